"""How large should a step be, and do three more ideas gain? At the size of a CPU, on what the speed run kept.

    python tokenizer.py --dataset=BOOKS --vocab_size=4096 --out=books4k.json
    python fineweb.py --dataset=BOOKS --tokenizer=books4k.json --val_split=validation --out_dir=data/books4k
    python fineweb.py config/data/shakespeare_char.py
    python records/2026-12-01_small_steps/run.py data/books4k data/shakespeare_char out/small_steps

Two runs at a time, each on one thread. A run that is done is not repeated, so the command can be stopped and
given again. It ends with the table.
"""

import contextlib
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import dataloader  # noqa: E402
import optim  # noqa: E402
import train_gpt2  # noqa: E402

TOKENS = 819_200  # in each run on books: 400 steps of 2,048
RATES = dict(learning_rate=0.025, embed_lr=0.7, head_lr=0.012, vector_lr=0.015)  # tuned at 2,048 tokens
RUN = dict(vocab_size=4096, batch_size=16, dtype="bfloat16", compile=True, sample_interval=0, checkpoint_interval=0)
FACTORS = {2048: (0.5, 0.7, 1.0, 1.4), 4096: (0.7, 1.0, 1.4), 8192: (0.5, 0.7, 1.0, 1.4)}
SEEDS = (1, 2, 3)

# ---- The ideas, each in place of a function of the program

linear, muon_update, shuffled = optim.learning_rate, optim.Muon.update, train_gpt2.train_batches


def power_law(step: int, config: optim.OptimConfig, max_steps: int) -> float:
    """The linear cool-down to the power of 1.2."""
    return config.learning_rate * (linear(step, config, max_steps) / config.learning_rate) ** 1.2


def norm_kept(self: optim.Muon, params: list[torch.Tensor], group: dict) -> None:
    """Muon's step without weight decay, then every matrix back to the norm it had (zero matrices are free)."""
    before = torch._foreach_norm(params)
    muon_update(self, params, group | dict(weight_decay=0.0))
    for p, norm, new in zip(params, before, torch._foreach_norm(params), strict=True):
        p.mul_(torch.where(norm > 0, norm / new, 1.0))


def cut_anew(windows, seed, rows, batch_size, rank, world_size, device, step) -> dataloader.Batches:
    """train_batches of one process and one shard, but epoch e cuts the windows at an offset drawn from (seed, e)."""
    (path,), T, n = windows.paths, windows.seq_len, len(windows)
    tokens = windows.shard(path)
    while True:
        numbers = dataloader.step_windows(step, rows, n, seed)
        epochs = ((step - 1) * rows + np.arange(rows)) // n
        offsets = [0 if e == 0 else np.random.default_rng([seed, e]).integers(T) for e in epochs]
        starts = np.minimum(numbers * T + offsets, len(tokens) - T - 1)
        batch = np.stack([tokens[start : start + T + 1] for start in starts]).astype(np.int64)
        for part in torch.from_numpy(batch).split(batch_size):
            yield part[:, :-1].contiguous(), part[:, 1:].contiguous()
        step += 1


