"""A run's whole state in one file: write, find, read. A checkpoint appears whole or not at all."""

import dataclasses
import os
import re
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path

import torch

from configurator import UserError
from model import GPTConfig


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
    """Write `state` as the checkpoint of its step, then delete all but the newest `keep` (0: none) and the best."""
    path = path_of(out_dir, state["step"])
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # the data must be on disk before the name is
    os.replace(partial, path)
    if keep:
        for old in find(out_dir)[keep:]:
            if step_of(old) != best_step:
                old.unlink()
    return path


def is_whole(path: Path) -> bool:
    """Whether every byte is as it was written. torch.load checks no checksum: a damaged file would load silently."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        load(path)
    except Exception:  # a damaged file fails in many ways, and all of them mean: not whole
        return False
    return True


def load(path: Path) -> dict:
    """A checkpoint's state, on the CPU, mapped from disk."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def newest_whole(out_dir: str) -> Path | None:
    """The newest whole checkpoint; None where there is no checkpoint at all. Raises UserError where none is whole."""
    paths = find(out_dir)
    for path in paths:
        if is_whole(path):
            return path
        print(f"{path} is damaged, trying the one before it", file=sys.stderr, flush=True)
    if paths:
        raise UserError(f"{out_dir}: no whole checkpoint among {len(paths)}; restore one, or start in another out_dir")
    return None


def same_model(saved: dict, asked: GPTConfig, given: Collection[str], path: Path) -> GPTConfig:
    """The architecture to resume with: the checkpoint's, with dropout as asked. Raises UserError where what was given
    says otherwise."""
    theirs = GPTConfig(**saved["gpt_config"])
    for field in dataclasses.fields(GPTConfig):
        name, want, have = field.name, getattr(asked, field.name), getattr(theirs, field.name)
        if name in given and want != have and name != "dropout":
            raise UserError(f"{name} = {want}, but {path} has {have}; resume with the same model")
    return dataclasses.replace(theirs, dropout=asked.dropout if "dropout" in given else theirs.dropout)
