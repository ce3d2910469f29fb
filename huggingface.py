"""Models to and from Hugging Face's folders, which transformers reads and writes.

    python huggingface.py --model=out/notes --out_dir=hf/notes

writes a folder for AutoModelForCausalLM and AutoTokenizer: learned positions, layernorm and gelu become a
GPT2LMHeadModel; rope, rmsnorm and swiglu a LlamaForCausalLM. In both directions the two models must give the same
logits: a model without a counterpart is refused, never approximated.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
from configurator import PathStr, UserError, cli, configure, is_out_of_memory
from model import GPT, GPTConfig
from tokenizer import ENDOFTEXT, get_tokenizer, same_tokenizer, to_json

KINDS = {"learned": "gpt2", "rope": "llama"}  # Hugging Face's model_type by our pos
# Of each: the flags of GPTConfig that it computes, and its names for the other fields.
FLAGS = {
    "gpt2": dict(pos="learned", norm="layernorm", mlp="gelu", qk_norm=False),
    "llama": dict(pos="rope", norm="rmsnorm", mlp="swiglu", qk_norm=False),
}
FIELDS = {
    "gpt2": dict(
        block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
        mlp_hidden="n_inner", norm_eps="layer_norm_epsilon", tie_weights="tie_word_embeddings",
    ),
    "llama": dict(
        block_size="max_position_embeddings", vocab_size="vocab_size", n_layer="num_hidden_layers",
        n_head="num_attention_heads", n_embd="hidden_size", mlp_hidden="intermediate_size", norm_eps="rms_norm_eps",
        tie_weights="tie_word_embeddings", bias="attention_bias",
    ),
}  # fmt: skip
# Their modules -> ours. GPT-2's are called as ours.
MODULES = dict(
    embed_tokens="wte", layers="h", norm="ln_f", input_layernorm="ln_1", post_attention_layernorm="ln_2",
    self_attn="attn", q_proj="c_q", k_proj="c_k", v_proj="c_v", o_proj="c_proj",
    gate_proj="c_gate", up_proj="c_fc", down_proj="c_proj",
)  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    model: PathStr | None = None  # a checkpoint, a run or Hugging Face folder, or gpt2..gpt2-xl; None: the newest run
    out_dir: PathStr | None = None  # the folder to write; must not exist yet, or be empty


def main() -> int:
    from weights import load_model  # which imports this file

    config, _ = configure(ExportConfig)
    if config.out_dir is None:
        raise UserError("say where to write: --out_dir=FOLDER")
    out_dir = Path(config.out_dir)
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UserError(f"out_dir {out_dir} exists and is not an empty folder; name another")
    model, tokenizer, path = load_model(config.model, torch.device("cpu"))
    save_folder(model, tokenizer, out_dir, path)
    print(f"{path} -> {out_dir}: {model.num_params():,} parameters")
    if tokenizer is None:
        print("its tokenizer is not known, so the folder has none")
    elif (used := get_tokenizer(tokenizer).n_vocab) < model.config.vocab_size:
        print(f"its vocabulary stays padded: {model.config.vocab_size} rows, of which {used} are tokens")
    return 0


def load_folder(folder: Path) -> GPT:
    """The model of a Hugging Face folder, in float32. Runs no code of the folder's.

    Raises UserError, naming the folder, if it is damaged or its model is not one of ours.
    """
    transformers = import_transformers()
    with one_line_errors(folder):
        their_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = to_gpt_config(their_config, folder)
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=their_config, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
        for problem, tensors in report.items():  # missing, unexpected and mismatched keys
            for tensor in tensors:
                if not str(tensor).endswith(".masked_bias"):  # a buffer of old files
                    raise UserError(f"{folder}: config.json and weights differ: {problem.replace('_', ' ')}: {tensor}")
        weights = {name: tensor.contiguous() for name, tensor in by_our_names(theirs.state_dict()).items()}
        with torch.device("meta"):  # no time or memory for weights that are replaced
            model = GPT(config)
        checkpoint.load_weights(model, weights, folder, assign=True)
        check_same_logits(model, theirs, folder)
    return model


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


def their_settings(ours: GPTConfig) -> dict[str, Any]:
    """What config.json says of such a model, as far as its logits depend on it."""
    settings = {theirs: getattr(ours, name) for name, theirs in FIELDS[KINDS[ours.pos]].items()}
    if KINDS[ours.pos] == "gpt2":
        return settings | dict(activation_function="gelu_new", scale_attn_by_inverse_layer_idx=False)
    bias = ours.bias or bool(ours.qkv_bias)
    rope = dict(rope_type="default", rope_theta=ours.rope_base)
    heads = dict(num_key_value_heads=ours.n_head, head_dim=ours.n_embd // ours.n_head)
    return settings | heads | dict(hidden_act="silu", attention_bias=bias, mlp_bias=bias, rope_parameters=rope)


def to_gpt_config(theirs: Any, where: str | Path) -> GPTConfig:
    """Our config of theirs, without dropout, which belongs to a training run. Raises UserError, naming the setting, if
    there is none."""
    kind = theirs.model_type
    if kind not in FIELDS:
        raise UserError(f"{where}: model_type = {kind!r}, but it must be one of {', '.join(FIELDS)}")
    values = {ours: getattr(theirs, name) for ours, name in FIELDS[kind].items()} | FLAGS[kind]
    if kind == "llama":
        theirs.rope_parameters.pop("type", None)  # what old files call rope_type
        values["rope_base"] = theirs.rope_parameters["rope_theta"]
    config = GPTConfig(**values)
    for name, want in their_settings(config).items():
        if (have := getattr(theirs, name)) != want:
            raise UserError(f"{where}: {name} = {have!r}, but our model computes only {want!r}")
    return config


def by_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors as ours are called and shaped: views, so that what is written to them is written to theirs."""
    views = {}
    for name, tensor in theirs.items():
        ours = ".".join(MODULES.get(x, x) for x in name.split(".") if x not in ("transformer", "model"))
        if re.search(r"\.c_(attn|proj|fc)\.weight$", name):  # GPT-2's "Conv1D" is nn.Linear's transposed
            tensor = tensor.t()
        if ".c_attn." in ours:  # GPT-2 stacks q, k and v
            views |= {ours.replace("c_attn", f"c_{x}"): part for x, part in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            views[ours] = tensor
    return views


@torch.no_grad()
def check_same_logits(ours: GPT, theirs: nn.Module, where: str | Path) -> None:
    """Put both models into eval mode. Raises UserError unless they give the same logits for random ids at 64 positions
    spread over the whole context."""
    config = ours.eval().config
    positions = torch.linspace(0, config.block_size - 1, min(64, config.block_size), dtype=torch.float64).long()[None]
    idx = torch.randint(config.vocab_size, positions.shape, generator=torch.Generator().manual_seed(0))
    want = theirs.eval()(idx, position_ids=positions, attention_mask=torch.ones_like(idx)).logits
    have = ours.lm_head(ours.hidden(idx, positions=positions))
    difference = ((have - want).abs().max() / want.abs().max()).item()
    limit = 1e-4 + (3e-7 * config.block_size if config.pos == "rope" else 0)  # float32 rounds RoPE's angles
    if not difference < limit:
        raise UserError(f"{where}: the logits of our model and of {type(theirs).__name__} differ by {difference:.1e}")


def tokenizer_files(enc: Any, block_size: int) -> dict[str, dict]:
    """{file name: JSON} of a tokenizer that gives enc's ids, which transformers loads as GPT-2's whatever the model."""
    config = {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # or else transformers 4 drops the space in " ."
        "bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "unk_token": ENDOFTEXT,
    }  # fmt: skip
    return {"tokenizer.json": to_json(enc), "tokenizer_config.json": config}


def read_tokenizer(folder: Path) -> str | None:
    """The folder's tokenizer as a checkpoint keeps it; None if it has none, or one that splits text in other ways than
    ours (then a line on stderr says so)."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    auto = import_transformers().AutoTokenizer
    try:
        with one_line_errors(folder):
            theirs = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            content = theirs.backend_tokenizer.to_str()
            enc = get_tokenizer(content)
    except UserError as error:
        print(f"{folder}: its tokenizer counts as unknown: {error}", file=sys.stderr, flush=True)
        return None
    known = {50257: "gpt2", 257: "bytes"}.get(enc.n_vocab, content)
    return known if same_tokenizer(known, content) else content


@contextlib.contextmanager
def one_line_errors(where: str | Path, advice: str = "") -> Iterator[None]:
    """Raises UserError, saying where, for whatever goes wrong within: files and downloads fail in many ways."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"{where} cannot be loaded: {type(error).__name__}: {str(error)[:300]}{advice}") from None


def import_transformers() -> Any:
    """transformers, which takes seconds to import, without its progress bars and reports."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


if __name__ == "__main__":
    cli(main)
