"""Reading checkpoints, ours and the published ones, without running anything in them."""

from __future__ import annotations

import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from deco_fast.checkpoint.checksums import check_undamaged
from deco_fast.checkpoint.find import locate
from deco_fast.checkpoint.format import TRAINING_FILE, WEIGHTS
from deco_fast.checkpoint.sniff import open_source
from deco_fast.checkpoint.source import Source
from deco_fast.errors import UserError, nearest
from deco_fast.models.card import ModelCard
from deco_fast.models.config import DeCoT2IConfig, NetworkConfig, PixelDiTConfig
from deco_fast.models.network import DeCoNetwork
from deco_fast.models.presets import PRESETS
from deco_fast.models.presets import preset as named_preset


def load_checkpoint(
    path: str | Path,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    preset: str | None = None,
) -> DeCoNetwork:
    """A model from a checkpoint, ready to sample from.

    The file is memory-mapped: on the CPU and in the file's dtype the parameters are views of it
    (changing them does not change the file); otherwise one tensor at a time is converted.

    Args:
        path: a checkpoint folder, a run folder (its newest checkpoint), a .safetensors file, a
            published Lightning .ckpt, "hf:owner/repository/file" on the Hugging Face hub, or
            "deco-digits", which ships with the package.
        weights: "ema" for the moving average, which images are drawn with, or "model".
        device: where the parameters shall be.
        dtype: their floating-point type.
        preset: a name in `PRESETS`: its image size and sampling settings instead of the file's.

    Returns:
        The model in eval mode. Its `card` says what tensors cannot tell; `card.assumed` lists
        what nobody said: a published file without a preset counts as one for 256×256 with the
        published guidance.

    Raises:
        UserError: there is no such file, it is damaged or of something else, it has code in it,
            lacks these weights, or is not of the preset's architecture.
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(
            f"weights cannot be {dtype}: choose torch.float32, torch.bfloat16 or torch.float16"
        )
    target = _usable(device)
    source = open_checkpoint(path, weights, preset)
    check_undamaged(source.path)
    model = source.empty_model()
    state = {name: source.read(name).to(device=target, dtype=dtype) for name in model.state_dict()}
    # The tensors become the parameters; nothing is copied into memory that was made for them.
    model.load_state_dict(state, assign=True)
    return model.eval()


def open_checkpoint(
    path: str | Path, weights: str | None = None, preset: str | None = None
) -> Source:
    """What `load_checkpoint` makes a model of, opened and not yet read.

    Raises:
        UserError: as `load_checkpoint`, apart from missing tensors.
    """
    if weights is not None and weights not in WEIGHTS:
        raise UserError(f"unknown weights '{weights}'{nearest(weights, WEIGHTS)}")
    chosen = None if preset is None else named_preset(preset)
    source = open_source(locate(path), weights)
    if chosen is None:
        return source
    own, other = source.config, chosen.config
    if (
        isinstance(own, PixelDiTConfig)
        and isinstance(other, PixelDiTConfig)
        and source.card.assumed
    ):
        # Tensors alone do not tell JiT from the baseline.
        source = replace(source, config=replace(own, prediction=other.prediction))
    suitable = [
        name for name, one in PRESETS.items() if not _differences(source.config, one.config)
    ]
    remedy = f"use --preset {' or '.join(suitable)}" if suitable else "leave --preset out"
    check_architecture(source.path, source.config, chosen.config, f"preset {preset}", remedy)
    return replace(source, card=replace(chosen.card, step=source.card.step))


def load_weights(path: str | Path, model: DeCoNetwork, weights: str | None = None) -> None:
    """Overwrite the parameters of an existing model, where it is and in its dtype.

    Args:
        path: as for `load_checkpoint`.
        model: of the same architecture.
        weights: "ema", "model", or None for the average where there is one.

    Raises:
        UserError: as `load_checkpoint`, or the architecture is another.
    """
    source = open_checkpoint(path, weights)
    check_architecture(source.path, source.config, model.config, "the model to load it into")
    source.empty_model()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            parameter.copy_(source.read(name))


def read_config(path: str | Path) -> NetworkConfig:
    """The architecture of a checkpoint.

    Raises:
        UserError: as `load_checkpoint`.
    """
    return open_checkpoint(path).config


def read_card(path: str | Path) -> ModelCard:
    """What a checkpoint's tensors cannot tell; `assumed` lists what the file does not say.

    Raises:
        UserError: as `load_checkpoint`.
    """
    return open_checkpoint(path).card


def load_training_state(folder: str | Path) -> dict[str, Any]:
    """The `training` of `save_checkpoint`, its tensors on the CPU.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = locate(folder) / TRAINING_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} has no {TRAINING_FILE}: it can be sampled from but not be trained further"
        )
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{file} is truncated or damaged: delete {file.parent} to go on from an older one"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{file} holds no training state: delete {file.parent}")
    return state


def _usable(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"there is no device '{device}' here: use cpu") from error
    return target


def _differences(one: NetworkConfig, other: NetworkConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two networks have different tensors."""
    fields, others = asdict(one), asdict(other)
    return {
        name: (fields.get(name), others.get(name))
        for name in {**fields, **others}
        if fields.get(name) != others.get(name) and name != "class_embedding_std"
    }


def check_architecture(
    path: Path,
    config: NetworkConfig,
    expected: NetworkConfig,
    what: str,
    remedy: str = "name another checkpoint",
) -> None:
    """See that a checkpoint is of an architecture.

    Args:
        path: of the checkpoint.
        config: the checkpoint's.
        expected: the other one.
        what: has the other one.
        remedy: the end of the message.

    Raises:
        UserError: it is not; what differs is named.
    """
    differences = _differences(config, expected)
    if isinstance(config, DeCoT2IConfig) != isinstance(expected, DeCoT2IConfig):
        condition = "text" if isinstance(config, DeCoT2IConfig) else "class labels"
        raise UserError(f"{path} draws from {condition}, unlike {what}: {remedy}")
    if differences:
        listed = ", ".join(f"{name} {a} and not {b}" for name, (a, b) in differences.items())
        raise UserError(f"{path} is not of the architecture of {what} ({listed}): {remedy}")
