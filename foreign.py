"""Token files that others made: llm.c's shards, nanoGPT's train.bin and val.bin, build-nanogpt's .npy; in a folder, or
in a Hugging Face data set, from which they are downloaded one at a time. fineweb.py --shards= makes shards of them."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configurator import UserError
from shards import HEADER_BYTES, foreign_kind, shard_tokens, split_of
from sources import fingerprint, leave_out, one_line


class TokenFile(NamedTuple):
    split: str
    version: str  # names it, and its content if that is on the hub
    get: Callable[[], Path]  # its path, once it is on this machine; raises UserError
    is_download: bool  # so that it may be deleted


def find_token_files(where: str, exclude: str | None, downloads: Path) -> tuple[list[TokenFile], str]:
    """The token files of a folder or data set, in the order of their names, and a fingerprint of them all. Raises
    UserError if there are none to train on or none for validation."""
    if os.path.isdir(where):
        paths = [os.path.join(where, name) for name in os.listdir(where)]
        files = {path: TokenFile(split_of(path), path, partial(Path, path), False) for path in paths if split_of(path)}
    else:
        files = find_on_hub(where, downloads)
    names = leave_out(sorted(files), exclude)
    kinds = {foreign_kind(name) or "llm.c's shards" for name in names}
    if len(kinds) > 1:
        raise UserError(f"--shards={where}: there are {' and '.join(sorted(kinds))}; leave some out with --exclude")
    if any(name.endswith("train.bin") for name in names) and os.path.exists(os.path.join(where, "meta.pkl")):
        raise UserError(f"--shards={where}: its ids are characters (meta.pkl); prepare the text with --tokenizer=bytes")
    for split in ("train", "val"):
        if not any(split_of(name) == split for name in names):
            raise UserError(f"--shards={where}: no {split} file there (*_{split}_*.bin, {split}.bin, *_{split}_*.npy)")
    found = [files[name] for name in names]
    return found, fingerprint([file.version for file in found])


def find_on_hub(repo: str, downloads: Path) -> dict[str, TokenFile]:
    """The token files of a data set by name."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(repo, files_metadata=True)
    except Exception as error:  # of many types: no network, no such data set, no access; all have a good message
        raise UserError(f"--shards={repo}: no such folder, and of Hugging Face: {one_line(error)}") from None
    files = {f"{repo}/{file.rfilename}": file for file in info.siblings if split_of(file.rfilename)}
    return {
        name: TokenFile(
            split_of(name), f"{name} {file.blob_id}", partial(download, repo, info.sha, file, downloads), True
        )
        for name, file in files.items()
    }


def download(repo: str, commit: str, file: Any, downloads: Path) -> Path:
    """Download a file of a data set, with a progress bar on a terminal. Raises UserError."""
    import huggingface_hub

    where, again = f"--shards={repo}: {file.rfilename}", "run the same command to go on"
    try:
        path = huggingface_hub.hf_hub_download(
            repo, file.rfilename, repo_type="dataset", revision=commit, local_dir=downloads
        )
    except Exception as error:  # of many types
        raise UserError(f"{where}: {one_line(error)}; when that is mended, {again}") from None
    with open(path, "rb") as data:
        known = file.lfs.sha256 if file.lfs else None  # of what is kept outside of git: all large files
        if known and hashlib.file_digest(data, "sha256").hexdigest() != known:
            os.unlink(path)
            raise UserError(f"{where}: its sha256 is not {known}; {again}")
    return Path(path)


def open_tokens(path: Path) -> np.ndarray:
    """A file's token ids, uint16, mapped from disk. Raises UserError if it is not what its name says."""
    kind, size = foreign_kind(path.name), path.stat().st_size
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
        else:
            offset = 0 if kind else HEADER_BYTES
            tokens = np.memmap(path, "<u2", "r", offset, size // 2 if kind else shard_tokens(path))
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    if tokens.dtype != np.dtype("<u2") or tokens.ndim != 1 or not len(tokens) or (kind and size % 2):
        raise UserError(f"{path}: {tokens.dtype} of shape {tokens.shape} in {size} bytes, not a row of uint16")
    return tokens
