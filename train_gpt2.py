"""Train a GPT: on a laptop, one GPU, or many.

    python train_gpt2.py config/quickstart.py
    torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_124m.py --out_dir=out/mine

A run writes metrics.jsonl, checkpoints (ckpt_<step>.pt) and, at its end, report.md into out_dir.
Whatever ended it early: the same command with --resume=True continues it.
"""

import gc
import signal

from configurator import end_with_torchrun

if __name__ == "__main__":
    end_with_torchrun()  # which may be killed while this process still imports torch
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback
    gc.disable()  # until the first step: looking for garbage takes a tenth of the start, and there is none

import contextlib
import math
import shlex
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import checkpoint
from configurator import PathStr, UserError, at_least, cli, configure
from dataloader import Windows, check_data, data_tokenizer, fingerprints, read_meta, train_batches, val_batches
from distributed import StopRequest, World, full, hardware, machine, make_deterministic, peak_memory, pick_dtype
from metrics import Metrics, bits_per_byte, clock, word_loss
from model import GPT, GPTConfig, choose_attention_kernel
from optim import Average, OptimConfig, learning_rate, make_optimizers

MAX_SKIPPED = 20  # a run gives up after this many steps in a row without a finite loss and gradient


@dataclass(frozen=True)
class TrainConfig(OptimConfig):
    """A training run, with its optimizer. The defaults pretrain GPT-2 124M on FineWeb-Edu."""

    # what most runs set
    out_dir: PathStr = "out/gpt2_124m"  # folder for metrics, checkpoints and the report
    data_dir: PathStr = "data/fineweb_edu10B"  # folder of token shards, made by fineweb.py
    init_from: PathStr = "scratch"  # "scratch", a checkpoint, a run's or Hugging Face folder, or gpt2..gpt2-xl
    resume: bool = False  # continue the run in out_dir from its newest checkpoint; start it if there is none
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    batch_size: int = 16  # sequences in a micro-batch, on each GPU
    total_batch_size: int | None = 524288  # tokens per optimizer step, in micro-batches; None: one micro-batch
    max_steps: int | None = None  # optimizer steps; None: as many as epochs says
    val_interval: int = 250  # steps between evaluations on the validation set; 0: none
    checkpoint_interval: int = 1000  # steps between checkpoints, the last step always has one; 0: only that
    # length
    epochs: float | None = None  # passes over the training set, unless max_steps ends sooner; None: one
    max_hours: float | None = None  # time limit of the run, all its launches together; None: no limit
    target_loss: float | None = None  # stop after a step whose training loss is below this
    patience: int | None = None  # stop after this many evaluations without a new lowest validation loss
    # between steps; an interval of 0 means never
    val_tokens: int = 10485760  # tokens to evaluate on, from the start of the validation set
    hellaswag_interval: int = 0  # steps between evaluations on HellaSwag's 10,042 examples
    sample_interval: int = 0  # steps between samples of 200 tokens
    sample_start: str = ""  # text that samples continue; empty: the start of a document
    keep_checkpoints: int = 3  # newest checkpoints to keep, beside the best one; 0: all
    log_interval: int = 10  # steps between log lines and train records
    log_to: Literal["wandb"] | None = None  # also send the numbers to Weights & Biases; WANDB_MODE=offline works
    # computation
    seed: int = 1337  # seed of the initial weights, the data order and dropout
    seq_len: int | None = None  # tokens in a training sequence; None: block_size
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision of matrix products; weights: float32
    compile: bool | None = None  # torch.compile: faster steps after a minute of compiling; None: on NVIDIA GPUs
    parallel: Literal["ddp", "ddp_bf16", "fsdp"] = "ddp"  # ddp_bf16: half the traffic; fsdp: less memory, slower
    activation_checkpointing: bool = False  # recompute activations in the backward pass: saves memory, 1/4 slower
    chunked_loss: bool = False  # compute the logits in chunks: saves memory
    deterministic: bool = False  # the same bits in every run on GPUs too (slower); on CPUs they always are

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "batch_size", "total_batch_size", "log_interval", "seq_len", "max_steps", "patience")
        at_least(self, 0, "seed", "val_interval", "val_tokens", "hellaswag_interval", "sample_interval")
        at_least(self, 0, "checkpoint_interval", "keep_checkpoints")
        at_least(self, 1e-12, "epochs", "max_hours")
        if not (self.out_dir and self.data_dir):
            raise ValueError("out_dir or data_dir is empty")
        if self.parallel == "fsdp" and self.optimizer == "adafactor":
            raise ValueError("optimizer = 'adafactor' needs whole matrices; use --parallel=ddp, or adamw or muon")


