"""How fast noise is drawn on one core: millions of draws a second, side by side in one run.

    python -m benchmarks noise [--draws 4000000] [--repeats 9] [--deviation 10000] [--json noise.json]

Ours is the whole release: the sum is rounded to the grid and checked, AES-keyed noise is drawn, rounded and added.  The
others only draw: numpy's and torch's default generators, which anybody who learns the seed repeats, and the four draws
a number of Opacus' secure mode.

Integer noise of the given deviation, which sites add before a secure sum, is compared with differences of numpy's
Poisson numbers, from the same AES generator and from numpy's default one.  Figures are medians, in processor time, of
repeats that take turns; "ours" in a ratio is the first line of each part.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from opacus.optimizers.optimizer import _generate_noise

from dp.integer_noise import IntegerNoise
from dp.noise import GaussianNoise, csprng


def measure(draws: int, repeats: int, deviation: float) -> list[dict[str, float]]:
    """Millions of draws a second of each way, for each kind of noise."""
    torch.set_num_threads(1)
    noise = GaussianNoise(clip_norm=1.0, noise_multiplier=1.0, dimensions=draws)
    total, reference = np.zeros(draws), torch.zeros(draws)
    plain, secure = np.random.default_rng(), csprng()
    skellam = IntegerNoise(mechanism="skellam", deviation=deviation)
    discrete = IntegerNoise(mechanism="discrete gaussian", deviation=deviation)

    def poissons(generator: np.random.Generator) -> Callable[[], object]:
        return lambda: generator.poisson(deviation**2 / 2, draws) - generator.poisson(deviation**2 / 2, draws)

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
    seconds: dict[str, list[float]] = {name: [] for ways in kinds for name in ways}
    for _ in range(repeats + 1):
        for ways in kinds:
            for name, way in ways.items():
                start = time.process_time()
                way()
                seconds[name].append(time.process_time() - start)
    # The first turn touches memory and code for the first time.
    return [{name: draws / statistics.median(seconds[name][1:]) / 1e6 for name in ways} for ways in kinds]


def main() -> None:
    """Measure and print; with ``--json`` also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--deviation", type=float, default=1e4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    kinds = measure(arguments.draws, arguments.repeats, arguments.deviation)
    for rates in kinds:
        ours, *_ = rates.values()
        for name, rate in rates.items():
            print(f"{name:32}{rate:8.1f} million draws a second   ours / this {ours / rate:5.2f}")
    if arguments.json:
        rates = {name: rate for kind in kinds for name, rate in kind.items()}
        report = {"draws": arguments.draws, "repeats": arguments.repeats, "deviation": arguments.deviation}
        arguments.json.write_text(json.dumps({**report, "million draws a second": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
