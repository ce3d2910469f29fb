"""records/gpu/run.sh: the command that tries everything on a card, here on a CPU and with its quickest rows."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from conftest import ROOT

from tokenizer import get_tokenizer

ENV = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def start(out, *args):
    command = ["bash", ROOT / "records/gpu/run.sh", out, "--device=cpu", *args]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(out):
    return {result["name"]: result for result in json.loads((out / "results.json").read_text())}


def test_rows_that_work_fail_or_cannot_be_had_are_all_written_down(tmp_path):
    (tmp_path / "model.py").write_text("raise OSError('no nanoGPT in here')")
    out = tmp_path / "out"
    process = start(out, "--only=nanogpt,speed_32_flash", f"--nanogpt={tmp_path}")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    have = results(out)
    assert {name: result["status"] for name, result in have.items()} == dict(
        nanogpt="failed", speed_32_flash="measured"
    )
    assert "no nanoGPT in here" in have["nanogpt"]["result"]
    assert have["speed_32_flash"]["bench"]["config"]["batch_size"] == 4
    assert "tok/s" in have["speed_32_flash"]["result"]
    table = (out / "results.md").read_text()
    assert all(f"| {name} | {result['status']} |" in table for name, result in have.items())
    # The same command goes on: first with what has not been run, and one that does not fit into the time is not begun.
    flags = ("--only=nanogpt,speed_32_flash,machine", "--limit=10")
    said, _ = start(out, *flags).communicate(timeout=120)
    assert [line.split()[0] for line in said.splitlines()[:2]] == ["machine", "nanogpt"]
    again = results(out)
    assert (again["machine"]["status"], again["machine"]["result"][:14]) == ("not run", "10 s were left")
    assert (again["nanogpt"], again["speed_32_flash"]) == (have["nanogpt"], have["speed_32_flash"])


def test_a_stop_leaves_what_was_had_and_nothing_that_runs(tmp_path):
    log = tmp_path / "log.txt"
    for number in (signal.SIGKILL, signal.SIGTERM):  # the second time it goes on
        process = start(tmp_path, "--only=machine,precision")
        begun = log.read_text().count("step     1/30") if log.exists() else 0
        while not (log.exists() and log.read_text().count("step     1/30") > begun):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=120)
        have = {name: result["status"] for name, result in results(tmp_path).items()}
        assert have == dict(machine="measured", precision="not run")
        deadline = time.monotonic() + 20
        while any(str(tmp_path) in command for command in commands()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert log.read_text().count("==== machine") == 1
    assert "--dtype=bfloat16" not in log.read_text()  # the row's second run


def commands():
    """The command lines of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            yield path.read_text(errors="replace")


def test_what_rows_need_travels(tmp_path):
    (tmp_path / "text.txt").write_text("First Citizen: speak, speak. " * 100)
    said, _ = start(tmp_path / "data", "--prepare", f"--text={tmp_path}/text.txt").communicate(timeout=120)
    assert "is ready" in said
    meta = json.loads((tmp_path / "data/words/meta.json").read_text())
    [shard] = (tmp_path / "data/words").glob("*_train_*.bin")
    ids = np.fromfile(shard, dtype="<u2")[512:].tolist()
    enc = get_tokenizer(str(tmp_path / "data/words" / meta["tokenizer"]))  # with no network and no package
    assert enc.decode(ids) == (tmp_path / "text.txt").read_text()


def test_an_unknown_row_and_a_machine_without_a_card_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, "CUDA_VISIBLE_DEVICES", "")
    for flag, told in (("--only=machin", "no machin"), ("--device=cuda", "--device=cpu")):
        process = start(tmp_path / "out", flag)
        said, _ = process.communicate(timeout=120)
        assert (process.returncode, told in said.splitlines()[-1]) == (2, True)
        assert not (tmp_path / "out").exists()
