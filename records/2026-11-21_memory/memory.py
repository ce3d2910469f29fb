"""Peak memory of one forward and backward pass of GPT-2 124M, float32 on a CPU, with each option that saves some.

    python records/2026-11-21_memory/memory.py [--nanogpt=DIR]     # DIR holds nanoGPT's model.py

Prints one JSON line a variant: the process's peak in GB (10^9 bytes), and what it had with the model alone.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
B, T, V = 8, 512, 50304
VARIANTS = {
    "plain": (),
    "chunked_loss": ("chunked_loss",),
    "activation_checkpointing": ("activation_checkpointing",),
    "both": ("chunked_loss", "activation_checkpointing"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nanogpt")
    parser.add_argument("--variant")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args.nanogpt)))
        return
    for variant in [*VARIANTS, *(["nanogpt"] if args.nanogpt else [])]:
        command = [sys.executable, __file__, f"--variant={variant}", f"--nanogpt={args.nanogpt or ''}"]
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is freed goes back at once (glibc)
        ended = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        print(ended.stdout.splitlines()[-1], flush=True)


def measure(variant: str, nanogpt: str) -> dict:
    """In a process of its own, whose peak it is."""
    import torch

    torch.manual_seed(0)
    if variant == "nanogpt":
        sys.path.insert(0, nanogpt)
        import model as theirs

        model = theirs.GPT(theirs.GPTConfig(block_size=1024, vocab_size=V, dropout=0.0, bias=True))
    else:
        sys.path.insert(0, str(ROOT))
        from model import GPT, GPTConfig

        model = GPT(GPTConfig(vocab_size=V))
        for option in VARIANTS[variant]:
            setattr(model, option, True)
    x, y = torch.randint(V, (2, B, T), generator=torch.Generator().manual_seed(1))
    before = peak()
    loss = model(x, y)
    loss = loss[1] if variant == "nanogpt" else loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item()
    return dict(variant=variant, peak_gb=round(peak(), 3), model_gb=round(before, 3), loss=loss.item(), norm=norm)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
