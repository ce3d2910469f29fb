"""HellaSwag: how often does a model find the right one of four endings the likeliest? Chance is 0.25.

    python hellaswag.py --model=out/mine
    torchrun --nproc_per_node=8 hellaswag.py --model=out/mine

The last line printed is one JSON object: acc counts endings of the lowest summed loss, acc_norm of the lowest mean loss
per token. Texts are rendered as GPT-2 reproductions do: the tokens of the context, then those of " " + ending.

Zellers et al. 2019, arXiv 1905.07830; https://github.com/rowanz/hellaswag
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
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
    model: PathStr | None = None  # a checkpoint, a run or Hugging Face folder, or gpt2..gpt2-xl; None: the newest run
    best: bool = False  # of a run, the checkpoint with the lowest val loss in place of the newest
    data: PathStr | None = None  # a .jsonl of examples; None: the validation set, downloaded once
    limit: int | None = None  # score only the first examples, this many
    batch_size: int = 4  # tokens in a forward pass, in block_sizes (texts are packed), on each process
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the matrix products

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
    in_dtype = autocast(pick_dtype(config.dtype, world.device), world.device)
    acc, acc_norm, n = score(model, examples, config.batch_size * block_size, world, in_dtype, progress=True)
    world.close()
    if world.is_main:
        print(json.dumps({"model": str(path), "acc": acc, "acc_norm": acc_norm, "n": n}))
    return 0


def load(path: str | None, enc: tiktoken.Encoding, block_size: int, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a file (None: of the validation set, downloaded once), tokenised.

    The start of a context is cut off if the longest ending would not fit into block_size behind it. Raises UserError,
    naming the line, for what is not an example, and for a file without any.
    """
    examples, path = [], path or download()
    try:
        with open(path, "rb") as file:
            for line in islice(file, limit):
                row = json.loads(line)
                context, *endings = map(enc.encode_ordinary, [row["ctx"], *(" " + ending for ending in row["endings"])])
                room = block_size + 1 - max(map(len, endings))  # an ending's last token is predicted, not read
                if len(endings) != 4 or row["label"] not in range(4) or not context or room < 1:
                    raise ValueError(f"not a context, four endings that fit into {block_size} tokens, and a label")
                examples.append(Example(context[-room:], endings, row["label"]))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path}:{len(examples) + 1}: not an example of HellaSwag: {error!r}") from None
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def download() -> str:
    """The path of the validation set, downloaded if it is not there yet. Raises UserError."""
    path, data = Path(VAL_FILE), b""
    if path.exists():
        data = path.read_bytes()
    else:
        import requests

        with contextlib.suppress(requests.RequestException):
            data = requests.get(URL, timeout=60).content
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{path} is not HellaSwag's validation set; put there what {URL} has")
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write(data)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
    return VAL_FILE


def score(model: GPT, examples: list[Example], *how, **more) -> tuple[float, float, int] | None:
    """(acc, acc_norm, number of examples), on every rank; takes what ending_losses takes. None if stopped."""
    losses = ending_losses(model, examples, *how, **more)
    if losses is None:
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
) -> np.ndarray | None:  # fmt: skip
    """The summed loss in nats of every ending, float64 (n, 4), on every rank; None if `stop` became true on any.

    max_tokens is the size of a forward pass. Draws no random numbers, and changes neither the model's train or eval
    mode nor its compiled forward.
    """
    losses = np.zeros((len(examples), 4))
    device, was_training = model.wte.weight.device, model.training
    model.eval()
    for batch in share(make_batches(examples, max_tokens), world, progress):
        if stop:
            break
        idx, positions, segment, where, targets = (t.to(device) for t in pack([examples[i] for i in batch]))
        mask = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)  # (B, T, T)
        with in_dtype:
            hidden = model.hidden(idx, positions=positions, mask=mask.tril().unsqueeze(1)).flatten(0, 1)[where]
            loss = token_losses(model, hidden, targets).cpu().double().numpy()
        starts = np.cumsum([0] + [len(ending) for i in batch for ending in examples[i].endings])[:-1]
        losses[batch] = np.add.reduceat(loss, starts).reshape(-1, 4)
    model.train(was_training)
    *totals, stopped = world.sum([*losses.flatten(), bool(stop)])  # a rank's losses are 0 where another's are not
    return None if stopped else np.array(totals).reshape(-1, 4)


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
