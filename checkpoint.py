"""A run's whole state in one file: write, find, read. A checkpoint appears whole or not at all."""

import math
import re
import sys
import typing
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from configurator import UserError, check
from distributed import copy_like
from files import remove_partial, whole_file
from model import GPT, GPTConfig

# What makes it a model that can speak, a run that can go on, and parts of that; each with its types.
SPEAKS = {"model": (OrderedDict, dict), "step": (int,), "gpt_config": (dict,), "tokenizer": (str, NoneType)}
GOES_ON = {
    "config": (dict,), "optimizers": (list,), "scaler": (dict,), "data": (dict,), "best": (dict,), "skipped": (int,),
    "stopped": (bool,), "target_reached": (bool,), "plateau": (bool,), "lowest": (dict,), "seconds": (float,),
    "loss_sum": (float,), "loss_count": (int,), "mean_loss": (float, NoneType),
    "training_weights": (OrderedDict, dict, NoneType),  # where "model" is their average
}  # fmt: skip
BEST = {"step": (int, NoneType), "val_loss": (float,)}
LATER = {  # what older versions' checkpoints have not
    "seconds": 0.0, "plateau": False, "lowest": {"step": 0, "val_loss": math.inf},
    "loss_sum": 0.0, "loss_count": 0, "mean_loss": None, "training_weights": None,
}  # fmt: skip
SCALER = {"scale": (float,), "_growth_tracker": (int,)}


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

    Raises OSError if the disk is full or fails, and then deletes nothing. What cannot be deleted is a line on stderr.
    """
    path = path_of(out_dir, state["step"])
    remove_partial(out_dir, "ckpt_*.pt")
    with whole_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch wraps the OSError of a full disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    if keep:
        # Skip newer ones: they are damaged, or from a future that this run will write again.
        older = [old for old in find(out_dir) if step_of(old) <= state["step"]]
        for old in older[keep:]:
            if step_of(old) != best_step:
                try:
                    old.unlink(missing_ok=True)
                except OSError as error:  # the new one is saved all the same
                    print(f"{old} cannot be deleted: {error.strerror}", file=sys.stderr, flush=True)
    return path


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if every checksum is right and it holds a run's state.

    torch.load checks no checksum, so a damaged file would load silently. Nothing in the file is executed.
    """
    if not path.is_file():
        return "is not a file"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return "is damaged"
        state = load(path)
        if not isinstance(state, dict) or misfits(state, SPEAKS):
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
    """The same of a checkpoint that a run can resume, and its path. Raises UserError if it holds only a model, or its
    types and sizes are not a run's."""
    saved = LATER | load(path)
    if missing := GOES_ON.keys() - saved.keys():
        raise UserError(f"{path}: has no {', '.join(sorted(missing))} to go on from; use it with --init_from")
    check_types(saved, GOES_ON, f"{path}:")
    check_types(saved["best"], BEST, f"{path}: best")
    check_types(saved["lowest"], BEST | {"step": (int,)}, f"{path}: lowest")
    if saved["scaler"]:
        check_types(saved["scaler"], SCALER, f"{path}: scaler")
    gpt_config(saved, path)
    return saved | {"path": path}


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


def best_of(newest: Path) -> Path:
    """The checkpoint with the lowest val loss, of the run whose newest one is given. Raises UserError if no val loss is
    known, or that checkpoint is not whole."""
    best = load(newest).get("best")
    if not isinstance(best, dict) or type(best.get("step")) is not int:
        raise UserError(f"{newest} knows of no val loss; leave out --best=True")
    path = path_of(newest.parent, best["step"])
    if wrong := fault(path):
        raise UserError(f"{path}, the best, {wrong}; leave out --best=True")
    return path


def gpt_config(state: dict, path: Path) -> GPTConfig:
    """The architecture of a checkpoint. Raises UserError if this version of the model does not know it, or the file is
    too small for it."""
    hints, where = typing.get_type_hints(GPTConfig), f"{path}: its gpt_config is not one of this version of model.py"
    try:
        config = GPTConfig(**{str(name): check(str(name), v, hints, where) for name, v in state["gpt_config"].items()})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    check_size(config, len(state["model"]), path.stat().st_size, f"{path}: its gpt_config")
    return config


