"""Nothing lost: what killed, stopped, resumed and misled runs end with, compared with a run that was left alone."""

import dataclasses
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import start
import torch
from conftest import ROOT, TRAIN, Fork, call, metrics, write_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import checkpoint
import distributed
import train_gpt2
from configurator import TORCHRUN, cli
from dataloader import DataGuard
from metrics import Metrics, read_metrics

FLAGS = [
    *TRAIN, "--resume=True", "--max_steps=24", "--dropout=0.2", "--checkpoint_interval=2", "--sample_interval=8",
    "--sample_start=the ",
]  # fmt: skip


def train(data_dir, out_dir, *args, processes=None):
    args = [f"--data_dir={data_dir}", f"--out_dir={out_dir}", *args]
    return call("train_gpt2.py", *args, processes=processes)


def records(out_dir):
    """What must not depend on what a run went through."""
    timings = ("dt", "tokens_per_sec", "mfu", "seconds")
    kept = [r for r in read_metrics(Path(out_dir, "metrics.jsonl")) if r["kind"] in ("train", "val", "sample")]
    return [{name: value for name, value in r.items() if name not in timings} for r in kept]


def flat(value, where=""):
    """A state as {path of names: number, string or tensor}."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, each in pairs for k, v in flat(each, f"{where}/{name}").items()}
    return {where: value}


def same_state(a, b):
    a, b = (flat(torch.load(max(Path(out).glob("ckpt_*.pt")), weights_only=True)) for out in (a, b))
    for state in (a, b):
        for name in ("/config/out_dir", "/config/resume", "/seconds"):
            state.pop(name)
    assert a.keys() == b.keys()
    for name in a:
        tensors = isinstance(a[name], torch.Tensor)
        assert torch.equal(a[name], b[name]) if tensors else a[name] == b[name], name
    return True


def fork(data_dir, out_dir, *args, main=train_gpt2.main, **kwargs):
    return Fork(main, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *args, **kwargs)


SPEEDRUN = [
    "--optimizer=muon", "--muon_update=spectral", "--vector_lr=0.01", "--value_embeds=1",
    "--even_units=True", "--average=0.3",
]  # fmt: skip


@pytest.mark.parametrize("options", [["--optimizer=adamw"], ["--optimizer=muon"], ["--optimizer=adafactor"], SPEEDRUN])
def test_kills_at_random_moments_change_nothing(data_dir, tmp_path, options):
    """The long version, with 50 kills and several processes: records/2026-11-20_torture."""
    flags = [*FLAGS, *options, "--max_steps=16"]
    assert train(data_dir, tmp_path / "alone", *flags).returncode == 0
    rng = random.Random(str(options))
    out, killed, status = tmp_path / "killed", 0, None
    while status is None:
        process = fork(data_dir, out, *flags)
        begun = len(list(out.glob("ckpt_*.pt")))
        newest = max(out.glob("ckpt_*.pt"), default=None)
        while killed < 5 and max(out.glob("ckpt_*.pt"), default=None) == newest:  # until it gets somewhere
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        if killed < 5:
            process.kill()
            killed += 1
        status = None if process.ended() == -signal.SIGKILL else process.exitcode
        assert begun <= 5
    assert (status, killed) == (0, 5)
    assert records(out) == records(tmp_path / "alone")
    assert same_state(out, tmp_path / "alone")
    assert [path.name for path in out.glob(".*")] == []


def test_killed_before_its_first_checkpoint(data_dir, tmp_path):
    """Its metrics are there, but no checkpoint: with --resume=True it starts afresh, without it is refused."""
    out = tmp_path / "run"
    assert train(data_dir, out, *FLAGS, "--max_steps=1").returncode == 0
    (out / "ckpt_000001.pt").unlink()
    done = train(data_dir, out, *FLAGS, "--max_steps=1", "--resume=False")
    assert (done.returncode, "already holds a run" in done.stderr) == (2, True)
    assert train(data_dir, out, *FLAGS, "--max_steps=1").returncode == 0
    assert [r["step"] for r in metrics(out, "train")] == [1]
    assert len(metrics(out, "run")) == 1


def test_a_run_without_a_checkpoint_lends_its_options(data_dir, tmp_path):
    """Killed before its first save, it begins again as it was, not as another run with the defaults."""
    out, flags = tmp_path / "run", [*FLAGS, "--max_steps=3", "--checkpoint_interval=0", "--optimizer=muon"]
    assert train(data_dir, out, *flags).returncode == 0
    want = records(out)
    (out / "ckpt_000003.pt").unlink()
    refused = call("train_gpt2.py", f"--out_dir={out}", "--resume=True", "--learning_rate=1")
    assert (refused.returncode, "this run has 0.003" in refused.stderr) == (2, True)
    assert records(out) == want
    done = call("train_gpt2.py", f"--out_dir={out}", "--resume=True")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("starting again at step 0 with this run's options")
    assert records(out) == want
    assert len(metrics(out, "run")) == 1


def test_fine_tuning_that_died_before_its_first_checkpoint_begins_again(data_dir, tmp_path):
    """With the dropout and the longer vocabulary that were given then."""
    assert train(data_dir, tmp_path / "base", *TRAIN, "--max_steps=1").returncode == 0
    out, flags = tmp_path / "run", [*TRAIN[4:], "--max_steps=2", f"--init_from={tmp_path / 'base'}"]
    assert train(data_dir, out, *flags, "--dropout=0.3", "--vocab_size=300").returncode == 0
    want = records(out)
    (out / "ckpt_000002.pt").unlink()
    done = call("train_gpt2.py", f"--out_dir={out}", "--resume=True")
    assert done.returncode == 0, done.stderr
    assert records(out) == want


def test_resuming_where_there_is_no_run(data_dir, tmp_path):
    """With options it is a fresh start, and says so; with none it would be the defaults', which nobody asked for."""
    out = tmp_path / "run"
    refused = call("train_gpt2.py", f"--out_dir={out}", "--resume=True")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "holds no run" in refused.stderr
    assert not out.exists()
    done = train(data_dir, out, *FLAGS, "--max_steps=1")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"{out} does not exist: this is a fresh start")