# A resumed run keeps its options; flags change them, but not these or GPTConfig: another model,
# data order, batch or kind of optimizer is another run. val_tokens: losses must compare.
FIXED = {"init_from", "seed", "seq_len", "total_batch_size", "val_tokens", "optimizer"}


@dataclass
class Run:
    """What a run is made of: set up once, used by every step."""

    config: TrainConfig  # with every size filled in
    gpt_config: GPTConfig
    world: World  # the processes of this run
    log: Metrics
    # what look() found
    path: Path | None  # the checkpoint to resume
    saved: dict  # its content, or the weights to start from, until build() has used them
    changed: dict[str, list]  # {option: [saved, now]} of a resumed run
    meta: dict  # the data's meta.json
    tokenizer: str | None  # of the data: a name or the content of a tokenizer.json; None: unknown
    data: dict[str, list]  # the fingerprint of each shard
    train_data: Windows
    val_data: Windows | None  # None: no evaluations
    rows: int  # windows in a step, on all processes together
    micro_batches: int  # of batch_size windows, in a step of each process
    max_steps: int
    # what build() made
    model: GPT = None  # for evaluations and checkpoints
    wrapped: nn.Module = None  # the same model, but its backward averages gradients over all processes
    optimizers: list[torch.optim.Optimizer] = None
    average: Average | None = None  # of the weights
    scaler: torch.amp.GradScaler = None
    autocast: contextlib.AbstractContextManager = None
    examples: list = ()  # of HellaSwag
    stop: StopRequest = None  # true once this process is asked to end
    launched: float = 0.0  # by time.perf_counter; a resumed run's earlier launches moved it back


@dataclass
class State:
    """What a run remembers, beside weights and optimizers. A checkpoint holds all of it."""

    step: int = 0  # optimizer steps done
    loss: float = math.nan  # of the last step's whole batch
    norm: float = math.nan  # of the last step's gradient, before clipping
    skipped: int = 0  # the newest steps in a row without a finite loss and gradient
    losses: list[float] = field(default_factory=list)  # finite ones, since the last train record
    times: list[float] = field(default_factory=list)  # seconds of each step since then
    seconds: float = 0.0  # of running, in all launches together
    saved_step: int | None = None  # the newest checkpoint
    best: dict = field(default_factory=lambda: {"step": None, "val_loss": math.inf})  # of the saved steps
    lowest: dict = field(default_factory=lambda: {"step": 0, "val_loss": math.inf})  # of all evaluations
    ended_by: str | None = None  # "target_loss" or "patience", once one of them has ended the run


def main() -> int:
    """A run from its command line to its exit status: look, build, train."""
    config, gpt_config, given = configure(TrainConfig, GPTConfig)
    world = World(device=None)  # a resumed run brings its own device
    log = Metrics(config.out_dir, world.is_main)

    # Look before writing. A mistake in the options, the data or the machine ends the run here, on
    # all processes with the same line, and nothing has been touched.
    path, saved = world.on_main(lambda: checkpoint.find_run(config.out_dir, config.resume, given, log))
    run = world.together(lambda: look(config, gpt_config, given, path, saved, world, log))
    state = State(**{f.name: run.saved[f.name] for f in fields(State) if f.name in run.saved})
    if state.ended_by in run.changed:  # a new target_loss or patience: the old one ends nothing
        state.ended_by = None

    # A finished run has nothing to do but write the report, if it died in that. One that died
    # between its last checkpoint and its last record is not finished: it goes on to conclude.
    if path and finished(run, state) and world.on_main(lambda: log.is_done(state.step)):
        report = log.path.with_name("report.md")
        if not (report.exists() and report.stat().st_mtime >= log.path.stat().st_mtime):
            write_report(run)
        log.say(f"{config.out_dir}: this run is done, at step {state.step}")
        world.close()
        return 0

    # Build the model, open the log and train. Records from behind the checkpoint go, as these steps
    # are taken again; so do those of its own step that are made again.
    build(run, state)
    again = evaluations_due(run, state) | {"sample"}
    world.on_main(lambda: log.begin(state.step if path else None, run.config.log_to, again))
    announce(run, state)
    check_shared(run)
    if run.config.hellaswag_interval:
        load_hellaswag(run, state)
    gc.enable()
    status = train(run, state)
    log.close()
    world.close()
    return status


