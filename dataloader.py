"""Which tokens make up step s: the windows, and the batches of a run.

A window is seq_len inputs and their targets: window i of a shard reads seq_len + 1 tokens from i * seq_len. All windows
of all shards are shuffled together once an epoch, and the windows of step s are a pure function of (seed, s): nothing
has to be saved to resume, and the global batch is the same on any number of processes.
"""

import os
import threading
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from files import read_json, read_text
from shards import HEADER_BYTES, find_parts, find_shards, join_command, prepare_advice, shard_checksum, shard_tokens

AGAIN = "prepare the data again"
MAX_MAPS = 16_384  # shards of a split that stay mapped: Linux gives a process 65,530 maps, and others need some


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, uint16 (n,), mapped from disk. Raises UserError if the file is not a whole shard."""
    size = HEADER_BYTES // 2 + shard_tokens(path)
    # torch closes the file once it is mapped (np.memmap does not: thousands of shards would exhaust the open files).
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint16).numpy()[HEADER_BYTES // 2 :]


def read_meta(data_dir: str) -> dict:
    """data_dir/meta.json, or {} for shards made elsewhere.

    Raises UserError if there is no data, or fineweb.py has not finished it.
    """
    if not os.path.isdir(data_dir):
        raise UserError(f"data_dir {data_dir}: no such folder; prepare it with fineweb.py (see config/data/)")
    path = Path(data_dir, "meta.json")
    if not path.exists():
        check_finished(data_dir)
        return {}
    meta = read_json(path, AGAIN)
    if isinstance(meta, dict) and meta.get("part"):
        join = join_command(Path(data_dir).resolve().parent)
        raise UserError(f"{data_dir} is part {meta['part']} of a preparation; once all parts are there: {join}")
    counts = [f"{split}_{what}" for split in ("train", "val") for what in ("tokens", "words", "bytes")]  # some may miss
    for name, kind in {"tokenizer": str, "vocab_size": int, **dict.fromkeys(counts, int)}.items():
        value = meta.get(name, 0 if name in counts else None) if isinstance(meta, dict) else None
        if type(value) is not kind or (kind is int and value < 0):
            raise UserError(f"{path}: {name} is missing or not a {'count' if kind is int else 'name'}; {AGAIN}")
    if not 1 <= meta["vocab_size"] <= 1 << 16:
        raise UserError(f"{path}: vocab_size is {meta['vocab_size']}, but shards hold 1 to 65,536 different ids")
    try:
        pairs = [pair for names in meta.get("shards", {}).values() for pair in names.values()]
        whole = all(type(tokens) is type(checksum) is int for tokens, checksum in pairs)
    except (AttributeError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{path}: shards is not {{split: {{name: [tokens, crc32]}}}}; {AGAIN}")
    return meta


def check_finished(data_dir: str) -> None:
    """Raises UserError if fineweb.py was stopped before it wrote meta.json, or has made only parts yet."""
    path = Path(data_dir, "progress.json")
    if path.exists():
        again = "run its fineweb.py command again"
        finish = read_json(path, again).get("command", again)
        raise UserError(f"{data_dir}: the preparation of this data is not finished; finish it: {finish}")
    if find_parts(data_dir):
        raise UserError(f"{data_dir}: the parts of this data are not joined yet: {join_command(data_dir)}")


def data_tokenizer(data_dir: str, meta: dict, vocab_size: int) -> str | None:
    """The data's tokenizer for get_tokenizer: a name, or the whole content of a tokenizer.json; None if unknown."""
    if not meta:
        return "gpt2" if vocab_size in (50257, 50304) else None
    name = meta["tokenizer"]
    if name.endswith(".json"):
        paths = [path for path in (Path(data_dir, name), Path(name)) if path.exists()]
        if not paths:
            raise UserError(f"{data_dir}: its meta.json names the tokenizer {name}, which is not there")
        return read_text(paths[0], AGAIN)
    return name


