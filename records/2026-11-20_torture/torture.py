"""Kill a small CPU run again and again, at random moments, and compare its end with that of a run left alone.

    python records/2026-11-20_torture/torture.py --signal=KILL --kills=50 --processes=1 --optimizer=muon

KILL: SIGKILL to all its processes at once, as when a machine dies; then the same command with --resume=True.
TERM, HUP, USR1: that signal to the launcher; it must end in order, with a checkpoint of the very step that was running.
AGENT: SIGKILL to torchrun, which leaves its processes behind; they must end in order as for SIGTERM.
RANK: SIGKILL to one process out of several; torchrun --max-restarts must go on by itself.
DISK: the run's own small file system is filled up to a random rest, now and then with a SIGKILL and a new start while
it is full, then emptied (Linux, as root). Best values are not compared: a step that is not saved cannot be the best.
A third of the blows wait until a checkpoint is being written. Equal must be: every bit of the last checkpoint (weights,
optimizer states, best values), and every train, val and sample record but its timings. Prints one JSON line.
"""

import contextlib
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from shards import shard_header  # noqa: E402

from configurator import UserError, cli, configure  # noqa: E402
from metrics import read_metrics  # noqa: E402

DISK = 48 << 20  # bytes of the small file system: the checkpoints that are kept, and two more


@dataclass(frozen=True)
class TortureConfig:
    signal: Literal["KILL", "TERM", "HUP", "USR1", "AGENT", "RANK", "DISK"] = "KILL"
    kills: int = 50
    processes: int = 1
    optimizer: Literal["adamw", "muon", "adafactor"] = "adamw"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    steps: int = 300
    threads: int = 1  # of each process
    seed: int = 0  # of the moments
    options: str = ""  # more options of the run


def main() -> int:
    config, _ = configure(TortureConfig)
    rng = random.Random(config.seed)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        make_data(Path(folder, "data"))
        alone, tortured = Path(folder, "alone"), Path(folder, "small", "tortured")
        tortured.parent.mkdir()
        if config.signal == "DISK":
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", tortured.parent]
            subprocess.run(mount, check=True)
            stack.callback(subprocess.run, ["umount", tortured.parent], check=True)
        straight = subprocess.run(
            command(config, folder, alone, restarts=0), capture_output=True, text=True, env=env(config)
        )
        if straight.returncode:
            raise UserError(straight.stderr)
        began = time.perf_counter()
        how = {"RANK": torture_ranks, "DISK": torture_disk}.get(config.signal, torture)
        done, saving = how(config, folder, tortured, rng)
        seconds = time.perf_counter() - began
        leave_out = {"out_dir", "seconds"} | ({"best"} if config.signal == "DISK" else set())
        states = [digest(out, leave_out) for out in (alone, tortured)]
        same = {"records": records(alone) == records(tortured), "state": states[0] == states[1]}
        steps = [r["step"] for r in read_metrics(tortured / "metrics.jsonl") if r["kind"] == "train"]
        resumed = [r for r in read_metrics(tortured / "metrics.jsonl") if r.get("event") == "resume"]
        result = dict(
            **asdict(config), while_saving=saving, resumes_on_record=len(resumed), train_records=len(steps),
            sha256=states[1][:16], same=same, seconds=round(seconds),
        )  # fmt: skip
        print(json.dumps(result))
    return 0 if all(same.values()) and done and len(steps) == len(set(steps)) == config.steps else 1


