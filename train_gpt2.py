"""Train a GPT: on a laptop, one GPU, or many.

    python train_gpt2.py config/quickstart.py
    torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_124m.py --out_dir=out/mine

The run goes to out_dir: metrics.jsonl and ckpt_<step>.pt. A stopped run goes on with --resume=True.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import contextlib
import gc
import math
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
from configurator import PathStr, UserError, cli, configure, under_torchrun
from dataloader import DataGuard, Windows, data_tokenizer, read_meta, train_batches, val_batches
from distributed import StopRequest, World, hardware, machine, make_deterministic, pick_dtype
from metrics import Metrics, bits_per_byte, word_loss
from model import GPT, GPTConfig
from optim import learning_rate, make_optimizers


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults pretrain GPT-2 124M on FineWeb-Edu."""

    # files
    out_dir: PathStr = "out/gpt2_124m"  # where the run goes
    data_dir: PathStr = "data/fineweb_edu10B"  # token shards, made by fineweb.py
    init_from: PathStr = "scratch"  # "scratch", or weights: a checkpoint, run or Hugging Face folder, gpt2..gpt2-xl
    resume: bool = False  # go on from the newest checkpoint in out_dir, with its options; start afresh without one
    # machine
    seed: int = 1337  # of the initial weights, the data order and dropout
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the matrix products; weights are float32
    compile: bool = True  # torch.compile: faster steps after a minute of compiling
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
    hellaswag_data: PathStr | None = None  # a .jsonl of examples; None: the validation set, downloaded once
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
    "out_dir", "data_dir", "resume", "device", "dtype", "compile", "deterministic", "batch_size", "max_steps", "epochs",
    "target_loss", "target_val_loss", "max_skipped", "val_interval", "hellaswag_interval", "hellaswag_data",
    "sample_interval", "sample_start", "checkpoint_interval", "keep_checkpoints", "log_interval", "log_to",
}  # fmt: skip


