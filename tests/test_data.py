"""Datasets, transforms and the order of samples."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from deco_fast.data import DigitsDataset, EpochBatches
from deco_fast.data.transforms import Crop, centre_crop, crop_to_size, normalise, to_pixels, to_rgb

# --- digits ---------------------------------------------------------------------------------


def test_digits_are_rgb_in_range() -> None:
    dataset = DigitsDataset("train")
    assert dataset.images.shape == (1437, 3, 32, 32)
    assert dataset.images.dtype == torch.float32
    assert dataset.images.amin() == -1 and dataset.images.amax() == 1
    assert dataset.labels.dtype == torch.int64
    image, label = dataset[5]
    assert image.shape == (3, 32, 32) and type(label) is int and label == dataset.labels[5]
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_digits_split_is_stratified_and_holds_every_digit_once() -> None:
    # At size 8 nothing is enlarged, so that the images are scikit-learn's own.
    splits = [DigitsDataset("train", size=8), DigitsDataset("test", size=8)]
    assert [len(split) for split in splits] == [1437, 360]
    for split, fraction in zip(splits, (0.8, 0.2), strict=True):
        expected = np.bincount(load_digits().target) * fraction
        np.testing.assert_allclose(split.labels.bincount(), expected, atol=1)

    def as_counter(images: Tensor, labels: Tensor) -> Counter[tuple[bytes, int]]:
        return Counter(
            (image.numpy().tobytes(), int(label))
            for image, label in zip(images, labels, strict=True)
        )

    original = load_digits()
    pixels = torch.from_numpy(original.images).float() / 8 - 1
    together = sum(
        (as_counter(split.images[:, 0].contiguous(), split.labels) for split in splits), Counter()
    )
    assert together == as_counter(pixels, torch.from_numpy(original.target))


def test_digits_split_is_fixed() -> None:
    """Figures compare only while the held-out images stay the same ones."""
    dataset = DigitsDataset("test", size=8)
    ink = ((dataset.images[:, 0] + 1) * 8).sum((1, 2))
    assert dataset.labels[:8].tolist() == [7, 6, 3, 7, 7, 3, 2, 8]
    assert ink[:8].tolist() == [278, 312, 334, 277, 273, 268, 291, 383]


def test_digits_enlarge_bilinearly() -> None:
    small = DigitsDataset("test", size=8).images[:4, 0].numpy()
    large = DigitsDataset("test", size=16).images[:4, 0].numpy()
    # At twice the size every new pixel lies a quarter pixel from its nearest old one.
    rows = 0.75 * small[:, 1:-1] + 0.25 * small[:, :-2]
    inner = 0.75 * rows[:, :, 1:-1] + 0.25 * rows[:, :, :-2]
    np.testing.assert_allclose(large[:, 2:-2:2, 2:-2:2], inner, atol=1e-6)


@pytest.mark.parametrize(("split", "size"), [("all", 32), ("train", 4)])
def test_digits_refuse_wrong_arguments(split: str, size: int) -> None:
    with pytest.raises(ValueError, match="choose"):
        DigitsDataset(split, size)  # type: ignore[arg-type]


# --- order ----------------------------------------------------------------------------------

sizes = st.integers(1, 40)


@settings(deadline=None)
@given(dataset_size=sizes, batch_size=sizes, seed=st.integers(0, 2**40))
def test_order_shows_every_sample_once_an_epoch(
    dataset_size: int, batch_size: int, seed: int
) -> None:
    epochs = 3
    steps = -(-epochs * dataset_size // batch_size)
    batches = list(itertools.islice(EpochBatches(dataset_size, batch_size, seed), steps))
    assert all(len(batch) == batch_size for batch in batches)
    stream = list(itertools.chain(*batches))
    for epoch in range(epochs):
        shown = stream[epoch * dataset_size : (epoch + 1) * dataset_size]
        assert sorted(shown) == list(range(dataset_size))


@settings(deadline=None)
@given(dataset_size=sizes, batch_size=sizes, seed=st.integers(0, 2**40), start=st.integers(0, 99))
def test_order_resumes_at_any_step(
    dataset_size: int, batch_size: int, seed: int, start: int
) -> None:
    unbroken = EpochBatches(dataset_size, batch_size, seed)
    resumed = EpochBatches(dataset_size, batch_size, seed, start_step=start)
    expected = list(itertools.islice(unbroken, start, start + 5))
    assert list(itertools.islice(resumed, 5)) == expected
    assert list(itertools.islice(resumed, 5)) == expected  # iterating keeps no state
    assert [resumed.global_batch(start + step) for step in range(5)] == expected


@settings(deadline=None)
@given(
    dataset_size=sizes,
    local_size=st.integers(1, 9),
    world_size=st.integers(1, 6),
    start=st.integers(0, 20),
)
def test_order_is_shared_among_ranks(
    dataset_size: int, local_size: int, world_size: int, start: int
) -> None:
    batch_size = local_size * world_size
    ranks = [
        EpochBatches(dataset_size, batch_size, 3, rank, world_size, start_step=start)
        for rank in range(world_size)
    ]
    alone = EpochBatches(dataset_size, batch_size, 3, start_step=start)
    for whole, *parts in itertools.islice(zip(alone, *ranks, strict=True), 4):
        assert all(len(part) == local_size for part in parts)
        assert list(itertools.chain(*parts)) == whole


def test_order_differs_between_epochs_and_seeds() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return EpochBatches(500, 500, seed).global_batch(number)

    orders = [epoch(seed, number) for seed in range(3) for number in range(3)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    # A shuffle: next to none of the samples stay where they were.
    for order in orders:
        assert np.mean(np.array(order) == np.arange(500)) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_size": 0}, "no samples"),
        ({"batch_size": 0}, "multiple"),
        ({"batch_size": 10, "world_size": 4}, "multiple of 4"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"seed": -1}, "seed"),
        ({"start_step": -1}, "start_step"),
    ],
)
def test_order_refuses_wrong_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochBatches(**({"dataset_size": 8, "batch_size": 4, "seed": 0} | arguments))


# --- transforms -----------------------------------------------------------------------------


def gradient(width: int, height: int) -> Image.Image:
    """Red grows with x, green with y, so that a crop tells where it was taken."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, 0 * x], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(64, 64, 16), (65, 47, 16), (31, 90, 16), (7, 5, 16), (16, 200, 16), (333, 500, 64)],
)
def test_centre_crop_takes_the_middle(width: int, height: int, size: int) -> None:
    red, green, _ = np.asarray(centre_crop(gradient(width, height), size, size), float).T
    short = min(width, height)
    centres = (np.arange(size) + 0.5) / size - 0.5
    # One pixel of the input, and half a pixel of the output where the margin is odd.
    tolerance = 255 * (1 / short + 0.5 / size) + 1
    middle = slice(1, -1)  # the filter is one-sided at the border
    x = 255 * (0.5 + centres * short / width)
    y = 255 * (0.5 + centres * short / height)
    np.testing.assert_allclose(red.mean(1)[middle], x[middle], atol=tolerance)
    np.testing.assert_allclose(green.mean(0)[middle], y[middle], atol=tolerance)


