"""The memory of a training step, measured and as memory.py foresees it.

    python records/2026-11-21_memory_foreseen/foreseen.py --device=cpu                # the process's peak
    python records/2026-11-21_memory_foreseen/foreseen.py --device=cuda < cases.jsonl # the most that tensors took

A case is a JSON object: fields of GPTConfig, and B, T, dtype, compiled, checkpointing, chunked, optimizer. Each is two
steps of two micro-batches; on the CPU one micro-batch, without an optimizer unless named. Prints a JSON line a case.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CPU = [
    dict(B=8, T=512, checkpointing=checkpointing, chunked=chunked, optimizer=optimizer)
    for optimizer in (None, "adamw")
    for chunked, checkpointing in ((False, False), (True, False), (False, True), (True, True))
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--case")
    args = parser.parse_args()
    if args.case:
        measure(json.loads(args.case), args.device)
    elif args.device == "cuda":
        for line in sys.stdin:
            measure(json.loads(line), args.device)
    else:
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is freed goes back at once (glibc)
        for case in CPU:
            subprocess.run(
                [sys.executable, __file__, "--device=cpu", f"--case={json.dumps(case)}"], check=True, env=env
            )


def measure(case: dict, device: str) -> None:
    import torch
    from memory import Setting, foresee

    from model import GPT, GPTConfig
    from optim import OptimConfig, make_optimizers

    B, T, dtype = case["B"], case.get("T", 1024), getattr(torch, case.get("dtype", "float32"))
    names = {field.name for field in fields(GPTConfig)}
    config = GPTConfig(**{"vocab_size": 50304} | {name: value for name, value in case.items() if name in names})
    setting = Setting(
        B, T, case.get("optimizer") or "none", dtype, case.get("compiled", False), device,
        case.get("checkpointing", False), case.get("chunked", False), accumulates=device == "cuda",
    )  # fmt: skip
    foreseen = foresee(config, setting)
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = GPT(config)
    model.activation_checkpointing, model.chunked_loss = setting.activation_checkpointing, setting.chunked_loss
    model.to(device)
    if setting.compiled:
        model.compile()
    optimizers = []
    if case.get("optimizer"):
        optimizers = make_optimizers(model, OptimConfig(optimizer=case["optimizer"]))
    x, y = torch.randint(config.vocab_size, (2, B, T)).to(device)
    for _ in range(2 if optimizers else 1):
        for _ in range(2 if device == "cuda" else 1):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = model(x, y)
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    reserved = None
    if device == "cuda":
        measured, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved() / 1e9
    error = round(foreseen.total / measured - 1, 4)
    print(
        json.dumps(dict(case, gb=measured / 1e9, reserved_gb=reserved, foreseen_gb=foreseen.total / 1e9, error=error))
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
