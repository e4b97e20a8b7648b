"""Recomputing what a ledger's rows claim."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.ledgers import EVENT, open_ledger, release

from dp.accountants import rdp_epsilon
from dp.budget import BudgetGuard, PrivacyBudget
from dp.claims import Recomputed, recompute
from dp.errors import BudgetExhausted
from dp.events import PoissonSampledDiscreteGaussian, PoissonSampledGaussian, PoissonSampledSkellam
from dp.ledger import Claim, events_in, read_ledger, verify

SHARED = (
    PoissonSampledSkellam(sampling_rate=0.25, l2_sensitivity=1e4, l1_sensitivity=1e6, variance=4e10, steps=2),
    PoissonSampledDiscreteGaussian(
        sampling_rate=0.25, l2_sensitivity=1e4, local_deviation=1e5, parties=3, dimensions=10**4, steps=3
    ),
)


def of(path: Path) -> Recomputed:
    """What recomputing the ledger in this file gives."""
    return recompute(verify(read_ledger(path)).entries)


def test_an_honest_ledger_holds(tmp_path: Path) -> None:
    """Every claim of the guard holds, refused ones included, and the totals are those of all that is reserved."""
    ledger = open_ledger(tmp_path / "ledger.sqlite")
    guard = BudgetGuard(PrivacyBudget(1.0, 1e-3), ledger)
    for number in (1, 2, 3):
        guard.authorize(release(number))
    with pytest.raises(BudgetExhausted):
        guard.authorize(release(1000))
    found = of(tmp_path / "ledger.sqlite")
    events = [PoissonSampledGaussian(sampling_rate=0.25, noise_multiplier=3.5, steps=steps) for steps in (1, 2, 3)]
    assert found.wrong == ()
    assert (found.claims, found.delta) == (4, 1e-3)
    assert found.claimed == pytest.approx(rdp_epsilon(events, 1e-3))
    assert [total.name for total in found.totals] == ["RDP", "PRV", "PLD"]
    assert all(0 < total.epsilon <= found.claimed * (1 + 1e-9) for total in found.totals)
    assert [each.sequence for each in found.found] == [2, 3, 4, 5]
    assert found.found[1].epsilon == rdp_epsilon(events[1:2], 1e-3)
    assert found.found[1].cumulative == rdp_epsilon(events[:2], 1e-3)
    assert found.found[2].cumulative == found.totals[0].epsilon < found.found[3].cumulative


def test_a_ledger_with_shared_noise_holds(tmp_path: Path) -> None:
    """Releases with integer noise are read back as they were booked, compose with local ones, and hold by RDP; the
    accountants that have no figure for them accuse nobody."""
    ledger = open_ledger(tmp_path / "ledger.sqlite")
    guard = BudgetGuard(PrivacyBudget(1.0, 1e-3), ledger)
    guard.authorize(release(1))
    for number, event in enumerate(SHARED, start=2):
        guard.authorize(replace(release(number), event=event))
    with pytest.raises(BudgetExhausted, match=r"at the same noise multiplier, 20, \d+ steps would fit$"):
        guard.authorize(replace(release(9), event=replace(SHARED[0], steps=10_000)))
    found = of(tmp_path / "ledger.sqlite")
    events = (replace(EVENT, steps=1), *SHARED)
    assert events_in(tmp_path / "ledger.sqlite") == ledger.events == events
    assert found.wrong == ()
    assert found.claimed == pytest.approx(rdp_epsilon(events, 1e-3))
    assert [total.epsilon == math.inf for total in found.totals] == [False, True, True]


def test_a_claim_of_shared_noise_that_does_not_hold(tmp_path: Path) -> None:
    """Too low an epsilon for integer noise is found out."""
    ledger = open_ledger(tmp_path / "ledger.sqlite")
    claim = Claim(delta=1e-3, epsilon=1e-3, cumulative_epsilon=1e-3, budget_epsilon=2.0)
    ledger.reserve(replace(release(1), event=SHARED[0]), lambda _: claim)
    assert [text.partition(":")[0] for text in of(tmp_path / "ledger.sqlite").wrong] == ["row 2", "row 2", "all rows"]


def test_an_empty_ledger(tmp_path: Path) -> None:
    """A ledger in which nothing is reserved claims nothing."""
    open_ledger(tmp_path / "ledger.sqlite").close()
    assert of(tmp_path / "ledger.sqlite") == Recomputed(0, 0.0, None, (), ())


@pytest.mark.parametrize(
    ("claim", "texts"),
    [
        (Claim(delta=1e-3, epsilon=0.1, cumulative_epsilon=2.0, budget_epsilon=2.0), ["for this release, found 0."]),
        (
            Claim(delta=1e-3, epsilon=2.0, cumulative_epsilon=0.1, budget_epsilon=2.0),
            ["for all together, found 0.", "RDP finds", "PRV finds", "PLD finds"],
        ),
        (
            Claim(delta=1e-3, epsilon=2.0, cumulative_epsilon=2.0, budget_epsilon=1.0),
            ["reserved at epsilon 2, expected at most its budget 1"],
        ),
    ],
    ids=["this release", "all together", "its budget"],
)
def test_a_claim_that_does_not_hold(tmp_path: Path, claim: Claim, texts: list[str]) -> None:
    """A site that signs too low an epsilon, or reserves beyond its budget, is found out without its key."""
    assert 0.1 < rdp_epsilon([EVENT], 1e-3) < 1
    ledger = open_ledger(tmp_path / "ledger.sqlite")
    ledger.reserve(release(1, steps=EVENT.steps), lambda _: claim)
    found = of(tmp_path / "ledger.sqlite")
    assert len(found.wrong) == len(texts)
    for text, expected in zip(found.wrong, texts, strict=True):
        assert expected in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"event": None}, "TypeError"),
        ({"event": {"mechanism": "Magic"}}, "KeyError"),
        ({"event": {"mechanism": "PoissonSampledGaussian", "steps": 1}}, "TypeError"),
        ({"delta": "small"}, "ValueError"),
        ({"delta": 2.0}, "UnsupportedEvent"),
        ({"epsilon": None}, "TypeError"),
        ({"cumulative_epsilon": 10**400}, "OverflowError"),
        ({"decision": None}, "all together"),
        ({"epsilon": "nan"}, "claims epsilon nan for this release"),
        ({"cumulative_epsilon": "nan"}, "reserved at epsilon nan"),
    ],
)
def test_a_row_that_is_none(tmp_path: Path, changes: dict[str, object], text: str) -> None:
    """A decision that cannot be read, or whose numbers are none, is wrong; the rows after it are still recomputed."""
    ledger = open_ledger(tmp_path / "ledger.sqlite")
    BudgetGuard(PrivacyBudget(1.0, 1e-3), ledger).authorize(release(1))
    BudgetGuard(PrivacyBudget(1.0, 1e-3), ledger).authorize(release(2))
    opening, first, second = verify(read_ledger(tmp_path / "ledger.sqlite")).entries
    found = recompute([opening, {**first, **changes}, {**second, "cumulative_epsilon": 0.1}])
    assert any(line.startswith("row 2") and text in line for line in found.wrong) or "decision" in changes
    assert any(line.startswith("row 3: claims epsilon 0.1 for all together") for line in found.wrong)
    assert found.claims == 2
