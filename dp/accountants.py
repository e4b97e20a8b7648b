"""Epsilon of a history of releases, by Renyi differential privacy (Mironov 2017; subsampling after Mironov, Talwar,
Zhang 2019; conversion after Balle et al. 2020), through Opacus' implementation."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Final

from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import PoissonSampledGaussian

# Opacus' orders and, above them, some for small budgets, where the best order is large.
ORDERS: Final = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *(float(order) for order in range(12, 64)),
    *(float(order) for order in range(64, 513, 16)),
)
LARGEST_NOISE_MULTIPLIER: Final = 1e5


def rdp_epsilon(events: Iterable[PoissonSampledGaussian], delta: float) -> float:
    """The epsilon at ``delta`` of all ``events`` on the same data together; 0 for none."""
    from opacus.accountants.analysis import rdp  # noqa: PLC0415  imports torch, which the ledger must not wait for

    if not 0 < delta < 1:
        raise UnsupportedEvent(f"delta: found {delta}, expected above 0 and below 1")
    history = list(events)
    if not history:
        return 0.0
    total: list[float] = [0.0] * len(ORDERS)
    for event in history:
        curve = rdp.compute_rdp(
            q=event.sampling_rate, noise_multiplier=event.noise_multiplier, steps=event.steps, orders=ORDERS
        )
        total = [sum(pair) for pair in zip(total, curve, strict=True)]
    with warnings.catch_warnings():
        # Opacus warns where a smallest or largest order is best: the bound is looser then, and still a bound.
        warnings.simplefilter("ignore", UserWarning)
        epsilon, _ = rdp.get_privacy_spent(orders=list(ORDERS), rdp=total, delta=delta)
    return float(epsilon)


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

    low, high = 0.05, LARGEST_NOISE_MULTIPLIER
    if (least := total(high)) > epsilon:
        raise BudgetExhausted(
            f"noise for {steps} steps at sampling rate {sampling_rate:.4g}: epsilon {rdp_epsilon(spent, delta):.4g} "
            "is spent "
            f"and even a noise multiplier of {high:g} leads to {least:.4g}, expected at most {epsilon:g} at delta "
            f"{delta:g}"
        )
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if total(middle) <= epsilon else (middle, high)
    return high
