"""Skellam and discrete Gaussian noise: the distribution that the sampler's tables define, and the one it draws.

Statistical tests have fixed entropy, and say what their false alarm would be for a random one.
"""

import math
import random
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.discrete_gaussian import discrete_gaussian
from scipy import stats
from support.integer_pmf import discrete_gaussian_log_pmf, skellam_log_pmf

from dp.errors import UnsupportedEvent
from dp.integer_noise import COLUMN_BITS, IntegerNoise, Mechanism, _debye_series, alias_table, log_weights
from secureagg.testing import CountingEntropy

COUNT = 2_000_000
MECHANISMS: tuple[Mechanism, ...] = ("skellam", "discrete gaussian")
both = pytest.mark.parametrize("mechanism", MECHANISMS)


def make(mechanism: Mechanism, deviation: float, seed: int | None = 0) -> IntegerNoise:
    """A source of noise with fixed entropy, or with the system's where ``seed`` is None."""
    options = {} if seed is None else {"entropy": CountingEntropy(seed)}
    return IntegerNoise(mechanism=mechanism, deviation=deviation, **options)


def exact_log_weights(mechanism: Mechanism, deviation: float, largest: int) -> list[Decimal]:
    """ln(w(k) / w(0)) for k = 0, ..., ``largest`` with 50 digits."""
    with localcontext(prec=50):
        if mechanism == "discrete gaussian":
            return [-((Decimal(k) / Decimal(deviation)) ** 2) / 2 for k in range(largest + 1)]
        variance, ratio, ratios = Decimal(deviation * deviation), Decimal(0), []
        for k in range(2 * largest + 100, 0, -1):
            ratio = 1 / (2 * k / variance + ratio)
            ratios.append(ratio)
        found = [Decimal(0)]
        for ratio in reversed(ratios[-largest:]):
            found.append(found[-1] + ratio.ln())
        return found


@cache
def log_pmf(mechanism: Mechanism, deviation: float) -> np.ndarray:
    """ln P of all integers up to 13 deviations from 0, in float64."""
    radius = int(13 * deviation) + 30
    if mechanism == "skellam":
        return skellam_log_pmf(deviation**2, radius)
    return discrete_gaussian_log_pmf(deviation, radius)


# The distribution that tables and thresholds define.


def test_bessel_functions_by_their_series() -> None:
    """The recurrence that this file judges by gives the Bessel functions' own series, in exact fractions."""
    variance = Fraction(9)

    def series(k: int) -> Fraction:
        return sum(
            ((variance / 2) ** (2 * i + k) / (math.factorial(i) * math.factorial(i + k)) for i in range(60)),
            Fraction(0),
        )

    found = exact_log_weights("skellam", 3.0, 40)
    for k in (1, 2, 7, 40):
        ratio = series(k) / series(0)
        with localcontext(prec=40):
            expected = (Decimal(ratio.numerator) / Decimal(ratio.denominator)).ln()
        assert abs(found[k] - expected) < Decimal("1e-30")


@both
@pytest.mark.parametrize("deviation", [3.0, 10.0, 63.9, 64.0, 100.3, 1000.0])
def test_the_tables_define_the_exact_distribution(mechanism: Mechanism, deviation: float) -> None:
    """Each integer is drawn with its probability to 2^-50 (1 + k^2 / S^2) and 2^-75 absolutely, as computed in integers
    from the alias table and the thresholds; what is beyond the table has less than 2^-65."""
    noise = make(mechanism, deviation)
    shares = [0] * (1 << COLUMN_BITS)
    for column, (threshold, alias) in enumerate(zip(noise._thresholds.tolist(), noise._aliases.tolist(), strict=True)):
        full = alias == column
        shares[column] += 2**64 if full else threshold
        shares[alias] += 0 if full else 2**64 - threshold
    assert sum(shares) == 2**75
    numbers = np.arange(-noise.largest, noise.largest)
    strips = (numbers >> noise._bits) + noise._half
    ratios = np.exp(noise._log_weights(numbers) - noise._log_highest[strips])
    kept = np.ceil(np.maximum(ratios, noise._surely[strips]).clip(max=1.0) * 2.0**53)
    drawn = [shares[strip] * int(chance) for strip, chance in zip(strips.tolist(), kept.tolist(), strict=True)]
    total = sum(drawn)

    expected = exact_log_weights(mechanism, deviation, 2 * noise.largest)
    with localcontext(prec=50):
        weights = [value.exp() for value in expected]
        norm = weights[0] + 2 * sum(weights[1:])
        assert 2 * sum(weights[noise.largest + 1 :]) + weights[noise.largest] < norm / 2**65
        for k, found in zip(numbers.tolist(), drawn, strict=True):
            probability = weights[abs(k)] / norm
            relative = Decimal(2.0**-50 * (1 + (k / deviation) ** 2))
            assert abs(Decimal(found) / Decimal(total) - probability) <= relative * probability + Decimal(2) ** -74


