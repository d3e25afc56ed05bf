"""How the objective is spread over memory and processes: recomputation, DDP, FSDP2, compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from deco_fast.config import TrainingConfig
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.network import DeCoNetwork
from deco_fast.training.distributed import Processes
from deco_fast.training.objective import Objective
from deco_fast.training.partition import RecomputeCheapInputs

COMPILE_OPTIONS: dict[str, Any] = {"joint_custom_post_pass": RecomputeCheapInputs()}
"""For Inductor, whatever it compiles of a step."""


def device_mesh(processes: Processes) -> DeviceMesh:
    """All processes in a row."""
    return init_device_mesh(processes.device.type, (processes.world_size,))


def shard(model: DeCoNetwork, mesh: DeviceMesh, root: nn.Module | None = None) -> None:
    """Give every process a part of each parameter (FSDP2), gathered block by block when needed.

    Args:
        model: its parameters become DTensors, in place.
        mesh: from `device_mesh`.
        root: a module around the model whose other parameters are to be shared as well.
    """
    for block in _all_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model.decoder, mesh=mesh)
    fully_shard(root if root is not None else model, mesh=mesh)


def _all_blocks(model: DeCoNetwork) -> list[nn.Module]:
    """Those of the DiT, and those that refine the text."""
    refining = list(model.text_blocks) if isinstance(model, DeCoT2I) else []
    return [*refining, *model.blocks]


def set_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite all parameters of a module, shared among processes or not.

    Args:
        module: the same in every process.
        tensors: whole, by name, the same in every process.
    """
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(module, dict(tensors), options=options)


def recompute_activations(model: DeCoNetwork) -> None:
    """Let every block keep its input alone, and compute again in the backward pass."""
    for block in _all_blocks(model):
        # On the instance: a wrapper module would change the parameters' names.
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A function of ours and no partial of torch's: the compiler steps over torch's own.
    def recomputed(*inputs: Tensor) -> Tensor:
        result: Tensor = checkpoint(forward, *inputs, use_reentrant=False)
        return result

    return recomputed


def prepare_network(
    objective: Objective, config: TrainingConfig, processes: Processes, *, recorded: bool = False
) -> nn.Module:
    """What a step calls in place of the objective: wrapped for DDP, and compiled.

    Args:
        objective: sharded already where the processes share it.
        config: the run's training section.
        processes: this process among those of the run.
        recorded: whether it goes into a CUDA graph, after which the caller averages the gradients
            itself: DDP would do so in the middle of the backward pass.
    """
    network: nn.Module = objective
    sharded = isinstance(objective, FSDPModule)
    if processes.world_size > 1 and not (sharded or recorded):
        network = DistributedDataParallel(
            objective,
            [processes.device] if processes.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    if config.compile:
        # FSDP2's hooks lie between the blocks, and DDP's splitting of the graph into buckets
        # cannot see into recomputed ones: there each block is a graph of its own.
        by_block = sharded or (network is not objective and config.recompute_activations)
        for part in _all_blocks(objective.model) if by_block else [network]:
            part.compile(options=COMPILE_OPTIONS)
    return network


def reduce_gradients(network: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """The context of a backward pass, whose gradients are reduced now or with a later one's."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)
    elif isinstance(network, DistributedDataParallel) and not now:
        return network.no_sync()
    return nullcontext()
