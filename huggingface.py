"""A model from anything that has one, and every model to Hugging Face.

    python huggingface.py --model=out/notes --out_dir=hf/notes

writes a folder for AutoModelForCausalLM and AutoTokenizer. GPT-2's flags become a GPT2LMHeadModel,
Llama's (rope, rmsnorm, swiglu) a LlamaForCausalLM. Any other model goes there together with a copy
of model.py, to be loaded by AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
"""

import contextlib
import dataclasses
import glob
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiktoken
import torch
from torch import Tensor, nn

import checkpoint
import model as model_file
from configurator import PathStr, UserError, cli, configure, nearest, out_of_memory
from dataloader import data_tokenizer
from files import read_json
from model import GPT, GPTConfig
from tokenizer import ENDOFTEXT, check_same_tokenizer, get_tokenizer, same_tokenizer, to_json, tokenizer_content

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
REMOTE = "train_gpt2"  # the model_type of a folder that holds our own model.py
# Llama's modules -> ours. GPT-2's are called as ours.
MODULES = dict(
    embed_tokens="wte", layers="h", norm="ln_f", input_layernorm="ln_1", post_attention_layernorm="ln_2",
    self_attn="attn", q_proj="c_q", k_proj="c_k", v_proj="c_v", o_proj="c_proj",
    gate_proj="c_gate", up_proj="c_fc", down_proj="c_proj",
)  # fmt: skip


