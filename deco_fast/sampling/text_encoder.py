"""The text encoder of a model that draws from prompts, and what it leaves out of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from deco_fast.conditioning.qwen3 import QWEN3_1_7B, Qwen3TextEncoder
from deco_fast.models.card import ModelCard
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.network import DeCoNetwork
from deco_fast.sampling.prompts import shorten


def text_encoder_path(given: str | None, card: ModelCard) -> str:
    """Where the text encoder is: what is given, else what the card says, else the published one."""
    return given or card.text_encoder or QWEN3_1_7B


def open_text_encoder(
    model: DeCoNetwork, path: str, device: torch.device
) -> Qwen3TextEncoder | None:
    """That of a text model; a class model has none.

    Raises:
        UserError: there is no such text encoder.
    """
    if not isinstance(model, DeCoT2I):
        return None
    return Qwen3TextEncoder(
        path, length=model.config.text_length, size=model.config.text_size, device=device
    )


def cut_prompts(encoder: Qwen3TextEncoder, prompts: Iterable[str]) -> list[str]:
    """A sentence for each prompt of which the encoder does not use all."""
    lines = []
    for prompt in dict.fromkeys(prompts):
        if (tokens := encoder.count_tokens(prompt)) > encoder.length:
            used = f"of {tokens:,} tokens the first {encoder.length} are used"
            lines.append(f"cut: {used}: {shorten(prompt)!r}")
    return lines
