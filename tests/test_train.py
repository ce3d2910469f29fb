"""The training script, end to end."""

import contextlib
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import MODEL, ROOT, TRAIN, call, metrics, run, write_shard

from configurator import configure
from dataloader import Windows, step_windows
from distributed import World
from model import GPT, GPTConfig
from train_gpt2 import TrainConfig, evaluate

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def train(data_dir, out_dir, *args, processes=None):
    args = [f"--data_dir={data_dir}", f"--out_dir={out_dir}", *TRAIN, *args]
    return call("train_gpt2.py", *args, processes=processes)


def losses(out_dir):
    return {r["step"]: r["loss"] for r in metrics(out_dir, "train")}


@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory):
    """One run of 20 steps that others are compared with; float32, one process, micro-batches of 2."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    done = train(data_dir, out, "--max_steps=20", "--keep_checkpoints=0", "--checkpoint_interval=10")
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_loop_against_one_written_by_hand(data_dir, straight):
    """Same data, model and steps in a dozen lines of plain torch: the recorded numbers are what they claim to be."""
    out, _ = straight
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    windows = Windows(str(data_dir), "train", 32)
    x, y = Windows(str(data_dir), "val", 32).read(range(2000 // 32))
    with torch.no_grad():
        val = {0: model(x, y).item()}
    for step, record in enumerate(metrics(out, "train"), start=1):
        loss = model(*windows.read(step_windows(step, 8, len(windows), 1337)))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = 3e-3 * step / 2 if step <= 2 else 6e-5 + (3e-3 - 6e-5) / 2 * (1 + math.cos(math.pi * (step - 3) / 18))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            val[step] = model(x, y).item()
        assert record["step"] == step
        assert record["tokens"] == 256 * step
        assert record["lr"] == pytest.approx(lr)
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert {r["step"]: r["val_loss"] for r in metrics(out, "val")} == pytest.approx(
        {s: val[s] for s in (0, 5, 10, 15, 20)}, abs=1e-5
    )


def test_what_a_run_leaves(data_dir, straight):
    out, done = straight
    assert sorted(p.name for p in out.iterdir()) == ["ckpt_000010.pt", "ckpt_000020.pt", "metrics.jsonl"]
    (header,) = metrics(out, "run")
    assert header["config"]["learning_rate"] == 3e-3
    assert header["gpt_config"]["vocab_size"] == 257  # the data's, as none was given
    assert header["parameters"] == sum(p.numel() for p in GPT(GPTConfig(**header["gpt_config"])).parameters())
    assert header["world_size"] == 1
    assert all(r["mfu"] is None for r in metrics(out, "train"))  # no guess for an unknown card
    state = torch.load(out / "ckpt_000020.pt", weights_only=True)
    assert {"model", "step", "gpt_config", "config", "tokenizer", "optimizers", "scaler", "best"} <= set(state)
    assert (state["step"], state["tokenizer"]) == (20, "bytes")
    GPT(GPTConfig(**state["gpt_config"])).load_state_dict(state["model"])  # clean names
    line = r"step +20/20 \| loss \d\.\d{4} \| lr \d\.\d\de-\d\d \| norm \d\.\d{4} \| "
    assert re.search(line + r"[\d.]+ ms \| [\d,]+ tok/s \| eta 0:00:00", done.stdout)
    assert f"\nfirst an evaluation, on {2000 // 32} windows\nstep     0/20 | val loss" in done.stdout
    losses_ = losses(out)
    assert losses_[20] < losses_[1] - 1


@pytest.mark.parametrize(("processes", "batch_size"), [(None, 1), (None, 8), (4, 2)])
def test_same_losses_on_any_number_of_processes(data_dir, straight, tmp_path, processes, batch_size):
    done = train(data_dir, tmp_path / "run", "--max_steps=20", f"--batch_size={batch_size}", processes=processes)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(straight[0]), abs=1e-4)
    for have, want in zip(metrics(tmp_path / "run", "val"), metrics(straight[0], "val"), strict=True):
        # At step 0 the weights are the same to the bit, so only the order of the sums differs.
        assert have["val_loss"] == pytest.approx(want["val_loss"], abs=1e-4 if have["step"] else 1e-6)
    assert len(metrics(tmp_path / "run", "run")) == 1  # rank 0 alone writes


def test_max_hours_ends_a_run_in_order(data_dir, tmp_path):
    """Counted over all lives of a run: more hours continue it."""
    out, flags = tmp_path / "run", ["--max_steps=2000", "--resume=True"]
    assert train(data_dir, out, *flags, "--max_hours=1e-9").returncode == 0
    assert [record["step"] for record in metrics(out, "val")] == [0, 1]
    assert metrics(out, "event")[-1]["event"] == "done"
    seconds = metrics(out, "train")[-1]["seconds"]
    assert "this run is done, at step 1" in train(data_dir, out, *flags).stdout
    done = train(data_dir, out, *flags, f"--max_hours={(seconds + 0.05) / 3600}")
    assert done.returncode == 0, done.stderr
    assert 1 < metrics(out, "train")[-1]["step"] < 2000
    assert metrics(out, "train")[-1]["seconds"] > seconds + 0.05


def test_options_that_save_memory_give_the_same_losses(data_dir, straight, tmp_path):
    options = "--activation_checkpointing=True", "--chunked_loss=True"
    done = train(data_dir, tmp_path / "run", "--max_steps=20", *options)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(straight[0]), abs=1e-4)


def test_resume_on_three_processes_equals_a_straight_run(data_dir, tmp_path):
    """To the bit: with three summands their order matters, and DDP's changes after its first backward pass."""
    a, b = tmp_path / "a", tmp_path / "b"
    flags = ["--total_batch_size=192", "--checkpoint_interval=4", "--keep_checkpoints=0", "--max_steps=16"]
    flags += ["--optimizer=muon"]  # whose matrices are shared out
    assert train(data_dir, a, *flags, processes=3).returncode == 0
    b.mkdir()
    shutil.copy(a / "ckpt_000004.pt", b)
    shutil.copy(a / "metrics.jsonl", b)
    assert train(data_dir, b, *flags, "--resume=True", processes=3).returncode == 0
    assert losses(b) == losses(a)
    x, y = (torch.load(p / "ckpt_000016.pt", weights_only=True) for p in (a, b))
    for name in x["model"]:
        assert torch.equal(x["model"][name], y["model"][name]), name


