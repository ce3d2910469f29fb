"""Text from a model: what is drawn, how it is spelled, and where prompts come from."""

import copy
import io
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call
from torch import nn

import checkpoint
import sample
from model import GPT, GPTConfig
from sample import complete, generate, pack, sample_token
from tokenizer import get_tokenizer, to_json

SMALL = dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=16)
ROPE = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False)


def make(**flags):
    """A random model, sharp enough for its tokens to depend on the context."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **flags})).eval()
    for p in model.parameters():
        p.data *= 4 if p.dim() == 2 else 1
    return model


def save(folder, model, tokenizer="bytes"):
    state = {"step": 1, "model": model.state_dict(), "gpt_config": vars(model.config), "tokenizer": tokenizer}
    return checkpoint.save(state, folder, keep=0, best_step=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with a model of bytes, whose vocabulary is padded from 257 to 320."""
    out = tmp_path_factory.mktemp("run")
    save(out, make())
    return out


def run(folder, *args, start="Hello"):
    return call("sample.py", f"--model={folder}", "--device=cpu", "--max_new_tokens=60", f"--start={start}", *args)


# ---- what is drawn


@pytest.mark.parametrize("flags", [{}, ROPE], ids=["gpt2", "llama"])
@pytest.mark.parametrize("how", [dict(temperature=0.0), dict(temperature=0.8, top_k=20, top_p=0.9)], ids=["0", "0.8"])
def test_cached_generation_equals_the_definition(flags, how):
    """The whole context forward for every token, and where it is full its newer half alone."""
    model, idx, want = make(**flags), torch.randint(257, (3, 7)), []
    how = {"top_k": None, "top_p": None, **how}
    context, generator = idx, torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _ in range(60):
            context = context if context.size(1) <= 32 else context[:, -16:]
            want.append(sample_token(model(context)[:, -1], **how, generator=generator))
            context = torch.cat([context, want[-1][:, None]], 1)
    have = list(generate(model, idx, 60, **how, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(torch.stack(have), torch.stack(want))
    assert len(torch.stack(have).unique()) > (10 if how["temperature"] else 2)


def test_a_sample_ends_at_endoftext_and_never_has_an_id_without_a_token():
    model, idx = make(), torch.randint(257, (8, 4))
    for p in model.parameters():
        p.data /= 4  # all ids about equally likely, the padding from 20 on and the unused 0 and 1 too
    unused = torch.tensor([0, 1])
    free, stopped = (
        torch.stack(list(generate(model, idx, 200, 1.0, None, None, 20, eot, generator, unused)), 1)
        for eot, generator in ((None, torch.Generator().manual_seed(0)), (7, torch.Generator().manual_seed(0)))
    )
    assert free.shape == (8, 200)
    assert set(free.flatten().tolist()) == set(range(2, 20))
    ends = [row.index(7) if 7 in row else len(row) for row in stopped.tolist()]
    assert len(set(ends)) > 3  # they end at different times, and the last one ends them all
    assert stopped.size(1) == min(max(ends) + 1, 200) < 200
    for row, alone, end in zip(stopped, free, ends, strict=True):
        assert (row[end:] == 7).all()
        assert torch.equal(row[: min(ends)], alone[: min(ends)])  # all drew the same until the first one ended


def test_top_k_and_top_p_against_brute_force():
    torch.manual_seed(0)
    logits = torch.randn(1, 10)
    order, probs = logits[0].argsort(descending=True).tolist(), (logits[0] / 0.7).softmax(0).tolist()
    assert sample_token(logits, 1e-40, None, None, None).item() == order[0]  # no logits / temperature is infinite
    choices = [(5, None), (None, 1.0), (100, None), (1, None), *((k, p / 50) for k in (None, 7) for p in range(1, 50))]
    for top_k, top_p in choices:
        allowed, mass = [], 0.0
        among = order[:top_k]
        for i in among:
            if top_p is None or mass < top_p:
                allowed.append(i)
            mass += probs[i] / sum(probs[j] for j in among)
        drawn = sample_token(logits.expand(3000, -1), 0.7, top_k, top_p, torch.Generator().manual_seed(1))
        assert set(drawn.tolist()) == set(allowed), (top_k, top_p)
        shares = torch.bincount(drawn, minlength=10) / 3000
        for i in allowed:
            assert shares[i].item() == pytest.approx(probs[i] / sum(probs[j] for j in allowed), abs=0.04)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_row_that_is_not_finite(temperature):
    for row in (0, 1):
        logits = torch.zeros(2, 9)
        logits[row, 3] = math.nan
        with pytest.raises(FloatingPointError):
            sample_token(logits, temperature, None, None, None)


@pytest.mark.parametrize("flags", [[], ["--temperature=0"]], ids=str)
def test_logits_that_are_not_finite_are_one_line(tmp_path, flags, monkeypatch):
    model = make()
    model.ln_f.bias.data[:] = math.nan
    save(tmp_path, model)
    monkeypatch.setattr(torch, "multinomial", None)  # on CUDA it would end the process
    done = run(tmp_path, *flags)
    assert (done.returncode, done.stdout) == (2, "Hello\n")
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/ckpt_000001.pt: the logits are not finite")


def test_no_character_is_broken(monkeypatch):
    """Two rows of scripted tokens; the second ends, and one more row stops in the middle of a character."""
    text = "naïve 漢字 🙂 end"
    rows = [[*text.encode()], [*text.encode()[:-4], *[256] * 4]]
    monkeypatch.setattr("sample.generate", lambda *args: map(torch.tensor, zip(*rows, strict=True)))
    pieces = list(complete(make(), get_tokenizer("bytes"), "x", 2, 99))
    assert ["".join(column) for column in zip(*pieces, strict=True)] == [text, text[:-4]]
    assert all("\ufffd" not in piece for step in pieces for piece in step)
    rows = [["é".encode()[0]]]
    assert list(complete(make(), get_tokenizer("bytes"), "", 1, 99)) == [[""], ["\ufffd"]]


# ---- the script


def test_the_same_seed_gives_the_same_text_and_several_samples_are_one_batch(folder):
    first, again, other = (run(folder, "--num_samples=3", f"--seed={seed}") for seed in (1, 1, 2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout != other.stdout
    assert "ckpt_000001.pt, seed 1, float" in first.stderr  # what it is goes to stderr: stdout is the text alone
    texts = first.stdout.split("\n---\n")
    assert len(set(texts)) == 3
    assert all(text.startswith("Hello") and len(text) > 20 for text in texts)


def test_a_tokenizer_with_holes(tmp_path):
    """Ids 257 to 999 have no token; a model may like them all the same."""
    spec = json.loads(to_json("bytes"))
    spec["added_tokens"].append(spec["added_tokens"][0] | {"content": "<pad>", "id": 1000})
    save(tmp_path, make(vocab_size=1024), json.dumps(spec))
    done = run(tmp_path, "--top_k=None", "--temperature=5", "--max_new_tokens=200", start="the <pad> cat")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the <pad> cat")


def test_tokenizers_that_do_not_fit_are_one_line(tmp_path):
    for tokenizer, message in ((None, "not known"), ("nowhere", "nowhere"), ("gpt2", "50257 ids, but its vocab_size")):
        save(tmp_path, make(), tokenizer)
        done = run(tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr


@pytest.mark.parametrize("flag", ["temperature=-1", "top_p=0", "top_p=2", "top_k=0", "num_samples=0", "model=nowhere"])
def test_mistakes(folder, flag):
    done = run(folder, f"--{flag}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_attention_is_not_cudnns(folder, cudnn):
    assert run(folder).returncode == 0
    assert set(cudnn) == {False}


# ---- prompts


def test_a_prompt_from_a_file_is_as_training_data_is(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sample, "show", lambda model, enc, start, *args: print(repr(start)))
    (tmp_path / "prompt.txt").write_bytes("\ufeffGrüße,\r\n  Welt\n".encode())
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    for name in (tmp_path / "prompt.txt", "~/prompt.txt"):
        assert run(folder, start=f"FILE:{name}").stdout == repr("Grüße,\r\n  Welt\n") + "\n"
    for name in ("missing.txt", tmp_path, tmp_path / "latin.txt"):
        done = run(folder, start=f"FILE:{name}")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert f"--start=FILE:{name}: " in done.stderr
    for piped, start in (("\ufeffOnce\r\n\r\n".encode(), "Once\r\n"), (b"Once\n", "Once"), (b"", "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        done = call("sample.py", f"--model={folder}", "--device=cpu")
        assert (done.stdout, done.returncode) == (f"{start!r}\n", 0)


def test_a_prompt_beyond_the_context_is_cut_with_a_word(folder):
    long = "".join(chr(97 + i % 26) for i in range(40))
    cut, whole = run(folder, "--temperature=0", start=long), run(folder, "--temperature=0", start=long[8:])
    assert cut.stdout == long[:8] + whole.stdout
    assert "the prompt has 40 tokens, of which the model sees only the last 32" in cut.stderr
    assert "tokens" not in whole.stderr
    assert [sample.encode(get_tokenizer("bytes"), text) for text in ("", "ab", "<|endoftext|>a")] == [
        [256], [97, 98], [256, 97],
    ]  # fmt: skip


@pytest.mark.parametrize("last", ["\n", "quit\n", "", KeyboardInterrupt])
def test_at_a_terminal(folder, last, monkeypatch):
    """Prompts until an empty line, "quit", Ctrl-D or Ctrl-C, each with a seed of its own; Ctrl-C ends a sample, too."""

    class Terminal(io.StringIO):
        isatty = lambda self: True  # noqa: E731

    def complete(model, enc, start, *args):
        yield [f" by {args[-1]}"]
        raise KeyboardInterrupt

    def read_line():
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    lines = iter(["Hello\n", "World\n", last])
    monkeypatch.setattr(sample, "complete", complete)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--model={folder}", "--device=cpu", "--seed=5"])
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, Terminal())
    monkeypatch.setattr(sys.stdin, "readline", read_line)
    assert sample.main() == 0
    assert sys.stdout.getvalue().strip() == "prompt> Hello by 5\nprompt> World by 6\nprompt>"
    assert sys.stderr.getvalue().endswith('Type a text to continue. An empty line, "quit" or Ctrl-D ends.\n')


def test_as_a_user_runs_it(folder, tmp_path):
    """And without transformers, which takes seconds to import, as a checkpoint does not need it."""
    (tmp_path / "transformers.py").write_text("raise SystemExit('transformers was imported')\n")
    options = [f"--model={folder}", "--device=cpu", "--max_new_tokens=20"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "sample.py", *options]
    done = subprocess.run(command, env=env, input=b"\xc3\xa9\n", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("é".encode())
    assert not done.stdout.startswith("é\n".encode())


def test_in_python_as_the_readme_prints_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").symlink_to(folder)
    exec("""from sample import load, text
model, enc = load("out/mine")
print(text(model, enc, "Once upon a time"))""")
    want = run(folder, "--dtype=float32", "--max_new_tokens=200", start="Once upon a time")
    assert capsys.readouterr().out == want.stdout


# ---- float16 matrices


@pytest.mark.parametrize("num_samples", [1, 3])
def test_packing_rounds_the_matrices_alone(num_samples):
    model, idx = make(), torch.randint(257, (num_samples, 20))
    rounded, embedding = copy.deepcopy(model), model.wte.weight.clone()
    rounded.lm_head.weight = nn.Parameter(rounded.lm_head.weight.data)  # the embedding itself keeps its float32
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.half().float()
    with torch.inference_mode():
        exact, want, got = model(idx), rounded(idx), pack(model)(idx)
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(got, exact, atol=1e-5)
    assert torch.equal(model.wte.weight, embedding)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize("value", [1e6, math.inf, math.nan])
def test_what_float16_cannot_hold_is_not_packed(value):
    model, idx = make(), torch.randint(257, (2, 9))
    model.h[0].mlp.c_fc.weight.data[3, 4] = value
    with torch.inference_mode():
        before, after = model(idx), pack(model)(idx)
    assert torch.isfinite(before).all() == torch.isfinite(after).all() == (value == 1e6)
    assert [name for name, part in model.named_modules() if isinstance(part, nn.Linear)] == ["h.0.mlp.c_fc"]


@pytest.mark.parametrize(
    ("engine", "asked", "dtype", "weights"),
    [
        ("x86", "auto", "float16", "float32 PackedLinear"),
        ("x86", "bfloat16", "bfloat16", "bfloat16 Linear"),
        ("qnnpack", "auto", "float32", "float32 Linear"),
        ("qnnpack", "float16", "float16", "float16 Linear"),
    ],
)
def test_dtype_is_the_fastest(folder, monkeypatch, engine, asked, dtype, weights):
    monkeypatch.setattr(torch.backends.quantized, "engine", engine)
    head = lambda model, *args: [[f"{model.wte.weight.dtype} {type(model.lm_head).__name__}"]]  # noqa: E731
    monkeypatch.setattr("sample.complete", head)
    done = run(folder, f"--dtype={asked}", start="")
    assert (done.stdout, f", {dtype}\n" in done.stderr) == (f"torch.{weights}\n", True)
