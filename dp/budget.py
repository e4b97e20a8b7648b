"""The guard between a site's data and everything that asks for it: no release without room in the budget."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dp.accountants import noise_multiplier_for, rdp_epsilon
from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.ledger import Claim, Ledger, Release, Reservation


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
    """Reserves releases in a ledger, and refuses those that a budget has no room for.

    ``budget``: of the data, for everything that is ever released from it; ``run_budget``: of each run, if that is
    less.  Both come from the site's own files.
    """

    def __init__(self, budget: PrivacyBudget, ledger: Ledger, *, run_budget: PrivacyBudget | None = None) -> None:
        self.budget = budget
        self.run_budget = budget if run_budget is None else run_budget
        self.ledger = ledger

    @property
    def spent(self) -> float:
        """Epsilon of everything in the ledger, at the budget's delta."""
        return _epsilon(self.ledger.releases, self.budget)

    def spent_by(self, run: str) -> float:
        """Epsilon of one run, at its budget's delta."""
        return _epsilon(_of(run, self.ledger.releases), self.run_budget)

    def least_noise(self, *, sampling_rate: float, steps: int, run: str | None = None) -> float:
        """The least noise multiplier with which ``steps`` more steps of ``run``, of a new one by default, fit both
        budgets; BudgetExhausted if none does."""
        releases = self.ledger.releases
        limits: list[tuple[PrivacyBudget, Sequence[Release]]] = [(self.budget, releases)]
        if self.run_budget != self.budget:
            limits.append((self.run_budget, _of(run, releases)))
        return max(
            noise_multiplier_for(
                epsilon=limit.epsilon,
                delta=limit.delta,
                sampling_rate=sampling_rate,
                steps=steps,
                spent=[release.event for release in counted],
            )
            for limit, counted in limits
        )

    def authorize(self, release: Release) -> Reservation:
        """Reserve ``release`` in the ledger; call it before the data is sampled.

        Raises BudgetExhausted, saying what is spent, asked, allowed and what would still fit; the refusal is in the
        ledger then, and costs nothing.
        """
        # Computed once for nothing: the curve of a new mechanism takes long, and nobody else can reserve meanwhile.
        self._decide(release, self.ledger.releases)
        reservation = self.ledger.reserve(release, lambda releases: self._decide(release, releases))
        if reservation.claim.refused is not None:
            raise BudgetExhausted(
                f"privacy budget, round {release.round_number} of run {release.run}: {reservation.claim.refused}; "
                f"{self._what_would_fit(release)}"
            )
        return reservation

    def _decide(self, release: Release, releases: Sequence[Release]) -> Claim:
        total = _epsilon([*releases, release], self.budget)
        return Claim(
            delta=self.budget.delta,
            epsilon=_epsilon([release], self.budget),
            cumulative_epsilon=total,
            budget_epsilon=self.budget.epsilon,
            refused=self._refusal(release, releases),
        )

    def _refusal(self, release: Release, releases: Sequence[Release]) -> str | None:
        """Why ``release`` may not follow ``releases``, or None."""
        for of_what, limit, counted in (
            ("", self.budget, releases),
            (" by this run", self.run_budget, _of(release.run, releases)),
        ):
            asked = _epsilon([*counted, release], limit)
            if not asked <= limit.epsilon:
                return (
                    f"epsilon {_epsilon(counted, limit):.4g} is spent{of_what} and {release.event.steps} more steps "
                    f"would make it {asked:.4g}, expected at most {limit.epsilon:g} at delta {limit.delta:g}"
                )
        return None

    def _what_would_fit(self, release: Release) -> str:
        releases, event = self.ledger.releases, release.event
        low, high = 0, event.steps
        while high - low > 1:
            middle = (low + high) // 2
            fewer = replace(release, event=replace(event, steps=middle))
            low, high = (middle, high) if self._refusal(fewer, releases) is None else (low, middle)
        fewer_steps = f"at the same noise multiplier, {event.noise_multiplier:.4g}, {low} steps would fit"
        if not isinstance(event, PoissonSampledGaussian):
            return fewer_steps  # shared noise is all sites' decision
        try:
            least = self.least_noise(sampling_rate=event.sampling_rate, steps=event.steps, run=release.run)
            noise = f"{event.steps} steps with a noise multiplier of {_rounded_up(least):g} or more"
        except BudgetExhausted:
            noise = f"no noise multiplier makes {event.steps} steps fit"
        return f"{fewer_steps}, and {noise}"


def _rounded_up(number: float) -> float:
    """To four digits, so that what is printed is enough."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 3)
    return math.ceil(number / unit) * unit


def _of(run: str | None, releases: Iterable[Release]) -> list[Release]:
    return [release for release in releases if release.run == run]


def _epsilon(releases: Iterable[Release], budget: PrivacyBudget) -> float:
    return rdp_epsilon((release.event for release in releases), budget.delta)
