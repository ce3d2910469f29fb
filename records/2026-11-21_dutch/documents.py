"""The documents of a glob: the rows of Parquet files (column text), and whole text files."""

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet


def documents(pattern: str) -> Iterator[str]:
    for path in sorted(glob.glob(pattern, recursive=True)):
        if path.endswith(".parquet"):
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256, columns=["text"]):
                yield from batch.column("text").to_pylist()
        elif "/site-packages/" not in path and Path(path).is_file():
            with contextlib.suppress(UnicodeDecodeError):  # Python's tests have files in other encodings
                yield Path(path).read_text(encoding="utf-8")
