"""The benchmark: it must be the training step that it times, and put each part's time where it was spent."""

import json
import shutil
import subprocess
import time

import pytest
import torch
from conftest import MODEL, ROOT, TRAIN, call, metrics

import bench
from configurator import UserError
from optim import Untraced

FLAGS = [*MODEL, "--device=cpu", "--compile=False", "--batch_size=2", "--total_batch_size=256"]
PARTS = ["data", "forward", "backward", "waiting", "optimizer"]


def result_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_takes_the_steps_of_a_training_run(data_dir, tmp_path):
    flags = [f"--data_dir={data_dir}", *TRAIN, "--dropout=0.1", "--max_steps=6"]
    assert call("train_gpt2.py", *flags, f"--out_dir={tmp_path}/run").returncode == 0
    flags += [f"--out_dir={tmp_path}/bench", "--warmup=2", "--steps=4", f"--profile={tmp_path}/trace.json"]
    done = call("bench.py", *flags)
    result = result_of(done)
    assert result["losses"] == [record["loss"] for record in metrics(tmp_path / "run", "train")]
    assert not (tmp_path / "bench").exists()
    names = [event.get("name", "") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert sum("AdamW.step" in name for name in names) == 1  # one step more
    assert list(result["parts"]) == PARTS
    assert sum(result["parts"].values()) == pytest.approx(result["ms_mean"], rel=0.1)
    assert result["ms_min"] <= result["ms"] <= result["ms_max"]
    assert result["tokens_per_sec"] == pytest.approx(256 / result["ms"] * 1e3)
    assert result["mfu"] is None  # no guess for an unknown device
    assert 0.1 < result["peak_memory_gb"] <= result["reserved_memory_gb"] < 30
    assert (result["skipped"], result["world_size"], result["dtype"]) == (0, 1, "float32")
    assert result["gpt_config"]["vocab_size"] == 257  # the data's
    assert all(f"{part:>12} {ms:10.2f} ms" in done.stdout for part, ms in result["parts"].items())


@pytest.mark.parametrize(
    ("part", "owner", "name", "calls"),
    [
        ("forward", torch.nn.functional, "cross_entropy", 4),
        ("backward", torch.Tensor, "backward", 4),
        ("waiting", torch.nn.utils, "clip_grad_norm_", 1),
        ("optimizer", Untraced, "zero_grad", 1),
        ("data", bench, "next", 4),
    ],
)
def test_a_part_that_is_slower_shows_in_its_line(data_dir, monkeypatch, part, owner, name, calls):
    """And a slow start, building or in the first step, is no part of a step."""
    slow, build, now = getattr(owner, name, next), bench.build, [0.0]

    def slower(*args, **kwargs):
        now[0] += 0.2 / calls + (8 if now[0] == 50 else 0)  # the first step compiles
        return slow(*args, **kwargs)

    def slow_build(*args):
        now[0] += 50
        build(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])  # nothing else takes time
    monkeypatch.setattr(owner, name, slower, raising=False)
    monkeypatch.setattr(bench, "build", slow_build)
    result = result_of(call("bench.py", f"--data_dir={data_dir}", *FLAGS, "--steps=2", "--warmup=1"))
    assert {name: ms for name, ms in result["parts"].items() if ms} == {part: pytest.approx(200)}
    assert (result["setup_seconds"], result["ms"]) == (pytest.approx(58), pytest.approx(200))


