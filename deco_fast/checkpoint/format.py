"""What our checkpoints consist of, and the metadata in them that tensors cannot tell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from deco_fast.checkpoint.checksums import CHECKSUMS_FILE
from deco_fast.errors import UserError
from deco_fast.models.card import ModelCard
from deco_fast.models.config import NetworkConfig, config_from_json

FORMAT = "deco_fast"
FORMAT_VERSION = 1

WEIGHTS = ("model", "ema")
"""The two kinds of weights: as the optimizer left them, and their moving average."""

TRAINING_FILE = "training.pt"

OPTIMIZER_FOLDER = "optimizer"
"""Its state where several processes share it (FSDP2), as they wrote it, in safetensors."""


def weights_file(weights: str) -> str:
    """The file of a checkpoint folder that holds these weights."""
    return f"{weights}.safetensors"


PROJECTOR_FILE = "projector.safetensors"

BESIDE_SCHEME = "beside:"
"""Of a card's text encoder: it lies in this folder beside the weights file, wherever that is."""

FOLDER_FILES = (
    *map(weights_file, WEIGHTS),
    PROJECTOR_FILE,
    TRAINING_FILE,
    OPTIMIZER_FOLDER,
    CHECKSUMS_FILE,
)
"""Everything that a checkpoint folder can hold."""


@dataclass(frozen=True)
class Header:
    """The metadata of a weights file.

    Attributes:
        weights: "model" or "ema".
        config: the network's shape.
        card: what the tensors cannot tell.
        files: the files of the checkpoint folder that this one belongs to; empty for a lone file.
    """

    weights: str
    config: NetworkConfig
    card: ModelCard
    files: tuple[str, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """For safetensors, whose metadata are strings."""
        return {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "weights": self.weights,
            "config": json.dumps(self.config.to_json()),
            "card": json.dumps(self.card.to_json()),
            "files": json.dumps(self.files),
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> Header:
        """The inverse of `to_metadata`; `path` is for messages.

        Raises:
            UserError: the metadata are not ours, of a later version, or damaged.
        """
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{path} is a safetensors file of another program (no '{FORMAT}' in its "
                "metadata): name one that deco_fast wrote, or a published .ckpt"
            )
        version = metadata.get("format_version", "")
        if version != str(FORMAT_VERSION):
            raise UserError(
                f"{path} has format version '{version}' and this is version {FORMAT_VERSION}: "
                "install a newer deco_fast"
            )
        try:
            return cls(
                weights=metadata["weights"],
                config=config_from_json(json.loads(metadata["config"])),
                card=ModelCard.from_json(json.loads(metadata["card"])),
                files=tuple(json.loads(metadata["files"])),
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} has damaged metadata ({error}): save or convert it again"
            ) from error
