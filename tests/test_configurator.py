import io
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from conftest import ROOT, call
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from configurator import NANOGPT, TORCHRUN, Output, PathStr, UserError, at_least, cli, configure, help_text, within


@dataclass(frozen=True)
class Model:
    # size
    width: int = 8  # how wide
    # other things
    kind: Literal["plain", "fancy"] = "plain"  # which kind
    bias: bool | None = None

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f"width = {self.width} is odd")


@dataclass(frozen=True)
class Train:
    lr: float = 1e-3  # the rate, # in full
    steps: int | None = None  # how many
    text: str = "out"  # what
    resume: bool = False  # whether
    folder: PathStr | None = None  # where


def load(*argv):
    return configure(Model, Train, argv=[str(arg) for arg in argv])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("width=10", 10), ("width=1e1", 10), ("lr=1", 1.0), ("lr=6e-4", 6e-4), ("steps=none", None),
        ("steps=1_000", 1000), ("resume=TRUE", True), ("bias=False", False), ("kind=fancy", "fancy"),
        ("text=a b=c", "a b=c"), ("text=2024", "2024"), ("text=none", "none"), ("text=", ""), ("text=~/c", "~/c"),
        ('text="quoted"', '"quoted"'), ("folder=none", None), ("folder=~/a", "/home/me/a"), ("folder=7", "7"),
    ],
)  # fmt: skip
def test_values(monkeypatch, flag, value):
    monkeypatch.setenv("HOME", "/home/me")
    name = flag.partition("=")[0]
    model, train, given = load(f"--{name}=3", f"--{flag}") if name == "lr" else load(f"--{flag}")  # the last one wins
    have = getattr(model if hasattr(model, name) else train, name)
    assert (have, type(have), given) == (value, type(value), {name: f"--{name}"})


def test_files_in_order_then_flags(tmp_path, monkeypatch):
    base, a, b = (tmp_path / f"{name}.py" for name in ("base", "a", "b"))
    base.write_text("steps = 4\nother = 1\n")
    a.write_text("import math\nfrom base import other, steps\n_half = max(x for x in [4])\nwidth = 2 * _half\n"
                 "lr = math.pi\ntext = 'x'\n")  # fmt: skip
    b.write_text("lr = 2\nsteps = 7\n", encoding="utf-8-sig")  # with a byte order mark
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load() == (Model(), Train(), {})
    assert load(a)[1].steps == 4  # an imported option counts, `other` is none
    model, train, given = load(a, "--steps=9", b)
    assert (model.width, train) == (8, Train(lr=2.0, steps=9, text="x"))
    assert given == {"width": f"{a}:4", "lr": f"{b}:1", "text": f"{a}:6", "steps": "--steps"}
    train, given = configure(Train, argv=["2024", "--lr=1"], positional="text")
    assert (train, given) == (Train(1.0, text="2024"), {"text": "2024", "lr": "--lr"})


def one_line(*argv):
    with pytest.raises(UserError) as error:
        load(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--widht=3", ["--widht", "unknown", "did you mean width?"]), ("--width=wide", ["'wide'", "a whole number"]),
        ("--width=1.5", ["--width", "a whole number"]), ("--lr=1e400", ["--lr", "inf", "finite"]),
        ("--wi\ndth=3", ["--wi dth", "unknown"]), ("a\nb", ["a b: not a config file"]), ("--width=3", ["is odd"]),
        ("--width=True", ["--width", "a whole number"]), ("--resume=1", ["--resume", "True or False"]),
        ("--kind=fency", ["--kind", "'plain' or 'fancy'", "did you mean fancy?"]), ("steps=3", ["--name=value"]),
        ("--resume", ["--resume: options look like --name=value"]), ("-steps=3", ["did you mean steps?"]),
        ("--steps 6", ["--steps: options look like --name=value"]), ("config.py", ["config.py: no such config file"]),
        ("config/smal.py", ["config/smal.py", "no such config file", "did you mean config/small.py?"]),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(monkeypatch, argv, said):
    monkeypatch.chdir(ROOT)
    line = one_line(*argv.split(" "))
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("\nwidht = 3\n", [":2", "unknown", "did you mean width?"]), ("lr = '3'\n", [":1", "lr = '3'", "a finite num"]),
        ("gpus = 2\nwidth = 4 * gpus\n", [":1", "unknown option 'gpus'; a helper variable starts", "_gpus"]),
        ("lr = 1\nlr = (\n", [":2", "SyntaxError"]), ("lr = 1\ntext = lr + 'x'\n", [":2", "TypeError"]),
        ("import nonesuch\n", [":1", "ModuleNotFoundError"]), ("width = 3\n", [":1", "is odd"]),
        ("raise ValueError('a\\nb')\n", [":1", "ValueError: a b"]), ("lr = float('nan')\n", [":1", "finite"]),
        (b"text = '\xff'\n", ["utf-8"]), (b"text = '\0'\n", ["null bytes"]),
        (None, [":1: FileNotFoundError: [Errno 2] No such file"]),
    ],
)  # fmt: skip
def test_mistakes_in_a_file(tmp_path, monkeypatch, source, said):
    path = tmp_path / "c.py"
    if source is None:  # it cannot be read
        monkeypatch.setattr("os.path.isfile", lambda path: True)
    else:
        path.write_bytes(source if isinstance(source, bytes) else source.encode())
    line = one_line(path)
    assert all(part in line for part in [str(path), *said]), line


