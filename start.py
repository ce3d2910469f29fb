"""What a run starts from, decided before it writes anything.

`look` finds the run to go on with, merges its options with those asked for, opens the data and works out the sizes. A
mistake in the options, the data or the machine is a UserError here, and nothing has been touched.
"""

import contextlib
import json
import math
import shutil
import typing
import zlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import checkpoint
from configurator import UserError, check, out_of_memory
from dataloader import DataGuard, Windows, data_tokenizer, read_meta
from device import check_tokens, code
from distributed import World
from metrics import Metrics, read_metrics
from model import GPTConfig


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from the config, the data and the number of processes."""

    rows: int  # windows in a step, on all processes together
    micro_batches: int  # of batch_size windows, in a step of each process
    warmup_steps: int
    max_steps: int
    max_seconds: float  # since the launch


@dataclass
class Start:
    """What `look` found."""

    config: Any  # train_gpt2.py's TrainConfig, every size filled in
    gpt_config: GPTConfig
    path: Path | None  # the checkpoint to resume
    saved: dict  # its content; {} for a run from the start
    changed: dict[str, list]  # {option: [saved, now]} of a resumed run
    weights: dict | None  # None: new ones
    meta: dict  # of the data
    tokenizer: str | None  # of the data: a name or a tokenizer.json's content; None: unknown
    train_data: Windows
    val_data: Windows | None  # None: no validation
    guard: DataGuard
    plan: Plan

    def release(self) -> None:
        """Forget the checkpoint's content once it is in use: a deleted file stays on disk while it is mapped."""
        self.saved, self.weights = {}, None


def look(
    config: Any, gpt_config: GPTConfig, sources: dict[str, str], may_change: Collection[str], world: World, log: Metrics
) -> Start:
    """Everything that a run with these options needs to begin or to go on. `sources` says where each option was set;
    `may_change` names the options that may differ from a resumed run's. Raises UserError on every rank alike."""
    path, saved = find_run(config, sources, world, log)

    def look_here() -> tuple[Start, dict[str, str]]:
        start = open_start(path, saved, config, gpt_config, sources, may_change, world)
        return start, facts(start) | code()

    start = world.together(look_here)
    world.on_main(start.guard.check)
    return start


def facts(start: Start) -> dict[str, str]:
    """What all ranks must agree on: each option, and what the data is, wherever each machine has it."""
    options = asdict(start.config) | asdict(start.gpt_config)
    del options["out_dir"], options["data_dir"]
    splits = [data for data in (start.train_data, start.val_data) if data]
    shards = {path.name: length for data in splits for path, length in zip(data.paths, data.lengths, strict=True)}
    content = json.dumps([start.meta, start.tokenizer, shards]).encode()
    about = f"{len(shards)} shards, {sum(shards.values()):,} tokens, checksum {zlib.crc32(content):08x}"
    found = {f"option {name} =": repr(value) for name, value in options.items()}
    return found | {"the data is": about}


def open_start(
    path: Path | None, saved: dict, config: Any, gpt_config: GPTConfig, sources: dict[str, str],
    may_change: Collection[str], world: World,
) -> Start:  # fmt: skip
    """What this rank finds; no rank waits for another here. Raises UserError."""
    config, gpt_config, changed = resume_options(saved, config, gpt_config, sources, may_change, path)
    world.use(config.device)
    meta = read_meta(config.data_dir)
    gpt_config, weights = starting_point(saved, config, gpt_config, sources, meta)
    tokenizer = data_tokenizer(config.data_dir, meta, gpt_config.vocab_size)
    T = config.seq_len or gpt_config.block_size
    config = replace(config, seq_len=T, total_batch_size=config.total_batch_size or config.batch_size * T * world.size)
    check_options(config, gpt_config, meta, tokenizer, world)
    ids = meta.get("vocab_size", gpt_config.vocab_size)
    train_data = Windows(config.data_dir, "train", T, ids)
    val_data = Windows(config.data_dir, "val", T, ids) if config.val_interval else None
    plan = make_plan(config, len(train_data), world)
    guard = DataGuard(config.data_dir, ["train", "val"] if val_data else ["train"], meta, saved.get("data", {}))
    return Start(
        config, gpt_config, path, saved, changed, weights, meta, tokenizer, train_data, val_data, guard, plan
    )  # fmt: skip


