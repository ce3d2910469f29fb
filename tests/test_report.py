import json
import resource
import signal

import pytest
from conftest import call

from metrics import Metrics


def test_plots(tmp_path):
    log = Metrics(tmp_path)
    log.begin(None)
    log.write("run", parameters=1_000_000)
    log.write("val", step=0, val_loss=4.0)
    for step in range(1, 20):
        log.write("train", step=step, loss=4.0 / step if step != 7 else float("nan"), lr=1e-3 / step)
    log.write("val", step=19, val_loss=0.5)
    done = call("report.py", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("loss.png", "lr.png"):
        assert str(tmp_path / name) in done.stdout
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_that_has_not_started(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "run", "parameters": 5}) + "\n")
    assert call("report.py", tmp_path).returncode == 0


@pytest.mark.parametrize(
    "content",
    [
        b'{"kind": "tra\n',
        b'{"kind": "train"}\n',
        b'{"kind": "run", "parameters": null}\n',
        b'{"kind": "val", "step": "1", "val_loss": 1.0}\n',
        b'{"kind": "val", "step": 1, "val_loss": NaN}\n',
        b'{"kind": "val", "step": 1, "val_loss": 1e300}\n',
        b'{"kind": "val", "step": 1' + b"0" * 30 + b', "val_loss": 1.0}\n',
        b'{"kind": []}\n',
        b'["kind"]\n',
        b"\xff\n",
        b"\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_damaged_metrics(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    done = call("report.py", tmp_path)
    *left_out, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert error.startswith(f"error: {tmp_path / 'metrics.jsonl'}: ")
    assert all("skipped" in line for line in left_out)
    assert not list(tmp_path.glob("*.png"))


def test_a_folder_for_a_file_and_a_name_that_looks_like_mathematics(tmp_path):
    run = tmp_path / "$a^$"
    (run / "metrics.jsonl").mkdir(parents=True)
    done = call("report.py", run)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    (run / "metrics.jsonl").rmdir()
    (run / "metrics.jsonl").write_text('{"kind": "run", "parameters": 5}\n')
    assert call("report.py", run).returncode == 0


@pytest.mark.parametrize(
    "args", [[], ["nowhere"], ["--dpi=high", "nowhere"], ["--dpi=0", "."], ["\udcff"], ["x" * 999]]
)
def test_mistakes(args):
    done = call("report.py", *args)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_full_disk(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run", "parameters": 5}\n')
    assert call("report.py", tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in (0, 1, len(before[tmp_path / "loss.png"]) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            done = call("report.py", tmp_path)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr == f"error: {tmp_path}/loss.png: File too large\n"
            assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run", "parameters": 5}\n')
    done = call("report.py", f"~/{tmp_path.name}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss.png").exists()
