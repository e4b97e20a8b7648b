"""How fast noise is drawn on one core: millions of draws a second, side by side in one run.

Ours is the whole release: the sum is rounded to the grid and checked, AES-keyed noise is drawn, rounded and added.  The
others only draw: numpy's and torch's default generators, which anybody who learns the seed repeats, and the four draws
a number of Opacus' secure mode.

Integer noise of one deviation, which sites add before a secure sum, is compared with differences of numpy's Poisson
numbers, from the same AES generator and from numpy's default one.  Times are processor times.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from opacus.optimizers.optimizer import _generate_noise

from benchmarks.dp import one_thread
from benchmarks.record import Figure, Record, ratios
from benchmarks.turns import by_turns
from dp.integer_noise import IntegerNoise
from dp.noise import GaussianNoise, csprng

DEVIATION = 1e4  # of integer noise


@one_thread()
def measure(*, full: bool) -> Record:
    """Each way of each kind of noise; a ratio above 1 says that ours draws more in the same time."""
    draws, repeats = (4_000_000, 9) if full else (1_000_000, 3)
    noise = GaussianNoise(clip_norm=1.0, noise_multiplier=1.0, dimensions=draws)
    total, reference = np.zeros(draws), torch.zeros(draws)
    plain, secure = np.random.default_rng(), csprng()
    skellam = IntegerNoise(mechanism="skellam", deviation=DEVIATION)
    discrete = IntegerNoise(mechanism="discrete gaussian", deviation=DEVIATION)

    def poissons(generator: np.random.Generator) -> Callable[[], object]:
        return lambda: generator.poisson(DEVIATION**2 / 2, draws) - generator.poisson(DEVIATION**2 / 2, draws)

    kinds: list[dict[str, Callable[[], object]]] = [
        {
            "ours, float64, whole release": lambda: noise.release(total),
            "numpy, float64": lambda: plain.normal(scale=1.1, size=draws),
            "torch, float64": lambda: torch.normal(0.0, 1.1, (draws,), dtype=torch.float64),
            "torch, float32": lambda: torch.normal(0.0, 1.1, (draws,)),
            "Opacus' secure mode, float32": lambda: _generate_noise(1.1, reference, secure_mode=True),
        },
        {
            "ours, Skellam": lambda: skellam.draw(draws),
            "ours, discrete Gaussian": lambda: discrete.draw(draws),
            "two Poissons, AES": poissons(secure),
            "two Poissons, numpy's default": poissons(plain),
        },
    ]
    figures = []
    for ways in kinds:
        times = by_turns(repeats, ways, clock=time.process_time)
        (ours, *_) = times.values()
        for name, spent in times.items():
            figures.append(Figure(name, [draws / each / 1e6 for each in spent], "million/s"))
            if spent is not ours:
                figures.append(Figure(f"ours / {name}", ratios(spent, ours)))
    title = f"{draws:,} draws of noise on one core; integers of deviation {DEVIATION:,.0f}"
    return Record("noise", title, figures, full)
