"""Train a GPT: on a laptop, one GPU, or many.

    python train_gpt2.py config/quickstart.py
    torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_124m.py --out_dir=out/mine

The run goes to out_dir: metrics.jsonl and ckpt_<step>.pt. A stopped run goes on with --resume=True.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
from configurator import UserError, cli, configure
from dataloader import Windows, read_meta, train_batches, val_batches
from distributed import World
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
        for name in ("batch_size", "total_batch_size", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must be at least 1")
        for name in ("seq_len", "max_steps", "epochs"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must be more than 0")
        for name in ("val_interval", "sample_interval", "checkpoint_interval", "keep_checkpoints", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must not be negative")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}")


# Dense bf16 (T4, V100: fp16) tensor-core peak in FLOP/s, from NVIDIA's data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "A40": 150e12, "L40S": 362e12,
    "L4": 121e12, "V100": 125e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "RTX 5090": 210e12,
}  # fmt: skip


def main() -> int:
    config, gpt_config, given = configure(TrainConfig, GPTConfig)
    world = World(config.device)
    device = world.device

    def say(*words: object) -> None:
        if world.is_main:
            print(*words, flush=True)

    # Everything that can be wrong is looked at before anything is written.
    resume_path = world.from_main(find_run(config)) if world.size == 1 else agree(world, lambda: find_run(config))
    saved = checkpoint.load(resume_path) if resume_path else None
    if saved and saved["done"] and not wants_more(saved, config):
        say(f"{config.out_dir}: this run is done, at step {saved['step']}")
        return 0
    meta = read_meta(config.data_dir)
    gpt_config, weights, tokenizer = initial_model(config, gpt_config, given, meta, saved)
    T = config.seq_len or gpt_config.block_size
    if T > gpt_config.block_size:
        raise UserError(f"seq_len = {T} is more than block_size = {gpt_config.block_size}")
    train = Windows(config.data_dir, "train", T)
    val = Windows(config.data_dir, "val", T) if config.val_interval else None
    if val and config.val_tokens < T:
        raise UserError(f"val_tokens = {config.val_tokens} is less than one window of seq_len = {T}")
    rows = config.total_batch_size // T  # windows in a step
    if config.total_batch_size % (config.batch_size * T * world.size):
        parts = f"batch_size {config.batch_size} x seq_len {T} x {world.size} processes"
        raise UserError(f"total_batch_size = {config.total_batch_size} is not a multiple of {parts}")
    micro_batches = rows // (config.batch_size * world.size)
    max_steps = planned_steps(config, len(train), rows)
    if config.sample_interval and not tokenizer:
        raise UserError(f"{config.data_dir}: its tokenizer is not known, so no samples; use --sample_interval=0")
    if config.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("compile = True needs a C++ compiler (g++) on a CPU; install one, or use --compile=False")

    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    model = GPT(gpt_config)
    if weights:
        model.load_state_dict(weights)
    model.to(device)
    dtype = pick_dtype(config.dtype, device)
    autocast = contextlib.nullcontext()
    if dtype != torch.float32:
        autocast = torch.autocast(device.type, dtype)
    optimizers = make_optimizers(
        model, config.optimizer, config.learning_rate, config.weight_decay, (config.beta1, config.beta2)
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best = 0, {"step": None, "val_loss": math.inf}
    if saved:
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(saved["scaler"])
        step, best = saved["step"], saved["best"]
    del saved, weights
    if config.compile:
        model.compile()
    wrapped = world.wrap(model)

    log = Metrics(config.out_dir, step if resume_path else None) if world.is_main else None
    record = log.write if log else lambda kind, **values: None
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    if resume_path:
        record("event", event="resume", step=step, path=str(resume_path), world_size=world.size)
    else:
        record(
            "run", config=dataclasses.asdict(config), gpt_config=dataclasses.asdict(gpt_config),
            parameters=model.num_params(), max_steps=max_steps, dtype=str(dtype).removeprefix("torch."),
            commit=git_commit(), torch=torch.__version__, python=platform.python_version(), hardware=card,
            world_size=world.size, data=meta,
        )  # fmt: skip
    say(f"model {model.num_params():,} parameters | data {len(train):,} windows of {T} tokens | {max_steps:,} steps")
    say(f"{world.size} x {card}, {dtype} | {rows:,} windows a step = {micro_batches} x {config.batch_size} a process")
    say(f"{'resuming at step ' + str(step) if resume_path else 'writing'} -> {config.out_dir}")

    @torch.no_grad()
    def evaluate() -> float:
        """Mean loss over the first val_tokens of the val split, the same set of tokens on any number of processes."""
        model.eval()
        losses, counts = [], []
        for x, y in val_batches(val, config.val_tokens, config.batch_size, world.rank, world.size, device):
            forward = model if len(x) == config.batch_size else model.forward  # a ragged batch is not compiled anew
            with autocast:
                losses.append(forward(x, y))
            counts.append(y.numel())
        model.train()
        total = sum(loss * n for loss, n in zip(torch.stack(losses).tolist(), counts, strict=True)) if losses else 0.0
        loss, tokens = world.sum([total, sum(counts)])
        return loss / tokens

    def sample() -> str:
        from tokenizer import get_tokenizer

        enc = get_tokenizer(tokenizer)
        model.eval()
        start = enc.encode_ordinary(config.sample_start) or [enc.eot_token]
        generator = torch.Generator(device).manual_seed(config.seed)
        idx = torch.tensor([start], device=device)
        how = {"temperature": 0.8, "top_k": 200, "vocab_size": enc.n_vocab, "eot": enc.eot_token}
        with autocast:
            ids = [int(token) for token in model.generate(idx, 200, generator=generator, **how)]
        model.train()
        return config.sample_start + enc.decode([i for i in ids if i != enc.eot_token])

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "step": step,
            "best": best,
            "done": done,
            "gpt_config": dataclasses.asdict(gpt_config),
            "config": dataclasses.asdict(config),
            "tokenizer": tokenizer,
        }
        path = checkpoint.save(state, config.out_dir, config.keep_checkpoints, best["step"])
        say(f"saved {path}")

    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    batches = train_batches(train, config.seed, rows, config.batch_size, world.rank, world.size, device, step + 1)
    params = list(model.parameters())
    tokens_each = rows * T
    flops_each = model.flops_per_token(T) * tokens_each / world.size
    done = step >= max_steps
    saved_step, timed_from, timer = step if resume_path else None, step, time.perf_counter()
    width = len(str(max_steps))

    while True:
        # Between two steps: validation, samples, checkpoint, the end.
        pause = time.perf_counter()
        stopping = bool(signals) if world.size == 1 else world.sum([len(signals)])[0] > 0

        def due(interval: int) -> bool:
            return interval > 0 and not stopping and (step % interval == 0 or done)  # noqa: B023

        if due(config.val_interval):
            val_loss = evaluate()
            if val_loss < best["val_loss"]:
                best = {"step": step, "val_loss": val_loss}
            record("val", step=step, val_loss=finite(val_loss))
            say(f"step {step:>{width}}/{max_steps} | val loss {val_loss:.4f}{bits_per_byte(val_loss, meta)}")
            if config.target_val_loss is not None and val_loss < config.target_val_loss:
                record("event", event="target_val_loss reached", step=step)
                done = True
        if due(config.sample_interval) and world.is_main:
            text = sample()
            record("sample", step=step, text=text)
            say(f"--- sample at step {step}\n{text}\n---")
        last = done or stopping
        if step != saved_step and step > 0 and (last or due(config.checkpoint_interval)):
            if world.is_main:
                save()
            saved_step = step
        if last:
            break
        timer += time.perf_counter() - pause

        # One step: gradients of the whole batch, micro-batch by micro-batch, and an update.
        step += 1
        if gpt_config.dropout:  # a pure function of (seed, step, rank), so there is no generator state to save
            torch.manual_seed(hash((config.seed, step, world.rank)))
        lr = learning_rate(
            step, config.schedule, config.learning_rate, config.min_lr, config.warmup_steps, max_steps,
            config.decay_fraction,
        )  # fmt: skip
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
        norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip or math.inf)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()

        loss = loss.item()  # the one wait for the accelerator in a step
        done = step >= max_steps
        if config.target_loss is not None and loss < config.target_loss:
            record("event", event="target_loss reached", step=step)
            done = True
        if step == 1 or step % config.log_interval == 0 or done:
            now = time.perf_counter()
            dt = (now - timer) / (step - timed_from)
            timer, timed_from = now, step
            mfu = flops_each / dt / peak if peak else None
            record(
                "train", step=step, loss=finite(loss), lr=lr, grad_norm=finite(norm.item()), tokens=step * tokens_each,
                tokens_per_sec=tokens_each / dt, dt=dt, mfu=mfu,
            )  # fmt: skip
            say(
                f"step {step:>{width}}/{max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.4f} | "
                f"{dt * 1e3:.1f} ms | {tokens_each / dt:,.0f} tok/s | "
                f"{f'mfu {mfu:.1%} | ' if mfu else ''}eta {clock(dt * (max_steps - step))}"
            )

    batches.close()
    if stopping and not done:
        name = signal.Signals(signals[0]).name if signals else "a signal to another process"
        record("event", event="stopped", step=step, signal=name)
        say(f"stopped by {name} at step {step}; the same command with --resume=True goes on")
    elif world.is_main:
        say(f"done: {step} steps in {config.out_dir}; try: python sample.py --model={config.out_dir}")
    world.close()
    return 0


def agree(world: World, decide) -> Path | None:
    """Rank 0 decides for all; a mistake it finds is every rank's."""
    error = result = None
    if world.is_main:
        try:
            result = decide()
        except UserError as mistake:
            error = str(mistake)
    result, error = world.from_main((result, error))
    if error:
        raise UserError(error)
    return result


