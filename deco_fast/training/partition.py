"""What a compiled step keeps between its forward and its backward pass.

Under autocast each weight is cast for its product, and torch.compile keeps the cast for the
products of the backward pass: as much memory as half the float32 weights, 0.8 GiB for DeCo-L
beside 0.25 GiB of activations for each image. Casting again takes a read of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

_CASTS = (
    torch.ops.prims.convert_element_type.default,
    torch.ops.aten._to_copy.default,
)


class RecomputeCasts(CustomGraphPass):
    """Marks the casts of parameters and other inputs as what the backward pass computes again.

    For torch.compile(options={"joint_custom_post_pass": RecomputeCasts()}): the pass sees forward
    and backward as one graph, before it is parted.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="placeholder"):
            for user in node.users:
                if user.target in _CASTS:
                    user.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE

    def uuid(self) -> Any:
        """For the key of compiled code in the cache."""
        return get_hash_for_files((__file__,))
