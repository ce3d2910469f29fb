"""Text from a checkpoint or from GPT-2, streamed as it is made.

python sample.py --start="def main"                  the newest run under out/
python sample.py --model=out/quickstart --start=FILE:prompt.txt --num_samples=3
python sample.py --model=gpt2 --start="Once upon a time"
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import codecs
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from configurator import PathStr, UserError, cli, configure
from distributed import pick_device, pick_dtype
from huggingface import encoding_of, load_model
from model import GPT

if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True)
class SampleConfig:
    model: PathStr | None = None  # a checkpoint, a run or Hugging Face folder, or gpt2..gpt2-xl; None: the newest run
    start: str = ""  # text to continue, or FILE:path; empty: the start of a document
    num_samples: int = 1  # made together as one batch; the first is streamed
    max_new_tokens: int = 500  # of each sample, unless it ends itself with <|endoftext|>
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model's own distribution
    top_k: int | None = 200  # draw from the so many likeliest tokens; None: from all
    top_p: float | None = None  # draw from the likeliest tokens that hold this probability together
    seed: int = 1337  # the same seed gives the same text
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the weights; auto: as in training

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must be at least 1")
        if self.temperature and self.temperature < 1e-6:  # logits over less leave what float32 holds
            raise ValueError(f"temperature = {self.temperature}, but it must be 0 or at least 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}, but it must be at least 1 (or None)")
        if self.top_p is not None and not 1e-6 <= self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}, but it must be in [1e-6, 1] (or None)")


def main() -> int:
    config, _ = configure(SampleConfig)
    device = pick_device(config.device)
    model, tokenizer, path = load_model(config.model, device)
    enc = encoding_of(model, tokenizer, path)
    model = model.to(pick_dtype(config.dtype, device)).eval()
    speed_up(model)
    start = read_start(config.start)
    print(f"{path}, seed {config.seed}\n---", file=sys.stderr, flush=True)

    texts = [start] * config.num_samples
    sys.stdout.write(start)
    try:
        for pieces in complete(
            model, enc, start, config.num_samples, config.max_new_tokens,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed,
        ):  # fmt: skip
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            sys.stdout.write(pieces[0])
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass  # enough text
    except FloatingPointError as error:
        print()
        raise UserError(f"{path}: {error}") from None
    print()
    for text in texts[1:]:
        print(f"---\n{text}")
    return 0


def read_start(start: str) -> str:
    """The text to continue: `start`, or the content of the file that FILE:path names."""
    if not start.startswith("FILE:"):
        return start
    path = Path(os.path.expanduser(start.removeprefix("FILE:")))
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"--start=FILE:{path}: not a regular file")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--start=FILE:{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--start=FILE:{path}: not a text in UTF-8") from None


def speed_up(model: GPT) -> None:
    """Lay out float32 matrices on a CPU column by column: one token at a time, each is multiplied by a single vector,
    for which MKL then reads memory 1.6 times as fast. In place; for generation only."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                module.weight.data = weight.t().contiguous().t()


def complete(
    model: GPT, enc: "tiktoken.Encoding", start: str, num_samples: int, max_new_tokens: int, *,
    temperature: float = 0.8, top_k: int | None = 200, top_p: float | None = None, seed: int = 1337,
) -> Iterator[list[str]]:  # fmt: skip
    """Continue `start` num_samples times, yielding what each sample's text gained with each token, as whole characters.

    An empty start is the start of a document. `<|endoftext|>` in the start is the special token. The last piece holds
    the bytes of a character that was left unfinished, as U+FFFD. Raises FloatingPointError as GPT.generate does.
    """
    device = model.wte.weight.device
    ids = enc.encode(start, allowed_special={"<|endoftext|>"}, disallowed_special=()) or [enc.eot_token]
    idx = torch.tensor([ids] * num_samples, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    for tokens in model.generate(
        idx, max_new_tokens, temperature, top_k, top_p,
        vocab_size=enc.n_vocab, eot=enc.eot_token, generator=generator,
    ):  # fmt: skip
        ids = tokens.tolist()
        yield [
            "" if i == enc.eot_token else decoder.decode(enc.decode_single_token_bytes(i))
            for i, decoder in zip(ids, decoders, strict=True)
        ]
    yield [decoder.decode(b"", final=True) for decoder in decoders]


if __name__ == "__main__":
    cli(main)
