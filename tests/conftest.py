import contextlib
import gc
import importlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import cli
from distributed import StopRequest
from model import GPT
from shards import shard_header

SIGNALS = [getattr(signal, name) for name in StopRequest.SIGNALS]
torch.set_num_threads(1)  # models this small are slower on two
ROOT = Path(__file__).parent.parent
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
    launcher = [sys.executable]
    if processes:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, **kwargs)


def call(script, *args):
    """The same inside this process, which saves the seconds that starting Python and importing torch take."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [str(ROOT / script), *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli(importlib.import_module(script.removesuffix(".py")).main)
    finally:
        gc.enable()
        sys.argv = argv
        for number, handler in before.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(args, ended.value.code, out.getvalue(), err.getvalue())


def call_on(processes, script, *args):
    """The same on several processes, forked from this one with what torchrun would tell them; rank 0's as finished."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(processes))
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        children = []
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                sys.stdout, sys.stderr, sys.argv = out, err, [str(ROOT / script), *map(str, args)]
                os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
                try:
                    cli(importlib.import_module(script.removesuffix(".py")).main)
                finally:
                    os._exit(1)  # cli ends a process of several: this is a failure
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(args, max(codes, key=abs), out.read(), err.read())


@pytest.fixture
def cudnn(monkeypatch):
    """Of each forward pass from now on, whether its attention may be cuDNN's, as it may outside of it."""
    seen, hidden, before = [], GPT.hidden, torch.backends.cuda.cudnn_sdp_enabled()

    def record(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return hidden(*args, **kwargs)

    monkeypatch.setattr(GPT, "hidden", record)
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield seen
    torch.backends.cuda.enable_cudnn_sdp(before)


def metrics(out_dir, kind):
    records = [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]
