"""The script of the fine-tuning table: rows of finished runs, which the same command makes where there are none."""

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
    script = importlib.import_module("table")
    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=in_this_process, PIPE=subprocess.PIPE))
    small = GPT(GPTConfig(vocab_size=257, n_layer=1, n_head=1, n_embd=16))
    monkeypatch.setattr(script, "save_folder", lambda model, tokenizer, *to: save_folder(small, "bytes", *to))

    def table(steps, contexts, log_interval=1):
        flags = f"--device=cpu --compile=False --max_steps={steps} --val_interval=1 --log_interval={log_interval}"
        done = call(
            "table.py", "--standins=True", "--models=gpt2", "--data=wikitext2", f"--contexts={contexts}",
            f"--flags={flags}", f"--wikitext2_dir={data_dir}", f"--out_dir={tmp_path}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == (tmp_path / "table.md").read_text()
        return [[word.strip() for word in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]

    too_long, good = first = table(3, "2048,32")
    assert too_long[:4] == ["wikitext2", "gpt2 (stand-in)", "8", "2048"]
    assert too_long[4].startswith("failed: error: ")
    cell = tmp_path / "wikitext2_gpt2_8x32"
    losses, val = [record["loss"] for record in metrics(cell, "train")], metrics(cell, "val")[-1]
    assert good[3:6] == ["32", "3", f"{sum(losses) / 3:.4f}"]
    assert good[6:] == [f"{val['val_loss']:.4f}", f"{val['word_loss']:.4f}", "-", "-"]

    records = (cell / "metrics.jsonl").read_text()
    assert table(4, "32") == first[1:]  # a cell that is done is left alone
    assert (cell / "metrics.jsonl").read_text() == records

    (cell / "metrics.jsonl").write_text("".join(x for x in records.splitlines(True) if '"done"' not in x))  # not done
    assert table(4, "32")[0][4] == "4"
    assert [event["step"] for event in metrics(cell, "event") if event["event"] == "resume"] == [3]
    shutil.rmtree(cell)
    assert table(3, "32", log_interval=2) == first[1:]  # the mean of all steps, whatever the log_interval