def test_names_of_nanogpt_are_answered(tmp_path):
    options = call("train_gpt2.py", "--help").stdout
    (tmp_path / "mine.py").write_text("init_from = 'resume'")
    for name, answer in NANOGPT.items():
        first = answer.split()[0]
        assert f"--{first}=" in options or (ROOT / first).exists()
        line = f"error: --{name}: unknown option {name!r}; did you mean {answer}?\n"
        done = call("train_gpt2.py", f"--{name}=1")
        assert (done.returncode, done.stderr) == (2, line)
    for arg in ("--init_from=resume", tmp_path / "mine.py"):
        assert call("train_gpt2.py", arg).stderr.endswith("init_from = 'resume' is nanoGPT's; use --resume=True\n")


def test_a_config_of_another_script():
    train, data = ("train_gpt2.py", "config/small.py"), ("fineweb.py", "config/data/shakespeare.py")
    for (script, _), (other, config) in ((train, data), (data, train)):
        done = call(script, ROOT / config)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"{config}: this is a config of {other}: python {other} " in done.stderr


def test_help_has_each_option_with_its_default_choices_and_comment(monkeypatch):
    """That of a run fits two screens, and one rank prints it."""
    lines = [" ".join(line.split()) for line in help_text((Model, Train), "text").splitlines()]
    assert lines[-15].endswith(" [TEXT] [config/file.py ...] [--name=value ...]")
    assert lines[-14:] == [
        "", "size:", "--width=8 how wide", "", "other things:", "--kind=plain plain|fancy which kind", "--bias=None",
        "", "Train:", "--lr=0.001 the rate, # in full", "--steps=None how many", "--text=out what",
        "--resume=False whether", "--folder=None where",
    ]  # fmt: skip
    for rank, lines in (("1", range(1)), ("0", range(70, 112))):
        monkeypatch.setenv("RANK", rank)
        done = call("train_gpt2.py", "--help")
        assert (done.returncode, done.stdout.count("\n") in lines) == (0, True)


def test_rules_across_options():
    at_least(Model(), 8, "bias", "width")  # bias is None: not set
    with pytest.raises(ValueError, match=r"^width = 8, but it must be at least 9$"):
        at_least(Model(), 9, "bias", "width")
    with pytest.raises(ValueError, match=r"^width = 8, but it must be 1 to 7$"):
        within(Model(), 1, 7, "bias", "width")


# ---- The frame of every script


def end_with(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli(main)
    return ended.value.code


def test_under_torchrun_one_process_says_it_and_torchruns_report_ends_with_it(monkeypatch, tmp_path, capsys):
    waits, path = [], tmp_path / "error.json"
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("os._exit", sys.exit)
    for name in TORCHRUN:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    for rank, said in (("1", ""), ("0", "error: --lr=x: wrong\n")):  # the first lets the second speak
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert end_with(UserError("--lr=x: wrong")) == 2
        assert (capsys.readouterr().err, len(waits), path.exists()) == (said, 1, rank == "0")
    report = ChildFailedError("train_gpt2.py", {0: ProcessFailure(0, 123, 2, str(path))}).format_msg()
    *_, last, border = report.splitlines()
    assert (last.endswith(": error: --lr=x: wrong"), set(border)) == (True, {"="})


CHATTY = """
from configurator import cli
def main():
    for _ in range(9):
        print("é " * 9999)
    open("done", "w")
cli(main)
"""


@pytest.mark.parametrize("where", ["| true", "> /dev/full", ">&-", "> out"])
def test_output_that_nobody_takes_ends_no_run(tmp_path, where):
    """Nor do letters that the terminal does not have."""
    (tmp_path / "chatty.py").write_text(CHATTY)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = f"set -o pipefail; {sys.executable} chatty.py {where}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr, (tmp_path / "done").exists()) == (0, "", True)
    assert where != "> out" or (tmp_path / "out").read_text() == ("? " * 9999 + "\n") * 9


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_control_characters_do_not_reach_a_terminal(monkeypatch):
    """But a progress bar on stderr may go to the start of its line, a line up, and erase."""
    text = "a\n\tb\b\x1b[2J\r\x1b[A\x1b[K\x9bé"
    for stream, progress_bars, seen in (
        (Terminal(), False, "a\n\tb\\x08\\x1b[2J\\x0d\\x1b[A\\x1b[K\\x9bé"),
        (Terminal(), True, "a\n\tb\\x08\\x1b[2J\r\x1b[A\x1b[K\\x9bé"),
        (io.StringIO(), False, text),  # a file or a pipe gets the text as it is
    ):
        Output(stream, progress_bars).write(text)
        assert stream.getvalue() == seen
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert end_with(UserError("\x1b]0;title\x07 is no folder")) == 2
    assert terminal.getvalue() == "error: \\x1b]0;title\\x07 is no folder\n"


NO_MEMORY = [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), "(4096 bytes"),
    (RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), "(8"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "(2.00 GiB"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "memory; use"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory; use"),
    (RuntimeError("std::bad_alloc"), "memory; use"),
    (OSError(12, "Cannot allocate memory"), "memory; use"),
    (MemoryError(), "memory; use"),
]


@pytest.mark.parametrize(("error", "line"), NO_MEMORY)
def test_out_of_memory_is_one_line(capsys, error, line):
    assert end_with(error) == 2
    said = capsys.readouterr().err
    assert (said.startswith("error: out of memory"), line in said, said.count("\n")) == (True, True, 1)


CHILD = "import time, configurator as c; c.end_with_torchrun(); print('ready', flush=True); time.sleep(60)"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
def test_the_death_of_torchrun_ends_a_process_that_still_imports():
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **dict.fromkeys(TORCHRUN, "0")}
    torchrun = subprocess.Popen([sys.executable, "-c", parent, CHILD], env=env, stdout=subprocess.PIPE)
    assert torchrun.stdout.readline() == b"ready\n"
    torchrun.kill()
    torchrun.communicate(timeout=10)  # until the child has closed the output, too
