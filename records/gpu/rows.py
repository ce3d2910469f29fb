"""The rows that run.py runs one after the other, each in a process of its own; README.md says what each should be.

A row is a function that gets a Card and returns what to record: `result`, a line for the table; `ok`, whether it is as
it should be (None: a number without a verdict); and numbers. The list of all, in their order, is at the end.
"""

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")


class Skip(Exception):
    """Why a row cannot be had on this machine."""


@dataclass(frozen=True)
class Row:
    name: str
    part: str  # right or fast
    seconds: int  # that it takes on an H100: one that does not fit into what is left is not begun
    run: Callable[["Card"], dict]


@dataclass(frozen=True)
class Card:
    """What a row may know: the device, the sizes, and where to write."""

    device: str
    small: bool
    seconds: float  # until this row is killed
    data: Path  # what `prepare` wrote
    nanogpt: Path | None
    work: Path  # runs, deleted at the end
    out: Path

    @property
    def shape(self) -> dict:
        """GPT-2 124M, or a small one."""
        small = dict(block_size=64, n_layer=2, n_head=2, n_embd=64, vocab_size=512)
        return small if self.small else dict(block_size=1024, n_layer=12, n_head=12, n_embd=768, vocab_size=50304)

    @property
    def batches(self) -> tuple[int, int, int]:
        return (8, 4, 2) if self.small else (64, 32, 16)

    full_batches = (64, 32, 16)  # in the names of the rows

    @property
    def tokens(self) -> int:
        """In a step whose speed is measured."""
        return 1024 if self.small else 524288

    @property
    def compile(self) -> bool:
        return self.device != "cpu"

    @property
    def computes(self) -> bool:
        """Whether 1 + 1 is 2 here. It is not on a stand-in for CUDA, whose values say nothing."""
        import torch

        return (torch.ones(2, device=self.device) + 1).tolist() == [2, 2]

    def synchronize(self) -> None:
        import torch

        getattr(torch, self.device).synchronize()

    def time(self, action: Callable, repeats: int) -> float:
        """Seconds of an action, the mean after one that is not timed."""
        action()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            action()
        self.synchronize()
        return (time.perf_counter() - began) / repeats


# ---------------------------------------------------------------------------------------------------------------------
# Tools


def options(**values: object) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def python(*command: object, env: dict | None = None, seconds: float | None = None) -> str:
    """Run Python on a command line and return what it printed; SIGTERM after so many seconds. Raises RuntimeError."""
    print("$ python", *command, flush=True)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | (env or {}), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    timer = threading.Timer(seconds or threading.TIMEOUT_MAX, process.terminate)
    timer.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    timer.cancel()
    if process.wait():
        raise RuntimeError(f"{Path(str(command[0])).name}: exit status {process.returncode}: {''.join(lines[-3:])}")
    return "".join(lines)


def last_json(text: str) -> dict:
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])


def training(card: Card, name: str, **values: object) -> tuple[Path, list[str]]:
    """A run's folder and the command line of a short one: four layers of the model, on bytes, every step recorded."""
    out = card.work / name
    short = dict(batch_size=8, total_batch_size=32768, learning_rate=1e-3, n_layer=4)
    if card.small:
        short = dict(batch_size=4, total_batch_size=512, learning_rate=1e-2)
    values = dict(
        data_dir=card.data / "bytes", out_dir=out, device=card.device, compile=card.compile, warmup_steps=5,
        max_steps=30, log_interval=1, val_interval=0, **card.shape | short,
    ) | values  # fmt: skip
    return out, ["train_gpt2.py", *options(**values)]


def train(card: Card, name: str, *launcher: str, **values: object) -> Path:
    out, command = training(card, name, **values)
    python(*launcher, *command)
    return out


def records(out: Path, kind: str = "train") -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(out: Path) -> list[float]:
    return [record["loss"] if record["loss"] is not None else float("nan") for record in records(out)]


def mean_loss(out: Path) -> float:
    """Over all steps. Two runs see the same batches, and while losses fall steeply a single step says little."""
    have = losses(out)
    return sum(have) / len(have)


