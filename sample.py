"""Text from a checkpoint or from GPT-2, streamed as it is made.

python sample.py                                     asks for prompts, on a terminal; of the newest run under out/
python sample.py --start="def main"
python sample.py --model=out/quickstart --start=FILE:prompt.txt --num_samples=3
python sample.py --model=gpt2 --start="Once upon a time"
"""

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import tiktoken
import torch
from torch import Tensor, nn

from configurator import PathStr, UserError, at_least, cli, configure
from distributed import pick_device, pick_dtype
from files import read_text
from huggingface import encoding_of, load_model
from model import GPT, KVCache, without_cudnn


@dataclass(frozen=True)
class SampleConfig:
    model: PathStr | None = None  # a checkpoint, a run or Hugging Face folder, or gpt2..gpt2-xl; None: the newest run
    best: bool = False  # of a run, the checkpoint with the lowest val loss in place of the newest
    start: str = ""  # text to continue, or FILE:path; empty: the start of a document; not given: asks on a terminal
    num_samples: int = 1  # made together as one batch; the first is streamed
    max_new_tokens: int = 500  # of each sample, unless it ends itself with <|endoftext|>
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model's own distribution
    top_k: int | None = 200  # draw from this many likeliest tokens; None: from all
    top_p: float | None = None  # draw from the likeliest tokens that hold this probability together
    seed: int = 1337  # the same seed gives the same text
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the weights; auto: the fastest

    def __post_init__(self):
        at_least(self, 1, "num_samples", "max_new_tokens")
        if self.temperature and self.temperature < 1e-6:  # logits over less leave what float32 holds
            raise ValueError(f"temperature = {self.temperature}, but it must be 0 or at least 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}, but it must be at least 1 (or None)")
        if self.top_p is not None and not 1e-6 <= self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}, but it must be in [1e-6, 1] (or None)")


def main() -> int:
    config, given = configure(SampleConfig, positional="model")
    device = pick_device(config.device)
    model, tokenizer, path = load_model(config.model, device, config.best)
    enc = encoding_of(model, tokenizer, path)
    packed = device.type == "cpu" and config.dtype in ("auto", "float16")
    packed &= torch.backends.quantized.engine in ("x86", "fbgemm")  # CPUs with AVX2
    dtype = torch.float16 if packed else pick_dtype(config.dtype, device)
    model = (pack(model) if packed else model.to(dtype)).eval()
    starts = [config.start]
    if config.start.startswith("FILE:"):
        starts = [read_text(os.path.expanduser(config.start.removeprefix("FILE:")), "it is the text to continue")]
    if "start" not in given and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        starts = iter(lambda: input("prompt> "), "")  # until an empty line
    print(f"{path}, seed {config.seed}, {str(dtype).removeprefix('torch.')}\n---", file=sys.stderr, flush=True)
    try:
        for number, start in enumerate(starts):
            show(model, enc, start, config, config.seed + number)
    except (EOFError, KeyboardInterrupt):
        print()
    except FloatingPointError as error:
        print()
        raise UserError(f"{path}: {error}") from None
    return 0


def show(model: GPT, enc: tiktoken.Encoding, start: str, config: SampleConfig, seed: int) -> None:
    """Print the samples of one start, the first one as it is made; Ctrl-C ends them early."""
    texts, how = [start] * config.num_samples, (config.temperature, config.top_k, config.top_p)
    print(start, end="")
    with contextlib.suppress(KeyboardInterrupt):  # enough text
        for pieces in complete(model, enc, start, config.num_samples, config.max_new_tokens, *how, seed=seed):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            print(pieces[0], end="", flush=True)
    print("", *texts[1:], sep="\n---\n")