@pytest.mark.parametrize("crop", ["adm", "bilinear"])
def test_an_image_too_narrow_to_enlarge_is_refused_and_takes_no_memory(crop: Crop) -> None:
    for width, height in ((1, 60_000), (60_000, 1)):
        with pytest.raises(ValueError, match=f"{width}×{height} is too long and narrow"):
            crop_to_size(Image.new("RGB", (width, height)), 256, 256, crop)


def test_centre_crop_is_the_adm_crop() -> None:
    """Its steps by hand: halve 154x90 to 77x45, scale to 51x30, cut 10 and 11 columns."""
    # Multiples of four, so that Pillow's halving has nothing to round.
    noise = 4 * np.random.default_rng(0).integers(0, 64, (90, 154, 3), dtype=np.uint8)
    halved = noise.reshape(45, 2, 77, 2, 3).mean((1, 3)).astype(np.uint8)
    scaled = Image.fromarray(halved).resize((51, 30), Image.Resampling.BICUBIC)
    cropped = centre_crop(Image.fromarray(noise), 30, 30)
    np.testing.assert_array_equal(np.asarray(cropped), np.asarray(scaled)[:, 10:40])


def test_centre_crop_to_another_shape() -> None:
    cropped = centre_crop(gradient(300, 100), 32, 64)
    assert cropped.size == (64, 32)
    red, green, _ = np.asarray(cropped, float).T
    # The whole height and the middle 200 of 300 columns are seen.
    assert green.min() < 10 and green.max() > 245
    np.testing.assert_allclose([red.min(), red.max()], [255 / 6, 255 * 5 / 6], atol=6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = to_rgb(Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode))
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 254


def test_palette_with_transparency_becomes_rgb(recwarn: pytest.WarningsRecorder) -> None:
    buffer = io.BytesIO()
    palette = Image.new("RGB", (4, 4), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(buffer, "png", transparency=b"\x80")
    with Image.open(buffer) as image:
        assert image.mode == "P"
        assert to_rgb(image).getpixel((0, 0)) == (200, 100, 50)
    assert not recwarn.list


def test_16_bit_grey_keeps_its_shades() -> None:
    shades = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    rgb = np.asarray(to_rgb(Image.fromarray(shades)))
    np.testing.assert_array_equal(rgb[..., 1].ravel(), np.arange(256))


def test_pixels_of_unknown_range_are_refused() -> None:
    with pytest.raises(ValueError, match="range"):
        to_rgb(Image.new("F", (4, 4)))
    file = io.BytesIO()
    Image.new("I", (4, 4), 200).save(file, format="TIFF")
    with Image.open(file) as image, pytest.raises(ValueError, match="32-bit integers of unknown"):
        to_rgb(image)


def test_pixels_are_scaled_to_minus_one_and_one() -> None:
    image = np.array([[[0, 51, 255]], [[255, 0, 102]]], dtype=np.uint8)
    pixels = to_pixels(Image.fromarray(image))
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    expected = torch.tensor([[[-1.0], [1.0]], [[-0.6], [-1.0]], [[1.0], [-0.2]]])
    torch.testing.assert_close(normalise(pixels), expected)


@pytest.mark.gpu
def test_pixels_are_scaled_to_the_same_bits_on_a_gpu() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(normalise(pixels.cuda()).cpu(), normalise(pixels))
