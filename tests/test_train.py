"""The training script, end to end."""

import dataclasses
import json
import math
import re
import shutil

import conftest
import pytest
import requests
import torch
from conftest import MODEL, ROOT, TRAIN, call, cut, disk_full_at, events, metrics, refused, run, write_shard

import checkpoint
import hellaswag
import report
import train_gpt2
from dataloader import Windows, step_windows
from model import GPT, GPTConfig
from train_gpt2 import TrainConfig


def train(data_dir, out_dir, *args, **kwargs):
    return call("train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *TRAIN, *args, **kwargs)


def losses(out_dir):
    return {r["step"]: r["loss"] for r in metrics(out_dir, "train")}


@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory):
    """One run of 20 steps that others are compared with; float32, one process, micro-batches of 2.

    Its 63 validation windows do not fill the last batch.
    """
    out = tmp_path_factory.mktemp("runs") / "straight"
    done = train(
        data_dir, out, "--max_steps=20", "--keep_checkpoints=0", "--checkpoint_interval=10", "--val_tokens=2016"
    )
    assert done.returncode == 0, done.stderr
    return out, done


# ---- What a run computes


def test_the_loop_against_one_written_by_hand(data_dir, straight):
    """Same data, model and steps in a dozen lines of plain torch: the recorded numbers are what they claim to be."""
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    windows = Windows(str(data_dir), "train", 32)
    x, y = Windows(str(data_dir), "val", 32).read(range(63))
    with torch.no_grad():
        val = {0: model(x, y).item()}
    for step, record in enumerate(metrics(straight[0], "train"), start=1):
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
        assert (record["step"], record["tokens"]) == (step, 256 * step)
        assert record["lr"] == pytest.approx(lr)
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert {r["step"]: r["val_loss"] for r in metrics(straight[0], "val")} == pytest.approx(
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
    times = [record["time"] for record in metrics(out, "train")]
    assert times == sorted(times)
    assert header["time"][:19] <= times[0].removesuffix("+00:00") < "3"
    state = torch.load(out / "ckpt_000020.pt", weights_only=True)
    assert {"model", "step", "gpt_config", "config", "tokenizer", "optimizer", "scaler", "best"} <= set(state)
    assert (state["step"], state["tokenizer"]) == (20, "bytes")
    GPT(GPTConfig(**state["gpt_config"])).load_state_dict(state["model"])  # clean names
    line = r"step +20/20 \| loss \d\.\d{4} \| lr \d\.\d\de-\d\d \| norm \d\.\d{4} \| "
    assert re.search(line + r"[\d.]+ ms \| [\d,]+ tok/s \| eta 0:00:00", done.stdout)
    assert "\nstep: 256 tokens = 4 x 1 x 2 x 32 (micro-batches, " in done.stdout
    line = r"step +20/20 \| val loss \d\.\d{4} \| word loss [\d.]+ \| "
    assert re.search(line + r"\d\.\d{4} bits per byte \| after 0:00 h\n", done.stdout)
    assert losses(out)[20] < losses(out)[1] - 1


SHARED = [
    "--total_batch_size=512", "--max_steps=6", "--checkpoint_interval=4", "--keep_checkpoints=0", "--grad_clip=0.5",
    "--val_interval=1", "--n_embd=30",  # which 4 processes do not share out evenly
]  # fmt: skip
SPEEDRUN = [
    "--optimizer=muon", "--embed_lr=0.01", "--value_embeds=1", "--embed_norm=True", "--tie_weights=False",
    "--head_bias=True", "--logit_softcap=15", "--average=0.5", "--even_units=True",
]  # fmt: skip


def assert_same(out, want, atol=0.0):
    """Two runs have the same records, weights and optimizer states; muon's updates are rounded to bfloat16."""
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("val", "val_loss")):
        ours, theirs = ([record[name] for record in metrics(folder, kind)] for folder in (out, want))
        assert len(ours) == len(theirs) > 5
        assert ours == pytest.approx(theirs, rel=0, abs=atol), name
    a, b = (torch.load(folder / "ckpt_000006.pt", weights_only=True) for folder in (out, want))
    a, b = (state["optimizer"] | {"": state["model"]} for state in (a, b))
    assert a.keys() == b.keys()
    for name, tensors in b.items():
        assert a[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.allclose(a[name][key], tensor, rtol=0, atol=10 * atol), (name, key)


@pytest.mark.parametrize(("options", "processes"), [(["--optimizer=adamw"], 2), (SPEEDRUN, 4)])
def test_sharded_over_processes_it_computes_the_same(data_dir, tmp_path, options, processes):
    alone, sharded, resumed, whole = (tmp_path / name for name in ("alone", "sharded", "resumed", "whole"))
    flags = [*options, *SHARED]
    memory = ["--activation_checkpointing=True", "--chunked_loss=True"] if processes == 4 else []
    sample = ["--sample_interval=1000"] if processes == 2 else []  # of the untrained weights, and at the end
    assert train(data_dir, alone, *flags, *sample).returncode == 0
    done = train(data_dir, sharded, *flags, *sample, "--parallel=fsdp", *memory, processes=processes)
    assert done.returncode == 0, done.stderr
    assert_same(sharded, alone, atol=1e-4)
    assert [r["text"] for r in metrics(sharded, "sample")] == [r["text"] for r in metrics(alone, "sample")]
    for out in (resumed, whole):  # sharded to the same bits, or on one process
        cut(sharded, out, 4)
    done = train(data_dir, resumed, *flags, "--resume=True", "--sample_interval=0", processes=processes)
    assert done.returncode == 0, done.stderr
    assert_same(resumed, sharded)
    assert train(data_dir, whole, *flags, "--resume=True", "--parallel=ddp").returncode == 0
    assert_same(whole, alone, atol=1e-4)


def test_resume_on_three_processes_equals_a_straight_run(data_dir, tmp_path):
    """To the bit: with three summands their order matters, and DDP's changes after its first backward pass."""
    a, b = tmp_path / "a", tmp_path / "b"
    flags = ["--total_batch_size=192", "--checkpoint_interval=4", "--keep_checkpoints=0", "--max_steps=16"]
    flags += ["--optimizer=muon"]  # whose matrices are shared out
    assert train(data_dir, a, *flags, processes=3).returncode == 0
    cut(a, b, 4)
    assert train(data_dir, b, *flags, "--resume=True", processes=3).returncode == 0
    assert losses(b) == losses(a)
    x, y = (torch.load(p / "ckpt_000016.pt", weights_only=True)["model"] for p in (a, b))
    assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize(("dropout", "different"), [(0.0, 1), (0.5, 4)])
def test_dropout_differs_from_step_to_step(tmp_path, cudnn, dropout, different):
    """The same single window and a learning rate of 0: only what is dropped can change the loss."""
    write_shard(tmp_path / "x_train_000001.bin", range(33))
    flags = ["--batch_size=1", "--total_batch_size=32", "--val_interval=0", "--max_steps=4", "--vocab_size=64"]
    assert train(tmp_path, tmp_path, *flags, "--learning_rate=0", "--min_lr=0", f"--dropout={dropout}").returncode == 0
    assert len(set(losses(tmp_path).values())) == different
    assert cudnn == [not dropout] * 4  # whether its attention may be cuDNN's, which has no dropout
    assert torch.compiler.config.cache_key_tag.startswith(f"cudnn={not dropout}")


def test_the_average_is_what_is_measured_and_saved(data_dir, tmp_path):
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
    assert val < metrics(tmp_path / "without", "val")[-1]["val_loss"]  # at a learning rate this high


# ---- How long it is, and what happens between its steps


def test_max_hours_ends_a_run_in_order(data_dir, tmp_path):
    """Counted over all launches of a run: more hours continue it."""
    out, flags = tmp_path / "run", ["--max_steps=2000", "--resume=True"]
    assert train(data_dir, out, *flags, "--max_hours=1e-9").returncode == 0
    assert [record["step"] for record in metrics(out, "val")] == [0, 1]
    assert events(out) == [("done", 1)]
    seconds = metrics(out, "train")[-1]["seconds"]
    assert "this run is done, at step 1" in train(data_dir, out, *flags).stdout
    done = train(data_dir, out, *flags, f"--max_hours={(seconds + 0.05) / 3600}")
    assert done.returncode == 0, done.stderr
    assert 1 < metrics(out, "train")[-1]["step"] < 2000
    assert metrics(out, "train")[-1]["seconds"] > seconds + 0.05


def test_a_target_ends_a_run_and_a_lower_one_continues_it(data_dir, tmp_path):
    out, flags = tmp_path / "run", ["--max_steps=60", "--resume=True"]
    assert train(data_dir, out, *flags, "--target_loss=4.5").returncode == 0
    last = metrics(out, "train")[-1]["step"]
    assert 1 < last < 60
    assert [step for step, loss in losses(out).items() if loss < 4.5] == [last]
    assert (out / f"ckpt_{last:06d}.pt").exists()
    assert (metrics(out, "val")[-1]["step"], metrics(out, "event")[-1]["ended_by"]) == (last, "target_loss")
    assert "is done" in train(data_dir, out, *flags, "--target_loss=4.5").stdout
    assert train(data_dir, out, *flags, "--target_loss=4.0").returncode == 0
    assert last < metrics(out, "train")[-1]["step"] < 60


def test_patience(data_dir, tmp_path, monkeypatch):
    """Evaluations without a new low are counted over all launches of a run; more patience goes on."""
    values = {0: 5.0, 2: 4.0, 4: 4.5, 6: 3.9, 8: 4.0, 10: 3.95, 12: 3.9, 14: 3.0, 16: 4.0, 18: 4.0, 20: 4.0}
    evaluated = []

    def evaluate(run):
        [step] = [int(p["step"].item()) for p in list(run.optimizers[0].state.values())[:1]] or [0]
        evaluated.append(step)
        return values[step]

    monkeypatch.setattr(train_gpt2, "evaluate", evaluate)
    flags = ["--max_steps=20", "--val_interval=2", "--checkpoint_interval=1", "--keep_checkpoints=0"]
    flags += ["--log_interval=100"]
    a, b = tmp_path / "a", tmp_path / "b"
    done = train(data_dir, a, *flags, "--patience=3")
    assert done.returncode == 0, done.stderr
    assert evaluated == [0, 2, 4, 6, 8, 10, 12]
    assert metrics(a, "event")[-1]["ended_by"] == "patience"
    assert list(losses(a)) == [1, 12]  # the last step always has a record
    assert "this run is done, at step 12" in train(data_dir, a, *flags, "--resume=True").stdout
    cut(a, b, 8)  # died behind the first evaluation without a new low
    assert train(data_dir, b, *flags, "--patience=3", "--resume=True").returncode == 0
    assert metrics(b, "val") == metrics(a, "val")
    assert train(data_dir, b, *flags, "--patience=4", "--resume=True").returncode == 0
    assert metrics(b, "val")[-1]["step"] == 20


def test_the_best_checkpoint_is_kept(data_dir, tmp_path, monkeypatch):
    """Of those that were saved: the save of the very best step fails, and from then on the best is another."""
    val_losses = iter([4.0, 3.0, 1.0, 2.0, 2.5])  # at steps 0, 2, 4, 6 and 8
    monkeypatch.setattr(train_gpt2, "evaluate", lambda run: next(val_losses))
    monkeypatch.setattr(checkpoint, "save", disk_full_at([4]))
    flags = ["--max_steps=8", "--val_interval=2", "--checkpoint_interval=2", "--keep_checkpoints=1"]
    out = tmp_path / "run"
    done = train(data_dir, out, *flags)
    assert (done.returncode, done.stdout.count("NOT SAVED at step 4")) == (0, 1)
    assert [checkpoint.step_of(path) for path in checkpoint.find(out)] == [8, 6]
    assert torch.load(out / "ckpt_000008.pt")["best"] == {"step": 6, "val_loss": 2.0}
    assert "its best checkpoint has val loss 2.0000 at step 6; --best=True" in done.stdout
    best = ["--best=True", "--start=the", "--max_new_tokens=1"]
    assert call("sample.py", out, *best).returncode == 0
    (out / "ckpt_000006.pt").unlink()
    assert refused(call("sample.py", out, *best), "ckpt_000006.pt")


def test_epochs_a_step_of_one_micro_batch_and_a_long_warmup(data_dir, tmp_path):
    """And no validation: then patience, which small.py sets, does not apply."""
    flags = ["--epochs=0.01", "--total_batch_size=None", "--warmup_steps=100", "--resume=True"]
    flags += ["--val_interval=0", "--patience=1"]
    done = train(data_dir, tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    steps, last = int(0.01 * len(Windows(str(data_dir), "train", 32)) / 2), metrics(tmp_path / "run", "train")[-1]
    assert (last["step"], last["tokens"]) == (steps, steps * 2 * 32)
    assert f"\nwarmup_steps = 100 outlasts the run, which ends at step {steps}\n" in done.stdout
    again = train(data_dir, tmp_path / "run", *flags)  # what None became is what the run had
    assert (again.returncode, "is done" in again.stdout) == (0, True)


@pytest.fixture
def few_examples(tmp_path, monkeypatch):
    """In place of HellaSwag's validation set, which would have to be downloaded."""
    rows = [
        {"ctx": "the fox " * (i % 3 + 1), "endings": ["tea", "a dog", "jumps", "x" * (i + 1)], "label": i % 4}
        for i in range(9)
    ]
    path, load = tmp_path / "few.jsonl", hellaswag.load
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(hellaswag, "load", lambda data, *rest: load(data or str(path), *rest))
    return path


def test_evaluations_leave_the_run_undisturbed(data_dir, few_examples, tmp_path):
    """With dropout, so that a model left in eval() or a generator that was used would show."""
    flags = ["--max_steps=7", "--dropout=0.3"]
    often = ["--hellaswag_interval=3", "--sample_interval=2", "--sample_start=the ", "--val_interval=3"]
    assert train(data_dir, tmp_path / "never", *flags, "--val_interval=0").returncode == 0
    done = train(data_dir, tmp_path / "often", *flags, *often)
    assert done.returncode == 0, done.stderr
    assert "HellaSwag acc" in done.stdout
    assert losses(tmp_path / "often") == losses(tmp_path / "never")
    samples, scores = metrics(tmp_path / "often", "sample"), metrics(tmp_path / "often", "hellaswag")
    assert [s["step"] for s in samples] == [0, 2, 4, 6, 7]
    assert [(s["step"], s["n"]) for s in scores] == [(0, 9), (3, 9), (6, 9), (7, 9)]
    last = call("hellaswag.py", f"--model={tmp_path / 'often'}", f"--data={few_examples}", "--device=cpu")
    result = json.loads(last.stdout.splitlines()[-1])
    assert (result["acc"], result["acc_norm"]) == (scores[-1]["acc"], scores[-1]["acc_norm"])
    how = ["--start=the ", "--max_new_tokens=200", "--device=cpu", "--dtype=float32"]
    done = call("sample.py", f"--model={tmp_path / 'often'}", *how)
    assert done.stdout == samples[-1]["text"] + "\n"


def test_hellaswag_that_cannot_be_had(data_dir, tmp_path, monkeypatch):
    """Without a network a run goes on without it, and says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(requests, "get", lambda *args, **kwargs: (_ for _ in ()).throw(requests.ConnectionError()))
    done = train(data_dir, tmp_path / "run", "--max_steps=1", "--hellaswag_interval=1")
    assert (done.returncode, "\nno HellaSwag in this run: " in done.stdout) == (0, True)
    assert events(tmp_path / "run") == [("no hellaswag", 0), ("done", 1)]


def test_weights_that_cannot_speak_end_no_run(data_dir, tmp_path, monkeypatch):
    hidden = GPT.hidden
    spoiled = lambda self, *args: hidden(self, *args) * (1 if self.training else math.nan)  # noqa: E731
    monkeypatch.setattr(GPT, "hidden", spoiled)
    done = train(data_dir, tmp_path / "run", "--max_steps=2", "--sample_interval=2", "--val_interval=0")
    assert done.returncode == 0, done.stderr
    assert events(tmp_path / "run") == [("no sample", 0), ("no sample", 2), ("done", 2)]
    assert metrics(tmp_path / "run", "sample") == []


# ---- What it starts from


def test_init_from_another_run_and_resume_as_that_model(data_dir, straight, tmp_path):
    flags = ["--max_steps=1", f"--init_from={straight[0]}", "--val_tokens=2016"]
    done = train(data_dir, tmp_path / "a", *flags)
    assert done.returncode == 0, done.stderr
    first, last = metrics(tmp_path / "a", "val")[0], metrics(straight[0], "val")[-1]
    assert first["val_loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    done = train(data_dir, tmp_path / "b", *flags, "--vocab_size=300", "--dropout=0.1")
    assert done.returncode == 0, done.stderr
    done = call("train_gpt2.py", f"--out_dir={tmp_path / 'b'}", "--resume=True", "--max_steps=2")  # as it was shaped
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "b" / "ckpt_000002.pt", weights_only=True)
    assert [state["gpt_config"][name] for name in ("n_layer", "dropout", "vocab_size")] == [2, 0.1, 300]
    assert refused(train(data_dir, tmp_path / "c", *flags, "--n_layer=3"), "n_layer")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch_size=3"], "not a multiple of batch_size 3 x seq_len 32 x 1 processes = 96"),
        (["--seq_len=64"], "block_size"),
        (["--val_tokens=10"], "val_tokens"),
        (["--vocab_size=100"], "vocab_size"),
        (["--data_dir=data/stdlib"], "python fineweb.py config/data/stdlib.py"),
        (["--init_from=nowhere"], "nowhere"),
        (["--device=cuda:99"], "cuda"),
        (["--epochs=0.0001"], "less than one step"),
        (["--max_steps=0"], "max_steps"),
        (["--out_dir="], "out_dir"),
        (["--parallel=fsdp", "--optimizer=adafactor"], "adafactor"),
        (["--log_to=tensorboard"], "wandb"),
        (["--max_hours=0"], "max_hours"),
    ],
)
def test_mistakes_are_one_line_and_status_2(data_dir, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    assert refused(train(data_dir, tmp_path / "run", *flags), said)
    assert not (tmp_path / "run").exists()


def test_a_run_has_at_most_70_options():
    assert len(dataclasses.fields(TrainConfig)) + len(dataclasses.fields(GPTConfig)) <= 70


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_on_two_threads(data_dir, few_examples, tmp_path):
    """With evaluations: the losses of an eager run, and resumed the same bits. (Compiled for a CPU, threads would add
    up the embedding's gradient in any order, but for deterministic mode.)"""
    flags = ["--max_steps=8", "--n_layer=1", "--batch_size=16", "--total_batch_size=1024"]
    often = ["--hellaswag_interval=3", "--sample_interval=4", "--checkpoint_interval=4", "--keep_checkpoints=0"]
    eager, whole, resumed = (tmp_path / name for name in ("eager", "whole", "resumed"))
    assert train(data_dir, eager, *flags).returncode == 0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.set_num_threads(2)
    try:
        done = train(data_dir, whole, *flags, *often, "--compile=True")
        # Training and validation are compiled once each: an example, or a last batch, of another shape would be more.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
        again = train(data_dir, cut(whole, resumed, 4), *flags, *often, "--compile=True", "--resume=True")
    finally:
        torch.set_num_threads(1)
    assert (done.returncode, again.returncode) == (0, 0), done.stderr + again.stderr
    assert losses(whole) == pytest.approx(losses(eager), abs=1e-4)
    for kind in ("val", "hellaswag", "sample"):
        assert metrics(resumed, kind) == metrics(whole, kind)
    a, b = (torch.load(out / "ckpt_000008.pt", weights_only=True)["model"] for out in (whole, resumed))
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(a[name], b[name]) and "_orig_mod" not in name for name in a | b)


CUDA_IS_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.09"


def test_out_of_memory_is_one_line_and_the_run_goes_on(data_dir, tmp_path, monkeypatch):
    forward = GPT.forward

    def full(self, idx, *args):
        if len(idx) > 1 and self.training:
            raise torch.OutOfMemoryError(CUDA_IS_FULL)
        return forward(self, idx, *args)

    monkeypatch.setattr(GPT, "forward", full)
    done = train(data_dir, tmp_path / "run", "--max_steps=2")
    assert refused(done, "out of memory (2.00 GiB more", "--batch_size")
    done = call("train_gpt2.py", f"--out_dir={tmp_path / 'run'}", "--resume=True", "--batch_size=1")
    assert done.returncode == 0, done.stderr
    assert list(losses(tmp_path / "run")) == [1, 2]


# ---- As a user runs it


def test_as_a_user_runs_it(data_dir, tmp_path):
    """From a shell, in any folder, with a config file and a flag; its report at the end too."""
    (tmp_path / "mine.py").write_text("".join(f"{flag[2:]}\n" for flag in MODEL) + "device = 'cpu'\ncompile = False\n")
    flags = ["--batch_size=2", "--total_batch_size=64", "--max_steps=1", "--val_interval=0", f"--data_dir={data_dir}"]
    done = run("train_gpt2.py", "mine.py", *flags, "--out_dir=a run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a run" / "ckpt_000001.pt").exists()
    assert done.stdout.endswith("\nreport: a run/report.md\ndone; next: python sample.py 'a run'\n")
    assert (tmp_path / "a run" / "report.md").read_text().startswith("# a run")


def test_a_report_that_a_run_did_not_get_is_made_by_the_same_command(data_dir, tmp_path, monkeypatch):
    """Not if it has one; anew if the run has gone on since."""
    monkeypatch.setattr(train_gpt2, "write_report", conftest.write_report)
    out, written = tmp_path / "run", []

    def write(runs, out_dir):
        if not written:
            written.append("killed")
            raise OSError(28, "No space left on device")
        written.append(runs[0].last("step"))
        (out / "report.md").write_text("report")
        return out / "report.md"

    monkeypatch.setattr(report, "write", write)
    flags = ["--resume=True", "--val_interval=0"]
    done = train(data_dir, out, *flags, "--max_steps=1")
    assert (done.returncode, "no report: [Errno 28] No space left" in done.stdout) == (0, True)
    for steps in (1, 1, 2, 2):
        assert train(data_dir, out, *flags, f"--max_steps={steps}").returncode == 0
    assert written == ["killed", 1, 2]
    assert "is done" in train(data_dir, out, *flags, "--max_steps=2").stdout
