"""The text encoder of a run with a text model."""

from __future__ import annotations

import torch

from deco_fast.conditioning.qwen3 import Qwen3TextEncoder
from deco_fast.config import RunConfig
from deco_fast.models.config import DeCoT2IConfig


def open_text_encoder(config: RunConfig, device: torch.device) -> Qwen3TextEncoder | None:
    """The frozen text encoder; None for a class model.

    Raises:
        UserError: it cannot be read.
    """
    if not isinstance(config.model, DeCoT2IConfig):
        return None
    return Qwen3TextEncoder(
        config.text.encoder,
        length=config.model.text_length,
        size=config.model.text_size,
        device=device,
    )
