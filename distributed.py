"""One process or many: ranks, sharding, and the request to stop. Nothing else in the project knows about ranks."""

import contextlib
import math
import os
import platform
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F

from configurator import TORCHRUN, UserError, under_torchrun
from device import keep_freed_memory, pick_device

TIMEOUT = timedelta(minutes=15)  # how long a process waits for the others: compiling, saving, or hung


class World:
    """This process among `size`: its `rank` and `device`. Started by torchrun, or alone."""

    def __init__(self, device: str | None = "auto"):
        """Join the group; `device` as in `use`, or None to choose it later.

        Raises UserError if only a part of torchrun's environment is set.
        """
        found = [name for name in TORCHRUN[:3] if name in os.environ]  # an address alone, as a job script sets, is fine
        if found and not under_torchrun():
            missing = [name for name in TORCHRUN if name not in os.environ]
            raise UserError(
                f"{found[0]} is set, but not {', '.join(missing)}: start with torchrun, or unset {' '.join(found)}"
            )
        try:
            self.rank, self.local_rank, self.size = (
                int(os.environ.get(name, alone)) for name, alone in zip(TORCHRUN[:3], (0, 0, 1), strict=True)
            )
        except ValueError as error:
            raise UserError(f"{', '.join(TORCHRUN[:3])} must be numbers, as torchrun sets them: {error}") from None
        self.is_main = self.rank == 0  # the one that prints and writes
        self.sharded: list[nn.Module] = []  # the blocks of a sharded model, and last itself
        # torchrun makes a folder for each launch: its name tells a restarted group from another run's.
        folder = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self.launch = Path(folder).parent.parent.parent.name if folder else None
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by torchrun --max-restarts
        if under_torchrun():
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            store = own_store(store, rank, size)
            # gloo carries the small numbers that live on the CPU, NCCL everything on GPUs.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        if device is not None:
            self.use(device)

    def use(self, device: str) -> None:
        """Choose this process's device: 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'."""
        self.device = pick_device(device, self.local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif self.device.type == "cpu" and sys.platform == "linux":
            keep_freed_memory()

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        """Share out all weights, and with them gradients and optimizer states, over all ranks, in place: FSDP2 (Zhao et
        al. 2023, arXiv 2304.11277). Each block is whole only while it computes, on GPUs in `dtype`; the rest of the
        model stays whole, in float32, from the forward to the backward pass. A process alone keeps its model."""
        if not dist.is_initialized():
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # which take a second to import

        # Inputs stay what autocast makes them: a rotation must not be rounded. So does the head: its gradients add up.
        mesh = dist.init_device_mesh(self.device.type, (self.size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        in_dtype = replace(
            policy, param_dtype=dtype if self.device.type == "cuda" else None
        )  # a CPU's norms do not mix
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=in_dtype)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.sharded = [*blocks, model]

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        """Inside, every rank has all weights, and may call any method of a sharded model as often as it likes. No
        gradients here."""
        for module in self.sharded:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in self.sharded:
                module.set_reshard_after_forward(module is not self.sharded[-1], recurse=False)
                module.reshard()

    def reshard(self) -> None:
        """Let go of gathered weights: they have changed since."""
        for module in self.sharded:
            module.reshard()

    def full(self, value: Tensor) -> Tensor:
        """The tensor itself, or all of one that is sharded: then all ranks must ask."""
        return value.full_tensor() if is_sharded(value) else value

    def whole(self, state: Any) -> Any:
        """The state dicts that one process would have, from those of a sharded model: on rank 0, on the CPU. All ranks
        must ask; without sharding it is the state itself."""
        if not self.sharded:
            return state
        if isinstance(state, dict):
            return {name: self.whole(value) for name, value in state.items()}
        if isinstance(state, list):
            return [self.whole(value) for value in state]
        if not is_sharded(state):
            return state
        tensor = self.full(state)
        return tensor.cpu() if self.is_main else None

    def wrap(self, model: nn.Module, *example: Tensor, warm_up: bool = False) -> nn.Module:
        """The model whose backward averages gradients over all ranks. `example` are inputs that give a loss.

        warm_up: run one forward and backward pass now, so that what fails to compile fails here.
        """
        wrapped = model
        if self.sharded:
            warm_up = True  # it settles what belongs to which rank before anything else is asked of the model
        elif dist.is_initialized():
            wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            # DDP regroups its buckets after the first backward pass, and with them the order in which ranks are summed.
            # That pass is thrown away: otherwise a resumed run would differ from a straight one in the last bits.
            warm_up = True
        if warm_up:
            wrapped(*example).backward()
            model.zero_grad(set_to_none=True)
        return wrapped

    def sync_gradients(self, wrapped: nn.Module, on: bool) -> None:
        """Whether the next backward averages gradients: only a step's last micro-batch has to. (A sharded model does it
        every time: it has no room for whole gradients.)"""
        wrapped.require_backward_grad_sync = on

    def sum(self, values: Iterable[float]) -> list[float]:
        """Each value summed over all ranks, in float64 on the CPU."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: object) -> bool:
        """Whether it is true on any rank. All ranks must ask."""
        return bool(flag) if self.size == 1 else self.sum([bool(flag)])[0] > 0

    def mean_(self, value: Tensor) -> Tensor:
        """A tensor averaged over all ranks, in place, on its own device and without waiting for it."""
        if dist.is_initialized():
            dist.all_reduce(value)
            value /= self.size
        return value

    def spread(self, function: Callable[[Tensor], Tensor], batch: Tensor, rows: int) -> Tensor:
        """function(batch), for a function that maps every matrix of a batch (n, rows, columns) alone to one of the same
        shape. Each rank computes a part of the matrices; all ranks get all results, or their own rows of all."""
        if self.size == 1:
            return function(batch)
        n = math.ceil(len(batch) / self.size)  # matrices a rank computes
        if self.sharded:
            return self.spread_rows(function, batch, rows, n)
        padded = torch.cat([batch, batch.new_zeros(n * self.size - len(batch), *batch.shape[1:])])
        results = torch.empty(padded.shape, dtype=padded.dtype, device=padded.device)
        dist.all_gather(list(results.split(n)), function(padded[self.rank * n :][:n]).contiguous())
        return results[: len(batch)]

    def spread_rows(self, function: Callable[[Tensor], Tensor], batch: Tensor, rows: int, n: int) -> Tensor:
        """The same where each rank has its own rows of all matrices, the first ceil(rows / size) on rank 0."""
        share = math.ceil(rows / self.size)
        padding = (0, 0, 0, share - batch.size(1), 0, n * self.size - len(batch))
        mine = F.pad(batch, padding)  # (size * n, share, columns)
        dist.all_to_all_single(parts := torch.empty_like(mine), mine)  # size parts of n matrices
        matrices = parts.unflatten(0, (self.size, n)).transpose(0, 1).flatten(1, 2)  # (n, size * share, columns)
        results = F.pad(function(matrices[:, :rows]), (0, 0, 0, self.size * share - rows))
        parts = results.unflatten(1, (self.size, share)).transpose(0, 1).flatten(0, 1).contiguous()
        dist.all_to_all_single(mine, parts)
        return mine[: len(batch), : batch.size(1)]

    def on_main(self, decide: Callable[[], Any]) -> Any:
        """Run `decide` on rank 0 alone: what it returns, on every rank; a UserError it raises there is every rank's."""
        value = error = None
        if self.is_main:
            try:
                value = decide()
            except UserError as mistake:
                error = str(mistake)
        box = [(value, error)]
        if dist.is_initialized():
            dist.broadcast_object_list(box)
        value, error = box[0]
        if error:
            raise UserError(error)
        return value

    def together(self, look: Callable[[], tuple[Any, dict[str, str]]]) -> Any:
        """Run `look` on every rank -> its result here; look returns (result, {what it found: value}).

        Raises UserError, the same on every rank, where it was raised on any, or where what they found differs: it says
        which rank on which machine.
        """
        result, found, problem = None, {}, None
        try:
            result, found = look()
        except UserError as mistake:
            problem = str(mistake)
        reports = [(platform.node(), problem, found)] * self.size
        if dist.is_initialized():
            dist.all_gather_object(reports, reports[0])
        main_host, _, main_found = reports[0]
        for rank, (host, problem, values) in enumerate(reports):
            who = f"rank {rank} on {host}"
            if problem:  # a mistake that all have made is nobody's own
                alone = any(problem != other for _, other, _ in reports)
                raise UserError(f"{who}: {problem}" if alone else problem)
            for name in main_found | values:
                have, want = values.get(name), main_found.get(name)
                if have != want:
                    raise UserError(f"{who}: {name} {have}, but {want} on rank 0 ({main_host}); make them the same")
        return result

    def from_main(self, decide: Callable[[], Any]) -> Any:
        """As on_main, for what holds tensors on the CPU, in dicts and lists: they travel one by one, as a pickle of all
        would take the memory of each several times."""
        if not dist.is_initialized():
            return decide()
        tensors: list[Tensor] = []

        def take_out(value: Any) -> Any:
            if isinstance(value, Tensor):
                tensors.append(value)
                return Travels(value.dtype, tuple(value.shape))
            if isinstance(value, dict):
                return {name: take_out(part) for name, part in value.items()}
            return [take_out(part) for part in value] if isinstance(value, list) else value

        def put_in(value: Any) -> Any:
            if isinstance(value, Travels):
                tensor = tensors.pop(0).contiguous() if self.is_main else torch.empty(value.shape, dtype=value.dtype)
                dist.broadcast(tensor, 0)
                return tensor
            if isinstance(value, dict):
                return {name: put_in(part) for name, part in value.items()}
            return [put_in(part) for part in value] if isinstance(value, list) else value

        return put_in(self.on_main(lambda: take_out(decide())))

    def close(self) -> None:
        """Wait for the other ranks. `cli` then ends the process, and the group with it: destroying the group can hang,
        as gloo joins a thread that waits for Python's lock to free its last tensor."""
        self.sum([0.0])


class Travels(NamedTuple):
    """In place of a tensor that comes on its own."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def own_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The part of torchrun's store that belongs to this life of the group.

    A restarted group shares the store of the one before, and would dial its dead addresses there. torchrun counts
    restarts on each node for itself, and a node that came back begins at 0: so rank 0 numbers the lives, and another
    rank believes a number only once rank 0 has answered.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        life = f"life {store.add('lives', 1)}"
        store.set("life", life)
        present = [store.get(f"{life} has {other}") for other in range(1, size)]  # waits for each
        store.set(f"{life} began", b" ".join(present))
        return dist.PrefixStore(life, store)
    while True:
        life = store.get("life").decode()  # of the group before, until rank 0 is here
        store.set(f"{life} has {rank}", me)
        if store.check([f"{life} began"]) and me in store.get(f"{life} began").decode():
            return dist.PrefixStore(life, store)
        time.sleep(0.05)


class StopRequest:
    """Whether this process was asked to end its run: true from the first signal on, or once torchrun, which started it,
    is dead. `reason` is the signal's name, or says that torchrun is gone."""

    SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGXCPU")  # a terminal lost, a scheduler's warning

    def __init__(self):
        self.reason: str | None = None
        self.parent = os.getppid() if under_torchrun() else None
        for name in self.SIGNALS:
            number = getattr(signal, name, None)  # Windows has the first two
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets SIGHUP
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _: object) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # the next Ctrl-C ends it at once, whatever is going on
            if os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(OSError):  # no terminal any more. A print() may be what the signal broke into
                    os.write(2, b"\nstopping after this step; Ctrl-C again stops now\n")

    def __bool__(self) -> bool:
        if self.parent not in (None, os.getppid()):
            self.reason = self.reason or "torchrun is gone"
        return self.reason is not None


def is_sharded(value: object) -> bool:
    return hasattr(value, "full_tensor")  # importing its type, DTensor, would take a second


def own_rows(p: Tensor) -> Tensor:
    """A matrix or vector; if it is sharded, this rank's rows of it, which share its memory."""
    return p.to_local() if is_sharded(p) else p


def copy_like(p: Tensor, value: Tensor) -> Tensor:
    """A copy of a whole tensor, on p's device; if p is sharded, of this rank's rows, sharded as p."""
    if not is_sharded(p):
        return value.to(p.device, copy=True, memory_format=torch.contiguous_format)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
