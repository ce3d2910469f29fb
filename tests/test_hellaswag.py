import contextlib
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
    "relu2 untied qk-norm": dict(pos="rope", norm="rmsnorm", mlp="relu2", qk_norm=True, tie_weights=False),
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
    file = tmp_path_factory.mktemp("hellaswag") / "val.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory):
    model = make()
    state = {"step": 1, "model": model.state_dict(), "gpt_config": vars(model.config), "tokenizer": "bytes"}
    return checkpoint.save(state, tmp_path_factory.mktemp("run"), keep=0, best_step=None)


@torch.no_grad()
def one_by_one(model, rows):
    """The definition: every ending behind its context, alone. Summed losses (n, 4), acc and acc_norm."""
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
def test_equals_one_ending_at_a_time(flags, rows, path):
    model = make(**flags)
    losses, acc, acc_norm = one_by_one(model, rows)
    assert acc != acc_norm  # so that neither can pass for the other
    examples = hellaswag.load(path, BYTES, 64)
    for max_tokens in (1, 200, 10**6):
        ours = hellaswag.ending_losses(model, examples, max_tokens, World("cpu"), EAGER)
        assert abs(ours - losses).max() < 1e-4
        assert hellaswag.score(model, examples, max_tokens, World("cpu"), EAGER) == (acc, acc_norm, len(rows))


class Rank:
    """Stands in for one process of several: its sums are its own."""

    def __init__(self, rank, size):
        self.rank, self.size, self.is_main, self.sum = rank, size, rank == 0, list


@pytest.mark.parametrize("size", [2, 3, 8])
def test_any_number_of_processes(size, path):
    model = make()
    examples = hellaswag.load(path, BYTES, 64)
    assert len(hellaswag.make_batches(examples, 200)) % size  # the last round is short
    whole = hellaswag.ending_losses(model, examples, 200, World("cpu"), EAGER)
    forwards, parts = [], []
    model.wte.register_forward_hook(lambda *_: forwards.append(rank))
    for rank in range(size):
        parts.append(hellaswag.ending_losses(model, examples, 200, Rank(rank, size), EAGER))
    assert np.array_equal(sum(parts), whole)  # to the bit: batches are the same
    assert len({forwards.count(rank) for rank in range(size)}) == 1  # a sharded model would hang otherwise


def test_a_context_is_computed_once_and_logits_only_of_endings(rows, path):
    model = make()
    examples = hellaswag.load(path, BYTES, 64)
    read, predicted = [], []
    model.wte.register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    model.lm_head.register_forward_hook(lambda module, args, out: predicted.append(len(args[0])))
    hellaswag.ending_losses(model, examples, 1, World("cpu"), EAGER)
    endings = [len((" " + ending).encode()) for row in rows for ending in row["endings"]]
    assert sum(predicted) == sum(endings)
    assert sum(read) == sum(len(example.context) for example in examples) + sum(endings) - len(endings)
    for batch in hellaswag.make_batches(examples, 300):
        assert len(batch) == 1 or len(batch) * max(hellaswag.row_length(examples[i]) for i in batch) <= 300


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


