"""Run the rows of rows.py one after the other, and write each down as it is had. See README.md."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from rows import ROWS, Card, Row, Skip, prepare

GOOD = ("ok", "measured")  # rows with such a result are not run again
stopped: list[int] = []  # the signals that asked this process to end


def main() -> int:
    parser, given = options()
    text, nanogpt, data = (path and path.resolve() for path in (given.text, given.nanogpt, given.data))
    small = given.size == "small" or (given.size is None and given.device == "cpu")
    out = given.out_dir.resolve()
    if given.prepare:
        prepare(out, text, small)
        print(f"{out} is ready: use it by --data={given.out_dir}")
        return 0
    if small and given.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower on two
    work = out / "work"
    card = Card(given.device, small, given.seconds, data or work / "data", nanogpt, work, out)
    if given.row:
        return run_row(card, next(row for row in ROWS if row.name == given.row))
    check(parser, given)
    kept = results_so_far(parser, out)
    rows = to_run(given.only, given.again, kept)
    if not rows:
        print(f"all these rows have a result in {given.out_dir}/results.md; --again runs them anew")
        return 0

    # A kill can leave the folder of its runs.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if not data:
        prepare(card.data, text, small)
    end = time.monotonic() + given.limit
    for row in rows:
        kept.setdefault(row.name, dict(name=row.name, status="not run", result=""))
    for row in rows:
        write(out, kept)
        result = driven(card, row, end - time.monotonic())
        if stopped:
            break
        if result["status"] != "not run" or kept[row.name]["status"] == "not run":  # it keeps what it had
            kept[row.name] = result
        print(f"{row.name:28} {result['status']:10} {result['result']}", flush=True)
    write(out, kept)
    shutil.rmtree(work)
    if stopped:
        return 128 + stopped[0]
    if left := [row.name for row in ROWS if kept.get(row.name, {}).get("status", "not run") == "not run"]:
        print(f"{len(left)} rows are left: the same command goes on with them")
    return 0


def options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path, help="results.json, results.md and log.txt go here; rows in it are kept")
    parser.add_argument("--only", default="right,fast", help="right, fast or names of rows, with commas")
    parser.add_argument("--again", action="store_true", help="run rows anew that have a good result")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", choices=("full", "small"), help="default: full on cuda, small on a CPU")
    parser.add_argument("--limit", type=float, default=530, help="seconds for this call; the next one goes on")
    parser.add_argument("--text", type=Path, help="a text file to train on; for report C tiny Shakespeare")
    parser.add_argument("--prepare", action="store_true", help="only write the text and GPT-2's vocabulary to out_dir")
    parser.add_argument("--data", type=Path, help="the folder that --prepare wrote, perhaps on another machine")
    parser.add_argument("--nanogpt", type=Path, help="a folder with nanoGPT's model.py, to be measured too")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # of a row's own process
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    return parser, parser.parse_args()


def check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Tell in one line what is wrong with the options or this machine, and exit with status 2."""
    known = {name for row in ROWS for name in (row.name, row.part)}
    if unknown := set(given.only.split(",")) - known:
        names = " ".join(row.name for row in ROWS)
        parser.error(f"--only={given.only}: no {', '.join(sorted(unknown))}; rows: {names}")
    if given.text and not given.text.is_file():
        parser.error(f"--text={given.text}: there is no such file")
    if given.data and not (given.data / "about.json").is_file():
        parser.error(f"--data={given.data}: --prepare has not written this folder")
    import torch  # it takes a while

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        parser.error(f"torch {torch.__version__} is too old: 2.11 or newer is needed")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA card; --device=cpu rehearses with small models")


def results_so_far(parser: argparse.ArgumentParser, out: Path) -> dict[str, dict]:
    path = out / "results.json"
    try:
        return {result["name"]: result for result in json.loads(path.read_text())}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError):
        parser.error(f"{path} is damaged; move it away")


def to_run(only: str, again: bool, kept: dict[str, dict]) -> list[Row]:
    """The chosen rows without a good result: first those that have not been run yet."""
    wanted = only.split(",")
    status = {row.name: kept.get(row.name, {}).get("status", "not run") for row in ROWS}
    chosen = [row for row in ROWS if row.name in wanted or row.part in wanted]
    rows = [row for row in chosen if again or status[row.name] not in GOOD]
    return sorted(rows, key=lambda row: status[row.name] != "not run")


def driven(card: Card, row: Row, left: float) -> dict:
    """Run a row in a process of its own, killed where it takes thrice its time; what to record of it."""
    about = dict(name=row.name)
    if left < (20 if card.small else row.seconds):
        return about | dict(status="not run", result=f"{left:.0f} s were left; the same command goes on")
    seconds = min(left, 3 * row.seconds)
    answer = card.work / row.name / "answer.json"
    command = [sys.executable, __file__, card.out, f"--row={row.name}", f"--seconds={seconds}", f"--data={card.data}"]
    command += [f"--device={card.device}", f"--size={'small' if card.small else 'full'}"]
    command += [f"--nanogpt={card.nanogpt}"] if card.nanogpt else []
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
    """In the row's own process, which ends with its parent, even if that is killed."""
    parent = os.getppid()

    def end_with_the_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    card = replace(card, work=card.work / row.name)
    card.work.mkdir()
    try:
        result = row.run(card)
        verdict = {True: "ok", False: "WRONG", None: "measured"}[result.pop("ok")]
        if verdict != "measured" and not card.computes:
            verdict, result["result"] = (
                "measured",
                f"not judged, since 1 + 1 is not 2 on this device: {result['result']}",
            )
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
    for number in (signal.SIGTERM, signal.SIGINT):  # an exception out of here could leave subprocess's lock locked
        signal.signal(number, lambda number, _: stopped.append(number))
    sys.exit(main())
