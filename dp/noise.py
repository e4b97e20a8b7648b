"""Gaussian noise and sampling coins from a CSPRNG.

Opacus draws its noise from torch's global Mersenne Twister: sites that set the same seed, as careful engineers do, add
the same noise, and whoever guesses the seed subtracts it.  Its secure mode needs a package that is no longer
maintained. Here AES-128 in counter mode (randomgen) is keyed from the operating system for each release.

A normal number of double precision does not take all values that exact arithmetic would allow, and which ones it
takes can betray the sum it was added to (Mironov 2012).  As Opacus' secure mode intends, each draw here is the sum of
four independent ones, divided by 2, so that no single one can be enumerated (Holohan and Braghin 2021).
"""

import os
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
from randomgen import AESCounter

_SUMMANDS: Final = 4


def csprng(entropy: Callable[[int], bytes] = os.urandom) -> np.random.Generator:
    """A numpy generator over AES-128-CTR with a fresh 16-byte key from ``entropy``."""
    return np.random.Generator(AESCounter(key=int.from_bytes(entropy(16), "little")))


class GaussianNoise:
    """Independent normal draws, from a key of its own."""

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._generator = csprng(entropy)

    def draw(self, shape: tuple[int, ...], *, deviation: float) -> npt.NDArray[np.float64]:
        """Normal draws of mean 0 and the given standard ``deviation``, as float64."""
        total = self._generator.standard_normal(shape)
        for _ in range(_SUMMANDS - 1):
            total += self._generator.standard_normal(shape)
        total *= deviation / np.sqrt(_SUMMANDS)
        return total
