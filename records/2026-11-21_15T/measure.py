"""What 15T tokens cost at a start: 150,000 shards of 100M, files of the right size that hold nothing.

    python records/2026-11-21_15T/measure.py index FOLDER [SHARDS]  # make it, and time what every start does
    python records/2026-11-21_15T/measure.py checkpoints FOLDER  # size and seconds by model
    python records/2026-11-21_15T/measure.py windows FOLDER  # windows of a real shard that is not in memory

Linux only.
"""

import ctypes
import json
import os
import re
import resource
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from shards import HEADER_BYTES, shard_header  # noqa: E402

import checkpoint  # noqa: E402
from dataloader import DataGuard, Windows, open_shard, read_meta, train_batches  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optim import OptimConfig, make_optimizers  # noqa: E402

TOKENS = 100_000_000  # in a shard


def timed(what: str, action: object) -> object:
    before, cpu, began = maps(), time.process_time(), time.perf_counter()
    result = action()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{what}: {wall:.2f} s, {cpu:.2f} s of CPU, {maps() - before:,} more maps, peak {peak:,} MB", flush=True)
    return result


def maps() -> int:
    with open("/proc/self/maps", "rb") as file:
        return sum(1 for _ in file)


def make_index(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict = {"train": {}, "val": {}}
    for number in range(count):
        split = "val" if number == 0 else "train"
        name = f"fake_{split}_{number:06d}.bin"
        shards[split][name] = [TOKENS, number * 2654435761 % 2**32]
        with open(folder / name, "wb") as file:
            file.write(shard_header(TOKENS))
            file.truncate(HEADER_BYTES + 2 * TOKENS)
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "settings": {}, "shards": shards}
    meta |= {f"{split}_tokens": TOKENS * len(names) for split, names in shards.items()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def index(folder: Path, count: int) -> None:
    if not (folder / "meta.json").exists():
        timed(f"{count:,} shards made", lambda: make_index(folder, count))
    print(f"meta.json: {(folder / 'meta.json').stat().st_size:,} bytes")
    for life in ("first", "second"):  # the second finds the folder in memory
        print(f"--- {life} look")
        meta = timed("read_meta", lambda: read_meta(str(folder)))
        train = timed("Windows of train", lambda: Windows(str(folder), "train", 1024, 50257))
        val = timed("Windows of val", lambda: Windows(str(folder), "val", 1024, 50257))
        guard = DataGuard(str(folder), ["train", "val"], meta, {})
        timed("DataGuard.check, first", guard.check)
        timed("DataGuard.check, at a checkpoint", guard.check)
        path = folder.with_name("record.pt")
        timed("its record written", lambda guard=guard, path=path: torch.save({"data": guard.record}, path))
        timed("its record read", lambda path=path: torch.load(path, weights_only=True, mmap=True))
        print(f"its record in a checkpoint: {path.stat().st_size:,} bytes")
        path.unlink()
    print(f"{len(train):,} train windows, {len(val):,} val windows")
    rng = np.random.default_rng(0)
    for rows in (64, 64, 64):
        indices = rng.integers(0, len(train), rows)
        timed(f"{rows} windows read from anywhere", lambda indices=indices: train.read(indices))
    # 1,024 ranks, 4 windows each a step: what one rank's reader does
    batches = train_batches(train, 1, 4096, 4, 5, 1024, torch.device("cpu"), 1)
    next(batches)
    timed("100 steps of one of 1,024 ranks (4 of 4,096 windows)", lambda: [next(batches) for _ in range(100)])
    batches.close()


def windows(folder: Path) -> None:
    """The same windows by a map as it is, by one told to expect random reads, and by a file opened for each."""
    folder.mkdir(parents=True, exist_ok=True)
    path, reads, rng = folder / "real_train_000001.bin", 300, np.random.default_rng(1)
    with open(path, "wb") as file:
        file.write(shard_header(200_000_000))
        for _ in range(100):
            file.write(os.urandom(4_000_000))
        os.fsync(file.fileno())

    def run(what: str, read: object) -> None:
        starts = rng.integers(0, 190_000, reads) * 1024
        for life in ("not in memory", "in memory"):
            before, cpu, began = disk_bytes(), time.process_time(), time.perf_counter()
            for start in starts.tolist():
                read(start).max()
            wall, cpu = (time.perf_counter() - began) / reads, (time.process_time() - cpu) / reads
            size = (disk_bytes() - before) / reads / 1024
            print(f"{what}, {life}: {wall * 1e6:.0f} us, {cpu * 1e6:.0f} us of CPU, {size:,.1f} KB from disk a window")

    for what, advice in (("map", None), ("map, MADV_RANDOM", 1)):
        forget(path)
        tokens = open_shard(path)
        if advice:
            address, size = tokens.ctypes.data - HEADER_BYTES, tokens.nbytes + HEADER_BYTES
            assert ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) == 0
        run(what, lambda start, tokens=tokens: tokens[start : start + 1025])
        del tokens
    forget(path)
    run("file opened for each", lambda start: np.fromfile(path, "<u2", 1025, offset=HEADER_BYTES + 2 * start))
    path.unlink()


def forget(path: Path) -> None:
    """Let the kernel drop what it holds of a file in memory."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


def checkpoints(folder: Path) -> None:
    sizes = {"124M": (12, 12, 768), "medium": (24, 16, 1024)}
    for name, (n_layer, n_head, n_embd) in sizes.items():
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50304))
        [optimizer] = make_optimizers(model, OptimConfig())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p in model.parameters():
            p.grad = None
        state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict()], "step": 1}
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            began = time.perf_counter()
            path = checkpoint.save(state, str(folder), 1, None)
            seconds = time.perf_counter() - began
            forget(path)
            began = time.perf_counter()
            with zipfile.ZipFile(path) as archive:
                archive.testzip()
            checked, size = time.perf_counter() - began, path.stat().st_size
            parameters = model.num_params()
            print(
                f"{name}: {parameters:,} parameters, {size:,} bytes ({size / parameters:.1f} a parameter), saved in "
                f"{seconds:.1f} s ({size / seconds / 1e6:,.0f} MB/s), its checksums in {checked:.1f} s",
                flush=True,
            )
            path.unlink()
        del model, optimizer, state


if __name__ == "__main__":
    if sys.argv[1] == "index":
        index(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 150_000)
    else:
        {"checkpoints": checkpoints, "windows": windows}[sys.argv[1]](Path(sys.argv[2]))
