"""The noise of image i: a function of (seed, i), bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deco_fast.sampling.noise import noise_for

SHAPE = (3, 8, 8)
numbers = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("seed", "index", "expected"),
    [
        (
            0,
            0,
            [
                "0x1.eaca8c0000000p-5",
                "0x1.fddbac0000000p-7",
                "-0x1.2a18a40000000p+0",
                "-0x1.0fa94c0000000p-3",
            ],
        ),
        (
            2026,
            49_999,
            [
                "-0x1.2ccf9a0000000p-1",
                "0x1.af4cd20000000p-1",
                "0x1.664efc0000000p-6",
                "-0x1.4b002c0000000p-1",
            ],
        ),
        (
            2**64 - 1,
            2**64 - 1,
            [
                "0x1.5aca280000000p-1",
                "0x1.06bf1e0000000p-2",
                "-0x1.01af880000000p-1",
                "-0x1.941c500000000p-1",
            ],
        ),
    ],
)
def test_pinned_values(seed: int, index: int, expected: list[str]) -> None:
    """A seed means the same images in every version: what these values were, they stay."""
    assert [
        value.hex() for value in noise_for(seed, index, (1, 1, 4)).flatten().tolist()
    ] == expected


@given(numbers, st.permutations(range(6)), st.integers(0, 2**64 - 6))
def test_depends_on_seed_and_index_alone(seed: int, order: list[int], start: int) -> None:
    torch.manual_seed(1)
    alone = [noise_for(seed, start + i, SHAPE) for i in range(6)]
    torch.manual_seed(2)
    torch.rand(3)
    for i in order:
        assert torch.equal(noise_for(seed, start + i, SHAPE), alone[i])


@given(numbers, numbers, numbers, numbers)
def test_other_pairs_have_other_noise(seed: int, index: int, seed2: int, index2: int) -> None:
    if (seed, index) != (seed2, index2):
        assert not torch.equal(noise_for(seed, index, SHAPE), noise_for(seed2, index2, SHAPE))


def test_no_bit_of_seed_or_index_is_lost() -> None:
    bits = [0, *(2**k for k in range(64))]
    keys = [*((bit, 0) for bit in bits), *((0, bit) for bit in bits[1:])]
    noises = [tuple(noise_for(*key, (1, 1, 4)).flatten().tolist()) for key in keys]
    assert len(set(noises)) == len(keys)


def test_is_standard_normal_and_independent() -> None:
    noise = torch.stack([noise_for(seed, i, (3, 32, 32)) for seed in (0, 1) for i in range(200)])
    assert noise.dtype == torch.float32
    values = noise.double().flatten()
    error = len(values) ** -0.5
    assert abs(values.mean()) < 5 * error
    assert abs(values.var() - 1) < 5 * 2**0.5 * error
    assert abs((values**4).mean() - 3) < 5 * 96**0.5 * error
    correlation = torch.corrcoef(noise.double().flatten(1)) - torch.eye(len(noise))
    assert correlation.abs().max() < 6 * noise[0].numel() ** -0.5


@pytest.mark.parametrize("value", [-1, 2**64])
def test_out_of_range_is_an_error(value: int) -> None:
    with pytest.raises(ValueError, match="seed must be"):
        noise_for(value, 0, SHAPE)
    with pytest.raises(ValueError, match="index must be"):
        noise_for(0, value, SHAPE)
