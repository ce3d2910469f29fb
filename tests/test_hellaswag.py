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
from test_evaluate import MODELS, save

import hellaswag
from configurator import UserError
from distributed import World
from tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")
HOW = World("cpu"), contextlib.nullcontext()
RNG = random.Random(5)
# Contexts from one letter to more than block_size; endings of one token to 24.
WORDS = "a bee can dig <|endoftext|> gnü hill".split()
LETTERS = ["A", *(" ".join(RNG.choices(WORDS, k=k)) for k in (1, 2, 5, 9, 14, 20))]
ROWS = [
    {"ctx": text, "label": RNG.randrange(4), "endings": ["", *("xyz "[: RNG.randint(1, 4)] * 5 + i for i in "012")]}
    for text in LETTERS * 2
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """With blank lines, as editors and downloads leave them."""
    file = tmp_path_factory.mktemp("hellaswag") / "val.jsonl"
    file.write_text("\n" + "".join(json.dumps(row) + "\n" for row in ROWS) + "\n \n")
    return file


@torch.no_grad()
def one_by_one(model):
    """Summed losses (n, 4), acc and acc_norm."""
    losses, right, right_norm = [], 0, 0
    for row in ROWS:
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
    return np.array(losses), right / len(ROWS), right_norm / len(ROWS)


@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS.keys())
def test_equals_one_ending_at_a_time(flags, path, tmp_path, cudnn):
    model = save(tmp_path, block_size=64, **flags)
    losses, acc, acc_norm = one_by_one(model)
    assert acc != acc_norm  # so that neither can pass for the other
    examples = hellaswag.load(path, BYTES, 64)
    cudnn.clear()
    for max_tokens in (1, 200, 10**6):
        assert abs(hellaswag.ending_losses(model, examples, max_tokens, *HOW) - losses).max() < 1e-4
        assert hellaswag.score(model, examples, max_tokens, *HOW) == (acc, acc_norm, len(ROWS))
    assert set(cudnn) == {False}  # it would make a plan for every new shape


def test_a_context_is_computed_once_and_logits_only_of_endings(path, tmp_path):
    model, examples, read, predicted = save(tmp_path, block_size=64), hellaswag.load(path, BYTES, 64), [], []
    model.wte.register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    model.lm_head.register_forward_hook(lambda module, args, out: predicted.append(len(args[0])))
    hellaswag.ending_losses(model, examples, 1, *HOW)
    endings = [len((" " + ending).encode()) for row in ROWS for ending in row["endings"]]
    assert sum(predicted) == sum(endings)
    assert sum(read) == sum(len(example.context) for example in examples) + sum(endings) - len(endings)
    batches = hellaswag.make_batches(examples, 300)
    assert sorted(i for batch in batches for i in batch) == list(range(len(ROWS)))
    assert all(len(b) == 1 or len(b) * max(hellaswag.row_length(examples[i]) for i in b) <= 300 for b in batches)
    assert len(batches) < len(ROWS)
    assert hellaswag.score(model, examples, 1, *HOW, stop=read) is None  # as by a signal


def test_training_is_not_disturbed(path, tmp_path):
    model, compilations = save(tmp_path, block_size=64, dropout=0.1).train(), []

    def backend(module, inputs):
        compilations.append(1)
        return module.forward

    model.compile(backend=backend)
    idx = torch.zeros(2, 16, dtype=torch.int64)
    model(idx, idx).backward()
    compiled, state = len(compilations), torch.get_rng_state()
    assert compiled
    examples = hellaswag.load(path, BYTES, 64)
    scores = [hellaswag.score(model, examples, n, *HOW) for n in (100, 1000)]
    assert scores[0] == scores[1]  # no dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    model(idx, idx).backward()
    assert len(compilations) == compiled
    hellaswag.score(model.eval(), examples, 1000, *HOW)
    assert not model.training


def test_as_a_user_runs_it(path, tmp_path):
    _, acc, acc_norm = one_by_one(save(tmp_path, block_size=64))
    args = [f"--model={tmp_path}", f"--data={path}", "--device=cpu", "--batch_size=1"]
    for more in ({}, {"processes": 3}):
        done = call("hellaswag.py", *args, **more)
        said = json.loads(done.stdout.splitlines()[-1])
        assert (said["acc"], said["acc_norm"], said["n"]) == (acc, acc_norm, len(ROWS)), done.stderr
    assert json.loads(call("hellaswag.py", *args, "--limit=5").stdout)["n"] == 5


def test_mistakes(path, tmp_path):
    def refused(message, data, *args):
        done = call("hellaswag.py", f"--model={tmp_path}", "--device=cpu", f"--data={data}", *args)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr

    save(tmp_path, block_size=64)
    bad, good = tmp_path / "bad.jsonl", json.dumps(ROWS[0])
    row = {"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 0}
    for line in (
        '{"ctx": "a", "endi', "[]", "{}", row | {"endings": ["a", "b", "c"]}, row | {"endings": ["a", "b", "c", 4]},
        row | {"label": 4}, row | {"label": "1"}, row | {"ctx": ""}, row | {"endings": ["a", "b", "c", "d" * 64]},
    ):  # fmt: skip
        bad.write_text(f"{good}\n\n{line if isinstance(line, str) else json.dumps(line)}\n{good}\n")
        refused(f"{bad}:3: not an example of HellaSwag: ", bad)
        assert len(hellaswag.load(bad, BYTES, 64, limit=1)) == 1
    bad.write_text("\n")
    refused("bad.jsonl: no examples", bad)
    refused("missing.jsonl: No such file", tmp_path / "missing.jsonl")
    refused(f"{tmp_path}: Is a directory", tmp_path)
    refused("limit = 0", path, "--limit=0")
    save(tmp_path, tokenizer=None, block_size=64)
    refused("tokenizer", path)


def test_download(path, tmp_path, monkeypatch):
    """Once, and whole or not at all."""
    monkeypatch.chdir(tmp_path)
    asked, answer = [], requests.Response()
    answer.status_code, answer._content = 404, path.read_bytes()

    def fails(message):
        with pytest.raises(UserError, match=f"data/hellaswag/hellaswag_val.jsonl: .*{message}"):
            hellaswag.load(None, BYTES, 64)
        assert not list(tmp_path.rglob("*.*"))

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/x")
    fails("invalid path: /x; put there what https")
    monkeypatch.setattr(requests, "get", lambda url, **kwargs: asked.append(url) or answer)
    fails("404")
    answer.status_code = 200
    fails("sha256")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda fd: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        fails("No space left")
    for _ in range(2):
        assert hellaswag.load(None, BYTES, 64) == hellaswag.load(path, BYTES, 64)
    assert asked == [hellaswag.URL] * 4  # the last time it was there
    (tmp_path / "data/hellaswag/hellaswag_val.jsonl").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"hellaswag_val.jsonl.*sha256"):
        hellaswag.load(None, BYTES, 64)
