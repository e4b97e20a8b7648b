"""Integer noise from a CSPRNG: Skellam and discrete Gaussian, by rejection from a table of strips.

Noise that goes into the ring before the sum is masked must be integers, and as exact as what the accountant assumes.

**Why not numpy's Poisson.**  A Skellam number of variance m is the difference of two Poisson numbers of mean m / 2.
numpy decides whether to take a candidate k from k ln(m) - ln(k!) - m in float64.  That cancels: at deviation 10^4 its
exponential is off by up to 2 parts in 10^7, at 10^7, a common value in a 32-bit ring, by a third, at 10^8 by anything.
It also takes longer than what follows.

**The method.**  Let w(k) be the probability up to a factor; it is even and falls with |k|.  The integers from -R to
R - 1 are cut into strips of W = 2^b integers, W at most S / 32 (S: the deviation).

1. A strip is drawn with probability proportional to h, the largest w in it, at its end next to 0: by Walker's
   alias table of 2^11 columns, made in exact integer arithmetic, and 11 + 64 random bits.
2. A place in the strip is drawn from b random bits.  So far, k has probability proportional to the h of its strip.
3. k is kept if a uniform u of 53 bits is below w(k) / h, which is at least 0.7; otherwise all is drawn again.  Mostly u
   is below the least w / h of the strip, which the table has, and w need not be computed.

Below S = 64 a strip is one integer, and nothing is rejected.  Nothing depends on what was drawn before, or on secrets
other than the noise.

**How exact.**  Three things differ from the theorem's distribution.

- Beyond R there is nothing.  R = L/3 + sqrt(L^2/9 + 2 S^2 L), L = 66 ln 2, so that less than 2^-65 is missing: the
  Chernoff bound of variables whose cumulants are at most those of two Poisson variables (Bernstein's inequality).
- The table's probabilities are multiples of 2^-75: together at most 2^-64 off.
- w is computed in float64.  The discrete Gaussian's logarithm is -k^2 / 2 S^2, whose rounding is below (1 + k^2 / S^2)
  2^-52.  Skellam's is that of exp(-m) I_k(m).  With r = sqrt(k^2 + m^2) it is, up to a constant,

      r - m - k asinh(k / m) - ln(r) / 2 + ln(1 + U1 / k + U2 / k^2 + U3 / k^3 + U4 / k^4),

  Debye's expansion (DLMF 10.41.3 and 10.41.10); divided by the powers of k, the U are polynomials in 1 / r without any
  singularity.  r - m = k^2 / (r + m) cancels nothing, and what is left out is below r^-5 / 4, 2^-62 as m is 4096 or
  more.  Below, where a strip is one integer, I_k comes from its recurrence with 40 decimal digits.

So but for an event of probability 2^-63 per number, ln of the probability of k is right to (1 + k^2 / S^2) 2^-50.  The
privacy loss of N numbers is then right to about N 2^-49: 2 parts in 10^5 for ten billion.  The tests compute the
distribution that the table and the thresholds define, and compare it with the exact one.

Not covered: the time that rejection takes depends on what is rejected, which a process on the same machine might see.
"""

import math
import os
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from dp.errors import UnsupportedEvent
from dp.events import LEAST_LOCAL_DEVIATION
from dp.noise import csprng

Mechanism = Literal["skellam", "discrete gaussian"]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

LARGEST_DEVIATION: Final = 2.0**50  # the table's and the strips' bits then fit one word of 64
COLUMN_BITS: Final = 11
_COLUMNS: Final = 1 << COLUMN_BITS
_CAPACITY: Final = 1 << 64  # of a column, so that all together hold 2^75
_STRIPS_PER_DEVIATION: Final = 32
_TAIL_LOG: Final = 66 * math.log(2)
_BLOCK: Final = 1 << 14  # numbers at a time: their words and the table stay in the processor's cache


class IntegerNoise:
    """Independent integers of mean 0 from one ``mechanism``, any number of them, from a key of its own.

    ``deviation``: S, from 3 to 2^50: for "skellam" the standard deviation, for "discrete gaussian" the parameter, from
    which the standard deviation differs by less than 1 part in 10^70.  Attribute ``largest``: a bound on all draws.
    Raises UnsupportedEvent for another mechanism or deviation.
    """

    def __init__(
        self, *, mechanism: Mechanism = "skellam", deviation: float, entropy: Callable[[int], bytes] = os.urandom
    ) -> None:
        if mechanism not in get_args(Mechanism):
            raise UnsupportedEvent(f"noise: found mechanism {mechanism!r}, expected {' or '.join(get_args(Mechanism))}")
        # Stops noise that is no noise; a NaN fails both comparisons.
        if not LEAST_LOCAL_DEVIATION <= deviation <= LARGEST_DEVIATION:
            raise UnsupportedEvent(
                f"noise: found deviation {deviation}, expected {LEAST_LOCAL_DEVIATION:g} to {LARGEST_DEVIATION:g}"
            )
        self.mechanism, self.deviation = mechanism, deviation
        self._bits = max(0, math.frexp(deviation / _STRIPS_PER_DEVIATION)[1] - 1)
        width = 1 << self._bits
        reach = _TAIL_LOG / 3 + math.sqrt(_TAIL_LOG**2 / 9 + 2 * _TAIL_LOG * deviation**2)
        self._half = math.ceil(reach / width)
        self.largest = self._half * width
        self._log_weights = log_weights(mechanism, deviation, self.largest)
        first = np.arange(-self._half, self._half) << self._bits
        last = first + (width - 1)
        self._log_highest = self._log_weights(np.where(first < 0, last, first))
        self._surely = np.exp(self._log_weights(np.where(first < 0, first, last)) - self._log_highest)
        self._thresholds, self._aliases = alias_table(np.exp(self._log_highest))
        self._generator = csprng(entropy)

    def draw(self, count: int) -> Integers:
        """``count`` fresh numbers."""
        drawn, done = np.empty(count, np.int64), 0
        while done < count:
            kept = self._attempt(min(_BLOCK, count - done))
            drawn[done : done + len(kept)] = kept
            done += len(kept)
        return drawn

    def _attempt(self, count: int) -> Integers:
        """At most ``count`` numbers: those of so many attempts that are kept."""
        words = self._generator.bit_generator.random_raw
        places, chances = words(count), words(count)
        columns = (places & np.uint64(_COLUMNS - 1)).view(np.int64)
        strips = np.where(chances < self._thresholds[columns], columns, self._aliases[columns])
        if self._bits == 0:
            return strips - self._half
        places >>= np.uint64(COLUMN_BITS)
        places &= np.uint64((1 << self._bits) - 1)
        numbers = ((strips - self._half) << self._bits) + places.view(np.int64)
        uniform = self._generator.random(count)
        unsure = np.flatnonzero(uniform >= self._surely[strips])
        ratios = np.exp(self._log_weights(numbers[unsure]) - self._log_highest[strips[unsure]])
        return np.delete(numbers, unsure[uniform[unsure] >= ratios])


