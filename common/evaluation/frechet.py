"""The Fréchet distance between two sets of features, and bootstrap intervals.

    d² = |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)

is the squared Wasserstein-2 distance between Gaussians of these moments (Dowson and Landau 1982), used for images by
Heusel et al., arXiv 1706.08500 ("FID"), and for video by Unterthiner et al., arXiv 1812.01717. From n samples it comes
out too large, by about 1/n times a constant that depends on the features (Chong and Forsyth, arXiv 1911.07023): true
video compared with true video of the same n gives that floor. Most of it is the luck of which scenes are in a set: on
the mini world 200 segments lie 2 to 4 from a reference of other scenes, and 0.3 from true video of the same captions
with other drives. Compare with a reference of the same captions.

Everything is float64. Shapes: n samples, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class FeatureStatistics:
    """Count, mean and covariance of features that come in pieces; memory does not grow with their number.

    Sums are kept relative to the running mean (Chan, Golub and LeVeque 1983), so a long stream loses no digits.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)  # [D]
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # Σ (x − mean)(x − mean)ᵀ

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features [n, D]."""
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    def update(self, features: Tensor) -> None:
        """Adds features [n, D] of any float type, from any device.

        Raises:
            ValueError: for another width, or values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features are {list(features.shape)}; [n, {len(self.mean)}] is needed")
        values = features.detach().to("cpu", torch.float64)
        if not values.isfinite().all():
            raise ValueError("features hold values that are not finite")
        if not len(values):
            return
        count, mean = len(values), values.mean(0)
        total, centred, change = self.count + count, values - mean, mean - self.mean
        scatter = self._scatter + centred.T @ centred
        self._scatter = scatter + torch.outer(change, change) * (self.count * count / total)
        self.mean = self.mean + change * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[D, D], divided by n − 1.

        Raises:
            ValueError: below two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, there is {self.count}")
        return self._scatter / (self.count - 1)


def gaussian_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """d² of two Gaussians: means [D], covariances [D, D].

    tr (Σ_a Σ_b)^½ is the sum of the roots of the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which is symmetric: no complex
    numbers, and a covariance without full rank does no harm.
    """
    values, vectors = torch.linalg.eigh(covariance_a.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ covariance_b.double() @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    apart = (mean_a.double() - mean_b.double()).square().sum()
    distance = apart + covariance_a.double().trace() + covariance_b.double().trace() - 2 * cross
    return max(distance.item(), 0.0)  # equal sets give a rounding error of either sign


def statistics_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """d² of two sets that were accumulated."""
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


@dataclass(frozen=True)
class Interval:
    """A value with the interval it lies in."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[[Tensor], float], num_samples: int, num_draws: int = 200, seed: int = 0
) -> Interval:
    """The 95 % interval of any statistic of samples, by drawing the samples again with replacement (Efron 1979).

    `statistic` takes row numbers int64 [n] (with repeats) and returns a number. Samples have to be independent: give
    videos, not their segments.

    A set drawn with repeats has less variety than the one it is from, which raises a Fréchet distance: the interval is
    the spread of the draws about their own mean, put around the statistic of the samples themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    value = float(statistic(torch.arange(num_samples)))
    draws = torch.empty(num_draws, dtype=torch.float64)
    for i in range(num_draws):
        draws[i] = float(statistic(torch.randint(num_samples, (num_samples,), generator=generator)))
    low, high = (draws - draws.mean()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, value + low, value + high)
