"""How to draw: the paper's named recipes, and which of several sources decides a setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from deco_fast.errors import UserError, nearest
from deco_fast.models.card import SamplingSettings


class Recipe(NamedTuple):
    """A solver and its steps from the paper's tables, and what they are for."""

    solver: str
    steps: int
    description: str


RECIPES: dict[str, Recipe] = {
    "euler-100": Recipe("euler", 100, "the paper's default: FID 1.71 at 256×256, 2.22 at 512×512"),
    "euler-250": Recipe("euler", 250, "the paper's best: FID 1.62 at 256×256"),
    # JiT's Heun, with which the paper compares, is the one of two evaluations a step.
    "heun-50": Recipe("heun", 50, "the comparison with JiT: FID 1.69 at 256×256, 600 epochs"),
}

_GUIDANCE_SCALE_256 = 3.2
_GUIDANCE_SCALE_512 = 5.0
_GUIDANCE_INTERVAL = (0.1, 1.0)


def recipe_settings(name: str, height: int, width: int) -> SamplingSettings:
    """A recipe for images of a size in pixels.

    With the guidance published for ImageNet (B.14): in (0.1, 1], of scale 5.0 for 512×512 and
    above, 3.2 below. The paper names no other for 250 steps or for Heun.

    Raises:
        UserError: there is no such recipe; the nearest name is suggested.
    """
    check_recipe(name)
    large = height * width >= 512 * 512
    return SamplingSettings(
        solver=RECIPES[name].solver,
        steps=RECIPES[name].steps,
        guidance_scale=_GUIDANCE_SCALE_512 if large else _GUIDANCE_SCALE_256,
        guidance_interval=_GUIDANCE_INTERVAL,
    )


def check_recipe(name: str) -> None:
    """Raise UserError unless there is such a recipe."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe '{name}'{nearest(name, RECIPES)}")


def resolve_settings(
    card: SamplingSettings, recipe: SamplingSettings | None, given: Mapping[str, Any]
) -> SamplingSettings:
    """What is given wins over the recipe, and the recipe over the card.

    Args:
        card: the settings of the checkpoint's card, or of a preset's.
        recipe: complete settings in place of the card's.
        given: values of single fields; None stands for "not given".
    """
    explicit = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(recipe or card, **explicit)
