"""hellaswag.py beside its definition: every ending behind its context, alone."""

import contextlib
import hashlib
import json
import os
import random

import numpy as np
import pytest
import requests
import torch
from conftest import call

import checkpoint
import hellaswag
from configurator import UserError
from distributed import World
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")
EAGER = contextlib.nullcontext()
MODELS = {
    "gpt2": dict(),
    "modern": dict(pos="rope", norm="rmsnorm", mlp="swiglu"),
    "relu2": dict(pos="rope", norm="rmsnorm", mlp="relu2", qk_norm=True, tie_weights=False),
}


def make(**flags):
    """Random weights, large enough that what is attended to matters; the vocabulary is padded from 257 to 320."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=32, **flags))
    for p in model.parameters():
        p.data *= 5 if p.dim() == 2 else 1
    return model.eval()


@pytest.fixture(scope="module")
def rows():
    """Texts of all lengths: from one letter to more than block_size; endings of one token to 24."""
    rng = random.Random(0)
    words = "a bee can dig every fig <|endoftext|> gnü hill".split()
    texts = ["A", *(" ".join(rng.choices(words, k=k)) for k in (1, 2, 3, 5, 9, 14, 20, 3, 5, 4, 7))]
    return [
        {"ctx": text, "label": rng.randrange(4), "endings": ["", *("xyz "[: rng.randint(1, 4)] * 5 + i for i in "012")]}
        for text in texts
    ]


@pytest.fixture(scope="module")
def path(rows, tmp_path_factory):
    """With blank lines, as editors and downloads leave them."""
    file = tmp_path_factory.mktemp("hellaswag") / "val.jsonl"
    file.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows) + "\n \n")
    return file


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory):
    model = make()
    state = {"step": 1, "model": model.state_dict(), "gpt_config": vars(model.config), "tokenizer": "bytes"}
    return checkpoint.save(state, tmp_path_factory.mktemp("run"), keep=0, best_step=None)


@torch.no_grad()
def one_by_one(model, rows):
    """Summed losses (n, 4), acc and acc_norm."""
    losses, right, right_norm = [], 0, 0
    for row in rows:
        ctx = list(row["ctx"].encode())
        endings = [list((" " + ending).encode()) for ending in row["endings"]]
        ctx = ctx[-(64 + 1 - max(map(len, endings))) :]
        sums = []
        for ending in endings:
            logp = model(torch.tensor([ctx + ending])[:, :-1])[0].log_softmax(-1)
            sums.append(-sum(logp[len(ctx) - 1 + i, token].item() for i, token in enumerate(ending)))
        means = [total / len(ending) for total, ending in zip(sums, endings, strict=True)]
        losses.append(sums)
        right += sums.index(min(sums)) == row["label"]
        right_norm += means.index(min(means)) == row["label"]
    return np.array(losses), right / len(rows), right_norm / len(rows)


@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS.keys())
def test_equals_one_ending_at_a_time(flags, rows, path, cudnn):
    model = make(**flags)
    losses, acc, acc_norm = one_by_one(model, rows)
    assert acc != acc_norm  # so that neither can pass for the other
    examples = hellaswag.load(path, BYTES, 64)
    cudnn.clear()
    for max_tokens in (1, 200, 10**6):
        ours = hellaswag.ending_losses(model, examples, max_tokens, World("cpu"), EAGER)
        assert abs(ours - losses).max() < 1e-4
        assert hellaswag.score(model, examples, max_tokens, World("cpu"), EAGER) == (acc, acc_norm, len(rows))
    assert set(cudnn) == {False}  # it would make a plan for every new shape


class Rank:
    """Stands in for one process of several: its sums are its own."""

    def __init__(self, rank, size):
        self.rank, self.size, self.is_main, self.sum = rank, size, rank == 0, list


@pytest.mark.parametrize("size", [2, 8])
def test_the_ranks_share_the_examples(size, path):
    model, examples = make(), hellaswag.load(path, BYTES, 64)
    whole = hellaswag.ending_losses(model, examples, 200, World("cpu"), EAGER)
    parts = [hellaswag.ending_losses(model, examples, 200, Rank(rank, size), EAGER) for rank in range(size)]
    assert np.array_equal(sum(parts), whole)  # to the bit: batches are the same
    assert all((part > 0).any(axis=1).sum() < len(examples) for part in parts)


def test_a_stop_breaks_it_off(path):
    model, examples, stop = make(), hellaswag.load(path, BYTES, 64), []
    model.wte.register_forward_hook(lambda *_: stop.append(1))
    assert hellaswag.score(model, examples, 1, World("cpu"), EAGER, stop=stop) is None
    assert len(stop) == 1


def test_a_context_is_computed_once_and_logits_only_of_endings(rows, path):
    model, examples, read, predicted = make(), hellaswag.load(path, BYTES, 64), [], []
    model.wte.register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    model.lm_head.register_forward_hook(lambda module, args, out: predicted.append(len(args[0])))
    hellaswag.ending_losses(model, examples, 1, World("cpu"), EAGER)
    endings = [len((" " + ending).encode()) for row in rows for ending in row["endings"]]
    assert sum(predicted) == sum(endings)
    assert sum(read) == sum(len(example.context) for example in examples) + sum(endings) - len(endings)
    batches = hellaswag.make_batches(examples, 300)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(hellaswag.row_length(examples[i]) for i in batch) <= 300
    assert len(batches) < len(rows) / 2


def test_training_is_not_disturbed(path):
    model, compilations = make(dropout=0.1).train(), []

    def backend(module, inputs):
        compilations.append(1)
        return module.forward

    model.compile(backend=backend)
    idx = torch.zeros(2, 16, dtype=torch.int64)
    model(idx, idx).backward()
    compiled, state = len(compilations), torch.get_rng_state()
    assert compiled
    examples = hellaswag.load(path, BYTES, 64)
    scores = [hellaswag.score(model, examples, n, World("cpu"), EAGER) for n in (100, 1000)]
    assert scores[0] == scores[1]  # no dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    model(idx, idx).backward()
    assert len(compilations) == compiled
    hellaswag.score(model.eval(), examples, 1000, World("cpu"), EAGER)
    assert not model.training


def test_as_a_user_runs_it(rows, path, checkpoint_path):
    _, acc, acc_norm = one_by_one(make(), rows)
    want = {"model": str(checkpoint_path), "acc": acc, "acc_norm": acc_norm, "n": len(rows)}
    args = [f"--model={checkpoint_path}", f"--data={path}", "--device=cpu"]
    for more in ({}, {"processes": 3}):
        done = call("hellaswag.py", *args, "--batch_size=1", **more)
        assert json.loads(done.stdout.splitlines()[-1]) == want, done.stderr
    few = json.loads(call("hellaswag.py", *args, "--limit=5").stdout)
    assert (few["n"], few["acc"]) == (5, one_by_one(make(), rows[:5])[1])


def test_mistakes(path, tmp_path, checkpoint_path):
    def refused(message, data, *args):
        done = call("hellaswag.py", f"--model={checkpoint_path}", "--device=cpu", f"--data={data}", *args)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr

    bad, good = tmp_path / "bad.jsonl", path.read_bytes().splitlines()[1]
    four = {"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 0}
    for line, message in (
        (b'{"ctx": "a", "endi', "JSON"),
        (b'{"ctx": "caf\xe9"}', "utf-8"),
        (b'["ctx"]', "TypeError"),
        (json.dumps({"ctx": "a", "endings": four["endings"]}).encode(), "'label'"),
        (json.dumps(four | {"endings": ["a", "b", "c"]}).encode(), "four endings"),
        (json.dumps(four | {"endings": ["a", "b", "c", 4]}).encode(), "TypeError"),
        (json.dumps(four | {"label": 4}).encode(), "label"),
        (json.dumps(four | {"label": "1"}).encode(), "label"),
        (json.dumps(four | {"ctx": ""}).encode(), "ctx"),
        (json.dumps(four | {"endings": ["a", "b", "c", "d" * 64]}).encode(), "64 tokens"),
    ):
        bad.write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
        refused(message, bad)
        refused(f"{bad}:3: not an example", bad)
        assert hellaswag.load(bad, BYTES, 64, limit=1) == hellaswag.load(path, BYTES, 64, limit=1)
    (tmp_path / "empty.jsonl").write_text("\n")
    refused("empty.jsonl: no examples", tmp_path / "empty.jsonl")
    refused("missing.jsonl: No such file", tmp_path / "missing.jsonl")
    refused(f"{tmp_path}: Is a directory", tmp_path)
    refused("limit = 0", path, "--limit=0")
    state = checkpoint.load(checkpoint_path) | {"tokenizer": None}
    unknown = checkpoint.save(state, tmp_path, keep=0, best_step=None)
    refused("tokenizer", path, f"--model={unknown}")


def test_download(path, tmp_path, monkeypatch):
    """Once, and whole or not at all."""
    monkeypatch.chdir(tmp_path)
    data, asked, answer = path.read_bytes(), [], requests.Response()
    answer.status_code, answer._content = 404, data

    def get(url, **kwargs):
        asked.append(url)
        return answer

    for name, message in (("/x", "TLS CA certificate bundle.*/x"), ("", "get|HTTPS|resolve")):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", name)
        monkeypatch.setattr(hellaswag, "URL", "https://localhost:1/x")
        with pytest.raises(UserError, match=rf"hellaswag_val.jsonl: .*({message}).*put there what https"):
            hellaswag.load(None, BYTES, 64)
    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(UserError, match="404"):
        hellaswag.load(None, BYTES, 64)
    answer.status_code = 200
    with pytest.raises(UserError, match="sha256"):
        hellaswag.load(None, BYTES, 64)
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(data).hexdigest())
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda fd: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        with pytest.raises(UserError, match=r"hellaswag_val.jsonl: No space left"):
            hellaswag.load(None, BYTES, 64)
    assert not list(tmp_path.rglob("*.*"))
    asked.clear()
    for _ in range(2):
        assert hellaswag.load(None, BYTES, 64) == hellaswag.load(path, BYTES, 64)
    assert asked == [hellaswag.URL]
    assert [file.name for file in tmp_path.rglob("*.*")] == ["hellaswag_val.jsonl"]
    (tmp_path / hellaswag.VAL_FILE).write_bytes(data[:-9])
    with pytest.raises(UserError, match=r"hellaswag_val.jsonl.*sha256"):
        hellaswag.load(None, BYTES, 64)


def test_the_validation_set_is_the_one_that_others_use():
    assert hellaswag.VAL_FILE == "data/hellaswag/hellaswag_val.jsonl"
    assert hellaswag.SHA256 == "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
