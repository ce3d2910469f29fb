import errno
import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from configurator import UserError
from metrics import Metrics, bits_per_byte, read_metrics, word_loss


def begin(out_dir, resumed_at=None, log_to=None):
    log = Metrics(out_dir)
    log.lock()
    log.begin(resumed_at, log_to, again={"val"})
    return log


def test_records_past_a_resume_go(tmp_path):
    log = begin(tmp_path)
    log.write("run", seed=1)
    for step in range(5):
        log.write("val", step=step, val_loss=1.0)
        log.write("train", step=step + 1, loss=float("nan"), grad_norm=float("inf"), mfu=None)
        log.write("event", event="x", step=step + 1)
    log.file.write(b'{"kind": "tra')  # killed in the middle of a line
    log.close()
    log = begin(tmp_path, 3)
    assert log.has_run
    log.write("event", event="resume", step=3)
    records = read_metrics(tmp_path / "metrics.jsonl")
    have = [(r["kind"], r.get("step")) for r in records]
    want = [("run", None), ("val", 0), ("train", 1), ("event", 1), ("val", 1), ("train", 2), ("event", 2), ("val", 2)]
    assert have == [*want, ("train", 3), ("event", 3), ("event", 3)]
    assert records[2]["loss"] is None is records[2]["grad_norm"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_torn_at_any_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"kind": "train", "step": step, "loss": 1.5, "text": "é\n"} for step in range(3)]
    whole = "".join(json.dumps(record) + "\n" for record in records).encode()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read_metrics(path) == records[: whole[: size + 1].count(b"\n")]  # a line is whole without its newline
    path.write_bytes(whole[:20] + b'\0\xff\n[1]\n{"kind": "val", "step": null}\n' + whole)
    assert read_metrics(path) == records


class FullDisk:
    """A file that takes `room` more bytes."""

    def __init__(self, path, room):
        self.file, self.room = open(path, "wb", buffering=0), room  # noqa: SIM115

    def write(self, data):
        if not self.room and data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written


def test_a_full_disk_loses_no_record(tmp_path, capsys):
    log = begin(tmp_path)
    log.file = FullDisk(log.path, 30)
    for step in range(4):
        log.write("train", step=step)
    assert capsys.readouterr().err.count("No space left") == 1
    with pytest.raises(OSError, match="No space"):
        log.sync()
    log.file.room = 1000
    log.write("train", step=4)
    assert [r["step"] for r in read_metrics(log.path)] == [0, 1, 2, 3, 4]


def test_a_file_system_without_fsync(tmp_path, monkeypatch):
    log = begin(tmp_path)
    for code in (errno.EINVAL, errno.EIO):  # it has no such call; the disk fails

        def fsync(handle, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)
        if code == errno.EINVAL:
            log.sync()
            continue
        with pytest.raises(OSError, match="Input/output"):
            log.sync()


def test_wandb_gets_the_numbers(tmp_path, monkeypatch, capsys):
    """A stand-in for the package: which calls it gets, over two launches of one run; then one that fails."""
    calls = []
    run = SimpleNamespace(log=calls.append, define_metric=lambda *args, **kwargs: None, finish=lambda: None)
    stand_in = ModuleType("wandb", "stand-in")
    stand_in.__spec__ = ModuleSpec("wandb", None, origin="stand-in")
    stand_in.init, stand_in.Settings = lambda **kwargs: calls.append(kwargs["id"]) or run, dict
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for resumed_at in (None, 1):
        log = begin(tmp_path / "mine", resumed_at, "wandb")
        if resumed_at is None:
            log.write("run", seed=1, time="2026-01-02T03:04")
        log.write("event", event="x", step=0)
        log.write("sample", step=0, text="not a number")
        log.write("train", step=2, loss=1.5, mfu=None, time="12:00")
        log.close()
    assert calls == ["mine-202601020304", {"step": 2, "train/loss": 1.5}] * 2

    run.log = lambda values: (_ for _ in ()).throw(RuntimeError("no room\nleft"))
    log = begin(tmp_path / "mine", 1, "wandb")
    for step in (2, 3):
        log.write("val", step=step, val_loss=1.0)
    log.close()
    assert capsys.readouterr().err == f"metrics go to {log.path} alone from here on: no room left\n"
    assert [r["step"] for r in read_metrics(log.path) if r["kind"] == "val"] == [2, 3]


@pytest.mark.parametrize("stray", [False, True])
def test_log_to_without_its_package(tmp_path, monkeypatch, stray):
    """A stray folder of that name is none."""
    if stray:
        (tmp_path / "wandb").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        begin(tmp_path / "run", None, "wandb")
    assert not (tmp_path / "run").exists()


def test_losses_in_other_units():
    meta = {"val_tokens": 275844, "val_words": 245566, "val_bytes": 4 * 275844}  # of a published table: 3.03 and 3.40
    assert bits_per_byte(2.0, meta) == pytest.approx(2.0 / 0.6931471805599453 / 4)
    assert word_loss(3.03, meta) == pytest.approx(3.03 * 275843 / 245565)
    assert round(word_loss(3.03, meta), 2) == 3.40
    assert bits_per_byte(2.0, {}) is word_loss(2.0, {}) is word_loss(2.0, {"val_tokens": 5, "val_words": 1}) is None
