"""HellaSwag: how often is the right one of four endings the likeliest? Chance is 0.25.

    python hellaswag.py --model=out/mine
    torchrun --nproc_per_node=8 hellaswag.py --model=out/mine

The last line printed is one JSON object. acc picks the ending with the lowest summed loss, acc_norm
the one with the lowest mean loss per token. As in other GPT-2 reproductions, a text is the tokens
of the context, then those of " " + ending. (Zellers et al. 2019, arXiv 1905.07830;
https://github.com/rowanz/hellaswag)
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

from configurator import PathStr, UserError, at_least, cli, configure
from distributed import World, autocast, pick_dtype
from evaluate import share, token_losses
from files import whole_file
from huggingface import encoding_of, load_model
from model import GPT, without_cudnn

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
VAL_FILE = "data/hellaswag/hellaswag_val.jsonl"


@dataclass(frozen=True)
class HellaSwagConfig:
    model: PathStr | None = None  # checkpoint, folder of a run or of Hugging Face, gpt2..gpt2-xl; None: the newest run
    best: bool = False  # use the run's best checkpoint (lowest val loss), not its newest
    data: PathStr | None = None  # .jsonl file of examples; None: the validation set, downloaded once
    limit: int | None = None  # number of examples to score, the first ones of the file; None: all
    batch_size: int = 4  # size of a forward pass on each process, in multiples of block_size tokens
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision of the matrix multiplications

    def __post_init__(self):
        at_least(self, 1, "limit", "batch_size")


class Example(NamedTuple):
    context: list[int]  # token ids
    endings: list[list[int]]  # token ids of the four endings
    label: int  # index of the right ending


def main() -> int:
    config, _ = configure(HellaSwagConfig, positional="model")
    world = World(config.device)
    model, tokenizer, path = load_model(config.model, world.device, config.best)
    # The main process reads, or downloads, the examples for all ranks.
    enc, block_size = encoding_of(model, tokenizer, path), model.config.block_size
    examples = world.on_main(lambda: load(config.data, enc, block_size, config.limit))
    in_dtype = autocast(pick_dtype(config.dtype, world.device), world.device)
    acc, acc_norm, n = score(model, examples, config.batch_size * block_size, world, in_dtype, progress=True)
    world.close()
    if world.is_main:
        print(json.dumps({"model": str(path), "acc": acc, "acc_norm": acc_norm, "n": n}))
    return 0


def load(path: str | None, enc: tiktoken.Encoding, block_size: int, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a file, or of the validation set (downloaded once), tokenized.

    Raises UserError if the file cannot be read or is empty, and names a line that is no example.
    """
    path = path or download()
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    # Count empty lines, too, so that an error names the line that an editor shows.
    numbered = [(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path}: no examples in it")
    return [parse(line, where, enc, block_size) for line, where in numbered[:limit]]


def parse(line: bytes, where: str, enc: tiktoken.Encoding, block_size: int) -> Example:
    """The example of a line of JSON. Raises UserError if the line is not one."""
    try:
        row = json.loads(line)
        # Context and endings are tokenized apart: all four endings follow the same context ids.
        context, *endings = map(enc.encode_ordinary, [row["ctx"], *(" " + ending for ending in row["endings"])])
        # Only the end of a long context is used, so that the longest ending fits behind it. The
        # last token of an ending is predicted but never read, so it needs no room.
        room = block_size + 1 - max(map(len, endings))
        if not context or len(endings) != 4 or row["label"] not in range(4) or room < 1:
            raise ValueError(f"it needs a ctx, four endings of at most {block_size} tokens, and a label from 0 to 3")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not an example of HellaSwag: {error!r}") from None
    return Example(context[-room:], endings, row["label"])


def download() -> str:
    """The path of the validation set, which is downloaded unless it is there. Raises UserError."""
    path = Path(VAL_FILE)
    try:
        if path.exists():
            data = path.read_bytes()
        else:
            import requests  # it takes a while to import

            response = requests.get(URL, timeout=60)
            response.raise_for_status()
            data = response.content
        # A file that was there is checked, too: accuracy on other examples cannot be compared.
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise UserError(f"{path}: not HellaSwag's validation set: its sha256 differs; put there what {URL} has")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write(data)
    except OSError as error:  # the errors of requests are OSErrors, too, but without a strerror
        raise UserError(f"{path}: {error.strerror or f'{error}; put there what {URL} has'}") from None
    return VAL_FILE


def score(model: GPT, examples: list[Example], *args, **kwargs) -> tuple[float, float, int] | None:
    """(acc, acc_norm, number of examples), on every rank; None if stopped. See ending_losses."""
    losses = ending_losses(model, examples, *args, **kwargs)
    if losses is None:
        return None
    # The model's answer is the ending with the lowest loss: (n, 4) -> (n,). A sum favours short
    # endings, so acc_norm compares means per token.
    lengths = np.array([[len(ending) for ending in example.endings] for example in examples])
    labels = np.array([example.label for example in examples])
    acc, acc_norm = (float((x.argmin(axis=1) == labels).mean()) for x in (losses, losses / lengths))
    return acc, acc_norm, len(examples)


@torch.no_grad()
@without_cudnn()
def ending_losses(
    model: GPT, examples: list[Example], max_tokens: int, world: World,
    in_dtype: contextlib.AbstractContextManager, progress: bool = False, stop: object = False,
) -> np.ndarray | None:  # fmt: skip
    """The summed loss of every ending in nats, float64 (n, 4), on every rank; None if stopped.

    A training run is not disturbed: no random number is drawn, the model's mode stays.
    """
    losses = np.zeros((len(examples), 4))
    device, was_training = model.wte.weight.device, model.training
    model.eval()
    # Score this rank's batches. The four endings of an example share a row, so that the context is
    # read once instead of four times.
    for batch in share(make_batches(examples, max_tokens), world, progress):
        if stop:
            break
        idx, positions, segment, where, targets = (t.to(device) for t in pack([examples[i] for i in batch]))

        # A token sees those before it that are in its own segment or in the context.
        mask = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)  # (B, T, T)
        with in_dtype:
            # Logits only where an ending is predicted: (B, T, C) -> (N, C) -> losses (N,).
            hidden = model.hidden(idx, positions=positions, mask=mask.tril().unsqueeze(1)).flatten(0, 1)[where]
            loss = token_losses(model, hidden, targets).cpu().double().numpy()

        # The losses of an ending stand side by side, and so do an example's four endings.
        starts = np.cumsum([0] + [len(ending) for i in batch for ending in examples[i].endings])[:-1]
        losses[batch] = np.add.reduceat(loss, starts).reshape(-1, 4)
    model.train(was_training)

    # An example is scored on one rank and 0 on all others: the sum over the ranks has them all.
    *totals, stopped = world.sum([*losses.flatten(), bool(stop)])
    return None if stopped else np.array(totals).reshape(-1, 4)


