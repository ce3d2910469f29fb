"""What runs recorded in metrics.jsonl, read and checked, and the arithmetic on it that reports need."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import UserError
from metrics import read_metrics

NEEDED = {  # by kind; None is "not known" where it can be
    "run": ("parameters",), "train": ("step", "loss", "lr"), "val": ("step", "val_loss"),
    "hellaswag": ("step", "acc", "acc_norm"), "sample": ("step", "text"), "event": ("event",),
}  # fmt: skip
ALWAYS_KNOWN = ("step", "parameters", "text", "event")
TEXTS = ("text", "event", "hardware", "dtype", "torch", "commit", "time", "tokenizer", "signal", "problem")
TABLES = ("config", "gpt_config", "data", "changed", "settings", "lowest_val_loss")
NUMBERS = (
    "parameters", "max_steps", "world_size", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_sec", "dt", "mfu",
    "seconds", "peak_memory_gb", "mean_loss", "epoch", "val_loss", "word_loss", "acc", "acc_norm", "n", "vocab_size",
    "train_tokens", "train_bytes", "val_tokens", "val_bytes",
)  # fmt: skip
# What may differ between runs that are one experiment: the seed, and what does not touch the losses.
SAME_EXPERIMENT = {"seed", "out_dir", "resume", "report", "log_to", "checkpoint_interval", "keep_checkpoints"}


@dataclass(frozen=True)
class History:
    """One run's records."""

    folder: Path
    records: list[dict]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def header(self) -> dict:
        """The run record; {} where it is missing."""
        return next((record for record in self.records if record["kind"] == "run"), {})

    @property
    def data(self) -> dict:
        """What the run knew of its data; {} for shards made elsewhere."""
        return self.header.get("data") or {}

    @property
    def settings(self) -> dict:
        """All options, as the last resume left them."""
        settings = (self.header.get("config") or {}) | (self.header.get("gpt_config") or {})
        for event in self.events("resume"):
            changed = event.get("changed") or {}
            settings |= {name: pair[-1] for name, pair in changed.items() if isinstance(pair, list) and pair}
        return settings

    def of(self, kind: str) -> list[dict]:
        return [record for record in self.records if record["kind"] == kind]

    def events(self, *names: str) -> list[dict]:
        return [record for record in self.of("event") if record["event"] in names]

    def series(self, kind: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values, where the value is known."""
        known = [record for record in self.of(kind) if record.get(name) is not None]
        return [record["step"] for record in known], [record[name] for record in known]

    def ended(self) -> dict | None:
        """The event that ended the run; None if it goes on, or was killed."""
        ends = self.events("done", "stopped", "gave up", "resume")
        return ends[-1] if ends and ends[-1]["event"] != "resume" else None


def read(folder: str | Path) -> History:
    """A run's records. Raises UserError, in one line, if the folder holds no run, or a record is not one of a run."""
    path = Path(folder, "metrics.jsonl")
    try:
        if not path.exists():
            raise UserError(f"{folder}: no metrics.jsonl, so not a run's folder")
        records = [record for record in read_metrics(path) if record["kind"] in NEEDED]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not records:
        raise UserError(f"{path}: no record of a run in it")
    for record in records:
        for name in NEEDED[record["kind"]]:
            if name not in record or (name in ALWAYS_KNOWN and record[name] is None):
                raise UserError(f"{path}: damaged: a {record['kind']} record has no {name}")
        check_types(record, f"{path}: damaged: a {record['kind']} record")
    return History(Path(folder), records)


def check_types(record: dict, where: str) -> None:
    """Raises UserError where a value is of a type that no run has written."""
    for name, value in record.items():
        number = type(value) in (int, float) and abs(value) < 1e18  # JSON has integers of any length, and Infinity
        right = number if name in NUMBERS else isinstance(value, str if name in TEXTS else dict)
        if value is not None and name in (*NUMBERS, *TEXTS, *TABLES) and not right:
            raise UserError(f"{where} has {name} = {str(value)[:100]!r}")
        if name in ("data", "settings") and isinstance(value, dict):
            check_types(value, f"{where}, in its {name},")


# ---------------------------------------------------------------------------------------------------------------------
# One run


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """The mean of the `span` values around each one (odd; of those that there are, at both ends)."""
    sums, half = np.concatenate([[0.0], np.cumsum(values)]), span // 2
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return ((sums[last] - sums[first]) / (last - first)).tolist()


def span_of(count: int) -> int:
    """How many of so many records a smoothed curve takes the mean of: about a sixteenth, and odd."""
    return count // 16 | 1


def train_loss(run: History) -> tuple[list[int], list[float]]:
    """Steps and train losses: each the mean since the record before; of older runs that of the step alone."""
    records = [(r["step"], r.get("mean_loss"), r["loss"]) for r in run.of("train")]
    known = [(step, loss if mean is None else mean) for step, mean, loss in records if (mean, loss) != (None, None)]
    return [step for step, _ in known], [loss for _, loss in known]


def tokens_per_step(run: History) -> float | None:
    steps, tokens = run.series("train", "tokens")
    return tokens[-1] / steps[-1] if steps and steps[-1] else None


def along(run: History, steps: Sequence[int], axis: str) -> list[float] | None:
    """Steps as positions on an axis: "step", "tokens", "hours" or "minutes" (since the launch, evaluations and saving
    included, work that a kill undid left out). None if the run does not know."""
    if axis == "step":
        return list(steps)
    if axis == "tokens":
        each = tokens_per_step(run)
        return each and [step * each for step in steps]
    known, seconds = run.series("train", "seconds")
    unit = {"hours": 3600, "minutes": 60}[axis]
    return np.interp(steps, [0, *known], [0.0, *(s / unit for s in seconds)]).tolist() if known else None


def tokens_of(run: History) -> float | None:
    """Tokens trained on so far."""
    each = tokens_per_step(run)
    return each and last_step(run) * each


def epochs(run: History) -> float | None:
    """Passes over the training data so far; of older runs by tokens, which ignores the remainder of each shard."""
    _, known = run.series("train", "epoch")
    tokens, whole = tokens_of(run), run.data.get("train_tokens")
    if known or not (tokens and whole):
        return known[-1] if known else None
    return tokens / whole


def last_step(run: History) -> int:
    return max((record["step"] for record in run.records if record.get("step") is not None), default=0)


def seconds_of(run: History) -> float | None:
    """Wall time of all lives of a run, without what kills undid."""
    known = [record["seconds"] for record in run.records if record.get("seconds") is not None]
    return max(known, default=None)


def median_of(run: History, name: str) -> float | None:
    """Of the train records but the first, whose step compiles or warms up."""
    _, values = run.series("train", name)
    return statistics.median(values[1:] or values) if values else None


# ---------------------------------------------------------------------------------------------------------------------
# Several runs


@dataclass(frozen=True)
class Group:
    """Runs whose options and data are the same but for the seed."""

    label: str
    runs: list[History]


@dataclass(frozen=True)
class Curve:
    """A group's values at the steps that all its runs have."""

    steps: list[int]
    runs: list[list[float]]  # one list of values a run

    @property
    def mean(self) -> list[float]:
        return [statistics.fmean(values) for values in zip(*self.runs, strict=True)]

    @property
    def low(self) -> list[float]:
        return [min(values) for values in zip(*self.runs, strict=True)]

    @property
    def high(self) -> list[float]:
        return [max(values) for values in zip(*self.runs, strict=True)]


def curve(series: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Curve:
    """The runs' (steps, values) at their common steps."""
    tables = [dict(zip(*pair, strict=True)) for pair in series]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return Curve(steps, [[table[step] for step in steps] for table in tables])


def group(runs: Sequence[History]) -> list[Group]:
    """Runs by experiment, in the order given. A label is what makes a group differ, or its first folder's name."""
    experiments: dict[str, list[History]] = {}
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in SAME_EXPERIMENT}
        same = repr((sorted(settings.items()), sorted(run.data.items())))
        experiments.setdefault(same if settings else str(run.folder), []).append(run)
    differing = differences([runs[0] for runs in experiments.values()])
    labels = []
    for i in range(len(experiments)):
        values = {name: each[i] for name, each in differing.items()}
        labels.append(", ".join(v if isinstance(v, str) else f"{name}={v}" for name, v in values.items()))
    names = [members[0].name for members in experiments.values()]
    if len(set(labels)) < len(labels) or not all(0 < len(label) <= 50 for label in labels):
        labels = names
    pairs = zip(labels, experiments.values(), strict=True)
    return [Group(label.lstrip("_") or "run", members) for label, members in pairs]  # a legend leaves out _names


def differences(runs: Sequence[History]) -> dict[str, list]:
    """{option: its value in each run}, of those that are not the same in all."""
    names = {name: None for run in runs for name in run.settings if name not in SAME_EXPERIMENT}
    table = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def unit_of(runs: Sequence[History]) -> str:
    """What losses are shown in: "nats per token", or, where tokenizers differ, "bits per byte".

    Raises UserError where they differ and a run does not know its data's bytes: such losses do not compare.
    """
    tokenizers = {(run.data.get("tokenizer"), run.data.get("vocab_size")) for run in runs}
    if len(tokenizers) == 1:
        return "nats per token"
    for run in runs:
        if not all(run.data.get(f"{split}_{what}") for split in ("train", "val") for what in ("tokens", "bytes")):
            raise UserError(
                f"{run.folder}: tokenizers differ, and its data's bytes are not known: losses do not compare"
            )
    return "bits per byte"


def in_unit(run: History, losses: Sequence[float], unit: str, split: str) -> list[float]:
    """Losses in nats per token as the unit has them."""
    if unit == "nats per token":
        return list(losses)
    factor = run.data[f"{split}_tokens"] / run.data[f"{split}_bytes"] / math.log(2)
    return [loss * factor for loss in losses]


def same_data(runs: Sequence[History]) -> bool:
    """Whether they trained and were evaluated on the same text, as far as its size in bytes tells."""
    known = [tuple(run.data.get(name) for name in ("train_bytes", "val_bytes")) for run in runs]
    places = [run.settings.get("data_dir") for run in runs]
    evaluated = {run.settings.get("val_tokens") for run in runs}
    return len(evaluated) == 1 and len(set(known if None not in known[0] else places)) == 1


def val_curve(members: Group, unit: str) -> Curve:
    series = [(run, *run.series("val", "val_loss")) for run in members.runs]
    return curve([(steps, in_unit(run, losses, unit, "val")) for run, steps, losses in series])


def verdict(groups: Sequence[Group], unit: str) -> str | None:
    """Which group ends with the lowest val loss, by how much, with the spread; None if there is nothing to compare."""
    curves = [(each, val_curve(each, unit)) for each in groups]
    ends = sorted([(c.mean[-1], c, each) for each, c in curves if c.steps], key=lambda end: end[0])
    if len(ends) < 2 or not same_data([run for each in groups for run in each.runs]):
        return None
    (mean, first, best), (other, second, next_best) = ends[:2]
    apart = "do not overlap" if first.high[-1] < second.low[-1] else "overlap"
    spread = f"the runs' ranges {apart}" if len(first.runs) + len(second.runs) > 2 else "one run each: seeds not tried"
    steps = [c.steps[-1] for c in (first, second)]
    at = f"step {steps[0]:,}" if steps[0] == steps[1] else f"steps {steps[0]:,} and {steps[1]:,}"
    reached = next((s for s, value in zip(first.steps, first.mean, strict=True) if value <= other), None)
    sooner = f", whose loss it reaches by step {reached:,}" if reached is not None and reached < steps[1] else ""
    return (
        f"{best.label}: {mean:.4f}, {other - mean:.4f} {unit} below {next_best.label} ({other:.4f}) at {at}{sooner}; "
        f"{spread}"
    )
