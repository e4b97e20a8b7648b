"""How fast noise is drawn on one core: millions of draws a second, side by side in one run.

    python -m benchmarks noise [--draws 4000000] [--repeats 9] [--json noise.json]

Ours is the whole release: the sum is rounded to the grid and checked, AES-keyed noise is drawn, rounded and added.  The
others only draw: numpy's and torch's default generators, which anybody who learns the seed repeats, and the four draws
a number of Opacus' secure mode.  Figures are medians, in processor time, of repeats that take turns.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from opacus.optimizers.optimizer import _generate_noise

from dp.noise import GaussianNoise


def measure(draws: int, repeats: int) -> dict[str, float]:
    """Millions of draws a second of each way, and how our rate compares."""
    torch.set_num_threads(1)
    noise = GaussianNoise(clip_norm=1.0, noise_multiplier=1.0, dimensions=draws)
    total, reference = np.zeros(draws), torch.zeros(draws)
    plain = np.random.default_rng()
    ways = {
        "ours, float64, whole release": lambda: noise.release(total),
        "numpy, float64": lambda: plain.normal(scale=1.1, size=draws),
        "torch, float64": lambda: torch.normal(0.0, 1.1, (draws,), dtype=torch.float64),
        "torch, float32": lambda: torch.normal(0.0, 1.1, (draws,)),
        "Opacus' secure mode, float32": lambda: _generate_noise(1.1, reference, secure_mode=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    # The first turn touches memory and code for the first time.
    return {name: draws / statistics.median(values[1:]) / 1e6 for name, values in seconds.items()}


def main() -> None:
    """Measure and print; with ``--json`` also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    rates = measure(arguments.draws, arguments.repeats)
    ours, *_ = rates.values()
    for name, rate in rates.items():
        print(f"{name:32}{rate:8.1f} million draws a second   ours / this {ours / rate:5.2f}")
    if arguments.json:
        report = {"draws": arguments.draws, "repeats": arguments.repeats, "million draws a second": rates}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
