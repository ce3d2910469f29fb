"""config/shakespeare_cpu.py next to nanoGPT's documented CPU run on tiny Shakespeare by characters, in turn.

    python records/2026-11-21_shakespeare_cpu/compare.py NANOGPT_FOLDER INPUT_TXT [rounds]

Both train on the first 90% of the text and are judged by the mean loss over all non-overlapping 64-character windows of
the last 10%. Training seconds are those of steps alone: no evaluation, no start-up, no saving. Prints, for each round,
the seconds in which nanoGPT ends its 2,000 steps, its loss, and the seconds in which our run is first at or below it.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NANO = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0"
).split()


def run(command, cwd):
    return subprocess.run([sys.executable, *command], cwd=cwd, check=True, capture_output=True, text=True).stdout


def nano(folder, out):
    log = run([*NANO, f"--out_dir={out}"], folder)
    times = {int(i): float(ms) / 1e3 for i, ms in re.findall(r"^iter (\d+): .* time ([\d.]+)ms", log, re.M)}
    usual = statistics.median(times.values())
    seconds = sum(usual if i % 250 == 0 else t for i, t in times.items())  # every 250th includes an evaluation
    script = f"""
import numpy as np, torch, sys
from model import GPT, GPTConfig
ckpt = torch.load({out + "/ckpt.pt"!r}, map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**ckpt["model_args"]))
model.load_state_dict(ckpt["model"])
model.eval()
ids = np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64)
n = (len(ids) - 1) // 64
x, y = torch.from_numpy(ids[: n * 64]).view(n, 64), torch.from_numpy(ids[1 : n * 64 + 1]).view(n, 64)
with torch.no_grad():
    losses = [model(a, b)[1].item() * len(a) for a, b in zip(x.split(64), y.split(64))]
print(ckpt["iter_num"], sum(losses) / n)
"""
    iteration, loss = run(["-c", script], folder).splitlines()[-1].split()
    return {"seconds": seconds, "ms_per_step": usual * 1e3, "checkpoint": int(iteration), "val_loss": float(loss)}


def ours(data, out, target, seed):
    flags = [f"--data_dir={data}", f"--out_dir={out}", f"--seed={seed}", "--log_interval=5"]
    run(["train_gpt2.py", "config/shakespeare_cpu.py", *flags], ROOT)
    seconds, last, crossed = 0.0, 0, None
    with open(f"{out}/metrics.jsonl") as file:
        for record in map(json.loads, file):
            if record["kind"] == "train":
                seconds += record["dt"] * (record["step"] - last)
                last = record["step"]
            if record["kind"] == "val":
                if crossed is None and record["val_loss"] <= target:
                    crossed = {"step": record["step"], "seconds": seconds, "val_loss": record["val_loss"]}
                final = record["val_loss"]
    return {"crossed": crossed, "seconds": seconds, "steps": last, "val_loss": final}


def main():
    folder, text = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    ratios = []
    with tempfile.TemporaryDirectory() as tmp:
        data = f"{tmp}/shakespeare_char"
        run(["fineweb.py", f"--files={text}", "--tokenizer=bytes", "--val_fraction=0.1", f"--out_dir={data}"], ROOT)
        for i in range(rounds):
            theirs = nano(folder, f"{tmp}/nano{i}")
            mine = ours(data, f"{tmp}/ours{i}", theirs["val_loss"], seed=1 + i)
            ratios.append(mine["crossed"]["seconds"] / theirs["seconds"])
            print(json.dumps({"nanoGPT": theirs, "ours": mine, "ratio": round(ratios[-1], 3)}), flush=True)
    print(
        "our run is at nanoGPT's final loss in this part of its training seconds: "
        f"mean {statistics.mean(ratios):.3f}, median {statistics.median(ratios):.3f}, worst {max(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
