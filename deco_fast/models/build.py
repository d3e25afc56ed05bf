"""The network of a configuration."""

from __future__ import annotations

from deco_fast.models.card import ModelCard
from deco_fast.models.config import DeCoConfig, DeCoT2IConfig, NetworkConfig, PixNerdConfig
from deco_fast.models.deco import DeCo
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.network import DeCoNetwork
from deco_fast.models.pixnerd import PixNerd


def build_network(config: NetworkConfig, card: ModelCard | None = None) -> DeCoNetwork:
    """A freshly initialised network: `DeCo` or `PixNerd` for class labels, `DeCoT2I` for text."""
    if isinstance(config, DeCoT2IConfig):
        return DeCoT2I(config, card)
    if isinstance(config, PixNerdConfig):
        return PixNerd(config, card)
    assert isinstance(config, DeCoConfig)
    return DeCo(config, card)
