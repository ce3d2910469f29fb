"""Text to token shards: FineWeb-Edu by default, any Hugging Face data set, any local files.

    python fineweb.py                                     # FineWeb-Edu, 10B tokens, to data/fineweb_edu10B
    python fineweb.py config/data/shakespeare.py
    python fineweb.py --files='notes/**/*.txt' --val_fraction=0.1 --out_dir=data/notes

Texts come from sources.py, are cut into pieces (make_pieces) and in batches of about a million characters sent to
worker processes (encode); their tokens come back in order and go into shards (ShardWriter). Each batch knows where in
the source it begins, so after any kind of death the same command goes on behind the last whole shard and ends with the
same bytes.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tiktoken

from configurator import PathStr, UserError, cli, configure
from files import lock_folder, remove_partial, whole_file
from shards import find_shards, shard_header, shard_tokens
from sources import Source, import_datasets, open_source, read_texts
from tokenizer import fast_encoder, get_tokenizer, token_bytes, tokenizer_content
from wikitext import detokenize

BATCH = 1_000_000  # characters sent to a worker at a time
COUNTS = [f"{split}_{what}" for split in ("train", "val") for what in ("tokens", "words", "bytes")]  # in meta.json
PIECE = 250_000  # characters encoded at a time, at most three times as many; tiktoken's regex fails on 1,000,000 spaces
WIKITEXT_PIECE = 16_000_000  # detokenized at a time: in published numbers a whole file is, and this holds val and test


@dataclass(frozen=True)
class DataConfig:
    dataset: PathStr | None = None  # Hugging Face data set or folder; without files and url, FineWeb-Edu
    subset: str | None = None  # the data set's configuration; sample-10BT for the default data set
    split: str = "train"  # or several: train+test
    text_column: str = "text"  # of a data set, .jsonl and .parquet
    files: PathStr | None = None  # or a glob of .jsonl, .jsonl.gz, .parquet, or text (a document a file)
    exclude: str | None = None  # globs, separated by commas, of paths to leave out of files
    url: str | None = None  # or a text file to download, one document
    tokenizer: PathStr = "gpt2"  # gpt2, bytes, another name of tiktoken's, or the path of a tokenizer.json
    out_dir: PathStr | None = None  # where the shards go; data/fineweb_edu10B for the default data set
    shard_tokens: int = 100_000_000  # tokens in a shard; the last of a split has what is left
    num_proc: int | None = None  # worker processes; None is all cores
    join: bool = False  # all rows are one document, a row a line (WikiText)
    detokenize: Literal["wikitext"] | None = None  # tokens are of the text without WikiText's spaces, words of it as is
    val_split: str | None = None  # validation: the data set's own split of this name,
    val_fraction: float | None = None  # or this fraction of the documents, at the end; of a single one its characters
    val_shards: int | None = None  # or this many shards, at the beginning; 1 if none of the three is given

    def __post_init__(self) -> None:
        sources = [name for name in ("dataset", "files", "url") if getattr(self, name)]
        rules = [name for name in ("val_split", "val_fraction", "val_shards") if getattr(self, name) is not None]
        for name, value in vars(self).items():
            if value == "":  # as --files=$UNSET: not what the defaults are meant for
                raise ValueError(f"{name} is empty")
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are both given, but text comes from one of them")
        if len(rules) > 1:
            raise ValueError(f"{' and '.join(rules)} are both given, but validation is chosen by one of them")
        if sources and not self.out_dir:
            raise ValueError(f"{sources[0]} needs a place for its shards: --out_dir=data/NAME")
        if self.exclude and not self.files:
            raise ValueError("exclude belongs to files")
        if self.val_split and (self.files or self.url):
            raise ValueError("val_split is a split of a data set; with files or url use val_fraction or val_shards")
        if (self.subset or self.split != "train") and (self.files or self.url):
            raise ValueError(f"{'subset' if self.subset else 'split'} belongs to a data set, not to files or url")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        for name, end in (("shard_tokens", 2**31), ("num_proc", 2**10), ("val_shards", 2**31)):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < end:
                raise ValueError(f"{name} must be at least 1 and below {end}, not {getattr(self, name)}")
        if not sources:
            object.__setattr__(self, "dataset", "HuggingFaceFW/fineweb-edu")
            object.__setattr__(self, "subset", self.subset or "sample-10BT")
            object.__setattr__(self, "out_dir", self.out_dir or "data/fineweb_edu10B")
        if not rules:
            object.__setattr__(self, "val_shards", 1)


# ---------------------------------------------------------------------------------------------------------------------
# Documents to pieces to batches


class Cursor(NamedTuple):
    """Where a piece begins: enough to go on from there."""

    part: int = 0  # of the source
    file: int = 0  # in the part
    place: int = 0  # of the text in the file
    offset: int = 0  # characters into the text
    document: int = 0  # number in the part
    char: int = 0  # characters into the document


class Piece(NamedTuple):
    text: str
    new: bool  # starts a document
    last: bool  # ends one


class Batch(NamedTuple):
    cursor: Cursor  # of its first piece
    split: str
    pieces: list[Piece]


Cut = tuple[float, int]  # (document, character): where in a part validation begins
NEVER = (math.inf, 0)


def find_cut(source: Source, join: bool, val_fraction: float) -> Cut:
    """Validation is the last of the documents; of a single one, its last characters."""
    rest = 1 - Fraction(str(val_fraction))  # exact: the float 1 - 0.1 is a little off
    documents = source.documents
    if documents is None or documents == 1:
        documents = characters = 0
        for _, text, begins in read_texts(source.parts[0][1], join):
            documents += begins or documents == 0
            characters += len(text)
        if documents == 1:
            return 0, int(characters * rest)
    return int(documents * rest), 0


# Between these two characters every pre-tokenizer splits, so that the tokens of a document cut there are those of the
# whole: a letter or digit and white space, a letter and a mark that no pattern takes together with letters.
SAFE = re.compile(r"[^\W_](?=[ \t\r\n])|[A-Za-zぁ-ゖァ-ヺ一-鿿](?=[,.;:!?、。，．；：！？])")


def safe_place(text: str) -> int:
    """The last place in a text where it may be cut, 0 if there is none."""
    for start in (max(0, len(text) - 1_000), 0):  # nearly always it is near the end
        places = [match.end() for match in SAFE.finditer(text, start)]
        if places:
            return places[-1]
    return 0


def make_slices(texts: Iterator[tuple], begin: Cursor, cut: Cut) -> Iterator[tuple[Cursor, str]]:
    """Texts in slices of at most PIECE characters. Where they end depends on nothing before the cursor."""
    (offset, document, char), is_first = begin[3:], True
    for (file, place), text, begins in texts:
        if begins and not is_first:
            document, char = document + 1, 0
        is_first = False
        while True:
            end = min(len(text), offset - offset % PIECE + PIECE)
            if document == cut[0] and char < cut[1]:
                end = min(end, offset + cut[1] - char)
            yield Cursor(begin.part, file, place, offset, document, char), text[offset:end]
            offset, char = end, char + end - offset
            if offset == len(text):
                break
        offset = 0


def make_pieces(slices: Iterator[tuple[Cursor, str]], cut: Cut, least: int) -> Iterator[tuple[Cursor, Piece]]:
    """Slices joined to pieces that end with the document, or at a safe place behind about `least` characters.

    The safe place is always in the newest slice, so that the cursor of what follows is known.
    """
    held, size, begin, new = [], 0, Cursor(), True
    for cursor, text in slices:
        starts = cursor.char == 0 or (cursor.document, cursor.char) == cut
        if starts and held:
            yield begin, Piece("".join(held), new, True)
            held = []
        if not held:
            begin, new, size = cursor, starts, 0
        held.append(text)
        size += len(text)
        if size < least:
            continue
        place = safe_place(text) or (len(text) if size >= 2 * least else 0)  # at worst one token differs there
        if place:
            rest = text[place:]
            yield begin, Piece("".join(held)[: size - len(rest)], new, False)
            held, size, new = [rest] if rest else [], len(rest), False
            begin = cursor._replace(offset=cursor.offset + place, char=cursor.char + place)
    if held:
        yield begin, Piece("".join(held), new, True)


def make_batches(source: Source, join: bool, begin: Cursor, cut: Cut, least: int) -> Iterator[Batch]:
    """The whole source from a cursor on, in batches of about BATCH characters, each of one split."""
    batch, size = None, 0
    for part, (split, readers) in list(enumerate(source.parts))[begin.part :]:
        here = begin if part == begin.part else Cursor(part)
        slices = make_slices(read_texts(readers, join, here.file, here.place), here, cut)
        for cursor, piece in make_pieces(slices, cut, least):
            name = "val" if (cursor.document, cursor.char) >= cut else split
            if batch and (size >= BATCH or batch.split != name):
                yield batch
                batch = None
            if batch is None:
                batch, size = Batch(cursor, name, []), 0
            batch.pieces.append(piece)
            size += len(piece.text)
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Batches to tokens, in worker processes, which alone load the tokenizer


class Encoded(NamedTuple):
    tokens: np.ndarray  # uint16, of all pieces
    starts: np.ndarray  # where in them each piece begins
    words: np.ndarray  # of each piece
    bytes: int  # of all pieces, in UTF-8


def start_workers(num_proc: int, tokenizer: str, is_wikitext: bool, lock: int | None) -> ProcessPoolExecutor:
    """Worker processes, started first of all because a fork wants no threads, and datasets has some."""
    forked = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if forked else "spawn")
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business; workers inherit it
    pool = ProcessPoolExecutor(num_proc, context, start_worker, (tokenizer, is_wikitext, lock if forked else None))
    pool.submit(int)  # without work there are no processes
    signal.signal(signal.SIGINT, handler)
    return pool


def start_worker(tokenizer: str, is_wikitext: bool, lock: int | None) -> None:
    global _tokenizer, _is_wikitext
    if lock is not None:
        os.close(lock)  # the main process's alone, or the folder would stay locked for a moment after its death
    _tokenizer, _is_wikitext = tokenizer, is_wikitext
    load_tokenizer.cache_clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # again, for what was spawned
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # a killed parent says nothing


@functools.cache
def load_tokenizer() -> tuple[tiktoken.Encoding, Callable[[str], np.ndarray], np.ndarray]:
    enc = get_tokenizer(_tokenizer)
    return enc, fast_encoder(enc), np.array([enc.eot_token], dtype=np.uint32)


def describe_tokenizer() -> tuple[str, int, np.ndarray]:
    """What the main process must know: name, size, and the length in bytes of every id."""
    enc, *_ = load_tokenizer()
    if enc.n_vocab > 2**16:
        raise UserError(f"the tokenizer has {enc.n_vocab:,} ids, but shards of uint16 hold 65,536")
    return enc.name, enc.n_vocab, token_bytes(enc)


def encode(pieces: list[Piece]) -> Encoded:
    """Tokens of a batch; every document begins with <|endoftext|>, and <|endoftext|> in a text is ordinary text.

    The words of a document are len(text.strip().split(" ")), spread over its pieces; bytes are those of the tokens.
    """
    _, encode_text, end_of_text = load_tokenizer()
    parts, starts, words, count, size = [], [], [], 0, 0
    for text, new, last in pieces:
        starts.append(count)
        if _is_wikitext:
            text = re.sub(r"\n(?=\n)", "\n ", text)  # its empty lines are a space, which Hugging Face's rows have lost
        stripped = text.lstrip() if new else text
        words.append((stripped.rstrip() if last else stripped).count(" ") + new)
        if _is_wikitext:
            text = detokenize(text)
        try:
            size += len(text.encode())
        except UnicodeEncodeError:  # half a surrogate pair, as JSON can spell it
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            size += len(text.encode())
        ids = encode_text(text)
        parts += [end_of_text, ids] if new else [ids]
        count += new + len(ids)
    tokens = np.concatenate(parts, dtype=np.uint16, casting="unsafe")  # no id is above 65,535
    return Encoded(tokens, np.array(starts), np.array(words), size)


def encode_all(pool: ProcessPoolExecutor, batches: Iterator[Batch], waiting: int) -> Iterator[tuple[Batch, Encoded]]:
    """All batches with their tokens, in order; at most `waiting` are in memory."""
    queue: deque = deque()
    for batch in batches:
        queue.append((batch, pool.submit(encode, batch.pieces)))
        if len(queue) == waiting:
            batch, future = queue.popleft()
            yield batch, future.result()
    for batch, future in queue:
        yield batch, future.result()


# ---------------------------------------------------------------------------------------------------------------------
# Tokens to shards


def write_json(path: Path, data: dict) -> None:
    with whole_file(path, "w") as file:
        json.dump(data, file, indent=1)


class ShardWriter:
    """Writes tokens into shards. A shard appears whole or not at all, and after each the progress is saved."""

    def __init__(self, out_dir: Path, config: DataConfig, progress: dict, lengths: np.ndarray) -> None:
        self.out_dir, self.config, self.progress, self.lengths = out_dir, config, progress, lengths
        self.file, self.split, self.count, self.checksum = None, "", 0, 0

    def write(self, batch: Batch, encoded: Encoded, done: int) -> None:
        """Write a batch from its token `done` on."""
        tokens, starts, words, size = encoded
        shards, counts, val_shards = self.progress["shards"], self.progress["counts"], self.config.val_shards
        if self.file and not val_shards and self.split != batch.split:
            self.finish(batch.cursor, 0)
        while done < len(tokens):
            if not self.file:
                in_val = val_shards and len(shards["train"]) + len(shards["val"]) < val_shards
                self.start("val" if in_val else batch.split)
            end = min(len(tokens), done + self.config.shard_tokens - self.count)
            self.file.write(tokens[done:end])
            self.checksum = zlib.crc32(tokens[done:end], self.checksum)
            counts[f"{self.split}_tokens"] += end - done
            counts[f"{self.split}_words"] += int(words[(starts >= done) & (starts < end)].sum())
            whole = end - done == len(tokens)
            counts[f"{self.split}_bytes"] += size if whole else int(self.lengths[tokens[done:end]].sum())
            self.count += end - done
            done = end
            if self.count == self.config.shard_tokens:
                self.finish(batch.cursor, done)

    def start(self, split: str) -> None:
        number = len(self.progress["shards"][split])
        if split == "train":
            number += self.config.val_shards or 1
        self.path = self.out_dir / f"{self.out_dir.resolve().name}_{split}_{number:06d}.bin"
        self.split, self.count, self.checksum = split, 0, 0
        self.file = open(f"{self.path}.tmp", "wb")  # noqa: SIM115, finish closes it
        self.file.write(shard_header(0))

    def finish(self, cursor: Cursor, skip: int) -> None:
        """End the shard; what comes next is token `skip` of the batch at `cursor`."""
        self.file.seek(0)
        self.file.write(shard_header(self.count))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(f"{self.path}.tmp", self.path)
        self.file = None
        self.progress["shards"][self.split][self.path.name] = [self.count, self.checksum]
        write_json(self.out_dir / "progress.json", self.progress | {"cursor": cursor, "skip": skip})


# ---------------------------------------------------------------------------------------------------------------------
# The whole


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[int | None]:
    """A folder that only this process writes, made where there is none -> the handle of its lock.

    A new one in which nothing was written is removed again. Raises UserError where another process writes it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = lock_folder(folder)
    try:
        yield handle
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        if handle is not None:
            os.close(handle)