SHARED = [
    "--total_batch_size=512", "--max_steps=6", "--checkpoint_interval=4", "--keep_checkpoints=0", "--grad_clip=0.5",
    "--val_interval=1", "--n_embd=30",  # which 4 processes do not share out evenly
]  # fmt: skip


def assert_same(out, want, atol=0.0):
    """Two runs have the same records, weights and optimizer states; muon's updates are rounded to bfloat16."""
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("val", "val_loss")):
        ours, theirs = ([record[name] for record in metrics(folder, kind)] for folder in (out, want))
        assert len(ours) == len(theirs) > 5
        assert ours == pytest.approx(theirs, rel=0, abs=atol), name
    a, b = (torch.load(folder / "ckpt_000006.pt", weights_only=True) for folder in (out, want))
    assert a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        assert torch.allclose(a["model"][name], b["model"][name], rtol=0, atol=10 * atol), name
    for ours, theirs in zip(a["optimizers"], b["optimizers"], strict=True):
        assert ours["state"].keys() == theirs["state"].keys()
        for number, state in theirs["state"].items():
            for name in state:
                assert torch.allclose(ours["state"][number][name], state[name], rtol=0, atol=10 * atol), (number, name)


SPEEDRUN = [
    "--optimizer=muon", "--embed_lr=0.01", "--value_embeds=1", "--embed_norm=True",
    "--tie_weights=False", "--head_bias=True", "--logit_softcap=15", "--average=0.5", "--even_units=True",
]  # fmt: skip


