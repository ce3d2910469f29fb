"""Kill a small CPU run again and again, at random moments, and compare its end with that of a run left alone.

    python records/2026-12-01_torture/torture.py --blow=KILL --blows=50 --processes=2 --optimizer=muon

    KILL             SIGKILL to all processes at once, as when a machine dies; the same command goes on
    TERM, HUP, USR1  that signal to the launcher: it must end in order, with a checkpoint of the step that was running
    AGENT            SIGKILL to torchrun, which leaves its processes behind: they must end in order, too
    RANK             SIGKILL to one process of several: torchrun --max-restarts must go on by itself
    DISK             a small file system is filled up and emptied, with a SIGKILL now and then (Linux, as root). Best
                     values are not compared: a step that is not saved cannot be the best

A third of the blows wait until a checkpoint is being written. Equal must be every bit of the last checkpoint (weights,
optimizer states, best values), and every train, val, hellaswag and sample record but its timings. Prints a JSON line.
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
from configurator import UserError, cli, configure  # noqa: E402
from files import shard_header  # noqa: E402
from metrics import read_metrics  # noqa: E402

DISK = 48 << 20  # bytes of the small file system: room for the checkpoints that are kept, and for two more
TIMINGS = {"dt", "tokens_per_sec", "mfu", "seconds", "time", "times"}
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew tea".split()


@dataclass(frozen=True)
class TortureConfig:
    blow: Literal["KILL", "TERM", "HUP", "USR1", "AGENT", "RANK", "DISK"] = "KILL"
    blows: int = 50
    processes: int = 1
    optimizer: Literal["adamw", "muon", "adafactor"] = "adamw"
    steps: int = 300
    threads: int = 1  # of each process
    seed: int = 0  # of the moments
    options: str = ""  # more options of the run: "--average=0.3 --parallel=fsdp"


class Torture:
    def __init__(self, config: TortureConfig, folder: Path, out: Path):
        self.config, self.folder, self.out, self.rng = config, folder, out, random.Random(config.seed)
        self.log = folder / "log"  # what the newest process printed
        self.while_saving = 0

    def start(self, restarts: int = 0) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.config.threads)}
        with open(self.log, "w") as log:
            return subprocess.Popen(self.command(restarts), stdout=log, stderr=log, env=environment)

    def command(self, restarts: int) -> list[str]:
        config, launcher = self.config, [sys.executable]
        if config.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.processes}"]
            launcher += [f"--max-restarts={restarts}"]
        return [
            *launcher, str(self.folder / "start.py"), f"--data_dir={self.folder}/data", f"--out_dir={self.out}",
            "--resume=True", "--block_size=32", "--n_layer=2", "--n_head=2", "--n_embd=128", "--dropout=0.2",
            "--device=cpu", "--compile=False", f"--optimizer={config.optimizer}", "--batch_size=2",
            "--total_batch_size=512", "--learning_rate=3e-3", "--warmup_steps=10", f"--max_steps={config.steps}",
            "--log_interval=2", "--val_interval=10", "--val_tokens=2000", "--hellaswag_interval=20",
            "--sample_interval=50", "--sample_start=the ", "--checkpoint_interval=3", *shlex.split(config.options),
        ]  # fmt: skip

    def records(self) -> list[dict]:
        return read_metrics(self.out / "metrics.jsonl") if (self.out / "metrics.jsonl").exists() else []

    def wait_for_a_moment(self, process: subprocess.Popen) -> None:
        """Most blows come at any moment, a third while a checkpoint is being written."""
        if self.rng.random() > 1 / 3:
            time.sleep(self.rng.uniform(0, 0.1))
            return
        end = time.perf_counter() + 5
        while time.perf_counter() < end and process.poll() is None:
            if any(self.out.glob(".ckpt_*.partial")):
                time.sleep(self.rng.uniform(0, 0.01))
                self.while_saving += any(self.out.glob(".ckpt_*.partial"))
                return

    def strike(self, number: int) -> None:
        """Start the run, let it get somewhere, and strike."""
        process, name = self.start(), self.config.blow
        if name == "KILL" and self.rng.random() < 0.1:  # some while it starts
            time.sleep(self.rng.uniform(0, 3))
        else:
            # A line is two steps: half of the steps on average, so that the run does not end before the last blow.
            lines = self.rng.randrange(1, 2 + self.config.steps // (2 * self.config.blows))
            while (
                process.poll() is None and len([x for x in self.log.read_text().split("\n") if "| loss" in x]) < lines
            ):
                time.sleep(0.01)
            self.wait_for_a_moment(process)
        everyone = [*descendants(process.pid), process.pid]
        if process.poll() is not None:
            raise UserError(f"ended by itself after {number} blows; give more --steps:\n{self.log.read_text()}")
        if name == "KILL":
            kill(*everyone)
            process.wait()
            return
        process.send_signal(signal.SIGKILL if name == "AGENT" else getattr(signal, f"SIG{name}"))
        process.wait(timeout=120)
        while any(alive(pid) for pid in everyone[:-1]):  # orphans
            time.sleep(0.05)
        # The run has ended in order: its launcher's status, an event, and a checkpoint of that step.
        status = process.returncode
        launchers = -signal.SIGKILL if name == "AGENT" else -signal.SIGUSR1 if name == "USR1" else 1  # torchrun's own
        ends = [record for record in self.records() if record.get("event") == "stopped"]
        if status != (0 if self.config.processes == 1 else launchers) or len(ends) != number + 1:
            raise UserError(f"blow {number + 1} ended with {status}; on record: {ends}\n{self.log.read_text()}")
        if not (self.out / f"ckpt_{ends[-1]['step']:06d}.pt").exists():
            raise UserError(f"stopped at {ends[-1]}, but there is no checkpoint of that step")

    def kill_ranks(self) -> subprocess.Popen:
        """One launch of torchrun, of which single processes are killed."""
        process, seen = self.start(restarts=self.config.blows), 0
        for number in range(self.config.blows):
            while (starts := sum(r["kind"] == "run" or r.get("event") == "resume" for r in self.records())) <= seen:
                if process.poll() is not None:
                    raise UserError(f"ended after {number} blows; give more --steps:\n{self.log.read_text()}")
                time.sleep(0.02)
            seen = starts
            time.sleep(self.rng.uniform(0, 1))
            self.wait_for_a_moment(process)
            kill(self.rng.choice(descendants(process.pid)))
        return process

    def fill_disks(self) -> subprocess.Popen:
        """Fill the run's file system and empty it again. Whenever the run has ended because of that, it goes on."""
        process, filling = self.start(), self.out.parent / "filling"
        for _ in range(self.config.blows):
            if process.poll() is not None:
                if process.returncode == 0 or "No space left" not in self.log.read_text():
                    raise UserError(f"ended with {process.returncode}:\n{self.log.read_text()}")
                process = self.start()
            time.sleep(self.rng.uniform(0.5, 3))
            self.wait_for_a_moment(process)
            disk = os.statvfs(self.out.parent)
            rests = [0, self.rng.randrange(5000), self.rng.randrange(1 << 20), self.rng.randrange(DISK // 3)]
            with contextlib.suppress(OSError):  # the run was faster, and took some of it
                filling.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - self.rng.choice(rests))))
            time.sleep(self.rng.uniform(0, 0.5))
            if self.rng.random() < 0.4:
                kill(*descendants(process.pid), process.pid)
                process.wait()
                process = self.start()
                time.sleep(self.rng.uniform(0, 3))
            filling.unlink(missing_ok=True)
        while process.wait(timeout=600) and "No space left" in self.log.read_text():
            process = self.start()
        return process

    def strikes(self) -> subprocess.Popen:
        for number in range(self.config.blows):
            self.strike(number)
        return self.start()

    def go(self) -> int:
        """All blows, and then to the end. Returns the last status."""
        how = {"RANK": self.kill_ranks, "DISK": self.fill_disks}.get(self.config.blow, self.strikes)
        return how().wait(timeout=600)

    def end(self) -> tuple[list[dict], str]:
        """What must be equal: the records, and a SHA-256 of the newest checkpoint."""
        kinds = ("train", "val", "hellaswag", "sample")
        kept = [{n: v for n, v in r.items() if n not in TIMINGS} for r in self.records() if r["kind"] in kinds]
        state, sha = torch.load(max(self.out.glob("ckpt_*.pt")), weights_only=True), hashlib.sha256()
        for name in TIMINGS | ({"best", "saved_step"} if self.config.blow == "DISK" else set()):
            state.pop(name, None)
        state["config"] |= {"out_dir": ""}

        def add(value: object) -> None:
            if isinstance(value, dict):
                for name in value:
                    sha.update(repr(name).encode())
                    add(value[name])
            else:
                sha.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())

        add(state)
        return kept, sha.hexdigest()


