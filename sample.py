"""Text from a checkpoint or from GPT-2, printed while it is made.

    python sample.py                                    asks for prompts; newest run in out/
    python sample.py --start="def main"
    python sample.py --model=out/quickstart --start=FILE:prompt.txt --num_samples=3
    echo "Once upon a time" | python sample.py --model=gpt2

In Python, load() returns a model with its tokenizer, and text() lets it continue a text.
"""

import codecs
import contextlib
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch
from torch import Tensor, nn

from configurator import PathStr, UserError, at_least, cli, configure, within
from distributed import pick_device, pick_dtype
from huggingface import encoding_of, load_model
from model import GPT, KVCache, without_cudnn
from tokenizer import ENDOFTEXT, unused_ids


@dataclass(frozen=True)
class SampleConfig:
    model: PathStr | None = None  # a run, a checkpoint, a Hugging Face folder or gpt2..gpt2-xl; None: the newest run
    best: bool = False  # use the run's best checkpoint (lowest val loss), not its newest
    start: str = ""  # text to continue, or FILE:path; empty: a new document; without it: stdin, or it asks
    num_samples: int = 1  # samples of each prompt, made as one batch; the first is printed while it is made
    max_new_tokens: int = 500  # length of a sample, unless it ends itself with <|endoftext|>
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model's own distribution
    top_k: int | None = 200  # draw from this many likeliest tokens; None: from all
    top_p: float | None = None  # draw from the likeliest tokens that hold this probability together; None: from all
    seed: int = 1337  # the same seed gives the same text
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the weights; auto: the fastest

    def __post_init__(self):
        at_least(self, 1, "num_samples", "max_new_tokens", "top_k")
        at_least(self, 0, "temperature")
        within(self, 1e-6, 1, "top_p")


def main() -> int:
    # Read the prompts first: a wrong --start is told before gigabytes of weights are loaded.
    config, given = configure(SampleConfig, positional="model")
    starts = prompts(config.start, "start" in given)
    device = pick_device(config.device)
    model, tokenizer, path = load_model(config.model, device, config.best)
    enc = encoding_of(model, tokenizer, path)

    # A CPU is fastest with float16 matrices (if it has AVX2), a GPU with 16-bit weights.
    packed = device.type == "cpu" and config.dtype in ("auto", "float16")
    packed = packed and torch.backends.quantized.engine in ("x86", "fbgemm")
    dtype = torch.float16 if packed else pick_dtype(config.dtype, device)
    model = (pack(model) if packed else model.to(dtype)).eval()

    # What it is goes to stderr: stdout is the text alone. Each prompt has a seed of its own.
    print(f"{path}, seed {config.seed}, {str(dtype).removeprefix('torch.')}\n---", file=sys.stderr, flush=True)
    try:
        for number, start in enumerate(starts):
            show(model, enc, start, config, config.seed + number)
    except (EOFError, KeyboardInterrupt):  # Ctrl-D or Ctrl-C at the prompt
        print()
    except FloatingPointError as error:
        print()
        raise UserError(f"{path}: {error}") from None
    return 0


def prompts(start: str, given: bool) -> Iterable[str]:
    """The texts to continue: --start, else what is piped in, else what the user types.

    Raises UserError.
    """
    # With `> file` nobody would see the question, so start a new document without asking.
    if not given and sys.stdin.isatty():
        return ask() if sys.stdout.isatty() else [start]

    # As in training data, a byte order mark is not text, and line ends stay as they are. So read
    # bytes and decode them: Python's text files would turn "\r\n" into "\n".
    where = f"--start={start}" if given else "stdin"
    try:
        if start.startswith("FILE:"):
            return [Path(start.removeprefix("FILE:")).expanduser().read_bytes().decode("utf-8-sig")]
        if given:
            return [start]
        print("reading the prompt from stdin, as there is no --start", file=sys.stderr, flush=True)
        text = sys.stdin.buffer.read().decode("utf-8-sig")
        return [text.removesuffix("\n").removesuffix("\r")]  # the last line end is echo's
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not text in UTF-8") from None


