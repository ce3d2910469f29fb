"""Tokens of held-out text, by a tokenizer and by GPT-2's: python held_out.py TOKENIZER.json GLOB [...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from documents import documents

from tokenizer import get_tokenizer

for own, pattern in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    texts = list(documents(pattern))
    size = sum(len(text.encode()) for text in texts)
    for name in (own, "gpt2"):
        tokens = sum(map(len, get_tokenizer(name).encode_ordinary_batch(texts, num_threads=1)))
        print(
            f"{pattern}: {len(texts)} documents, {size:,} bytes; {name}: {tokens:,} tokens, {size / tokens:.3f} bytes"
        )
