import functools
import gzip
import hashlib
import http.server
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import requests
import tqdm
from conftest import call, write_shard

import fineweb
import tokenizer
from configurator import UserError
from dataloader import Windows, read_meta
from fineweb import Cursor, DataConfig
from metrics import bits_per_byte
from tokenizer import get_tokenizer, to_json

SCRIPT = str(Path(fineweb.__file__))
ENC = get_tokenizer("gpt2")
ALPHABET = [*"aZé中。か \n\t\u00a0',.!7½🙂_-\x1f", "  ", "\r\n", "'s", "e\u0301", "word", "another", "it's"]
ALPHABET += ["<|endoftext|>", "x" * 9, " " * 20, "end ", "end, "]
BIGGEST = 2500  # tokens that a batch of small data can have


def random_text(seed, length=200):
    return "".join(random.Random(seed).choices(ALPHABET, k=length))


def documents(count=60):
    return [random_text(seed, seed * 7 % 500) for seed in range(count)]  # the first is empty


def write_rows(path, texts):
    path.parent.mkdir(exist_ok=True)
    if path.suffix.lower() == ".parquet":
        table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, "string")})
        return pyarrow.parquet.write_table(table, path, row_group_size=7)
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def tokens_of(texts, enc=ENC):
    """The oracle: every document whole, after <|endoftext|>."""
    return [token for text in texts for token in (enc.eot_token, *enc.encode_ordinary(text))]


def words_of(texts):
    return sum(len(text.strip().split(" ")) for text in texts)


def read_shard(path):
    header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)
    assert header.tolist() == [20240520, 1, len(tokens), *[0] * 253]
    return tokens.tolist()


def read_split(out_dir, *splits):
    return [
        token for split in splits for path in sorted(out_dir.glob(f"*_{split}_*.bin")) for token in read_shard(path)
    ]


