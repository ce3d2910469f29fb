"""Nothing lost: what killed, stopped, resumed and misled runs end with, compared with a run that was left alone."""

import errno
import functools
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
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TRAIN, Fork, call, cut, disk_full_at, events, metrics, refused, write_shard

import checkpoint
import distributed
import train_gpt2
from metrics import read_metrics

FLAGS = [
    *TRAIN, "--resume=True", "--max_steps=24", "--dropout=0.2", "--checkpoint_interval=2", "--sample_interval=8",
    "--sample_start=the ",
]  # fmt: skip


def train(data_dir, out_dir, *args, **kwargs):
    return call("train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *args, **kwargs)


def fork(data_dir, out_dir, *args, **kwargs):
    return Fork(train_gpt2.main, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *args, **kwargs)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(out_dir):
    """What must not depend on what a run went through."""
    timings = ("dt", "tokens_per_sec", "mfu", "seconds", "time")
    kept = [r for r in read_metrics(Path(out_dir, "metrics.jsonl")) if r["kind"] in ("train", "val", "sample")]
    return [{name: value for name, value in r.items() if name not in timings} for r in kept]


def flat(value, where=""):
    """A state as {path of names: number, string or tensor}."""
    if isinstance(value, dict):
        return {k: v for name, each in value.items() for k, v in flat(each, f"{where}/{name}").items()}
    return {where: value}


def same_state(a, b):
    a, b = (flat(torch.load(max(Path(out).glob("ckpt_*.pt")), weights_only=True)) for out in (a, b))
    for state in (a, b):
        for name in ("/config/out_dir", "/config/resume", "/seconds", "/times"):
            state.pop(name)
    assert a.keys() == b.keys()
    for name in a:
        tensors = isinstance(a[name], torch.Tensor)
        assert torch.equal(a[name], b[name]) if tensors else a[name] == b[name], name
    return True


def begun(data_dir, out, *flags, steps=2):
    assert train(data_dir, out, *TRAIN, f"--max_steps={steps}", *flags).returncode == 0
    return out


# ---- Killed, and resumed


SPEEDRUN = [
    "--optimizer=muon", "--vector_lr=0.01", "--value_embeds=1", "--even_units=True", "--average=0.3",
    "--log_interval=5",
]  # fmt: skip


@pytest.mark.parametrize("options", [["--optimizer=adamw"], SPEEDRUN])
def test_kills_at_random_moments_change_nothing(data_dir, tmp_path, options):
    """The long version, also with several processes: records/2026-12-01_torture."""
    flags = [*FLAGS, *options, "--max_steps=16"]
    assert train(data_dir, tmp_path / "alone", *flags).returncode == 0
    rng = random.Random(str(options))
    out, killed, status = tmp_path / "killed", 0, None
    while status is None:
        process = fork(data_dir, out, *flags)
        newest = max(out.glob("ckpt_*.pt"), default=None)
        while killed < 4 and max(out.glob("ckpt_*.pt"), default=None) == newest:  # until it gets somewhere
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        if killed < 4:
            process.kill()
            killed += 1
        status = None if process.ended() == -signal.SIGKILL else process.exitcode
    assert (status, killed) == (0, 4)
    assert records(out) == records(tmp_path / "alone")
    assert same_state(out, tmp_path / "alone")
    assert [path.name for path in out.glob(".*")] == []
    assert events(out)[-1] == ("done", 16)


def die_before_the_record():
    train_gpt2.conclude = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_between_the_last_checkpoint_and_its_record(data_dir, tmp_path):
    """The run is not done before that is on record, and the same command records it."""
    flags = [*FLAGS, "--max_steps=4", "--average=0.5"]
    assert train(data_dir, tmp_path / "alone", *flags).returncode == 0
    assert fork(data_dir, tmp_path / "run", *flags, setup=die_before_the_record).ended() == -signal.SIGKILL
    assert events(tmp_path / "run") == []
    assert train(data_dir, tmp_path / "run", *flags).returncode == 0
    assert events(tmp_path / "run") == [("resume", 4), ("done", 4)]
    assert records(tmp_path / "run") == records(tmp_path / "alone")
    assert same_state(tmp_path / "run", tmp_path / "alone")
    assert "is done" in train(data_dir, tmp_path / "run", *flags).stdout


def test_a_run_that_died_before_its_first_checkpoint(data_dir, tmp_path):
    """It lends its options; a new run without --resume=True takes its place. But never that of one that is done."""
    out = begun(data_dir, tmp_path / "run", "--optimizer=muon", "--dropout=0.3", "--vocab_size=300")
    want = records(out)
    (out / "ckpt_000002.pt").unlink()
    assert refused(train(data_dir, out, *TRAIN, "--max_steps=1"), "already holds a run", "or delete it")
    assert refused(call("train_gpt2.py", f"--out_dir={out}", "--resume=True", "--seed=1"), "this run has 1337")
    done = call("train_gpt2.py", f"--out_dir={out}", "--resume=True")
    assert (done.returncode, "starting again at step 0 with this run's options" in done.stdout) == (0, True)
    assert (records(out), len(metrics(out, "run"))) == (want, 1)
    (out / "ckpt_000002.pt").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    early = "".join(line + "\n" for line in lines if '"done"' not in line)
    for event in ("stopped", "resume"):  # it had a checkpoint, which lies elsewhere now
        (out / "metrics.jsonl").write_text(early + json.dumps({"kind": "event", "event": event, "step": 2}) + "\n")
        assert refused(train(data_dir, out, *TRAIN, "--max_steps=1"), "already holds a run")
    (out / "metrics.jsonl").write_text(early)
    done = train(data_dir, out, *TRAIN, "--max_steps=1")
    assert (done.returncode, "takes its place" in done.stdout) == (0, True)
    assert ([r["step"] for r in metrics(out, "train")], len(metrics(out, "run"))) == ([1], 1)


def test_resuming_where_there_is_no_run(data_dir, tmp_path):
    """With options it is a fresh start, and says so; with none it would be the defaults', which nobody asked for."""
    out = tmp_path / "run"
    assert refused(call("train_gpt2.py", f"--out_dir={out}", "--resume=True"), "holds no run")
    assert not out.exists()
    done = train(data_dir, out, *FLAGS, "--max_steps=1")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"{out} does not exist: this is a fresh start")


