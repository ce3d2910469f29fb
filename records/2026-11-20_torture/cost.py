"""What surviving costs: this repository against a copy of it that checks and survives nothing, in turn.

    python records/2026-11-20_torture/cost.py --rounds=10

The copy has no stop flag, no test for non-finite steps, no check of ids, shards and fingerprints, no lock, no
deterministic kernels, and writes its metrics without care. Prints the medians of both, of single steps and of the
seconds from launch to the end of the first step, and their ratio.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from configurator import cli, configure  # noqa: E402
from metrics import read_metrics  # noqa: E402

REMOVED = {
    "train_gpt2.py": [
        ("        numbers[1] += len(stop_signals)\n", ""),
        ("        finite = math.isfinite(loss) and math.isfinite(norm)  #", "        finite = True  #"),
        ('    if device.type == "cpu":\n', "    if False:\n"),
        ("    data = world.agree(lambda: same_data(config.data_dir, train, val, data_then))\n", "    data = {}\n"),
        ("    begun = log.lock()\n", "    begun = False\n"),
    ],
    "dataloader.py": [
        ("            if row.max() >= self.vocab_size:\n", "            if False:\n"),
        ("        if tokens != expected:\n", "        if False:\n"),
    ],
    "metrics.py": [
        ("            lock(self.file.fileno(), out_dir)  # before", "            pass  # before"),
        ("            os.fsync(self.file.fileno())\n            os.replace", "            os.replace"),
        ("buffering=0)", "buffering=-1)"),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class CostConfig:
    rounds: int = 10
    steps: int = 200
    data_dir: str = "data/stdlib"  # of fineweb.py config/data/stdlib.py
    config: str = "config/quickstart.py"
    flags: str = ""  # more of train_gpt2.py's, separated by spaces


def main() -> int:
    config, _ = configure(CostConfig)
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder, "bare")
        shutil.copytree(ROOT, bare, ignore=shutil.ignore_patterns(".venv", ".git", "data", "out", "__pycache__"))
        for name, changes in REMOVED.items():
            source = (bare / name).read_text()
            for old, new in changes:
                assert source.count(old) == 1, old
                source = source.replace(old, new)
            (bare / name).write_text(source)
        figures: dict[str, dict[str, list[float]]] = {"with": {}, "without": {}}
        for number in range(config.rounds + 1):  # the first warms the caches
            order = [("with", ROOT), ("without", bare)]
            for name, root in order if number % 2 else order[::-1]:
                out = Path(folder, f"{name}{number}")
                for figure, value in measure(root, out, config).items():
                    if number:
                        figures[name].setdefault(figure, []).append(value)
    result = {"rounds": config.rounds, "steps": config.steps, "config": config.config, "flags": config.flags}
    for figure in figures["with"]:
        values = [figures[name][figure] for name in ("with", "without")]
        median, low = [statistics.median(v) for v in values], [min(v) for v in values]
        result[figure] = {
            "with": median[0], "without": median[1], "ratio": round(median[0] / median[1], 4),
            "ratio_of_minima": round(low[0] / low[1], 4),
        }  # fmt: skip
    print(json.dumps(result, indent=1))
    return 0


def measure(root: Path, out: Path, config: CostConfig) -> dict[str, float]:
    """Seconds of a step (median over the run's), and from launch to the first step."""
    command = [
        sys.executable, root / "train_gpt2.py", root / config.config, f"--data_dir={Path(config.data_dir).resolve()}",
        f"--out_dir={out}", f"--max_steps={config.steps}", "--log_interval=1", "--val_interval=0",
        "--sample_interval=0", "--checkpoint_interval=0", "--device=cpu", *config.flags.split(),
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    while "step     1/" not in process.stdout.readline():
        assert process.poll() is None
    start = time.perf_counter() - began
    process.communicate()
    assert process.returncode == 0
    steps = [r["dt"] for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"][10:]
    shutil.rmtree(out)
    return {"step": statistics.median(steps), "start": start}


if __name__ == "__main__":
    cli(main)