def checkpoint_of(out: Path) -> dict:
    import torch

    return torch.load(max(out.glob("ckpt_*.pt")), map_location="cpu", weights_only=True)


def bench(card: Card, *args: str, env: dict | None = None, launcher: tuple = (), **values: object) -> dict:
    """bench.py's numbers for a config file at this card's sizes."""
    values = dict(
        device=card.device, compile=card.compile, batch_size=card.batches[0], total_batch_size=card.tokens,
        steps=6, warmup=2, **card.shape if card.small else {},
    ) | values  # fmt: skip
    result = last_json(python(*launcher, "bench.py", *args, *options(**values), env=env))
    parts = ", ".join(f"{part} {ms:.1f}" for part, ms in result["parts"].items())
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] else ""
    text = f"{result['tokens_per_sec']:,.0f} tok/s{mfu}, {result['ms']:.1f} ms ({parts}), "
    memory = f"{result['peak_memory_gb']:.1f} GB in use, {result['reserved_memory_gb']:.1f} GB reserved"
    text += f"{memory}, {result['setup_seconds']:.0f} s to start"
    if result["skipped"]:
        text += f", {result['skipped']} updates SKIPPED"
    return dict(ok=None, result=text, bench=result)


# ---------------------------------------------------------------------------------------------------------------------
# Right


def machine(card: Card) -> dict:
    """What it is, and its two ceilings: a large matrix product in bf16, and a copy."""
    import torch

    from distributed import machine as described

    n, size = (256, 1 << 20) if card.small else (8192, 1 << 31)
    a, b = (torch.randn(n, n, device=card.device, dtype=torch.bfloat16) for _ in "ab")
    source = torch.ones(size, device=card.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    tflops = 2 * n**3 / card.time(lambda: a @ b, 10) / 1e12
    tb = 2 * size / card.time(lambda: target.copy_(source), 10) / 1e12
    about = dict(
        described(torch.device(card.device), torch.bfloat16), cores=os.cpu_count(),
        cudnn=torch.backends.cudnn.version(),
    )  # fmt: skip
    if shutil.which("nvidia-smi") and card.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    text = ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
    return dict(ok=None, result=f"{text}; {tflops:.0f} TFLOP/s, copies {tb:.2f} TB/s", tflops=tflops, tb_s=tb, **about)


def use_attention(card: Card, kind: str) -> None:
    """Make this process, and those it starts, use flash's or cuDNN's attention. To be called before torch is imported.

    cuDNN's is what training uses where torch chooses it: on Hopper and newer. Skip if it is not chosen.
    """
    if kind == "flash":
        os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"
        return
    import torch
    from torch.nn.attention import SDPBackend

    if card.device == "cuda":
        q = torch.zeros(1, 12, 64, 64, device="cuda", dtype=torch.bfloat16)
        if SDPBackend(torch._fused_sdp_choice(q, q, q, None, 0.0, True)) != SDPBackend.CUDNN_ATTENTION:
            raise Skip("torch does not choose cuDNN's attention on this device: training uses flash's")


def attention_in(names: Iterable[str]) -> str:
    """Which attention these kernels are."""
    text = " ".join(names).lower()
    return "cudnn" if re.search(r"cudnn\w*sdpa", text) else "flash" if "flash_fwd" in text else "another kernel"


def parity(card: Card, dtype: str, kind: str = "flash") -> dict:
    """Logits, loss and gradients next to transformers', for the same random weights: GPT-2, and a Llama.

    In bfloat16 (autocast, as in training, and with the attention kernel of training) both are compared with
    transformers in float32.
    """
    if importlib.util.find_spec("transformers") is None:
        raise Skip("transformers is not installed")
    use_attention(card, kind)
    import torch

    ok, text, numbers = True, [], {}
    for name, flags in (("gpt2", {}), ("llama", dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False))):
        ours, theirs, exact = parity_outputs(card, flags, getattr(torch, dtype))
        for what in ("logits", "loss", "gradients"):
            error = relative(ours[what], exact[what])
            numbers[f"{name}_{what}"] = error
            limit = 1e-4
            if dtype == "bfloat16":
                numbers[f"{name}_{what}_transformers"] = relative(theirs[what], exact[what])
                limit = 3 * numbers[f"{name}_{what}_transformers"] + 1e-3
            ok &= error <= limit
            text.append(f"{name} {what} {error:.1e}" + (f" of {limit:.1e}" if dtype == "bfloat16" else ""))
        if card.device == "cuda" and dtype == "bfloat16":
            numbers[f"{name}_attention"] = ours["attention"]
            ok &= ours["attention"] == kind
            text.append(f"attention by {ours['attention']}")
    return dict(ok=ok, result="relative errors: " + ", ".join(text), **numbers)


