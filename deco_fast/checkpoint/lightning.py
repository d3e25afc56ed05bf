"""Opening a published checkpoint, a file of PyTorch Lightning (.ckpt)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deco_fast.checkpoint.format import TRAINING_FILE, WEIGHTS, Header
from deco_fast.checkpoint.source import Source, choose_weights, listed
from deco_fast.errors import UserError
from deco_fast.interop import published
from deco_fast.interop.unpickle import TensorRecord, TorchFile
from deco_fast.models.card import ModelCard
from deco_fast.models.config import DeCoT2IConfig, NetworkConfig
from deco_fast.models.presets import PRESETS

PUBLISHED_METADATA = "deco_fast"
"""Entry of a file in the published layout in which we keep our config and card."""


def open_published(path: Path, weights: str | None) -> Source:
    """Open a file of torch.save that has the published layout.

    Args:
        path: the file.
        weights: "ema", "model", or None for either, the average where there is one.

    Raises:
        UserError: it is damaged, of another network, or does not hold these weights.
    """
    file = TorchFile(path)
    content = file.content if isinstance(file.content, dict) else {}
    state = content.get("state_dict")
    tensors = {
        name: tensor
        for name, tensor in (state if isinstance(state, dict) else {}).items()
        if isinstance(name, str) and isinstance(tensor, TensorRecord)
    }
    held = [
        name for name in WEIGHTS if any(key.startswith(published.PREFIXES[name]) for key in tensors)
    ]
    if not held:
        hint = "its checkpoint's folder" if path.name == TRAINING_FILE else "a published .ckpt"
        raise UserError(f"{path} holds no weights of DeCo (no denoiser.*): name {hint}")
    weights = choose_weights(weights, held, path)
    prefix = published.PREFIXES[weights]
    records = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    layout = published.layout_of(records)
    ours = {name: layout.from_published(name) for name in records}
    by_name = {our: records[name] for name, our in ours.items() if our is not None}
    shapes = {name: record.shape for name, record in by_name.items()}

    def name_in_file(name: str) -> str:
        return prefix + layout.to_published(name)

    metadata = content.get(PUBLISHED_METADATA)
    if isinstance(metadata, dict):
        config, card = _stored(metadata, path)
    else:
        config = _infer_config(path, shapes, name_in_file)
        card = _assumed_card(path, content, config)
    return Source(
        path=path,
        weights=weights,
        config=config,
        card=card,
        shapes=shapes,
        extra=tuple(prefix + name for name, our in ours.items() if our is None),
        left_out=_left_out(state, content),
        is_published=True,
        tensor=lambda name: file.read(by_name[name]),
        name_in_file=name_in_file,
        projector=lambda: {
            name.removeprefix(published.PROJECTOR_PREFIX): file.read(tensor)
            for name, tensor in tensors.items()
            if name.startswith(published.PROJECTOR_PREFIX)
        },
    )


def _left_out(state: Any, content: Mapping[str, Any]) -> tuple[str, ...]:
    """What a published file holds beside the weights of its networks."""
    known = (*published.PREFIXES.values(), published.PROJECTOR_PREFIX)
    unknown = [str(name) for name in state if not str(name).startswith(known)]
    carried = ("state_dict", "global_step", "pytorch-lightning_version", PUBLISHED_METADATA)
    entries = [str(key) for key in content if key not in carried]
    descriptions = (
        (unknown, f"other tensors ({listed(unknown)})"),
        (entries, f"the entries {', '.join(entries)}"),
    )
    return tuple(description for names, description in descriptions if names)


def _stored(metadata: Mapping[str, Any], path: Path) -> tuple[NetworkConfig, ModelCard]:
    header = Header.from_metadata({key: str(value) for key, value in metadata.items()}, path)
    return header.config, header.card


def _infer_config(
    path: Path, shapes: Mapping[str, tuple[int, ...]], name_in_file: Callable[[str], str]
) -> NetworkConfig:
    missing = published.missing_for_inference(shapes)
    if missing:
        names = [name_in_file(name) for name in missing]
        raise UserError(
            f"{path} does not have the tensors of a DeCo: {len(names)} missing ({listed(names)}); "
            "name an unchanged checkpoint of DeCo"
        )
    try:
        return published.infer_config(shapes)
    except ValueError as error:
        raise UserError(
            f"{path} does not have the tensors of a DeCo: {error}; "
            "name an unchanged checkpoint of DeCo"
        ) from error


def _assumed_card(path: Path, content: Mapping[str, Any], config: NetworkConfig) -> ModelCard:
    """What a published file does not say, as published: for ImageNet at 256×256, or text at 512."""
    card = PRESETS["deco-t2i" if isinstance(config, DeCoT2IConfig) else "deco-xl"].card
    sampling = card.sampling
    low, high = sampling.guidance_interval
    end = ")" if sampling.solver == "adams" else "]"
    shift = f", time shift {sampling.time_shift:g}" if sampling.time_shift != 1 else ""
    step = content.get("global_step")
    return replace(
        card,
        name=path.stem,
        step=step if type(step) is int else None,
        assumed=(
            f"images of {card.height}×{card.width} pixels",
            f"the network predicts {card.prediction}",
            f"guidance scale {sampling.guidance_scale:g} for times in ({low:g}, {high:g}{end}",
            f"{sampling.steps} steps of the solver {sampling.solver}{shift}",
        ),
    )