@dataclass
class State:
    """What a run remembers from step to step, beside its weights and optimizers. A checkpoint holds all of it."""

    step: int = 0  # optimizer steps done
    skipped: int = 0  # the last of them, in a row, without a finite loss and gradient
    best: dict = field(default_factory=lambda: {"step": None, "val_loss": math.inf})  # among those saved
    target_reached: bool = False
    stopped: bool = False  # by a signal: this step's evaluations are still to be made


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from the config, the data and the number of processes."""

    rows: int  # windows in a step, on all processes together
    micro_batches: int  # of batch_size windows, in a step of each process
    warmup_steps: int
    max_steps: int


@dataclass(frozen=True)
class Run:
    """What main sets up once and every step uses."""

    config: TrainConfig
    plan: Plan
    world: World
    log: Metrics
    model: GPT  # for evaluations and checkpoints
    wrapped: nn.Module  # the same model, whose backward averages gradients over all processes
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    autocast: contextlib.AbstractContextManager
    val: Windows | None
    examples: list  # of HellaSwag
    meta: dict  # of the data
    guard: DataGuard  # of the data, on rank 0
    identity: dict  # what every checkpoint of the run says: both configs and the tokenizer
    stop: StopRequest


def main() -> int:
    gc.disable()  # up to the loop nothing becomes garbage, and looking for it takes a fifth of the time to get there
    config, gpt_config, given = configure(TrainConfig, GPTConfig)
    world = World(device=None)  # a resumed run has its own
    log = Metrics(config.out_dir, world.is_main)

    # Look before anything is written: a mistake in the options, the data or the machine ends here.
    path, saved = checkpoint.find_run(config, given, world, log)
    config, gpt_config, changed = checkpoint.resume_options(saved, config, gpt_config, given, MAY_CHANGE, path)
    world.use(config.device)
    meta = read_meta(config.data_dir)
    gpt_config, weights = starting_point(saved, config, gpt_config, given, meta)
    tokenizer = data_tokenizer(config.data_dir, meta, gpt_config.vocab_size)
    config = fill_in(config, gpt_config, world)
    check(config, gpt_config, meta, tokenizer, world)
    train_data, val_data = open_data(config, gpt_config, meta)
    plan = make_plan(config, len(train_data), world)
    guard = DataGuard(config.data_dir, ["train", "val"] if val_data else ["train"], meta, saved.get("data", {}))
    world.agree(guard.check)
    state = State(**{name: saved[name] for name in vars(State()) if name in saved})
    if changed.keys() & {"target_loss", "target_val_loss"}:
        state.target_reached = False
    if path and finished(state, plan) and not state.stopped:
        log.say(f"{config.out_dir}: this run is done, at step {state.step}")
        world.close()
        return 0
    examples, no_hellaswag = load_hellaswag(config, tokenizer, gpt_config.block_size, world)

    # Build the model and its optimizers, then begin the record of the run.
    identity = dict(config=asdict(config), gpt_config=asdict(gpt_config), tokenizer=tokenizer)
    run = make_run(config, gpt_config, plan, world, log, saved, weights, val_data, examples, meta, guard, identity)
    saved = weights = None  # and with them the file, which stays on disk for as long as anything is mapped to it
    batches = train_batches(
        train_data, config.seed, plan.rows, config.batch_size, world.rank, world.size, world.device, state.step + 1
    )
    world.agree(lambda: log.begin(state.step if path else None, config.log_to))
    announce(run, state, path, changed, len(train_data), no_hellaswag)
    gc.enable()
    gave_up = train(run, state, batches, saved_step=state.step if path and not state.stopped else None)
    batches.close()
    log.close()
    world.close()
    if gave_up:
        return 3
    if state.stopped:
        log.say(f"stopped by a signal at step {state.step}; the same command with --resume=True goes on")
    else:
        log.say(f"done: {config.out_dir} holds the checkpoint and metrics.jsonl; next:")
        log.say(f"  python sample.py --model={config.out_dir}\n  python report.py {config.out_dir}")
    return 0


def train(run: Run, state: State, batches: Iterator[tuple[Tensor, Tensor]], saved_step: int | None) -> bool:
    """Step by step to the end, or until a signal; whether the run gave up. `saved_step` has its checkpoint already."""
    config, plan, log = run.config, run.plan, run.log
    first_step, logged_step, seconds = state.step + 1, state.step, 0.0  # of training since the logged step
    stopping, numbers = False, None
    while True:
        # Between two steps: evaluations, a checkpoint, or the end.
        val_loss = None
        if not stopping:
            val_loss, stopping = evaluate_all(run, state)
        state.stopped, done = stopping, finished(state, plan)
        if done and state.step > logged_step:
            log_step(run, state.step, numbers, seconds / (state.step - logged_step))
        regular = done or (state.step > 0 and due(state, config.checkpoint_interval))
        saving = state.step != saved_step and (regular or stopping)
        if saving:
            run.world.agree(run.guard.check)  # what was trained on data that changed is not kept
        if done or stopping:
            reason = dict(signal=run.stop.reason) if stopping else dict(target_reached=state.target_reached)
            log.write("event", event="stopped" if stopping else "done", step=state.step, **reason)
        if saving:
            saved_step = save(run, state, val_loss if regular else None, last=done or stopping) or saved_step
        if done or stopping:
            return False

        # One step: the gradient of the whole batch, and an update unless it is not finite.
        began = time.perf_counter()
        state.step += 1
        numbers = train_step(run, state.step, batches)
        loss, norm, _, stopping = numbers
        seconds += time.perf_counter() - began
        if run.world.is_main and state.step == first_step:
            run.guard.start_reading()  # not before: the first step waits for nothing
        if state.step == first_step + 1:  # the first one compiles
            warn_of_long_steps(log, time.perf_counter() - began)
        finite = math.isfinite(loss) and math.isfinite(norm)
        state.skipped = 0 if finite else state.skipped + 1
        if not finite:
            log.write("event", event="skipped step", step=state.step, loss=loss, grad_norm=norm)
            log.say(f"step {state.step:>5}/{plan.max_steps} | skipped: loss {loss}, gradient norm {norm}")
        if state.skipped >= config.max_skipped:  # more than that where a resumed run has a lower limit
            log.write("event", event="gave up", step=state.step)
            log.say(f"gave up: {state.skipped} steps in a row without a finite loss; the last checkpoint is kept")
            return True
        state.target_reached = config.target_loss is not None and loss < config.target_loss
        if state.step == 1 or due(state, config.log_interval) or finished(state, plan):
            log_step(run, state.step, numbers, seconds / (state.step - logged_step))
            logged_step, seconds = state.step, 0.0


def warn_of_long_steps(log: Metrics, seconds: float) -> None:
    """Say in time that torchrun would kill this run before it can stop in order."""
    if under_torchrun() and seconds > 20:  # saving takes time too
        log.say(
            f"a step takes {seconds:.0f} s, but torchrun kills what has not ended 30 s after a signal: start it with "
            f"torchrun --shutdown-timeout={120 + 2 * round(seconds)}, or a stopped run is not saved"
        )


def train_step(run: Run, step: int, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, float, bool]:
    """One optimizer step: (mean loss of the whole batch, gradient norm before clipping, learning rate, whether any
    process was asked to stop). Without a finite loss and norm, no weight changes."""
    config, plan, world, scaler = run.config, run.plan, run.world, run.scaler
    if run.model.config.dropout:  # seeded by the step, so that there is no generator state to save or disturb
        seed = np.random.SeedSequence([config.seed, step, world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
    totals = torch.zeros(2, device=world.device)  # the mean loss; how many processes were asked to stop
    for micro_batch in range(plan.micro_batches):
        x, y = next(batches)
        world.sync_gradients(run.wrapped, on=micro_batch == plan.micro_batches - 1)
        with run.autocast:
            loss = run.wrapped(x, y) / plan.micro_batches
        totals[0] += loss.detach()
        scaler.scale(loss).backward()
    totals[1] += bool(run.stop)
    world.mean_(totals)
    for optimizer in run.optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    norm, (loss, stop) = norm.item(), totals.tolist()  # the step's one wait for the device
    lr = learning_rate(
        step, config.schedule, config.learning_rate, config.min_lr, plan.warmup_steps, plan.max_steps,
        config.decay_fraction,
    )  # fmt: skip
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(loss) and math.isfinite(norm):  # the same on all ranks; a NaN would spoil the weights for good
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return loss, norm, lr, stop > 0


def evaluate_all(run: Run, state: State) -> tuple[float | None, bool]:
    """Validation, HellaSwag and a sample, each where it is due: (val loss, whether a signal broke it off)."""
    config, plan, log, world = run.config, run.plan, run.log, run.world
    val_loss, here = None, f"step {state.step:>5}/{plan.max_steps}"
    if due(state, config.val_interval, plan):
        val_loss = evaluate(run)
        if val_loss is None:  # a resumed run evaluates again
            return None, True
        state.target_reached |= config.target_val_loss is not None and val_loss < config.target_val_loss
        bpb = bits_per_byte(val_loss, run.meta)
        per_word = word_loss(val_loss, run.meta) if config.val_tokens // config.seq_len >= len(run.val) else None
        log.write("val", step=state.step, val_loss=val_loss, word_loss=per_word)
        log.say(
            f"{here} | val loss {val_loss:.4f}"
            + (f" | word loss {per_word:.4f}" if per_word else "")
            + (f" | {bpb:.4f} bits per byte" if bpb else "")
        )
    if run.examples and due(state, config.hellaswag_interval, plan):
        import hellaswag

        max_tokens = config.batch_size * config.seq_len
        score = hellaswag.score(run.model, run.examples, max_tokens, world, run.autocast, stop=run.stop)
        if score is None:
            return None, True
        acc, acc_norm, n = score
        log.write("hellaswag", step=state.step, acc=acc, acc_norm=acc_norm, n=n)
        log.say(f"{here} | HellaSwag acc {acc:.4f}, acc_norm {acc_norm:.4f}, of {n:,}")
    if due(state, config.sample_interval, plan):
        text, problem = sample(run) if world.is_main else ("", None)
        if world.sum([bool(run.stop)])[0]:
            return None, True
        if problem:
            log.write("event", event="no sample", step=state.step, problem=problem)
            log.say(f"{here} | no sample: {problem}")
        else:
            log.write("sample", step=state.step, text=text)
            log.say(f"--- sample\n{text}\n---")
    return val_loss, False


@torch.no_grad()
def evaluate(run: Run) -> float | None:
    """Mean loss of the first val_tokens in nats per token, over all ranks; None where a signal came first, on any."""
    config, world = run.config, run.world
    run.model.eval()
    losses, counts = [], []
    for x, y in val_batches(run.val, config.val_tokens, config.batch_size, world.rank, world.size, world.device):
        if run.stop:
            break
        forward = run.model if len(x) == config.batch_size else run.model.forward  # no compiling for a ragged last one
        with run.autocast:
            losses.append(forward(x, y))
        counts.append(y.numel())
    run.model.train()
    losses = [loss.item() for loss in losses]  # one wait at the end
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    total, tokens, stop = world.sum([total, sum(counts), bool(run.stop)])
    return None if stop else total / tokens


def sample(run: Run) -> tuple[str, str | None]:
    """200 tokens behind sample_start, always the same ones of the same weights, fewer where a signal comes; and what
    went wrong, if something did."""
    from sample import complete  # tokenizers take a while to import
    from tokenizer import get_tokenizer

    run.model.eval()
    text, problem = run.config.sample_start, None
    try:
        for [piece] in complete(run.model, get_tokenizer(run.identity["tokenizer"]), text, 1, 200):
            text += piece
            if run.stop:
                break
    except FloatingPointError as error:  # the weights have become useless, which the loss shows too
        problem = str(error)
    run.model.train()
    return text, problem


def save(run: Run, state: State, val_loss: float | None, last: bool) -> int | None:
    """Write this step's checkpoint; its step, or None where the disk did not take it and the run goes on all the same.

    `val_loss` (None: not known) may make it the best. Raises UserError where the last one is not saved.
    """
    config, log, earlier_best = run.config, run.log, state.best
    if val_loss is not None and val_loss < state.best["val_loss"]:
        state.best = {"step": state.step, "val_loss": val_loss}
    contents = {
        "model": run.model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "scaler": run.scaler.state_dict(), "data": run.guard.record, **asdict(state), **run.identity,
    }  # fmt: skip

    def write() -> str | None:
        try:
            log.sync()  # what led to a checkpoint is on disk before it
            keep = 0 if state.skipped else config.keep_checkpoints  # a run that fails pushes no good one out
            log.say(f"saved {checkpoint.save(contents, config.out_dir, keep, state.best['step'])}")
        except OSError as error:
            return error.strerror or str(error)

    problem = run.world.agree(write)
    if problem is None:
        return state.step
    if last:
        raise UserError(
            f"{config.out_dir}: step {state.step} is not saved: {problem}; mend that, and go on with --resume=True"
        )
    log.write("event", event="not saved", step=state.step, problem=problem)
    log.say(f"NOT SAVED at step {state.step}: {problem}; older checkpoints are untouched, and the run goes on")
    state.best = earlier_best
    return None


def finished(state: State, plan: Plan) -> bool:
    return state.step >= plan.max_steps or state.target_reached


def due(state: State, interval: int, plan: Plan | None = None) -> bool:
    """Whether something happens at this step: every `interval` steps (0: never), and with a plan at the end too."""
    return interval > 0 and (state.step % interval == 0 or (plan is not None and finished(state, plan)))


# ---------------------------------------------------------------------------------------------------------------------
# Before the first step


def starting_point(
    saved: dict, config: TrainConfig, gpt_config: GPTConfig, given: Collection[str], meta: dict
) -> tuple[GPTConfig, dict | None]:
    """The architecture, and the weights to start with (None: new ones)."""
    if "model" in saved:
        return gpt_config, saved["model"]
    if config.init_from != "scratch":
        from huggingface import starting_weights  # tokenizers take a while to import

        given = vars(gpt_config) if saved else given  # the options of a run that begins again were all given
        return starting_weights(config.init_from, gpt_config, given, config.data_dir, meta)
    if meta and "vocab_size" not in given and not saved:
        gpt_config = replace(gpt_config, vocab_size=meta["vocab_size"])
    return gpt_config, None


def fill_in(config: TrainConfig, gpt_config: GPTConfig, world: World) -> TrainConfig:
    """The config with the sizes that it leaves open."""
    T = config.seq_len or gpt_config.block_size
    return replace(config, seq_len=T, total_batch_size=config.total_batch_size or config.batch_size * T * world.size)


def check(config: TrainConfig, gpt_config: GPTConfig, meta: dict, tokenizer: str | None, world: World) -> None:
    """Raises UserError where options, model, data and machine do not go together."""
    T, one_round = config.seq_len, config.batch_size * config.seq_len * world.size
    if gpt_config.vocab_size < meta.get("vocab_size", 0):
        raise UserError(f"vocab_size = {gpt_config.vocab_size}, but {config.data_dir} has {meta['vocab_size']} ids")
    if gpt_config.block_size < T:
        raise UserError(f"seq_len = {T} is more than block_size = {gpt_config.block_size}")
    if config.val_interval and config.val_tokens < T:
        raise UserError(f"val_tokens = {config.val_tokens} is less than one window of seq_len = {T}")
    if config.total_batch_size % one_round:
        parts = f"batch_size {config.batch_size} x seq_len {T} x {world.size} processes"
        raise UserError(f"total_batch_size = {config.total_batch_size} is not a multiple of {parts}")
    for name in ("sample_interval", "hellaswag_interval"):
        if getattr(config, name) and not tokenizer:
            raise UserError(f"{config.data_dir}: its tokenizer is not known, which {name} needs; use --{name}=0")
    compilers = (
        ("g++", "clang++", "c++") if world.device.type == "cpu" else ("gcc", "clang", "cc")
    )  # Triton's, for CUDA
    if config.compile and not any(map(shutil.which, compilers)):
        raise UserError("compile = True needs a C++ compiler; install g++, or use --compile=False")


def open_data(config: TrainConfig, gpt_config: GPTConfig, meta: dict) -> tuple[Windows, Windows | None]:
    """The windows of both splits; of val only where it is evaluated."""
    vocab_size = meta.get("vocab_size", gpt_config.vocab_size)
    train_data = Windows(config.data_dir, "train", config.seq_len, vocab_size)
    return train_data, Windows(config.data_dir, "val", config.seq_len, vocab_size) if config.val_interval else None


def make_plan(config: TrainConfig, num_windows: int, world: World) -> Plan:
    """The run's sizes. It ends at max_steps or after its epochs, whichever comes sooner; with neither, after one."""
    rows = config.total_batch_size // config.seq_len
    epochs = config.epochs if config.epochs or config.max_steps else 1
    ends = [config.max_steps] if config.max_steps else []
    if epochs:
        ends.append(math.floor(epochs * num_windows / rows))
    if min(ends) < 1:
        raise UserError(f"{config.data_dir}: {epochs} epochs of {num_windows} windows are less than one step of {rows}")
    part = config.warmup_fraction
    warmup_steps = config.warmup_steps if part is None else round(part * min(ends))
    return Plan(rows, rows // (config.batch_size * world.size), warmup_steps, min(ends))


def load_hellaswag(
    config: TrainConfig, tokenizer: str | None, block_size: int, world: World
) -> tuple[list, str | None]:
    """HellaSwag's examples where they are wanted; and why there are none, where they cannot be had."""
    if not config.hellaswag_interval:
        return [], None
    import hellaswag  # with tokenizers, which take a while to import
    from tokenizer import get_tokenizer

    try:
        return world.agree(lambda: hellaswag.load(config.hellaswag_data, get_tokenizer(tokenizer), block_size)), None
    except UserError as error:
        if config.hellaswag_data:
            raise
        return [], f"no HellaSwag in this run: {error}"  # a machine without a network can train all the same


def make_run(
    config: TrainConfig, gpt_config: GPTConfig, plan: Plan, world: World, log: Metrics, saved: dict,
    weights: dict | None, val: Windows | None, examples: list, meta: dict, guard: DataGuard, identity: dict,
) -> Run:  # fmt: skip
    """The model and its optimizers, new or as they were saved, compiled and wrapped for this number of processes."""
    make_deterministic(world.device, config.deterministic)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    model = GPT(gpt_config)
    if weights:
        checkpoint.load_weights(model, weights, saved.get("path", config.init_from))
    model.to(world.device)
    dtype = pick_dtype(config.dtype, world.device)
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(world.device.type, dtype)
    optimizers = make_optimizers(
        model, config.optimizer, config.learning_rate, config.weight_decay, (config.beta1, config.beta2)
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    if "optimizers" in saved:
        checkpoint.restore(saved, model, optimizers, scaler)
    if config.compile:
        model.compile()
    example = torch.zeros(config.batch_size, config.seq_len + 1, dtype=torch.int64, device=world.device)
    with autocast:  # two tensors laid out as a real batch: for others it would be compiled once more
        wrapped = world.wrap(model, example[:, :-1], example[:, 1:], warm_up=config.compile)
    return Run(
        config, plan, world, log, model, wrapped, optimizers, scaler, autocast, val, examples, meta, guard, identity,
        stop=StopRequest(),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What a run says of itself


def announce(
    run: Run, state: State, path: Path | None, changed: dict, num_windows: int, no_hellaswag: str | None
) -> None:
    """The first record of a run, or of its going on, and the first lines on the terminal."""
    config, plan, world, log, model = run.config, run.plan, run.world, run.log, run.model
    about = machine(world, pick_dtype(config.dtype, world.device))
    if path:
        log.write("event", event="resume", step=state.step, checkpoint=path.name, changed=changed, **about)
    else:
        configs = {name: run.identity[name] for name in ("config", "gpt_config")}
        data = {name: value for name, value in run.meta.items() if name != "shards"}
        log.write("run", **configs, parameters=model.num_params(), max_steps=plan.max_steps, data=data, **about)
    epochs = plan.max_steps * plan.rows / num_windows
    log.say(f"model: {model.num_params():,} parameters, on {world.size} x {about['hardware']} in {about['dtype']}")
    log.say(f"data: {num_windows:,} windows of {config.seq_len} tokens in {config.data_dir}; {epochs:.2f} epochs")
    parts = f"{plan.micro_batches} micro-batches x {world.size} processes x {config.batch_size}"
    log.say(f"step: {plan.rows:,} windows = {parts}")
    log.say(f"{f'resuming at step {state.step} in' if path else 'writing to'} {config.out_dir}")
    if no_hellaswag:
        log.write("event", event="no hellaswag", step=state.step, problem=no_hellaswag)
        log.say(no_hellaswag)
    for name, (before, after) in changed.items():
        log.say(f"changed: {name} = {after}, was {before}")


def log_step(run: Run, step: int, numbers: tuple, dt: float) -> None:
    """The train record and line of a step; dt is the mean seconds of the steps since the last."""
    config, plan, world = run.config, run.plan, run.world
    loss, norm, lr, _ = numbers
    tokens_per_sec = config.total_batch_size / dt
    _, peak_flops = hardware(world.device)
    mfu = run.model.flops_per_token(config.seq_len) * tokens_per_sec / (world.size * peak_flops) if peak_flops else None
    run.log.write(
        "train", step=step, loss=loss, lr=lr, grad_norm=norm, tokens=step * config.total_batch_size,
        tokens_per_sec=tokens_per_sec, dt=dt, mfu=mfu,
    )  # fmt: skip
    run.log.say(
        f"step {step:>5}/{plan.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.4f} | {dt * 1e3:.1f} ms | "
        f"{tokens_per_sec:,.0f} tok/s | {f'mfu {mfu:.1%} | ' if mfu else ''}eta {clock(dt * (plan.max_steps - step))}"
    )


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


if __name__ == "__main__":
    cli(main)
