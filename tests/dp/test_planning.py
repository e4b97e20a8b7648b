"""What training will cost, before it is begun."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp.accountants import rdp_epsilon
from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.planning import BudgetPlan, plan

HOSPITAL: dict[str, Any] = {
    "patients": 30,
    "batch_size": 8,
    "rounds": 10,
    "steps": 2,
    "epsilon": 1.0,
    "delta": 1e-3,
}
SPENT = [PoissonSampledGaussian(sampling_rate=0.5, noise_multiplier=14.0, steps=20)]


def hospital(**changes: Any) -> BudgetPlan:
    """The plan of a hospital with 30 patients, or another one."""
    return plan(**{**HOSPITAL, **changes})


def test_the_plan_fits_the_budget_and_wastes_nothing() -> None:
    """All rounds with the planned noise stay within epsilon, and one per cent less noise would not."""
    made = hospital()
    z = made.planned.noise_multiplier
    event, less = (
        PoissonSampledGaussian(sampling_rate=8 / 30, noise_multiplier=noise, steps=20) for noise in (z, 0.99 * z)
    )
    assert made.after_round[-1] == rdp_epsilon([event], 1e-3) <= 1.0 < rdp_epsilon([less], 1e-3)
    assert made.spent == 0.0
    assert made.planned.noise_on_mean == pytest.approx(z / 8)


def test_epsilon_grows_round_by_round() -> None:
    """There is one epsilon per round, each above the one before, as accounting round by round gives it."""
    made = hospital(spent=SPENT)
    assert len(made.after_round) == 10
    epsilons = [made.spent, *made.after_round]
    assert all(before < after for before, after in itertools.pairwise(epsilons))
    one = PoissonSampledGaussian(sampling_rate=8 / 30, noise_multiplier=made.planned.noise_multiplier, steps=2)
    assert made.after_round == tuple(rdp_epsilon([*SPENT, *[one] * done], 1e-3) for done in range(1, 11))


def test_what_is_spent_leaves_less() -> None:
    """What a ledger holds counts: the same plan needs more noise, and all together stays within epsilon."""
    fresh, after = hospital(), hospital(spent=SPENT)
    assert after.spent == rdp_epsilon(SPENT, 1e-3) > 0
    assert after.planned.noise_multiplier > 1.1 * fresh.planned.noise_multiplier
    assert after.after_round[-1] <= 1.0
    assert after.planned.epsilon_at_planned_noise == after.after_round[-1]
    assert after.planned.epsilon_at_planned_noise > 0.99


def test_the_accountants_agree_on_the_total() -> None:
    """RDP's total is that of the last round, and the two nearly exact ones are below it, near each other."""
    made = hospital(spent=SPENT)
    rdp, prv, pld = made.totals
    assert [each.name for each in made.totals] == ["RDP", "PRV", "PLD"]
    assert all(each.version for each in made.totals)
    assert rdp.epsilon == made.after_round[-1]
    assert 0.5 < pld.epsilon < prv.epsilon < rdp.epsilon
    assert prv.epsilon - pld.epsilon < 0.03


def test_a_large_rate_costs_what_the_table_says() -> None:
    """At the same noise a larger batch costs a small hospital dearly; with the noise that fits it gains a little."""
    made = hospital()
    assert [row.batch_size for row in made.what_if] == [2, 4, 8, 16, 30]
    assert [row.sampling_rate for row in made.what_if] == pytest.approx([2 / 30, 4 / 30, 8 / 30, 16 / 30, 1.0])
    for smaller, larger in itertools.pairwise(made.what_if):
        assert smaller.noise_multiplier < larger.noise_multiplier
        assert smaller.noise_on_mean > larger.noise_on_mean
        assert smaller.epsilon_at_planned_noise < larger.epsilon_at_planned_noise
    assert made.planned in made.what_if
    assert made.what_if[-1].epsilon_at_planned_noise > 4
    for row in made.what_if:
        event = PoissonSampledGaussian(
            sampling_rate=row.sampling_rate, noise_multiplier=made.planned.noise_multiplier, steps=20
        )
        assert row.epsilon_at_planned_noise == rdp_epsilon([event], 1e-3)
        own = PoissonSampledGaussian(sampling_rate=row.sampling_rate, noise_multiplier=row.noise_multiplier, steps=20)
        assert 0.99 < rdp_epsilon([own], 1e-3) <= 1.0


def test_noise_on_the_mean_is_in_the_gradients_units() -> None:
    """Twice the clip norm is twice the noise on the averaged gradient, with the same epsilon and multiplier."""
    one, two = hospital(), hospital(clip_norm=2.0)
    assert two.planned.noise_multiplier == one.planned.noise_multiplier
    assert two.planned.noise_on_mean == 2 * one.planned.noise_on_mean
    assert two.after_round == one.after_round


def test_more_than_all_patients_are_all_patients() -> None:
    """A batch size above the number of patients takes all of them, and divides by as many as there are."""
    made = hospital(batch_size=64)
    assert made.planned.sampling_rate == 1.0
    assert made.planned.noise_on_mean == pytest.approx(made.planned.noise_multiplier / 30)
    assert made.planned.noise_multiplier == hospital(batch_size=30).planned.noise_multiplier


@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 4), st.integers(1, 5), st.floats(0.2, 8.0))
@settings(max_examples=15, deadline=None)
def test_any_plan_stays_within_its_budget(patients: int, batch: int, rounds: int, steps: int, epsilon: float) -> None:
    """Whatever is planned, the last round ends within epsilon, for each batch size that is offered."""
    made = plan(patients=patients, batch_size=batch, rounds=rounds, steps=steps, epsilon=epsilon, delta=1e-3)
    assert made.after_round[-1] <= epsilon
    assert made.planned in made.what_if
    assert all(row.batch_size <= patients or row == made.planned for row in made.what_if)


def test_a_spent_budget_is_refused_with_numbers() -> None:
    """Where nothing is left, the refusal says what is spent and what is allowed."""
    with pytest.raises(BudgetExhausted, match=r"20 steps .* epsilon 1\.\d+ is spent, expected at most 0\.9 at delta"):
        hospital(epsilon=0.9, spent=5 * SPENT)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("patients", 0, "found patients 0, expected 1 or more"),
        ("batch_size", -1, "found batch size -1, expected 1 or more"),
        ("rounds", 0, "found rounds 0, expected 1 or more"),
        ("steps", 0, "found steps 0, expected 1 or more"),
        ("epsilon", 0.0, "found epsilon 0.0, expected a finite number above 0"),
        ("epsilon", float("nan"), "found epsilon nan"),
        ("clip_norm", float("inf"), "found clip norm inf"),
        ("delta", 1.0, "delta: found 1.0, expected above 0 and below 1"),
    ],
)
def test_values_that_plan_nothing(name: str, value: float, text: str) -> None:
    """Each value out of its range is refused by name."""
    with pytest.raises(UnsupportedEvent, match=text):
        hospital(**{name: value})
