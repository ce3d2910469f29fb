"""Random input to everything that reads some: it is refused in one line, or it means exactly what it says.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from conftest import TRAIN, call
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_tokenizer import TEXTS

import fineweb
from configurator import UserError, configure
from dataloader import Windows
from files import shard_header
from tokenizer import get_tokenizer

FULL = os.environ.get("FUZZ") == "full"


def cases(small, full):
    """So many inputs in the suite, and so many with FUZZ=full, which also makes a failing one small."""
    common = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    if FULL:
        return settings(max_examples=full, **common)
    return settings(max_examples=small, derandomize=True, phases=[Phase.generate], **common)


def check_line(error, *names):
    """One line, which names the file."""
    message = str(error)
    assert len(message.splitlines()) == 1
    assert not names or any(str(name) in message for name in names), message


@st.composite
def damaged(draw, data):
    """The bytes of a file, most often damaged."""
    data, how = bytearray(data), draw(st.sampled_from(["whole", "cut", "flip", "zeros", "longer", "noise"]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "cut":
        del data[place:]
    elif how == "flip" and data:
        data[place] ^= 1 << draw(st.integers(0, 7))
    elif how == "zeros":
        data[place : place + 9] = bytes(len(data[place : place + 9]))
    elif how in ("longer", "noise"):
        data = (data if how == "longer" else b"") + draw(st.binary(max_size=40))
    return bytes(data)


# ---- Config files


@dataclass(frozen=True)
class Plain:
    """An option of every type, and no rules."""

    whole: int = 1
    maybe_whole: int | None = None
    number: float = 1.0
    switch: bool = False
    text: str = "text"
    choice: Literal["one", "two"] = "one"


LINES = [
    "import math", "import os as _os", "from math import *", "import nothere", "raise ValueError('a\\nb')",
    "class _R:\n    __repr__ = lambda _: 'a\\nb'\ntext = _R()", "def whole(): return 1", "whole = lambda: 1", "int = 3",
    "def _f(x): return 2 * x\nwhole = _f(4)", "for whole in range(3): pass", "whole, number = 2, 3.5", "whole += 1",
    "with open('nothere'): pass", "exec('whole = 7')", "number = float('nan')", "whole = 1e400", "whole = 4e0", "\f",
    "text = '\\ud800'", "choice = 'x' * 10 ** 6", "switch = 1", "whole = (", "  whole = 1", "1 = whole", "widht = 1",
    "def f(:", "'''", "yield 1", "(" * 150 + ")" * 150, "def _f(): return _f()\n_f()", "# coding: nothere", "\\",
]  # fmt: skip
VALUES = st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=5) | st.sampled_from(["one", "two"])
ASSIGNED = st.tuples(st.sampled_from(list(Plain.__annotations__)), VALUES).map(lambda t: f"{t[0]} = {t[1]!r}")


@cases(100, 3000)
@given(lines=st.lists(ASSIGNED | st.sampled_from(LINES), max_size=5), data=st.data())
def test_config_files(lines, data):
    source = "\n".join(lines).replace("= nan", "= float('nan')").replace("= inf", "= float('inf')") + "\n"
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "c.py")
        path.write_bytes(data.draw(damaged(source.encode(errors="replace"))))
        try:
            plain, where = configure(Plain, argv=[str(path)])
        except UserError as error:
            return check_line(error, path)
        said = runpy.run_path(str(path), run_name="config")
    assert set(where) == said.keys() & set(Plain.__annotations__)
    for option, value in vars(plain).items():
        assert value == said.get(option, getattr(Plain, option))
        assert type(said.get(option, value)) in (type(value), int, float)


# ---- Shards


def tokens_of(data):
    """The tokens in the bytes of a file, None where they are no shard."""
    magic, version, count = struct.unpack_from("<3i", data) if len(data) >= 1024 else (0, 0, 0)
    whole = (magic, version) == (20240520, 1) and len(data) == 1024 + 2 * count
    return list(struct.unpack_from(f"<{count}H", data, 1024)) if whole else None


@st.composite
def shard_files(draw):
    tokens = draw(st.lists(st.integers(0, 65535), max_size=40))
    data = shard_header(len(tokens)) + struct.pack(f"<{len(tokens)}H", *tokens)
    if draw(st.booleans()):
        numbers = [draw(st.just(right) | st.integers(-(2**31), 2**31 - 1)) for right in (20240520, 1, len(tokens))]
        data = struct.pack("<3i", *numbers) + data[12:]
    return draw(damaged(data)) if draw(st.booleans()) else data


@cases(100, 2500)
@given(files=st.lists(shard_files(), min_size=1, max_size=3), seq_len=st.integers(1, 9))
def test_windows_of_shards(files, seq_len):
    shards = [tokens_of(data) for data in files]
    with tempfile.TemporaryDirectory() as name:
        for number, data in enumerate(files):
            Path(name, f"x_train_{number:06d}.bin").write_bytes(data)
        try:
            windows = Windows(name, "train", seq_len)
        except UserError as error:
            assert None in shards or max(map(len, shards)) <= seq_len
            return check_line(error, name)
        starts = [shard[i : i + seq_len + 1] for shard in shards for i in range(0, len(shard) - seq_len, seq_len)]
        x, y = windows.read(np.arange(len(windows)))
        assert (x.tolist(), y.tolist()) == ([tokens[:-1] for tokens in starts], [tokens[1:] for tokens in starts])


# ---- Data preparation


@pytest.fixture(scope="module")
def small():
    """Small pieces, batches and blocks, so that small data has many."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in dict(PIECE=30, BATCH=50, ROWS=3, BLOCK=16).items():
            patch.setattr(fineweb, name, size)
        yield


