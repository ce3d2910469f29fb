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
import zlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import checkpoint
from configurator import PathStr, UserError, at_least, cli, configure
from dataloader import Windows, check_data, data_tokenizer, fingerprints, read_meta, train_batches, val_batches
from distributed import StopRequest, World, autocast, full, hardware, machine, make_deterministic, pick_dtype
from metrics import Metrics, bits_per_byte, clock, word_loss
from model import GPT, GPTConfig
from optim import Average, OptimConfig, learning_rate, make_optimizers

MAX_SKIPPED = 20  # a run gives up after this many steps in a row without a finite loss and gradient


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
    val_interval: int = 250  # steps between evaluations
    val_tokens: int = 10485760  # evaluate on this many tokens, the first of the val split
    hellaswag_interval: int = 0  # steps between evaluations on HellaSwag, 10,042 examples
    hellaswag_data: PathStr | None = None  # a .jsonl of examples; None: the validation set, downloaded once
    sample_interval: int = 0  # steps between samples of 200 tokens
    sample_start: str = ""  # what samples continue; empty: the start of a document
    checkpoint_interval: int = 1000  # steps between checkpoints; the last step always has one
    keep_checkpoints: int = 3  # the newest ones, and the best; 0: all
    log_interval: int = 10  # steps between log lines and train records
    log_to: Literal["tensorboard", "wandb"] | None = None  # where metrics go beside metrics.jsonl; wandb also offline

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "batch_size", "total_batch_size", "log_interval", "seq_len", "max_steps", "patience")
        at_least(self, 0, "seed", "val_interval", "val_tokens", "hellaswag_interval", "sample_interval")
        at_least(self, 0, "checkpoint_interval", "keep_checkpoints", "epochs", "max_hours")
        if not (self.out_dir and self.data_dir):
            raise ValueError("out_dir or data_dir is empty")
        if self.parallel == "fsdp" and self.optimizer == "adafactor":
            raise ValueError("optimizer = 'adafactor' needs whole matrices; use --parallel=ddp, or adamw or muon")
        if (self.target_val_loss or self.patience) and not self.val_interval:
            raise ValueError("target_val_loss and patience need evaluations, but val_interval = 0 means there are none")


OF_NO_RUN = {"out_dir", "resume"}  # always as they are given
# What makes another run if it changes, beside all of GPTConfig.
FIXED = {"init_from", "seed", "seq_len", "total_batch_size", "val_tokens", *(f.name for f in fields(OptimConfig))}


@dataclass
class State:
    """What a run remembers from step to step, beside its weights and optimizers. A checkpoint holds all of it."""

    step: int = 0  # optimizer steps done
    skipped: int = 0  # the last steps in a row that had no finite loss and gradient
    best: dict = field(default_factory=lambda: {"step": None, "val_loss": math.inf})  # of the saved steps
    lowest: dict = field(default_factory=lambda: {"step": 0, "val_loss": math.inf})  # of all evaluations
    ended_by: str | None = None  # target_loss, target_val_loss or patience, once one of them has ended the run
    losses: list[float] = field(default_factory=list)  # the finite ones since the last train record
    seconds: float = 0.0  # since the launch; those of a resumed run's earlier lives count
    stopped: bool = False  # by a signal, before this step's evaluations were done


@dataclass
class Run:
    """What is set up once, and every step uses."""

    config: TrainConfig  # with every size filled in
    gpt_config: GPTConfig
    world: World
    log: Metrics
    # from look()
    path: Path | None  # the checkpoint to resume
    saved: dict  # its content, or weights to start with, until build() has used it; {} for new ones
    changed: dict[str, list]  # {option: [saved, now]} of a resumed run
    meta: dict  # of the data
    tokenizer: str | None  # of the data: a name or a tokenizer.json's content; None: unknown
    data: dict[str, list]  # the fingerprints of its shards
    train_data: Windows
    val_data: Windows | None
    rows: int  # windows in a step, on all processes together
    micro_batches: int  # of batch_size windows, in a step of each process
    max_steps: int
    # from build()
    model: GPT = None  # for evaluations and checkpoints
    wrapped: nn.Module = None  # the same model, but its backward averages gradients over all processes
    optimizers: list[torch.optim.Optimizer] = None
    average: Average | None = None  # of the weights
    scaler: torch.amp.GradScaler = None
    autocast: contextlib.AbstractContextManager = None
    examples: list = ()  # of HellaSwag
    stop: StopRequest = None
    launched: float = 0.0  # by time.perf_counter; a resumed run's earlier lives moved it back


