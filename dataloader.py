"""Which tokens make up step s, and reading them.

A window is seq_len inputs and their targets: window i of a shard reads seq_len + 1 tokens from
i * seq_len. All windows of all shards are shuffled together once per epoch. The windows of step s
depend on (seed, s) and nothing else: a checkpoint needs no position in the data, and the global
batch is the same on any number of processes.
"""

import itertools
import os
import re
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
from files import HEADER_BYTES, find_shards, read_json, read_text, shard_tokens

MAX_MAPS = 16_384  # shards of a split that stay mapped: Linux allows a process 65,530 maps, and torch needs some
AGAIN = "prepare the data again with fineweb.py"
Batches = Iterator[tuple[Tensor, Tensor]]  # inputs and targets, int64 (B, T) each


# ---- A folder of shards


def read_meta(data_dir: str) -> dict:
    """The content of data_dir/meta.json; {} for shards made elsewhere."""
    try:
        names = os.listdir(data_dir)
    except OSError as error:
        advice = "" if os.path.exists(data_dir) else f"; prepare it: {command_for(data_dir)}"
        raise UserError(f"data_dir {data_dir}: {error.strerror}{advice}") from None
    # fineweb.py keeps a progress.json while it works and writes meta.json last. Without this check,
    # a run would train on the half that is there. Shards made elsewhere have neither file.
    path = Path(data_dir, "meta.json")
    if path.name not in names:
        if "progress.json" in names:
            raise UserError(f"{data_dir}: its preparation is not finished; run its fineweb.py command again")
        return {}
    meta = read_json(path, AGAIN)
    if not isinstance(meta, dict) or not {"tokenizer", "vocab_size"} <= meta.keys():
        raise UserError(f"{path}: damaged, its tokenizer and vocab_size are missing; {AGAIN}")
    return meta


def command_for(data_dir: str) -> str:
    """The command that prepares this folder, if one of our data configs does."""
    for path in sorted(Path(__file__).parent.glob("config/data/*.py")):
        out_dir = re.search(r'^out_dir = "(.*)"', path.read_text(errors="replace"), re.MULTILINE)
        if out_dir and out_dir[1] == os.path.normpath(data_dir):
            return f"python fineweb.py config/data/{path.name}"
    return "python fineweb.py --files=YOUR_TEXTS --out_dir=DATA_DIR, or a config in config/data/"