def find_run(config: Any, sources: dict[str, str], world: World, log: Metrics) -> tuple[Path | None, dict]:
    """The checkpoint to go on from and its content; (None, {}) for a run from the start.

    A run that died before its first checkpoint left its record: then (None, its options). Raises UserError rather than
    overwrite a run, or start one that the user did not describe.
    """

    def find() -> tuple[Path | None, dict]:
        begun = log.lock()
        records = read_metrics(log.path) if begun else []
        restarted = world.restarts > 0 and any(record.get("launch") == world.launch for record in records)
        if not config.resume and not restarted:  # torchrun restarts what this very launch began
            if checkpoint.find(config.out_dir) or (begun and log.path.stat().st_size):
                raise UserError(
                    f"out_dir {config.out_dir} already holds a run; go on with --resume=True, or name another"
                )
            return None, {}
        path = checkpoint.newest_whole(config.out_dir)
        if path:
            return path, {}
        record = next((record for record in records if record["kind"] == "run"), {})
        options = {name: record[name] for name in ("config", "gpt_config") if isinstance(record.get(name), dict)}
        if len(options) == 2:
            log.say(f"{config.out_dir} has no checkpoint: starting again at step 0 with this run's options")
            return None, options
        if not sources.keys() - {"out_dir", "resume"}:
            raise UserError(
                f"out_dir {config.out_dir} holds no run to go on with; check its name, or say what to train"
            )
        if not log.path.parent.is_dir():
            log.say(f"{config.out_dir} does not exist: this is a fresh start")
        return None, {}

    def find_for_all() -> tuple[Path | None, dict, int, tuple | None]:
        path, options = find()
        return path, options, newest_step(config.out_dir), file_status(path)

    path, options, newest, status = world.on_main(find_for_all)

    def look_here() -> tuple[bool, dict[str, str]]:
        if newest_step(config.out_dir) > newest:  # ranks may be dealt anew among machines
            where = f"out_dir {config.out_dir} holds a checkpoint of a later step than rank 0's machine does"
            raise UserError(f"{where}; share out_dir between the machines, or start where rank 0 was")
        return file_status(path) == status, {}

    if world.any(not world.together(look_here)):  # out_dir is not shared
        return path, world.from_main(lambda: checkpoint.load_run(path))
    return path, checkpoint.load_run(path) if path else options


def newest_step(out_dir: str) -> int:
    return max(map(checkpoint.step_of, checkpoint.find(out_dir)), default=-1)


def file_status(path: Path | None) -> tuple[int, int] | None:
    """What tells whether two machines see the same file."""
    if not path or not path.exists():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def resume_options(
    saved: dict, config: Any, gpt_config: GPTConfig, sources: dict[str, str], may_change: Collection[str],
    path: Path | None,
) -> tuple[Any, GPTConfig, dict[str, list]]:  # fmt: skip
    """The two configs to go on with, and {option: [saved, now]} of what changes. Without saved ones: as asked.

    Raises UserError where an option is set now that would make it another run.
    """
    if not saved:
        return config, gpt_config, {}
    where = path or Path(config.out_dir, "metrics.jsonl")
    left_open = {name for name in ("seq_len", "total_batch_size") if getattr(config, name) is None}
    sources = {"out_dir": "--out_dir", "resume": "--resume"} | sources
    sources = {name: source for name, source in sources.items() if name not in left_open}
    config = merge(saved["config"], config, sources, may_change, where)
    gpt_config = merge(saved["gpt_config"], gpt_config, sources, (), where)
    changed = {
        name: [saved["config"].get(name), value]
        for name, value in asdict(config).items()
        if value != saved["config"].get(name) and name not in ("out_dir", "resume")
    }
    return config, gpt_config, changed


def merge(saved: dict, asked: Any, sources: dict[str, str], may_change: Collection[str], path: Path) -> Any:
    """The saved options as a dataclass, with the values of those that are set now and may change."""
    values, hints = {}, typing.get_type_hints(type(asked))
    for field in fields(asked):
        name, want = field.name, getattr(asked, field.name)
        have = check(name, saved.get(name, field.default), hints, str(path))
        if name in sources and want != have and name not in may_change:
            raise UserError(
                f"{sources[name]}: {name} = {want!r}, but this run has {have!r} ({path}); keep that, or start another"
            )
        values[name] = want if name in sources else have
    try:
        return type(asked)(**values)
    except ValueError as error:  # a rule across the options
        raise UserError(f"{error} ({path} and what is set now)") from None


def starting_point(
    saved: dict, config: Any, gpt_config: GPTConfig, sources: dict[str, str], meta: dict
) -> tuple[GPTConfig, dict | None]:
    """The architecture, and the weights to start with (None: new ones)."""
    if "model" in saved:
        return gpt_config, saved["training_weights"] or saved["model"]
    if config.init_from != "scratch":
        from weights import starting_weights  # tokenizers take a while to import

        asked = vars(gpt_config) if saved else sources  # a run that begins again has all its options already
        return starting_weights(config.init_from, gpt_config, asked, config.data_dir, meta)
    if meta and "vocab_size" not in sources and not saved:
        gpt_config = replace(gpt_config, vocab_size=meta["vocab_size"])
    return gpt_config, None