@pytest.mark.parametrize(("options", "processes"), [(["--optimizer=adamw"], 2), (SPEEDRUN, 4)])
def test_sharded_over_processes_it_computes_the_same(data_dir, tmp_path, options, processes):
    alone, sharded, resumed, whole = (tmp_path / name for name in ("alone", "sharded", "resumed", "whole"))
    flags = [*options, *SHARED]
    memory = ["--activation_checkpointing=True", "--chunked_loss=True"] if processes == 4 else []
    sample = (
        ["--sample_interval=1000", "--sample_tokens=40"] if processes == 2 else []
    )  # of the untrained weights, and at the end
    assert train(data_dir, alone, *flags, *sample).returncode == 0
    done = train(data_dir, sharded, *flags, *sample, "--parallel=fsdp", *memory, processes=processes)
    assert done.returncode == 0, done.stderr
    assert_same(sharded, alone, atol=1e-4)
    assert [r["text"] for r in metrics(sharded, "sample")] == [r["text"] for r in metrics(alone, "sample")]
    for out in (resumed, whole):  # sharded to the same bits, or on one process
        out.mkdir()
        shutil.copy(sharded / "ckpt_000004.pt", out)
        shutil.copy(sharded / "metrics.jsonl", out)
    done = train(data_dir, resumed, *flags, "--resume=True", "--sample_interval=0", processes=processes)
    assert done.returncode == 0, done.stderr
    assert_same(resumed, sharded)
    assert train(data_dir, whole, *flags, "--resume=True", "--parallel=ddp").returncode == 0
    assert_same(whole, alone, atol=1e-4)


def test_resume_without_a_whole_checkpoint(data_dir, tmp_path):
    out = tmp_path / "run"
    assert train(data_dir, out, "--max_steps=2", "--resume=True").returncode == 0  # none at all: a fresh start
    (out / "ckpt_000002.pt").write_bytes(b"half")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    done = train(data_dir, out, "--max_steps=2", "--resume=True")
    assert done.returncode == 2
    assert "no whole checkpoint" in done.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_run_is_never_overwritten(data_dir, straight):
    before = {p.name: p.read_bytes() for p in straight[0].iterdir()}
    done = train(data_dir, straight[0], "--max_steps=20")
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert {p.name: p.read_bytes() for p in straight[0].iterdir()} == before


def test_targets_end_a_run(data_dir, tmp_path):
    for flag in ("--target_loss=4.5", "--target_val_loss=4.5"):
        out = tmp_path / flag.strip("-")
        assert train(data_dir, out, "--max_steps=500", flag).returncode == 0
        last = metrics(out, "train")[-1]["step"]
        assert 1 < last < 500
        assert (out / f"ckpt_{last:06d}.pt").exists()
        assert metrics(out, "val")[-1]["step"] == last
        if flag.startswith("--target_loss"):
            below = [step for step, loss in losses(out).items() if loss < 4.5]
            assert below == [last]
        else:
            assert metrics(out, "val")[-1]["val_loss"] < 4.5 <= metrics(out, "val")[-2]["val_loss"]
        again = train(data_dir, out, "--max_steps=500", flag, "--resume=True")
        assert (again.returncode, "is done" in again.stdout) == (0, True)


def test_the_last_step_is_always_recorded(data_dir, tmp_path):
    flags = ["--log_interval=100", "--max_steps=500", "--target_val_loss=5.4", "--val_interval=3"]
    assert train(data_dir, tmp_path / "run", *flags).returncode == 0
    steps = [r["step"] for r in metrics(tmp_path / "run", "train")]
    assert steps == [1, metrics(tmp_path / "run", "val")[-1]["step"]]
    assert steps[1] % 100


