"""Drawing many images: batches, labels, progress."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from deco_fast.errors import UserError
from deco_fast.sampling.condition_table import Condition
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.images import to_uint8
from deco_fast.sampling.noise import noise_for
from deco_fast.sampling.state import State
from deco_fast.transfer import begin_to_cpu

Item = TypeVar("Item")


def labels_for(num: int, num_classes: int, classes: Sequence[int] | None = None) -> list[int]:
    """The class of each of `num` images: `classes`, or all of them, over and over.

    Raises:
        UserError: a class is not 0 … num_classes − 1.
    """
    for label in classes or ():
        if not 0 <= label < num_classes:
            raise UserError(f"class {label} does not exist: the model knows 0 … {num_classes - 1}")
    order = classes or range(num_classes)
    return [order[i % len(order)] for i in range(num)]


def share(num: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """The images of 0 … num − 1 that one of several processes draws: every so-manieth batch.

    An image's batch depends on its index and the batch size alone, so a run that goes on after it
    was killed, with as many processes or another number, meets the same batches.
    """
    return [i for i in range(num) if i // batch_size % world_size == rank]


def draw(
    engine: SamplingEngine,
    conditions: Sequence[Condition],
    indices: Sequence[int] | None = None,
    *,
    seed: int = 0,
    uncondition: Condition | None = None,
    progress: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Draw images batch by batch.

    An image's noise depends on the seed and its index alone. Batches of another size give the
    same images up to the rounding of the matrix products. A GPU computes the next batch while the
    caller has one in hand.

    Args:
        engine: model, size, settings and batch size.
        conditions: the class of each image, or its prompt.
        indices: the number of each image; by default 0, 1, …
        seed: 0 … 2⁶⁴ − 1.
        uncondition: in place of the null class or the empty prompt, a negative prompt.
        progress: show a bar with images/s and remaining time.
        check: called at every evaluation; what it raises ends the drawing.

    Yields:
        (indices, images): numbers of up to batch_size images, and uint8 (B, H, W, 3) on the CPU.

    Raises:
        ValueError: an argument is out of range.
        UserError: an image is not finite.
    """
    indices = range(len(conditions)) if indices is None else indices
    if len(indices) != len(conditions):
        raise ValueError(f"{len(conditions)} conditions for {len(indices)} images")
    bar = tqdm(
        total=len(indices),
        desc="sampling",
        unit="image",
        # The count is of images, in fractions while a batch is on its way.
        bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]",
        disable=not progress,
        dynamic_ncols=True,
    )
    with bar:
        ordered = _ordered(engine, conditions, indices, seed, uncondition, bar, check)
        # Orders to a GPU return at once: with one batch ahead it never waits for the host.
        for batch, on_their_way in _one_behind(ordered) if engine.is_ahead else ordered:
            images, finite = on_their_way()
            check_finite(finite, batch, engine.model.dtype)
            yield batch, images


def draw_states(
    engine: SamplingEngine,
    conditions: Sequence[Condition],
    indices: Sequence[int],
    *,
    seed: int = 0,
    uncondition: Condition | None = None,
) -> Iterator[tuple[list[int], State]]:
    """Draw the images of `draw`, batch by batch, and show every state on the way.

    Args:
        engine, conditions, indices, seed, uncondition: as for `draw`.

    Yields:
        (indices, state): numbers of up to batch_size images, and where they are. Each batch
        begins with its noise and ends with its images.

    Raises:
        ValueError: an argument is out of range.
    """
    for start in range(0, len(indices), engine.batch_size):
        batch = list(indices[start : start + engine.batch_size])
        noise = torch.stack([noise_for(seed, index, engine.image_shape) for index in batch])
        some = conditions[start : start + len(batch)]
        for state in engine.states(noise, some, uncondition=uncondition):
            yield batch, state


def _ordered(
    engine: SamplingEngine,
    conditions: Sequence[Condition],
    indices: Sequence[int],
    seed: int,
    uncondition: Condition | None,
    bar: tqdm,
    check: Callable[[], None],
) -> Iterator[tuple[list[int], Callable[[], tuple[Tensor, ...]]]]:
    """Of batches that may still be computed the indices, and what waits for the images and whether
    each is finite."""
    done = 0
    states = draw_states(engine, conditions, indices, seed=seed, uncondition=uncondition)
    for batch, state in states:
        check()
        bar.update(done + len(batch) * state.evaluation / engine.evaluations - bar.n)
        if state.evaluation == engine.evaluations:
            done += len(batch)
            yield batch, begin_to_cpu(to_uint8(state.x), finite_images(state.x))


def finite_images(images: Tensor) -> Tensor:
    """Whether each of the images (B, C, H, W) is finite, bool (B,)."""
    return images.isfinite().flatten(1).all(dim=1)


def _one_behind(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each after the next one has been asked for."""
    held = list(itertools.islice(items, 1))
    for item in items:
        yield held.pop()
        held.append(item)
    yield from held


def check_finite(finite: Tensor, indices: Sequence[int], dtype: torch.dtype) -> None:
    """Raise UserError if an image is not finite.

    Args:
        finite: bool (B,), on the CPU.
        indices: the images' numbers.
        dtype: of the model.
    """
    if not finite.all():
        first = indices[int(finite.logical_not().nonzero()[0])]
        remedy = (
            "the weights or the settings are to blame"
            if dtype == torch.float32
            else "draw with --dtype fp32"
        )
        raise UserError(f"image {first} is not finite in {str(dtype).split('.')[1]}: {remedy}")
