"""What a call of the pipeline asks for, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from deco_fast.conditioning.unicode import check_unicode
from deco_fast.errors import UserError
from deco_fast.models.card import SamplingSettings
from deco_fast.models.config import ClassConfig, NetworkConfig
from deco_fast.sampling.condition_table import Condition
from deco_fast.sampling.recipes import resolve_settings

Prompts = str | Sequence[str]
Labels = int | Sequence[int] | Tensor
Generators = torch.Generator | Sequence[torch.Generator]


def conditions_of(
    config: NetworkConfig,
    prompt: Prompts | None,
    class_labels: Labels | None,
    negative_prompt: Prompts | None,
    num_images: int,
) -> tuple[list[Condition], Condition | None]:
    """The condition of each image, those of one prompt beside each other, and the uncondition.

    Args:
        config: the network's.
        prompt, class_labels, negative_prompt: as the user gave them.
        num_images: of each prompt or class.

    Raises:
        UserError: one is missing, not for this model, or out of range.
    """
    check_count("num_images_per_prompt", num_images)
    conditions: Sequence[Condition]
    if isinstance(config, ClassConfig):
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if value is not None:
                raise UserError(f"{name}: this model draws classes; give class_labels")
        conditions, uncondition = _labels(class_labels, config.num_classes), None
    else:
        if class_labels is not None:
            raise UserError("class_labels: this model draws from text; give prompt")
        if prompt is None:
            raise UserError("this model draws from text: give prompt")
        conditions = _texts("prompt", prompt)
        uncondition = _negative(negative_prompt)
    if not conditions:
        raise UserError("there is nothing to draw: the list of prompts or classes is empty")
    return [condition for condition in conditions for _ in range(num_images)], uncondition


def settings_of(
    card: SamplingSettings,
    *,
    num_inference_steps: int | None,
    guidance_interval: Sequence[float] | None,
    **given: Any,
) -> SamplingSettings:
    """The card's settings with those of the call, numbers seen to be numbers.

    Args:
        card: the model's.
        num_inference_steps, guidance_interval: as the user gave them; None is "not given".
        given: other fields of `SamplingSettings`, in the same way.

    Raises:
        UserError: a number is none, or is out of a range that the solver does not check itself.
    """
    for name, value in (("num_inference_steps", num_inference_steps), ("order", given["order"])):
        if value is not None:
            check_count(name, value)
    for name in ("guidance_scale", "guidance_rescale", "time_shift"):
        if given[name] is not None:
            _check_number(name, given[name])
    rescale = given["guidance_rescale"]
    if rescale is not None and not 0 <= rescale <= 1:
        raise UserError(f"guidance_rescale must be 0 … 1, not {rescale}")
    interval = guidance_interval
    if interval is not None:
        if isinstance(interval, Real) or len(interval) != 2:
            raise UserError(f"guidance_interval must be two times (low, high), not {interval!r}")
        for bound in interval:
            _check_number("guidance_interval", bound)
        interval = tuple(interval)
    fields = {**given, "steps": num_inference_steps, "guidance_interval": interval}
    return resolve_settings(card, None, fields)


def check_count(name: str, value: object) -> None:
    """See that an argument is a whole number of at least 1.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UserError(f"{name} must be a whole number, at least 1, not {value!r}")


def check_generator(
    generator: Generators | None, count: int
) -> torch.Generator | list[torch.Generator] | None:
    """The generator of the noise, or one for each of `count` images.

    Raises:
        UserError: it is something else, or there are more or fewer.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, Sequence) or not all(
        isinstance(one, torch.Generator) for one in generator
    ):
        raise UserError(
            f"generator must be a torch.Generator or a list of them, not {generator!r}: for a seed "
            "torch.Generator().manual_seed(SEED)"
        )
    if len(generator) != count:
        raise UserError(f"{len(generator)} generators for {count} images: one for each")
    return list(generator)


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The images or their initial noise, seen to have this shape (N, C, H, W).

    Raises:
        UserError: they have not, or are of integers.
    """
    if not isinstance(latents, Tensor):
        raise UserError(f"latents must be a tensor {shape}, not {type(latents).__name__}")
    if tuple(latents.shape) != shape or not latents.is_floating_point():
        raise UserError(
            f"latents must be floating-point noise {shape}, not {latents.dtype} "
            f"{tuple(latents.shape)}"
        )
    return latents


def _labels(given: Labels | None, num_classes: int) -> list[int]:
    if given is None:
        raise UserError(f"this model draws classes: give class_labels, 0 … {num_classes - 1}")
    try:
        labels = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:  # what torch raises for text and None
        raise UserError(f"class_labels must be whole numbers, not {given!r}") from error
    are_whole = (
        not (labels.is_floating_point() or labels.is_complex()) and labels.dtype != torch.bool
    )
    if labels.numel() and not are_whole:
        raise UserError(f"class_labels must be whole numbers, not {labels.dtype}")
    values: list[int] = labels.flatten().tolist()
    for label in values:
        if not 0 <= label <= num_classes:
            raise UserError(
                f"class {label} does not exist: the model knows 0 … {num_classes - 1}, and "
                f"{num_classes} for none of them"
            )
    return values


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{name} must be a number, not {value!r}")


def _texts(name: str, given: Prompts) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{name} must be text or a list of texts, not {text!r}")
        check_unicode(text, name)
    return texts


def _negative(given: Prompts | None) -> str | None:
    if given is None:
        return None
    texts = set(_texts("negative_prompt", given))
    if len(texts) != 1:
        raise UserError("negative_prompt: one text for all images; make a call for each")
    return texts.pop()
