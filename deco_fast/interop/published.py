"""The published layout: what it calls our tensors, and how its networks are told apart.

Specification B.9 and B.14; names and shapes as in the published LightningModule's state dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import Any

from deco_fast.models.config import (
    DeCoConfig,
    DeCoT2IConfig,
    NetworkConfig,
    PixelDiTConfig,
    PixNerdConfig,
)

PREFIXES = {"model": "denoiser.", "ema": "ema_denoiser."}
"""Where a published file keeps the raw and the averaged weights."""

PROJECTOR_PREFIX = "diffusion_trainer.proj.0."
"""Where it keeps the projector of representation alignment (REPA)."""

# Ours, theirs; "#" is an index and "*" a name, the same on both sides. Each layer has a weight,
# and most have a bias.
_DIT = (
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
)
_DECO = (
    *_DIT,
    ("patch_embedder", "s_embedder.proj"),
    ("decoder.pixel_embedder", "x_embedder.embedder.0"),
    ("decoder.input_proj", "dec_net.input_proj"),
    ("decoder.upsample", "dec_net.cond_embed"),
    ("decoder.blocks.#.norm", "dec_net.res_blocks.#.in_ln"),
    ("decoder.blocks.#.modulation", "dec_net.res_blocks.#.adaLN_modulation.1"),
    ("decoder.blocks.#.mlp.#", "dec_net.res_blocks.#.mlp.#"),
    ("decoder.output", "dec_net.final_layer.linear"),
)
_PIXEL_DIT = (
    *_DIT,
    ("patch_embedder", "x_embedder.proj"),
    ("modulation", "final_layer.adaLN_modulation.0"),
    ("decoder.output", "final_layer.linear"),
)
# Its NerfBlocks are numbered on from the DiT's, which no rule of this kind can say: see `Layout`.
_PIXNERD = (
    ("decoder.blocks.#.param_generator", "blocks.#.param_generator1.0"),
    ("decoder.blocks.#.norm", "blocks.#.norm"),
    *_DIT,
    ("patch_embedder", "s_embedder.proj"),
    ("decoder.pixel_embedder", "x_embedder.embedder.0"),
    ("decoder.norm", "final_layer.norm"),
    ("decoder.output", "final_layer.linear"),
)
_LAYERS = {"deco": _DECO, "pixel-dit": _PIXEL_DIT, "pixnerd": _PIXNERD}

_Rule = tuple[re.Pattern[str], str]


@cache
def _rule(source: str, target: str) -> _Rule:
    pattern = re.escape(source).replace(r"\#", r"(\d+)").replace(r"\*", r"(\w+)")
    pieces = re.split(r"[#*]", target)
    replacement = pieces[0] + "".join(
        rf"\g<{group}>{piece}" for group, piece in enumerate(pieces[1:], start=1)
    )
    leaf_group = len(pieces)
    return re.compile(pattern + r"\.(weight|bias)"), rf"{replacement}.\g<{leaf_group}>"


@dataclass(frozen=True)
class Layout:
    """The published names of one kind of network.

    Attributes:
        network: "deco" (the class and the text model), "pixel-dit" or "pixnerd".
        depth: DiT blocks of a PixNerd.
    """

    network: str = "deco"
    depth: int = 0

    def from_published(self, name: str) -> str | None:
        """Our name of a published tensor (without its prefix), None if there is no such tensor."""
        if self.network == "deco" and name == "y_pos_embedding":
            return "text_position"
        ours = _translate(name, [_rule(theirs, ours) for ours, theirs in _LAYERS[self.network]])
        return ours if ours is None else self._renumber(ours, -self.depth)

    def to_published(self, name: str) -> str:
        """The published name, without a prefix, of one of our tensors.

        Raises:
            ValueError: the network has no such tensor.
        """
        if self.network == "deco" and name == "text_position":
            return "y_pos_embedding"
        theirs = _translate(
            self._renumber(name, self.depth), [_rule(*pair) for pair in _LAYERS[self.network]]
        )
        if theirs is None:
            raise ValueError(f"{name} is not a tensor of a published {self.network}")
        return theirs

    def _renumber(self, ours: str, shift: int) -> str:
        if self.network != "pixnerd":
            return ours
        return re.sub(
            r"(?<=^decoder\.blocks\.)\d+", lambda match: str(int(match.group()) + shift), ours
        )


def _translate(name: str, rules: Iterable[_Rule]) -> str | None:
    for pattern, replacement in rules:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    return None


def layout_of(names: Iterable[str]) -> Layout:
    """The layout of a file with these published names (without prefix); DeCo's in doubt."""
    names = list(names)
    if any(".param_generator1." in name for name in names):
        blocks = {name.split(".")[1] for name in names if ".attn." in name}
        return Layout("pixnerd", len(blocks))
    return Layout("pixel-dit" if "x_embedder.proj.weight" in names else "deco")


