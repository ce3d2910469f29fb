"""Train 30 steps on one process, replicated on 2, and sharded over 2 and 4 (gloo, float32): the largest differences.

    python fineweb.py config/data/stdlib.py
    python records/2026-11-21_fsdp/compare.py

Steps have accumulation and clipping; on 4 processes activation checkpointing and the chunked loss too. The last row of
an optimizer is a run whose checkpoints cross: 10 steps sharded over 2 processes, 10 on one, 10 on 4 replicas. One JSON
line a row.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
MEMORY = ["--activation_checkpointing=True", "--chunked_loss=True"]
MODEL = [
    "--data_dir=data/stdlib", "--device=cpu", "--n_layer=4", "--n_head=3", "--n_embd=126", "--block_size=128",
    "--batch_size=2", "--total_batch_size=4096", "--learning_rate=6e-4", "--warmup_steps=10",
    "--grad_clip=0.5", "--log_interval=1", "--val_interval=5", "--val_tokens=16384", "--checkpoint_interval=10",
    "--keep_checkpoints=0", "--resume=True", "--schedule=constant",
]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for optimizer in ("adamw", "muon"):
            flags = [*MODEL, f"--optimizer={optimizer}"]
            alone = Path(folder, optimizer)
            train(alone, 1, *flags)
            for processes, parallel, more in ((2, "ddp", []), (2, "fsdp", []), (4, "fsdp", MEMORY)):
                out = Path(folder, f"{optimizer}_{parallel}_{processes}")
                train(out, processes, *flags, f"--parallel={parallel}", *more)
                report(alone, out, optimizer, f"{parallel} on {processes}")
            out = Path(folder, f"{optimizer}_crossing")
            for steps, processes, parallel in ((10, 2, "fsdp"), (20, 1, "fsdp"), (30, 4, "ddp")):
                train(out, processes, *flags, f"--parallel={parallel}", steps=steps)
            report(alone, out, optimizer, "10 steps sharded over 2, 10 on 1, 10 on 4 replicas")


def train(out: Path, processes: int, *flags: str, steps: int = 30) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / "train_gpt2.py"), f"--out_dir={out}", f"--max_steps={steps}", *flags]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)


def report(alone: Path, out: Path, optimizer: str, how: str) -> None:
    rows = dict(loss=("train", "loss"), grad_norm=("train", "grad_norm"), val_loss=("val", "val_loss"))
    differences = {}
    for name, (kind, field) in rows.items():
        a, b = (read(folder, kind, field) for folder in (alone, out))
        assert a.keys() == b.keys(), (how, name)
        differences[name] = max(abs(a[step] - b[step]) for step in a)
    a, b = (torch.load(folder / "ckpt_000030.pt", weights_only=True)["model"] for folder in (alone, out))
    differences["weights"] = max((a[name] - b[name]).abs().max().item() for name in a)
    first, last = (read(alone, "train", "loss")[step] for step in (1, 30))
    print(json.dumps(dict(optimizer=optimizer, how=how, first=first, last=last, differences=differences)), flush=True)


def read(folder: Path, kind: str, field: str) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[field] for record in records if record["kind"] == kind}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
