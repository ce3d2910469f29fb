"""Files that appear whole or not at all, whatever dies while they are written; and folders with one writer."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from configurator import UserError


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write, which takes its name once all of it is on disk.

    On an error or a full disk (OSError) nothing is left of it, and a file that was there before is as it was. What a
    kill leaves, `remove_partial` removes.
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
    """What a file is called while it is written; another process that writes the same one has another."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_partial(folder: str | Path, name: str = "*") -> None:
    """Remove what kills left of files of this name (a glob) in a folder where nobody else writes now."""
    for partial in Path(folder).glob(f".{name}.*.partial"):
        partial.unlink()


def lock_folder(folder: str | Path) -> int | None:
    """Keep other processes from writing a folder that exists, until the returned file handle is closed or this process
    ends, however that may be. None on Windows, which has no such locks.

    Raises UserError where another process has the lock.
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
