"""A model from anything that has one: a run, a checkpoint, a Hugging Face folder, or the name of a GPT-2.

transformers reads the folders. Our model and theirs must give the same logits: one without a counterpart is refused,
never approximated.
"""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor, nn

import checkpoint
from configurator import UserError, is_out_of_memory, nearest
from dataloader import data_tokenizer
from model import GPT, GPTConfig
from tokenizer import check_same_tokenizer, get_tokenizer, same_tokenizer

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
KINDS = {"learned": "gpt2", "rope": "llama"}  # Hugging Face's model_type by our pos
# Of each: the flags of GPTConfig that it computes, and its names for the other fields.
NEITHER = dict(
    rope_fraction=1.0, qk_norm=False, attn_scale=None, embed_norm=False, head_gate=0, value_embeds=0,
    head_bias=False, logit_softcap=None,
)  # fmt: skip
FLAGS = {
    "gpt2": dict(pos="learned", norm="layernorm", mlp="gelu", **NEITHER),
    "llama": dict(pos="rope", norm="rmsnorm", mlp="swiglu", **NEITHER),
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
    path = Path(name)
    is_run, is_folder = bool(checkpoint.find(name)), os.path.isfile(path / "config.json")
    if best and not is_run:
        raise UserError(f"--best=True is for a run's folder, which {name} is not")
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
        path = checkpoint.best_of(found) if best else found
    elif not os.path.exists(path):
        raise UserError(f"model {name}: no such checkpoint or folder{nearest(name, GPT2_NAMES)}")
    elif wrong := checkpoint.fault(path):
        raise UserError(f"{path} {wrong}")
    state = checkpoint.load(path)
    config = checkpoint.gpt_config(state, path)
    model = checkpoint.model_of(config, state["model"], path)
    return model.to(device), state["tokenizer"], path


def encoding_of(model: GPT, tokenizer: str | None, path: Path) -> tiktoken.Encoding:
    """The tokenizer of a loaded model. Raises UserError if it is unknown, or has ids that the model does not have."""
    if tokenizer is None:
        raise UserError(f"{path}: its tokenizer is not known, and without one its ids have no text")
    try:
        enc = get_tokenizer(tokenizer)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
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
# Hugging Face's folders


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
