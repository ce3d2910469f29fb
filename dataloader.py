"""Which tokens make up step s: the windows, and the batches of a run.

A window is seq_len inputs and their targets: window i of a shard reads seq_len + 1 tokens from i * seq_len. All windows
of all shards are shuffled together once an epoch, and the windows of step s are a pure function of (seed, s): nothing
has to be saved to resume, and the global batch is the same on any number of processes.
"""

import json
import os
import re
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from shards import HEADER_BYTES, shard_tokens


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, uint16 (n,), mapped from disk. Raises UserError where the file is not a whole shard."""
    size = HEADER_BYTES // 2 + shard_tokens(path)
    # torch closes the file once it is mapped (np.memmap does not: thousands of shards would exhaust the open files).
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint16).numpy()[HEADER_BYTES // 2 :]


def read_meta(data_dir: str) -> dict:
    """data_dir/meta.json, or {} for shards that were made elsewhere. Raises UserError where there is no data at all."""
    if not os.path.isdir(data_dir):
        raise UserError(f"data_dir {data_dir}: no such folder; prepare it with fineweb.py (see config/data/)")
    path = Path(data_dir, "meta.json")
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); prepare the data anew") from None
    counts = {
        f"{split}_{what}": 0 for split in ("train", "val") for what in ("tokens", "words", "bytes")
    }  # may be missing
    for name, kind in {"tokenizer": str, "vocab_size": int, **dict.fromkeys(counts, int)}.items():
        value = meta.get(name, counts.get(name)) if isinstance(meta, dict) else None
        if type(value) is not kind or (kind is int and value < 0):
            raise UserError(
                f"{path}: {name} is missing or no {'count' if kind is int else 'name'}; prepare the data anew"
            )
    if not 1 <= meta["vocab_size"] <= 1 << 16:
        raise UserError(f"{path}: vocab_size is {meta['vocab_size']}, but shards hold 1 to 65,536 different ids")
    return meta


def data_tokenizer(data_dir: str, meta: dict, vocab_size: int) -> str | None:
    """What get_tokenizer takes: a name, or the whole content of the data's tokenizer file; None where it is unknown."""
    if not meta:
        return "gpt2" if vocab_size in (50257, 50304) else None
    name = meta["tokenizer"]
    if name.endswith(".json"):
        paths = [path for path in (Path(data_dir, name), Path(name)) if path.exists()]
        if not paths:
            raise UserError(f"{data_dir}: its meta.json names the tokenizer {name}, which is not there")
        try:
            return paths[0].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{paths[0]}: not a tokenizer file ({error}); prepare the data anew") from None
    return name


