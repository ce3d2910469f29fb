import errno
import os
import struct

import numpy as np
import pytest

from configurator import UserError
from files import (
    WIDE_MAGIC,
    find_shards,
    lock_folder,
    read_json,
    remove_partial,
    shard_header,
    shard_tokens,
    whole_file,
)


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path, "w") as file:
        file.write("é")
        assert not path.exists()
    assert path.read_bytes() == "é".encode()
    with (  # noqa: PT012
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(OSError, match="No space"),
        whole_file(path) as file,
    ):
        file.write(b"half")
        full.write(b"more")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_bytes() == "é".encode()


def test_data_name_and_folder_are_synced_in_this_order(tmp_path, monkeypatch):
    """So that after a power cut there is the old file, or all of the new one."""
    calls = []
    fsync, replace = os.fsync, os.replace
    is_dir = lambda fd: os.path.isdir(f"/proc/self/fd/{fd}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("folder" if is_dir(fd) else "data") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *args: calls.append("name") or replace(*args))
    with whole_file(tmp_path / "a") as file:
        file.write(b"x")
    assert calls == ["data", "name", "folder"]


@pytest.mark.parametrize(
    ("number", "of_files", "works"),
    [(errno.EINVAL, True, True), (errno.EIO, False, True), (errno.EIO, True, False), (errno.ENOSPC, True, False)],
)
def test_file_systems_that_cannot_sync(tmp_path, monkeypatch, number, of_files, works):
    """A file system without fsync is one to write on. A disk that fails or is full is not."""

    def fsync(handle):
        if of_files or os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        with whole_file(tmp_path / "a") as file:
            file.write(b"x")
    except OSError:
        assert not works
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"x"] * works


def test_partial_files_are_removed_and_no_others(tmp_path):
    for name in (".a.bin.123.partial", ".b.bin.9.partial", ".a.b.partial", "c.1.partial"):
        (tmp_path / name).touch()
    remove_partial(tmp_path, "a.bin")
    assert len(list(tmp_path.iterdir())) == 3
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.b.partial", "c.1.partial"]


def test_one_process_writes_a_folder(tmp_path):
    handle = lock_folder(tmp_path)
    with pytest.raises(UserError, match="another process is writing there"):
        lock_folder(tmp_path)
    os.close(handle)
    os.close(lock_folder(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, None])
def test_json_that_cannot_be_read_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: .*; make it again"):
        read_json(tmp_path / "a.json", "make it again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header"),
        (shard_header(3)[:11], "header"),
        (shard_header(3) + bytes(5), "cut or damaged"),
        (shard_header(3) + bytes(8), "cut or damaged"),
        (struct.pack(">3i", 20240520, 1, 3) + shard_header(3)[12:] + bytes(6), "header"),
        (struct.pack("<3i", 20240520, 1, -506), "cut or damaged"),  # as long as that says: 1024 - 2 * 506 = 12 bytes
        (struct.pack("<3i", WIDE_MAGIC, 7, 3) + bytes(1012 + 12), "32-bit ids; this program has 16"),
        (np.arange(999, dtype="<u2").tobytes(), "prepare the text with fineweb.py"),  # nanoGPT's train.bin
        (None, "No such file"),
    ],
)
def test_files_that_are_no_whole_shard(tmp_path, content, message):
    path = tmp_path / "x_train_000000.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x_train_000000\.bin.*{message}"):
        shard_tokens(path)
    path.write_bytes(shard_header(3) + bytes(6))
    assert shard_tokens(path) == 3


def test_shards_of_a_split_in_order(tmp_path):
    names = ["a_train_b_val_1.bin", "train.bin", "tiny_train.bin", "x_train_000002.bin", "x_train_000010.bin"]
    for name in (*names, "train_.bin", "x_train_1.bin.tmp", "training.bin"):
        (tmp_path / name).touch()
    assert [path.name for path in find_shards(tmp_path, "train")] == sorted(names[1:])
    assert [path.name for path in find_shards(tmp_path, "val")] == names[:1]