@pytest.fixture(autouse=True, scope="module")
def one_gigatoken():
    """Loading a vocabulary takes a tenth of a second: here once."""
    load = functools.lru_cache(lambda tokens, load=tokenizer.load_gigatoken: load(list(tokens)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "load_gigatoken", lambda tokens: load(tuple(tokens)))
        yield


def prepare(out_dir, **options):
    fineweb.prepare(DataConfig(out_dir=str(out_dir), **{"num_proc": 1, **options}))
    return json.loads((out_dir / "meta.json").read_text())


def contents(out_dir):
    return {path.name: path.read_bytes() for path in out_dir.iterdir()}


@pytest.fixture
def small(monkeypatch):
    """Small pieces, batches and blocks, so that small data has many."""
    for name, value in {"PIECE": 300, "BATCH": 500, "ROWS": 5, "BLOCK": 1000}.items():
        monkeypatch.setattr(fineweb, name, value)


# From texts to shards


@pytest.mark.parametrize("chunk", [17, 50, 250, 10_000])
def test_tokens_of_pieces_are_those_of_the_whole(monkeypatch, chunk):
    monkeypatch.setattr(fineweb, "PIECE", 200)
    for seed in range(100):
        text = random_text(seed, 1000)
        chunks = ((text[i : i + chunk], i == 0) for i in range(0, len(text), chunk))
        pieces = list(fineweb.cut_pieces(chunks, False))
        texts = [piece.text.decode() for piece in pieces]
        assert "".join(texts) == text
        assert all(len(text) < 600 for text in texts)
        assert len(pieces) > 2
        assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert sum(piece.words for piece in pieces) == words_of([text])
        assert [token for text in texts for token in ENC.encode_ordinary(text)] == ENC.encode_ordinary(text)


@pytest.mark.parametrize("first_val", [99, 2])
def test_batches_from_any_cursor_are_the_same(small, first_val):
    many = [random_text(seed, 30 * seed) for seed in range(20)]
    documents = [[random_text(2), *many, "", random_text(3)], [random_text(1)], [""], [random_text(4)] * 2]
    parts = [(split, lambda: ((t, i == 0) for d in documents for i, t in enumerate(d))) for split in ("train", "val")]
    for size in (1, 1000):
        config = DataConfig(files="a", shard_tokens=size)
        batches = list(fineweb.make_batches(config, parts, Cursor(), first_val))
        for i, (_, end) in enumerate(batches):
            assert list(fineweb.make_batches(config, parts, end, first_val)) == batches[i + 1 :]
        assert len(batches) > 10
        assert all(len(pieces) == 1 for pieces, _ in batches)  # each has one split


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet", "dataset"])
def test_every_kind_of_source(tmp_path, small, kind):
    texts, source, out = documents(), tmp_path / "source", tmp_path / "out"
    options = {"dataset": str(source)} if kind == "dataset" else {"files": f"{source}/**/*.*"}
    if kind == "txt":
        (source / "deep").mkdir(parents=True)
        for i, text in enumerate(texts):
            (source / "deep" / f"{i:03}.txt").write_bytes(text.encode())
    else:
        names = ("train-0.parquet", "train-1.parquet") if kind == "dataset" else (f"a.{kind}", f"b.{kind}")
        write_rows(source / names[0], texts[:33])
        write_rows(source / names[1], texts[33:])
    meta = prepare(out, shard_tokens=3000, val_shards=1, **options)
    val = read_split(out, "val")
    assert read_split(out, "val", "train") == tokens_of(texts)
    assert 3000 <= len(val) == meta["val_tokens"] < 3000 + BIGGEST
    assert meta["train_tokens"] == len(tokens_of(texts)) - len(val)
    assert meta["val_words"] + meta["train_words"] == words_of(texts)
    assert meta["val_bytes"] + meta["train_bytes"] == sum(len(text.encode()) for text in texts)
    assert meta["val_bytes"] == len(ENC.decode_bytes([token for token in val if token != ENC.eot_token]))
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    trains = [f"out_train_{i:06}.bin" for i in range(1, len(list(out.iterdir())) - 1)]
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", *trains, "out_val_000000.bin"]
    assert [*meta["shards"]["train"], *meta["shards"]["val"]] == [*trains, "out_val_000000.bin"]
    for name, [count, checksum] in (meta["shards"]["train"] | meta["shards"]["val"]).items():
        data = (out / name).read_bytes()[1024:]
        assert (count, checksum) == (len(data) // 2, zlib.crc32(data))
        assert 3000 <= count < 3000 + BIGGEST or name == trains[-1]


def test_join(tmp_path, small):
    rows = ["", " = Title = \n", "", " text without newline", "  \n", *documents(20)]
    text = "".join(row if row.endswith("\n") else row + "\n" for row in rows)
    write_rows(tmp_path / "source" / "train.parquet", rows)
    write_rows(tmp_path / "source" / "test.parquet", rows[:4])
    options = {"dataset": str(tmp_path / "source"), "join": True}
    meta = prepare(tmp_path / "out", val_split="test", **options)
    assert read_split(tmp_path / "out", "train") == tokens_of([text])
    assert read_split(tmp_path / "out", "val") == tokens_of(["\n = Title = \n\n text without newline\n"])
    assert meta["train_words"] == words_of([text])
    prepare(tmp_path / "out2", val_fraction=0.25, **options)
    cut = [text[: len(text) * 3 // 4], text[len(text) * 3 // 4 :]]
    assert read_split(tmp_path / "out2", "train", "val") == tokens_of(cut)
    (tmp_path / "a.txt").write_bytes(b"one")
    write_rows(tmp_path / "b.jsonl", ["two", "three\n"])
    prepare(tmp_path / "out3", files=f"{tmp_path}/?.*", join=True, val_fraction=0.5)
    assert read_split(tmp_path / "out3", "train", "val") == tokens_of(["one\ntwo", "\nthree\n"])


def test_wikitext(tmp_path, small, monkeypatch):
    """Rows as Hugging Face has them, with empty lines that are empty, are counted as the file's, whose are a space."""
    lines = [f' He said " word {i} , and then \n 1 @,@ 000 " . \n \n \n' for i in range(40)]
    text = "".join([" \n", " = Title = \n", " \n", *lines])
    rows = [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]
    write_rows(tmp_path / "source" / "train.parquet", rows)
    write_rows(tmp_path / "source" / "test.parquet", rows[:20])
    options = {"dataset": str(tmp_path / "source"), "join": True, "detokenize": "wikitext", "val_split": "test"}
    meta = prepare(tmp_path / "out", **options)
    plain = "\n= Title =\n\n" + "".join(f'He said "word {i}, and then\n1,000".\n\n\n' for i in range(40))
    assert read_split(tmp_path / "out", "train") == tokens_of([plain])
    assert meta["train_words"] == words_of([text])
    assert meta["train_bytes"] == len(plain.encode())
    assert meta["val_words"] == words_of(["\n".join(text.split("\n")[:20])])
    monkeypatch.setattr(fineweb, "WIKITEXT_PIECE", 300)  # more than one piece, as a larger file has
    assert prepare(tmp_path / "out2", **options)["train_words"] == words_of([text])


@pytest.mark.parametrize(("text", "want"), [
    ("a two @-@ part , 1 @.@ 5 m , 3 @,@ 000 \n", "a two-part, 1.5 m, 3,000\n"),
    (" \n = Robert <unk> = \n \n Robert is \n", "\n= Robert <unk> =\n\nRobert is\n"),
    (" = = Career = = \n = = = 1990s = = = \n", " == Career ==\n=== 1990s ===\n"),
    ('role as " Craig " in " Teddy \'s Story " ( 2004 ; [ 1 ] )', 'role as "Craig" in "Teddy\'s Story" (2004; [1])'),
    ("the players ' union ' s ' {  } 's", "the players'union' s'{}'s"),
    ('one " two \n three " four " five', 'one "two\nthree" four " five'),
    ("at 45 ° N , why ? no ! so : yes ; . . .", "at 45°N, why? no! so: yes;. . ."),
    ("at 45 N st", "at 45 1 st"), ("", ""),
])  # fmt: skip
def test_detokenize(text, want):
    assert fineweb.detokenize(text) == want


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_single_document_is_cut(tmp_path, small, kind):
    """Also one that is read in several blocks, whose borders characters straddle."""
    text = random_text(0, 3000)
    write_rows(tmp_path / f"a.{kind}", [text])
    if kind == "txt":
        (tmp_path / "a.txt").write_bytes(text.encode())
    meta = prepare(tmp_path / "out", files=f"{tmp_path}/a.{kind}", val_fraction=0.3)
    at = int(Fraction(7, 10) * len(text))
    assert read_split(tmp_path / "out", "train", "val") == tokens_of([text[:at], text[at:]])
    assert meta["train_tokens"] == len(tokens_of([text[:at]]))
    assert (meta["train_words"], meta["val_words"]) == (words_of([text[:at]]), words_of([text[at:]]))


def test_val_shards_and_splits(tmp_path, small):
    texts = documents()
    write_rows(tmp_path / "source" / "train.parquet", texts[:30])
    write_rows(tmp_path / "source" / "test.parquet", texts[30:])
    prepare(tmp_path / "out", val_shards=2, shard_tokens=2000, dataset=str(tmp_path / "source"), split="train+test")
    assert 4000 <= len(read_split(tmp_path / "out", "val")) < 4000 + 2 * BIGGEST
    assert read_split(tmp_path / "out", "val", "train") == tokens_of(texts)
    assert [(tmp_path / "out" / f"out_train_00000{i}.bin").exists() for i in (1, 2)] == [False, True]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_val_fraction(tmp_path, small, kind, seed):
    """The last documents or, with a seed, those that a hash of the document's number draws."""
    texts, split = documents(), {"train": [], "val": []}
    for i in range(3):
        write_rows(tmp_path / f"{i}.{kind}", texts[i * 20 : i * 20 + 20])
    for number, text in enumerate(texts):
        digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
        is_val = number >= 42 if seed is None else int.from_bytes(digest) / 2**64 < 0.3
        split["val" if is_val else "train"].append(text)
    options = {"files": f"{tmp_path}/*.{kind}", "val_fraction": 0.3, "val_seed": seed, "shard_tokens": 2000}
    meta = prepare(tmp_path / "out", **options)
    for name, own in split.items():
        assert read_split(tmp_path / "out", name) == tokens_of(own)
        assert meta[f"{name}_tokens"] == len(tokens_of(own))
        assert meta[f"{name}_words"] == words_of(own)
    assert 3 < len(meta["shards"]["train"]) < 10


def test_own_tokenizer_goes_with_the_shards(tmp_path):
    (tmp_path / "own.json").write_text(to_json("bytes"))
    (tmp_path / "own2.json").write_text(to_json("bytes") + " ")
    write_rows(tmp_path / "a.jsonl", documents())
    options = {"files": f"{tmp_path}/a.jsonl", "val_fraction": 0.5}
    meta = prepare(tmp_path / "out", tokenizer=str(tmp_path / "own.json"), **options)
    assert meta["tokenizer"] == "tokenizer.json"
    enc = get_tokenizer(str(tmp_path / "out" / "tokenizer.json"))
    assert read_split(tmp_path / "out", "train") == tokens_of(documents()[:30], enc)
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "own2.json", tmp_path / "two" / "tokenizer.json")
    with pytest.raises(UserError, match="is another tokenizer; move it away"):
        prepare(tmp_path / "two", tokenizer=str(tmp_path / "own.json"), **options)


@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_odd_parquet_files(tmp_path, small, kind):
    """A column encoded by a dictionary, as pandas writes its categories, nulls, and files without rows."""
    texts, source = ["one", "two", "", "one"] * 5, tmp_path / "source"
    where = {kind: {"files": f"{source}/*", "dataset": str(source)}[kind]}
    write_rows(source / "train-0.parquet", [])
    with pytest.raises(UserError, match="no documents"):
        prepare(tmp_path / "out", **where)
    column = pyarrow.array([text or None for text in texts]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(20)), "text": column}), source / "train-1.parquet")
    write_rows(source / "train-2.parquet", [])
    if kind == "dataset":  # whose files must have the same columns
        (source / "train-0.parquet").unlink()
        (source / "train-2.parquet").unlink()
    prepare(tmp_path / "out", val_fraction=0.25, **where)
    assert read_split(tmp_path / "out", "train") == tokens_of(texts[:15])
    assert read_split(tmp_path / "out", "val") == tokens_of(texts[15:])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["jsonl", "txt", "dataset", "joined", "by chance"])
