"""Releases as frozen data: what a mechanism was, in the terms that its guarantee depends on."""

import math
from dataclasses import dataclass

from dp.errors import UnsupportedEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonSampledGaussian:
    """``steps`` sums over Poisson-sampled patients, each clipped to C, plus Gaussian noise of deviation z C.

    ``sampling_rate``: each patient's chance q in (0, 1] to be in a step; ``noise_multiplier``: z above 0.
    Neighbouring data sets differ by one patient added or removed.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise UnsupportedEvent(f"sampling rate: found {self.sampling_rate}, expected above 0 and at most 1")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise UnsupportedEvent(f"noise multiplier: found {self.noise_multiplier}, expected a finite number above 0")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise UnsupportedEvent(f"steps: found {self.steps}, expected an integer of 1 or more")
