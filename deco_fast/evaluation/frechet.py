"""Mean and covariance of features in bounded memory, and the Fréchet distance between two sets."""

from __future__ import annotations

import torch
from torch import Tensor

from deco_fast.training.distributed import Processes


class Moments:
    """Running mean and covariance in float64, exact whatever the batches and their order.

    Batches are merged by their means and centred products (Chan, Golub and LeVeque, 1979), so that
    nothing cancels where a mean is large against its deviation.

    Args:
        size: of a feature vector.
        device: where the sums are kept; the CPU where float64 is missing.

    Attributes:
        count: vectors seen.
        mean: (size,) float64.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self._products = torch.zeros(size, size, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, count: int) -> Moments:
        """The moments that a file holds: mean (size,), covariance (size, size) with divisor
        count − 1."""
        moments = cls(len(mean))
        moments.count, moments.mean = count, mean.double()
        moments._products = covariance.double() * (count - 1)
        return moments

    @property
    def size(self) -> int:
        """Of a feature vector."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """(size, size) float64, with divisor count − 1 as in numpy.cov.

        Raises:
            ValueError: fewer than two vectors have been seen.
        """
        if self.count < 2:
            raise ValueError(f"the covariance of {self.count} vector(s) is not defined")
        return self._products / (self.count - 1)

    def add(self, features: Tensor) -> None:
        """Take in vectors (B, size)."""
        values = features.to(self.mean)
        mean = values.mean(dim=0)
        centred = values - mean
        self._merge(len(values), mean, centred.T @ centred)

    def gathered(self, processes: Processes) -> Moments:
        """The moments over all processes, in each of them."""
        counts = processes.gather_rows(torch.tensor([self.count]))
        means = processes.gather_rows(self.mean.cpu()[None])
        products = processes.gather_rows(self._products.cpu()[None])
        whole = Moments(self.size)
        for part in zip(counts.tolist(), means, products, strict=True):
            whole._merge(*part)
        return whole

    def _merge(self, count: int, mean: Tensor, products: Tensor) -> None:
        if not count:
            return
        total = self.count + count
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self._products += products
        self._products += torch.outer(shift, shift) * (self.count * count / total)
        self.count = total


def frechet_distance(first: Moments, second: Moments) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two Gaussians (Dowson and Landau, 1982).

    With Σ = A·Aᵀ the trace of the root is the sum of the singular values of A₁ᵀ·A₂. This needs no
    root of a product that is not symmetric, nothing complex, and no offset where a covariance is
    singular (the ADM suite adds 1e-6 to the diagonal there).

    Raises:
        ValueError: the vectors differ in size.
    """
    if first.size != second.size:
        raise ValueError(f"features of {first.size} and of {second.size} values do not compare")
    covariances = [moments.covariance.cpu() for moments in (first, second)]
    one, other = map(_factor, covariances)
    root = torch.linalg.svdvals(one.T @ other).sum()
    shift = (first.mean.cpu() - second.mean.cpu()).square().sum()
    traces = sum(covariance.trace() for covariance in covariances)
    # Rounding may leave −1e-13 for equal sets.
    return max(0.0, float(shift + traces - 2 * root))


def _factor(covariance: Tensor) -> Tensor:
    """A (size, rank) with A·Aᵀ = Σ."""
    values, vectors = torch.linalg.eigh(covariance)
    # What is smaller than the rounding of the largest is zero, of either sign, and its root is not.
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()
