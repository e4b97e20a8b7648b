"""From a history of releases to epsilon: one contract for all accountants, and what is known of the truth."""

import itertools
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from support.privacy_loss import (
    epsilon_by_divergences,
    exact_epsilon,
    gaussian_delta,
    gaussian_epsilon,
    renyi_divergence,
)

from dp import accountants
from dp.accountants import ACCOUNTANTS, ORDERS, Accountant, Pld, Prv, Rdp, noise_multiplier_for, rdp_epsilon
from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import PoissonSampledGaussian

DELTA = 1e-5
RDP, PRV, PLD = Rdp(), Prv(), Pld()
assert ACCOUNTANTS == (RDP, PRV, PLD)
# The orders that the published figures used, Opacus' and TensorFlow Privacy's, as far as one of them is best.
THEIR_ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *map(float, range(12, 30)))

every = pytest.mark.parametrize("accountant", ACCOUNTANTS, ids=lambda accountant: accountant.name)
nearly_exact = pytest.mark.parametrize("accountant", [PRV, PLD], ids=lambda accountant: accountant.name)


def event(q: float = 0.02, z: float = 1.0, steps: int = 50) -> PoissonSampledGaussian:
    """A mechanism in short."""
    return PoissonSampledGaussian(sampling_rate=q, noise_multiplier=z, steps=steps)


def allowed(rdp: float) -> float:
    """By how much a nearly exact accountant may be off, as its documentation states."""
    return 0.01 * max(rdp, 0.1)


MIXED = [event(0.02, 1.0, 50), event(0.3, 4.0, 20), event(1.0, 12.0, 7), event(0.001, 0.6, 90)]


# The contract, which each accountant keeps.


@every
def test_it_says_what_it_is(accountant: Accountant) -> None:
    """Name and library versions are there for reports, and the names differ."""
    assert accountant.name in {"RDP", "PRV", "PLD"}
    assert any(package in accountant.version for package in ("dp-accounting 0.", "prv-accountant 0."))
    assert len({each.name for each in ACCOUNTANTS}) == len(ACCOUNTANTS)


@every
def test_nothing_costs_nothing(accountant: Accountant) -> None:
    """An empty history has epsilon 0."""
    assert accountant.epsilon([], DELTA) == 0.0


@every
@pytest.mark.parametrize("q", [0.02, 0.4, 1.0])
@pytest.mark.parametrize("z", [0.7, 3.0])
def test_more_data_more_steps_less_noise_or_less_delta_cost_more(accountant: Accountant, q: float, z: float) -> None:
    """Epsilon grows with steps and sampling rate, and falls with noise and delta."""
    base = accountant.epsilon([event(q, z, 40)], DELTA)
    assert 0 < base < math.inf
    assert accountant.epsilon([event(q, z, 60)], DELTA) > base
    assert accountant.epsilon([event(q, z / 1.3, 40)], DELTA) > base
    assert accountant.epsilon([event(q, z, 40)], DELTA / 30) > base
    if q < 1:
        assert accountant.epsilon([event(min(1.0, 1.5 * q), z, 40)], DELTA) > base


@every
def test_the_order_of_a_history_does_not_matter(accountant: Accountant) -> None:
    """Any order of the same releases has the same epsilon, to the last bit."""
    expected = accountant.epsilon(MIXED, DELTA)
    assert accountant.epsilon(MIXED[::-1], DELTA) == expected
    assert accountant.epsilon(iter([*MIXED[2:], *MIXED[:2]]), DELTA) == expected


@every
def test_split_steps_cost_the_same(accountant: Accountant) -> None:
    """Fifty releases of 50 steps cost what one of 2,500 costs, also in between others, to the last bit."""
    assert accountant.epsilon([event()] * 50, DELTA) == accountant.epsilon([event(steps=2500)], DELTA)
    split = [event(0.02, 1.0, 20), *MIXED[1:], event(0.02, 1.0, 30)]
    assert accountant.epsilon(split, DELTA) == accountant.epsilon(MIXED, DELTA)


@every
def test_each_release_of_a_mixed_history_counts(accountant: Accountant) -> None:
    """A history costs more than any part of it, and at most what its parts cost at a share of delta each."""
    whole = accountant.epsilon(MIXED, DELTA)
    for left_out in range(len(MIXED)):
        assert accountant.epsilon(MIXED[:left_out] + MIXED[left_out + 1 :], DELTA) < whole
    assert whole < sum(accountant.epsilon([each], DELTA / len(MIXED)) for each in MIXED)


