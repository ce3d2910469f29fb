"""Plots of a run: python report.py RUN_FOLDER [...] writes loss.png and lr.png into each."""

import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, cli, configure
from metrics import read_metrics


@dataclass(frozen=True)
class ReportConfig:
    dpi: int = 120  # resolution of the plots


def main() -> int:
    folders = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    config, _ = configure(ReportConfig, argv=[arg for arg in sys.argv[1:] if arg.startswith("-")])
    if not folders:
        raise UserError("which run? python report.py RUN_FOLDER, e.g. out/quickstart")
    for folder in folders:
        path = Path(folder, "metrics.jsonl")
        if not path.exists():
            raise UserError(f"{folder}: no metrics.jsonl, so not a run's folder")
        for written in plot(read_metrics(path), Path(folder), config.dpi):
            print(written)
    return 0


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
        axes.set(xlabel="optimizer step", ylabel=label, title=title)
        axes.grid(alpha=0.3)
        if lines[0][0]:
            axes.legend()
        figure.savefig(folder / name, dpi=dpi)
        plt.close(figure)
        paths.append(folder / name)
    return paths


if __name__ == "__main__":
    cli(main)