def main() -> int:
    config, gpt_config, given = configure(TrainConfig, GPTConfig)
    world = World(device=None)  # a resumed run has its own device
    log = Metrics(config.out_dir, world.is_main)

    # Look before writing: a mistake in the options, the data or the machine ends here, on all processes alike.
    path, saved = world.on_main(lambda: checkpoint.find_run(config.out_dir, config.resume, given, log))
    run = world.together(lambda: look(config, gpt_config, given, path, saved, world, log))
    state = State(**{f.name: run.saved[f.name] for f in fields(State) if f.name in run.saved})
    if state.ended_by in run.changed:
        state.ended_by = None
    if run.path and finished(run, state) and not state.stopped:
        log.say(f"{config.out_dir}: this run is done, at step {state.step}")
        world.close()
        return 0

    # Build, begin the record of the run or go on with it, and train.
    build(run, state)
    again = {kind for kind in ("val", "hellaswag") if due(state, getattr(run.config, f"{kind}_interval"), run)}
    world.on_main(lambda: log.begin(state.step if run.path else None, run.config.log_to, {"sample", *again}))
    announce(run, state)
    gc.enable()
    status = train(run, state)
    log.close()
    world.close()
    if status == 0 and state.stopped:
        log.say(f"stopped by a signal at step {state.step}; the same command with --resume=True goes on")
    elif status == 0:
        log.say(f"done; next: python report.py {config.out_dir}; python sample.py {config.out_dir}")
    return status


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run, state: State) -> int:
    """Steps until the run is finished, a signal comes, or too many are skipped in a row; the exit status."""
    config, log, world = run.config, run.log, run.world
    batches = train_batches(
        run.train_data, config.seed, run.rows, config.batch_size, world.rank, world.size, world.device, state.step + 1
    )
    saved_step = state.step if run.path and not state.stopped else None
    loss = norm = math.nan
    logged_step, seconds, stopping = state.step, 0.0, False  # seconds of training since logged_step
    while True:
        # Between two steps: evaluations, a checkpoint, or the end.
        val_loss = None
        if not stopping:
            val_loss, stopping = evaluate_all(run, state)
        state.stopped, done = stopping, finished(run, state)
        if done and state.step > logged_step:
            log_step(run, state, loss, norm, seconds / (state.step - logged_step))
        regular = done or (state.step > 0 and due(state, config.checkpoint_interval))
        saving = state.step != saved_step and (regular or stopping)
        if saving:  # never what was trained on data that changed
            world.on_main(lambda: check_data(config.data_dir, run.data, fingerprints(config.data_dir, run.meta)))
        if done or stopping:
            about = dict(signal=run.stop.reason) if stopping else dict(ended_by=state.ended_by, val_loss=val_loss)
            log.write("event", event="stopped" if stopping else "done", step=state.step, **about)
        if saving:
            saved_step = save(run, state, val_loss if regular else None, last=done or stopping) or saved_step
        if done or stopping:
            batches.close()
            return 0

        # One step: the gradient of the whole batch, and an update unless it is not finite.
        began = time.perf_counter()
        loss, norm, stopping = train_step(run, state, batches)
        seconds += time.perf_counter() - began
        if state.skipped:
            log.write("event", event="skipped step", step=state.step, loss=loss, grad_norm=norm)
            log.say(f"step {state.step:>5}/{run.max_steps} | skipped: loss {loss}, norm {norm}")
        if state.skipped >= MAX_SKIPPED:
            log.write("event", event="gave up", step=state.step)
            log.say(f"gave up: {state.skipped} steps in a row without a finite loss; the last checkpoint is kept")
            batches.close()
            return 3
        if state.step == 1 or due(state, config.log_interval) or finished(run, state):
            log_step(run, state, loss, norm, seconds / (state.step - logged_step))
            logged_step, seconds = state.step, 0.0


