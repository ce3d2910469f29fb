"""metrics.jsonl, the record of a run: one JSON object a line, each with its "kind"."""

import json
import math
import os
import sys
from pathlib import Path
from typing import IO

from configurator import UserError
from files import lock, partial_of


class Metrics:
    """Writes out_dir/metrics.jsonl; no other process does until this one ends.

    A resumed run first drops what the last one recorded past the checkpoint's step, and the evaluations at that very
    step, which are made anew. `earlier` is the last run's file, from `lock_metrics`. Raises UserError where another run
    began in out_dir meanwhile, OSError where out_dir cannot be written.
    """

    def __init__(self, out_dir: str, resumed_at: int | None, earlier: IO | None):
        self.path = Path(out_dir, "metrics.jsonl")
        self.unwritten, self.failing = b"", False
        os.makedirs(out_dir, exist_ok=True)
        kept = []
        if earlier is None:
            try:
                earlier = open(self.path, "xb")  # noqa: SIM115
            except FileExistsError:
                raise UserError(f"{out_dir}: another run has just begun there; choose another --out_dir") from None
        elif resumed_at is not None:
            for record in read_metrics(self.path):
                evaluation = record["kind"] in ("val", "hellaswag", "sample")
                if record.get("step", 0) < resumed_at + (not evaluation):
                    kept.append(json.dumps(record) + "\n")
        partial = partial_of(self.path)
        self.file = open(partial, "wb", buffering=0)  # noqa: SIM115  (open until the process ends)
        try:
            lock(self.file.fileno(), out_dir)  # before it takes the name, so that there is no moment without a lock
            self.file.write("".join(kept).encode())
            os.fsync(self.file.fileno())
            os.replace(partial, self.path)
        except OSError:
            partial.unlink()
            raise
        earlier.close()

    def write(self, kind: str, **values: object) -> None:
        """One record. Numbers that are not finite become null: JSON has no NaN."""
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        self.unwritten += (json.dumps({"kind": kind, **values}) + "\n").encode()
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.failing = False
        except OSError as error:  # a full disk ends no run: the next record tries again
            if not self.failing:
                print(f"{self.path}: {error.strerror}; records wait in memory", file=sys.stderr, flush=True)
            self.failing = True

    def sync(self) -> None:
        """Return once all records are on disk. Raises OSError where that fails."""
        self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        if self.unwritten:
            raise OSError(f"{self.path}: the disk took a part of a record")
        os.fsync(self.file.fileno())


def lock_metrics(out_dir: str) -> IO | None:
    """The metrics file of the run in out_dir, which no other process can write until it is closed; None where there is
    none. Raises UserError where another process is writing it: a run that is still going."""
    path = Path(out_dir, "metrics.jsonl")
    if not path.exists():
        return None
    file = open(path, "ab")  # noqa: SIM115
    lock(file.fileno(), out_dir)
    return file


def read_metrics(path: Path) -> list[dict]:
    """All records of a metrics.jsonl. What a kill or crash tore is left out, with a warning unless it is the end."""
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["kind"], str):
                raise TypeError
            records.append(record)
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                print(f"{path}:{number}: not a record, left out", file=sys.stderr)
    return records


def bits_per_byte(loss: float, meta: dict) -> float | None:
    """Nats per token to bits per byte of UTF-8, comparable across tokenizers; None where meta.json does not say."""
    return loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"] if meta.get("val_bytes") else None


def word_loss(loss: float, meta: dict) -> float | None:
    """Nats per token to nats per word of the original text, whose exp is the word-level perplexity; None where
    meta.json does not say. `loss` is that of the whole val split: the tokens behind its last whole window are taken to
    be as hard as the rest (evaluate.py predicts them too)."""
    words = meta.get("val_words", 0)
    return loss * (meta["val_tokens"] - 1) / (words - 1) if words > 1 else None
