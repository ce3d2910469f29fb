"""report.py: the numbers on the page and in the plots are those of the records."""

import json
import math
import re
import resource
import signal
import statistics
from pathlib import Path

import pytest
from conftest import TRAIN, call, metrics, run

import report
from metrics import Metrics

DATA = dict(tokenizer="bytes", vocab_size=257, train_tokens=8000, train_bytes=8000, val_tokens=900, val_bytes=899)


def fake(folder, optimizer="adamw", seed=1, offset=0.0, data=DATA, steps=60, events=(), val=True, **options):
    """The folder of a run of steps of 512 tokens, whose val loss ends at 2 + offset."""
    config = dict(optimizer=optimizer, seed=seed, out_dir=str(folder), val_tokens=900, seq_len=1024) | options
    log = Metrics(folder)
    log.begin(None)
    log.write("run", parameters=1_000_000, config=config, gpt_config={"n_layer": 2}, data=data, max_steps=steps)
    for step in range(steps + 1):
        if val and step % 10 == 0:
            log.write("val", step=step, val_loss=2 + offset + 3 * (1 - step / steps))
        if step:
            log.write(
                "train", step=step, loss=9.0, mean_loss=5.0 / step, lr=1e-3, grad_norm=1.0 + step, dt=5.0,
                tokens=512 * step, tokens_per_sec=99.0 + step, mfu=None, seconds=6.0 * step, epoch=0.1 * step,
                time=f"2026-12-01T00:{step:02}:00+00:00",
            )  # fmt: skip
    for event in events:
        log.write("event", **event)
    log.close()
    return str(folder)


def curves(figure, panel=0):
    """{label: its line} of what a figure draws."""
    return {line.get_label(): line for line in figure.axes[panel].lines}


def plots(*folders):
    runs = [report.read(folder) for folder in folders]
    return report.plots(report.group(runs), report.unit_of(runs))


