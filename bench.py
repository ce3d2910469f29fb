"""Time the training step of any config: tokens/s, MFU, time by part and peak memory.

    python bench.py config/gpt2_124m.py --batch_size=64
    torchrun --nproc_per_node=8 bench.py config/gpt2_124m.py
    python bench.py config/gpt2_124m.py --against="--optimizer=muon"                  # other options too, in turn
    python bench.py config/gpt2_124m.py --against="--batch_size=32; --batch_size=64"  # what fits, and how fast it is
    python bench.py config/gpt2_124m.py --compare=HEAD~3                              # that commit's code too, in turn

It is train_gpt2.py's own step on its own loader, which reads data_dir or, where a config names a folder that is not
there, random tokens. Nothing of a run is written. The last line printed is one JSON object. Its parts are mean ms a
step, on CUDA as the device went through them, elsewhere as Python did:
    data       until a micro-batch is there           backward   gradients, and averaging them over processes
    forward    the losses                             optimizer  the update
    waiting    for the losses of other processes, the gradient's norm, and Python to know both
Its memory is the most that tensors took on CUDA, elsewhere the most that the process had.
"""

import json
import math
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from start import advice_on_memory, look

from configurator import PathStr, UserError, at_least, cli, configure, under_torchrun
from dataloader import train_batches
from distributed import World, hardware, machine, pick_dtype
from files import shard_header
from metrics import Metrics
from model import GPTConfig
from train_gpt2 import Run, TrainConfig, build, train_step

HERE = Path(__file__).parent


@dataclass(frozen=True)
class BenchConfig:
    steps: int = 20  # steps that are timed
    warmup: int = 5  # steps before them
    profile: PathStr | None = None  # write a trace of one more step to this file, for ui.perfetto.dev
    against: str | None = None  # other options, measured too; several are parted by ";"; a file replaces those given
    compare: str | None = None  # a commit: its code is measured too
    rounds: int = 3  # with compare or against: how often each is measured, in turn
    processes: int | None = None  # with compare or against: torchrun's, in place of starting this with it

    def __post_init__(self):
        at_least(self, 1, "steps", "rounds", "processes")
        at_least(self, 0, "warmup")


def main() -> int:
    bench, config, gpt_config, sources = configure(BenchConfig, TrainConfig, GPTConfig)
    if bench.compare or bench.against:
        print(json.dumps(compare(bench, sys.argv[1:])))
        return 0
    world = World(config.device)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with advice_on_memory(config):
            run = build_run(config, gpt_config, sources, world, Path(folder))
            result = measure(bench, run, built=time.perf_counter() - began)
        world.close()
    if world.is_main:
        mfu = f" | mfu {result['mfu']:.1%}" if result["mfu"] else ""
        print(f"{result['parameters']:,} parameters, {result['world_size']} x {result['hardware']}, {result['dtype']}")
        for part, ms in result["parts"].items():
            print(f"{part:>12} {ms:10.2f} ms {ms / result['ms_mean']:7.1%}")
        print(f"{'step':>12} {result['ms']:10.2f} ms median, {result['ms_min']:.2f} to {result['ms_max']:.2f}")
        print(f"{result['tokens_per_sec']:,.0f} tok/s{mfu} | peak memory {result['peak_memory_gb']:.2f} GB", end="")
        print(f" | {result['setup_seconds']:.1f} s to build and compile | {result['skipped']} updates skipped")
        print(json.dumps(result))
    return 0


def build_run(config: TrainConfig, gpt_config: GPTConfig, sources: dict[str, str], world: World, folder: Path) -> Run:
    """The run that train_gpt2.py would begin, without what happens between steps; on random tokens if the config names
    a data_dir that is not there. Nothing is written but to `folder`. Raises UserError as train_gpt2.py does."""
    config = replace(
        config, resume=False, out_dir=str(folder / "run"), val_interval=0, target_val_loss=None, patience=None,
        hellaswag_interval=0, sample_interval=0,
    )  # fmt: skip
    log = Metrics(config.out_dir, world.is_main)
    if not os.path.isdir(config.data_dir) and sources.get("data_dir") != "--data_dir":
        log.say(f"{config.data_dir} is not there: measured on random tokens")
        config = replace(config, data_dir=str(folder))
        count = 10 * (config.total_batch_size or config.batch_size * gpt_config.block_size * world.size) + 1
        tokens = np.random.default_rng(0).integers(0, min(gpt_config.vocab_size, 1 << 16), count, dtype=np.uint16)
        (folder / "random_train_000000.bin").write_bytes(shard_header(count) + tokens.tobytes())
    return build(look(config, gpt_config, sources, (), world, log), world, log, examples=[])


