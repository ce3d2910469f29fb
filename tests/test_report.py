import json

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


@pytest.mark.parametrize("args", [[], ["nowhere"], ["--dpi=high", "nowhere"]])
def test_mistakes(args):
    done = call("report.py", *args)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
