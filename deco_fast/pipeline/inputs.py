"""What a call of the pipeline asks for, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deco_fast.errors import UserError
from deco_fast.models.config import ClassConfig, NetworkConfig
from deco_fast.sampling.condition_table import Condition

Prompts = str | Sequence[str]
Labels = int | Sequence[int] | Tensor


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
    if num_images < 1:
        raise UserError(f"num_images_per_prompt must be at least 1, not {num_images}")
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


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The initial noise, seen to have this shape (N, C, H, W).

    Raises:
        UserError: it has not, or is of integers.
    """
    if tuple(latents.shape) != shape or not latents.is_floating_point():
        raise UserError(
            f"latents must be floating-point noise {shape}, not {latents.dtype} "
            f"{tuple(latents.shape)}"
        )
    return latents


def _labels(given: Labels | None, num_classes: int) -> list[int]:
    if given is None:
        raise UserError(f"this model draws classes: give class_labels, 0 … {num_classes - 1}")
    labels = torch.as_tensor(given)
    if labels.is_floating_point() and labels.numel():
        raise UserError(f"class_labels must be whole numbers, not {labels.dtype}")
    values: list[int] = labels.flatten().tolist()
    for label in values:
        if not 0 <= label <= num_classes:
            raise UserError(
                f"class {label} does not exist: the model knows 0 … {num_classes - 1}, and "
                f"{num_classes} for none of them"
            )
    return values


def _texts(name: str, given: Prompts) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{name} must be text or a list of texts, not {text!r}")
    return texts


def _negative(given: Prompts | None) -> str | None:
    if given is None:
        return None
    texts = set(_texts("negative_prompt", given))
    if len(texts) != 1:
        raise UserError("negative_prompt: one text for all images; make a call for each")
    return texts.pop()
