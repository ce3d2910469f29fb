"""A run's whole state in one file: write, find, read. A checkpoint appears whole or not at all."""

import dataclasses
import os
import re
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from configurator import UserError
from files import whole_file
from model import GPT, GPTConfig

STATE = {"model", "step", "gpt_config", "tokenizer"}  # what makes it a model that can speak


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
    """Write `state` as the checkpoint of its step, then delete all older ones but the newest `keep` (0: none) and the
    best. Raises OSError where the disk is full or fails; then all older ones are as they were."""
    path = path_of(out_dir, state["step"])
    with whole_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of it
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    if keep:
        # A newer one is damaged, or this run had gone on from it: it counts for nothing, and is soon overwritten.
        older = [old for old in find(out_dir) if step_of(old) <= state["step"]]
        for old in older[keep:]:
            if step_of(old) != best_step:
                old.unlink()
    return path


def clean(out_dir: str) -> None:
    """Delete what a kill left of checkpoints that were being written."""
    for partial in Path(out_dir).glob(".ckpt_*.pt.partial"):
        partial.unlink()


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint file, None if it is whole: every byte as it was written, and written by a run.

    torch.load checks no checksum, so that a damaged file would load silently. Nothing in the file is executed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return "is damaged"
        state = load(path)
    except Exception:  # a damaged file fails in many ways
        return "is damaged, or not a checkpoint"
    if not isinstance(state, dict) or not state.keys() >= STATE:
        return "is not a checkpoint of a run"
    if step_of(path) not in (None, state["step"]):
        return f"holds step {state['step']}, which is not what its name says"
    return None


def load(path: Path) -> dict:
    """A checkpoint's state, on the CPU, mapped from disk. Only plain data and tensors load (weights_only)."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def newest_whole(out_dir: str) -> Path | None:
    """The newest whole checkpoint; None where there is no checkpoint at all. Raises UserError where none is whole."""
    paths = find(out_dir)
    for path in paths:
        wrong = fault(path)
        if wrong is None:
            return path
        print(f"{path} {wrong}; trying the one before it", file=sys.stderr, flush=True)
    if paths:
        raise UserError(f"{out_dir}: no whole checkpoint among {len(paths)}; restore one, or start in another out_dir")
    return None


def as_it_was(saved: dict, asked: Any, given: dict[str, str], may_change: Collection[str], path: Path) -> Any:
    """The dataclass to resume with: the saved values, and of those given now the ones that may change.

    `given` says where each was set. Raises UserError where a value that would make it another run was given anew.
    """
    values = {}
    for field in dataclasses.fields(asked):
        name = field.name
        have, want = saved.get(name, field.default), getattr(asked, name)
        if name in given and want != have and name not in may_change:
            raise UserError(
                f"{given[name]}: {name} = {want!r}, but this run has {have!r} ({path}); go on with that, or start anew"
            )
        values[name] = want if name in given else have
    try:
        return type(asked)(**values)
    except ValueError as error:  # a rule across the fields
        raise UserError(f"{error} ({path} and what was given now)") from None


def gpt_config(state: dict, path: Path) -> GPTConfig:
    """The architecture of a checkpoint. Raises UserError where this version of the model does not know it."""
    try:
        return GPTConfig(**state["gpt_config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its gpt_config is not one of this version of model.py: {error}") from None


def starting_weights(path: str, asked: GPTConfig, given: Collection[str], vocab_size: int) -> tuple[GPTConfig, dict]:
    """Another run's weights to start from, and their architecture: dropout as asked, block_size cropped, vocab_size
    padded (to the data's where none is given). Raises UserError where anything else that was given differs."""
    model, _, file = load_model(path, torch.device("cpu"))
    theirs = model.config
    changes: dict = {"vocab_size": max(theirs.vocab_size, vocab_size)}
    for field in dataclasses.fields(GPTConfig):
        name, want, have = field.name, getattr(asked, field.name), getattr(theirs, field.name)
        if name not in given or want == have:
            continue
        cropped = name == "block_size" and (want < have or theirs.pos == "rope")
        padded = name == "vocab_size" and want > have
        if not (cropped or padded or name == "dropout"):
            raise UserError(f"{name} = {want}, but {file} has {have}, and its weights need that")
        changes[name] = want
    weights = dict(model.state_dict())
    config = dataclasses.replace(theirs, **changes)
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: config.block_size]
    for name in ("wte.weight", "lm_head.weight"):  # new rows start as the mean of the others
        rows = config.vocab_size - theirs.vocab_size
        weights[name] = torch.cat([weights[name], weights[name].mean(0, keepdim=True).expand(rows, -1)])
    return config, weights


def load_model(name: str | None, device: torch.device) -> tuple[GPT, str | None, Path]:
    """The model, its tokenizer (see tokenizer.get_tokenizer; None: unknown) and the file, from a checkpoint, or a run's
    folder (its newest checkpoint), or None (the newest run under out/)."""
    if name is None:
        runs = [path for path in Path("out").glob("**/ckpt_*.pt") if step_of(path) is not None]
        if not runs:
            raise UserError("no checkpoint under out/; train one (python train_gpt2.py ...) or say --model=PATH")
        name = str(max(runs, key=os.path.getmtime).parent)
    path = Path(name)
    if path.is_dir():
        found = newest_whole(name)
        if found is None:
            raise UserError(f"{name}: no checkpoint (ckpt_*.pt) in this folder")
        path = found
    elif not path.exists():
        raise UserError(f"model {name}: no such checkpoint or folder")
    elif wrong := fault(path):
        raise UserError(f"{path} {wrong}")
    state = load(path)
    with torch.device("meta"):  # no time spent on an initialisation that is overwritten
        model = GPT(gpt_config(state, path))
    model.load_state_dict(state["model"], assign=True)
    if model.config.tie_weights:
        model.lm_head.weight = model.wte.weight
    return model.to(device), state["tokenizer"], path
