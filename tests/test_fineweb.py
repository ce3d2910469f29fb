import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sources
from conftest import call
from preparation import CONFIGS, COUNTS, train_command
from shards import find_parts

import fineweb
import tokenizer
from configurator import UserError, configure
from dataloader import read_meta
from files import lock_folder
from fineweb import NEVER, Cursor, DataConfig, own_source
from model import GPTConfig
from tokenizer import byte_alphabet, get_tokenizer
from train_gpt2 import TrainConfig

SCRIPT = str(Path(fineweb.__file__))
ENC = get_tokenizer("gpt2")
ALPHABET = [
    *"aZé中。か \n\t\u00a0',.!7½🙂_-\x1f",
    "  ",
    "\r\n",
    "'s",
    "e\u0301",
    "word",
    "another",
    "it's",
    "<|endoftext|>",
]
ALPHABET += ["x" * 9, " " * 20, "end ", "end, "]
BIGGEST = 2500  # tokens that a batch of small data can have


def random_text(seed, length=200):
    return "".join(random.Random(seed).choices(ALPHABET, k=length))


def documents(count=60):
    return [random_text(seed, seed * 7 % 500) for seed in range(count)]  # the first is empty


def write_rows(path, texts):
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def tokens_of(texts, enc=ENC):
    """The oracle: every document whole, after <|endoftext|>."""
    return [token for text in texts for token in (enc.eot_token, *enc.encode_ordinary(text))]


def words_of(texts):
    return sum(len(text.strip().split(" ")) for text in texts)


def read_shard(path):
    header = np.fromfile(path, dtype="<i4", count=256)
    tokens = np.fromfile(path, dtype="<u2", offset=1024)
    assert header[:3].tolist() == [20240520, 1, len(tokens)]
    assert not header[3:].any()
    return tokens.tolist()


def read_split(out_dir, split):
    return [token for path in sorted(out_dir.glob(f"*_{split}_*.bin")) for token in read_shard(path)]


@pytest.fixture(autouse=True, scope="module")
def one_gigatoken():
    """Loading a vocabulary takes a tenth of a second: here once."""
    loaded = {}

    def load(tokens, load=tokenizer.load_gigatoken):
        key = b" ".join(tokens)
        if key not in loaded:
            loaded[key] = load(tokens)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "load_gigatoken", load)
        yield


