"""The guard that refuses."""

from pathlib import Path

import pytest

from dp.accountants import rdp_epsilon
from dp.budget import BudgetGuard, PrivacyBudget
from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.ledger import Ledger, Release

EVENT = PoissonSampledGaussian(sampling_rate=0.3, noise_multiplier=4.0, steps=5)
DELTA = 1e-3


def release(number: int, run: str = "run", event: PoissonSampledGaussian = EVENT) -> Release:
    """A release of one round."""
    return Release(run=run, round_number=number, event=event)


def test_what_fits_is_booked_before_it_is_allowed(tmp_path: Path) -> None:
    """An authorised release is in the file, and the epsilon returned is that of everything so far."""
    path = tmp_path / "ledger.jsonl"
    guard = BudgetGuard(PrivacyBudget(3.0, DELTA), Ledger(path))
    assert guard.spent == 0.0
    for number in (1, 2):
        spent = guard.authorize(release(number))
        assert spent == guard.spent == rdp_epsilon([EVENT] * number, DELTA)
        assert len(Ledger(path).releases) == number


def test_what_does_not_fit_is_refused_and_not_booked(tmp_path: Path) -> None:
    """The refusal says what is spent, asked, allowed, and how many steps would still fit; the file stays as it was."""
    path = tmp_path / "ledger.jsonl"
    budget = PrivacyBudget(rdp_epsilon([EVENT, PoissonSampledGaussian(**{**fields(EVENT), "steps": 3})], DELTA), DELTA)
    guard = BudgetGuard(budget, Ledger(path))
    spent = guard.authorize(release(1))
    before = path.read_bytes()
    asked = rdp_epsilon([EVENT, EVENT], DELTA)
    with pytest.raises(BudgetExhausted) as refused:
        guard.authorize(release(2))
    text = str(refused.value)
    for part in (
        "round 2 of run run",
        f"epsilon {spent:.4g} is spent",
        f"would make it {asked:.4g}",
        "3 steps would fit",
    ):
        assert part in text
    assert f"expected at most {budget.epsilon:g} at delta 0.001" in text
    assert path.read_bytes() == before
    assert guard.spent == spent
    guard.authorize(release(2, event=PoissonSampledGaussian(**{**fields(EVENT), "steps": 3})))


def fields(event: PoissonSampledGaussian) -> dict[str, float]:
    """The fields of an event."""
    return {name: getattr(event, name) for name in ("sampling_rate", "noise_multiplier", "steps")}


@pytest.mark.parametrize("run", ["run", "another run"])
def test_a_new_process_or_run_continues_the_budget(tmp_path: Path, run: str) -> None:
    """What one process has spent on the data is spent for the next one too, whatever run it calls itself."""
    path = tmp_path / "ledger.jsonl"
    budget = PrivacyBudget(1.5 * rdp_epsilon([EVENT], DELTA), DELTA)
    BudgetGuard(budget, Ledger(path)).authorize(release(1))
    BudgetGuard(budget, Ledger(path)).authorize(release(2, run))
    with pytest.raises(BudgetExhausted):
        BudgetGuard(budget, Ledger(path)).authorize(release(3, run))


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.1), (-1.0, 0.1), (float("inf"), 0.1), (1.0, 0.0), (1.0, 1.0)])
def test_budgets_that_promise_nothing(epsilon: float, delta: float) -> None:
    """A budget without a finite epsilon above 0 and a delta in (0, 1) is refused."""
    with pytest.raises(UnsupportedEvent, match="budget: found epsilon"):
        PrivacyBudget(epsilon, delta)


def test_two_guards_share_one_budget(tmp_path: Path) -> None:
    """Two processes on the same data cannot each spend what is there once."""
    path = tmp_path / "ledger.jsonl"
    budget = PrivacyBudget(1.5 * rdp_epsilon([EVENT], DELTA), DELTA)
    one, other = (BudgetGuard(budget, Ledger(path)) for _ in range(2))
    one.authorize(release(1))
    other.authorize(release(1, "other"))
    with pytest.raises(BudgetExhausted):
        one.authorize(release(2))
    assert len(Ledger(path).releases) == 2
