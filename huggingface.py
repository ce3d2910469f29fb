"""Weights to and from Hugging Face.

    python huggingface.py --model=out/notes --out_dir=hf/notes

writes a folder that transformers and what builds on it load: learned + layernorm + gelu as GPT2LMHeadModel,
rope + rmsnorm + swiglu as LlamaForCausalLM. A model that is not exactly one of these is refused.
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
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import tiktoken
import torch
from torch import Tensor

import checkpoint
from configurator import PathStr, UserError, check, cli, configure, is_out_of_memory, nearest
from dataloader import data_tokenizer
from model import GPT, GPTConfig
from tokenizer import ENDOFTEXT, check_same_tokenizer, get_tokenizer, same_tokenizer, to_json

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# By model_type, GPTConfig's fields: (their name in config.json, what holds where config.json does not say).
CONFIG_NAMES: dict[str, dict[str, tuple[str, typing.Any]]] = {
    "gpt2": dict(
        block_size=("n_positions", 1024), vocab_size=("vocab_size", 50257), n_layer=("n_layer", 12),
        n_head=("n_head", 12), n_embd=("n_embd", 768), mlp_hidden=("n_inner", None),
        norm_eps=("layer_norm_epsilon", 1e-5), tie_weights=("tie_word_embeddings", True),
    ),
    "llama": dict(
        block_size=("max_position_embeddings", 2048), vocab_size=("vocab_size", 32000),
        n_layer=("num_hidden_layers", 32), n_head=("num_attention_heads", 32), n_embd=("hidden_size", 4096),
        mlp_hidden=("intermediate_size", 11008), norm_eps=("rms_norm_eps", 1e-6), rope_base=("rope_theta", 10000.0),
        tie_weights=("tie_word_embeddings", False), bias=("attention_bias", False),
    ),
}  # fmt: skip
LLAMA_FLAGS = dict(pos="rope", norm="rmsnorm", mlp="swiglu")  # GPT-2's are GPTConfig's defaults
LLAMA_MODULES = {
    "wte": "embed_tokens", "ln_f": "norm", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
    "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    model: PathStr | None = None  # a checkpoint, a run or Hugging Face folder, or gpt2..gpt2-xl; None: the newest run
    out_dir: PathStr | None = None  # the folder to write; must not exist yet, or be empty


def main() -> int:
    config, _ = configure(ExportConfig)
    if config.out_dir is None:
        raise UserError("say where to write: --out_dir=FOLDER")
    out_dir = Path(config.out_dir)
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UserError(f"out_dir {out_dir} exists and is not an empty folder; name another")
    model, tokenizer, path = load_model(config.model, torch.device("cpu"))
    save_folder(model, tokenizer, out_dir, str(path))
    print(f"{path} -> {out_dir}: {model.num_params():,} parameters")
    if tokenizer is None:
        print("its tokenizer is not known, so the folder has none")
    elif (used := get_tokenizer(tokenizer).n_vocab) < model.config.vocab_size:
        print(f"its vocabulary stays padded: {model.config.vocab_size} rows, of which {used} are tokens")
    return 0


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
    is_run, is_hf = bool(checkpoint.find(name)), os.path.isfile(path / "config.json")
    # A path called gpt2 goes before the model of that name only where it holds a model itself.
    if name in GPT2_NAMES and not is_run and not is_hf:
        path = download(name)
        return load_folder(path).to(device), "gpt2", path
    if is_hf and not is_run:
        model = load_folder(path)
        return model.to(device), read_tokenizer(path, model.config.vocab_size), path
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
    model = without_weights(checkpoint.gpt_config(state, path))
    checkpoint.load_weights(model, state["model"], path, assign=True)
    return model.to(device), state["tokenizer"], path


def encoding_of(model: GPT, tokenizer: str | None, path: Path) -> tiktoken.Encoding:
    """The tokenizer of a loaded model. Raises UserError where it is not known, or has ids that the model has not."""
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
    """Weights to start from (source as load_model's name) and their architecture: dropout as asked, block_size cropped,
    vocab_size padded (to the data's, as its meta.json has it, where none is given). Raises UserError where anything
    else that was given differs, or the data has another tokenizer.
    """
    model, tokenizer, path = load_model(source, torch.device("cpu"))
    theirs = model.config
    check_same_tokenizer(tokenizer, data_tokenizer(data_dir, meta, theirs.vocab_size), path, data_dir)
    changes: dict = {"vocab_size": max(theirs.vocab_size, meta.get("vocab_size", 0))}
    for field in dataclasses.fields(GPTConfig):
        name, want, have = field.name, getattr(asked, field.name), getattr(theirs, field.name)
        if name not in given or want == have:
            continue
        cropped = name == "block_size" and (want < have or theirs.pos == "rope")
        padded = name == "vocab_size" and want > have
        if not (cropped or padded or name == "dropout"):
            raise UserError(f"{name} = {want}, but {path} has {have}, and its weights need that")
        changes[name] = want
    weights = dict(model.state_dict())
    config = dataclasses.replace(theirs, **changes)
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: config.block_size]
    for name in ("wte.weight", "lm_head.weight"):  # new rows start as the mean of the others
        rows = config.vocab_size - theirs.vocab_size
        weights[name] = torch.cat([weights[name], weights[name].mean(0, keepdim=True).expand(rows, -1)])
    return config, weights


def without_weights(config: GPTConfig) -> GPT:
    with torch.device("meta"):  # no time spent on an initialisation that is overwritten
        return GPT(config)


def layout(config: GPTConfig) -> dict[str, tuple[list[str], torch.Size]]:
    """{their tensor: (our tensors, its shape)}. GPT-2 stacks q, k and v; tied weights are kept once. Names without the
    `transformer.` or `model.` before them, which some files have and some do not."""
    state = without_weights(config).state_dict()
    if config.tie_weights:
        del state["lm_head.weight"]
    names: dict[str, list[str]] = {}
    for ours in state:
        if config.pos == "learned":
            theirs = re.sub(r"\.c_[qkv]\.", ".c_attn.", ours)
        else:
            theirs = re.sub(r"^h\.", "layers.", ours)
            for a, b in LLAMA_MODULES.items():
                theirs = theirs.replace(f"{a}.", f"{b}.")
        names.setdefault(theirs, []).append(ours)
    return {theirs: (ours, stack(theirs, [state[name] for name in ours]).shape) for theirs, ours in names.items()}


def stack(theirs: str, ours: list[Tensor]) -> Tensor:
    tensor = torch.cat(ours)
    return (tensor.t() if is_conv1d(theirs) else tensor).contiguous()


def is_conv1d(theirs: str) -> bool:
    """Whether it is a matrix of GPT-2's "Conv1D", which holds what nn.Linear holds transposed."""
    return re.search(r"\.c_(attn|proj|fc)\.weight$", theirs) is not None


# ---- in


def download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # takes a while to import

    try:
        return Path(
            snapshot_download(f"openai-community/{name}", allow_patterns=["config.json", "model*.safetensors*"])
        )
    except Exception as error:  # the hub's errors have no common class
        raise UserError(
            f"model {name} could not be downloaded ({type(error).__name__}); a local folder works too: --model=FOLDER"
        ) from None


def load_folder(folder: Path) -> GPT:
    """The model of a Hugging Face folder, in float32. Raises UserError, naming the file and the setting or tensor."""
    with reading(folder / "config.json"):
        config = to_gpt_config(read_json(folder / "config.json"), f"{folder}/config.json")
    where, files = weight_files(folder)
    tensors, weights = read_tensors(files), {}
    size = sum(file.stat().st_size for file in files)
    checkpoint.check_size(config, len(tensors), size, f"{folder}/config.json")
    for theirs, (ours, shape) in layout(config).items():
        if theirs not in tensors:
            raise UserError(f"{where}: no tensor {theirs}, which config.json calls for")
        tensor = tensors.pop(theirs)
        if tensor.shape != shape:
            raise UserError(f"{where}: {theirs} is {tuple(tensor.shape)}, but config.json makes it {tuple(shape)}")
        if not tensor.is_floating_point():
            raise UserError(f"{where}: {theirs} is {tensor.dtype}; quantized weights cannot be read")
        tensor = tensor.float().t() if is_conv1d(theirs) else tensor.float()
        weights |= {name: part.contiguous() for name, part in zip(ours, tensor.chunk(len(ours)), strict=True)}
    if config.tie_weights:
        weights["lm_head.weight"] = weights["wte.weight"]
    head = tensors.get("lm_head.weight")
    if head is not None and torch.equal(head.float(), weights["wte.weight"]):
        del tensors["lm_head.weight"]  # tied, yet written a second time
    if tensors:
        raise UserError(f"{where}: {min(tensors)} has no place in config.json's model ({len(tensors)} such tensors)")
    model = without_weights(config)
    checkpoint.load_weights(model, weights, where, assign=True)
    return model


def to_gpt_config(data: dict, where: str) -> GPTConfig:
    """config.json -> GPTConfig (dropout is not taken over: it belongs to a training run, not to the weights).

    Raises UserError for what our model does not compute.
    """
    data = {name: value for name, value in data.items() if value is not None}
    kind = data.get("model_type")
    if kind not in CONFIG_NAMES:
        raise UserError(f"{where}: model_type = {kind!r}, but it must be one of {', '.join(CONFIG_NAMES)}")
    rope = data.get("rope_scaling", {}) | data.get("rope_parameters", {})  # where older and newer files say it
    data = {"mlp_bias": False} | data | rope | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    hints = typing.get_type_hints(GPTConfig)
    values = {
        ours: check(theirs, data.get(theirs, default), {theirs: hints[ours]}, where)
        for ours, (theirs, default) in CONFIG_NAMES[kind].items()
    }
    try:
        config = GPTConfig(**values, **(LLAMA_FLAGS if kind == "llama" else {}))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if kind == "gpt2":
        needed = dict(
            activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
            reorder_and_upcast_attn=False, add_cross_attention=False,
        )  # fmt: skip
    else:
        needed = dict(
            hidden_act="silu", num_key_value_heads=config.n_head, head_dim=config.n_embd // config.n_head,
            rope_type="default", mlp_bias=config.bias,
        )  # fmt: skip
    for name, value in needed.items():
        if data.get(name, value) != value:
            raise UserError(f"{where}: {name} = {data.get(name)!r}, but our model computes only {value!r}")
    return config


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raises UserError, naming the file, for whatever goes wrong within: a damaged file fails in many ways."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{file}: cannot be read: {type(error).__name__}: {str(error)[:300]}") from None


def read_json(path: Path) -> dict:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return data


def weight_files(folder: Path) -> tuple[Path, set[Path]]:
    """What holds or lists the weights, model.safetensors or else pytorch_model.bin, and the files that hold them."""
    names = [name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    where = next((folder / name for name in names if (folder / name).is_file()), None)
    if where is None:
        raise UserError(f"{folder}: no model.safetensors (nor its index, nor pytorch_model.bin) beside config.json")
    if where.suffix != ".json":
        return where, {where}
    with reading(where):
        parts = set(read_json(where)["weight_map"].values())
        if outside := [part for part in parts if Path(part).name != part]:
            raise UserError(f"{where}: {min(outside)!r} is not a file in its folder")
    if missing := [part for part in parts if not (folder / part).is_file()]:
        raise UserError(f"{where}: {min(missing)} is not there")
    return where, {folder / part for part in parts}


def read_tensors(files: set[Path]) -> dict[str, Tensor]:
    """All tensors. Names lose `transformer.` or `model.`; buffers that old files hold (masks, RoPE's table) are left
    out."""
    tensors = {}
    for file in sorted(files):
        with reading(file):
            if file.suffix == ".safetensors":
                part = safetensors.torch.load_file(file)
            else:
                part = torch.load(file, map_location="cpu", weights_only=True)
            for name, tensor in part.items():
                if not checkpoint.plain(tensor):
                    raise UserError(f"{file}: {name} is no plain tensor")
                tensors[re.sub(r"^(transformer|model)\.", "", name)] = tensor.detach()
    buffers = r".*\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq"
    return {name: tensor for name, tensor in tensors.items() if not re.fullmatch(buffers, name)}


def read_tokenizer(folder: Path, vocab_size: int) -> str | None:
    """The folder's tokenizer as a checkpoint keeps it; None where it has none, or one that splits text in other ways
    than ours (then a line on stderr says so)."""
    if (folder / "tokenizer.json").is_file():
        with reading(folder / "tokenizer.json"):
            content = json.dumps(read_json(folder / "tokenizer.json"), ensure_ascii=False)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():  # GPT-2's own two files
        with reading(folder / "vocab.json"):
            vocab = read_json(folder / "vocab.json")
        with reading(folder / "merges.txt"):
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines[lines[0].startswith("#version") :] if line]
        ordinary = {merge.replace(" ", "") for merge in merges}
        data = {
            "model": {"vocab": vocab, "merges": merges},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "added_tokens": [{"id": i, "content": t} for t, i in vocab.items() if len(t) > 1 and t not in ordinary],
        }
        content = json.dumps(data, ensure_ascii=False)
    else:
        return None
    try:
        enc = get_tokenizer(content)
    except UserError as error:
        print(f"{folder}: its tokenizer counts as unknown: {error}", file=sys.stderr, flush=True)
        return None
    if enc.n_vocab > vocab_size:
        raise UserError(f"{folder}: its tokenizer has {enc.n_vocab} ids, but config.json's vocab_size is {vocab_size}")
    known = {50257: "gpt2", 257: "bytes"}.get(enc.n_vocab, content)
    return known if same_tokenizer(known, content) else content


# ---- out


def save_folder(model: GPT, tokenizer: str | None, out_dir: Path, where: str) -> None:
    """Write out_dir, whole or not at all. Raises UserError where the model, called `where`, has no counterpart."""
    config = to_config_json(model, where)
    if tokenizer is not None:
        enc = get_tokenizer(tokenizer)
        config |= {"bos_token_id": enc.eot_token, "eos_token_id": enc.eot_token}
    files = {"config.json": config, "generation_config.json": {k: config[k] for k in ("bos_token_id", "eos_token_id")}}
    texts = {name: json.dumps(data, indent=2) + "\n" for name, data in files.items()}
    if tokenizer is not None:
        texts |= tokenizer_files(enc, model.config.block_size)

    # Theirs has all biases or none (GPT-2: all); a bias that ours does not have is one of zeros.
    full = dataclasses.replace(model.config, bias=config.get("attention_bias", True), qkv_bias=None)
    state = {name: torch.zeros(p.shape) for name, p in without_weights(full).state_dict().items()} | model.state_dict()
    prefix = "model." if full.pos == "rope" else "transformer."
    tensors = {
        (theirs if theirs == "lm_head.weight" else prefix + theirs): stack(theirs, [state[name] for name in ours])
        for theirs, (ours, _) in layout(full).items()
    }

    out_dir = out_dir.resolve()
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        safetensors.torch.save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(partial / "config.json", partial / "model.safetensors")  # save_file lets no one else read it
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # the data must be on disk before the name is
        os.replace(partial, out_dir)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{out_dir} could not be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_config_json(model: GPT, where: str) -> dict:
    """The model's config.json. Raises UserError, naming the flag, where it could not say all that GPTConfig says."""
    ours = model.config
    kind = "llama" if ours.pos == "rope" else "gpt2"
    data = {"model_type": kind} | {theirs: getattr(ours, name) for name, (theirs, _) in CONFIG_NAMES[kind].items()}
    hidden, bias = model.h[0].mlp.c_fc.out_features, ours.bias or bool(ours.qkv_bias)
    if kind == "gpt2":
        data |= dict(
            architectures=["GPT2LMHeadModel"], n_inner=hidden, activation_function="gelu_new",
            n_ctx=ours.block_size,  # llama.cpp's converter reads this one
            resid_pdrop=ours.dropout, embd_pdrop=ours.dropout, attn_pdrop=ours.dropout,
        )  # fmt: skip
    else:
        data |= dict(
            architectures=["LlamaForCausalLM"], intermediate_size=hidden, hidden_act="silu",
            num_key_value_heads=ours.n_head, head_dim=ours.n_embd // ours.n_head, attention_bias=bias, mlp_bias=bias,
            rope_parameters={"rope_type": "default", "rope_theta": ours.rope_base},  # as transformers 5 says it
        )  # fmt: skip
    back = to_gpt_config(data, where)
    for field in dataclasses.fields(GPTConfig):
        name, have, said = field.name, getattr(ours, field.name), getattr(back, field.name)
        if have != said and name not in ("dropout", "bias", "qkv_bias", "mlp_hidden"):
            raise UserError(f"{where}: {name} = {have!r}, but Hugging Face's {data['architectures'][0]} has {said!r}")
    return data | {"torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None}


def tokenizer_files(enc: tiktoken.Encoding, block_size: int) -> dict[str, str]:
    """{file name: text} of a tokenizer that gives enc's ids, which transformers loads as GPT-2's whatever the model."""
    data = to_json(enc)
    config = {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # or else transformers 4 drops the space in " ."
        "bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "unk_token": ENDOFTEXT,
    }  # fmt: skip
    return {
        "tokenizer.json": json.dumps(data, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        # The same once more, for loaders that are older than tokenizer.json.
        "vocab.json": json.dumps(data["model"]["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *data["model"]["merges"], ""]),
    }


if __name__ == "__main__":
    cli(main)