def train_step(run: Run, state: State, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, bool]:
    """One optimizer step -> the loss of the whole batch, the gradient's norm before clipping, and whether a process was
    asked to stop. Without a finite loss and gradient no weight changes, on any process."""
    config, world, scaler = run.config, run.world, run.scaler
    state.step += 1
    if run.gpt_config.dropout:  # seeded by the step: no generator state to save or disturb
        seed = np.random.SeedSequence([config.seed, state.step, world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
    totals = torch.zeros(3, device=world.device)  # to average over all processes: loss, stop, seconds
    for micro_batch in range(run.micro_batches):
        x, y = next(batches)
        world.sync_gradients(run.wrapped, on=micro_batch == run.micro_batches - 1)
        with run.autocast:
            loss = run.wrapped(x, y) / run.micro_batches
        totals[0] += loss.detach()
        scaler.scale(loss).backward()
    totals[1] += bool(run.stop)
    totals[2] += time.perf_counter() - run.launched
    world.mean_(totals)
    for optimizer in run.optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    norm, (loss, stop, state.seconds) = full(norm).item(), totals.tolist()  # the step's one wait for the device
    finite, lr = math.isfinite(loss) and math.isfinite(norm), rate(run, state.step)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        if finite:  # the same on all processes; a NaN would spoil the weights for good
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    if run.average and finite:
        run.average.update(state.step)
    state.skipped = 0 if finite else state.skipped + 1
    state.losses += [loss] if math.isfinite(loss) else []
    if config.target_loss is not None and loss < config.target_loss:
        state.ended_by = "target_loss"
    return loss, norm, stop > 0


def rate(run: Run, step: int) -> float:
    return learning_rate(step, run.config, run.max_steps)


def finished(run: Run, state: State) -> bool:
    hours = state.seconds / 3600
    return bool(state.ended_by) or state.step >= run.max_steps or hours >= (run.config.max_hours or math.inf)


def due(state: State, interval: int, run: Run | None = None) -> bool:
    """Whether something happens at this step: every `interval` steps (0: never), and with a run at its end too."""
    return interval > 0 and (state.step % interval == 0 or (run is not None and finished(run, state)))


# ---------------------------------------------------------------------------------------------------------------------
# Between two steps: evaluate and save


def evaluate_all(run: Run, state: State) -> tuple[float | None, bool]:
    """Validation, HellaSwag and a sample, each where it is due: (val loss, whether a signal broke it off)."""
    config, log, world = run.config, run.log, run.world
    val_loss, here = None, f"step {state.step:>5}/{run.max_steps}"
    intervals = config.val_interval, config.hellaswag_interval, config.sample_interval
    if not any(due(state, interval, run) for interval in intervals):
        return None, False
    with judged_weights(run):
        if due(state, config.val_interval, run):
            val_loss = evaluate(run)
            if val_loss is None:
                return None, True
            record_val_loss(run, state, val_loss)
        if run.examples and due(state, config.hellaswag_interval, run):
            import hellaswag

            max_tokens = config.batch_size * config.seq_len
            with world.unsharded():
                score = hellaswag.score(run.model, run.examples, max_tokens, world, run.autocast, stop=run.stop)
            if score is None:
                return None, True
            log.write("hellaswag", step=state.step, acc=score[0], acc_norm=score[1], n=score[2])
            log.say(f"{here} | HellaSwag acc {score[0]:.4f}, acc_norm {score[1]:.4f}, of {score[2]:,}")
        if due(state, config.sample_interval, run):
            text = sample(run)
            log.write("sample", step=state.step, text=text)
            log.say(f"--- sample\n{text}\n---")
    return val_loss, False


@contextlib.contextmanager
def judged_weights(run: Run) -> Iterator[None]:
    """Inside, the model has the weights that are judged: their average, where the run keeps one."""
    if run.average:
        run.average.swap()
    try:
        yield
    finally:
        if run.average:
            run.average.swap()
            run.world.reshard()


@torch.no_grad()
def evaluate(run: Run) -> float | None:
    """Mean loss of the first val_tokens in nats per token, over all ranks; None if a signal breaks it off.

    All ranks take the same number of forward passes, so that a sharded model could take them too.
    """
    config, world, model = run.config, run.world, run.model
    model.eval()
    losses, counts, stopped = [], [], False
    for x, y in val_batches(run.val_data, config.val_tokens, config.batch_size, world.rank, world.size, world.device):
        if stopped := world.any(run.stop):
            break
        counts.append(y.numel())
        missing = (0, 0, 0, config.batch_size - len(x))  # a smaller batch would be compiled for its own shape
        with run.autocast:
            losses.append(model(F.pad(x, missing), F.pad(y, missing, value=-1)))
    model.train()
    losses = [loss.item() for loss in losses]  # one wait at the end
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count)
    total, tokens = world.sum([total, sum(counts)])
    return None if stopped else total / tokens


def record_val_loss(run: Run, state: State, val_loss: float) -> None:
    """What a val loss means for the run, and its record."""
    config, whole_split = run.config, val_windows(run) == len(run.val_data)
    if config.target_val_loss is not None and val_loss < config.target_val_loss:
        state.ended_by = "target_val_loss"
    if val_loss < state.lowest["val_loss"]:
        state.lowest = {"step": state.step, "val_loss": val_loss}
    if state.step - state.lowest["step"] >= (config.patience or math.inf) * config.val_interval:
        state.ended_by = "patience"
    bpb, per_word = bits_per_byte(val_loss, run.meta), word_loss(val_loss, run.meta) if whole_split else None
    run.log.write("val", step=state.step, val_loss=val_loss, word_loss=per_word)
    more = (f" | word loss {per_word:.4f}" if per_word else "") + (f" | {bpb:.4f} bits per byte" if bpb else "")
    run.log.say(f"step {state.step:>5}/{run.max_steps} | val loss {val_loss:.4f}{more}")


def val_windows(run: Run) -> int:
    """How many windows an evaluation takes, on all ranks together."""
    return min(run.config.val_tokens // run.config.seq_len, len(run.val_data))


def sample(run: Run) -> str:
    """200 tokens behind sample_start, always the same ones of the same weights. All ranks sample, and get the same."""
    from sample import complete  # tokenizers take a while to import
    from tokenizer import get_tokenizer

    run.model.eval()
    start, enc = run.config.sample_start, get_tokenizer(run.tokenizer)
    # Gathered weights are in the products' dtype, which only autocast mixes with others.
    with run.world.unsharded(), run.autocast if run.world.sharded else contextlib.nullcontext():
        pieces = [piece for (piece,) in complete(run.model, enc, start, 1, 200, temperature=0.8, top_k=200)]
    run.model.train()
    return start + "".join(pieces)


def save(run: Run, state: State, val_loss: float | None, last: bool) -> int | None:
    """Write this step's checkpoint; its step, or None if the disk did not take it: then the run goes on.

    `val_loss` (None: unknown) may make it the best. Raises UserError if the last checkpoint is not saved.
    """
    config, log, world = run.config, run.log, run.world
    better = val_loss is not None and val_loss < state.best["val_loss"]
    best = {"step": state.step, "val_loss": val_loss} if better else state.best
    weights, average = run.model.state_dict(), run.average and run.average.state_dict()
    contents = {
        "model": world.whole(average or weights), "training_weights": world.whole(weights if average else None),
        "optimizers": world.whole([optimizer.state_dict() for optimizer in run.optimizers]),
        "scaler": run.scaler.state_dict(), "data": run.data, "tokenizer": run.tokenizer,
        "config": asdict(config), "gpt_config": asdict(run.gpt_config), **asdict(state), "best": best,
    }  # fmt: skip

    def write() -> str | None:
        try:
            log.sync()  # what led to a checkpoint is on disk before it
            keep = 0 if state.skipped else config.keep_checkpoints  # a run that fails pushes no good one out
            log.say(f"saved {checkpoint.save(contents, config.out_dir, keep, best['step'])}")
        except OSError as error:
            return error.strerror or str(error)

    if problem := world.on_main(write):
        log.write("event", event="not saved", step=state.step, problem=problem)
        if last:
            raise UserError(f"{config.out_dir}: step {state.step} is not saved: {problem}; make room and --resume=True")
        log.say(f"NOT SAVED at step {state.step}: {problem}; older checkpoints are untouched, and the run goes on")
        return None
    state.best = best
    return state.step


# ---------------------------------------------------------------------------------------------------------------------
# Before the first step


def look(
    config: TrainConfig, gpt_config: GPTConfig, given: dict[str, str], path: Path | None, saved: dict, world: World,
    log: Metrics,
) -> tuple[Run, int]:  # fmt: skip
    """The run with these options, all but built, and a checksum of what must be the same on all processes.

    `given` says where each option was set; `path` is the checkpoint to go on from; without one, `saved` has the options
    of a run to begin again, or nothing. Raises UserError.
    """
    saved = checkpoint.load_run(path) if path else saved
    changed = {}
    if saved:
        where = path or log.path
        config = checkpoint.merge(saved["config"], config, given | dict.fromkeys(OF_NO_RUN, ""), FIXED, where)
        gpt_config = checkpoint.merge(saved["gpt_config"], gpt_config, given, vars(gpt_config), where)
        pairs = {name: [saved["config"].get(name, value), value] for name, value in asdict(config).items()}
        changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in OF_NO_RUN}
    world.use(config.device)
    meta = read_meta(config.data_dir)
    gpt_config, saved = starting_point(saved, config, gpt_config, given, meta)
    tokenizer = data_tokenizer(config.data_dir, meta, gpt_config.vocab_size)
    T = config.seq_len or gpt_config.block_size
    config = replace(config, seq_len=T, total_batch_size=config.total_batch_size or config.batch_size * T * world.size)
    check_sizes(config, gpt_config, meta, world)
    if (config.sample_interval or config.hellaswag_interval) and not tokenizer:
        raise UserError(f"{config.data_dir}: its tokenizer is not known, which samples and HellaSwag need")
    ids = meta.get("vocab_size", gpt_config.vocab_size)
    train_data = Windows(config.data_dir, "train", T, ids)
    val_data = Windows(config.data_dir, "val", T, ids) if config.val_interval else None
    data = fingerprints(config.data_dir, meta)
    if path:
        check_data(config.data_dir, saved["data"], data)
    rows, epochs = config.total_batch_size // T, config.epochs or (math.inf if config.max_steps else 1)
    max_steps = min(config.max_steps or math.inf, epochs * len(train_data) / rows)
    if max_steps < 1:
        raise UserError(f"{config.data_dir}: {epochs} epochs of {len(train_data)} windows are less than one step")
    run = Run(
        config, gpt_config, world, log, path, saved, changed, meta, tokenizer, data, train_data, val_data,
        rows, rows // (config.batch_size * world.size), math.floor(max_steps),
    )  # fmt: skip
    code = [torch.__version__, *(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))]
    options = asdict(config) | asdict(gpt_config) | {"out_dir": "", "data_dir": ""}
    return run, zlib.crc32(repr([options, meta, tokenizer, data, saved.get("step"), code]).encode())