def parity_outputs(card: Card, flags: dict, dtype) -> Iterator[dict]:
    """Of ours and of transformers', both in dtype, and of transformers' in float32: logits, loss, gradients."""
    import torch
    import transformers

    from huggingface import by_our_names, save_folder
    from model import GPT, GPTConfig, choose_attention_kernel

    torch.manual_seed(0)
    config = GPTConfig(**card.shape | flags)
    model = GPT(config)
    tokens = torch.randint(config.vocab_size, (2, config.block_size), device=card.device)
    folder = card.work / f"hf_{config.pos}_{dtype}"
    save_folder(model, None, folder, "random weights")
    model.to(card.device).train()  # it computes q, k and v in one product
    choose_attention_kernel(config.dropout)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(card.device)
    for who, precision in ((model, dtype), (peer, dtype), (peer, torch.float32)):
        who.zero_grad()
        with torch.profiler.profile() if card.device == "cuda" else contextlib.nullcontext() as profile:
            with torch.autocast(card.device, precision, enabled=precision != torch.float32):
                logits = who(tokens) if who is model else who(tokens).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
            card.synchronize()
        seen = attention_in(event.name for event in profile.events()) if profile else None
        grads = {name: p.grad for name, p in who.named_parameters()}
        grads = grads if who is model else by_our_names(grads)
        flat = torch.cat([grads[name].flatten() for name, _ in model.named_parameters()])
        yield dict(logits=logits.detach().float(), loss=loss.detach(), gradients=flat, attention=seen)


def relative(have, want) -> float:
    return ((have - want).norm() / want.norm()).item()


def nccl_1_rank(card: Card) -> dict:
    """DDP over NCCL (on a CPU gloo) with compiling: the losses of a run without torchrun."""
    alone, ranks = train(card, "alone"), train(card, "torchrun", *TORCHRUN)
    apart = abs(mean_loss(alone) - mean_loss(ranks))
    return dict(ok=apart < 0.02, result=f"mean losses of 30 steps differ by {apart:.1e}", apart=apart)


