"""Epsilon of a history of releases, by Renyi differential privacy (Mironov 2017; subsampling after Mironov, Talwar,
Zhang 2019; conversion after Balle et al. 2020), through Opacus' implementation."""

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import PoissonSampledGaussian

# Opacus' orders and, above them, some for small budgets, where the best order is large.
ORDERS: Final = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *(float(order) for order in range(12, 64)),
    *(float(order) for order in range(64, 513, 16)),
)
SMALLEST_NOISE_MULTIPLIER: Final = 0.05
LARGEST_NOISE_MULTIPLIER: Final = 1e5
USED_UP: Final = 0.99


def rdp_epsilon(events: Iterable[PoissonSampledGaussian], delta: float) -> float:
    """The epsilon at ``delta`` of all ``events`` on the same data together; 0 for none."""
    if not 0 < delta < 1:
        raise UnsupportedEvent(f"delta: found {delta}, expected above 0 and below 1")
    history = list(events)
    if not history:
        return 0.0
    from opacus.accountants.analysis import rdp  # noqa: PLC0415  imports torch, which the ledger must not wait for

    total = [0.0] * len(ORDERS)
    for event in history:
        step = _curve_of_a_step(event.sampling_rate, event.noise_multiplier)
        total = [so_far + event.steps * one for so_far, one in zip(total, step, strict=True)]
    with warnings.catch_warnings():
        # Opacus warns where a smallest or largest order is best: the bound is looser then, and still a bound.
        warnings.simplefilter("ignore", UserWarning)
        epsilon, _ = rdp.get_privacy_spent(orders=list(ORDERS), rdp=total, delta=delta)
    return max(0.0, float(epsilon))  # the conversion may go below 0 where delta is large


@lru_cache(maxsize=256)
def _curve_of_a_step(sampling_rate: float, noise_multiplier: float) -> tuple[float, ...]:
    """Renyi divergence of one step at each of ORDERS; takes a tenth of a second, and a run repeats its mechanism."""
    from opacus.accountants.analysis import rdp  # noqa: PLC0415

    curve = rdp.compute_rdp(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS)
    return tuple(float(order) for order in curve)


def noise_multiplier_for(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    spent: Sequence[PoissonSampledGaussian] = (),
) -> float:
    """The least noise multiplier, to within 0.1 %, for which ``steps`` more steps after ``spent`` stay within
    ``epsilon``.

    Raises BudgetExhausted, with the numbers, if no noise multiplier does.
    """

    def total(noise_multiplier: float) -> float:
        event = PoissonSampledGaussian(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)
        return rdp_epsilon([*spent, event], delta)

    so_far = rdp_epsilon(spent, delta)
    found = f"noise for {steps} steps at sampling rate {sampling_rate:.4g}: epsilon {so_far:.4g} is spent"
    allowed = f"expected at most {epsilon:g} at delta {delta:g}"
    # What this function leaves over of a budget is no budget for another run, which would release nothing but noise.
    if so_far > USED_UP * epsilon:
        raise BudgetExhausted(f"{found}, {allowed}")
    least = total(LARGEST_NOISE_MULTIPLIER)
    if least > epsilon:
        raise BudgetExhausted(f"{found} and the least that these can cost leads to {least:.4g}, {allowed}")
    high = 1.0
    while total(high) > epsilon:
        high *= 2
    low = high / 2
    while low > SMALLEST_NOISE_MULTIPLIER and total(low) <= epsilon:
        low, high = low / 2, low
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if total(middle) <= epsilon else (middle, high)
    return high