def ask() -> Iterator[str]:
    """What the user types, until an empty line or "quit". Raises EOFError on Ctrl-D."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (makes the line one that can be edited)
    print('Type a text to continue. An empty line, "quit" or Ctrl-D ends.', file=sys.stderr, flush=True)
    while (text := input("prompt> ")) not in ("", "quit"):
        yield text


def show(model: GPT, enc: tiktoken.Encoding, start: str, config: SampleConfig, seed: int) -> None:
    """Print the samples of one prompt, the first while it is made. Ctrl-C ends them early."""
    # A prompt that is too long is no error, but a model that ignores its beginning looks broken.
    num_tokens, block_size = len(encode(enc, start)), model.config.block_size
    if num_tokens > block_size:
        cut = f"of which the model sees only the last {block_size} (its context)"
        print(f"the prompt has {num_tokens} tokens, {cut}", file=sys.stderr, flush=True)

    # A terminal can show only one sample growing, the first. The others are printed at the end.
    texts = [start] * config.num_samples
    print(start, end="")
    with contextlib.suppress(KeyboardInterrupt):
        how = (config.temperature, config.top_k, config.top_p, seed)
        for pieces in complete(model, enc, start, config.num_samples, config.max_new_tokens, *how):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            print(pieces[0], end="", flush=True)
    print("", *texts[1:], sep="\n---\n")


class PackedLinear(nn.Module):
    """An nn.Linear with its matrix in float16, in FBGEMM's layout; all else is float32. A few rows
    take as long as reading the matrix: half of the bytes are half of the time."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.data, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def pack(model: GPT) -> GPT:
    """Replace a float32 model's matrices by PackedLinears, for generation. Returns the model."""
    # What float16 cannot hold stays: packing would turn infinities and NaNs into numbers.
    linears, largest = {}, torch.finfo(torch.float16).max
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and part.weight.abs().amax() <= largest:
            linears[name] = part

    # Packing one matrix keeps one thread busy, so pack as many at a time as there are threads, the
    # largest first: last of all, GPT-2's head would keep one thread waiting for the other.
    names = sorted(linears, key=lambda name: linears[name].weight.numel(), reverse=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, packed in zip(names, pool.map(PackedLinear, map(linears.get, names)), strict=True):
            model.set_submodule(name, packed)
    return model


def load(name: str | None = None, device: str = "auto") -> tuple[GPT, tiktoken.Encoding]:
    """The model called `name`, as --model, in eval mode, and its tokenizer. Raises UserError."""
    model, tokenizer, path = load_model(name, pick_device(device))
    return model.eval(), encoding_of(model, tokenizer, path)


def text(model: GPT, enc: tiktoken.Encoding, start: str = "", max_new_tokens: int = 200, **how) -> str:
    """`start` and its continuation; `how`: temperature, top_k, top_p and seed, as in complete."""
    return start + "".join(piece for (piece,) in complete(model, enc, start, 1, max_new_tokens, **how))


def encode(enc: tiktoken.Encoding, start: str) -> list[int]:
    """A prompt's ids: <|endoftext|> is the special token, an empty one the start of a document."""
    return enc.encode(start, allowed_special={ENDOFTEXT}, disallowed_special=()) or [enc.eot_token]


def complete(
    model: GPT, enc: tiktoken.Encoding, start: str, num_samples: int, max_new_tokens: int, temperature: float = 0.8,
    top_k: int | None = 200, top_p: float | None = None, seed: int = 1337,
) -> Iterator[list[str]]:  # fmt: skip
    """Continue `start` num_samples times, yielding what each text gained with each token.

    The last piece holds the bytes of a character that was left unfinished, as U+FFFD. Raises
    FloatingPointError as generate does.
    """
    # One batch, with the same prompt in every row. The rows differ because all of them draw from
    # one generator, in turn. It is our own, so that the caller's random numbers stay as they are.
    device = model.wte.weight.device
    idx = torch.tensor([encode(enc, start)] * num_samples, device=device)
    unused = torch.from_numpy(unused_ids(enc)).to(device)
    generator = torch.Generator(device).manual_seed(seed)

    # A token may be part of a character: a decoder keeps its bytes until that is whole.
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    how = (temperature, top_k, top_p, enc.n_vocab, enc.eot_token, generator, unused)
    for tokens in generate(model, idx, max_new_tokens, *how):
        spelled = (b"" if i == enc.eot_token else enc.decode_single_token_bytes(i) for i in tokens.tolist())
        yield [decoder.decode(part) for decoder, part in zip(decoders, spelled, strict=True)]
    yield [decoder.decode(b"", final=True) for decoder in decoders]


@torch.inference_mode()
def generate(
    model: GPT, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, vocab_size: int | None = None, eot: int | None = None,
    generator: torch.Generator | None = None, unused: Tensor | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Continue prompts idx (B, T >= 1), yielding the next token of each sequence, (B,).

    temperature 0 is greedy. Ids from vocab_size on (the vocabulary's padding) and the ids in
    `unused` are never drawn. A sequence that drew eot repeats it; generation ends when all have, or
    after max_new_tokens. Raises FloatingPointError if logits are not finite.
    """
    # The cache keeps the keys and values of all tokens so far, so that each is computed once. It
    # is as long as this text can become: a short answer does not pay for the whole context.
    block_size = model.config.block_size
    total = min(block_size, idx.size(1) + max_new_tokens)
    cache = KVCache(model.config, idx.size(0), total, device=idx.device, dtype=model.wte.weight.dtype)
    context = new = idx[:, -block_size:]
    done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        # When the context is full, read its newer half again: about one more token read for each.
        if cache.length + new.size(1) > block_size:
            new = context = context[:, -max(1, block_size // 2) :]
            cache.length = 0

        # One forward pass of the new tokens alone; only the last position's logits are needed.
        with without_cudnn():
            logits = model.logits(model.hidden(new, cache)[:, -1])[:, :vocab_size]  # (B, V)
        if unused is not None:
            logits[:, unused] = -torch.inf
        token = sample_token(logits, temperature, top_k, top_p, generator)  # (B,)

        # A finished sequence goes on as <|endoftext|>, until all of the batch have finished.
        if eot is not None:
            token = torch.where(done, eot, token)
            done = token == eot
        yield token
        if eot is not None and done.all():
            return

        # The cache knows the text so far: the next pass needs this token alone, (B,) -> (B, 1).
        new = token[:, None]
        context = torch.cat([context, new], dim=1)


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token a row: logits (B, V) -> ids (B,). top_p: Holtzman et al. 2020, arXiv 1904.09751.

    Raises FloatingPointError if the logits have no finite maximum.
    """
    # Ask before drawing: torch.multinomial would end a CUDA process at a NaN.
    if not logits.amax(dim=-1).isfinite().all():
        raise FloatingPointError("the logits are not finite: its weights are not, or are too large for the dtype")
    if temperature < 1e-6:  # as good as 0, and logits / temperature could be infinite
        return logits.argmax(dim=-1)

    # Take the candidates alone, likeliest first: cheaper than a softmax over all of V.
    ids = None
    if top_k is not None or top_p is not None:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    probs = (logits / temperature).softmax(dim=-1)

    # top_p drops a token if the likelier ones together already hold that much probability.
    if top_p is not None:
        mass_before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(mass_before >= top_p, 0.0)

    # The draw is a place among the candidates; look up which id stands there.
    choice = torch.multinomial(probs, 1, generator=generator)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


if __name__ == "__main__":
    cli(main)