def check_options(config: Any, gpt_config: GPTConfig, meta: dict, tokenizer: str | None, world: World) -> None:
    """Raises UserError where options, model, data and machine do not go together."""
    T, one_round = config.seq_len, config.batch_size * config.seq_len * world.size
    if gpt_config.vocab_size < meta.get("vocab_size", 0):
        raise UserError(f"vocab_size = {gpt_config.vocab_size}, but {config.data_dir} has {meta['vocab_size']} ids")
    if gpt_config.block_size < T:
        raise UserError(f"seq_len = {T} is more than block_size = {gpt_config.block_size}")
    if config.val_interval and config.val_tokens < T:
        raise UserError(f"val_tokens = {config.val_tokens} is less than one window of seq_len = {T}")
    check_tokens(config.batch_size, T, world.device)
    if config.total_batch_size % one_round:
        parts = f"batch_size {config.batch_size} x seq_len {T} x {world.size} processes"
        below = config.total_batch_size // one_round * one_round
        near = " or ".join(f"--total_batch_size={size}" for size in (below, below + one_round) if size)
        raise UserError(f"total_batch_size = {config.total_batch_size} is not a multiple of {parts}; use {near}")
    for name in ("sample_interval", "hellaswag_interval"):
        if getattr(config, name) and not tokenizer:
            raise UserError(f"{config.data_dir}: its tokenizer is not known, which {name} needs; use --{name}=0")
    compilers = ("g++", "clang++", "c++") if world.device.type == "cpu" else ("gcc", "clang", "cc")  # CUDA: Triton's
    if compiles(config, world.device) and not any(map(shutil.which, compilers)):
        raise UserError("compile = True needs a C++ compiler; install g++, or use --compile=False")


def compiles(config: Any, device: torch.device) -> bool:
    return device.type == "cuda" if config.compile is None else config.compile


def make_plan(config: Any, num_windows: int, world: World) -> Plan:
    """The run's sizes. It ends at max_steps or after its epochs, whichever comes sooner; with neither, after one."""
    rows = config.total_batch_size // config.seq_len
    epochs = config.epochs if config.epochs or config.max_steps else 1
    ends = [config.max_steps] if config.max_steps else []
    if epochs:
        ends.append(math.floor(epochs * num_windows / rows))
    if min(ends) < 1:
        raise UserError(f"{config.data_dir}: {epochs} epochs of {num_windows} windows are less than one step of {rows}")
    warmup_steps = min(715, round(0.05 * min(ends))) if config.warmup_steps is None else config.warmup_steps
    if config.warmup_fraction is not None:
        warmup_steps = round(config.warmup_fraction * min(ends))
    max_seconds = 3600 * config.max_hours if config.max_hours else math.inf
    return Plan(rows, rows // (config.batch_size * world.size), warmup_steps, min(ends), max_seconds)


def load_hellaswag(
    config: Any, tokenizer: str | None, block_size: int, world: World
) -> tuple[list, str | None]:  # fmt: skip
    """HellaSwag's examples if the run wants them; and why there are none, if they cannot be downloaded."""
    if not config.hellaswag_interval:
        return [], None
    import hellaswag  # with tokenizers, which take a while to import
    from tokenizer import get_tokenizer

    try:
        return world.on_main(lambda: hellaswag.load(config.hellaswag_data, get_tokenizer(tokenizer), block_size)), None
    except UserError as error:
        if config.hellaswag_data:
            raise
        return [], f"no HellaSwag in this run: {error}"  # a machine without a network can train all the same


@contextlib.contextmanager
def advice_on_memory(config: Any, begun: bool = False) -> Iterator[None]:
    """Turns running out of memory into a UserError that says what was asked and what to do, on this process alone."""
    try:
        yield
    except Exception as error:
        problem = out_of_memory(error)
        if not problem:
            raise
        advice = [f"--batch_size={config.batch_size // 2}"] if config.batch_size > 1 else []
        saving = ("activation_checkpointing", "chunked_loss")
        advice += [f"--{name}=True" for name in saving if not getattr(config, name)]
        asked = f"batch_size {config.batch_size}" + (f" x seq_len {config.seq_len}" if config.seq_len else "")
        use = " or ".join(advice) or "a smaller model or seq_len"
        go_on = "; with any of them this run goes on by --resume=True" if begun and advice else ""
        raise UserError(f"{problem} at {asked}; use {use}{go_on}", alone=True) from None
