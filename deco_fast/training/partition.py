"""What a compiled step keeps between its forward and its backward pass.

torch.compile keeps whatever a product of the backward pass takes, also where it is made again at
little cost:

- the weights as the products take them. Under autocast each is cast, and some are joined: as much
  memory as half the float32 weights, 0.8 GiB for DeCo-L beside 0.25 GiB of activations an image;
- the MLP's silu(gate)·value, beside the gate and the value that its gradient needs anyway: an
  eighth of the activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

_aten, _prims = torch.ops.aten, torch.ops.prims
_CASTS = {_prims.convert_element_type.default, _aten._to_copy.default}
_VIEWS = {
    *(_aten.view.default, _aten.permute.default, _aten.transpose.int, _aten.t.default),
    *(_aten.slice.Tensor, _aten.split.Tensor, _aten.split_with_sizes.default),
    *(_aten.unsqueeze.default, _aten.squeeze.dim, _aten.expand.default, _aten.select.int),
}
_JOINING = {_aten.constant_pad_nd.default, _aten.cat.default}
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}
# silu(x) = x / (1 + exp(−x)), by one name or another, and what it is multiplied by.
_SWIGLU = {
    *(_aten.neg.default, _aten.exp.default, _aten.sigmoid.default),
    *(_aten.mul.Tensor, _aten.div.Tensor),
}


class RecomputeCheapInputs(CustomGraphPass):
    """Marks what products take, and what the backward pass is to compute again for its own.

    That is what casts, views and joins alone make of the graph's inputs, and what silu and
    multiplication make of products' results.

    For torch.compile(options={"joint_custom_post_pass": RecomputeCheapInputs()}): the pass sees
    forward and backward as one graph, before it is parted.
    """

    def __call__(self, graph: fx.Graph) -> None:
        weights: set[fx.Node] = set()
        products: set[fx.Node] = set()
        activations: set[fx.Node] = set()
        backward: set[fx.Node] = set()
        for node in graph.nodes:
            inputs = set(node.all_input_nodes)
            if node.op == "placeholder":
                # "tangents" are what the backward pass begins with.
                (backward if node.name.startswith("tangents") else weights).add(node)
                continue
            if inputs & backward:
                backward.add(node)
                continue
            is_view = node.target in _VIEWS or _is_part(node)
            if inputs and inputs <= weights and (is_view or node.target in _CASTS | _JOINING):
                weights.add(node)
            elif node.target in _PRODUCTS or (is_view and inputs <= products):
                products.add(node)
            elif inputs <= products | activations and (
                is_view or node.target in _CASTS | _SWIGLU or _is_one_more(node)
            ):
                activations.add(node)
            else:
                continue
            if node not in products:
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE

    def uuid(self) -> Any:
        """For the key of compiled code in the cache."""
        return get_hash_for_files((__file__,))


def _is_part(node: fx.Node) -> bool:
    """Whether it is one of the results of an op that has several."""
    return getattr(node.target, "__name__", "") == "getitem"


def _is_one_more(node: fx.Node) -> bool:
    # With two tensors it would be a residual, and all of them one chain.
    return node.target == _aten.add.Tensor and len(node.all_input_nodes) == 1
