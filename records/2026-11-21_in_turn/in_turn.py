"""This checkout against another (git worktree add), in turn: what a user waits for.

    python records/2026-11-21_in_turn/in_turn.py ../another --files='text/*.parquet' --rounds=5

Prints the medians of both and their ratio for: preparing `files` (launch to end), launch to the end of the first
training step, and a step (median of a run's), each with the options of one of RUNS.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [
    "--device=cpu", "--log_interval=1", "--val_interval=0", "--sample_interval=0", "--checkpoint_interval=0",
]  # fmt: skip
RUNS = {
    "shakespeare_cpu": ["config/shakespeare_cpu.py", "--dtype=float32", "--max_steps=40"],
    "shakespeare_cpu, adamw": ["config/shakespeare_cpu.py", "--dtype=float32", "--max_steps=40", "--optimizer=adamw"],
    "shakespeare_cpu, adafactor": [
        "config/shakespeare_cpu.py", "--dtype=float32", "--max_steps=40", "--optimizer=adafactor",
        "--learning_rate=1e-3", "--min_lr=1e-4",
    ],
    "GPT-2 of 3 layers, 128 tokens": [
        "--compile=False", "--dtype=float32", "--batch_size=1", "--seq_len=128", "--total_batch_size=128",
        "--max_steps=12", "--vocab_size=50304", "--n_layer=3",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("other", type=Path)
    parser.add_argument("--files", required=True, help="what is prepared, with the tokenizers gpt2 and bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="runs, prepare")
    args = parser.parse_args()
    trees = {"this": ROOT, "other": args.other.resolve()}
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tokenizer in ("gpt2", "bytes"):
            prepare(ROOT, args.files, tokenizer, Path(folder, tokenizer))
        for number in range(args.rounds + 1):  # the first warms the caches
            for name in ("this", "other") if number % 2 else ("other", "this"):
                new = {}
                if args.only != "runs":
                    for tokenizer in ("gpt2", "bytes"):
                        out = Path(folder, "prepared")
                        new[f"prepare with {tokenizer}, s"] = prepare(trees[name], args.files, tokenizer, out)
                        shutil.rmtree(out)
                if args.only != "prepare":
                    for run, options in RUNS.items():
                        data = Path(folder, "bytes" if "shakespeare" in run else "gpt2")
                        seconds, step = train(trees[name], [*options, f"--data_dir={data}"], Path(folder, "run"))
                        new |= {f"{run}: launch to first step, s": seconds, f"{run}: step, ms": step}
                for figure, value in new.items():
                    if number:
                        figures.setdefault(figure, {"this": [], "other": []})[name].append(value)
    for figure, values in figures.items():
        median, low = [statistics.median(v) for v in values.values()], [min(v) for v in values.values()]
        print(json.dumps(dict(
            figure=figure, rounds=args.rounds, this=round(median[0], 3), other=round(median[1], 3),
            ratio=round(median[0] / median[1], 3), ratio_of_minima=round(low[0] / low[1], 3),
        )))  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ""}


def prepare(root: Path, files: str, tokenizer: str, out: Path) -> float:
    began = time.perf_counter()
    options = [f"--files={files}", f"--tokenizer={tokenizer}", f"--out_dir={out}", "--val_fraction=0.01"]
    subprocess.run(
        [sys.executable, root / "fineweb.py", *options], cwd=root, check=True, capture_output=True, env=environment()
    )
    return time.perf_counter() - began


def train(root: Path, options: list[str], out: Path) -> tuple[float, float]:
    """Seconds from launch to the end of the first step, and ms of a step."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, root / "train_gpt2.py", *options, *TRAIN, f"--out_dir={out}"],
        cwd=root, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    first = None
    for line in process.stdout:
        if first is None and line.startswith("step ") and " | loss" in line:
            first = time.perf_counter() - began
    assert process.wait() == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record["dt"] for record in records if record["kind"] == "train"][2:]
    return first, 1e3 * statistics.median(steps)


if __name__ == "__main__":
    main()