def test_stopped_anywhere_and_resumed_is_the_same(tmp_path, small, monkeypatch, kind):
    texts, source = documents(30), tmp_path / "source"
    options = {"files": f"{source}/*", "shard_tokens": 900, "tokenizer": "bytes"}
    if kind == "txt":
        source.mkdir()
        (source / "a.txt").write_bytes("".join(texts).encode())
        (source / "b.txt").write_bytes("\n".join(texts).encode())
    elif kind == "jsonl":
        write_rows(source / "a.jsonl", texts)
        options["val_shards"] = 3
    else:
        write_rows(source / "train-0.parquet", texts[:13])
        write_rows(source / "train-1.parquet", texts[13:])
        options = {**options, "files": None, "dataset": str(source), "val_fraction": 0.4, "join": kind == "joined"}
        options["val_seed"] = 3 if kind == "by chance" else None
    prepare(tmp_path / "straight" / "out", **options)
    real, left, deaths, out = os.replace, 0, 0, tmp_path / "killed" / "out"

    def replace(*args):  # dies before or after a file appears
        nonlocal left
        for call_it in (lambda: None, lambda: real(*args)):
            call_it()
            left -= 1
            if left == 0:
                raise Killed

    monkeypatch.setattr(os, "replace", replace)
    while not (out / "meta.json").exists():
        left = 3 + deaths % 7
        try:
            prepare(out, **options)
        except Killed:
            deaths += 1
            assert deaths < 100
    assert deaths > 3
    straight = contents(tmp_path / "straight" / "out")
    assert len(straight) > 5
    assert {k: v for k, v in contents(out).items() if k != "progress.json"} == straight


