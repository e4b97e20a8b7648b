"""Renyi divergences of integer noise, and what Poisson sampling makes of any of them.

Neighbouring sums are integer vectors a and b with |a - b|_2 <= D2 and |a - b|_1 <= D1; the noise has independent
coordinates.  Bounds are on D_order(a + noise || b + noise) and hold for whole orders above 1.

- **Skellam** noise of variance m (Agarwal, Kairouz, Liu, NeurIPS 2021): close to the Gaussian's order
  D2^2 / 2 m where D2 and m are large, and closed under sums.
- **Sums of n discrete Gaussians** of parameter S each: in every point within a factor e^t, t = 10 sum_{k=1}^{n-1}
  exp(-2 pi^2 S^2 k / (k + 1)), of the discrete Gaussian of parameter sqrt(n) S (Kairouz, Liu, Steinke, ICML 2021),
  whose divergence is order D2^2 / (2 n S^2) (Canonne, Kamath, Steinke, NeurIPS 2020).  From
  E_Q[(P/Q)^order], with each P up to a factor e^t larger and each Q as much smaller, t (2 order - 1) / (order - 1) per
  coordinate is to be added, at most 3 t.  (The paper shows t; at S = 3 either is below 10^-36.)
- **Poisson sampling** with rate q turns a pair (P, Q) into P and the mixture (1 - q) P + q Q.  The divergence of the
  mixture from P is a binomial sum of those of Q from P, exactly (Zhu, Wang, ICML 2019).  That of P from
  the mixture is no larger: the noise is symmetric and Q is P moved by the integer vector v, so that x -> v - x swaps P
  and Q and keeps volumes (Mironov, Talwar, Zhang 2019, theorem 5).  Stochastic rounding does not change this: given the
  coins of the rounding and of all other units, the two sums are fixed integer vectors, and the divergence of the
  mixtures over these coins is no larger than the largest of them (quasi-convexity).
- **Fractional orders**: (order - 1) D_order is convex in the order and D_order grows with it, hence the line between
  the next whole orders is a bound, and below 2 that of order 2 is one.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_RELATIVE_ROUNDING = 1e-9  # of the binomial sum; float64 loses some 1e-11 at order 16,384


def skellam(orders: Floats, *, l2: float, l1: float, variance: float) -> Floats:
    """Bound for Skellam noise of this variance at whole ``orders`` above 1, for sensitivities ``l2`` and ``l1``."""
    close = ((2 * orders - 1) * l2 / variance * l2 + 6 * l1 / variance) / (4 * variance)
    return orders * (l2 / variance * l2) / 2 + np.minimum(close, 1.5 * l1 / variance)


def discrete_gaussian(orders: Floats, *, l2: float, local_deviation: float, parties: int, dimensions: int) -> Floats:
    """Bound for the sum of ``parties`` discrete Gaussians in ``dimensions`` coordinates at ``orders`` above 1."""
    ratio = l2 / local_deviation
    apart = sum_ratio(local_deviation, parties)
    return orders * ratio * ratio / (2 * parties) + dimensions * apart * (2 * orders - 1) / (orders - 1)


def sum_ratio(local_deviation: float, parties: int) -> float:
    """t: the most by which the logarithm of the probability of a value differs between the sum of ``parties`` discrete
    Gaussians of parameter ``local_deviation``, at least 1/2, and one discrete Gaussian of their summed variance."""
    decay = 2 * math.pi**2 * local_deviation * local_deviation
    # Past these terms, the rest is (parties - 1 - terms) times at most exp(-decay terms / (terms + 1)).
    terms = min(parties - 1, 1000)
    first = sum(math.exp(-decay * k / (k + 1)) for k in range(1, terms + 1))
    return 10 * (first + (parties - 1 - terms) * math.exp(-decay * terms / (terms + 1)))


def poisson_sampled(curve: Callable[[Floats], Floats], sampling_rate: float, order: int) -> float:
    """The divergence of ``order`` of a mechanism with the divergences ``curve`` (whole orders above 1, of symmetric
    noise) when each unit takes part with probability ``sampling_rate``; never more than without sampling."""
    orders = np.arange(2.0, order + 1)
    divergences = curve(orders)
    plain = float(divergences[-1])
    if sampling_rate == 1:
        return plain
    # ln C(order, j) for j = 2, ..., order
    choices = np.cumsum(np.log((order + 1 - np.arange(1.0, order + 1)) / np.arange(1.0, order + 1)))[1:]
    weights = choices + (order - orders) * math.log1p(-sampling_rate) + orders * math.log(sampling_rate)
    exponents = (orders - 1) * divergences
    # The weights of 0, 1, ..., order add up to 1, and the terms of 0 and 1 have exponent 0: what is beyond 1 is a sum
    # of positive terms, in which no digits cancel.
    terms = weights + exponents + np.log(-np.expm1(-exponents))
    largest = float(terms.max())
    beyond = largest + math.log(float(np.exp(terms - largest).sum()))
    moment = beyond + math.log1p(math.exp(-beyond)) if beyond > 0 else math.log1p(math.exp(beyond))
    return min(plain, moment / (order - 1) * (1 + _RELATIVE_ROUNDING))
