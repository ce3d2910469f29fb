"""How fast fineweb.py tokenizes, next to the usual way: whole processes, in turn, on the same Parquet folder.

    python records/2026-11-20_tokenize/bench.py FOLDER [ROUNDS]

A: fineweb.py. B: the way of most GPT-2 reproductions: a pool of the same number of processes that is handed one
document at a time and returns its tokens. C: one core that only encodes (no reading, no shards): the upper bound is
C times the cores. MB/s are of UTF-8 text: over the whole process, and over its work behind the imports.
"""

import glob
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from tokenizer import get_tokenizer  # noqa: E402

SHARD_TOKENS = 10_000_000
enc = get_tokenizer("gpt2")


def encode_document(row: dict) -> np.ndarray:
    return np.array([enc.eot_token, *enc.encode_ordinary(row["text"])]).astype(np.uint16)


def document_at_a_time(folder: str, out_dir: str, processes: int) -> None:
    from datasets import load_dataset

    start = time.perf_counter()
    data = load_dataset(folder, split="train")
    shard, filled, number = np.empty(SHARD_TOKENS, dtype=np.uint16), 0, 0
    with multiprocessing.Pool(processes) as pool:
        for tokens in pool.imap(encode_document, data, chunksize=16):
            while len(tokens):
                taken = tokens[: SHARD_TOKENS - filled]
                shard[filled : filled + len(taken)] = taken
                filled, tokens = filled + len(taken), tokens[len(taken) :]
                if filled == SHARD_TOKENS:
                    np.save(f"{out_dir}/{number:06d}", shard)
                    filled, number = 0, number + 1
    np.save(f"{out_dir}/{number:06d}", shard[:filled])
    print(f"in {time.perf_counter() - start:.3f} s")


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds of the whole process, and of its work behind the imports, which it prints."""
    start = time.perf_counter()
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - start, float(re.search(r"in ([\d.]+) s", out)[1])


def main() -> None:
    import pyarrow.parquet

    folder, rounds = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    processes = os.cpu_count()
    files = sorted(glob.glob(f"{folder}/train*.parquet"))
    texts = [t for f in files for t in pyarrow.parquet.read_table(f, columns=["text"])["text"].to_pylist()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    few = texts[: len(texts) // 4]
    few_megabytes = sum(len(text.encode()) for text in few) / 1e6
    print(f"{megabytes:.1f} MB, {len(texts):,} documents, {processes} processes; MB/s")
    print(f"{'':8}{'A':>8}{'B':>8}{'A/B':>8}{'A work':>10}{'B work':>8}{'A/B':>8}{'C':>8}")
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        ours = [sys.executable, f"{ROOT}/fineweb.py", f"--dataset={folder}", f"--out_dir={tmp}/A"]
        ours += [f"--shard_tokens={SHARD_TOKENS}", f"--num_proc={processes}"]
        theirs = [sys.executable, os.path.abspath(__file__), "--document_at_a_time", folder, f"{tmp}/B", str(processes)]
        for number in range(rounds):
            for name in "AB":
                shutil.rmtree(f"{tmp}/{name}", ignore_errors=True)
                os.mkdir(f"{tmp}/{name}")
            (a, a_work), (b, b_work) = timed(ours), timed(theirs)
            start = time.perf_counter()
            for text in few:
                enc.encode_to_numpy(text, disallowed_special=())
            c = few_megabytes / (time.perf_counter() - start)
            rows.append(
                [megabytes / a, megabytes / b, b / a, megabytes / a_work, megabytes / b_work, b_work / a_work, c]
            )
            show(f"round {number + 1}", rows[-1])
    show("median", [statistics.median(column) for column in zip(*rows, strict=True)])


def show(name: str, row: list[float]) -> None:
    print(
        f"{name:8}{row[0]:8.1f}{row[1]:8.1f}{row[2]:8.2f}{row[3]:10.1f}{row[4]:8.1f}{row[5]:8.2f}{row[6]:8.1f}",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1] == "--document_at_a_time":
        document_at_a_time(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
