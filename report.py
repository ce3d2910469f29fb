"""A run as a report: its curves, numbers, events and samples; or several runs in the same axes.

    python report.py out/mine                           writes report.md and its plots into out/mine
    python report.py out/a1 out/a2 out/b1 out/b2        compares them in out/comparison; seeds become mean and range
    python report.py out/mine --dollars_per_hour=24     what it cost

A run that is going on has a report too. Times, tokens and epochs are those of metrics.jsonl.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import history
from configurator import PathStr, UserError, at_least, check, cli, configure
from files import whole_file
from history import Group, History, last_step
from metrics import bits_per_byte, clock
from plots import plots

KNOWN_AT_THE_START = ("val data", "hardware", "parameters")


@dataclass(frozen=True)
class ReportConfig:
    out_dir: PathStr | None = None  # where it goes; None: the run's folder, or "comparison" beside the first of several
    dollars_per_hour: float | None = None  # of all the machines of a run together, for its cost
    dpi: int = 100  # resolution of the plots

    def __post_init__(self) -> None:
        at_least(self, 0, "dollars_per_hour")
        if not 10 <= self.dpi <= 1200:
            raise ValueError(f"dpi = {self.dpi}, but it must be in [10, 1200]")


def main() -> int:
    folders = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    config, _ = configure(ReportConfig, argv=[arg for arg in sys.argv[1:] if arg.startswith("-")])
    if not folders:
        raise UserError("which run? python report.py RUN_FOLDER, e.g. out/quickstart")
    for folder in folders:
        check("folder", folder, {"folder": str}, "RUN_FOLDER")
    runs = [history.read(os.path.expanduser(folder)) for folder in dict.fromkeys(folders)]
    own = runs[0].folder if len(runs) == 1 else runs[0].folder.parent / "comparison"
    print(write(runs, config.out_dir or own, config.dollars_per_hour, config.dpi))
    return 0


def write(runs: Sequence[History], out_dir: str | Path, dollars_per_hour: float | None = None, dpi: int = 100) -> Path:
    """Write report.md and its plots into out_dir; returns the path of report.md.

    Raises UserError where the runs do not compare, or out_dir cannot be written.
    """
    unit, groups = history.unit_of(runs), history.group(runs)
    out_dir, pictures = Path(out_dir), {}
    for name, figure in plots(groups, unit).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"optimize": True})
        pictures[name] = buffer.getvalue()
    text = page(runs[0], list(pictures), dollars_per_hour) if len(runs) == 1 else None
    text = text or comparison(groups, unit, list(pictures), dollars_per_hour)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in (pictures | {"report.md": text.encode()}).items():
            path = out_dir / name
            with whole_file(path) as file:
                file.write(content)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None
    return out_dir / "report.md"


# ---------------------------------------------------------------------------------------------------------------------
# Words


def facts(run: History, dollars_per_hour: float | None = None) -> dict[str, str]:
    """A run's numbers, each with its unit; what is not known is left out."""
    steps, losses = run.series("val", "val_loss")
    rows = {"run": state_of(run), "steps": steps_of(run)}
    if steps:
        bits = bits_per_byte(losses[-1], run.data)
        rows["val loss"] = f"{losses[-1]:.4f} nats per token at step {steps[-1]:,}" + (
            f" ({bits:.4f} bits per byte)" if bits else ""
        )
        lowest = min(losses)
        rows["lowest val loss"] = f"{lowest:.4f} nats per token at step {steps[losses.index(lowest)]:,}"
        rows["val data"] = val_data(run)
    records = run.of("train")
    if records and records[-1].get("mean_loss") is not None:
        behind = records[-1]["step"] - (records[-2]["step"] if len(records) > 1 else 0)
        rows["train loss"] = f"{records[-1]['mean_loss']:.4f} nats per token, mean of the last {behind:,} steps"
    elif records and records[-1]["loss"] is not None:
        rows["train loss"] = f"{records[-1]['loss']:.4f} nats per token, of the last step alone"
    scores = run.of("hellaswag")
    if scores and None not in (scores[-1]["acc"], scores[-1]["acc_norm"]):
        n = f", of {scores[-1]['n']:,} examples" if scores[-1].get("n") else ""
        rows["HellaSwag"] = f"acc {scores[-1]['acc']:.4f}, acc_norm {scores[-1]['acc_norm']:.4f}{n}"
    return rows | machine_of(run, dollars_per_hour)


