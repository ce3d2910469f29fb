"""How large should a step be, and do two more ideas gain? At the size of a CPU, on config/speedrun_cpu.py.

    python fineweb.py config/data/stdlib.py
    python records/2026-12-01_small_steps/run.py data/stdlib out/small_steps          # all: 39 runs
    python records/2026-12-01_small_steps/run.py data/stdlib out/small_steps tune     # or tune, seeds, ideas

A run that was stopped goes on, and one that is done is not repeated. Each call ends with the table of all runs.
"""

import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import optim  # noqa: E402
import train_gpt2  # noqa: E402

TOKENS = 819_200  # in each run: 400 steps of 2,048
RATES = dict(learning_rate=0.025, embed_lr=0.7, head_lr=0.012, vector_lr=0.015)  # config/speedrun_cpu.py's, at 2,048
SEEDS = (1, 2, 3)


def flags(tokens: int, factor: float, seed: int) -> list[str]:
    """A run with steps of so many tokens; factor multiplies the learning rates scaled by sqrt(tokens / 2,048)."""
    scale = factor * math.sqrt(tokens / 2048)
    options = {name: lr * scale for name, lr in RATES.items()} | dict(
        seed=seed, total_batch_size=tokens, batch_size=tokens // 128, max_steps=TOKENS // tokens,
        val_interval=TOKENS // tokens, sample_interval=0, checkpoint_interval=100,
    )  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


def power_law(step: int, config: optim.OptimConfig, max_steps: int) -> float:
    """The linear cool-down to the power of 1.2."""
    return config.learning_rate * (optim_rate(step, config, max_steps) / config.learning_rate) ** 1.2


def norm_kept(self: optim.Muon, params: list[torch.Tensor], group: dict) -> None:
    """Muon's step without weight decay, then every matrix back to the norm it had (zero matrices are free)."""
    before = torch._foreach_norm(params)
    muon_update(self, params, group | dict(weight_decay=0.0))
    for p, norm, new in zip(params, before, torch._foreach_norm(params), strict=True):
        p.mul_(torch.where(norm > 0, norm / new, 1.0))


optim_rate, muon_update = optim.learning_rate, optim.Muon.update
IDEAS = {"": (optim_rate, muon_update), "power law": (power_law, muon_update), "norm kept": (optim_rate, norm_kept)}


def run(data: str, out: Path, tokens: int, factor: float, seed: int, idea: str = "") -> float:
    """The final val loss of a run, which is trained unless it is done."""
    folder = out / f"{tokens}_{factor}_{seed}{'_' * bool(idea)}{idea.replace(' ', '_')}"
    train_gpt2.learning_rate, optim.Muon.update = IDEAS[idea]
    argv = [str(ROOT / "config/speedrun_cpu.py"), f"--data_dir={data}", f"--out_dir={folder}", "--resume=True"]
    sys.argv[1:] = argv + flags(tokens, factor, seed)
    if not any(folder.glob(f"ckpt_{TOKENS // tokens:06d}.pt")):
        assert train_gpt2.main() == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["val_loss"] for record in records if record["kind"] == "val"][-1]


def main(data: str, out: str, part: str = "all") -> None:
    rows, sizes, best = [], (2048, 4096, 8192), {}

    # Tune: five learning rates for each size, one seed that is not used again.
    for tokens in sizes:
        losses = {factor: run(data, Path(out), tokens, factor, 1337) for factor in (0.5, 0.7, 1.0, 1.4, 2.0)}
        best[tokens] = min(losses, key=losses.get)
        rows += [f"| {tokens} | {factor} | {loss:.4f} | |" for factor, loss in losses.items()]

    # Compare: the best learning rates with three seeds, then the ideas at 2,048 tokens.
    trials = [(tokens, best[tokens], "") for tokens in sizes] if part in ("all", "seeds") else []
    if part in ("all", "ideas"):
        trials += [(2048, factor, "power law") for factor in (1.0, 1.4)]
        trials += [(2048, factor, "norm kept") for factor in (0.7, 1.0, 1.4)]
    for tokens, factor, idea in trials:
        losses = [run(data, Path(out), tokens, factor, seed, idea) for seed in SEEDS]
        spread = statistics.stdev(losses)
        rows.append(f"| {tokens} {idea} | {factor} | {statistics.mean(losses):.4f} | {spread:.4f} |")
    print("\n".join(["| tokens a step | factor | val loss | standard deviation |", "|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
