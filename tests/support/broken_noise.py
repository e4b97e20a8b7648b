"""Sources of noise that are broken in a known way, to take the place of ``dp.training.GaussianNoise``."""

from itertools import count

import numpy as np
import torch

from dp.noise import GaussianNoise

ROUNDS = 8  # after which ``Shared`` begins again


class Halved(GaussianNoise):
    """Half of the noise that was asked for."""

    def __init__(self, *, noise_multiplier, **options):
        super().__init__(noise_multiplier=noise_multiplier / 2, **options)


class Removed(GaussianNoise):
    """No noise."""

    def release(self, total):
        """``total`` itself."""
        return np.array(total)


class Reused(GaussianNoise):
    """The same key in every round, and so the same noise."""

    def __init__(self, *, entropy, **options):
        super().__init__(entropy=lambda length: b"k" * length, **options)


class Shared(GaussianNoise):
    """Other noise in each of ``ROUNDS`` rounds, but the same in every training, as at two sites with one seed."""

    rounds_begun = count()

    def __init__(self, *, entropy, **options):
        number = next(self.rounds_begun) % ROUNDS
        super().__init__(entropy=lambda length: number.to_bytes(length, "little"), **options)


class Seeded(GaussianNoise):
    """Noise from torch's global generator, which whoever knows the seed can draw too."""

    def release(self, total):
        """``total`` plus noise."""
        return total + torch.randn(total.shape, dtype=torch.float64).numpy() * self.deviation
