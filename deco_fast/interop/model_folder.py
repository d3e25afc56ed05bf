"""A folder to publish a model in: weights, their configuration, and a model card for people.

It is what the Hugging Face hub shows and what `DeCoPipeline` reads, and a checkpoint of ours: the
weights file says everything by itself, the others repeat it for those who do not open it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from deco_fast.checkpoint.atomic import atomic_folder
from deco_fast.checkpoint.find import HUB_SCHEME, check_outside
from deco_fast.checkpoint.format import BESIDE_SCHEME, WEIGHTS, Header, weights_file
from deco_fast.checkpoint.load import open_checkpoint
from deco_fast.checkpoint.save import save_weights
from deco_fast.checkpoint.source import open_safetensors, read_header
from deco_fast.errors import UserError
from deco_fast.interop.model_readme import model_readme
from deco_fast.models.build import empty_network
from deco_fast.models.card import ModelCard
from deco_fast.models.config import DeCoT2IConfig, NetworkConfig, config_from_json

CONFIG_FILE = "config.json"
PIPELINE_FILE = "model_index.json"
"""What diffusers knows a pipeline by."""

README_FILE = "README.md"
NEW_README_FILE = "README.new.md"
TEXT_ENCODER_FOLDER = "text_encoder"

_FILES = (
    CONFIG_FILE,
    PIPELINE_FILE,
    README_FILE,
    NEW_README_FILE,
    TEXT_ENCODER_FOLDER,
    *map(weights_file, WEIGHTS),
)

DATA_FILES = ("*.json", "*.safetensors", "*.txt", README_FILE)
"""Patterns of what such a folder consists of: nothing that could be run."""


_ENCODER_FILES = (
    *("config.json", "generation_config.json", "tokenizer*.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "model*.safetensors"),
    *("model.safetensors.index.json", "README.md", "LICENSE"),
)


def write_model_folder(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    card: ModelCard,
    config: NetworkConfig,
    weights: str = "ema",
) -> Path:
    """Write config.json, model_index.json, README.md and WEIGHTS.safetensors.

    A text encoder in a folder is copied into `text_encoder/`; one on the hub is named. A model
    folder that is already there is replaced, whole or not at all, but for a README.md that was
    edited: it stays, and the new one is README.new.md.

    Args:
        folder: where.
        tensors: the network's, in the dtype to publish them in.
        card: what the tensors cannot tell.
        config: the network's shape.
        weights: which weights these are, "ema" or "model".

    Returns:
        The folder.

    Raises:
        UserError: the folder cannot be written or holds other files, or the text encoder's folder
            is missing.
    """
    folder = Path(folder)
    beside = card.text_encoder is not None and not card.text_encoder.startswith(HUB_SCHEME)
    beside &= isinstance(config, DeCoT2IConfig)
    with atomic_folder(folder, owned=_FILES) as temporary:
        if beside:
            assert card.text_encoder is not None
            _copy_text_encoder(Path(card.text_encoder), temporary / TEXT_ENCODER_FOLDER)
            card = replace(card, text_encoder=BESIDE_SCHEME + TEXT_ENCODER_FOLDER)
        save_weights(
            temporary / weights_file(weights), tensors, card, weights=weights, config=config
        )
        _write_json(temporary / CONFIG_FILE, _config(config, card))
        network = type(empty_network(config))
        names = [network.__module__, network.__name__]
        _write_json(
            temporary / PIPELINE_FILE, {"_class_name": "DeCoPipeline", "transformer": names}
        )
        readme = model_readme(Header(weights, config, card), tensors).encode()
        (temporary / README_FILE).write_bytes(readme)
        before = _read(folder / README_FILE)
        if before not in (None, readme, _unedited_readme(folder)):
            (temporary / README_FILE).rename(temporary / NEW_README_FILE)
            shutil.copyfile(folder / README_FILE, temporary / README_FILE)
    return folder


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _unedited_readme(folder: Path) -> bytes | None:
    """README.md as it was written with the weights in a model folder; None if they do not say."""
    for file in (folder / weights_file(weights) for weights in WEIGHTS):
        if file.exists():
            with suppress(UserError):
                tensors = open_safetensors(file, None).state_dict()
                return model_readme(read_header(file), tensors).encode()
    return None


def check_model_folder(folder: Path, weights: str) -> None:
    """See that config.json, where there is one, says what the weights file does.

    Raises:
        UserError: it does not, or is damaged or of a later version.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        card = ModelCard.from_json(fields.pop("card"))
        config = config_from_json(fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): export the model again") from error
    header = read_header(folder / weights_file(weights))
    # Not as text: an older version wrote fewer fields, and the others have their defaults.
    if (config, card) != (header.config, header.card):
        raise UserError(
            f"{path} says other things than {weights_file(weights)} beside it, which holds what "
            "counts: export the model again instead of editing it"
        )


def export(
    source: str | Path,
    folder: str | Path,
    *,
    weights: str = "ema",
    preset: str | None = None,
    force: bool = False,
) -> list[str]:
    """Write a checkpoint as a folder to publish.

    Args:
        source: anything that `load_checkpoint` opens.
        folder: where.
        weights: "ema" or "model".
        preset: as for `load_checkpoint`.
        force: replace a model folder that is there.

    Returns:
        Sentences on what was assumed and what the folder does not carry.

    Raises:
        UserError: the source cannot be read, or the folder exists or cannot be written.
    """
    opened = open_checkpoint(source, weights, preset)
    check_outside(Path(folder))
    if Path(folder).exists() and not force:
        raise UserError(f"{folder} exists: choose another name, or replace it with --force")
    write_model_folder(folder, opened.state_dict(), opened.card, opened.config, opened.weights)
    notes = [f"assumed: {fact}" for fact in opened.card.assumed]
    notes += [f"not carried: {part}" for part in opened.left_out]
    if opened.projector():
        notes.append("not carried: the projector of representation alignment")
    if Path(folder, NEW_README_FILE).exists():
        notes.append(f"{README_FILE} stays as it was: compare it with {NEW_README_FILE}")
    else:
        notes.append(f"{README_FILE} names no licence: add one before the folder is published")
    return notes


def _config(config: NetworkConfig, card: ModelCard) -> dict[str, Any]:
    return {**config.to_json(), "card": card.to_json()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_text_encoder(source: Path, destination: Path) -> None:
    if not source.is_dir():
        raise UserError(
            f"the text encoder {source} is no folder, so it cannot be published with the model: "
            "restore it"
        )
    # The checkpoint says where it is, and must not have anything else published.
    try:
        kind = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind != "qwen3":
        raise UserError(
            f"{source} holds no text encoder of type qwen3, so it cannot be published with the "
            "model: restore it"
        )
    files = {file for pattern in _ENCODER_FILES for file in source.glob(pattern) if file.is_file()}
    destination.mkdir()
    for file in sorted(files):
        shutil.copy2(file, destination)
