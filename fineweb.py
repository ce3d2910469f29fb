"""Text to token shards: FineWeb-Edu by default, any Hugging Face data set, any local files.

    python fineweb.py                                     # FineWeb-Edu, 10B tokens, to data/fineweb_edu10B
    python fineweb.py config/data/shakespeare.py
    python fineweb.py --files='notes/**/*.txt' --out_dir=data/notes     # a tenth of it for validation
    python fineweb.py --shards=kjj0/fineweb10B-gpt2 --out_dir=data/fineweb10B          # tokens that others have made

parts (a file each, sources.py) -> pieces of documents -> batches, encoded on all cores (tokenizer.py) -> shards.
A shard is a number of whole batches, and a batch ends behind a known piece of a known part. So after any kind of death
the same command goes on behind the last whole shard: it opens that part, reads up to that piece without encoding, and
ends with the same bytes.

Several machines make one preparation by parts of it, at the same time and in any order, on file systems shared or not:

    python fineweb.py config/data/fineweb_edu.py --part=3/16           # the third of 16, to out_dir/03of16
    python fineweb.py config/data/fineweb_edu.py --join_parts=True     # once all 16 folders lie in out_dir

A part is some source files in a row or, with fewer files than parts, some documents in a row of one file, which every
part then reads and only its own encodes. So the joined data is one preparation's, document for document, and the same
documents are validation: val_shards are made by part 1, which must have more text than they hold; val_split's files
come behind all others; and val_fraction needs the documents' numbers, for which each part reads the files before
its own once, unless they are Parquet or text without a separator given by --files.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import contextlib
import hashlib
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tiktoken import Encoding

from configurator import PathStr, UserError, cli, configure
from foreign import TokenFile, find_token_files, open_tokens
from preparation import (
    Cursor,
    begin_writing,
    check_same,
    fresh_progress,
    join_parts,
    own_folder,
    part_name,
    read_progress,
    spell_tokens,
    train_command,
    write_json,
    write_meta,
)  # fmt: skip
from shards import join_command, new_shard
from sources import Reader, Source, open_source, take_share
from tokenizer import BatchEncoder, get_tokenizer, token_bytes, tokenizer_content
from wikitext import add_spaces, detokenize

PIECE = 250_000  # characters of a long document encoded at a time; tiktoken's regex fails on 1,000,000 spaces
WIKITEXT_PIECE = 16_000_000  # detokenized at a time: in published numbers a whole file is, and this holds val and test
BATCH = 4_000_000  # bytes encoded at a time


@dataclass(frozen=True)
class DataConfig:
    dataset: PathStr | None = None  # Hugging Face data set or folder; without files and url, FineWeb-Edu
    subset: str | None = None  # the data set's configuration; sample-10BT for the default data set
    split: str = "train"  # or several: train+test
    text_column: str = "text"  # of a data set, .jsonl and .parquet
    files: PathStr | None = None  # or a glob of .jsonl, .jsonl.gz, .parquet, or text (a document a file)
    shards: PathStr | None = None  # or token files made elsewhere: a Hugging Face data set or folder of them
    exclude: str | None = None  # globs, separated by commas, of paths to leave out of files or shards
    separator: str | None = None  # what stands between documents in a text file; None: a file is one document
    url: str | None = None  # or a text file to download, one document
    tokenizer: PathStr = "gpt2"  # gpt2, bytes, another name of tiktoken's, or the path of a tokenizer.json
    document_token: str | None = None  # what a tokenizer.json made elsewhere calls <|endoftext|>: </s>, ...
    out_dir: PathStr | None = None  # where the shards go; data/fineweb_edu10B for the default data set
    shard_tokens: int = 100_000_000  # tokens in a shard, and at most a batch more; the last of a split has what is left
    num_proc: int | None = None  # threads; None is all cores
    part: str | None = None  # 3/16: make only the third of 16 parts, as an array job's tasks do
    join_parts: bool = False  # make one preparation of the parts in out_dir, once all of them are there
    join: bool = False  # all rows are one document, a row a line (WikiText)
    detokenize: Literal["wikitext"] | None = None  # tokens are of the text without WikiText's spaces, words of it as is
    val_split: str | None = None  # validation: the data set's own split of this name,
    val_fraction: float | None = None  # or this fraction of the documents, at the end; of a single one its characters
    val_seed: int | None = None  # with it, val_fraction takes documents by chance, whole ones, instead of the last
    val_shards: int | None = None  # or this many shards, at the beginning; none of the three: 1, of files or url 0.1

    def __post_init__(self) -> None:
        sources = [name for name in ("dataset", "files", "url", "shards") if getattr(self, name)]
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
        if self.exclude and not (self.files or self.shards):
            raise ValueError("exclude belongs to files or shards")
        of_text = [*rules, *(name for name in ("separator", "part", "join", "detokenize") if getattr(self, name))]
        if self.shards and of_text:
            raise ValueError(f"{of_text[0]} is of text, but shards are tokens already, and train or val by their names")
        if self.separator and self.dataset:
            raise ValueError("separator belongs to text files, not to a data set")
        if self.val_split and (self.files or self.url):
            raise ValueError("val_split is a split of a data set; with files or url use val_fraction or val_shards")
        if (self.subset or self.split != "train") and sources and not self.dataset:
            raise ValueError(f"{'subset' if self.subset else 'split'} belongs to a data set, not to {sources[0]}")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        if self.val_seed is not None and (self.join or not self.val_fraction):
            why = "join makes one document of all" if self.join else "it needs val_fraction"
            raise ValueError(f"val_seed chooses among documents, but {why}")
        for name, end in (("shard_tokens", 2**30), ("num_proc", 2**10), ("val_shards", 2**31)):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < end:
                raise ValueError(f"{name} must be at least 1 and below {end}, not {getattr(self, name)}")
        if self.part is not None and not (self.share and 0 <= self.share[0] < self.share[1]):
            raise ValueError(f"part is {self.part}, but it must be like 3/16, the third of 16 parts")
        if self.part and (self.join or self.join_parts or self.url):
            other = "join" if self.join else "join_parts" if self.join_parts else "url"
            raise ValueError(f"part and {other} are both given: parts are some documents each, and joined later")
        if not sources:
            object.__setattr__(self, "dataset", "HuggingFaceFW/fineweb-edu")
            object.__setattr__(self, "subset", self.subset or "sample-10BT")
            object.__setattr__(self, "out_dir", self.out_dir or "data/fineweb_edu10B")
        if not rules and (self.files or self.url):  # often less than a shard
            object.__setattr__(self, "val_fraction", 0.1)
        elif not rules and not self.shards:
            object.__setattr__(self, "val_shards", 1)

    @property
    def share(self) -> tuple[int, int] | None:
        """`part` counted from 0, and how many there are."""
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", self.part or "")
        return (int(match[1]) - 1, int(match[2])) if match else None


# ---------------------------------------------------------------------------------------------------------------------
# Parts to pieces to batches


class Piece(NamedTuple):
    text: bytes  # UTF-8
    first: bool  # of its document
    words: int


class Batch(NamedTuple):
    pieces: dict[str, list[Piece]]  # by split: one or, where documents are chosen, both
    end: Cursor  # behind its last piece
    is_last: bool  # of its splits


class Tokens(NamedTuple):
    ids: np.ndarray  # uint16
    words: int  # of their text
    bytes: int


Results = Iterator[tuple[Batch, dict[str, Tokens]]]  # by split
Cut = tuple[float, int]  # (document, character): where in the source validation begins
NEVER = (math.inf, 0)
Choice = Callable[[int], bool]  # of documents by their numbers


def find_cut(source: Source, val_fraction: float | None) -> Cut:
    """Validation is the last of the documents; of a single one, its last characters."""
    if not val_fraction:
        return NEVER
    rest = 1 - Fraction(str(val_fraction))  # exact: the float 1 - 0.1 is a little off
    documents = source.documents
    if documents is None or documents == 1:
        documents = characters = 0
        for part in source.parts:
            for text, begins in part.read():
                documents += begins
                characters += len(text)
        if documents == 1:
            return 0, int(characters * rest)
    return int(documents * rest), 0


def choose(seed: int, fraction: float, begin: int, number: int) -> bool:
    """Whether the document `number` behind `begin` is validation: by its hash, without memory of the others."""
    digest = hashlib.blake2b(f"{seed} {begin + number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def split_texts(
    split: str, read: Reader, document: int, cut: Cut, chosen: Choice | None = None
) -> Iterator[tuple[str, str, bool]]:
    """(split, text, whether it begins a document) of a part whose first document is number `document`."""
    document, character = document - 1, 0
    for text, begins in read():
        if begins:
            document, character = document + 1, 0
            if chosen:
                split = "val" if chosen(document) else "train"
        before = cut[1] - character if document == cut[0] else 0
        if 0 < before < len(text):
            yield split, text[:before], begins
            yield "val", text[before:], True
        else:
            at = (document, character)
            yield "val" if at >= cut else split, text, begins or at == cut
        character += len(text)


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


def cut_pieces(texts: Iterator[tuple[str, str, bool]], is_wikitext: bool) -> Iterator[tuple[str, Piece]]:
    """Pieces with their split: a document, or of a long one about `PIECE` characters, at most three times as many."""
    least = WIKITEXT_PIECE if is_wikitext else PIECE
    held, first, split = "", True, None
    for new_split, text, begins in texts:
        if begins and split:
            yield split, make_piece(held, first, True, is_wikitext)
            held, first = "", True
        split = new_split
        for start in range(0, len(text), least):
            held += text[start : start + least]
            if len(held) < least:
                continue
            place = safe_place(held) or (len(held) if len(held) >= 2 * least else 0)  # at worst one token differs there
            if place:
                yield split, make_piece(held[:place], first, False, is_wikitext)
                held, first = held[place:], False
    if split:
        yield split, make_piece(held, first, True, is_wikitext)


def make_piece(text: str, first: bool, last: bool, is_wikitext: bool) -> Piece:
    """A document's words are len(text.strip().split(" ")), spread over its pieces."""
    if is_wikitext:
        text = add_spaces(text)
    data = to_utf8(text)
    rest = text.lstrip() if first else text
    kept = rest.rstrip() if last else rest
    outside = text[: len(text) - len(rest)] + rest[len(kept) :]
    words = first + int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord(" "))) - outside.count(" ")
    return Piece(to_utf8(detokenize(text)) if is_wikitext else data, first, words)


