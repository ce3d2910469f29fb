"""Time the training step of any config: tokens/s, MFU, time by part and peak memory.

    python bench.py config/gpt2_124m.py --batch_size=64
    torchrun --nproc_per_node=8 bench.py config/gpt2_124m.py
    python bench.py config/gpt2_124m.py --compare=HEAD~3               # that commit's code too, in turn
    python bench.py config/gpt2_124m.py --against=--optimizer=muon     # other options too, in turn
    python bench.py config/gpt2_124m.py --memory=True --processes=8    # before renting: what fits which card

It is train_gpt2.py's own step on its own loader, which reads data_dir or, where a config names a folder that is not
there, random tokens. Nothing of a run is written. The last line printed is one JSON object. Its parts are mean ms a
step, on CUDA as the device went through them, elsewhere as Python did:
    data       until a micro-batch is there           backward   gradients, and averaging them over processes
    forward    the losses                             optimizer  the update
    waiting    for the losses of other processes, the gradient's norm, and Python to know both
Its memory is the most that tensors took on CUDA, elsewhere the most that the process had; --memory=True computes that
from shapes, on any machine: for a CUDA card, unless --device names something else. Not for Windows.
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
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from configurator import PathStr, UserError, at_least, cli, configure, under_torchrun
from dataloader import read_meta, train_batches
from device import hardware, machine, pick_dtype
from distributed import World
from memory import Foreseen, Setting, foresee
from metrics import Metrics
from model import GPTConfig
from shards import shard_header
from start import advice_on_memory, compiles, look, starting_point
from train_gpt2 import Run, TrainConfig, build, train_step

HERE = Path(__file__).parent
CARDS = (12, 24, 40, 80)  # GB
CARD_SHARE = 0.85  # the rest is for what lies unused between tensors (an eighth at 124M), the context and NCCL
SAVING = {
    name: dict(chunked_loss=chunked, activation_checkpointing=checkpointing)
    for name, chunked, checkpointing in (
        ("plain", False, False), ("chunked_loss", True, False), ("activation_checkpointing", False, True),
        ("both", True, True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    steps: int = 20  # steps that are timed
    warmup: int = 5  # steps before them
    profile: PathStr | None = None  # write a trace of one more step to this file, for ui.perfetto.dev
    compare: str | None = None  # a commit: its code is measured too
    against: str | None = None  # other options, measured too: "config/y.py --name=value"; a file replaces those given
    rounds: int = 3  # with compare or against: how often each of the two is measured, in turn
    processes: int | None = None  # with compare, against or memory: torchrun's, in place of starting this with it
    memory: bool = False  # measure nothing: foresee what a process takes, and the largest batch_size for some cards

    def __post_init__(self):
        at_least(self, 1, "steps", "rounds", "processes")
        at_least(self, 0, "warmup")
        if self.profile and not Path(self.profile).absolute().parent.is_dir():
            raise ValueError(f"profile = {self.profile!r}: there is no such folder to write to")


def main() -> int:
    bench, config, gpt_config, sources = configure(BenchConfig, TrainConfig, GPTConfig)
    if bench.compare or bench.against:
        print(json.dumps(compare(bench, sys.argv[1:])))
        return 0
    if bench.memory:
        print(json.dumps(foresee_memory(config, gpt_config, sources, bench.processes or 1)))
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
    start = look(config, gpt_config, sources, (), world, log)
    return build(start, world, log, examples=[])


def measure(bench: BenchConfig, run: Run, built: float) -> dict:
    """Take the steps; what the JSON line says. `built`: the seconds that building the run took."""
    config, plan, world = run.start.config, run.start.plan, run.world
    device, synchronize = world.device, getattr(torch, world.device.type).synchronize
    batches = train_batches(
        run.start.train_data, config.seed, plan.rows, config.batch_size, world.rank, world.size, device, 1
    )
    clock, losses, skipped, times = Clock(run), [], [], []
    timed = clock.timed(batches)

    def one_step(step: int) -> None:
        result = train_step(run, step, timed)
        if result.stop:
            raise KeyboardInterrupt
        losses.append(result.loss if math.isfinite(result.loss) else None)
        skipped.append(not result.finite)

    for step in range(1, bench.warmup + bench.steps + 1):
        if step == bench.warmup + 1:
            synchronize()
            clock.marks.clear()
        times.append(time.perf_counter())
        one_step(step)
    clock.mark("end")
    synchronize()
    times.append(time.perf_counter())
    parts = {part: ms / bench.steps for part, ms in clock.parts().items()}
    if bench.profile:
        with torch.profiler.profile() as trace:
            one_step(step + 1)
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
        skipped=sum(skipped[bench.warmup : bench.warmup + bench.steps]), losses=losses,
        parameters=run.model.num_params(), world_size=world.size,
        **machine(device, pick_dtype(config.dtype, device)),
        config=asdict(config), gpt_config=asdict(run.model.config),
    )  # fmt: skip


class Clock:
    """Marks when a step goes from one part to the next, by what train_step calls there.

    (A forward hook would be compiled into the model.)
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
        def marked(*args):
            self.mark(part)
            return function(*args)

        return marked

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