def data_tokenizer(data_dir: str, meta: dict, vocab_size: int) -> str | None:
    """The data's tokenizer: a name or a tokenizer.json's content; None: it is not known."""
    if not meta:
        # Only the vocabulary size tells: GPT-2's, or that rounded up to a multiple of 64.
        return "gpt2" if vocab_size in (50257, 50304) else None
    name = meta["tokenizer"]
    if not name.endswith(".json"):
        return name
    if name != os.path.basename(name):  # on another machine, another folder's file may be gone or another tokenizer
        raise UserError(f"{data_dir}/meta.json: the tokenizer {name} is outside of {data_dir}; copy it there")
    return read_text(Path(data_dir, name), AGAIN)


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, uint16 (n,), mapped from disk. UserError if it is not whole."""
    size = HEADER_BYTES // 2 + shard_tokens(path)
    # torch closes the mapped file. np.memmap does not: thousands of shards would be too many files.
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint16).numpy()[HEADER_BYTES // 2 :]


def fingerprints(data_dir: str, meta: dict) -> dict[str, list]:
    """{shard's name: [tokens, crc32 of a sample of them, crc32 in meta.json]}, to know data again.

    Folder and times of the files do not count, so data may be copied, moved and touched.
    """
    # The checksums in meta.json cover whole shards: equal samples do not hide a difference.
    known = {name: crc for shards in meta.get("shards", {}).values() for name, (_, crc) in shards.items()}
    found = {}
    for path in find_shards(data_dir, "train") + find_shards(data_dir, "val"):
        tokens, crc = open_shard(path), 0
        # 16 blocks of 2,048 tokens, spread evenly: reading 20 GB at each start takes too long.
        for start in np.linspace(0, max(0, len(tokens) - 2048), 16).astype(int):
            crc = zlib.crc32(tokens[start : start + 2048], crc)
        found[path.name] = [len(tokens), crc, known.get(path.name)]
    return found


def check_data(data_dir: str, saved: dict[str, list], now: dict[str, list]) -> None:
    """Compare a checkpoint's fingerprints with today's. UserError names a shard that differs."""
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            change = "is new" if name not in saved else "is gone" if name not in now else "has other tokens"
            raise UserError(f"{Path(data_dir, name)} {change} since this run began; restore it, or start a new run")


# ---- Windows and batches


class Windows:
    """The windows of one split, numbered 0 to len - 1 through its shards, ordered by name.

    Raises UserError if a shard is damaged or missing, or holds a token id of vocab_size or more.
    """

    def __init__(self, data_dir: str, split: str, seq_len: int, vocab_size: int = 1 << 16):
        self.paths = find_shards(data_dir, split)
        if not self.paths:
            advice = "; to train without a validation set, --val_interval=0" if split == "val" else ""
            raise UserError(f"{data_dir}: no {split} shards (*_{split}_*.bin); prepare them with fineweb.py{advice}")
        # Map all shards now, to find a damaged one before step 1; what is not read takes no memory.
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.shard = lru_cache(MAX_MAPS)(open_shard)
        lengths = [len(self.shard(path)) for path in self.paths]

        # A shard that was lost on the way would change the order of all windows unnoticed.
        expected = read_meta(data_dir).get(f"{split}_tokens", sum(lengths))
        if sum(lengths) != expected:
            raise UserError(f"{data_dir}: {len(lengths)} {split} shards hold {sum(lengths)} {split} tokens, not the "
                            f"{expected} of its meta.json; restore what is missing, or {AGAIN}")  # fmt: skip

        # ends[k]: the windows in shards 0 to k. A binary search in it finds the shard of a window.
        self.ends = np.cumsum([max(0, (length - 1) // seq_len) for length in lengths])
        if not len(self):
            raise UserError(f"{data_dir}: no {split} shard holds a window of {seq_len}; the largest has {max(lengths)}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these windows, int64 (B, T) each."""
        T = self.seq_len
        # Not two views of (B, T + 1): strided rows reach a GPU through memory that is not pinned.
        x, y = np.empty((2, len(indices), T), dtype=np.int64)
        for row, index in enumerate(indices):
            # Window number -> its shard and place in it -> T + 1 tokens -> T inputs, T targets.
            shard = int(np.searchsorted(self.ends, index, side="right"))
            first = int(self.ends[shard - 1]) if shard else 0  # the shard's first window
            start = (int(index) - first) * T
            tokens = self.shard(self.paths[shard])[start : start + T + 1]
            x[row], y[row] = tokens[:-1], tokens[1:]
            # On a GPU such an id would end in a device-side assertion that does not name the shard.
            if tokens.max() >= self.vocab_size:
                raise UserError(
                    f"{self.paths[shard]}: token {start + int(tokens.argmax())} is {tokens.max()}, but the vocabulary "
                    f"has {self.vocab_size} ids; the shard is damaged or of another tokenizer",
                    alone=True,  # no other process reads this window
                )
        return torch.from_numpy(x), torch.from_numpy(y)


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a keyed shuffle of range(size) puts each index: a bijection, in O(1) memory."""
    # A Feistel network on two halves of an index, one round for each of 8 keys. The keys come from
    # seed and epoch, so each epoch has its own order.
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _mix(np.arange(8, dtype=np.uint64) + _mix(_mix(np.array([seed], dtype=np.uint64)) + np.uint64(epoch)))
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    # It permutes the next power of four. Results of size or more are permuted again until they
    # fall inside: cycle walking (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        value[outside] = left << np.uint64(half) | right
        outside = value >= size
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def step_windows(step: int, rows: int, num_windows: int, seed: int) -> np.ndarray:
    """The windows of step 1, 2, ..., int64 (rows,). A batch can straddle two epochs, or more."""
    # Row q of the whole run, counted from step 1, is row q % num_windows of epoch q // num_windows.
    q = (step - 1) * rows + np.arange(rows)
    epochs, within = np.divmod(q, num_windows)
    windows = np.empty(rows, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        windows[here] = permute(within[here], num_windows, seed, int(epoch))
    return windows


def train_batches(
    windows: Windows, seed: int, rows: int, batch_size: int, rank: int, world_size: int, device: torch.device, step: int
) -> Batches:
    """This rank's micro-batches on the device, from the given step on, without end.

    `rows` is the number of windows in a step, over all its micro-batches on all ranks.
    """
    micro_batches = rows // (batch_size * world_size)

    def read() -> Batches:
        for s in itertools.count(step):
            # A step's windows are dealt out in turn: micro-batch 0 of rank 0, of rank 1, and so on.
            mine = step_windows(s, rows, len(windows), seed).reshape(micro_batches, world_size, batch_size)[:, rank]
            for indices in mine:
                yield windows.read(indices)

    return prefetch(read(), device, ahead=2 * micro_batches)


def val_batches(
    windows: Windows, val_tokens: int, batch_size: int, rank: int, world_size: int, device: torch.device
) -> Batches:
    """This rank's share of the first val_tokens, in batches of at most batch_size windows.

    All ranks together read the same windows whatever batch_size and world_size.
    """
    count = min(val_tokens // windows.seq_len, len(windows))
    # The range ends later on later ranks, so that every rank gets as many batches. Its last one may
    # be smaller, or empty.
    starts = range(rank * batch_size, count + rank * batch_size, world_size * batch_size)
    batches = (windows.read(np.arange(start, min(start + batch_size, count))) for start in starts)
    return prefetch(batches, device, ahead=2)


def prefetch(batches: Batches, device: torch.device, ahead: int) -> Batches:
    """The same batches on the device, `ahead` of them read in advance."""
    on_gpu = device.type == "cuda"  # on MPS, a copy that is not waited for may hold anything

    def read() -> tuple[Tensor, Tensor] | None:
        batch = next(batches, None)
        if batch and on_gpu:  # a GPU copies from pinned memory while it computes
            batch = batch[0].pin_memory(), batch[1].pin_memory()
        return batch

    # A thread reads ahead, so that no GPU waits for a disk. A batch that is used makes room for the
    # next read.
    with ThreadPoolExecutor(1) as reader:
        waiting = deque(reader.submit(read) for _ in range(ahead))
        while batch := waiting.popleft().result():
            x, y = batch
            yield x.to(device, non_blocking=on_gpu), y.to(device, non_blocking=on_gpu)
            waiting.append(reader.submit(read))
