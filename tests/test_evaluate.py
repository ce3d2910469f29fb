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
def tokens():
    return [token for text in TEXTS for token in (256, *text.encode())]


@pytest.fixture(scope="module")
def data(tokens, tmp_path_factory):
    """Three documents; the split is cut into two shards in the middle of the first."""
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "x_val_000000.bin", tokens[:101])
    write_shard(folder / "x_val_000001.bin", tokens[101:])
    meta = {"tokenizer": "bytes", "vocab_size": 257, "val_tokens": len(tokens)}
    meta |= {"val_words": sum(len(text.strip().split(" ")) for text in TEXTS)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


def evaluate(folder, data, *args):
    done = call("evaluate.py", f"--model={folder}", f"--data_dir={data}", "--device=cpu", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def one_by_one(model, tokens, seq_len, stride):
    """The definition: each token but the first alone, in the first window that has it. Mean loss in nats."""
    total = 0.0
    for target in range(1, len(tokens)):
        start = next(start for start in range(0, len(tokens), stride) if target <= start + seq_len)
        context = tokens[start:target]
        assert len(context) > min(target - 1, seq_len - stride)  # what a stride is for
        total -= model(torch.tensor([context]))[0, -1].log_softmax(-1)[tokens[target]].item()
    return total / (len(tokens) - 1)


MODELS = [
    dict(),
    dict(pos="rope", norm="rmsnorm", mlp="swiglu"),
    dict(pos="rope", norm="rmsnorm", mlp="relu2", qk_norm=True, tie_weights=False),
]


@pytest.mark.parametrize("flags", MODELS, ids=["gpt2", "modern", "relu2 untied qk-norm"])
def test_equals_a_token_at_a_time(flags, folder, data, tokens):
    model = save(folder, **flags)
    loss = one_by_one(model, tokens, T, T)
    for args in ([], ["--batch_size=1"], ["--batch_size=100"], [f"--stride={T}"]):
        out = evaluate(folder, data, *args)
        assert out["loss"] == pytest.approx(loss, abs=1e-5)
    assert out["tokens"] == len(tokens) - 1
    assert (out["seq_len"], out["stride"]) == (T, T)


@pytest.mark.parametrize(("seq_len", "stride"), [(32, 8), (32, 1), (20, 7), (16, 16)])
@pytest.mark.parametrize(
    "limit", [None, 192, 101, 5, 10**6]
)  # a multiple of some strides, a shard's end, less than one
def test_windows(seq_len, stride, limit, folder, data, tokens):
    model = save(folder)
    some = tokens[: limit and limit + 1]
    out = evaluate(folder, data, f"--seq_len={seq_len}", f"--stride={stride}", f"--tokens={limit}")
    assert out["loss"] == pytest.approx(one_by_one(model, some, seq_len, stride), abs=1e-5)
    assert out["tokens"] == len(some) - 1


def test_units(folder, data, tokens):
    save(folder)
    out = evaluate(folder, data)
    words = sum(len(text.strip().split(" ")) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (out["words"], out["bytes"]) == (words, size)
    nats = out["loss"] * (len(tokens) - 1)
    assert out["perplexity"] == pytest.approx(math.exp(out["loss"]))
    assert out["word_loss"] == pytest.approx(nats / (words - 1))
    assert out["word_perplexity"] == pytest.approx(math.exp(out["word_loss"]))
    assert out["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)

    some = evaluate(folder, data, "--tokens=205")  # up to the first letters of the second document
    size = len(bytes(token for token in tokens[1:206] if token < 256))
    assert size == 204
    assert (some["tokens"], some["bytes"]) == (205, size)
    assert some["bits_per_byte"] == pytest.approx(some["loss"] * 205 / math.log(2) / size)
    assert some["words"] is some["word_loss"] is some["word_perplexity"] is None


def test_without_meta(folder, data, tmp_path):
    save(folder)
    for path in data.glob("*.bin"):
        shutil.copy(path, tmp_path)
    with_meta, without = evaluate(folder, data), evaluate(folder, tmp_path)
    assert without["loss"] == with_meta["loss"]
    assert all(without[name] is None for name in ("words", "word_loss", "word_perplexity", "bytes", "bits_per_byte"))


def test_is_the_val_loss_of_training(data_dir, tmp_path):
    out = tmp_path / "run"
    args = [*TRAIN, f"--data_dir={data_dir}", f"--out_dir={out}", "--max_steps=5"]
    assert call("train_gpt2.py", *args).returncode == 0
    val = metrics(out, "val")[-1]
    whole = 2000 // T * T  # val_tokens, in whole windows
    assert evaluate(out, data_dir, f"--tokens={whole}")["loss"] == pytest.approx(val["val_loss"], abs=1e-6)
    assert evaluate(out, data_dir, "--split=train")["loss"] < math.log(257)


def test_processes(folder, data):
    save(folder)
    args = [f"--model={folder}", f"--data_dir={data}", "--device=cpu", "--batch_size=4", "--stride=20"]  # 5 batches
    done = call("evaluate.py", *args, processes=2)
    assert done.returncode == 0, done.stderr
    alone, shared = evaluate(folder, data, *args[3:]), json.loads(done.stdout.splitlines()[-1])
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-12)
    assert all(shared[name] == alone[name] for name in ("tokens", "bytes", "words"))


def test_not_a_number_is_null(folder, data):
    model = save(folder)
    state = checkpoint.load(folder / "ckpt_000001.pt")
    state["model"] = model.state_dict() | {"ln_f.weight": torch.full((32,), math.nan)}
    checkpoint.save(state, folder, keep=0, best_step=None)
    out = evaluate(folder, data)
    assert out["loss"] is out["perplexity"] is out["bits_per_byte"] is out["word_perplexity"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stride=33"], "stride = 33"),
        (["--seq_len=33"], "seq_len = 33"),
        (["--seq_len=8", "--stride=9"], "stride = 9"),
        (["--tokens=0"], "tokens = 0"),
        (["--split=train"], "no train shards"),
        (["--split=test"], "split = 'test'"),
        (["--data_dir=nowhere"], "nowhere"),
        (["--model=nowhere"], "nowhere"),
    ],
)
def test_mistakes(args, message, folder, data):
    save(folder)
    refused(message, f"--model={folder}", f"--data_dir={data}", *args)


def test_weights_that_do_not_say_on_which_data(folder):
    save(folder)
    refused("use --data_dir=DIR", folder)


def refused(message, *args):
    done = call("evaluate.py", "--device=cpu", *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


def test_data_that_is_not_the_models(folder, data, tmp_path):
    for tokenizer, flags, message in [
        ("gpt2", dict(), "trained with gpt2, but"),
        ('{"model": 1}', dict(), "not a byte-level BPE"),
        ("bytes", dict(vocab_size=200), "257 ids"),
    ]:
        save(folder, tokenizer, **flags)
        refused(message, f"--model={folder}", f"--data_dir={data}")
    save(folder)
    write_shard(tmp_path / "x_val_000000.bin", [1, 2, 320, 3])  # nothing but the ids themselves says so
    refused("321 ids", f"--model={folder}", f"--data_dir={tmp_path}")


def test_a_context_far_longer_than_the_data_costs_nothing(folder, data, tokens):
    model = save(folder, pos="rope", block_size=2**60)
    out = evaluate(folder, data)
    assert out["loss"] == pytest.approx(one_by_one(model, tokens, 2**60, 2**60), abs=1e-5)


def test_a_home_folder(folder, data, monkeypatch):
    save(folder)
    monkeypatch.setenv("HOME", str(data.parent))
    assert evaluate(folder, f"~/{data.name}")["data_dir"] == str(data)


def test_attention_is_not_cudnns(folder, data, cudnn):
    save(folder)
    evaluate(folder, data)
    assert set(cudnn) == {False}
