"""The guard that refuses."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.killed_site import Server
from support.ledgers import EVENT as OTHER_EVENT
from support.ledgers import bodies, open_ledger

from dp.accountants import rdp_epsilon
from dp.budget import BudgetGuard, PrivacyBudget
from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.ledger import Claim, Release

EVENT = PoissonSampledGaussian(sampling_rate=0.3, noise_multiplier=4.0, steps=5)
DELTA = 1e-3
FEWER = replace(EVENT, steps=3)


def release(number: int, run: str = "run", event: PoissonSampledGaussian = EVENT) -> Release:
    """A release of one round."""
    return Release(run=run, round_number=number, event=event)


def guard_of(
    path: Path, epsilon: float, *, delta: float = DELTA, run_budget: PrivacyBudget | None = None
) -> BudgetGuard:
    """A guard on the ledger in this file, as a process that has just started has it."""
    return BudgetGuard(PrivacyBudget(epsilon, delta), open_ledger(path), run_budget=run_budget)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a ledger will be."""
    return tmp_path / "ledger.sqlite"


def test_what_fits_is_reserved_before_it_is_allowed(path: Path) -> None:
    """An authorised release is in the file with what it was said to cost, alone and with everything before it."""
    guard = guard_of(path, 3.0)
    assert guard.spent == 0.0
    for number in (1, 2):
        reservation = guard.authorize(release(number))
        cumulative = rdp_epsilon([EVENT] * number, DELTA)
        assert guard.spent == guard.spent_by("run") == pytest.approx(cumulative, rel=1e-12)
        entry = bodies(path)[-1]
        assert entry["sequence"] == reservation.sequence
        assert entry["decision"] == "reserved"
        assert entry["cumulative_epsilon"] == guard.spent
        assert entry["epsilon"] == pytest.approx(rdp_epsilon([EVENT], DELTA), rel=1e-12)
        assert (entry["delta"], entry["budget_epsilon"]) == (DELTA, 3.0)
        with open_ledger(path) as ledger:
            assert len(ledger.releases) == number


def test_what_does_not_fit_is_refused(path: Path) -> None:
    """The refusal says what is spent, asked and allowed, how many steps would still fit, and with how much noise the
    asked ones would; it is in the ledger and costs nothing; and what it says is so."""
    budget = rdp_epsilon([EVENT, FEWER], DELTA)
    guard = guard_of(path, budget)
    guard.authorize(release(1))
    spent, asked = guard.spent, rdp_epsilon([EVENT, EVENT], DELTA)
    with pytest.raises(BudgetExhausted) as refused:
        guard.authorize(release(2))
    text = str(refused.value)
    assert text.startswith(
        f"privacy budget, round 2 of run run: epsilon {spent:.4g} is spent and 5 more steps would make it {asked:.4g}, "
        f"expected at most {budget:g} at delta 0.001; at the same noise multiplier, 4, 3 steps would fit, and 5 steps "
        "with a noise multiplier of "
    )
    entry = bodies(path)[-1]
    assert (entry["decision"], entry["refused"] in text) == ("refused", True)
    assert guard.spent == spent
    least = float(re.search(r"multiplier of ([\d.]+) or more", text)[1])
    assert 4.0 < least < 8.0
    with pytest.raises(BudgetExhausted):
        guard.authorize(release(2, event=replace(EVENT, steps=4)))
    with pytest.raises(BudgetExhausted):
        guard.authorize(release(2, event=replace(EVENT, noise_multiplier=0.99 * least)))
    again = guard_of(path, budget)
    again.ledger.reserve(release(2, event=replace(EVENT, noise_multiplier=least)), lambda _: passing(budget))
    assert again.spent <= budget
    guard = guard_of(path.with_name("other.sqlite"), budget)
    guard.authorize(release(1))
    guard.authorize(release(2, event=FEWER))


def passing(budget: float) -> Claim:
    """A decision that lets a release pass, to see what it comes to."""
    return Claim(delta=DELTA, epsilon=0.0, cumulative_epsilon=0.0, budget_epsilon=budget)


def test_nothing_fits(path: Path) -> None:
    """Where the budget is used up, the refusal says that no step fits and no noise helps."""
    guard = guard_of(path, 1.0001 * rdp_epsilon([EVENT], DELTA))
    guard.authorize(release(1))
    with pytest.raises(BudgetExhausted, match="4, 0 steps would fit, and no noise multiplier makes 5 steps fit"):
        guard.authorize(release(2))


def test_a_release_without_a_finite_epsilon(path: Path) -> None:
    """A mechanism with next to no noise is refused, and the refusal can be written down."""
    tiny = replace(EVENT, noise_multiplier=1e-3)
    with pytest.raises(BudgetExhausted, match="0 steps would fit"):
        guard_of(path, 1.0).authorize(release(1, event=tiny))
    assert bodies(path)[-1]["decision"] == "refused"
    open_ledger(path).close()


@pytest.mark.parametrize("run", ["run", "another run"])
def test_a_new_process_or_run_continues_the_budget(path: Path, run: str) -> None:
    """What one process has spent on the data is spent for the next one too, whatever run it calls itself."""
    budget = 1.5 * rdp_epsilon([EVENT], DELTA)
    guard_of(path, budget).authorize(release(1))
    guard_of(path, budget).authorize(release(2, run))
    with pytest.raises(BudgetExhausted):
        guard_of(path, budget).authorize(release(3, run))


