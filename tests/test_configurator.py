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
    out: str = "out"  # where
    resume: bool = False  # whether


def load(*argv):
    return configure(Model, Train, argv=list(argv))


def test_defaults():
    assert load() == (Model(), Train(), {})


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--width=10", "width", 10),
        ("--width=1e1", "width", 10),
        ("--lr=1", "lr", 1.0),
        ("--lr=6e-4", "lr", 6e-4),
        ("--steps=none", "steps", None),
        ("--steps=1_000", "steps", 1000),
        ("--resume=TRUE", "resume", True),
        ("--bias=False", "bias", False),
        ("--kind=fancy", "kind", "fancy"),
        ("--out=a b=c", "out", "a b=c"),
        ("--out=2024", "out", "2024"),
        ("--out=none", "out", "none"),
        ("--out='quoted'", "out", "'quoted'"),
        ("--out=", "out", ""),
    ],
)
def test_values(flag, name, value):
    model, train, given = load(flag)
    have = getattr(model if hasattr(model, name) else train, name)
    assert have == value
    assert type(have) is type(value)
    assert given == {name: f"--{name}"}


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("max_iters=6", "did you mean max_steps?"), ("eval_iters=6", "did you mean val_tokens (counted in tokens)?"),
        ("lr_decay_iters=6", "did you mean max_steps"), ("decay_lr=False", "--schedule=constant"),
        ("eval_only=True", "did you mean evaluate.py"), ("wandb_log=True", "--log_to=wandb"),
        ("init_from=resume", "use --resume=True"), ("parallel=fsdpp", "did you mean fsdp?"),
    ],
)  # fmt: skip
def test_names_of_nanogpt_are_answered(tmp_path, flag, answer):
    """As flags and in a config file."""
    (tmp_path / "mine.py").write_text(flag.replace("resume", "'resume'").replace("fsdpp", "'fsdpp'"))
    for arg in (f"--{flag}", tmp_path / "mine.py"):
        done = call("train_gpt2.py", arg)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert answer in done.stderr


def test_every_answer_to_a_name_of_nanogpt_exists():
    options = call("train_gpt2.py", "--help").stdout
    for name, answer in NANOGPT.items():
        first = answer.split()[0]
        assert f"--{first}=" in options or (ROOT / first).exists()
        assert f"--{name}=" not in options


def test_a_config_of_another_script():
    train, data = ("train_gpt2.py", "config/small.py"), ("fineweb.py", "config/data/shakespeare.py")
    for (script, _), (other, config) in ((train, data), (data, train)):
        done = call(script, ROOT / config)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"{config}: this is a config of {other}: python {other} " in done.stderr


def test_a_positional_argument():
    assert configure(Train, argv=["2024", "--lr=1"], positional="out") == (
        Train(1.0, out="2024"),
        {"out": "2024", "lr": "--lr"},
    )
    assert " [OUT] [config/file.py ...] [--name=value ...]\n" in help_text((Train,), "out")
    with pytest.raises(UserError, match=r"missing.py: no such config file"):
        configure(Train, argv=["missing.py"], positional="out")