def test_random_tokens_where_there_is_no_data(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("data_dir = 'data/nowhere'\nvocab_size = 300\nsample_interval = 1\npatience = 1")
    monkeypatch.chdir(tmp_path)
    for processes in (None, 2):
        done = call("bench.py", "mine.py", *FLAGS, "--steps=2", processes=processes)
        result = result_of(done)
        assert done.stdout.count("data/nowhere does not exist") == 1
        assert (result["world_size"], len(result["losses"])) == (processes or 1, 7)
        assert all(5 < loss < 6.5 for loss in result["losses"])  # ln 300 = 5.7
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    done = call("bench.py", *FLAGS, "--data_dir=data/nowhere")  # but where it was asked for by name
    assert (done.returncode, done.stderr.count("\n"), "data/nowhere" in done.stderr) == (2, 1, True)


def test_skipped_updates_are_counted(data_dir):
    flags = ["--learning_rate=1e30", "--warmup_steps=0", "--steps=3"]
    result = result_of(call("bench.py", f"--data_dir={data_dir}", *FLAGS, *flags))
    assert (result["skipped"], result["losses"][-1]) == (3, None)  # JSON has no NaN


def test_variants_in_turn(data_dir, tmp_path, monkeypatch):
    """Beside other options, one of which needs too much memory, and a commit with twice the loss."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    step = (tmp_path / "train_gpt2.py").read_text()
    twice_the_loss = step.replace("loss = run.wrapped(x, y) /", "loss = 2 * run.wrapped(x, y) /")
    (tmp_path / "train_gpt2.py").write_text(twice_the_loss)
    (tmp_path / "mine.py").write_text("n_layer = 1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "twice"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "train_gpt2.py").write_text(step)
    (tmp_path / "mine.py").write_text("n_layer = 2\nrope_base = 5.0")
    (tmp_path / "other.py").write_text("n_layer = 3")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as a git hook sets it
    output_of = bench.output_of

    def sooner(command):
        """This code in this process, which saves starting another."""
        if command[1] != str(tmp_path / "bench.py"):
            return output_of(command)
        done = call("bench.py", *command[2:])
        if done.returncode:
            raise UserError(done.stderr.strip().removeprefix("error: "))
        return done.stdout

    monkeypatch.setattr(bench, "output_of", sooner)
    args = ["mine.py", f"--data_dir={data_dir}", *MODEL[:1], *MODEL[2:], *FLAGS[4:], "--steps=2", "--warmup=1"]
    against = "--against=--mlp_hidden=9; --n_embd=500000 --n_head=1; other.py"
    done = call("bench.py", *args, against, "--compare=HEAD", "--rounds=1")
    result = result_of(done)
    assert list(result) == ["as given", "--mlp_hidden=9", "--n_embd=500000 --n_head=1", "other.py", "HEAD"]
    first, wider, too_large, other, twice = result.values()
    assert (first[0]["gpt_config"]["mlp_hidden"], wider[0]["gpt_config"]["mlp_hidden"]) == (None, 9)
    assert [x[0]["gpt_config"]["n_layer"] for x in (first, wider, other, twice)] == [2, 2, 3, 1]  # each its config file
    assert twice[0]["losses"][0] == pytest.approx(2 * first[0]["losses"][0], rel=0.1)
    bases = [x[0]["gpt_config"]["rope_base"] for x in (first, wider, other)]
    assert bases == [5, 5, 10000]  # and no file beside its own
    assert too_large == []
    rows = done.stdout.splitlines()[-6:-1]
    assert rows[2].startswith("--n_embd=500000 --n_head=1: out of memory (")
    ratio = wider[0]["tokens_per_sec"] / first[0]["tokens_per_sec"]
    memory = f"{wider[0]['tokens_per_sec']:,.0f} tok/s, {wider[0]['peak_memory_gb']:.2f} GB"
    assert rows[1] == f"--mlp_hidden=9: {memory}, {ratio:.3f} x as fast ({ratio:.3f} to {ratio:.3f})"
    done = call("bench.py", *args, "--batch_size=3", "--against=--n_layer=3")  # where no variant can be measured
    assert (done.returncode, done.stderr.count("\n"), "total_batch_size" in done.stderr) == (2, 1, True)


def test_mistakes_are_one_line_and_status_2():
    for flag, said in (
        ("--steps=0", "steps"), ("--warmup=-1", "warmup"), ("--compare=nowhere", "nowhere"), ("--step=1", "mean step"),
    ):  # fmt: skip
        done = call("bench.py", *FLAGS, "--vocab_size=300", "--steps=1", "--warmup=0", flag)
        assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (2, 1, True), done.stderr
