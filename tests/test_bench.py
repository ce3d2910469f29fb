"""The benchmark: it must be the training step that it times, and put each part's time where it was spent."""

import json
import shutil
import subprocess
import time
from dataclasses import replace

import pytest
import torch
from conftest import MODEL, ROOT, TRAIN, call, metrics
from memory import Setting, foresee, kept_around_blocks, kept_by_block, optimizer_state, parameter_shapes

import bench
from model import GPT, GPTConfig
from optim import OptimConfig, Untraced, make_optimizers

FLAGS = [*MODEL, "--device=cpu", "--compile=False", "--batch_size=2", "--total_batch_size=256"]
PARTS = ["data", "forward", "backward", "waiting", "optimizer"]


def result_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_takes_the_steps_of_a_training_run(data_dir, tmp_path):
    flags = [f"--data_dir={data_dir}", *TRAIN, "--dropout=0.1", "--max_steps=6"]
    assert call("train_gpt2.py", *flags, f"--out_dir={tmp_path}/run").returncode == 0
    result = result_of(call("bench.py", *flags, f"--out_dir={tmp_path}/bench", "--warmup=2", "--steps=4"))
    assert result["losses"] == [record["loss"] for record in metrics(tmp_path / "run", "train")]
    assert not (tmp_path / "bench").exists()


def test_what_it_reports(data_dir):
    done = call("bench.py", f"--data_dir={data_dir}", *FLAGS, "--steps=10", "--warmup=1")
    result = result_of(done)
    assert list(result["parts"]) == PARTS
    assert sum(result["parts"].values()) == pytest.approx(result["ms_mean"], rel=0.03)
    assert result["ms_min"] <= result["ms"] <= result["ms_max"]
    assert result["tokens_per_sec"] == pytest.approx(256 / result["ms"] * 1e3)
    assert result["mfu"] is None  # no guess for an unknown device
    assert 0.1 < result["peak_memory_gb"] < 30
    assert (result["skipped"], result["world_size"], result["dtype"]) == (0, 1, "float32")
    assert result["config"]["data_dir"] == str(data_dir)
    assert result["gpt_config"]["vocab_size"] == 257  # the data's
    for part in PARTS:
        assert f"{part:>12} {result['parts'][part]:10.2f} ms" in done.stdout


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
    slow, now = getattr(owner, name, next), [0.0]

    def slower(*args, **kwargs):
        now[0] += 0.2 / calls
        return slow(*args, **kwargs)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])  # nothing else takes time
    monkeypatch.setattr(owner, name, slower, raising=False)
    parts = result_of(call("bench.py", f"--data_dir={data_dir}", *FLAGS, "--steps=2", "--warmup=1"))["parts"]
    assert parts.pop(part) == pytest.approx(200)
    assert max(parts.values()) == 0


def test_a_slow_start_is_no_part_of_a_step(data_dir, monkeypatch):
    slow, step, now = bench.build, bench.train_step, [0.0]

    def passes(seconds, function):
        now[0] += seconds
        return function

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench, "build", lambda *args, **kwargs: passes(50.0, slow)(*args, **kwargs))
    monkeypatch.setattr(bench, "train_step", lambda *args: passes(0.1, step)(*args))
    result = result_of(call("bench.py", f"--data_dir={data_dir}", *FLAGS, "--steps=2", "--warmup=0"))
    assert result["setup_seconds"] == pytest.approx(50)
    assert sum(result["parts"].values()) <= 100.1


def test_random_tokens_where_there_is_no_data(tmp_path, monkeypatch):
    options = ["data_dir = 'data/nowhere'", "vocab_size = 300", "sample_interval = 1", "patience = 1"]
    (tmp_path / "mine.py").write_text("\n".join(options))
    monkeypatch.chdir(tmp_path)
    done = call("bench.py", "mine.py", *FLAGS, "--steps=2")
    result = result_of(done)
    assert "data/nowhere is not there" in done.stdout
    assert len(result["losses"]) == 7
    assert all(5 < loss < 6.5 for loss in result["losses"])  # ln 300 = 5.7
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    assert not bench.Path(result["config"]["data_dir"]).exists()
    done = call("bench.py", *FLAGS, "--data_dir=data/nowhere")  # but where it was asked for by name
    assert (done.returncode, done.stderr.count("\n"), "data/nowhere" in done.stderr) == (2, 1, True)


def test_steps_without_an_update_are_counted(data_dir):
    result = result_of(call("bench.py", f"--data_dir={data_dir}", *FLAGS, "--learning_rate=1e30", "--warmup_steps=0"))
    assert result["skipped"] == 20
    assert result["losses"][-1] is None  # JSON has no NaN


def test_profile_writes_a_trace(data_dir, tmp_path):
    trace = tmp_path / "trace.json"
    result_of(call("bench.py", f"--data_dir={data_dir}", *FLAGS, "--steps=1", "--warmup=0", f"--profile={trace}"))
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum("AdamW.step" in name for name in names) == 1  # one step