def compiled(card: Card) -> dict:
    """A compiled run with validation (a ragged last batch), HellaSwag and samples: compiled twice, and never again."""
    import torch

    T, B = card.shape["block_size"], 4 if card.small else 8
    often = dict(val_interval=10, val_tokens=T * (B + B // 2), hellaswag_interval=10, sample_interval=10)
    out, command = training(card, "compiled", compile=True, **often)
    import hellaswag
    import train_gpt2

    hellaswag.download = lambda: str(card.data / "hellaswag.jsonl")  # there is no network
    sys.argv = command
    torch._logging.set_logs(recompiles=True, graph_breaks=True)
    if status := train_gpt2.main():
        raise RuntimeError(f"train_gpt2.py: exit status {status}")
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    eager = train(card, "eager", compile=False)
    apart = abs(mean_loss(out) - mean_loss(eager))
    counts = {kind: len(records(out, kind)) for kind in ("val", "hellaswag", "sample")}
    ok = (graphs, breaks) == (2, 0) and apart < 0.05 and set(counts.values()) == {4}
    text = f"{graphs} graphs, {breaks} graph breaks; the mean loss differs from eager's by {apart:.1e}; {counts}"
    return dict(ok=ok, result=text, graphs=graphs, graph_breaks=breaks, apart=apart, **counts)


def kill_and_resume(card: Card) -> dict:
    """SIGKILL in the middle and --resume=True, with --deterministic=True: the bits of a run that was left alone."""
    import torch

    flags = dict(deterministic=True, max_steps=40, checkpoint_interval=10, val_interval=10)
    flags |= dict(val_tokens=8 * card.shape["block_size"])
    straight = train(card, "straight", **flags)
    killed, command = training(card, "killed", **flags)
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    while process.poll() is None and not (killed / "ckpt_000020.pt").exists():
        time.sleep(0.002)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the run that was to be killed ended by itself, with {process.returncode}")
    reached = max(killed.glob("ckpt_*.pt")).name
    python(*command, "--resume=True")
    a, b = checkpoint_of(straight), checkpoint_of(killed)
    different = [name for name in a["model"] if not torch.equal(a["model"][name], b["model"][name])]
    same_losses, same_val = losses(straight) == losses(killed), records(straight, "val") == records(killed, "val")
    text = f"killed after {reached}; {len(different)} of {len(a['model'])} tensors differ at step {b['step']}; "
    text += f"losses {'equal' if same_losses else 'NOT equal'}, val losses {'equal' if same_val else 'NOT equal'}"
    return dict(ok=same_losses and same_val and not different, result=text, different=different, reached=reached)


def precision(card: Card) -> dict:
    """float16 with the gradient scaler, and bfloat16, next to float32."""
    means, text = {}, []
    for dtype in ("float32", "bfloat16", "float16"):
        out = train(card, dtype, dtype=dtype, compile=False)
        means[dtype] = mean_loss(out)
        text.append(f"{dtype} {means[dtype]:.4f}")
    skipped = sum(event["event"] == "skipped step" for event in records(out, "event"))
    scale = checkpoint_of(out)["scaler"]["scale"]
    ok = all(abs(means[dtype] - means["float32"]) < 0.1 + 0.05 * skipped for dtype in means) and scale > 0
    text = f"{', '.join(text)}; float16 scale {scale:.0f}, {skipped} steps skipped"
    return dict(ok=ok, result=text, scale=scale, skipped=skipped, **means)


# ---------------------------------------------------------------------------------------------------------------------
# Fast: the first rows are the most telling ones


def speed(card: Card, kind: str, index: int) -> dict:
    """The training step of GPT-2 124M as published, vocab 50,304, T = 1024, bf16, compiled, with the kernels that took
    the most time. Wrong if attention's kernel is not the one asked for, or if cuDNN's losses are not flash's."""
    use_attention(card, kind)
    trace = card.work / "trace.json"
    result = bench(card, "config/gpt2_124m.py", batch_size=card.batches[index], profile=trace)
    if card.device != "cuda":
        return result
    times, seen = kernels(trace)
    result |= dict(kernels=times, attention=seen, ok=seen == kind)
    result["result"] += f", attention by {seen}"
    twin = earlier(card, f"speed_{card.full_batches[index]}_flash")
    if kind == "cudnn" and twin:
        pairs = zip(result["bench"]["losses"], twin["bench"]["losses"], strict=True)
        worst = max(abs(a - b) for a, b in pairs)
        result |= dict(ok=result["ok"] and worst < 0.05, worst=worst)
        result["result"] += f", losses within {worst:.1e} of flash's"
    return result


def earlier(card: Card, name: str) -> dict | None:
    """What a row has measured, in this call or in one before."""
    have = json.loads((card.out / "results.json").read_text())
    return next((result for result in have if result["name"] == name and "bench" in result), None)


def kernels(trace: Path) -> tuple[list, str]:
    """[(name, ms, calls)] of the 25 that took the most time in a step, and attention's kind."""
    times: dict[str, list] = {}
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") == "kernel":
            times.setdefault(event["name"], []).append(event["dur"] / 1e3)
    longest = sorted(times, key=lambda name: -sum(times[name]))[:25]
    return [(name[:120], round(sum(times[name]), 3), len(times[name])) for name in longest], attention_in(times)


def nanogpt(card: Card) -> dict:
    """nanoGPT's model in a loop like its own: bf16, compiled, fused AdamW, clipping, the same batch, made once."""
    if not card.nanogpt:
        raise Skip("no --nanogpt=DIR")
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(card.nanogpt, "model.py"))
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_float32_matmul_precision("high")
    model = module.GPT(module.GPTConfig(bias=True, dropout=0.0, **card.shape)).to(card.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), card.device)
    step_model = torch.compile(model) if card.compile else model
    B, T = card.batches[0], card.shape["block_size"]
    rounds = card.tokens // (B * T)
    x, y = torch.randint(card.shape["vocab_size"], (2, rounds, B, T), device=card.device)
    autocast = torch.autocast(card.device, torch.bfloat16) if card.device == "cuda" else contextlib.nullcontext()

    def step() -> None:
        for i in range(rounds):
            with autocast:
                loss = step_model(x[i], y[i])[1] / rounds
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    step()
    rate = card.tokens / card.time(step, 6)
    result = dict(ok=None, result=f"{rate:,.0f} tok/s", tokens_per_sec=rate)
    rows = [earlier(card, f"speed_64_{kind}") for kind in ("flash", "cudnn")]
    ours = [row["bench"]["tokens_per_sec"] for row in rows if row]
    if ours:
        result |= dict(ratio=max(ours) / rate, ok=max(ours) / rate >= 1.04 if card.device == "cuda" else None)
        result["result"] += f"; ours is {max(ours) / rate:.2f} x as fast"
    return result