def killed(monkeypatch, out_dir, **options):
    """A preparation that dies before its meta.json."""
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "finish", raise_killed)
        with pytest.raises(Killed):
            prepare(out_dir, **options)


def start_until(shards, out_dir, options):
    """A preparation in a process of its own, once it has written that many shards."""
    command = [sys.executable, SCRIPT, "--num_proc=2", *options]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True)
    while process.poll() is None and len(list(out_dir.glob("*.bin"))) < shards:
        time.sleep(0.002)
    return process


def raise_killed(*_, **__):
    raise Killed


def test_killed_processes_and_two_at_once(tmp_path):
    """A killed process leaves what the next goes on with. A second is refused, and an interrupt is one line."""
    write_rows(tmp_path / "a.jsonl", documents() * 60)
    options = [f"--files={tmp_path}/a.jsonl", "--shard_tokens=20000"]
    assert call("fineweb.py", *options, f"--out_dir={tmp_path}/straight/out", "--num_proc=1").returncode == 0
    out = tmp_path / "killed" / "out"
    options.append(f"--out_dir={out}")
    process = start_until(1, out, options)
    os.killpg(process.pid, signal.SIGSTOP)
    second = call("fineweb.py", *options, "--num_proc=1")
    assert second.returncode == 2
    assert "another process" in second.stderr
    with pytest.raises(UserError, match="not finished"):
        read_meta(str(out))
    process.kill()
    process.communicate(timeout=20)
    process = start_until(4, out, options)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert [line for line in error.splitlines() if "tok" not in line] == ["interrupted; run the same command to go on"]
    assert call("fineweb.py", *options, "--num_proc=1").returncode == 0
    assert contents(out) == contents(tmp_path / "straight" / "out")
    assert "complete" in call("fineweb.py", *options).stdout


# What a user gets wrong


