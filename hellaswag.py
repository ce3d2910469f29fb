"""HellaSwag: how often does a model find the right one of four endings the likeliest? Chance is 0.25.

    python hellaswag.py --model=out/mine
    torchrun --nproc_per_node=8 hellaswag.py --model=out/mine

The last line printed is one JSON object: acc counts endings of the lowest summed loss, acc_norm of the lowest mean loss
per token. Texts are rendered as GPT-2 reproductions do: the tokens of the context, then those of " " + ending.

Zellers et al. 2019, arXiv 1905.07830; https://github.com/rowanz/hellaswag
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configurator import PathStr, UserError, at_least, cli, configure
from device import autocast, pick_dtype
from distributed import World
from evaluate import deal, token_losses
from files import whole_file
from model import GPT, without_cudnn
from weights import encoding_of, load_model

if TYPE_CHECKING:
    import tiktoken

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
VAL_FILE = "data/hellaswag/hellaswag_val.jsonl"


@dataclass(frozen=True)
class HellaSwagConfig:
    model: PathStr | None = None  # a checkpoint, a run or Hugging Face folder, or gpt2..gpt2-xl; None: the newest run
    best: bool = False  # of a run, the checkpoint with the lowest val loss in place of the newest
    data: PathStr | None = None  # a .jsonl of examples; None: the validation set, downloaded once
    limit: int | None = None  # score only the first examples, this many
    batch_size: int = 4  # tokens in a forward pass, in block_sizes (texts are packed), on each process
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the matrix products
    compile: bool = False  # torch.compile, which takes about a minute before it saves any

    def __post_init__(self):
        at_least(self, 1, "limit", "batch_size")


class Example(NamedTuple):
    context: list[int]  # token ids
    endings: list[list[int]]
    label: int  # of the right ending


def main() -> int:
    config, _ = configure(HellaSwagConfig, positional="model")
    world = World(config.device)
    model, tokenizer, path = load_model(config.model, world.device, config.best)
    enc, block_size = encoding_of(model, tokenizer, path), model.config.block_size
    examples = world.on_main(lambda: load(config.data, enc, block_size, config.limit))
    if config.compile:
        model.hidden = torch.compile(model.hidden, dynamic=True)
    in_dtype = autocast(pick_dtype(config.dtype, world.device), world.device)
    acc, acc_norm, n = score(model, examples, config.batch_size * block_size, world, in_dtype, progress=True)
    world.close()
    if world.is_main:
        print(json.dumps({"model": str(path), "acc": acc, "acc_norm": acc_norm, "n": n}))
    return 0


def load(path: str | None, enc: "tiktoken.Encoding", block_size: int, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a file (None: of the validation set, downloaded once), tokenised.

    The start of a context is cut off if the longest ending would not fit into block_size behind it. Raises UserError,
    naming the line, for what is not an example, and for a file without any.
    """
    examples, name = [], path or VAL_FILE
    try:
        with open(path or download(), "rb") as file:
            for line in islice(file, limit):
                context, endings, label = parse(line)
                context, *endings = map(enc.encode_ordinary, [context, *(" " + ending for ending in endings)])
                longest = max(map(len, endings))
                if longest > block_size:
                    raise ValueError(f"an ending of {longest} tokens does not fit into block_size = {block_size}")
                room = block_size + 1 - longest  # its last token is predicted, not read
                examples.append(Example(context[-room:], endings, label))
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{name}:{len(examples) + 1}: {error}") from None
    if not examples:
        raise UserError(f"{name}: no examples in it")
    return examples


