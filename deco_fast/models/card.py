"""What a network's tensors cannot tell: the image size, what it predicts, how to sample it."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from typing import Any

from deco_fast.guidance import check_interval
from deco_fast.solvers import check_solver


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
            ValueError: a field is unknown, of another type or out of range.
        """
        try:
            sampling, assumed = fields.get("sampling", {}), fields.get("assumed", ())
            if not isinstance(sampling, dict) or not isinstance(assumed, list | tuple):
                raise TypeError("sampling must be an object, and assumed a list")
            sampling = dict(sampling)
            if "guidance_interval" in sampling:
                low, high = sampling["guidance_interval"]
                sampling["guidance_interval"] = (float(low), float(high))
            card = cls(
                **{
                    **fields,
                    "sampling": SamplingSettings(**sampling),
                    "assumed": tuple(assumed),
                }
            )
        except (TypeError, OverflowError, AttributeError) as error:
            raise ValueError(f"not a model card: {error}") from error
        _check_card(card)
        check_sampling(card.sampling)
        return card


def _check_card(card: ModelCard) -> None:
    _check_type(card, str, "name", "prediction")
    _check_type(card, int, "height", "width")
    _check_range(card, 1, math.inf, "height", "width")
    if card.text_encoder is not None:
        _check_type(card, str, "text_encoder")
    if card.step is not None:
        _check_type(card, int, "step")
        _check_range(card, 0, math.inf, "step")
    if not all(isinstance(sentence, str) for sentence in card.assumed):
        raise ValueError(f"assumed must be sentences, not {card.assumed}")


def check_sampling(settings: SamplingSettings) -> None:
    """Raise ValueError for settings that no model can be drawn from with."""
    _check_type(settings, str, "solver")
    _check_type(settings, int, "order", "steps")
    _check_type(settings, float, "guidance_scale", "guidance_rescale", "time_shift")
    check_solver(settings.solver, settings.order)
    check_interval(settings.guidance_interval)
    _check_range(settings, 1, math.inf, "steps")
    _check_range(settings, 0, 1, "guidance_rescale")
    if not settings.time_shift > 0:
        raise ValueError(f"time_shift must be above 0, not {settings.time_shift}")


def _check_type(part: object, kind: type, *names: str) -> None:
    for name in names:
        value: Any = getattr(part, name)
        # JSON has whole numbers for floats too, and Python takes a truth value for one.
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or isinstance(value, bool):
            raise ValueError(f"{name} must be of type {kind.__name__}, not {value!r}")
        if kind is float and not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} must be finite, not {value}")


def _check_range(part: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if not low <= value <= high:
            bounds = f"at least {low}" if math.isinf(high) else f"{low} … {high}"
            raise ValueError(f"{name} must be {bounds}, not {value}")
