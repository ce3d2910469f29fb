"""Our training step, sampling and start next to nanoGPT's (and transformers'), in turn, on the same CPU.

    python records/2026-11-21_sampling/bench.py NANOGPT_FOLDER [step|sample|start] [rounds]

step: a training step of GPT-2 124M, bfloat16, compiled, B = 4, T = 256: seconds and peak memory.
sample: 256 tokens from a random GPT-2 124M after a prompt of 16: seconds; ours with float16 matrices, as sample.py has
them, the others in float32. NEW, SAMPLES, DTYPE in the environment: other than 256 tokens, 1 sample, their float32.
start: from launching the training script on a tiny model to its first step's log line: seconds.
Each measurement is a process of its own; the table gives the median of the rounds.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def our_model(dropout=0.0):
    sys.path.insert(0, ROOT)
    from model import GPT, GPTConfig

    return GPT(GPTConfig(vocab_size=50304, dropout=dropout))


def nano_model(folder):
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig

    return GPT(GPTConfig(vocab_size=50304, bias=True))


def step(who, folder):
    import torch

    torch.manual_seed(0)
    if who == "ours":
        model = our_model()
        from distributed import World
        from optim import OptimConfig, make_optimizers

        World("cpu")  # as in train_gpt2.py: freed memory is kept
        [optimizer] = make_optimizers(model, OptimConfig())
        model.compile()
    else:
        model = nano_model(folder)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
        model = torch.compile(model)
    tokens = torch.randint(50257, (4, 257))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def one():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, y) if who == "ours" else model(x, y)[1]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    for _ in range(3):
        one()
    times = []
    for _ in range(8):
        start = time.perf_counter()
        loss, _ = one()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "loss": loss}


def sample(who, folder):
    import torch

    torch.manual_seed(0)
    new, samples = int(os.environ.get("NEW", 256)), int(os.environ.get("SAMPLES", 1))
    dtype = getattr(torch, os.environ.get("DTYPE", "float32"))
    prompt = torch.randint(50257, (samples, 16))
    if who == "ours":
        model = our_model().eval()
        from sample import generate as sample_from
        from sample import pack

        model = pack(model)

        def generate():
            return len(list(sample_from(model, prompt, new, temperature=0.8, top_k=200)))
    elif who == "transformers":
        import transformers

        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50304)).to(dtype).eval()

        def generate():
            with torch.inference_mode():
                out = model.generate(
                    prompt, max_new_tokens=new, min_new_tokens=new, do_sample=True, temperature=0.8, top_k=200,
                    attention_mask=torch.ones_like(prompt), pad_token_id=50256,
                )  # fmt: skip
            return out.shape[1] - 16
    else:
        model = nano_model(folder).to(dtype).eval()

        def generate():
            return model.generate(prompt, new, temperature=0.8, top_k=200).shape[1] - 16

    with torch.inference_mode():
        model(prompt)  # first call's set-up
    start = time.perf_counter()
    assert generate() == new
    return {"seconds": time.perf_counter() - start}


def start(who, folder):
    tiny = ["--block_size=64", "--n_layer=4", "--n_head=4", "--n_embd=128", "--device=cpu", "--compile=False"]
    with tempfile.TemporaryDirectory() as out:
        if who == "ours":
            sys.path.insert(0, ROOT)
            import numpy as np

            from files import shard_header

            data = np.random.default_rng(0).integers(0, 65, 1_000_000).astype("<u2")
            with open(f"{out}/x_train_000001.bin", "wb") as file:
                file.write(shard_header(len(data)) + data.tobytes())
            flags = [f"--data_dir={out}", f"--out_dir={out}/run", "--vocab_size=65", "--val_interval=0"]
            flags += ["--batch_size=12", "--total_batch_size=768", "--max_steps=1000"]
            command, cwd, mark = [sys.executable, "-u", "train_gpt2.py", *tiny, *flags], ROOT, "| loss"
        else:
            flags = [f"--out_dir={out}", "--eval_iters=1", "--log_interval=1", "--batch_size=12", "--dropout=0.0"]
            command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *tiny, *flags]
            cwd, mark = folder, "iter 0:"
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout:
            if mark in line:
                break
        else:
            raise SystemExit(f"{who}: no first step")
        seconds = time.perf_counter() - begin
        process.kill()
        process.wait()
    return {"seconds": seconds}


def main():
    folder, what = os.path.abspath(sys.argv[1]), sys.argv[2]
    if what == "one":  # a measurement, in a process of its own
        task, who = sys.argv[3:5]
        result = {"step": step, "sample": sample, "start": start}[task](who, folder)
        result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps(result))
        return
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    who = ["ours", "nanoGPT"] + (["transformers"] if what == "sample" else [])
    results = {name: [] for name in who}
    for i in range(rounds):
        for name in who:
            command = [sys.executable, os.path.abspath(__file__), folder, "one", what, name]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[name].append(json.loads(out.splitlines()[-1]))
            print(f"round {i + 1} {name:12} {results[name][-1]}", flush=True)
    for name in who:
        median = statistics.median(r["seconds"] for r in results[name])
        ratio = statistics.median(
            b["seconds"] / a["seconds"] for a, b in zip(results["ours"], results[name], strict=True)
        )
        peak = max(r["peak_gb"] for r in results[name])
        print(f"{what:7} {name:12} {median:8.3f} s   {ratio:6.2f} x ours   peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
