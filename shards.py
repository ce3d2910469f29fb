"""The shard format, which is llm.c's: a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens,
zeros), then that many uint16 token ids."""

import os
from pathlib import Path

import numpy as np

from configurator import UserError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


def shard_header(num_tokens: int) -> bytes:
    """The bytes in front of a shard's tokens."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, num_tokens
    return header.tobytes()


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
