"""Gaussian noise and sampling coins from a CSPRNG.

Opacus draws its noise from torch's global Mersenne Twister: sites that set the same seed, as careful engineers do, add
the same noise, and whoever guesses the seed subtracts it.  Its secure mode needs a package that is no longer
maintained.  Here AES-128 in counter mode (randomgen) is keyed from the operating system for each release.

**Floating point.**  A float64 normal takes only some of the values that exact arithmetic would allow, and which values
``x + noise`` can take betrays x (Mironov, CCS 2012).  Opacus' secure mode adds four normals, so that the values are
hard to enumerate (Holohan and Braghin 2021); the low-order bits still depend on x.  Here they cannot.  Let g be a power
of two, the grid, and [y] the multiple of g next to y.  What is released is

    [x] + [n]  =  [[x] + n],   n ~ N(0, s^2)

an equation because [x] is a multiple of g (ties have probability 0), and free of rounding because both summands, and
their sum, are multiples of g below 2^53 g.  So the release is computed from [x] + n, the Gaussian mechanism on real
numbers, and costs no more than that.  It is a multiple of g whatever x is; no bit below g exists.

**What the grid costs.**  [x] and [x'] differ in each coordinate by at most g more than x and x' do, so over d
coordinates the L2 sensitivity C becomes C + g sqrt(d).  The deviation s is z (C + g sqrt(d)), so that the noise
multiplier z holds for what is released, not nearly but exactly.  g is the largest power of two that is at most
2^-12 C / sqrt(d) and 2^-12 z C, which makes the noise larger by at most 1 part in 4096.  Vectors on the grid are also
added without rounding, in any order; a sum of rounded numbers may change by more than the number that is taken out of
it (Casacuberta et al., CCS 2022).

**Why not a finer grid.**  n is not a real number either: numpy's ziggurat draws it from about 2^52 values spaced
2^-50 s or less around the centre and wider where values are rarer, up to 13.7 s.  Each grid value must be hit by many
of these for its probability to be right: to about one part in 2^50 g / s, that is in 2^37 / (z sqrt(d)).  For ten
million coordinates and z = 1 this is 2e-8 per coordinate.  It is what remains between this code and the theorem; a
coarser grid makes it smaller, a finer one larger.

Not covered: the time that the ziggurat takes depends on its draws, which a process on the same machine might measure.
"""

import math
import os
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
from randomgen import AESCounter

from dp.errors import UnsupportedEvent

KEY_BYTES: Final = 16
FINEST: Final = 2.0**-12  # of the sensitivity per coordinate and of the deviation
LARGEST: Final = 2.0**52  # grid steps that a sum may have: the noise, at most 13.7 deviations, then still fits 2^53
FARTHEST: Final = 14  # deviations: more than any draw of the ziggurat
_BLOCK: Final = 1 << 14  # draws at a time: two buffers of 128 KiB stay in the processor's cache


def csprng(entropy: Callable[[int], bytes] = os.urandom) -> np.random.Generator:
    """A numpy generator over AES-128-CTR with a fresh 16-byte key from ``entropy``.

    Raises UnsupportedEvent if ``entropy`` gives another number of bytes.
    """
    key = entropy(KEY_BYTES)
    # Stops a source that has run dry from leaving a key that can be guessed.
    if len(key) != KEY_BYTES:
        raise UnsupportedEvent(f"entropy: found {len(key)} bytes, expected {KEY_BYTES}")
    return np.random.Generator(AESCounter(key=int.from_bytes(key, "little")))


class GaussianNoise:
    """The Gaussian mechanism for vectors of ``dimensions`` coordinates, any number of times, from a key of its own.

    ``clip_norm``: C, the most in L2 norm by which neighbouring vectors differ before they are rounded to the grid;
    ``noise_multiplier``: z.  Attributes: ``grid``, the power of two that all releases are multiples of; ``deviation``
    of the noise, z C and at most 1 part in 4096 more; ``largest_sum``, the bound on a coordinate to be released.
    Raises UnsupportedEvent for C, z or ``dimensions`` that are not finite and above 0, and for scales without a grid.
    """

    def __init__(
        self,
        *,
        clip_norm: float,
        noise_multiplier: float,
        dimensions: int,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        values = {"clip norm": clip_norm, "noise multiplier": noise_multiplier, "dimensions": dimensions}
        for name, value in values.items():
            if not (math.isfinite(value) and value > 0):
                raise UnsupportedEvent(f"noise: found {name} {value}, expected a finite number above 0")
        root = math.sqrt(dimensions)
        spacing = FINEST * min(clip_norm / root, noise_multiplier * clip_norm)
        self.grid = math.ldexp(0.5, math.frexp(spacing)[1])
        self.deviation = noise_multiplier * (clip_norm + self.grid * root)
        self.largest_sum = LARGEST * self.grid
        # Where grid or noise leave float64's range, the sums of the theory above are no longer exact.
        if not (2.0**-900 < self.grid < 2.0**900 and FARTHEST * self.deviation < self.largest_sum):
            raise UnsupportedEvent(
                f"noise: found deviation {self.deviation:g} at clip norm {clip_norm:g} in {dimensions} dimensions, "
                "expected a scale at which float64 adds without rounding"
            )
        self._generator = csprng(entropy)
        self._buffer = np.empty(_BLOCK)

    def release(self, total: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """``total`` of any shape, rounded to the grid, plus fresh noise; ``total`` stays as it is.

        Raises UnsupportedEvent for a coordinate that is not finite or larger than ``largest_sum``.
        """
        flat = np.asarray(total, dtype=np.float64).reshape(-1)
        released = np.empty_like(flat)
        in_steps, scale = 1 / self.grid, self.deviation / self.grid
        for start in range(0, flat.size, _BLOCK):
            block = released[start : start + _BLOCK]
            drawn = self._buffer[: block.size]
            np.multiply(flat[start : start + _BLOCK], in_steps, out=block)
            np.rint(block, out=block)
            block += 0.0  # -0 becomes 0: otherwise a sum of two zeros has the sign that x had
            # Stops what lies off the range in which sums are exact; a NaN fails both comparisons.
            if not (block.max() <= LARGEST and block.min() >= -LARGEST):
                raise UnsupportedEvent(
                    f"noise: found a coordinate that is not finite or too large, expected at most {self.largest_sum:g}"
                )
            self._generator.standard_normal(out=drawn)
            drawn *= scale
            np.rint(drawn, out=drawn)
            block += drawn
            block *= self.grid
        return released.reshape(np.shape(total))