def test_files_in_order_then_flags(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(
        "import math\nfrom os.path import join\n_half = 4\nwidth = 2 * _half\nlr = math.pi\nout = join('x', 'y')\n"
    )
    b.write_text("lr = 2\nsteps = 7\n")
    model, train, given = load(str(a), "--steps=9", str(b))
    assert (model.width, train) == (8, Train(lr=2.0, steps=9, out="x/y"))
    assert given == {"width": f"{a}:4", "lr": f"{b}:1", "out": f"{a}:6", "steps": "--steps"}


def test_an_imported_name_that_is_an_option_counts(tmp_path, monkeypatch):
    (tmp_path / "base.py").write_text("steps = 4\nother = 1\n")
    (tmp_path / "a.py").write_text("from base import other, steps\nsteps = steps * other * 2\n")
    (tmp_path / "b.py").write_text("from base import steps\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load(str(tmp_path / "a.py"))[1].steps == 8
    assert load(str(tmp_path / "b.py"))[1].steps == 4


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.py").write_text("width = 4\n", encoding="utf-8-sig")
    assert load(str(tmp_path / "a.py"))[0].width == 4


def test_the_last_of_a_repeated_flag_wins():
    assert load("--width=2", "--width=4")[0].width == 4


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--widht=3"], ["--widht", "unknown", "did you mean width?"]),
        (["--width=wide"], ["--width", "'wide'", "a whole number"]),
        (["--width=1.5"], ["--width", "a whole number"]),
        (["--lr=1e400"], ["--lr", "inf", "finite"]),
        (["--wi\ndth=3"], ["--wi dth", "unknown"]),
        (["a\nb"], ["a b: not a config file"]),
        (["--width=True"], ["--width", "a whole number"]),
        (["--resume=1"], ["--resume", "True or False"]),
        (["--kind=fency"], ["--kind", "'plain' or 'fancy'", "did you mean fancy?"]),
        (["--resume"], ["--resume: options look like --name=value"]),
        (["-steps=3"], ["--name=value", "did you mean steps?"]),
        (["--steps", "6"], ["--steps: options look like --name=value"]),
        (["steps=3"], ["--name=value"]),
        (["--width=3"], ["--width", "is odd"]),
        (["config/smal.py"], ["config/smal.py", "no such config file", "did you mean config/small.py?"]),
        (["config.py"], ["config.py: no such config file"]),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, argv, said):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        load(*argv)
    assert "\n" not in str(error.value)
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("\nwidht = 3\n", [":2", "unknown", "did you mean width?"]),
        ("gpus = 2\nwidth = 4 * gpus\n", [":1", "unknown option 'gpus'; a helper variable starts", "_gpus"]),
        ("lr = '3'\n", [":1", "lr = '3'", "a finite number"]),
        ("lr = 1\nlr = (\n", [":2", "SyntaxError"]),
        ("lr = 1\nout = lr + 'x'\n", [":2", "TypeError"]),
        ("import nonesuch\n", [":1", "ModuleNotFoundError"]),
        ("width = 3\n", [":1", "is odd"]),
        ("raise ValueError('a\\nb')\n", [":1", "ValueError: a b"]),
        ("lr = float('nan')\n", [":1", "finite"]),
        (b"out = '\xff'\n", ["utf-8"]),
    ],
)
def test_mistakes_in_a_file(tmp_path, source, said):
    path = tmp_path / "c.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    with pytest.raises(UserError) as error:
        load(str(path))
    assert "\n" not in str(error.value)
    for part in [str(path), *said]:
        assert part in str(error.value)


def test_a_config_that_is_no_readable_file(tmp_path, monkeypatch):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(UserError, match=r"folder\.py: no such config file$"):
        load(str(tmp_path / "folder.py"))
    (tmp_path / "mine.py").write_text("width = 4")
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "no", "me")))
    with pytest.raises(UserError, match=r"mine\.py:1: PermissionError: \[Errno 13\] no: 'me'$"):
        load(str(tmp_path / "mine.py"))


def test_help_has_each_option_with_its_default_choices_and_comment(capsys):
    with pytest.raises(SystemExit, match="0"):
        load("--help")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-13:] == [
        "", "size:", "--width=8 how wide", "", "other things:", "--kind=plain plain|fancy which kind", "--bias=None",
        "", "Train:", "--lr=0.001 the rate, # in full", "--steps=None how many", "--out=out where",
        "--resume=False whether",
    ]  # fmt: skip


def test_help_of_a_run_fits_two_screens_and_one_rank_prints_it(monkeypatch):
    for rank, lines in (("1", range(1)), ("0", range(70, 112))):
        monkeypatch.setenv("RANK", rank)
        done = call("train_gpt2.py", "--help")
        assert (done.returncode, done.stdout.count("\n") in lines) == (0, True)


def test_at_least():
    with pytest.raises(ValueError, match=r"^width = 8, but it must be at least 9$"):
        at_least(Model(), 9, "bias", "width")
    at_least(Model(), 8, "bias", "width")  # bias is None: not set
    with pytest.raises(ValueError, match=r"^width = 8, but it must be 1 to 7$"):
        within(Model(), 1, 7, "bias", "width")


