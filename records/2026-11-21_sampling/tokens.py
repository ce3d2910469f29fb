"""The cost of one sampled token, ours and transformers' cached `generate`, in turn in one process, on one thread.

    OMP_NUM_THREADS=1 python records/2026-11-21_sampling/tokens.py [rounds]

GPT-2 124M with random weights, a prompt of 64, 16 tokens more: the context is the middle of that of 128 tokens behind a
prompt of 8. Milliseconds of the processor's time, which other programs on the machine disturb less than the clock's:
the median of the rounds' medians, and of their ratios. Each round is told too.
"""

import itertools
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import torch  # noqa: E402
import transformers  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from sample import generate, pack  # noqa: E402

NEW = 16


def ours(dtype, prompt):
    model = GPT(GPTConfig(vocab_size=50304)).eval()
    model = pack(model) if dtype == torch.float16 else model.to(dtype)
    return lambda: ticks(generate(model, prompt, NEW, 0.8, 200, vocab_size=50257, eot=50256))


def theirs(dtype, prompt):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50304)).eval().to(dtype)
    times = []

    class Clock(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            times.append(time.process_time())
            return torch.zeros(len(ids), dtype=torch.bool)

    @torch.inference_mode()
    def run():
        times.clear()
        model.generate(
            prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, temperature=0.8, top_k=200,
            attention_mask=torch.ones_like(prompt), pad_token_id=50256,
            stopping_criteria=transformers.StoppingCriteriaList([Clock()]),
        )  # fmt: skip
        return times

    return lambda: gaps(run())


def ticks(tokens):
    return gaps([time.process_time() for _ in tokens])


def gaps(times):
    return [1e3 * (after - before) for before, after in itertools.pairwise(times)]


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.manual_seed(0)
    for samples in (1, 4):
        prompt = torch.randint(50257, (samples, 64))
        runs = {}
        for name in ("float16", "bfloat16", "float32"):
            runs[f"ours {name}"] = ours(getattr(torch, name), prompt)
        for name in ("float16", "bfloat16", "float32"):
            runs[f"transformers {name}"] = theirs(getattr(torch, name), prompt)
        found = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                found[name].append(statistics.median(run()))
            print(samples, *(f"{name} {times[-1]:.1f}" for name, times in found.items()), flush=True)
        for name, times in found.items():
            ratio = statistics.median(b / a for a, b in zip(found["ours float16"], times, strict=True))
            print(f"{samples} samples {name:22} {statistics.median(times):6.1f} ms  {ratio:.2f} x", flush=True)
    print("load", *(f"{load:.1f}" for load in os.getloadavg()))


if __name__ == "__main__":
    main()