def test_a_longer_run_keeps_the_evaluation_of_its_first_end(data_dir, tmp_path):
    for steps in (7, 10):
        assert train(data_dir, tmp_path / "run", *TRAIN, f"--max_steps={steps}", "--resume=True").returncode == 0
    assert [r["step"] for r in metrics(tmp_path / "run", "val")] == [0, 5, 7, 10]


PAIR = [*TRAIN, "--max_steps=24", "--checkpoint_interval=2", "--keep_checkpoints=0"]


@pytest.fixture(scope="module")
def pair(data_dir, tmp_path_factory):
    """A run of two processes."""
    out = tmp_path_factory.mktemp("pair") / "run"
    assert train(data_dir, out, *PAIR, processes=2).returncode == 0
    return out


@pytest.mark.parametrize("odd", ["", '{"kind": "train", "step": "x"}\n{"kind": "run"}\n[1]\n{"kind": "val", "st'])
def test_without_its_metrics_file_or_with_an_odd_one(data_dir, pair, tmp_path, odd):
    """As a checkpoint that was copied from elsewhere. The new file has all that a report needs."""
    out = cut(pair, tmp_path / "run", 22)
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").mkdir()
    assert refused(train(data_dir, out, *PAIR, "--resume=True"), "metrics.jsonl cannot be read: Is a directory")
    (out / "metrics.jsonl").rmdir()
    if odd:
        (out / "metrics.jsonl").write_text(odd)
    done = train(data_dir, out, *PAIR, "--resume=True")
    assert done.returncode == 0, done.stderr
    assert odd or metrics(out, "run")[0]["config"]["learning_rate"] == 3e-3
    assert events(out) == [("resume", 22), ("done", 24)]


