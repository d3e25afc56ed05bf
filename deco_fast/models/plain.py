"""Layers whose weights a fused op reads, without calling the layers."""

from __future__ import annotations

from typing import cast

from torch import nn


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes x Wᵀ + b with its weight and bias, and nothing listens to it."""
    listened_to = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer).forward is nn.Linear.forward and not listened_to


def plain(layer: nn.Module) -> nn.Linear:
    """The layer, whose weight may be read; hooks on it are not called.

    Raises:
        TypeError: it computes something else, an adapter's product for one.
    """
    if type(layer).forward is not nn.Linear.forward:
        kind = type(layer)
        raise TypeError(
            f"{kind.__module__}.{kind.__qualname__} stands in a place where a fused op reads a "
            "weight, and would be passed over: merge it into the weight, or leave this layer out"
        )
    return cast(nn.Linear, layer)
