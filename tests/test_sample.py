import contextlib
import copy
import json
import math
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
import tokenizers
import torch
from conftest import ROOT, call
from test_model import batch, make, variants
from torch import nn
from weights import load_model

import checkpoint
from configurator import cli
from model import GPT, GPTConfig
from sample import complete, generate, main, pack, sample_token
from tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with a random model of bytes, whose vocabulary is padded from 257 to 320."""
    out = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = GPTConfig(block_size=32, vocab_size=320, n_layer=1, n_head=1, n_embd=16)
    model = GPT(config)
    state = {"step": 1, "model": model.state_dict(), "gpt_config": vars(config), "tokenizer": "bytes"}
    checkpoint.save(state, out, keep=0, best_step=None)
    return out


def sample(folder, *args):
    return call("sample.py", f"--model={folder}", "--device=cpu", "--max_new_tokens=80", *args)


def test_same_seed_same_text(folder):
    first, again, other = (sample(folder, "--start=Hello", f"--seed={seed}") for seed in (1, 1, 2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout != other.stdout
    assert first.stdout.startswith("Hello")
    assert "ckpt_000001.pt" in first.stderr  # what it is goes to stderr: stdout is the text alone


def test_several_samples_are_one_batch(folder):
    done = sample(folder, "--start=Hello", "--num_samples=3")
    texts = done.stdout.split("\n---\n")
    assert len(texts) == 3
    assert all(text.startswith("Hello") for text in texts)
    assert len(set(texts)) == 3


class Terminal:
    """A script's `main` in a copy of this process that has a terminal of its own."""

    def __init__(self, *args):
        self.pid, self.handle = pty.fork()
        self.seen = b""
        if self.pid == 0:
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            sys.argv = ["sample.py", *map(str, args)]
            try:
                cli(main)
            except SystemExit as ended:
                os._exit(ended.code)
            finally:
                os._exit(99)

    def until(self, text):
        """What it writes up to this, and from here on no more of it is told."""
        while text.encode() not in self.seen:
            self.seen += os.read(self.handle, 10_000)  # OSError where it has ended
        told, _, self.seen = self.seen.partition(text.encode())
        return told.decode()

    def type(self, text):
        os.write(self.handle, text.encode())

    def ended(self, key=""):
        """Its exit status, after this key; -9 where it had to be killed."""
        pid, status, tries = 0, None, 0
        while not pid:
            if tries == 600:
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(OSError):  # it has ended
                self.type(key)  # again: Python's input forgets a Ctrl-C in the instant before it begins to wait
            time.sleep(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            tries += 1
        os.close(self.handle)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("last", ["\x03", "\x04"])
def test_it_asks_on_a_terminal(folder, last, monkeypatch):
    monkeypatch.setattr("sample.complete", lambda model, enc, start, *args, seed, **kwargs: [[f" by {seed}"]])
    terminal = Terminal(f"--model={folder}", "--device=cpu", "--max_new_tokens=80", "--seed=5")
    assert "ckpt_000001.pt" in terminal.until("prompt> ")
    told = []
    for _ in range(2):
        terminal.type("Hello\n")
        terminal.until("Hello\r\n")  # the terminal's echo
        told.append(terminal.until("prompt> "))
    assert terminal.ended(last) == 0
    assert [text.split() for text in told] == [["Hello", "by", "5"], ["Hello", "by", "6"]]


def test_with_a_start_it_asks_nothing(folder):
    terminal = Terminal(f"--model={folder}", "--device=cpu", "--start=", "--max_new_tokens=5")
    terminal.until("---")
    assert terminal.ended() == 0


def test_start_from_a_file(folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("Grüße,\n  Welt", encoding="utf-8")
    assert sample(folder, f"--start=FILE:{tmp_path / 'prompt.txt'}").stdout.startswith("Grüße,\n  Welt")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    os.mkfifo(tmp_path / "fifo")  # which nobody writes: reading it would wait for ever
    for name in ("missing.txt", "/dev/zero", tmp_path, tmp_path / "fifo", tmp_path / "latin.txt", "x" * 999, ""):
        done = sample(folder, f"--start=FILE:{name}")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert f"--start=FILE:{name}" in done.stderr or name == ""


def test_a_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder / "prompt.txt").write_text("Hello")
    done = sample(f"~/{folder.name}", f"--start=FILE:~/{folder.name}/prompt.txt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello")


def generate_uncached(model, idx, n, **how):
    """The definition: the whole context forward for every token, its older half dropped where it is full."""
    context = idx[:, -model.config.block_size :]
    out = []
    for _ in range(n):
        if context.size(1) > model.config.block_size:
            context = context[:, -model.config.block_size // 2 :]
        out.append(sample_token(model(context)[:, -1], **how))
        context = torch.cat([context, out[-1][:, None]], 1)
    return torch.stack(out, 1)


@variants
@pytest.mark.parametrize("how", [dict(temperature=0.0), dict(temperature=0.8, top_k=20, top_p=0.9)])
def test_cached_generation_equals_uncached(flags, how):
    model, (idx, _) = make(flags), batch(T=7)
    for p in model.parameters():  # a sharper model, whose tokens depend on the context
        p.data *= 4 if p.dim() == 2 else 1
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        uncached = generate_uncached(model, idx, 60, **{"top_k": None, "top_p": None, **how, "generator": generator})
    generator.manual_seed(7)
    cached = torch.stack(list(generate(model, idx, 60, generator=generator, **how)), 1)
    assert torch.equal(cached, uncached)  # 7 + 60 tokens: past block_size = 32 too
    if how["temperature"]:
        assert len(set(cached.flatten().tolist())) > 10


def test_generation_stops_at_endoftext_and_never_draws_padding():
    model, (idx, _) = make(), batch(B=8, T=4)
    model.lm_head.weight.data[90:] = 3 * model.lm_head.weight.data[:11]  # the padding would be likely
    generator = torch.Generator().manual_seed(0)
    free = torch.stack(list(generate(model, idx, 200, vocab_size=90, generator=generator)), 1)
    assert free.max() < 90
    assert free.shape == (8, 200)
    generator.manual_seed(0)
    eot = free[0, 5].item()
    stopped = torch.stack(list(generate(model, idx, 200, vocab_size=90, eot=eot, generator=generator)), 1)
    for row, alone in zip(stopped, free, strict=True):
        ends = (row == eot).nonzero()
        first = ends[0].item() if len(ends) else len(row)
        assert (row[first:] == eot).all()
        if first <= stopped.size(1):
            assert torch.equal(row[: min(first, 6)], alone[: min(first, 6)])
    assert (stopped[0, 5:] == eot).all()


def test_top_k_and_top_p_against_brute_force():
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 50)
    order = logits[0].argsort(descending=True).tolist()
    probs = (logits[0] / 0.7).softmax(0)
    for top_k, top_p in [(5, None), (None, 0.6), (7, 0.8), (None, 1.0), (100, None)]:
        allowed = order[: top_k or 50]
        if top_p is not None and top_p < 1:
            total = sum(probs[i].item() for i in allowed)
            mass, nucleus = 0.0, []
            for i in allowed:
                if mass >= top_p:
                    break
                nucleus.append(i)
                mass += probs[i].item() / total
            allowed = nucleus
        want = torch.zeros(50)
        want[allowed] = probs[allowed] / probs[allowed].sum()
        many = sample_token(logits.expand(20000, -1), 0.7, top_k, top_p, torch.Generator().manual_seed(1))
        have = torch.bincount(many, minlength=50) / 20000
        assert set(many.tolist()) <= set(allowed)
        assert (have - want).abs().max() < 0.02


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("flags", [[], ["--temperature=0"], ["--top_k=None"], ["--top_p=0.9"]], ids=str)
def test_logits_that_are_not_finite_are_one_line(tmp_path, value, flags, monkeypatch):
    config = GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=1, n_embd=16)
    model = GPT(config)
    model.ln_f.bias.data[:] = value
    state = {"step": 1, "model": model.state_dict(), "gpt_config": vars(config), "tokenizer": "bytes"}
    checkpoint.save(state, tmp_path, keep=0, best_step=None)
    monkeypatch.setattr(torch, "multinomial", None)  # on CUDA it would end the process
    done = sample(tmp_path, "--start=Hello", *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "Hello\n", 3), done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/ckpt_000001.pt: the logits are not finite")
    with pytest.raises(FloatingPointError):
        list(complete(model, get_tokenizer("bytes"), "x", 2, 5))