@pytest.mark.parametrize("processes", [None, 4])
def test_on_any_number_of_processes_the_losses_are_the_same(data_dir, pair, tmp_path, processes):
    """To rounding, after a resume, which may also change the micro-batch."""
    out = cut(pair, tmp_path / "run", 18)
    done = train(data_dir, out, *PAIR, "--resume=True", "--batch_size=1", processes=processes)
    assert (done.returncode, "changed: batch_size = 1, was 2" in done.stdout) == (0, True), done.stderr
    for have, want in zip(records(out), records(pair), strict=True):
        assert have == pytest.approx(want, abs=1e-4)


def test_the_scaler_of_a_float16_run_goes_on(data_dir, tmp_path):
    flags = [*FLAGS, "--dtype=float16", "--keep_checkpoints=0", "--max_steps=12"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(data_dir, whole, *flags).returncode == 0
    assert train(data_dir, cut(whole, resumed, 6), *flags).returncode == 0
    assert records(resumed) == records(whole)
    assert same_state(resumed, whole)
    assert torch.load(resumed / "ckpt_000012.pt")["scaler"]["_growth_tracker"] > 6


def rank_1_has(flag):
    if os.environ["RANK"] == "1":
        sys.argv.append(flag)


def rank_1_sees_no_checkpoint():
    if os.environ["RANK"] == "1":
        load = checkpoint.load_run
        checkpoint.load_run = lambda path: load(path.with_name("elsewhere.pt"))


@pytest.mark.parametrize("what", ["option", "data", "out_dir", "out_dir to resume", "checkpoint"])
def test_ranks_that_disagree_do_not_begin(data_dir, pair, own_data, tmp_path, what):
    """Nor do those that do not see the same out_dir, at a first start or a later one."""
    out = tmp_path / "run" if what in ("option", "data", "out_dir") else cut(pair, tmp_path / "run", 22)
    meta = json.loads((own_data / "meta.json").read_text())
    (own_data / "meta.json").write_text(json.dumps(meta | {"val_words": 3}))
    flag = {"option": "--seed=5", "data": f"--data_dir={own_data}"}.get(what, f"--out_dir={tmp_path / 'elsewhere'}")
    setup = rank_1_sees_no_checkpoint if what == "checkpoint" else functools.partial(rank_1_has, flag)
    done = train(data_dir, out, *PAIR, "--resume=True", processes=2, setup=setup)
    said = {"option": "has other options, data", "data": "has other options, data", "checkpoint": "is not there"}
    assert done.returncode == 2
    assert said.get(what, "is not the same folder for all processes") in done.stderr
    assert f"rank 1 on {platform.node()}" in done.stderr
    assert not list(tmp_path.glob("*/ckpt_*[!2].pt"))


# ---- Signals, and deaths of a process


def test_a_signal_saves_the_step_that_is_running(data_dir, tmp_path):
    """Ended right there, the run has the records of one that was never stopped: a step's loss is saved with it."""
    out, alone = tmp_path / "run", tmp_path / "alone"
    flags = [*TRAIN, "--dropout=0.2", "--checkpoint_interval=100000", "--val_interval=0", "--schedule=constant"]
    flags += ["--log_interval=1000"]  # so that only a run's end writes the record of a later step
    process = fork(data_dir, out, *flags, "--max_steps=4000")
    process.until("step     1/")
    process.signal(signal.SIGTERM)
    assert process.ended() == 0
    assert "--resume=True goes on" in process.read()
    (event,) = metrics(out, "event")
    (path,) = out.glob("ckpt_*.pt")
    step = event["step"]
    assert event == {"kind": "event", "event": "stopped", "step": step, "signal": "SIGTERM"}
    assert checkpoint.step_of(path) == torch.load(path, weights_only=True)["step"] == step
    for folder in (out, alone):
        assert train(data_dir, folder, *flags, f"--max_steps={step}", "--resume=True").returncode == 0
    assert records(out) == records(alone)


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


@pytest.mark.parametrize(("when", "step"), [("evaluate", 5), ("sample", 5), ("evaluate", 8)])
def test_a_signal_in_an_evaluation(data_dir, tmp_path, monkeypatch, when, step):
    """It is broken off, and made anew when the run goes on, which ends as if nothing had happened. Step 8 is the last:
    the run is not done without its evaluation."""
    flags = [*FLAGS, "--checkpoint_interval=5", "--max_steps=8", "--sample_interval=5", "--keep_checkpoints=1"]
    assert train(data_dir, tmp_path / "a", *flags).returncode == 0
    original, calls = getattr(train_gpt2, when), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == {5: 2, 8: 3}[step]:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train_gpt2, when, interrupted)
    out = tmp_path / "b"
    assert train(data_dir, out, *flags).returncode == 0
    assert metrics(out, "event")[-1] == {"kind": "event", "event": "stopped", "step": step, "signal": "SIGTERM"}
    assert train(data_dir, out, *flags).returncode == 0
    assert records(out) == records(tmp_path / "a")
    assert same_state(out, tmp_path / "a")
    assert contents(out).keys() == contents(tmp_path / "a").keys()


