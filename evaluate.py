"""Loss, perplexity, word-level loss and bits per byte of a model on prepared data.

    python evaluate.py out/mine                          # on the data that it was trained on
    python evaluate.py gpt2 --data_dir=data/wikitext2_test --stride=512
    torchrun --nproc_per_node=8 evaluate.py --data_dir=data/fineweb_edu10B --tokens=10485760

A split is one stream of tokens, and each but the first is predicted once, in windows of seq_len, the last one ragged.
The last line printed is one JSON object: loss is in nats per token, perplexity its exp; words are those of the whole
split, bytes those of the predicted tokens' text in UTF-8; word_loss is loss x tokens / (words - 1), bits_per_byte is
loss x tokens / bytes / ln 2. What is not known without a meta.json, or of a part of the split, is null. On the whole
windows of one shard, without a stride, the loss is train_gpt2.py's val_loss.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import checkpoint
from configurator import PathStr, UserError, at_least, cli, configure
from dataloader import Windows, data_tokenizer, open_shard, read_meta
from distributed import World, autocast, pick_dtype
from huggingface import load_model
from model import GPT, without_cudnn
from tokenizer import check_same_tokenizer, get_tokenizer, token_bytes


@dataclass(frozen=True)
class EvaluateConfig:
    model: PathStr | None = None  # a checkpoint, a run or Hugging Face folder, or gpt2..gpt2-xl; None: the newest run
    best: bool = False  # of a run, the checkpoint with the lowest val loss in place of the newest
    data_dir: PathStr | None = None  # token shards, made with the model's tokenizer; None: those a run was trained on
    split: Literal["val", "train"] = "val"
    tokens: int | None = None  # predict only the first ones, this many; None: all
    seq_len: int | None = None  # tokens in a window; None: the model's block_size
    stride: int | None = None  # tokens from a window to the next, which predicts only what is new; None: seq_len
    batch_size: int = 8  # windows in a forward pass, on each process
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the matrix products

    def __post_init__(self):
        at_least(self, 1, "tokens", "seq_len", "stride", "batch_size")


def main() -> int:
    config, _ = configure(EvaluateConfig, positional="model")
    world = World(config.device)
    model, tokenizer, path = load_model(config.model, world.device, config.best)
    data_dir, T = config.data_dir or own_data(path), config.seq_len or model.config.block_size
    stride, meta, vocab_size = config.stride or T, read_meta(data_dir), model.config.vocab_size
    its_tokenizer = data_tokenizer(data_dir, meta, vocab_size)
    check_same_tokenizer(tokenizer, its_tokenizer, path, data_dir)
    shards = [open_shard(path) for path in Windows(data_dir, config.split, 1).paths]
    ids = meta.get("vocab_size") or 1 + max(int(shard.max()) for shard in shards)
    if ids > vocab_size:
        raise UserError(f"{data_dir} has {ids} ids, but {path} only {vocab_size}")
    if not stride <= T <= model.config.block_size:
        raise UserError(f"stride = {stride} <= seq_len = {T} <= block_size = {model.config.block_size} does not hold")
    everything = sum(map(len, shards)) - 1
    tokens = min(config.tokens or everything, everything)
    byte_lengths = token_bytes(get_tokenizer(its_tokenizer)) if meta else None
    in_dtype = autocast(pick_dtype(config.dtype, world.device), world.device)
    nats, size = evaluate(model.eval(), shards, tokens, T, stride, config.batch_size, world, in_dtype, byte_lengths)
    world.close()
    words = meta.get(f"{config.split}_words", 0) if tokens == everything else 0
    result = {
        "model": str(path), "data_dir": data_dir, "split": config.split, "seq_len": T, "stride": stride,
        "loss": nats / tokens, "perplexity": exp(nats / tokens), "word_loss": nats / (words - 1) if words > 1 else None,
        "word_perplexity": exp(nats / (words - 1)) if words > 1 else None,
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "tokens": tokens, "words": words or None, "bytes": size,
    }  # fmt: skip
    if world.is_main:
        print(json.dumps({name: None if value != value else value for name, value in result.items()}))  # no NaN in JSON
    return 0


def own_data(path: Path) -> str:
    """The data_dir of the run that a checkpoint is of. Raises UserError if it is of none."""
    config = (checkpoint.load(path).get("config") if path.is_file() else None) or {}
    if "data_dir" not in config:
        raise UserError(f"{path} does not say on which data it was trained; use --data_dir=DIR")
    return config["data_dir"]


def exp(loss: float) -> float | None:
    """A perplexity; None if it is more than a float holds."""
    return math.exp(loss) if loss < 700 else None


@torch.no_grad()
@without_cudnn()
def evaluate(
    model: GPT, shards: Sequence[np.ndarray], tokens: int, seq_len: int, stride: int, batch_size: int, world: World,
    in_dtype: contextlib.AbstractContextManager, byte_lengths: np.ndarray | None,
) -> tuple[float, int | None]:  # fmt: skip
    """The summed loss in nats of the first `tokens` targets, and the bytes of their text, by the bytes of each id."""
    windows = range(1 + math.ceil(max(0, tokens - seq_len) / stride))
    batches = [windows[first : first + batch_size] for first in windows[::batch_size]]
    nats = num_bytes = predicted = 0
    for batch in share(batches, world, progress=True):
        x, y = read_windows(shards, batch, tokens, seq_len, stride)
        keep = y >= 0
        targets = y[keep]
        with in_dtype:
            hidden = model.hidden(x.to(world.device))[keep.to(world.device)]  # (N, C)
            loss = token_losses(model, hidden, targets.to(world.device))
        nats += loss.cpu().double().sum().item()
        num_bytes += byte_lengths[targets].sum() if byte_lengths is not None else 0
        predicted += len(targets)
    nats, num_bytes, predicted = world.sum([nats, num_bytes, predicted])
    assert predicted == tokens
    return nats, int(num_bytes) if byte_lengths is not None else None


def read_windows(
    shards: Sequence[np.ndarray], numbers: Sequence[int], tokens: int, seq_len: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of windows of the stream, (B, T) each. Window i begins at i * stride; targets that the one
    before it has predicted, and those past the first `tokens`, are -1."""
    x = torch.zeros(len(numbers), min(seq_len, tokens), dtype=torch.int64)
    y = torch.full_like(x, -1)
    for row, number in enumerate(numbers):
        start = number * stride
        size = min(seq_len, tokens - start)
        ids = torch.from_numpy(read(shards, start, start + size + 1).astype(np.int64))
        seen = seq_len - stride if number else 0
        x[row, :size] = ids[:-1]
        y[row, seen:size] = ids[1 + seen :]
    return x, y


def read(shards: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
    """Tokens start to stop of all shards in a row."""
    parts = []
    for shard in shards:
        parts.append(shard[max(0, start) : max(0, stop)])
        start, stop = start - len(shard), stop - len(shard)
    return np.concatenate(parts)


def token_losses(model: GPT, hidden: Tensor, targets: Tensor, rows: int = 256) -> Tensor:
    """Cross entropy in nats, float32 (N,), of targets (N,) given final hidden states (N, C), `rows` at a time:
    the logits of all rows together would fill the memory, and on a CPU small pieces are faster."""
    return torch.cat([
        F.cross_entropy(model.logits(x), y, reduction="none")
        for x, y in zip(hidden.split(rows), targets.split(rows), strict=True)
    ])  # fmt: skip


def share(batches: Sequence, world: World, progress: bool) -> Iterable:
    """This rank's share of the batches, with a progress bar."""
    from tqdm import tqdm

    off = not (progress and world.is_main)
    interval = 0.5 if sys.stderr.isatty() else 30  # a log file wants few lines
    return tqdm(batches[world.rank :: world.size], unit="batch", mininterval=interval, delay=1, disable=off)


if __name__ == "__main__":
    cli(main)
