"""The plots of a report: figures of one run, or of several in the same axes, as matplotlib figures."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import history
from history import Group, History, in_unit, last_step

if TYPE_CHECKING:  # imported where it draws: it takes a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")  # told apart by all
UNITS = {
    "step": "optimizer step", "tokens": "tokens trained on",
    "hours": "hours since the launch", "minutes": "minutes since the launch",
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What another project published: val losses of FineWeb's or FineWeb-Edu's GPT-2 tokens, windows of 1,024."""

    label: str
    dataset: str
    losses: dict[int, float]  # by step of 524,288 tokens; {0: loss} alone: of a finished model


REFERENCES = (
    Reference(
        "llm.c, GPT-2 124M", "HuggingFaceFW/fineweb",
        {
            250: 6.171, 500: 5.374, 750: 4.710, 1000: 4.317, 1500: 4.006, 2000: 3.859, 3000: 3.697, 4000: 3.618,
            6000: 3.507, 8000: 3.443, 10000: 3.392, 12000: 3.351, 14000: 3.315, 16000: 3.288, 18000: 3.275,
            19560: 3.272,
        },
    ),
    Reference(
        "speed run's simple script", "HuggingFaceFW/fineweb",
        {
            250: 4.098, 500: 3.828, 750: 3.724, 1000: 3.652, 1500: 3.538, 2000: 3.454, 2500: 3.379, 3000: 3.304,
            3250: 3.277,
        },
    ),
    Reference("OpenAI's GPT-2 124M", "HuggingFaceFW/fineweb-edu", {0: 3.2924}),  # as build-nanogpt evaluates it
)  # fmt: skip
HELLASWAG = {"acc": 0.2859, "acc_norm": 0.2955}  # OpenAI's GPT-2 124M, all 10,042 examples
CHANCE = 0.25


def plots(groups: Sequence[Group], unit: str) -> dict[str, "Figure"]:
    """{file name: figure}; by tokens only where steps have different sizes, by hours where the runs know their time."""
    runs = [run for each in groups for run in each.runs]
    figures = {"loss.png": loss_figure(groups, unit, "step")}
    if len({history.tokens_per_step(run) for run in runs}) > 1 and all(map(history.tokens_per_step, runs)):
        figures["loss_by_tokens.png"] = loss_figure(groups, unit, "tokens")
    if all(history.along(run, [0], "hours") for run in runs):
        long = max(map(history.seconds_of, runs)) > 7200
        figures["loss_by_time.png"] = loss_figure(groups, unit, "hours" if long else "minutes")
    if any(run.of("train") for run in runs):
        figures["training.png"] = training_figure(groups)
    if any(run.of("hellaswag") for run in runs):
        figures["hellaswag.png"] = hellaswag_figure(groups)
    return figures


def new_figure(width: float, height: float) -> "Figure":
    """Without pyplot, which looks for a screen and keeps what it draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure


def dress(axes: "Axes", x: str, y: str, title: str = "") -> None:
    """Labels, grid and title; parse_math is off as a folder may be called $."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, parse_math=False, fontsize=10, loc="left", wrap=True)
    if x == UNITS["step"]:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 2.5, 5, 10]))
    if x == UNITS["tokens"]:
        axes.xaxis.set_major_formatter(lambda value, _: short(value))


