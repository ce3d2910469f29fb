"""WikiText's text as people write it: the rules of NVIDIA's Megatron-LM, which most published numbers go by.

The data set comes in words with spaces between them (`" a two @-@ part episode , 1 @.@ 5 m "`), which GPT-2 has never
seen. Word-level perplexity is per word of that original all the same, so that it compares across tokenizers.
"""

import re


def add_spaces(text: str) -> str:
    """The text with a space in each empty line, as the original files have it and Hugging Face's rows do not."""
    return re.sub(r"\n(?=\n)", "\n ", text)


def detokenize(text: str) -> str:
    """The text without the spaces that WikiText put in. Quotes and brackets are taken in pairs, one behind the other
    through all of `text`, lines and all, so that a lone one changes what follows it."""
    text = text.replace("s '", "s'")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for first, last in ("()", "[]", "{}", '""', "''"):
        text = strip_inside(text, first, last)
    for level in (4, 3, 2):  # headings
        text = text.replace(" ".join("=" * level), "=" * level)
    text = text.replace(" ° ", "°").replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")  # N is what other data sets make of a number


def strip_inside(text: str, first: str, last: str) -> str:
    """Without white space behind `first` and before the next `last`: `( a ) b` -> `(a) b`."""
    parts, done = [], 0
    while (start := text.find(first, done)) >= 0 and (end := text.find(last, start + 1)) >= 0:
        parts += [text[done:start], first, text[start + 1 : end].strip(), last]
        done = end + 1
    return "".join(parts) + text[done:]