def read_progress(out_dir: Path, settings: dict) -> tuple[dict | None, bool]:
    """(what an earlier run with the same settings left, None for a fresh start; whether it is complete).

    Raises UserError where something else made what is there.
    """
    shards = sorted(path.name for path in out_dir.glob("*.bin"))
    path = next((path for path in (out_dir / "meta.json", out_dir / "progress.json") if path.exists()), None)
    done = path is not None and path.name == "meta.json"
    if path is None and shards:
        raise UserError(f"{out_dir} holds {shards[0]}, which this script did not make: choose another --out_dir")
    if not shards and not done:
        return None, False  # an earlier run made no shard, so nothing is lost
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        counts = progress if done else progress["counts"]
        numbers = [counts[name] for name in COUNTS]
        if not done:
            made = {split: dict(progress["shards"][split]) for split in ("train", "val")}
            numbers += [n for names in made.values() for tokens, checksum in names.values() for n in (tokens, checksum)]
            if any(made.values()):  # else it is that of a fresh start
                numbers += [*Cursor._make(progress["cursor"]), progress["skip"]]  # all six
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError
        check_same(out_dir, dict(progress["settings"]), settings)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        advice = f"choose another --out_dir, or delete {out_dir}"
        raise UserError(f"{path} is damaged, or made by another or an older program: {advice}") from None
    if done and not is_whole(out_dir, counts):
        print(f"{out_dir} has a meta.json, but shards are gone or cut: all are made again")
        return None, False
    if not done:
        check_made(out_dir, made, counts)
    return progress, done