def test_the_best_checkpoint_is_kept(data_dir, tmp_path):
    """Of those that were saved; with a rate this high the val loss soon rises again."""
    flags = ["--max_steps=16", "--val_interval=2", "--checkpoint_interval=4", "--keep_checkpoints=1"]
    done = train(data_dir, tmp_path / "run", *flags, "--learning_rate=1.0", "--schedule=constant")
    assert done.returncode == 0, done.stderr
    val = {r["step"]: r["val_loss"] for r in metrics(tmp_path / "run", "val") if r["step"] in (4, 8, 12, 16)}
    best = min(val, key=val.get)
    assert best < 16
    assert {p.name for p in (tmp_path / "run").glob("*.pt")} == {f"ckpt_{best:06d}.pt", "ckpt_000016.pt"}
    assert f"lowest val loss of its checkpoints: {val[best]:.4f} at step {best}; --best=True" in done.stdout
    for flags, step in (([], 16), (["--best=True"], best)):
        done = call("evaluate.py", tmp_path / "run", *flags, "--tokens=1984")  # on its own data
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["model"] == str(tmp_path / "run" / f"ckpt_{step:06d}.pt")
        assert told["loss"] == pytest.approx(val[step], rel=1e-5)
    done = call("evaluate.py", tmp_path / "run" / "ckpt_000016.pt", "--best=True")
    assert (done.returncode, "is for a run's folder" in done.stderr) == (2, True)
    (tmp_path / "run" / f"ckpt_{best:06d}.pt").unlink()
    done = call("sample.py", tmp_path / "run", "--best=True")
    assert (done.returncode, "leave out --best=True" in done.stderr) == (2, True)


def test_the_average_is_what_is_judged_and_saved(data_dir, tmp_path):
    """And the weights that are trained are those of a run without it."""
    flags = ["--max_steps=20", "--checkpoint_interval=20", "--learning_rate=0.02", "--schedule=constant"]
    for name, part in (("without", 0.0), ("with", 0.4)):
        assert train(data_dir, tmp_path / name, *flags, f"--average={part}").returncode == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    a, b = (torch.load(tmp_path / name / "ckpt_000020.pt", weights_only=True) for name in ("with", "without"))
    assert b["training_weights"] is None
    for name, weight in b["model"].items():
        assert torch.equal(a["training_weights"][name], weight), name
        assert not torch.equal(a["model"][name], weight), name
    val = metrics(tmp_path / "with", "val")[-1]["val_loss"]
    assert val < metrics(tmp_path / "without", "val")[-1]["val_loss"]  # at a rate this high
    done = call("evaluate.py", tmp_path / "with", "--tokens=1984")
    assert json.loads(done.stdout.splitlines()[-1])["loss"] == pytest.approx(val, rel=1e-5)


def test_a_longer_run_keeps_the_evaluation_of_its_first_end(data_dir, tmp_path):
    for steps in (7, 10):
        assert train(data_dir, tmp_path / "run", f"--max_steps={steps}", "--resume=True").returncode == 0
    assert [r["step"] for r in metrics(tmp_path / "run", "val")] == [0, 5, 7, 10]


def test_epochs(data_dir, tmp_path):
    done = train(data_dir, tmp_path / "run", "--epochs=0.2", "--val_interval=0")
    assert done.returncode == 0, done.stderr
    n = len(Windows(str(data_dir), "train", 32))
    assert metrics(tmp_path / "run", "train")[-1]["step"] == int(0.2 * n / 8)


def test_warmup_fraction_and_a_step_of_one_micro_batch(data_dir, tmp_path):
    flags = [
        "--max_steps=10", "--warmup_steps=0.3", "--schedule=linear", "--min_lr=0", "--total_batch_size=None",
        "--val_interval=0", "--resume=True",
    ]  # fmt: skip
    assert train(data_dir, tmp_path / "run", *flags).returncode == 0
    rates = [record["lr"] / 3e-3 for record in metrics(tmp_path / "run", "train")]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, *(1 - i / 7 for i in range(7))])
    assert metrics(tmp_path / "run", "train")[-1]["tokens"] == 10 * 2 * 32
    again = train(data_dir, tmp_path / "run", *flags)  # what None became is what the run had
    assert again.returncode == 0
    assert "done" in again.stdout