# ---- Before the first step


def look(
    config: TrainConfig, gpt_config: GPTConfig, given: dict[str, str], path: Path | None, saved: dict, world: World,
    log: Metrics,
) -> tuple[Run, int]:  # fmt: skip
    """The run, not built yet, and a checksum of what must be the same on all processes.

    `given` says where each option was set. `path` is the checkpoint to resume; without one, `saved`
    holds the options of a run that died before its first checkpoint, or nothing. Raises UserError.
    """
    # A run that goes on has its own options; only flags change them.
    saved, changed = checkpoint.load_run(path) if path else saved, {}
    if saved:
        config, gpt_config, changed = checkpoint.merge(saved, config, gpt_config, given, FIXED, log)

    # The data decides the vocabulary of a new model. A resumed run must find the data that it began
    # with, and keeps its tokenizer.
    world.use(config.device)
    meta = read_meta(config.data_dir)
    gpt_config, saved = starting_point(saved, config, gpt_config, given, meta)
    tokenizer, data = data_tokenizer(config.data_dir, meta, gpt_config.vocab_size), fingerprints(config.data_dir, meta)
    if path:
        check_data(config.data_dir, saved["data"], data)
        if tokenizer != saved["tokenizer"]:
            from tokenizer import check_same_tokenizer  # takes a while to import

            check_same_tokenizer(saved["tokenizer"], tokenizer, path, config.data_dir)
        tokenizer = saved["tokenizer"]

    # Fill in the sizes that were left open. The run ends at max_steps or after its epochs,
    # whichever comes first; after one epoch if neither is given.
    T = config.seq_len or gpt_config.block_size
    config = replace(config, seq_len=T, total_batch_size=config.total_batch_size or config.batch_size * T * world.size)
    check_sizes(config, gpt_config, meta, tokenizer, world)
    ids = meta.get("vocab_size", gpt_config.vocab_size)
    train_data = Windows(config.data_dir, "train", T, ids)
    val_data = Windows(config.data_dir, "val", T, ids) if config.val_interval else None
    rows, epochs = config.total_batch_size // T, config.epochs or (math.inf if config.max_steps else 1)
    max_steps = min(config.max_steps or math.inf, epochs * len(train_data) / rows)
    if max_steps < 1:
        raise UserError(f"{config.data_dir}: {epochs} epochs of {len(train_data)} windows are less than one step")
    run = Run(
        config, gpt_config, world, log, path, saved, changed, meta, tokenizer, data, train_data, val_data,
        rows, rows // (config.batch_size * world.size), math.floor(max_steps),
    )  # fmt: skip
    code = [torch.__version__, *(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))]
    options = asdict(config) | asdict(gpt_config) | {"out_dir": "", "data_dir": ""}  # paths may differ by machine
    return run, zlib.crc32(repr([options, meta, tokenizer, data, saved.get("step"), code]).encode())


def starting_point(
    saved: dict, config: TrainConfig, gpt_config: GPTConfig, given: dict[str, str], meta: dict
) -> tuple[GPTConfig, dict]:
    """The architecture, and what to start from: a checkpoint, {"model": weights}, or {}."""
    if "model" in saved:
        return gpt_config, saved
    if config.init_from != "scratch":
        from huggingface import starting_weights  # tokenizers take a while to import

        asked = vars(gpt_config) if saved else given  # a run that starts over has all its options already
        gpt_config, weights = starting_weights(config.init_from, gpt_config, asked, config.data_dir, meta)
        return gpt_config, {"model": weights}
    if meta and "vocab_size" not in given and not saved:
        gpt_config = replace(gpt_config, vocab_size=meta["vocab_size"])
    return gpt_config, {}