def main() -> int:
    config, _ = configure(TortureConfig)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_data(folder)
        small = folder / "small"
        small.mkdir()
        if config.blow == "DISK":
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", small], check=True)
            stack.callback(subprocess.run, ["umount", small], check=True)
        alone, tortured = Torture(config, folder, folder / "alone"), Torture(config, folder, small / "tortured")
        if alone.start().wait():
            raise UserError(alone.log.read_text())
        began, status = time.perf_counter(), tortured.go()
        if status:
            raise UserError(tortured.log.read_text())
        (records, sha), (tortured_records, tortured_sha) = alone.end(), tortured.end()
        same = {"records": records == tortured_records, "state": sha == tortured_sha}
        resumes = sum(record.get("event") == "resume" for record in tortured.records())
        about = dict(while_saving=tortured.while_saving, resumes_on_record=resumes, sha256=tortured_sha[:16], same=same)
        print(json.dumps(asdict(config) | about | {"seconds": round(time.perf_counter() - began)}))
    return 0 if all(same.values()) else 1


def make_data(folder: Path) -> None:
    """Two training shards and a validation shard, a few HellaSwag examples, and a start of the run that uses those."""
    rng, counts, data = random.Random(0), {}, folder / "data"
    data.mkdir()
    for name, split, n in (("000000", "val", 400), ("000001", "train", 2000), ("000002", "train", 1500)):
        ids = [256, *" ".join(rng.choice(WORDS) for _ in range(n)).encode()]
        (data / f"data_{split}_{name}.bin").write_bytes(shard_header(len(ids)) + np.array(ids, dtype="<u2").tobytes())
        counts[f"{split}_tokens"] = counts.get(f"{split}_tokens", 0) + len(ids)
    (data / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257, **counts}))
    examples = [{"ctx": "the", "endings": rng.sample(WORDS, 4), "label": rng.randrange(4)} for _ in range(20)]
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, examples)))
    (folder / "start.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport hellaswag\nload = hellaswag.load\n"
        f"hellaswag.load = lambda path, *rest: load({str(folder / 'few.jsonl')!r}, *rest)\n"
        f"runpy.run_path({str(ROOT / 'train_gpt2.py')!r}, run_name='__main__')\n"
    )


def descendants(pid: int) -> list[int]:
    """A process's children, theirs, and so on (Linux)."""
    with contextlib.suppress(OSError):
        children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [each for child in children for each in (*descendants(child), child)]
    return []


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


def kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a child of one that is dead
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    cli(main)
