"""evaluate.py beside its definition: every token predicted alone, in the first window that has it."""

import json
import math
import shutil

import pytest
import torch
from conftest import TRAIN, call, metrics, write_shard

import checkpoint
from model import GPT, GPTConfig

T = 32  # block_size
TEXTS = ["the quick  brown fox. " * 9, "jumps över\n a lazy dog " * 6, "naïve"]
TOKENS = [token for text in TEXTS for token in (256, *text.encode())]
WORDS = sum(len(text.strip().split(" ")) for text in TEXTS)
MODELS = {
    "gpt2": dict(),
    "modern": dict(pos="rope", norm="rmsnorm", mlp="swiglu"),
    "relu2": dict(pos="rope", norm="rmsnorm", mlp="relu2", qk_norm=True, tie_weights=False),
}


def save(folder, tokenizer="bytes", **flags):
    """A checkpoint with random weights, large enough that what is attended to matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=T, vocab_size=320, n_layer=2, n_head=2, n_embd=32), **flags}))
    for p in model.parameters():
        p.data *= 5 if p.dim() == 2 else 1
    state = {"step": 1, "model": model.state_dict(), "gpt_config": vars(model.config), "tokenizer": tokenizer}
    folder.mkdir(exist_ok=True)
    checkpoint.save(state, folder, keep=0, best_step=None)
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three documents; the split is cut into two shards in the middle of the first."""
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "x_val_000000.bin", TOKENS[:101])
    write_shard(folder / "x_val_000001.bin", TOKENS[101:])
    meta = {"tokenizer": "bytes", "vocab_size": 257, "val_tokens": len(TOKENS), "val_words": WORDS}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def evaluate(folder, data, *args, **kwargs):
    done = call("evaluate.py", f"--model={folder}", f"--data_dir={data}", "--device=cpu", *args, **kwargs)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def one_by_one(model, tokens, seq_len, stride):
    """Mean loss in nats of all tokens but the first."""
    total = 0.0
    for target in range(1, len(tokens)):
        start = next(start for start in range(0, len(tokens), stride) if target <= start + seq_len)
        context = tokens[start:target]
        assert len(context) > min(target - 1, seq_len - stride)  # what a stride is for
        total -= model(torch.tensor([context]))[0, -1].log_softmax(-1)[tokens[target]].item()
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS.keys())
def test_equals_a_token_at_a_time(flags, data, tmp_path, cudnn):
    loss = one_by_one(save(tmp_path, **flags), TOKENS, T, T)
    cudnn.clear()
    for args in ([], ["--batch_size=1"], ["--batch_size=100", f"--stride={T}"]):
        out = evaluate(tmp_path, data, *args)
        assert out["loss"] == pytest.approx(loss, abs=1e-5)
        assert (out["seq_len"], out["stride"], out["tokens"]) == (T, T, len(TOKENS) - 1)
    assert set(cudnn) == {False}  # it would make a plan for every new shape


@pytest.mark.parametrize(
    ("seq_len", "stride", "limit"),  # all tokens, a multiple of strides, a shard's end, less than a window, too many
    [(32, 8, None), (32, 8, 192), (32, 1, 101), (20, 7, 101), (20, 7, None), (16, 16, 192), (32, 8, 5), (32, 8, 10**6)],
)
def test_windows(seq_len, stride, limit, data, tmp_path):
    some = TOKENS[: limit and limit + 1]
    loss = one_by_one(save(tmp_path), some, seq_len, stride)
    out = evaluate(tmp_path, data, f"--seq_len={seq_len}", f"--stride={stride}", f"--tokens={limit}")
    assert out["loss"] == pytest.approx(loss, abs=1e-5)
    assert out["tokens"] == len(some) - 1