def check_sizes(config: TrainConfig, gpt_config: GPTConfig, meta: dict, tokenizer: str | None, world: World) -> None:
    """Raises UserError where options, model, data and machine do not go together."""
    T, one_round = config.seq_len, config.batch_size * config.seq_len * world.size
    if gpt_config.vocab_size < meta.get("vocab_size", 0):
        raise UserError(f"vocab_size = {gpt_config.vocab_size}, but {config.data_dir} has {meta['vocab_size']} ids")
    if gpt_config.block_size < T:
        raise UserError(f"seq_len = {T} is more than block_size = {gpt_config.block_size}")
    if config.val_interval and config.val_tokens < T:
        raise UserError(f"val_tokens = {config.val_tokens} is less than one window of seq_len = {T}")
    if world.device.type == "mps" and config.batch_size * T > 32768:  # github.com/pytorch/pytorch/issues/177116
        raise UserError(f"batch_size x seq_len above 32768 has wrong gradients on MPS; use --batch_size={32768 // T}")
    if (config.sample_interval or config.hellaswag_interval) and not tokenizer:
        raise UserError(f"{config.data_dir}: its tokenizer is not known, which samples and HellaSwag need")
    if config.total_batch_size % one_round:
        parts = f"batch_size {config.batch_size} x seq_len {T} x {world.size} processes = {one_round}"
        raise UserError(f"total_batch_size = {config.total_batch_size} is not a multiple of {parts}")


def build(run: Run, state: State) -> None:
    """Fill in the run's model and optimizers, new or from the checkpoint, compiled and wrapped."""
    config, world, saved = run.config, run.world, run.saved

    # Every process draws the same initial weights, or copies them from the checkpoint. Where a run
    # averages its weights, "model" is the average, and what trains on lies beside it.
    make_deterministic(world.device, config.deterministic)
    choose_attention_kernel(run.gpt_config.dropout)
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    torch.manual_seed(config.seed)
    run.model = model = GPT(run.gpt_config)
    if saved:
        weights = saved.get("training_weights") or saved["model"]
        checkpoint.load_weights(model, weights, run.path or config.init_from)
    model.activation_checkpointing, model.chunked_loss = config.activation_checkpointing, config.chunked_loss

    # FSDP cuts the model up before it goes to the GPU, which may be too small for it. Weights stay
    # in float32, autocast lowers the precision of products, and float16 needs scaled gradients.
    dtype = pick_dtype(config.dtype, world.device)
    if config.parallel == "fsdp":
        world.shard(model, model.h, dtype)
    model.to(world.device)
    run.autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    run.optimizers = make_optimizers(model, config, world.spread)
    run.average = Average(model, config.average, saved.get("model")) if config.average else None
    run.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    if run.path:
        checkpoint.restore(saved, model, run.optimizers, run.scaler)
    run.saved = {}  # the file is mapped: as long as it is in use, deleting it frees no disk

    # Compile, and take one backward pass whose gradients are thrown away: what fails to compile or
    # does not fit into memory fails here. DDP and FSDP also settle in it who sums what in which
    # order: else a resumed run on three processes would differ from one that never stopped.
    compiled = world.device.type == "cuda" if config.compile is None else config.compile
    if compiled and not any(map(shutil.which, ("g++", "clang++", "c++", "gcc", "clang", "cc"))):
        raise UserError("torch.compile needs a C++ compiler; install g++, or use --compile=False")
    if compiled and world.sharded:  # blocks are gathered between compiled parts
        for block in model.h:
            block.compile()
        model.loss = torch.compile(model.loss)
    elif compiled:
        model.compile()
    example = torch.zeros((2, config.batch_size, config.seq_len), dtype=torch.int64, device=world.device)  # x and y
    with run.autocast:
        run.wrapped = world.wrap(model, *example, warm_up=compiled, bf16=config.parallel == "ddp_bf16")
    run.stop, run.launched = StopRequest(), time.perf_counter() - state.seconds


def load_hellaswag(run: Run, state: State) -> None:
    """Fill in the HellaSwag examples. Without a network, a line says so and the run goes on."""
    import hellaswag  # with tokenizers, which take a while to import
    from tokenizer import get_tokenizer

    try:
        enc, block_size = get_tokenizer(run.tokenizer), run.gpt_config.block_size
        run.examples = run.world.on_main(lambda: hellaswag.load(None, enc, block_size))
    except UserError as error:  # the same on all processes
        run.log.write("event", event="no hellaswag", step=state.step, problem=str(error))
        run.log.say(f"no HellaSwag in this run: {error}")


# ---- The steps


