"""Loss, perplexity, word-level loss and bits per byte of a model on prepared data.

    python evaluate.py out/mine                          # on the data that it was trained on
    python evaluate.py gpt2 --data_dir=data/wikitext2_test --stride=512
    torchrun --nproc_per_node=8 evaluate.py --data_dir=data/fineweb_edu10B --tokens=10485760

A split is one stream of tokens. Each token but the first is predicted once, in windows of seq_len
tokens. The last line printed is one JSON object: loss is in nats per token, and perplexity its exp;
word_loss is loss x tokens / (words - 1); bits_per_byte is loss x tokens / bytes / ln 2, where bytes
are those of the predicted text. What is not known is null, such as the words of a part of a split.
On the whole windows of one shard, loss is the val loss of train_gpt2.py.
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
from tqdm import tqdm

import checkpoint
from configurator import PathStr, UserError, at_least, cli, configure
from dataloader import Windows, data_tokenizer, open_shard, read_meta
from distributed import World, autocast, pick_dtype
from huggingface import load_model
from model import GPT, without_cudnn
from tokenizer import check_same_tokenizer, get_tokenizer, token_bytes


@dataclass(frozen=True)
class EvaluateConfig:
    model: PathStr | None = None  # checkpoint, folder of a run or of Hugging Face, gpt2..gpt2-xl; None: the newest run
    best: bool = False  # use the run's best checkpoint (lowest val loss), not its newest
    data_dir: PathStr | None = None  # folder of token shards; None: the data that the run was trained on
    split: Literal["val", "train"] = "val"  # which shards to evaluate on
    tokens: int | None = None  # number of tokens to predict, the first ones of the split; None: all
    seq_len: int | None = None  # tokens in a window; None: the model's block_size
    stride: int | None = None  # tokens from one window to the next, at most seq_len; None: seq_len
    batch_size: int = 8  # windows in a forward pass on each process
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision of the matrix multiplications

    def __post_init__(self):
        at_least(self, 1, "tokens", "seq_len", "stride", "batch_size")


def main() -> int:
    config, _ = configure(EvaluateConfig, positional="model")
    world = World(config.device)
    model, tokenizer, path = load_model(config.model, world.device, config.best)
    data_dir = config.data_dir or own_data(path)
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    # A window may be shorter than the model's context, never longer. A stride below seq_len gives
    # each token more context to be predicted from, at the price of reading it several times.
    seq_len = config.seq_len or block_size
    stride = config.stride or seq_len
    if not stride <= seq_len <= block_size:
        raise UserError(f"{path}: it needs stride <= seq_len <= block_size, not {stride}, {seq_len}, {block_size}")

    # The data must be in the model's tokens: the same tokenizer, and no id beyond its vocabulary.
    meta = read_meta(data_dir)
    tokenizer_of_data = data_tokenizer(data_dir, meta, vocab_size)
    check_same_tokenizer(tokenizer, tokenizer_of_data, path, data_dir)
    shards = [open_shard(shard) for shard in Windows(data_dir, config.split, 1).paths]
    ids = meta.get("vocab_size") or 1 + max(int(shard.max()) for shard in shards)
    if ids > vocab_size:
        raise UserError(f"{data_dir} has {ids} ids, but {path} only {vocab_size}")

    # Words are counted for a whole split, bytes for each token id: a part has no word loss.
    whole = sum(map(len, shards)) - 1  # the first token of all is not predicted
    tokens = min(config.tokens or whole, whole)
    words = meta.get(f"{config.split}_words", 0) if tokens == whole else 0
    byte_lengths = token_bytes(get_tokenizer(tokenizer_of_data)) if meta else np.zeros(vocab_size)  # 0: not known
    in_dtype = autocast(pick_dtype(config.dtype, world.device), world.device)
    sizes = tokens, seq_len, stride, config.batch_size
    nats, size = evaluate(model.eval(), shards, *sizes, byte_lengths, world, in_dtype)
    world.close()
    about = {"model": str(path), "data_dir": data_dir, "split": config.split, "seq_len": seq_len, "stride": stride}
    if world.is_main:
        print(json.dumps(about | results(nats, tokens, words, size)))
    return 0


def results(nats: float, tokens: int, words: int, size: int) -> dict[str, float | None]:
    """A summed loss in all units. Words and bytes are 0 if unknown. What is not finite is None."""
    loss, word_loss = nats / tokens, nats / (words - 1) if words > 1 else None
    perplexity, word_perplexity = (None if x is None or x > 700 else math.exp(x) for x in (loss, word_loss))
    values = {
        "loss": loss, "perplexity": perplexity, "word_loss": word_loss, "word_perplexity": word_perplexity,
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "tokens": tokens, "words": words or None, "bytes": size or None,
    }  # fmt: skip
    return {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}


def own_data(path: Path) -> str:
    """The data_dir of a checkpoint's run. Raises UserError if it belongs to none."""
    config = (checkpoint.load(path).get("config") if path.is_file() else None) or {}
    if "data_dir" not in config:
        raise UserError(f"{path} does not say on which data it was trained; use --data_dir=DIR")
    return config["data_dir"]


