"""DCT energy spectra: where in the spectrum a model works (paper, section "Empirical Analysis").

An image, a velocity or a grid of tokens is cut into 8×8 blocks and each block transformed by the
orthonormal DCT of JPEG; the energy of a frequency is the mean square of its coefficient over
images, channels and blocks, and the frequencies stand in JPEG's zig-zag order, low ones first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor

from deco_fast.flow import interpolate, velocity
from deco_fast.kernels.flow_matching_loss.reference import BLOCK, dct_matrix
from deco_fast.sampling.loop import VelocityModel
from deco_fast.sampling.noise import noise_for

TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)

DIT_OUTPUT = "dit_output"
VELOCITY = "velocity"
TRUE_VELOCITY = "true_velocity"
"""x − noise, what a perfect model would have to predict on average."""


class Spectrum(NamedTuple):
    """The energies of one signal at one time.

    Attributes:
        model: whose; empty for the true velocity.
        signal: DIT_OUTPUT, VELOCITY or TRUE_VELOCITY.
        timestep: 0 noise … 1 data.
        energy: (block²,) float64, in zig-zag order.
    """

    model: str
    signal: str
    timestep: float
    energy: Tensor

    @property
    def share(self) -> Tensor:
        """The fraction of the whole energy that each frequency has, (block²,)."""
        return self.energy / self.energy.sum()

    @property
    def high_share(self) -> float:
        """The fraction that the upper half of the frequencies has, in zig-zag order."""
        return float(self.share[len(self.share) // 2 :].sum())


class LabelledBatch(NamedTuple):
    """Images (B, 3, H, W) float32 in [−1, 1], and labels (B,) int64."""

    images: Tensor
    labels: Tensor


class _Encoder(Protocol):
    """What DeCo and the models beside it have: tokens, block by block."""

    config: Any

    def encode(
        self, x: Tensor, t: Tensor, y: Tensor, return_layers: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...


def parse_timesteps(text: str) -> tuple[float, ...]:
    """Times from a list with commas.

    Raises:
        ValueError: one is not a number from 0 to 1, or two differ only where no table shows it.
    """
    timesteps = tuple(float(part) for part in text.split(","))
    if not all(0 <= timestep <= 1 for timestep in timesteps):
        raise ValueError(f"timesteps are 0 … 1, not {text}")
    shown = {f"{timestep:g}" for timestep in timesteps}
    if len(shown) < len(set(timesteps)):
        raise ValueError(f"two timesteps of {text} are equal in six digits: leave one out")
    return timesteps


def zigzag(size: int = BLOCK) -> Tensor:
    """JPEG's order of the frequencies of a block: (size²,) places in the flattened block."""
    places = [(row, column) for row in range(size) for column in range(size)]
    # Along each antidiagonal, up and down in turn, beginning to the right.
    places.sort(key=lambda place: (sum(place), place[sum(place) % 2 == 0]))
    return torch.tensor([row * size + column for row, column in places])


def block_energy(values: Tensor) -> Tensor:
    """The energy of each frequency, in zig-zag order.

    Args:
        values: (B, C, H, W). Blocks are 8×8, or of the smaller side where that is less; what is
            left over on the right and at the bottom is not seen.

    Returns:
        (block²,) float64 on the CPU.
    """
    height, width = values.shape[-2:]
    size = min(BLOCK, height, width)
    whole = values[..., : height // size * size, : width // size * size].double()
    blocks = rearrange(whole, "b c (h u) (w v) -> (b c h w) u v", u=size, v=size)
    matrix = dct_matrix(blocks.device, torch.float64, size)
    coefficients = matrix @ blocks @ matrix.T
    return coefficients.square().mean(dim=0).flatten().cpu()[zigzag(size)]


def spectral_error(energy: Tensor, reference: Tensor) -> float:
    """How far two spectra of images lie apart: the root mean square over the frequencies of the
    difference in decibels, 10·log₁₀ of the ratio of energies.

    Args:
        energy, reference: (block²,), as `block_energy` gives them.
    """
    floor = torch.finfo(torch.float64).tiny
    decibels = 10 * (energy.clamp(min=floor) / reference.clamp(min=floor)).log10()
    return float(decibels.square().mean().sqrt())


@torch.no_grad()
def measure_spectra(
    model: VelocityModel,
    name: str,
    batches: Iterable[LabelledBatch],
    *,
    timesteps: Sequence[float] = TIMESTEPS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Spectrum]:
    """The spectra of a model's velocity and, where it has an encoder, of the DiT's output.

    The DiT's output is that of its last block, before the time embedding (which is the same for
    all tokens) and the SiLU: the tokens of an image as a grid.

    Args:
        model: gives the velocity at (x, t, y). With `encode(x, t, y, return_layers=…)` and
            `config.depth`, `config.patch_size`, its tokens are looked at as well.
        name: of the model, in the result.
        batches: images and labels.
        timesteps: 0 … 1, at which the images are mixed with noise; one given twice counts once.
        seed: of the noise, which is the same for every model and time.
        device: the model's.

    Returns:
        For each time the true velocity's, the velocity's and, last, the DiT's.
    """
    sums: dict[tuple[str, float], Tensor] = {}
    count = 0
    for images, labels in batches:
        noise = torch.stack([noise_for(seed, count + i, im.shape) for i, im in enumerate(images)])
        x, y, noise = images.to(device), labels.to(device), noise.to(device)
        for timestep in dict.fromkeys(timesteps):
            t = x.new_full((len(x),), timestep)
            for signal, values in _signals(model, x, noise, t, y):
                key = (signal, timestep)
                sums[key] = sums.get(key, torch.zeros(())) + block_energy(values) * len(x)
        count += len(images)
    return [
        Spectrum("" if signal == TRUE_VELOCITY else name, signal, timestep, total / count)
        for (signal, timestep), total in sums.items()
    ]


def _signals(
    model: VelocityModel, x: Tensor, noise: Tensor, t: Tensor, y: Tensor
) -> Iterator[tuple[str, Tensor]]:
    noisy = interpolate(x, noise, t)
    yield TRUE_VELOCITY, velocity(x, noise)
    yield VELOCITY, model(noisy, t, y).float()
    if hasattr(model, "encode"):
        encoder = cast(_Encoder, model)
        depth, patch_size = encoder.config.depth, encoder.config.patch_size
        _, (tokens,) = encoder.encode(noisy, t, y, return_layers=(depth,))
        rows = x.shape[-2] // patch_size
        yield DIT_OUTPUT, rearrange(tokens.float(), "b (h w) d -> b d h w", h=rows)
