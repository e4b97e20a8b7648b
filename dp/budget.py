"""The guard between a site's data and everything that asks for it: no release without room in the budget."""

import math
from dataclasses import dataclass, replace

from dp.accountants import rdp_epsilon
from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.ledger import Ledger, Release


@dataclass(frozen=True, slots=True)
class PrivacyBudget:
    """The most that may ever be spent on one data set: ``epsilon`` at ``delta``."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0 and 0 < self.delta < 1):
            raise UnsupportedEvent(
                f"budget: found epsilon {self.epsilon} at delta {self.delta}, expected epsilon above 0, delta in (0, 1)"
            )


class BudgetGuard:
    """Books releases into a ledger, and refuses those that a budget has no room for."""

    def __init__(self, budget: PrivacyBudget, ledger: Ledger) -> None:
        self.budget = budget
        self.ledger = ledger

    @property
    def spent(self) -> float:
        """Epsilon of everything in the ledger, at the budget's delta."""
        return rdp_epsilon(self.ledger.events, self.budget.delta)

    def authorize(self, release: Release) -> float:
        """Book ``release`` and return the epsilon spent with it; call it before the data is sampled.

        Raises BudgetExhausted, saying what is spent, asked, allowed and what would still fit; nothing is booked then.
        """
        asked = 0.0

        def check() -> None:
            nonlocal asked
            asked = rdp_epsilon([*self.ledger.events, release.event], self.budget.delta)
            if asked > self.budget.epsilon:
                raise BudgetExhausted(
                    f"privacy budget, round {release.round_number} of run {release.run}: epsilon {self.spent:.4g} is "
                    f"spent and {release.event.steps} more steps would make it {asked:.4g}, expected at most "
                    f"{self.budget.epsilon:g} at delta {self.budget.delta:g}; at the same noise "
                    f"{self._steps_that_fit(release.event)} steps would fit"
                )

        self.ledger.reserve(release, check=check)
        return asked

    def _steps_that_fit(self, event: PoissonSampledGaussian) -> int:
        low, high = 0, event.steps
        while high - low > 1:
            middle = (low + high) // 2
            total = rdp_epsilon([*self.ledger.events, replace(event, steps=middle)], self.budget.delta)
            low, high = (middle, high) if total <= self.budget.epsilon else (low, middle)
        return low
