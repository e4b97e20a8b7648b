"""Noise from a CSPRNG."""

import numpy as np
import torch
from scipy import stats

from dp.noise import GaussianNoise, csprng
from secureagg.testing import CountingEntropy

COUNT = 200_000


def test_global_seeds_do_not_matter() -> None:
    """Two sites that set the same seeds, as careful engineers do, still draw different noise."""
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        draws.append(GaussianNoise().draw((100,), deviation=1.0))
    assert not np.intersect1d(*draws).size


def test_injected_entropy_repeats() -> None:
    """The same entropy gives the same draws, other entropy others."""
    one, same, other = (GaussianNoise(CountingEntropy(seed)).draw((9,), deviation=1.0) for seed in (1, 1, 2))
    assert (one == same).all()
    assert not (one == other).any()


def test_distribution() -> None:
    """200,000 fixed draws are normal with the given deviation: Kolmogorov-Smirnov and chi-square of the variance, false
    alarms below 1e-6 each."""
    draws = GaussianNoise(CountingEntropy(3)).draw((COUNT,), deviation=2.5)
    assert stats.kstest(draws / 2.5, "norm").pvalue > 1e-6
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], COUNT)
    assert low < (draws**2).sum() / 2.5**2 < high
    assert abs(draws.mean()) < 5 * 2.5 / np.sqrt(COUNT)


def test_draws_are_independent() -> None:
    """Neighbouring draws, and those of two instances, are uncorrelated to within 5 standard errors (below 1e-6)."""
    one, other = (GaussianNoise(CountingEntropy(seed)).draw((COUNT,), deviation=1.0) for seed in (4, 5))
    for first, second in ((one, other), (one[:-1], one[1:])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(COUNT)


def test_shape_and_scale() -> None:
    """Draws have the shape asked for, are float64, and a deviation of 0 is no noise."""
    draws = GaussianNoise().draw((2, 3), deviation=1.0)
    assert (draws.shape, draws.dtype) == ((2, 3), np.float64)
    assert not GaussianNoise().draw((4,), deviation=0.0).any()


def test_coins_are_fair() -> None:
    """A sampling coin of rate q falls q of the time, within 5 standard deviations (below 1e-6)."""
    hits = int((csprng(CountingEntropy(6)).random(COUNT) < 0.3).sum())
    assert abs(hits - 0.3 * COUNT) < 5 * np.sqrt(COUNT * 0.21)


def test_one_draw_is_a_sum_of_four() -> None:
    """No draw is a single normal of the generator: it is the sum of four, divided by 2."""
    single = csprng(CountingEntropy(7))
    parts = [single.standard_normal((5,)) for _ in range(4)]
    np.testing.assert_allclose(GaussianNoise(CountingEntropy(7)).draw((5,), deviation=1.0), sum(parts) / 2, rtol=1e-12)
