import errno
import json
import os

import pytest

from configurator import UserError
from metrics import Metrics, bits_per_byte, lock_metrics, read_metrics, word_loss


def test_records_past_a_resume_go(tmp_path):
    log = Metrics(tmp_path, None, None)
    log.write("run", seed=1)
    for step in range(5):
        log.write("val", step=step, val_loss=1.0)
        log.write("train", step=step + 1, loss=float("nan"), grad_norm=float("inf"), mfu=None)
        log.write("event", event="x", step=step + 1)
    log.file.write(b'{"kind": "tra')  # killed in the middle of a line
    log.file.close()
    Metrics(tmp_path, 3, lock_metrics(tmp_path)).write("event", event="resume", step=3)
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
    Metrics(tmp_path / "a" / "b", None, None).write("run")
    assert (tmp_path / "a" / "b" / "metrics.jsonl").read_text() == '{"kind": "run"}\n'


def test_one_writer(tmp_path):
    assert lock_metrics(tmp_path) is None
    log = Metrics(tmp_path, None, None)
    log.write("run")
    with pytest.raises(UserError, match="another process"):
        lock_metrics(tmp_path)
    with pytest.raises(UserError, match="just begun"):  # both looked when there was no run yet
        Metrics(tmp_path, None, None)
    log.file.close()
    again = Metrics(tmp_path, 0, lock_metrics(tmp_path))
    with pytest.raises(UserError, match="another process"):
        lock_metrics(tmp_path)
    again.file.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "run"}]


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
    log = Metrics(tmp_path, None, None)
    log.file = FullDisk(log.path, 30)
    for step in range(4):
        log.write("train", step=step)
    assert capsys.readouterr().err.count("No space left") == 1
    with pytest.raises(OSError, match="No space"):
        log.sync()
    log.file.room = 1000
    log.write("train", step=4)
    assert [r["step"] for r in read_metrics(log.path)] == [0, 1, 2, 3, 4]


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