def short(count: float) -> str:
    """1500000 -> 1.5M"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def legend(axes: "Axes", **where: object) -> None:
    if axes.get_legend_handles_labels()[0]:
        for text in axes.legend(frameon=False, fontsize=9, title_fontsize=8, **where).get_texts():
            text.set_parse_math(False)


def loss_figure(groups: Sequence[Group], unit: str, axis: str) -> "Figure":
    """Train and val loss; for several groups also how they end, run by run."""
    figure = new_figure(10 if len(groups) > 1 else 8, 4.8)
    axes, *side = figure.subplots(1, 2, width_ratios=[3, 1]) if len(groups) > 1 else [figure.subplots()]
    runs = [run for each in groups for run in each.runs]
    if len(runs) == 1:
        draw_run(axes, runs[0], unit, axis)
        title = title_of(runs[0])
    else:
        for color, each in zip(colors(groups), groups, strict=True):
            draw_group(axes, each, unit, axis, color)
        title = history.verdict(groups, unit) or ""
        if not history.same_data(runs):
            title = "on different data: the losses do not compare"
    draw_references(axes, runs, unit, axis)
    crop(axes, runs, unit)
    dress(axes, UNITS[axis], f"loss ({unit})")
    figure.suptitle("\n".join(textwrap.wrap(title, 110 if side else 90)), fontsize=10, parse_math=False)
    each = history.tokens_per_step(runs[0])
    if axis == "step" and each and len({history.tokens_per_step(run) for run in runs}) == 1:
        top = axes.secondary_xaxis("top", functions=(lambda x: x * each, lambda x: x / each))
        dress(top, UNITS["tokens"], "")
        top.spines["top"].set_visible(True)
    legend(axes, loc="best", title=None if len(runs) == 1 else "thick: val loss, mean and range; thin: train, smoothed")
    if side:
        draw_ends(side[0], groups, unit)
    return figure


def colors(groups: Sequence[Group]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(groups))]


def title_of(run: History) -> str:
    parameters = run.header.get("parameters")
    return f"{run.name}: {parameters / 1e6:.1f}M parameters" if parameters is not None else run.name


def draw_run(axes: "Axes", run: History, unit: str, axis: str) -> None:
    """One run: train loss raw and smoothed, val loss, and where it was resumed or skipped a step."""
    steps, losses = history.train_loss(run)
    losses, span = in_unit(run, losses, unit, "train"), history.span_of(len(losses))
    x = history.along(run, steps, axis)
    behind = ", mean since the last record" if run.series("train", "mean_loss")[0] else ""
    if steps:
        axes.plot(x, losses, color=COLORS[0], linewidth=0.8, alpha=0.35 if span > 1 else 1, label=f"train{behind}")
    if steps and span > 1:
        label = f"train, smoothed (mean of {span} records)"
        axes.plot(x, history.smoothed(losses, span), color=COLORS[0], linewidth=1.6, label=label)
    steps, losses = run.series("val", "val_loss")
    losses = in_unit(run, losses, unit, "val")
    if steps:
        x = history.along(run, steps, axis)
        axes.plot(x, losses, "o-", color=COLORS[1], linewidth=1.6, markersize=4, label=f"val (last {losses[-1]:.4f})")
    marks = (("resume", "resumed", "v", "black"), ("skipped step", "skipped step", "x", "red"))
    for event, label, marker, color in marks:
        x = history.along(run, [e["step"] for e in run.events(event) if e.get("step") is not None], axis)
        if x:
            at_the_bottom = axes.get_xaxis_transform()
            axes.plot(x, [0.03] * len(x), marker, color=color, markersize=6, transform=at_the_bottom, label=label)


def draw_group(axes: "Axes", members: Group, unit: str, axis: str, color: str) -> None:
    """Runs that differ only in seed: the mean val loss and its range, and the mean train loss, thin."""
    trained = [(steps, in_unit(run, losses, unit, "train"))
               for run in members.runs for steps, losses in [history.train_loss(run)]]  # fmt: skip
    train, val = history.curve(trained), history.val_curve(members, unit)
    for curve, thin in ((train, True), (val, False)):
        if not curve.steps:
            continue
        positions = [history.along(run, curve.steps, axis) for run in members.runs]
        x = [sum(each) / len(each) for each in zip(*positions, strict=True)]
        label = members.label + (f" ({len(members.runs)} runs)" if len(members.runs) > 1 else "")
        if thin:
            smooth = history.smoothed(curve.mean, history.span_of(len(curve.steps)))
            axes.plot(x, smooth, color=color, linewidth=1, alpha=0.5, label=None if val.steps else label)
        else:
            axes.fill_between(x, curve.low, curve.high, color=color, alpha=0.25, linewidth=0)
            axes.plot(x, curve.mean, "o-", color=color, linewidth=1.6, markersize=3, label=label)


def draw_ends(axes: "Axes", groups: Sequence[Group], unit: str) -> None:
    """The last val loss of every run, and each group's mean and range."""
    for i, (color, each) in enumerate(zip(colors(groups), groups, strict=True)):
        curve = history.val_curve(each, unit)
        if curve.steps:
            ends = [values[-1] for values in curve.runs]
            axes.plot([i] * len(ends), ends, "o", color=color, markersize=5, alpha=0.6)
            axes.plot([i - 0.25, i + 0.25], [curve.mean[-1]] * 2, color=color, linewidth=2)
            ranged = len(ends) > 1 and len(groups) <= 4  # those of more groups would overlap; the table has them
            label = f"{curve.mean[-1]:.3f}" + (f"\n{min(ends):.3f}–{max(ends):.3f}" if ranged else "")
            axes.annotate(
                label, (i, max(ends)), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=color
            )
    dress(axes, "", f"last val loss of each run ({unit})")
    names = [each.label.replace(", ", ",\n") for each in groups]
    narrow = len(groups) * max(len(line) for name in names for line in name.split("\n")) > 30
    turned = dict(rotation=45, ha="right") if narrow else {}
    axes.set_xticks(range(len(groups)), names, fontsize=7, parse_math=False, **turned)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.margins(y=0.2)
    axes.grid(visible=False, axis="x")


