"""Train a GPT: on a laptop, one GPU, or many.

    python train_gpt2.py config/quickstart.py
    torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_124m.py --out_dir=out/mine

The run goes to out_dir: metrics.jsonl and ckpt_<step>.pt. A stopped run goes on with --resume=True.
"""

import contextlib
import dataclasses
import gc
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import checkpoint
from configurator import UserError, cli, configure
from dataloader import Windows, data_tokenizer, read_meta, train_batches, val_batches
from distributed import World, hardware, pick_dtype
from metrics import Metrics, bits_per_byte
from model import GPT, GPTConfig
from optim import learning_rate, make_optimizers


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults pretrain GPT-2 124M on FineWeb-Edu."""

    # files
    out_dir: str = "out/gpt2_124m"  # where the run goes
    data_dir: str = "data/fineweb_edu10B"  # token shards, made by fineweb.py
    init_from: str = "scratch"  # "scratch", or a checkpoint or run folder whose weights to start from
    resume: bool = False  # go on from the newest checkpoint in out_dir; start afresh where there is none
    # machine
    seed: int = 1337  # of the initial weights, the data order and dropout
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the matrix products; weights are float32
    compile: bool = True  # torch.compile: faster steps after a minute of compiling
    # batch
    seq_len: int | None = None  # tokens in a training sequence; None: block_size
    batch_size: int = 16  # sequences in a micro-batch, on each process
    total_batch_size: int = 524288  # tokens in a step; more than one round of micro-batches is accumulated
    # length
    max_steps: int | None = None  # optimizer steps
    epochs: float | None = None  # passes over the data, unless max_steps comes sooner; with neither, one pass
    target_loss: float | None = None  # stop after a step whose train loss is below this
    target_val_loss: float | None = None  # stop at an evaluation whose val loss is below this
    # optimizer
    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"  # muon: the blocks' matrices; AdamW takes the rest
    learning_rate: float = 6e-4  # the highest
    min_lr: float = 6e-5  # the last
    warmup_steps: int = 715  # steps from 0 to learning_rate
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # after the warm-up
    decay_fraction: float = 0.2  # wsd: the part of all steps in which the rate falls
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW: memory of the gradient
    beta2: float = 0.95  # AdamW: memory of its square
    grad_clip: float = 1.0  # longest gradient; 0: no clipping
    # what else happens; an interval of 0 means never
    val_interval: int = 250  # steps between evaluations
    val_tokens: int = 10485760  # the first so many tokens of the val split
    sample_interval: int = 0  # steps between samples
    sample_start: str = ""  # what samples continue; empty: the start of a document
    checkpoint_interval: int = 1000  # steps between checkpoints; the last step always has one
    keep_checkpoints: int = 3  # the newest so many, and the best; 0: all
    log_interval: int = 10  # steps between log lines and train records

    def __post_init__(self):
        at_least_1 = ("batch_size", "total_batch_size", "log_interval", "seq_len", "max_steps")
        at_least_0 = ("seed", "val_interval", "sample_interval", "checkpoint_interval", "keep_checkpoints")
        at_least_0 += ("warmup_steps", "learning_rate", "min_lr", "weight_decay", "grad_clip", "val_tokens")
        for least, names in ((1, at_least_1), (0, at_least_0)):
            for name in names:
                if getattr(self, name) is not None and getattr(self, name) < least:
                    raise ValueError(f"{name} = {getattr(self, name)}, but it must be at least {least}")
        for name in ("out_dir", "data_dir", "init_from"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must be in [0, 1)")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction = {self.decay_fraction}, but it must be in [0, 1]")
        if self.epochs is not None and not 0 < self.epochs < 2**31:
            raise ValueError(f"epochs = {self.epochs}, but it must be more than 0 and below 2^31")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}")
        if self.target_val_loss is not None and not self.val_interval:
            raise ValueError("target_val_loss is looked at in evaluations, but val_interval = 0 means there are none")


MAX_NON_FINITE = 20  # steps in a row; a float16 scaler may need about 16 to find its scale


def main() -> int:
    gc.disable()  # up to the loop nothing becomes garbage, and looking for it takes a fifth of the time to get there
    config, gpt_config, given = configure(TrainConfig, GPTConfig)
    world = World(config.device)
    device = world.device

    def say(text: str) -> None:
        if world.is_main:
            print(text, flush=True)

    # What can be wrong is looked at before anything is written.
    resume_path = world.agree(lambda: find_run(config))
    meta = read_meta(config.data_dir)
    tokenizer = data_tokenizer(config.data_dir, meta, gpt_config.vocab_size)
    if meta and "vocab_size" not in given:
        gpt_config = dataclasses.replace(gpt_config, vocab_size=meta["vocab_size"])
    saved, weights = None, None
    if resume_path:
        saved = checkpoint.load(resume_path)
        gpt_config, weights = checkpoint.same_model(saved, gpt_config, given, resume_path), saved["model"]
    elif config.init_from != "scratch":
        gpt_config, weights = checkpoint.starting_weights(
            config.init_from, gpt_config, given, meta.get("vocab_size", 0)
        )
    if gpt_config.vocab_size < meta.get("vocab_size", 0):
        raise UserError(f"vocab_size = {gpt_config.vocab_size}, but {config.data_dir} has {meta['vocab_size']} ids")
    T = config.seq_len or gpt_config.block_size
    if gpt_config.block_size < T:
        raise UserError(f"seq_len = {T} is more than block_size = {gpt_config.block_size}")
    train = Windows(config.data_dir, "train", T)
    val = Windows(config.data_dir, "val", T) if config.val_interval else None
    if val and config.val_tokens < T:
        raise UserError(f"val_tokens = {config.val_tokens} is less than one window of seq_len = {T}")
    if config.total_batch_size % (config.batch_size * T * world.size):
        parts = f"batch_size {config.batch_size} x seq_len {T} x {world.size} processes"
        raise UserError(f"total_batch_size = {config.total_batch_size} is not a multiple of {parts}")
    rows = config.total_batch_size // T  # windows in a step
    micro_batches = rows // (config.batch_size * world.size)
    max_steps = planned_steps(config, len(train), rows)
    if config.sample_interval and not tokenizer:
        raise UserError(f"{config.data_dir}: its tokenizer is not known, so no samples; use --sample_interval=0")
    if config.compile and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError("compile = True needs a C++ compiler on a CPU; install g++, or use --compile=False")
    if saved and (saved["step"] >= max_steps or saved["target_reached"]):
        say(f"{config.out_dir}: this run is done, at step {saved['step']}")
        world.close()
        return 0

    # The model, its optimizers, and the state to go on from.
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    model = GPT(gpt_config)
    if weights:
        model.load_state_dict(weights)
    model.to(device)
    params = list(model.parameters())
    dtype = pick_dtype(config.dtype, device)
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    optimizers = make_optimizers(
        model, config.optimizer, config.learning_rate, config.weight_decay, (config.beta1, config.beta2)
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, target_reached = 0, {"step": None, "val_loss": math.inf}, False
    if saved:
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(saved["scaler"])
        step, best = saved["step"], saved["best"]
    del saved, weights
    if config.compile:
        model.compile()
    example = torch.zeros(config.batch_size, T, dtype=torch.int64, device=device)
    with autocast:
        wrapped = world.wrap(model, example, example)
    batches = train_batches(train, config.seed, rows, config.batch_size, world.rank, world.size, device, step + 1)

    log = Metrics(config.out_dir, step if resume_path else None) if world.is_main else None
    record = log.write if log else lambda kind, **values: None
    card, peak_flops = hardware(device)
    if resume_path:
        record("event", event="resume", step=step, checkpoint=resume_path.name, world_size=world.size)
    else:
        record(
            "run", config=dataclasses.asdict(config), gpt_config=dataclasses.asdict(gpt_config),
            parameters=model.num_params(), max_steps=max_steps, dtype=str(dtype).removeprefix("torch."),
            commit=git_commit(), torch=torch.__version__, python=platform.python_version(), hardware=card,
            world_size=world.size, data=meta,
        )  # fmt: skip
    say(f"model: {model.num_params():,} parameters, on {world.size} x {card} in {dtype}")
    say(f"data: {len(train):,} windows of {T} tokens in {config.data_dir}; {max_steps * rows / len(train):.2f} epochs")
    say(f"step: {rows:,} windows = {micro_batches} micro-batches x {world.size} processes x {config.batch_size}")
    say(f"{f'resuming at step {step} in' if resume_path else 'writing to'} {config.out_dir}")

    stop_signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):  # the first asks to stop after this step, a second one insists
        signal.signal(number, lambda n, _: sys.exit(128 + n) if stop_signals else stop_signals.append(n))
    gc.enable()
    saved_step, non_finite = step, 0
    logged_step, logged_at = step, time.perf_counter()

    def log_step() -> None:
        nonlocal logged_step, logged_at
        now = time.perf_counter()
        dt = (now - logged_at) / (step - logged_step)
        logged_step, logged_at = step, now
        tokens_per_sec = config.total_batch_size / dt
        mfu = model.flops_per_token(T) * tokens_per_sec / (world.size * peak_flops) if peak_flops else None
        record(
            "train", step=step, loss=loss, lr=lr, grad_norm=norm, tokens=step * config.total_batch_size,
            tokens_per_sec=tokens_per_sec, dt=dt, mfu=mfu,
        )  # fmt: skip
        say(
            f"step {step:>5}/{max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.4f} | {dt * 1e3:.1f} ms | "
            f"{tokens_per_sec:,.0f} tok/s | {f'mfu {mfu:.1%} | ' if mfu else ''}eta {clock(dt * (max_steps - step))}"
        )

    while True:
        # Between two steps: validation, samples, a checkpoint, or the end.
        stopping = world.sum([len(stop_signals)])[0] > 0  # waits for the slowest rank, so it is part of the step
        pause = time.perf_counter()
        done = step >= max_steps or target_reached
        due = {
            name: interval > 0 and not stopping and (step % interval == 0 or done)
            for name, interval in [
                ("val", config.val_interval),
                ("sample", config.sample_interval),
                ("checkpoint", config.checkpoint_interval),
            ]
        }
        if due["val"]:
            val_loss = evaluate(
                model, val_batches(val, config.val_tokens, config.batch_size, world.rank, world.size, device),
                config.batch_size, autocast, world,
            )  # fmt: skip
            if config.target_val_loss is not None and val_loss < config.target_val_loss:
                done = target_reached = True
            bpb = bits_per_byte(val_loss, meta)
            record("val", step=step, val_loss=val_loss)
            say(
                f"step {step:>5}/{max_steps} | val loss {val_loss:.4f}" + (f" | {bpb:.4f} bits per byte" if bpb else "")
            )
        if due["sample"] and world.is_main:
            from sample import complete  # tokenizers take a while to import
            from tokenizer import get_tokenizer

            model.eval()
            text = "".join(piece for [piece] in complete(model, get_tokenizer(tokenizer), config.sample_start, 1, 200))
            model.train()
            record("sample", step=step, text=config.sample_start + text)
            say(f"--- sample\n{config.sample_start}{text}\n---")
        if step > saved_step and (due["checkpoint"] or done or stopping):
            if due["val"] and val_loss < best["val_loss"]:  # the best of those saved
                best = {"step": step, "val_loss": val_loss}
            if world.is_main:
                state = {
                    "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "scaler": scaler.state_dict(), "step": step, "best": best, "target_reached": target_reached,
                    "gpt_config": dataclasses.asdict(gpt_config), "config": dataclasses.asdict(config),
                    "tokenizer": tokenizer,
                }  # fmt: skip
                say(f"saved {checkpoint.save(state, config.out_dir, config.keep_checkpoints, best['step'])}")
            saved_step = step
        logged_at += time.perf_counter() - pause  # dt is of steps alone
        if done and step > logged_step:
            log_step()
        if done or stopping:
            break

        # One step: the gradient of the whole batch, micro-batch by micro-batch, and an update.
        step += 1
        lr = learning_rate(
            step, config.schedule, config.learning_rate, config.min_lr, config.warmup_steps, max_steps,
            config.decay_fraction,
        )  # fmt: skip
        if gpt_config.dropout:  # seeded by the step, so that there is no generator state to save or disturb
            torch.manual_seed(
                int(np.random.SeedSequence([config.seed, step, world.rank]).generate_state(1, np.uint64)[0])
            )
        loss = torch.zeros((), device=device)
        for micro_batch in range(micro_batches):
            x, y = next(batches)
            world.sync_gradients(wrapped, on=micro_batch == micro_batches - 1)
            with autocast:
                micro_loss = wrapped(x, y) / micro_batches
            loss += micro_loss.detach()
            scaler.scale(micro_loss).backward()
        world.mean_(loss)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip or math.inf).item()  # the step's one wait
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if math.isfinite(norm):  # one bad gradient anywhere spoils the clipped gradients everywhere
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()

        loss = loss.item()
        non_finite = 0 if math.isfinite(norm) else non_finite + 1
        if non_finite:
            record("event", event="skipped step", step=step, loss=loss, grad_norm=norm)
            say(f"step {step:>5}/{max_steps} | skipped: loss {loss}, gradient norm {norm}")
        if non_finite == MAX_NON_FINITE:
            record("event", event="gave up", step=step)
            say(f"gave up: {MAX_NON_FINITE} steps in a row without a finite gradient; the last checkpoint is kept")
            return 3
        target_reached = config.target_loss is not None and loss < config.target_loss
        if step == 1 or step % config.log_interval == 0 or step == max_steps or target_reached:
            log_step()

    batches.close()
    if stopping and not done:
        record(
            "event", event="stopped", step=step, signal=signal.Signals(stop_signals[0]).name if stop_signals else None
        )
        say(f"stopped by a signal at step {step}; the same command with --resume=True goes on")
    else:
        record("event", event="done", step=step, target_reached=target_reached)
        say(f"done: {config.out_dir} holds the checkpoint and metrics.jsonl; next:")
        say(f"  python sample.py --model={config.out_dir}\n  python report.py {config.out_dir}")
    world.close()
    return 0


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor]], batch_size: int, autocast: contextlib.AbstractContextManager,
    world: World,
) -> float:  # fmt: skip
    """Mean loss in nats per token over every rank's batches."""
    model.eval()
    losses, counts = [], []
    for x, y in batches:
        forward = model if len(x) == batch_size else model.forward  # a ragged last batch is not worth compiling for
        with autocast:
            losses.append(forward(x, y))
        counts.append(y.numel())
    model.train()
    losses = [loss.item() for loss in losses]  # one wait at the end
    total, tokens = world.sum([sum(loss * count for loss, count in zip(losses, counts, strict=True)), sum(counts)])
    return total / tokens


def find_run(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, or None for a run from the start. Raises UserError rather than overwrite a run."""
    if config.resume:
        return checkpoint.newest_whole(config.out_dir)
    if checkpoint.find(config.out_dir) or Path(config.out_dir, "metrics.jsonl").exists():
        raise UserError(f"out_dir {config.out_dir} already holds a run; go on with --resume=True, or name another")
    return None


def planned_steps(config: TrainConfig, num_windows: int, rows: int) -> int:
    """The last step: max_steps or so many epochs, whichever comes sooner; one epoch where neither is given."""
    epochs = config.epochs if config.epochs or config.max_steps else 1
    steps = [config.max_steps] if config.max_steps else []
    if epochs:
        steps.append(math.floor(epochs * num_windows / rows))
    if min(steps) < 1:
        raise UserError(f"{config.data_dir}: {epochs} epochs of {num_windows} windows are less than one step of {rows}")
    return min(steps)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def git_commit() -> str | None:
    """The commit of this code, with + behind it where files differ; None outside of a git checkout."""
    here = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        commit = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*here, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


if __name__ == "__main__":
    cli(main)