@torch.no_grad()
@without_cudnn()
def evaluate(
    model: GPT, shards: Sequence[np.ndarray], tokens: int, seq_len: int, stride: int, batch_size: int,
    byte_lengths: np.ndarray, world: World, in_dtype: contextlib.AbstractContextManager,
) -> tuple[float, int]:  # fmt: skip
    """The summed loss of the first `tokens` targets in nats, and their bytes, on every rank.

    `byte_lengths` (V,) are the bytes of each token id.
    """
    # The first window predicts seq_len tokens, each later one the `stride` tokens that are new.
    windows = range(1 + math.ceil(max(0, tokens - seq_len) / stride))
    batches = [windows[first : first + batch_size] for first in windows[::batch_size]]
    nats = size = 0
    for batch in share(batches, world):
        x, y = read_windows(shards, batch, tokens, seq_len, stride)
        keep = y >= 0
        targets = y[keep]  # (N,)
        # logits only where they are needed: with a small stride, most targets were predicted before
        with in_dtype:
            hidden = model.hidden(x.to(world.device))[keep.to(world.device)]  # (N, C)
            nats += token_losses(model, hidden, targets.to(world.device)).cpu().double().sum().item()
        del hidden  # its memory serves the next batch
        size += byte_lengths[targets].sum()
    # Each rank has summed its own batches; every token is in exactly one of them.
    nats, size = world.sum([nats, size])
    return nats, int(size)


def read_windows(
    shards: Sequence[np.ndarray], numbers: Sequence[int], tokens: int, seq_len: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of these windows, (B, T) each. Window i begins at token i * stride.

    Targets are -1 where the window before has predicted them, and behind the first `tokens` of all.
    """
    x = torch.zeros(len(numbers), min(seq_len, tokens), dtype=torch.int64)
    y = torch.full_like(x, -1)
    for row, number in enumerate(numbers):
        start = number * stride
        size = min(seq_len, tokens - start)
        ids = torch.from_numpy(read(shards, start, start + size + 1).astype(np.int64))
        # The start of a later window is context: the window before has predicted these tokens.
        # Their targets stay -1, as do those in the padding of the last window.
        seen = seq_len - stride if number else 0
        x[row, :size] = ids[:-1]
        y[row, seen:size] = ids[1 + seen :]
    return x, y


def read(shards: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop` of the stream that the shards form together."""
    parts = []
    for shard in shards:
        # start and stop count from this shard's first token; negative is in an earlier shard.
        parts.append(shard[max(0, start) : max(0, stop)])
        start, stop = start - len(shard), stop - len(shard)
    return np.concatenate(parts)


def token_losses(model: GPT, hidden: Tensor, targets: Tensor, rows: int = 256) -> Tensor:
    """Cross entropy in nats, float32 (N,), of targets (N,) given final hidden states (N, C)."""
    # (N, C) -> pieces of (256, C) -> logits (256, V) -> losses (256,). All logits at once would
    # fill the memory, and on a CPU small pieces are faster.
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.cross_entropy(model.logits(x), y, reduction="none") for x, y in pieces])


def share(batches: Sequence, world: World, progress: bool = True) -> Iterable:
    """The batches of this rank, with a progress bar on the main one."""
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file wants few lines
    hidden = not (progress and world.is_main)
    return tqdm(batches[world.rank :: world.size], unit="batch", mininterval=interval, delay=1, disable=hidden)


if __name__ == "__main__":
    cli(main)
