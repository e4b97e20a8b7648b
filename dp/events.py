"""Releases as frozen data: what a mechanism was, in the terms that its guarantee depends on.

All of them are sums over a Poisson sample plus noise; neighbouring data sets differ by one unit (a patient, a record, a
site) added or removed.  Integer noise is described as an adversary sees it: of what several sites added, the part that
this adversary knows nothing of.
"""

import math
from dataclasses import dataclass
from typing import Final

from dp.errors import UnsupportedEvent

LEAST_LOCAL_DEVIATION: Final = 3.0  # from here on a sum of discrete Gaussians is one, to 1 part in 10^37


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
        _check_sampling(self.sampling_rate, self.steps)
        _check_positive("noise multiplier", self.noise_multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonSampledSkellam:
    """``steps`` sums of integer vectors over a Poisson sample, plus in each coordinate Skellam noise.

    ``l2_sensitivity`` and ``l1_sensitivity``: the most by which one unit moves the sum, in ring units; ``variance``: of
    the noise, in ring units squared, as far as the adversary does not know it.
    """

    sampling_rate: float
    l2_sensitivity: float
    l1_sensitivity: float
    variance: float
    steps: int

    def __post_init__(self) -> None:
        _check_sampling(self.sampling_rate, self.steps)
        _check_positive("L2 sensitivity", self.l2_sensitivity)
        _check_positive("L1 sensitivity", self.l1_sensitivity)
        _check_positive("variance", self.variance)

    @property
    def noise_multiplier(self) -> float:
        """Deviation of the noise in units of the L2 sensitivity."""
        return math.sqrt(self.variance) / self.l2_sensitivity


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonSampledDiscreteGaussian:
    """``steps`` sums of integer vectors of ``dimensions`` coordinates over a Poisson sample, plus in each coordinate
    the sum of ``parties`` discrete Gaussians of parameter ``local_deviation``, at least 3.

    ``l2_sensitivity``: the most by which one unit moves the sum, in ring units; ``parties``: how many of those that
    added noise the adversary does not know.
    """

    sampling_rate: float
    l2_sensitivity: float
    local_deviation: float
    parties: int
    dimensions: int
    steps: int

    def __post_init__(self) -> None:
        _check_sampling(self.sampling_rate, self.steps)
        _check_positive("L2 sensitivity", self.l2_sensitivity)
        _check_count("parties", self.parties)
        _check_count("dimensions", self.dimensions)
        if not (math.isfinite(self.local_deviation) and self.local_deviation >= LEAST_LOCAL_DEVIATION):
            raise UnsupportedEvent(
                f"local deviation: found {self.local_deviation}, expected a finite number of "
                f"{LEAST_LOCAL_DEVIATION:g} or more, below which sums of discrete Gaussians are none"
            )

    @property
    def noise_multiplier(self) -> float:
        """Deviation of the noise in units of the L2 sensitivity."""
        return math.sqrt(self.parties) * self.local_deviation / self.l2_sensitivity


IntegerEvent = PoissonSampledSkellam | PoissonSampledDiscreteGaussian
Event = PoissonSampledGaussian | IntegerEvent


def _check_sampling(sampling_rate: float, steps: int) -> None:
    if not 0 < sampling_rate <= 1:
        raise UnsupportedEvent(f"sampling rate: found {sampling_rate}, expected above 0 and at most 1")
    _check_count("steps", steps)


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UnsupportedEvent(f"{name}: found {value}, expected a finite number above 0")


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise UnsupportedEvent(f"{name}: found {value}, expected an integer of 1 or more")
