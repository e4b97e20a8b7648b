"""The exact sampler of the discrete Gaussian (Canonne, Kamath, Steinke, NeurIPS 2020, algorithms 1 to 3).

Rational arithmetic and fair integers only, so that it has exactly the distribution that the theorem is about; slow.
"""

from collections.abc import Callable
from fractions import Fraction

Below = Callable[[int], int]  # a uniform integer from 0 up to, not including, its argument


def bernoulli(probability: Fraction, below: Below) -> bool:
    """True with this probability."""
    return below(probability.denominator) < probability.numerator


def bernoulli_exp(gamma: Fraction, below: Below) -> bool:
    """True with probability exp(-gamma) (algorithm 1)."""
    while gamma > 1:
        if not bernoulli_exp(Fraction(1), below):
            return False
        gamma -= 1
    k = 1
    while bernoulli(gamma / k, below):
        k += 1
    return k % 2 == 1


def discrete_laplace(scale: int, below: Below) -> int:
    """k with probability proportional to exp(-|k| / scale) (algorithm 2)."""
    while True:
        remainder = below(scale)
        if not bernoulli_exp(Fraction(remainder, scale), below):
            continue
        whole = 0
        while bernoulli_exp(Fraction(1), below):
            whole += 1
        negative, magnitude = bernoulli(Fraction(1, 2), below), remainder + scale * whole
        if not (negative and magnitude == 0):
            return -magnitude if negative else magnitude


def discrete_gaussian(deviation: Fraction, below: Below) -> int:
    """k with probability proportional to exp(-k^2 / 2 deviation^2) (algorithm 3)."""
    scale = int(deviation) + 1
    while True:
        k = discrete_laplace(scale, below)
        if bernoulli_exp((abs(k) - deviation**2 / scale) ** 2 / (2 * deviation**2), below):
            return k
