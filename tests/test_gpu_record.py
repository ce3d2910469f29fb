"""records/gpu/run.sh: the command that tries everything on a card, here on a CPU and with its quickest rows."""

import json
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT

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
    # Rows that are there stay when others are run, and one that does not fit into the time left is not begun.
    assert start(out, "--only=machine", "--limit=10").communicate(timeout=120)
    again = results(out)
    assert (again["machine"]["status"], again["machine"]["result"][:14]) == ("not run", "10 s were left")
    assert again["nanogpt"] == have["nanogpt"]


def test_a_stop_leaves_what_was_had_and_nothing_that_runs(tmp_path):
    process, log = start(tmp_path, "--only=machine,precision"), tmp_path / "log.txt"
    while not (log.exists() and "step     1/30" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert {name: result["status"] for name, result in results(tmp_path).items()} == dict(
        machine="measured", precision="not run"
    )
    assert "--dtype=bfloat16" not in log.read_text()  # the row's second run


def test_an_unknown_row_and_a_machine_without_a_card_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, "CUDA_VISIBLE_DEVICES", "")
    for flag, told in (("--only=machin", "no machin"), ("--device=cuda", "--device=cpu")):
        process = start(tmp_path / "out", flag)
        said, _ = process.communicate(timeout=120)
        assert (process.returncode, told in said.splitlines()[-1]) == (2, True)
        assert not (tmp_path / "out").exists()