def is_whole(out_dir: Path, counts: dict) -> bool:
    """Whether the shards there hold as many tokens of each split as `counts` says."""
    try:
        return all(
            sum(map(shard_tokens, find_shards(out_dir, split))) == counts[f"{split}_tokens"]
            for split in ("train", "val")
        )
    except UserError:  # one is cut
        return False


def check_made(out_dir: Path, made: dict[str, dict], counts: dict) -> None:
    """Raises UserError where the shards that an earlier run made, {split: {name: [tokens, crc32]}}, are not there."""
    for split, names in made.items():
        for name, (tokens, _) in names.items():
            path = out_dir / name
            if not path.exists() or shard_tokens(path) != tokens:
                what = "is not as it was made" if path.exists() else "is gone"
                raise UserError(f"{path} {what}; delete {out_dir} to start again")
        if sum(tokens for tokens, _ in names.values()) != counts[f"{split}_tokens"]:
            raise UserError(f"{out_dir / 'progress.json'} is damaged; delete {out_dir} to start again")


def check_same(out_dir: Path, old: dict, new: dict) -> None:
    for name, value in new.items():
        if old.get(name) != value:
            what = (
                "other source files (name, size or modification time)"
                if name == "source"
                else f"{name}={old.get(name)}, not {value}"
            )
            raise UserError(f"{out_dir} holds shards made with {what}: choose another --out_dir, or delete this one")