PAIR = [*TRAIN, "--max_steps=24", "--checkpoint_interval=2", "--keep_checkpoints=0"]


@pytest.fixture(scope="module")
def pair(data_dir, tmp_path_factory):
    """A run of two processes."""
    out = tmp_path_factory.mktemp("pair") / "run"
    assert train(data_dir, out, *PAIR, processes=2).returncode == 0
    return out


@pytest.mark.parametrize("processes", [None, 4])
def test_on_another_number_of_processes_and_micro_batch(data_dir, pair, tmp_path, processes):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("ckpt_000012.pt", "metrics.jsonl"):
        shutil.copy(pair / name, out)
    done = train(data_dir, out, *PAIR, "--resume=True", "--batch_size=1", processes=processes)
    assert done.returncode == 0, done.stderr
    for have, want in zip(records(out), records(pair), strict=True):
        assert have == pytest.approx(want, abs=1e-4)
    assert "changed: batch_size = 1, was 2" in done.stdout
    (event,) = [e for e in metrics(out, "event") if e["event"] == "resume"]
    assert (event["changed"]["batch_size"], event["world_size"]) == ([2, 1], processes or 1)


def test_an_out_dir_that_rank_0_alone_sees(data_dir, pair, tmp_path, monkeypatch):
    """The run goes on to the same bits. Where another rank has later checkpoints, they may be the run's own."""
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(pair, out)
    for path in checkpoint.find(str(out)):
        if checkpoint.step_of(path) > 12:
            path.unlink()
    find, status, load = checkpoint.find, start.file_status, checkpoint.load_run

    def is_main():
        return os.environ["RANK"] == "0"

    monkeypatch.setattr(checkpoint, "find", lambda folder: find(folder if is_main() else elsewhere))
    monkeypatch.setattr(start, "file_status", lambda path: status(path if is_main() else elsewhere / path.name))
    monkeypatch.setattr(checkpoint, "load_run", lambda path: load(path) if is_main() else 1 / 0)
    (elsewhere / "ckpt_000013.pt").touch()
    refused = train(data_dir, out, *PAIR, "--resume=True", processes=2)
    assert refused.returncode == 2
    assert re.search(r"rank 1 on .*holds a checkpoint of a later step than rank 0's", refused.stderr)
    (elsewhere / "ckpt_000013.pt").rename(elsewhere / "ckpt_000012.pt")  # another one, which is not read
    done = train(data_dir, out, *PAIR, "--resume=True", processes=2)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 12" in done.stdout
    assert same_state(out, pair)
    assert records(out) == records(pair)


@pytest.mark.parametrize("what", ["option", "data", "code"])
def test_ranks_that_disagree(data_dir, tmp_path, monkeypatch, what):
    real = {"option": start.resume_options, "data": start.read_meta, "code": start.code}[what]

    def differently(*args):
        found = real(*args)
        if os.environ["RANK"] == "0":
            return found
        if what == "option":
            return dataclasses.replace(found[0], seed=5), *found[1:]
        return found | ({"val_words": 3} if what == "data" else {"model.py has checksum": "0"})

    name = {"option": "resume_options", "data": "read_meta", "code": "code"}[what]
    monkeypatch.setattr(start, name, differently)
    done = train(data_dir, tmp_path / "run", *FLAGS, "--max_steps=3", processes=2)
    line = {"option": "option seed = 5, but 1337 on rank 0", "data": "the data is 3 shards"}
    assert done.returncode == 2
    assert f"rank 1 on {platform.node()}: " + line.get(what, "model.py has checksum 0, but") in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_on_two_threads(data_dir, tmp_path):
    """Compiled for a CPU, threads would add up the embedding's gradient in any order, but for deterministic mode."""
    flags = [*TRAIN, "--compile=True", "--max_steps=8", "--checkpoint_interval=4", "--keep_checkpoints=0"]
    flags += ["--batch_size=32", "--total_batch_size=1024", "--n_layer=1", "--val_interval=0"]
    torch.set_num_threads(2)
    try:
        assert train(data_dir, tmp_path / "a", *flags).returncode == 0
        b = tmp_path / "b"
        b.mkdir()
        for name in ("ckpt_000004.pt", "metrics.jsonl"):
            shutil.copy(tmp_path / "a" / name, b)
        assert train(data_dir, b, *flags, "--resume=True").returncode == 0
    finally:
        torch.set_num_threads(1)
    assert records(b) == records(tmp_path / "a")
    assert same_state(b, tmp_path / "a")


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_the_step_that_is_running(data_dir, tmp_path, number):
    out = tmp_path / "run"
    flags = [*TRAIN, "--max_steps=400", "--dropout=0.2", "--checkpoint_interval=100000", "--val_interval=0"]
    process = fork(data_dir, out, *flags)
    process.until("step     3/")
    process.signal(number)
    assert process.ended() == 0
    assert "--resume=True goes on" in process.read()
    (event,) = metrics(out, "event")
    (path,) = out.glob("ckpt_*.pt")
    step = event["step"]
    assert event == {"kind": "event", "event": "stopped", "step": step, "signal": number.name}
    assert checkpoint.step_of(path) == torch.load(path, weights_only=True)["step"] == step
    assert metrics(out, "train")[-1]["step"] == step
    flags += [f"--max_steps={step + 3}"]
    assert train(data_dir, out, *flags, "--resume=True").returncode == 0
    flags += ["--schedule=cosine"]
    assert metrics(out, "train")[-1]["step"] == step + 3