def to_utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as JSON can spell it
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def make_batches(
    source: Source, begin: Cursor, cut: Cut, size: int, is_wikitext: bool, chosen: Choice | None = None
) -> Iterator[Batch]:
    """Batches of about `size` bytes of all that lies behind a cursor; of one split each, unless documents are chosen
    for validation."""
    pieces, room, end = {}, size, begin
    documents, done = begin.documents, begin.piece
    for number, part in list(enumerate(source.parts))[begin.part :]:
        before = documents
        found = cut_pieces(split_texts(part.split, part.read, before, cut, chosen), is_wikitext)
        for count, (split, piece) in enumerate(found, 1):
            documents += piece.first
            if count <= done:
                continue  # it is in a shard of a killed preparation
            turns = split not in pieces and not chosen
            if pieces and (room <= 0 or turns):
                yield Batch(pieces, end, turns)
                pieces, room = {}, size
            pieces.setdefault(split, []).append(piece)
            room -= len(piece.text)
            end = Cursor(number, count, before)
        done = 0
    if pieces:
        yield Batch(pieces, end, True)


# ---------------------------------------------------------------------------------------------------------------------
# Batches to tokens


def encode(pieces: list[Piece], encoder: BatchEncoder) -> Tokens:
    """Every document begins with <|endoftext|>; the same characters in a text are ordinary text."""
    ids, counts = encoder([piece.text for piece in pieces])
    starts = (np.cumsum(counts) - counts)[[piece.first for piece in pieces]]
    ids = np.insert(ids, starts, encoder.enc.eot_token)
    return Tokens(ids, sum(piece.words for piece in pieces), sum(len(piece.text) for piece in pieces))