def prepare(config: DataConfig) -> None:
    """Make the shards and meta.json in config.out_dir, or what of them is still to be made. Raises UserError."""
    out_dir = Path(config.out_dir)
    tokenizer = tokenizer_content(config.tokenizer)
    settings = {name: value for name, value in asdict(config).items() if name not in ("out_dir", "num_proc")}
    if tokenizer.startswith("{"):  # the path may change, the content may not
        settings["tokenizer"] = f"json {hashlib.sha256(tokenizer.encode()).hexdigest()[:16]}"
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(own_folder(out_dir))
        progress, done = read_progress(out_dir, settings)
        if done:
            print(
                f"{out_dir} is complete: {progress['train_tokens']:,} train and {progress['val_tokens']:,} val tokens"
            )
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_proc = config.num_proc or cores
        pool = start_workers(num_proc, tokenizer, config.detokenize == "wikitext", lock)
        stack.callback(pool.shutdown, cancel_futures=True)
        # Nothing is written until the tokenizer is known and the source's first texts are read.
        description = pool.submit(describe_tokenizer)
        if config.dataset:
            import_datasets()  # half a second, in which a worker loads the tokenizer
        start = time.perf_counter()
        name, vocab_size, lengths = description.result()
        source = open_source(config, out_dir)
        settings["source"] = source.fingerprint
        if progress:
            check_same(out_dir, progress["settings"], settings)
        else:
            progress = {"settings": settings, "shards": {"train": {}, "val": {}}, "counts": dict.fromkeys(COUNTS, 0)}
        progress["command"] = shlex.join(["python", "fineweb.py", *sys.argv[1:]])  # for who finds it unfinished
        cut = find_cut(source, config.join, config.val_fraction) if config.val_fraction else NEVER
        least = WIKITEXT_PIECE if config.detokenize else PIECE
        batches = make_batches(source, config.join, Cursor(*progress.get("cursor", ())), cut, least)
        stack.enter_context(contextlib.closing(batches))  # now: at the interpreter's exit its readers would complain
        first = next(batches, None)
        if first is None and "cursor" not in progress:
            raise UserError(f"{config.dataset or config.files or config.url}: no documents there")

        begin_writing(out_dir, progress)
        encoded = encode_all(pool, chain([first] if first else [], batches), 8 * num_proc)
        write_all(encoded, ShardWriter(out_dir, config, progress, lengths), source, start)
        write_meta(out_dir, tokenizer, vocab_size, progress)
    counts = progress["counts"]
    print(f"{out_dir}: {sum(map(len, progress['shards'].values()))} shards, ", end="")
    print(f"{counts['train_tokens']:,} train and {counts['val_tokens']:,} val tokens of {name}")
    print(f"next: python train_gpt2.py --data_dir={out_dir}")


