"""Old against new, in turn: the time and the peak memory of whole preparations.

    python records/2026-12-01_prepare/measure.py OTHER_CHECKOUT 'books/train*.parquet' [ROUNDS] [MB]

Three settings: rows of Parquet, one long text of novels, and one of words that never come twice. A round runs both
checkouts in each setting, and the one that begins changes from round to round. The tokens must be equal.
The time in a process's own code leaves out what the system needs for it, above all for memory: on a virtual
machine that time differs by a factor of ten between two runs of the same command.
"""

import contextlib
import glob
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet

ROOT = Path(__file__).resolve().parents[2]


def make_texts(folder: Path, files: str, size: int) -> dict[str, list[str]]:
    """Write the two long texts of `size` bytes. Returns the options of each setting."""
    rows = pyarrow.parquet.read_table(sorted(glob.glob(files))[0], columns=["text"])
    prose = "\n".join(rows.column("text").to_pylist()).encode()
    (folder / "novels.txt").write_bytes((prose * (1 + size // len(prose)))[:size].decode(errors="ignore").encode())
    words = np.random.default_rng(0).integers(97, 123, size=(size // 9, 9), dtype=np.uint8)
    words[:, 8] = ord(" ")
    (folder / "words.txt").write_bytes(words.tobytes())
    return {
        "rows": [f"--files={os.path.abspath(files)}", "--shard_tokens=10000000"],
        "novels": [f"--files={folder}/novels.txt", "--shard_tokens=10000000"],
        "new words": [f"--files={folder}/words.txt", "--shard_tokens=10000000"],
    }


def measure(root: Path, options: list[str], out_dir: Path) -> tuple[float, float, float, np.ndarray]:
    """Seconds of the whole process, seconds in its own code on all cores, its peak memory in MB, and all tokens."""
    shutil.rmtree(out_dir, ignore_errors=True)
    start = time.perf_counter()
    command = [sys.executable, str(root / "fineweb.py"), *options, f"--out_dir={out_dir}"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory = ended = 0
    while not ended:  # wait4's ru_maxrss would be this process's own, if that is larger
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            memory = int(found[1]) / 1024 if found else memory
        time.sleep(0.02)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    seconds = time.perf_counter() - start
    assert status == 0, command
    paths = [path for split in ("train", "val") for path in sorted(out_dir.glob(f"*_{split}_*.bin"))]
    return seconds, usage.ru_utime, memory, np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths])


def main(other: str, files: str, rounds: str = "5", megabytes: str = "300") -> None:
    roots = {"old": Path(other).resolve(), "new": ROOT}
    with tempfile.TemporaryDirectory() as name:
        settings = make_texts(Path(name), files, int(megabytes) * 1_000_000)
        for setting, options in settings.items():
            found = {which: [] for which in roots}
            for number in range(int(rounds)):
                tokens = []
                for which in [*roots][:: 1 if number % 2 else -1]:
                    *measured, ids = measure(roots[which], options, Path(name, "out"))
                    found[which].append(measured)
                    tokens.append(ids)
                assert np.array_equal(*tokens)
            for which, values in found.items():
                seconds, own, memory = (statistics.median(column) for column in zip(*values, strict=True))
                print(f"{setting}: {which} {seconds:.2f} s, {own:.2f} s in its own code, {memory:,.0f} MB at most")
            old, new = (np.array(found[which]) for which in ("old", "new"))
            for column, what in enumerate(("as fast", "as fast in its own code")):
                ratios = old[:, column] / new[:, column]
                print(f"{setting}: new is {np.median(ratios):.2f} x {what} ({ratios.min():.2f} to {ratios.max():.2f})")
            print(f"{setting}: peak memory {new[:, 2].max() / old[:, 2].max():.2f} x", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