@pytest.fixture
def texts(tmp_path):
    """A folder of texts as users have them."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write_rows(folder / "train.parquet", documents(5))
    for name, content in {
        "a.txt": b"one two", "b.txt": b"four five", "latin.txt": b"caf\xe9 au lait", "cut.jsonl.gz": b"\x1f\x8b",
        "broken.jsonl": b'{"text": "a"}\n{"text": \n', "number.jsonl": b'{"text": 1}\n', "list.jsonl": b"[1]\n",
        "deep.jsonl": b"[" * 100_000, "broken.parquet": b"PAR1 not really", "page.txt": b"\n<!DOCTYPE html><html>",
        "lfs.txt": b"version https://git-lfs.github.com/spec/v1\n", "rows.txt": b'{"text": "a"}\n', "x.json": b"[]",
        "lfs.parquet": b"version https://git-lfs.github.com/spec/v1\n", "x.CSV": b"text\na\n",
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], ["text", "text"]), folder / "twice.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a" * 99, "b" * 99]}), folder / "flipped.parquet",
        compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True,
    )  # fmt: skip
    flipped = (folder / "flipped.parquet").read_bytes()
    (folder / "flipped.parquet").write_bytes(flipped.replace(b"bbb", b"cbb", 1))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x_train_000001.bin").touch()
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": "{}/nothere/*"}, "no file"),
        ({"files": "{}"}, r"is a folder; .*/texts/\*\*/\*.txt"),
        ({"files": "{}/latin.txt"}, "latin.txt, after 0 documents: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        ({"files": "{}/page.txt"}, "page.txt: a web page"),
        ({"files": "{}/lfs.txt"}, "lfs.txt: a pointer of Git LFS"),
        ({"files": "{}/lfs.parquet"}, "lfs.parquet: a pointer of Git LFS"),
        ({"files": "{}/rows.txt"}, "rows.txt: JSON, not text"),
        ({"files": "{}/x.*"}, r"x.CSV: .CSV is not read; make it .jsonl .*--exclude='\*.CSV'"),
        ({"files": "{}/*.json"}, "x.json: .json is not read"),
        ({"files": "{}/broken.jsonl"}, "broken.jsonl, after 1 documents: Expecting value"),
        ({"files": "{}/number.jsonl"}, "int, not text .*text_column"),
        ({"files": "{}/list.jsonl"}, "list.jsonl.*not an object with 'text'"),
        ({"files": "{}/deep.jsonl"}, "deep.jsonl.*recursion"),
        ({"files": "{}/cut.jsonl.gz"}, "cut.jsonl.gz"),
        ({"files": "{}/broken.parquet"}, "broken.parquet"),
        ({"files": "{}/twice.parquet"}, "column 'text'"),
        ({"files": "{}/flipped.parquet"}, "flipped.parquet.*CRC"),
        ({"files": "{}/train.parquet", "text_column": "txt"}, "did you mean text"),
        ({"files": "{}/train.parquet", "text_column": "id"}, "int, not text"),
        ({"files": "{}/train.parquet", "val_shards": 1}, "no text is left for train.*delete .*out, then use --val_fr"),
        ({"files": "{}/train.parquet", "val_fraction": 0.99}, "no text is left for train: val_fraction=0.99 of 5 doc"),
        ({"files": "{}/train.parquet", "tokenizer": "gtp2"}, "did you mean gpt2"),
        ({"files": "{}/train.parquet", "out_dir": "{}/../foreign"}, "was not made by this program"),
        ({"files": "{}/[ab].txt", "exclude": "*/c*"}, r"--exclude=\*/c\* matches none of 2 files"),
        ({"files": "{}/[ab].txt", "exclude": "*"}, "no file there that --exclude leaves"),
        ({"files": "{}/[ab].txt", "separator": "---"}, "--separator=--- is in none of the text files"),
        ({"dataset": "{}", "split": "nothere"}, "--dataset=.*nothere"),
        ({"url": "nothere"}, "--url=nothere"),
        ({"shards": "{}"}, "its shards train as they are: --data_dir="),
        ({"files": "a", "url": "b"}, "files and url exclude each other"),
        ({"files": "a", "val_split": "test"}, "val_split does not go with files"),
        ({"shards": "a", "val_fraction": 0.0}, "val_fraction does not go with shards"),
        ({"val_fraction": 1.0}, "val_fraction must be"),
        ({"val_seed": 1}, "val_seed needs val_fraction"),
        ({"val_seed": 1, "val_fraction": 0.1, "join": True}, "one document"),
        ({"shard_tokens": 0}, "shard_tokens"),
        ({"files": ""}, "an option is empty"),
    ],
)
def test_mistakes(texts, tmp_path, options, message):
    options = {name: value.format(texts) if isinstance(value, str) else value for name, value in options.items()}
    out_dir = Path(options.pop("out_dir", tmp_path / "out"))
    if "dataset" in options:
        for path in texts.glob("[!t]*"):
            path.unlink()
    with pytest.raises((UserError, ValueError), match=message) as error:
        prepare(out_dir, **options)
    assert "\n" not in str(error.value)
    if "delete" not in message:
        assert out_dir.name == "foreign" or not out_dir.exists() or not list(out_dir.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separator": "---"}, "separator goes with --files or --url, not with --dataset"),
        ({"dataset": "a", "exclude": "*b"}, "exclude goes with --files or --shards, not with --dataset"),
        ({"url": "a", "exclude": "*b"}, "exclude goes with --files or --shards, not with --url"),
        ({"files": "a", "split": "test"}, "split goes with --dataset, not with --files"),
    ],
)
def test_an_option_of_another_source_is_not_ignored(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_what_files_takes(tmp_path, monkeypatch):
    """Brackets, endings in upper case, a loop of links, a folder that cannot be read, a name that is not UTF-8."""
    folder = tmp_path / "data [v2]"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    write_rows(folder / "deep" / "b.jsonl", ["two", None])
    (folder / "deep" / "b.jsonl").rename(folder / "deep" / "b.JSONL")
    write_rows(folder / "c.parquet", [None, "three"])
    (folder / "d.ndjson").write_text('{"text": null}')
    (folder / "c.parquet").rename(folder / "c.PARQUET")
    (folder / "loop").symlink_to(folder)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt")).write_text("four")
    everything = {"files": f"{folder}/**/*", "val_shards": 1, "shard_tokens": 1}
    prepare(tmp_path / "out", **everything)
    tokens = read_split(tmp_path / "out", "val", "train")
    assert tokens == tokens_of(["one", "", "three", "", "two", "", "four"])  # a null is an empty document
    prepare(tmp_path / "one", files=f"{folder}/a.txt", val_fraction=0)
    assert read_split(tmp_path / "one", "train") == tokens_of(["one"])
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "deep" not in path and access(path, mode))
    with pytest.raises(UserError, match="deep/: this folder cannot be read"):
        prepare(tmp_path / "two", **everything)
    prepare(tmp_path / "two", **everything, exclude="*/deep/*")


def test_separator(tmp_path, small):
    r"""\n in it is a line end, and a text between two of them is streamed."""
    long = random_text(1, 5000)
    (tmp_path / "a.txt").write_bytes(f"one two\n---\n{long}\n---\nfour\n---\n".encode())
    prepare(tmp_path / "out", files=f"{tmp_path}/a.txt", separator=r"\n---\n", val_fraction=0.34)
    assert read_split(tmp_path / "out", "train") == tokens_of(["one two"])
    assert read_split(tmp_path / "out", "val") == tokens_of([long, "four"])
    found = [(text, begins) for text, begins in fineweb.read_separated(str(tmp_path / "a.txt"), "\n---\n")]
    assert max(len(text) for text, _ in found) < 1100


def test_no_validation(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", ["one", "two"])
    meta = prepare(tmp_path / "my out", files=f"{tmp_path}/a.jsonl", val_fraction=0)
    assert (meta["train_tokens"], meta["val_tokens"], meta["shards"]["val"]) == (4, 0, {})
    data_dir = shlex.quote(f"--data_dir={tmp_path}/my out")
    command = f"python train_gpt2.py config/small.py {data_dir} '--out_dir=out/my out' --val_interval=0"
    assert f"next: {command}  # or another config" in capsys.readouterr().out


# What must not be lost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mended", None),
        ("left out", None),
        ("read before", "the files that .* was made of are not the same any more"),
        ("text before", "file 3 of the source has other text where it was read before"),
    ],
)
def test_a_bad_file_in_the_middle_costs_no_hours(tmp_path, small, monkeypatch, change, message):
    source, out = tmp_path / "source", tmp_path / "out"
    texts = [documents(40)[1 + 9 * n : 10 + 9 * n] for n in range(4)]
    for name, own in zip("abcd", texts, strict=True):
        write_rows(source / f"{name}.jsonl", own)
    lines = (source / "c.jsonl").read_bytes().splitlines(keepends=True)
    (source / "c.jsonl").write_bytes(b"".join(lines[:7]) + b"not json\n")
    options = {"files": f"{source}/*", "shard_tokens": 500, "val_shards": 1}
    with pytest.raises(UserError, match=r"c\.jsonl, after 7 documents: .*--exclude.* run the same command"):
        prepare(out, **options)
    assert json.loads((out / "progress.json").read_text())["cursor"][0] == 2  # within it
    done, want = read_split(out, "val", "train"), tokens_of([text for own in texts for text in own])
    assert done == want[: len(done)]

    monkeypatch.chdir(source)
    options["files"] = "./*"  # the same files by other names
    (source / "c.jsonl").write_bytes(b"".join(lines))
    if change == "left out":
        options["exclude"] = "*c.jsonl"
        want = done + tokens_of(texts[3])  # what is in shards stays there
    elif change == "read before":
        os.utime(source / "a.jsonl", (1, 1))
    elif change == "text before":
        (source / "c.jsonl").write_bytes(b"".join([lines[1], *lines[1:]]))
    if message:
        with pytest.raises(UserError, match=message):
            prepare(out, **options)
        return
    # Killed once more before the next shard is whole.
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_shards", raise_killed)
        with pytest.raises(Killed):
            prepare(out, **options)
    prepare(out, **options)
    assert read_split(out, "val", "train") == want


def test_a_damaged_parquet_file_that_is_left_out_counts_no_more(tmp_path, small):
    texts = documents(60)
    for number, name in enumerate("abc"):
        table = pyarrow.table({"text": texts[20 * number :][:20]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", write_page_checksum=True)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes().replace(b"word", b"Word", 1))
    options = {"files": f"{tmp_path}/*.parquet", "shard_tokens": 100, "val_fraction": 0.5}
    with pytest.raises(UserError, match=r"b\.parquet, after 0 documents: .*--exclude"):
        prepare(tmp_path / "out", **options)
    prepare(tmp_path / "out", **options, exclude="*b.parquet")
    assert read_split(tmp_path / "out", "train") == tokens_of(texts[:20])
    assert read_split(tmp_path / "out", "val") == tokens_of(texts[40:])


def test_a_source_that_changes(tmp_path, monkeypatch):
    """While it is read, and after the end."""
    write_rows(tmp_path / "a.jsonl", documents())
    options = {"files": f"{tmp_path}/a.jsonl"}
    write = fineweb.write_shards

    def change_and_write(*args):
        os.utime(tmp_path / "a.jsonl", (1, 1))
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_shards", change_and_write)
        with pytest.raises(UserError, match=r"a\.jsonl changed while it was read; delete .*out, then"):
            prepare(tmp_path / "out", **options)
    with pytest.raises(UserError, match="not finished"):
        read_meta(str(tmp_path / "out"))
    meta = prepare(tmp_path / "two", **options)
    assert prepare(tmp_path / "two", **options) == meta  # it is complete
    with pytest.raises(UserError, match="tokenizer=gpt2, not bytes"):
        prepare(tmp_path / "two", tokenizer="bytes", **options)
    os.utime(tmp_path / "a.jsonl", (2, 2))
    with pytest.raises(UserError, match="two was made of are not the same any more"):
        prepare(tmp_path / "two", **options)
    (tmp_path / "a.jsonl").unlink()
    assert prepare(tmp_path / "two", **options) == meta


@pytest.mark.parametrize("name", ["meta.json", "progress.json"])
@pytest.mark.parametrize("content", [b"", b"\xff", b"null", b"[]", b"{}", b'{"settings": 1}', b'{"shards": []}'])
def test_a_damaged_state_is_a_line(tmp_path, name, content):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        prepare(tmp_path / "out", files=f"{tmp_path}/a.txt")
    assert (tmp_path / "out" / name).read_bytes() == content


def test_what_others_wrote_stays(tmp_path, small, monkeypatch):
    write_rows(tmp_path / "a.jsonl", documents())
    options, out = {"files": f"{tmp_path}/a.jsonl", "shard_tokens": 1000}, tmp_path / "out"
    killed(monkeypatch, out, **options)
    theirs = {"mine_train_000077.bin": b"a", "download.txt": b"b", "tokenizer.json": b"c", ".a.b.partial": b"d"}
    for name, content in theirs.items():
        (out / name).write_bytes(content)
    prepare(out, **options)
    assert {name: (out / name).read_bytes() for name in theirs} == theirs


# Hugging Face, which the tests do not reach


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in with llm.c's shards, also in a subfolder, as the data set some/shards."""
    (tmp_path / "hub" / "deep").mkdir(parents=True)
    write_shard(tmp_path / "hub" / "tiny_shakespeare_val.bin", tokens_of(["A text."]))
    write_shard(tmp_path / "hub" / "deep" / "x_train_000001.bin", tokens_of(["Words."]))
    write_shard(tmp_path / "hub" / "deep" / "x_train_000002.bin", tokens_of(["More words."]))

    def snapshot_download(repo, *, repo_type, local_dir, allow_patterns, ignore_patterns):
        assert (repo, repo_type, allow_patterns) == ("some/shards", "dataset", "*.bin")
        shutil.copytree(
            tmp_path / "hub", local_dir, ignore=shutil.ignore_patterns(*ignore_patterns), dirs_exist_ok=True
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(requests, "head", lambda *args, **kwargs: None)
    return tmp_path / "hub"


def test_shards_of_others(hub, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "download").mkdir(parents=True)
    killed(monkeypatch, out, shards="some/shards", exclude="*2.bin")
    (out / "mine.bin").touch()
    meta = prepare(out, shards="some/shards", exclude="*2.bin")
    names = {"meta.json", "download", "mine.bin", "x_train_000001.bin", "tiny_shakespeare_val.bin"}
    assert {path.name for path in out.iterdir()} == names
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(tokens_of(["Words."])), len(tokens_of(["A text."])))
    assert len(Windows(str(out), "val", 2)) == 1
    assert bits_per_byte(1.0, meta) is None  # nobody knows their text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([20240801, 7, 1], "<i4").tobytes() + bytes(1016), "32-bit ids; this program has 16"),
        (b"short", "not a token shard"),
    ],
)
def test_shards_that_are_none(hub, tmp_path, content, message):
    (hub / "y_train_000001.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", shards="some/shards")