# Our options -> the settings in their config.json.
SETTINGS = {
    "gpt2": dict(
        block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
        mlp_hidden="n_inner", norm_eps="layer_norm_epsilon", tie_weights="tie_word_embeddings",
    ),
    "llama": dict(
        block_size="max_position_embeddings", vocab_size="vocab_size", n_layer="num_hidden_layers",
        n_head="num_attention_heads", n_embd="hidden_size", mlp_hidden="intermediate_size", norm_eps="rms_norm_eps",
        tie_weights="tie_word_embeddings",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    model: PathStr | None = None  # a run, a checkpoint, a Hugging Face folder or gpt2..gpt2-xl; None: the newest run
    best: bool = False  # use the run's best checkpoint (lowest val loss), not its newest
    out_dir: PathStr | None = None  # the folder to write; must not exist yet, or be empty


def main() -> int:
    config, _ = configure(ExportConfig, positional="model")
    if config.out_dir is None:
        raise UserError("say where to write: --out_dir=FOLDER")
    model, tokenizer, path = load_model(config.model, torch.device("cpu"), config.best)
    save_folder(model, tokenizer, Path(config.out_dir), path)
    used = f"of which {get_tokenizer(tokenizer).n_vocab} are tokens" if tokenizer else "but its tokenizer is not known"
    print(f"{path} -> {config.out_dir}: {model.num_params():,} parameters, {model.config.vocab_size} rows, {used}")
    if not is_native(model.config):
        print("its shape is neither GPT-2's nor Llama's: from_pretrained needs trust_remote_code=True to load it")
    return 0


# ---- A model from anything that has one


def load_model(name: str | None, device: torch.device, best: bool = False) -> tuple[GPT, str | None, Path]:
    """The model, its tokenizer (see get_tokenizer; None: unknown) and where they came from.

    name is a checkpoint, a run's folder (its newest whole checkpoint or its best), a Hugging Face
    folder, one of GPT2_NAMES, or None: the newest run under out/. Raises UserError.
    """
    path = newest_run() if name is None else Path(name)
    is_run = bool(checkpoint.find(str(path)))
    if best and not is_run:
        raise UserError(f"--best=True is for a run's folder, which {path} is not")

    # A Hugging Face folder. One that is called gpt2 comes before the download of that name.
    if not is_run and (path / "config.json").exists():
        return load_folder(path).to(device), read_tokenizer(path), path
    if not is_run and name in GPT2_NAMES:
        from huggingface_hub import snapshot_download  # takes a while to import

        files = ["config.json", "model*.safetensors*"]
        with one_line_errors(f"model {name} cannot be downloaded", "; without a network, name a copy of its folder"):
            path = Path(snapshot_download(f"openai-community/{name}", allow_patterns=files))
        return load_folder(path).to(device), "gpt2", path

    # A run's folder, or a checkpoint itself.
    if path.is_dir():
        newest = checkpoint.newest_whole(str(path))
        if newest is None:
            raise UserError(f"{path}: no checkpoint (ckpt_*.pt) and no config.json in this folder")
        path = checkpoint.best_of(newest) if best else newest
    elif not path.exists():
        raise UserError(f"model {path}: no such checkpoint or folder{nearest(str(path), GPT2_NAMES)}")
    elif wrong := checkpoint.fault(path):
        raise UserError(f"{path} {wrong}")
    state = checkpoint.load(path)
    model = checkpoint.model_of(checkpoint.gpt_config(state, path), state["model"], path)
    return model.to(device), state["tokenizer"], path


def newest_run() -> Path:
    """The folder of the newest checkpoint under out/. Raises UserError if there is none."""
    times = {}
    for path in map(Path, glob.glob("out/**/ckpt_*.pt", recursive=True)):  # unlike Path.glob, it follows links
        # A run that goes on may have deleted the file by now, and a link may lead nowhere.
        with contextlib.suppress(FileNotFoundError):
            if checkpoint.step_of(path) is not None:
                times[path] = path.stat().st_mtime
    if not times:
        raise UserError("no checkpoint under out/; train one (python train_gpt2.py ...) or say --model=PATH")
    return max(times, key=times.get).parent


def encoding_of(model: GPT, tokenizer: str | None, path: Path) -> tiktoken.Encoding:
    """A loaded model's tokenizer. Raises UserError if it is unknown or has too many ids."""
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

    Of the architecture only dropout, a smaller block_size (any with RoPE) and a larger vocab_size
    may be given; without one, vocab_size grows to the data's in meta.json. Raises UserError if
    another field in `given` differs from the model's, or the data has another tokenizer.
    """
    model, tokenizer, path = load_model(source, torch.device("cpu"))
    old = model.config
    check_same_tokenizer(tokenizer, data_tokenizer(data_dir, meta, old.vocab_size), path, data_dir)
    cropped = asked.block_size < old.block_size or old.pos == "rope"
    may_change = dict(dropout=True, block_size=cropped, vocab_size=asked.vocab_size > old.vocab_size)
    changes = {name: want for name, want in vars(asked).items() if name in given and want != getattr(old, name)}
    for name, want in changes.items():
        if not may_change.get(name):
            raise UserError(f"{name} = {want}, but {path} has {getattr(old, name)}, and its weights need that")
    of_data = {"vocab_size": max(old.vocab_size, meta.get("vocab_size", 0))}
    new = dataclasses.replace(old, **of_data | changes)

    # Positions are cut off at the end. New tokens' rows start as the mean of all others.
    weights = dict(model.state_dict())
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: new.block_size]
    for name in [name for name in weights if name.startswith(("wte", "vte", "lm_head"))]:
        mean = weights[name].mean(0, keepdim=True)
        weights[name] = torch.cat([weights[name], *[mean] * (new.vocab_size - old.vocab_size)])
    return new, weights


# ---- Hugging Face's folders, in


def load_folder(folder: Path) -> GPT:
    """The model of a Hugging Face folder, in float32. Runs no code of the folder's.

    Raises UserError, naming the folder, if it is damaged or its model is not one of ours.
    """
    from safetensors.torch import load_file

    settings = read_json(folder / "config.json", "it must be a Hugging Face model's")
    kind = settings.get("model_type")
    if kind not in (*SETTINGS, REMOTE):
        raise UserError(f"{folder}: model_type = {kind!r}, but it must be gpt2, llama or {REMOTE}")
    with one_line_errors(f"{folder} cannot be read"):
        if kind != REMOTE:
            return load_native(folder)
        # What save_remote wrote: our own names, and the head only if it is not the embedding.
        config = checkpoint.gpt_config(settings, folder / "config.json")
        theirs = load_file(folder / "model.safetensors")
        weights = {name.removeprefix("gpt."): tensor.float() for name, tensor in theirs.items()}
        if config.tie_weights:
            weights["lm_head.weight"] = weights["wte.weight"]
        return checkpoint.model_of(config, weights, folder)


def load_native(folder: Path) -> GPT:
    """The model of a folder in GPT-2's or Llama's shape; transformers must give the same logits."""
    transformers, local = import_transformers(), dict(local_files_only=True, trust_remote_code=False)
    their_config = transformers.AutoConfig.from_pretrained(folder, **local)
    config = to_gpt_config(their_config)
    for name, want in their_settings(config).items():
        if (have := getattr(their_config, name)) != want:
            raise UserError(f"{folder}: {name} = {have!r}, but our model computes only {want!r}")

    # It lists missing, unexpected and mismatched tensors. Old files' masked_bias is no fault.
    how = dict(config=their_config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, **how, **local)
    for problem, tensors in report.items():
        if tensors := [tensor for tensor in tensors if not str(tensor).endswith(".masked_bias")]:
            raise UserError(f"{folder}: config.json and weights differ: {problem.replace('_', ' ')}: {tensors[0]}")
    weights = {name: tensor.contiguous() for name, tensor in by_our_names(theirs.state_dict()).items()}
    model = checkpoint.model_of(config, weights, folder)
    check_same_logits(model, theirs, folder)
    return model


def to_gpt_config(theirs: Any) -> GPTConfig:
    """Our config of their GPT2Config or LlamaConfig, without dropout: that belongs to a run."""
    shape = {our: getattr(theirs, name) for our, name in SETTINGS[theirs.model_type].items()}
    if theirs.model_type == "llama":
        rope_base = theirs.rope_parameters["rope_theta"]
        shape |= dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=theirs.attention_bias, rope_base=rope_base)
    return GPTConfig(**shape)


def their_settings(ours: GPTConfig) -> dict[str, Any]:
    """What config.json says of a model's logits: in GPT-2's words, or with RoPE in Llama's."""
    kind = "gpt2" if ours.pos == "learned" else "llama"
    settings = {"model_type": kind} | {name: getattr(ours, our) for our, name in SETTINGS[kind].items()}
    if kind == "gpt2":
        return settings | dict(activation_function="gelu_new")
    bias = ours.bias or bool(ours.qkv_bias)  # one setting for all of q, k, v and their output
    return settings | dict(
        num_key_value_heads=ours.n_head, head_dim=ours.n_embd // ours.n_head, attention_bias=bias, mlp_bias=bias,
        hidden_act="silu", rope_parameters=dict(rope_type="default", rope_theta=ours.rope_base),
    )  # fmt: skip


def by_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, named and shaped as ours: views, so writing to them writes to theirs."""
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
    """Put both models into eval mode. Raises UserError unless they give the same logits for random
    ids at 64 positions spread over the whole context."""
    config = ours.eval().config
    positions = torch.linspace(0, config.block_size - 1, min(64, config.block_size), dtype=torch.float64).long()[None]
    idx = torch.randint(config.vocab_size, positions.shape, generator=torch.Generator().manual_seed(0))
    want = theirs.eval()(idx, position_ids=positions, attention_mask=torch.ones_like(idx)).logits
    have = ours.logits(ours.hidden(idx, positions=positions))
    difference = ((have - want).abs().max() / want.abs().max()).item()
    limit = 1e-4 + (3e-7 * config.block_size if config.pos == "rope" else 0)  # float32 rounds RoPE's angles
    if not difference < limit:  # a NaN is not, either
        raise UserError(f"{where}: the logits of our model and of {type(theirs).__name__} differ by {difference:.1e}")


def read_tokenizer(folder: Path) -> str | None:
    """The folder's tokenizer as a checkpoint keeps it; None if it has none, or one that splits text
    in other ways than ours (then a line on stderr says so)."""
    if (folder / "tokenizer.json").is_file():
        content = tokenizer_content(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file():  # as GPT-2's tokenizer was published
        from tokenizers import ByteLevelBPETokenizer

        theirs = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        theirs.add_special_tokens([ENDOFTEXT])
        content = theirs.to_str()
    else:
        return None
    try:
        known = {50257: "gpt2", 257: "bytes"}.get(get_tokenizer(content).n_vocab, content)
        return known if same_tokenizer(known, content) else content
    except UserError as error:
        print(f"{folder}: its tokenizer counts as unknown: {error}", file=sys.stderr, flush=True)
        return None


@contextlib.contextmanager
def one_line_errors(what: str, advice: str = "") -> Iterator[None]:
    """Raises UserError, `what` first, for a damaged file, a full disk or a missing network."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{what}: {type(error).__name__}: {str(error)[:300]}{advice}") from None


def import_transformers() -> Any:
    """transformers, which takes seconds to import, without its progress bars and reports."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# ---- Hugging Face's folders, out


def save_folder(model: GPT, tokenizer: str | None, out_dir: Path, where: str | Path) -> None:
    """Write a model, which came from `where`, and its tokenizer to out_dir. Raises UserError."""
    partial = out_dir / ".huggingface.partial"
    if out_dir.exists() and not (out_dir.is_dir() and set(os.listdir(out_dir)) <= {partial.name}):
        raise UserError(f"out_dir {out_dir} exists and is not an empty folder; name another")
    eot = get_tokenizer(tokenizer).eot_token if tokenizer else None
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        with one_line_errors(f"{out_dir} cannot be written"):
            partial.mkdir(parents=True)
            if is_native(model.config):
                to_transformers(model, eot, where).save_pretrained(partial)
            else:
                save_remote(model, eot, partial)
            if tokenizer:
                save_tokenizer(tokenizer, model.config.block_size, partial)

            # Files move up once all are on disk, and config.json last: a folder without it is no
            # model. (The folder itself may be a mount point, which nothing can replace.)
            mode = (partial / "config.json").stat().st_mode
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                with contextlib.suppress(PermissionError):  # some file systems have no chmod
                    path.chmod(mode)  # safetensors lets no one else read its files
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(path, out_dir / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_native(config: GPTConfig) -> bool:
    """Whether transformers' GPT-2 or Llama is this model: their config says all that ours does."""
    back = to_gpt_config(SimpleNamespace(**their_settings(config)))
    # Dropout and init are no part of what it computes, and missing biases are biases of 0.
    return back == dataclasses.replace(config, dropout=0.0, init="gpt2", bias=back.bias, qkv_bias=None)


def to_transformers(model: GPT, eot: int | None, where: str | Path) -> nn.Module:
    """The same model as transformers', on the CPU. Raises UserError if their logits differ."""
    transformers = import_transformers()
    ours = dataclasses.replace(model.config, mlp_hidden=model.h[0].mlp.c_fc.out_features)
    settings = their_settings(ours) | dict(bos_token_id=eot, eos_token_id=eot)
    if ours.pos == "learned":
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), ours.dropout)
        settings |= dict(n_ctx=ours.block_size)  # llama.cpp's converter reads this one
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    views = by_our_names(theirs.state_dict())
    for name, tensor in model.state_dict().items():  # theirs has all biases or none: those that ours lacks stay 0
        views[name].copy_(tensor)
    check_same_logits(model, theirs, where)
    if ours.pos == "rope":
        theirs.config.rope_theta = ours.rope_base  # where transformers 4 and others look for it
    return theirs


