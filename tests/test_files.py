import os

import pytest

from configurator import UserError
from files import lock_folder, whole_file


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
    """So that after a loss of power there is the old file, or all of the new one."""
    calls = []
    fsync, replace = os.fsync, os.replace
    is_dir = lambda fd: os.path.isdir(f"/proc/self/fd/{fd}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("folder" if is_dir(fd) else "data") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *args: calls.append("name") or replace(*args))
    with whole_file(tmp_path / "a") as file:
        file.write(b"x")
    assert calls == ["data", "name", "folder"]


def test_one_process_writes_a_folder(tmp_path):
    handle = lock_folder(tmp_path)
    with pytest.raises(UserError, match="another process is writing there"):
        lock_folder(tmp_path)
    os.close(handle)
    os.close(lock_folder(tmp_path))
