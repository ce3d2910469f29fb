"""Where text comes from: a Hugging Face data set, local files, or a download.

A source is a list of parts, a file each. A part's reader yields (text, whether it begins a document): a row is a whole
document, a text file is one that comes in several texts. No document reaches into the next part.
"""

import codecs
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from configurator import UserError, nearest
from files import whole_file

ROW_FILES = (".jsonl", ".jsonl.gz", ".parquet")  # rows with a column of text; any other file is a text
TEXT_TYPES = ("string", "large_string", "string_view")  # Arrow's
ROWS = 256  # read at a time
BLOCK = 1 << 20  # bytes of a text file read at a time

Texts = Iterator[tuple[str, bool]]
Reader = Callable[[], Texts]


class Part(NamedTuple):
    split: str
    read: Reader
    documents: int | None = None  # None if only reading can tell


class Source(NamedTuple):
    parts: list[Part]  # in the order in which they are written
    documents: int | None  # to train on, before validation is taken from them; None if only reading can tell
    size: int | None  # their bytes; None if only reading can tell
    fingerprint: str  # changes with the source's files


def open_source(config: Any, out_dir: Path) -> Source:
    """The source that fineweb.py's DataConfig names; a download is kept in out_dir. Raises UserError."""
    if config.dataset:
        return open_dataset(config)
    paths = find_files(config.files, config.exclude) if config.files else [download(config.url, out_dir)]
    opened = [open_file(path, config.text_column, config.separator) for path in paths]
    readers, counts = zip(*opened, strict=True)
    documents = None if None in counts else sum(counts)
    size = None if any(path.endswith(ROW_FILES) for path in paths) else sum(map(os.path.getsize, paths))
    parts = make_parts("train", readers, counts, config.join)
    return Source(parts, 1 if config.join else documents, size, fingerprint(paths))


def make_parts(split: str, readers: list[Reader], counts: list[int | None], join: bool) -> list[Part]:
    if join:
        return [Part(split, partial(read_joined, readers), 1)]
    return [Part(split, read, documents) for read, documents in zip(readers, counts, strict=True)]


def read_joined(readers: list[Reader]) -> Texts:
    """All rows of all files as one document, each ending in a new line."""
    is_first, ended = True, True
    for read in readers:
        for text, begins in read():
            yield text if ended or not begins else "\n" + text, is_first
            is_first, ended = False, text.endswith("\n")
    if not ended:
        yield "\n", False


