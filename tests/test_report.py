import json
import math
import random
import re
import resource
import signal
import statistics
import sys
from pathlib import Path

import history
import plots
import pytest
from conftest import TRAIN, call, metrics
from history import History

import report
from metrics import Metrics

DATA = dict(tokenizer="bytes", vocab_size=257, train_tokens=8000, train_bytes=8000, val_tokens=900, val_bytes=899)


def fake(folder, optimizer="adamw", seed=1, offset=0.0, data=DATA, steps=60, **options):
    """A run of steps of 512 tokens, whose val loss ends at 2 + offset."""
    config = dict(optimizer=optimizer, seed=seed, out_dir=str(folder), val_tokens=900, max_steps=steps) | options
    log = Metrics(folder)
    log.begin(None)
    log.write("run", parameters=1_000_000, config=config, gpt_config={"n_layer": 2}, data=data, max_steps=steps)
    for step in range(steps + 1):
        if step % 10 == 0:
            log.write("val", step=step, val_loss=2 + offset + 3 * (1 - step / steps))
        if step < steps:
            log.write(
                "train", step=step + 1, loss=5.0 / (step + 1), mean_loss=5.0 / (step + 1), lr=1e-3, grad_norm=1.0,
                tokens=512 * (step + 1), tokens_per_sec=100.0 + step, dt=5.0, mfu=None, seconds=6.0 * (step + 1),
                epoch=0.1 * (step + 1),
            )  # fmt: skip
    log.close()
    return str(folder)


def pictures(folder):
    paths = sorted(Path(folder).glob("*.png"))
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in paths)
    return [path.name for path in paths]


def seen(figure):
    """All text that a figure shows."""
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def test_short_counts():
    counts = [0, 999, 1000, 1.5e6, 2e9, 1.3e13]
    assert [plots.short(count) for count in counts] == ["0", "999", "1k", "1.5M", "2B", "13T"]