def test_a_second_ctrl_c_stops_at_once(data_dir, tmp_path):
    """Even where Python does not get to run: the micro-batches of this step take minutes."""
    flags = [*TRAIN, "--max_steps=9", "--val_interval=0", "--total_batch_size=64000000"]
    process = fork(data_dir, tmp_path / "run", *flags)
    process.until("writing to")
    process.signal(signal.SIGINT)
    process.join(timeout=0.5)
    assert process.is_alive()
    process.signal(signal.SIGINT)
    assert process.ended(timeout=5) == -signal.SIGINT


@pytest.mark.parametrize("when", ["evaluation", "sample"])
def test_a_signal_in_an_evaluation(data_dir, tmp_path, monkeypatch, when):
    """It is broken off, and made anew when the run goes on, which ends as if nothing had happened."""
    flags = [*FLAGS, "--checkpoint_interval=5", "--max_steps=8", "--sample_interval=5", "--keep_checkpoints=1"]
    assert train(data_dir, tmp_path / "a", *flags).returncode == 0
    name = "evaluate" if when == "evaluation" else "sample"
    original, calls = getattr(train_gpt2, name), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:  # at step 5, where a checkpoint is due too
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train_gpt2, name, interrupted)
    out = tmp_path / "b"
    assert train(data_dir, out, *flags).returncode == 0
    assert metrics(out, "event")[-1] == {"kind": "event", "event": "stopped", "step": 5, "signal": "SIGTERM"}
    assert [r["step"] for r in metrics(out, "sample")] == [0]
    assert train(data_dir, out, *flags).returncode == 0
    assert records(out) == records(tmp_path / "a")
    assert same_state(out, tmp_path / "a")
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "a").iterdir()}


def test_a_signal_at_the_last_step(data_dir, tmp_path, monkeypatch):
    """The run is not done before its last evaluation is made."""
    flags = [*TRAIN, "--max_steps=6", "--val_interval=6"]
    original, calls = train_gpt2.evaluate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train_gpt2, "evaluate", interrupted)
    assert train(data_dir, tmp_path / "run", *flags).returncode == 0
    assert [r["step"] for r in metrics(tmp_path / "run", "val")] == [0]
    assert train(data_dir, tmp_path / "run", *flags, "--resume=True").returncode == 0
    assert [r["step"] for r in metrics(tmp_path / "run", "val")] == [0, 6]
    assert "is done" in train(data_dir, tmp_path / "run", *flags, "--resume=True").stdout