def foresee_memory(config: TrainConfig, gpt_config: GPTConfig, sources: dict[str, str], processes: int) -> dict:
    """Print what a process takes, and the largest batch_size for some cards; what the JSON line says. Raises
    UserError."""
    if config.init_from != "scratch":
        raise UserError(f"init_from = {config.init_from!r}: memory is foreseen from sizes; give --n_layer and the like")
    if os.path.isdir(config.data_dir):
        gpt_config, _ = starting_point({}, config, gpt_config, sources, read_meta(config.data_dir))
    device = "cuda" if config.device == "auto" else config.device.partition(":")[0]
    dtype = {"cuda": "bfloat16"}.get(device, "float32") if config.dtype == "auto" else config.dtype
    T = config.seq_len or gpt_config.block_size

    def foreseen(batch_size: int, **options: bool) -> Foreseen:
        alone = processes == 1 and config.total_batch_size in (None, batch_size * T)
        setting = Setting(
            batch_size, T, config.optimizer, getattr(torch, dtype), compiles(config, torch.device(device)), device,
            config.activation_checkpointing, config.chunked_loss, accumulates=not alone, average=config.average > 0,
            shards=processes if config.parallel == "fsdp" else 1,
        )  # fmt: skip
        return foresee(gpt_config, replace(setting, **options))

    def total(batch_size: int, **options: bool) -> float:  # GB
        return foreseen(batch_size, **options).total / 1e9

    parts, fits = asdict(foreseen(config.batch_size)), {}
    print(f"batch_size {config.batch_size} x seq_len {T} in {dtype} on {device}, foreseen from shapes, not measured:")
    for part, size in parts.items():
        print(f"{part:>12} {size / 1e9:8.2f} GB" + (" at most at one moment" if part == "total" else ""))
    print(f"the largest batch_size that takes {CARD_SHARE:.0%} of a card, and its GB:")
    print("       ", *(f"{name:>26}" for name in SAVING))
    per_step = (config.total_batch_size or 0) // (T * processes)  # sequences
    sizes = [n for n in range(1, 2049) if not per_step or per_step % n == 0]
    for card in CARDS:
        fits[card] = {}
        for name, options in SAVING.items():
            fitting = bisect_right(sizes, CARD_SHARE * card, key=lambda n, options=options: total(n, **options))
            fits[card][name] = (sizes[fitting - 1], total(sizes[fitting - 1], **options)) if fitting else None
        print(f"{card:>4} GB", *(f"{f'{fit[0]} ({fit[1]:.1f})' if fit else '-':>26}" for fit in fits[card].values()))
    return dict(memory=parts, fits=fits, config=asdict(config), gpt_config=asdict(gpt_config), processes=processes)


def compare(bench: BenchConfig, args: list[str]) -> dict:
    """Measure these options on this code (a) and the others on the other code (b), in turn, each in a process of its
    own: b's time over a's in each round, their median, and all results. Raises UserError."""
    if under_torchrun():
        raise UserError("compare and against start processes of their own: use --processes=N in place of torchrun")
    mine = [arg for arg in args if not arg.startswith(("--compare=", "--against=", "--rounds=", "--processes="))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={bench.processes}"]
    results: dict[str, list[dict]] = {"a": [], "b": []}
    with tempfile.TemporaryDirectory() as folder:
        code = HERE
        if bench.compare:
            archive, code = Path(folder, "code.tar"), Path(folder, "code")
            done(["git", "-C", str(HERE), "archive", f"--output={archive}", bench.compare])
            shutil.unpack_archive(archive, code)
            if not (code / "bench.py").exists():
                shutil.copy(__file__, code)
        for number in range(1, bench.rounds + 1):
            for name, where, options in (("a", HERE, mine), ("b", code, other(mine, bench.against or ""))):
                command = [sys.executable, *(torchrun if bench.processes else []), str(where / "bench.py"), *options]
                results[name].append(json.loads(done(command).splitlines()[-1]))
                print(f"round {number} {name}: {results[name][-1]['ms']:10.2f} ms a step", flush=True)
    ratios = [b["ms"] / a["ms"] for a, b in zip(*results.values(), strict=True)]
    print(f"a is {statistics.median(ratios):.3f} x as fast as b ({min(ratios):.3f} to {max(ratios):.3f})")
    return dict(ratio=statistics.median(ratios), ratios=ratios, **results)


def other(args: list[str], against: str) -> list[str]:
    """['x.py', '--a=1'], 'y.py --b=2' -> ['--a=1', 'y.py', '--b=2']; without a file, x.py stays."""
    theirs = shlex.split(against)
    replaced = any(not arg.startswith("-") for arg in theirs)
    return [arg for arg in args if arg.startswith("-") or not replaced] + theirs


def done(command: list[str]) -> str:
    """What a command printed. Raises UserError where it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # GIT_DIR: another's
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    if ended.returncode:
        raise UserError(f"{shlex.join(command)}: {(ended.stderr.strip().splitlines() or ['failed'])[-1]}")
    return ended.stdout


if __name__ == "__main__":
    cli(main)