@every
@pytest.mark.parametrize(
    ("z", "steps"), [(0.3, 1), (0.7, 1), (4.0, 1), (1.5, 3), (10.0, 20), (60.0, 10_000), (900.0, 1)]
)
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
def test_never_below_the_gaussian_mechanism(accountant: Accountant, z: float, steps: int, delta: float) -> None:
    """With everybody in each step the exact epsilon is known (Balle and Wang 2018), and none is below it; the nearly
    exact ones are above by no more than they state."""
    exact = gaussian_epsilon(z / math.sqrt(steps), delta)
    found = accountant.epsilon([event(1.0, z, steps)], delta)
    assert exact <= found < math.inf
    if accountant != RDP:
        assert found <= exact + 2.1 * allowed(rdp_epsilon([event(1.0, z, steps)], delta))


@every
def test_never_below_the_gaussian_mechanism_for_mixed_noise(accountant: Accountant) -> None:
    """Gaussian releases of different noise are together one Gaussian mechanism, whose exact epsilon none is below."""
    history = [event(1.0, 3.0, 2), event(1.0, 8.0, 5), event(1.0, 20.0, 40)]
    exact = gaussian_epsilon(sum(each.steps / each.noise_multiplier**2 for each in history) ** -0.5, DELTA)
    assert exact <= accountant.epsilon(history, DELTA) <= 1.12 * exact


@every
@pytest.mark.parametrize(
    "history",
    [[event()], [event(steps=2500)], [event(0.3, 5.0, 20)], [event(0.27, 1.1, 20)], [event(0.5, 0.7, 5)], MIXED],
    ids=["one round", "fifty rounds", "large rate", "hospital", "little noise", "mixed"],
)
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_never_below_the_integrated_privacy_loss(
    accountant: Accountant, history: list[PoissonSampledGaussian], delta: float
) -> None:
    """With sampling, none is below epsilon from our own integration; the nearly exact ones stay within their error."""
    exact = exact_epsilon(tuple(history), delta, largest=60)
    found = accountant.epsilon(history, delta)
    assert exact <= found * (1 + 1e-5)
    assert found < 2.5 * exact if accountant == RDP else found <= exact + 2.1 * allowed(rdp_epsilon(history, delta))


@every
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, float("nan")])
def test_delta_is_a_probability(accountant: Accountant, delta: float) -> None:
    """A delta that is no probability between 0 and 1 has no epsilon, not even for an empty history."""
    for history in ([event()], []):
        with pytest.raises(UnsupportedEvent, match=rf"delta: found {delta}, expected above 0 and below 1"):
            accountant.epsilon(history, delta)


HARD = {
    "privacy.05": event(0.3, 0.05, 50),
    "no noise": event(0.3, 1e-3, 1),
    "its square is 0": event(0.3, 1e-200, 1),
    "its square is infinite": event(0.3, 1e200, 1),
    "many steps": event(0.01, 1.0, 10**7),
    "more steps than floats count": event(0.01, 1.0, 10**400),
    "rare and noiseless": event(1e-9, 0.05, 1),
    "very rare": event(1e-300, 1.0, 1),
    "nearly always": event(1 - 2**-53, 0.2, 3),
    "an even chance in much noise": event(0.5, 1e4, 100),
}


@every
@pytest.mark.parametrize("hard", HARD.values(), ids=HARD)
@pytest.mark.parametrize("delta", [0.3, 1e-5, 1e-14])
def test_what_cannot_be_computed_is_infinite_and_soon(
    accountant: Accountant, hard: PoissonSampledGaussian, delta: float
) -> None:
    """Extreme mechanisms take no more than some seconds of processor time, and give neither NaN nor less than the
    mechanism costs by the probability that the patient is in a step and the plain Gaussian mechanism tells them."""
    began = time.process_time()
    found = accountant.epsilon([hard], delta)
    assert time.process_time() - began < 30
    assert found >= 0
    # With probability q one step is the plain mechanism, so delta at this epsilon is at least q times the plain one's,
    # less what the ratio 1 - q + q e^loss is short of q e^loss.
    if 0.1 < hard.noise_multiplier < 100 and found < 700:
        plain = gaussian_delta(math.log1p(math.expm1(found) / hard.sampling_rate), hard.noise_multiplier)
        assert hard.sampling_rate * plain <= delta * (1 + 1e-6)