@pytest.mark.parametrize("row", [0, 1])
def test_one_row_that_is_not_finite(row):
    logits = torch.zeros(2, 9)
    logits[row, 3] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError):
            sample_token(logits, temperature, None, None, None)
    with pytest.raises(FloatingPointError):  # finite, but not over a temperature this low
        sample_token(torch.full((1, 9), 3e38), 1e-6, None, None, None)
    masked = torch.zeros(2, 9)
    masked[:, 1:] = -math.inf  # no probability at all is a probability
    assert sample_token(masked, 1.0, None, None, None).tolist() == [0, 0]


@pytest.mark.parametrize("num_samples", [1, 3])
def test_packing_rounds_the_matrices_alone(num_samples):
    torch.manual_seed(0)
    config = GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32, value_embeds=1)
    model, idx = GPT(config).eval(), torch.randint(64, (num_samples, 20))
    embedding = model.wte.weight.clone()
    rounded = copy.deepcopy(model)
    rounded.lm_head.weight = nn.Parameter(rounded.lm_head.weight.data)  # the embedding itself keeps its float32
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.half().float()
    with torch.inference_mode():
        exact, want, got = model(idx), rounded(idx), pack(model)(idx)
    assert torch.allclose(got, want, atol=1e-6)
    assert not torch.allclose(got, exact, atol=1e-6)
    assert torch.equal(model.wte.weight, embedding)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


