"""metrics.jsonl, the record of a run: one JSON object a line, each with its "kind"."""

import errno
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from configurator import UserError
from files import lock_folder, remove_partial, whole_file


class Metrics:
    """out_dir/metrics.jsonl, in a folder with one writer: `lock`, then `begin`, then `write` and `sync`."""

    def __init__(self, out_dir: str, is_main: bool = True):
        """`is_main`: of several processes, whether this is the one that writes and speaks; the others do neither."""
        self.path, self.is_main = Path(out_dir, "metrics.jsonl"), is_main
        self.file, self.mirror, self.lock_handle, self.begun = None, None, None, False
        self.unwritten, self.failing = b"", False

    def lock(self) -> bool:
        """Lock out_dir for this process, if it exists; whether it holds a metrics.jsonl already.

        Raises UserError if another process has the lock: its run is going on.
        """
        try:
            if not self.path.parent.is_dir():
                return False
            self.lock_handle = lock_folder(self.path.parent)
        except OSError as error:
            raise UserError(f"out_dir {self.path.parent} cannot be written: {error.strerror}") from None
        self.begun = self.path.exists()
        return self.begun

    def begin(self, resumed_at: int | None, log_to: str | None = None, again: Collection[str] = ()) -> None:
        """Start an empty file, or keep the records up to the step that is resumed, but of that step itself none of the
        kinds in `again`: they are made again. `log_to` (tensorboard, wandb) gets the same records.

        Raises UserError if another run has just begun there, out_dir cannot be written, or log_to is not installed, and
        then leaves the old file untouched.
        """
        out_dir, kept = self.path.parent, []
        if log_to and not installed(log_to):
            raise UserError(f"log_to = {log_to!r} needs a package: pip install {log_to}")
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            if self.lock_handle is None:
                self.lock_handle = lock_folder(out_dir)
            if self.path.exists() and not self.begun:
                raise UserError(f"{out_dir}: another run has just begun there; choose another --out_dir")
            remove_partial(out_dir, "metrics.jsonl")
            for record in read_metrics(self.path) if resumed_at is not None else []:
                if record.get("step", 0) < resumed_at + (record["kind"] not in again):
                    kept.append(record)
            with whole_file(self.path) as file:  # the old file stays until the new one is on disk
                file.writelines(to_line(record) for record in kept)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"out_dir {out_dir} cannot be written: {error.strerror}") from None
        if log_to:
            self.show(lambda: self.open_mirror(log_to, kept))

    def open_mirror(self, log_to: str, kept: list[dict]) -> None:
        self.mirror = {"tensorboard": TensorBoard, "wandb": WandB}[log_to](str(self.path.parent), kept)

    def write(self, kind: str, **values: object) -> None:
        """One record. Numbers that are not finite become null: JSON has no NaN."""
        if not self.is_main:
            return
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        record = {"kind": kind, **values}
        self.unwritten += to_line(record)
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.failing = False
        except OSError as error:  # a full disk ends no run: the next record tries again
            if not self.failing:
                print(f"{self.path}: {error.strerror}; records wait in memory", file=sys.stderr, flush=True)
            self.failing = True
        if self.mirror:
            self.show(lambda: self.mirror.show(record))

    def show(self, action: Callable[[], None]) -> None:
        """Do something with the mirror, and drop it if that fails: the run does not depend on it."""
        try:
            action()
        except Exception as error:  # a full disk, a network, an account: of many types
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"metrics go to {self.path} alone from here on: {reason}", file=sys.stderr, flush=True)
            self.mirror = None

    def sync(self) -> None:
        """Return once all records are on disk. Raises OSError where that fails."""
        self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        if self.unwritten:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fsync(self.file.fileno())

    def say(self, text: str) -> None:
        """One line or more for the terminal."""
        if self.is_main:
            print(text, flush=True)

    def say_parts(self, parts: dict[str, str], spare: Sequence[str]) -> None:
        """One line of parts. On a terminal it leaves out as many of the spare ones, the first first, as do not fit."""
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
        for name in ("", *spare):
            parts = {key: part for key, part in parts.items() if part and key != name}
            if len(" | ".join(parts.values())) <= width:
                break
        self.say(" | ".join(parts.values()))

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.mirror:
            self.show(self.mirror.close)
        self.__del__()

    def __del__(self):  # unlocks the folder after an error too
        if self.lock_handle is not None:
            os.close(self.lock_handle)
            self.lock_handle = None