class Windows:
    """The windows of one split, numbered 0 to len - 1 through its shards in the order of their names.

    Raises UserError if a shard is damaged or missing; reading a token of vocab_size or more raises one too.
    """

    def __init__(self, data_dir: str, split: str, seq_len: int, vocab_size: int = 1 << 16):
        self.paths = find_shards(data_dir, split)
        if not self.paths:
            raise UserError(f"{data_dir}: no {split} shards (*_{split}_*.bin); {prepare_advice(data_dir)}")
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.shard = lru_cache(MAX_MAPS)(open_shard)
        self.lengths = [len(self.shard(path)) for path in self.paths]
        tokens = sum(self.lengths)
        expected = read_meta(data_dir).get(f"{split}_tokens", tokens)
        if tokens != expected:
            raise UserError(
                f"{data_dir}: meta.json says {expected} {split} tokens, but {len(self.paths)} shards hold {tokens}; "
                f"restore what is missing or changed, or {AGAIN}"
            )
        counts = [max(0, (length - 1) // seq_len) for length in self.lengths]
        self.ends = np.cumsum(counts)
        if not len(self):
            raise UserError(
                f"{data_dir}: no {split} shard holds a window of seq_len = {seq_len}; "
                f"the largest has {max(self.lengths)}"
            )

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


class DataGuard:
    """Notices shards that change during a run, or between a run and its resumption. For rank 0 alone.

    `record` goes into checkpoints: {split: {shard's name: {"tokens", "size", "mtime_ns", "crc32"}}}; crc32 is the
    checksum of the tokens in meta.json, or None. `saved` is the record of the checkpoint to resume, {} for a new run.
    """

    def __init__(self, data_dir: str, splits: Collection[str], meta: dict, saved: dict):
        self.data_dir, self.splits, self.record = data_dir, splits, saved
        self.checksums = {
            name: checksum for names in meta.get("shards", {}).values() for name, (_, checksum) in names.items()
        }
        self.reader: threading.Thread | None = None
        self.problem: str | None = None

    def start_reading(self) -> None:
        """Compare all shards with their checksums in the background, once; the next `check` reports a difference."""
        if self.reader is None:
            self.reader = threading.Thread(target=self.read_all, daemon=True)  # daemon: it ends with the process
            self.reader.start()

    def read_all(self) -> None:
        for split in self.splits:
            for path in find_shards(self.data_dir, split):
                self.problem = self.problem or self.read(path)

    def read(self, path: Path) -> str | None:
        """What is wrong with a shard's content; None if nothing is, or its checksum is unknown."""
        expected = self.checksums.get(path.name)
        try:
            if expected is None or expected == shard_checksum(path):
                return None
        except OSError as error:
            return f"{path}: {error.strerror}"
        return f"{path}: its tokens do not match the checksum in meta.json; restore it, and resume"

    def check(self) -> None:
        """Compare every shard's size and modification time with the record. Raises UserError if a shard is new, gone or
        different."""
        if self.problem:
            raise UserError(self.problem)
        for split in self.splits:
            paths = find_shards(self.data_dir, split)
            now = {path.name: fingerprint(path, self.checksums.get(path.name)) for path in paths}
            then = self.record.get(split, now)
            for name in sorted(now.keys() | then.keys()):
                path = Path(self.data_dir, name)
                change = "new" if name not in then else "gone" if name not in now else None
                if change := change or self.change(path, then[name], now[name]):
                    raise UserError(f"{path}: {change} since this run began; restore it, or start another run")
            self.record = self.record | {split: now}

    def change(self, path: Path, then: dict, now: dict) -> str | None:
        """How a shard has changed between two records of it."""
        if not isinstance(then, dict):
            return None  # an older version's checkpoint had another kind of record
        known = then["crc32"] is not None and now["crc32"] is not None
        if then["size"] != now["size"] or (known and then["crc32"] != now["crc32"]):
            return "not the same"
        if then["mtime_ns"] == now["mtime_ns"]:
            return None
        if not known:
            return "written to (or copied without its time, which cp -p and rsync -t keep)"
        # The content decides. At the start of a run nothing is read yet: start_reading will compare it.
        return "not the same" if self.reader and self.read(path) else None


def fingerprint(path: Path, checksum: int | None) -> dict[str, int | None]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    tokens = (status.st_size - HEADER_BYTES) // 2
    return {"tokens": tokens, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "crc32": checksum}


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