def test_two_processes(data_dir):
    done = call("bench.py", f"--data_dir={data_dir}", *FLAGS, "--steps=3", "--warmup=2", processes=2)
    result = result_of(done)
    assert result["world_size"] == 2
    alone = result_of(call("bench.py", f"--data_dir={data_dir}", *FLAGS, "--steps=3", "--warmup=2"))
    assert result["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert done.stdout.count("tok/s") == 1


def test_two_processes_without_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("bench.py", *FLAGS, "--steps=1", "--warmup=1", processes=2)
    assert result_of(done)["world_size"] == 2


def test_compare_measures_the_code_of_a_commit(data_dir, tmp_path, monkeypatch):
    """In a repository whose one commit has twice the loss and no bench.py, and whose files are this code."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "bench.py").unlink()
    step = (tmp_path / "train_gpt2.py").read_text()
    twice = step.replace("loss = run.wrapped(x, y) / plan", "loss = 2 * run.wrapped(x, y) / plan")
    assert twice != step
    (tmp_path / "train_gpt2.py").write_text(twice)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "twice"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "train_gpt2.py").write_text(step)
    shutil.copy(ROOT / "bench.py", tmp_path)
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [f"--data_dir={data_dir}", *FLAGS, "--steps=3", "--warmup=1", "--rounds=1", "--compare=HEAD"]
    done = call("bench.py", *flags, "--against=--n_layer=1")
    result = result_of(done)
    [a], [b] = result["a"], result["b"]
    assert b["losses"][0] == pytest.approx(2 * a["losses"][0], rel=0.1)
    assert result["ratios"] == [result["ratio"]] == [b["ms"] / a["ms"]]
    assert (a["gpt_config"]["n_layer"], b["gpt_config"]["n_layer"]) == (2, 1)
    assert subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout == (
        " M train_gpt2.py\n?? bench.py\n"
    )


def test_other_options():
    assert bench.other(["x.py", "--a=1"], "--b=2") == ["x.py", "--a=1", "--b=2"]
    assert bench.other(["x.py", "--a=1"], "y.py '--b=a name'") == ["--a=1", "y.py", "--b=a name"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps=0"], "steps"),
        (["--warmup=-1"], "warmup"),
        (["--profile=no/such/folder/trace.json"], "no/such/folder"),
        (["--compare=nowhere"], "nowhere"),
        (["--batch_size=3", "--against=--n_layer=1"], "total_batch_size"),
        (["--step=1"], "did you mean step"),
        (["--device=gpu"], "device"),
    ],
)
def test_mistakes_are_one_line_and_status_2(flags, said):
    done = call("bench.py", *FLAGS, "--vocab_size=300", "--steps=1", "--warmup=0", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        {},
        dict(pos="rope", norm="rmsnorm", mlp="swiglu"),
        dict(mlp="relu2", bias=False),
        dict(qk_norm=True, tie_weights=False),
        dict(pos="rope", qk_norm=True),
        dict(value_embeds=1),
    ],
    ids=lambda flags: "-".join(flags) or "gpt2",
)
def test_what_the_backward_pass_keeps_is_foreseen(flags):
    config = GPTConfig(block_size=64, vocab_size=300, n_layer=3, n_head=2, n_embd=64, **flags)
    model, sizes = GPT(config), {}
    params = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    idx, targets = torch.randint(300, (2, 4, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(idx, targets)
    setting = Setting(4, 64, dtype=torch.float32, compiled=False, device="cpu")
    block, around = kept_by_block(config, setting), kept_around_blocks(config, setting)
    foreseen = 4 * 64 * (3 * sum(block.values()) + sum(around.values()) + 4 * 300)  # and the log softmax
    assert sum(sizes.values()) == pytest.approx(foreseen, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_the_optimizers_state_is_foreseen_to_the_byte(optimizer):
    config = GPTConfig(block_size=16, vocab_size=100, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config)
    idx, targets = torch.randint(100, (2, 1, 16))
    model(idx, targets).backward()
    states = []
    for opt in make_optimizers(model, OptimConfig(optimizer=optimizer)):
        opt.step()
        states += [tensor.nbytes for state in opt.state.values() for tensor in state.values()]
    assert optimizer_state(parameter_shapes(config), optimizer) == sum(states)
    foreseen = foresee(config, Setting(1, 16, optimizer))
    assert foreseen.parameters == foreseen.gradients == sum(p.nbytes for p in model.parameters())


def test_memory_of_an_unknown_variant_is_an_error():
    config = GPTConfig(block_size=16, vocab_size=100, n_layer=2, n_head=2, n_embd=32)
    with pytest.raises(NotImplementedError, match="mlp = 'geglu'"):
        foresee(replace(config, mlp="geglu"), Setting(1, 16))
    with pytest.raises(NotImplementedError, match="optimizer = 'lion'"):
        foresee(config, Setting(1, 16, "lion"))


def test_memory_needs_neither_data_nor_a_card(tmp_path):
    flags = ["config/gpt2_medium.py", f"--out_dir={tmp_path / 'run'}", "--memory=True", "--processes=2"]
    plain, both = (
        result_of(call("bench.py", *flags, *more))
        for more in ([], ["--activation_checkpointing=True", "--chunked_loss=True"])
    )
    assert plain["memory"]["parameters"] == 4 * 406_212_608
    assert both["memory"]["total"] < plain["memory"]["total"]
    assert plain["fits"] == both["fits"]
    (batch_size, gb), (larger, _) = plain["fits"]["24"]["plain"], plain["fits"]["24"]["both"]
    more = result_of(call("bench.py", *flags, f"--batch_size={batch_size + 1}"))["memory"]["total"] / 1e9
    assert gb <= bench.CARD_SHARE * 24 < more
    assert larger > batch_size
    assert not (tmp_path / "run").exists()
    done = call("bench.py", "--memory=True", "--init_from=gpt2")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