def torture(config: TortureConfig, folder: str, out: Path, rng: random.Random) -> tuple[bool, int]:
    """Lives that each end with a blow, and one that does not: (whether it reached the end, blows while saving)."""
    kills, saving = 0, 0
    pipe = subprocess.PIPE
    while kills < config.kills:
        process = subprocess.Popen(
            command(config, folder, out, 0), stdout=pipe, stderr=pipe, text=True, env=env(config)
        )
        if config.signal == "KILL" and rng.random() < 0.1:  # some while it starts
            time.sleep(rng.uniform(0, 3))
        else:
            lines = rng.randrange(7 * config.steps // (5 * config.kills))
            while (line := process.stdout.readline()) and lines >= 0:
                lines -= "loss" in line or "writing to" in line or "resuming at" in line
            saving += wait(out, process, rng)
        everyone = [*descendants(process.pid), process.pid]
        if process.poll() is not None:
            raise UserError(f"ended by itself after {kills} blows; give more --steps:\n{process.communicate()}")
        if config.signal == "KILL":
            for pid in everyone:
                kill(pid)
            process.communicate()
            kills += 1
            continue
        number = signal.SIGKILL if config.signal == "AGENT" else getattr(signal, f"SIG{config.signal}")
        process.send_signal(number)
        process.communicate(timeout=60)  # the output is closed when the last process has ended
        expected = (
            0 if config.processes == 1 else -number if config.signal in ("AGENT", "USR1") else 1
        )  # torchrun's own
        events = [r for r in read_metrics(out / "metrics.jsonl") if r.get("event") == "stopped"]
        states = sorted(out.glob("ckpt_*.pt"))
        if any(r.get("event") == "done" for r in read_metrics(out / "metrics.jsonl")):
            raise UserError(f"ended by itself after {kills} blows; give more --steps")
        if process.returncode != expected or len(events) != kills + 1:
            raise UserError(f"blow number {kills + 1} ended with {process.returncode}, on record are {events}")
        if events[-1]["step"] and states[-1] != out / f"ckpt_{events[-1]['step']:06d}.pt":
            raise UserError(f"stopped at {events[-1]}, but the newest checkpoint is {states[-1]}")
        kills += 1
    last = subprocess.run(command(config, folder, out, restarts=0), capture_output=True, text=True, env=env(config))
    return last.returncode == 0, saving


def torture_disk(config: TortureConfig, folder: str, out: Path, rng: random.Random) -> tuple[bool, int]:
    """Fillings of a file system that holds the run alone: (whether it reached the end, fillings while saving)."""
    disk = out.parent
    process, log, saving = None, Path(folder, "log"), 0
    for _ in range(config.kills):
        process = go_on(process, config, folder, out, log)
        time.sleep(rng.uniform(0.2, 1.5))
        saving += wait(out, process, rng)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        size = max(0, free - rng.choice([0, rng.randrange(5000), rng.randrange(1 << 20), rng.randrange(DISK // 3)]))
        with contextlib.suppress(OSError):  # the run was faster, and took some of it
            (disk / "filling").write_bytes(bytes(size))
        time.sleep(rng.uniform(0, 0.5))
        if rng.random() < 0.4:
            for pid in (*descendants(process.pid), process.pid):
                kill(pid)
            process.wait()
            process = go_on(process, config, folder, out, log)
            time.sleep(rng.uniform(0, 3))
        (disk / "filling").unlink()
    while process.wait(timeout=300) and "No space left" in log.read_text():  # the last checkpoint, or a start
        process = go_on(process, config, folder, out, log)
    return process.returncode == 0, saving


def go_on(
    process: subprocess.Popen | None, config: TortureConfig, folder: str, out: Path, log: Path
) -> subprocess.Popen:
    """The same process, or where it has ended (as a full disk makes it) the next one."""
    if process and process.poll() is None:
        return process
    if process and process.returncode == 0:
        raise UserError("ended by itself; give more --steps")
    if process and process.returncode > 0 and "No space left" not in log.read_text():
        raise UserError(f"ended with {process.returncode}:\n{log.read_text()}")
    with open(log, "w") as file:
        return subprocess.Popen(command(config, folder, out, 0), stdout=file, stderr=file, env=env(config))


def torture_ranks(config: TortureConfig, folder: str, out: Path, rng: random.Random) -> tuple[bool, int]:
    """One launch of torchrun, of which single processes are killed."""
    with open(os.path.join(folder, "log"), "w") as log:
        process = subprocess.Popen(command(config, folder, out, config.kills), stdout=log, stderr=log, env=env(config))
    saving, seen = 0, set()
    for blow in range(config.kills):
        while starts(out) <= seen:  # until the group runs again
            if process.poll() is not None:
                raise UserError(f"ended by itself after {blow} blows; give more --steps:\n{Path(log.name).read_text()}")
            time.sleep(0.02)
        seen |= starts(out)
        time.sleep(rng.uniform(0, 1))
        saving += wait(out, process, rng)
        kill(rng.choice(descendants(process.pid)))
    return process.wait(timeout=300) == 0, saving


def starts(out: Path) -> set[str]:
    """When the groups of processes began. One that died before the first checkpoint is not among them."""
    path = out / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return {r["time"] for r in records if r.get("event") == "resume" or r["kind"] == "run"}


def wait(out: Path, process: subprocess.Popen, rng: random.Random) -> bool:
    """Until the moment of a blow; whether that is while a checkpoint is written."""
    if rng.random() > 1 / 3:
        time.sleep(rng.uniform(0, 0.1))
        return False
    end = time.perf_counter() + 5
    while time.perf_counter() < end and process.poll() is None:
        if any(out.glob(".ckpt_*.partial")):
            time.sleep(rng.uniform(0, 0.01))
            return any(out.glob(".ckpt_*.partial"))
    return False


def command(config: TortureConfig, folder: str, out: Path, restarts: int) -> list[str]:
    launcher = [sys.executable]
    if config.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.processes}"]
        launcher += [f"--max-restarts={restarts}"]
    return [
        *launcher, str(ROOT / "train_gpt2.py"), f"--data_dir={folder}/data", f"--out_dir={out}", "--resume=True",
        "--block_size=32", "--n_layer=2", "--n_head=2", "--n_embd=128", "--dropout=0.2", "--device=cpu",
        f"--compile={config.compile}", f"--dtype={config.dtype}", f"--optimizer={config.optimizer}",
        f"--parallel={config.parallel}", "--batch_size=2", "--total_batch_size=512", "--learning_rate=3e-3",
        "--warmup_steps=10", f"--max_steps={config.steps}", "--log_interval=1", "--val_interval=10",
        "--val_tokens=2000", "--sample_interval=50", "--sample_start=the ", "--checkpoint_interval=3",
        *shlex.split(config.options),
    ]  # fmt: skip


def env(config: TortureConfig) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(config.threads)}


def make_data(folder: Path) -> None:
    folder.mkdir()
    rng = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog while seven wizards brew tea".split()
    counts = {}
    for name, split, n in (("000000", "val", 400), ("000001", "train", 2000), ("000002", "train", 1500)):
        ids = [256, *" ".join(rng.choice(words) for _ in range(n)).encode()]
        (folder / f"data_{split}_{name}.bin").write_bytes(shard_header(len(ids)) + np.array(ids, dtype="<u2").tobytes())
        counts[f"{split}_tokens"] = counts.get(f"{split}_tokens", 0) + len(ids)
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257, **counts}))


def descendants(pid: int) -> list[int]:
    """A process's children, theirs, and so on (Linux)."""
    try:
        children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (*descendants(child), child)]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # a child of one that is dead
        os.kill(pid, signal.SIGKILL)


def records(out: Path) -> list[dict]:
    timings = ("dt", "tokens_per_sec", "mfu", "seconds")
    kept = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] in ("train", "val", "sample")]
    return [{name: value for name, value in r.items() if name not in timings} for r in kept]


def digest(out: Path, leave_out: set[str]) -> str:
    """SHA-256 of the newest checkpoint's content but for these names, of the state or of its config."""
    path = max(out.glob("ckpt_*.pt"))
    state = torch.load(path, weights_only=True)
    state["config"] = {name: value for name, value in state["config"].items() if name not in leave_out}
    state = {name: value for name, value in state.items() if name not in leave_out}
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, dict):
            for name in value:
                sha.update(repr(name).encode())
                add(value[name])
        elif isinstance(value, list):
            for each in value:
                add(each)
        elif isinstance(value, torch.Tensor):
            sha.update(value.contiguous().numpy().tobytes())
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


if __name__ == "__main__":
    cli(main)