def test_units(data, tmp_path):
    save(tmp_path / "model")
    out = evaluate(tmp_path / "model", data)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (out["words"], out["bytes"]) == (WORDS, size)
    nats = out["loss"] * (len(TOKENS) - 1)
    assert out["perplexity"] == pytest.approx(math.exp(out["loss"]))
    assert out["word_loss"] == pytest.approx(nats / (WORDS - 1))
    assert out["word_perplexity"] == pytest.approx(math.exp(out["word_loss"]))
    assert out["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)

    some = evaluate(tmp_path / "model", data, "--tokens=205")  # up to the first letters of the second document
    assert some["bytes"] == len(bytes(token for token in TOKENS[1:206] if token < 256)) == 204
    assert some["bits_per_byte"] == pytest.approx(some["loss"] * 205 / math.log(2) / 204)
    assert some["words"] is some["word_loss"] is some["word_perplexity"] is None

    for path in data.glob("*.bin"):  # without meta.json
        shutil.copy(path, tmp_path)
    without = evaluate(tmp_path / "model", tmp_path)
    assert without["loss"] == out["loss"]
    assert all(without[name] is None for name in ("words", "word_loss", "word_perplexity", "bytes", "bits_per_byte"))


def test_is_the_val_loss_of_training(data_dir, tmp_path):
    args = [*TRAIN, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_steps=5"]
    assert call("train_gpt2.py", *args).returncode == 0
    val_loss = metrics(tmp_path, "val")[-1]["val_loss"]
    whole = 2000 // T * T  # val_tokens, in whole windows
    out = json.loads(call("evaluate.py", tmp_path, "--device=cpu", f"--tokens={whole}").stdout.splitlines()[-1])
    assert (out["data_dir"], out["loss"]) == (str(data_dir), pytest.approx(val_loss, abs=1e-6))
    assert evaluate(tmp_path, data_dir, "--split=train")["loss"] < math.log(257)


def test_processes(data, tmp_path):
    save(tmp_path)
    args = ["--batch_size=4", "--stride=20"]  # 5 batches
    alone, shared = evaluate(tmp_path, data, *args), evaluate(tmp_path, data, *args, processes=2)
    assert shared.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-12)
    assert all(shared[name] == alone[name] for name in ("tokens", "bytes", "words"))


@pytest.mark.parametrize(("weight", "loss_is_null"), [(math.nan, True), (1e4, False)])
def test_what_is_not_finite_is_null(weight, loss_is_null, data, tmp_path):
    model = save(tmp_path)
    state = checkpoint.load(tmp_path / "ckpt_000001.pt")
    state["model"] = model.state_dict() | {"ln_f.weight": torch.full((32,), weight)}
    checkpoint.save(state, tmp_path, keep=0, best_step=None)
    out = evaluate(tmp_path, data)
    assert (out["loss"] is None) == (out["bits_per_byte"] is None) == loss_is_null
    assert out["perplexity"] is out["word_perplexity"] is None  # of a loss above 700 as well


def test_a_context_far_longer_than_the_data_costs_nothing(data, tmp_path):
    model = save(tmp_path, pos="rope", block_size=2**60)
    assert evaluate(tmp_path, data)["loss"] == pytest.approx(one_by_one(model, TOKENS, 2**60, 2**60), abs=1e-5)


def test_mistakes(data, tmp_path):
    def refused(message, *args):
        done = call("evaluate.py", "--device=cpu", *args)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr

    save(tmp_path)
    here = [f"--model={tmp_path}", f"--data_dir={data}"]
    refused("stride <= seq_len <= block_size, not 33, 32, 32", *here, "--stride=33")
    refused("stride <= seq_len <= block_size, not 33, 33, 32", *here, "--seq_len=33")
    refused("tokens = 0", *here, "--tokens=0")
    refused("split = 'test'", *here, "--split=test")
    refused("no train shards", *here, "--split=train")
    refused("nowhere", *here, "--data_dir=nowhere")
    refused("use --data_dir=DIR", f"--model={tmp_path}")  # weights that do not say on which data
    write_shard(tmp_path / "x_val_000000.bin", [1, 2, 320, 3])  # nothing but the ids themselves says so
    refused("321 ids", here[0], f"--data_dir={tmp_path}")
    for tokenizer, flags, message in (
        ("gpt2", {}, "trained with gpt2, but"),
        ("bytes", {"vocab_size": 200}, "257 ids"),
    ):
        save(tmp_path, tokenizer, **flags)
        refused(message, *here)
