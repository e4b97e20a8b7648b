"""What a training plan will cost before it is begun: the noise that fits the budget, and what other batches would cost.

A step at batch size B samples each of n patients with probability q = B / n, sums gradients clipped to C, adds noise of
deviation z C and divides by q n.  A larger batch needs more noise z for the same epsilon, but spreads it over more
patients: what the training feels is the deviation z C / (q n) on the averaged gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dp.accountants import AccountantTotal, noise_multiplier_for, rdp_epsilon, totals
from dp.errors import UnsupportedEvent
from dp.events import Event, PoissonSampledGaussian


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCost:
    """One batch size within the budget.

    ``noise_on_mean``: deviation of the noise on the averaged gradient, in the gradient's own units;
    ``epsilon_at_planned_noise``: what this batch size would cost with the planned one's noise multiplier, spent
    releases included.
    """

    batch_size: int
    sampling_rate: float
    noise_multiplier: float
    noise_on_mean: float
    epsilon_at_planned_noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPlan:
    """Noise and epsilons of ``rounds`` rounds of ``steps`` steps after what has been spent.

    ``after_round``: epsilon by RDP after each round; ``totals``: the plan's, spent releases included, by each
    accountant; ``what_if``: the planned batch size among others, by size.
    """

    patients: int
    rounds: int
    steps: int
    epsilon: float
    delta: float
    clip_norm: float
    spent: float
    planned: BatchCost
    after_round: tuple[float, ...]
    totals: tuple[AccountantTotal, ...]
    what_if: tuple[BatchCost, ...]


def plan(
    *,
    patients: int,
    batch_size: int,
    rounds: int,
    steps: int,
    epsilon: float,
    delta: float,
    clip_norm: float = 1.0,
    spent: Sequence[Event] = (),
) -> BudgetPlan:
    """Plan ``rounds`` rounds of ``steps`` steps for a site of so many ``patients`` that has ``spent`` before.

    A ``batch_size`` above ``patients`` takes all of them in each step, as training does.  Raises UnsupportedEvent for
    values that plan nothing, and BudgetExhausted, with the numbers, where no noise fits.
    """
    for name, count in (("patients", patients), ("batch size", batch_size), ("rounds", rounds), ("steps", steps)):
        if count < 1:
            raise UnsupportedEvent(f"plan: found {name} {count}, expected 1 or more")
    for name, number in (("epsilon", epsilon), ("clip norm", clip_norm)):
        if not (math.isfinite(number) and number > 0):
            raise UnsupportedEvent(f"plan: found {name} {number}, expected a finite number above 0")

    def event(size: int, noise: float, steps: int) -> PoissonSampledGaussian:
        rate = min(1.0, size / patients)
        return PoissonSampledGaussian(sampling_rate=rate, noise_multiplier=noise, steps=steps)

    def cost(size: int, planned_noise: float | None = None) -> BatchCost:
        rate = min(1.0, size / patients)
        noise = noise_multiplier_for(
            epsilon=epsilon, delta=delta, sampling_rate=rate, steps=rounds * steps, spent=spent
        )
        same = event(size, noise if planned_noise is None else planned_noise, rounds * steps)
        return BatchCost(
            batch_size=size,
            sampling_rate=rate,
            noise_multiplier=noise,
            noise_on_mean=noise * clip_norm / (rate * patients),
            epsilon_at_planned_noise=rdp_epsilon([*spent, same], delta),
        )

    planned = cost(batch_size)
    noise = planned.noise_multiplier
    return BudgetPlan(
        patients=patients,
        rounds=rounds,
        steps=steps,
        epsilon=epsilon,
        delta=delta,
        clip_norm=clip_norm,
        spent=rdp_epsilon(spent, delta),
        planned=planned,
        after_round=tuple(
            rdp_epsilon([*spent, event(batch_size, noise, done * steps)], delta) for done in range(1, rounds + 1)
        ),
        totals=totals([*spent, event(batch_size, noise, rounds * steps)], delta),
        what_if=tuple(
            planned if size == batch_size else cost(size, noise) for size in _sizes_around(batch_size, patients)
        ),
    )


def _sizes_around(batch_size: int, patients: int) -> list[int]:
    """A quarter, half, double and four times the batch size, and all patients, as far as there are so many."""
    others = {batch_size // 4, batch_size // 2, 2 * batch_size, 4 * batch_size, patients}
    return sorted({batch_size, *(size for size in others if 1 <= size <= patients)})