def take_share(source: Source, number: int, count: int, numbered: bool) -> tuple[Source, int]:
    """Share 0 to count - 1 of a source: some parts in a row or, where there are fewer parts than shares, some documents
    in a row of one part. And the number of its first document in the whole source; 0 unless `numbered`."""
    parts = source.parts
    first, end = len(parts) * number // count, len(parts) * (number + 1) // count
    taken, begin = parts[first:end], 0
    if len(parts) < count:
        sharing = [other for other in range(count) if len(parts) * other // count == first]
        total, place = count_documents(parts[first : first + 1]), sharing.index(number)
        begin, end = (total * k // len(sharing) for k in (place, place + 1))
        taken = [Part(parts[first].split, partial(read_some, parts[first].read, begin, end), end - begin)]
    if numbered:
        begin += count_documents(parts[:first])
    counts = [part.documents for part in taken]
    size = source.size and source.size // count  # about: only the progress bar wants it
    return source._replace(parts=taken, documents=None if None in counts else sum(counts), size=size), begin


def count_documents(parts: list[Part]) -> int:
    """How many there are; reads where only reading can tell."""
    return sum(sum(begins for _, begins in read()) if known is None else known for _, read, known in parts)


def read_some(read: Reader, begin: int, end: int) -> Texts:
    """Documents begin to end - 1 of a part."""
    number = -1
    for text, begins in read():
        number += begins
        if number >= end:
            return
        if number >= begin:
            yield text, begins


def fingerprint(paths: list[str]) -> str:
    """Of names, and of local files' sizes and modification times; a path on the hub holds the commit."""
    states = [os.stat(path) if os.path.exists(path) else None for path in paths]
    files = [(p, s.st_size, s.st_mtime_ns) if s else (p,) for p, s in zip(paths, states, strict=True)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Files


def find_files(pattern: str, exclude: str | None) -> list[str]:
    found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    paths = sorted(leave_out(found, exclude))
    if not paths:
        raise UserError(f"--files={pattern}: no file there{' that --exclude leaves' if found else ''}")
    return paths


def leave_out(paths: list[str], exclude: str | None) -> list[str]:
    """Those that match none of the globs in exclude."""
    excluded = [os.path.expanduser(name.strip()) for name in (exclude or "").split(",")]
    return [path for path in paths if not any(fnmatch(path, name) for name in excluded)]


def download(url: str, out_dir: Path) -> str:
    """Download once -> the path of the copy in out_dir."""
    import requests

    path = out_dir / f"download_{hashlib.sha256(url.encode()).hexdigest()[:8]}.txt"
    if not path.exists():
        try:
            with requests.get(url, stream=True, timeout=30) as response:
                response.raise_for_status()
                with whole_file(path) as file:
                    for chunk in response.iter_content(BLOCK):
                        file.write(chunk)
        except (requests.RequestException, ValueError) as error:  # ValueError: what is no URL at all
            raise UserError(f"--url={url}: {one_line(error)}") from None
    return str(path)


def open_file(path: str, column: str, separator: str | None) -> tuple[Reader, int | None]:
    """(reader, number of documents; None if only reading can tell)"""
    if path.endswith((".jsonl", ".jsonl.gz")):
        return partial(read_jsonl, path, column), None
    if path.endswith(".parquet"):
        return partial(read_parquet, path, column), open_parquet(path, column).metadata.num_rows
    if separator:
        return partial(read_separated, path, separator), None
    return partial(read_text, path), 1


def read_text(path: str) -> Texts:
    """A text file of any size, a block at a time."""
    with open(path, "rb") as file:
        data, start, last = b"", 0, False
        while not last:
            block = file.read(BLOCK)
            data, last = data + block, len(block) < BLOCK
            try:
                text, used = codecs.utf_8_decode(data, "strict", last)  # a character may straddle two blocks
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: byte {start + error.start} is not UTF-8; convert or exclude it") from None
            if start == 0:
                yield text.removeprefix("\ufeff"), True  # a byte order mark is no text
            elif text:
                yield text, False
            data, start = data[used:], start + used


def read_separated(path: str, separator: str) -> Texts:
    """A text file's documents, of any size, between separators; an empty one is none."""
    held, begins = "", True
    for text, _ in read_text(path):
        *ended, held = (held + text).split(separator)
        for document in ended:
            if document:
                yield document, begins
            begins = True
        known = held[: max(0, len(held) + 1 - len(separator))]  # the rest may be the first half of a separator
        if known:
            yield known, begins
            held, begins = held[len(known) :], False
    if held:
        yield held, begins


def read_jsonl(path: str, column: str) -> Texts:
    start = 0  # of the line, in bytes of the unpacked file
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        try:
            for line in file:
                if line.strip():
                    row = json.loads(line.decode("utf-8" if start else "utf-8-sig"))
                    yield row_text(row, column), True
                start += len(line)
        except (ValueError, EOFError, RecursionError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: the line at byte {start}: {error}") from None


def row_text(row: Any, column: str) -> str:
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        if isinstance(row, dict) and column in row:
            raise ValueError(f"{column!r} is {type(text).__name__}, not text; see --text_column")
        fields = f", but it has {shorten(', '.join(row), 200)}" if isinstance(row, dict) else ""
        raise ValueError(f"no text under {column!r}{fields}; see --text_column")
    return text


def open_parquet(path: str, column: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)  # where there are checksums
        check_column(path, column, file.schema_arrow)
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    return file


def read_parquet(path: str, column: str) -> Texts:
    rows = 0
    with open_parquet(path, column) as file:
        for text, begins in read_tables(file.iter_batches(ROWS, columns=[column]), path, column):
            yield text, begins
            rows += 1
        expected = file.metadata.num_rows
    if rows != expected:  # pyarrow leaves rows of some damaged pages out, and says nothing
        raise UserError(f"{path}: damaged: {rows:,} rows in it, but it says {expected:,}; restore or exclude it")


def read_tables(tables: Iterator, where: str, column: str) -> Texts:
    """Rows of Arrow tables; no text (null) is an empty one."""
    try:
        for table in tables:
            check_column(where, column, table.schema)
            yield from ((text or "", True) for text in table.column(column).to_pylist())
    except UserError:
        raise
    except Exception as error:  # of many types: network, broken file, text that is not UTF-8
        raise UserError(f"{where}: {one_line(error)}; when that is mended, run the same command to go on") from None


def check_column(where: str, column: str, schema: Any) -> None:
    """Raises UserError where it is not a column of text, plain or encoded by a dictionary (pandas' categories)."""
    import pyarrow

    if column not in schema.names:
        known = nearest(column, schema.names) or f"; there are {shorten(', '.join(schema.names), 200)}"
        raise UserError(f"{where}: no column {column!r} (--text_column){known}")
    if schema.names.count(column) > 1:
        raise UserError(f"{where}: {schema.names.count(column)} columns are called {column!r} (--text_column)")
    kind = schema.field(column).type
    if str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind) not in TEXT_TYPES:
        raise UserError(f"{where}: column {column!r} (--text_column) is {kind}, not text")


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face data sets


def open_dataset(config: Any) -> Source:
    os.environ.setdefault("USE_TORCH", "0")  # datasets would import torch, which takes longer than all else here
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a mistake is one line, which is ours
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    where = f"--dataset={config.dataset}" + (f" {config.subset}" if config.subset else "")
    parts = []
    try:
        builder = datasets.load_dataset_builder(config.dataset, config.subset)
        if hasattr(builder.config, "batch_size"):  # Parquet: else the first row group's size, which may be 0
            builder.config.batch_size = ROWS
        for name, splits in (("train", config.split), ("val", config.val_split)):
            streams = [builder.as_streaming_dataset(split=split) for split in splits.split("+")] if splits else []
            files = [(stream, index) for stream in streams for index in range(stream.num_shards)]
            readers = [partial(read_dataset, *file, where, config.text_column) for file in files]
            parts += make_parts(name, readers, [None] * len(readers), config.join) if readers else []
    except Exception as error:  # of many types: no network, no such data set, subset or split; all have a good message
        raise UserError(f"{where}: {one_line(error)}") from None
    infos = [(builder.info.splits or {}).get(split) for split in config.split.split("+")]
    documents = sum(info.num_examples for info in infos) if all(infos) else None
    files = {name: [str(path) for path in paths] for name, paths in (builder.config.data_files or {}).items()}
    used = [path for split in config.split.split("+") for path in files.get(split, [""])]
    if documents is None and all(path.endswith(".parquet") and os.path.exists(path) for path in used):
        documents = sum(open_parquet(path, config.text_column).metadata.num_rows for path in used)
    paths = [path for _, paths in sorted(files.items()) for path in paths]
    return Source(parts, 1 if config.join else documents, None, fingerprint(paths))


def read_dataset(stream: Any, index: int, where: str, column: str) -> Texts:
    """Rows of one source file."""
    tables = stream.shard(stream.num_shards, index).with_format("arrow").iter(ROWS)
    yield from read_tables(tables, where, column)
