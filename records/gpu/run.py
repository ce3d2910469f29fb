"""Run the rows of rows.py one after the other, and write each down as it is had. See README.md."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import ROWS, Card, Row, Skip, prepare

stopped: list[int] = []  # the signals that asked this process to end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, help="results.json, results.md and log.txt go here; rows in it are kept")
    parser.add_argument("--only", default="right,fast", help="right, fast or names of rows, with commas")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", choices=("full", "small"), help="default: full on cuda, small on a CPU")
    parser.add_argument("--limit", type=float, default=530, help="seconds for right, and as many for fast")
    parser.add_argument("--text", help="a text file to train on; for report C tiny Shakespeare")
    parser.add_argument("--resume", action="store_true", help="do not run rows again that have a good result")
    parser.add_argument("--nanogpt", help="a folder with nanoGPT's model.py, to be measured too")
    for name in ("row", "work", "seconds"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)  # of a row's own process
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # an exception out of here could leave subprocess's lock locked
        signal.signal(number, lambda number, _: stopped.append(number))
    small = given.size == "small" or (given.size is None and given.device == "cpu")
    text, nanogpt = (str(Path(path).resolve()) if path else None for path in (given.text, given.nanogpt))
    out = given.out_dir.resolve()
    if small and given.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower on two
    if given.row:
        card = Card(given.device, small, float(given.seconds), text, nanogpt, Path(given.work), out)
        return run_row(card, next(row for row in ROWS if row.name == given.row))
    wanted = given.only.split(",")
    chosen = [row for row in ROWS if row.name in wanted or row.part in wanted]
    if unknown := set(wanted) - {name for row in ROWS for name in (row.name, row.part)}:
        parser.error(
            f"--only={given.only}: no {', '.join(sorted(unknown))}; rows: {' '.join(row.name for row in ROWS)}"
        )
    import torch  # it takes a while

    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA card; --device=cpu rehearses with small models")
    if text and not Path(text).is_file():
        parser.error(f"--text={text}: there is no such file")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        parser.error(f"torch {torch.__version__} is too old: 2.11 or newer is needed")
    out.mkdir(parents=True, exist_ok=True)
    try:
        results = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else []
    except ValueError:
        parser.error(f"{out / 'results.json'} is damaged; move it away")
    if given.resume:  # rows that have a result are not run again
        done = {result["name"] for result in results if result["status"] in ("ok", "measured")}
        chosen = [row for row in chosen if row.name not in done]
    kept = {result["name"]: result for result in results}
    kept |= {row.name: dict(name=row.name, part=row.part, status="not run", result="") for row in chosen}
    with tempfile.TemporaryDirectory() as work:
        card = Card(given.device, small, 0, text, nanogpt, Path(work), out)
        prepare(card)
        ends: dict[str, float] = {}
        for row in chosen:
            end = ends.setdefault(row.part, time.monotonic() + given.limit)  # its part begins with its first row
            write(out, kept)
            result = driven(card, row, end - time.monotonic())
            if stopped:
                return 128 + stopped[0]
            kept[row.name] = result
            print(f"{row.name:28} {kept[row.name]['status']:10} {kept[row.name]['result']}", flush=True)
        write(out, kept)
    return 0


def driven(card: Card, row: Row, left: float) -> dict:
    """Run a row in a process of its own, killed where it takes thrice its time; what to record of it."""
    about = dict(name=row.name, part=row.part)
    if left < (20 if card.small else row.seconds):
        return about | dict(status="not run", result=f"{left:.0f} s were left; the same command with --resume goes on")
    seconds = min(left, 3 * row.seconds)
    answer = card.work / "answer.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, card.out, f"--row={row.name}", f"--work={card.work}", f"--seconds={seconds}"]
    command += [f"--device={card.device}", f"--size={'small' if card.small else 'full'}"]
    command += [f"--{name}={getattr(card, name)}" for name in ("text", "nanogpt") if getattr(card, name)]
    log, began = card.out / "log.txt", time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        start = file.tell()
        print(f"\n==== {row.name}", file=file, flush=True)
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None and not stopped and time.monotonic() < began + seconds:
            time.sleep(0.02)
        status = f"stopped after {seconds:.0f} s" if process.poll() is None else None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
    about["seconds"] = round(time.monotonic() - began, 1)
    if answer.exists():
        return about | json.loads(answer.read_text())
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        last = " / ".join(line.strip() for line in file.read().splitlines()[-4:])
    return about | dict(status="failed", result=f"{status or f'exit status {process.returncode}'}: {last[-600:]}")


def run_row(card: Card, row: Row) -> int:
    """In the row's own process."""
    try:
        result = row.run(card)
        verdict = {True: "ok", False: "WRONG", None: "measured"}[result.pop("ok")]
        result = dict(status=verdict) | result
    except Skip as reason:
        result = dict(status="skipped", result=str(reason))
    (card.work / "answer.json").write_text(json.dumps(result))
    return 0


def write(out: Path, results: dict[str, dict]) -> None:
    """results.json and results.md, whole."""
    order = [row.name for row in ROWS]
    rows = sorted(results.values(), key=lambda result: order.index(result["name"]) if result["name"] in order else 99)
    lines = ["| row | | | s |", "|---|---|---|---|"]
    for result in rows:
        text = " ".join(str(result["result"]).split()).replace("|", "/")
        lines.append(f"| {result['name']} | {result['status']} | {text} | {result.get('seconds', '')} |")
    for name, content in (("results.json", json.dumps(rows, indent=1)), ("results.md", "\n".join(lines))):
        partial = out / f".{name}"
        partial.write_text(content + "\n", encoding="utf-8")
        os.replace(partial, out / name)


if __name__ == "__main__":
    sys.exit(main())