def starting_point(
    saved: dict, config: TrainConfig, gpt_config: GPTConfig, given: Collection[str], meta: dict
) -> tuple[GPTConfig, dict]:
    """The architecture, and what to start with: a checkpoint's content, or only {"model": weights}, or {}: new ones."""
    if "model" in saved:
        return gpt_config, saved
    if config.init_from != "scratch":
        from huggingface import starting_weights  # tokenizers take a while to import

        asked = vars(gpt_config) if saved else given  # a run that begins again has all its options already
        gpt_config, weights = starting_weights(config.init_from, gpt_config, asked, config.data_dir, meta)
        return gpt_config, {"model": weights}
    if meta and "vocab_size" not in given and not saved:
        gpt_config = replace(gpt_config, vocab_size=meta["vocab_size"])
    return gpt_config, {}


def check_sizes(config: TrainConfig, gpt_config: GPTConfig, meta: dict, world: World) -> None:
    """Raises UserError where the sizes of options, model, data and machine do not go together."""
    T, one_round = config.seq_len, config.batch_size * config.seq_len * world.size
    if gpt_config.vocab_size < meta.get("vocab_size", 0):
        raise UserError(f"vocab_size = {gpt_config.vocab_size}, but {config.data_dir} has {meta['vocab_size']} ids")
    if gpt_config.block_size < T:
        raise UserError(f"seq_len = {T} is more than block_size = {gpt_config.block_size}")
    if config.val_interval and config.val_tokens < T:
        raise UserError(f"val_tokens = {config.val_tokens} is less than one window of seq_len = {T}")
    if world.device.type == "mps" and config.batch_size * T > 32768:  # github.com/pytorch/pytorch/issues/177116
        raise UserError(f"batch_size x seq_len above 32768 has wrong gradients on MPS; use --batch_size={32768 // T}")
    if rest := config.total_batch_size % one_round:
        parts = f"batch_size {config.batch_size} x seq_len {T} x {world.size} processes"
        near = config.total_batch_size - rest + one_round
        raise UserError(f"total_batch_size = {config.total_batch_size} is not a multiple of {parts}, as {near} is")