def row_length(example: Example) -> int:
    """The tokens that are read: the context, and each ending but its last token."""
    return len(example.context) + sum(len(ending) - 1 for ending in example.endings)


def make_batches(examples: list[Example], max_tokens: int) -> list[list[int]]:
    """The examples' numbers, longest first, in batches of at most max_tokens with padding."""
    # Rows of like length need little padding. The first and longest row sets how many fit.
    order = sorted(range(len(examples)), key=lambda i: row_length(examples[i]), reverse=True)
    batches = []
    while order:
        size = max(1, max_tokens // row_length(examples[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    return batches


def pack(examples: list[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One row per example: its context once, then the four endings without their last tokens.

    Returns idx, positions and segment, (B, T) each; segment is 0 in the context, 1 to 4 in the
    endings. From the places `where` (N,) in the flattened rows, `targets` (N,) are predicted.
    """
    B, T = len(examples), max(map(row_length, examples))
    idx, positions, segment = np.zeros((3, B, T), dtype=np.int64)
    where, targets = [], []
    for row, (context, endings, _) in enumerate(examples):
        end = len(context)
        # Padding stands behind all that is scored, so nothing that is scored sees it.
        idx[row, :end] = context
        positions[row, :end] = np.arange(end)
        for number, ending in enumerate(endings, 1):
            start, end = end, end + len(ending) - 1
            idx[row, start:end] = ending[:-1]
            # Every ending has the positions behind the context, as if it were the only one.
            positions[row, start:end] = len(context) + np.arange(end - start)
            segment[row, start:] = number
            # The last token of the context predicts the first token of all four endings.
            where += [row * T + len(context) - 1, *range(row * T + start, row * T + end)]
            targets += ending
    return tuple(torch.from_numpy(np.asarray(a)) for a in (idx, positions, segment, where, targets))


if __name__ == "__main__":
    cli(main)