def installed(package: str) -> bool:
    """Whether a package can be imported. A folder of its name without code does not count (Python imports it)."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def to_line(record: dict) -> bytes:
    return (json.dumps(record) + "\n").encode()


class TensorBoard:
    """Shows records in out_dir/tensorboard. A resumed run writes it again from the records it kept."""

    def __init__(self, out_dir: str, kept: list[dict]):
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = say_nothing_of_tensorboard
        folder = Path(out_dir, "tensorboard")
        shutil.rmtree(folder, ignore_errors=True)
        self.writer = SummaryWriter(str(folder), flush_secs=20)
        for record in kept:
            self.show(record)

    def show(self, record: dict) -> None:
        kind, step = record["kind"], record.get("step")
        if kind == "sample":
            self.writer.add_text(kind, record["text"], step)
        elif kind in ("run", "event"):
            self.writer.add_text(kind, "    " + json.dumps(record, indent=1).replace("\n", "\n    "), step)
        else:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


def say_nothing_of_tensorboard(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread prints its error (a full disk), and the next call raises it again: once is enough."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failed)


class WandB:
    """Shows records in Weights & Biases; a resumed run continues its old entry. WANDB_MODE=offline works."""

    def __init__(self, out_dir: str, kept: list[dict]):
        self.out_dir, self.run = out_dir, None
        if kept:
            self.begin(kept[0])

    def begin(self, record: dict) -> None:
        import wandb

        name = os.path.basename(os.path.abspath(self.out_dir))
        id = f"{name}-{re.sub('[^0-9]', '', record.get('time', ''))}"  # the same for all of the run's lives
        self.run = wandb.init(
            project="train_gpt2", name=name, id=id, resume="allow", dir=self.out_dir, config=record,
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")

    def show(self, record: dict) -> None:
        kind = record["kind"]
        if kind == "run":
            self.begin(record)
        elif kind != "event":
            values = {f"{kind}/{name}": value for name, value in record.items() if name not in ("kind", "step")}
            self.run.log({"step": record["step"], **values})

    def close(self) -> None:
        self.run.finish()


def read_metrics(path: Path) -> list[dict]:
    """All records of a metrics.jsonl. A torn line is skipped, with a warning unless it is the last one."""
    *lines, end = map(parse, path.read_bytes().split(b"\n"))
    torn = [number for number, record in enumerate(lines, 1) if record is None]
    if torn:
        print(f"{path}:{torn[0]}: not a record, skipped ({len(torn)} such lines)", file=sys.stderr)
    return [record for record in (*lines, end) if record is not None]


def parse(line: bytes) -> dict | None:
    """A line's record; None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def bits_per_byte(loss: float, meta: dict) -> float | None:
    """Nats per token to bits per byte of UTF-8, comparable across tokenizers; None if meta.json lacks the counts."""
    tokens, size = meta.get("val_tokens"), meta.get("val_bytes")
    return loss / math.log(2) * tokens / size if tokens and size else None


def word_loss(loss: float, meta: dict) -> float | None:
    """Nats per token to nats per word of the original text; its exp is the word-level perplexity. None if meta.json
    lacks the counts. `loss` is that of the whole val split; tokens behind its last whole window are assumed to be as
    hard as the rest (evaluate.py predicts them too)."""
    tokens, words = meta.get("val_tokens", 0), meta.get("val_words", 0)
    return loss * (tokens - 1) / (words - 1) if tokens > 1 and words > 1 else None


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3661 -> 1:01:01."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
