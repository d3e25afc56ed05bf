"""Drawing many images: batches, labels, progress."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from deco_fast.errors import UserError
from deco_fast.models.card import SamplingSettings
from deco_fast.models.deco import DeCo
from deco_fast.sampling.images import to_uint8
from deco_fast.sampling.loop import sample
from deco_fast.sampling.noise import noise_for

# Pixels in a batch: 64 images of 32×32 or one of 256×256 on a CPU, whose caches larger batches
# leave; 32 images of 256×256 on a GPU, where the decoder's activations then take some 4 GB.
_PIXELS_ON_CPU = 64 * 32**2
_PIXELS_ELSEWHERE = 32 * 256**2


def default_batch_size(device: torch.device, height: int, width: int) -> int:
    """Images per batch of a size in pixels that suits a device."""
    pixels = _PIXELS_ON_CPU if device.type == "cpu" else _PIXELS_ELSEWHERE
    return max(1, pixels // (height * width))


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


def evaluations(settings: SamplingSettings) -> int:
    """Times that the model is called for a batch."""
    return 2 * settings.steps - 1 if settings.solver == "heun" else settings.steps


def draw(
    model: DeCo,
    labels: Sequence[int],
    indices: Sequence[int] | None = None,
    *,
    seed: int = 0,
    settings: SamplingSettings | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    pad_last: bool = False,
    progress: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Draw images batch by batch.

    An image's noise depends on the seed and its index alone. Batches of another size give the
    same images up to the rounding of the matrix products.

    Args:
        model: whose card fills in what is not given.
        labels: the class of each image.
        indices: the number of each image; by default 0, 1, …
        seed: 0 … 2⁶⁴ − 1.
        settings: solver, steps and guidance.
        height, width: in pixels, divisible by the patch size.
        batch_size: images computed at once (with guidance, twice as many inputs); by default
            `default_batch_size`.
        pad_last: fill the last batch up to the size of the others, so that a compiled model is
            not compiled again for it; the filling is dropped.
        progress: show a bar with images/s and remaining time.

    Yields:
        (indices, images): numbers of up to batch_size images, and uint8 (B, H, W, 3) on the CPU.

    Raises:
        ValueError: an argument is out of range, or the model has no card and one is needed.
        UserError: an image is not finite.
    """
    if model.card is None and None in (settings, height, width):
        raise ValueError("the model has no card: give settings, height and width")
    if model.card is not None:
        settings = settings or model.card.sampling
        height, width = height or model.card.height, width or model.card.width
    assert settings is not None and height is not None and width is not None
    indices = range(len(labels)) if indices is None else indices
    if len(indices) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(indices)} images")
    device = model.patch_embedder.weight.device
    batch_size = default_batch_size(device, height, width) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, not {batch_size}")
    shape = (model.config.in_channels, height, width)
    calls = evaluations(settings)

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
        for start in range(0, len(indices), batch_size):
            batch = list(indices[start : start + batch_size])
            rows = list(range(start, start + len(batch)))
            if pad_last:
                rows += [rows[-1]] * (batch_size - len(rows))
            noise = torch.stack([noise_for(seed, indices[row], shape) for row in rows])
            condition = torch.tensor([labels[row] for row in rows], device=device)
            images = sample(
                _Counted(model, bar, len(batch) / calls, start + len(batch)),
                noise.to(device),
                condition,
                torch.full_like(condition, model.config.num_classes),
                **dataclasses.asdict(settings),
            )[: len(batch)]
            _check_finite(images, batch, model.dtype)
            bar.update(start + len(batch) - bar.n)
            yield batch, to_uint8(images).cpu()


def warm_up(model: DeCo, batch_size: int, height: int, width: int, guided: bool) -> None:
    """Call the model once for every shape that `draw` will, so that compiling is done with."""
    device = model.patch_embedder.weight.device
    with torch.no_grad():
        for size in (batch_size, 2 * batch_size)[: 2 if guided else 1]:
            x = torch.zeros(size, model.config.in_channels, height, width, device=device)
            model(x, x.new_zeros(size), torch.zeros(size, dtype=torch.int64, device=device))


def weights_checksum(model: DeCo) -> str:
    """Sixteen hexadecimal digits that tell two sets of weights apart, the same on any device.

    A sum over the bits of each tensor: exact in any order, and a moment's work for any size.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        bits = parameter.detach().view(
            torch.int32 if parameter.element_size() == 4 else torch.int16
        )
        digest.update(f"{name} {tuple(bits.shape)} {int(bits.sum(dtype=torch.int64))};".encode())
    return digest.hexdigest()


class _Counted:
    """A model that moves the progress bar by so many images at each call."""

    def __init__(self, model: DeCo, bar: tqdm, images: float, end: int) -> None:
        self.model, self.bar, self.images, self.end = model, bar, images, end

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        velocity: Tensor = self.model(x, t, y)
        # The fractions of a batch may add up to a little more than it.
        self.bar.update(min(self.images, self.end - self.bar.n))
        return velocity


def _check_finite(images: Tensor, indices: Sequence[int], dtype: torch.dtype) -> None:
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        first = indices[int(finite.logical_not().nonzero()[0])]
        remedy = (
            "the weights or the settings are to blame"
            if dtype == torch.float32
            else "draw with --dtype fp32"
        )
        raise UserError(f"image {first} is not finite in {str(dtype).split('.')[1]}: {remedy}")