def find_run(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, or None for a run from the start. Raises UserError rather than overwrite a run."""
    if config.resume:
        return checkpoint.newest_whole(config.out_dir)
    if checkpoint.find(config.out_dir) or Path(config.out_dir, "metrics.jsonl").exists():
        raise UserError(f"out_dir {config.out_dir} already holds a run; go on with --resume=True, or name another")
    return None


def wants_more(saved: dict, config: TrainConfig) -> bool:
    """Whether a finished run was asked for a longer one."""
    return any(saved["config"][name] != getattr(config, name) for name in ("max_steps", "epochs"))


def initial_model(
    config: TrainConfig, gpt_config: GPTConfig, given: dict, meta: dict, saved: dict | None
) -> tuple[GPTConfig, dict | None, str | None]:
    """The architecture, the weights to start from (None: random ones), and the tokenizer that the data was made with."""
    tokenizer, weights = data_tokenizer(config.data_dir, meta, gpt_config), None
    if meta and "vocab_size" not in given:
        gpt_config = dataclasses.replace(gpt_config, vocab_size=meta["vocab_size"])
    if saved:
        other = GPTConfig(**saved["gpt_config"])
        for field in dataclasses.fields(GPTConfig):
            theirs, ours = getattr(other, field.name), getattr(gpt_config, field.name)
            if theirs != ours and field.name != "dropout":
                raise UserError(f"{config.out_dir}: its model has {field.name} = {theirs}, this command says {ours}")
        weights = saved["model"]
    elif config.init_from != "scratch":
        model, _, path = checkpoint.load_model(config.init_from, torch.device("cpu"))
        gpt_config, weights = fit(model, gpt_config, given, meta, str(path))
    if meta and gpt_config.vocab_size < meta["vocab_size"]:
        raise UserError(
            f"vocab_size = {gpt_config.vocab_size}, but {config.data_dir} was made with {meta['vocab_size']} ids"
        )
    return gpt_config, weights, tokenizer


def fit(model: GPT, asked: GPTConfig, given: dict, meta: dict, path: str) -> tuple[GPTConfig, dict]:
    """Weights with their own architecture, but dropout as asked, block_size cropped and vocab_size padded."""
    theirs = model.config
    for name in given:
        if name in ("dropout", "block_size", "vocab_size") or not hasattr(theirs, name):
            continue
        if getattr(asked, name) != getattr(theirs, name):
            raise UserError(f"{given[name]}: {name} = {getattr(asked, name)}, but {path} has {getattr(theirs, name)}")
    block_size = asked.block_size if "block_size" in given else theirs.block_size
    vocab_size = asked.vocab_size if "vocab_size" in given else max(theirs.vocab_size, meta.get("vocab_size", 0))
    if block_size > theirs.block_size and theirs.pos == "learned":
        raise UserError(f"block_size = {block_size}, but {path} has positions for {theirs.block_size} only")
    if vocab_size < theirs.vocab_size:
        raise UserError(f"vocab_size = {vocab_size}, but {path} has {theirs.vocab_size}; it can only be padded")
    weights = dict(model.state_dict())
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][:block_size]
    for name in ("wte.weight", "lm_head.weight"):
        extra = vocab_size - theirs.vocab_size
        weights[name] = torch.cat([weights[name], weights[name].mean(0, keepdim=True).expand(extra, -1)])
    dropout = asked.dropout if "dropout" in given else theirs.dropout
    return dataclasses.replace(theirs, block_size=block_size, vocab_size=vocab_size, dropout=dropout), weights


def data_tokenizer(data_dir: str, meta: dict, gpt_config: GPTConfig) -> str | None:
    """What get_tokenizer takes: a name, or the whole content of the data's tokenizer file; None where it is unknown."""
    if not meta:
        return "gpt2" if gpt_config.vocab_size in (50257, 50304) else None
    name = meta["tokenizer"]
    if name.endswith(".json"):
        path = Path(data_dir, name) if Path(data_dir, name).exists() else Path(name)
        return path.read_text(encoding="utf-8")
    return name


def planned_steps(config: TrainConfig, num_windows: int, rows: int) -> int:
    """The last step: max_steps or so many epochs, whichever comes sooner; one epoch where neither is given."""
    epochs = config.epochs if config.epochs or config.max_steps else 1
    steps = [config.max_steps] if config.max_steps else []
    if epochs:
        steps.append(math.floor(epochs * num_windows / rows))
    if min(steps) < 1:
        raise UserError(f"{config.data_dir}: {epochs} epochs of {num_windows} windows are less than one step of {rows}")
    return min(steps)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on the cards that compute in it, float16 on older ones, float32 elsewhere."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class Metrics:
    """out_dir/metrics.jsonl, one JSON object a line. A resumed run's records past its step are dropped first."""

    def __init__(self, out_dir: str, resumed_at: int | None):
        os.makedirs(out_dir, exist_ok=True)
        path = Path(out_dir, "metrics.jsonl")
        kept = []
        if resumed_at is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that the last run died in
                    continue
                evaluation = entry["kind"] in ("val", "hellaswag", "sample")
                if entry.get("step", 0) < resumed_at + (not evaluation):
                    kept.append(line + "\n")
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115, a line is written when it is made

    def write(self, kind: str, **values: object) -> None:
        self.file.write(json.dumps({"kind": kind, **values}) + "\n")


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def bits_per_byte(loss: float, meta: dict) -> str:
    """How well the text is compressed, whatever the tokenizer: nats per token to bits per byte of UTF-8."""
    if not meta.get("val_bytes"):
        return ""
    return f" | {loss / math.log(2) * meta['val_tokens'] / meta['val_bytes']:.4f} bits per byte"


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
    sys.exit(cli(main))
