import os
import platform
import signal
import threading

import pytest
import torch
import torch.distributed as dist
from conftest import call_processes

from configurator import TORCHRUN, UserError
from distributed import StopRequest, World, own_store

CPU = torch.device("cpu")


def test_alone():
    world = World("cpu")
    assert (world.rank, world.size, world.is_main, world.device) == (0, 1, True, CPU)
    assert world.sum([1.5, 2.0]) == [1.5, 2.0]
    assert world.mean_(torch.tensor(3.0)).item() == 3.0
    assert world.on_main(lambda: "x") == "x"
    assert world.together(lambda: ("x", {"seed": "1"})) == "x"
    with pytest.raises(UserError, match=r"^what it saw$"):
        world.together(lambda: refuse("what it saw"))
    assert world.from_main(lambda: {"a": [torch.ones(2), None]})["a"][0].tolist() == [1.0, 1.0]
    assert world.spread(lambda x: x + 1, torch.zeros(3, 1, 1), rows=1).tolist() == [[[1.0]]] * 3
    model = torch.nn.Linear(2, 2)
    assert world.wrap(model, torch.ones(1, 2)) is model


def refuse(text):
    raise UserError(text)


def three_processes():
    def mistake():
        raise UserError("what rank 0 saw")

    world = World("cpu")
    assert world.size == 3
    assert world.sum([world.rank, 10.0**15 + world.rank]) == [3.0, 3 * 10.0**15 + 3]
    assert world.mean_(torch.tensor([float(world.rank)])).item() == 1.0
    calls = []
    assert world.on_main(lambda: calls.append(1) or "from " + str(world.rank)) == "from 0"
    assert calls == ([1] if world.rank == 0 else [])  # rank 0 alone decides
    with pytest.raises(UserError, match="what rank 0 saw"):
        world.on_main(mistake)
    for n, parts in ((7, 3), (6, 2), (1, 1)):  # 7 do not divide by 3
        batch, seen = torch.randn(n, 2, 2, generator=torch.Generator().manual_seed(n)).bfloat16().mT, []
        assert torch.equal(world.spread(lambda x, seen=seen: seen.append(len(x)) or x * 2, batch, rows=2), batch * 2)
        assert seen == [parts]
    for n, rows in ((7, 8), (2, 3), (3, 2)):  # of 2 rows the last rank has none
        batch = torch.randn(n, rows, 5, generator=torch.Generator().manual_seed(n)).bfloat16()
        mine = [*batch.chunk(3, dim=1), batch[:, :0]][world.rank]  # as FSDP2 does
        world.sharded = ["a model"]
        ours = world.spread(lambda x: x.cumsum(1) + x.amax((1, 2), keepdim=True), mine, rows)
        whole = batch.cumsum(1) + batch.amax((1, 2), keepdim=True)
        assert torch.equal(ours, [*whole.chunk(3, dim=1), whole[:, :0]][world.rank]), (n, rows)
    world.sharded = []
    torch.manual_seed(world.rank)  # DDP starts all ranks from rank 0's weights
    model = torch.nn.Linear(3, 1, bias=False)
    wrapped = world.wrap(model, torch.ones(1, 3))
    assert model.weight.grad is None
    for k in range(2):
        world.sync_gradients(wrapped, on=k == 1)
        wrapped(torch.full((2, 3), float(world.rank + k))).sum().backward()
    want = sum(2.0 * (r + k) for r in range(3) for k in range(2)) / 3
    assert torch.allclose(model.weight.grad, torch.full((1, 3), want)), model.weight.grad
    rank, host = world.rank, platform.node()
    assert world.together(lambda: (rank, {"option seed =": "1", "torch is": "2"})) == rank
    for look, line in [
        (lambda: refuse("no data"), "^no data$"),  # which all of them say
        (lambda: refuse("no data") if rank == 2 else (0, {}), f"^rank 2 on {host}: no data$"),
        (lambda: refuse(f"no card {rank}"), f"^rank 0 on {host}: no card 0$"),
        (
            lambda: (0, {"option seed =": str(rank // 2)}),
            rf"^rank 2 on {host}: option seed = 1, but 0 on rank 0 \({host}\)",
        ),
        (lambda: (0, {"x.py is": "1"} if rank == 1 else {}), rf"^rank 1 on {host}: x.py is 1, but None on rank 0"),
    ]:
        with pytest.raises(UserError, match=line):
            world.together(look)
    saved = {
        "model": {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(3, dtype=torch.int8)}, "step": 7,
        "optimizers": [{"state": {0: {"exp": torch.ones(2)}}, "empty": []}, {}], "none": None,
    }  # fmt: skip
    have = world.from_main(lambda: saved if rank == 0 else refuse("rank 0 alone is asked"))
    assert have["model"]["a"].equal(saved["model"]["a"])
    assert have["model"]["b"].dtype == torch.int8
    assert have["optimizers"][0]["state"][0]["exp"].tolist() == [1.0, 1.0]
    assert (have["step"], have["optimizers"][0]["empty"], have["optimizers"][1], have["none"]) == (7, [], {}, None)
    with pytest.raises(UserError, match="what rank 0 saw"):
        world.from_main(mistake)
    print("fine", world.rank)


def test_three_processes():
    done = call_processes(three_processes, [], 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 3


def test_each_life_of_a_group_has_a_store_of_its_own():
    """Whatever torchrun's counts of restarts are, and whoever comes first."""
    stores, shared = {}, dist.HashStore()

    def join(life, rank):
        stores[life, rank] = own_store(shared, rank, 3)

    for life, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 0, 2)]):
        threads = [threading.Thread(target=join, args=(life, rank), daemon=True) for rank in order]
        for thread in threads:
            thread.start()
            thread.join(0.1)  # the first ones see what the group before has left
        for thread in threads:
            thread.join(10)
        stores[life, 0].set("address", f"of life {life}")
        assert [stores[life, rank].get("address").decode() for rank in range(3)] == [f"of life {life}"] * 3


@pytest.mark.parametrize(
    "given", [{"WORLD_SIZE": "4"}, {"RANK": "0"}, {"LOCAL_RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}]
)
def test_half_of_torchruns_environment_is_refused(monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{next(n for n in TORCHRUN if n in given)} is set, but not .*MASTER_ADDR"):
        World("cpu")


def test_an_environment_that_is_not_torchruns(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node1")  # as a job script exports it for whatever comes
    assert World("cpu").size == 1
    for name in TORCHRUN:
        monkeypatch.setenv(name, "x")
    with pytest.raises(UserError, match="must be numbers"):
        World("cpu")


@pytest.fixture
def handlers():
    numbers = [getattr(signal, name) for name in StopRequest.SIGNALS]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}  # nohup's would be left alone
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", StopRequest.SIGNALS)
def test_a_signal_is_a_request_to_stop(handlers, name):
    stop = StopRequest()
    assert not stop
    os.kill(os.getpid(), getattr(signal, name))
    assert stop
    os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it twice
    assert stop.reason == name


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_ctrl_c_says_what_it_does(handlers, capfd, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.reason == "SIGINT"
    said = "\nstopping after this step; Ctrl-C again stops now\n"
    assert capfd.readouterr().err == (said if rank == "0" else "")


def test_nohup_keeps_its_meaning(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop


def test_the_death_of_torchrun_is_a_request_to_stop(handlers, monkeypatch):
    assert not StopRequest()  # alone, a parent may die: the shell that started it
    for name in TORCHRUN:
        monkeypatch.setenv(name, "0")
    stop = StopRequest()
    assert not stop
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop
    assert stop.reason == "torchrun is gone"