def summary(run: History) -> str:
    """What the terminal says of a run at its end: the facts but for what it said at the start."""
    return "\n".join(f"{what}: {value}" for what, value in facts(run).items() if what not in KNOWN_AT_THE_START)


def machine_of(run: History, dollars_per_hour: float | None) -> dict[str, str]:
    """Time, speed, memory, cost and hardware."""
    rows, seconds, tokens = {}, history.seconds_of(run), history.tokens_of(run)
    if seconds is not None:
        rows["wall time"] = f"{clock(seconds)} h:mm:ss, with evaluations and saving"
    speed, ms = history.median_of(run, "tokens_per_sec"), history.median_of(run, "dt")
    if speed is not None:
        rows["throughput"] = f"{speed:,.0f} tokens/s in training steps (median)" + (
            f", {tokens / seconds:,.0f} over the wall time" if tokens and seconds else ""
        )
    if ms is not None:
        rows["step"] = f"{ms * 1e3:,.1f} ms (median)"
    mfu = history.median_of(run, "mfu")
    if mfu is not None:
        rows["MFU"] = f"{mfu:.1%} of the card's peak (median)"
    _, memory = run.series("train", "peak_memory_gb")
    if memory:
        rows["peak memory"] = f"{max(memory):.2f} GB of tensors on each device (10^9 bytes)"
    if dollars_per_hour is not None and seconds is not None:
        price = cost(seconds, dollars_per_hour)
        rows["cost"] = f"${price:,.2f} at ${dollars_per_hour:,.2f} an hour"
    about = [f"{run.header[name]}" for name in ("hardware", "dtype") if run.header.get(name)]
    if about:
        versions = f"torch {run.header.get('torch')}, commit {(run.header.get('commit') or 'unknown')[:12]}"
        rows["hardware"] = f"{run.header.get('world_size') or 1} x {' in '.join(about)}; {versions}"
    if run.header.get("parameters") is not None:
        rows["parameters"] = f"{run.header['parameters']:,}"
    return rows


def cost(seconds: float, dollars_per_hour: float) -> float:
    """Dollars."""
    return seconds / 3600 * dollars_per_hour


def state_of(run: History) -> str:
    event = run.ended()
    if event is None:
        return f"not ended: last record at step {last_step(run):,}"
    why = f" by {event['signal']}" if event.get("signal") else ""
    why += " (target reached)" if event.get("target_reached") else ""
    why += " (no new low for --patience evaluations)" if event.get("plateau") else ""
    return f"{event['event']}{why} at step {last_step(run):,}"


def steps_of(run: History) -> str:
    each, passes = history.tokens_per_step(run), history.epochs(run)
    planned = run.settings.get("max_steps") or run.header.get("max_steps")
    return (
        f"{last_step(run):,}"
        + (f" of {planned:,}" if type(planned) is int else "")
        + (f", each of {each:,.0f} tokens: {last_step(run) * each:,.0f} tokens" if each else "")
        + (f", {passes:.3g} epochs" if passes is not None else "")
    )


def val_data(run: History) -> str:
    """Which text the val loss is of."""
    made_from, tokens = run.data.get("settings") or {}, run.settings.get("val_tokens")
    whole = run.data.get("val_tokens")
    part = f"the first {tokens:,} tokens" if type(tokens) is int and not (whole and tokens >= whole) else "all tokens"
    split = made_from.get("val_split")
    source = made_from.get("dataset") or made_from.get("files") or made_from.get("url") or run.settings.get("data_dir")
    return f"{part} of {f'split {split} of ' if split else 'the val shards of '}{source}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def images(names: Sequence[str]) -> str:
    return "\n\n".join(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in names)


