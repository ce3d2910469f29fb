"""Plots of a run: python report.py RUN_FOLDER [...] writes loss.png and lr.png into each."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, check, cli, configure
from files import whole_file
from metrics import read_metrics


@dataclass(frozen=True)
class ReportConfig:
    dpi: int = 120  # resolution of the plots

    def __post_init__(self) -> None:
        if not 10 <= self.dpi <= 1200:
            raise ValueError(f"dpi = {self.dpi}, but it must be in [10, 1200]")


def main() -> int:
    folders = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    config, _ = configure(ReportConfig, argv=[arg for arg in sys.argv[1:] if arg.startswith("-")])
    if not folders:
        raise UserError("which run? python report.py RUN_FOLDER, e.g. out/quickstart")
    for folder in folders:
        check("folder", folder, {"folder": str}, "RUN_FOLDER")
        folder = os.path.expanduser(folder)
        path = Path(folder, "metrics.jsonl")
        try:
            if not path.exists():
                raise UserError(f"{folder}: no metrics.jsonl, so not a run's folder")
            records = read_metrics(path)
            check_records(records, path)
            for written in plot(records, Path(folder), config.dpi):
                print(written)
        except OSError as error:
            raise UserError(f"{error.filename or path}: {error.strerror}") from None
        except RecursionError:
            raise UserError(f"{path}: damaged: a record is nested too deeply") from None
    return 0


def check_records(records: list[dict], path: Path) -> None:
    """Raises UserError where the records have not what a plot needs; a loss that is not known is null."""
    if not records:
        raise UserError(f"{path}: no record of a run in it")
    plotted = {"run": ("parameters",), "train": ("step", "loss", "lr"), "val": ("step", "val_loss")}
    for record in records:
        for name in plotted.get(record["kind"], ()):
            value = record.get(name, "")
            known = value is not None or name in ("step", "parameters")
            if known and (type(value) not in (int, float) or not abs(value) < 1e15):
                raise UserError(f"{path}: damaged: a {record['kind']} record has {name} = {str(value)[:100]!r}")


def plot(records: list[dict], folder: Path, dpi: int) -> list[Path]:
    """Draw loss.png (train and val loss by step) and lr.png (learning rate by step); returns their paths."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    def series(kind: str, name: str) -> tuple[list[int], list[float]]:
        points = [(r["step"], r[name]) for r in records if r["kind"] == kind and r[name] is not None]
        return [step for step, _ in points], [value for _, value in points]

    run = next((r for r in records if r["kind"] == "run"), None)
    title = f"{folder.name}: {run['parameters'] / 1e6:.1f}M parameters" if run else folder.name
    curves = {
        "loss.png": (
            "loss (nats per token)",
            [("train", *series("train", "loss")), ("val", *series("val", "val_loss"))],
        ),
        "lr.png": ("learning rate", [(None, *series("train", "lr"))]),
    }
    paths = []
    for name, (label, lines) in curves.items():
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for line_label, steps, values in lines:
            mark = "o-" if line_label == "val" else "-"
            axes.plot(steps, values, mark, label=line_label, linewidth=1.2, markersize=3)
            if line_label == "val" and steps:
                axes.annotate(
                    f"{values[-1]:.4f}", (steps[-1], values[-1]), (0, 6), textcoords="offset points", ha="right"
                )
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.set_title(title, parse_math=False)  # a folder may be called $
        axes.grid(alpha=0.3)
        if lines[0][0]:
            axes.legend()
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=dpi)
        plt.close(figure)
        try:
            with whole_file(folder / name) as file:
                file.write(picture.getbuffer())
        except OSError as error:
            raise UserError(f"{folder / name}: {error.strerror}") from None
        paths.append(folder / name)
    return paths


if __name__ == "__main__":
    cli(main)