def test_word_loss_of_the_whole_split(data_dir, tmp_path):
    done = train(data_dir, tmp_path / "run", "--max_steps=1", "--val_tokens=1e6")
    [_, val] = metrics(tmp_path / "run", "val")
    meta = json.loads((data_dir / "meta.json").read_text())
    assert val["word_loss"] == pytest.approx(val["val_loss"] * (meta["val_tokens"] - 1) / (meta["val_words"] - 1))
    assert f"word loss {val['word_loss']:.4f}" in done.stdout
    theirs = json.loads(
        call("evaluate.py", f"--model={tmp_path}/run", f"--data_dir={data_dir}").stdout.splitlines()[-1]
    )
    assert val["word_loss"] == pytest.approx(theirs["word_loss"], rel=1e-2)  # which has the tail of the split too
    done = train(data_dir, tmp_path / "part", "--max_steps=1", "--val_tokens=640")
    assert metrics(tmp_path / "part", "val")[-1]["word_loss"] is None
    assert "word loss" not in done.stdout


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.name)
def test_configs(path):
    config, gpt_config, given = configure(TrainConfig, GPTConfig, argv=[str(path)])
    assert {"out_dir", "data_dir"} <= given.keys()
    T = config.seq_len or gpt_config.block_size
    assert (config.total_batch_size or 0) % (config.batch_size * T) == 0


def test_evaluation_and_samples_leave_the_run_undisturbed(data_dir, tmp_path):
    """With dropout, so that a model left in eval() or a generator that was used would show."""
    flags = ["--max_steps=12", "--dropout=0.3"]
    often = ["--sample_interval=4", "--sample_start=the ", "--val_interval=3"]
    assert train(data_dir, tmp_path / "often", *flags, *often).returncode == 0
    assert train(data_dir, tmp_path / "never", *flags, "--val_interval=0").returncode == 0
    samples = metrics(tmp_path / "often", "sample")
    assert [s["step"] for s in samples] == [0, 4, 8, 12]
    assert all(s["text"].startswith("the ") for s in samples)
    assert losses(tmp_path / "often") == losses(tmp_path / "never")


def test_options_of_samples(data_dir, tmp_path):
    """What sample.py makes of the same weights with the same options; greedy ones are all alike."""
    flags = ["--max_steps=3", "--sample_interval=3", "--sample_start=the ", "--sample_tokens=9"]
    for name, options in (
        ("two", dict(num=2, temperature=0.9, top_k=5)),
        ("greedy", dict(num=2, temperature=0.0, top_k=None)),
    ):
        out, given = tmp_path / name, [f"--sample_{option}={value}" for option, value in options.items()]
        assert train(data_dir, out, *flags, *given).returncode == 0
        texts = [record["text"] for record in metrics(out, "sample") if record["step"] == 3]
        same = [
            f"--temperature={options['temperature']}",
            f"--top_k={options['top_k']}",
            "--dtype=float32",
            "--device=cpu",
        ]
        done = call(
            "sample.py",
            f"--model={out}",
            "--start=the ",
            "--num_samples=2",
            "--max_new_tokens=9",
            "--device=cpu",
            *same,
        )
        assert done.stdout == "\n---\n".join(texts) + "\n"
        assert (texts[0] == texts[1]) == (name == "greedy")
    for flag in ("--sample_temperature=1e-9", "--sample_top_k=0", "--sample_num=0", "--sample_tokens=0"):
        assert train(data_dir, tmp_path / "refused", flag).returncode == 2


