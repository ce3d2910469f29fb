"""The shard format, which is llm.c's: a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens,
zeros), then that many uint16 token ids."""

import contextlib
import os
import re
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from configurator import UserError
from files import whole_file

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
BLOCK = 1 << 20  # bytes read at a time


def shard_header(num_tokens: int) -> bytes:
    """The bytes in front of a shard's tokens."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, num_tokens
    return header.tobytes()


class NewShard:
    """A shard that is being written: its name, tokens so far, and the crc32 of these as bytes."""

    def __init__(self, name: str, file: IO[bytes]):
        self.name, self.tokens, self.checksum, self.file = name, 0, 0, file

    def write(self, ids: np.ndarray) -> None:
        """Add token ids, uint16. Raises OSError."""
        self.file.write(ids)
        self.tokens += len(ids)
        self.checksum = zlib.crc32(ids, self.checksum)


@contextlib.contextmanager
def new_shard(path: Path) -> Iterator[NewShard]:
    """A shard to write, which gets its name and a header once it is whole. Raises OSError."""
    with whole_file(path) as file:
        file.write(shard_header(0))
        shard = NewShard(path.name, file)
        yield shard
        file.seek(0)
        file.write(shard_header(shard.tokens))


def shard_tokens(path: str | Path) -> int:
    """How many tokens a shard has. Raises UserError where the file is not a whole shard."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            magic, version, tokens = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4").tolist()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if (magic, version) != (MAGIC, VERSION):
        raise UserError(f"{path}: not a token shard (its header is wrong); prepare the data with fineweb.py")
    if size != HEADER_BYTES + 2 * tokens or tokens < 0:
        raise UserError(f"{path}: {size} bytes, but its header says {tokens} tokens; the file is cut or damaged")
    return tokens


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of a split, in the order of their names."""
    # The last part of the name counts: a folder may be called my_train_set, and its shards after it.
    name = re.compile(rf".*_{split}_\d+\.bin", re.DOTALL)
    return sorted(path for path in Path(folder).glob("*.bin") if name.fullmatch(path.name))


def split_of(path: str | Path) -> str | None:
    """train or val, if this is the name of a token file: one of ours or, as foreign_kind says, of another program's."""
    match = re.fullmatch(r"(?:.*_)?(train|val)(?:_\d+\.bin|_\d+\.npy|\.bin)", os.path.basename(path), re.DOTALL)
    return match and match[1]


def foreign_kind(path: str | Path) -> str | None:
    """What a token file is that does not train as it is; None of any other file."""
    if not split_of(path) or re.search(r"_\d+\.bin$", str(path)):
        return None
    return "NumPy's array, as build-nanogpt makes" if str(path).endswith(".npy") else "nanoGPT's: ids without a header"


def prepare_advice(folder: str | Path) -> str:
    """What to do where there are no shards."""
    for path in sorted(Path(folder).iterdir()):
        if kind := foreign_kind(path):
            command = shlex.join(["python", "fineweb.py", f"--shards={folder}", f"--out_dir={Path(folder)}_shards"])
            return f"but {path.name} is {kind}; convert it: {command}"
    return "prepare them with fineweb.py"


def find_parts(folder: str | Path) -> list[Path]:
    """The folders of a preparation's parts that are not joined yet: 01of16, ..."""
    return sorted(path for path in Path(folder).glob("*of*") if re.fullmatch(r"\d+of\d+", path.name))


def join_command(folder: str | Path) -> str:
    """What makes one preparation of them."""
    return shlex.join(["python", "fineweb.py", "--join_parts=True", f"--out_dir={folder}"])


def shard_checksum(path: str | Path) -> int:
    """The crc32 of a shard's tokens as bytes. Other threads run meanwhile. Raises OSError."""
    checksum, block = 0, memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        file.seek(HEADER_BYTES)
        while size := file.readinto(block):
            checksum = zlib.crc32(block[:size], checksum)
    return checksum
