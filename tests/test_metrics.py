import errno
import importlib.util
import json
import os
import resource
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing import event_accumulator

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
    begin(tmp_path, 3).write("event", event="resume", step=3)
    records = read_metrics(tmp_path / "metrics.jsonl")
    have = [(r["kind"], r.get("step")) for r in records]
    want = [("run", None), ("val", 0), ("train", 1), ("event", 1), ("val", 1), ("train", 2), ("event", 2), ("val", 2)]
    assert have == [*want, ("train", 3), ("event", 3), ("event", 3)]
    assert records[2]["loss"] is None is records[2]["grad_norm"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_torn_at_any_byte(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    records = [{"kind": "train", "step": step, "loss": 1.5, "text": "é\n"} for step in range(3)]
    whole = "".join(json.dumps(record) + "\n" for record in records).encode()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read_metrics(path) == records[: whole[: size + 1].count(b"\n")]  # a line is whole without its newline
    assert capsys.readouterr().err == ""
    path.write_bytes(whole[:20] + b"\0\xff\n" + whole)  # torn in the middle: it says so
    assert read_metrics(path) == records
    assert "metrics.jsonl:1" in capsys.readouterr().err


def test_a_new_run_starts_an_empty_file(tmp_path):
    begin(tmp_path / "a" / "b").write("run")
    assert (tmp_path / "a" / "b" / "metrics.jsonl").read_text() == '{"kind": "run"}\n'


def test_one_writer(tmp_path):
    out = tmp_path / "run"
    first, second = Metrics(out), Metrics(out)
    assert (first.lock(), second.lock()) == (False, False)
    first.begin(None)
    first.write("run")
    with pytest.raises(UserError, match="another process"):
        Metrics(out).lock()
    with pytest.raises(UserError, match="another process"):  # both looked when there was no run yet
        second.begin(None)
    first.close()
    again = Metrics(out)
    assert again.lock()
    for _ in range(2):
        with pytest.raises(UserError, match="another process"):
            Metrics(out).lock()
        again.begin(0)
    again.close()
    assert read_metrics(out / "metrics.jsonl") == [{"kind": "run"}]


def test_the_lock_is_the_folders(tmp_path):
    """A run whose metrics.jsonl was deleted still keeps others out."""
    log = begin(tmp_path)
    log.path.unlink()
    with pytest.raises(UserError, match="another process"):
        begin(tmp_path)
    log.close()
    begin(tmp_path).close()


def test_a_resume_that_finds_no_room_leaves_the_old_file(tmp_path):
    log = begin(tmp_path)
    for step in range(1000):
        log.write("train", step=step)
    log.close()
    before = log.path.read_bytes()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 3, hard))  # a write that crosses this comes back short
    try:
        with pytest.raises(UserError, match="cannot be written: File too large"):
            begin(tmp_path, 900)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_bytes() == before


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


def test_tensorboard_shows_the_same_numbers_once(tmp_path):
    """After a resume too: what was dropped from metrics.jsonl is gone from there."""
    for resumed_at in (None, 2):
        log = begin(tmp_path, resumed_at, "tensorboard")
        if resumed_at is None:
            log.write("run", seed=1)
        for step in range((resumed_at or 0) + 1, 5):
            log.write("train", step=step, loss=1.0 / step, mfu=None)
            log.write("val", step=step, val_loss=2.0 / step)
            log.write("sample", step=step, text="é\n<b>")
        log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for kind, name in (("train", "loss"), ("val", "val_loss")):
        want = [(r["step"], r[name]) for r in read_metrics(log.path) if r["kind"] == kind]
        have = [(e.step, e.value) for e in events.Scalars(f"{kind}/{name}")]
        assert have == [(step, pytest.approx(value)) for step, value in want]
    assert events.Tags()["scalars"] == ["train/loss", "val/val_loss"]


def test_wandb_gets_the_same_records(tmp_path, monkeypatch):
    """A stand-in for the package: which calls it gets, over two lives of one run."""
    calls = []
    run = SimpleNamespace(
        log=calls.append, define_metric=lambda *args, **kwargs: None, finish=lambda: calls.append("finish")
    )
    stand_in = ModuleType("wandb", "stand-in")
    stand_in.__spec__ = ModuleSpec("wandb", None, origin="stand-in")
    stand_in.init = lambda **kwargs: calls.append(kwargs["id"]) or run
    stand_in.Settings = dict
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for resumed_at in (None, 1):
        log = begin(tmp_path / "mine", resumed_at, "wandb")
        if resumed_at is None:
            log.write("run", seed=1, time="2026-01-02T03:04")
        log.write("event", event="x", step=0)
        log.write("train", step=2, loss=1.5, mfu=None)
        log.close()
    values = {"step": 2, "train/loss": 1.5, "train/mfu": None}
    assert calls == ["mine-202601020304", values, "finish"] * 2


def test_log_to_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        begin(tmp_path / "run", None, "tensorboard")
    assert not (tmp_path / "run").exists()


def test_bits_per_byte():
    meta = {"val_tokens": 1000, "val_bytes": 4000}
    assert bits_per_byte(2.0, meta) == pytest.approx(2.0 / 0.6931471805599453 / 4)
    assert bits_per_byte(2.0, {}) is None


def test_word_loss():
    meta = {"val_tokens": 275844, "val_words": 245566}  # of a published table: 3.03 and 3.40
    assert word_loss(3.03, meta) == pytest.approx(3.03 * 275843 / 245565)
    assert round(word_loss(3.03, meta), 2) == 3.40
    assert word_loss(2.0, {}) is None
    assert word_loss(2.0, {"val_tokens": 5, "val_words": 1}) is None


class Failing:
    def show(self, record):
        raise RuntimeError("no room\nleft")

    close = None


def test_a_mirror_that_fails_is_dropped(tmp_path, capsys):
    log = begin(tmp_path)
    log.mirror = Failing()
    for step in range(3):
        log.write("train", step=step)
    log.close()
    assert len(read_metrics(log.path)) == 3
    assert capsys.readouterr().err == f"metrics go to {log.path} alone from here on: no room left\n"


def test_a_mirror_that_cannot_be_opened_ends_no_run(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    log = begin(tmp_path, log_to="tensorboard")
    log.write("train", step=1)
    log.close()
    assert capsys.readouterr().err.count("alone from here on") == 1


def test_a_stray_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="pip install wandb"):
        begin(tmp_path / "run", log_to="wandb")


COLUMNS = (80, 54, 53, 43, 42, 10)


def test_a_line_of_parts_fits_the_terminal(monkeypatch, capsys):
    log = Metrics("out")
    parts = dict(step="step 5000/19073", lr="lr 6.00e-04", mfu="", ms="125.4 ms", eta="eta 4:51:12")
    log.say_parts(parts, spare=("ms", "lr"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns in COLUMNS:
        monkeypatch.setenv("COLUMNS", str(columns))
        log.say_parts(parts, spare=("ms", "lr"))
    whole, *lines = capsys.readouterr().out.splitlines()
    assert whole == "step 5000/19073 | lr 6.00e-04 | 125.4 ms | eta 4:51:12"
    without_ms, shortest = "step 5000/19073 | lr 6.00e-04 | eta 4:51:12", "step 5000/19073 | eta 4:51:12"
    assert lines == [whole if n >= len(whole) else without_ms if n >= len(without_ms) else shortest for n in COLUMNS]