def check_size(config: GPTConfig, tensors: int, size: int, where: str) -> None:
    """Raises UserError if a number of tensors, of `size` bytes in all, cannot be such a model. Building it comes later:
    it could take all memory."""
    C = config.n_embd
    embedding = C * (config.vocab_size + (config.block_size if config.pos == "learned" else 0))
    least = embedding + config.n_layer * C * (4 * C + 2 * (config.mlp_hidden or C))
    if config.n_layer > tensors or least > size:
        raise UserError(
            f"{where} has n_layer = {config.n_layer} and {least:,} parameters or more, but the weights are only "
            f"{tensors:,} tensors and {size:,} bytes"
        )


def check_types(values: dict, types: dict[str, tuple], where: str) -> None:
    for name in misfits(values, types):
        raise UserError(f"{where} {name} is missing, or of a type that no run has written")


def misfits(values: dict, types: dict[str, tuple]) -> list[str]:
    """The names that are missing or of another type; a subclass is another (True is no step)."""
    return [name for name, allowed in types.items() if name not in values or type(values[name]) not in allowed]


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
    they are the model's float32 weights: all of them and no others."""
    check_tensors(weights, {name: p.shape for name, p in model.state_dict().items()}, f"{path}:")
    model.load_state_dict(weights, assign=assign)


def restore(saved: dict, model: GPT, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> None:
    """Load the optimizers' and the scaler's state: copies, so that the file need not stay mapped.

    Settings (betas, weight decay, ...) come from the run's options, not from the file. Raises UserError, naming the
    tensor, if one has not the optimizer's shape: fused code would read and write past its end.
    """
    path, names = saved["path"], {p: name for name, p in model.named_parameters()}
    states = [part.get("state") if isinstance(part, dict) else None for part in saved["optimizers"]]
    if len(states) != len(optimizers) or not all(isinstance(state, dict) for state in states):
        raise UserError(f"{path}: its optimizers are not the {len(optimizers)} of this run")
    for optimizer, state in zip(optimizers, states, strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if state and state.keys() != set(range(len(params))):  # it is empty if all steps were skipped
            raise UserError(f"{path}: its optimizers have state of {len(state)} parameters, not of {len(params)}")
        copies: dict[int, dict[str, Tensor]] = {}
        for i, tensors in state.items():
            p = params[i]
            check_tensors(tensors, state_shapes(optimizer, p), f"{path}: the optimizer's state of {names[p]}:")
            copies[i] = {
                name: value.clone() if name == "step" else copy_like(p, value) for name, value in tensors.items()
            }
        optimizer.load_state_dict({"state": copies, "param_groups": optimizer.state_dict()["param_groups"]})
    if saved["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | {name: saved["scaler"][name] for name in SCALER})


def state_shapes(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, tuple[int, ...]]:
    """What torch's optimizers keep of a parameter, in float32."""
    match optimizer:
        case torch.optim.AdamW():
            return {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        case torch.optim.Muon():
            return {"momentum_buffer": p.shape}
        case torch.optim.Adafactor() if p.dim() > 1:
            return {"step": (), "row_var": (*p.shape[:-1], 1), "col_var": (*p.shape[:-2], 1, p.shape[-1])}
        case torch.optim.Adafactor():
            return {"step": (), "variance": p.shape}
    raise NotImplementedError(type(optimizer))


def check_tensors(tensors: Any, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Raises UserError unless these are plain float32 tensors on the CPU of exactly these names and shapes."""
    if not isinstance(tensors, dict):
        raise UserError(f"{where} no tensors, but of type {type(tensors).__name__}")
    for name, shape in shapes.items():
        have, want = spell(tensors.get(name)), f"float32 {tuple(shape)}"
        if have != want:
            raise UserError(f"{where} {name} is {have}, but it must be {want}")
    if foreign := tensors.keys() - shapes.keys():
        raise UserError(f"{where} {min(map(str, foreign))} has no place in it ({len(foreign)} such names)")


def spell(value: Any) -> str:
    """What a message calls it: float32 (3, 4)."""
    if not plain(value):
        return "missing" if value is None else f"no plain tensor but of type {type(value).__name__}"
    return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")


def plain(value: Any) -> bool:
    """Whether it is a tensor that holds its numbers one by one on the CPU: not sparse, nested or without any."""
    is_tensor = isinstance(value, Tensor) and not value.is_nested
    return is_tensor and value.layout == torch.strided and value.device.type == "cpu"
