import re

import pytest
from wikitext import detokenize


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a two @-@ part , 1 @.@ 5 m , 3 @,@ 000 \n", "a two-part, 1.5 m, 3,000\n"),
        (" \n = Robert <unk> = \n \n Robert is \n", "\n= Robert <unk> =\n\nRobert is\n"),
        (" = = Career = = \n = = = 1990s = = = \n", " == Career ==\n=== 1990s ===\n"),
        (
            'role as " Craig " in " Teddy \'s Story " ( 2004 ; [ 1 ] )',
            'role as "Craig" in "Teddy\'s Story" (2004; [1])',
        ),
        ("the players ' union ' s ' {  } 's", "the players'union' s'{}'s"),
        ('one " two \n three " four " five', 'one "two\nthree" four " five'),
        ("at 45 ° N , why ? no ! so : yes ; . . .", "at 45°N, why? no! so: yes;. . ."),
        ("at 45 N st", "at 45 1 st"),
        ("", ""),
    ],
)
def test_by_hand(text, want):
    assert detokenize(text) == want


def test_pairs_against_a_regular_expression():
    text = "".join("(){}[]\"' a\n="[i * i * 7 % 12] + " " * (i % 3) for i in range(2000))
    text = text.replace("'", "")  # whose rules would meet
    want = text
    for first, last in ("()", "[]", "{}", '""'):
        first, last = re.escape(first), re.escape(last)
        want = re.sub(rf"({first})\s*([^{last}]*?)\s*({last})", r"\1\2\3", want)
    for equals in ("= = = =", "= = =", "= ="):
        want = want.replace(equals, equals.replace(" ", ""))
    assert detokenize(text) == want.replace(" \n", "\n").replace("\n ", "\n")
