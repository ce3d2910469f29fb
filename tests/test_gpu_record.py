"""records/gpu/run.sh: the command that tries everything on a card, here on a CPU and with its quickest rows."""

import contextlib
import importlib
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


def in_use(folder):
    """Whether a process has this folder in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if str(folder) in path.read_text(errors="replace"):
                return True
    return False


NANOGPT = """
import pathlib, subprocess
pathlib.Path(__file__).with_name("begun").touch()
subprocess.run(["sh", "-c", f"sleep 60; : {__file__}"])
"""


def test_rows_that_work_stop_fail_or_cannot_be_had_are_all_written_down(tmp_path, monkeypatch):
    """A stop in the middle leaves what was had and nothing that runs, and the same command goes on behind it."""
    out, begun, flags = tmp_path / "out", tmp_path / "begun", ("--only=nanogpt,speed_64_flash", f"--nanogpt={tmp_path}")
    (tmp_path / "model.py").write_text(NANOGPT)
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = start(out, *flags)
        while not begun.exists():
            assert process.poll() is None
            time.sleep(0.05)
        begun.unlink()
        process.send_signal(number)
        process.communicate(timeout=120)
        have = results(out)
        assert [have[name]["status"] for name in ("speed_64_flash", "nanogpt")] == ["measured", "not run"]
        deadline = time.monotonic() + 20
        while in_use(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    log = (out / "log.txt").read_text()
    assert [log.count(f"==== {name}") for name in ("speed_64_flash", "nanogpt")] == [1, 2]
    assert have["speed_64_flash"]["bench"]["config"]["batch_size"] == 8
    assert "tok/s" in have["speed_64_flash"]["result"]

    (tmp_path / "model.py").write_text("raise OSError('no nanoGPT in here')")
    process = start(out, *flags)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    have = results(out)
    assert {name: result["status"] for name, result in have.items()} == dict(
        speed_64_flash="measured", nanogpt="failed"
    )
    assert "no nanoGPT in here" in have["nanogpt"]["result"]
    table = (out / "results.md").read_text()
    assert all(f"| {name} | {result['status']} |" in table for name, result in have.items())

    # What has not been run comes first, and what does not fit into the time is not begun.
    monkeypatch.syspath_prepend(ROOT / "records/gpu")
    script = importlib.import_module("run")
    rows = script.to_run("right,nanogpt,speed_64_flash", False, have)
    names = [row.name for row in rows]
    assert (names[0], names[-1], "speed_64_flash" in names) == ("machine", "nanogpt", False)
    card = script.Card("cpu", True, 0, out, None, out, out)
    assert script.driven(card, rows[0], 10)["result"].startswith("10 s were left")


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