def test_another_consortium_model_and_mechanism_continue_the_budget(path: Path) -> None:
    """Nothing that a release says of itself makes it free: consortium, purpose, model, manifest, mechanism."""
    budget = rdp_epsilon([EVENT, EVENT, OTHER_EVENT], DELTA)
    guard = guard_of(path, budget)
    guard.authorize(replace(release(1), consortium="one", model_sha256="a" * 64, manifest_sha256="a" * 64))
    guard.authorize(replace(release(1, "x"), consortium="two", model_sha256="b" * 64, manifest_sha256="b" * 64))
    guard.authorize(replace(release(1, "y", OTHER_EVENT), purpose="test"))
    assert guard.spent == pytest.approx(budget, rel=1e-9)
    for extra in (replace(release(1, "z", OTHER_EVENT), consortium="three"), release(2, "y", OTHER_EVENT)):
        with pytest.raises(BudgetExhausted):
            guard.authorize(extra)


def test_a_run_has_a_budget_of_its_own(path: Path) -> None:
    """A run may spend what the consortium has signed, all runs together what the site allows; each refusal says which
    of the two it was."""
    once = rdp_epsilon([EVENT], DELTA)
    of_a_run = PrivacyBudget(1.01 * once, DELTA)
    guard = guard_of(path, 1.01 * rdp_epsilon([EVENT, EVENT], DELTA), run_budget=of_a_run)
    guard.authorize(release(1))
    with pytest.raises(BudgetExhausted, match=rf"is spent by this run and .* at most {of_a_run.epsilon:g} at delta"):
        guard.authorize(release(2))
    guard.authorize(release(1, "another"))
    assert (guard.spent_by("run"), guard.spent_by("another")) == (once, once)
    with pytest.raises(BudgetExhausted, match=rf"is spent and .* at most {guard.budget.epsilon:g} at delta"):
        guard.authorize(release(1, "third"))


def test_the_least_noise_fits_both_budgets(path: Path) -> None:
    """The noise that the guard names keeps a run within its own budget and within what the others have left."""
    guard = guard_of(path, 2.0, delta=1e-2, run_budget=PrivacyBudget(0.5, DELTA))
    least = guard.least_noise(sampling_rate=0.3, steps=5)
    alone = replace(EVENT, noise_multiplier=least)
    assert 0.98 * 0.5 <= rdp_epsilon([alone], DELTA) <= 0.5
    guard.authorize(release(1, event=alone))
    guard = guard_of(path, 1.05 * guard.spent, delta=1e-2, run_budget=PrivacyBudget(0.5, DELTA))
    more = guard.least_noise(sampling_rate=0.3, steps=5)
    assert more > least
    guard.authorize(release(1, "another", replace(EVENT, noise_multiplier=more)))
    assert guard.spent <= guard.budget.epsilon


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.1), (-1.0, 0.1), (float("inf"), 0.1), (1.0, 0.0), (1.0, 1.0)])
def test_budgets_that_promise_nothing(epsilon: float, delta: float) -> None:
    """A budget without a finite epsilon above 0 and a delta in (0, 1) is refused."""
    with pytest.raises(UnsupportedEvent, match="budget: found epsilon"):
        PrivacyBudget(epsilon, delta)


def test_two_guards_share_one_budget(path: Path) -> None:
    """Two guards that were open before either spent anything cannot each spend what is there once."""
    budget = 1.5 * rdp_epsilon([EVENT], DELTA)
    one, other = (guard_of(path, budget) for _ in range(2))
    one.authorize(release(1))
    other.authorize(release(1, "other"))
    with pytest.raises(BudgetExhausted):
        one.authorize(release(2))
    with open_ledger(path) as ledger:
        assert len(ledger.releases) == 2


def test_processes_race_for_the_last_room(path: Path) -> None:
    """Of several processes that ask at once for what the budget has room for once, exactly one gets it."""
    budget = 1.01 * rdp_epsilon([OTHER_EVENT] * 3, DELTA)
    guard = guard_of(path, budget)
    for number in (1, 2):
        guard.authorize(release(number, event=OTHER_EVENT))
    with Server() as server:
        assert server.race(path, budget, 3) == [0, 3, 3]
    with open_ledger(path) as ledger:
        assert len(ledger.releases) == 3
    assert [entry["decision"] for entry in bodies(path)[1:]].count("refused") == 2


@given(st.lists(st.tuples(st.integers(1, 8), st.sampled_from([2.0, 4.0, 8.0]), st.sampled_from("ab")), max_size=12))
@settings(max_examples=25, deadline=None)
def test_the_ledger_never_exceeds_either_budget(tmp_path_factory, asked) -> None:
    """Whatever is asked, in whatever order: what is reserved stays within both budgets, nothing that would have fitted
    is refused, and refusals cost nothing."""
    folder = tmp_path_factory.mktemp("budget")
    guard = guard_of(folder / "x.sqlite", 1.2, delta=1e-2, run_budget=PrivacyBudget(0.9, DELTA))
    guard.least_noise = lambda **_: 100.0  # its search, for the text of a refusal, takes seconds
    held: list[Release] = []
    for number, (steps, noise, run) in enumerate(asked):
        event = PoissonSampledGaussian(sampling_rate=0.3, noise_multiplier=noise, steps=steps)
        wanted = release(number, run, event)
        total = rdp_epsilon([each.event for each in [*held, wanted]], 1e-2)
        own = rdp_epsilon([each.event for each in [*held, wanted] if each.run == run], DELTA)
        if total <= 1.2 and own <= 0.9:
            guard.authorize(wanted)
            held.append(wanted)
        else:
            with pytest.raises(BudgetExhausted):
                guard.authorize(wanted)
        assert guard.ledger.releases == tuple(held)
    with open_ledger(folder / "x.sqlite") as ledger:
        assert ledger.releases == tuple(held)