def prepare(out_dir, files, **options):
    options = dict(tokenizer="bytes", num_proc=1, val_fraction=0.5) | options
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fineweb.prepare(fineweb.DataConfig(out_dir=str(out_dir), files=str(files), **options))


def check_source(data, suffix, documents):
    """Prepare such a file: what comes out are these documents, or (None) one line that names the file."""
    with tempfile.TemporaryDirectory() as name:
        path, out_dir = Path(name, f"a{suffix}"), Path(name, "out")
        path.write_bytes(data)
        try:
            prepare(out_dir, path)
        except UserError as error:
            too_little = "no text is left" in str(error)
            assert not documents or fineweb_refuses(data) or (too_little and sum(map(bool, documents)) < 2)
            assert not list(out_dir.glob("*.bin"))
            return check_line(error, path, "no text is left")
        middle = len(documents) // 2
        parts = documents[:middle], documents[middle:]
        if len(documents) == 1:
            text = documents[0]
            parts = [text[: len(text) // 2]], [text[len(text) // 2 :]]
        for split, texts in zip(("train", "val"), parts, strict=True):
            shards = [tokens_of(shard.read_bytes()) for shard in sorted(out_dir.glob(f"*_{split}_*.bin"))]
            in_utf8 = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode() for text in texts]
            want = [token for text in in_utf8 for token in (256, *text)]
            assert [token for shard in shards for token in shard] == want


def fineweb_refuses(data):
    """Files that are not the text that their names promise."""
    return data.lstrip().startswith((b"{", b"<", b"version", b"\xef\xbb\xbf{"))


TEXT = st.sampled_from(TEXTS) | st.text("ab é中🙂\r\n\t\0,.\ufeff\u2028\x85", max_size=120)
BAD_LINES = [
    b"[" * 100_000, b'{"text": "a"', b'{"text": "\xff"}', b'{"text": "\xed\xa0\x80"}', b"\0", b"null", b"{}", b'"',
    b'{"text": "a"}{"text": "b"}', b'{"text": ' + b"9" * 5000 + b"}", b'{"text": null}', b'{"txt": "a"}', b" \t\r",
    b'\xef\xbb\xbf{"text": "a"}', b'{"text": "\\ud83d"}', b'{"text": "\t"}', b'{"text": NaN}', b'{"text": ["a"]}',
]  # fmt: skip
LINE = st.builds(lambda text, ascii: json.dumps({"text": text}, ensure_ascii=ascii).encode(), TEXT, st.booleans())
LINES_OF_TEXT = st.lists(LINE, max_size=6) | st.lists(LINE | st.sampled_from(BAD_LINES), max_size=6)


def read_lines(data):
    """The documents of JSON lines, None where a line is wrong."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        lines = [line for line in data.decode("utf-8-sig").split("\n") if line.strip(" \t\r\f\v")]
        texts = [json.loads(line)["text"] for line in lines]
        return [text or "" for text in texts] if all(isinstance(text, str | None) for text in texts) else None


def read_parquet(data):
    """The documents of a Parquet file, None where it is damaged or has no column of text."""
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), page_checksum_verification=True)
        texts = file.read(["text"]).column("text").to_pylist()
        assert len(texts) == file.metadata.num_rows
        assert all(isinstance(text, str | None) for text in texts)
        return [text or "" for text in texts]
    except Exception:  # whatever: the oracle's refusals
        return None


@st.composite
def parquet_files(draw):
    kind, values = draw(st.sampled_from([("string", TEXT), ("large_string", TEXT), ("int64", st.integers(0, 9))]))
    column = pyarrow.array(draw(st.lists(values | st.none(), max_size=9)), getattr(pyarrow, kind)())
    names = draw(st.sampled_from([["text"]] * 3 + [["text", "id"], ["text", "text"], ["txt"], []]))
    sink, table = io.BytesIO(), pyarrow.Table.from_arrays([column] * len(names), names)
    pyarrow.parquet.write_table(table, sink, row_group_size=2, write_page_checksum=draw(st.booleans()))
    return draw(damaged(sink.getvalue()))


@cases(120, 5000)
@given(lines=LINES_OF_TEXT, end=st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n"]), data=st.data())
def test_source_files(small, lines, end, data):
    kind = data.draw(st.sampled_from([".txt", ".jsonl", ".jsonl.gz", ".parquet"]))
    content = end.join([*lines, b""])
    documents = None
    if kind == ".txt":
        content = data.draw(damaged(data.draw(TEXT).encode()))
        with contextlib.suppress(UnicodeDecodeError):
            documents = [content.decode("utf-8-sig")]  # a byte order mark is no text
    elif kind == ".jsonl":
        documents = read_lines(content)
    elif kind == ".jsonl.gz":
        content = data.draw(damaged(gzip.compress(content, mtime=0)))
        with contextlib.suppress(Exception):  # whatever: the oracle's refusals
            documents = read_lines(gzip.decompress(content))
    else:
        content = data.draw(parquet_files())
        documents = read_parquet(content)
    check_source(content, kind, documents)


# ---- JSON that this program reads back, with one value removed or replaced

JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers())
WRONG = [None, True, -1, 1.5, "1", "", [], {}, [[]], {"a": 1}, "é\n", math.nan, 0, 70_000, 2**31, 2**64, 10**400, "a b"]


def places_of(data, path=()):
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else []
    return [path, *(inner for key, value in items for inner in places_of(value, (*path, key)))]


def change(draw, data, places, values):
    *path, last = draw(st.sampled_from([place for place in places if place]))
    inner = functools.reduce(lambda inner, key: inner[key], path, data)
    if draw(st.booleans()):
        inner[last] = draw(st.sampled_from(values))
    else:
        del inner[last]
    return data


@functools.cache
def own_tokenizer():
    learned = tokenizers.ByteLevelBPETokenizer()
    learned.train_from_iterator(TEXTS * 3, 290, special_tokens=["<|endoftext|>", "<pad>"], show_progress=False)
    return learned.to_str()


@cases(40, 1500)
@given(data=st.data())
def test_tokenizer_files(data):
    content = json.loads(own_tokenizer())
    places = [place for i, place in enumerate(places_of(content)) if len(place) < 3 or i % 7 == 0]  # not every token
    places.remove(("model", "continuing_subword_prefix"))  # of which some values abort the library
    content = change(data.draw, content, places, [*WRONG, "<|endoftext|>", "BPE", "a", "Ġ", ["a", "b"]])
    content = data.draw(damaged(json.dumps(content).encode()) | st.just(json.dumps(content).encode()))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "own.json")
        path.write_bytes(content)
        try:
            enc = get_tokenizer(str(path))
        except UserError as error:
            return check_line(error, path)
        theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    theirs.no_truncation()
    theirs.no_padding()
    for text in TEXTS:
        assert enc.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids
        assert enc.decode(enc.encode_ordinary(text)) == text


@pytest.fixture(scope="module")
def preparations(small, tmp_path_factory):
    """A function (hypothesis prints arguments): {name: bytes} of a killed and of a whole preparation, their source."""
    folder, replace, left, states = tmp_path_factory.mktemp("preparations"), os.replace, 12, []
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * (i % 7)}) + "\n" for i in range(30)))

    def die(source, target):
        nonlocal left
        left -= 1
        if not left:
            raise UserError("killed")
        replace(source, target)

    for stop in (die, replace):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(UserError):
            patch.setattr(os, "replace", stop)
            prepare(folder / "out", folder / "a.jsonl", shard_tokens=100)
        states.append({path.name: path.read_bytes() for path in (folder / "out").iterdir()})
    assert "progress.json" in states[0]
    assert 3 < len(states[0]) < len(states[1])
    return lambda: (*states, folder / "a.jsonl")


@cases(60, 1200)
@given(data=st.data())
def test_damaged_preparations(preparations, data):
    """A shard or a progress.json that is damaged, or a meta.json: one line, or the same bytes in the end."""
    killed, finished, source = preparations()
    before, name = data.draw(st.sampled_from([(dict(killed), "progress.json"), (dict(finished), "meta.json")]))
    how = data.draw(st.sampled_from(["damaged", "other", "shard"]))
    if how == "shard" and name == "progress.json":
        shard = data.draw(st.sampled_from([name for name in before if name.endswith(".bin")]))
        before[shard] = before[shard][: data.draw(st.integers(0, len(before[shard])))]
    else:
        before[name] = data.draw(JSON.map(json.dumps)).encode() if how == "other" else data.draw(damaged(before[name]))
    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder, "out")
        out_dir.mkdir()
        for file, content in before.items():
            (out_dir / file).write_bytes(content)
        try:
            prepare(out_dir, source, shard_tokens=100)
        except UserError as error:
            return check_line(error, folder)
        after = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    shards = {file: content for file, content in finished.items() if file.endswith(".bin")}
    assert after == before or {file: after.get(file) for file in shards} == shards


# ---- Checkpoints and records of a run


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A function (hypothesis prints arguments): a run's folder and its options."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TRAIN, f"--data_dir={data_dir}", "--val_interval=0"]
    assert call("train_gpt2.py", *flags, f"--out_dir={folder}", "--max_steps=1").returncode == 0
    return lambda: (folder, flags)


@cases(15, 800)
@given(data=st.data())
def test_damaged_checkpoints(trained, data):
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


@cases(2, 200)
@given(data=st.data())
def test_damaged_metrics(trained, data):
    records = [json.loads(line) for line in (trained()[0] / "metrics.jsonl").read_text().splitlines()]
    records = change(data.draw, records, places_of(records), WRONG) if data.draw(st.booleans()) else records
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    with tempfile.TemporaryDirectory() as name:
        Path(name, "metrics.jsonl").write_bytes(data.draw(damaged(content) | st.just(content)))
        done = call("report.py", name)
        *_, last = done.stderr.splitlines() or [""]
        assert last.startswith("error: ") == (done.returncode == 2) == (done.returncode != 0), done.stderr
