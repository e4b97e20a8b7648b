"""Integer noise from the definitions: logarithms of probabilities, and Renyi divergences added up point by point."""

import numpy as np
from scipy.special import logsumexp


def skellam_log_pmf(variance: float, radius: int) -> np.ndarray:
    """ln P of -radius, ..., radius: modified Bessel functions of the first kind, from their ratios, which
    I_{k-1} - I_{k+1} = (2 k / m) I_k gives downwards from any far start (Miller's algorithm)."""
    ratio, ratios = 0.0, np.empty(radius)
    for k in range(2 * radius + 100, 0, -1):
        ratio = 1 / (2 * k / variance + ratio)  # I_k / I_{k-1}
        if k <= radius:
            ratios[k - 1] = ratio
    falling = np.cumsum(np.log(ratios))
    weights = np.concatenate([falling[::-1], [0.0], falling])
    return weights - logsumexp(weights)


def discrete_gaussian_log_pmf(deviation: float, radius: int) -> np.ndarray:
    """ln P of -radius, ..., radius: proportional to exp(-k^2 / 2 S^2)."""
    weights = -(np.arange(-radius, radius + 1) ** 2) / (2 * deviation**2)
    return weights - logsumexp(weights)


def sum_of_discrete_gaussians_log_pmf(deviation: float, parties: int) -> np.ndarray:
    """ln P of the sum of so many, as far as it is above 1e-290, by one convolution after the other."""
    one = np.exp(discrete_gaussian_log_pmf(deviation, int(30 * deviation) + 1))
    total = one
    for _ in range(parties - 1):
        total = np.convolve(total, one)
        total = total[total > 1e-290]
    return np.log(total)


def renyi(log_p: np.ndarray, log_q: np.ndarray, order: float) -> float:
    """D_order(P || Q)."""
    return float(logsumexp(order * log_p + (1 - order) * log_q)) / (order - 1)


def neighbours(log_pmf: np.ndarray, shift: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Without the unit, and with it at this sampling rate where it moves the sum by ``shift``, on the common points."""
    without, moved = log_pmf[shift:], log_pmf[: len(log_pmf) - shift]
    if rate == 1:
        return without, moved
    return without, np.logaddexp(np.log1p(-rate) + without, np.log(rate) + moved)