def encode_all(batches: Iterator[Batch], encoder: BatchEncoder, thread: ThreadPoolExecutor) -> Results:
    """All batches with their tokens, in order; while one is encoded, the next are read."""

    def encode_batch(batch: Batch) -> dict[str, Tokens]:
        return {split: encode(pieces, encoder) for split, pieces in batch.pieces.items()}

    waiting: deque = deque()
    for batch in batches:
        waiting.append((batch, thread.submit(encode_batch, batch)))
        if len(waiting) == 3:
            batch, future = waiting.popleft()
            yield batch, future.result()
    for batch, future in waiting:
        yield batch, future.result()


# ---------------------------------------------------------------------------------------------------------------------
# Tokens to shards


def write_shards(results: Results, out_dir: Path, config: DataConfig, progress: dict) -> None:
    """Whole batches into whole shards, those of both splits at once where batches hold both; after each,
    progress.json says how far the source has been read."""
    shards, val_shards, prefix = progress["shards"], config.val_shards or 0, out_dir.resolve().name
    if config.part:
        prefix = f"{out_dir.resolve().parent.name}_{prefix}"
        val_shards = val_shards if config.share[0] == 0 else 0
    for batch, tokens in results:
        all_val, new = len(shards["train"]) + len(shards["val"]) < val_shards, {}  # new: {split: NewShard}
        with contextlib.ExitStack() as stack:
            while True:
                for split, (ids, words, size) in tokens.items():
                    split = "val" if all_val else split
                    if split not in new:
                        number = len(shards[split]) + (val_shards or 1 if split == "train" else 0)
                        path = out_dir / f"{prefix}_{split}_{number:06d}.bin"
                        new[split] = stack.enter_context(new_shard(path))
                    new[split].write(ids)
                    progress[f"{split}_tokens"] += len(ids)
                    progress[f"{split}_words"] += words
                    progress[f"{split}_bytes"] += size
                if batch.is_last or max(shard.tokens for shard in new.values()) >= config.shard_tokens:
                    break
                batch, tokens = next(results)
        for split, shard in new.items():
            shards[split][shard.name] = [shard.tokens, shard.checksum]
        progress["cursor"] = batch.end
        write_json(out_dir / "progress.json", progress)


