"""Whole rounds of random cohorts, weights and dropouts."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secureagg import RoundAborted
from secureagg.parameters import default_threshold
from secureagg.testing import HOMOMORPHIC_PHASES, PHASES, CountingEntropy, RoundOutcome, run_round

BEFORE_THE_INPUT = ("AdvertisingKeys", "SharingKeys", "CollectingMaskedInputs")


@dataclass(frozen=True)
class Case:
    """The arguments of one round."""

    updates: dict[str, np.ndarray]
    value_range: float
    value_bits: int
    weights: dict[str, int] | None
    dropouts: dict[str, str]
    seed: int


@st.composite
def cases(draw: st.DrawFn, phases: tuple[str, ...] = PHASES) -> Case:
    """Random arguments of a round, the edges of the range among them; ``phases``: in which a site may fall silent."""
    n, length = draw(st.integers(3, 12)), draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    names = [f"site-{index}" for index in range(n)]
    value_range = draw(st.sampled_from([1e-3, 1.0, 7.5, 1e6]))
    updates = {name: random.uniform(-value_range, value_range, length) for name in names}
    if draw(st.booleans()):  # everybody at the edge: the largest sum there is
        updates = {name: np.full(length, value_range) for name in names}
    weights = None
    if draw(st.booleans()):
        weights = {name: int(random.integers(0, 10_000)) for name in names}
    dropouts = draw(st.dictionaries(st.sampled_from(names), st.sampled_from(phases), max_size=n))
    return Case(updates, value_range, draw(st.integers(2, 32)), weights, dropouts, seed)


def check(case: Case, **backend: str) -> RoundOutcome | None:
    """The survivors' exact sum and their mean within one step, or RoundAborted when too few are left."""
    n, needed = len(case.updates), default_threshold(len(case.updates))
    survivors = {name for name in case.updates if case.dropouts.get(name) not in BEFORE_THE_INPUT}
    enough = n - len(case.dropouts) >= needed
    try:
        outcome = run_round(
            case.updates,
            value_range=case.value_range,
            value_bits=case.value_bits,
            weights=case.weights,
            dropouts=case.dropouts,
            entropy=CountingEntropy(case.seed),
            **backend,
        )
    except RoundAborted:
        weighted_to_nothing = case.weights is not None and not any(case.weights[name] for name in survivors)
        assert not enough or weighted_to_nothing
        return None
    assert enough
    assert set(outcome.survivors) == survivors
    np.testing.assert_array_equal(outcome.total, sum(outcome.encoded.values()))
    weights = case.weights or dict.fromkeys(survivors, 1)
    mean = sum(weights[name] * case.updates[name] for name in survivors) / sum(weights[name] for name in survivors)
    step = case.value_range / (2 ** (case.value_bits - 1) - 1)
    assert (np.abs(outcome.aggregate - mean) <= step * (1 + 1e-9) + 1e-12 * case.value_range).all()
    return outcome


@given(cases())
@settings(max_examples=60, deadline=None)
def test_a_round_yields_the_survivors_sum_or_nothing(case: Case) -> None:
    """At or above the threshold the aggregate is the survivors' weighted mean within one quantisation step and the
    total their exact integer sum; below it nothing is released."""
    check(case)


@given(cases(HOMOMORPHIC_PHASES), st.sampled_from(["sites", "coordinator"]))
@settings(max_examples=20, deadline=None)
def test_the_backends_give_the_same(case: Case, release_to: str) -> None:
    """With the homomorphic backend, whoever is given the sum and whenever sites fall silent, the integers of the total
    are those of the masked backend, in which a site that would be silent while the sum is opened has done its part."""
    pytest.importorskip("tenseal")
    outcome = check(case, backend="homomorphic", release_to=release_to)
    earlier = {site: phase for site, phase in case.dropouts.items() if phase in PHASES}
    if outcome is not None:
        masked = check(replace(case, dropouts=earlier))
        assert masked.survivors == outcome.survivors
        np.testing.assert_array_equal(masked.total, outcome.total)
        np.testing.assert_array_equal(masked.aggregate, outcome.aggregate)


@pytest.mark.parametrize("sites", [20, 50, 100])
def test_large_cohorts(sites: int) -> None:
    """The same at 20, 50 and 100 sites, with dropouts at every phase."""
    random = np.random.default_rng(sites)
    names = [f"site-{index}" for index in range(sites)]
    dropouts = {names[index * sites // 12]: phase for index, phase in enumerate(PHASES)}
    weights = {name: int(random.integers(1, 1000)) for name in names}
    updates = {name: random.normal(0, 0.2, 30).clip(-1, 1) for name in names}
    check(Case(updates, 1.0, 16, weights, dropouts, sites))
