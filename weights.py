"""A model from anything that has one: a run, a checkpoint, a Hugging Face folder, or the name of a GPT-2."""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path

import tiktoken
import torch

import checkpoint
from configurator import UserError, nearest
from dataloader import data_tokenizer
from huggingface import load_folder, one_line_errors, read_tokenizer
from model import GPT, GPTConfig
from tokenizer import check_same_tokenizer, get_tokenizer

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def load_model(name: str | None, device: torch.device) -> tuple[GPT, str | None, Path]:
    """The model, its tokenizer (see tokenizer.get_tokenizer; None: unknown) and where they came from.

    name is a checkpoint, a run's folder (its newest whole checkpoint), a Hugging Face folder, one of GPT2_NAMES
    (downloaded once), or None (the newest run under out/). Raises UserError.
    """
    if name is None:
        runs = [path for path in Path("out").glob("**/ckpt_*.pt") if checkpoint.step_of(path) is not None]
        if not runs:
            raise UserError("no checkpoint under out/; train one (python train_gpt2.py ...) or say --model=PATH")
        name = str(max(runs, key=os.path.getmtime).parent)
    path = Path(name)
    is_run, is_folder = bool(checkpoint.find(name)), os.path.isfile(path / "config.json")
    if is_folder and not is_run:
        return load_folder(path).to(device), read_tokenizer(path), path
    if name in GPT2_NAMES and not is_run:  # a path of that name comes first only if it holds a model
        from huggingface_hub import snapshot_download  # takes a while to import

        files = ["config.json", "model*.safetensors*"]
        with one_line_errors(f"model {name}", "; without a network, copy its folder here and name that"):
            path = Path(snapshot_download(f"openai-community/{name}", allow_patterns=files))
        return load_folder(path).to(device), "gpt2", path
    if os.path.isdir(path):
        found = checkpoint.newest_whole(name)
        if found is None:
            raise UserError(f"{name}: no checkpoint (ckpt_*.pt) and no config.json in this folder")
        path = found
    elif not os.path.exists(path):
        raise UserError(f"model {name}: no such checkpoint or folder{nearest(name, GPT2_NAMES)}")
    elif wrong := checkpoint.fault(path):
        raise UserError(f"{path} {wrong}")
    state = checkpoint.load(path)
    config = checkpoint.gpt_config(state, path)
    with torch.device("meta"):  # no time or memory for weights that are replaced
        model = GPT(config)
    checkpoint.load_weights(model, state["model"], path, assign=True)
    return model.to(device), state["tokenizer"], path


def encoding_of(model: GPT, tokenizer: str | None, path: Path) -> tiktoken.Encoding:
    """The tokenizer of a loaded model. Raises UserError if it is unknown, or has ids that the model does not have."""
    if tokenizer is None:
        raise UserError(f"{path}: its tokenizer is not known, and without one its ids have no text")
    enc = get_tokenizer(tokenizer)
    if enc.n_vocab > model.config.vocab_size:
        raise UserError(f"{path}: its tokenizer has {enc.n_vocab} ids, but its vocab_size is {model.config.vocab_size}")
    return enc


def starting_weights(
    source: str, asked: GPTConfig, given: Collection[str], data_dir: str, meta: dict
) -> tuple[GPTConfig, dict]:
    """The architecture and weights to start training from; source is a name as load_model takes it.

    Of the architecture only dropout, a smaller block_size (any with RoPE) and a larger vocab_size may be given; without
    one, vocab_size grows to the data's in meta.json. Raises UserError if another field in `given` differs from the
    model's, or the data has another tokenizer.
    """
    model, tokenizer, path = load_model(source, torch.device("cpu"))
    theirs = model.config
    check_same_tokenizer(tokenizer, data_tokenizer(data_dir, meta, theirs.vocab_size), path, data_dir)
    changes: dict = {"vocab_size": max(theirs.vocab_size, meta.get("vocab_size", 0))}
    for name, have in dataclasses.asdict(theirs).items():
        want = getattr(asked, name)
        if name not in given or want == have:
            continue
        cropped = name == "block_size" and (want < have or theirs.pos == "rope")
        padded = name == "vocab_size" and want > have
        if not (cropped or padded or name == "dropout"):
            raise UserError(f"{name} = {want}, but {path} has {have}, and its weights need that")
        changes[name] = want
    config, weights = dataclasses.replace(theirs, **changes), dict(model.state_dict())
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: config.block_size]
    for name in ("wte.weight", "lm_head.weight"):  # new rows start as the mean of the others
        rows = config.vocab_size - theirs.vocab_size
        weights[name] = torch.cat([weights[name], weights[name].mean(0, keepdim=True).expand(rows, -1)])
    return config, weights
