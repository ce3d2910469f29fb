"""How fast fineweb.py tokenizes, next to the usual way: whole processes, in turn, on the same Parquet folder.

    python records/2026-11-20_tokenize/bench.py FOLDER [ROUNDS]

A: fineweb.py. B: the way of most GPT-2 reproductions: a pool of the same number of processes that is handed one
document at a time and returns its tokens. C: one core that only encodes (no reading, no shards): the upper bound is
C times the cores. MB/s are of UTF-8 text over the wall time from the start of the process to its end.
"""

import glob
import multiprocessing
import os
import resource
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


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds of wall time and of CPU time, that of all processes together."""
    start, cpu = time.perf_counter(), cpu_seconds()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start, cpu_seconds() - cpu


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    import pyarrow.parquet

    folder, rounds = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    processes = os.cpu_count()
    files = sorted(glob.glob(f"{folder}/train*.parquet"))
    texts = [t for f in files for t in pyarrow.parquet.read_table(f, columns=["text"])["text"].to_pylist()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    few = texts[: len(texts) // 4]
    few_megabytes = sum(len(text.encode()) for text in few) / 1e6
    print(f"{megabytes:.1f} MB, {len(texts):,} documents, {processes} processes")
    speeds: dict[str, list[float]] = {"A": [], "B": [], "C": [], "A per CPU second": [], "B per CPU second": []}
    with tempfile.TemporaryDirectory() as tmp:
        ours = [sys.executable, f"{ROOT}/fineweb.py", f"--dataset={folder}", f"--out_dir={tmp}/A"]
        ours += [f"--shard_tokens={SHARD_TOKENS}", f"--num_proc={processes}"]
        theirs = [sys.executable, os.path.abspath(__file__), "--document_at_a_time", folder, f"{tmp}/B", str(processes)]
        for _ in range(rounds):
            for name, command in (("A", ours), ("B", theirs)):
                shutil.rmtree(f"{tmp}/{name}", ignore_errors=True)
                os.mkdir(f"{tmp}/{name}")
                wall, cpu = timed(command)
                speeds[name].append(megabytes / wall)
                speeds[f"{name} per CPU second"].append(megabytes / cpu)
            start = time.perf_counter()
            for text in few:
                enc.encode_to_numpy(text, disallowed_special=())
            speeds["C"].append(few_megabytes / (time.perf_counter() - start))
            print("  ".join(f"{name} {values[-1]:5.1f}" for name, values in speeds.items()), "MB/s", flush=True)
    a, b, c, a_cpu, b_cpu = (statistics.median(values) for values in speeds.values())
    print(f"median: A {a:.1f}, B {b:.1f}, C {c:.1f} MB/s; A/B {a / b:.2f}, A/({processes} C) {a / (processes * c):.2f}")
    print(f"per CPU second, which other work disturbs less: A {a_cpu:.1f}, B {b_cpu:.1f} MB; A/B {a_cpu / b_cpu:.2f}")


if __name__ == "__main__":
    if sys.argv[1] == "--document_at_a_time":
        document_at_a_time(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