def until(process, text):
    while text not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_torchrun_restarts_a_group_and_when_it_dies_itself_the_group_stops_in_order(data_dir, tmp_path):
    """As a user starts it. In the end the bits are those of a run that was left alone."""
    out, alone = tmp_path / "run", tmp_path / "alone"
    flags = [*PAIR, "--resume=True", "--schedule=constant", "--keep_checkpoints=2", "--max_steps=100000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    command += [ROOT / "train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={out}", *flags]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)
    for rank in (1, 0):  # twice, because the second restart finds what the first one left
        until(process, "saved")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[rank]), signal.SIGKILL)
        until(process, "resuming at step")
    until(process, "saved")
    process.kill()
    process.communicate(timeout=60)  # until the ranks have closed the output too
    event = metrics(out, "event")[-1]
    assert event["event"] == "stopped"
    assert checkpoint.step_of(checkpoint.newest_whole(out)) == event["step"] < 100000
    for folder in (out, alone):  # nobody holds the lock
        done = train(data_dir, folder, *flags, f"--max_steps={event['step'] + 1}", processes=2)
        assert done.returncode == 0, done.stderr
    assert records(out) == records(alone)
    assert same_state(out, alone)


# ---- Steps that compute nonsense


def spoil_rank_1():
    original, calls = train_gpt2.GPT.forward, []

    def poisoned(self, *args):
        loss = original(self, *args)
        if self.training:
            calls.append(1)
        bad = os.environ["RANK"] == "1" and len(calls) in (6, 7)  # after DDP's pass at the start: steps 5 and 6
        return loss * math.nan if bad else loss

    train_gpt2.GPT.forward = poisoned


def test_nan_on_one_rank_is_skipped_on_all(data_dir, tmp_path):
    """No weight changes, nor a moment of the optimizer. No checkpoint is written until a step is good again."""
    flags = [*TRAIN, "--max_steps=8", "--checkpoint_interval=2", "--keep_checkpoints=0", "--batch_size=4"]
    done = train(data_dir, tmp_path / "run", *flags, processes=2, setup=spoil_rank_1)
    assert done.returncode == 0, done.stderr
    assert events(tmp_path / "run") == [("skipped step", 5), ("skipped step", 6), ("done", 8)]
    assert [r["step"] for r in metrics(tmp_path / "run", "train") if r["loss"] is None] == [5, 6]
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path / "run")] == [8, 4, 2]
    four, eight = (torch.load(tmp_path / "run" / f"ckpt_00000{s}.pt", weights_only=True) for s in (4, 8))
    assert {state["step"].item() for state in eight["optimizer"].values()} == {6}  # of 8 steps
    assert all(weight.isfinite().all() for weight in eight["model"].values())
    assert not torch.equal(four["model"]["wte.weight"], eight["model"]["wte.weight"])


