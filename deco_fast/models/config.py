"""The shapes of the DeCo networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from deco_fast.errors import UserError, nearest

Config = TypeVar("Config", bound="NetworkConfig")


@dataclass(frozen=True)
class NetworkConfig:
    """What all networks have: a DiT over patches.

    The classes of single networks add `network`, the name that configurations know them by.

    Raises:
        ValueError: a field is out of range.
    """

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012  pydantic reads it off the class

    hidden_size: int = field(metadata={"help": "width of the DiT, a multiple of 4 × num_heads"})
    depth: int = field(metadata={"help": "DiT blocks"})
    num_heads: int = field(metadata={"help": "attention heads"})
    patch_size: int = field(default=16, metadata={"help": "side of a patch in pixels"})
    in_channels: int = field(default=3, metadata={"help": "image channels"})

    def __post_init__(self) -> None:
        for part in dataclasses.fields(self):
            if part.type == "int" and getattr(self, part.name) < 1:
                raise ValueError(f"{part.name} must be at least 1, not {getattr(self, part.name)}")
        for name, hint in get_type_hints(type(self)).items():
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            if choices and (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, not {value!r}")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 × num_heads "
                f"({self.num_heads}): rotary embedding turns the channels of a head in fours"
            )

    @property
    def kind(self) -> str:
        """The name of the network, a key of `NETWORKS`."""
        return str(getattr(self, "network"))  # noqa: B009  a field of the subclasses alone

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
class PixelDecoderConfig(NetworkConfig):
    """A network whose decoder has channels of its own for each pixel."""

    decoder_hidden_size: int = field(default=32, metadata={"help": "channels of the pixel decoder"})
    decoder_depth: int = field(default=3, metadata={"help": "blocks of the decoder"})


@dataclass(frozen=True)
class ClassConfig(NetworkConfig):
    """A network for class labels: 0 … num_classes − 1, and num_classes itself is the null class.

    Raises:
        ValueError: a field is out of range.
    """

    num_classes: int = field(default=1000, metadata={"help": "classes, without the null class"})
    class_embedding_std: float = field(
        default=0.02, metadata={"help": "of the class embedding at initialisation"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.class_embedding_std < math.inf:
            raise ValueError(
                f"class_embedding_std must be at least 0 and finite, not {self.class_embedding_std}"
            )

    @property
    def mlp_hidden_size(self) -> int:
        """Inner width of the SwiGLU MLP: two thirds of four times the width (B.3)."""
        return 2 * (4 * self.hidden_size) // 3


def _network(name: str) -> Any:
    return field(default=name, metadata={"help": "deco, deco-t2i, pixel-dit, pixnerd or pixddt"})


@dataclass(frozen=True)
class DeCoConfig(ClassConfig, PixelDecoderConfig):
    """Everything that determines DeCo's parameters; what they cannot tell is in `ModelCard`.

    Raises:
        ValueError: a field is out of range.
    """

    decoder_conditioning: Literal["adaln", "concat"] = field(
        default="adaln",
        metadata={"help": "adaln, or concat: the UNet-style stacking of the paper's ablation"},
    )
    decoder_patch_size: int = field(
        default=1,
        metadata={"help": "side of the pixel decoder's own patches; above 1 the paper's ablation"},
    )
    network: Literal["deco"] = _network("deco")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size % self.decoder_patch_size:
            raise ValueError(
                f"decoder_patch_size {self.decoder_patch_size} must divide patch_size "
                f"{self.patch_size}"
            )
        if self.decoder_patch_size > 1 and self.decoder_conditioning == "concat":
            raise ValueError("decoder_conditioning concat works on pixels: decoder_patch_size 1")

    @property
    def is_published(self) -> bool:
        """Whether the decoder is the published one, and no variant of the ablation."""
        return self.decoder_conditioning == "adaln" and self.decoder_patch_size == 1


@dataclass(frozen=True)
class PixNerdConfig(ClassConfig, PixelDecoderConfig):
    """Everything that determines PixNerd's parameters; `decoder_depth` counts its NerfBlocks.

    Raises:
        ValueError: a field is out of range.
    """

    decoder_hidden_size: int = field(default=64, metadata={"help": "channels of the decoder"})
    decoder_depth: int = field(default=2, metadata={"help": "NerfBlocks in the decoder"})
    nerf_mlp_ratio: int = field(default=2, metadata={"help": "inner width of a NerfBlock's MLP"})
    network: Literal["pixnerd"] = _network("pixnerd")


@dataclass(frozen=True)
class PixelDiTConfig(ClassConfig):
    """Everything that determines the pixel DiT, the paper's baseline, and with "image" JiT.

    Raises:
        ValueError: a field is out of range.
    """

    prediction: Literal["velocity", "image"] = field(
        default="velocity", metadata={"help": "what a pixel DiT predicts; image is JiT"}
    )
    network: Literal["pixel-dit"] = _network("pixel-dit")


@dataclass(frozen=True)
class PixDDTConfig(ClassConfig):
    """Everything that determines PixDDT's parameters.

    Raises:
        ValueError: a field is out of range.
    """

    decoder_depth: int = field(default=3, metadata={"help": "blocks of the velocity decoder"})
    network: Literal["pixddt"] = _network("pixddt")


@dataclass(frozen=True)
class DeCoT2IConfig(PixelDecoderConfig):
    """Everything that determines the parameters of the text-to-image DeCo.

    Raises:
        ValueError: a field is out of range.
    """

    text_depth: int = field(default=4, metadata={"help": "blocks that refine the text"})
    text_size: int = field(default=2048, metadata={"help": "channels of the text features"})
    text_length: int = field(default=128, metadata={"help": "text tokens, padding included"})
    network: Literal["deco-t2i"] = _network("deco-t2i")

    @property
    def mlp_hidden_size(self) -> int:
        """Inner width of the SwiGLU MLPs: four times the width, without the two thirds (B.3)."""
        return 4 * self.hidden_size


NETWORKS: dict[str, type[NetworkConfig]] = {
    "deco": DeCoConfig,
    "deco-t2i": DeCoT2IConfig,
    "pixel-dit": PixelDiTConfig,
    "pixnerd": PixNerdConfig,
    "pixddt": PixDDTConfig,
}
"""The configurations by the name of their network."""


def network_of(fields: Mapping[str, Any]) -> str:
    """The network that these fields of a configuration are of.

    Without `network` it is a DeCo, and the text model if there are fields of text.
    """
    if "network" in fields:
        return str(fields["network"])
    return "deco-t2i" if any(str(key).startswith("text_") for key in fields) else "deco"


def config_from_json(fields: dict[str, Any]) -> NetworkConfig:
    """The configuration that `to_json` made these fields of.

    Raises:
        ValueError: a field is unknown, missing or out of range.
    """
    name = network_of(fields)
    if name not in NETWORKS:
        raise ValueError(f"unknown network '{name}'{nearest(name, NETWORKS)}")
    return NETWORKS[name].from_json(fields)


def class_config(config: NetworkConfig, checkpoint: object) -> ClassConfig:
    """The configuration of a class model.

    Args:
        config: of any model.
        checkpoint: where it comes from, for the message.

    Raises:
        UserError: it is that of a text model.
    """
    if not isinstance(config, ClassConfig):
        raise UserError(f"{checkpoint} draws from text: name a checkpoint that draws classes")
    return config