def test_shards_with_one_name(hub, tmp_path):
    shutil.copy(hub / "deep" / "x_train_000001.bin", hub)
    with pytest.raises(UserError, match=r"several shards are called x_train_000001\.bin"):
        prepare(tmp_path / "out", shards="some/shards")


def test_no_network_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for source in ("--dataset=some/words", "--shards=some/words"):
        start = time.monotonic()
        done = call("fineweb.py", source, f"--out_dir={tmp_path / 'out'}")
        assert time.monotonic() - start < 1
        assert done.returncode == 2
        told, error = done.stderr.splitlines()
        assert told == "looking up some/words on Hugging Face"
        assert "cannot be reached" in error


@pytest.mark.parametrize("rows", [100, 30])
def test_val_fraction_counts_and_believes_no_readme(tmp_path, small, rows):
    source, texts = tmp_path / "source", [f"document {i}" for i in range(rows)]
    write_rows(source / "train.parquet", texts)
    split = "{name: train, num_bytes: 9, num_examples: 1000}"
    info = (
        f"dataset_info:\n  features: [{{name: id, dtype: int64}}, {{name: text, dtype: string}}]\n  splits: [{split}]"
    )
    (source / "README.md").write_text(f"---\n{info}\n---\n")
    prepare(tmp_path / "out", dataset=str(source), val_fraction=0.2)
    assert read_split(tmp_path / "out", "val") == tokens_of(texts[rows * 4 // 5 :])


def test_counting_what_is_far_away_is_told(capsys):
    config = DataConfig(dataset="some/words", val_fraction=0.5)
    assert fineweb.find_val(config, [("train", lambda: iter([("a", True)] * 4))], None) == (4, 2, 0)
    assert "downloads everything twice; --val_seed=1" in capsys.readouterr().err


# The machine


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (ModuleNotFoundError("No module named 'datasets'"), "No module named 'datasets'"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_errors_of_the_system_are_one_line(tmp_path, monkeypatch, error, message):
    (tmp_path / "a.txt").write_text("one two")

    def fail(*_):
        raise error

    monkeypatch.setattr(fineweb.ThreadPoolExecutor, "submit", fail)
    done = call("fineweb.py", f"--files={tmp_path}/a.txt", f"--out_dir={tmp_path}/out", "--tokenizer=bytes")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_local_data_needs_no_cache_and_a_wrong_timeout_is_a_line(tmp_path):
    write_rows(tmp_path / "source" / "train.parquet", documents(5))
    (tmp_path / "file").touch()
    command = [sys.executable, SCRIPT, f"--dataset={tmp_path}/source", "--tokenizer=bytes", "--val_fraction=0.5"]
    for env, status in (({"HF_HOME": f"{tmp_path}/file/x"}, 0), ({"HF_HUB_DOWNLOAD_TIMEOUT": "soon"}, 2)):
        out = f"--out_dir={tmp_path}/{status}"
        done = subprocess.run([*command, out], env={**os.environ, **env}, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    assert (done.stdout + done.stderr).count("\n") == 1
    assert "HF_HUB_DOWNLOAD_TIMEOUT=soon: it must be a number" in done.stdout + done.stderr


def test_a_missing_tokenizer_names_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(SCRIPT).parent)
    for config, size in (("dutch", 52000), ("tinystories", 8192)):
        done = call("fineweb.py", f"config/data/{config}.py", f"--out_dir={tmp_path / 'out'}")
        assert done.returncode == 2
        assert "learn it first: python tokenizer.py --dataset=" in done.stderr
        assert f"--vocab_size={size} --out={config}.json" in done.stderr
    done = call("fineweb.py", "--files=a", "--tokenizer=mine.json", f"--out_dir={tmp_path / 'out'}")
    assert "learn it first: python tokenizer.py --files=YOUR_TEXTS --out=mine.json" in done.stderr


def test_url(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "input.txt").write_text("one two three four")
    (tmp_path / "www" / "page").write_text("<html>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        prepare(tmp_path / "out", url=f"{url}/input.txt", tokenizer="bytes", val_fraction=0.5)
        for name, message in (("nothere.txt", "404"), ("page", "a web page, not text")):
            with pytest.raises(UserError, match=message):
                prepare(tmp_path / "out2", url=f"{url}/{name}")
            assert not list((tmp_path / "out2").iterdir())
        server.shutdown()
    assert read_split(tmp_path / "out", "train") == [256, *b"one two t"]
    assert read_split(tmp_path / "out", "val") == [256, *b"hree four"]


@pytest.mark.parametrize(
    ("kind", "rule", "is_known"),
    [("txt", "val_shards", True), ("jsonl", "val_shards", False), ("jsonl", "val_fraction", True)],
)
def test_the_progress_bar_knows_the_end_if_the_size_is_known(tmp_path, small, monkeypatch, kind, rule, is_known):
    texts, totals = ["word " * 50] * 100, []
    write_rows(tmp_path / f"a.{kind}", texts)
    if kind == "txt":
        (tmp_path / "a.txt").write_text("".join(texts))

    class Bar(tqdm.tqdm):
        def update(self, count):
            totals.append(self.total)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    options = {"files": f"{tmp_path}/a.{kind}", "shard_tokens": 1000, "tokenizer": "bytes"}
    meta = prepare(tmp_path / "out", **options, **{rule: 1 if rule == "val_shards" else 0.5})
    tokens = meta["train_tokens"] + meta["val_tokens"]
    assert totals[5] == (pytest.approx(tokens, rel=0.01) if is_known else None)
