"""The processes of one training run, as torchrun starts them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from deco_fast.errors import UserError, report

T = TypeVar("T")

_STORE_KEY = "deco_fast/store"
_CONNECT_TIMEOUT = timedelta(seconds=5)

_PEER_HAS_LEFT = re.compile(r"Connection (closed|reset) by peer|[Gg]loo.*Broken pipe")
"""In gloo's errors, which have no type of their own."""

_BUCKET_BYTES = 128 * 2**20
"""Of tensors that travel together: enough for the wires' full speed, and few enough that one bucket
can be gathered while another is under way."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; a plain `python train.py` is one of one."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def greatest(self, value: int) -> int:
        """The largest value of all processes."""
        if self.world_size == 1:
            return value
        # On the CPU, where gloo serves: a value on a GPU would have to wait for its queue.
        values = torch.tensor(value)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values)

    def union(self, flags: torch.Tensor) -> torch.Tensor:
        """The bool flags that are set in any process; on the CPU."""
        if self.world_size == 1:
            return flags
        counts = flags.to(self.device, torch.uint8)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return counts.bool().cpu()

    def least(self, value: int) -> int:
        """The smallest value of all processes."""
        if self.world_size == 1:
            return value
        # On the CPU: it is asked where the GPU's memory has just been filled to find out.
        values = torch.tensor(value)
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return int(values)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor on the device over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def copy_from_main_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put the main process's values in the place of tensors on the device."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def average_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put the means over all processes in the place of tensors of one dtype on the device."""
        if self.world_size == 1:
            return
        under_way = None
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            work = dist.all_reduce(flat, async_op=True)
            if under_way is not None:
                self._put_mean(*under_way)
            under_way = bucket, flat, work
        if under_way is not None:
            self._put_mean(*under_way)

    def _put_mean(self, bucket: list[torch.Tensor], flat: torch.Tensor, work: dist.Work) -> None:
        work.wait()
        flat /= self.world_size
        parts = flat.split([tensor.numel() for tensor in bucket])
        shaped = [part.view_as(own) for part, own in zip(parts, bucket, strict=True)]
        torch._foreach_copy_(bucket, shaped)

    def share(self, count: int) -> range:
        """This process's part of so many things: consecutive ones, in the order of the ranks."""
        start, stop = (count * (self.rank + k) // self.world_size for k in (0, 1))
        return range(start, stop)

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (N, …) of all processes on the CPU, in their order; N may differ."""
        if self.world_size == 1:
            return rows
        # On the CPU, where gloo serves and memory is plenty.
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)]))
        most = max(int(count) for count in counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def from_main(self, value: T) -> T:
        """What the main process passed, in every process."""
        if self.world_size > 1:
            values = [value]
            dist.broadcast_object_list(values, device=torch.device("cpu"))
            value = values[0]
        return value

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world_size > 1:
            dist.barrier()


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours, of `_BUCKET_BYTES` together where one alone is not larger."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def pick_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is a GPU, else the CPU; under torchrun the process's own GPU.

    Raises:
        UserError: the device does not exist here, or is of another kind.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    unknown = UserError(f"unknown device '{device}': use auto, cpu or cuda")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise unknown from error
    if chosen.type not in ("cpu", "cuda"):
        raise unknown
    if chosen.type == "cuda":
        index = chosen.index if chosen.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise UserError(
                f"device '{device}' is not available: this machine has "
                f"{torch.cuda.device_count()} CUDA GPU(s); use --device cpu"
            )
        chosen = torch.device("cuda", index)
    return chosen


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the run's process group where torchrun started one, and leave it at the end.

    After an error among several GPUs the process ends here and at once, by `report`: to leave
    NCCL's group is to wait for the other processes, and they may be waiting for this one. torchrun
    ends them when it sees that this one has gone.

    Raises:
        UserError: on CPUs, another process has left in the meantime.
    """
    chosen = pick_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Processes(0, 1, chosen)
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=_fresh_store(),
        rank=int(os.environ["RANK"]),
        world_size=world_size,
    )
    try:
        yield Processes(dist.get_rank(), world_size, chosen)
    except BaseException as error:
        if chosen.type == "cuda":
            status = report(error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
        if isinstance(error, RuntimeError) and _PEER_HAS_LEFT.search(str(error)):
            raise UserError("another process has ended: its own message says why") from error
        raise
    dist.destroy_process_group()


def _fresh_store() -> dist.Store:
    """A store that holds nothing of processes that died: torchrun's outlives a restart.

    With --max-restarts a restarted process would read in it where its peers listened before they
    died (torch 2.13). So rank 0 opens a store of its own and names it in torchrun's: who reads the
    name of a dead one cannot connect, and reads again.
    """
    shared, rank, world_size = next(dist.rendezvous("env://"))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return shared
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        own = dist.TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)
        shared.set(_STORE_KEY, str(own.port))
        return own
    while True:
        port = int(shared.get(_STORE_KEY))
        try:
            store = dist.TCPStore(
                host, port, world_size, timeout=_CONNECT_TIMEOUT, wait_for_workers=False
            )
        except dist.DistError:
            continue
        store.set_timeout(dist.default_pg_timeout)
        return store