@pytest.mark.parametrize("count", [1, 2, 5, 40])
@pytest.mark.parametrize("span", [1, 3, 9])
def test_smoothed_means(count, span):
    values = [random.Random(count).uniform(1, 5) for _ in range(count)]
    around = [values[max(0, i - span // 2) : i + span // 2 + 1] for i in range(count)]
    assert history.smoothed(values, span) == pytest.approx([statistics.fmean(part) for part in around])
    assert history.span_of(count) % 2 == 1


def test_epochs_tokens_means_and_hours_of_a_real_run(data_dir, tmp_path):
    """With accumulation: counted micro-batch by micro-batch, and second by second."""
    flags = ["--max_steps=9", "--log_interval=4", "--batch_size=2", "--total_batch_size=256"]
    assert call("train_gpt2.py", *TRAIN, *flags, f"--data_dir={data_dir}", f"--out_dir={tmp_path}").returncode == 0
    every = tmp_path / "every"
    assert (
        call("train_gpt2.py", *TRAIN, "--max_steps=9", f"--data_dir={data_dir}", f"--out_dir={every}").returncode == 0
    )
    losses = [record["loss"] for record in metrics(every, "train")]
    windows = sum((path.stat().st_size // 2 - 512 - 1) // 32 for path in data_dir.glob("*_train_*.bin"))
    tokens, last = 0, 0
    records = {record["step"]: record for record in metrics(tmp_path, "train")}
    assert list(records) == [1, 4, 8, 9]
    for step in range(1, 10):
        for _ in range(4):  # micro-batches of 2 windows of 32 tokens
            tokens += 2 * 32
        if step in records:
            assert records[step]["tokens"] == tokens
            assert records[step]["epoch"] == pytest.approx(tokens / 32 / windows)
            assert records[step]["mean_loss"] == pytest.approx(statistics.fmean(losses[last:step]), rel=1e-12)
            last = step
    run = history.read(tmp_path)
    assert history.epochs(run) == pytest.approx(9 * 8 / windows)
    assert history.tokens_of(run) == tokens
    done = metrics(tmp_path, "event")[-1]
    assert (done["event"], done["tokens"], done["mean_loss"]) == ("done", tokens, records[9]["mean_loss"])
    assert done["seconds"] >= records[9]["seconds"]
    assert done["val_loss"] == metrics(tmp_path, "val")[-1]["val_loss"]


def test_hours_and_cost(tmp_path):
    run = history.read(fake(tmp_path))
    for step, hours in zip((0, 1, 7, 60), history.along(run, (0, 1, 7, 60), "hours"), strict=True):
        seconds = 0.0
        for _ in range(step):
            seconds += 6.0
        assert hours == pytest.approx(seconds / 3600)
    assert history.along(run, (0, 60), "tokens") == [0, 60 * 512]
    dollars = sum(24 / 3600 for _ in range(360))
    assert report.cost(history.seconds_of(run), 24) == pytest.approx(dollars)
    assert report.facts(run, 24)["cost"] == "$2.40 at $24.00 an hour"
    assert report.facts(run)["wall time"].startswith("0:06:00 ")
    assert history.median_of(run, "tokens_per_sec") == statistics.median(100 + step for step in range(1, 60))


def test_a_resumed_runs_options_are_its_last(tmp_path):
    fake(tmp_path, max_steps=60)
    log = Metrics(tmp_path)
    log.lock()
    log.begin(60)
    log.write("event", event="resume", step=60, changed={"max_steps": [60, 90]})
    log.close()
    run = history.read(tmp_path)
    assert run.settings["max_steps"] == 90
    assert report.steps_of(run).startswith("60 of 90, ")
    assert report.state_of(run) == "not ended: last record at step 60"


# ---------------------------------------------------------------------------------------------------------------------
# One run


def test_a_run_writes_its_report(data_dir, tmp_path):
    out = tmp_path / "run"
    flags = ["--max_steps=4", "--report=True", "--sample_interval=4", "--sample_start=`the", "--sample_num=2"]
    done = call("train_gpt2.py", *TRAIN, *flags, f"--data_dir={data_dir}", f"--out_dir={out}")
    assert done.returncode == 0, done.stderr
    assert pictures(out) == ["loss.png", "loss_by_time.png", "training.png"]
    val = metrics(out, "val")[-1]["val_loss"]
    assert f"val loss: {val:.4f} nats per token at step 4" in done.stdout
    page = (out / "report.md").read_text()
    assert f"| {val:.4f} nats per token at step 4" in page
    assert "| done at step 4 |" in page
    assert "the first 2,000 tokens of the val shards of" in page
    assert page.count("Step 4:\n\n    `the") == 2
    assert "learning_rate = 0.003" in page
    assert set(re.findall(r"\]\((.*?)\)", page)) == set(pictures(out))
    assert [path.name for path in out.glob(".*")] == []
    before = page
    (out / "report.md").unlink()
    assert call("report.py", out).stdout == f"{out}/report.md\n"
    assert (out / "report.md").read_text() == before


def test_a_report_that_fails_ends_no_run(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is not installed
    args = [*TRAIN, "--max_steps=1", "--report=True", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"]
    done = call("train_gpt2.py", *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no report: " in done.stdout
    assert "done: " in done.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"ckpt_000001.pt", "metrics.jsonl"}


def test_training_starts_without_matplotlib():
    """It takes a second to import."""
    code = "import sys, train_gpt2, report; sys.exit('matplotlib' in sys.modules)"
    root = Path(report.__file__).parent
    assert __import__("subprocess").run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_a_run_that_has_not_started(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "run", "parameters": 5}) + "\n")
    assert call("report.py", tmp_path).returncode == 0
    assert pictures(tmp_path) == ["loss.png"]


def test_a_run_that_goes_on(tmp_path):
    """Torn in the middle of its last line."""
    fake(tmp_path)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    done = call("report.py", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"not ended: last record at step (3|4)\d", (tmp_path / "report.md").read_text())


def test_skipped_steps_resumes_and_losses_that_are_not_finite(tmp_path):
    fake(tmp_path)
    log = Metrics(tmp_path)
    log.lock()
    log.begin(60)
    log.write("event", event="resume", step=60, checkpoint="ckpt_000060.pt", changed={})
    log.write("event", event="skipped step", step=61, loss=math.nan, grad_norm=1.5)
    log.write("train", step=61, loss=math.nan, lr=1e-3, mean_loss=None)
    log.write("event", event="gave up", step=61)
    log.close()
    [run] = [history.read(tmp_path)]
    figure = plots.plots(history.group([run]), "nats per token")["loss.png"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["resumed"].get_xdata().tolist() == [60]
    assert lines["skipped step"].get_xdata().tolist() == [61]
    report.write([run], tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| 61 | skipped step | loss not finite, grad_norm 1.5 |" in page
    assert "| gave up at step 61 |" in page


def test_what_the_picture_says(tmp_path):
    """The numbers on the axes are the records'."""
    run = history.read(fake(tmp_path))
    figures = plots.plots(history.group([run]), "nats per token")
    axes = figures["loss.png"].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["val (last 2.0000)"].get_xdata().tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert lines["train, mean since the last record"].get_ydata().tolist() == [5.0 / step for step in range(1, 61)]
    assert "train, smoothed (mean of 3 records)" in lines
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss (nats per token)")
    assert "tokens trained on" in seen(figures["loss.png"])
    hours = figures["loss_by_time.png"].axes[0]
    assert hours.get_xlabel() == "minutes since the launch"
    assert hours.lines[-1].get_xdata().max() == pytest.approx(6)


# ---------------------------------------------------------------------------------------------------------------------
# Several runs


def test_optimizers_with_three_seeds_each(tmp_path):
    folders = [fake(tmp_path / f"a{seed}", "adamw", seed, seed / 100) for seed in (1, 2, 3)]
    folders += [fake(tmp_path / f"m{seed}", "muon", seed, seed / 100 - 0.5) for seed in (1, 2, 3)]
    done = call("report.py", *folders, "--dollars_per_hour=2")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/comparison/report.md\n"), done.stderr
    runs = list(map(history.read, folders))
    groups = history.group(runs)
    assert [(each.label, len(each.runs)) for each in groups] == [("adamw", 3), ("muon", 3)]
    curve = history.val_curve(groups[1], "nats per token")
    brute = [[2 + seed / 100 - 0.5 + 3 * (1 - step / 60) for seed in (1, 2, 3)] for step in range(0, 61, 10)]
    assert curve.steps == list(range(0, 61, 10))
    assert curve.mean == pytest.approx([sum(each) / 3 for each in brute])
    assert curve.low == pytest.approx([min(each) for each in brute])
    assert curve.high == pytest.approx([max(each) for each in brute])
    says = history.verdict(groups, "nats per token")
    assert says == (
        "muon: 1.5200, 0.5000 nats per token below adamw (2.0200) at step 60, "
        "whose loss it reaches by step 50; the runs' ranges do not overlap"
    )
    page = (tmp_path / "comparison" / "report.md").read_text()
    assert says in page
    assert "| optimizer | adamw | muon |" in page
    assert "1.5100 to 1.5300" in page
    assert "$0.60" in page  # three runs of six minutes
    assert pictures(tmp_path / "comparison") == ["loss.png", "loss_by_time.png", "training.png"]
    assert not list((tmp_path / "a1").glob("*.png"))


def test_ranges_that_overlap_and_single_runs(tmp_path):
    a = [history.read(fake(tmp_path / f"a{seed}", "adamw", seed, seed)) for seed in (1, 2)]
    b = [history.read(fake(tmp_path / f"b{seed}", "muon", seed, seed - 0.5)) for seed in (1, 2)]
    assert history.verdict(history.group(a + b), "nats per token").endswith("the runs' ranges overlap")
    assert history.verdict(history.group([a[0], b[0]]), "nats per token").endswith("one run each: seeds not tried")
    assert history.verdict(history.group(a), "nats per token") is None


def test_other_sizes_of_steps_are_compared_by_tokens_too(tmp_path):
    a, b = fake(tmp_path / "a"), fake(tmp_path / "b", total_batch_size=256)
    path = tmp_path / "b" / "metrics.jsonl"
    path.write_text(re.sub(r'"tokens": (\d+)', lambda m: f'"tokens": {int(m[1]) // 2}', path.read_text()))
    assert call("report.py", a, b, f"--out_dir={tmp_path / 'out'}").returncode == 0
    assert "loss_by_tokens.png" in pictures(tmp_path / "out")


def test_different_vocabularies(tmp_path):
    """In bits per byte, which do compare; where the bytes are not known, a line."""
    bpe = dict(tokenizer="gpt2", vocab_size=50257, train_tokens=2000, train_bytes=8000, val_tokens=225, val_bytes=899)
    a, b = fake(tmp_path / "a"), fake(tmp_path / "b", data=bpe, offset=4.0)
    assert call("report.py", a, b).returncode == 0
    says = (tmp_path / "comparison" / "report.md").read_text()
    bits = [2 / math.log(2) * 900 / 899, 6 / math.log(2) * 225 / 899]
    assert f"{bits[0]:.4f} at step 60" in says
    assert f"{bits[1]:.4f} at step 60" in says
    assert f"{bits[0] - bits[1]:.4f} bits per byte below" in says
    done = call("report.py", a, fake(tmp_path / "c", data={"tokenizer": "gpt2"}))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "losses do not compare" in done.stderr


def test_different_data(tmp_path):
    runs = [history.read(fake(tmp_path / "a")), history.read(fake(tmp_path / "b", data=DATA | {"val_bytes": 700}))]
    assert history.verdict(history.group(runs), "nats per token") is None
    figure = plots.plots(history.group(runs), "nats per token")["loss.png"]
    assert "different data" in seen(figure)


@pytest.mark.parametrize(
    ("change", "curves"),
    [
        ({}, 2),
        ({"total_batch_size": 262144}, 0),
        ({"val_tokens": 1000}, 0),
        ({"block_size": 512}, 0),
        ({"tokenizer": "bytes"}, 0),
        ({"dataset": "books"}, 0),
        ({"dataset": "HuggingFaceFW/fineweb-edu"}, 1),
    ],
)
def test_published_curves_stand_beside_their_own_kind_only(tmp_path, change, curves):
    have = dict(
        dataset="HuggingFaceFW/fineweb", tokenizer="gpt2", val_tokens=10485760, block_size=1024, total_batch_size=524288
    ) | change  # fmt: skip
    data = DATA | dict(tokenizer=have["tokenizer"], settings={"dataset": have["dataset"]})
    options = {name: have[name] for name in ("val_tokens", "block_size", "total_batch_size")}
    run = history.read(fake(tmp_path, data=data, **options))
    shown = seen(plots.plots(history.group([run]), "nats per token")["loss.png"])
    assert sum(reference.label in shown for reference in plots.REFERENCES) == curves


@pytest.mark.parametrize(("n", "known"), [(10042, True), (100, False)])
def test_hellaswag(tmp_path, n, known):
    scores = [{"kind": "hellaswag", "step": step, "acc": 0.25, "acc_norm": 0.26, "n": n} for step in (0, 5)]
    run = History(tmp_path, [{"kind": "run", "parameters": 5}, *scores])
    shown = seen(plots.plots(history.group([run]), "nats per token")["hellaswag.png"])
    assert ("0.2955" in shown) == known
    assert report.facts(run)["HellaSwag"] == f"acc 0.2500, acc_norm 0.2600, of {n:,} examples"


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"kind": "tra\n',
        b'{"kind": "train"}\n',
        b'{"kind": "run", "parameters": null}\n',
        b'{"kind": "run", "parameters": 5, "config": 5}\n',
        b'{"kind": "run", "parameters": 5, "data": {"val_tokens": "5"}}\n',
        b'{"kind": "val", "step": "1", "val_loss": 1.0}\n',
        b'{"kind": "val", "step": 1, "val_loss": NaN}\n',
        b'{"kind": "val", "step": 1, "val_loss": 1e300}\n',
        b'{"kind": "val", "step": 1' + b"0" * 30 + b', "val_loss": 1.0}\n',
        b'{"kind": "sample", "step": 1, "text": 5}\n',
        b'{"kind": []}\n',
        b'["kind"]\n',
        b'{"step": 1, "train/loss": 3.5}\n',  # another program's
        b"step:1 train_loss:3.5\n",
        b"\xff\n",
        b"\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_damaged_empty_and_foreign_files(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    done = call("report.py", tmp_path)
    *left_out, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert error.startswith(f"error: {tmp_path / 'metrics.jsonl'}: ")
    assert all("skipped" in line for line in left_out)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_for_a_file_and_a_name_that_looks_like_mathematics(tmp_path):
    run = tmp_path / "$a^$"
    (run / "metrics.jsonl").mkdir(parents=True)
    done = call("report.py", run)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    (run / "metrics.jsonl").rmdir()
    fake(run)
    fake(tmp_path / "_b|$^$", n_embd="$^$")
    assert call("report.py", run).returncode == 0
    done = call("report.py", run, tmp_path / "_b|$^$")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nowhere"],
        ["--dpi=high", "nowhere"],
        ["--dpi=0", "."],
        ["--dollars_per_hour=-1", "."],
        ["\udcff"],
        ["x" * 999],
    ],
)
def test_mistakes(args):
    done = call("report.py", *args)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_full_disk(tmp_path):
    fake(tmp_path)
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
    fake(tmp_path)
    done = call("report.py", f"~/{tmp_path.name}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss.png").exists()
