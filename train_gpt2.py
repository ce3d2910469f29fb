"""Train a GPT: on a laptop, one GPU, or many.

    python train_gpt2.py config/quickstart.py
    torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_124m.py --out_dir=out/mine

The run goes to out_dir: metrics.jsonl and ckpt_<step>.pt. A stopped run goes on with --resume=True.
"""

import contextlib
import copy
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import checkpoint
from configurator import UserError, cli, configure
from dataloader import Windows, data_tokenizer, read_meta, same_data, train_batches, val_batches
from distributed import World, check_tokens, hardware, pick_dtype
from metrics import Metrics, bits_per_byte, read_metrics, word_loss
from model import GPT, GPTConfig
from optim import learning_rate, make_optimizers


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults pretrain GPT-2 124M on FineWeb-Edu."""

    # files
    out_dir: str = "out/gpt2_124m"  # where the run goes
    data_dir: str = "data/fineweb_edu10B"  # token shards, made by fineweb.py
    init_from: str = "scratch"  # "scratch", or weights: a checkpoint, run or Hugging Face folder, gpt2..gpt2-xl
    resume: bool = False  # go on from the newest checkpoint in out_dir, with its options; start afresh without one
    # machine
    seed: int = 1337  # of the initial weights, the data order and dropout
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the matrix products; weights are float32
    compile: bool | None = None  # torch.compile: faster steps after a minute of compiling; None: on NVIDIA GPUs
    cudnn_attention: bool = False  # on NVIDIA's H100 and newer, without dropout: cuDNN's, and not flash attention
    deterministic: bool = False  # the same bits whenever it is run, on GPUs too (slower); on CPUs they always are
    # batch
    seq_len: int | None = None  # tokens in a training sequence; None: block_size
    batch_size: int = 16  # sequences in a micro-batch, on each process
    total_batch_size: int | None = 524288  # tokens in a step, accumulated over rounds of micro-batches; None: one round
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
    warmup_fraction: float | None = None  # in place of warmup_steps: this part of all steps
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # after the warm-up
    decay_fraction: float = 0.2  # wsd: the part of all steps in which the rate falls
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW: memory of the gradient
    beta2: float = 0.95  # AdamW: memory of its square
    grad_clip: float = 1.0  # longest gradient; 0: no clipping
    max_skipped: int = 20  # give up (exit status 3) after so many steps in a row without a finite loss and gradient
    # what else happens; an interval of 0 means never
    val_interval: int = 250  # steps between evaluations
    val_tokens: int = 10485760  # the first so many tokens of the val split
    hellaswag_interval: int = 0  # steps between evaluations on HellaSwag, 10,042 examples
    hellaswag_data: str | None = None  # a .jsonl of examples; None: the validation set, downloaded once
    sample_interval: int = 0  # steps between samples
    sample_start: str = ""  # what samples continue; empty: the start of a document
    checkpoint_interval: int = 1000  # steps between checkpoints; the last step always has one
    keep_checkpoints: int = 3  # the newest so many, and the best; 0: all
    log_interval: int = 10  # steps between log lines and train records
    log_to: Literal["tensorboard", "wandb"] | None = None  # where metrics go beside metrics.jsonl; wandb also offline

    def __post_init__(self):
        at_least_1 = ("batch_size", "total_batch_size", "max_skipped", "log_interval", "seq_len", "max_steps")
        at_least_0 = (
            "seed", "val_interval", "hellaswag_interval", "sample_interval", "checkpoint_interval", "keep_checkpoints",
            "warmup_steps", "learning_rate", "min_lr", "weight_decay", "grad_clip", "val_tokens",
        )  # fmt: skip
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
        for name in ("decay_fraction", "warmup_fraction"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must be in [0, 1]")
        if self.epochs is not None and not 0 < self.epochs < 2**31:
            raise ValueError(f"epochs = {self.epochs}, but it must be more than 0 and below 2^31")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}")
        if self.target_val_loss is not None and not self.val_interval:
            raise ValueError("target_val_loss is looked at in evaluations, but val_interval = 0 means there are none")


# Options that leave it the same run, and so may differ when it is resumed: where, on what, how long, how often.
MAY_CHANGE = {
    "out_dir", "data_dir", "resume", "device", "dtype", "compile", "cudnn_attention", "deterministic", "batch_size",
    "max_steps", "epochs", "target_loss", "target_val_loss", "max_skipped", "val_interval", "hellaswag_interval",
    "hellaswag_data", "sample_interval", "sample_start", "checkpoint_interval", "keep_checkpoints", "log_interval",
    "log_to",
}  # fmt: skip


def main() -> int:
    gc.disable()  # up to the loop nothing becomes garbage, and looking for it takes a fifth of the time to get there
    config, gpt_config, given = configure(TrainConfig, GPTConfig)
    world = World(config.device)
    device = world.device

    def say(text: str) -> None:
        if world.is_main:
            try:
                print(text, flush=True)
            except OSError:  # the terminal is gone, or the disk of a log file full: no reason to end a run
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    # What can be wrong is looked at before anything is written.
    log = Metrics(config.out_dir)
    resume_path = world.agree(lambda: find_run(config, world, log))
    saved, weights, changed = None, None, {}
    if resume_path:
        saved = checkpoint.load(resume_path)
        if missing := {"config", "optimizers", "scaler", "data"} - saved.keys():
            raise UserError(f"{resume_path}: has no {', '.join(missing)} to go on from; use it with --init_from")
        worked_out = {name for name in ("seq_len", "total_batch_size") if getattr(config, name) is None}  # at the start
        now = {name: f"--{name}" for name in ("out_dir", "resume", "device")} | given
        now = {name: where for name, where in now.items() if name not in worked_out}
        config = checkpoint.as_it_was(saved["config"], config, now, MAY_CHANGE, resume_path)
        gpt_config = checkpoint.as_it_was(saved["gpt_config"], gpt_config, given, (), resume_path)
        changed = {
            name: [saved["config"].get(name), value]
            for name, value in dataclasses.asdict(config).items()
            if value != saved["config"].get(name) and name not in ("out_dir", "resume")
        }
    meta = read_meta(config.data_dir)
    if resume_path:
        weights = saved["model"]
    elif config.init_from != "scratch":
        from huggingface import starting_weights  # tokenizers take a while to import

        gpt_config, weights = starting_weights(config.init_from, gpt_config, given, meta.get("vocab_size", 0))
    elif meta and "vocab_size" not in given:
        gpt_config = dataclasses.replace(gpt_config, vocab_size=meta["vocab_size"])
    tokenizer = data_tokenizer(config.data_dir, meta, gpt_config.vocab_size)
    if gpt_config.vocab_size < meta.get("vocab_size", 0):
        raise UserError(f"vocab_size = {gpt_config.vocab_size}, but {config.data_dir} has {meta['vocab_size']} ids")
    T = config.seq_len or gpt_config.block_size
    if gpt_config.block_size < T:
        raise UserError(f"seq_len = {T} is more than block_size = {gpt_config.block_size}")
    one_round = config.batch_size * T * world.size
    config = dataclasses.replace(config, seq_len=T, total_batch_size=config.total_batch_size or one_round)
    vocab_size = meta.get("vocab_size", gpt_config.vocab_size)
    train = Windows(config.data_dir, "train", T, vocab_size)
    val = Windows(config.data_dir, "val", T, vocab_size) if config.val_interval else None
    data_then = saved["data"] if saved else {}
    data = world.agree(lambda: same_data(config.data_dir, train, val, data_then))
    if val and config.val_tokens < T:
        raise UserError(f"val_tokens = {config.val_tokens} is less than one window of seq_len = {T}")
    if config.total_batch_size % one_round:
        parts = f"batch_size {config.batch_size} x seq_len {T} x {world.size} processes"
        raise UserError(f"total_batch_size = {config.total_batch_size} is not a multiple of {parts}")
    rows = config.total_batch_size // T  # windows in a step
    micro_batches = rows // (config.batch_size * world.size)
    max_steps = planned_steps(config, len(train), rows)
    part = config.warmup_fraction
    warmup_steps = config.warmup_steps if part is None else round(part * max_steps)
    for name in ("sample_interval", "hellaswag_interval"):
        if getattr(config, name) and not tokenizer:
            raise UserError(f"{config.data_dir}: its tokenizer is not known, which {name} needs; use --{name}=0")
    check_tokens(config.batch_size, T, device)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    if compiled and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError("compile = True needs a C++ compiler on a CPU; install g++, or use --compile=False")
    target_reached = bool(saved and saved["target_reached"] and not changed.keys() & {"target_loss", "target_val_loss"})
    if saved and (saved["step"] >= max_steps or target_reached) and not saved["stopped"]:
        say(f"{config.out_dir}: this run is done, at step {saved['step']}")
        world.close()
        return 0

    examples, no_hellaswag = [], None
    if config.hellaswag_interval:
        import hellaswag  # with tokenizers, which take a while to import
        from tokenizer import get_tokenizer

        try:
            examples = world.agree(
                lambda: hellaswag.load(config.hellaswag_data, get_tokenizer(tokenizer), gpt_config.block_size)
            )
        except UserError as error:
            if config.hellaswag_data:
                raise
            no_hellaswag = f"no HellaSwag in this run: {error}"  # a machine without a network can train all the same

    # The model, its optimizers, and the state to go on from.
    if device.type == "cpu":
        torch.set_deterministic_debug_mode("error")  # compiled code would add up threads' results in any order
    elif config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
        torch.use_deterministic_algorithms(True)  # the same, and the compiler chooses no kernel by its speed
    torch.utils.deterministic.fill_uninitialized_memory = False  # which finds bugs, and costs time
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
        model, config.optimizer, config.learning_rate, config.weight_decay, (config.beta1, config.beta2), world.spread
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, saved_step, best, skipped = 0, 0, {"step": None, "val_loss": math.inf}, 0
    if saved:
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(state) if device.type == "cpu" else state)  # else it is no copy
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        step, best, skipped = saved["step"], saved["best"], saved["skipped"]
        saved_step = None if saved["stopped"] else step  # where a signal came, the evaluations are still to be made
        del state
    del saved, weights  # and with them the file, which stays on disk for as long as anything is mapped to it
    torch.backends.cuda.enable_cudnn_sdp(config.cudnn_attention and not gpt_config.dropout)  # which it rounds
    if compiled:
        model.compile()
    example = torch.zeros((2, config.batch_size, T), dtype=torch.int64, device=device)  # two tensors, as x and y are
    with autocast:
        wrapped = world.wrap(model, *example)
    batches = train_batches(train, config.seed, rows, config.batch_size, world.rank, world.size, device, step + 1)

    stop_signals: list[int] = []

    def on_signal(number: int, _: object) -> None:
        stop_signals.append(number)  # stop after this step, on all ranks
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # and at once at the next Ctrl-C, whatever is going on

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

    world.agree(lambda: log.begin(step if resume_path else None, config.log_to))
    record = log.write if world.is_main else lambda kind, **values: None
    card, peak_flops = hardware(device)
    about = dict(
        commit=git_commit(), torch=torch.__version__, python=platform.python_version(), hardware=card,
        world_size=world.size, dtype=str(dtype).removeprefix("torch."), launch=world.launch,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )  # fmt: skip
    if resume_path:
        record("event", event="resume", step=step, checkpoint=resume_path.name, changed=changed, **about)
    else:
        record(
            "run", config=dataclasses.asdict(config), gpt_config=dataclasses.asdict(gpt_config),
            parameters=model.num_params(), max_steps=max_steps, data=meta, **about,
        )  # fmt: skip
    say(f"model: {model.num_params():,} parameters, on {world.size} x {card} in {dtype}")
    say(f"data: {len(train):,} windows of {T} tokens in {config.data_dir}; {max_steps * rows / len(train):.2f} epochs")
    say(f"step: {rows:,} windows = {micro_batches} micro-batches x {world.size} processes x {config.batch_size}")
    say(f"{f'resuming at step {step} in' if resume_path else 'writing to'} {config.out_dir}")

    if no_hellaswag:
        record("event", event="no hellaswag", step=step, problem=no_hellaswag)
        say(no_hellaswag)
    for name, (before, after) in changed.items():
        say(f"changed: {name} = {after}, was {before}")
    gc.enable()
    stopping = gave_up = False
    logged_step, seconds = step, 0.0  # of training since then

    def log_step() -> None:
        nonlocal logged_step, seconds
        dt = seconds / (step - logged_step)
        logged_step, seconds = step, 0.0
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

    def save() -> str | None:
        """What went wrong, if it did."""
        state = {
            "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(), "step": step, "best": best, "skipped": skipped, "stopped": stopping,
            "target_reached": target_reached, "data": data, "gpt_config": dataclasses.asdict(gpt_config),
            "config": dataclasses.asdict(config), "tokenizer": tokenizer,
        }  # fmt: skip
        try:
            log.sync()  # what led to a checkpoint is on disk before it
            keep = 0 if skipped else config.keep_checkpoints  # a run that fails pushes no good one out
            say(f"saved {checkpoint.save(state, config.out_dir, keep, best['step'])}")
        except OSError as error:
            return error.strerror or str(error)

    while True:
        # Between two steps: validation, samples, a checkpoint, or the end.
        done = step >= max_steps or target_reached
        due = {
            name: interval > 0 and not stopping and (step % interval == 0 or done)
            for name, interval in [
                ("val", config.val_interval),
                ("hellaswag", config.hellaswag_interval),
                ("sample", config.sample_interval),
                ("checkpoint", config.checkpoint_interval),
            ]
        }
        if due["val"]:
            val_loss = evaluate(
                model, val_batches(val, config.val_tokens, config.batch_size, world.rank, world.size, device),
                config.batch_size, autocast, world, stop_signals,
            )  # fmt: skip
            stopping = val_loss is None  # a resumed run evaluates anew
        if due["val"] and not stopping:
            if config.target_val_loss is not None and val_loss < config.target_val_loss:
                done = target_reached = True
            bpb = bits_per_byte(val_loss, meta)
            of_words = word_loss(val_loss, meta) if config.val_tokens // T >= len(val) else None
            record("val", step=step, val_loss=val_loss, word_loss=of_words)
            say(
                f"step {step:>5}/{max_steps} | val loss {val_loss:.4f}"
                + (f" | word loss {of_words:.4f}" if of_words else "")
                + (f" | {bpb:.4f} bits per byte" if bpb else "")
            )
        if due["hellaswag"] and examples and not stopping:
            score = hellaswag.score(model, examples, config.batch_size * T, world, autocast, stop=stop_signals)
            stopping = score is None
            if not stopping:
                acc, acc_norm, n = score
                record("hellaswag", step=step, acc=acc, acc_norm=acc_norm, n=n)
                say(f"step {step:>5}/{max_steps} | HellaSwag acc {acc:.4f}, acc_norm {acc_norm:.4f}, of {n:,}")
        if due["sample"] and not stopping:
            if world.is_main:
                text = config.sample_start + sample(model, tokenizer, config.sample_start, stop_signals)
            stopping = world.sum([len(stop_signals)])[0] > 0
            if world.is_main and not stopping:
                record("sample", step=step, text=text)
                say(f"--- sample\n{text}\n---")
        if done and step > logged_step:
            log_step()
        regular = (due["checkpoint"] and step > 0) or done
        best_before = best
        if regular and due["val"] and not stopping and val_loss < best["val_loss"]:  # the best of those saved
            best = {"step": step, "val_loss": val_loss}
        if done and not stopping:
            record("event", event="done", step=step, target_reached=target_reached)
        elif stopping:
            name = signal.Signals(stop_signals[0]).name if stop_signals else None  # None: another rank's
            record("event", event="stopped", step=step, signal=name)
        if step != saved_step and (regular or stopping):
            problem = world.agree(save)
            if problem and (done or stopping):
                raise UserError(
                    f"{config.out_dir}: step {step} is not saved: {problem}; mend that, and go on with --resume=True"
                )
            if problem:
                record("event", event="not saved", step=step, problem=problem)
                say(f"NOT SAVED at step {step}: {problem}; older checkpoints are untouched, and the run goes on")
                best = best_before
            else:
                saved_step = step
        if done or stopping:
            break

        # One step: the gradient of the whole batch, micro-batch by micro-batch, and an update.
        began = time.perf_counter()
        step += 1
        lr = learning_rate(
            step, config.schedule, config.learning_rate, config.min_lr, warmup_steps, max_steps,
            config.decay_fraction,
        )  # fmt: skip
        if gpt_config.dropout:  # seeded by the step, so that there is no generator state to save or disturb
            torch.manual_seed(
                int(np.random.SeedSequence([config.seed, step, world.rank]).generate_state(1, np.uint64)[0])
            )
        numbers = torch.zeros(2, device=device)  # the mean loss; whether to stop
        for micro_batch in range(micro_batches):
            x, y = next(batches)
            world.sync_gradients(wrapped, on=micro_batch == micro_batches - 1)
            with autocast:
                micro_loss = wrapped(x, y) / micro_batches
            numbers[0] += micro_loss.detach()
            scaler.scale(micro_loss).backward()
        numbers[1] += len(stop_signals)
        world.mean_(numbers)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip or math.inf)
        norm, (loss, stop) = norm.item(), numbers.tolist()  # the step's one wait
        stopping = stop > 0
        finite = math.isfinite(loss) and math.isfinite(norm)  # the same on all ranks
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if finite:  # else one bad gradient would spoil every weight and running mean, for good
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        seconds += time.perf_counter() - began

        skipped = 0 if finite else skipped + 1
        if skipped:
            record("event", event="skipped step", step=step, loss=loss, grad_norm=norm)
            say(f"step {step:>5}/{max_steps} | skipped: loss {loss}, gradient norm {norm}")
        gave_up = skipped >= config.max_skipped  # more than that where a resumed run has a lower limit
        if gave_up:
            record("event", event="gave up", step=step)
            say(f"gave up: {skipped} steps in a row without a finite loss and gradient; the last checkpoint is kept")
            break
        target_reached = config.target_loss is not None and loss < config.target_loss
        if step == 1 or step % config.log_interval == 0 or step == max_steps or target_reached:
            log_step()

    batches.close()
    if world.is_main:
        log.close()
    world.close()
    if gave_up:
        return 3
    if stopping and not done:
        say(f"stopped by a signal at step {step}; the same command with --resume=True goes on")
    else:
        say(f"done: {config.out_dir} holds the checkpoint and metrics.jsonl; next:")
        say(f"  python sample.py --model={config.out_dir}\n  python report.py {config.out_dir}")
    return 0


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor]], batch_size: int, autocast: contextlib.AbstractContextManager,
    world: World, stop_signals: list[int],
) -> float | None:  # fmt: skip
    """Mean loss in nats per token over every rank's batches; None where a signal came first, on any rank."""
    model.eval()
    losses, counts = [], []
    for x, y in batches:
        if stop_signals:
            break
        counts.append(y.numel())
        missing = (0, 0, 0, batch_size - len(x))  # a ragged last batch: of another shape it would be compiled anew
        with autocast:
            losses.append(model(F.pad(x, missing), F.pad(y, missing, value=-1)))
    model.train()
    losses = [loss.item() for loss in losses]  # one wait at the end
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    total, tokens, stop = world.sum([total, sum(counts), len(stop_signals)])
    return None if stop else total / tokens


def sample(model: GPT, tokenizer: str, start: str, stop_signals: list[int]) -> str:
    """200 tokens behind `start`, always the same ones of the same weights; fewer where a signal comes."""
    from sample import complete  # tokenizers take a while to import
    from tokenizer import get_tokenizer

    model.eval()
    text = ""
    for [piece] in complete(model, get_tokenizer(tokenizer), start, 1, 200):
        text += piece
        if stop_signals:
            break
    model.train()
    return text


def find_run(config: TrainConfig, world: World, log: Metrics) -> Path | None:
    """The checkpoint to go on from, or None for a run from the start. Raises UserError rather than overwrite a run."""
    begun = log.lock()
    records = read_metrics(log.path) if world.restarts and begun else []
    restarted = any(record.get("launch") == world.launch for record in records)  # by torchrun, which began this run
    if config.resume or restarted:
        return checkpoint.newest_whole(config.out_dir)
    if checkpoint.find(config.out_dir) or (begun and log.path.stat().st_size):
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
