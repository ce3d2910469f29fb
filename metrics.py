"""metrics.jsonl, the record of a run: one JSON object a line, each with its "kind"."""

import contextlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from configurator import UserError
from files import lock_folder, remove_partial, sync, whole_file


class Metrics:
    """out_dir/metrics.jsonl and the terminal. First `lock`, then `begin`, then the rest."""

    def __init__(self, out_dir: str, is_main: bool = True):
        """`is_main`: whether this process writes and prints; of several processes one does."""
        self.path, self.is_main = Path(out_dir, "metrics.jsonl"), is_main
        self.lock_handle, self.file, self.unwritten, self.wandb = None, None, b"", None
        self.begun = self.has_run = False  # whether there was a file, and whether it has a record of the kind "run"

    def lock(self) -> bool:
        """Lock out_dir, if it exists. Returns whether a run has begun there. Raises UserError."""
        with self.one_line_errors():
            if self.lock_handle is None and self.path.parent.is_dir():
                self.lock_handle = lock_folder(self.path.parent)
            self.begun = self.path.exists()
        return self.begun

    def records(self) -> list[dict]:
        """All records so far; none if there is no file. Raises UserError."""
        with self.one_line_errors("read"):
            return read_metrics(self.path) if self.path.exists() else []

    def is_done(self, step: int) -> bool:
        """Whether the file says that the run ended at this step."""
        return any(record.get("event") == "done" and record.get("step") == step for record in self.records())

    def begin(self, resumed_at: int | None, log_to: str | None = None, again: Collection[str] = ()) -> None:
        """Start an empty file, or keep the records up to the resumed step, but not that step's
        kinds in `again`. `log_to` ("wandb") gets the same numbers. Raises UserError."""
        spec = importlib.util.find_spec(log_to) if log_to else None
        if log_to and (spec is None or spec.origin is None):  # Python imports even a stray folder of that name
            raise UserError(f"log_to = {log_to!r} needs a package: pip install {log_to}")
        begun, kept = self.begun, []
        with self.one_line_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.lock() and not begun:
                raise UserError(f"{self.path.parent}: another run has just begun there; choose another --out_dir")
            remove_partial(self.path.parent, "metrics.jsonl")
            if resumed_at is not None:
                records = self.records()
                kept = [r for r in records if r.get("step", 0) < (resumed_at if r["kind"] in again else resumed_at + 1)]
            with whole_file(self.path) as file:  # the old file stays until the new one is on disk
                file.writelines(map(to_line, kept))
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        header = next((record for record in kept if record["kind"] == "run"), None)
        self.has_run = header is not None
        if log_to:
            self.wandb = WandB(str(self.path.parent))
            if header:
                self.attempt(lambda: self.wandb.show(header))

    @contextlib.contextmanager
    def one_line_errors(self, done: str = "written") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path} cannot be {done}: {error.strerror}") from None

    def check_folder(self) -> None:
        """Raises UserError if out_dir is no longer the locked folder, but maybe another run's."""
        if self.lock_handle is None:  # on Windows
            return
        folder = self.path.parent
        if not folder.exists() or not os.path.samestat(os.fstat(self.lock_handle), os.stat(folder)):
            raise UserError(f"{folder} was moved or deleted during its run; nothing more is saved there")

    def write(self, kind: str, **values: object) -> None:
        """Append one record. Numbers that are not finite become null: JSON has no NaN."""
        if not self.is_main:
            return
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        self.has_run |= kind == "run"
        waiting = bool(self.unwritten)
        self.unwritten += to_line({"kind": kind, **values})
        try:
            self.flush()
        except OSError as error:  # a full disk ends no run: the next record, or `sync`, tries again
            if not waiting:
                print(f"{self.path}: {error.strerror}; records wait in memory", file=sys.stderr, flush=True)
        if self.wandb:
            self.attempt(lambda: self.wandb.show({"kind": kind, **values}))

    def flush(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def sync(self) -> None:
        """Return once all records are on disk. Raises OSError where that fails."""
        self.flush()
        sync(self.file.fileno())

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something with wandb. If that fails, say so and go on without it."""
        try:
            action()
        except Exception as error:  # a full disk, a network, an account: of many types
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"metrics go to {self.path} alone from here on: {reason}", file=sys.stderr, flush=True)
            self.wandb = None

    def say(self, text: str) -> None:
        """Print text for the user."""
        if self.is_main:
            print(text, flush=True)

    def close(self) -> None:
        if self.wandb:
            self.attempt(lambda: self.wandb.close())
        if self.file:
            self.file.close()
        self.__del__()

    def __del__(self):  # unlocks the folder after an error too
        if self.lock_handle is not None:
            os.close(self.lock_handle)
            self.lock_handle = None


class WandB:
    """A run's numbers in Weights & Biases. A resumed run continues its old entry there."""

    def __init__(self, out_dir: str):
        self.out_dir, self.run = out_dir, None

    def show(self, record: dict) -> None:
        if record["kind"] == "run":
            from wandb import Settings, init

            name = os.path.basename(os.path.abspath(self.out_dir))
            id = f"{name}-{re.sub('[^0-9]', '', record['time'])}"  # the same in all launches of a run
            about = dict(project="train_gpt2", name=name, id=id, resume="allow", dir=self.out_dir, config=record)
            self.run = init(**about, settings=Settings(console="off"))
            self.run.define_metric("*", step_metric="step")
        elif record["kind"] in ("train", "val", "hellaswag"):
            kind, step = record.pop("kind"), record.pop("step")
            numbers = {f"{kind}/{name}": value for name, value in record.items() if isinstance(value, int | float)}
            self.run.log({"step": step, **numbers})

    def close(self) -> None:
        self.run.finish()


def to_line(record: dict) -> bytes:
    return (json.dumps(record) + "\n").encode()


def read_metrics(path: Path) -> list[dict]:
    """All records of a metrics.jsonl. What is none is skipped: a kill may leave half a line."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("step", 0)) is int:
                records.append(record)
    return records


def bits_per_byte(loss: float, meta: dict) -> float | None:
    """Nats per token to bits per byte, of any tokenizer; None if meta lacks the counts."""
    tokens, size = meta.get("val_tokens"), meta.get("val_bytes")
    return loss / math.log(2) * tokens / size if tokens and size else None


def word_loss(loss: float, meta: dict) -> float | None:
    """Nats per token to nats per word of the original text, of the whole validation set. Its exp is
    the word-level perplexity. None if meta.json lacks the counts."""
    tokens, words = meta.get("val_tokens", 0), meta.get("val_words", 0)
    return loss * (tokens - 1) / (words - 1) if tokens > 1 and words > 1 else None


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3661 -> 1:01:01."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
