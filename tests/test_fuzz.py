"""Damaged files: each is refused in one line that names it, or it means exactly what it says.

In the suite a few hundred inputs, always the same. FUZZ=full pytest tests/test_fuzz.py tries some ten thousand, new
ones each time; what fails is printed as small as hypothesis can make it.
"""

import contextlib
import functools
import gzip
import io
import json
import math
import os
import runpy
import struct
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from conftest import ROOT, TRAIN, call
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_tokenizer import TEXTS, library_ids

import fineweb
from configurator import UserError, configure
from model import GPTConfig
from tokenizer import get_tokenizer
from train_gpt2 import TrainConfig


def cases(small, full):
    """So many inputs in the suite, and so many with FUZZ=full, which also makes a failing one small."""
    common = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    if os.environ.get("FUZZ") == "full":
        return settings(max_examples=full, **common)
    return settings(max_examples=small, derandomize=True, phases=[Phase.generate], **common)


def check_line(error, name):
    message = str(error)
    assert len(message.splitlines()) == 1
    assert str(name) in message, message


@st.composite
def damaged(draw, data):
    """The bytes of a file, most often damaged."""
    data, how = bytearray(data), draw(st.sampled_from(["whole", "cut", "flip", "longer", "noise"]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "cut":
        del data[place:]
    elif how == "flip" and data:
        data[place] ^= 1 << draw(st.integers(0, 7))
    elif how in ("longer", "noise"):
        data = (data if how == "longer" else b"") + draw(st.binary(max_size=40))
    return bytes(data)


WRONG = [
    None, True, -1, 1.5, "1", "", [], {}, [[]], {"a": 1}, "é\n", math.nan, 0, 70_000, 2**31, 2**64, 10**400, "a b",
    "<|endoftext|>", "BPE", "a", "Ġ", ["a", "b"],
]  # fmt: skip
ABORTS = ("model", "continuing_subword_prefix")  # the library, with some values


@st.composite
def changed(draw, text):
    """The bytes of a tokenizer.json with one value removed or replaced, or damaged in other ways."""
    if draw(st.booleans()):
        return draw(damaged(text.encode()))
    data = json.loads(text)
    places = [place for i, place in enumerate(places_of(data)) if place != ABORTS and (len(place) < 3 or i % 7 == 0)]
    *path, last = draw(st.sampled_from(places[1:]))
    inner = functools.reduce(lambda inner, key: inner[key], path, data)
    if draw(st.booleans()):
        inner[last] = draw(st.sampled_from(WRONG))
    else:
        del inner[last]
    return json.dumps(data).encode()


def places_of(data, path=()):
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else []
    return [path, *(inner for key, value in items for inner in places_of(value, (*path, key)))]


@cases(60, 3000)
@given(path=st.sampled_from(sorted((ROOT / "config").glob("*.py"))), data=st.data())
def test_config_files(path, data):
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name, path.name)
        copy.write_bytes(data.draw(damaged(path.read_bytes())))
        try:
            *configs, where = configure(TrainConfig, GPTConfig, argv=[str(copy)])
        except UserError as error:
            return check_line(error, copy)
        said = runpy.run_path(str(copy))
    options = vars(configs[0]) | vars(configs[1])
    assert where.keys() == said.keys() & options.keys()
    assert all(options[name] == said[name] for name in where)


@pytest.fixture(scope="module")
def small():
    """Small pieces, batches and blocks, so that small data has many."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in dict(PIECE=30, BATCH=50, ROWS=3, BLOCK=16).items():
            patch.setattr(fineweb, name, size)
        yield


TEXT = st.sampled_from(TEXTS) | st.text("ab é中🙂\r\n\t\0,.\ufeff\u2028\x85", max_size=120)
LINE = st.builds(lambda text, ascii: json.dumps({"text": text}, ensure_ascii=ascii).encode(), TEXT, st.booleans())
BAD_LINES = [
    b"[" * 100_000, b'{"text": "a"', b'{"text": "\xff"}', b'{"text": "\xed\xa0\x80"}', b"\0", b"null", b"{}", b'"',
    b'{"text": "a"}{"text": "b"}', b'{"text": ' + b"9" * 5000 + b"}", b'{"text": null}', b'{"txt": "a"}', b" \t\r",
    b'\xef\xbb\xbf{"text": "a"}', b'{"text": "\\ud83d"}', b'{"text": "\t"}', b'{"text": NaN}', b'{"text": ["a"]}',
]  # fmt: skip


def read(kind, data):
    """The oracle: the documents of a source file, None where it is damaged."""
    with contextlib.suppress(Exception):  # the oracle's refusals
        if kind == ".txt":
            return [data.decode("utf-8-sig")]
        if kind == ".parquet":
            file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), page_checksum_verification=True)
            texts = file.read(["text"]).column("text").to_pylist()
            assert len(texts) == file.metadata.num_rows
        else:
            data = gzip.decompress(data) if kind == ".jsonl.gz" else data
            text = data.decode("utf-8-sig", "surrogatepass")  # as json.loads reads bytes
            lines = [line for line in text.split("\n") if line.strip(" \t\r\f\v")]
            texts = [json.loads(line)["text"] for line in lines]
        assert all(isinstance(text, str | None) for text in texts)
        return [text or "" for text in texts]


@cases(120, 5000)
@given(kind=st.sampled_from([".txt", ".jsonl", ".jsonl.gz", ".parquet"]), data=st.data())
def test_source_files(small, kind, data):
    if kind == ".txt":
        content = data.draw(TEXT).encode()
    elif kind == ".parquet":
        table, sink = pyarrow.table({"text": data.draw(st.lists(TEXT, min_size=1, max_size=9))}), io.BytesIO()
        pyarrow.parquet.write_table(table, sink, row_group_size=2, write_page_checksum=True)
        content = sink.getvalue()
    else:
        lines = data.draw(st.lists(LINE, max_size=6) | st.lists(LINE | st.sampled_from(BAD_LINES), max_size=6))
        content = data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join([*lines, b""])
        content = gzip.compress(content, mtime=0) if kind == ".jsonl.gz" else content
    content = data.draw(damaged(content))
    documents = read(kind, content)
    with tempfile.TemporaryDirectory() as name:
        path, out_dir = Path(name, f"a{kind}"), Path(name, "out")
        path.write_bytes(content)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                fineweb.prepare(
                    fineweb.DataConfig(files=str(path), out_dir=str(out_dir), tokenizer="bytes", val_fraction=0)
                )
        except UserError as error:
            markup = content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"<", b"version"))
            assert not any(documents or []) or (kind == ".txt" and markup)
            return check_line(error, path)
        data = b"".join(shard.read_bytes()[1024:] for shard in sorted(out_dir.glob("*_train_*.bin")))
    in_utf8 = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode() for text in documents]
    assert list(struct.unpack(f"<{len(data) // 2}H", data)) == [token for text in in_utf8 for token in (256, *text)]


OWN = tokenizers.ByteLevelBPETokenizer()
OWN.train_from_iterator(TEXTS * 3, 290, special_tokens=["<|endoftext|>", "<pad>"], show_progress=False)


@cases(40, 1500)
@given(changed(OWN.to_str()))
def test_tokenizers(content):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "own.json")
        path.write_bytes(content)
        try:
            enc = get_tokenizer(str(path))
        except UserError as error:
            return check_line(error, path)
    for text in TEXTS:
        assert enc.encode_ordinary(text) == library_ids(content.decode(), [text])[0]
        assert enc.decode(enc.encode_ordinary(text)) == text


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A function (hypothesis prints arguments): a run's folder and its options."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TRAIN, f"--data_dir={data_dir}", "--val_interval=0"]
    assert call("train_gpt2.py", *flags, f"--out_dir={folder}", "--max_steps=1").returncode == 0
    return lambda: (folder, flags)


@cases(15, 800)
@given(data=st.data())
def test_checkpoints(trained, data):
    """It speaks and goes on, or is refused in one line that names it. (What kills the process fails too.)"""
    folder, flags = trained()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "ckpt_000001.pt")
        path.write_bytes(data.draw(damaged((folder / path.name).read_bytes())))
        speak = ("sample.py", f"--model={path}", "--max_new_tokens=2", "--device=cpu")
        for command in (speak, ("train_gpt2.py", *flags, f"--out_dir={name}", "--resume=True", "--max_steps=2")):
            done = call(*command)
            *_, last = done.stderr.splitlines() or [""]
            assert done.returncode in (0, 2)
            assert done.returncode == 0 or (last.startswith("error: ") and name in last), done.stderr
