"""A model from anything that has one, and to Hugging Face: a run, a checkpoint, a folder, or the name of a GPT-2.

    python huggingface.py --model=out/notes --out_dir=hf/notes

writes a folder for AutoModelForCausalLM and AutoTokenizer: learned positions, layernorm and gelu become a
GPT2LMHeadModel; rope, rmsnorm and swiglu a LlamaForCausalLM. transformers reads and writes the folders, and must give
the same logits as our model: one without a counterpart is refused, never approximated.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor, nn

import checkpoint
from configurator import PathStr, UserError, cli, configure, is_out_of_memory, nearest
from dataloader import data_tokenizer
from model import GPT, GPTConfig
from tokenizer import ENDOFTEXT, check_same_tokenizer, get_tokenizer, same_tokenizer, to_json

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
KINDS = {"learned": "gpt2", "rope": "llama"}  # Hugging Face's model_type by our pos
FLAGS = {
    "gpt2": dict(pos="learned", norm="layernorm", mlp="gelu"),
    "llama": dict(pos="rope", norm="rmsnorm", mlp="swiglu"),
}
FIELDS = {  # what config.json calls the fields of GPTConfig; those without a name there must have their default
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
ELSEWHERE = ("dropout", "init", "bias", "qkv_bias", "rope_base")  # what has its place, or need not have one
# Their modules -> ours. GPT-2's are called as ours.
MODULES = dict(
    embed_tokens="wte", layers="h", norm="ln_f", input_layernorm="ln_1", post_attention_layernorm="ln_2",
    self_attn="attn", q_proj="c_q", k_proj="c_k", v_proj="c_v", o_proj="c_proj",
    gate_proj="c_gate", up_proj="c_fc", down_proj="c_proj",
)  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    model: PathStr | None = None  # a checkpoint, a run or Hugging Face folder, or gpt2..gpt2-xl; None: the newest run
    best: bool = False  # of a run, the checkpoint with the lowest val loss in place of the newest
    out_dir: PathStr | None = None  # the folder to write; must not exist yet, or be empty


def main() -> int:
    config, _ = configure(ExportConfig, positional="model")
    if config.out_dir is None:
        raise UserError("say where to write: --out_dir=FOLDER")
    model, tokenizer, path = load_model(config.model, torch.device("cpu"), config.best)
    save_folder(model, tokenizer, Path(config.out_dir), path)
    used = f"of which {get_tokenizer(tokenizer).n_vocab} are tokens" if tokenizer else "but its tokenizer is not known"
    print(f"{path} -> {config.out_dir}: {model.num_params():,} parameters, {model.config.vocab_size} rows, {used}")
    return 0


def load_model(name: str | None, device: torch.device, best: bool = False) -> tuple[GPT, str | None, Path]:
    """The model, its tokenizer (see tokenizer.get_tokenizer; None: unknown) and where they came from.

    name is a checkpoint, a run's folder (its newest whole checkpoint, or its best), a Hugging Face folder, one of
    GPT2_NAMES (downloaded once), or None (the newest run under out/). Raises UserError.
    """
    if name is None:
        runs = [path for path in Path("out").glob("**/ckpt_*.pt") if checkpoint.step_of(path) is not None]
        if not runs:
            raise UserError("no checkpoint under out/; train one (python train_gpt2.py ...) or say --model=PATH")
        name = str(max(runs, key=os.path.getmtime).parent)
    path, tokenizer = Path(name), None
    is_run, is_folder = bool(checkpoint.find(name)), (path / "config.json").is_file()
    if best and not is_run:
        raise UserError(f"--best=True is for a run's folder, which {name} is not")
    if name in GPT2_NAMES and not is_run and not is_folder:  # a path of that name comes first if it holds a model
        path, tokenizer, is_folder = download(name), "gpt2", True
    if is_folder and not is_run:
        return load_folder(path).to(device), tokenizer or read_tokenizer(path), path
    if path.is_dir():
        found = checkpoint.newest_whole(name)
        if found is None:
            raise UserError(f"{name}: no checkpoint (ckpt_*.pt) and no config.json in this folder")
        path = checkpoint.best_of(found) if best else found
    elif not path.exists():
        raise UserError(f"model {name}: no such checkpoint or folder{nearest(name, GPT2_NAMES)}")
    elif wrong := checkpoint.fault(path):
        raise UserError(f"{path} {wrong}")
    state = checkpoint.load(path)
    model = checkpoint.model_of(checkpoint.gpt_config(state, path), state["model"], path)
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
    of_tokens = [name for name in weights if name.startswith(("wte", "vte", "lm_head"))]
    for name in of_tokens:  # new rows start as the mean of the others
        new = weights[name].mean(0, keepdim=True)
        weights[name] = torch.cat([weights[name], *[new] * (config.vocab_size - theirs.vocab_size)])
    return config, weights


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's folders, in


def download(name: str) -> Path:
    """The folder of one of GPT2_NAMES."""
    from huggingface_hub import snapshot_download  # takes a while to import

    with one_line_errors(f"model {name}", "; without a network, copy its folder here and name that"):
        return Path(
            snapshot_download(f"openai-community/{name}", allow_patterns=["config.json", "model*.safetensors*"])
        )


def load_folder(folder: Path) -> GPT:
    """The model of a Hugging Face folder, in float32. Runs no code of the folder's.

    Raises UserError, naming the folder, if it is damaged or its model is not one of ours.
    """
    transformers, safe = import_transformers(), dict(local_files_only=True, trust_remote_code=False)
    with one_line_errors(folder):
        their_config = transformers.AutoConfig.from_pretrained(folder, **safe)
        config = to_gpt_config(their_config, folder)
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=their_config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **safe,
        )
        for problem, tensors in report.items():  # missing, unexpected and mismatched keys
            if tensors := [tensor for tensor in tensors if not str(tensor).endswith(".masked_bias")]:  # of old files
                raise UserError(f"{folder}: config.json and weights differ: {problem.replace('_', ' ')}: {tensors[0]}")
        weights = {name: tensor.contiguous() for name, tensor in by_our_names(theirs.state_dict()).items()}
        model = checkpoint.model_of(config, weights, folder)
        check_same_logits(model, theirs, folder)
    return model


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


def their_settings(ours: GPTConfig) -> dict[str, Any]:
    """What config.json says of such a model, as far as its logits depend on it."""
    settings = {theirs: getattr(ours, name) for name, theirs in FIELDS[KINDS[ours.pos]].items()}
    if KINDS[ours.pos] == "gpt2":
        return settings | dict(activation_function="gelu_new", scale_attn_by_inverse_layer_idx=False)
    bias = ours.bias or bool(ours.qkv_bias)
    rope = dict(rope_type="default", rope_theta=ours.rope_base)
    heads = dict(num_key_value_heads=ours.n_head, head_dim=ours.n_embd // ours.n_head)
    return settings | heads | dict(hidden_act="silu", attention_bias=bias, mlp_bias=bias, rope_parameters=rope)


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
    have = ours.logits(ours.hidden(idx, positions=positions))
    difference = ((have - want).abs().max() / want.abs().max()).item()
    limit = 1e-4 + (3e-7 * config.block_size if config.pos == "rope" else 0)  # float32 rounds RoPE's angles
    if not difference < limit:
        raise UserError(f"{where}: the logits of our model and of {type(theirs).__name__} differ by {difference:.1e}")


def read_tokenizer(folder: Path) -> str | None:
    """The folder's tokenizer as a checkpoint keeps it; None if it has none, or one that splits text in other ways than
    ours (then a line on stderr says so)."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    try:
        with one_line_errors(folder):
            theirs = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
            content = theirs.backend_tokenizer.to_str()
            known = {50257: "gpt2", 257: "bytes"}.get(get_tokenizer(content).n_vocab, content)
    except UserError as error:
        print(f"{folder}: its tokenizer counts as unknown: {error}", file=sys.stderr, flush=True)
        return None
    return known if same_tokenizer(known, content) else content