def report_c(card: Card) -> dict:
    """config/shakespeare_124m.py in full: GPT-2 124M until a step's loss is below 0.09, after about 3,500 steps."""
    out = card.work / "shakespeare"
    values = dict(data_dir=card.data / "words", out_dir=out, device=card.device, compile=card.compile)
    values |= dict(log_interval=1, vocab_size=50257, checkpoint_interval=0, sample_start="The")
    if json.loads((card.data / "about.json").read_text())["words"]:
        values |= dict(sample_interval=0)
    if card.small:
        values |= dict(n_layer=2, n_head=2, n_embd=64, batch_size=4, total_batch_size=512, max_steps=150)
        values |= dict(target_loss=8.0, warmup_steps=10, learning_rate=1e-2)
    began = time.perf_counter()
    python("train_gpt2.py", "config/shakespeare_124m.py", *options(**values), seconds=card.seconds - 15)
    seconds = time.perf_counter() - began
    steps = records(out)
    last, target = steps[-1], records(out, "run")[0]["config"]["target_loss"]
    reached = last["loss"] is not None and last["loss"] < target
    ms = sorted(step["dt"] * 1e3 for step in steps)[len(steps) // 2]
    text = f"loss {last['loss']} at step {last['step']:,} after {seconds:.0f} s, {ms:.1f} ms a step; "
    text += json.loads((card.data / "about.json").read_text())["text"]
    every = {step["step"]: step["loss"] for step in steps if step["step"] % 100 == 0}
    # Only a run with twice the steps that the report needed is wrong; one that was cut off sooner says nothing.
    enough = card.small or last["step"] > 7000
    ok = True if reached else False if enough else None
    return dict(ok=ok, result=text, step=last["step"], seconds_to_target=seconds, losses=every)


def optimizers(card: Card) -> dict:
    """ms of a step's update of all 124M parameters, and launching it."""
    small = dict(batch_size=card.batches[2] // 2, total_batch_size=card.batches[2] // 2 * card.shape["block_size"])
    numbers = {}
    for name in ("adamw", "muon", "adafactor"):
        result = bench(card, "config/gpt2_124m.py", optimizer=name, compile=False, steps=10, **small)["bench"]
        numbers[name] = result["parts"]["optimizer"]
    return dict(ok=None, result=", ".join(f"{name} {ms:.2f} ms" for name, ms in numbers.items()), **numbers)


def sampling(card: Card) -> dict:
    """Tokens a second as sample.py makes them, of one text and of 16 at once: the first time, and again."""
    import torch

    from sample import complete, pack
    from tokenizer import get_tokenizer

    enc, model = get_tokenizer("bytes"), random_model(card)
    with torch.no_grad():  # the end of a text is never drawn
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[enc.eot_token] = -1.0
    model = (model.to(torch.bfloat16) if card.device == "cuda" else pack(model)).eval()
    count = 32 if card.small else 256
    numbers, text = {}, []
    for samples in (1, 16):
        for time_ in ("first", "again"):
            began = time.perf_counter()
            made = sum(1 for _ in complete(model, enc, "The ", samples, count)) - 1  # and a last piece
            rate = samples * made / (time.perf_counter() - began)
            numbers[f"{samples}_{time_}"] = rate
            text.append(f"{samples} x {made}: {rate:,.0f} tok/s {time_}")
    return dict(ok=None, result="; ".join(text), **numbers)


def hellaswag_rate(card: Card) -> dict:
    """Examples a second, as in a run, of texts as long as HellaSwag's (in bytes instead of tokens)."""

    import hellaswag
    from distributed import World, autocast, pick_dtype
    from tokenizer import get_tokenizer

    world, model = World(card.device), random_model(card)
    T = card.shape["block_size"]
    examples = hellaswag.load(str(card.data / "hellaswag.jsonl"), get_tokenizer("bytes"), T)
    in_dtype = autocast(pick_dtype("auto", world.device), world.device)
    seconds = card.time(lambda: hellaswag.score(model, examples, card.batches[1] * T, world, in_dtype), 1)
    rate = len(examples) / seconds
    return dict(ok=None, result=f"{rate:,.0f} examples/s: 10,042 in {10042 / rate:.0f} s", examples_per_sec=rate)


def random_model(card: Card):
    import torch

    from model import GPT, GPTConfig

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    return GPT(GPTConfig(**card.shape)).to(card.device)


def speed_modern(card: Card) -> dict:
    """config/gpt2_124m_modern.py: RoPE, SwiGLU, RMSNorm."""
    return bench(card, "config/gpt2_124m_modern.py")


def speed_run(card: Card) -> dict:
    """config/speedrun_124m.py: Muon, relu squared, qk-norm."""
    return bench(card, "config/speedrun_124m.py")


def speed_max_autotune(card: Card) -> dict:
    """Matrix products by the fastest kernel that the compiler finds, which takes it some minutes."""
    return bench(card, "config/gpt2_124m.py", env=dict(TORCHINDUCTOR_MAX_AUTOTUNE="1"))


def speed_eager(card: Card) -> dict:
    """Not compiled."""
    return bench(card, "config/gpt2_124m.py", compile=False, batch_size=card.batches[2])


def speed_vocab_50257(card: Card) -> dict:
    """The vocabulary as published, which is not a multiple of 128."""
    return bench(card, "config/gpt2_124m.py", vocab_size=509 if card.small else 50257)


def speed_fsdp(card: Card) -> dict:
    """FSDP on one rank."""
    return bench(card, "config/gpt2_124m.py", launcher=TORCHRUN, parallel="fsdp")


def speed_switched(card: Card, option: str) -> dict:
    return bench(card, "config/gpt2_124m.py", **{option: True})


# ---------------------------------------------------------------------------------------------------------------------
# Data


def text_of(path: Path | None) -> tuple[str, str]:
    """A text and its name: of the file, or 2 MB of this Python's own library."""
    if path:
        return path.read_text(encoding="utf-8"), path.name
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
        if size > 2e6:
            break
    return "".join(texts), "Python's standard library"


def write_shards(folder: Path, tokenizer: str | None, vocab_size: int, **splits) -> None:
    from files import shard_header

    folder.mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        data = shard_header(len(ids)) + ids.astype("<u2").tobytes()
        (folder / f"text_{split}_000000.bin").write_bytes(data)
    if tokenizer:
        sizes = {f"{split}_tokens": len(ids) for split, ids in splits.items()}
        (folder / "meta.json").write_text(json.dumps(dict(tokenizer=tokenizer, vocab_size=vocab_size, **sizes)))


def prepare(folder: Path, path: Path | None, small: bool) -> None:
    """Write all data that the rows need, so that it can travel to a machine without a network: the text by bytes and in
    GPT-2's tokens, GPT-2's vocabulary, and examples of HellaSwag's form and lengths, a token of which is here a byte.

    Without GPT-2's vocabulary, every word is a token: about as many, of as many kinds.
    """
    import numpy as np

    from configurator import UserError
    from tokenizer import get_tokenizer, to_json

    text, name = text_of(path)
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    cut = len(data) * 9 // 10
    write_shards(folder / "bytes", "bytes", 257, train=data[:cut], val=data[cut:])

    try:
        ids, kind, vocabulary = get_tokenizer("gpt2").encode_ordinary(text), "GPT-2 tokens", to_json("gpt2")
    except (UserError, ImportError):
        words: dict[str, int] = {}
        ids = [words.setdefault(w, len(words)) % 50257 for w in re.findall(r" ?\w+| ?[^\w\s]+|\s", text)]
        kind, vocabulary = "words (GPT-2's vocabulary is not here)", None
    ids = np.array(ids[:338025])  # all of tiny Shakespeare, and as much of another text
    write_shards(folder / "words", "tokenizer.json" if vocabulary else None, 50257, train=ids)
    if vocabulary:
        (folder / "words" / "tokenizer.json").write_text(vocabulary, encoding="utf-8")

    rng, words = random.Random(0), text.split()
    longest = 24 if small else 60

    def piece(size: int) -> str:
        start = rng.randrange(len(words) - 100)
        return " ".join(words[start : start + 100]).encode()[:size].decode(errors="ignore") or "x"

    with open(folder / "hellaswag.jsonl", "w", encoding="utf-8") as file:
        for number in range(40 if small else 2000):
            endings = [piece(rng.randrange(4, longest // 2)) for _ in range(4)]
            file.write(json.dumps(dict(ctx=piece(longest), endings=endings, label=number % 4)) + "\n")

    # Written last: it says that the folder is whole.
    about = dict(text=f"{name}, {len(ids):,} {kind} to train on", words=vocabulary is None)
    (folder / "about.json").write_text(json.dumps(about))


# ---------------------------------------------------------------------------------------------------------------------
# All of them: what matters most is had after 8 minutes

ROWS = [
    Row("machine", "right", 15, machine),
    Row("parity_bfloat16_cudnn", "right", 40, partial(parity, dtype="bfloat16", kind="cudnn")),
    Row("parity_bfloat16_flash", "right", 40, partial(parity, dtype="bfloat16", kind="flash")),
    Row("speed_64_flash", "fast", 80, partial(speed, kind="flash", index=0)),
    Row("speed_64_cudnn", "fast", 75, partial(speed, kind="cudnn", index=0)),
    Row("compiled", "right", 80, compiled),
    Row("kill_and_resume", "right", 110, kill_and_resume),
    Row("nanogpt", "fast", 70, nanogpt),
    # the second call
    Row("report_c", "fast", 200, report_c),
    Row("speed_run", "fast", 80, speed_run),
    Row("speed_modern", "fast", 80, speed_modern),
    Row("nccl_1_rank", "right", 70, nccl_1_rank),
    Row("precision", "right", 50, precision),
    Row("parity_float32", "right", 40, partial(parity, dtype="float32")),
    # the third and the fourth
    Row("sampling", "fast", 40, sampling),
    Row("hellaswag", "fast", 40, hellaswag_rate),
    Row("optimizers", "fast", 60, optimizers),
    Row("speed_32_flash", "fast", 65, partial(speed, kind="flash", index=1)),
    Row("speed_16_flash", "fast", 60, partial(speed, kind="flash", index=2)),
    Row("speed_32_cudnn", "fast", 65, partial(speed, kind="cudnn", index=1)),
    Row("speed_16_cudnn", "fast", 60, partial(speed, kind="cudnn", index=2)),
    Row("speed_eager", "fast", 60, speed_eager),
    Row("speed_vocab_50257", "fast", 65, speed_vocab_50257),
    Row("speed_fsdp", "fast", 70, speed_fsdp),
    Row("speed_chunked_loss", "fast", 65, partial(speed_switched, option="chunked_loss")),
    Row("speed_checkpointing", "fast", 65, partial(speed_switched, option="activation_checkpointing")),
    Row("speed_max_autotune", "fast", 200, speed_max_autotune),
]