def layout_for(config: NetworkConfig) -> Layout | None:
    """The layout of networks of this configuration; None where nothing of them is published."""
    match config:
        case DeCoConfig() if config.is_published:
            return Layout()
        case DeCoT2IConfig():
            return Layout()
        case PixelDiTConfig():
            return Layout("pixel-dit")
        case PixNerdConfig():
            return Layout("pixnerd", config.depth)
    return None


# Of which number of dimensions each must be.
_DIT_TENSORS = {
    "patch_embedder.weight": 2,
    "blocks.0.attention.q_norm.weight": 1,
    "decoder.output.weight": 2,
}
_TENSORS = {
    "deco": _DIT_TENSORS | {"decoder.blocks.0.norm.weight": 1, "class_embedder.weight": 2},
    "deco-t2i": _DIT_TENSORS
    | {
        "decoder.blocks.0.norm.weight": 1,
        "text_embedder.proj.weight": 2,
        "text_position": 3,
        "text_blocks.0.norm1.weight": 1,
    },
    "pixel-dit": _DIT_TENSORS | {"class_embedder.weight": 2},
    "pixnerd": _DIT_TENSORS
    | {"decoder.blocks.0.param_generator.weight": 2, "class_embedder.weight": 2},
}


def _network_of(names: Iterable[str]) -> str:
    """Which network has tensors of these names (ours)."""
    names = list(names)
    if any(name.startswith("text_") for name in names):
        return "deco-t2i"
    if "modulation.weight" in names:
        return "pixel-dit"
    return "pixnerd" if any(".param_generator." in name for name in names) else "deco"


def missing_for_inference(names: Iterable[str]) -> list[str]:
    """The tensors (our names) without which `infer_config` cannot work."""
    present = set(names)
    return [name for name in _TENSORS[_network_of(present)] if name not in present]


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> NetworkConfig:
    """The architecture that tensors of these shapes (our names) belong to.

    What cannot be seen: `class_embedding_std`, which matters at initialisation alone, and whether a
    pixel DiT predicts the velocity, as is assumed, or the image.

    Raises:
        ValueError: no network that is known here has such tensors.
    """
    network = _network_of(shapes)
    for name, dimensions in _TENSORS[network].items():
        if len(shapes[name]) != dimensions or 0 in shapes[name]:
            raise ValueError(f"{name} has the shape {shapes[name]}, which no DeCo network has")
    hidden_size, patch_values = shapes["patch_embedder.weight"]
    outputs, decoder_hidden_size = shapes["decoder.output.weight"]
    (head_dim,) = shapes["blocks.0.attention.q_norm.weight"]
    # A pixel DiT's output is a patch, and its images are taken to be RGB.
    in_channels = 3 if network == "pixel-dit" else outputs
    patch_size = isqrt(patch_values // in_channels)
    if in_channels * patch_size**2 != patch_values:
        raise ValueError(
            f"a patch of {patch_values} values is no square of {in_channels}-channel pixels"
        )
    if hidden_size % head_dim:
        raise ValueError(f"heads of {head_dim} channels do not divide a width of {hidden_size}")
    common: dict[str, Any] = {
        "hidden_size": hidden_size,
        "depth": _count(shapes, "blocks."),
        "num_heads": hidden_size // head_dim,
        "patch_size": patch_size,
        "in_channels": in_channels,
    }
    decoder: dict[str, Any] = {
        "decoder_hidden_size": decoder_hidden_size,
        "decoder_depth": _count(shapes, "decoder.blocks."),
    }
    if network == "deco-t2i":
        return DeCoT2IConfig(
            **common,
            **decoder,
            text_depth=_count(shapes, "text_blocks."),
            text_size=shapes["text_embedder.proj.weight"][1],
            text_length=shapes["text_position"][1],
        )
    common["num_classes"] = shapes["class_embedder.weight"][0] - 1
    if network == "pixel-dit":
        return PixelDiTConfig(**common)
    if network == "deco":
        return DeCoConfig(**common, **decoder)
    generated = shapes["decoder.blocks.0.param_generator.weight"][0]
    ratio, rest = divmod(generated, 2 * decoder_hidden_size**2)
    if rest or not ratio:
        raise ValueError(
            f"{generated} generated weights are no MLP of {decoder_hidden_size} channels"
        )
    return PixNerdConfig(**common, **decoder, nerf_mlp_ratio=ratio)


def _count(names: Iterable[str], prefix: str) -> int:
    # The distinct indices, not the highest one: a stray "blocks.999999999" must not make us
    # build that many blocks.
    return len({name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)})
