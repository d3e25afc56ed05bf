"""Forward and backward of a step recorded as one CUDA graph.

A step of DeCo-L has some 1,700 kernels, and a host that orders them one by one can be slower than
the GPU that runs them: on an H200 84 ms against 48. A graph is recorded once, and replaying it is
one order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from deco_fast.config import TrainingConfig
from deco_fast.recording import pool_bytes, recording
from deco_fast.training.distributed import Processes

Losses = dict[str, Tensor]

# Compilers and libraries choose what to do in the first calls.
_WARM_UP_CALLS = 3


def can_capture(config: TrainingConfig, processes: Processes) -> bool:
    """Whether a run's steps can be recorded: on GPUs, with nothing that asks the host.

    Recomputing activations reads the random state from the GPU, and FSDP2 has a say between the
    blocks.
    """
    on_gpus = processes.device.type == "cuda" and not config.recompute_activations
    return on_gpus and (processes.world_size == 1 or config.distribution == "ddp")


class CapturedBackward:
    """The losses of a micro batch, and their gradients in `parameter.grad`, from one replay.

    The first call warms up and records. Inputs of other shapes than its own are computed without
    the graph, and all where it cannot be recorded, such as for want of memory: a warning says so.
    The memory of activations and gradients belongs to the graph and stays taken.

    Args:
        network: gives the losses, of which "total" is differentiated.
        parameters: get the gradients; they must stay where they are in memory.
        parts: backward passes that make a step; a gradient is that of total / parts.
    """

    def __init__(
        self, network: Callable[..., Losses], parameters: Sequence[Tensor], parts: int
    ) -> None:
        self._network, self._parts = network, parts
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool: tuple[int, int] = (0, 0)
        self._failed = False
        self._inputs: tuple[Tensor | None, ...] = ()
        self._losses: Losses = {}
        self._gradients: list[Tensor | None] = []

    def __call__(self, *inputs: Tensor | None) -> Losses:
        """Add the gradients of total / parts to `parameter.grad`; the losses hold until the next
        call."""
        if self._graph is None and not self._failed:
            self._record(inputs)
        if self._graph is None or not self._fits(inputs):
            return self._compute(inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given, non_blocking=True)
        self._graph.replay()
        self._hand_over()
        return self._losses

    @property
    def is_recorded(self) -> bool:
        """Whether there is a graph to replay."""
        return self._graph is not None

    def graph_bytes(self) -> int:
        """The GPU's memory that the graph holds, 0 where there is none."""
        return pool_bytes(self._pool) if self.is_recorded else 0

    def _fits(self, inputs: Sequence[Tensor | None]) -> bool:
        return not any(map(_differ, self._inputs, inputs))

    def _compute(self, inputs: Sequence[Tensor | None]) -> Losses:
        losses = self._network(*inputs)
        (losses["total"] / self._parts).backward()
        return losses

    def _record(self, inputs: Sequence[Tensor | None]) -> None:
        held = [parameter.grad for parameter in self._parameters]
        self._inputs = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream(self._parameters[0].device)
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                self._forget_gradients()
                self._compute(self._inputs)
        self._forget_gradients()
        current.wait_stream(stream)
        graph, self._pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # The loader's thread may pin memory in the meantime, which is no part of the recording.
            with recording(graph, self._pool, stream, capture_error_mode="thread_local"):
                losses = self._compute(self._inputs)
        except RuntimeError as error:
            _abandon(self._pool, current)
            self._failed, self._inputs = True, ()
            self._forget_gradients()
            # The error of what was recorded, where that of the end of the recording followed it.
            reason = str(error.__context__ or error).strip().partition("\n")[0]
            warnings.warn(
                f"a step cannot be recorded as a CUDA graph ({reason}): it is made without, which "
                "is slower where the host is; --training.cuda_graph=false does so at once",
                stacklevel=2,
            )
        else:
            self._losses = {name: value.detach() for name, value in losses.items()}
            self._gradients = [parameter.grad for parameter in self._parameters]
            self._graph = graph
        for parameter, gradient in zip(self._parameters, held, strict=True):
            parameter.grad = gradient

    def _forget_gradients(self) -> None:
        """A backward pass then makes new ones, and a replay overwrites them."""
        for parameter in self._parameters:
            parameter.grad = None

    def _hand_over(self) -> None:
        """Give the parameters the graph's gradients, or add these to what there is."""
        old, new = [], []
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is not None:
                old.append(parameter.grad)
                new.append(gradient)
            else:
                # The next replay overwrites the graph's own.
                parameter.grad = gradient if self._parts == 1 else gradient.clone()
        if old:
            torch._foreach_add_(old, new)


def _abandon(pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
    """Go on on this stream after a recording has failed.

    An error while a recording ends leaves the recording's stream behind as the current one, and the
    allocator recording into its pool, which then gives no memory back, its own or others'.
    """
    torch.cuda.set_stream(stream)
    # Where the recording has ended in good order, there is nothing to end: so says the error.
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(stream.device.index, pool)
        torch._C._cuda_releasePool(stream.device.index, pool)


def _differ(own: Tensor | None, given: Tensor | None) -> bool:
    if own is None or given is None:
        return own is not given
    return (own.shape, own.dtype) != (given.shape, given.dtype)
