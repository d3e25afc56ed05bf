"""What a network's tensors cannot tell: the image size, what it predicts, how to sample it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SamplingSettings:
    """How to draw from a model; the arguments of `deco_fast.sample`, which documents them."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  pydantic reads it off the class

    solver: str = field(default="euler", metadata={"help": "euler, heun, heun-pec or adams"})
    order: int = field(default=2, metadata={"help": "of adams, 1 … 4"})
    steps: int = field(default=100, metadata={"help": "solver steps"})
    guidance_scale: float = field(default=1.0, metadata={"help": "1 is no guidance"})
    guidance_interval: tuple[float, float] = field(
        default=(0.0, 1.0), metadata={"help": "times at which guidance acts"}
    )
    guidance_rescale: float = field(default=0.0, metadata={"help": "0 … 1, against contrast"})
    time_shift: float = field(default=1.0, metadata={"help": "above 1: more steps near noise"})


@dataclass(frozen=True)
class ModelCard:
    """The facts that a checkpoint carries beside its tensors.

    Attributes:
        name: for people and for file names.
        height, width: the image size that the model was trained at, in pixels.
        prediction: what the network predicts; "velocity" for DeCo.
        sampling: the settings its makers recommend.
        text_encoder: of a text model, what its prompts are encoded with: a folder, or hf:….
        step: optimizer steps behind the weights, where known.
        assumed: sentences on what no file said and a default filled in.
    """

    name: str = "deco"
    height: int = 256
    width: int = 256
    prediction: str = "velocity"
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    text_encoder: str | None = None
    step: int | None = None
    assumed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as plain types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelCard:
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is unknown or malformed.
        """
        try:
            sampling = dict(fields.get("sampling", {}))
            if "guidance_interval" in sampling:
                low, high = sampling["guidance_interval"]
                sampling["guidance_interval"] = (float(low), float(high))
            return cls(
                **{
                    **fields,
                    "sampling": SamplingSettings(**sampling),
                    "assumed": tuple(fields.get("assumed", ())),
                }
            )
        except TypeError as error:
            raise ValueError(f"not a model card: {error}") from error