# Agreement: with each other, with Opacus, with our own integration, with what others have published.

GRID = [*itertools.product([0.002, 0.05, 0.3, 0.9], [0.8, 2.0, 10.0], [1, 30]), (0.002, 0.8, 1000), (0.3, 10.0, 1000)]


@pytest.mark.parametrize(("q", "z", "steps"), GRID)
def test_the_accountants_agree(q: float, z: float, steps: int) -> None:
    """PLD lies in PRV's interval but for its own error, and RDP is above the truth that both enclose."""
    history = [event(q, z, steps)]
    rdp = rdp_epsilon(history, DELTA)
    lower, upper = PRV.bounds(history, DELTA)
    pld = PLD.epsilon(history, DELTA)
    assert 0 <= lower <= pld <= upper + allowed(rdp)
    assert upper - lower <= 2.1 * allowed(rdp) + 1e-3 * rdp
    assert rdp >= max(lower, pld - allowed(rdp))


@pytest.mark.parametrize(("q", "z", "steps"), [(0.01, 1.1, 1000), (0.3, 5.0, 20), (0.02, 0.7, 10), (0.5, 3.0, 100)])
def test_never_above_opacus_own_accountant(q: float, z: float, steps: int) -> None:
    """More orders give the bound of Opacus' own RDP accountant or a slightly better one, never another result."""
    theirs = RDPAccountant()
    theirs.history = [(z, q, steps)]
    epsilon = theirs.get_epsilon(delta=DELTA)
    assert epsilon * 0.98 < rdp_epsilon([event(q, z, steps)], DELTA) <= epsilon * (1 + 1e-9)


@pytest.mark.parametrize(("q", "z", "steps"), [(0.01, 1.1, 1000), (0.3, 5.0, 20), (0.02, 0.7, 10), (0.5, 3.0, 100)])
def test_in_line_with_opacus_exact_accountant(q: float, z: float, steps: int) -> None:
    """Opacus' PRV accountant, an upper bound to within 0.02, lies between our lower bound and 0.02 above our upper
    one."""
    theirs = PRVAccountant()
    theirs.history = [(z, q, steps)]
    lower, upper = PRV.bounds([event(q, z, steps)], DELTA)
    assert lower <= theirs.get_epsilon(delta=DELTA, eps_error=0.01) <= upper + 0.02


