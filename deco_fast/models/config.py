"""The shapes of the DeCo networks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deco_fast.errors import UserError

Config = TypeVar("Config", bound="NetworkConfig")


@dataclass(frozen=True)
class NetworkConfig:
    """What the class and the text model have in common.

    Raises:
        ValueError: a field is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  pydantic reads it off the class

    hidden_size: int = field(metadata={"help": "width of the DiT, a multiple of 4 × num_heads"})
    depth: int = field(metadata={"help": "DiT blocks"})
    num_heads: int = field(metadata={"help": "attention heads"})
    patch_size: int = field(default=16, metadata={"help": "side of a patch in pixels"})
    decoder_hidden_size: int = field(default=32, metadata={"help": "channels of the pixel decoder"})
    decoder_depth: int = field(default=3, metadata={"help": "AdaLN-Zero blocks in the decoder"})
    in_channels: int = field(default=3, metadata={"help": "image channels"})

    def __post_init__(self) -> None:
        for part in dataclasses.fields(self):
            if part.type == "int" and getattr(self, part.name) < 1:
                raise ValueError(f"{part.name} must be at least 1, not {getattr(self, part.name)}")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 × num_heads "
                f"({self.num_heads}): rotary embedding turns the channels of a head in fours"
            )

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_size(self) -> int:
        """Inner width of the SwiGLU MLP (B.3)."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The fields as plain types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls: type[Config], fields: dict[str, Any]) -> Config:
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is unknown, missing or out of range.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a DeCo configuration: {error}") from error


@dataclass(frozen=True)
class DeCoConfig(NetworkConfig):
    """Everything that determines DeCo's parameters; what they cannot tell is in `ModelCard`.

    Labels are 0 … num_classes − 1, and num_classes itself is the null class.

    Raises:
        ValueError: a field is out of range.
    """

    num_classes: int = field(default=1000, metadata={"help": "classes, without the null class"})
    class_embedding_std: float = field(
        default=0.02, metadata={"help": "of the class embedding at initialisation"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_embedding_std < 0:
            raise ValueError("class_embedding_std must not be negative")

    @property
    def mlp_hidden_size(self) -> int:
        """Inner width of the SwiGLU MLP: two thirds of four times the width (B.3)."""
        return 2 * (4 * self.hidden_size) // 3


@dataclass(frozen=True)
class PixNerdConfig(DeCoConfig):
    """Everything that determines PixNerd's parameters; `decoder_depth` counts its NerfBlocks.

    Raises:
        ValueError: a field is out of range.
    """

    decoder_hidden_size: int = field(default=64, metadata={"help": "channels of the decoder"})
    decoder_depth: int = field(default=2, metadata={"help": "NerfBlocks in the decoder"})
    nerf_mlp_ratio: int = field(default=2, metadata={"help": "inner width of a NerfBlock's MLP"})


@dataclass(frozen=True)
class DeCoT2IConfig(NetworkConfig):
    """Everything that determines the parameters of the text-to-image DeCo.

    Raises:
        ValueError: a field is out of range.
    """

    text_depth: int = field(default=4, metadata={"help": "blocks that refine the text"})
    text_size: int = field(default=2048, metadata={"help": "channels of the text features"})
    text_length: int = field(default=128, metadata={"help": "text tokens, padding included"})

    @property
    def mlp_hidden_size(self) -> int:
        """Inner width of the SwiGLU MLPs: four times the width, without the two thirds (B.3)."""
        return 4 * self.hidden_size


def config_from_json(fields: dict[str, Any]) -> NetworkConfig:
    """The configuration that `to_json` made these fields of.

    Text models alone have a text_length, and PixNerd alone a nerf_mlp_ratio.

    Raises:
        ValueError: a field is unknown, missing or out of range.
    """
    if "text_length" in fields:
        return DeCoT2IConfig.from_json(fields)
    if "nerf_mlp_ratio" in fields:
        return PixNerdConfig.from_json(fields)
    return DeCoConfig.from_json(fields)


def class_config(config: NetworkConfig, checkpoint: object) -> DeCoConfig:
    """The configuration of a class model.

    Args:
        config: of any model.
        checkpoint: where it comes from, for the message.

    Raises:
        UserError: it is that of a text model.
    """
    if not isinstance(config, DeCoConfig):
        raise UserError(f"{checkpoint} draws from text: name a checkpoint that draws classes")
    return config