def train(run: Run, state: State) -> int:
    """Train until the end, a signal, or too many skipped steps. Returns the exit status."""
    config, world = run.config, run.world
    batches = train_batches(
        run.train_data, config.seed, run.rows, config.batch_size, world.rank, world.size, world.device, state.step + 1
    )
    stop = False
    while True:
        # Between two steps the weights stand still: this is the time to measure them and to save
        # them. Whoever asks the run to stop cannot wait for that: the resumed run does it.
        val_loss = None
        if not stop:
            val_loss, stop = evaluate_if_due(run, state)
        done = finished(run, state) and not stop
        if done and state.times:  # ended by its evaluation, at a step without a train record
            log_step(run, state)

        # While steps are being skipped, only the end of the run is saved: weights that have just
        # become useless would push out good ones.
        wanted = stop or (state.step > 0 and due(state.step, config.checkpoint_interval))
        if done or (wanted and not state.skipped):
            save(run, state, val_loss, last=done or stop)

        # The end is recorded once all is saved. After a kill in between, the resumed run records
        # it.
        if done or stop:
            batches.close()
            return conclude(run, state, stop)

        # One optimizer step. It changes nothing if its loss or gradient is not finite. A few such
        # steps are bad luck; many in a row mean that the run has diverged for good.
        stop = train_step(run, state, batches)
        if state.skipped:
            run.log.write("event", event="skipped step", step=state.step, loss=state.loss, grad_norm=state.norm)
            run.log.say(f"{here(run, state)} | skipped: loss {state.loss}, norm {state.norm}")
        if state.skipped >= MAX_SKIPPED:
            batches.close()
            return give_up(run, state)
        if state.step == 1 or due(state.step, config.log_interval, finished(run, state)):
            log_step(run, state)


def train_step(run: Run, state: State, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
    """One step; loss and norm go into the state. Returns whether a process was asked to stop."""
    config, world, scaler, began = run.config, run.world, run.scaler, time.perf_counter()
    state.step += 1

    # Dropout draws from a generator that the step's number seeds. So a resumed run needs no
    # generator state, and no sample between two steps changes what the next one draws.
    if run.gpt_config.dropout:
        seed = np.random.SeedSequence([config.seed, state.step, world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))

    # Forward and backward. The gradients of all micro-batches add up in p.grad; dividing each loss
    # by their number makes the sum a mean. Only the last one averages gradients over the GPUs:
    # doing it every time would send the same bytes again and again.
    totals = torch.zeros(3, device=world.device)  # loss, requests to stop, seconds
    for i in range(run.micro_batches):
        x, y = next(batches)  # (B, T) each
        world.sync_gradients(run.wrapped, on=i == run.micro_batches - 1)
        with run.autocast:
            loss = run.wrapped(x, y) / run.micro_batches
        totals[0] += loss.detach()
        scaler.scale(loss).backward()

    # Average the loss over the GPUs. The request to stop and the clock ride in the same message, so
    # that all processes end after the same step, and none waits for a second message.
    totals[1] += bool(run.stop)
    totals[2] += time.perf_counter() - run.launched
    world.mean_(totals)

    # Clip the gradient to a length of grad_clip. Here the CPU waits for the GPU, once in a step.
    for optimizer in run.optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    state.norm, (state.loss, stop, state.seconds) = full(norm).item(), totals.tolist()

    update(run, state, finite=math.isfinite(state.loss) and math.isfinite(state.norm))
    if math.isfinite(state.loss):
        state.losses.append(state.loss)
    if config.target_loss is not None and state.loss < config.target_loss:
        state.ended_by = "target_loss"
    state.times.append(time.perf_counter() - began)
    return stop > 0


def update(run: Run, state: State, finite: bool) -> None:
    """Update the weights, unless the step is not finite: a NaN would spoil them for good."""
    lr = learning_rate(state.step, run.config, run.max_steps)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        if finite:
            run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    if run.average and finite:
        run.average.update(state.step)
    state.skipped = 0 if finite else state.skipped + 1


def finished(run: Run, state: State) -> bool:
    """Whether the run has reached its steps, its hours, its target or the end of its patience."""
    hours = state.seconds / 3600
    return state.step >= run.max_steps or hours >= (run.config.max_hours or math.inf) or state.ended_by is not None


def due(step: int, interval: int, at_end: bool = False) -> bool:
    """Whether something happens now that is due every `interval` steps (0: never) or at the end."""
    return interval > 0 and (step % interval == 0 or at_end)


# ---- Between two steps


def evaluate_if_due(run: Run, state: State) -> tuple[float | None, bool]:
    """Evaluate and sample, if due. Returns the val loss, if any, and whether to stop."""
    config, log, kinds = run.config, run.log, evaluations_due(run, state)
    if not kinds:
        return None, False
    val_loss = None
    with weights_to_measure(run):
        # The validation loss decides which checkpoint is the best, and when patience ends.
        if "val" in kinds:
            val_loss = evaluate(run)
            if val_loss is None:
                return None, True
            record_val_loss(run, state, val_loss)
        if "hellaswag" in kinds and run.examples:
            import hellaswag

            max_tokens = config.batch_size * config.seq_len
            with run.world.unsharded():
                score = hellaswag.score(run.model, run.examples, max_tokens, run.world, run.autocast, stop=run.stop)
            if score is None:
                return None, True
            log.write("hellaswag", step=state.step, acc=score[0], acc_norm=score[1], n=score[2])
            log.say(f"{here(run, state)} | HellaSwag acc {score[0]:.4f}, acc_norm {score[1]:.4f}, of {score[2]:,}")
        if "sample" in kinds:
            try:
                text = sample(run)
            except FloatingPointError as error:  # the weights have become useless, which the loss shows too
                log.write("event", event="no sample", step=state.step, problem=str(error))
                log.say(f"{here(run, state)} | no sample: {error}")
                return val_loss, False
            if run.world.any(run.stop):
                return None, True
            log.write("sample", step=state.step, text=text)
            log.say(f"--- sample\n{text}\n---")
    return val_loss, False


def evaluations_due(run: Run, state: State) -> set[str]:
    """Which evaluations this step has: "val", "hellaswag", "sample"."""
    config, end = run.config, finished(run, state)
    intervals = dict(val=config.val_interval, hellaswag=config.hellaswag_interval, sample=config.sample_interval)
    return {kind for kind, interval in intervals.items() if due(state.step, interval, end)}


@contextlib.contextmanager
def weights_to_measure(run: Run) -> Iterator[None]:
    """Inside, the model drops nothing out, and has its averaged weights if the run keeps them."""
    run.model.eval()
    if run.average:
        run.average.swap()
    try:
        yield
    finally:
        run.model.train()
        if run.average:
            run.average.swap()
            run.world.reshard()


@torch.no_grad()
def evaluate(run: Run) -> float | None:
    """Mean loss of the first val_tokens, in nats per token; None if a request to stop came."""
    config, world, model = run.config, run.world, run.model
    batches = val_batches(run.val_data, config.val_tokens, config.batch_size, world.rank, world.size, world.device)
    rounds = math.ceil(val_windows(run) / (config.batch_size * world.size))
    hidden = None if world.is_main else True  # None: where stderr is no terminal
    losses, counts, stopped = [], [], False
    for x, y in tqdm(batches, "evaluating", rounds, unit="batch", delay=3, leave=False, disable=hidden):
        # All processes take the same number of batches, and stop at the same one.
        if stopped := world.any(run.stop):
            break
        # Pad the last batch with targets that do not count: a smaller one would be compiled anew.
        counts.append(y.numel())
        missing = (0, 0, 0, config.batch_size - len(x))
        with run.autocast:
            losses.append(model(F.pad(x, missing), F.pad(y, missing, value=-1)))

    # Sum up in float64, so that the result hardly depends on how the windows were shared out.
    losses = [loss.item() for loss in losses]  # one wait for the GPU, at the end
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count)
    total, tokens = world.sum([total, sum(counts)])
    return None if stopped else total / tokens