def save_tokenizer(tokenizer: str, block_size: int, folder: Path) -> None:
    """Write a tokenizer with the same ids. transformers loads it as GPT-2's, whatever the model."""
    content, eot = to_json(tokenizer), get_tokenizer(tokenizer).eot_token
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    name = next(token["content"] for token in json.loads(content)["added_tokens"] if token["id"] == eot)
    settings = {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # or else transformers 4 drops the space in " ."
        "bos_token": name, "eos_token": name, "unk_token": name,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def save_remote(model: GPT, eot: int | None, folder: Path) -> None:
    """Write a model of any shape, with model.py and a class by which transformers runs it."""
    from safetensors.torch import save_file

    config, code = model.config, f"modeling_{REMOTE}"
    settings = {
        "model_type": REMOTE, "architectures": ["TrainGPT2"], "dtype": "float32",
        "auto_map": {"AutoConfig": f"{code}.TrainGPT2Config", "AutoModelForCausalLM": f"{code}.TrainGPT2"},
        "vocab_size": config.vocab_size, "max_position_embeddings": config.block_size, "use_cache": False,
        "tie_word_embeddings": config.tie_weights, "bos_token_id": eot, "eos_token_id": eot,
        # lm-eval asks for a cache: transformers makes one of these sizes, which forward ignores
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head, "hidden_size": config.n_embd,
        "gpt_config": vars(config),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / f"{code}.py").write_text(REMOTE_CODE, encoding="utf-8")
    shutil.copyfile(model_file.__file__, folder / "model.py")
    weights = {f"gpt.{name}": tensor for name, tensor in model.state_dict().items()}
    if config.tie_weights:
        del weights["gpt.lm_head.weight"]  # it is gpt.wte.weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


REMOTE_CODE = '''"""Lets AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) run model.py."""

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import GPT, GPTConfig


class TrainGPT2Config(PretrainedConfig):
    model_type = "train_gpt2"


class TrainGPT2(PreTrainedModel, GenerationMixin):
    config_class = TrainGPT2Config
    _tied_weights_keys = {"gpt.lm_head.weight": "gpt.wte.weight"}  # if config.tie_word_embeddings

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt_config))
        self.post_init()

    def _init_weights(self, module):
        pass  # GPT has done it

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        positions = mask = None
        if attention_mask is not None and not attention_mask.all():
            # Nobody but itself attends to padding, and positions count from the first token that is none.
            tokens = attention_mask.bool()
            positions = (tokens.cumsum(-1) - 1).clamp(min=0)  # (B, T)
            itself = torch.eye(tokens.size(1), dtype=torch.bool, device=tokens.device)
            mask = (torch.ones_like(itself).tril() & tokens[:, None, None, :]) | itself  # (B, 1, T, T)
        logits = self.gpt.logits(self.gpt.hidden(input_ids, positions=positions, mask=mask))  # (B, T, V)
        if labels is None:
            return CausalLMOutput(logits=logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())  # labels of -100 do not count
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """Without a cache the whole text is read for every token, as much of it as the context holds."""
        last = slice(-self.config.max_position_embeddings, None)
        mask = None if attention_mask is None else attention_mask[:, last]
        return {"input_ids": input_ids[:, last], "attention_mask": mask}
'''


if __name__ == "__main__":
    cli(main)
