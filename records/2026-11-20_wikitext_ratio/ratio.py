"""Where a published ratio of 275,844 tokens to 245,566 words comes from, in WikiText-2's test file.

    python records/2026-11-20_wikitext_ratio/ratio.py --file=wiki.test.tokens [--published=wiki.test.tokens.pkl]

The published file is data/wikitext-2/wiki.test.tokens.pkl of github.com/bkkaggle/lm-finetuning, the windows themselves.
"""

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import tiktoken

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from wikitext import detokenize  # noqa: E402

from configurator import UserError, cli, configure  # noqa: E402
from tokenizer import get_tokenizer  # noqa: E402

# GPT-2's own ends in `|\s+(?!\S)|\s+`: of white space before a word the last character stays apart, so that two line
# ends before a word are two tokens. The published windows have one there.
ONE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass(frozen=True)
class RatioConfig:
    file: str | None = None  # wiki.test.tokens, with <unk>
    published: str | None = None  # the windows that the ratio was published with


class Published(pickle.Unpickler):
    """Lists and numbers in one object of a class that is not here; nothing else is loaded."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("__main__", "TextDataset"):
            raise UserError(f"the published file holds a {module}.{name}: not the one meant here")
        return type(name, (), {})


def main() -> int:
    config, _ = configure(RatioConfig)
    if config.file is None:
        raise UserError("say where WikiText-2's test file is: --file=wiki.test.tokens")
    original = Path(config.file).read_bytes().decode()
    words = len(original.strip().split(" "))
    gpt2 = get_tokenizer("gpt2")
    one = tiktoken.Encoding("one", pat_str=ONE, mergeable_ranks=gpt2._mergeable_ranks, special_tokens={})
    text = detokenize(original)
    tokens = gpt2.encode_ordinary(text)
    joined = one.encode_ordinary(text)
    windows = [joined[i * 255 : i * 255 + 254] for i in range(len(joined) // 255)]
    inputs = sum(map(len, windows))
    for what, count in (
        ("words", words),
        ("GPT-2's tokens of the detokenized file", len(tokens)),
        ("the same, two line ends being one token", len(joined)),
        (f"inputs of the {len(windows)} windows of 255 of them", inputs),
    ):
        print(f"{count:>9,}  {count / words:.4f}  {what}")
    if config.published:
        with open(config.published, "rb") as file:
            theirs = Published(file).load()
        print(f"published: {theirs.n_tokens:,} and {theirs.n_original_tokens:,}; equal windows: ", end="")
        print(f"{sum(a == b for a, b in zip(windows, theirs.batches, strict=True)):,} of {len(theirs.batches):,}")
    return 0


if __name__ == "__main__":
    cli(main)