def test_under_torchrun_one_process_says_it_and_the_others_let_it(monkeypatch, capsys):
    def wrong():
        raise UserError("wrong")

    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("os._exit", sys.exit)
    for name in TORCHRUN:
        monkeypatch.setenv(name, "0")
    for rank, said, waited in (("1", "", 1), ("0", "error: wrong\n", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            cli(wrong)
        assert capsys.readouterr().err == said
        assert len(waits) == waited


def test_torchrun_finds_the_line_in_its_error_file(monkeypatch, tmp_path, capsys):
    """torchrun reads the file as its own writer would have left it, and its report ends with the line."""

    def wrong():
        raise UserError("--lr=x: wrong")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit, match="2"):
        cli(wrong)
    failure = ProcessFailure(0, 123, 2, str(tmp_path / "error.json"))
    *_, last, border = ChildFailedError("train_gpt2.py", {0: failure}).format_msg().splitlines()
    assert last.endswith(": error: --lr=x: wrong")
    assert set(border) == {"="}
    assert capsys.readouterr().err == "error: --lr=x: wrong\n"


@dataclass(frozen=True)
class Paths:
    folder: PathStr = "x"
    other: PathStr | None = None
    text: str = ""


def test_a_path_may_begin_at_home_and_a_text_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths, _ = configure(Paths, argv=["--folder=~/a", "--other=~/b", "--text=~/c"])
    assert paths == Paths("/home/me/a", "/home/me/b", "~/c")
    paths, _ = configure(Paths, argv=["--other=none"])
    assert paths == Paths()


CHATTY = """
from configurator import cli
def main():
    for _ in range(9):
        print("é " * 9999)
    open("done", "w")
cli(main)
"""


@pytest.mark.parametrize("where", ["| true", "> /dev/full", ">&-"])
def test_output_that_nobody_takes_ends_no_run(tmp_path, where):
    script = tmp_path / "chatty.py"
    script.write_text(CHATTY)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = f"set -o pipefail; {sys.executable} chatty.py {where}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr, (tmp_path / "done").exists()) == (0, "", True)


def test_characters_that_a_terminal_does_not_have_are_replaced(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    code = "import sys\nfrom configurator import cli\ncli(lambda: print('é', file=sys.stdout))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "?\n", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_control_characters_do_not_reach_a_terminal():
    """But a progress bar on stderr may go to the start of its line, a line up, and erase."""
    text = "a\n\tb\x1b[2J\r\x1b[A\x1b[K\x9bé"
    for stream, progress_bars, seen in (
        (Terminal(), False, "a\n\tb\\x1b[2J\\x0d\\x1b[A\\x1b[K\\x9bé"),
        (Terminal(), True, "a\n\tb\\x1b[2J\r\x1b[A\x1b[K\\x9bé"),
        (io.StringIO(), False, text),  # a file or a pipe gets the text as it is
    ):
        Output(stream, progress_bars).write(text)
        assert stream.getvalue() == seen


def test_an_error_line_steers_no_terminal(monkeypatch):
    def main():
        raise UserError("\x1b]0;title\x07 is no folder")

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(SystemExit, match="2"):
        cli(main)
    assert terminal.getvalue() == "error: \\x1b]0;title\\x07 is no folder\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), "(4096 bytes"),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), "(8"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "(2.00 GiB"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "memory; use"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory; use"),
        (RuntimeError("std::bad_alloc"), "memory; use"),
        (OSError(12, "Cannot allocate memory"), "memory; use"),
        (MemoryError(), "memory; use"),
    ],
)
def test_out_of_memory_is_one_line(capsys, error, line):
    def main():
        raise error

    with pytest.raises(SystemExit, match="2"):
        cli(main)
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory")
    assert line in said
    assert said.count("\n") == 1


CHILD = """
import time
from configurator import end_with_torchrun
end_with_torchrun()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
def test_the_death_of_torchrun_ends_a_process_that_still_imports():
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **dict.fromkeys(TORCHRUN, "0")}
    torchrun = subprocess.Popen([sys.executable, "-c", parent, CHILD], env=env, stdout=subprocess.PIPE)
    assert torchrun.stdout.readline() == b"ready\n"
    torchrun.kill()
    torchrun.communicate(timeout=10)  # until the child has closed the output, too