def parse(line: bytes) -> tuple[str, list[str], int]:
    """A line of the file to context, four endings, and the number of the right one. Raises ValueError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON; is the file damaged?") from None
    for name in ("ctx", "endings", "label"):
        if not isinstance(row, dict) or name not in row:
            raise ValueError(f"no field {name!r}")
    ctx, endings, label = row["ctx"], row["endings"], row["label"]
    if not isinstance(ctx, str) or not ctx:
        raise ValueError("ctx is not a text")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(ending, str) for ending in endings):
        raise ValueError("endings are not 4 texts")
    if type(label) is not int or not 0 <= label < 4:
        raise ValueError(f"label is {label!r}, not 0, 1, 2 or 3")
    return ctx, endings, label


def download() -> str:
    """The path of the validation set, downloaded if it is not there yet. Raises UserError."""
    path = Path(VAL_FILE)
    if path.exists():
        data = path.read_bytes()
    else:
        import requests

        try:
            response = requests.get(URL, timeout=60)
            response.raise_for_status()
        except requests.RequestException as error:
            raise UserError(f"{URL}: {type(error).__name__}; put it at {path}") from None
        data = response.content
    if hashlib.sha256(data).hexdigest() != SHA256:
        where = f"{path}: not HellaSwag's validation set" if path.exists() else f"{URL}: not what it was"
        raise UserError(f"{where} (its sha256 is another); move it away")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(data)
    return VAL_FILE


def score(
    model: GPT, examples: list[Example], max_tokens: int, world: World,
    in_dtype: contextlib.AbstractContextManager, progress: bool = False, stop: Sequence = (),
) -> tuple[float, float, int] | None:  # fmt: skip
    """(acc, acc_norm, number of examples), on every rank; max_tokens is the size of a forward pass. None if `stop`
    became true on any rank.

    Draws no random numbers, and changes neither the model's train or eval mode nor its compiled forward.
    """
    losses = ending_losses(model, examples, max_tokens, world, in_dtype, progress, stop)
    if world.sum([bool(stop)])[0]:
        return None
    lengths = np.array([[len(ending) for ending in example.endings] for example in examples])
    labels = np.array([example.label for example in examples])
    acc, acc_norm = (float((x.argmin(axis=1) == labels).mean()) for x in (losses, losses / lengths))
    return acc, acc_norm, len(examples)


@torch.no_grad()
@without_cudnn()
def ending_losses(
    model: GPT, examples: list[Example], max_tokens: int, world: World,
    in_dtype: contextlib.AbstractContextManager, progress: bool = False, stop: Sequence = (),
) -> np.ndarray:  # fmt: skip
    """The summed loss in nats of every ending, float64 (n, 4), on every rank."""
    losses = np.zeros((len(examples), 4))
    device, was_training = model.wte.weight.device, model.training
    model.eval()
    for batch, counts in deal(make_batches(examples, max_tokens), world, progress):
        if stop:
            break
        idx, positions, segment, where, targets = (t.to(device) for t in pack([examples[i] for i in batch]))
        mask = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)  # (B, T, T)
        with in_dtype:
            hidden = model.hidden(idx, positions=positions, mask=mask.tril().unsqueeze(1)).flatten(0, 1)[where]
            loss = token_losses(model, hidden, targets).cpu().double().numpy()
        if counts:
            lengths = [len(ending) for i in batch for ending in examples[i].endings]
            losses[batch] = np.add.reduceat(loss, np.cumsum([0, *lengths[:-1]])).reshape(-1, 4)
    model.train(was_training)
    return np.array(world.sum(losses.flatten())).reshape(-1, 4)  # a rank's are 0 where another's are not


def row_length(example: Example) -> int:
    return len(example.context) + sum(len(ending) - 1 for ending in example.endings)


def make_batches(examples: list[Example], max_tokens: int) -> list[list[int]]:
    """The examples' numbers, longest first, in batches of at most max_tokens with padding, of which there is little."""
    order = sorted(range(len(examples)), key=lambda i: row_length(examples[i]), reverse=True)
    batches = []
    while order:
        size = max(1, max_tokens // row_length(examples[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    return batches


def pack(examples: list[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One row an example: the context once, and behind it the four endings without their last tokens.

    idx, positions and segment are (B, T): segment 0 is the context, which every ending sees, 1 to 4 are the endings,
    which do not see each other. `where` (N,) are the places in the flattened rows, and `targets` (N,) the tokens that
    follow there, of every ending in order: the last token of the context predicts the first of all four.
    """
    B, T = len(examples), max(map(row_length, examples))
    idx, positions, segment = np.zeros((3, B, T), dtype=np.int64)
    where, targets = [], []
    for row, (context, endings, _) in enumerate(examples):
        end = len(context)
        idx[row, :end] = context
        positions[row, :end] = np.arange(end)
        for number, ending in enumerate(endings, 1):
            start, end = end, end + len(ending) - 1
            idx[row, start:end] = ending[:-1]
            positions[row, start:end] = len(context) + np.arange(end - start)
            segment[row, start:] = number
            where += [row * T + len(context) - 1, *range(row * T + start, row * T + end)]
            targets += ending
    return tuple(torch.from_numpy(np.asarray(a)) for a in (idx, positions, segment, where, targets))


if __name__ == "__main__":
    cli(main)
