"""A run's whole state in one file: write, find, read. A checkpoint appears whole or not at all."""

import contextlib
import errno
import os
import pickle
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from configurator import UserError
from distributed import copy_like
from files import remove_partial, whole_file
from metrics import Metrics
from model import GPT, GPTConfig

# What reading a damaged zip file raises. Errors of the system (OSError) are not among them.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError, ArithmeticError, LookupError,
          ValueError, RuntimeError)  # fmt: skip


def path_of(out_dir: str, step: int) -> Path:
    return Path(out_dir, f"ckpt_{step:06d}.pt")


def step_of(path: Path) -> int | None:
    match = re.fullmatch(r"ckpt_(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def find(out_dir: str) -> list[Path]:
    """A run's checkpoints, newest step first. Raises UserError if the folder cannot be read."""
    try:
        paths = [Path(out_dir, name) for name in os.listdir(out_dir)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{out_dir} cannot be read: {error.strerror}") from None
    return sorted((path for path in paths if step_of(path) is not None), key=step_of, reverse=True)


def save(state: dict, out_dir: str, keep: int, best_step: int | None) -> Path:
    """Write `state` as its step's checkpoint, then keep the newest `keep` (0: all) and the best.

    Raises OSError if the disk is full or fails, and then deletes nothing.
    """
    path = path_of(out_dir, state["step"])
    remove_partial(out_dir, "ckpt_*.pt")
    with whole_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch wraps the OSError of a full disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    # Newer files do not count: they are damaged, or from a future that this run will write again.
    older = [old for old in find(out_dir) if step_of(old) <= state["step"]]
    for old in older[keep:] if keep else ():
        if step_of(old) != best_step:
            with contextlib.suppress(OSError):  # the new one is saved all the same
                old.unlink(missing_ok=True)
    return path


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if every checksum is right and it holds a model.

    Raises UserError if the system cannot read the file. That is no damage: a run that took an older
    checkpoint for it would overwrite a newer, good one.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "is not a file"
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksum: damaged files load silently
            if archive.testzip() is not None:
                return "is damaged"
        state = load(path)
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged offset, from before the beginning of the file
            return "is damaged"
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except DAMAGE as error:
        if "mmap" in str(error):  # torch lacks memory to map the file
            raise UserError(f"{path} cannot be read: {error}") from None
        return "is damaged, or not a checkpoint"
    if not isinstance(state, dict) or not {"model", "step", "gpt_config", "tokenizer"} <= state.keys():
        return "is not a checkpoint of a run"
    if step_of(path) not in (None, state["step"]):
        return f"holds step {state['step']}, which is not what its name says"
    return None


def load(path: Path) -> dict:
    """A checkpoint's state on the CPU, mapped from disk: plain data and tensors, nothing else."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_run(path: Path) -> dict:
    """The state that a run goes on from; every process reads it. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} is not there for this process; all processes of a run must see its out_dir")
    saved = load(path)
    if "optimizer" not in saved:
        raise UserError(f"{path}: holds only a model, which a run cannot go on from; use it with --init_from")
    return saved


def newest_whole(out_dir: str) -> Path | None:
    """The newest whole checkpoint; None if there is none. Raises UserError if all are damaged."""
    paths = find(out_dir)
    for path in paths:
        wrong = fault(path)
        if wrong is None:
            return path
        print(f"{path} {wrong}; trying the one before it", file=sys.stderr, flush=True)
    if paths:
        raise UserError(f"{out_dir}: no whole checkpoint among {len(paths)}; restore one, or start in another out_dir")
    return None


def best_of(newest: Path) -> Path:
    """The run's checkpoint with the lowest val loss, given its newest one. Raises UserError."""
    best = load(newest).get("best") or {"step": None}
    if best["step"] is None:
        raise UserError(f"{newest} knows of no val loss; leave out --best=True")
    path = path_of(newest.parent, best["step"])
    if wrong := fault(path):
        raise UserError(f"{path}, the best, {wrong}; leave out --best=True")
    return path


# ---- Which run goes on, and with which options


def find_run(out_dir: str, resume: bool, given: Collection[str], log: Metrics) -> tuple[Path | None, dict]:
    """The checkpoint to resume, or the options of a run that died before its first, or neither.

    Locks out_dir. Raises UserError rather than overwrite a run, or start one that nobody described.
    """
    log.lock()
    records = log.records()
    if not resume:
        # Without a checkpoint it died early, unless it says that it had one: it was moved away.
        had_one = any(record.get("event") in ("done", "stopped", "resume") for record in records)
        if find(out_dir) or had_one:
            advice = "continue it with --resume=True, or name another, or delete it"
            raise UserError(f"out_dir {out_dir} already holds a run; {advice}")
        if records:
            log.say(f"{out_dir}: the run there died before its first checkpoint; this one takes its place")
        return None, {}
    if path := newest_whole(out_dir):
        return path, {}
    record = next((r for r in records if r["kind"] == "run" and {"config", "gpt_config"} <= r.keys()), None)
    if record:
        log.say(f"{out_dir} has no checkpoint: starting again at step 0 with this run's options")
        return None, {name: record[name] for name in ("config", "gpt_config")}
    if not given.keys() - {"out_dir", "resume"}:
        raise UserError(f"out_dir {out_dir} holds no run to go on with; check its name, or say what to train")
    if not os.path.isdir(out_dir):
        log.say(f"{out_dir} does not exist: this is a fresh start")
    return None, {}


def merge(
    saved: dict, config: Any, gpt_config: GPTConfig, given: dict[str, str], fixed: Collection[str], log: Metrics
) -> tuple[Any, GPTConfig, dict[str, list]]:
    """A run's saved options as changed by flags, and {option: [saved, now]} of the changes.

    `given` says where each option was set. Against a config file, which may have been edited since,
    the run's options hold; a line says so. Raises UserError where a flag would make it another run:
    the model's options and the `fixed`.
    """
    configs, changed = [], {}
    for asked, old in ((config, saved["config"]), (gpt_config, saved["gpt_config"])):
        values = {option.name: old.get(option.name, option.default) for option in fields(asked)}
        for name, have in values.items():
            want, source = getattr(asked, name), given.get(name)
            left_open = want is None and name in ("seq_len", "total_batch_size")  # worked out when the run began
            may_change = asked is config and name not in fixed
            if name in ("out_dir", "resume"):  # always as they are given
                values[name] = want
            elif source is None or want == have or left_open:
                continue
            elif not source.startswith("--"):
                change = "; a flag would change it" if may_change else ""
                log.say(f"{source} says {name} = {want!r}; this run keeps {have!r}{change}")
            elif may_change:
                values[name], changed[name] = want, [have, want]
            else:
                raise UserError(f"{source}: {name} = {want!r}, but this run has {have!r}; keep that, or start another")
        try:
            configs.append(type(asked)(**values))
        except ValueError as error:  # a rule across the options
            raise UserError(f"{error} (the options of {config.out_dir}, and the flags)") from None
    return *configs, changed


# ---- From a state to a model and its optimizers


def gpt_config(state: dict, path: Path) -> GPTConfig:
    """A checkpoint's architecture. Raises UserError if this version of model.py lacks it."""
    try:
        return GPTConfig(**state["gpt_config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its gpt_config is not one of this version of model.py: {error}") from None


class NoInit(TorchFunctionMode):
    """Inside, new modules draw no weights: on "meta" that imports torch's compiler."""

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
    """Copy weights into a model, or assign them. UserError names one that does not fit."""
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        have, want = (f"{t[name].dtype} {tuple(t[name].shape)}" if name in t else None for t in (weights, wanted))
        if have != want:
            raise UserError(f"{path}: {name} is {have}, but it must be {want}")
    model.load_state_dict(weights, assign=assign)


def optimizer_state(model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict[str, dict[str, Tensor]]:
    """What the optimizers remember of each parameter, by its name: their numbering is not fixed."""
    known = [(name, o.state[p]) for name, p in model.named_parameters() for o in optimizers if p in o.state]
    return {name: dict(tensors) for name, tensors in known}


def restore(saved: dict, model: GPT, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> None:
    """Load the optimizers' and the scaler's state: copies, so that the file need not stay mapped.

    Learning rates, betas and the like come from the run's options. Raises UserError, naming it, if
    a moment has another shape than its parameter: fused code would read and write past its end.
    """
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        params, state = [p for group in optimizer.param_groups for p in group["params"]], {}
        for i, p in enumerate(params):
            for name, tensor in saved["optimizer"].get(names[p], {}).items():
                if tensor.shape != p.shape and name not in ("step", "row_var", "col_var"):
                    raise UserError(f"the checkpoint's {name} of {names[p]} has shape {tuple(tensor.shape)}")
                state.setdefault(i, {})[name] = tensor.clone() if name == "step" else copy_like(p, tensor)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if saved["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(saved["scaler"])
