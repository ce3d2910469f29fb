"""metrics.jsonl, the record of a run: one JSON object a line, each with its "kind"."""

import json
import math
import os
from pathlib import Path


class Metrics:
    """Writes out_dir/metrics.jsonl. A resumed run first drops what the last one recorded past the checkpoint's step,
    and the evaluations at that very step, which are made anew."""

    def __init__(self, out_dir: str, resumed_at: int | None):
        os.makedirs(out_dir, exist_ok=True)
        path = Path(out_dir, "metrics.jsonl")
        kept = []
        if resumed_at is not None and path.exists():
            for record in read_metrics(path):
                evaluation = record["kind"] in ("val", "hellaswag", "sample")
                if record.get("step", 0) < resumed_at + (not evaluation):
                    kept.append(json.dumps(record) + "\n")
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (a line is on disk once it is made)

    def write(self, kind: str, **values: object) -> None:
        """One record. Numbers that are not finite become null: JSON has no NaN."""
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        self.file.write(json.dumps({"kind": kind, **values}) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """All records of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # behind the last newline is nothing, or half a record


def bits_per_byte(loss: float, meta: dict) -> float | None:
    """Nats per token to bits per byte of UTF-8, comparable across tokenizers; None where meta.json does not say."""
    return loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"] if meta.get("val_bytes") else None