def checksums(out_dir, names):
    data = {name: (out_dir / name).read_bytes()[1024:] for name in names}
    return {name: [len(tokens) // 2, zlib.crc32(tokens)] for name, tokens in data.items()}


def prepare(out_dir, **options):
    fineweb.prepare(DataConfig(out_dir=str(out_dir), **{"num_proc": 1, **options}))
    return json.loads((out_dir / "meta.json").read_text())


def contents(out_dir):
    return {path.name: path.read_bytes() for path in out_dir.iterdir()}


@pytest.fixture
def small(monkeypatch):
    """Small pieces, batches and blocks, so that small data has many."""
    monkeypatch.setattr(fineweb, "PIECE", 300)
    monkeypatch.setattr(fineweb, "BATCH", 500)
    monkeypatch.setattr(sources, "ROWS", 5)
    monkeypatch.setattr(sources, "BLOCK", 1000)


# Pieces


def cut(*documents):
    """The pieces of documents that come in several texts."""
    texts = [("train", text, i == 0) for document in documents for i, text in enumerate(document)]
    return [piece for _, piece in fineweb.cut_pieces(iter(texts), False)]


@pytest.mark.parametrize("chunk", [17, 50, 250, 10_000])
def test_tokens_of_pieces_are_those_of_the_whole(monkeypatch, chunk):
    monkeypatch.setattr(fineweb, "PIECE", 200)
    for seed in range(100):
        text = random_text(seed, 1000)
        pieces = cut([text[i : i + chunk] for i in range(0, len(text), chunk)])
        texts = [piece.text.decode() for piece in pieces]
        assert "".join(texts) == text
        assert all(len(text) < 600 for text in texts)
        assert len(pieces) > 2
        assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert sum(piece.words for piece in pieces) == words_of([text])
        assert [token for text in texts for token in ENC.encode_ordinary(text)] == ENC.encode_ordinary(text)


@pytest.mark.parametrize("cut", [NEVER, (2, 0), (2, 1300), (2, 601), (0, 0)])
def test_batches_from_any_cursor_are_the_same(small, cut):
    many = [random_text(seed, 30 * seed) for seed in range(20)]
    documents = [[""], [random_text(1)], [random_text(2), *many, "", random_text(3)], [""], [random_text(4)] * 2]

    def read():
        return ((text, i == 0) for document in documents for i, text in enumerate(document))

    source = sources.Source([sources.Part(split, read) for split in ("train", "train", "val")], 10, None, "")
    for size in (1, 1000):
        batches = list(fineweb.make_batches(source, Cursor(), cut, size, False))
        for i, batch in enumerate(batches):
            assert list(fineweb.make_batches(source, batch.end, cut, size, False)) == batches[i + 1 :]
        assert len(batches) > 10
        splits = [split for batch in batches for split in batch.pieces]
        assert len(splits) == len(batches)  # each has one
        assert {splits[i] for i, batch in enumerate(batches) if batch.is_last} == {*splits}


def test_a_text_without_a_safe_place_is_still_cut(small):
    texts = [piece.text for piece in cut([" " * 1000, " " * 500])]
    assert b"".join(texts) == b" " * 1500
    assert max(map(len, texts)) < 900


def test_words_and_bytes_of_any_text(monkeypatch):
    monkeypatch.setattr(fineweb, "PIECE", 50)
    for seed in range(300):
        text = "".join(random.Random(seed).choices([" ", "\n", "a", "é", "\u2003", "b, "], k=seed % 40))
        pieces = cut([text])
        assert sum(piece.words for piece in pieces) == words_of([text])
        assert sum(len(piece.text) for piece in pieces) == len(text.encode())


# Sources


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet", "dataset"])
def test_every_kind_of_source(tmp_path, small, kind):
    texts = documents()
    source = tmp_path / "source"
    source.mkdir()
    options = {"files": f"{source}/**/*", "val_shards": 1}
    if kind == "txt":
        for i, text in enumerate(texts):
            (source / f"{i:03}.txt").write_bytes(text.encode())
    elif kind == "dataset":
        for i in range(3):
            write_rows(source / f"train-{i}.parquet", texts[i * 20 : i * 20 + 20])
        options = {"dataset": str(source)}
    else:
        write_rows(source / f"0.{kind}", texts[:33])
        (source / "deep").mkdir()
        write_rows(source / "deep" / f"1.{kind}", texts[33:])
        texts = texts[:33] + texts[33:]  # "0..." sorts before "deep"
    meta = prepare(tmp_path / "out", shard_tokens=3000, **options)
    val, train = read_split(tmp_path / "out", "val"), read_split(tmp_path / "out", "train")
    assert val + train == tokens_of(texts)
    assert 3000 <= len(val) == meta["val_tokens"] < 3000 + BIGGEST
    assert len(train) == meta["train_tokens"]
    assert meta["val_words"] + meta["train_words"] == words_of(texts)
    assert meta["val_bytes"] + meta["train_bytes"] == sum(len(text.encode()) for text in texts)
    assert meta["val_bytes"] == len(ENC.decode_bytes([token for token in val if token != ENC.eot_token]))
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    trains = [f"out_train_{i:06}.bin" for i in range(1, len(names) - 1)]
    assert names == ["meta.json", *trains, "out_val_000000.bin"]
    assert meta["shards"] == {
        "train": checksums(tmp_path / "out", trains),
        "val": checksums(tmp_path / "out", names[-1:]),
    }
    assert all(3000 <= len(read_shard(tmp_path / "out" / name)) < 3000 + BIGGEST for name in trains[:-1])


def test_a_big_text_file_is_streamed(tmp_path):
    text = "".join(random_text(seed, 3000) for seed in range(300))  # 3 MB: characters straddle the blocks it is read in
    (tmp_path / "big.txt").write_text(text, encoding="utf-8", newline="")
    meta = prepare(tmp_path / "out", files=f"{tmp_path}/big.txt", val_fraction=0.3)
    at = int(Fraction(7, 10) * len(text))
    assert read_split(tmp_path / "out", "train") == tokens_of([text[:at]])
    assert read_split(tmp_path / "out", "val") == tokens_of([text[at:]])
    assert (meta["train_words"], meta["val_words"]) == (words_of([text[:at]]), words_of([text[at:]]))


def test_exclude_and_order(tmp_path):
    for name in ("b.txt", "a.txt", "skip.txt", "c.log"):
        (tmp_path / name).write_text(name)
    prepare(tmp_path / "out", files=f"{tmp_path}/*.*", exclude="*/skip*, *.log", val_fraction=0.5)
    assert read_split(tmp_path / "out", "train") == tokens_of(["a.txt"])
    assert read_split(tmp_path / "out", "val") == tokens_of(["b.txt"])


def test_join(tmp_path, small):
    rows = ["", " = Title = \n", "", " text without newline", "  \n", *documents(20)]
    text = "".join(row if row.endswith("\n") else row + "\n" for row in rows)
    (tmp_path / "source").mkdir()
    write_rows(tmp_path / "source" / "train.parquet", rows)
    write_rows(tmp_path / "source" / "test.parquet", rows[:4])
    options = {"dataset": str(tmp_path / "source"), "join": True}
    meta = prepare(tmp_path / "out", val_split="test", **options)
    assert read_split(tmp_path / "out", "train") == tokens_of([text])
    assert read_split(tmp_path / "out", "val") == tokens_of(["\n = Title = \n\n text without newline\n"])
    assert meta["train_words"] == words_of([text])
    prepare(tmp_path / "out2", val_fraction=0.25, **options)
    assert read_split(tmp_path / "out2", "train") == tokens_of([text[: len(text) * 3 // 4]])
    assert read_split(tmp_path / "out2", "val") == tokens_of([text[len(text) * 3 // 4 :]])
    (tmp_path / "a.txt").write_bytes(b"one")
    write_rows(tmp_path / "b.jsonl", ["two", "three\n"])
    prepare(tmp_path / "out3", files=f"{tmp_path}/?.*", join=True, val_fraction=0.5)
    assert read_split(tmp_path / "out3", "train") == tokens_of(["one\ntwo"])
    assert read_split(tmp_path / "out3", "val") == tokens_of(["\nthree\n"])


def test_wikitext(tmp_path, small, monkeypatch):
    """Rows as Hugging Face has them, with empty lines that are empty, are counted as the file's, whose are a space."""
    lines = [
        " \n",
        " = Title = \n",
        " \n",
        *(f' He said " word {i} , and then \n 1 @,@ 000 " . \n \n \n' for i in range(40)),
    ]
    text = "".join(lines)
    rows = [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]
    (tmp_path / "source").mkdir()
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


def test_url(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "input.txt").write_text("one two three four")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        prepare(tmp_path / "out", url=f"{url}/input.txt", tokenizer="bytes", val_fraction=0.5)
        with pytest.raises(UserError, match="404"):
            prepare(tmp_path / "out2", url=f"{url}/nothere.txt", val_fraction=0.5)
        server.shutdown()
    assert read_split(tmp_path / "out", "train") == [256, *b"one two t"]
    assert read_split(tmp_path / "out", "val") == [256, *b"hree four"]


# Validation


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("count", "fraction", "trains"), [(10, 0.1, 9), (10, 0.9, 1), (7, 0.1, 6)])
def test_val_fraction(tmp_path, small, count, fraction, trains, kind):
    texts = [random_text(seed, 1000) for seed in range(count)]
    write_rows(tmp_path / f"a.{kind}", texts)
    prepare(tmp_path / "out", files=f"{tmp_path}/a.{kind}", val_fraction=fraction)
    assert read_split(tmp_path / "out", "train") == tokens_of(texts[:trains])
    assert read_split(tmp_path / "out", "val") == tokens_of(texts[trains:])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_val_fraction_of_a_single_document(tmp_path, small, kind):
    text = random_text(0, 3000)
    write_rows(tmp_path / f"a.{kind}", [text])
    meta = prepare(tmp_path / "out", files=f"{tmp_path}/a.{kind}", val_fraction=0.3)
    at = int(Fraction(7, 10) * len(text))
    assert read_split(tmp_path / "out", "train") == tokens_of([text[:at]])
    assert read_split(tmp_path / "out", "val") == tokens_of([text[at:]])
    assert (meta["train_words"], meta["val_words"]) == (words_of([text[:at]]), words_of([text[at:]]))


def test_val_shards_and_splits(tmp_path, small):
    texts = documents()
    (tmp_path / "source").mkdir()
    write_rows(tmp_path / "source" / "train.parquet", texts[:30])
    write_rows(tmp_path / "source" / "test.parquet", texts[30:])
    options = {"dataset": str(tmp_path / "source"), "split": "train+test"}
    prepare(tmp_path / "out", val_shards=2, shard_tokens=2000, **options)
    val = read_split(tmp_path / "out", "val")
    assert 4000 <= len(val) < 4000 + 2 * BIGGEST
    assert val + read_split(tmp_path / "out", "train") == tokens_of(texts)
    assert not (tmp_path / "out" / "out_train_000001.bin").exists()
    assert (tmp_path / "out" / "out_train_000002.bin").exists()


def by_chance(texts, seed, fraction):
    """{split: texts}, by the definition: a document's number and the seed decide."""
    split = {"train": [], "val": []}
    for number, text in enumerate(texts):
        digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
        split["val" if int.from_bytes(digest) / 2**64 < fraction else "train"].append(text)
    return split


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_val_seed(tmp_path, small, kind):
    texts, made = documents(), {}
    (tmp_path / "source").mkdir()
    if kind == "txt":
        for i, text in enumerate(texts):
            (tmp_path / "source" / f"{i:02}.txt").write_bytes(text.encode())
    else:
        for i in range(3):
            write_rows(tmp_path / "source" / f"{i}.jsonl", texts[i * 20 : i * 20 + 20])
    for seed in (1, 2):
        out, split = tmp_path / f"{seed}", by_chance(texts, seed, 0.3)
        meta = prepare(out, files=f"{tmp_path}/source/*", val_fraction=0.3, val_seed=seed, shard_tokens=2000)
        assert 8 < len(split["val"]) < 28
        for name, own in split.items():
            made[seed, name] = read_split(out, name)
            assert made[seed, name] == tokens_of(own)
            assert meta[f"{name}_tokens"] == len(made[seed, name])
            assert meta[f"{name}_words"] == words_of(own)
            assert meta["shards"][name] == checksums(out, meta["shards"][name])
        assert 4 < len(meta["shards"]["train"]) <= 1 + (meta["train_tokens"] + meta["val_tokens"]) / 2000
    assert made[1, "val"] != made[2, "val"]


def test_a_single_document_is_not_split_by_chance(tmp_path):
    (tmp_path / "a.txt").write_text("one text")
    with pytest.raises(UserError, match=r"no text is left for .*--val_seed"):
        prepare(tmp_path / "out", files=f"{tmp_path}/a.txt", val_fraction=0.5, val_seed=1)


# Endings


def test_own_tokenizer_goes_with_the_shards(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    hf.train_from_iterator(documents(), trainer)
    hf.save(str(tmp_path / "own.json"))
    write_rows(tmp_path / "a.jsonl", documents())
    meta = prepare(
        tmp_path / "out", files=f"{tmp_path}/a.jsonl", tokenizer=str(tmp_path / "own.json"), val_fraction=0.5
    )
    assert meta["tokenizer"] == "tokenizer.json"
    enc = get_tokenizer(str(tmp_path / "out" / "tokenizer.json"))
    assert read_split(tmp_path / "out", "train") == tokens_of(documents()[:30], enc)


def test_a_byte_order_mark_is_no_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}')
    prepare(tmp_path / "out", files=f"{tmp_path}/a.jsonl", val_fraction=0.5)
    assert read_split(tmp_path / "out", "train") == tokens_of(["a"])


@pytest.mark.parametrize("content", ["a\ufeffb", "", "\ufeff"])
def test_a_byte_order_mark_is_no_text(tmp_path, small, content):
    """At the start of a file; elsewhere it is a character like any other."""
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(content + "word, " * 300 * i, encoding="utf-8-sig")
    meta = prepare(tmp_path / "out", files=f"{tmp_path}/?.txt", val_fraction=0.5)
    assert read_split(tmp_path / "out", "train") == tokens_of([content])
    assert read_split(tmp_path / "out", "val") == tokens_of([content + "word, " * 300])
    assert meta["train_bytes"] == len(content.encode())


@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_columns_encoded_by_a_dictionary(tmp_path, small, kind):
    """As pandas writes its categories."""
    texts = ["one", "two", "", "one"] * 5
    (tmp_path / "source").mkdir()
    column = pyarrow.array([text or None for text in texts]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "source" / "train.parquet")
    where = {"files": f"{tmp_path}/source/*", "dataset": str(tmp_path / "source")}[kind]
    prepare(tmp_path / "out", val_fraction=0.25, **{kind: where})
    assert read_split(tmp_path / "out", "train") == tokens_of(texts[:15])
    assert read_split(tmp_path / "out", "val") == tokens_of(texts[15:])


@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_parquet_files_without_rows(tmp_path, small, kind):
    (tmp_path / "source").mkdir()
    where = {"files": f"{tmp_path}/source/*", "dataset": str(tmp_path / "source")}[kind]
    empty = pyarrow.table({"id": pyarrow.array([], "int64"), "text": pyarrow.array([], "string")})
    pyarrow.parquet.write_table(empty, tmp_path / "source" / "train-0.parquet")
    with pytest.raises(UserError, match="no documents"):
        prepare(tmp_path / "out", **{kind: where})
    assert not (tmp_path / "out").exists()
    write_rows(tmp_path / "source" / "train-1.parquet", documents(20))
    pyarrow.parquet.write_table(empty, tmp_path / "source" / "train-2.parquet")
    prepare(tmp_path / "out", val_fraction=0.1, **{kind: where})
    assert read_split(tmp_path / "out", "train") == tokens_of(documents(20)[:18])


def test_parquet_files_that_lack_rows(tmp_path, monkeypatch):
    """pyarrow reads fewer rows than the file says, and no error, where some pages are damaged."""
    path = tmp_path / "a.parquet"
    write_rows(path, documents(20))
    read = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", lambda *a, **k: (x[:-1] for x in read(*a, **k)))
    with pytest.raises(UserError, match=r"a\.parquet: damaged: 19 rows in it, but it says 20"):
        prepare(tmp_path / "out", files=str(path))


def test_half_a_surrogate_pair(tmp_path):
    write_rows(tmp_path / "a.jsonl", ["a\ud83d b", "c"])
    meta = prepare(tmp_path / "out", files=f"{tmp_path}/a.jsonl", val_fraction=0.5)
    assert read_split(tmp_path / "out", "train") == tokens_of(["a\ufffd b"])
    assert meta["train_bytes"] == 6


def test_processes_do_not_matter(tmp_path, small):
    write_rows(tmp_path / "a.jsonl", documents())
    for n in (1, 3):
        prepare(tmp_path / f"{n}" / "out", files=f"{tmp_path}/a.jsonl", shard_tokens=1000, num_proc=n)
    assert contents(tmp_path / "1" / "out") == contents(tmp_path / "3" / "out")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["jsonl", "txt", "dataset", "joined", "by chance"])
def test_stopped_anywhere_and_resumed_is_the_same(tmp_path, small, monkeypatch, kind):
    texts = documents(30)
    (tmp_path / "source").mkdir()
    options = {"files": f"{tmp_path}/source/*", "val_fraction": 0.13, "tokenizer": "bytes"}
    if kind == "jsonl":
        write_rows(tmp_path / "source" / "a.jsonl", texts)
        options = {"files": f"{tmp_path}/source/*", "val_shards": 3, "tokenizer": "bytes"}
    elif kind == "txt":
        (tmp_path / "source" / "a.txt").write_bytes("".join(texts).encode())
        (tmp_path / "source" / "b.txt").write_bytes("\n".join(texts).encode())
    else:
        write_rows(tmp_path / "source" / "train-0.parquet", texts[:13])
        write_rows(tmp_path / "source" / "train-1.parquet", texts[13:])
        options = {"dataset": str(tmp_path / "source"), "val_fraction": 0.13, "tokenizer": "bytes"}
        options |= {"val_fraction": 0.4, "val_seed": 3} if kind == "by chance" else {"join": kind == "joined"}
    prepare(tmp_path / "straight" / "out", shard_tokens=900, **options)
    real, left = os.replace, 0

    def replace(source, target):  # dies before or after a file appears
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        real(source, target)
        left -= 1
        if left == 0:
            raise Killed

    out, deaths = tmp_path / "killed" / "out", 0
    monkeypatch.setattr(os, "replace", replace)
    while not (out / "meta.json").exists():
        left = 3 + deaths % 7
        try:
            prepare(out, shard_tokens=900, **options)
        except Killed:
            deaths += 1
            assert deaths < 100
    assert deaths > 3
    assert not list(out.glob("*.tmp"))
    straight = contents(tmp_path / "straight" / "out")
    assert len(straight) > 5
    assert {k: v for k, v in contents(out).items() if k != "progress.json"} == straight


def start(*options):
    command = [sys.executable, SCRIPT, "--num_proc=2", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_shards(process, out_dir, count):
    while process.poll() is None and len(list(out_dir.glob("*.bin"))) < count:
        time.sleep(0.002)


def test_killed_processes_leave_nothing_behind(tmp_path):
    write_rows(tmp_path / "a.jsonl", documents() * 60)
    options = [f"--files={tmp_path}/a.jsonl", "--shard_tokens=20000"]
    assert call("fineweb.py", *options, f"--out_dir={tmp_path}/straight/out", "--num_proc=1").returncode == 0
    out = tmp_path / "killed" / "out"
    options.append(f"--out_dir={out}")
    for shards in (1, 6):
        process = start(*options)
        wait_for_shards(process, out, shards)
        process.kill()
        process.communicate(timeout=20)  # which waits for the workers too: they hold the pipes
    assert len(list(out.glob("*.bin"))) < len(list((tmp_path / "straight" / "out").glob("*.bin")))
    assert call("fineweb.py", *options, "--num_proc=1").returncode == 0
    assert contents(out) == contents(tmp_path / "straight" / "out")
    assert "complete" in call("fineweb.py", *options).stdout


def killed(monkeypatch, out_dir, **options):
    """A preparation that dies before its meta.json."""
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_meta", raise_killed)
        with pytest.raises(Killed):
            prepare(out_dir, **options)


def raise_killed(*_, **__):
    raise Killed


def test_data_that_is_not_finished_names_the_command_that_finishes_it(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", documents())
    out, command = (
        tmp_path / "out",
        ["fineweb.py", f"--files={tmp_path}/a.jsonl", "--shard_tokens=3000", "--num_proc=1"],
    )
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_meta", raise_killed)
        with contextlib.suppress(Killed):
            call(*command, f"--out_dir={out}")
    with pytest.raises(UserError, match="not finished") as error:
        read_meta(str(out))
    again = str(error.value).partition("finish it: python ")[2]
    assert call(*shlex.split(again)).returncode == 0
    meta = read_meta(str(out))
    assert meta["train_tokens"] + meta["val_tokens"] == len(tokens_of(documents()))


def test_an_older_programs_progress_is_a_line(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", documents())
    options = {"files": f"{tmp_path}/a.jsonl", "shard_tokens": 3000}
    killed(monkeypatch, tmp_path / "out", **options)
    progress = json.loads((tmp_path / "out" / "progress.json").read_text())
    older = {name: value for name, value in progress.items() if name not in COUNTS}
    older |= {"counts": {name: progress[name] for name in COUNTS}, "cursor": [0, 0, 17, 0, 17, 0], "skip": 1234}
    damaged = progress | {"shards": progress["shards"] | {"val": ""}, "val_tokens": 0}
    for wrong in (older, damaged):
        (tmp_path / "out" / "progress.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"progress\.json is damaged, or made by another or an older program"):
            prepare(tmp_path / "out", **options)


@pytest.mark.parametrize("gone", ["all", "one", "cut", "all but one"])
def test_shards_that_are_gone_are_made_again(tmp_path, small, capsys, gone):
    write_rows(tmp_path / "a.jsonl", documents())
    options = {"files": f"{tmp_path}/a.jsonl", "shard_tokens": 1000}
    out = tmp_path / "out"
    prepare(out, **options)
    before = contents(out)
    shards = sorted(out.glob("*.bin"))
    for path in {"all": shards, "all but one": shards[1:], "cut": []}.get(gone, shards[2:3]):
        path.unlink()
    if gone == "cut":
        shards[1].write_bytes(shards[1].read_bytes()[:-2])
    capsys.readouterr()
    prepare(out, **options)
    said = capsys.readouterr().out
    assert "made again" in said
    assert "complete" not in said
    assert contents(out) == before
    prepare(out, **options)
    assert "complete" in capsys.readouterr().out


def test_shards_made_again_are_those_of_the_source_alone(tmp_path, small, monkeypatch):
    """Also where that has become smaller, and the second preparation is killed."""
    options = {"files": f"{tmp_path}/a.jsonl", "shard_tokens": 1000}
    write_rows(tmp_path / "a.jsonl", documents())
    prepare(tmp_path / "out", **options)
    (tmp_path / "out" / "out_train_000003.bin").unlink()
    write_rows(tmp_path / "a.jsonl", documents(30))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", raise_killed)
        with pytest.raises(Killed):
            prepare(tmp_path / "out", **options)
    killed(monkeypatch, tmp_path / "out", **options)
    with pytest.raises(UserError, match="not finished"):
        read_meta(str(tmp_path / "out"))
    prepare(tmp_path / "out", **options)
    prepare(tmp_path / "straight" / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight" / "out")


def test_a_source_that_changes_at_equal_size_is_noticed(tmp_path, small, monkeypatch):
    write_rows(tmp_path / "a.jsonl", documents())
    options = {"files": f"{tmp_path}/a.jsonl", "shard_tokens": 1000}
    killed(monkeypatch, tmp_path / "out", **options)
    status = (tmp_path / "a.jsonl").stat()
    os.utime(tmp_path / "a.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UserError, match="other source files"):
        prepare(tmp_path / "out", **options)
    os.utime(tmp_path / "a.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    prepare(tmp_path / "out", **options)


@pytest.mark.parametrize("options", [{"val_shards": 1}, {"val_fraction": 0.99}])
def test_a_split_without_text_leaves_the_folder_for_other_settings(tmp_path, options):
    write_rows(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(UserError, match="no text is left"):
        prepare(tmp_path / "out", files=f"{tmp_path}/a.jsonl", **options)
    meta = prepare(tmp_path / "out", files=f"{tmp_path}/a.jsonl", val_fraction=0.5)
    assert (meta["train_tokens"], meta["val_tokens"]) == (2, 2)


# One preparation in a folder


def test_the_folder_is_locked_before_anything_in_it_is_read(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", documents())
    real = fineweb.read_progress

    def read_progress(out_dir, settings):
        with pytest.raises(UserError, match="another process"):
            lock_folder(out_dir)
        return real(out_dir, settings)

    monkeypatch.setattr(fineweb, "read_progress", read_progress)
    prepare(tmp_path / "out", files=f"{tmp_path}/a.jsonl", val_fraction=0.5)


def test_two_at_the_same_instant(tmp_path):
    """One wins, whatever the other wants."""
    write_rows(tmp_path / "a.jsonl", documents() * 20)
    options = [f"--files={tmp_path}/a.jsonl", f"--out_dir={tmp_path}/out", "--shard_tokens=20000"]
    names = ("gpt2", "bytes")
    pair = [start(*options, f"--tokenizer={name}") for name in names]
    errors = [process.communicate(timeout=30)[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 2]
    won = 0 if pair[0].returncode == 0 else 1
    assert errors[1 - won].count("\n") == 1
    meta = read_meta(str(tmp_path / "out"))
    assert meta["tokenizer"] == names[won]
    tokens = read_split(tmp_path / "out", "val") + read_split(tmp_path / "out", "train")
    assert tokens == tokens_of(documents() * 20, get_tokenizer(names[won]))


def test_a_folder_of_the_users_own_stays(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="no file"):
        prepare(tmp_path / "out", files="nothere/*")
    assert (tmp_path / "out").exists()


# The terminal


@pytest.mark.parametrize("where", ["closed pipe", "full disk"])
def test_output_that_goes_nowhere_ends_no_preparation(tmp_path, where):
    write_rows(tmp_path / "a.jsonl", documents())
    read, write = os.pipe()
    os.close(read)
    if where == "full disk":
        os.dup2(os.open("/dev/full", os.O_WRONLY), write)
    options = [f"--files={tmp_path}/a.jsonl", f"--out_dir={tmp_path}/out", "--shard_tokens=3000", "--num_proc=1"]
    done = subprocess.run([sys.executable, SCRIPT, *options], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert read_meta(str(tmp_path / "out"))["val_tokens"] >= 3000


def test_an_interrupt_during_the_imports_prints_nothing(tmp_path):
    (tmp_path / "tiktoken.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT, "--files=a"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "a.jsonl", documents())
    (tmp_path / "config.py").write_text('out_dir = "~/out"\nshard_tokens = 3000\n')
    done = call("fineweb.py", f"{tmp_path}/config.py", "--files=~/*.jsonl", "--exclude=~/b*", "--num_proc=1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_a_second_process_is_refused_and_an_interrupt_is_one_line(tmp_path, kind):
    (tmp_path / "source").mkdir()
    write_rows(tmp_path / "source" / "train.parquet", documents() * 100)
    where = {"files": f"--files={tmp_path}/source/*", "dataset": f"--dataset={tmp_path}/source"}[kind]
    options = [where, f"--out_dir={tmp_path}/out", "--shard_tokens=5000"]
    process = start(*options)
    wait_for_shards(process, tmp_path / "out", 1)
    os.killpg(process.pid, signal.SIGSTOP)
    second = call("fineweb.py", *options, "--num_proc=1")
    os.killpg(process.pid, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C: to all
    _, error = process.communicate(timeout=20)
    assert second.returncode == 2
    assert "another process" in second.stderr
    assert process.returncode == 130
    assert [line for line in error.splitlines() if "tok" not in line] == ["interrupted; run the same command to go on"]


# Mistakes


@pytest.fixture(scope="module")
def big_tokenizer(tmp_path_factory):
    """A file with a token for every pair of bytes."""
    path = tmp_path_factory.mktemp("big") / "big.json"
    merges = [[a, b] for a in byte_alphabet() for b in byte_alphabet()]
    vocab = {token: i for i, token in enumerate([*byte_alphabet(), *map("".join, merges), "<|endoftext|>"])}
    data = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "added_tokens": []}
    data["added_tokens"].append({"content": "<|endoftext|>", "id": len(vocab) - 1})
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False}
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    write_rows(tmp_path / "source" / "train.parquet", documents(5))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "number.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "wide.jsonl").write_text('{"text": "a"}', encoding="utf-16")
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps(dict.fromkeys([f"c\n{i}" for i in range(9999)])) + "\n")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a", "b"])] * 2, ["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    latin = pyarrow.array([b"caf\xe9", b"b"])
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 2, latin.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "latin.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a" * 99, "b" * 99]}), tmp_path / "flipped.parquet",
        compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True,
    )  # fmt: skip
    flipped = (tmp_path / "flipped.parquet").read_bytes()
    (tmp_path / "flipped.parquet").write_bytes(flipped.replace(b"bbb", b"cbb", 1))
    whole = (tmp_path / "source" / "train.parquet").read_bytes()
    (tmp_path / "thrift.parquet").write_bytes(whole[:-100] + bytes(60) + whole[-40:])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x_train_000001.bin").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": "{}/nothere/*"}, "no file"),
        ({"files": "{}/latin.txt"}, "byte 3"),
        ({"files": "{}/broken.jsonl"}, "line at byte 14"),
        ({"files": "{}/number.jsonl"}, "text_column"),
        ({"files": "{}/broken.parquet"}, "broken.parquet"),
        ({"files": "{}/deep.jsonl"}, "line at byte 0.*recursion"),
        ({"files": "{}/null.jsonl"}, "'text' is NoneType"),
        ({"files": "{}/long.jsonl"}, r"it has c 0, c 1,.{150,250}$"),
        ({"files": "{}/twice.parquet"}, "2 columns are called 'text'"),
        ({"files": "{}/latin.parquet"}, "latin.parquet.*utf-8"),
        ({"files": "{}/thrift.parquet"}, "thrift.parquet"),
        ({"files": "{}/flipped.parquet"}, "flipped.parquet.*CRC"),
        ({"files": "{}/wide.jsonl"}, "line at byte 0.*utf-8"),
        ({"files": "{}/source/*", "tokenizer": "~nobody-here/x.json"}, "nobody-here"),
        ({"files": "{}/source/*", "text_column": "txt"}, "did you mean text"),
        ({"files": "{}/source/*", "text_column": "id"}, "int64"),
        ({"files": "{}/source/*", "val_shards": 1}, "no text is left for train"),
        ({"files": "{}/source/*", "tokenizer": "gtp2"}, "did you mean gpt2"),
        ({"url": "http://127.0.0.1:9/nothere", "tokenizer": "gtp2"}, "did you mean gpt2"),
        ({"files": "{}/source/*", "tokenizer": "BIG"}, "65,793 ids"),
        ({"files": "{}/source/*", "out_dir": "{}/foreign"}, "did not make"),
        ({"dataset": "{}/source", "text_column": "txt"}, "did you mean text"),
        ({"dataset": "{}/source", "val_split": "test"}, "Available splits"),
        ({"dataset": "{}/source", "split": "nothere"}, "Available splits"),
        ({"dataset": "{}/source", "subset": "nothere"}, "nothere"),
        ({"dataset": "{}/nothere"}, "nothere"),
        ({"url": "http://127.0.0.1:9/nothere"}, "127.0.0.1"),
        ({"url": "nothere"}, "nothere"),
    ],
)
def test_mistakes(source, options, message, big_tokenizer):
    for name, value in options.items():
        if isinstance(value, str):
            options = options | {name: value.format(source).replace("BIG", str(big_tokenizer))}
    out_dir = Path(options.pop("out_dir", source / "out"))
    with pytest.raises(UserError, match=message) as error:
        prepare(out_dir, **options)
    assert "\n" not in str(error.value)
    assert out_dir.name == "foreign" or out_dir.exists() == ("no text is left" in message)


def test_a_tenth_of_files_is_validation_unless_it_is_said(tmp_path, small):
    rules = ("val_split", "val_fraction", "val_shards")
    for options, want in (
        ({"files": "a"}, (None, 0.1, None)),
        ({"url": "a"}, (None, 0.1, None)),
        ({"files": "a", "val_shards": 2}, (None, None, 2)),
        ({"dataset": "a"}, (None, None, 1)),
        ({}, (None, None, 1)),
    ):
        config = DataConfig(**{"out_dir": "out", **options})
        assert tuple(getattr(config, name) for name in rules) == want


def test_a_source_on_the_command_line_replaces_a_configs(tmp_path):
    config = tmp_path / "web.py"
    config.write_text("dataset, subset, split, val_split, out_dir = 'a', 'b', 'train+test', 'test', 'data/web'\n")
    asked, _ = configure(DataConfig, argv=own_source([str(config), "--files=c", "--tokenizer=bytes"]))
    assert asked == DataConfig(files="c", tokenizer="bytes", out_dir="data/web")
    asked, _ = configure(DataConfig, argv=own_source([str(config), "--dataset=c", "--val_split=dev"]))
    assert asked == DataConfig(dataset="c", val_split="dev", out_dir="data/web")
    asked, _ = configure(DataConfig, argv=own_source([str(config), "--shards=c"]))
    assert asked == DataConfig(shards="c", out_dir="data/web")
    with pytest.raises(UserError, match="files and url are both given"):
        configure(DataConfig, argv=own_source(["--files=a", "--url=b", "--out_dir=c"]))


@pytest.mark.parametrize("path", [*CONFIGS.glob("*.py")], ids=lambda path: path.name)
def test_the_next_command_names_the_configs_made_for_the_data(path):
    config, _, _ = configure(TrainConfig, GPTConfig, argv=[str(path)])
    command = train_command(Path(config.data_dir + "/"))
    assert f"config/{path.name}" in command
    script, first = shlex.split(command, comments=True)[1:]
    assert (script, (CONFIGS.parent / first).exists()) == ("train_gpt2.py", True)


def test_the_next_command_has_a_small_model_for_other_data():
    argv = shlex.split(train_command(Path("data/my notes")))[2:]
    config, _, _ = configure(TrainConfig, GPTConfig, argv=[str(CONFIGS.parent / argv[0]), *argv[1:]])
    assert (config.data_dir, config.out_dir) == ("data/my notes", "out/my notes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": "a", "url": "b"}, "files and url"),
        ({"files": "a", "val_split": "test"}, "val_split"),
        ({"dataset": "a", "val_split": "test", "val_fraction": 0.1}, "val_split and val_fraction"),
        ({"dataset": "a", "val_fraction": 1.0}, "val_fraction"),
        ({"dataset": "a", "val_seed": 1}, "val_seed .*it needs val_fraction"),
        ({"dataset": "a", "val_seed": 1, "val_fraction": 0.1, "join": True}, "val_seed .*one document"),
        ({"dataset": "a", "shard_tokens": 0}, "shard_tokens"),
        ({"dataset": "a", "exclude": "b"}, "exclude"),
        ({"files": "a", "subset": "b"}, "subset"),
        ({"url": "a", "split": "test"}, "split"),
        ({"files": ""}, "files is empty"),
        ({"dataset": "a", "num_proc": 100_000}, "num_proc"),
        ({"dataset": "a", "out_dir": None}, "out_dir"),
    ],
)
def test_settings_that_contradict(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"out_dir": "out", **options})


def test_another_setting_or_source_in_the_same_folder(source):
    options = {"files": f"{source}/source/*", "val_fraction": 0.5}
    prepare(source / "out", **options)
    with pytest.raises(UserError, match="tokenizer=gpt2, not bytes"):
        prepare(source / "out", tokenizer="bytes", **options)
    (source / "out" / "meta.json").rename(source / "out" / "progress.json")  # as if it had been killed before the end
    write_rows(source / "source" / "train.parquet", documents(6))
    progress = json.loads((source / "out" / "progress.json").read_text())
    (source / "out" / "progress.json").write_text(json.dumps({**progress, "cursor": [0, 3, 0]}))
    with pytest.raises(UserError, match="source"):
        prepare(source / "out", **options)


@pytest.mark.parametrize("name", ["meta.json", "progress.json"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"null", b"[]", b"{}", b'{"settings": 1}', b'{"settings": {}}', bytes(99)]
)
def test_a_damaged_state_is_refused(source, name, content):
    (source / "foreign" / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        prepare(source / "foreign", files=f"{source}/source/*")


def test_a_damaged_shard_is_not_gone_on_from(tmp_path, small, monkeypatch):
    write_rows(tmp_path / "a.jsonl", documents())
    options = {"files": f"{tmp_path}/a.jsonl", "shard_tokens": 1000}

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_meta", die)
        with pytest.raises(Killed):
            prepare(tmp_path / "out", **options)
    shard = tmp_path / "out" / "out_train_000002.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="out_train_000002"):
        prepare(tmp_path / "out", **options)
    shard.unlink()
    with pytest.raises(UserError, match=r"out_train_000002.*is gone"):
        prepare(tmp_path / "out", **options)


@pytest.mark.parametrize("options", [["--files={}/latin.txt"], ["--dataset={}/source", "--tokenizer=gtp2"]])
def test_a_mistake_is_one_line_and_status_2(source, options):
    options = [option.format(source) for option in options]
    result = call("fineweb.py", *options, f"--out_dir={source}/out", "--num_proc=1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (source / "out").exists()


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("text", ["", "a", "a<|>b<|>", "<|><|>a<|", "ab<<|>|>c\n<|>\nd", "x" * 50 + "<|>" + "y" * 50])
def test_documents_between_separators(tmp_path, monkeypatch, text, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    (tmp_path / "a.txt").write_text(text)
    documents = []
    for piece, begins in sources.read_separated(str(tmp_path / "a.txt"), "<|>"):
        documents += [""] if begins else []
        documents[-1] += piece
    assert documents == [document for document in text.split("<|>") if document]


def test_separator(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n<|endoftext|>\nthree\n<|endoftext|>\nfour\n<|endoftext|>\n")
    done = call(
        "fineweb.py", f"--files={tmp_path / 'a.txt'}", "--separator=\n<|endoftext|>\n", f"--out_dir={tmp_path / 'out'}",
        "--val_fraction=0.34", "--tokenizer=bytes",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_shard(tmp_path / "out" / "out_train_000001.bin") == tokens_of(["one two"], get_tokenizer("bytes"))
    val = tokens_of(["three", "four"], get_tokenizer("bytes"))
    assert read_shard(tmp_path / "out" / "out_val_000000.bin") == val


# Parts of one preparation


def prepare_parts(out_dir, count, **options):
    for number in random.Random(count).sample(range(1, count + 1), count):  # in any order
        fineweb.prepare(DataConfig(out_dir=str(out_dir), num_proc=1, part=f"{number}/{count}", **options))
    fineweb.join_parts(out_dir)
    return json.loads((out_dir / "meta.json").read_text())


@pytest.mark.parametrize("count", [3, 7])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet", "dataset", "val_split", "separator", "one"])
@pytest.mark.parametrize("val", [{}, {"val_fraction": 0.3}, {"val_fraction": 0.3, "val_seed": 5}])
def test_parts_together_are_one_preparation(tmp_path, small, kind, count, val):
    texts, source = documents()[::-1], tmp_path / "source"
    source.mkdir()
    val = val or {"one": {}, "val_split": {"val_split": "test"}}.get(kind, {"val_shards": 1})
    options = {"files": f"{source}/*", "shard_tokens": 500, "tokenizer": "bytes", **val}
    if kind == "txt":
        for i, text in enumerate(texts):
            (source / f"{i:03}.txt").write_bytes(text.encode())
    elif kind == "separator":
        (source / "a.txt").write_bytes("<|>".join(texts).encode())
        options["separator"] = "<|>"
    elif kind == "one":  # a document, which cannot be divided
        options.pop("val_seed", None)
        (source / "a.txt").write_bytes("".join(texts).encode())
    else:
        suffix = "parquet" if kind in ("dataset", "val_split") else kind
        for i in range(3):
            write_rows(source / f"train-{i}.{suffix}", texts[i * 20 : i * 20 + 20])
        if kind == "val_split":
            write_rows(source / "test.parquet", texts[:9])
        if kind in ("dataset", "val_split"):
            options["dataset"] = str(source)
            del options["files"]
    one = prepare(tmp_path / "one", **options)
    joined = prepare_parts(tmp_path / "joined", count, **options)
    for split in ("train", "val"):
        assert read_split(tmp_path / "joined", split) == read_split(tmp_path / "one", split)
    shards = joined.pop("shards")
    assert {name: value for name, value in one.items() if name != "shards"} == joined
    names = sorted(path.name for path in (tmp_path / "joined").iterdir() if path.name != "meta.json")
    assert names == sorted([*shards["train"], *shards["val"]])
    for made in shards.values():
        assert made == checksums(tmp_path / "joined", made)
    assert read_meta(str(tmp_path / "joined"))


def test_a_part_reads_little_of_what_is_not_its_own(tmp_path, small, monkeypatch):
    for i in range(12):
        write_rows(tmp_path / f"{i:02}.jsonl", documents(20)[::-1])
    read, real = [], sources.read_jsonl
    monkeypatch.setattr(sources, "read_jsonl", lambda path, column: read.append(Path(path).stem) or real(path, column))
    prepare_parts(tmp_path / "out", 4, files=f"{tmp_path}/*.jsonl", shard_tokens=500, val_shards=1)
    assert sorted(read) == [f"{i:02}" for i in range(12)]


@pytest.mark.parametrize("val", [{"val_shards": 1}, {"val_fraction": 0.3}, {"val_fraction": 0.3, "val_seed": 5}])
def test_a_part_that_is_killed_and_repeated_is_the_same(tmp_path, small, monkeypatch, val):
    write_rows(tmp_path / "a.jsonl", documents(24)[::-1])
    options = {"files": f"{tmp_path}/a.jsonl", "shard_tokens": 500, "tokenizer": "bytes", **val}
    prepare_parts(tmp_path / "straight" / "out", 2, **options)
    out, real, left, deaths = tmp_path / "killed" / "out", os.replace, 0, 0

    def replace(source, target):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        real(source, target)
        left -= 1
        if left == 0:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)
    for part in ("2/2", "1/2"):
        while not (out / part.replace("/", "of") / "meta.json").exists():
            left = 5 + deaths % 7
            try:
                fineweb.prepare(DataConfig(out_dir=str(out), num_proc=1, part=part, **options))
            except Killed:
                deaths += 1
                assert deaths < 100
    assert deaths > 3
    while find_parts(out):  # joining may die anywhere too, also while it removes what is left
        left = 1 + deaths % 23
        with contextlib.suppress(Killed):
            fineweb.join_parts(out)
        deaths += 1
        assert deaths < 200
    assert contents(out) == contents(tmp_path / "straight" / "out")


def test_joining_that_dies_while_it_tidies_up(tmp_path, small, monkeypatch):
    write_rows(tmp_path / "a.jsonl", documents())
    options = {"files": f"{tmp_path}/a.jsonl", "shard_tokens": 500}
    for number in (1, 2, 3):
        fineweb.prepare(DataConfig(out_dir=str(tmp_path / "out"), part=f"{number}/3", **options))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", raise_killed)
        with pytest.raises(Killed):
            fineweb.join_parts(tmp_path / "out")
    meta = read_meta(str(tmp_path / "out"))  # what was joined trains already
    (tmp_path / "out" / "1of3" / "meta.json").unlink()
    fineweb.join_parts(tmp_path / "out")
    assert not find_parts(tmp_path / "out")
    assert read_meta(str(tmp_path / "out")) == meta
    fineweb.join_parts(tmp_path / "out")
    fineweb.prepare(DataConfig(out_dir=str(tmp_path / "out"), part="2/3", **options))  # a task that a scheduler repeats
    assert read_meta(str(tmp_path / "out")) == meta
    next((tmp_path / "out").glob("*.bin")).unlink()
    with pytest.raises(UserError, match="not whole any more"):
        fineweb.prepare(DataConfig(out_dir=str(tmp_path / "out"), part="2/3", **options))


def test_two_parts_at_the_same_time(tmp_path):
    write_rows(tmp_path / "a.jsonl", documents() * 20)
    options = [f"--files={tmp_path}/a.jsonl", f"--out_dir={tmp_path}/out", "--shard_tokens=20000"]
    pair = [start(*options, f"--part={number}/2") for number in (1, 2)]
    outputs = [process.communicate(timeout=60) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    join = outputs[0][0].strip().partition("python ")[2]
    assert call(*shlex.split(join)).returncode == 0
    assert read_split(tmp_path / "out", "val") + read_split(tmp_path / "out", "train") == tokens_of(documents() * 20)


def test_the_same_part_twice_at_the_same_time(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", documents())
    (tmp_path / "out" / "1of2").mkdir(parents=True)
    handle = lock_folder(tmp_path / "out" / "1of2")
    with pytest.raises(UserError, match="1of2: another process"):
        prepare_parts(tmp_path / "out", 2, files=f"{tmp_path}/a.jsonl", shard_tokens=500)
    os.close(handle)


@pytest.fixture
def three_parts(tmp_path):
    write_rows(tmp_path / "a.jsonl", documents())
    options = [f"--files={tmp_path}/a.jsonl", "--shard_tokens=1000", f"--out_dir={tmp_path}/out", "--num_proc=1"]
    options += ["--val_shards=1"]
    for number in (1, 2, 3):
        assert call("fineweb.py", *options, f"--part={number}/3").returncode == 0
    return tmp_path / "out", options


@pytest.mark.parametrize("what", ["missing", "unfinished", "cut", "settings", "source", "count", "foreign"])
def test_parts_that_do_not_make_one(three_parts, tmp_path, what):
    out, options = three_parts
    folder, meta = out / "2of3", json.loads((out / "2of3" / "meta.json").read_text())
    shard, say = next(folder.glob("*.bin")), what
    if what in ("missing", "settings", "source"):
        for path in [*folder.iterdir()]:
            path.unlink()
        folder.rmdir()
    if what == "unfinished":
        (folder / "meta.json").rename(folder / "progress.json")
        (folder / "progress.json").write_text(json.dumps({**meta, "cursor": [0, 0, 0]}))
        say = "2of3 is not finished"
    elif what == "cut":
        shard.write_bytes(shard.read_bytes()[:-2])
        say = "gone or cut"
    elif what == "settings":
        call("fineweb.py", *options, "--shard_tokens=2000", "--part=2/3")
        say = "2of3 holds shards made with shard_tokens=2000, not 1000"
    elif what == "source":
        os.utime(tmp_path / "a.jsonl", (1, 1))
        call("fineweb.py", *options, "--part=2/3")
        say = "2of3 holds .*other source files"
    elif what == "count":
        (out / "4of5").mkdir()
        say = "parts of 3 and of 5"
    elif what == "foreign":
        (out / "x_train_000001.bin").write_bytes(shard.read_bytes())
        say = "x_train_000001.bin is of none"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = call("fineweb.py", "--join_parts=True", f"--out_dir={out}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    with pytest.raises(UserError, match=say):
        fineweb.join_parts(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(UserError, match=r"not joined yet: python fineweb\.py --join_parts=True --out_dir="):
        read_meta(str(out))
    if what in ("missing", "cut"):  # the line has the command that mends it
        assert call(*shlex.split(done.stderr.partition(": python ")[2])).returncode == 0
        fineweb.join_parts(out)
        assert read_split(out, "val") + read_split(out, "train") == tokens_of(documents())


def test_a_part_alone_does_not_train(three_parts):
    out, _ = three_parts
    with pytest.raises(UserError, match=rf"is part 2/3 .*python fineweb.py --join_parts=True --out_dir={out}$"):
        read_meta(str(out / "2of3"))


def test_parts_too_small_for_validation(tmp_path):
    write_rows(tmp_path / "a.jsonl", documents())
    with pytest.raises(UserError, match=r"no text is left for train: .* use fewer parts"):
        prepare(tmp_path / "out", files=f"{tmp_path}/a.jsonl", val_shards=1, part="1/2")
    write_rows(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(UserError, match="no text is left for train in all its parts"):
        prepare_parts(tmp_path / "out2", 2, files=f"{tmp_path}/a.jsonl", val_fraction=0.99)


def test_nothing_to_join(tmp_path):
    with pytest.raises(UserError, match="no parts there"):
        fineweb.join_parts(tmp_path / "nothere")
    assert not (tmp_path / "nothere").exists()


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "1/0", "a/b", "-1/3", "", "1/3/3"])
def test_what_is_no_part(part):
    with pytest.raises(ValueError, match="part is"):
        DataConfig(part=part)


@pytest.mark.parametrize("options", [{"join": True}, {"url": "a"}, {"join_parts": True}])
def test_what_has_no_parts(options):
    with pytest.raises(ValueError, match=f"part and {next(iter(options))}"):
        DataConfig(part="1/3", out_dir="out", **options)
