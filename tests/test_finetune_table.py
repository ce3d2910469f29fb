import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from conftest import ROOT, call, metrics

from huggingface import save_folder
from model import GPT, GPTConfig


def in_this_process(command, stdout, **kwargs):
    """Stands in for subprocess.run: the same script with the same arguments, seconds sooner."""
    python, script, *args = command
    assert (python, Path(script).parent) == (sys.executable, ROOT)
    done = call(Path(script).name, *args)
    stdout.write(done.stdout)
    return done


def test_goes_on_where_it_stopped(data_dir, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(next(ROOT.glob("records/*_finetune_table")))
    table_module = importlib.import_module("table")
    monkeypatch.setattr(table_module, "subprocess", SimpleNamespace(run=in_this_process, PIPE=subprocess.PIPE))
    small = GPT(GPTConfig(vocab_size=257, n_layer=1, n_head=1, n_embd=16))
    monkeypatch.setattr(table_module, "save_folder", lambda model, tokenizer, *to: save_folder(small, "bytes", *to))

    def table(steps, contexts, *more):
        flags = f"--device=cpu --compile=False --max_steps={steps} --val_interval=1 --log_interval=2"
        done = call(
            "table.py", "--standins=True", "--models=gpt2", "--data=wikitext2", f"--contexts={contexts}",
            f"--flags={flags}", f"--wikitext2_dir={data_dir}", f"--out_dir={tmp_path}", *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == (tmp_path / "table.md").read_text()
        return [[word.strip() for word in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]

    too_long, good = first = table(1, "2048,32")
    assert too_long[:4] == ["wikitext2", "gpt2 (stand-in)", "8", "2048"]
    assert too_long[4].startswith("failed: error: ")
    assert "2048" in too_long[4]
    cell = tmp_path / "wikitext2_gpt2_8x32"
    val = metrics(cell, "val")[-1]
    loss = metrics(cell, "train")[0]["loss"]
    assert good[3:] == ["32", "1", f"{loss:.4f}", f"{val['val_loss']:.4f}", f"{val['word_loss']:.4f}", "-", "-"]

    records = (cell / "metrics.jsonl").read_text()
    assert table(2, "32") == first[1:]  # a cell that is done is left alone
    assert (cell / "metrics.jsonl").read_text() == records

    (cell / "metrics.jsonl").write_text("".join(x for x in records.splitlines(True) if '"done"' not in x))  # not done
    assert table(2, "32")[0][4] == "2"
    assert [event["step"] for event in metrics(cell, "event") if event["event"] == "resume"] == [1]

    [two, _] = table(1, "256", "--batches=2", "--micro_batch=1")
    train = metrics(tmp_path / "wikitext2_gpt2_2x256", "run")[-1]["config"]
    assert (two[2], train["batch_size"], train["total_batch_size"]) == ("2", 1, 2 * 256)
    shutil.rmtree(tmp_path / "wikitext2_gpt2_8x32")
    row = table(5, "32", "--flags=--device=cpu --compile=False --max_steps=5 --val_interval=1 --log_interval=1")[0]
    losses = [record["loss"] for record in metrics(tmp_path / "wikitext2_gpt2_8x32", "train")]
    shutil.rmtree(tmp_path / "wikitext2_gpt2_8x32")
    assert row[5] == table(5, "32")[0][5] == f"{sum(losses) / 5:.4f}"  # whatever the log_interval
