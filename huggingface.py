"""A model to a Hugging Face folder, which transformers writes (weights.py reads them).

    python huggingface.py --model=out/notes --out_dir=hf/notes

writes a folder for AutoModelForCausalLM and AutoTokenizer: learned positions, layernorm and gelu become a
GPT2LMHeadModel; rope, rmsnorm and swiglu a LlamaForCausalLM. Both models must give the same logits: one without a
counterpart is refused, never approximated.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configurator import PathStr, UserError, cli, configure
from model import GPT
from tokenizer import ENDOFTEXT, get_tokenizer, to_json
from weights import (
    FLAGS,
    KINDS,
    by_our_names,
    check_same_logits,
    import_transformers,
    load_model,
    their_settings,
)


@dataclass(frozen=True)
class ExportConfig:
    model: PathStr | None = None  # a checkpoint, a run or Hugging Face folder, or gpt2..gpt2-xl; None: the newest run
    best: bool = False  # of a run, the checkpoint with the lowest val loss in place of the newest
    out_dir: PathStr | None = None  # the folder to write; must not exist yet, or be empty


def main() -> int:
    config, _ = configure(ExportConfig, positional="model")
    if config.out_dir is None:
        raise UserError("say where to write: --out_dir=FOLDER")
    out_dir = Path(config.out_dir)
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UserError(f"out_dir {out_dir} exists and is not an empty folder; name another")
    model, tokenizer, path = load_model(config.model, torch.device("cpu"), config.best)
    save_folder(model, tokenizer, out_dir, path)
    print(f"{path} -> {out_dir}: {model.num_params():,} parameters")
    if tokenizer is None:
        print("its tokenizer is not known, so the folder has none")
    elif (used := get_tokenizer(tokenizer).n_vocab) < model.config.vocab_size:
        print(f"its vocabulary stays padded: {model.config.vocab_size} rows, of which {used} are tokens")
    return 0


def save_folder(model: GPT, tokenizer: str | None, out_dir: Path, where: str | Path) -> None:
    """Write out_dir, whole or not at all. Raises UserError if the model, called `where`, has no counterpart."""
    from safetensors import SafetensorError

    files, eot = {}, None
    if tokenizer is not None:
        enc = get_tokenizer(tokenizer)
        files, eot = tokenizer_files(enc, model.config.block_size), enc.eot_token
    theirs = to_transformers(model, eot, where)
    out_dir = out_dir.resolve()
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        theirs.save_pretrained(partial)
        for name, data in files.items():
            (partial / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        for path in partial.iterdir():
            path.chmod((partial / "config.json").stat().st_mode)  # safetensors lets no one else read its files
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # the data must be on disk before the name is
        os.replace(partial, out_dir)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out_dir} could not be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_transformers(model: GPT, eot: int | None, where: str | Path) -> nn.Module:
    """The same model as a class of transformers, on the CPU. Raises UserError, naming the flag, if there is none."""
    transformers = import_transformers()
    ours = dataclasses.replace(model.config, mlp_hidden=model.h[0].mlp.c_fc.out_features)
    kind = KINDS[ours.pos]
    for name, value in FLAGS[kind].items():
        if (have := getattr(ours, name)) != value:
            raise UserError(f"{where}: {name} = {have!r}, but Hugging Face's {kind} has {value!r}")
    settings = their_settings(ours) | dict(bos_token_id=eot, eos_token_id=eot)
    if kind == "gpt2":
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), ours.dropout)
        settings |= dict(n_ctx=ours.block_size)  # llama.cpp's converter reads this one
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))
    views = by_our_names(theirs.state_dict())
    for name, tensor in model.state_dict().items():  # theirs has all biases or none: those that ours lacks stay 0
        views[name].copy_(tensor)
    check_same_logits(model, theirs, where)
    if kind == "llama":
        theirs.config.rope_theta = ours.rope_base  # where transformers 4 and others look for it
    return theirs


def tokenizer_files(enc: Any, block_size: int) -> dict[str, dict]:
    """{file name: JSON} of a tokenizer that gives enc's ids, which transformers loads as GPT-2's whatever the model."""
    config = {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # or else transformers 4 drops the space in " ."
        "bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "unk_token": ENDOFTEXT,
    }  # fmt: skip
    return {"tokenizer.json": to_json(enc), "tokenizer_config.json": config}


if __name__ == "__main__":
    cli(main)