@pytest.fixture
def script(monkeypatch):
    """A function: from now on these are the tokens that are drawn, a row a sample. It returns a list of the prompts."""

    def script(*rows):
        prompts = []

        def generate(model, idx, *args, **kwargs):
            prompts.append(idx.tolist())
            return map(torch.tensor, zip(*rows, strict=True))

        monkeypatch.setattr("sample.generate", generate)
        return prompts

    return script


MODEL = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=1, n_embd=16))


def test_no_character_is_broken(script):
    enc = get_tokenizer("bytes")
    text = "naïve 漢字 🙂 end"
    script([*text.encode()], [*text.encode()[:-4], *[256] * 4])
    pieces = list(complete(MODEL, enc, "x", 2, 99))
    assert "".join(first for first, _ in pieces) == text
    assert "".join(second for _, second in pieces) == text[:-4]
    assert all("\ufffd" not in piece for step in pieces for piece in step)
    script("é".encode()[:1])
    assert ["".join(p) for p in complete(MODEL, enc, "", 1, 99)] == ["", "\ufffd"]


def test_prompts(script):
    enc = get_tokenizer("bytes")
    for start, ids in [("", [256]), ("ab", [97, 98]), ("<|endoftext|>a", [256, 97])]:
        prompts = script([97])
        list(complete(MODEL, enc, start, 1, 1))
        assert prompts == [[ids]]


