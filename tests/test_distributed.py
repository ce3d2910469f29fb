import ctypes
import os
import platform
import signal
import subprocess
import sys

import pytest
import torch
from conftest import Fork, call_processes

from configurator import TORCHRUN, UserError
from distributed import PEAK_FLOPS, StopRequest, World, hardware, machine, pick_device, pick_dtype

CPU, MPS = torch.device("cpu"), torch.device("mps")


def refuse(text):
    raise UserError(text)


# ---- Processes


def test_alone(monkeypatch):
    for name, value in {"MASTER_ADDR": "node1", "RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)  # a job script may export half of torchrun's environment for whatever comes
    world = World("cpu")
    assert (world.rank, world.size, world.is_main, world.device) == (0, 1, True, CPU)
    assert (world.sum([1.5, 2.0]), world.mean_(torch.tensor(3.0)).item()) == ([1.5, 2.0], 3.0)
    assert world.on_main(lambda: "x") == world.together(lambda: ("x", 1)) == "x"
    with pytest.raises(UserError, match=r"^what it saw$"):
        world.together(lambda: refuse("what it saw"))
    assert world.spread(lambda x: x + 1, torch.zeros(3, 1, 1), rows=1).tolist() == [[[1.0]]] * 3
    model = torch.nn.Linear(2, 2)
    assert world.wrap(model, torch.ones(1, 2)) is model


def three_processes():
    world = World("cpu")
    rank, host = world.rank, platform.node()
    assert world.size == 3
    assert world.sum([rank, 10.0**15 + rank]) == [3.0, 3 * 10.0**15 + 3]
    assert world.mean_(torch.tensor([float(rank)])).item() == 1.0
    calls = []
    assert world.on_main(lambda: calls.append(1) or "from " + str(rank)) == "from 0"
    assert calls == ([1] if rank == 0 else [])  # rank 0 alone decides
    with pytest.raises(UserError, match="what rank 0 saw"):
        world.on_main(lambda: refuse("what rank 0 saw"))

    # a result and a checksum on each rank
    assert world.together(lambda: (rank, 7)) == rank
    for look, line in [
        (lambda: refuse("no data") if rank == 2 else (0, 7), rf"^no data \(rank 2 on {host}\)$"),
        (lambda: (0, int(rank == 1)), f"^rank 1 on {host} has other options, data"),
    ]:
        with pytest.raises(UserError, match=line):
            world.together(look)

    # matrices that are shared out, whole ones or the rows of each rank
    for n, parts in ((7, 3), (6, 2), (1, 1)):  # 7 do not divide by 3
        batch, seen = torch.randn(n, 2, 2, generator=torch.Generator().manual_seed(n)).bfloat16().mT, []
        assert torch.equal(world.spread(lambda x, seen=seen: seen.append(len(x)) or x * 2, batch, rows=2), batch * 2)
        assert seen == [parts]
    for n, rows in ((7, 8), (2, 3), (3, 2)):  # of 2 rows the last rank has none
        batch = torch.randn(n, rows, 5, generator=torch.Generator().manual_seed(n)).bfloat16()
        mine = [*batch.chunk(3, dim=1), batch[:, :0]][rank]  # as FSDP2 does
        world.sharded = ["a model"]
        ours = world.spread(lambda x: x.cumsum(1) + x.amax((1, 2), keepdim=True), mine, rows)
        whole = batch.cumsum(1) + batch.amax((1, 2), keepdim=True)
        assert torch.equal(ours, [*whole.chunk(3, dim=1), whole[:, :0]][rank]), (n, rows)
    world.sharded = []

    # gradients: a mean over ranks of the sum over micro-batches, to the bit or rounded to bfloat16 once
    want = sum(2 * (0.1234 + r + k) for r in range(3) for k in range(2)) / 3
    for bf16 in (False, True):
        torch.manual_seed(rank)  # DDP starts all ranks from rank 0's weights
        model = torch.nn.Linear(3, 1, bias=False)
        wrapped = world.wrap(model, torch.ones(1, 3), bf16=bf16)
        assert model.weight.grad is None
        for k in range(2):
            world.sync_gradients(wrapped, on=k == 1)
            wrapped(torch.full((2, 3), 0.1234 + rank + k)).sum().backward()
        error = abs(model.weight.grad / want - 1).max().item()
        assert 1e-5 < error < 2**-7 if bf16 else error < 1e-6
        assert torch.equal(model.weight.grad.bfloat16().float(), model.weight.grad) == bf16
    print("fine", rank)


def test_three_processes():
    done = call_processes(three_processes, [], 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 3


class Block(torch.nn.Module):
    """With the methods that FSDP adds."""

    unshard = reshard = set_reshard_after_forward = lambda self, *args, **kwargs: None

    def forward(self, x):
        return 2 * x


def test_sharded_blocks_run_eagerly_where_shapes_change():
    """Else each of them would be compiled for each shape, until torch gives up."""
    world, block, graphs = World("cpu"), Block(), []
    block.compile(backend=lambda graph, _: graphs.append(1) or graph.forward, dynamic=False)
    world.sharded = [block]
    block(torch.ones(1, 2))
    with torch.no_grad(), world.unsharded():
        for n in (3, 4, 5):
            block(torch.ones(n, 2))
    assert len(graphs) == 1
    block(torch.ones(7, 2))
    assert len(graphs) == 2


# ---- Stopping


@pytest.fixture
def handlers():
    numbers = [getattr(signal, name) for name in StopRequest.SIGNALS]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}  # nohup's would be left alone
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("name", "rank"), [*((name, "0") for name in StopRequest.SIGNALS), ("SIGINT", "1")])
def test_a_signal_is_a_request_to_stop(handlers, capfd, monkeypatch, name, rank):
    monkeypatch.setenv("RANK", rank)
    ignored = signal.SIGHUP if name != "SIGHUP" else signal.SIGUSR1
    signal.signal(ignored, signal.SIG_IGN)  # by nohup, which keeps its meaning
    stop = StopRequest()
    os.kill(os.getpid(), ignored)
    assert not stop
    os.kill(os.getpid(), getattr(signal, name))
    assert stop
    os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it twice
    said = "\nstopping after this step; Ctrl-C again stops now\n" if (name, rank) == ("SIGINT", "0") else ""
    assert (stop.reason, capfd.readouterr().err) == (name, said)


