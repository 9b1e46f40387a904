"""The Fréchet distance against closed forms, and intervals."""

import math

import pytest
import torch

from common.evaluation.frechet import FeatureStatistics, bootstrap_interval, gaussian_distance, statistics_distance


def normal(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_rotation(dim: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(dim, dim, seed))[0]


def with_moments(count: int, mean: torch.Tensor, covariance: torch.Tensor, seed: int) -> torch.Tensor:
    """Samples whose own mean and covariance are exactly these."""
    white = normal(count, len(mean), seed)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / (count - 1))).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def distance_of(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    return statistics_distance(FeatureStatistics.of(features_a), FeatureStatistics.of(features_b))


def test_one_dimension_is_the_difference_of_means_and_of_deviations():
    mean_a, mean_b = torch.tensor([1.5]), torch.tensor([-2.0])
    distance = gaussian_distance(mean_a, torch.tensor([[4.0]]), mean_b, torch.tensor([[9.0]]))
    assert distance == pytest.approx(3.5**2 + (2 - 3) ** 2, abs=1e-12)


def test_commuting_covariances_have_a_closed_form():
    rotation = random_rotation(7, 0)
    a, b = torch.linspace(0.1, 4, 7, dtype=torch.float64), torch.linspace(3, 0.2, 7, dtype=torch.float64)
    shift = normal(1, 7, 1)[0]
    distance = gaussian_distance(shift, (rotation * a) @ rotation.T, torch.zeros(7), (rotation * b) @ rotation.T)
    assert distance == pytest.approx((shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item(), abs=1e-10)


def test_two_dimensions_that_do_not_commute():
    """For 2×2, tr (AB)^½ = √(tr AB + 2 √(det A det B))."""
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, -0.4], [-0.4, 3.0]], dtype=torch.float64)
    cross = math.sqrt((a @ b).trace() + 2 * math.sqrt(torch.linalg.det(a) * torch.linalg.det(b)))
    expected = (a.trace() + b.trace()).item() - 2 * cross
    zero = torch.zeros(2, dtype=torch.float64)
    assert gaussian_distance(zero, a, zero, b) == pytest.approx(expected, abs=1e-12)
    assert gaussian_distance(zero, b, zero, a) == pytest.approx(expected, abs=1e-12)
    samples = [with_moments(50, zero, covariance, seed) for seed, covariance in enumerate((a, b))]
    assert distance_of(*samples) == pytest.approx(expected, abs=1e-10)


def test_a_set_is_at_no_distance_from_itself_even_without_full_rank():
    few = normal(5, 64, 0)  # 5 samples span 4 of 64 dimensions
    assert distance_of(few, few) == pytest.approx(0.0, abs=1e-6)
    flat = few * 0
    assert distance_of(flat, flat + 2) == pytest.approx(4 * 64, abs=1e-9)


def test_running_moments_equal_those_of_the_whole_far_from_zero():
    features = normal(1000, 6, 3) @ normal(6, 6, 4) + 1e6  # sums of squares would lose eight digits here
    running = FeatureStatistics(6)
    for piece in (*features[:600].split(37), features[:0], *features[600:].split(1)):
        running.update(piece)
    assert running.count == 1000
    torch.testing.assert_close(running.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(running.covariance, features.T.cov(), rtol=1e-8, atol=1e-8)
    assert statistics_distance(running, FeatureStatistics.of(features)) < 1e-7


def test_wrong_features_are_refused():
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match=r"\[2, 4\]; \[n, 3\]"):
        statistics.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="at least 2 samples, there is 1"):
        distance_of(torch.zeros(1, 3), torch.zeros(5, 3))


def test_interval_holds_the_truth_as_often_as_it_says():
    """Bootstrap of a mean: nearly 95 of 100 intervals hold the mean of the distribution."""
    held = 0
    for seed in range(100):
        sample = normal(60, 1, 100 + seed)[:, 0]
        interval = bootstrap_interval(lambda rows, s=sample: s[rows].mean().item(), 60, num_draws=300, seed=seed)
        assert interval.value == sample.mean().item()
        held += interval.low < 0 < interval.high
    assert 88 <= held <= 99


def test_interval_of_a_distance_holds_the_distance():
    reference = FeatureStatistics.of(normal(5000, 5, 10))
    features = normal(300, 5, 11) + 1.0

    def distance(rows: torch.Tensor) -> float:
        return statistics_distance(FeatureStatistics.of(features[rows]), reference)

    interval = bootstrap_interval(distance, len(features), num_draws=100)
    assert interval.low < interval.value < interval.high
    assert interval.low < 5.0 < interval.high and interval.high - interval.low < 2