def build(run: Run, state: State) -> None:
    """The model and its optimizers, new or from the checkpoint, compiled and wrapped for this number of processes."""
    config, world, saved = run.config, run.world, run.saved
    if config.hellaswag_interval:
        import hellaswag  # with tokenizers, which take a while to import
        from tokenizer import get_tokenizer

        enc, block_size = get_tokenizer(run.tokenizer), run.gpt_config.block_size
        run.examples = world.on_main(lambda: hellaswag.load(config.hellaswag_data, enc, block_size))
    make_deterministic(world.device, config.deterministic)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    run.model = model = GPT(run.gpt_config)
    if saved:
        weights = saved.get("training_weights") or saved["model"]
        checkpoint.load_weights(model, weights, run.path or config.init_from)
    model.activation_checkpointing, model.chunked_loss = config.activation_checkpointing, config.chunked_loss
    dtype = pick_dtype(config.dtype, world.device)
    if config.parallel == "fsdp":
        world.shard(model, model.h, dtype)
    model.to(world.device)
    run.autocast = autocast(dtype, world.device)
    run.optimizers = make_optimizers(model, config, world.spread)
    run.average = Average(model, config.average, saved.get("model")) if config.average else None
    run.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    if run.path:
        checkpoint.restore(saved, run.optimizers, run.scaler)
    run.saved = {}  # a deleted file would stay on disk while it is mapped
    compiled = compiles(config, world.device)
    if compiled and world.sharded:  # blocks are gathered between compiled parts
        for block in model.h:
            block.compile()
        model.loss = torch.compile(model.loss)
    elif compiled:
        model.compile()
    example = torch.zeros((2, config.batch_size, config.seq_len), dtype=torch.int64, device=world.device)  # x and y
    with run.autocast:
        run.wrapped = world.wrap(model, *example, warm_up=compiled)
    run.stop, run.launched = StopRequest(), time.perf_counter() - state.seconds


