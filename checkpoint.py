"""A run's whole state in one file: write, find, read. A checkpoint appears whole or not at all."""

import dataclasses
import re
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from configurator import UserError
from distributed import World
from files import remove_partial, whole_file
from metrics import Metrics, read_metrics
from model import GPTConfig

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
    remove_partial(out_dir, "ckpt_*.pt")
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


def load_run(path: Path) -> dict:
    """The same of a checkpoint that a run can go on from. Raises UserError for one that only holds a model."""
    saved = load(path)
    if missing := {"config", "optimizers", "scaler", "data"} - saved.keys():
        raise UserError(f"{path}: has no {', '.join(missing)} to go on from; use it with --init_from")
    return saved


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


def find_run(config: Any, given: dict, world: World, log: Metrics) -> tuple[Path | None, dict]:
    """The checkpoint to go on from and what it holds; (None, {}) for a run from the start.

    A run that died before its first checkpoint left its record: then (None, that run's options). Raises UserError
    rather than start over a run that is there, or start one that the user did not describe.
    """

    def look() -> tuple[Path | None, dict]:
        begun = log.lock()
        records = read_metrics(log.path) if begun else []
        restarted = world.restarts > 0 and any(record.get("launch") == world.launch for record in records)
        if not config.resume and not restarted:  # torchrun restarts what this very launch began
            if find(config.out_dir) or (begun and log.path.stat().st_size):
                raise UserError(
                    f"out_dir {config.out_dir} already holds a run; go on with --resume=True, or name another"
                )
            return None, {}
        path = newest_whole(config.out_dir)
        record = next((record for record in records if record["kind"] == "run"), {})
        options = {name: record[name] for name in ("config", "gpt_config") if isinstance(record.get(name), dict)}
        if path:
            return path, {}
        if len(options) == 2:
            log.say(f"{config.out_dir} has no checkpoint: starting again at step 0 with this run's options")
            return None, options
        if not given.keys() - {"out_dir", "resume"}:
            raise UserError(
                f"out_dir {config.out_dir} holds no run to go on with; check its name, or say what to train"
            )
        if not log.path.parent.is_dir():
            log.say(f"{config.out_dir} does not exist: this is a fresh start")
        return None, {}

    path, options = world.agree(look)
    return path, load_run(path) if path else options


def resume_options(
    saved: dict,
    config: Any,
    gpt_config: GPTConfig,
    given: dict[str, str],
    may_change: Collection[str],
    path: Path | None,
) -> tuple[Any, GPTConfig, dict]:
    """The two configs to go on with: the saved values, and of those given now the ones that may change; and what of it
    differs, {name: [saved, now]}. Without saved ones: as asked.

    `given` says where each was set. Raises UserError where a value was given that would make it another run.
    """
    if not saved:
        return config, gpt_config, {}
    where = path or Path(config.out_dir, "metrics.jsonl")
    found_at_start = {name for name in ("seq_len", "total_batch_size") if getattr(config, name) is None}
    given = {"out_dir": "--out_dir", "resume": "--resume"} | given
    given = {name: source for name, source in given.items() if name not in found_at_start}
    config = as_it_was(saved["config"], config, given, may_change, where)
    gpt_config = as_it_was(saved["gpt_config"], gpt_config, given, (), where)
    changed = {
        name: [saved["config"].get(name), value]
        for name, value in dataclasses.asdict(config).items()
        if value != saved["config"].get(name) and name not in ("out_dir", "resume")
    }
    return config, gpt_config, changed


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