class PackedLinear(nn.Module):
    """An nn.Linear with its matrix in float16, in FBGEMM's layout. Input, sums and output are float32. A product with a
    few rows takes as long as reading the matrix: half of the bytes are half of the time."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.data, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def pack(model: GPT) -> GPT:
    """Put PackedLinears in place of a float32 model's matrices, for generation only; the model itself. A matrix that
    float16 cannot hold stays: packing would turn a NaN into a number."""
    found = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    largest = torch.finfo(torch.float16).max
    found = [place for place in found if isinstance(place[2], nn.Linear) and place[2].weight.abs().amax() <= largest]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # packing one takes one thread
        packed = list(pool.map(PackedLinear, [linear for _, _, linear in found]))
    for (parent, name, _), linear in zip(found, packed, strict=True):
        setattr(parent, name, linear)
    return model


def complete(
    model: GPT, enc: tiktoken.Encoding, start: str, num_samples: int, max_new_tokens: int, temperature: float = 0.8,
    top_k: int | None = 200, top_p: float | None = None, seed: int = 1337,
) -> Iterator[list[str]]:  # fmt: skip
    """Continue `start` num_samples times, yielding what each sample's text gained with each token, as whole characters.

    An empty start is the start of a document. `<|endoftext|>` in the start is the special token. The last piece holds
    the bytes of a character that was left unfinished, as U+FFFD. Raises FloatingPointError as generate does.
    """
    device = model.wte.weight.device
    ids = enc.encode(start, allowed_special={"<|endoftext|>"}, disallowed_special=()) or [enc.eot_token]
    idx = torch.tensor([ids] * num_samples, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    how = (temperature, top_k, top_p, enc.n_vocab, enc.eot_token, generator)
    for tokens in generate(model, idx, max_new_tokens, *how):
        spelled = (b"" if i == enc.eot_token else enc.decode_single_token_bytes(i) for i in tokens.tolist())
        yield [decoder.decode(bytes_) for decoder, bytes_ in zip(decoders, spelled, strict=True)]
    yield [decoder.decode(b"", final=True) for decoder in decoders]


@torch.inference_mode()
def generate(
    model: GPT, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, vocab_size: int | None = None, eot: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Continue prompts idx (B, T >= 1), yielding the next token of each sequence, (B,), as soon as it is known.

    temperature 0 is greedy. Ids from vocab_size on (the vocabulary's padding) are never drawn. A sequence that drew
    eot repeats it from then on; generation ends when all have, or after max_new_tokens. When the context is full, its
    older half is dropped, so that a long text costs O(1) re-reads a token.

    Raises FloatingPointError if logits are not finite.
    """
    config, block_size = model.config, model.config.block_size
    total = min(block_size, idx.size(1) + max_new_tokens)
    cache = KVCache(config, idx.size(0), total, device=idx.device, dtype=model.wte.weight.dtype)
    context = new = idx[:, -block_size:]
    done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        if cache.length + new.size(1) > block_size:
            new = context = context[:, -max(1, block_size // 2) :]
            cache.length = 0
        with without_cudnn():
            logits = model.logits(model.hidden(new, cache)[:, -1])  # (B, V)
        token = sample_token(logits[:, :vocab_size], temperature, top_k, top_p, generator)  # (B,)
        if eot is not None:
            token = torch.where(done, eot, token)
            done |= token == eot
        yield token
        if eot is not None and done.all():
            return
        new = token[:, None]
        context = torch.cat([context, new], dim=1)


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token a row: logits (B, V) -> ids (B,). top_p: Holtzman et al. 2020, arXiv 1904.09751.

    Raises FloatingPointError if the logits have no finite maximum: torch.multinomial would end a CUDA process.
    """
    if not (logits.amax(dim=-1) / (temperature or 1.0)).isfinite().all():
        raise FloatingPointError("the logits are not finite: its weights are spoilt, or too large for the dtype")
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    ids = None
    if top_k is not None or top_p is not None:  # the candidates alone, likeliest first: cheaper than all of V
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    probs = (logits / temperature).softmax(dim=-1)
    if top_p is not None:
        outside = probs.cumsum(dim=-1) - probs >= top_p  # the mass before a token already reaches top_p
        probs = probs.masked_fill(outside, 0.0)
    choice = torch.multinomial(probs, 1, generator=generator)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


if __name__ == "__main__":
    cli(main)