def test_a_diverged_run_is_saved_by_a_lower_learning_rate(data_dir, tmp_path, monkeypatch):
    """It gives up with its newest checkpoint good, says what to do, and that works."""
    out, flags = tmp_path / "run", [*TRAIN, "--checkpoint_interval=3", "--keep_checkpoints=1", "--val_interval=0"]
    monkeypatch.setattr(train_gpt2, "MAX_SKIPPED", 4)
    clip = torch.nn.utils.clip_grad_norm_

    def too_fast(params, most):  # a learning rate above 1e-3 diverges from step 5 on
        params = list(params)
        return clip(params, most) * (math.inf if rates.append(1) or (len(rates) > 4 and rate > 1e-3) else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", too_fast)
    rates, rate = [], 3e-3
    done = train(data_dir, out, *flags, "--max_steps=12")
    assert (done.returncode, done.stderr) == (3, "")
    assert "gave up at step 8: gradient norm inf, the last of 4 skipped steps in a row\nstep 3 is saved" in done.stdout
    assert "--resume=True and a --learning_rate below 0.003" in done.stdout
    assert [checkpoint.step_of(path) for path in checkpoint.find(out)] == [3]
    assert events(out) == [("skipped step", s) for s in (5, 6, 7, 8)] + [("gave up", 8)]
    assert not re.search("NaN|Infinity", (out / "metrics.jsonl").read_text())  # which JSON does not have
    rates, rate = [1] * 3, 1e-3
    done = train(data_dir, out, "--resume=True", "--learning_rate=1e-3", "--vector_lr=1e-4")
    assert done.returncode == 0, done.stderr
    assert "changed: learning_rate = 0.001, was 0.003" in done.stdout
    assert metrics(out, "event")[0]["changed"] == {"learning_rate": [3e-3, 1e-3], "vector_lr": [None, 1e-4]}
    assert [r["step"] for r in metrics(out, "train")] == list(range(1, 13))
    rates = [1] * 4
    rate = 3e-3
    done = train(data_dir, tmp_path / "early", *flags, "--max_steps=12")
    assert (done.returncode, "there is no checkpoint yet" in done.stdout) == (3, True)


# ---- Disks and folders


def test_a_disk_that_gets_full(data_dir, tmp_path, monkeypatch):
    """At the first checkpoint it ends the run; later the run goes on, but is not done until its end is saved."""
    flags = [*TRAIN, "--max_steps=8", "--checkpoint_interval=2", "--keep_checkpoints=2", "--resume=True"]
    out, want = tmp_path / "run", records(begun(data_dir, tmp_path / "alone", steps=8))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", disk_full_at(range(100)))
        assert refused(train(data_dir, out, *flags), "step 2 is not saved: No space left on device; make room")
        assert metrics(out, "train")[-1]["step"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", disk_full_at([6, 8]))
        done = train(data_dir, out, *flags)
        assert refused(done, "step 8 is not saved: No space left")
        assert done.stdout.count("NOT SAVED at step 6: No space left on device; older checkpoints are untouched") == 1
        assert events(out) == [("not saved", 6), ("not saved", 8)]
        assert [checkpoint.step_of(path) for path in checkpoint.find(out)] == [4, 2]
    assert train(data_dir, out, *flags).returncode == 0
    assert (events(out), records(out)) == ([("resume", 4), ("done", 8)], want)


@pytest.mark.parametrize("another", [False, True])
def test_a_folder_that_is_moved_and_maybe_another_runs_by_now(data_dir, tmp_path, monkeypatch, another):
    """The run writes nothing there, and deletes nothing, but ends with a line."""
    out, evaluate, calls = tmp_path / "run", train_gpt2.evaluate, []

    def evaluate_then_move(run):
        calls.append(1)
        if len(calls) == 2:  # at step 5
            out.rename(tmp_path / "moved")
            if another:
                out.mkdir()
                (out / "ckpt_000001.pt").write_text("another's")
        return evaluate(run)

    monkeypatch.setattr(train_gpt2, "evaluate", evaluate_then_move)
    flags = [*TRAIN, "--max_steps=9", "--checkpoint_interval=2", "--keep_checkpoints=1"]
    assert refused(train(data_dir, out, *flags), f"{out} was moved or deleted")
    assert [path.read_text() for path in out.glob("*")] == ["another's"] * another


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_an_error_of_the_system_is_no_damage(data_dir, tmp_path, monkeypatch, number):
    """A checkpoint that cannot be read at the moment is not overwritten by a run that begins at an older one."""
    out = begun(data_dir, tmp_path / "run", "--checkpoint_interval=1")
    before, open_zip = contents(out), checkpoint.zipfile.ZipFile

    def unreadable(path, *args):
        if path.name == "ckpt_000002.pt":
            raise OSError(number, os.strerror(number))
        return open_zip(path, *args)

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", unreadable)
    done = train(data_dir, out, *TRAIN, "--resume=True", "--max_steps=5")
    assert refused(done, f"ckpt_000002.pt cannot be read: {os.strerror(number)}")
    assert contents(out) == before


def test_one_run_at_a_time(data_dir, tmp_path):
    """Of two that start at the same moment one goes on; a third is kept out, even without a metrics.jsonl."""
    out, flags = tmp_path / "run", [*TRAIN, "--max_steps=100000", "--val_interval=0"]
    pair = [fork(data_dir, out, *flags) for _ in range(2)]
    deadline = time.monotonic() + 60
    while all(process.is_alive() for process in pair):
        assert time.monotonic() < deadline, "both of them train"
        time.sleep(0.01)
    first, second = sorted(pair, key=lambda process: process.is_alive(), reverse=True)
    assert second.ended() == 2
    first.until("step     2/")
    for flag in ("--resume=True", "--resume=False"):
        assert refused(train(data_dir, out, *flags, flag), "another process")
    (out / "metrics.jsonl").unlink()
    assert refused(train(data_dir, out, *flags, "--resume=True"), "another process")
    first.signal(signal.SIGTERM)
    assert first.ended() == 0


# ---- Data and options of a resumed run


@pytest.fixture
def own_data(data_dir, tmp_path):
    return shutil.copytree(data_dir, tmp_path / "data")


def spoil(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 7
    path.write_bytes(data)


@pytest.mark.parametrize("processes", [None, 2])
def test_an_id_out_of_range(own_data, tmp_path, processes):
    """Found when its window is read, in the first epoch, by whichever process does."""
    path = next(own_data.glob("*train_000002.bin"))
    spoil(path, at=1024 + 3001)  # a high byte: the id becomes 1792 or more
    flags = [*TRAIN, "--epochs=1", "--val_interval=0", "--log_interval=100"]
    done = train(own_data, tmp_path / "run", *flags, processes=processes)
    assert done.returncode == 2
    assert re.search(rf"^error: {path}: token 1500 is \d+, but the vocabulary has 257 ids", done.stderr, re.MULTILINE)
    assert processes or done.stderr.count("\n") == 1


@pytest.mark.parametrize("fault", ["one token", "new shard", "gone", "tokenizer"])
def test_data_that_changed_is_noticed_on_resume(own_data, tmp_path, fault):
    out = begun(own_data, tmp_path / "run")
    before, meta = contents(out), json.loads((own_data / "meta.json").read_text())
    if fault == "one token":
        spoil(next(own_data.glob("*train_000001.bin")), at=2000)
    elif fault == "new shard":
        (own_data / "meta.json").unlink()
        write_shard(own_data / "tiny_train_000003.bin", range(200))
    elif fault == "gone":
        next(own_data.glob("*train_000002.bin")).unlink()
    else:
        (own_data / "meta.json").write_text(json.dumps(meta | {"tokenizer": "gpt2"}))
    done = train(own_data, out, *TRAIN, "--max_steps=4", "--resume=True")
    assert refused(done, "gpt2" if fault == "tokenizer" else "tiny_train_0"), done.stderr
    assert contents(out) == before


def test_data_that_is_elsewhere_touched_or_without_meta(own_data, tmp_path):
    """It is the same data, a new file in the folder ends no run that goes on, and the tokenizer stays known."""
    out, moved = begun(own_data, tmp_path / "run"), tmp_path / "moved"
    own_data.rename(moved)
    assert refused(train(own_data, out, *TRAIN, "--max_steps=4", "--resume=True"), str(own_data))
    (moved / "meta.json").unlink()
    for path in moved.iterdir():
        os.utime(path)
    process = fork(moved, out, *TRAIN, "--max_steps=100000", "--resume=True", "--checkpoint_interval=1")
    process.until("step     4/")
    (moved / "tiny_train_000009.bin").write_bytes(b"half a shard")
    process.until("saved")
    process.until("saved")
    process.signal(signal.SIGTERM)
    assert process.ended() == 0
    assert torch.load(max(out.glob("ckpt_*.pt")), weights_only=True)["tokenizer"] == "bytes"


@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory):
    return begun(data_dir, tmp_path_factory.mktemp("resume") / "run")


@pytest.mark.parametrize(
    ("flag", "had"),
    [
        ("--n_layer=3", 2), ("--vocab_size=300", 257), ("--dropout=0.1", 0.0), ("--seed=2", 1337), ("--seq_len=16", 32),
        ("--total_batch_size=512", 256), ("--optimizer=muon", "adamw"), ("--val_tokens=4000", 2000),
        ("--init_from=gpt2", "scratch"),
    ],
)  # fmt: skip
def test_what_would_make_it_another_run_is_refused(data_dir, straight, flag, had):
    before, name = contents(straight), flag[2:].split("=")[0]
    done = train(data_dir, straight, *TRAIN, "--max_steps=4", "--resume=True", flag)
    assert refused(done, f"--{name}: {name} = ", f"this run has {had!r}")
    assert contents(straight) == before


def test_options_of_files_do_not_hold_against_the_runs_own(data_dir, straight, tmp_path, monkeypatch):
    """A flag changes what it may. What is not given is as it was, and a file that differs is a line."""
    monkeypatch.chdir(tmp_path)
    out, picked, pick = shutil.copytree(straight, tmp_path / "run"), [], distributed.pick_device
    monkeypatch.setattr(distributed, "pick_device", lambda device, rank: picked.append(device) or pick(device, rank))
    Path("my.py").write_text("max_steps = 1\nn_layer = 9\nseed = 1337\nbeta2 = 0.5\nout_dir = 'elsewhere'")
    done = call("train_gpt2.py", "my.py", f"--out_dir={out}", "--resume=True", "--max_steps=4", "--beta2=0.9")
    assert done.returncode == 0, done.stderr
    assert "my.py:2 says n_layer = 9; this run keeps 2\n" in done.stdout
    assert "changed: max_steps = 4, was 2" in done.stdout
    (event,) = [e for e in metrics(out, "event") if e["event"] == "resume"]
    assert event["changed"] == {"max_steps": [2, 4], "beta2": [0.95, 0.9]}
    done = call("train_gpt2.py", "my.py", f"--out_dir={out}", "--resume=True")
    assert "my.py:1 says max_steps = 1; this run keeps 4; a flag would change it\n" in done.stdout
    assert "this run is done, at step 4" in done.stdout
    assert picked == ["cpu", "cpu"]
    saved = torch.load(out / "ckpt_000004.pt")["config"]
    assert [saved[name] for name in ("data_dir", "learning_rate", "beta2")] == [str(data_dir), 3e-3, 0.9]


def test_checkpoints_to_begin_with_that_are_none(data_dir, tmp_path):
    """One that is damaged; and one that is a model only: it speaks, but has nothing to go on from."""
    out = begun(data_dir, tmp_path / "run")
    path, state = out / "ckpt_000002.pt", torch.load(out / "ckpt_000002.pt")
    torch.save({name: state[name] for name in ("model", "step", "gpt_config", "tokenizer")}, path)
    assert refused(train(data_dir, out, *TRAIN, "--max_steps=3", "--resume=True"), "--init_from")
    begun(data_dir, tmp_path / "new", f"--init_from={out}", steps=1)
    path.write_bytes(b"half")
    before = contents(out)
    done = train(data_dir, out, *TRAIN, "--max_steps=3", "--resume=True")
    assert (done.returncode, "no whole checkpoint" in done.stderr) == (2, True)
    assert contents(out) == before