def compiles(config: TrainConfig, device: torch.device) -> bool:
    return device.type == "cuda" if config.compile is None else config.compile


# ---------------------------------------------------------------------------------------------------------------------
# What a run says of itself


def announce(run: Run, state: State) -> None:
    """The first record of a run, or of its going on, and the first lines on the terminal."""
    config, world, log, windows = run.config, run.world, run.log, len(run.train_data)
    parameters = run.model.num_params()
    about = dict(machine(world.device, pick_dtype(config.dtype, world.device)), world_size=world.size)
    if run.path:
        log.write("event", event="resume", step=state.step, checkpoint=run.path.name, changed=run.changed, **about)
    else:
        configs = dict(config=asdict(config), gpt_config=asdict(run.gpt_config))
        data = {name: value for name, value in run.meta.items() if name != "shards"}
        log.write("run", **configs, parameters=parameters, max_steps=run.max_steps, data=data, **about)
    epochs = run.max_steps * run.rows / windows
    log.say(f"model: {parameters:,} parameters, on {world.size} x {about['hardware']} in {about['dtype']}")
    log.say(f"data: {windows:,} windows of {config.seq_len} tokens in {config.data_dir}; {epochs:.2f} epochs")
    log.say(f"step: {run.rows:,} windows = {run.micro_batches} micro-batches x {world.size} x {config.batch_size}")
    log.say(f"resuming at step {state.step} in {config.out_dir}" if run.path else f"writing to {config.out_dir}")
    for name, (before, after) in run.changed.items():
        log.say(f"changed: {name} = {after}, was {before}")
    if due(state, config.val_interval, run):
        log.say(f"first an evaluation, on {val_windows(run):,} windows")


def log_step(run: Run, state: State, loss: float, norm: float, dt: float) -> None:
    """The train record and line of a step; dt is the mean seconds of the steps since the last."""
    config, step, device, (_, peak) = run.config, state.step, run.world.device, hardware(run.world.device)
    mean_loss = sum(state.losses) / len(state.losses) if state.losses else None
    state.losses, lr, tokens_per_sec = [], rate(run, step), config.total_batch_size / dt
    mfu = run.model.flops_per_token(config.seq_len) * tokens_per_sec / (run.world.size * peak) if peak else None
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    run.log.write(
        "train", step=step, loss=loss, mean_loss=mean_loss, lr=lr, grad_norm=norm, dt=dt, seconds=state.seconds,
        tokens=step * config.total_batch_size, epoch=step * run.rows / len(run.train_data),
        tokens_per_sec=tokens_per_sec, mfu=mfu, peak_memory_gb=memory,
    )  # fmt: skip
    parts = f"step {step:>5}/{run.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.4f} | {dt * 1e3:.1f} ms | "
    parts += f"{tokens_per_sec:,.0f} tok/s | " + (f"mfu {mfu:.1%} | " if mfu else "")
    left = min(dt * (run.max_steps - step), 3600 * (config.max_hours or math.inf) - state.seconds)
    run.log.say(f"{parts}eta {clock(left)}")


if __name__ == "__main__":
    cli(main)
