"""metrics.jsonl, the record of a run: one JSON object a line, each with its "kind"."""

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from configurator import UserError
from files import lock_folder, remove_partial, whole_file


class Metrics:
    """out_dir/metrics.jsonl, and the terminal. First `lock`, then `begin`, then `write`, `say` and `sync`."""

    def __init__(self, out_dir: str, is_main: bool = True):
        """`is_main`: of several processes, whether this is the one that writes and speaks; the others do neither."""
        self.path, self.is_main = Path(out_dir, "metrics.jsonl"), is_main
        self.lock_handle, self.begun, self.file, self.unwritten, self.mirror = None, False, None, b"", None

    def lock(self) -> bool:
        """Lock out_dir for this process, if it exists; whether a run has begun there. Raises UserError."""
        try:
            if self.lock_handle is None and self.path.parent.is_dir():
                self.lock_handle = lock_folder(self.path.parent)
            self.begun = self.path.exists()
        except OSError as error:
            raise UserError(f"out_dir {self.path.parent} cannot be written: {error.strerror}") from None
        return self.begun

    def begin(self, resumed_at: int | None, log_to: str | None = None, again: Collection[str] = ()) -> None:
        """Start an empty file, or keep the records up to the step that is resumed, but of that step itself none of the
        kinds in `again`: they are made again. `log_to` (tensorboard, wandb) gets the same records. Raises UserError.
        """
        begun = self.begun
        try:
            if log_to and not importlib.util.find_spec(log_to):
                raise UserError(f"log_to = {log_to!r} needs a package: pip install {log_to}")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.lock() and not begun:
                raise UserError(f"{self.path.parent}: another run has just begun there; choose another --out_dir")
            remove_partial(self.path.parent, "metrics.jsonl")
            kept = read_metrics(self.path) if resumed_at is not None and begun else []
            kept = [r for r in kept if r.get("step", 0) < (resumed_at if r["kind"] in again else resumed_at + 1)]
            with whole_file(self.path) as file:  # the old file stays until the new one is on disk
                file.writelines(map(to_line, kept))
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"out_dir {self.path.parent} cannot be written: {error.strerror}") from None
        if log_to:
            shutil.rmtree(self.path.parent / "tensorboard", ignore_errors=True)
            self.attempt(lambda: self.open_mirror(log_to, kept))

    def open_mirror(self, log_to: str, kept: list[dict]) -> None:
        self.mirror = {"tensorboard": TensorBoard, "wandb": WandB}[log_to](str(self.path.parent))
        for record in kept if log_to == "tensorboard" else kept[:1]:
            self.mirror.show(record)

    def write(self, kind: str, **values: object) -> None:
        """One record. Numbers that are not finite become null: JSON has no NaN."""
        if not self.is_main:
            return
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        self.unwritten += to_line({"kind": kind, **values})
        try:
            self.flush()
        except OSError as error:  # a full disk ends no run: the next record, or `sync`, tries again
            print(f"{self.path}: {error.strerror}; records wait in memory", file=sys.stderr, flush=True)
        if self.mirror:
            self.attempt(lambda: self.mirror.show({"kind": kind, **values}))

    def flush(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def sync(self) -> None:
        """Return once all records are on disk. Raises OSError where that fails."""
        self.flush()
        os.fsync(self.file.fileno())

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something with the mirror, and drop it if that fails: the run does not depend on it."""
        try:
            action()
        except Exception as error:  # a full disk, a network, an account: of many types
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"metrics go to {self.path} alone from here on: {reason}", file=sys.stderr, flush=True)
            self.mirror = None

    def say(self, text: str) -> None:
        """One line or more for the terminal."""
        if self.is_main:
            print(text, flush=True)

    def close(self) -> None:
        if self.mirror:
            self.attempt(lambda: self.mirror.close())
        if self.file:
            self.file.close()
        self.__del__()

    def __del__(self):  # unlocks the folder after an error too
        if self.lock_handle is not None:
            os.close(self.lock_handle)
            self.lock_handle = None


class TensorBoard:
    """Shows the numbers in out_dir/tensorboard. A resumed run writes it again from the records it kept."""

    def __init__(self, out_dir: str):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(out_dir, "tensorboard")))

    def show(self, record: dict) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step" and record["kind"] not in ("run", "event"):
                self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Shows the records in Weights & Biases; a resumed run continues its old entry. WANDB_MODE=offline works."""

    def __init__(self, out_dir: str):
        from wandb import init  # the name, because a stray folder called wandb can be imported too

        name = os.path.basename(os.path.abspath(out_dir))
        self.begin = functools.partial(init, project="train_gpt2", name=name, resume="allow", dir=out_dir)
        self.run = None

    def show(self, record: dict) -> None:
        if record["kind"] == "run":
            self.run = self.begin(id=re.sub(r"\W", "", record["time"]), config=record)  # one id in all of its lives
            self.run.define_metric("*", step_metric="step")
        elif record["kind"] != "event":
            kind, step = record.pop("kind"), record.pop("step")
            self.run.log({"step": step, **{f"{kind}/{name}": value for name, value in record.items()}})

    def close(self) -> None:
        self.run.finish()


def to_line(record: dict) -> bytes:
    return (json.dumps(record) + "\n").encode()


def read_metrics(path: Path) -> list[dict]:
    """All records of a metrics.jsonl. A torn line, as a kill may leave one, is skipped."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("kind"), str):
                records.append(record)
    return records


def bits_per_byte(loss: float, meta: dict) -> float | None:
    """Nats per token to bits per byte of UTF-8, comparable across tokenizers; None if meta.json lacks the counts."""
    tokens, size = meta.get("val_tokens"), meta.get("val_bytes")
    return loss / math.log(2) * tokens / size if tokens and size else None


def word_loss(loss: float, meta: dict) -> float | None:
    """Nats per token to nats per word of the original text (exp: the word-level perplexity), of the whole val split;
    None if meta.json lacks the counts."""
    tokens, words = meta.get("val_tokens", 0), meta.get("val_words", 0)
    return loss * (tokens - 1) / (words - 1) if tokens > 1 and words > 1 else None


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3661 -> 1:01:01."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