# ---------------------------------------------------------------------------------------------------------------------
# Deaths of a process


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def launch(main, data_dir, out_dir, restarts):
    """What torchrun does, less its command line, so that its two processes are forks."""
    nodes = dict(min_nodes=1, max_nodes=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test")
    config = LaunchConfig(nproc_per_node=2, max_restarts=restarts, monitor_interval=0.01, start_method="fork", **nodes)
    return fork(data_dir, out_dir, *PAIR, main=lambda: max(elastic_launch(config, main)().values()))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_torchrun_restarts_a_group_and_it_goes_on(data_dir, pair, tmp_path):
    """Without --resume=True too."""
    out = tmp_path / "run"
    torchrun = launch(train_gpt2.main, data_dir, out, restarts=3)
    for rank in (1, 0):  # twice, because the second restart finds what the first one left
        torchrun.until("saved")
        os.kill(children(torchrun.pid)[rank], signal.SIGKILL)
        torchrun.until("resuming at step")
    assert torchrun.ended() == 0
    assert records(out) == records(pair)
    assert same_state(out, pair)


def test_another_run_is_refused_however_often_torchrun_tries(data_dir, pair):
    """One process says so, and all of them end."""
    before = {path.name: path.read_bytes() for path in pair.iterdir()}
    torchrun = launch(lambda: cli(train_gpt2.main), data_dir, pair, restarts=1)
    assert torchrun.ended() == 1
    *_, last, border = torchrun.read("err").splitlines()
    assert ("already holds a run" in last, set(border)) == (True, {"="})
    assert torchrun.read("err").count("already holds a run") == 3  # once in each try, and in torchrun's last words
    assert {path.name: path.read_bytes() for path in pair.iterdir()} == before


def test_a_group_whose_torchrun_was_killed_stops_in_order(data_dir, tmp_path):
    """As a user starts it."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt2.py"]
    command += [*TRAIN, f"--data_dir={data_dir}", f"--out_dir={out}", "--max_steps=100000", "--val_interval=0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while "step     2/" not in process.stdout.readline():
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)  # until the ranks have closed the output too
    event = metrics(out, "event")[-1]
    assert (event["event"], event["signal"]) == ("stopped", "torchrun is gone")
    assert checkpoint.step_of(checkpoint.newest_whole(out)) == event["step"] < 100000
    flags = ["--max_steps=100000", "--val_interval=0", f"--max_steps={event['step'] + 1}"]
    assert train(data_dir, out, *TRAIN, *flags, "--resume=True").returncode == 0  # nobody holds the lock


def test_steps_that_outlast_torchruns_patience_are_announced(capsys, tmp_path, monkeypatch):
    log = Metrics(tmp_path)
    train_gpt2.warn_of_long_steps(log, 45.0)
    assert capsys.readouterr().out == ""
    for name in TORCHRUN:
        monkeypatch.setenv(name, "0")
    train_gpt2.warn_of_long_steps(log, 5.0)
    assert capsys.readouterr().out == ""
    train_gpt2.warn_of_long_steps(log, 45.0)
    assert "--shutdown-timeout=210" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Planted faults


def test_nan_on_one_rank_is_skipped_on_all(data_dir, tmp_path, monkeypatch):
    original, calls = train_gpt2.GPT.forward, []

    def poisoned(self, *args):
        loss = original(self, *args)
        if self.training:
            calls.append(1)
        bad = os.environ["RANK"] == "1" and len(calls) in (6, 7)  # after DDP's pass at the start: step 5 and 6
        return loss * math.nan if bad else loss

    monkeypatch.setattr(train_gpt2.GPT, "forward", poisoned)
    flags = [*TRAIN, "--max_steps=8", "--checkpoint_interval=1", "--keep_checkpoints=0", "--batch_size=4"]
    done = train(data_dir, tmp_path / "run", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    states = {s: torch.load(tmp_path / "run" / f"ckpt_{s:06d}.pt", weights_only=True) for s in range(3, 8)}
    assert [e["step"] for e in metrics(tmp_path / "run", "event") if e["event"] == "skipped step"] == [5, 6]
    assert [r["step"] for r in metrics(tmp_path / "run", "train") if r["loss"] is None] == [5, 6]
    for name in ("model", "optimizers"):  # moments and step counts as well
        last_good, after = flat(states[4][name]), flat(states[6][name])
        for key in last_good.keys() - {f"/{i}/param_groups/{j}/lr" for i in (0, 1) for j in (0, 1)}:
            a, b = last_good[key], after[key]
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key
    assert (states[6]["skipped"], states[7]["skipped"]) == (2, 0)
    assert not torch.equal(states[6]["model"]["wte.weight"], states[7]["model"]["wte.weight"])


def test_giving_up_leaves_the_last_good_checkpoint(data_dir, tmp_path, monkeypatch):
    """Resumed in the middle of it, the count goes on."""
    out, flags = tmp_path / "run", [*TRAIN, "--checkpoint_interval=1", "--keep_checkpoints=1", "--max_skipped=4"]
    flags += ["--val_interval=0"]  # no best one, which is kept anyway
    assert train(data_dir, out, *flags, "--max_steps=3").returncode == 0
    good = (out / "ckpt_000003.pt").read_bytes()
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * math.inf)
    assert train(data_dir, out, *flags, "--resume=True", "--max_steps=5").returncode == 0
    assert torch.load(out / "ckpt_000005.pt")["skipped"] == 2
    shutil.copytree(out, tmp_path / "lower")
    lower = ["--resume=True", "--max_steps=50", "--max_skipped=1"]  # already passed
    assert train(data_dir, tmp_path / "lower", *flags, *lower).returncode == 3
    assert metrics(tmp_path / "lower", "event")[-1] == {"kind": "event", "event": "gave up", "step": 6}
    assert train(data_dir, out, *flags, "--resume=True", "--max_steps=50").returncode == 3
    assert (out / "ckpt_000003.pt").read_bytes() == good
    events = [(e["event"], e["step"]) for e in metrics(out, "event") if e["event"] in ("skipped step", "gave up")]
    assert events == [("skipped step", s) for s in (4, 5, 6, 7)] + [("gave up", 7)]
    assert not re.search("NaN|Infinity", (out / "metrics.jsonl").read_text())  # which JSON does not have
    weights = [torch.load(path)["model"] for path in checkpoint.find(out)]
    assert all(torch.equal(w["wte.weight"], weights[0]["wte.weight"]) for w in weights)


def test_a_float16_runs_scaler_goes_on(data_dir, tmp_path):
    flags = [*FLAGS, "--dtype=float16", "--keep_checkpoints=0", "--max_steps=16"]
    assert train(data_dir, tmp_path / "a", *flags).returncode == 0
    b = tmp_path / "b"
    b.mkdir()
    for name in ("ckpt_000006.pt", "metrics.jsonl"):
        shutil.copy(tmp_path / "a" / name, b)
    assert train(data_dir, b, *flags).returncode == 0
    assert records(b) == records(tmp_path / "a")
    assert same_state(b, tmp_path / "a")
    assert torch.load(b / "ckpt_000016.pt")["scaler"]["_growth_tracker"] > 6


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if sys.platform != "linux" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(data_dir, small_disk, tmp_path):
    """Two checkpoints fit. The third is not saved, and the run goes on; when there is room again, it saves again."""
    out = small_disk / "run"
    flags = [*TRAIN, "--n_embd=96", "--checkpoint_interval=2", "--keep_checkpoints=0", "--val_interval=0"]
    done = train(data_dir, out, *flags, "--max_steps=8")
    assert done.returncode == 2
    assert (done.stdout.count("NOT SAVED"), "No space left" in done.stdout) == (1, True)
    assert done.stderr.count("\n") == 1
    assert "step 8 is not saved: No space left on device" in done.stderr
    assert [checkpoint.step_of(path) for path in checkpoint.find(out)] == [4, 2]
    assert [checkpoint.fault(path) for path in checkpoint.find(out)] == [None, None]
    assert sorted(path.name for path in out.iterdir()) == ["ckpt_000002.pt", "ckpt_000004.pt", "metrics.jsonl"]
    (out / "ckpt_000002.pt").unlink()
    done = train(data_dir, out, *flags, "--max_steps=8", "--resume=True", "--keep_checkpoints=1")
    assert done.returncode == 0, done.stderr
    assert train(data_dir, tmp_path / "large", *flags, "--max_steps=8").returncode == 0
    assert records(out) == records(tmp_path / "large")
    assert train(data_dir, small_disk / "other", *flags, "--max_steps=1").returncode == 0


def test_the_best_is_one_that_was_saved(data_dir, tmp_path, monkeypatch):
    """The save of the best step fails; from then on the best is another."""
    val_losses, save = iter([4.0, 3.0, 1.0, 2.0, 2.5]), checkpoint.save  # at steps 0, 2, 4, 6 and 8

    def fails_at_4(state, *args):
        if state["step"] == 4:
            raise OSError(28, "No space left on device")
        return save(state, *args)

    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args: next(val_losses))
    monkeypatch.setattr(checkpoint, "save", fails_at_4)
    flags = [*TRAIN, "--max_steps=8", "--val_interval=2", "--checkpoint_interval=2", "--keep_checkpoints=1"]
    done = train(data_dir, tmp_path / "run", *flags)
    assert (done.returncode, done.stdout.count("NOT SAVED at step 4")) == (0, 1)
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path / "run")] == [8, 6]
    assert torch.load(tmp_path / "run" / "ckpt_000008.pt")["best"] == {"step": 6, "val_loss": 2.0}


def test_out_dir_that_cannot_be_written(data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run", "x" * 300):
        done = train(data_dir, tmp_path / out, *TRAIN, "--max_steps=1")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "cannot be written" in done.stderr


def test_a_lost_terminal_ends_no_run(data_dir, tmp_path):
    terminal, end = os.pipe()
    process = fork(data_dir, tmp_path / "run", *TRAIN, "--max_steps=30", stdout=end)
    os.close(end)
    assert os.read(terminal, 1)
    os.close(terminal)
    assert process.ended() == 0
    assert metrics(tmp_path / "run", "train")[-1]["step"] == 30


@pytest.fixture
def own_data(data_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    return folder


def begun(data_dir, tmp_path):
    out = tmp_path / "run"
    assert train(data_dir, out, *TRAIN, "--max_steps=2").returncode == 0
    return out, {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("fault", ["one token", "swapped", "new shard", "gone", "truncated", "header", "val"])
def test_data_that_changed_is_noticed_on_resume(own_data, tmp_path, fault):
    out, before = begun(own_data, tmp_path)
    a, b, val = (next(own_data.glob(f"*{number}.bin")) for number in ("train_000001", "train_000002", "val_000000"))
    if fault in ("one token", "val"):
        path = a if fault == "one token" else val
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        path.write_bytes(data)
    elif fault == "swapped":
        data = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(data)
    elif fault == "new shard":
        (own_data / "meta.json").unlink()
        write_shard(own_data / "tiny_train_000003.bin", range(200))
    elif fault == "gone":
        b.unlink()
    elif fault == "truncated":
        b.write_bytes(b.read_bytes()[:-2])
    else:
        b.write_bytes(b"\0" * 4 + b.read_bytes()[4:])
    done = train(own_data, out, *TRAIN, "--max_steps=4", "--resume=True")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "tiny_" in done.stderr or "meta.json" in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_same_data_elsewhere_is_the_same(own_data, data_dir, tmp_path):
    out, _ = begun(own_data, tmp_path)
    shutil.rmtree(own_data)
    done = train(own_data, out, *TRAIN, "--max_steps=4", "--resume=True")
    assert (done.returncode, "no such folder" in done.stderr) == (2, True)
    assert train(data_dir, out, *TRAIN, "--max_steps=4", "--resume=True").returncode == 0


def with_checksums(folder):
    """The data as fineweb.py leaves it."""
    meta = json.loads((folder / "meta.json").read_text())
    shards = {"train": {}, "val": {}}
    for path in folder.glob("*.bin"):
        tokens = path.read_bytes()[1024:]
        shards["val" if "_val_" in path.name else "train"][path.name] = [len(tokens) // 2, zlib.crc32(tokens)]
    (folder / "meta.json").write_text(json.dumps({**meta, "shards": shards}))
    return folder


def test_data_copied_without_its_times_is_the_same_where_checksums_are_known(own_data, tmp_path):
    out = tmp_path / "run"
    assert train(with_checksums(own_data), out, *TRAIN, "--max_steps=2").returncode == 0
    for path in own_data.iterdir():
        os.utime(path)
    assert train(own_data, out, *TRAIN, "--max_steps=4", "--resume=True").returncode == 0
    (run_record,) = metrics(out, "run")
    assert "shards" not in run_record["data"]  # thousands of names, in a line for eyes


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("how", ["zeros", "touched", "gone", "new"])
def test_data_that_changes_during_a_run(own_data, tmp_path, monkeypatch, how, checksums):
    """The run ends, the last good checkpoint is kept, and with the data restored it goes on."""
    if checksums:
        with_checksums(own_data)
    flags = [*TRAIN, "--max_steps=6", "--checkpoint_interval=2"]
    assert train(own_data, tmp_path / "straight", *flags).returncode == 0
    shutil.copytree(own_data, tmp_path / "kept")
    path, out, save = own_data / "tiny_train_000002.bin", tmp_path / "run", checkpoint.save

    def save_then_change(*args):
        saved = save(*args)
        if how == "zeros":
            with open(path, "r+b") as file:
                file.seek(1024)
                file.write(bytes(path.stat().st_size - 1024))
        elif how == "gone":
            path.unlink()
        elif how == "new":
            write_shard(own_data / "tiny_train_000003.bin", range(200))
        if how != "gone":
            later = path.stat().st_mtime_ns + (0 if how == "new" else 10**9)
            os.utime(path, ns=(later, later))
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_then_change)
        done = train(own_data, out, *flags)
    if checksums and how == "touched":
        assert done.returncode == 0, done.stderr
    else:
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "tiny_train_00000" in done.stderr
        assert [path.name for path in out.glob("ckpt_*.pt")] == ["ckpt_000002.pt"]
        shutil.rmtree(own_data)
        shutil.copytree(tmp_path / "kept", own_data)
        out = shutil.copytree(out, tmp_path / "again")  # the lock of the other is this process's until it ends
        assert train(own_data, out, *flags, "--resume=True").returncode == 0
    assert records(out) == records(tmp_path / "straight")


def test_a_damaged_shard_whose_size_and_time_are_as_they_were(own_data, tmp_path, monkeypatch):
    """Found by its checksum, in the background, behind the first step; no checkpoint of it is written."""
    path, status = own_data / "tiny_train_000002.bin", (own_data / "tiny_train_000002.bin").stat()
    with_checksums(own_data)
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    start_reading = DataGuard.start_reading
    monkeypatch.setattr(DataGuard, "start_reading", lambda guard: start_reading(guard) or guard.reader.join())
    done = train(own_data, tmp_path / "run", *TRAIN, "--max_steps=3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "tiny_train_000002.bin" in done.stderr
    assert not list((tmp_path / "run").glob("ckpt_*.pt"))
    assert len(metrics(tmp_path / "run", "train")) == 3


def test_a_missing_shard_is_noticed_at_the_start(own_data, tmp_path):
    next(own_data.glob("*train_000002.bin")).unlink()
    done = train(own_data, tmp_path / "run", *TRAIN, "--max_steps=4")
    assert (done.returncode, done.stderr.count("\n"), "train tokens" in done.stderr) == (2, 1, True)


@pytest.mark.parametrize("processes", [None, 2])
def test_an_id_out_of_range(own_data, tmp_path, processes):
    """Found when its window is read, on whichever rank that is."""
    path = next(own_data.glob("*train_000002.bin"))
    data = bytearray(path.read_bytes())
    for at in range(1024 + 1, len(data), 40):
        data[at] = 7  # ids of 1792 and more
    path.write_bytes(data)
    flags = [*TRAIN, "--max_steps=8"]
    done = train(own_data, tmp_path / "run", *flags, processes=processes)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) >= 1
    assert "tiny_train_000002.bin: token" in said[0]
    assert "257 ids" in said[0]
    if not processes:
        assert done.stderr.count("\n") == 1


def test_a_clock_set_back(data_dir, tmp_path, monkeypatch):
    flags = [*FLAGS, "--max_steps=8"]
    assert train(data_dir, tmp_path / "a", *flags).returncode == 0
    out, now = tmp_path / "b", time.time()
    assert train(data_dir, out, *flags, "--max_steps=4").returncode == 0
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now - 1e8 - 60 * next(ticks))
    assert train(data_dir, out, *flags, "--schedule=cosine", "--max_steps=4").returncode == 0
    shutil.rmtree(out)
    assert train(data_dir, out, *flags).returncode == 0
    assert records(out) == records(tmp_path / "a")
    assert all(r["dt"] > 0 for r in metrics(out, "train"))


def test_a_deleted_metrics_file_lets_no_second_run_in(data_dir, tmp_path):
    out = tmp_path / "run"
    first = fork(data_dir, out, *TRAIN, "--max_steps=100000")
    first.until("step     2/")
    (out / "metrics.jsonl").unlink()
    done = train(data_dir, out, *TRAIN, "--max_steps=100000", "--resume=True")
    assert (done.returncode, "another process" in done.stderr) == (2, True)
    first.kill()
    first.join()


def test_weights_that_cannot_speak_end_no_run(data_dir, tmp_path, monkeypatch):
    hidden = train_gpt2.GPT.hidden
    spoiled = lambda self, *args: hidden(self, *args) * (1 if self.training else math.nan)  # noqa: E731
    monkeypatch.setattr(train_gpt2.GPT, "hidden", spoiled)
    done = train(data_dir, tmp_path / "run", *TRAIN, "--max_steps=2", "--sample_interval=2", "--val_interval=0")
    assert done.returncode == 0, done.stderr
    events = [(e["step"], e["event"]) for e in metrics(tmp_path / "run", "event")]
    assert events == [(0, "no sample"), (2, "no sample"), (2, "done")]
    assert metrics(tmp_path / "run", "sample") == []


def test_a_torn_metrics_line(data_dir, tmp_path):
    flags = [*FLAGS, "--max_steps=8", "--keep_checkpoints=0"]
    assert train(data_dir, tmp_path / "a", *flags).returncode == 0
    out = tmp_path / "b"
    shutil.copytree(tmp_path / "a", out)
    (out / "ckpt_000008.pt").unlink()
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(whole[: whole.index(b'"step": 7') + 20])
    assert train(data_dir, out, *flags).returncode == 0
    assert records(out) == records(tmp_path / "a")
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["kind"] == "run"


def test_two_runs_at_once(data_dir, tmp_path):
    out = tmp_path / "run"
    first = fork(data_dir, out, *TRAIN, "--max_steps=100000")
    first.until("step     2/")
    for flag in ("--resume=True", "--resume=False"):
        done = train(data_dir, out, *TRAIN, "--max_steps=100000", flag)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "another process" in done.stderr
    first.signal(signal.SIGTERM)
    assert first.ended() == 0
    assert metrics(out, "event")[-1]["event"] == "stopped"


def test_two_runs_that_start_at_the_same_moment(data_dir, tmp_path):
    out, flags = tmp_path / "run", [*TRAIN, "--max_steps=30", "--val_interval=0"]
    pair = [fork(data_dir, out, *flags) for _ in range(2)]
    assert sorted(process.ended() for process in pair) == [0, 2]
    assert [r["step"] for r in metrics(out, "train")] == list(range(1, 31))


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("flag", "had"),
    [
        ("--n_layer=3", 2), ("--vocab_size=300", 257), ("--dropout=0.1", 0.0), ("--seed=2", 1337), ("--seq_len=16", 32),
        ("--total_batch_size=512", 256), ("--optimizer=muon", "adamw"), ("--learning_rate=1e-2", 0.003),
        ("--min_lr=1e-6", 6e-05), ("--schedule=wsd", "cosine"), ("--warmup_steps=3", 2), ("--weight_decay=0.2", 0.1),
        ("--beta2=0.9", 0.95), ("--grad_clip=2", 1.0), ("--val_tokens=4000", 2000), ("--init_from=gpt2", "scratch"),
    ],
)  # fmt: skip
def test_what_would_make_it_another_run_is_refused(data_dir, straight, flag, had):
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    name, value = flag[2:].split("=")
    done = train(data_dir, straight, *TRAIN, "--max_steps=4", "--resume=True", flag)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--{name}: {name} = " in done.stderr
    assert repr(had) in done.stderr
    assert value.lstrip("0") in done.stderr or str(float(value)) in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in straight.iterdir()} == before


@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("resume") / "run"
    assert train(data_dir, out, *TRAIN, "--max_steps=2").returncode == 0
    return out


def test_what_is_not_given_is_as_it_was(data_dir, straight, tmp_path, monkeypatch):
    """A resumed run needs no flag but its folder; a changed length is taken, and said."""
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    picked = []
    monkeypatch.setattr(distributed, "pick_device", lambda device, rank: picked.append(device) or torch.device("cpu"))
    done = call("train_gpt2.py", f"--out_dir={out}", "--resume=True", "--max_steps=4", "--log_interval=2")
    assert done.returncode == 0, done.stderr
    assert picked == ["cpu"]
    assert "changed: max_steps = 4, was 2" in done.stdout
    (event,) = [e for e in metrics(out, "event") if e["event"] == "resume"]
    assert event["changed"] == {"max_steps": [2, 4], "log_interval": [1, 2]}
    assert [r["step"] for r in metrics(out, "train")] == [1, 2, 4]
    saved = torch.load(out / "ckpt_000004.pt")["config"]
    assert (saved["data_dir"], saved["learning_rate"], saved["max_steps"]) == (str(data_dir), 3e-3, 4)


def test_a_reached_target_may_be_set_lower(data_dir, tmp_path):
    out, flags = tmp_path / "run", [*TRAIN, "--max_steps=60", "--resume=True"]
    assert train(data_dir, out, *flags, "--target_loss=4.5").returncode == 0
    first = metrics(out, "train")[-1]["step"]
    assert "is done" in train(data_dir, out, *flags, "--target_loss=4.5").stdout
    assert train(data_dir, out, *flags, "--target_loss=4.0").returncode == 0
    assert first < metrics(out, "train")[-1]["step"] < 60


def test_another_programs_checkpoint(data_dir, tmp_path):
    """It speaks, but has nothing to go on from."""
    out = tmp_path / "run"
    assert train(data_dir, out, *TRAIN, "--max_steps=1").returncode == 0
    path = out / "ckpt_000001.pt"
    state = torch.load(path)
    torch.save({name: state[name] for name in ("model", "step", "gpt_config", "tokenizer")}, path)
    done = train(data_dir, out, *TRAIN, "--max_steps=2", "--resume=True")
    assert (done.returncode, done.stderr.count("\n"), "--init_from" in done.stderr) == (2, 1, True)
    assert train(data_dir, tmp_path / "new", *TRAIN, "--max_steps=1", f"--init_from={out}").returncode == 0


@pytest.mark.parametrize("cut", [4, 7, 8, 10])
def test_mean_losses_and_epochs_do_not_depend_on_kills(data_dir, tmp_path, cut):
    """A checkpoint between two records, or at one, holds what the next record needs."""
    flags = [*TRAIN, "--max_steps=12", "--log_interval=5", "--checkpoint_interval=1", "--keep_checkpoints=0"]
    a, b = tmp_path / "a", tmp_path / "b"
    assert train(data_dir, a, *flags).returncode == 0
    assert [record["step"] for record in metrics(a, "train")] == [1, 5, 10, 12]
    b.mkdir()
    shutil.copy(a / f"ckpt_{cut:06d}.pt", b)
    shutil.copy(a / "metrics.jsonl", b)
    assert train(data_dir, b, *flags, "--resume=True").returncode == 0
    assert records(b) == records(a)
    assert same_state(b, a)
    ends = [metrics(out, "event")[-1] for out in (a, b)]
    for end in ends:
        end.pop("seconds")
    assert ends[0] == ends[1]
    assert ends[0]["mean_loss"] == metrics(a, "train")[-1]["mean_loss"]


def test_an_older_versions_checkpoint_goes_on(data_dir, tmp_path):
    flags = [*TRAIN, "--max_steps=2", "--patience=3"]
    assert train(data_dir, tmp_path / "run", *flags).returncode == 0
    path = tmp_path / "run" / "ckpt_000002.pt"
    saved = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in saved.items() if name not in checkpoint.LATER}, path)
    assert train(data_dir, tmp_path / "run", *flags, "--max_steps=4", "--resume=True").returncode == 0
    assert [record["mean_loss"] is None for record in metrics(tmp_path / "run", "train")] == [False] * 4


def test_patience(data_dir, tmp_path, monkeypatch):
    """Evaluations without a new low are counted over all lives of a run; more patience goes on."""
    values = {0: 5.0, 2: 4.0, 4: 4.5, 6: 3.9, 8: 4.0, 10: 3.95, 12: 3.9, 14: 3.0, 16: 4.0, 18: 4.0, 20: 4.0}
    evaluated = []

    def evaluate(run):
        [step] = [int(p["step"].item()) for p in list(run.optimizers[0].state.values())[:1]] or [0]
        evaluated.append(step)
        return values[step]

    monkeypatch.setattr(train_gpt2, "evaluate", evaluate)
    flags = [*TRAIN, "--max_steps=20", "--val_interval=2", "--checkpoint_interval=1", "--keep_checkpoints=0"]
    a, b = tmp_path / "a", tmp_path / "b"
    done = train(data_dir, a, *flags, "--patience=3")
    assert done.returncode == 0, done.stderr
    assert evaluated == [0, 2, 4, 6, 8, 10, 12]
    assert metrics(a, "event")[-1]["plateau"]
    assert "this run is done, at step 12" in train(data_dir, a, *flags, "--resume=True").stdout
    b.mkdir()
    for name in ("ckpt_000008.pt", "metrics.jsonl"):  # died behind the first evaluation without a new low
        shutil.copy(a / name, b)
    assert train(data_dir, b, *flags, "--patience=3", "--resume=True").returncode == 0
    assert metrics(b, "val") == metrics(a, "val")
    assert metrics(b, "event")[-1]["lowest_val_loss"] == {"step": 6, "val_loss": 3.9}
    assert train(data_dir, b, *flags, "--patience=4", "--resume=True").returncode == 0
    assert metrics(b, "val")[-1]["step"] == 20
    refused = train(data_dir, tmp_path / "c", *flags, "--patience=1", "--val_interval=0")
    assert (refused.returncode, "patience is looked at in evaluations" in refused.stderr) == (2, True)
