"""Train every row of rows.py with every seed, two at a time, each on one thread; then the table.

    python records/2026-11-21_speedrun/run.py DATA_DIR OUT_DIR [ROW ...]

A row that is done is kept, so the command can be stopped and repeated.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
from rows import ROWS, SEEDS  # noqa: E402


def train(data: str, out: Path, row: str, seed: int) -> Path:
    """The folder of the run, done."""
    folder = out / f"{row}_{seed}"
    config, *flags = ROWS[row]
    command = [
        sys.executable, "train_gpt2.py", f"config/{config}.py", str(HERE / "small.py"), *flags,
        f"--data_dir={data}", f"--seed={seed}", f"--out_dir={folder}", "--resume=True",
    ]  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


def val_loss(folder: Path) -> float:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["val_loss"] for record in records if record["kind"] == "val"][-1]


def main() -> None:
    data, out, names = os.path.abspath(sys.argv[1]), Path(sys.argv[2]).absolute(), sys.argv[3:] or list(ROWS)
    jobs = [(row, seed) for seed in SEEDS for row in names]
    with ThreadPoolExecutor(2) as pool:
        losses = dict(zip(jobs, pool.map(lambda job: val_loss(train(data, out, *job)), jobs), strict=True))
    for row in names:
        found = [losses[row, seed] for seed in SEEDS]
        each = ", ".join(f"{loss:.4f}" for loss in found)
        print(f"| {row} | {statistics.mean(found):.4f} | {statistics.stdev(found):.4f} | {each} |")


if __name__ == "__main__":
    main()
