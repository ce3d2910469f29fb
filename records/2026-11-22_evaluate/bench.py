"""evaluate.py's loop beside the one that transformers' documentation gives for a perplexity, in turn in one process.

    python records/2026-11-22_evaluate/bench.py [rounds]

GPT-2 124M with random weights, 8,192 tokens in windows of 1,024, 1,024 and 512 tokens apart. Theirs takes a window at
a time and counts what no window before has predicted; its weights are in the dtype, ours compute in it. Both must find
the same loss. Seconds, the best and the median of the rounds.
"""

import os
import statistics
import sys
import time
from functools import partial

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from device import autocast  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from weights import by_our_names  # noqa: E402

from distributed import World  # noqa: E402
from evaluate import evaluate  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

T, TOKENS = 1024, 8192


def ours(model, ids, stride, dtype, world):
    in_dtype = autocast(dtype, world.device)
    nats, _ = evaluate(model, [ids], TOKENS, T, stride, 8, world, in_dtype, None)
    return nats / TOKENS


@torch.no_grad()
def theirs(model, ids, stride):
    ids = torch.from_numpy(ids.astype(np.int64))
    nats = end = 0
    for begin in range(0, TOKENS, stride):
        before, end = end, min(begin + T, TOKENS)
        logits = model(ids[None, begin:end]).logits[0, before - begin :]
        nats += F.cross_entropy(logits.float(), ids[before + 1 : end + 1], reduction="sum").item()
        if end == TOKENS:
            break
    return nats / TOKENS


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    world = World("cpu")
    ids = np.random.default_rng(0).integers(50257, size=TOKENS + 1).astype(np.uint16)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    model = GPT(GPTConfig()).eval()
    model.load_state_dict(by_our_names(peer.state_dict()))
    for dtype in (torch.float32, torch.bfloat16):
        peer.to(dtype)
        for stride in (T, T // 2):
            runs = {
                "ours": partial(ours, model, ids, stride, dtype, world),
                "transformers": partial(theirs, peer, ids, stride),
            }
            seconds, losses = {name: [] for name in runs}, {}
            for _ in range(rounds):
                for name, run in runs.items():
                    began = time.perf_counter()
                    losses[name] = run()
                    seconds[name].append(time.perf_counter() - began)
            ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True))
            text = "; ".join(f"{name} {min(s):.1f}, {statistics.median(s):.1f}" for name, s in seconds.items())
            loss = " ".join(f"{loss:.5f}" for loss in losses.values())
            print(f"{dtype!s:15} stride {stride}: {text}; {ratio:.2f} x; loss {loss}", flush=True)
    print("load", *(f"{load:.1f}" for load in os.getloadavg()))


if __name__ == "__main__":
    main()