def page(run: History, pictures: Sequence[str], dollars_per_hour: float | None) -> str:
    """One run's report.md."""
    parts = [f"# {cell(run.name)}", images(pictures[:1])]
    parts.append(table(["what", "value"], list(facts(run, dollars_per_hour).items())))
    parts.append(images(pictures[1:]))
    events = [(event.get("step", ""), event["event"], about(event)) for event in run.of("event")]
    if events:
        parts += ["## Events", table(["step", "event", "about"], events)]
    if samples := run.of("sample")[-3:]:
        parts.append("## Last samples")
        parts += [f"Step {sample['step']:,}:\n\n{quoted(sample['text'])}" for sample in samples]
    if run.settings:
        options = "\n".join(f"{name} = {value!r}" for name, value in sorted(run.settings.items()))
        parts += ["## Options", f"```\n{options}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def about(event: dict) -> str:
    """What an event's record says that is worth a line."""
    names = ("signal", "checkpoint", "loss", "grad_norm", "problem", "world_size", "hardware")
    said = [f"{name} {event[name]}" for name in names if event.get(name) is not None]
    if event["event"] == "skipped step":
        said = [f"{name} {event.get(name) or 'not finite'}" for name in ("loss", "grad_norm")]
    changed = event.get("changed") or {}
    return ", ".join(said + [f"{name}: {value}" for name, value in changed.items()])


def quoted(text: str) -> str:
    """Text of a model as a code block, which no character in it can end or disturb."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return "\n".join(f"    {line}" for line in shown.split("\n"))


def comparison(groups: Sequence[Group], unit: str, pictures: Sequence[str], dollars_per_hour: float | None) -> str:
    """report.md of several runs."""
    runs = [run for each in groups for run in each.runs]
    parts = [f"# {len(runs)} runs compared", history.verdict(groups, unit) or ""]
    if not history.same_data(runs):
        parts.append("The runs have different data: their losses do not compare.")
    price = [f"cost of all, at ${dollars_per_hour:,.2f} an hour"] if dollars_per_hour else []
    head = ["runs", "number", f"last val loss, mean ({unit})", "range", "steps", "tokens", "wall time, mean"]
    head += ["tokens/s, median of steps", *price]
    rows = [row(each, unit, dollars_per_hour) for each in groups]
    parts += [images(pictures[:1]), table(head, rows)]
    differing = history.differences([each.runs[0] for each in groups])
    if differing:
        labels = [each.label for each in groups]
        parts += ["## What differs", table(["option", *labels], [[name, *v] for name, v in differing.items()])]
    parts.append(images(pictures[1:]))
    members = [(each.label, run) for each in groups for run in each.runs]
    states = [[label, run.name, run.settings.get("seed", ""), state_of(run)] for label, run in members]
    parts += ["## Runs", table(["runs", "folder", "seed", "state"], states)]
    return "\n\n".join(part for part in parts if part) + "\n"


def row(members: Group, unit: str, dollars_per_hour: float | None) -> list[str]:
    """A group's line of the comparison."""
    curve, runs = history.val_curve(members, unit), members.runs
    seconds = [history.seconds_of(run) for run in runs]
    speeds = [history.median_of(run, "tokens_per_sec") for run in runs]
    timed, steps = None not in seconds, sorted({last_step(run) for run in runs})
    tokens = sorted({history.tokens_of(run) or 0 for run in runs})
    line = [
        members.label,
        str(len(runs)),
        f"{curve.mean[-1]:.4f} at step {curve.steps[-1]:,}" if curve.steps else "none",
        f"{curve.low[-1]:.4f} to {curve.high[-1]:.4f}" if curve.steps else "",
        ", ".join(f"{count:,}" for count in steps),
        ", ".join(f"{count:,.0f}" for count in tokens),
        clock(sum(seconds) / len(seconds)) if timed else "not known",
        f"{sum(speeds) / len(speeds):,.0f}" if None not in speeds else "not known",
    ]
    if dollars_per_hour:
        line.append(f"${cost(sum(seconds), dollars_per_hour):,.2f}" if timed else "not known")
    return line


if __name__ == "__main__":
    cli(main)