@pytest.fixture(scope="module")
def hellaswag_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("hellaswag") / "few.jsonl"
    rows = [
        {"ctx": "the fox " * (i % 3 + 1), "endings": ["tea", "a dog", "jumps", "x" * (i + 1)], "label": i % 4}
        for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hellaswag_leaves_the_run_undisturbed(data_dir, hellaswag_data, tmp_path):
    flags = ["--max_steps=7", "--dropout=0.3"]
    often = ["--hellaswag_interval=3", f"--hellaswag_data={hellaswag_data}", "--sample_interval=2"]
    assert train(data_dir, tmp_path / "never", *flags).returncode == 0
    done = train(data_dir, tmp_path / "often", *flags, *often)
    assert done.returncode == 0, done.stderr
    assert "HellaSwag acc" in done.stdout
    assert losses(tmp_path / "often") == losses(tmp_path / "never")
    assert metrics(tmp_path / "often", "val") == metrics(tmp_path / "never", "val")
    scores = metrics(tmp_path / "often", "hellaswag")
    assert [(s["step"], s["n"]) for s in scores] == [(0, 9), (3, 9), (6, 9), (7, 9)]
    last = call("hellaswag.py", f"--model={tmp_path / 'often'}", f"--data={hellaswag_data}", "--device=cpu")
    result = json.loads(last.stdout.splitlines()[-1])
    assert (result["acc"], result["acc_norm"]) == (scores[-1]["acc"], scores[-1]["acc_norm"])


def test_hellaswag_that_cannot_be_had(data_dir, tmp_path, monkeypatch):
    """Without a network a run goes on without it, and says so; a file that was named must be right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(requests, "get", lambda *args, **kwargs: (_ for _ in ()).throw(requests.ConnectionError()))
    done = train(data_dir, tmp_path / "run", "--max_steps=1", "--hellaswag_interval=1")
    assert (done.returncode, "no HellaSwag in this run: https" in done.stdout) == (0, True)
    assert "--data=" not in done.stdout  # an option of hellaswag.py, which a run has not
    assert [e["event"] for e in metrics(tmp_path / "run", "event")] == ["no hellaswag", "done"]
    (tmp_path / "torn.jsonl").write_text('{"ctx": "a')
    done = train(data_dir, tmp_path / "b", "--hellaswag_interval=1", "--hellaswag_data=torn.jsonl")
    assert (done.returncode, done.stderr.count("\n"), "torn.jsonl:1" in done.stderr) == (2, 1, True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_follows_float32(data_dir, straight, tmp_path, dtype):
    done = train(data_dir, tmp_path / "run", "--max_steps=20", f"--dtype={dtype}")
    assert done.returncode == 0, done.stderr
    ours = losses(tmp_path / "run")
    if dtype == "bfloat16":
        assert ours == pytest.approx(losses(straight[0]), abs=0.05)
        assert ours != losses(straight[0])
    else:  # the scaler may skip its first steps while it finds its scale
        assert ours[20] == pytest.approx(losses(straight[0])[20], abs=0.2)
        state = torch.load(tmp_path / "run" / "ckpt_000020.pt", weights_only=True)
        assert state["scaler"]["scale"] > 0


def test_init_from_another_run(data_dir, straight, tmp_path):
    out = straight[0]
    flags = ["--max_steps=1", f"--init_from={out}"]
    done = train(data_dir, tmp_path / "a", *flags)
    assert done.returncode == 0, done.stderr
    first, last = metrics(tmp_path / "a", "val")[0], metrics(out, "val")[-1]
    assert first["val_loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    done = train(data_dir, tmp_path / "b", *flags, "--vocab_size=300", "--block_size=16", "--dropout=0.1")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "b", "run")[0]["gpt_config"]["vocab_size"] == 300
    done = train(data_dir, tmp_path / "c", *flags, "--n_layer=3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "n_layer" in done.stderr
    assert not (tmp_path / "c").exists()


def test_a_step_without_a_finite_gradient_changes_nothing(data_dir, tmp_path, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def third_is_nan(*args):
        calls.append(clip(*args))
        return calls[-1] * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", third_is_nan)
    flags = ["--max_steps=4", "--checkpoint_interval=1", "--keep_checkpoints=0", "--optimizer=muon"]
    assert train(data_dir, tmp_path / "run", *flags).returncode == 0
    two, three, four = (torch.load(tmp_path / "run" / f"ckpt_00000{s}.pt")["model"] for s in (2, 3, 4))
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert not any(torch.equal(three[name], four[name]) for name in three)
    assert [e["step"] for e in metrics(tmp_path / "run", "event") if e["event"] == "skipped step"] == [3]


def test_dropout_differs_from_step_to_step(tmp_path):
    """The same single window and a rate of 0: only what is dropped can change the loss."""
    write_shard(tmp_path / "x_train_000001.bin", range(33))
    flags = ["--batch_size=1", "--total_batch_size=32", "--val_interval=0", "--max_steps=4", "--vocab_size=64"]
    flags += ["--learning_rate=0", "--min_lr=0"]
    for dropout, different in ((0.0, 1), (0.5, 4)):
        out = tmp_path / str(dropout)
        assert train(tmp_path, out, *flags, f"--dropout={dropout}").returncode == 0
        assert len(set(losses(out).values())) == different


def test_a_resumed_model_is_the_checkpoints(data_dir, straight, tmp_path):
    out = tmp_path / "run"
    assert train(data_dir, out, "--max_steps=1", f"--init_from={straight[0]}", "--dropout=0.1").returncode == 0
    flags = [f"--data_dir={data_dir}", f"--out_dir={out}", *TRAIN[len(MODEL) :], "--max_steps=2", "--resume=True"]
    assert call("train_gpt2.py", *flags).returncode == 0  # without a word of its shape
    state = torch.load(out / "ckpt_000002.pt", weights_only=True)
    assert (state["gpt_config"]["n_layer"], state["gpt_config"]["dropout"]) == (2, 0.1)
    done = call("train_gpt2.py", *flags, "--max_steps=3", "--n_layer=3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "n_layer" in done.stderr


def test_shards_without_meta(data_dir, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(data_dir, shards)
    (shards / "meta.json").unlink()
    done = train(shards, tmp_path / "run", "--max_steps=1", "--vocab_size=320")
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "run" / "ckpt_000001.pt", weights_only=True)["tokenizer"] is None
    done = train(shards, tmp_path / "other", "--max_steps=1", "--vocab_size=320", "--sample_interval=1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch_size=3"], "total_batch_size"),
        (["--seq_len=64"], "block_size"),
        (["--val_tokens=10"], "val_tokens"),
        (["--vocab_size=100"], "vocab_size"),
        (["--data_dir=nowhere"], "nowhere"),
        (["--init_from=nowhere"], "nowhere"),
        (["--device=cuda:99"], "cuda"),
        (["--device=gpu"], "device"),
        (["--epochs=0.0001"], "epochs"),
        (["--max_steps=0"], "max_steps"),
        (["--min_lr=1"], "min_lr"),
        (["--seed=-1"], "seed"),
        (["--learning_rate=-1"], "learning_rate"),
        (["--weight_decay=-0.1"], "weight_decay"),
        (["--grad_clip=-1"], "grad_clip"),
        (["--beta1=-0.1"], "beta1"),
        (["--beta2=1"], "beta2"),
        (["--schedule=wsd", "--decay_fraction=1.5"], "decay_fraction"),
        (["--epochs=1e300"], "epochs"),
        (["--out_dir="], "out_dir"),
        (["--target_val_loss=1", "--val_interval=0"], "target_val_loss"),
        (["--n_head=5"], "n_head"),
        (["config/gpt2_124n.py"], "gpt2_124m.py"),
        (["--learning_rat=1"], "learning_rate"),
    ],
)
def test_mistakes_are_one_line_and_status_2(data_dir, tmp_path, flags, said):
    done = train(data_dir, tmp_path / "run", *flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


@needs_compiler
def test_compiled_run_with_evaluations_equals_eager(data_dir, hellaswag_data, tmp_path):
    flags = ["--max_steps=6", "--n_layer=1", "--batch_size=8"]
    often = ["--hellaswag_interval=3", f"--hellaswag_data={hellaswag_data}", "--sample_interval=2"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    done = train(data_dir, tmp_path / "run", *flags, *often, "--compile=True")
    assert done.returncode == 0, done.stderr
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # training and validation, each once
    eager = train(data_dir, tmp_path / "eager", *flags)
    assert eager.returncode == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "eager"), abs=1e-4)
    assert not any(
        "_orig_mod" in name for name in torch.load(tmp_path / "run/ckpt_000006.pt", weights_only=True)["model"]
    )


def test_as_a_user_runs_it(data_dir, tmp_path):
    """From a shell, in any folder, with a config file and a flag."""
    (tmp_path / "mine.py").write_text("".join(f"{flag[2:]}\n" for flag in MODEL) + "device = 'cpu'\ncompile = False\n")
    flags = ["--batch_size=2", "--total_batch_size=64", "--max_steps=1", "--val_interval=0", f"--data_dir={data_dir}"]
    done = run("train_gpt2.py", "mine.py", *flags, "--out_dir=a run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a run" / "ckpt_000001.pt").exists()


def test_a_ragged_last_batch_has_the_shape_of_the_others(data_dir):
    """Another shape would be compiled anew, or computed without a compiler, which takes more memory."""
    windows = Windows(str(data_dir), "val", 32)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=1, n_embd=16))
    want, shapes, forward = model(*windows.read(range(10))).item(), set(), model.forward
    model.forward = lambda x, y: shapes.add((x.shape, y.shape)) or forward(x, y)
    start = SimpleNamespace(config=SimpleNamespace(batch_size=4, seq_len=32, val_tokens=10 * 32), val_data=windows)
    parts = dict(model=model, world=World("cpu"), autocast=contextlib.nullcontext(), stop=False)
    loss = evaluate(SimpleNamespace(start=start, **parts))
    assert shapes == {((4, 32), (4, 32))}
    assert loss == pytest.approx(want, abs=1e-6)


def test_compiles_by_itself_on_nvidia_gpus_only(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(GPT, "compile", lambda self: pytest.fail("compiled"))
    flags = [flag for flag in TRAIN if "compile" not in flag]
    args = f"--data_dir={data_dir}", "--max_steps=1"
    done = call("train_gpt2.py", *flags, *args, f"--out_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    with pytest.raises(pytest.fail.Exception):
        call("train_gpt2.py", *flags, *args, f"--out_dir={tmp_path / 'compiled'}", "--compile=True")


@pytest.mark.parametrize(
    ("flags", "on"),
    [([], False), (["--cudnn_attention=True"], True), (["--cudnn_attention=True", "--dropout=0.1"], False)],
)
def test_cudnn_attention_in_training(data_dir, tmp_path, cudnn, flags, on):
    done = train(data_dir, tmp_path / "run", "--max_steps=1", "--val_interval=0", *flags)
    assert done.returncode == 0, done.stderr
    assert set(cudnn) == {on}


def test_example_of_a_batch_is_two_tensors(data_dir, tmp_path, monkeypatch):
    """As every batch is: with one tensor twice the step is compiled for that, and then once more."""
    examples = []
    monkeypatch.setattr(World, "wrap", lambda self, model, *example, warm_up: examples.append(example) or model)
    assert train(data_dir, tmp_path / "run", "--max_steps=1").returncode == 0
    [(x, y)] = examples
    assert x.shape == y.shape == (2, 32)
    assert x.data_ptr() != y.data_ptr()
    assert x.stride() == y.stride() == (32, 1)


CUDA_IS_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.09"


CPU_IS_FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"


@pytest.mark.parametrize(
    ("kind", "text", "size"),
    [
        (torch.OutOfMemoryError, CUDA_IS_FULL, "(2.00 GiB more were wanted, of a card of 23.64 GiB)"),
        (RuntimeError, CPU_IS_FULL, "(8 bytes more"),
        (RuntimeError, CPU_IS_FULL.replace("can't allocate", "not enough"), "(8 bytes more"),
    ],
)
def test_out_of_memory_is_one_line_and_the_run_goes_on(data_dir, tmp_path, monkeypatch, kind, text, size):
    forward = GPT.forward

    def full(self, idx, *args):
        if len(idx) > 1 and self.training:
            raise kind(text)
        return forward(self, idx, *args)

    monkeypatch.setattr(GPT, "forward", full)
    done = train(data_dir, tmp_path / "run", *TRAIN, "--max_steps=2", "--chunked_loss=True")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"out of memory {size}" in done.stderr
    assert "at batch_size 2 x seq_len 32; use --batch_size=1 or --activation_checkpointing=True; with" in done.stderr
    done = call("train_gpt2.py", f"--out_dir={tmp_path / 'run'}", "--resume=True", "--batch_size=1")
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in metrics(tmp_path / "run", "train")] == [1, 2]


def test_one_process_out_of_memory_is_seen_before_the_run_begins(data_dir, tmp_path, monkeypatch):
    forward = GPT.forward

    def full(self, *args):
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError(CUDA_IS_FULL)
        return forward(self, *args)

    monkeypatch.setattr(GPT, "forward", full)
    flags = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", *TRAIN, "--max_steps=2"]
    done = call("train_gpt2.py", *flags, processes=2)
    assert done.returncode == 2
    assert "error: out of memory (2.00 GiB more" in done.stderr
    assert "resume" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
