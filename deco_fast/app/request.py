"""From what was entered on the page to what is drawn. Nothing a browser sends is trusted."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from deco_fast.app.limits import Limits
from deco_fast.cli.parser import number, whole_number
from deco_fast.conditioning.unicode import check_unicode
from deco_fast.errors import UserError
from deco_fast.models.card import SamplingSettings
from deco_fast.models.config import ClassConfig, NetworkConfig
from deco_fast.sampling.job import Job, check_size
from deco_fast.sampling.run import labels_for
from deco_fast.solvers import MAX_ORDER, check_solver

Number = TypeVar("Number", int, float)

# Wider than anything that is of use, and narrow enough that times and velocities stay finite.
_GUIDANCE = 100.0
_TIME_SHIFT = 100.0
# Of a number; 2⁶⁴ has 20.
_MOST_DIGITS = 40


@dataclass(frozen=True)
class DrawRequest:
    """Images to be drawn, as `sample.py` would draw them.

    Attributes:
        job: the class or prompt of each image.
        seed: 0 … 2⁶⁴ − 1; image i begins from the noise of (seed, i).
        height, width: in pixels.
        settings: solver, steps and guidance.
        negative_prompt: of a text model, what guidance leads away from.
    """

    job: Job
    seed: int
    height: int
    width: int
    settings: SamplingSettings
    negative_prompt: str = ""

    @property
    def num(self) -> int:
        """How many images."""
        return len(self.job.labels)

    @property
    def captions(self) -> list[str]:
        """Of each image, what it takes to draw it again beside the settings."""
        kind = "class" if self.job.prompts is None else "prompt"
        of = [f", class {label}" if kind == "class" else "" for label in self.job.labels]
        return [f"seed {self.seed}, image {i}{of[i]}" for i in range(self.num)]


def check_request(
    fields: Mapping[str, Any], config: NetworkConfig, settings: SamplingSettings, limits: Limits
) -> DrawRequest:
    """See that a model can draw what was entered, and that it is not too much.

    Args:
        fields: num, seed, height, width, solver, order, steps, guidance, time_shift; of class
            models classes, a list of numbers (empty: all in turn); of text models prompt and
            negative_prompt. Values as a browser sends them.
        config: the model's.
        settings: the model's, for what the page does not ask.
        limits: of one request.

    Raises:
        UserError: a value is missing, wrong or out of range; the message is one line.
    """
    num = _parse(whole_number(1, limits.images), "number of images", fields["num"])
    seed = _parse(whole_number(0, 2**64 - 1), "seed", fields["seed"])
    height, width = (_parse(whole_number(1), name, fields[name]) for name in ("height", "width"))
    check_size(config, height, width, names=("height", "width"))
    if height * width > limits.pixels:
        raise UserError(f"{height}×{width} is too large: at most {limits.pixels:,} pixels")
    if num * height * width > limits.pixels:
        most = limits.pixels // (height * width)
        raise UserError(f"{num} images of {height}×{width} are too many at once: at most {most}")
    solver = str(fields["solver"])
    try:
        check_solver(solver)
    except ValueError as error:
        raise UserError(str(error)) from error
    changed = dataclasses.replace(
        settings,
        solver=solver,
        order=_parse(whole_number(1, MAX_ORDER), "order", fields["order"]),
        steps=_parse(whole_number(1, limits.steps), "steps", fields["steps"]),
        guidance_scale=_parse(number(-_GUIDANCE, _GUIDANCE), "guidance", fields["guidance"]),
        time_shift=_parse(number(1 / _TIME_SHIFT, _TIME_SHIFT), "time shift", fields["time_shift"]),
    )
    if isinstance(config, ClassConfig):
        last = config.num_classes - 1
        classes = [
            _parse(whole_number(0, last), "class", label) for label in fields["classes"] or ()
        ]
        job = Job(labels_for(num, config.num_classes, classes))
        return DrawRequest(job, seed, height, width, changed)
    texts = [_text(fields[name], name, limits) for name in ("prompt", "negative_prompt")]
    return DrawRequest(Job([0] * num, texts[:1]), seed, height, width, changed, texts[1])


def _parse(parse: Callable[[str], Number], name: str, value: object) -> Number:
    text = "" if value is None else str(value).strip()
    # Without this a browser's 20 could come as 20.0, which is no whole number.
    if isinstance(value, float) and value.is_integer():
        text = str(int(value))
    if not text:
        raise UserError(f"{name} is empty: enter a number")
    if len(text) > _MOST_DIGITS:
        raise UserError(f"{name} is not a number of at most {_MOST_DIGITS} digits")
    try:
        return parse(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name} {error}") from error


def _text(value: object, name: str, limits: Limits) -> str:
    text = "" if value is None else str(value)
    if len(text) > limits.characters:
        raise UserError(
            f"the {name.replace('_', ' ')} has {len(text):,} characters: "
            f"at most {limits.characters:,}"
        )
    check_unicode(text, f"the {name.replace('_', ' ')}")
    return text