def test_the_report_of_a_real_run(data_dir, tmp_path):
    """Tokens, epochs and mean losses are counted beside it, micro-batch by micro-batch."""
    flags = [*TRAIN, "--max_steps=9", f"--data_dir={data_dir}", "--sample_interval=9", "--sample_start=`the"]
    assert call("train_gpt2.py", *flags, f"--out_dir={tmp_path}/every").returncode == 0
    assert call("train_gpt2.py", *flags, f"--out_dir={tmp_path}/run", "--log_interval=4").returncode == 0
    losses = [record["loss"] for record in metrics(tmp_path / "every", "train")]
    windows = sum((path.stat().st_size // 2 - 512 - 1) // 32 for path in data_dir.glob("*_train_*.bin"))
    records, last = metrics(tmp_path / "run", "train"), 0
    assert [record["step"] for record in records] == [1, 4, 8, 9]
    for record in records:
        step = record["step"]
        assert (record["tokens"], record["epoch"]) == (step * 4 * 2 * 32, pytest.approx(step * 4 * 2 / windows))
        assert record["mean_loss"] == pytest.approx(statistics.fmean(losses[last:step]), rel=1e-12)
        last = step

    assert call("report.py", tmp_path / "run").stdout == f"{tmp_path}/run/report.md\n"
    page = (tmp_path / "run/report.md").read_text()
    val_loss = metrics(tmp_path / "run", "val")[-1]["val_loss"]
    bits = val_loss / math.log(2) * report.read(tmp_path / "run").data["val_tokens"] / len(text_of(data_dir, "val"))
    assert f"| val loss | {val_loss:.4f} nats per token at step 9 ({bits:.4f} bits per byte) |" in page
    assert f"| trained on | {9 * 256:,} tokens, {9 * 8 / windows:.3g} epochs |" in page
    assert "| run | done, step 9 of 9 |" in page
    assert "## Sample at step 9\n\n    `the" in page
    assert "    learning_rate = 0.003\n" in page
    pictures = ["loss.png", "loss_by_time.png", "training.png"]
    assert re.findall(r"\]\((.*?)\)", page) == pictures == sorted(p.name for p in (tmp_path / "run").glob("*.png"))
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []


def text_of(data_dir, split):
    [path] = data_dir.glob(f"*_{split}_*.bin")
    return path.read_bytes()[1026::2]  # behind the header and the first token


def test_what_the_pictures_say(tmp_path):
    events = [dict(event="resume", step=30, changed={"lr": [1, 2]}), dict(event="skipped step", step=31, loss=math.nan)]
    folder = fake(tmp_path, events=[*events, dict(event="gave up", step=60)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        for step in (0, 60):
            score = dict(kind="hellaswag", step=step, acc=0.25, acc_norm=0.26 + step / 100, n=10042)
            file.write(json.dumps(score) + "\n")
    figures = plots(folder)
    lines = curves(figures["loss.png"])
    assert lines["val 2.0000"].get_xydata().tolist() == [[step, 5 - step / 20] for step in range(0, 61, 10)]
    train = [5.0 / step for step in range(1, 61)]
    assert lines["train, mean since the record before"].get_ydata().tolist() == train
    around = [statistics.fmean(train[max(0, i - 1) : i + 2]) for i in range(60)]  # 60 // 16, and odd
    assert lines["train, smoothed"].get_ydata() == pytest.approx(around)
    assert (lines["resume"].get_xdata(), lines["skipped step"].get_xdata()) == ([30], [31])
    assert figures["loss.png"].axes[0].get_ylim()[1] < 5  # where the losses begin
    axes = figures["loss_by_time.png"].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("minutes since the launch", "loss (nats per token)")
    assert curves(figures["loss_by_time.png"])["val 2.0000"].get_xdata() == pytest.approx(range(7))
    speeds, norms = (curves(figures["training.png"], panel)[str(tmp_path)].get_ydata() for panel in (2, 1))
    assert (speeds[0], len(speeds), max(norms)) == (100, 60, 61)
    assert figures["training.png"].axes[1].get_yscale() == "log"
    lines = curves(figures["hellaswag.png"])
    assert lines[folder].get_ydata().tolist() == [0.26, 0.86]
    assert {"OpenAI's GPT-2 124M: 0.2955", "chance"} <= lines.keys()
    told = report.facts(report.read(folder), 24)
    assert told["HellaSwag"] == "acc 0.2500, acc_norm 0.8600, of 10,042 examples"
    assert (told["cost"], told["wall time"][:8]) == ("$2.40 at $24.00 an hour", "0:06:00 ")
    assert told["throughput"].startswith(f"{statistics.median(range(100, 160)):,.0f} tokens/s")
    page = report.write([report.read(folder)], tmp_path).read_text()
    assert "| 31 | skipped step | loss not finite, grad_norm not finite |" in page
    assert "| 30 | resume | lr: 1 -> 2 |" in page
    assert "| run | gave up, step 60 of 60 |" in page
    assert "lr = 2" in page


def test_a_comparison_of_seeds(tmp_path):
    harmless = [{}, dict(log_interval=5, sample_interval=7, device="cuda"), dict(hellaswag_interval=3, compile=True)]
    for seed, options in enumerate(harmless, 1):
        fake(tmp_path / f"a{seed}", "adamw", seed, seed / 100, **options)
        resumed = [dict(event="done", step=60), dict(event="resume", step=60)]
        fake(tmp_path / f"m{seed}", "muon", seed, seed / 100 - 0.5, events=resumed, **options)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/metrics.jsonl").write_text('{"step": 1, "train/loss": 3.5}\n')  # another program's
    for _ in range(2):  # the second time it meets its own output
        done = call("report.py", *sorted(tmp_path.iterdir()), "--dollars_per_hour=2")
        assert (done.returncode, done.stdout) == (0, f"{tmp_path}/comparison/report.md\n"), done.stderr
        assert done.stderr.startswith(f"skipped, not runs: {tmp_path}/begun")
    page = (tmp_path / "comparison/report.md").read_text()
    assert "| optimizer=muon | 1.5200 (1.5100 to 1.5300) | m1 | 1 | not ended" in page
    assert "| optimizer | adamw | muon |" in page
    assert page.count("$0.20 at $2.00 an hour") == 6
    figures = plots(*(tmp_path / name for name in ("a1", "a2", "a3", "m1", "m2", "m3")))
    axes = figures["loss.png"].axes[0]
    mean = curves(figures["loss.png"])["optimizer=muon: val 1.5200 (1.5100 to 1.5300)"]
    assert mean.get_ydata() == pytest.approx([4.52 - step / 20 for step in range(0, 61, 10)])
    band = axes.collections[-1].get_paths()[0].vertices.tolist()
    assert sorted({y for x, y in band if x == 60}) == pytest.approx([1.51, 1.53])


def test_other_step_sizes_vocabularies_and_data(tmp_path):
    bpe = dict(tokenizer="gpt2", vocab_size=50257, train_tokens=2000, train_bytes=8000, val_tokens=225, val_bytes=899)
    a, b = fake(tmp_path / "a"), fake(tmp_path / "b", data=bpe, offset=4.0, total_batch_size=256)
    figure = plots(a, b)["loss.png"]
    assert figure.axes[0].get_xlabel() == "million tokens trained on"
    ends = {label.split(" ")[-1]: line.get_xydata()[-1] for label, line in curves(figure).items() if "val" in label}
    bits = 2 / math.log(2) * 900 / 899, 6 / math.log(2) * 225 / 899  # which do compare
    assert [ends[f"{end:.4f}"].tolist() for end in bits] == [pytest.approx([60 * 512 / 1e6, end]) for end in bits]
    done = call("report.py", a, fake(tmp_path / "c", data={"tokenizer": "gpt2"}))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "losses do not compare" in done.stderr
    other = fake(tmp_path / "d", data=DATA | {"val_bytes": 700})
    assert "different data" in plots(a, other)["loss.png"].get_suptitle()
    no_val = [fake(tmp_path / name, val=False, optimizer=name) for name in ("adamw", "muon")]
    assert {f"optimizer={name}: val none" for name in ("adamw", "muon")} <= curves(plots(*no_val)["loss.png"]).keys()


@pytest.mark.parametrize(
    ("change", "published"),
    [
        ({}, 2), ({"total_batch_size": 262144}, 0), ({"val_tokens": 1000}, 0), ({"seq_len": 512}, 0),
        ({"tokenizer": "bytes"}, 0), ({"dataset": "books"}, 0), ({"dataset": "HuggingFaceFW/fineweb-edu"}, 1),
    ],
)  # fmt: skip
def test_published_curves_stand_beside_their_own_kind_only(tmp_path, change, published):
    have = dict(tokenizer="gpt2", dataset="HuggingFaceFW/fineweb", val_tokens=10485760, total_batch_size=524288)
    have |= change
    data = DATA | dict(tokenizer=have.pop("tokenizer"), settings={"dataset": have.pop("dataset")})
    lines = curves(plots(fake(tmp_path, data=data, **have))["loss.png"])
    shown = [line for label, line in lines.items() if "(published)" in label]
    assert len(shown) == published
    assert all(len(line.get_xydata()) > 1 for line in shown)


def test_diverged_torn_and_just_begun_runs_have_a_report(tmp_path):
    lines = Path(fake(tmp_path), "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    for record in records[40:]:  # as a rate of 1e38 leaves them
        record |= dict(lr=1e38, grad_norm=3e19) if record["kind"] == "train" else {}
        record |= dict.fromkeys(("loss", "mean_loss", "val_loss"), 3e36 if record["step"] == 40 else None)
    diverged = "".join(json.dumps(record) + "\n" for record in records)
    for content, said in (
        (diverged, f"val loss | {3e36:.4f} nats"),
        ("".join(lines)[:6000], "train record: 2026-12-01T00:"),
        (lines[0], ""),
    ):
        (tmp_path / "metrics.jsonl").write_text(content)
        done = call("report.py", tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert said in (tmp_path / "report.md").read_text()
    (tmp_path / "metrics.jsonl").write_text(diverged)
    low, high = plots(tmp_path)["loss.png"].axes[0].get_ylim()
    assert -2 < low < high < 20  # what came before can still be seen


def test_nothing_of_the_users_breaks_it(tmp_path, monkeypatch):
    """Names that look like mathematics to matplotlib, its backend and its settings, home folders."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "no_such_backend")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.figsize: 1, 1\nfont.family: no such font\n")
    fake(tmp_path / "$a^$")
    fake(tmp_path / "_b|$^$", n_embd="$^$")
    done = run("report.py", "~/$a^$", "_b|$^$", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_mistakes_and_a_full_disk(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/metrics.jsonl").write_text("step:1 train_loss:3.5\n")
    (tmp_path / "odd/metrics.jsonl").mkdir(parents=True)
    for args in ([], ["nowhere"], ["."], ["--out=x", "."], [tmp_path / "foreign"], [tmp_path / "odd"]):
        done = call("report.py", *args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    call("report.py", fake(tmp_path / "run"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    ignored, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        done = call("report.py", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/run: File too large\n"
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