def begin_writing(out_dir: Path, progress: dict) -> None:
    """Save the progress, then remove what a kill left and the shards that are made again."""
    remove_partial(out_dir)
    write_json(out_dir / "progress.json", progress)
    (out_dir / "meta.json").unlink(missing_ok=True)
    stale = [p for split, made in progress["shards"].items() for p in find_shards(out_dir, split) if p.name not in made]
    for path in (*out_dir.glob("*.tmp"), *stale):
        path.unlink()


def write_all(results: Iterator[tuple[Batch, Encoded]], writer: ShardWriter, source: Source, start: float) -> None:
    """All batches into shards, with a progress bar, timed from `start` on. Raises UserError if a split stays empty."""
    from tqdm import tqdm

    counts, skip = writer.progress["counts"], writer.progress.get("skip", 0)
    interval = 0.5 if sys.stderr.isatty() else 30  # a log file wants few lines

    def total(what: str) -> int:
        return counts[f"train_{what}"] + counts[f"val_{what}"]

    bytes_before = total("bytes")
    with tqdm(unit="tok", unit_scale=True, initial=total("tokens"), mininterval=interval, delay=1) as bar:
        for batch, encoded in results:
            writer.write(batch, encoded, skip)
            skip = 0
            tokens = total("tokens")
            if source.size and total("bytes"):
                bar.total = tokens * source.size // total("bytes")
            elif source.documents and source.documents > 1 and batch.cursor.part == 0:
                bar.total = tokens * source.documents // (batch.cursor.document + len(batch.pieces))
            bar.update(tokens - bar.n)
    for split, other in (("train", "val"), ("val", "train")):
        if not counts[f"{split}_tokens"]:
            advice = "; use --val_fraction=0.1, or smaller --shard_tokens" if writer.config.val_shards else ""
            raise UserError(f"no text is left for {split}: all {total('tokens'):,} tokens are {other}{advice}")
    if writer.file:
        writer.finish(batch.cursor, len(encoded[0]))
    megabytes, seconds = (total("bytes") - bytes_before) / 1e6, time.perf_counter() - start
    print(f"{megabytes:,.1f} MB of text in {seconds:,.1f} s, {megabytes / seconds:,.1f} MB/s")


def write_meta(out_dir: Path, tokenizer: str, vocab_size: int, progress: dict) -> None:
    if tokenizer.startswith("{"):
        (out_dir / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        tokenizer = "tokenizer.json"  # in data_dir, which may be moved
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size, **progress["counts"]}
    meta |= {name: progress[name] for name in ("settings", "shards")}  # {split: {shard's name: [tokens, crc32]}}
    write_json(out_dir / "meta.json", meta)
    (out_dir / "progress.json").unlink()


def main() -> int | None:
    config, _ = configure(DataConfig)
    try:
        prepare(config)
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        raise UserError("a worker process died (was memory short?); run the same command to go on") from None
    except OSError as error:  # disk full, no permission, a file that went away
        raise UserError(f"{error}; when that is mended, run the same command to go on") from None


if __name__ == "__main__":
    cli(main)