@pytest.mark.parametrize("signalled", [True, False])
def test_the_death_of_torchrun_is_a_request_to_stop(handlers, monkeypatch, signalled):
    """Whether Linux tells by a signal or not."""
    assert not StopRequest()  # alone, a parent may die: the shell that started it
    for name in TORCHRUN:
        monkeypatch.setenv(name, "0")
    stop = StopRequest()
    assert (bool(stop), stop.reason) == (False, "a signal to another process")  # for which all of them stop
    monkeypatch.setattr(os, "getppid", lambda: stop.parent + 1)
    if signalled:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop
    assert stop.reason == "torchrun is gone"


# ---- The device


def page_faults():
    """How many pages a block of 256 MB takes from the system, the second time: without World and with it."""
    import resource  # not on Windows

    libc, size = ctypes.CDLL(None), 1 << 28
    libc.malloc.restype = ctypes.c_void_p
    for device in (None, "cpu"):
        World(device)
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
            ctypes.memset(block, 1, size)
            libc.free(block)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    process = Fork(page_faults)
    assert process.ended() == 0
    given_back, kept = (int(line) for line in process.read().split())
    assert kept < given_back / 100


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_devices_and_dtypes(monkeypatch, dtype):
    """auto depends on the card. MPS is refused what it computes wrongly."""
    assert pick_device("cpu") == CPU
    for wrong in ("gpu", "cuda:99", "meta", "cpu:1", "cuda:1000000000000"):
        with pytest.raises(UserError, match=wrong):
            pick_device(wrong)
    assert pick_dtype("auto", CPU) == pick_dtype("auto", MPS) == pick_dtype("float32", MPS) == torch.float32
    assert pick_dtype(dtype, CPU) == getattr(torch, dtype)
    with pytest.raises(UserError, match=f"'{dtype}'.* MPS,.*--dtype=float32"):
        pick_dtype(dtype, MPS)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: dtype == "bfloat16")
    assert pick_dtype("auto", torch.device("cuda", 0)) == getattr(torch, dtype)


def test_no_peak_is_guessed(monkeypatch):
    assert hardware(CPU) == ("cpu", None)
    for name, peak in [("NVIDIA L4", 121e12), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert hardware(torch.device("cuda", 0)) == (name, peak)
    assert all(1e13 < peak < 1e16 for peak in PEAK_FLOPS.values())


def test_the_commit_is_that_of_this_code(monkeypatch, tmp_path):
    for command in ("init -q", "-c user.name=a -c user.email=b commit -q --allow-empty -mx"):
        subprocess.run(["git", "-C", tmp_path, *command.split()], check=True)
    here = machine(CPU, torch.float32)["commit"]
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert machine(CPU, torch.float32)["commit"] == here