def draw_references(axes: "Axes", runs: Sequence[History], unit: str, axis: str) -> None:
    """Others' published losses, where every run has their data, tokenizer, windows and (on curves) batch."""
    last = max(map(last_step, runs))
    for reference in REFERENCES:
        if (
            axis in ("hours", "minutes")
            or unit != "nats per token"
            or not all(comparable(run, reference) for run in runs)
        ):
            continue
        if 0 in reference.losses:
            axes.axhline(reference.losses[0], color="grey", linestyle="--", linewidth=1, label=reference.label)
            continue
        points = {step: loss for step, loss in reference.losses.items() if step <= max(last, 500)}
        style = "--" if reference is REFERENCES[0] else ":"
        x = [step * 524288 if axis == "tokens" else step for step in points]
        axes.plot(x, points.values(), style, color="grey", linewidth=1.2, label=f"{reference.label} (published)")


def comparable(run: History, reference: Reference) -> bool:
    """Whether a run's val loss is of the reference's kind."""
    made_from, settings = run.data.get("settings") or {}, run.settings
    windows = settings.get("seq_len") or settings.get("block_size")
    same = (made_from.get("dataset"), run.data.get("tokenizer"), windows) == (reference.dataset, "gpt2", 1024)
    by_step = 0 in reference.losses or settings.get("total_batch_size") == 524288
    return same and by_step and settings.get("val_tokens") == 10485760


def crop(axes: "Axes", runs: Sequence[History], unit: str) -> None:
    """Leave out the first losses, next to which all else is a flat line; a note says what they were."""
    curves = [(run, "val", *run.series("val", "val_loss")) for run in runs]
    curves += [(run, "train", *history.train_loss(run)) for run in runs]
    late, every = [], []
    for run, split, steps, losses in curves:
        losses = in_unit(run, losses, unit, split)
        late += [loss for step, loss in zip(steps, losses, strict=True) if step >= last_step(run) / 8]
        every += losses
    if len(every) < 20 or not late:
        return
    room = 0.08 * (max(late) - min(late)) + 0.01
    if max(every) > max(late) + 2 * room:
        axes.set_ylim(min(every) - 1.5 * room, max(late) + room)
        note = f"first steps left out: the losses begin at {max(every):.2f}"
        axes.text(0.01, 0.07, note, transform=axes.transAxes, fontsize=8, color="grey")


def training_figure(groups: Sequence[Group]) -> "Figure":
    """Learning rate, gradient norm and throughput of every run by step."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = new_figure(8, 6.6)
    panels = figure.subplots(3, 1, sharex=True)
    rows = (("lr", "learning rate"), ("grad_norm", "gradient norm\nbefore clipping"), ("tokens_per_sec", "tokens/s"))
    for axes, (name, label) in zip(panels, rows, strict=True):
        values = []
        for color, each in zip(colors(groups), groups, strict=True):
            for i, run in enumerate(each.runs):
                steps, known = run.series("train", name)
                if name == "tokens_per_sec" and len(known) > 2:  # the first step compiles
                    steps, known = steps[1:], known[1:]
                values += known
                axes.plot(steps, known, color=color, linewidth=1, alpha=0.8, label=each.label if i == 0 else None)
        if name == "grad_norm" and values and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif values:
            axes.set_ylim(0, 1.08 * max(values) or 1)
        dress(axes, UNITS["step"] if axes is panels[-1] else "", label)
        axes.yaxis.get_offset_text().set_fontsize(8)
    panels[2].yaxis.set_major_formatter("{x:,.0f}")
    panels[0].yaxis.set_major_formatter("{x:g}")
    if len(groups) > 1:
        legend(panels[0], loc="best")
    else:
        figure.suptitle(title_of(groups[0].runs[0]), fontsize=10, parse_math=False)
    return figure


def hellaswag_figure(groups: Sequence[Group]) -> "Figure":
    """HellaSwag accuracy by step, beside GPT-2's and chance where all examples were asked."""
    figure = new_figure(8, 4.8)
    axes, every = figure.subplots(), False
    for color, each in zip(colors(groups), groups, strict=True):
        for name, style in (("acc_norm", "o-"), ("acc", "o:")):
            curve = history.curve([run.series("hellaswag", name) for run in each.runs])
            label = name if len(groups) == 1 else f"{each.label}: {name}"
            axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
            axes.plot(curve.steps, curve.mean, style, color=color, linewidth=1.4, markersize=3, label=label)
        every |= any(record.get("n") == 10042 for run in each.runs for record in run.of("hellaswag"))
    if every:
        for name, style in (("acc_norm", "-"), ("acc", ":")):
            label = f"OpenAI's GPT-2 124M: {name} {HELLASWAG[name]:.4f}"
            axes.axhline(HELLASWAG[name], color="grey", linewidth=1, linestyle=style, label=label)
    axes.axhline(CHANCE, color="grey", linewidth=1, linestyle="--", label="chance")
    dress(axes, UNITS["step"], "HellaSwag accuracy")
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure
