"""A run's whole state in one file: write, find, read. A checkpoint appears whole or not at all."""

import contextlib
import os
import re
import sys
import typing
import zipfile
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from configurator import UserError, check
from distributed import copy_like
from files import remove_partial, whole_file
from metrics import Metrics, read_metrics
from model import GPT, GPTConfig


def path_of(out_dir: str, step: int) -> Path:
    return Path(out_dir, f"ckpt_{step:06d}.pt")


def step_of(path: Path) -> int | None:
    match = re.fullmatch(r"ckpt_(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def find(out_dir: str) -> list[Path]:
    """A run's checkpoint files, newest step first."""
    paths = [path for path in Path(out_dir).glob("ckpt_*.pt") if step_of(path) is not None]
    return sorted(paths, key=step_of, reverse=True)


def save(state: dict, out_dir: str, keep: int, best_step: int | None) -> Path:
    """Write `state` as the checkpoint of its step, then delete older ones but the newest `keep` (0: all) and the best.

    Raises OSError if the disk is full or fails, and then deletes nothing.
    """
    path = path_of(out_dir, state["step"])
    remove_partial(out_dir, "ckpt_*.pt")
    with whole_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch wraps the OSError of a full disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    # Newer ones do not count: they are damaged, or from a future that this run will write again.
    older = [old for old in find(out_dir) if step_of(old) <= state["step"]]
    for old in older[keep:] if keep else ():
        if step_of(old) != best_step:
            with contextlib.suppress(OSError):  # the new one is saved all the same
                old.unlink(missing_ok=True)
    return path


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if every checksum is right and it holds a model.

    torch.load checks no checksum, so a damaged file would load silently. Nothing in the file is executed.
    """
    if not path.is_file():
        return "is not a file"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return "is damaged"
        state = load(path)
        if not isinstance(state, dict) or not {"model", "step", "gpt_config", "tokenizer"} <= state.keys():
            return "is not a checkpoint of a run"
        if step_of(path) not in (None, state["step"]):
            return f"holds step {state['step']}, which is not what its name says"
    except Exception:  # a damaged file fails in many ways
        return "is damaged, or not a checkpoint"
    return None


def load(path: Path) -> dict:
    """A checkpoint's state, on the CPU, mapped from disk. Only plain data and tensors load (weights_only)."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_run(path: Path) -> dict:
    """The same of the checkpoint that a run goes on from; all processes read it. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} is not there for this process; all processes of a run must see its out_dir")
    saved = load(path)
    if missing := {"config", "optimizers", "scaler", "data", "training_weights"} - saved.keys():
        raise UserError(f"{path}: has no {', '.join(sorted(missing))} to go on from; use it with --init_from")
    return saved


def newest_whole(out_dir: str) -> Path | None:
    """The newest whole checkpoint; None if there is no checkpoint file. Raises UserError if there are some and none is
    whole."""
    paths = find(out_dir)
    for path in paths:
        wrong = fault(path)
        if wrong is None:
            return path
        print(f"{path} {wrong}; trying the one before it", file=sys.stderr, flush=True)
    if paths:
        raise UserError(f"{out_dir}: no whole checkpoint among {len(paths)}; restore one, or start in another out_dir")
    return None


def find_run(out_dir: str, resume: bool, given: Collection[str], log: Metrics) -> tuple[Path | None, dict]:
    """The checkpoint to go on from; or None, and the options of a run that died before its first one, or {}: begin.

    Raises UserError rather than overwrite a run, or start one that the user did not describe.
    """
    begun = log.lock()
    if not resume:
        if find(out_dir) or (begun and log.path.stat().st_size):
            raise UserError(f"out_dir {out_dir} already holds a run; go on with --resume=True, or name another")
        return None, {}
    path = newest_whole(out_dir)
    record = next((r for r in read_metrics(log.path) if r["kind"] == "run"), None) if begun and not path else None
    if record:
        log.say(f"{out_dir} has no checkpoint: starting again at step 0 with this run's options")
        return None, {name: record[name] for name in ("config", "gpt_config")}
    if not path and not given.keys() - {"out_dir", "resume"}:
        raise UserError(f"out_dir {out_dir} holds no run to go on with; check its name, or say what to train")
    if not os.path.isdir(out_dir):
        log.say(f"{out_dir} does not exist: this is a fresh start")
    return path, {}


def merge(saved: dict, asked: Any, given: dict[str, str], fixed: Collection[str], path: Path) -> Any:
    """The saved options as a dataclass, with the values of those that are given now and may change."""
    values = {option.name: saved.get(option.name, option.default) for option in fields(asked)}
    for name in values.keys() & given.keys():
        want = getattr(asked, name)
        if want is None and name in ("seq_len", "total_batch_size"):  # left open, and worked out when the run began
            continue
        if want != values[name] and name in fixed:
            had = f"but this run has {values[name]!r} ({path})"
            raise UserError(f"{given[name]}: {name} = {want!r}, {had}; keep that, or start another run")
        values[name] = want
    try:
        return type(asked)(**values)
    except ValueError as error:  # a rule across the options
        raise UserError(f"{error} ({path} and what is given now)") from None


def best_of(newest: Path) -> Path:
    """The checkpoint with the lowest val loss, of the run whose newest one is given. Raises UserError."""
    best = load(newest).get("best") or {"step": None}
    if best["step"] is None:
        raise UserError(f"{newest} knows of no val loss; leave out --best=True")
    path = path_of(newest.parent, best["step"])
    if wrong := fault(path):
        raise UserError(f"{path}, the best, {wrong}; leave out --best=True")
    return path


def gpt_config(state: dict, path: Path) -> GPTConfig:
    """The architecture of a checkpoint. Raises UserError if this version of the model does not know it."""
    hints, where = typing.get_type_hints(GPTConfig), f"{path}: its gpt_config is not one of this version of model.py"
    try:
        return GPTConfig(**{name: check(name, value, hints, where) for name, value in state["gpt_config"].items()})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


class NoInit(TorchFunctionMode):
    """Inside, new modules draw no weights: on "meta" that would import torch's compiler, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        draws = getattr(function, "__module__", None) == "torch.nn.init"
        return None if draws else function(*args, **(kwargs or {}))


def model_of(config: GPTConfig, weights: dict[str, Tensor], path: Path | str) -> GPT:
    """A model whose weights are these very tensors. Raises UserError as load_weights does."""
    with torch.device("meta"), NoInit():
        model = GPT(config)
    load_weights(model, weights, path, assign=True)
    if config.tie_weights:
        model.lm_head.weight = model.wte.weight
    return model


def load_weights(model: GPT, weights: dict[str, Tensor], path: Path | str, assign: bool = False) -> None:
    """Put weights into a model: copies, or the tensors themselves (assign). Raises UserError, naming the tensor, unless
    they are all of the model's and no others."""
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        have, want = (f"{t[name].dtype} {tuple(t[name].shape)}" if name in t else None for t in (weights, wanted))
        if have != want:
            raise UserError(f"{path}: {name} is {have}, but it must be {want}")
    model.load_state_dict(weights, assign=assign)


def restore(saved: dict, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> None:
    """Load the optimizers' and the scaler's state: copies, so that the file need not stay mapped. Settings (betas,
    weight decay, ...) come from the run's options, not from the file."""
    for optimizer, part in zip(optimizers, saved["optimizers"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        copies: dict[int, dict[str, Tensor]] = {}
        for i, tensors in part["state"].items():
            copies[i] = {n: t.clone() if n == "step" else copy_like(params[i], t) for n, t in tensors.items()}
        optimizer.load_state_dict({"state": copies, "param_groups": optimizer.state_dict()["param_groups"]})
    if saved["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(saved["scaler"])
