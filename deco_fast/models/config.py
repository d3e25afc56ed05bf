"""The shape of a DeCo network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DeCoConfig:
    """Everything that determines DeCo's parameters; what they cannot tell is in `ModelCard`.

    Attributes:
        hidden_size: width of the DiT.
        depth: number of DiT blocks.
        num_heads: attention heads; `hidden_size / num_heads` must be a multiple of 4 (RoPE).
        patch_size: side of a patch in pixels.
        decoder_hidden_size: channels of the pixel decoder.
        decoder_depth: AdaLN-Zero blocks in the pixel decoder.
        num_classes: class labels 0 … num_classes − 1; num_classes itself is the null class.
        in_channels: image channels.
        class_embedding_std: standard deviation of the class embedding at initialisation.

    Raises:
        ValueError: a field is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  pydantic reads it off the class

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int = 16
    decoder_hidden_size: int = 32
    decoder_depth: int = 3
    num_classes: int = 1000
    in_channels: int = 3
    class_embedding_std: float = 0.02

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int" and getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name} must be at least 1, not {getattr(self, field.name)}"
                )
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 × num_heads "
                f"({self.num_heads}): rotary embedding turns the channels of a head in fours"
            )
        if self.class_embedding_std < 0:
            raise ValueError("class_embedding_std must not be negative")

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_size(self) -> int:
        """Inner width of the SwiGLU MLP: two thirds of four times the width (B.3)."""
        return 2 * (4 * self.hidden_size) // 3

    def to_json(self) -> dict[str, Any]:
        """The fields as plain types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> DeCoConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is unknown, missing or out of range.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a DeCo configuration: {error}") from error
