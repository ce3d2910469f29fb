"""hellaswag.py's scoring against one example at a time, in turn, with the same random GPT-2 124M on the same machine.

    python records/2026-11-20_hellaswag_speed/bench.py [--data=FILE.jsonl] [--examples=200] [--rounds=3] [--device=cpu]

One at a time is the usual loop of GPT-2 reproductions: the four endings of an example, each behind its own copy of the
context, padded to the longest, are a batch, whose logits are all computed. Examples are drawn evenly from the whole
file (default: the validation set, downloaded once), and both ways score the same ones. Tokenising is not timed.
"""

import contextlib
import os
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import hellaswag
from configurator import cli, configure
from distributed import World
from model import GPT, GPTConfig
from tokenizer import get_tokenizer


@dataclass(frozen=True)
class BenchConfig:
    data: str | None = None  # a .jsonl of examples; None: the validation set, downloaded once
    examples: int = 200  # scored in each round
    rounds: int = 3  # of both ways in turn; the table has their medians
    batch_size: int = 4  # of hellaswag.py
    device: str = "auto"


@torch.no_grad()
def one_at_a_time(model, examples, autocast):
    losses = []
    device = model.wte.weight.device
    for context, endings, _ in examples:
        length = len(context) + max(map(len, endings))
        idx = torch.zeros(4, length, dtype=torch.int64)
        counts = torch.zeros(4, length)
        for row, ending in enumerate(endings):
            idx[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            counts[row, len(context) : len(context) + len(ending)] = 1
        idx, counts = idx.to(device), counts.to(device)
        with autocast:
            logits = model(idx)
        targets = idx[:, 1:]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none")
        losses.append((loss.view_as(targets) * counts[:, 1:]).sum(1).tolist())
    return np.array(losses)


def main():
    config, _ = configure(BenchConfig)
    world = World(config.device)
    device = world.device
    examples = hellaswag.load(config.data, get_tokenizer("gpt2"), 1024)
    examples = examples[:: max(1, len(examples) // config.examples)][: config.examples]
    torch.manual_seed(0)
    model = GPT(GPTConfig()).to(device).eval()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{len(examples)} examples, GPT-2 124M, torch {torch.__version__}, {name}")
    for dtype in (torch.float32, torch.bfloat16):
        autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
        ways = {
            "one at a time": lambda part, autocast=autocast: one_at_a_time(model, part, autocast),
            "hellaswag.py": lambda part, autocast=autocast: hellaswag.ending_losses(
                model, part, config.batch_size * 1024, world, autocast
            ),
        }
        speeds = {way: [] for way in ways}
        for score in ways.values():
            score(examples[:4])  # first call's set-up
        for i in range(config.rounds):
            losses = []
            for way, score in ways.items():
                start = time.perf_counter()
                losses.append(score(examples))  # ends with the losses on the CPU
                speeds[way].append(len(examples) / (time.perf_counter() - start))
            both = ", ".join(f"{way} {speeds[way][i]:.2f}" for way in ways)
            difference = abs(losses[0] - losses[1]).max()
            print(
                f"{dtype} round {i + 1}: {both} examples/s; largest difference of a loss {difference:.1e}", flush=True
            )
        old, new = speeds.values()
        ratio = statistics.median(b / a for a, b in zip(old, new, strict=True))
        print(
            f"{dtype}: {statistics.median(old):.2f} and {statistics.median(new):.2f} examples/s, {ratio:.2f} x as fast"
        )


if __name__ == "__main__":
    cli(main)