def measure(bench: BenchConfig, run: Run, built: float) -> dict:
    """Take the steps; what the JSON line says. `built`: the seconds that building the run took."""
    config, plan, world = run.start.config, run.start.plan, run.world
    device, synchronize = world.device, getattr(torch, world.device.type).synchronize
    batches = train_batches(
        run.start.train_data, config.seed, plan.rows, config.batch_size, world.rank, world.size, device, 1
    )
    clock, results, times = Clock(run), [], []
    timed = clock.timed(batches)
    for step in range(1, bench.warmup + bench.steps + 1):
        if step == bench.warmup + 1:
            synchronize()
            clock.marks.clear()
        times.append(time.perf_counter())
        results.append(train_step(run, step, timed))
        if results[-1].stop:
            raise KeyboardInterrupt
    clock.mark("end")
    synchronize()
    times.append(time.perf_counter())
    parts = {part: ms / bench.steps for part, ms in clock.parts().items()}
    if bench.profile:
        with torch.profiler.profile() as trace:
            train_step(run, step + 1, timed)
            synchronize()
        if world.is_main:
            trace.export_chrome_trace(bench.profile)
    batches.close()

    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        peak_memory = torch.cuda.max_memory_allocated(device)
    ms = [1e3 * (end - begin) for begin, end in pairwise(times)]
    first, ms = ms[0], ms[bench.warmup :]
    median, (_, peak_flops) = statistics.median(ms), hardware(device)
    tokens_per_sec = config.total_batch_size / median * 1e3
    flops = run.model.flops_per_token(config.seq_len) * tokens_per_sec
    return dict(
        tokens_per_sec=tokens_per_sec, mfu=flops / (world.size * peak_flops) if peak_flops else None,
        ms=median, ms_min=min(ms), ms_max=max(ms), ms_mean=statistics.mean(ms), parts=parts,
        peak_memory_gb=peak_memory / 1e9, setup_seconds=built + (first - median) / 1e3,
        skipped=sum(not result.finite for result in results[bench.warmup :]),
        losses=[result.loss if math.isfinite(result.loss) else None for result in results],
        parameters=run.model.num_params(), world_size=world.size,
        **machine(device, pick_dtype(config.dtype, device)),
        config=asdict(config), gpt_config=asdict(run.model.config),
    )  # fmt: skip


class Clock:
    """Marks when a step goes from one part to the next, by what train_step calls there. (A forward hook would be
    compiled into the model.)"""

    def __init__(self, run: Run):
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []  # a part and when it began
        self.on_cuda = run.world.device.type == "cuda"
        run.scaler.scale = self.before(run.scaler.scale, "backward")
        run.world.mean_ = self.before(run.world.mean_, "waiting")
        for optimizer in run.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.mark("optimizer"))

    def mark(self, part: str) -> None:
        now = torch.cuda.Event(enable_timing=True) if self.on_cuda else time.perf_counter()
        if self.on_cuda:
            now.record()
        self.marks.append((part, now))

    def before(self, function: Callable, part: str) -> Callable:
        return lambda *args: (self.mark(part), function(*args))[1]

    def timed(self, batches: Iterator) -> Iterator:
        while True:
            self.mark("data")
            batch = next(batches)
            self.mark("forward")
            yield batch

    def parts(self) -> dict[str, float]:
        """The ms of each part, from the first mark to the last; the device must be done with all of them."""
        ms = dict.fromkeys(("data", "forward", "backward", "waiting", "optimizer"), 0.0)
        for (part, begin), (_, end) in pairwise(self.marks):
            ms[part] += begin.elapsed_time(end) if self.on_cuda else 1e3 * (end - begin)
        return ms


def compare(bench: BenchConfig, args: list[str]) -> dict:
    """Measure these options, the others and the other code in turn, each in a process of its own. {variant: results}"""
    if under_torchrun():
        raise UserError("compare and against start processes of their own: use --processes=N in place of torchrun")
    mine = [arg for arg in args if not arg.startswith(("--compare=", "--against=", "--rounds=", "--processes="))]
    variants = {"as given": (HERE, [])}
    variants |= {text.strip(): (HERE, shlex.split(text)) for text in (bench.against or "").split(";") if text.strip()}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={bench.processes}"]
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as code:
        if bench.compare:
            printed(["git", "-C", str(HERE), "archive", f"--output={code}/code.tar", bench.compare])
            shutil.unpack_archive(f"{code}/code.tar", code)
            variants[bench.compare] = (Path(code), [])
        for _ in range(bench.rounds):
            for name, (where, options) in variants.items():
                replaced = any(not option.startswith("-") for option in options)  # the config file
                given = [arg for arg in mine if arg.startswith("-") or not replaced]
                command = [sys.executable, *(torchrun if bench.processes else []), str(where / "bench.py")]
                try:
                    result = json.loads(printed([*command, *given, *options]).splitlines()[-1])
                except UserError as error:  # out of memory, for one: the others go on
                    print(f"{name}: {error}", flush=True)
                    continue
                results.setdefault(name, []).append(result)
                memory = f"{result['tokens_per_sec']:,.0f} tok/s, {result['peak_memory_gb']:.2f} GB"
                print(f"{result['ms']:10.2f} ms a step, {memory}: {name}", flush=True)
    first, *others = results.items()
    for name, measured in others:
        ratios = [b["tokens_per_sec"] / a["tokens_per_sec"] for a, b in zip(first[1], measured, strict=False)]
        print(f"{statistics.median(ratios):.3f} x as fast ({min(ratios):.3f} to {max(ratios):.3f}): {name}")
    return results


def printed(command: list[str]) -> str:
    """What a command printed. Raises UserError where it fails."""
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise UserError((ended.stderr.strip().splitlines() or [f"{shlex.join(command)}: failed"])[-1])
    return ended.stdout


if __name__ == "__main__":
    cli(main)
