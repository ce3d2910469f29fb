"""Train a GPT: on a laptop, one GPU, or many.

    python train_gpt2.py config/quickstart.py
    torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_124m.py --out_dir=out/mine

The run goes to out_dir: metrics.jsonl and ckpt_<step>.pt. A stopped run goes on with --resume=True.
"""

import gc
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback
    gc.disable()  # nothing becomes garbage before the loop, and looking for it takes a tenth of the time to get there

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import checkpoint
from configurator import PathStr, UserError, at_least, cli, configure, under_torchrun
from dataloader import train_batches, val_batches
from device import autocast, hardware, is_bfloat16_cpu, machine, make_deterministic, peak_memory, pick_dtype
from distributed import StopRequest, World
from metrics import Metrics, bits_per_byte, clock, word_loss
from model import GPT, GPTConfig
from optim import Average, OptimConfig, learning_rate, make_optimizers
from start import Plan, Start, advice_on_memory, compiles, load_hellaswag, look


@dataclass(frozen=True)
class TrainConfig(OptimConfig):
    """A training run, with its optimizer. The defaults pretrain GPT-2 124M on FineWeb-Edu."""

    # files
    out_dir: PathStr = "out/gpt2_124m"  # where the run goes
    data_dir: PathStr = "data/fineweb_edu10B"  # token shards, made by fineweb.py
    init_from: PathStr = "scratch"  # "scratch", or weights: a checkpoint, run or Hugging Face folder, gpt2..gpt2-xl
    resume: bool = False  # go on from the newest checkpoint in out_dir, with its options; without one, start
    # machine
    seed: int = 1337  # of the initial weights, the data order and dropout
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the matrix products; weights are float32
    compile: bool | None = None  # torch.compile: faster steps after a minute of compiling; None: on NVIDIA GPUs
    cudnn_attention: bool = False  # on NVIDIA's H100 and newer, without dropout: cuDNN's attention, not flash
    parallel: Literal["ddp", "fsdp"] = "ddp"  # each process has the whole model, or a part (fsdp: less memory, slower)
    activation_checkpointing: bool = False  # keep a block's input only: less memory, a quarter more computing
    chunked_loss: bool = False  # never hold the logits of all positions: less memory
    deterministic: bool = False  # the same bits in every run, on GPUs too (slower); CPU runs always have them
    # batch
    seq_len: int | None = None  # tokens in a training sequence; None: block_size
    batch_size: int = 16  # sequences in a micro-batch, on each process
    total_batch_size: int | None = 524288  # tokens in a step, accumulated over rounds of micro-batches; None: one round
    # length
    max_steps: int | None = None  # optimizer steps
    epochs: float | None = None  # passes over the data, unless max_steps comes sooner; with neither, one pass
    max_hours: float | None = None  # end then, if that is sooner still: hours of all lives of a resumed run together
    target_loss: float | None = None  # stop after a step whose train loss is below this
    target_val_loss: float | None = None  # stop at an evaluation whose val loss is below this
    patience: int | None = None  # stop when the val loss has had no new low for this many val_intervals
    # what else happens; an interval of 0 means never
    max_skipped: int = 20  # give up (exit status 3) after this many steps in a row without finite loss and gradient
    val_interval: int = 250  # steps between evaluations
    val_tokens: int = 10485760  # evaluate on this many tokens, the first of the val split
    hellaswag_interval: int = 0  # steps between evaluations on HellaSwag, 10,042 examples
    hellaswag_data: PathStr | None = None  # a .jsonl of examples; None: the validation set, downloaded once
    sample_interval: int = 0  # steps between samples
    sample_start: str = ""  # what samples continue; empty: the start of a document
    sample_num: int = 1  # samples each time
    sample_tokens: int = 200  # of each, unless it ends itself with <|endoftext|>
    sample_temperature: float = 0.8  # 0: always the likeliest token; 1: the model's own distribution
    sample_top_k: int | None = 200  # draw from this many likeliest tokens; None: from all
    checkpoint_interval: int = 1000  # steps between checkpoints; the last step always has one
    keep_checkpoints: int = 3  # the newest ones, and the best; 0: all
    log_interval: int = 10  # steps between log lines and train records
    log_to: Literal["tensorboard", "wandb"] | None = None  # where metrics go beside metrics.jsonl; wandb also offline
    report: bool = True  # write report.md and its plots at the end, as report.py does

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "batch_size", "total_batch_size", "max_skipped", "log_interval", "seq_len", "max_steps")
        at_least(self, 1, "patience", "sample_num", "sample_tokens", "sample_top_k")
        at_least(
            self, 0, "seed", "val_interval", "hellaswag_interval", "sample_interval", "checkpoint_interval",
            "keep_checkpoints", "val_tokens",
        )  # fmt: skip
        for name in ("out_dir", "data_dir", "init_from"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        for name in ("epochs", "max_hours"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 2**31:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must be more than 0 and below 2^31")
        if self.sample_temperature and self.sample_temperature < 1e-6:  # logits over less leave what float32 holds
            raise ValueError(f"sample_temperature = {self.sample_temperature}, but it must be 0 or at least 1e-6")
        if self.parallel == "fsdp" and self.optimizer == "adafactor":
            raise ValueError("optimizer = 'adafactor' needs whole matrices; use --parallel=ddp, or adamw or muon")
        for name in ("target_val_loss", "patience"):
            if getattr(self, name) is not None and not self.val_interval:
                raise ValueError(f"{name} is looked at in evaluations, but val_interval = 0 means there are none")


# Options that may differ when a run is resumed: where, on what, how long, how often. All others make another run.
MAY_CHANGE = {
    "out_dir", "data_dir", "resume", "device", "dtype", "compile", "cudnn_attention", "deterministic", "parallel",
    "activation_checkpointing", "chunked_loss", "batch_size", "max_steps", "epochs", "max_hours", "target_loss",
    "target_val_loss", "patience", "max_skipped", "val_interval", "hellaswag_interval", "hellaswag_data",
    "sample_interval", "sample_start", "sample_num", "sample_tokens", "sample_temperature", "sample_top_k",
    "checkpoint_interval", "keep_checkpoints", "log_interval", "log_to", "report",
}  # fmt: skip


@dataclass
class State:
    """What a run remembers from step to step, beside its weights and optimizers. A checkpoint holds all of it."""

    step: int = 0  # optimizer steps done
    skipped: int = 0  # the last steps in a row that had no finite loss and gradient
    best: dict = field(default_factory=lambda: {"step": None, "val_loss": math.inf})  # of the saved steps
    lowest: dict = field(default_factory=lambda: {"step": 0, "val_loss": math.inf})  # of all evaluations
    target_reached: bool = False
    plateau: bool = False  # the patience is at its end
    loss_sum: float = 0.0  # of the finite losses since the last train record
    loss_count: int = 0  # how many they are
    mean_loss: float | None = None  # what that record said
    seconds: float = 0.0  # since the launch; those of a resumed run's earlier lives count
    stopped: bool = False  # by a signal, before this step's evaluations were done


@dataclass(frozen=True)
class Run:
    """What main builds once and every step uses."""

    start: Start  # options, data and sizes
    world: World
    log: Metrics
    model: GPT  # for evaluations and checkpoints
    wrapped: nn.Module  # the same model, but its backward averages gradients over all processes
    optimizers: list[torch.optim.Optimizer]
    average: Average | None  # of the weights
    scaler: torch.amp.GradScaler
    autocast: contextlib.AbstractContextManager
    examples: list  # of HellaSwag
    stop: StopRequest
    launched: float  # by time.perf_counter; a resumed run's earlier lives moved it back


class Result(NamedTuple):
    """Of one optimizer step."""

    loss: float  # mean of the whole batch
    norm: float  # of the gradient, before clipping
    lr: float
    stop: bool  # whether any process was asked to stop
    seconds: float  # since the launch

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def main() -> int:
    config, gpt_config, sources = configure(TrainConfig, GPTConfig)
    world = World(device=None)  # a resumed run has its own device
    log = Metrics(config.out_dir, world.is_main)

    # Look before writing: a mistake in the options, the data or the machine ends here.
    start = look(config, gpt_config, sources, MAY_CHANGE, world, log)
    state = State(**{name: start.saved[name] for name in vars(State()) if name in start.saved})
    if start.changed.keys() & {"target_loss", "target_val_loss"}:
        state.target_reached = False
    if "patience" in start.changed:
        state.plateau = False
    if start.path and finished(state, start.plan) and not state.stopped:
        log.say(f"{start.config.out_dir}: this run is done, at step {state.step}")
        world.close()
        return 0
    examples, no_hellaswag = load_hellaswag(start.config, start.tokenizer, start.gpt_config.block_size, world)

    # Build, then begin the record of the run.
    with advice_on_memory(start.config):
        run = build(start, world, log, examples)
    start.release()
    batches = train_batches(
        start.train_data, start.config.seed, start.plan.rows, start.config.batch_size,
        world.rank, world.size, world.device, state.step + 1,
    )  # fmt: skip
    again = {"sample"}  # of this step's records; a measurement that is not made again is kept
    again |= {
        kind for kind in ("val", "hellaswag") if due(state, getattr(start.config, f"{kind}_interval"), start.plan)
    }
    world.on_main(lambda: log.begin(state.step if start.path else None, start.config.log_to, again))
    announce(run, state, no_hellaswag)
    gc.enable()
    with advice_on_memory(start.config, begun=True):
        status = train(run, state, batches)
    batches.close()
    if world.is_main and not state.stopped:  # who stops a run may not wait
        conclude(start.config, log)
    log.close()
    world.close()
    if status == 0 and state.stopped:
        log.say(f"stopped by a signal at step {state.step}; the same command with --resume=True goes on")
    elif status == 0:
        if state.best["step"] not in (None, state.step):
            lowest = f"{state.best['val_loss']:.4f} at step {state.best['step']}"
            log.say(f"lowest val loss of its checkpoints: {lowest}; --best=True takes that one, in place of the last")
        log.say(f"done: {start.config.out_dir} holds the checkpoint and metrics.jsonl; next:")
        log.say(f"  python sample.py --model={start.config.out_dir}\n  python report.py {start.config.out_dir}")
    return status


def train(run: Run, state: State, batches: Iterator[tuple[Tensor, Tensor]]) -> int:
    """Steps until the run is finished, a signal comes, or too many are skipped in a row; the exit status."""
    config, plan, log = run.start.config, run.start.plan, run.log
    saved_step = state.step if run.start.path and not state.stopped else None
    first_step, logged_step, seconds = state.step + 1, state.step, 0.0  # seconds of training since logged_step
    stopping, result = False, None
    while True:
        # Between two steps: evaluations, a checkpoint, or the end.
        val_loss = None
        if not stopping and evaluates(run, state):
            with averaged(run):
                val_loss, stopping = evaluate_all(run, state)
        state.stopped, done = stopping, finished(state, plan)
        if done and state.step > logged_step:
            log_step(run, state, result, seconds / (state.step - logged_step))
        regular = done or (state.step > 0 and due(state, config.checkpoint_interval))
        saving = state.step != saved_step and (regular or stopping)
        if saving:
            run.world.on_main(run.start.guard.check)  # never save what was trained on data that changed
        if done or stopping:
            about = dict(signal=run.stop.reason) if stopping else summary(run, state, val_loss)
            log.write("event", event="stopped" if stopping else "done", step=state.step, **about)
        if saving:
            saved_step = save(run, state, val_loss if regular else None, last=done or stopping) or saved_step
        if done or stopping:
            return 0

        # One step: the gradient of the whole batch, and an update unless it is not finite.
        began = time.perf_counter()
        state.step += 1
        result = train_step(run, state.step, batches)
        stopping, state.seconds = result.stop, result.seconds
        seconds += time.perf_counter() - began
        if run.world.is_main and state.step == first_step:
            run.start.guard.start_reading()  # only now, so that the first step waits for nothing
        if state.step == first_step + 1:  # the first one compiles
            warn_of_long_steps(log, time.perf_counter() - began)
        if math.isfinite(result.loss):
            state.loss_sum, state.loss_count = state.loss_sum + result.loss, state.loss_count + 1
        state.skipped = 0 if result.finite else state.skipped + 1
        if not result.finite:
            log.write("event", event="skipped step", step=state.step, loss=result.loss, grad_norm=result.norm)
            log.say(f"step {state.step:>5}/{plan.max_steps} | skipped: loss {result.loss}, norm {result.norm}")
        if state.skipped >= config.max_skipped:
            log.write("event", event="gave up", step=state.step)
            log.say(f"gave up: {state.skipped} steps in a row without a finite loss; the last checkpoint is kept")
            return 3
        state.target_reached = config.target_loss is not None and result.loss < config.target_loss
        if state.step == 1 or due(state, config.log_interval) or finished(state, plan):
            log_step(run, state, result, seconds / (state.step - logged_step))
            logged_step, seconds = state.step, 0.0


def train_step(run: Run, step: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Result:
    """One optimizer step. Without a finite loss and gradient no weight changes, on any process."""
    config, plan, world, scaler = run.start.config, run.start.plan, run.world, run.scaler
    if run.model.config.dropout:  # seeded by the step: no generator state to save or disturb
        seed = np.random.SeedSequence([config.seed, step, world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
    totals = torch.zeros(3, device=world.device)  # to average over all processes: loss, stop, seconds
    for micro_batch in range(plan.micro_batches):
        x, y = next(batches)
        world.sync_gradients(run.wrapped, on=micro_batch == plan.micro_batches - 1)
        with run.autocast:
            loss = run.wrapped(x, y) / plan.micro_batches
        totals[0] += loss.detach()
        scaler.scale(loss).backward()
    totals[1] += bool(run.stop)
    totals[2] += time.perf_counter() - run.launched
    world.mean_(totals)
    for optimizer in run.optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    norm, (loss, stop, seconds) = world.full(norm).item(), totals.tolist()  # the step's one wait for the device
    lr = learning_rate(
        step, config.schedule, config.learning_rate, config.min_lr, plan.warmup_steps, plan.max_steps,
        config.decay_fraction,
    )  # fmt: skip
    result = Result(loss, norm, lr, stop > 0, seconds)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        if result.finite:  # the same on all processes; a NaN would spoil the weights for good
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    if run.average and result.finite:
        run.average.update(step)
    return result


@contextlib.contextmanager
def averaged(run: Run) -> Iterator[None]:
    """Inside, the model has the weights that are judged: their average, where the run keeps one."""
    if run.average is None:
        yield
        return
    run.average.swap()
    try:
        yield
    finally:
        run.average.swap()
        run.world.reshard()


def evaluates(run: Run, state: State) -> bool:
    """Whether anything is to be evaluated at this step."""
    config = run.start.config
    intervals = config.val_interval, config.hellaswag_interval, config.sample_interval
    return any(due(state, interval, run.start.plan) for interval in intervals)


def evaluate_all(run: Run, state: State) -> tuple[float | None, bool]:
    """Validation, HellaSwag and a sample, each where it is due: (val loss, whether a signal broke it off)."""
    config, plan, log, world = run.start.config, run.start.plan, run.log, run.world
    meta, val_data = run.start.meta, run.start.val_data
    val_loss, here = None, f"step {state.step:>5}/{plan.max_steps}"
    if due(state, config.val_interval, plan):
        val_loss = evaluate(run)
        if val_loss is None:  # a resumed run evaluates again
            return None, True
        state.target_reached |= config.target_val_loss is not None and val_loss < config.target_val_loss
        if val_loss < state.lowest["val_loss"]:
            state.lowest = {"step": state.step, "val_loss": val_loss}
        steps = (config.patience or math.inf) * config.val_interval  # not a count: a resumed run evaluates again
        state.plateau = state.step - state.lowest["step"] >= steps
        bpb = bits_per_byte(val_loss, meta)
        per_word = word_loss(val_loss, meta) if val_windows(run.start) == len(val_data) else None
        log.write("val", step=state.step, val_loss=val_loss, word_loss=per_word)
        log.say(
            f"{here} | val loss {val_loss:.4f}"
            + (f" | word loss {per_word:.4f}" if per_word else "")
            + (f" | {bpb:.4f} bits per byte" if bpb else "")
        )
    if run.examples and due(state, config.hellaswag_interval, plan):
        import hellaswag

        max_tokens = config.batch_size * config.seq_len
        with world.unsharded():
            score = hellaswag.score(run.model, run.examples, max_tokens, world, run.autocast, stop=run.stop)
        if score is None:
            return None, True
        acc, acc_norm, n = score
        log.write("hellaswag", step=state.step, acc=acc, acc_norm=acc_norm, n=n)
        log.say(f"{here} | HellaSwag acc {acc:.4f}, acc_norm {acc_norm:.4f}, of {n:,}")
    if due(state, config.sample_interval, plan):
        texts, problem = sample(run)
        if world.any(run.stop):
            return None, True
        if problem:
            log.write("event", event="no sample", step=state.step, problem=problem)
            log.say(f"{here} | no sample: {problem}")
        for text in texts if not problem else ():
            log.write("sample", step=state.step, text=text)
            log.say(f"--- sample\n{text}\n---")
    return val_loss, False


@torch.no_grad()
def evaluate(run: Run) -> float | None:
    """Mean loss of the first val_tokens in nats per token, over all ranks; None if a signal breaks it off.

    All ranks take the same number of forward passes, so that a sharded model could take them too.
    """
    config, world = run.start.config, run.world
    run.model.eval()
    losses, counts, stopped = [], [], False
    batches = val_batches(
        run.start.val_data, config.val_tokens, config.batch_size, world.rank, world.size, world.device
    )
    rounds = math.ceil(val_windows(run.start) / (config.batch_size * world.size))
    off = None if world.is_main else True  # None: where stderr is no terminal
    for x, y in tqdm(batches, "evaluating", rounds, unit="batch", delay=3, leave=False, disable=off):
        if stopped := world.any(run.stop):
            break
        counts.append(y.numel())
        missing = (0, 0, 0, config.batch_size - len(x))  # a smaller batch would be compiled for its own shape
        with run.autocast:
            losses.append(run.model(F.pad(x, missing), F.pad(y, missing, value=-1)))
    run.model.train()
    losses = [loss.item() for loss in losses]  # one wait at the end
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count)
    total, tokens = world.sum([total, sum(counts)])
    return None if stopped else total / tokens


def val_windows(start: Start) -> int:
    """How many windows an evaluation takes, on all ranks together."""
    return min(start.config.val_tokens // start.config.seq_len, len(start.val_data))


def sample(run: Run) -> tuple[list[str], str | None]:
    """Texts behind sample_start, always the same ones of the same weights, shorter if a signal comes; and what went
    wrong, if anything. All ranks sample, and get the same texts."""
    from sample import complete  # tokenizers take a while to import
    from tokenizer import get_tokenizer

    run.model.eval()
    config, problem = run.start.config, None
    texts = [config.sample_start] * config.sample_num
    new = complete(
        run.model, get_tokenizer(run.start.tokenizer), config.sample_start, config.sample_num, config.sample_tokens,
        temperature=config.sample_temperature, top_k=config.sample_top_k,
    )  # fmt: skip
    try:
        # Gathered weights are in the products' dtype, which only autocast mixes with others.
        with run.world.unsharded(), run.autocast if run.world.sharded else contextlib.nullcontext():
            for pieces in new:
                texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
                if run.world.any(run.stop):
                    break
    except FloatingPointError as error:  # the weights have become useless, which the loss shows too
        problem = str(error)
    run.model.train()
    return texts, problem


def save(run: Run, state: State, val_loss: float | None, last: bool) -> int | None:
    """Write this step's checkpoint; its step, or None if the disk did not take it: then the run goes on.

    `val_loss` (None: unknown) may make it the best. Raises UserError if the last checkpoint is not saved.
    """
    config, log, earlier_best = run.start.config, run.log, state.best
    if val_loss is not None and val_loss < state.best["val_loss"]:
        state.best = {"step": state.step, "val_loss": val_loss}
    weights, average = run.model.state_dict(), run.average and run.average.state_dict()
    contents = {
        "model": run.world.whole(average or weights),
        "training_weights": run.world.whole(weights if average else None),
        "optimizers": run.world.whole([optimizer.state_dict() for optimizer in run.optimizers]),
        "scaler": run.scaler.state_dict(), "data": run.start.guard.record, **asdict(state), **identity(run.start),
    }  # fmt: skip

    def write() -> str | None:
        try:
            log.sync()  # what led to a checkpoint is on disk before it
            keep = 0 if state.skipped else config.keep_checkpoints  # a run that fails pushes no good one out
            log.say(f"saved {checkpoint.save(contents, config.out_dir, keep, state.best['step'])}")
        except OSError as error:
            return error.strerror or str(error)

    problem = run.world.on_main(write)
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
    early = state.target_reached or state.plateau or state.seconds >= plan.max_seconds
    return early or state.step >= plan.max_steps


def due(state: State, interval: int, plan: Plan | None = None) -> bool:
    """Whether something happens at this step: every `interval` steps (0: never), and with a plan at the end too."""
    return interval > 0 and (state.step % interval == 0 or (plan is not None and finished(state, plan)))


def identity(start: Start) -> dict:
    """What every checkpoint says of its run."""
    return dict(config=asdict(start.config), gpt_config=asdict(start.gpt_config), tokenizer=start.tokenizer)


def build(start: Start, world: World, log: Metrics, examples: list) -> Run:
    """The model and its optimizers, new or from the checkpoint, compiled and wrapped for this number of processes."""
    config, gpt_config = start.config, start.gpt_config
    make_deterministic(world.device, config.deterministic)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    model = GPT(gpt_config)
    if start.weights:
        checkpoint.load_weights(model, start.weights, start.path or config.init_from)
    model.activation_checkpointing, model.chunked_loss = config.activation_checkpointing, config.chunked_loss
    dtype = pick_dtype(config.dtype, world.device)
    if config.parallel == "fsdp":
        world.shard(model, model.h, dtype)
    elif config.parallel != "ddp":
        raise NotImplementedError(f"parallel = {config.parallel!r}")
    model.to(world.device)
    in_dtype = autocast(dtype, world.device)
    optimizers = make_optimizers(model, config, world.spread)
    judged = start.saved["model"] if start.path else None
    average = Average(model, config.average, judged) if config.average else None
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    if start.path:
        checkpoint.restore(start.saved, model, optimizers, scaler)
    torch.backends.cuda.enable_cudnn_sdp(config.cudnn_attention and not gpt_config.dropout)  # cuDNN rounds dropout
    compiled = compiles(config, world.device)
    if compiled and world.sharded:  # blocks are gathered between compiled parts
        for block in model.h:
            block.compile()
        model.loss = torch.compile(model.loss)
    elif compiled:
        model.compile()
    example = torch.zeros((2, config.batch_size, config.seq_len), dtype=torch.int64, device=world.device)  # x and y
    with in_dtype:
        wrapped = world.wrap(model, *example, warm_up=compiled)
    launched = time.perf_counter() - start.saved.get("seconds", 0.0)
    stop = StopRequest()
    return Run(start, world, log, model, wrapped, optimizers, average, scaler, in_dtype, examples, stop, launched)


# ---------------------------------------------------------------------------------------------------------------------
# What a run says of itself


def announce(run: Run, state: State, no_hellaswag: str | None) -> None:
    """The first record of a run, or of its going on, and the first lines on the terminal."""
    start, world, log = run.start, run.world, run.log
    config, plan, num_windows = start.config, start.plan, len(start.train_data)
    parameters, about = run.model.num_params(), machine(world.device, pick_dtype(config.dtype, world.device))
    about |= dict(world_size=world.size, launch=world.launch)
    if start.path:
        log.write("event", event="resume", step=state.step, checkpoint=start.path.name, changed=start.changed, **about)
    else:
        configs = dict(config=asdict(config), gpt_config=asdict(start.gpt_config))
        data = {name: value for name, value in start.meta.items() if name != "shards"}
        log.write("run", **configs, parameters=parameters, max_steps=plan.max_steps, data=data, **about)
    epochs = plan.max_steps * plan.rows / num_windows
    faster = " (--dtype=bfloat16 is faster here)" if config.dtype == "auto" and is_bfloat16_cpu(world.device) else ""
    log.say(f"model: {parameters:,} parameters, on {world.size} x {about['hardware']} in {about['dtype']}{faster}")
    log.say(f"data: {num_windows:,} windows of {config.seq_len} tokens in {config.data_dir}; {epochs:.2f} epochs")
    parts = f"{plan.micro_batches} micro-batches x {world.size} processes x {config.batch_size}"
    log.say(f"step: {plan.rows:,} windows = {parts}")
    log.say(f"{f'resuming at step {state.step} in' if start.path else 'writing to'} {config.out_dir}")
    if no_hellaswag:
        log.write("event", event="no hellaswag", step=state.step, problem=no_hellaswag)
        log.say(no_hellaswag)
    for name, (before, after) in start.changed.items():
        log.say(f"changed: {name} = {after}, was {before}")
    if due(state, config.val_interval, plan):
        log.say(f"first an evaluation, on {val_windows(start):,} windows")


def progress(run: Run, state: State) -> dict:
    """How far a run is: tokens trained on, epochs, the mean of the losses that its last train record stands for."""
    epoch = state.step * run.start.plan.rows / len(run.start.train_data)
    memory, tokens = peak_memory(run.world.device), state.step * run.start.config.total_batch_size
    return dict(mean_loss=state.mean_loss, tokens=tokens, epoch=epoch, peak_memory_gb=memory)


def summary(run: Run, state: State, val_loss: float | None) -> dict:
    """What the last event of a run says of it."""
    why, seconds = dict(target_reached=state.target_reached, plateau=state.plateau), time.perf_counter() - run.launched
    lowest = state.lowest if math.isfinite(state.lowest["val_loss"]) else None
    return why | progress(run, state) | dict(val_loss=val_loss, lowest_val_loss=lowest, seconds=seconds)


def log_step(run: Run, state: State, result: Result, dt: float) -> None:
    """The train record and line of a step; dt is the mean seconds of the steps since the last."""
    config, plan, world, step = run.start.config, run.start.plan, run.world, state.step
    state.mean_loss = state.loss_sum / state.loss_count if state.loss_count else None
    state.loss_sum, state.loss_count = 0.0, 0
    tokens_per_sec = config.total_batch_size / dt
    _, peak_flops = hardware(world.device)
    about = progress(run, state)
    memory = about["peak_memory_gb"]
    mfu = run.model.flops_per_token(config.seq_len) * tokens_per_sec / (world.size * peak_flops) if peak_flops else None
    run.log.write(
        "train", step=step, loss=result.loss, lr=result.lr, grad_norm=result.norm, tokens_per_sec=tokens_per_sec, dt=dt,
        mfu=mfu, seconds=result.seconds, **about,
    )  # fmt: skip
    parts = dict(
        step=f"step {step:>5}/{plan.max_steps}", loss=f"loss {result.loss:.4f}", lr=f"lr {result.lr:.2e}",
        norm=f"norm {result.norm:.4f}", ms=f"{dt * 1e3:.1f} ms", speed=f"{tokens_per_sec:,.0f} tok/s",
        mfu=f"mfu {mfu:.1%}" if mfu else "", memory=f"{memory:.1f} GB" if memory else "",
        eta=f"eta {clock(min(dt * (plan.max_steps - step), plan.max_seconds - result.seconds))}",
    )  # fmt: skip
    run.log.say_parts(parts, spare=("memory", "ms", "mfu", "lr"))


def conclude(config: TrainConfig, log: Metrics) -> None:
    """The summary and the report of a run that has ended. If they fail, a line says so: all is saved by now."""
    try:
        import history  # what they need is imported only now
        import report

        runs = [history.read(config.out_dir)]
        log.say(report.summary(runs[0]))
        if config.report:
            log.say(f"report: {report.write(runs, config.out_dir)}")
    except Exception as error:  # a full disk, fonts, a missing package: of many types
        log.say(f"no report: {' '.join(str(error).split()) or type(error).__name__}")


def warn_of_long_steps(log: Metrics, seconds: float) -> None:
    """Say in time that torchrun would kill this run before it can stop in order."""
    if under_torchrun() and seconds > 20:  # saving takes time too
        log.say(
            f"a step takes {seconds:.0f} s, but torchrun kills what has not ended 30 s after a signal: start it with "
            f"torchrun --shutdown-timeout={120 + 2 * round(seconds)}, or a stopped run is not saved"
        )


if __name__ == "__main__":
    cli(main)
