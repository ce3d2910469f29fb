"""Do tiktoken, tokenizers and gigatoken give the same ids, document by document? And does decoding give the text back?

python records/2026-11-21_dutch/agree.py TOKENIZER.json[,...] GLOB [...]
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers

sys.path.insert(0, str(Path(__file__).parents[2]))

from documents import documents

from tokenizer import ENDOFTEXT, BatchEncoder, get_tokenizer


def batches(texts: Iterator[str], size: int = 4_000_000) -> Iterator[list[str]]:
    held, room = [], size
    for text in texts:
        held.append(text)
        room -= len(text)
        if room <= 0:
            yield held
            held, room = [], size
    if held:
        yield held


def compare(name: str, pattern: str) -> None:
    enc, theirs = get_tokenizer(name), tokenizers.Tokenizer.from_file(name)
    theirs.encode_special_tokens = True  # <|endoftext|> in a text is ordinary text, as in our shards
    encoder = BatchEncoder(enc, 1)
    assert encoder.gigatoken, "nothing to compare with"
    counts = dict.fromkeys(("documents", "bytes", "tokens", "spelled"), 0)
    differ = dict.fromkeys(("tokenizers", "gigatoken", "decoded"), 0)
    for texts in batches(documents(pattern)):
        raw = [text.encode() for text in texts]
        ids, sizes = encoder(raw)
        parts = np.split(ids, np.cumsum(sizes)[:-1])
        for text, data, part, other in zip(texts, raw, parts, theirs.encode_batch(texts), strict=True):
            ours = enc.encode_ordinary(text)
            differ["gigatoken"] += part.tolist() != ours
            differ["tokenizers"] += other.ids != ours
            differ["decoded"] += enc.decode_bytes(ours) != data
            counts["documents"] += 1
            counts["bytes"] += len(data)
            counts["tokens"] += len(ours)
            counts["spelled"] += ENDOFTEXT in text  # documents that contain the string
    print(name, pattern, counts, "differ:", differ, flush=True)


for name in sys.argv[1].split(","):
    for pattern in sys.argv[2:]:
        compare(name, pattern)