class FewWindows(dataloader.Windows):
    """The first third of TOKENS alone, so that a run takes three epochs of them."""

    def __init__(self, data_dir: str, split: str, *more):
        super().__init__(data_dir, split, *more)
        if split == "train":
            self.ends = np.minimum(self.ends, TOKENS // 3 // self.seq_len)


# ---- Runs


def flags(data: str, tokens: int, factor: float, seed: int) -> list[str]:
    """The options of a run; factor multiplies the learning rates scaled by sqrt(tokens / 2,048)."""
    if data == "shakespeare":
        return [f"--seed={seed}", "--max_steps=1500", "--val_interval=300", "--sample_interval=0"]
    if data == "gpt2":  # GPT-2 itself, with a tuned AdamW
        sizes = dict(n_layer=4, n_head=2, n_embd=128, block_size=128, total_batch_size=2048, max_steps=TOKENS // 2048)
        more = dict(learning_rate=2e-3, warmup_steps=20, min_lr=0.0, device="cpu", val_tokens=131072, val_interval=400)
        options = sizes | more | dict(RUN, seed=seed)
        return [f"--{name}={value}" for name, value in options.items()]
    scale = factor * math.sqrt(tokens / 2048)
    options = {name: lr * scale for name, lr in RATES.items()} | dict(
        RUN, seed=seed, total_batch_size=tokens, max_steps=TOKENS // tokens, val_interval=TOKENS // tokens
    )
    return [f"--{name}={value}" for name, value in options.items()]


def run(data: str, folder: str, out: str, tokens: int, factor: float, seed: int, idea: str) -> float:
    """The final val loss of a run, which is trained unless it is done."""
    torch.set_num_threads(1)
    name = f"{data}_{tokens}_{factor}_{seed}_{idea.replace(' ', '_') or 'plain'}"
    train_gpt2.learning_rate = power_law if idea == "power law" else linear
    optim.Muon.update = norm_kept if idea == "norm kept" else muon_update
    train_gpt2.train_batches = cut_anew if idea.endswith("cut anew") else shuffled
    train_gpt2.Windows = FewWindows if idea.startswith("three epochs") else dataloader.Windows
    config = dict(shakespeare="shakespeare_cpu", gpt2="gpt2_124m").get(data, "speedrun_cpu")
    out_dir = Path(out, name)
    sys.argv[1:] = [str(ROOT / f"config/{config}.py"), f"--data_dir={folder}", f"--out_dir={out_dir}", "--resume=True"]
    sys.argv += flags(data, tokens, factor, seed)
    with open(f"{out_dir}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        assert train_gpt2.main() == 0
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["val_loss"] for record in records if record["kind"] == "val"][-1]


def rows(folders: dict[str, str], out: str, trials: list[tuple], seeds: tuple[int, ...]) -> Iterator[tuple]:
    """(trial, losses by seed) of each trial (data, tokens, factor, idea)."""
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = [
            pool.submit(run, data, folders[data], out, tokens, factor, seed, idea)
            for data, tokens, factor, idea in trials for seed in seeds
        ]  # fmt: skip
        for number, trial in enumerate(trials):
            yield trial, [job.result() for job in jobs[number * len(seeds) :][: len(seeds)]]


def main(books: str, shakespeare: str, out: str) -> None:
    folders = dict(books=os.path.abspath(books), shakespeare=os.path.abspath(shakespeare))
    folders["gpt2"] = folders["books"]
    os.makedirs(out, exist_ok=True)
    print("| tokens a step | factor | val loss, seed 1337 |\n|---|---|---|")

    # Tune the learning rates of each size with a seed that is not used again.
    best = {}
    tuning = [("books", tokens, factor, "") for tokens, factors in FACTORS.items() for factor in factors]
    for (_, tokens, factor, _), [loss] in rows(folders, out, tuning, (1337,)):
        print(f"| {tokens} | {factor} | {loss:.4f} |", flush=True)
        best[tokens] = min(best.get(tokens, (math.inf, 0)), (loss, factor))

    # Compare the best of each size, then the ideas at 2,048 tokens, with three seeds.
    print("\n| data | tokens a step | factor | idea | mean | standard deviation | seeds |")
    print("|---|---|---|---|---|---|---|")
    trials = [("books", tokens, factor, "") for tokens, (_, factor) in best.items()]
    ideas = ("power law", "norm kept", "three epochs", "three epochs, cut anew")
    trials += [("books", 2048, best[2048][1], idea) for idea in ideas]
    trials += [("books", 2048, factor, "norm kept") for factor in (0.7, 1.4)]
    trials += [("shakespeare", 2048, 1.0, idea) for idea in ("", "cut anew")]
    trials += [("gpt2", 2048, 1.0, idea) for idea in ("three epochs", "three epochs, cut anew")]
    for (data, tokens, factor, idea), losses in rows(folders, out, trials, SEEDS):
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        spread = f"{statistics.mean(losses):.4f} | {statistics.stdev(losses):.4f}"
        print(f"| {data} | {tokens} | {factor} | {idea} | {spread} | {each} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
