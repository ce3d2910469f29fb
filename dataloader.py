"""Which tokens make up step s: the windows, and the batches of a run.

A window is seq_len inputs and their targets: window i of a shard reads seq_len + 1 tokens from i * seq_len. All windows
of all shards are shuffled together once an epoch, and the windows of step s are a pure function of (seed, s): nothing
has to be saved to resume, and the global batch is the same on any number of processes.
"""

import json
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from files import HEADER_BYTES, find_shards, shard_tokens

MAX_MAPS = 16_384  # shards of a split that stay mapped: Linux gives a process 65,530 maps, and others need some
AGAIN = "prepare the data again with fineweb.py"


# ---------------------------------------------------------------------------------------------------------------------
# A folder of shards


def read_meta(data_dir: str) -> dict:
    """data_dir/meta.json, which fineweb.py writes last; {} for shards made elsewhere. Raises UserError."""
    path = Path(data_dir, "meta.json")
    if not os.path.isdir(data_dir):
        raise UserError(f"data_dir {data_dir}: no such folder; prepare it with fineweb.py (see config/data/)")
    if not path.exists():
        if Path(data_dir, "progress.json").exists() or list(Path(data_dir).glob("*of*")):
            raise UserError(f"{data_dir}: its preparation is not finished; run its fineweb.py command again")
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(meta["tokenizer"], str) and 1 <= meta["vocab_size"] <= 1 << 16):  # ids are uint16
            raise ValueError("no tokenizer, or vocab_size not within 1 to 65,536")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}; {AGAIN}") from None
    if meta.get("part"):
        raise UserError(f"{data_dir} is part {meta['part']} of a preparation; join its parts with fineweb.py")
    return meta


def data_tokenizer(data_dir: str, meta: dict, vocab_size: int) -> str | None:
    """The data's tokenizer for get_tokenizer: a name, or the whole content of a tokenizer.json; None if unknown."""
    if not meta:
        return "gpt2" if vocab_size in (50257, 50304) else None
    name = meta["tokenizer"]
    if not name.endswith(".json"):
        return name
    for path in (Path(data_dir, name), Path(name)):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise UserError(f"{data_dir}: its meta.json names the tokenizer {name}, which is not there")


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, uint16 (n,), mapped from disk. Raises UserError if the file is not a whole shard."""
    size = HEADER_BYTES // 2 + shard_tokens(path)
    # torch closes the file once it is mapped (np.memmap does not: thousands of shards would exhaust the open files).
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint16).numpy()[HEADER_BYTES // 2 :]


def fingerprints(data_dir: str, meta: dict) -> dict[str, list]:
    """What tells one preparation from another: {shard's name: [tokens, crc32 of a sample of them, its crc32 in
    meta.json]}. The sample is 16 blocks of 2,048 tokens, spread evenly: a shard that was written anew has another."""
    known = {name: crc for names in meta.get("shards", {}).values() for name, (_, crc) in names.items()}
    found = {}
    for path in find_shards(data_dir, "train") + find_shards(data_dir, "val"):
        tokens, crc = shard_tokens(path), 0
        with open(path, "rb", buffering=0) as file:
            for start in np.linspace(0, max(0, tokens - 2048), 16).astype(int).tolist():
                file.seek(HEADER_BYTES + 2 * start)
                crc = zlib.crc32(file.read(4096), crc)
        found[path.name] = [tokens, crc, known.get(path.name)]
    return found


def check_data(data_dir: str, was: dict[str, list], now: dict[str, list]) -> None:
    """Raises UserError, naming the shard, where the data is not what it was."""
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            change = "new" if name not in was else "gone" if name not in now else "not the same"
            raise UserError(f"{Path(data_dir, name)}: {change} since this run began; restore it, or start another run")


# ---------------------------------------------------------------------------------------------------------------------
# Windows and batches


class Windows:
    """The windows of one split, numbered 0 to len - 1 through its shards in the order of their names.

    Raises UserError if a shard is damaged or missing; reading a token of vocab_size or more raises one too.
    """

    def __init__(self, data_dir: str, split: str, seq_len: int, vocab_size: int = 1 << 16):
        self.paths = find_shards(data_dir, split)
        if not self.paths:
            raise UserError(f"{data_dir}: no {split} shards (*_{split}_*.bin); prepare them with fineweb.py")
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.shard = lru_cache(MAX_MAPS)(open_shard)
        lengths = [len(self.shard(path)) for path in self.paths]
        expected = read_meta(data_dir).get(f"{split}_tokens", sum(lengths))
        if sum(lengths) != expected:
            raise UserError(f"{data_dir}: {len(lengths)} {split} shards hold {sum(lengths)} {split} tokens, not the "
                            f"{expected} of its meta.json; restore what is missing, or {AGAIN}")  # fmt: skip
        self.ends = np.cumsum([max(0, (length - 1) // seq_len) for length in lengths])
        if not len(self):
            raise UserError(f"{data_dir}: no {split} shard holds a window of {seq_len}; the largest has {max(lengths)}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these windows, int64 (B, T) each. Two arrays, not views of one: copying strided rows to
        a GPU would go through memory that is not pinned."""
        T = self.seq_len
        x, y = np.empty((2, len(indices), T), dtype=np.int64)
        for row, index in enumerate(indices):
            shard = int(np.searchsorted(self.ends, index, side="right"))
            first = int(self.ends[shard - 1]) if shard else 0
            start = (int(index) - first) * T
            tokens = self.shard(self.paths[shard])[start : start + T + 1]
            x[row], y[row] = tokens[:-1], tokens[1:]
            if tokens.max() >= self.vocab_size:
                raise UserError(
                    f"{self.paths[shard]}: token {start + int(tokens.argmax())} is {tokens.max()}, but the vocabulary "
                    f"has {self.vocab_size} ids; the shard is damaged or of another tokenizer",
                    alone=True,  # no other process reads this window
                )
        return torch.from_numpy(x), torch.from_numpy(y)


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
    whatever the batch size and the number of ranks. All ranks get the same number of batches; the last may be empty.
    """
    count = min(val_tokens // windows.seq_len, len(windows))
    for first in range(0, count, world_size * batch_size):
        start = first + rank * batch_size
        x, y = windows.read(np.arange(start, min(start + batch_size, count)))
        yield x.to(device), y.to(device)