@both
def test_weights_of_wide_noise(mechanism: Mechanism) -> None:
    """Where a table of all integers would be too long to check, ln w is right to 2^-51 (1 + k^2 / S^2)."""
    noise = make(mechanism, 1e4)
    expected = exact_log_weights(mechanism, 1e4, noise.largest)
    numbers = np.unique(np.linspace(0, noise.largest, 3000).astype(np.int64))
    for sign in (1, -1):
        found = noise._log_weights(sign * numbers)
        for k, value in zip(numbers.tolist(), found.tolist(), strict=True):
            assert abs(Decimal(value) - expected[k]) <= Decimal(2.0**-51 * (1 + (k / 1e4) ** 2))


@pytest.mark.parametrize("variance", [60.0, 200.0, 1000.0])
def test_what_the_series_leaves_out(variance: float) -> None:
    """Where it can be seen, with less variance than the series is used for, the error is below r^-5 / 4 as stated."""
    expected = exact_log_weights("skellam", math.sqrt(variance), 100)
    k = np.arange(101.0)
    r = np.hypot(k, variance)
    series = _debye_series(r, k) - _debye_series(np.array(variance), np.array(0.0))
    found = (r - variance) - k * np.arcsinh(k / variance) - np.log(r / variance) / 2 + series
    error = np.abs(found - np.array([float(each) for each in expected]))
    assert np.all(error <= r**-5 / 4 + variance**-5 / 4 + 1e-13)
    assert variance > 100 or error.max() > 1e-12


@pytest.mark.parametrize("deviation", [1e5, 1e8, 2.0**50])
def test_wide_skellam_is_a_discrete_gaussian(deviation: float) -> None:
    """The wider, the closer: ln w of both differ by (x^2 + x^4) / m at x deviations, and by rounding."""
    numbers = np.linspace(-9 * deviation, 9 * deviation, 1001).astype(np.int64)
    square = (numbers / deviation) ** 2
    one, other = (log_weights(mechanism, deviation, int(9 * deviation))(numbers) for mechanism in MECHANISMS)
    assert np.all(np.abs(one - other) <= (square + square**2) / deviation**2 + 2.0**-50 * (1 + square))


@both
@pytest.mark.parametrize("deviation", [64.0, 1e4, 2.0**26, 1e12, 2.0**50])
def test_strips(mechanism: Mechanism, deviation: float) -> None:
    """At any scale the strips reach 9.5 deviations far and no number is kept with a chance below 0.7."""
    noise = make(mechanism, deviation)
    assert 9.5 * deviation < noise.largest < 10.1 * deviation
    assert 0.7 < noise._surely.min() <= noise._surely.max() <= 1
    assert deviation / 64 < 1 << noise._bits <= deviation / 32
    assert abs(noise.draw(10_000)).max() < 6 * deviation


@given(st.lists(st.floats(2.0**-60, 1.0), min_size=1, max_size=2048))
@settings(max_examples=40, deadline=None)
def test_the_alias_table_holds_the_weights(weights: list[float]) -> None:
    """Added up over the columns, each weight has its share of 2^75, to one part of that, the largest to 2^11."""
    thresholds, aliases = alias_table(np.array(weights))
    shares = [0] * 2048
    for column, (threshold, alias) in enumerate(zip(thresholds.tolist(), aliases.tolist(), strict=True)):
        shares[column] += threshold + (alias == column)
        shares[alias] += 2**64 - threshold - (alias == column)
    assert sum(shares) == 2**75
    total = sum(map(Fraction, weights))
    for share, weight in zip(shares, weights, strict=False):
        assert abs(share - 2**75 * Fraction(weight) / total) <= (1 if weight < max(weights) else 2048)
    assert not any(shares[len(weights) :])


# What is drawn.


def chi_square(draws: np.ndarray, edges: np.ndarray, mechanism: Mechanism, deviation: float) -> float:
    """p-value of the counts between ``edges`` (integers, each the first of its bin) against the exact probabilities."""
    probabilities = np.exp(log_pmf(mechanism, deviation))
    cumulative = np.concatenate([[0.0], np.cumsum(probabilities)])
    middle = len(probabilities) // 2
    expected = np.diff(np.concatenate([[0.0], cumulative[edges + middle], [1.0]])) * len(draws)
    counts = np.bincount(np.searchsorted(edges, draws, side="right"), minlength=len(expected))
    assert expected.min() > 10
    return float(stats.chisquare(counts, expected * len(draws) / expected.sum()).pvalue)


