"""Where text comes from: a Hugging Face data set, local files, or a download.

A source is a list of readers, a file each. A reader takes a place in its file (0, or one that it gave out) and yields
(place, text, first, last) from there on: a row is a whole document, a text file is one that comes in several texts.
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

Reader = Callable[[int], Iterator[tuple[int, str, bool, bool]]]


class Source(NamedTuple):
    parts: list[tuple[str, list[Reader]]]  # (split, readers), in the order in which they are written
    documents: int | None  # in the first part; None where that takes reading it
    size: int | None  # bytes of text in the first part; None where that takes reading it
    fingerprint: str  # changes with the source's files


def open_source(config: Any, out_dir: Path) -> Source:
    """The source that fineweb.py's DataConfig names; a download is kept in out_dir. Raises UserError."""
    if config.dataset:
        return open_dataset(config)
    paths = find_files(config.files, config.exclude) if config.files else [download(config.url, out_dir)]
    readers, counts = zip(*(open_file(path, config.text_column) for path in paths), strict=True)
    documents = None if None in counts else sum(counts)
    size = None if any(path.endswith(ROW_FILES) for path in paths) else sum(map(os.path.getsize, paths))
    return Source([("train", list(readers))], 1 if config.join else documents, size, fingerprint(paths))


def read_texts(readers: list[Reader], join: bool, file: int = 0, place: int = 0) -> Iterator[tuple]:
    """((file, place), text, whether it begins a document) of all texts from a place in a file on."""
    for number, read in enumerate(readers[file:], file):
        for at, text, first, last in read(place):
            if join and last and not text.endswith("\n"):
                text += "\n"
            yield (number, at), text, first and not join
        place = 0


def fingerprint(paths: list[str]) -> str:
    """Of names, and of local files' sizes and modification times; a path on the hub holds the commit."""
    files = [(path, *file_state(path)) for path in paths]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def file_state(path: str) -> tuple[int, ...]:
    """(size, modification time) of a local file, () of any other."""
    if not os.path.exists(path):
        return ()
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Files


def find_files(pattern: str, exclude: str | None) -> list[str]:
    found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    excluded = [os.path.expanduser(name.strip()) for name in (exclude or "").split(",")]
    paths = sorted(path for path in found if not any(fnmatch(path, name) for name in excluded))
    if not paths:
        raise UserError(f"--files={pattern}: no file there{' that --exclude leaves' if found else ''}")
    return paths


def download(url: str, out_dir: Path) -> str:
    """Download once -> the path of the copy in out_dir."""
    import requests

    path = out_dir / f"download_{hashlib.sha256(url.encode()).hexdigest()[:8]}.txt"
    if not path.exists():
        try:
            with requests.get(url, stream=True, timeout=30) as response:
                response.raise_for_status()
                out_dir.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as file:
                    for chunk in response.iter_content(BLOCK):
                        file.write(chunk)
        except (requests.RequestException, ValueError) as error:  # ValueError: what is no URL at all
            raise UserError(f"--url={url}: {one_line(error)}") from None
    return str(path)


def open_file(path: str, column: str) -> tuple[Reader, int | None]:
    """(reader, number of documents; None where that takes reading the file)"""
    if path.endswith((".jsonl", ".jsonl.gz")):
        return partial(read_jsonl, path, column), None
    if path.endswith(".parquet"):
        return partial(read_parquet, path, column), open_parquet(path, column).metadata.num_rows
    return partial(read_text, path), 1


def read_text(path: str, start: int) -> Iterator[tuple]:
    """A text file of any size, from byte `start` on."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        last = False
        while not last:
            file.seek(start)
            data = file.read(BLOCK)
            last = start + len(data) >= size or len(data) < BLOCK
            try:
                text, used = codecs.utf_8_decode(data, "strict", last)  # a character may straddle two blocks
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: byte {start + error.start} is not UTF-8; convert or exclude it") from None
            yield start, text.removeprefix("\ufeff") if start == 0 else text, start == 0, last  # no byte order mark
            start += used


def read_jsonl(path: str, column: str, start: int) -> Iterator[tuple]:
    """Rows from byte `start` (of the unpacked file) on."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        try:
            file.seek(start)
            for line in file:
                if line.strip():
                    row = json.loads(line.decode("utf-8" if start else "utf-8-sig"))
                    yield start, row_text(row, column), True, True
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


def read_parquet(path: str, column: str, start: int) -> Iterator[tuple]:
    """Rows from row `start` on."""
    with open_parquet(path, column) as file:
        yield from read_tables(file.iter_batches(ROWS, columns=[column]), path, column, start)


def read_tables(tables: Iterator, where: str, column: str, start: int) -> Iterator[tuple]:
    """Rows of Arrow tables, from row `start` on; no text (null) is an empty one."""
    row = 0
    while True:
        try:
            table = next(tables, None)
            if table is None:
                return
            check_column(where, column, table.schema)
            skip = max(0, start - row)
            texts = table.column(column).slice(skip).to_pylist()
        except UserError:
            raise
        except Exception as error:  # of many types: network, broken file, text that is not UTF-8
            raise UserError(f"{where}: {one_line(error)}; when that is mended, run the same command to go on") from None
        for number, text in enumerate(texts, row + skip):
            yield number, text or "", True, True
        row += table.num_rows


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


def import_datasets() -> Any:
    os.environ.setdefault("USE_TORCH", "0")  # datasets would import torch, which takes longer than all else here
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a mistake is one line, which is ours
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    return datasets


def open_dataset(config: Any) -> Source:
    datasets = import_datasets()
    where = f"--dataset={config.dataset}" + (f" {config.subset}" if config.subset else "")
    parts = []
    try:
        builder = datasets.load_dataset_builder(config.dataset, config.subset)
        if hasattr(builder.config, "batch_size"):  # Parquet: else the first row group's size, which may be 0
            builder.config.batch_size = ROWS
        for name, split in [("train", config.split)] + ([("val", config.val_split)] if config.val_split else []):
            streams = [builder.as_streaming_dataset(split=each) for each in split.split("+")]
            files = [(stream, index) for stream in streams for index in range(stream.num_shards)]
            parts.append((name, [partial(read_dataset, *file, where, config.text_column) for file in files]))
    except Exception as error:  # of many types: no network, no such data set, subset or split; all have a good message
        raise UserError(f"{where}: {one_line(error)}") from None
    infos = [(builder.info.splits or {}).get(split) for split in config.split.split("+")]
    documents = sum(info.num_examples for info in infos) if all(infos) else None
    data_files = {name: [str(path) for path in paths] for name, paths in (builder.config.data_files or {}).items()}
    used = [path for split in config.split.split("+") for path in data_files.get(split, [""])]
    if documents is None and all(path.endswith(".parquet") and os.path.exists(path) for path in used):
        documents = sum(open_parquet(path, config.text_column).metadata.num_rows for path in used)
    paths = [path for _, paths in sorted(data_files.items()) for path in paths]
    return Source(parts, 1 if config.join else documents, None, fingerprint(paths))


def read_dataset(stream: Any, index: int, where: str, column: str, start: int) -> Iterator[tuple]:
    """Rows of one source file, from row `start` on.

    Not the stream's own state_dict: datasets 5.2 continues right from it once, but not a second time.
    """
    tables = stream.shard(stream.num_shards, index).with_format("arrow").iter(ROWS)
    yield from read_tables(tables, where, column, start)