def log_weights(mechanism: Mechanism, deviation: float, largest: int) -> Callable[[Integers], Floats]:
    """ln(w(k) / w(0)) of integers k up to ``largest`` in magnitude, right to (1 + k^2 / S^2) 2^-51."""
    if mechanism == "discrete gaussian":
        return lambda numbers: -0.5 * (numbers / deviation) ** 2
    variance = deviation * deviation
    if deviation < 2 * _STRIPS_PER_DEVIATION:
        table = _bessel_by_recurrence(variance, largest)
        return lambda numbers: table[np.abs(numbers)]
    at_zero = _debye_series(np.array(variance), np.array(0.0))

    def bessel(numbers: Integers) -> Floats:
        k = np.abs(numbers).astype(np.float64)
        x = k / variance
        r = variance * np.sqrt(1 + x * x)
        exponent = k * (k / (r + variance) - np.arcsinh(x))
        ratio: Floats = exponent - np.log1p(x * x) / 4 + (_debye_series(r, k) - at_zero)
        return ratio

    return bessel


def _debye_series(r: Floats, k: Floats) -> Floats:
    """ln(1 + U1 / k + ... + U4 / k^4) of DLMF 10.41.10, with p = k / r and each U_j / k^j = r^-j times a polynomial in
    p^2."""
    p = (k / r) ** 2
    u1 = (3 - 5 * p) / 24
    u2 = (81 - 462 * p + 385 * p**2) / 1152
    u3 = (30375 - 369603 * p + 765765 * p**2 - 425425 * p**3) / 414720
    u4 = (4465125 - 94121676 * p + 349922430 * p**2 - 446185740 * p**3 + 185910725 * p**4) / 39813120
    series: Floats = np.log1p((u1 + (u2 + (u3 + u4 / r) / r) / r) / r)
    return series


def _bessel_by_recurrence(variance: float, largest: int) -> Floats:
    """ln(I_k(m) / I_0(m)) for k = 0, ..., ``largest``, from I_{k-1} = (2 k / m) I_k + I_{k+1} downwards, which forgets
    where it began (Miller; DLMF 3.6)."""
    with localcontext(prec=40):
        m, ratio = Decimal(variance), Decimal(0)
        ratios: list[Decimal] = []
        for k in range(2 * largest + 50, 0, -1):
            ratio = 1 / (2 * k / m + ratio)  # I_k / I_{k-1}
            if k <= largest:
                ratios.append(ratio)
        value, values = Decimal(0), [0.0]
        for ratio in reversed(ratios):
            value += ratio.ln()
            values.append(float(value))
    return np.array(values)


def alias_table(weights: Floats) -> tuple[npt.NDArray[np.uint64], Integers]:
    """Walker's table for positive ``weights`` of at most 1: column i stands for i with probability threshold / 2^64,
    otherwise for its alias.

    In integers (Vose 1991): the weights become shares of 2^75 that add up exactly, and columns of 2^64 are filled by
    taking what one lacks from another that has too much.
    """
    exact = [int(math.ldexp(weight, 140)) for weight in weights.tolist()]
    total = sum(exact)
    shares = [each * _COLUMNS * _CAPACITY // total for each in exact] + [0] * (_COLUMNS - len(exact))
    shares[shares.index(max(shares))] += _COLUMNS * _CAPACITY - sum(shares)
    thresholds, aliases = [_CAPACITY - 1] * _COLUMNS, list(range(_COLUMNS))  # full: the alias is the column itself
    lacking = [column for column in range(_COLUMNS) if shares[column] < _CAPACITY]
    having = [column for column in range(_COLUMNS) if shares[column] >= _CAPACITY]
    while lacking:
        column, other = lacking.pop(), having[-1]
        thresholds[column], aliases[column] = shares[column], other
        shares[other] -= _CAPACITY - shares[column]
        if shares[other] < _CAPACITY:
            lacking.append(having.pop())
    return np.array(thresholds, dtype=np.uint64), np.array(aliases, dtype=np.int64)
