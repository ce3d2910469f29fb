"""What a preparation has written: shards, progress.json while it is made, and meta.json once it is whole.

fineweb.py makes it; several machines make parts of it, which `join_parts` puts together.
"""

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from files import lock_folder, remove_partial, whole_file
from shards import find_parts, find_shards, shard_tokens

CONFIGS = Path(__file__).parent / "config"
COUNTS = [f"{split}_{what}" for split in ("train", "val") for what in ("tokens", "words", "bytes")]  # in meta.json


class Cursor(NamedTuple):
    """What has been read."""

    part: int = 0  # of the source, the one being read
    piece: int = 0  # pieces of it
    documents: int = 0  # in the parts before it


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """A folder that only this process writes. What is new of it and its parents, and stays empty, is removed again.

    Raises UserError if another process writes it.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            for path in new:
                path.rmdir()
        if lock is not None:
            os.close(lock)


def read_progress(out_dir: Path, settings: dict) -> tuple[dict | None, bool]:
    """(what an earlier run with the same settings left, None for a fresh start; whether it is complete).

    Raises UserError where something else made what is there.
    """
    shards, done = sorted(path.name for path in out_dir.glob("*.bin")), (out_dir / "meta.json").exists()
    path = out_dir / ("meta.json" if done else "progress.json")
    if not shards and not done:
        return None, False  # an earlier run made no shard, so nothing is lost
    if not path.exists():
        raise UserError(f"{out_dir} holds {shards[0]}, which this script did not make: choose another --out_dir")
    progress = load_progress(path, settings)
    for name, (tokens, _) in (progress["shards"]["train"] | progress["shards"]["val"]).items():
        if not is_whole(out_dir / name, tokens):
            if not done:
                raise UserError(f"{out_dir / name} is gone or cut; delete {out_dir} to start again")
            print(f"{out_dir} has a meta.json, but {name} is gone or cut: all shards are made again")
            return None, False
    return progress, done


def load_progress(path: Path, settings: dict) -> dict:
    """The content of a progress.json or meta.json. Raises UserError if it is none, or of other settings."""
    out_dir, done = path.parent, path.name == "meta.json"
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        made = {split: {**progress["shards"][split]} for split in ("train", "val")}  # a TypeError if it is no dict
        numbers = [progress[name] for name in COUNTS] + ([] if done else list(Cursor._make(progress["cursor"])))
        numbers += [
            number for names in made.values() for tokens, checksum in names.values() for number in (tokens, checksum)
        ]
        sums = [sum(tokens for tokens, _ in made[split].values()) - progress[f"{split}_tokens"] for split in made]
        if any(type(number) is not int or number < 0 for number in numbers) or any(sums):
            raise ValueError
        check_same(out_dir, dict(progress["settings"]), settings)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        advice = f"choose another --out_dir, or delete {out_dir}"
        raise UserError(f"{path} is damaged, or made by another or an older program: {advice}") from None
    return progress


def is_whole(path: Path, tokens: int) -> bool:
    try:
        return shard_tokens(path) == tokens
    except UserError:
        return False


def check_same(out_dir: Path, old: dict, new: dict, advice: str = "choose another --out_dir, or delete it") -> None:
    """Raises UserError where settings differ."""
    for name, value in new.items():
        if old.get(name) != value:
            what = f"{name}={old.get(name)}, not {value}"
            if name == "source":
                what = "other source files (name, size or modification time)"
            raise UserError(f"{out_dir} holds shards made with {what}: {advice}")


def fresh_progress(settings: dict) -> dict:
    return {"settings": settings, "shards": {"train": {}, "val": {}}, **dict.fromkeys(COUNTS, 0), "cursor": Cursor()}


def begin_writing(out_dir: Path, progress: dict) -> None:
    """Save the progress, then remove what a kill left and the shards that are made again."""
    remove_partial(out_dir)
    write_json(out_dir / "progress.json", progress)
    (out_dir / "meta.json").unlink(missing_ok=True)
    for split, made in progress["shards"].items():
        for path in find_shards(out_dir, split):
            if path.name not in made:
                path.unlink()


def write_meta(out_dir: Path, tokenizer: str, vocab_size: int, progress: dict) -> None:
    if tokenizer.startswith("{"):
        (out_dir / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        tokenizer = "tokenizer.json"  # in data_dir, which may be moved
    kept = [*COUNTS, "settings", "shards"]  # shards: {split: {name: [tokens, crc32]}}
    kept += ["part", "command"] if "part" in progress else []  # for join_parts
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size} | {name: progress[name] for name in kept}
    write_json(out_dir / "meta.json", meta)
    (out_dir / "progress.json").unlink()


def write_json(path: Path, data: dict) -> None:
    with whole_file(path, "w") as file:
        json.dump(data, file, indent=1)


def train_command(data_dir: Path) -> str:
    """What trains on it: the configs made for it, else a small model in a folder of its own."""
    line = re.compile(rf"^data_dir = {re.escape(json.dumps(str(data_dir)))}", re.MULTILINE)
    made = [f"config/{path.name}" for path in sorted(CONFIGS.glob("*.py")) if line.search(path.read_text())]
    own = shlex.join(["config/small.py", f"--data_dir={data_dir}", f"--out_dir=out/{data_dir.resolve().name}"])
    return f"python train_gpt2.py {'  # or '.join(made) or own}"


def spell_tokens(progress: dict) -> str:
    return f"{progress['train_tokens']:,} train and {progress['val_tokens']:,} val tokens"


# ---------------------------------------------------------------------------------------------------------------------
# Parts to one


def part_name(number: int, count: int) -> str:
    """The folder of a part, counted from 0: in the order of the names."""
    return f"{number + 1:0{len(str(count))}}of{count}"


def join_parts(out_dir: Path) -> None:
    """Move the shards of all parts to out_dir, write its meta.json and remove the parts' folders. Killed anywhere, it
    can be repeated. Raises UserError unless all parts are there, whole and of the same settings."""
    found = find_parts(out_dir)
    if not found and not (out_dir / "meta.json").exists():
        raise UserError(f"{out_dir}: no parts there; make them with --part=1/16 and so on")
    with contextlib.ExitStack() as locks:
        for folder in (out_dir, *found):
            locks.enter_context(own_folder(folder))
        if (out_dir / "meta.json").exists() and not any(out_dir.glob("*of*/*.bin")):
            meta = load_progress(out_dir / "meta.json", {})
        else:
            meta = move_parts(out_dir, found)
        for folder in found:
            remove_partial(folder)
            for name in ("meta.json", "progress.json", "tokenizer.json"):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something of the user's
                folder.rmdir()
    print(f"{out_dir}: {spell_tokens(meta)} in one\nnext: {train_command(out_dir)}")


def move_parts(out_dir: Path, found: list[Path]) -> dict:
    """The meta.json of all parts together, which is written last."""
    counts = sorted({folder.name.partition("of")[2] for folder in found})
    if len(counts) > 1:
        raise UserError(f"{out_dir} holds parts of {' and of '.join(counts)}: delete those of one preparation")
    metas = read_parts(out_dir, int(counts[0]))
    whole = {name: value for name, value in metas[0].items() if name not in ("part", "command")}
    whole |= {name: sum(meta[name] for meta in metas) for name in COUNTS}
    whole["shards"] = {
        split: {name: made for meta in metas for name, made in meta["shards"][split].items()}
        for split in ("train", "val")
    }
    names = whole["shards"]["train"] | whole["shards"]["val"]
    if foreign := [path for path in out_dir.glob("*.bin") if path.name not in names]:
        raise UserError(f"{foreign[0]} is of none of its parts; move it away")
    for split in ("train", "val"):
        if not whole[f"{split}_tokens"]:
            raise UserError(f"{out_dir}: no text is left for {split} in all its parts; make them of more text")
    for folder, meta in zip(found, metas, strict=True):
        for name in [*meta["shards"]["train"], *meta["shards"]["val"], "tokenizer.json"]:
            if (folder / name).exists():
                os.replace(folder / name, out_dir / name)
    write_json(out_dir / "meta.json", whole)
    return whole


def read_parts(out_dir: Path, count: int) -> list[dict]:
    """Their meta.json files. Raises UserError that names a part and the command that makes it unless all are there,
    whole and of the same settings. Shards may lie in out_dir already."""
    folders = [out_dir / part_name(number, count) for number in range(count)]
    metas = [folder / "meta.json" for folder in folders]
    paths = [path if path.exists() else path.with_name("progress.json") for path in metas]
    states = [load_progress(path, {}) if path.exists() else {} for path in paths]
    known = next((state for state in states if "command" in state), {"command": "python fineweb.py", "settings": {}})
    words = [word for word in known["command"].split(" ") if not word.startswith("--part=")]
    for number, (folder, path, state) in enumerate(zip(folders, paths, states, strict=True), 1):
        make = " ".join([*words, f"--part={number}/{count}"])
        if path not in metas:
            raise UserError(f"{folder} is {'not finished' if state else 'missing'}; make it: {make}")
        check_same(folder, state["settings"], known["settings"], f"delete it, and make it as the others: {make}")
        for name, (tokens, _) in (state["shards"]["train"] | state["shards"]["val"]).items():
            if not is_whole(folder / name, tokens) and not is_whole(out_dir / name, tokens):
                raise UserError(f"{folder / name} is gone or cut; make it again: {make}")
    return states