def val_windows(run: Run) -> int:
    """How many windows an evaluation reads, on all processes together."""
    return min(run.config.val_tokens // run.config.seq_len, len(run.val_data))


def record_val_loss(run: Run, state: State, val_loss: float) -> None:
    """Record a validation loss, and end the run if it has had no new low for too long."""
    if val_loss < state.lowest["val_loss"]:
        state.lowest = {"step": state.step, "val_loss": val_loss}
    if state.step - state.lowest["step"] >= (run.config.patience or math.inf) * run.config.val_interval:
        state.ended_by = "patience"

    # Nats per token depend on the tokenizer. Bits per byte do not, nor does the loss per word of
    # the original text, which is known only of a whole validation set.
    bpb = bits_per_byte(val_loss, run.meta)
    per_word = word_loss(val_loss, run.meta) if val_windows(run) == len(run.val_data) else None
    run.log.write("val", step=state.step, val_loss=val_loss, word_loss=per_word)
    more = (f" | word loss {per_word:.4f}" if per_word else "") + (f" | {bpb:.4f} bits per byte" if bpb else "")
    hours_and_minutes = clock(time.perf_counter() - run.launched)[:-3]
    run.log.say(f"{here(run, state)} | val loss {val_loss:.4f}{more} | after {hours_and_minutes} h")


def sample(run: Run) -> str:
    """sample_start and 200 tokens behind it, fewer if stopped; the same text on all ranks.

    Raises FloatingPointError if the weights give no finite logits.
    """
    from sample import complete  # tokenizers take a while to import
    from tokenizer import get_tokenizer

    text, enc = run.config.sample_start, get_tokenizer(run.tokenizer)
    # Where FSDP cut the weights up, each process gathers all of them. They are in the precision of
    # the products, which only autocast mixes with others.
    with run.world.unsharded(), run.autocast if run.world.sharded else contextlib.nullcontext():
        for (piece,) in complete(run.model, enc, text, 1, 200, temperature=0.8, top_k=200):
            text += piece
            if run.world.any(run.stop):
                break
    return text


def save(run: Run, state: State, val_loss: float | None, last: bool) -> None:
    """Write this step's checkpoint, unless it has one. The best one has the lowest val_loss.

    Raises UserError if out_dir is not the run's any more, or a full disk leaves no checkpoint.
    """
    config, log, world, before = run.config, run.log, run.world, (state.saved_step, state.best)
    if val_loss is not None and val_loss < state.best["val_loss"]:
        state.best = {"step": state.step, "val_loss": val_loss}
    elif state.saved_step == state.step:
        return
    state.saved_step = state.step

    # With FSDP every process has a part of the state: all of them gather it, one of them writes it.
    weights, average = run.model.state_dict(), run.average and run.average.state_dict()
    contents = {
        "model": world.whole(average or weights), "training_weights": world.whole(weights if average else None),
        "optimizer": world.whole(checkpoint.optimizer_state(run.model, run.optimizers)),
        "scaler": run.scaler.state_dict(), "data": run.data, "tokenizer": run.tokenizer,
        "config": asdict(config), "gpt_config": asdict(run.gpt_config), **asdict(state),
    }  # fmt: skip

    def write() -> str | None:
        try:
            log.check_folder()
            log.sync()  # the records that led to a checkpoint are on disk before it
            keep = 0 if state.skipped else config.keep_checkpoints  # weights that may be useless push out no good ones
            log.say(f"saved {checkpoint.save(contents, config.out_dir, keep, state.best['step'])}")
        except OSError as error:
            return error.strerror or str(error)

    # A full disk ends no run that has a checkpoint: the next save tries again. But the first one
    # must succeed, or a disk that is full from the start would cost the whole run.
    if problem := world.on_main(write):
        state.saved_step, state.best = before
        log.write("event", event="not saved", step=state.step, problem=problem)
        if last or state.saved_step is None:
            raise UserError(f"{config.out_dir}: step {state.step} is not saved: {problem}; make room and --resume=True")
        log.say(f"NOT SAVED at step {state.step}: {problem}; older checkpoints are untouched, and the run goes on")


# ---- What a run says of itself


def announce(run: Run, state: State) -> None:
    """Record what begins or goes on, and print it: model, data, batch, folder, changed options."""
    config, world, log, T = run.config, run.world, run.log, run.config.seq_len
    parameters, windows = run.model.num_params(), len(run.train_data)
    about = dict(machine(world.device, pick_dtype(config.dtype, world.device)), world_size=world.size)
    if not log.has_run:  # a new run, or a checkpoint that was copied here without its metrics.jsonl
        configs = dict(config=asdict(config), gpt_config=asdict(run.gpt_config))
        data = {name: value for name, value in run.meta.items() if name != "shards"}
        log.write("run", **configs, parameters=parameters, max_steps=run.max_steps, data=data, **about)
    if run.path:
        log.write("event", event="resume", step=state.step, checkpoint=run.path.name, changed=run.changed, **about)
    # The same for who watches: how large is it, on what, how far does it go?
    log.say(f"model: {parameters:,} parameters, on {world.size} x {about['hardware']} in {about['dtype']}")
    epochs = run.max_steps * run.rows / windows
    log.say(f"data: {windows:,} x {T} tokens in {config.data_dir}; {epochs:.2f} epochs")
    parts = f"{run.micro_batches} x {world.size} x {config.batch_size} x {T} (micro-batches, processes, batch, context)"
    log.say(f"step: {config.total_batch_size:,} tokens = {parts}")
    log.say(f"resuming at step {state.step} in {config.out_dir}" if run.path else f"writing to {config.out_dir}")
    for name, (before, after) in run.changed.items():
        log.say(f"changed: {name} = {after}, was {before}")
    if (config.warmup_steps or 0) > max(1, run.max_steps):
        log.say(f"warmup_steps = {config.warmup_steps:g} outlasts the run, which ends at step {run.max_steps}")


def check_shared(run: Run) -> None:
    """Raises UserError unless all processes see rank 0's run: they read its checkpoints."""
    newest = run.world.on_main(run.log.records)[-1:]  # it names the time of this launch

    def see() -> tuple[None, int]:
        if run.log.records()[-1:] != newest:
            raise UserError(f"out_dir {run.config.out_dir} is not the same folder for all processes; use a shared disk")
        return None, 0

    run.world.together(see)


def here(run: Run, state: State) -> str:
    return f"step {state.step:>5}/{run.max_steps}"


def log_step(run: Run, state: State) -> None:
    """Write a step's train record and log line; its time is the mean since the last record."""
    config, step, (_, peak_flops) = run.config, state.step, hardware(run.world.device)
    mean_loss = sum(state.losses) / len(state.losses) if state.losses else None
    dt = sum(state.times) / len(state.times)
    state.losses, state.times = [], []
    lr, tokens_per_sec = learning_rate(step, config, run.max_steps), config.total_batch_size / dt
    # Model FLOPs utilization: its arithmetic as a share of what the GPUs could do in that time.
    flops = run.model.flops_per_token(config.seq_len) * tokens_per_sec / run.world.size
    mfu = flops / peak_flops if peak_flops else None
    run.log.write(
        "train", step=step, loss=state.loss, mean_loss=mean_loss, lr=lr, grad_norm=state.norm, dt=dt,
        seconds=state.seconds, tokens=step * config.total_batch_size, epoch=step * run.rows / len(run.train_data),
        tokens_per_sec=tokens_per_sec, mfu=mfu, peak_memory_gb=peak_memory(run.world.device),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    speed = f"{dt * 1e3:.1f} ms | {tokens_per_sec:,.0f} tok/s" + (f" | mfu {mfu:.1%}" if mfu else "")
    left = min(dt * (run.max_steps - step), 3600 * (config.max_hours or math.inf) - state.seconds)
    numbers = f"loss {state.loss:.4f} | lr {lr:.2e} | norm {state.norm:.4f} | {speed}"
    run.log.say(f"{here(run, state)} | {numbers} | eta {clock(left)}")


def conclude(run: Run, state: State, stopped: bool) -> int:
    """Record the end of a saved run, write its report, say what is next. Returns the status, 0."""
    log, out_dir = run.log, run.config.out_dir
    if stopped:  # whoever stops a run cannot wait for a report
        log.write("event", event="stopped", step=state.step, signal=run.stop.reason)
        log.say(f"stopped by a signal at step {state.step}; the same command with --resume=True goes on")
        return 0
    log.write("event", event="done", step=state.step, ended_by=state.ended_by, seconds=state.seconds)
    write_report(run)
    if state.best["step"] not in (None, state.step):
        best = f"val loss {state.best['val_loss']:.4f} at step {state.best['step']}"
        log.say(f"its best checkpoint has {best}; --best=True takes that one, not the last")
    log.say(f"done; next: python sample.py {shlex.quote(out_dir)}")
    return 0


def give_up(run: Run, state: State) -> int:
    """End a diverged run: say what was not finite, and how to save it. Returns the status, 3."""
    log, lower = run.log, f"--resume=True and a --learning_rate below {run.config.learning_rate:g}"
    what = f"loss {state.loss}" if not math.isfinite(state.loss) else f"gradient norm {state.norm}"
    log.write("event", event="gave up", step=state.step, loss=state.loss, grad_norm=state.norm)
    log.say(f"gave up at step {state.step}: {what}, the last of {state.skipped} skipped steps in a row")
    last = "there is no checkpoint yet" if state.saved_step is None else f"step {state.saved_step} is saved"
    log.say(f"{last}; go on from there with {lower}")
    write_report(run)
    return 3


def write_report(run: Run) -> None:
    """Write report.md and its plots. If that fails, a line says so: the run itself is saved."""
    log, out_dir = run.log, run.config.out_dir
    if not run.world.is_main:
        return
    try:
        import report  # with matplotlib, which takes a second to import

        log.say(f"report: {report.write([report.read(out_dir)], out_dir)}")
    except (OSError, ImportError, RuntimeError, ValueError, UserError) as error:  # a full disk, a package, a font
        log.say(f"no report: {error}; try python report.py {shlex.quote(out_dir)}")


if __name__ == "__main__":
    cli(main)
