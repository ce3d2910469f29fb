import random
import struct
import zlib

import pytest
from shards import BLOCK, MAGIC, find_shards, shard_checksum, shard_header, shard_tokens

from configurator import UserError


def test_tokens(tmp_path):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(shard_header(3) + bytes(6))
    assert shard_tokens(path) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        shard_header(3)[:11],
        shard_header(3),
        shard_header(3) + bytes(5),
        shard_header(3) + bytes(8),
        struct.pack(">3i", MAGIC, 1, 3) + shard_header(3)[12:] + bytes(6),
        struct.pack("<3i", MAGIC, 1, -506),  # as long as that says: 1024 - 2 * 506 = 12 bytes
        struct.pack("<3i", MAGIC, 1, 2**31 - 1) + bytes(1012),
    ],
)
def test_files_that_are_no_whole_shard(tmp_path, content):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x_train_000000"):
        shard_tokens(path)


def test_paths_that_are_no_file(tmp_path):
    (tmp_path / "folder.bin").mkdir()
    for name in ("folder.bin", "missing.bin"):
        with pytest.raises(UserError, match=name):
            shard_tokens(tmp_path / name)


@pytest.mark.parametrize("size", [0, 2, BLOCK - 2, BLOCK, 2 * BLOCK + 6])
def test_checksum_of_all_tokens(tmp_path, size):
    path, tokens = tmp_path / "x_train_000000.bin", random.Random(size).randbytes(size)
    path.write_bytes(shard_header(size // 2) + tokens)
    assert shard_checksum(path) == zlib.crc32(tokens)


def test_shards_of_a_split_in_order(tmp_path):
    for name in ("x_train_000010.bin", "x_train_000002.bin", "x_val_000000.bin", "train_.bin", "x_train_1.bin.tmp"):
        (tmp_path / name).touch()
    assert [path.name for path in find_shards(tmp_path, "train")] == ["x_train_000002.bin", "x_train_000010.bin"]
