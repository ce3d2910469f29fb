"""Time the training step of any config: tokens/s, MFU, each part, peak memory. Nothing is kept.

    python bench.py config/gpt2_124m.py --batch_size=64
    torchrun --nproc_per_node=8 bench.py config/gpt2_124m.py
    python bench.py config/gpt2_124m.py --against="--optimizer=muon"      # beside other options
    python bench.py config/gpt2_124m.py --against="--batch_size=32; --batch_size=64"  # what fits?
    python bench.py config/gpt2_124m.py --compare=HEAD~3                  # beside a commit's code

It takes the steps of train_gpt2.py on data_dir, or on random tokens if a config names a data_dir
that does not exist. The last line printed is one JSON object. Parts of a step are mean ms, on CUDA
as the GPU went through them, elsewhere as Python did. "waiting" is for the loss of all processes
and the gradient norm to reach Python. Memory is the peak of all tensors on CUDA, and of what
PyTorch reserved for them; elsewhere both are the peak of the process.
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

from configurator import PathStr, UserError, at_least, cli, configure, under_torchrun
from dataloader import train_batches
from distributed import World, hardware, machine, pick_dtype
from files import shard_header
from metrics import Metrics
from model import GPTConfig
from train_gpt2 import Run, State, TrainConfig, build, look, train_step

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class BenchConfig:
    steps: int = 20  # steps that are timed
    warmup: int = 5  # steps before them
    profile: PathStr | None = None  # file for a trace of one more step, to be seen at ui.perfetto.dev; None: no trace
    against: str | None = None  # options to measure too, variants separated by ";"; a file replaces the config files
    compare: str | None = None  # commit whose code (and version of the config files) is measured too
    rounds: int = 3  # with against or compare: how often each variant is measured, in turn
    processes: int | None = None  # with against or compare: processes of torchrun; None: no torchrun

    def __post_init__(self):
        at_least(self, 1, "steps", "rounds", "processes")
        at_least(self, 0, "warmup")


def main() -> int:
    bench, config, gpt_config, given = configure(BenchConfig, TrainConfig, GPTConfig)
    if bench.against or bench.compare:
        print(json.dumps(compare(bench, sys.argv[1:])))
        return 0
    world = World(config.device)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run, state = build_run(config, gpt_config, given, world, Path(folder))
        result = measure(bench, run, state, setup_seconds=time.perf_counter() - began)
        world.close()
    if world.is_main:
        print(f"{result['parameters']:,} parameters, {result['world_size']} x {result['hardware']}, {result['dtype']}")
        for part, ms in result["parts"].items():
            print(f"{part:>12} {ms:10.2f} ms {ms / result['ms_mean']:7.1%}")
        print(f"{'step':>12} {result['ms']:10.2f} ms median, {result['ms_min']:.2f} to {result['ms_max']:.2f}")
        mfu = f" | mfu {result['mfu']:.1%}" if result["mfu"] else ""
        memory = f"peak memory {result['peak_memory_gb']:.2f} GB, {result['reserved_memory_gb']:.2f} GB reserved"
        setup = f"{result['setup_seconds']:.1f} s to build and compile"
        print(f"{result['tokens_per_sec']:,.0f} tok/s{mfu} | {memory} | {setup} | {result['skipped']} updates skipped")
        print(json.dumps(result))
    return 0


def build_run(config: TrainConfig, gpt_config: GPTConfig, given: dict, world: World, folder: Path) -> tuple[Run, State]:
    """The run that train_gpt2.py would start with these options, without anything between its
    steps. Writes to `folder` only. Raises UserError as train_gpt2.py does."""
    nothing = dict.fromkeys(("val_interval", "hellaswag_interval", "sample_interval"), 0)
    config = replace(config, resume=False, out_dir=str(folder / "run"), patience=None, **nothing)
    log = Metrics(config.out_dir, world.is_main)
    if not os.path.isdir(config.data_dir) and given.get("data_dir") != "--data_dir":
        log.say(f"{config.data_dir} does not exist: measured on random tokens")
        config = replace(config, data_dir=str(folder))
        count = 10 * (config.total_batch_size or config.batch_size * gpt_config.block_size * world.size) + 1
        tokens = np.random.default_rng(0).integers(0, min(gpt_config.vocab_size, 1 << 16), count, dtype=np.uint16)
        (folder / "random_train_000000.bin").write_bytes(shard_header(count) + tokens.tobytes())
    run, state = world.together(lambda: look(config, gpt_config, given, None, {}, world, log)), State()
    build(run, state)
    return run, state


def measure(bench: BenchConfig, run: Run, state: State, setup_seconds: float) -> dict:
    """Take the steps. Returns what the JSON line says."""
    config, world, device = run.config, run.world, run.world.device
    synchronize = getattr(torch, device.type).synchronize
    batches = train_batches(run.train_data, config.seed, run.rows, config.batch_size, world.rank, world.size, device, 1)
    clock, losses, skipped, times = Clock(run), [], [], []
    timed_batches = clock.timed(batches)

    # The warm-up must be over when the first timed step begins, and the last when the clock stops.
    for step in range(bench.warmup + bench.steps):
        if step == bench.warmup:
            synchronize()
            clock.marks.clear()
        times.append(time.perf_counter())
        if train_step(run, state, timed_batches):  # a request to stop came
            raise KeyboardInterrupt
        losses.append(state.loss if math.isfinite(state.loss) else None)  # JSON has no NaN
        skipped.append(state.skipped > 0)
    clock.mark("end")
    synchronize()
    times.append(time.perf_counter())
    parts = {part: ms / bench.steps for part, ms in clock.parts().items()}
    if bench.profile:
        with torch.profiler.profile() as trace:
            train_step(run, state, timed_batches)
            synchronize()
        if world.is_main:
            trace.export_chrome_trace(bench.profile)
    batches.close()

    # The first step compiles kernels, so what it takes longer than the others counts as setup.
    ms = [1e3 * (end - begin) for begin, end in pairwise(times)]
    first, ms = ms[0], ms[bench.warmup :]
    median = statistics.median(ms)
    tokens_per_sec, peak_flops = config.total_batch_size / median * 1e3, hardware(device)[1]
    flops = run.model.flops_per_token(config.seq_len) * tokens_per_sec / world.size
    used = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        used, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return dict(
        tokens_per_sec=tokens_per_sec, mfu=flops / peak_flops if peak_flops else None,
        ms=median, ms_min=min(ms), ms_max=max(ms), ms_mean=statistics.mean(ms), parts=parts,
        peak_memory_gb=used / 1e9, reserved_memory_gb=reserved / 1e9,
        setup_seconds=setup_seconds + (first - median) / 1e3, losses=losses, skipped=sum(skipped[bench.warmup :]),
        parameters=run.model.num_params(), world_size=world.size, **machine(device, pick_dtype(config.dtype, device)),
        config=asdict(config), gpt_config=asdict(run.gpt_config),
    )  # fmt: skip


class Clock:
    """Notes when a step goes from one part to the next, by what train_step calls there.

    (A forward hook would be simpler, but it would be compiled into the model.)
    """

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
        """The ms of each part, from the first mark to the last, all of which are over."""
        ms = dict.fromkeys(("data", "forward", "backward", "waiting", "optimizer"), 0.0)
        for (part, begin), (_, end) in pairwise(self.marks):
            ms[part] += begin.elapsed_time(end) if self.on_cuda else 1e3 * (end - begin)
        return ms


def compare(bench: BenchConfig, args: list[str]) -> dict[str, list[dict]]:
    """Measure these options, others, and another commit's code, each in its own processes. Returns
    {variant: results of the rounds}, none if it fails. Raises UserError if all fail."""
    if under_torchrun():
        raise UserError("against and compare start their own processes: use --processes=N instead of torchrun")
    args = [arg for arg in args if not arg.startswith(("--against=", "--compare=", "--rounds=", "--processes="))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={bench.processes}"]
    python = [sys.executable, *(torchrun if bench.processes else [])]
    with tempfile.TemporaryDirectory() as code:
        commands = {"as given": [str(HERE / "bench.py"), *args]}
        for variant in filter(None, map(str.strip, (bench.against or "").split(";"))):
            options = shlex.split(variant)
            names_a_file = any(not option.startswith("-") for option in options)
            kept = [arg for arg in args if arg.startswith("-") or not names_a_file]
            commands[variant] = [str(HERE / "bench.py"), *kept, *options]
        if bench.compare:  # with its own version of the config files
            output_of(["git", "-C", str(HERE), "archive", f"--output={code}/code.tar", bench.compare])
            shutil.unpack_archive(f"{code}/code.tar", code)
            theirs = [str(Path(code, arg)) if Path(code, arg).exists() else arg for arg in args]
            commands[bench.compare] = [f"{code}/bench.py", *theirs]

        # In turn, so that a machine that slows down or speeds up meanwhile does so for all of them.
        results, errors = {name: [] for name in commands}, {}
        for name in [*commands] * bench.rounds:
            try:
                if name not in errors:
                    results[name].append(json.loads(output_of([*python, *commands[name]]).splitlines()[-1]))
                    print(f"{results[name][-1]['ms']:10.2f} ms a step: {name}", flush=True)
            except UserError as error:  # such as out of memory: the other variants are measured all the same
                errors[name], results[name] = str(error), []
    if len(errors) == len(commands):
        raise UserError(errors["as given"])

    # One row a variant. Speeds are compared round by round with the first that was measured.
    first = next(rounds for rounds in results.values() if rounds)
    for name, rounds in results.items():
        row = errors.get(name)
        if rounds:
            speed, memory = (statistics.median(x[key] for x in rounds) for key in ("tokens_per_sec", "peak_memory_gb"))
            ratios = [b["tokens_per_sec"] / a["tokens_per_sec"] for a, b in zip(first, rounds, strict=False)]
            row = f"{speed:,.0f} tok/s, {memory:.2f} GB, {statistics.median(ratios):.3f} x as fast"
            row += f" ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name}: {row}")
    return results


def output_of(command: list[str]) -> str:
    """A command's stdout. Raises UserError with the last line of stderr if it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # GIT_DIR: another one's
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    if ended.returncode:
        last_line = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}, as if killed"])[-1]
        raise UserError(last_line.removeprefix("error: "))
    return ended.stdout


if __name__ == "__main__":
    cli(main)
