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
    elif not is_whole(path):
        raise UserError(f"{path}: not a whole checkpoint")
    state = load(path)
    with torch.device("meta"):  # no time spent on an initialisation that is overwritten
        model = GPT(GPTConfig(**state["gpt_config"]))
    model.load_state_dict(state["model"], assign=True)
    if model.config.tie_weights:
        model.lm_head.weight = model.wte.weight
    return model.to(device), state["tokenizer"], path
