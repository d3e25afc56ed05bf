"""The networks that have a name: the paper's, and the one that trains on a laptop."""

from __future__ import annotations

from typing import NamedTuple

from deco_fast.errors import UserError, nearest
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.config import (
    DeCoConfig,
    DeCoT2IConfig,
    NetworkConfig,
    PixelDiTConfig,
    PixNerdConfig,
)


class Preset(NamedTuple):
    """A network's shape and the settings published for it (specification B.14)."""

    config: NetworkConfig
    card: ModelCard


_XL = DeCoConfig(hidden_size=1152, depth=28, num_heads=16)
_L = DeCoConfig(hidden_size=1024, depth=22, num_heads=16)
_T2I = DeCoT2IConfig(hidden_size=1536, depth=16, num_heads=24)
# The class embedding begins at 0.3: with the published 0.02 ten classes are not told apart
# within the few thousand steps that a laptop has time for.
_DIGITS = DeCoConfig(
    hidden_size=128,
    depth=4,
    num_heads=4,
    patch_size=8,
    decoder_hidden_size=16,
    num_classes=10,
    class_embedding_std=0.3,
)

PRESETS: dict[str, Preset] = {
    "deco-xl": Preset(
        _XL,
        ModelCard(
            name="deco-xl",
            sampling=SamplingSettings(guidance_scale=3.2, guidance_interval=(0.1, 1.0)),
        ),
    ),
    "deco-xl-512": Preset(
        _XL,
        ModelCard(
            name="deco-xl-512",
            height=512,
            width=512,
            sampling=SamplingSettings(guidance_scale=5.0, guidance_interval=(0.1, 1.0)),
        ),
    ),
    "deco-l": Preset(_L, ModelCard(name="deco-l", sampling=SamplingSettings(steps=50))),
    "deco-digits": Preset(
        _DIGITS,
        ModelCard(
            name="deco-digits",
            height=32,
            width=32,
            sampling=SamplingSettings(guidance_scale=2.0),
        ),
    ),
    # The baselines of the paper's Table 1, and the largest of them.
    "baseline-l": Preset(
        PixelDiTConfig(hidden_size=1024, depth=24, num_heads=16),
        ModelCard(name="baseline-l", sampling=SamplingSettings(steps=50)),
    ),
    "baseline-xl": Preset(
        PixelDiTConfig(hidden_size=1152, depth=28, num_heads=16),
        ModelCard(
            name="baseline-xl",
            sampling=SamplingSettings(guidance_scale=3.2, guidance_interval=(0.1, 1.0)),
        ),
    ),
    "jit-l": Preset(
        PixelDiTConfig(hidden_size=1024, depth=24, num_heads=16, prediction="image"),
        ModelCard(name="jit-l", prediction="image", sampling=SamplingSettings(steps=50)),
    ),
    "pixnerd-l": Preset(
        PixNerdConfig(hidden_size=1024, depth=22, num_heads=16),
        ModelCard(name="pixnerd-l", sampling=SamplingSettings(steps=50)),
    ),
    # As published for the model after its last stage, sft_res512.
    "deco-t2i": Preset(
        _T2I,
        ModelCard(
            name="deco-t2i",
            height=512,
            width=512,
            sampling=SamplingSettings(
                solver="adams", order=2, steps=25, guidance_scale=4.0, time_shift=3.0
            ),
            text_encoder="hf:Qwen/Qwen3-1.7B",
        ),
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UserError: there is none; the nearest name is suggested.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'{nearest(name, PRESETS)}")
    return PRESETS[name]