def test_a_checkpoint_carries_its_own_tokenizer(tmp_path):
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator(["the cat sat on the mat"] * 9, vocab_size=270, special_tokens=["<|endoftext|>", "<pad>"])
    content = own._tokenizer.to_str()
    config = GPTConfig(block_size=32, vocab_size=own.get_vocab_size(), n_layer=1, n_head=1, n_embd=16)
    state = {"step": 1, "model": GPT(config).state_dict(), "gpt_config": vars(config), "tokenizer": content}
    checkpoint.save(state, tmp_path, keep=0, best_step=None)
    assert json.loads(load_model(str(tmp_path), torch.device("cpu"))[1])["model"]["type"] == "BPE"
    assert sample(tmp_path, "--start=the <pad> cat").stdout.startswith("the <pad> cat")
    done = sample(tmp_path, "--start=the cat")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")
    state["tokenizer"] = None
    checkpoint.save(state, tmp_path, keep=0, best_step=None)
    refused = sample(tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "flag",
    [
        "--temperature=-1",
        "--temperature=1e-40",
        "--top_p=1e-46",
        "--top_k=0",
        "--top_p=0",
        "--num_samples=0",
        "--model=nowhere",
        "--top=3",
    ],
)
def test_mistakes(folder, flag):
    done = sample(folder, flag)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_as_a_user_runs_it(folder, tmp_path):
    """And without transformers, which takes seconds to import, as a checkpoint does not need it."""
    (tmp_path / "transformers.py").write_text("raise SystemExit('transformers was imported')\n")
    options = [f"--model={folder}", "--device=cpu", "--start=é", "--max_new_tokens=20", "--temperature=0"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "sample.py", *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("é")


@pytest.mark.parametrize("script", ["sample.py", "hellaswag.py", "evaluate.py", "huggingface.py", "report.py"])
def test_ctrl_c_during_the_imports_is_silent(script, tmp_path):
    for name in ("torch.py", "difflib.py"):  # whichever it imports first
        (tmp_path / name).write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / script], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_tokenizer_with_ids_that_the_model_has_not(tmp_path):
    config = GPTConfig(block_size=32, vocab_size=200, n_layer=1, n_head=1, n_embd=16)
    state = {"step": 1, "model": GPT(config).state_dict(), "gpt_config": vars(config), "tokenizer": "bytes"}
    checkpoint.save(state, tmp_path, keep=0, best_step=None)
    done = sample(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "257 ids, but its vocab_size is 200" in done.stderr
    checkpoint.save(state | {"tokenizer": "nowhere"}, tmp_path, keep=0, best_step=None)
    done = sample(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path}/ckpt_000001.pt: unknown tokenizer 'nowhere'" in done.stderr


def test_attention_is_not_cudnns(folder, cudnn):
    assert sample(folder, "--start=Hello").returncode == 0
    assert set(cudnn) == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("value", [1e6, math.inf, math.nan])
def test_what_float16_cannot_hold_is_not_packed(value):
    model, (idx, _) = make().eval(), batch()
    model.h[0].mlp.c_fc.weight.data[3, 4] = value
    with torch.inference_mode():
        before = model(idx)
        after = pack(model)(idx)
    assert torch.isfinite(before).all() == torch.isfinite(after).all() == (value == 1e6)
    assert [name for name, part in model.named_modules() if isinstance(part, nn.Linear)] == ["h.0.mlp.c_fc"]


@pytest.mark.parametrize("packs", [True, False])
def test_dtype_is_the_fastest(folder, monkeypatch, packs):
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86" if packs else "qnnpack")
    monkeypatch.setattr(
        "sample.complete", lambda model, *args, **kwargs: [[f"{model.wte.weight.dtype} {model.lm_head}"]]
    )
    plain = "Linear(in_features=16, out_features=320, bias=False)"
    for asked, dtype, weights in (
        ("auto", *(("float16", "float32 PackedLinear()") if packs else ("float32", f"float32 {plain}"))),
        ("float16", "float16", "float32 PackedLinear()" if packs else f"float16 {plain}"),
        ("bfloat16", "bfloat16", f"bfloat16 {plain}"),
    ):
        done = sample(folder, f"--dtype={asked}")
        assert done.stdout == f"torch.{weights}\n"
        assert f", {dtype}\n" in done.stderr
