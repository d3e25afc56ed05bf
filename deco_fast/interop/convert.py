"""From the published layout to ours and back."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.checkpoint.find import check_outside
from deco_fast.checkpoint.format import WEIGHTS, Header
from deco_fast.checkpoint.lightning import PUBLISHED_METADATA
from deco_fast.checkpoint.load import open_checkpoint
from deco_fast.checkpoint.save import save_checkpoint, save_weights, write_torch
from deco_fast.checkpoint.source import MissingWeightsError, Source
from deco_fast.errors import UserError
from deco_fast.interop import published
from deco_fast.interop.progress import written_bytes_bar
from deco_fast.models.config import (
    DeCoConfig,
    DeCoT2IConfig,
    NetworkConfig,
    PixelDiTConfig,
    PixNerdConfig,
)

_LIGHTNING_VERSION = "2.5.0"
"""Lightning refuses a file that does not name the version it was written with."""


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    weights: str = "ema",
    preset: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write a checkpoint in another layout.

    Args:
        source: anything that `load_checkpoint` opens.
        destination: a name ending in .ckpt for the published layout, in .safetensors for one
            network in one file of ours, any other for a checkpoint folder of ours.
        weights: which network goes into a .safetensors file.
        preset: as for `load_checkpoint`, to say what a published file does not.
        force: replace what is at `destination`.
        progress: show a bar while the file is written.

    Returns:
        Sentences on what was assumed and what the new layout does not carry.

    Raises:
        UserError: the source cannot be read, the destination exists or cannot be written, or
            both have the same layout. Nothing is left half-written.
    """
    destination = Path(destination)
    if destination.suffix in (".pt", ".pth", ".bin", ".pkl"):
        raise UserError(
            f"{destination} names no layout: end it in .ckpt (published) or .safetensors, "
            "or name a folder"
        )
    to_one_file = destination.suffix == ".safetensors"
    networks = _open_all(source, preset, (weights,) if to_one_file else WEIGHTS)
    first = networks[0]
    if first.is_published == (destination.suffix == ".ckpt") and not to_one_file:
        layout = "published" if first.is_published else "deco_fast's own"
        raise UserError(f"{source} and {destination} are both in {layout} layout: copy it instead")
    if destination.suffix == ".ckpt" and published.layout_for(first.config) is None:
        raise UserError(
            f"{source} is a network of which nothing is published ({first.config.kind}), so it has "
            "no published layout: name a folder or a .safetensors file"
        )
    check_outside(destination)
    if destination.exists() and not force:
        raise UserError(f"{destination} exists: choose another name, or replace it with --force")
    tensors = {network.weights: network.state_dict() for network in networks}
    size = sum(tensor.nbytes for state in tensors.values() for tensor in state.values())
    bar = written_bytes_bar(destination.parent, size, f"writing {destination.name}")
    with bar if progress else nullcontext():
        if to_one_file:
            state = tensors[weights]
            save_weights(destination, state, first.card, weights=weights, config=first.config)
        elif destination.suffix == ".ckpt":
            _write_published(destination, first, tensors)
        else:
            save_checkpoint(
                destination,
                model=tensors.get("model"),
                ema=tensors.get("ema"),
                projector=first.projector(),
                card=first.card,
                config=first.config,
            )
    return _notes(source, destination, networks)


def _open_all(source: str | Path, preset: str | None, wanted: tuple[str, ...]) -> list[Source]:
    networks = []
    for weights in wanted:
        try:
            networks.append(open_checkpoint(source, weights, preset))
        except MissingWeightsError:
            if len(wanted) == 1:
                raise
    return networks


def _write_published(path: Path, source: Source, networks: dict[str, dict[str, Tensor]]) -> None:
    layout = published.layout_for(source.config)
    assert layout is not None, "refused above"
    state = {
        published.PREFIXES[weights] + layout.to_published(name): tensor
        for weights, tensors in networks.items()
        for name, tensor in tensors.items()
    } | {published.PROJECTOR_PREFIX + name: tensor for name, tensor in source.projector().items()}
    content = {
        "epoch": 0,
        "global_step": source.card.step or 0,
        "pytorch-lightning_version": _LIGHTNING_VERSION,
        "state_dict": state,
        PUBLISHED_METADATA: Header(source.weights, source.config, source.card).to_metadata(),
    }
    with atomic_file(path) as temporary:
        write_torch(temporary, content)


def _notes(source: str | Path, destination: Path, networks: list[Source]) -> list[str]:
    first = networks[0]
    notes = [f"assumed: {fact}" for fact in first.card.assumed]
    notes += [f"not carried: {part}" for part in first.left_out]
    if destination.suffix == ".safetensors" and first.projector():
        notes.append("not carried: the projector of representation alignment")
    absent = [name for name in WEIGHTS if name not in {network.weights for network in networks}]
    notes += [f"not in {destination}: the '{name}' weights" for name in absent]
    if destination.suffix == ".ckpt":
        notes += [
            f"only deco_fast reads the entry '{PUBLISHED_METADATA}': image size, sampling settings",
            f"the original's configuration file must say: {_published_arguments(first.config)}",
        ]
    else:
        notes.append("a training cannot go on from it: there is no optimizer state of ours")
    return notes


def _published_arguments(config: NetworkConfig) -> str:
    """The constructor arguments of the published network, in the order of its configurations."""
    arguments = {
        "in_channels": config.in_channels,
        "patch_size": config.patch_size,
        "num_groups": config.num_heads,
        "hidden_size": config.hidden_size,
    }
    if isinstance(config, PixelDiTConfig):
        arguments |= {"num_blocks": config.depth, "num_classes": config.num_classes}
    if isinstance(config, DeCoConfig | PixNerdConfig):
        arguments |= {
            "hidden_size_x": config.decoder_hidden_size,
            "num_blocks": config.depth + config.decoder_depth,
            "num_cond_blocks": config.depth,
            "num_classes": config.num_classes,
        }
    if isinstance(config, PixNerdConfig):
        arguments |= {"nerf_mlpratio": config.nerf_mlp_ratio}
    if isinstance(config, DeCoT2IConfig):
        arguments |= {
            "txt_embed_dim": config.text_size,
            "txt_max_length": config.text_length,
            "num_text_blocks": config.text_depth,
            "decoder_hidden_size": config.decoder_hidden_size,
            "num_encoder_blocks": config.depth,
            "num_decoder_blocks": config.decoder_depth,
        }
    return json.dumps(arguments).replace('"', "").strip("{}")