def show_progress(results: Results, source: Source, progress: dict) -> Results:
    """The same, with a progress bar, and at the end a line that says how fast it was."""
    from tqdm import tqdm

    start, size = time.perf_counter(), 0
    size_before = progress["train_bytes"] + progress["val_bytes"]
    tokens_before = progress["train_tokens"] + progress["val_tokens"]
    interval = 0.5 if sys.stderr.isatty() else 30  # a log file wants few lines
    with tqdm(unit="tok", unit_scale=True, initial=tokens_before, mininterval=interval, delay=1) as bar:
        for batch, tokens in results:
            size += sum(found.bytes for found in tokens.values())
            count = sum(len(found.ids) for found in tokens.values())
            if source.size:
                bar.total = (bar.n + count) * source.size // max(1, size_before + size)
            elif source.documents:  # a long one has several pieces
                documents = batch.end.documents + batch.end.piece
                bar.total = (bar.n + count) * max(source.documents, documents) // documents
            bar.update(count)
            yield batch, tokens
    seconds = time.perf_counter() - start
    print(f"{size / 1e6:,.1f} MB of text in {seconds:,.1f} s, {size / 1e6 / seconds:,.1f} MB/s")


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def prepare(config: DataConfig) -> None:
    """Make the shards and meta.json in config.out_dir, or what of them is still to be made. Raises UserError."""
    out_dir = Path(config.out_dir)
    tokenizer = tokenizer_content(config.tokenizer, config.document_token)
    left_out = ("out_dir", "num_proc", "part", "join_parts")  # they change no document
    settings = {name: value for name, value in asdict(config).items() if name not in left_out}
    if tokenizer.startswith("{"):  # the path may change, the content may not
        settings["tokenizer"] = f"json {hashlib.sha256(tokenizer.encode()).hexdigest()[:16]}"
    if config.part and (out_dir / "meta.json").exists():  # it is joined already
        progress, done = read_progress(out_dir, settings)
        if not done:
            raise UserError(f"{out_dir}: its parts are joined, but not whole any more; delete it to make them again")
    else:
        folder = out_dir / part_name(*config.share) if config.part else out_dir
        with own_folder(folder):
            progress, done = read_progress(folder, settings)
            if not done:
                make = convert_shards if config.shards else make_shards
                progress = make(config, folder, tokenizer, settings, progress)
        if config.part:
            print(f"{folder}{' is complete' * done}: {spell_tokens(progress)}")
            print(f"next, once all {config.share[1]} parts are there: {join_command(out_dir)}")
            return
    print(f"{out_dir}{' is complete' * done}: {spell_tokens(progress)}")
    print(f"next: {train_command(out_dir)}")


