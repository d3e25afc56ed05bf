"""The network of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from deco_fast.models.card import ModelCard
from deco_fast.models.config import (
    DeCoConfig,
    DeCoT2IConfig,
    NetworkConfig,
    PixDDTConfig,
    PixelDiTConfig,
    PixNerdConfig,
)
from deco_fast.models.deco import DeCo
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.network import DeCoNetwork
from deco_fast.models.pix_ddt import PixDDT
from deco_fast.models.pixel_dit import PixelDiT
from deco_fast.models.pixnerd import PixNerd


def build_network(config: NetworkConfig, card: ModelCard | None = None) -> DeCoNetwork:
    """A freshly initialised network: DeCo or a baseline for class labels, `DeCoT2I` for text."""
    match config:
        case DeCoConfig():
            return DeCo(config, card)
        case DeCoT2IConfig():
            return DeCoT2I(config, card)
        case PixelDiTConfig():
            return PixelDiT(config, card)
        case PixNerdConfig():
            return PixNerd(config, card)
        case PixDDTConfig():
            return PixDDT(config, card)
    raise TypeError(f"{type(config).__name__} is no network's configuration")


def empty_network(config: NetworkConfig, card: ModelCard | None = None) -> DeCoNetwork:
    """A network on the meta device: names and shapes of its tensors, which hold no memory."""
    with torch.device("meta"), _NoInitialisation():
        return build_network(config, card)


class _NoInitialisation(TorchFunctionMode):
    """Leaves out torch.nn.init: on the meta device it draws nothing, but the first normal
    distribution imports torch's compiler, which takes seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