@contextlib.contextmanager
def one_line_errors(where: str | Path, advice: str = "") -> Iterator[None]:
    """Raises UserError, saying where, for whatever goes wrong within: files and downloads fail in many ways."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(
            f"{where} cannot be read or written: {type(error).__name__}: {str(error)[:300]}{advice}"
        ) from None


def import_transformers() -> Any:
    """transformers, which takes seconds to import, without its progress bars and reports."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def save_folder(model: GPT, tokenizer: str | None, out_dir: Path, where: str | Path) -> None:
    """Write out_dir, whole or not at all. Raises UserError if the model, called `where`, has no counterpart, or out_dir
    is there already."""
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UserError(f"out_dir {out_dir} exists and is not an empty folder; name another")
    enc = get_tokenizer(tokenizer) if tokenizer else None
    theirs = to_transformers(model, enc and enc.eot_token, where)
    partial = out_dir.resolve().with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        with one_line_errors(out_dir):
            theirs.save_pretrained(partial)
            for name, text in tokenizer_files(tokenizer, model.config.block_size).items() if tokenizer else ():
                (partial / name).write_text(text, encoding="utf-8")
            for path in partial.iterdir():
                path.chmod(0o644)  # safetensors lets no one else read its files
            os.replace(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_transformers(model: GPT, eot: int | None, where: str | Path) -> nn.Module:
    """The same model as a class of transformers, on the CPU. Raises UserError, naming the flag, if there is none."""
    transformers = import_transformers()
    ours = dataclasses.replace(model.config, mlp_hidden=model.h[0].mlp.c_fc.out_features)
    kind = KINDS[ours.pos]
    plain = GPTConfig(**FLAGS[kind])
    for name, have in vars(ours).items():
        if name not in (*FIELDS[kind], *ELSEWHERE) and have != (want := getattr(plain, name)):
            raise UserError(f"{where}: {name} = {have!r}, but Hugging Face's {kind} has {want!r}")
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


def tokenizer_files(tokenizer: str, block_size: int) -> dict[str, str]:
    """{file name: content} of a tokenizer that gives the same ids. transformers loads it as GPT-2's, whatever the model."""
    config = {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # or else transformers 4 drops the space in " ."
        "bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "unk_token": ENDOFTEXT,
    }  # fmt: skip
    return {"tokenizer.json": to_json(tokenizer), "tokenizer_config.json": json.dumps(config)}


if __name__ == "__main__":
    cli(main)