def make_shards(config: DataConfig, out_dir: Path, tokenizer: str, settings: dict, progress: dict | None) -> dict:
    """The progress at the end. Before it writes, it knows the tokenizer and has read the source's first texts."""
    enc = get_tokenizer(tokenizer)
    if enc.n_vocab > 2**16:
        raise UserError(f"the tokenizer has {enc.n_vocab:,} ids, but shards of uint16 hold 65,536")
    source = open_source(config, out_dir)
    settings["source"] = source.fingerprint
    is_fresh = progress is None
    progress = progress or fresh_progress(settings)
    check_same(out_dir, progress["settings"], settings)
    progress["command"] = shlex.join(["python", "fineweb.py", *sys.argv[1:]])  # for who finds it unfinished
    by_chance, size = config.val_seed is not None, min(BATCH, config.shard_tokens)  # small shards, small batches
    cut, begin = NEVER if by_chance else find_cut(source, config.val_fraction), 0
    if config.part:
        progress["part"] = config.part
        source, begin = take_share(source, *config.share, numbered=bool(config.val_fraction))
        cut = (cut[0] - begin, cut[1])
    chosen = partial(choose, config.val_seed, config.val_fraction, begin) if by_chance else None
    batches = make_batches(source, Cursor(*progress["cursor"]), cut, size, config.detokenize == "wikitext", chosen)
    with contextlib.closing(batches), ThreadPoolExecutor(1) as thread:
        first = next(batches, None)
        if first is None and is_fresh and not config.part:
            raise UserError(f"{config.dataset or config.files or config.url}: no documents there")
        begin_writing(out_dir, progress)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        encoder = BatchEncoder(enc, config.num_proc or cores)
        results = encode_all(chain([first] if first else [], batches), encoder, thread)
        write_shards(show_progress(results, source, progress), out_dir, config, progress)
    for split, other in (("train", "val"), ("val", "train")):
        # A part may have one split alone; but where the first has no train text, its val shards are not whole.
        matters = not config.part or (split == "train" and config.val_shards and config.share[0] == 0)
        if matters and not progress[f"{split}_tokens"]:
            begin_writing(out_dir, fresh_progress(settings))  # other settings may use the folder
            fewer = "fewer parts, " if config.part else ""
            advice = f"; use {fewer}--val_fraction=0.1, or smaller --shard_tokens" if config.val_shards else ""
            advice = "; use another --val_fraction or --val_seed" if by_chance else advice
            tokens = progress[f"{other}_tokens"]
            raise UserError(f"no text is left for {split}: all {tokens:,} tokens are {other}{advice}")
    write_meta(out_dir, tokenizer, enc.n_vocab, progress)
    return progress


def convert_shards(config: DataConfig, out_dir: Path, tokenizer: str, settings: dict, progress: dict | None) -> dict:
    """The same of tokens that others made, which are downloaded to out_dir/download, a file at a time."""
    enc, downloads = get_tokenizer(tokenizer), out_dir / "download"
    files, settings["source"] = find_token_files(config.shards, config.exclude, downloads)
    progress = progress or fresh_progress(settings)
    check_same(out_dir, progress["settings"], settings)
    progress["command"] = shlex.join(["python", "fineweb.py", *sys.argv[1:]])
    begin_writing(out_dir, progress)
    shutil.rmtree(downloads, ignore_errors=True)  # what a kill left of a file: the hub's client begins it again
    results = read_token_files(files, Cursor(*progress["cursor"]), config.shard_tokens, enc)
    write_shards(show_progress(results, Source([], None, None, ""), progress), out_dir, config, progress)
    write_meta(out_dir, tokenizer, enc.n_vocab, progress)
    shutil.rmtree(downloads, ignore_errors=True)
    return progress


def read_token_files(files: list[TokenFile], begin: Cursor, size: int, enc: Encoding) -> Results:
    """A file is one shard, or several of at least `size` tokens. Raises UserError where ids are not the tokenizer's."""
    lengths = np.zeros(2**16, np.int64)
    lengths[: enc.n_vocab] = token_bytes(enc)
    for number, file in list(enumerate(files))[begin.part :]:
        path = file.get()
        tokens = open_tokens(path)
        parts = max(1, len(tokens) // size)
        for part in range(begin.piece if number == begin.part else 0, parts):
            ids = tokens[len(tokens) * part // parts : len(tokens) * (part + 1) // parts]
            counts = sum(np.bincount(ids[i : i + BATCH], minlength=2**16) for i in range(0, len(ids), BATCH))
            if counts[enc.n_vocab :].any():
                raise UserError(f"{path}: id {counts.nonzero()[0][-1]}, but --tokenizer has {enc.n_vocab:,} ids")
            end = Cursor(number, part + 1) if part + 1 < parts else Cursor(number + 1)
            yield Batch({}, end, True), {file.split: Tokens(ids, 0, int(counts @ lengths))}
        if file.is_download:
            path.unlink()


def own_source(argv: list[str]) -> list[str]:
    """The command line, in which a source that is a flag replaces a config's, and what belongs to that alone."""
    named = {arg.partition("=")[0] for arg in argv}
    if not named & {"--dataset", "--files", "--url", "--shards"}:
        return argv
    theirs = dict.fromkeys(["dataset", "subset", "files", "exclude", "separator", "url", "shards", "val_split"])
    theirs |= {"split": "train"}
    return [f"--{name}={value}" for name, value in theirs.items() if f"--{name}" not in named] + argv


def main() -> int | None:
    config, _ = configure(DataConfig, argv=own_source(sys.argv[1:]))
    try:
        if config.join_parts:
            join_parts(Path(config.out_dir))
        else:
            prepare(config)
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    except OSError as error:  # disk full, no permission, a file that went away
        raise UserError(f"{error}; when that is mended, run the same command to go on") from None


if __name__ == "__main__":
    cli(main)
