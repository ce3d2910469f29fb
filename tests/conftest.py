import atexit
import contextlib
import errno
import gc
import importlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from multiprocessing.reduction import DupFd
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import train_gpt2
from configurator import TORCHRUN, cli
from distributed import StopRequest
from files import shard_header
from model import GPT

torch.set_num_threads(1)  # models this small are slower on two
os.fsync = lambda handle: None  # no test takes the power away; 30,000 of them would take 10 s
write_report, train_gpt2.write_report = train_gpt2.write_report, lambda run: None  # plots take a second in every run
ROOT = Path(__file__).parent.parent
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload("conftest torch._dynamo torch.distributed.fsdp train_gpt2 evaluate hellaswag".split())
MODEL = ["--block_size=32", "--n_layer=2", "--n_head=2", "--n_embd=32"]
TRAIN = [
    *MODEL, "--device=cpu", "--compile=False", "--batch_size=2", "--total_batch_size=256", "--warmup_steps=2",
    "--learning_rate=3e-3", "--val_interval=5", "--val_tokens=2000", "--log_interval=1",
]  # fmt: skip


def write_shard(path, tokens):
    path.write_bytes(shard_header(len(tokens)) + np.asarray(tokens, dtype="<u2").tobytes())


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A little English by bytes, in two train shards and one for validation."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog while seven wizards brew tea".split()
    texts = [" ".join(rng.choice(words) for _ in range(n)) + ".\n" for n in (400, 2000, 1500)]
    for name, text in zip(("tiny_val_000000", "tiny_train_000001", "tiny_train_000002"), texts, strict=True):
        write_shard(folder / f"{name}.bin", [256, *text.encode()])
    sizes = [len(text) for text in texts]
    meta = dict(tokenizer="bytes", vocab_size=257, train_tokens=sum(sizes[1:]) + 2, val_tokens=sizes[0] + 1)
    meta |= dict(train_bytes=sum(sizes[1:]), val_bytes=sizes[0], train_words=3500, val_words=400)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def run(script, *args, processes=None, cwd=ROOT, **kwargs):
    """Run a script as a user would, alone or under torchrun; the finished process, with its text output."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *torchrun, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, **kwargs)


def call(script, *args, processes=None, setup=None):
    """The same without the seconds of starting Python and importing torch: in this process, or in several forks, set up
    as by torchrun. If one fails, the others are killed. `setup`: a function of a test's module, called first in each.
    """
    main = importlib.import_module(script.removesuffix(".py")).main
    if processes:
        return call_processes(main, args, processes, setup)
    numbers = [getattr(signal, name) for name in StopRequest.SIGNALS]
    before = {number: signal.getsignal(number) for number in numbers}
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [str(ROOT / script), *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli(main)
    finally:
        gc.enable()
        sys.argv = argv
        for number, handler in before.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(args, ended.value.code, out.getvalue(), err.getvalue())


def call_processes(main, args, processes, setup=None):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    envs = [(str(rank), str(rank), str(processes), "127.0.0.1", port) for rank in range(processes)]
    ranks = [Fork(main, *args, env=dict(zip(TORCHRUN, env, strict=True)), setup=setup) for env in envs]
    failed = None
    while running := [rank for rank in ranks if rank.exitcode is None]:
        in_time = multiprocessing.connection.wait([rank.sentinel for rank in running], timeout=120)
        # If two have failed, the one that wrote first told why, and the other only missed it. The fork
        # server may report the other first, so wait a moment for both.
        if not failed and any(rank.exitcode for rank in ranks):
            for rank in running:
                rank.join(0.2)
            ended = [rank for rank in ranks if rank.exitcode]
            failed = min(ended, key=lambda rank: os.fstat(rank.err.fileno()).st_mtime_ns)
        for rank in running:
            if failed or not in_time:
                rank.kill()
        assert in_time, f"{len(running)} of {processes} processes hang"
    out, err = ("".join(rank.read(stream) for rank in ranks) for stream in ("out", "err"))
    for rank in ranks:
        rank.end()
    return subprocess.CompletedProcess(args, failed.exitcode if failed else 0, out, err)


class Fork(FORKING.Process):
    """A script's `main` in a process and session of its own. `exitcode` is -9 where SIGKILL ended it.

    It is a fork of a server that has imported everything and has one thread. (pytest's process has run torch, whose
    threads are missing in a fork.) `main` and `setup` are functions of a module: they are sent by name.
    """

    def __init__(self, main, *args, env=(), stdout=None, setup=None):
        super().__init__()
        self.main, self.args, self.setup = main, [getattr(main, "__module__", ""), *map(str, args)], setup
        self.env = {**os.environ, **dict(env)}
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed with this object)
        self.stdout, self.seen = stdout or self.out.fileno(), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # for the server, which starts only once
            patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))  # else a fork runs pytest's script
            self.start()
        atexit.register(self.end)

    def __getstate__(self):
        # What is sent: open files as handles, of which the process gets copies.
        return self.__dict__ | dict(out=None, err=DupFd(self.err.fileno()), stdout=DupFd(self.stdout))

    def run(self):
        os.setsid()
        os.dup2(self.stdout.detach(), 1)
        os.dup2(self.err.detach(), 2)
        sys.stdout, sys.stderr = io.TextIOWrapper(io.FileIO(1, "w")), io.TextIOWrapper(io.FileIO(2, "w"))
        os.environ.clear()
        os.environ.update(self.env)
        torch.cuda.is_available = lambda: False  # these tests are of processes on a CPU
        sys.argv = self.args
        if self.setup:
            self.setup()
        cli(self.main)

    def read(self, stream="out"):
        """What it has written so far."""
        file = getattr(self, stream).fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode()

    def until(self, text):
        """Wait until it has written this, behind what was waited for before."""
        deadline = time.monotonic() + 120
        while text not in (have := self.read()[self.seen :]):
            assert self.is_alive(), self.read("err")
            assert time.monotonic() < deadline, f"it hangs, having written {have!r}"
            time.sleep(0.002)
        self.seen += have.index(text) + len(text)

    def signal(self, number):
        os.kill(self.pid, number)

    def ended(self, timeout=60):
        """Its exit status; None where it had to be killed."""
        self.join(timeout)
        status = self.exitcode
        self.end()
        return status

    def end(self):
        """Kill it and what it has started: whatever failed, pytest must not wait for it."""
        atexit.unregister(self.end)  # which would keep its files open
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has no session yet
                os.killpg(self.pid, signal.SIGKILL)
            self.kill()
            self.join()


@pytest.fixture(autouse=True)
def nothing_is_piped_in(monkeypatch):
    """pytest's own stdin refuses to be read, which sample.py does without --start."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


@pytest.fixture
def cudnn(monkeypatch):
    """A list that gets, for each forward pass, whether torch may choose cuDNN's attention."""
    seen, hidden, allowed = [], GPT.hidden, torch.backends.cuda.cudnn_sdp_enabled
    monkeypatch.setattr(GPT, "hidden", lambda *args, **kwargs: seen.append(allowed()) or hidden(*args, **kwargs))
    torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default
    return seen


def metrics(out_dir, kind):
    records = [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def events(out_dir):
    return [(record["event"], record["step"]) for record in metrics(out_dir, "event")]


def refused(done, *said):
    """One line on stderr that says this, and status 2."""
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert all(text in done.stderr for text in said), done.stderr
    return True


def cut(run, out, step):
    """`out` becomes a copy of a run that died behind its checkpoint of this step."""
    out.mkdir()
    shutil.copy(run / f"ckpt_{step:06d}.pt", out)
    shutil.copy(run / "metrics.jsonl", out)
    return out


def disk_full_at(steps):
    """checkpoint.save, but the disk does not take these steps."""
    save = checkpoint.save

    def failing(state, *args):
        if state["step"] in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(state, *args)

    return failing
