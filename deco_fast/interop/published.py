"""The published layout: what it calls our tensors, and how its networks are told apart.

Specification B.9 and B.14; names and shapes as in the published LightningModule's state dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

from deco_fast.models.config import DeCoConfig, DeCoT2IConfig, NetworkConfig

PREFIXES = {"model": "denoiser.", "ema": "ema_denoiser."}
"""Where a published file keeps the raw and the averaged weights."""

PROJECTOR_PREFIX = "diffusion_trainer.proj.0."
"""Where it keeps the projector of representation alignment (REPA)."""

# Ours, theirs; "#" is an index and "*" a name, the same on both sides. Each layer has a weight,
# and most have a bias.
_LAYERS = (
    ("patch_embedder", "s_embedder.proj"),
    ("timestep_embedder.mlp.#", "t_embedder.mlp.#"),
    ("class_embedder", "y_embedder.embedding_table"),
    ("text_embedder.*", "y_embedder.*"),
    ("text_blocks.#.norm1", "text_refine_blocks.#.norm1"),
    ("text_blocks.#.norm2", "text_refine_blocks.#.norm2"),
    ("text_blocks.#.attention.*", "text_refine_blocks.#.attn.*"),
    ("text_blocks.#.mlp.*", "text_refine_blocks.#.mlp.*"),
    ("text_blocks.#.modulation", "text_refine_blocks.#.adaLN_modulation.0"),
    ("blocks.#.norm1", "blocks.#.norm1"),
    ("blocks.#.norm2", "blocks.#.norm2"),
    ("blocks.#.attention.*", "blocks.#.attn.*"),
    ("blocks.#.mlp.*", "blocks.#.mlp.*"),
    ("blocks.#.modulation", "blocks.#.adaLN_modulation.0"),
    ("decoder.pixel_embedder", "x_embedder.embedder.0"),
    ("decoder.input_proj", "dec_net.input_proj"),
    ("decoder.upsample", "dec_net.cond_embed"),
    ("decoder.blocks.#.norm", "dec_net.res_blocks.#.in_ln"),
    ("decoder.blocks.#.modulation", "dec_net.res_blocks.#.adaLN_modulation.1"),
    ("decoder.blocks.#.mlp.#", "dec_net.res_blocks.#.mlp.#"),
    ("decoder.output", "dec_net.final_layer.linear"),
)

_Rule = tuple[re.Pattern[str], str]


def _rule(source: str, target: str) -> _Rule:
    pattern = re.escape(source).replace(r"\#", r"(\d+)").replace(r"\*", r"(\w+)")
    pieces = re.split(r"[#*]", target)
    replacement = pieces[0] + "".join(
        rf"\g<{group}>{piece}" for group, piece in enumerate(pieces[1:], start=1)
    )
    leaf_group = len(pieces)
    return re.compile(pattern + r"\.(weight|bias)"), rf"{replacement}.\g<{leaf_group}>"


# The last is the one parameter that is no weight or bias of a layer.
_TO_PUBLISHED = [
    *(_rule(ours, theirs) for ours, theirs in _LAYERS),
    (re.compile("text_position"), "y_pos_embedding"),
]
_FROM_PUBLISHED = [
    *(_rule(theirs, ours) for ours, theirs in _LAYERS),
    (re.compile("y_pos_embedding"), "text_position"),
]


def _translate(name: str, rules: Iterable[_Rule]) -> str | None:
    for pattern, replacement in rules:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    return None


def from_published(name: str) -> str | None:
    """Our name of a published tensor (without its prefix), None if DeCo has no such tensor."""
    return _translate(name, _FROM_PUBLISHED)


def to_published(name: str) -> str:
    """The published name, without a prefix, of one of our tensors.

    Raises:
        ValueError: it is not a tensor of DeCo.
    """
    translated = _translate(name, _TO_PUBLISHED)
    if translated is None:
        raise ValueError(f"{name} is not a tensor of DeCo")
    return translated


def has_layout(config: NetworkConfig) -> bool:
    """Whether networks of this configuration have a published layout that is known here."""
    is_deco = isinstance(config, DeCoConfig) and config.is_published
    return is_deco or isinstance(config, DeCoT2IConfig)


def other_network(names: Iterable[str]) -> str | None:
    """Which other published network these tensors (names without prefix) are of, if any."""
    names = list(names)
    if any(".param_generator1." in name for name in names):
        return "a PixNerd model"
    if "x_embedder.proj.weight" in names:
        return "a baseline DiT (FlattenDiT)"
    return None


# Of which number of dimensions each must be.
_ARCHITECTURE_TENSORS = {
    "patch_embedder.weight": 2,
    "blocks.0.attention.q_norm.weight": 1,
    "decoder.blocks.0.norm.weight": 1,
    "decoder.output.weight": 2,
}
_CLASS_TENSORS = _ARCHITECTURE_TENSORS | {"class_embedder.weight": 2}
_TEXT_TENSORS = _ARCHITECTURE_TENSORS | {
    "text_embedder.proj.weight": 2,
    "text_position": 3,
    "text_blocks.0.norm1.weight": 1,
}


def _architecture_tensors(names: Iterable[str]) -> dict[str, int]:
    return _TEXT_TENSORS if any(name.startswith("text_") for name in names) else _CLASS_TENSORS


def missing_for_inference(names: Iterable[str]) -> list[str]:
    """The tensors (our names) without which `infer_config` cannot work."""
    present = set(names)
    return [name for name in _architecture_tensors(present) if name not in present]


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> NetworkConfig:
    """The architecture that tensors of these shapes (our names) belong to.

    Only `class_embedding_std`, which matters at initialisation alone, cannot be seen.

    Raises:
        ValueError: no DeCo network has such tensors.
    """
    tensors = _architecture_tensors(shapes)
    for name, dimensions in tensors.items():
        if len(shapes[name]) != dimensions or 0 in shapes[name]:
            raise ValueError(f"{name} has the shape {shapes[name]}, which no DeCo network has")
    hidden_size, patch_channels = shapes["patch_embedder.weight"]
    in_channels, decoder_hidden_size = shapes["decoder.output.weight"]
    (head_dim,) = shapes["blocks.0.attention.q_norm.weight"]
    patch_size = isqrt(patch_channels // in_channels)
    if in_channels * patch_size**2 != patch_channels:
        raise ValueError(
            f"a patch of {patch_channels} values is no square of {in_channels}-channel pixels"
        )
    if hidden_size % head_dim:
        raise ValueError(f"heads of {head_dim} channels do not divide a width of {hidden_size}")
    common: dict[str, Any] = {
        "hidden_size": hidden_size,
        "depth": _count(shapes, "blocks."),
        "num_heads": hidden_size // head_dim,
        "patch_size": patch_size,
        "decoder_hidden_size": decoder_hidden_size,
        "decoder_depth": _count(shapes, "decoder.blocks."),
        "in_channels": in_channels,
    }
    if tensors is _CLASS_TENSORS:
        return DeCoConfig(**common, num_classes=shapes["class_embedder.weight"][0] - 1)
    return DeCoT2IConfig(
        **common,
        text_depth=_count(shapes, "text_blocks."),
        text_size=shapes["text_embedder.proj.weight"][1],
        text_length=shapes["text_position"][1],
    )


def _count(names: Iterable[str], prefix: str) -> int:
    # The distinct indices, not the highest one: a stray "blocks.999999999" must not make us
    # build that many blocks.
    return len({name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)})