@both
@pytest.mark.parametrize(
    ("deviation", "step"), [(3.0, 1), (10.0, 1), (64.0, 1), (200.0, 1), (1e4, 100), (1e4, 137), (123456.7, 1001)]
)
def test_draws_have_the_exact_distribution(mechanism: Mechanism, deviation: float, step: int) -> None:
    """Chi-square over all values, or over bins finer than the strips and across them; false alarm 1e-6."""
    draws = make(mechanism, deviation, 1).draw(COUNT)
    assert draws.dtype == np.int64
    reach = int(math.sqrt(2 * math.log(COUNT * step / deviation / 150)) * deviation) // step  # where 60 draws fall
    edges = np.arange(-reach, reach + 1) * step
    assert chi_square(draws, edges, mechanism, deviation) > 1e-6


@pytest.mark.parametrize("deviation", [3, 10])
def test_as_the_oracle_draws(deviation: int) -> None:
    """The discrete Gaussian's draws and those of the exact sampler in fractions cannot be told apart; nor can the
    latter's and the probabilities that this file judges by; false alarms 1e-6 each."""
    below = random.Random(1).randrange  # noqa: S311
    theirs = np.array([discrete_gaussian(Fraction(deviation), below) for _ in range(20_000)])
    ours = make("discrete gaussian", float(deviation), 2).draw(20_000)
    edges = np.arange(-2 * deviation, 2 * deviation + 1)
    assert chi_square(theirs, edges, "discrete gaussian", float(deviation)) > 1e-6
    counts = [np.bincount(np.searchsorted(edges, each, side="right")) for each in (ours, theirs)]
    assert stats.chi2_contingency(np.array(counts)).pvalue > 1e-6


@both
@pytest.mark.parametrize("deviation", [1e4, 1e7, 2.0**40])
def test_wide_draws(mechanism: Mechanism, deviation: float) -> None:
    """Wide noise is normal to the eye of Kolmogorov and Smirnov, of the right variance, and its last 8 bits are
    uniform; false alarms 1e-6 each."""
    draws = make(mechanism, deviation, 3).draw(COUNT)
    assert stats.kstest((draws + 0.5) / deviation, "norm").pvalue > 1e-6
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], COUNT)
    assert low < float((draws.astype(np.float64) ** 2).sum()) / deviation**2 < high
    assert abs(float(draws.mean())) < 5 * deviation / math.sqrt(COUNT)
    assert stats.chisquare(np.bincount(draws % 256, minlength=256)).pvalue > 1e-6


def test_skellam_is_closed_under_sums() -> None:
    """Sums of three sites' Skellam noise have the distribution of one with their summed variance; false alarm 1e-6."""
    total = sum(make("skellam", 4.0, seed).draw(COUNT) for seed in (4, 5, 6))
    assert chi_square(total, np.arange(-28, 29), "skellam", math.sqrt(48)) > 1e-6


@both
def test_draws_are_independent(mechanism: Mechanism) -> None:
    """Successive draws, and those of two sites, are uncorrelated in values and magnitudes; 5 standard errors."""
    one, other = make(mechanism, 1e4, 7), make(mechanism, 1e4, 8)
    first, second, theirs = one.draw(COUNT), one.draw(COUNT), other.draw(COUNT)
    for a, b in ((first, second), (first, theirs), (second[1:], second[:-1])):
        for x, y in ((a, b), (np.abs(a), np.abs(b))):
            assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(len(a))


@both
def test_entropy_decides(mechanism: Mechanism) -> None:
    """The same entropy gives the same draws, other entropy and the system's give others; any count is possible."""
    first = make(mechanism, 1e4, 9).draw(40_000)
    assert np.array_equal(make(mechanism, 1e4, 9).draw(40_000), first)
    for seed in (10, None, None):
        assert np.mean(make(mechanism, 1e4, seed).draw(40_000) == first) < 0.01
    assert make(mechanism, 1e4).draw(0).shape == (0,)


@both
@pytest.mark.parametrize("wrong", [2.99, 0.0, -5.0, math.nan, math.inf, 2.0**51])
def test_noise_that_is_none_is_refused(mechanism: Mechanism, wrong: float) -> None:
    """A deviation below 3, beyond 2^50 or that is no number is refused, with what is expected."""
    with pytest.raises(UnsupportedEvent, match=r"found deviation .*, expected 3 to 1\.1259e\+15"):
        make(mechanism, wrong)


def test_another_mechanism_is_refused() -> None:
    """A mechanism by another name is refused rather than taken for one of the two."""
    with pytest.raises(UnsupportedEvent, match="found mechanism 'gaussian', expected skellam or discrete gaussian"):
        make("gaussian", 10.0)  # type: ignore[arg-type]