@pytest.mark.parametrize("q", [1e-4, 0.02, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("z", [0.1, 0.5, 1.0, 5.0, 50.0])
def test_divergences_are_those_of_the_definition(q: float, z: float) -> None:
    """At fractional and whole orders alike the divergence of a step is the integral that defines it, or barely more."""
    for order in (1.02, 1.5, 2.0, 2.7, 10.9, 23.0, 512.0):
        by_definition = renyi_divergence(q, z, order)
        found = accountants._divergence(event(q, z, 1), order)
        assert (
            by_definition * (1 - 1e-9) - 1e-13 / (order - 1)
            <= found
            <= by_definition * (1 + 1e-7) + 3e-12 / (order - 1)
        )


@pytest.mark.parametrize("q", [0.001, 0.4, 1.0])
@pytest.mark.parametrize("z", [0.6, 4.0])
@pytest.mark.parametrize("steps", [1, 100, 10_000])
@pytest.mark.parametrize("delta", [1e-3, 1e-8])
def test_the_best_order_is_found(q: float, z: float, steps: int, delta: float) -> None:
    """The search gives the least bound of all orders, which is at neither end of the list, and is what dp-accounting's
    own accountant gives or less."""
    history = ((event(q, z, 1), steps),)
    orders = ORDERS[: ORDERS.index(1024) + 1]
    bounds = [accountants._bound(history, delta, order) for order in orders]
    found = rdp_epsilon([event(q, z, steps)], delta)
    assert found == min(bounds)
    assert found == 0 or 0 < bounds.index(found) < len(orders) - 1
    whole = [order for order in ORDERS if order.is_integer() and order <= 512]
    theirs = RdpAccountant(whole).compose(PoissonSampledDpEvent(q, GaussianDpEvent(z)), steps).get_epsilon(delta)
    assert found <= theirs * (1 + 1e-9) + 1e-7


@pytest.mark.parametrize("epsilon", [0.002, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("q", [0.01, 0.3, 1.0])
def test_orders_reach_far_enough_for_any_budget(epsilon: float, q: float) -> None:
    """From small budgets to senseless ones, the best order is inside the list."""
    z = noise_multiplier_for(epsilon=epsilon, delta=DELTA, sampling_rate=q, steps=20)
    first, *_, last = (accountants._bound(((event(q, z, 1), 20),), DELTA, order) for order in (ORDERS[0], ORDERS[-1]))
    assert rdp_epsilon([event(q, z, 20)], DELTA) < min(first, last)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure that others have published, with its source, and how it was converted."""

    source: str
    q: float
    z: float
    steps: int
    epsilon: float
    within: float
    how: str
    delta: float = DELTA

    def confirmed(self) -> float:
        """The figure by our own integration."""
        if self.how == "exact":
            return exact_epsilon((self.event,), self.delta, largest=40)
        return epsilon_by_divergences(self.q, self.z, self.steps, self.delta, orders=THEIR_ORDERS, conversion=self.how)

    @property
    def event(self) -> PoissonSampledGaussian:
        """The mechanism."""
        return event(self.q, self.z, self.steps)


OLD, NEW, EXACT = "Mironov 2017", "Canonne 2020", "exact"
MNIST = 256 / 60_000
TFP = "TensorFlow Privacy, tutorials/README.md, MNIST with 234 steps an epoch"
PUBLISHED = [
    Published(
        source="Abadi et al., CCS 2016, moments accountant against strong composition (there 9.34)",
        **{"q": 0.01, "z": 4.0, "steps": 10_000, "epsilon": 1.26, "within": 0.005, "how": OLD},
    ),
    *(
        Published(source=f"{TFP}, {epochs} epochs", q=MNIST, z=z, steps=234 * epochs, epsilon=e, within=0.008, how=OLD)
        for z, epochs, e in [(1.12, 1, 1.00), (1.12, 2, 1.04), (1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20)]
    ),
    Published(
        source="Bu, Dong, Long, Su, Deep learning with Gaussian DP, HDSR 2020, figure 4, moments accountant, 20 epochs",
        **{"q": MNIST, "z": 1.3, "steps": 4687, "epsilon": 1.34, "within": 0.01, "how": OLD},
    ),
    Published(
        source="ibidem, 70 epochs",
        **{"q": MNIST, "z": 0.7, "steps": 16_406, "epsilon": 8.68, "within": 0.005, "how": OLD},
    ),
    Published(
        source="Opacus, examples/mnist_README.md, first epoch of 250 steps",
        **{"q": 0.004, "z": 1.3, "steps": 250, "epsilon": 0.71, "within": 0.005, "how": OLD},
    ),
    Published(
        source="Opacus, opacus/tests/accountants_test.py, test_rdp_accountant",
        **{"q": 0.04, "z": 1.5, "steps": 2250, "epsilon": 7.32911117143, "within": 1e-6, "how": NEW},
    ),
    Published(
        source="Opacus, same file, test_get_noise_multiplier_rdp_epochs, a search for 8",
        **{"q": 0.04, "z": 1.416, "steps": 2250, "epsilon": 8.0, "within": 0.01, "how": NEW},
    ),
    Published(
        source="Opacus, same file, test_get_noise_multiplier_rdp_steps, a search for 8",
        **{"q": 0.04, "z": 1.3562, "steps": 2000, "epsilon": 8.0, "within": 0.01, "how": NEW},
    ),
    Published(
        source="Opacus, same file, test_prv_accountant: an upper bound to within 0.01",
        **{"q": 0.04, "z": 1.5, "steps": 2249, "epsilon": 6.777395712150674 - 0.01, "within": 0.001, "how": EXACT},
    ),
    Published(
        source="dp-accounting, pld_privacy_accountant_test.py, test_poisson_subsampled_gaussian",
        **{"q": 0.2, "z": 0.5, "steps": 3, "epsilon": 1.0, "within": 0.001, "how": EXACT, "delta": 0.15594},
    ),
    Published(
        source="dp-accounting, pld/accountant_test.py, smallest subsampled Gaussian noise, base",
        **{"q": 0.01, "z": 0.67379294682, "steps": 1, "epsilon": 1.0, "within": 0.001, "how": EXACT},
    ),
    Published(
        source="dp-accounting, same file, 25 queries of sensitivity 6",
        **{"q": 0.001, "z": 3.20956502598 / 6, "steps": 25, "epsilon": 1.0, "within": 0.001, "how": EXACT},
    ),
]


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.source)
def test_published_figures(published: Published) -> None:
    """Each published figure is confirmed by our own integration, and the accountants give it, or better if it comes
    from a conversion that has been improved since."""
    assert published.confirmed() == pytest.approx(published.epsilon, abs=published.within)
    rdp = rdp_epsilon([published.event], published.delta)
    lower, upper = PRV.bounds([published.event], published.delta)
    pld = PLD.epsilon([published.event], published.delta)
    assert lower <= pld <= rdp
    if published.how == EXACT:
        assert lower <= published.epsilon + published.within
        assert published.epsilon - published.within <= upper
        assert pld == pytest.approx(published.epsilon, abs=published.within + allowed(rdp))
    elif published.how == NEW:
        assert rdp == pytest.approx(published.epsilon, abs=published.within, rel=1e-3)
    else:
        assert pld < rdp < published.epsilon


def test_gaussian_mechanism_as_published() -> None:
    """Three releases at noise sqrt(3) are (1, 0.126936)-private: dp-accounting's test_gaussian_basic, and the normal
    mechanism of deviation 1 in Balle and Wang 2018."""
    assert gaussian_delta(1.0, 1.0) == pytest.approx(0.126936, abs=1e-6)
    for accountant in (PRV, PLD):
        found = accountant.epsilon([event(1.0, math.sqrt(3), 3)], 0.126936)
        assert found == pytest.approx(1.0, abs=0.03)


def test_one_round_is_not_fifty() -> None:
    """The known trap: 50 steps at q = 0.02, z = 1 cost 1.61, fifty such rounds together 6.93, however split."""
    assert rdp_epsilon([event()], DELTA) == pytest.approx(1.61, abs=0.005)
    assert rdp_epsilon([event()] * 50, DELTA) == pytest.approx(6.93, abs=0.005)
    integrated = epsilon_by_divergences(0.02, 1.0, 2500, DELTA, orders=THEIR_ORDERS, conversion=NEW)
    assert integrated == pytest.approx(6.93, abs=0.005)


def test_one_image_of_a_patient() -> None:
    """One image per patient at q = 0.01, z = 1, 1,000 steps costs 1.93 by PRV with an error of 0.1: 1.83 in truth."""
    history = [event(0.01, 1.0, 1000)]
    assert exact_epsilon(tuple(history), DELTA, largest=40) + 0.1 == pytest.approx(1.93, abs=0.005)
    assert PLD.epsilon(history, DELTA) + 0.1 == pytest.approx(1.93, abs=0.01)


# What cannot be computed, the time it takes, and what is imported.


@nearly_exact
def test_what_would_overflow_or_take_long_is_infinite(accountant: Accountant) -> None:
    """An epsilon in the hundreds, a delta that rounding decides, and too many steps have no figure."""
    assert accountant.epsilon([event(0.3, 0.05, 50)], DELTA) == math.inf
    assert accountant.epsilon([event()], 1e-12) == math.inf
    assert accountant.epsilon([event(1e-6, 1.0, 10**10)], DELTA) == math.inf


def test_a_failure_of_the_library_is_no_small_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the package raises, or answers with NaN or an interval upside down, PRV shows no bound."""
    import prv_accountant

    answers: list[object] = [RuntimeError("no convergence"), (0.1, math.nan, math.nan), (0.3, 0.2, 0.1)]

    def answer(*_: object) -> object:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(prv_accountant.PRVAccountant, "compute_epsilon", answer)
    for _ in range(3):
        assert PRV.bounds([event()], DELTA) == (0.0, math.inf)


@pytest.mark.parametrize("wrong", [math.nan, -1e-9, ZeroDivisionError("z")])
def test_a_wrong_divergence_is_no_perfect_privacy(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    """NaN, a negative divergence and an arithmetic error make epsilon infinite, not 0."""

    def compose(_: RdpAccountant, *__: object) -> object:
        if isinstance(wrong, Exception):
            raise wrong
        return type("Composed", (), {"_rdp": [wrong]})()

    monkeypatch.setattr(RdpAccountant, "compose", compose)
    monkeypatch.setattr(accountants, "ORDERS", (2.0, 3.0, 64.0))
    accountants._divergence.cache_clear()
    try:
        assert rdp_epsilon([event()], DELTA) == math.inf
    finally:
        accountants._divergence.cache_clear()


def test_the_gate_needs_no_torch() -> None:
    """Importing the accountants imports neither torch nor any accounting library; using all of them imports no
    torch."""
    code = """
import sys
from dp.accountants import ACCOUNTANTS
from dp.events import PoissonSampledGaussian
heavy = {"torch", "opacus", "dp_accounting", "prv_accountant", "scipy"} & set(sys.modules)
assert not heavy, heavy
event = PoissonSampledGaussian(sampling_rate=0.02, noise_multiplier=1.0, steps=50)
print([round(accountant.epsilon([event], 1e-5), 2) for accountant in ACCOUNTANTS])
assert not {"torch", "opacus"} & set(sys.modules)
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("[1.61, 1.1")
    assert not ended.stderr


# The least noise that fits.


@given(st.floats(0.01, 1.0), st.floats(0.8, 20.0), st.integers(1, 200))
@settings(max_examples=25, deadline=None)
def test_the_gate_is_strictly_monotone(q: float, z: float, steps: int) -> None:
    """Even small changes count: more steps or a higher rate cost more, more noise costs less."""
    base = rdp_epsilon([event(q, z, steps)], DELTA)
    assert base > 0
    assert rdp_epsilon([event(q, z, steps + 1)], DELTA) > base
    assert rdp_epsilon([event(q, 1.01 * z, steps)], DELTA) < base
    assert rdp_epsilon([event(0.99 * q, z, steps)], DELTA) < base


@pytest.mark.parametrize(
    ("epsilon", "q", "steps"), [(0.01, 0.1, 20), (0.5, 0.37, 20), (1.0, 1.0, 20), (8.0, 0.05, 500), (60.0, 0.4, 5)]
)
def test_the_least_noise_that_fits(epsilon: float, q: float, steps: int) -> None:
    """The noise multiplier found stays within epsilon, and 0.1 per cent less does not."""
    z = noise_multiplier_for(epsilon=epsilon, delta=DELTA, sampling_rate=q, steps=steps)
    assert rdp_epsilon([event(q, z, steps)], DELTA) <= epsilon
    assert rdp_epsilon([event(q, 0.999 * z, steps)], DELTA) > epsilon


def test_even_a_boundless_budget_gets_some_noise() -> None:
    """The noise multiplier is never below 0.05."""
    assert noise_multiplier_for(epsilon=1e6, delta=DELTA, sampling_rate=0.1, steps=1) == 0.05


def test_what_is_spent_leaves_less() -> None:
    """After earlier releases the same steps need more noise, and all together stay within epsilon."""
    spent = [event(0.3, 6.0, 10)]
    fresh, after = (
        noise_multiplier_for(epsilon=2.0, delta=DELTA, sampling_rate=0.3, steps=10, spent=history)
        for history in ([], spent)
    )
    assert after > fresh
    assert rdp_epsilon([*spent, event(0.3, after, 10)], DELTA) <= 2.0
    assert rdp_epsilon([*spent, event(0.3, 0.998 * after, 10)], DELTA) > 2.0


def test_no_noise_helps_when_all_is_spent() -> None:
    """With nothing left, or nothing to speak of, the error gives what is spent and what is allowed."""
    for epsilon in (1.5, 1.61):
        with pytest.raises(
            BudgetExhausted, match=rf"epsilon 1\.607 is spent, expected at most {epsilon} at delta 1e-05"
        ):
            noise_multiplier_for(epsilon=epsilon, delta=DELTA, sampling_rate=0.1, steps=1, spent=[event()])


def test_some_budgets_cannot_be_met_at_all() -> None:
    """Where no noise fits, the refusal says what the steps cost even with the most noise."""
    with pytest.raises(
        BudgetExhausted,
        match=r"the least that these can cost leads to 0\.00\d+, expected at most 0\.0001 at delta 1e-09",
    ):
        noise_multiplier_for(epsilon=1e-4, delta=1e-9, sampling_rate=1.0, steps=1)


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
