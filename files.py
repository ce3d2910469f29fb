"""Files that appear whole or not at all, folders with one writer, and files that others wrote."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from configurator import UserError


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write. It gets its name once all of it is on disk.

    On an error or a full disk (OSError) nothing of it is left, and an older file of that name stays. A kill may leave a
    partial file, which `remove_partial` removes.
    """
    partial = partial_of(path)
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # first the data, then the name
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the name too
        os.close(folder)


def partial_of(path: Path) -> Path:
    """A file's name while it is written, different in every process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_partial(folder: str | Path, name: str = "*") -> None:
    """Remove the partial files of this name (a glob) that kills left. Call it only while holding the folder's lock."""
    for partial in Path(folder).glob(f".{name}.*.partial"):
        partial.unlink()


def lock_folder(folder: str | Path) -> int | None:
    """Lock an existing folder until the returned file handle is closed or this process ends in any way. None on
    Windows, which has no such locks. Raises UserError if another process holds the lock.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY)  # the folder itself: no file in it that could be deleted
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"{folder}: another process is writing there; wait for it, or choose another --out_dir"
        ) from None
    except OSError as error:
        print(
            f"{folder}: this file system has no locks ({error.strerror}), so a second run would not be noticed",
            file=sys.stderr,
        )
    return handle


def read_text(path: str | Path, advice: str) -> str:
    """A UTF-8 file's content. Raises UserError, with what to do, if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {advice}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text in UTF-8; {advice}") from None


def read_json(path: str | Path, advice: str) -> Any:
    """A JSON file's content. Raises UserError, with what to do, if it cannot be read."""
    try:
        return json.loads(read_text(path, advice))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {advice}") from None
