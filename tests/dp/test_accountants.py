"""From a history of releases to epsilon."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant

from dp.accountants import ORDERS, noise_multiplier_for, rdp_epsilon
from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import PoissonSampledGaussian

DELTA = 1e-5


def event(q: float = 0.02, z: float = 1.0, steps: int = 50) -> PoissonSampledGaussian:
    """A mechanism in short."""
    return PoissonSampledGaussian(sampling_rate=q, noise_multiplier=z, steps=steps)


def test_one_round_is_not_fifty() -> None:
    """The known trap: 50 steps at q = 0.02, z = 1 cost 1.61, fifty such rounds together 6.93, however split."""
    assert rdp_epsilon([event()], DELTA) == pytest.approx(1.61, abs=0.01)
    assert rdp_epsilon([event()] * 50, DELTA) == pytest.approx(6.93, abs=0.01)
    assert rdp_epsilon([event(steps=2500)], DELTA) == pytest.approx(rdp_epsilon([event()] * 50, DELTA), rel=1e-9)


@pytest.mark.parametrize(("q", "z", "steps"), [(0.01, 1.1, 1000), (0.3, 5.0, 20), (0.02, 0.7, 10), (0.5, 3.0, 100)])
def test_never_above_opacus_own_accountant(q: float, z: float, steps: int) -> None:
    """More orders give the bound of Opacus' own accountant or a slightly better one, never another result."""
    accountant = RDPAccountant()
    accountant.history = [(z, q, steps)]
    theirs = accountant.get_epsilon(delta=DELTA)
    assert theirs * 0.98 < rdp_epsilon([event(q, z, steps)], DELTA) <= theirs * (1 + 1e-9)


@pytest.mark.parametrize(("z", "steps"), [(4.0, 1), (10.0, 20), (1.5, 3)])
def test_full_batches_by_hand(z: float, steps: int) -> None:
    """With everybody in each step, RDP is alpha T / (2 z^2), converted as Balle et al. 2020, the least over orders."""
    by_hand = min(
        alpha * steps / (2 * z * z) + math.log((alpha - 1) / alpha) - (math.log(DELTA) + math.log(alpha)) / (alpha - 1)
        for alpha in ORDERS
    )
    assert rdp_epsilon([event(1.0, z, steps)], DELTA) == pytest.approx(by_hand, rel=1e-9)


@given(st.floats(0.01, 1.0), st.floats(0.8, 20.0), st.integers(1, 200))
@settings(max_examples=15, deadline=None)
def test_more_data_more_steps_or_less_noise_cost_more(q: float, z: float, steps: int) -> None:
    """Epsilon grows with steps and sampling rate and falls with the noise."""
    base = rdp_epsilon([event(q, z, steps)], DELTA)
    assert base > 0
    assert rdp_epsilon([event(q, z, steps + 10)], DELTA) > base
    assert rdp_epsilon([event(q, 1.2 * z, steps)], DELTA) < base
    assert rdp_epsilon([event(q / 2, z, steps)], DELTA) < base


def test_order_does_not_matter_and_nothing_costs_nothing() -> None:
    """A history is a sum: its order is of no consequence, and an empty one costs 0."""
    one, other = event(), event(0.1, 4.0, 7)
    assert rdp_epsilon([one, other], DELTA) == pytest.approx(rdp_epsilon([other, one], DELTA), rel=1e-12)
    assert rdp_epsilon([one, other], DELTA) > rdp_epsilon([one], DELTA)
    assert rdp_epsilon([], DELTA) == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_delta_is_a_probability(delta: float) -> None:
    """A delta that is no probability between 0 and 1 has no epsilon."""
    with pytest.raises(UnsupportedEvent, match="delta: found"):
        rdp_epsilon([event()], delta)


@pytest.mark.parametrize(("epsilon", "q", "steps"), [(0.5, 0.37, 20), (1.0, 1.0, 20), (8.0, 0.05, 500), (60.0, 0.4, 5)])
def test_the_least_noise_that_fits(epsilon: float, q: float, steps: int) -> None:
    """The noise multiplier found stays within epsilon, and one per cent less does not."""
    z = noise_multiplier_for(epsilon=epsilon, delta=DELTA, sampling_rate=q, steps=steps)
    assert rdp_epsilon([event(q, z, steps)], DELTA) <= epsilon
    assert rdp_epsilon([event(q, 0.99 * z, steps)], DELTA) > epsilon


def test_what_is_spent_leaves_less() -> None:
    """After earlier releases the same steps need more noise, and all together stay within epsilon."""
    spent = [event(0.3, 6.0, 10)]
    fresh, after = (
        noise_multiplier_for(epsilon=2.0, delta=DELTA, sampling_rate=0.3, steps=10, spent=history)
        for history in ([], spent)
    )
    assert after > fresh
    assert rdp_epsilon([*spent, event(0.3, after, 10)], DELTA) <= 2.0


def test_no_noise_helps_when_all_is_spent() -> None:
    """With nothing left, or nothing to speak of, the error gives what is spent and what is allowed."""
    for epsilon in (1.5, 1.61):
        with pytest.raises(
            BudgetExhausted, match=rf"epsilon 1\.607 is spent, expected at most {epsilon} at delta 1e-05"
        ):
            noise_multiplier_for(epsilon=epsilon, delta=DELTA, sampling_rate=0.1, steps=1, spent=[event()])


def test_some_budgets_cannot_be_met_at_all() -> None:
    """An epsilon below what the accountant can show for any noise is refused with the least that it can show."""
    with pytest.raises(
        BudgetExhausted, match=r"the least that these can cost leads to 0\.00\d+, expected at most 0\.001"
    ):
        noise_multiplier_for(epsilon=0.001, delta=DELTA, sampling_rate=0.1, steps=1)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"q": 0.0}, "sampling rate: found 0.0"),
        ({"q": 1.1}, "sampling rate: found 1.1"),
        ({"z": 0.0}, "noise multiplier: found 0.0"),
        ({"z": float("inf")}, "noise multiplier: found inf"),
        ({"z": float("nan")}, "noise multiplier: found nan"),
        ({"steps": 0}, "steps: found 0"),
    ],
)
def test_events_that_have_no_guarantee(fields: dict[str, float], text: str) -> None:
    """A mechanism without noise, steps or a sampling rate is no event."""
    with pytest.raises(UnsupportedEvent, match=text):
        event(**fields)  # type: ignore[arg-type]