class Windows:
    """The windows of one split, numbered 0 to len - 1 through its shards in the order of their names.

    Raises UserError where a shard is not whole or missing; an id of vocab_size or more is one when it is read.
    """

    def __init__(self, data_dir: str, split: str, seq_len: int, vocab_size: int = 1 << 16):
        # The last part of the name counts: a folder may be called my_train_set, and its shards after it.
        name = re.compile(rf".*_{split}_\d+\.bin", re.DOTALL)
        self.paths = sorted(path for path in Path(data_dir).glob("*.bin") if name.fullmatch(path.name))
        if not self.paths:
            raise UserError(f"{data_dir}: no {split} shards (*_{split}_*.bin); prepare them with fineweb.py")
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.shards = [open_shard(path) for path in self.paths]
        tokens = sum(map(len, self.shards))
        expected = read_meta(data_dir).get(f"{split}_tokens", tokens)
        if tokens != expected:
            raise UserError(
                f"{data_dir}: meta.json says {expected} {split} tokens, but {len(self.shards)} shards hold {tokens}; "
                "restore what is missing or changed, or prepare the data anew"
            )
        counts = [max(0, (len(shard) - 1) // seq_len) for shard in self.shards]
        self.ends = np.cumsum(counts)
        if not len(self):
            tokens = max(len(shard) for shard in self.shards)
            raise UserError(
                f"{data_dir}: no {split} shard holds a window of seq_len = {seq_len}; the largest has {tokens}"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these windows, int64 (B, T) each. Views of one array would not stay pinned: a copy to a
        GPU first makes strided rows contiguous."""
        T = self.seq_len
        x, y = np.empty((2, len(indices), T), dtype=np.int64)
        for row, index in enumerate(indices):
            shard = int(np.searchsorted(self.ends, index, side="right"))
            first = int(self.ends[shard - 1]) if shard else 0
            start = (int(index) - first) * T
            tokens = self.shards[shard][start : start + T + 1]
            x[row], y[row] = tokens[:-1], tokens[1:]
            if tokens.max() >= self.vocab_size:
                # Only the process that reads this window knows.
                raise UserError(
                    f"{self.paths[shard]}: token {start + int(tokens.argmax())} is {tokens.max()}, but the vocabulary "
                    f"has {self.vocab_size} ids; the shard is damaged or of another tokenizer",
                    alone=True,
                )
        return torch.from_numpy(x), torch.from_numpy(y)

    def fingerprint(self) -> dict[str, int]:
        """{shard's name: checksum} to notice data that changed: of all tokens of a small shard, of pages spread over a
        large one, which takes milliseconds whatever its size."""
        return {path.name: checksum(shard) for path, shard in zip(self.paths, self.shards, strict=True)}


def same_data(data_dir: str, train: Windows, val: Windows | None, saved: dict) -> dict:
    """The fingerprints of both splits. Raises UserError where a shard is not as `saved` ones say it was."""
    now = {"train": train.fingerprint()} | ({"val": val.fingerprint()} if val else {})
    for split in now.keys() & saved.keys():
        for name in sorted(now[split].keys() | saved[split].keys()):
            if now[split].get(name) != saved[split].get(name):
                what = "new" if name not in saved[split] else "gone" if name not in now[split] else "not the same"
                raise UserError(
                    f"{Path(data_dir, name)}: {what} since this run began; restore it, or start another run"
                )
    return saved | now


def checksum(shard: np.ndarray) -> int:
    size = 2048 if len(shard) > 1 << 20 else len(shard)  # tokens of a page of 4 KB
    value = len(shard)
    for start in np.linspace(0, len(shard) - size, 16 if size < len(shard) else 1).astype(np.int64):
        value = zlib.crc32(np.ascontiguousarray(shard[start : start + size]), value)
    return value


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a keyed shuffle of range(size) puts each index: a bijection in O(1) memory, whatever the size.

    A Feistel network permutes the next power of four; results outside of range(size) are permuted again until they
    fall inside (cycle walking: Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _mix(np.arange(8, dtype=np.uint64) + _mix(_mix(np.array([seed], dtype=np.uint64)) + np.uint64(epoch)))
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        value[outside] = left << np.uint64(half) | right
        outside = value >= size
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def step_windows(step: int, rows: int, num_windows: int, seed: int) -> np.ndarray:
    """The windows of step 1, 2, ... in row order, int64 (rows,). A batch may straddle two epochs, or more."""
    q = (step - 1) * rows + np.arange(rows)
    epochs, within = np.divmod(q, num_windows)
    windows = np.empty(rows, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        windows[here] = permute(within[here], num_windows, seed, int(epoch))
    return windows


def train_batches(
    windows: Windows, seed: int, rows: int, batch_size: int, rank: int, world_size: int, device: torch.device, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches (inputs, targets), (B, T) each on the device, from the given step on, without end.

    A background thread reads ahead, so that the accelerator never waits for the disk.
    """
    micro_batches = rows // (batch_size * world_size)
    on_gpu = device.type == "cuda"  # on MPS a copy that is not waited for may hold anything

    def read(step: int) -> list[tuple[Tensor, Tensor]]:
        mine = step_windows(step, rows, len(windows), seed).reshape(micro_batches, world_size, batch_size)[:, rank]
        batches = [windows.read(indices) for indices in mine]
        if on_gpu:  # pinned memory is copied to the GPU while it computes
            batches = [(x.pin_memory(), y.pin_memory()) for x, y in batches]
        return batches

    with ThreadPoolExecutor(1) as reader:
        ahead = deque(reader.submit(read, s) for s in (step, step + 1))
        while True:
            for x, y in ahead.popleft().result():
                yield x.to(device, non_blocking=on_gpu), y.to(device, non_blocking=on_gpu)
            step += 1
            ahead.append(reader.submit(read, step + 1))


def val_batches(
    windows: Windows, val_tokens: int, batch_size: int, rank: int, world_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the first val_tokens, in batches of at most batch_size windows: the same set of windows
    whatever the batch size and the number of ranks."""
    count = min(val_tokens // windows.seq_len, len(windows))
    for start in range(rank * batch_size, count, world_size * batch_size):
        x, y = windows.read(np.arange(start, min(start + batch_size, count)))
        yield x.to(device), y.to(device)
