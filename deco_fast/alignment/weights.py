"""DINOv2 from a file, as the original's hub has it or as Hugging Face's."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from deco_fast.checkpoint.find import locate
from deco_fast.checkpoint.format import weights_file
from deco_fast.errors import UserError
from deco_fast.quiet import quiet_transformers

_SOURCE = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{0}14/dinov2_vit{0}14_pretrain.pth"

_HEAD_DIM = 64  # in every DINOv2; tensors do not tell it

# The original's name of a layer, Hugging Face's; "#" is the number of a block.
_LAYERS = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "blocks.#.norm1": "encoder.layer.#.norm1",
    "blocks.#.norm2": "encoder.layer.#.norm2",
    "blocks.#.attn.proj": "encoder.layer.#.attention.output.dense",
    "blocks.#.mlp.fc1": "encoder.layer.#.mlp.fc1",
    "blocks.#.mlp.fc2": "encoder.layer.#.mlp.fc2",
}
_TENSORS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "blocks.#.ls1.gamma": "encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.ls2.gamma": "encoder.layer.#.layer_scale2.lambda1",
} | {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in _LAYERS.items() for leaf in ("weight", "bias")}
_QKV = "blocks.#.attn.qkv"
_HEADS = "encoder.layer.#.attention.attention"


def load_dinov2(
    path: str | Path,
    purpose: str = "REPA",
    option: str = "--repa",
    instead: str = "train without REPA by --repa off",
    size: str = "b",
) -> Dinov2Model:
    """DINOv2 of any size without registers, on the CPU in float32.

    Args:
        path: the original's `dinov2_vitb14_pretrain.pth`, Hugging Face's `model.safetensors` (or
            the folder with it), or "hf:owner/repository/file".
        purpose, option, instead, size: for messages: what needs the network, the option that names
            its file, what can be done without it, and which size is meant, "b" or "l".

    Raises:
        UserError: the file is missing, damaged, has code in it, or is of another network.
    """
    try:
        return _load(locate(path))
    except UserError as error:
        raise UserError(
            f"{purpose} needs DINOv2: {error}; give {_SOURCE.format(size)} by {option} FILE, or "
            f"{instead}"
        ) from error


def _load(file: Path) -> Dinov2Model:
    if file.is_dir():
        file /= weights_file("model")
    tensors = _read(file)
    if "pos_embed" in tensors:
        tensors = dict(_from_original(tensors))
    config = _config(tensors, file)
    with quiet_transformers():
        loaded: Any = Dinov2Model.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True
        )
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise _not_dinov2(file, f"{len(wrong)} tensors are missing, unknown or of another shape")
    return cast(Dinov2Model, model.float())


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} is damaged, or holds more than tensors") from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise _not_dinov2(file, "it holds more than named tensors")
    return content


def _from_original(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        parts = name.split(".")
        index = parts[1] if parts[0] == "blocks" else ""
        general = ".".join(("blocks", "#", *parts[2:])) if index else name
        layer, _, leaf = general.rpartition(".")
        if layer == _QKV:
            for kind, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                yield f"{_HEADS}.{kind}.{leaf}".replace("#", index), part
        else:
            yield _TENSORS.get(general, name).replace("#", index), tensor


def _config(tensors: Mapping[str, Tensor], file: Path) -> Dinov2Config:
    try:
        patches = tensors["embeddings.patch_embeddings.projection.weight"]
        positions = tensors["embeddings.position_embeddings"]
        inner = tensors["encoder.layer.0.mlp.fc1.weight"]
    except KeyError as error:
        raise _not_dinov2(file, f"no {error.args[0]}") from error
    hidden_size, patch_size = patches.shape[0], patches.shape[-1]
    prefix = "encoder.layer."
    return Dinov2Config(
        hidden_size=hidden_size,
        num_hidden_layers=len({name.split(".")[2] for name in tensors if name.startswith(prefix)}),
        num_attention_heads=hidden_size // _HEAD_DIM,
        mlp_ratio=inner.shape[0] // hidden_size,
        patch_size=patch_size,
        image_size=math.isqrt(positions.shape[1] - 1) * patch_size,
    )


def _not_dinov2(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is not a DINOv2 without registers ({reason})")