def test_as_a_user_runs_it(rows, path, checkpoint_path, monkeypatch):
    _, acc, acc_norm = one_by_one(make(), rows)
    want = {"model": str(checkpoint_path), "acc": acc, "acc_norm": acc_norm, "n": len(rows)}
    args = [f"--model={checkpoint_path}", f"--data={path}", "--device=cpu"]
    for more in ([], ["--batch_size=50"]):
        done = call("hellaswag.py", *args, *more)
        assert json.loads(done.stdout.splitlines()[-1]) == want, done.stderr
    done = call("hellaswag.py", *args, "--batch_size=1", processes=3)
    assert json.loads(done.stdout.splitlines()[-1]) == want, done.stderr
    monkeypatch.setenv("HOME", str(path.parent))
    home = call("hellaswag.py", args[0], f"--data=~/{path.name}", "--device=cpu")
    assert json.loads(home.stdout.splitlines()[-1]) == want, home.stderr
    few = json.loads(call("hellaswag.py", *args, "--limit=5").stdout)
    assert (few["n"], few["acc"]) == (5, one_by_one(make(), rows[:5])[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ctx": "a", "endi', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"label": ' + "9" * 5000 + "}", "not JSON"),
        ('["ctx"]', "'ctx'"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"]}', "'label'"),
        ('{"ctx": "a", "endings": ["a", "b", "c"], "label": 0}', "4"),
        ('{"ctx": "a", "endings": ["a", "b", "c", 4], "label": 0}', "4"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 4}', "label is 4"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": "1"}', "label is '1'"),
        ('{"ctx": "", "endings": ["a", "b", "c", "d"], "label": 1}', "ctx"),
        (json.dumps({"ctx": "a", "endings": ["a", "b", "c", "d" * 64], "label": 1}), "65 tokens"),
    ],
)
def test_a_bad_line_is_named(line, message, path, tmp_path, checkpoint_path):
    bad = tmp_path / "bad.jsonl"
    good = path.read_text().splitlines()[0]
    bad.write_text(f"{good}\n{line}\n{good}\n")
    done = call("hellaswag.py", f"--model={checkpoint_path}", f"--data={bad}", "--device=cpu")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{bad}:2: " in done.stderr
    assert message in done.stderr
    assert call("hellaswag.py", f"--model={checkpoint_path}", f"--data={bad}", "--limit=1").returncode == 0


def test_other_mistakes(path, tmp_path, checkpoint_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "latin1.jsonl").write_bytes(b'{"ctx": "caf\xe9"}\n')
    state = checkpoint.load(checkpoint_path) | {"tokenizer": None}
    unknown = checkpoint.save(state, tmp_path, keep=0, best_step=None)
    for args in (
        [f"--data={tmp_path / 'missing.jsonl'}"],
        [f"--data={tmp_path / 'empty.jsonl'}"],
        [f"--data={tmp_path / 'latin1.jsonl'}"],
        [f"--data={path}", "--limit=0"],
        [f"--data={path}", f"--model={unknown}"],
    ):
        done = call("hellaswag.py", f"--model={checkpoint_path}", "--device=cpu", *args)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), args


def test_download(path, tmp_path, monkeypatch):
    """Once, and whole or not at all."""
    monkeypatch.chdir(tmp_path)
    data, asked = path.read_bytes(), []

    def get(url, **kwargs):
        asked.append(url)
        response = requests.Response()
        response.status_code, response._content = 200, data
        return response

    def refuse(url, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", refuse)
    with pytest.raises(UserError, match="ConnectionError"):
        hellaswag.download()
    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(UserError, match="sha256"):
        hellaswag.download()
    assert not list(tmp_path.rglob("*.*"))
    monkeypatch.setattr(hellaswag, "SHA256", hellaswag.hashlib.sha256(data).hexdigest())
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda fd: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        with pytest.raises(UserError, match=r"hellaswag_val.jsonl: No space left"):
            hellaswag.load(None, BYTES, 64)
    assert not list(tmp_path.rglob("*.*"))
    asked.pop()
    for _ in range(2):
        examples = hellaswag.load(None, BYTES, 64)
    assert asked == [hellaswag.URL] * 2  # the refused one, and one more
    assert examples == hellaswag.load(path, BYTES, 64)
    assert [file.name for file in tmp_path.rglob("*.*")] == ["hellaswag_val.jsonl"]
    (tmp_path / hellaswag.VAL_FILE).write_bytes(data[:-9])
    with pytest.raises(UserError, match=r"hellaswag_val.jsonl.*sha256"):
        hellaswag.download()


def test_attention_is_not_cudnns(path, cudnn):
    hellaswag.score(make(), hellaswag.load(path, BYTES, 64), 1000, World("cpu"), EAGER)
    assert set(cudnn) == {False}
