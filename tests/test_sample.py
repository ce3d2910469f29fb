import json

import pytest
import tokenizers
import torch
from conftest import call, run

import checkpoint
from huggingface import load_model
from model import GPT, GPTConfig
from sample import complete, speed_up
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


def test_start_from_a_file(folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("Grüße,\n  Welt", encoding="utf-8")
    assert sample(folder, f"--start=FILE:{tmp_path / 'prompt.txt'}").stdout.startswith("Grüße,\n  Welt")
    done = sample(folder, "--start=FILE:missing.txt")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_speed_up_changes_the_layout_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32)).eval()
    idx = torch.randint(64, (3, 20))
    before = model(idx)
    speed_up(model)
    assert model.h[0].mlp.c_fc.weight.stride() == (1, 128)
    assert model.lm_head.weight is model.wte.weight
    assert torch.allclose(model(idx), before, atol=1e-6)


class Scripted:
    """Stands in for a model whose tokens are known."""

    def __init__(self, rows):
        self.rows, self.wte = rows, torch.nn.Embedding(1, 1)

    def generate(self, idx, max_new_tokens, *args, eot, **kwargs):
        self.prompt = idx
        for tokens in zip(*self.rows, strict=True):
            yield torch.tensor(tokens)


def test_no_character_is_broken():
    enc = get_tokenizer("bytes")
    text = "naïve 漢字 🙂 end"
    model = Scripted([list(text.encode()), list(text.encode()[:-4]) + [256] * 4])
    pieces = list(complete(model, enc, "x", 2, 99))
    assert "".join(first for first, _ in pieces) == text
    assert "".join(second for _, second in pieces) == text[:-4]
    assert all("\ufffd" not in piece for step in pieces for piece in step)
    cut = Scripted([list("é".encode()[:1])])
    assert ["".join(p) for p in complete(cut, enc, "", 1, 99)] == ["", "\ufffd"]


def test_prompts():
    enc = get_tokenizer("bytes")
    for start, ids in [("", [256]), ("ab", [97, 98]), ("<|endoftext|>a", [256, 97])]:
        model = Scripted([[97]])
        list(complete(model, enc, start, 1, 1))
        assert model.prompt.tolist() == [ids]


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
        "--start='a\\0'",
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


def test_as_a_user_runs_it(folder):
    done = run("sample.py", f"--model={folder}", "--device=cpu", "--start=é", "--max_new_tokens=20", "--temperature=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("é")


def test_attention_is_not_cudnns(folder, cudnn):
    assert sample(folder, "--start=Hello").returncode == 0
    assert set(cudnn) == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_dtype_is_picked_as_in_training(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("sample.pick_dtype", lambda *args: asked.append(args) or torch.float64)
    monkeypatch.setattr("sample.complete", lambda model, *args, **kwargs: [[str(model.wte.weight.dtype)]])
    assert "torch.float64" in sample(folder, "--dtype=auto").stdout
    assert asked == [("auto", torch.device("cpu"))]
