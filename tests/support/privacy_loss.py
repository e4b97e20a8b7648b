"""Epsilon computed once more, from the definitions and by plain numerical integration, to judge accountants by.

Nothing here uses an accounting library.  One step on neighbouring data sets gives N(0, z^2) without the patient and
the mixture (1 - q) N(0, z^2) + q N(1, z^2) with them, in units of the clip norm.  The mixture against the plain normal
is the worse of the two directions at every epsilon of 0 or more.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, logsumexp, ndtr

from dp.events import PoissonSampledGaussian

CELLS = 2**18


def renyi_divergence(q: float, z: float, order: float) -> float:
    """Renyi divergence of the mixture from the normal by the trapezoid rule, which is exact to rounding for such
    integrands."""
    step = min(z, z * z) / 4
    x = np.arange(-12 * z, order + 12 * z, step)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * z * z)) if q < 1 else (x - 0.5) / z**2
    moment = logsumexp(order * log_ratio - x * x / (2 * z * z)) + math.log(step / (z * math.sqrt(2 * math.pi)))
    return float(moment) / (order - 1)


def epsilon_by_divergences(
    q: float, z: float, steps: int, delta: float, *, orders: Sequence[float], conversion: str
) -> float:
    """The least epsilon over ``orders``; ``conversion``: "Mironov 2017" (proposition 3) or "Canonne 2020"
    (proposition 12)."""

    def bound(order: float) -> float:
        total = steps * renyi_divergence(q, z, order)
        if conversion == "Mironov 2017":
            return total - math.log(delta) / (order - 1)
        return total + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)

    return min(map(bound, orders))


@cache
def exact_epsilon(events: tuple[PoissonSampledGaussian, ...], delta: float, *, largest: float) -> float:
    """Epsilon from the composed distribution of the privacy loss on a grid from ``-largest`` to ``largest``."""
    mesh = 2 * largest / CELLS
    spectrum = np.ones(CELLS // 2 + 1, dtype=np.complex128)
    losses = mesh * np.fft.fftfreq(CELLS, 1 / CELLS)  # 0, mesh, ..., and then the negative ones
    shift = 0.0
    for event in events:
        mass = _distribution(event, losses + mesh / 2) - _distribution(event, losses - mesh / 2)
        spectrum *= np.fft.rfft(mass) ** event.steps
        # What the middles of the cells get wrong of the mean would add up over the steps.
        shift += event.steps * (_mean(event) - mass @ losses)
    composed = np.fft.irfft(spectrum, CELLS)
    assert abs(composed.sum() - 1) < 1e-9
    losses += shift

    def excess(epsilon: float) -> float:
        above = losses > epsilon
        return float(composed[above] @ -np.expm1(epsilon - losses[above])) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, largest - mesh, xtol=1e-9))


def _mean(event: PoissonSampledGaussian) -> float:
    """Mean of one step's privacy loss under the mixture."""
    q, z = event.sampling_rate, event.noise_multiplier
    x, step = np.linspace(-12 * z, 1 + 12 * z, 200_001, retstep=True)
    log_ratio = np.log1p(q * np.expm1((x - 0.5) / z**2))
    return float(np.exp(log_ratio - x * x / (2 * z * z)) @ log_ratio) * step / (z * math.sqrt(2 * math.pi))


def _distribution(event: PoissonSampledGaussian, losses: np.ndarray) -> np.ndarray:
    """Probability that one step's privacy loss under the mixture is at most each of ``losses``."""
    q, z = event.sampling_rate, event.noise_multiplier
    with np.errstate(divide="ignore", invalid="ignore"):
        x = z * z * np.log((np.expm1(losses) + q) / q) + 0.5
    x = np.where(np.expm1(losses) + q > 0, x, -np.inf)
    return (1 - q) * ndtr(x / z) + q * ndtr((x - 1) / z)


def gaussian_delta(epsilon: float, deviation: float) -> float:
    """The exact delta of the Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, theorem 8)."""
    low, high = -epsilon * deviation - 0.5 / deviation, -epsilon * deviation + 0.5 / deviation
    return float(ndtr(high) - math.exp(epsilon + log_ndtr(low)))


def gaussian_epsilon(deviation: float, delta: float) -> float:
    """The exact epsilon of the Gaussian mechanism of sensitivity 1."""
    if gaussian_delta(0.0, deviation) <= delta:
        return 0.0
    highest = 0.5 / deviation**2 + 40 / deviation
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, deviation) - delta, 0.0, highest, xtol=1e-12))
