"""Bounds on the Renyi divergences of integer noise, against divergences added up from the probabilities themselves."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, logsumexp
from support.integer_pmf import (
    discrete_gaussian_log_pmf,
    neighbours,
    renyi,
    skellam_log_pmf,
    sum_of_discrete_gaussians_log_pmf,
)

from dp import divergences
from dp.accountants import ORDERS, Pld, Prv, rdp_epsilon, totals
from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledDiscreteGaussian, PoissonSampledGaussian, PoissonSampledSkellam

DELTA = 1e-5
WHOLE = (2, 3, 5, 8, 16)


def of_skellam(variance: float, shift: int):
    """The bound for one coordinate moved by ``shift``."""
    return lambda orders: divergences.skellam(orders, l2=shift, l1=shift, variance=variance)


def of_discrete(deviation: float, parties: int, shift: int, dimensions: int = 1):
    """The bound for so many discrete Gaussians in each coordinate."""
    return lambda orders: divergences.discrete_gaussian(
        orders, l2=shift, local_deviation=deviation, parties=parties, dimensions=dimensions
    )


def at(curve, order: int) -> float:
    """The bound at one order."""
    return float(curve(np.array([float(order)]))[0])


@pytest.mark.parametrize("order", WHOLE)
@pytest.mark.parametrize(("variance", "shift"), [(4.0, 1), (20.0, 1), (20.0, 5), (400.0, 20), (1e4, 7), (1e4, 150)])
def test_skellam_is_bounded_closely(order: int, variance: float, shift: int) -> None:
    """The divergence in one coordinate is below the bound, and close to it unless the order is too high for the
    noise, where the theorem's own terms are generous."""
    exact = renyi(
        *neighbours(skellam_log_pmf(variance, int(20 * math.sqrt(variance) + order * shift)), shift, 1), order
    )
    bound = at(of_skellam(variance, shift), order)
    assert exact <= bound <= exact * (1 + 3 * order * shift / variance)


def test_skellam_takes_the_lesser_of_both_terms() -> None:
    """The last term is the smaller one of the theorem's two: one wins for little noise, the other for much."""
    little, much = (divergences.skellam(np.array([64.0]), l2=10, l1=10, variance=v) for v in (5.0, 1e6))
    assert little == pytest.approx(64 * 100 / 10 + 3 * 10 / 10)
    assert much == pytest.approx(64 * 100 / 2e6 + (127 * 100 + 60) / 4e12, rel=1e-12)


@pytest.mark.parametrize("order", WHOLE)
@pytest.mark.parametrize("parties", [1, 2, 10, 100])
@pytest.mark.parametrize(("deviation", "shift"), [(0.5, 1), (0.6, 2), (1.0, 1), (3.0, 2), (3.0, 30)])
def test_sums_of_discrete_gaussians_are_bounded_closely(order: int, parties: int, deviation: float, shift: int) -> None:
    """Up to a hundred summed discrete Gaussians diverge by no more than the bound; from 3 on it is tight."""
    log_pmf = sum_of_discrete_gaussians_log_pmf(deviation, parties)
    exact = renyi(*neighbours(log_pmf, shift, 1), order)
    bound = at(of_discrete(deviation, parties, shift), order)
    assert exact <= bound * (1 + 1e-9)
    # What is decided far beyond the points that are added up is missing from the sum.
    if deviation >= 3 and shift * order < 10 * math.sqrt(parties) * deviation:
        assert bound <= exact * (1 + 1e-6)


@pytest.mark.parametrize("parties", [2, 10, 100])
@pytest.mark.parametrize("deviation", [0.5, 0.6, 0.7])
def test_sums_of_discrete_gaussians_are_nearly_one(parties: int, deviation: float) -> None:
    """Each value's probability is within the factor that is charged for, of that of one discrete Gaussian."""
    several = sum_of_discrete_gaussians_log_pmf(deviation, parties)
    one = discrete_gaussian_log_pmf(math.sqrt(parties) * deviation, len(several) // 2)
    core = np.abs(np.arange(len(one)) - len(one) // 2) <= 5 * math.sqrt(parties) * deviation
    apart = np.abs(one - several)[core].max()
    assert 1e-6 < apart <= divergences.sum_ratio(deviation, parties)


def test_from_three_on_sums_cost_nothing() -> None:
    """At deviation 3 the charge is 3e-38 a coordinate for two, hardly more for a million; less noise costs more."""
    assert divergences.sum_ratio(3.0, 1) == 0
    assert divergences.sum_ratio(3.0, 2) == pytest.approx(10 * math.exp(-9 * math.pi**2), rel=1e-9)
    assert divergences.sum_ratio(3.0, 10**6) < 3e-37
    assert divergences.sum_ratio(0.5, 3000) >= 10 * sum(
        math.exp(-(math.pi**2) / 2 * k / (k + 1)) for k in range(1, 3000)
    )


@pytest.mark.parametrize("order", WHOLE)
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["skellam", "discrete"])
@pytest.mark.parametrize(("deviation", "shift"), [(3.0, 1), (12.0, 12), (20.0, 60)])
def test_sampling_is_bounded_in_both_directions(
    order: int, rate: float, kind: str, deviation: float, shift: int
) -> None:
    """Adding and removing a unit, at any rate, stay below the bound; removing, the worse of the two, comes close."""
    radius = int(20 * deviation + order * shift)
    if kind == "skellam":
        log_pmf, curve = skellam_log_pmf(deviation**2, radius), of_skellam(deviation**2, shift)
    else:
        log_pmf, curve = discrete_gaussian_log_pmf(deviation, radius), of_discrete(deviation, 1, shift)
    without, mixed = neighbours(log_pmf, shift, rate)
    added, removed = renyi(without, mixed, order), renyi(mixed, without, order)
    bound = divergences.poisson_sampled(curve, rate, order)
    assert added <= removed * (1 + 1e-9)
    assert removed <= bound
    generous = 3 * order * shift / deviation**2 if kind == "skellam" else 1e-6
    assert bound <= (1 + generous) * removed + 1e-12


def test_sampling_two_coordinates() -> None:
    """In two coordinates at once, both directions stay below the bound of the two sensitivities."""
    variance, shifts, rate = 30.0, (4, 3), 0.2
    log_pmf = skellam_log_pmf(variance, 120)
    without = log_pmf[4:, None] + log_pmf[None, 3:]
    moved = log_pmf[:-4, None] + log_pmf[None, :-3]
    mixed = np.logaddexp(math.log1p(-rate) + without, math.log(rate) + moved)
    l2, l1 = math.hypot(*shifts), float(sum(shifts))
    for order in WHOLE:
        bound = divergences.poisson_sampled(
            lambda x: divergences.skellam(x, l2=l2, l1=l1, variance=variance), rate, order
        )
        for p, q in ((without, mixed), (mixed, without)):
            assert float(logsumexp(order * p + (1 - order) * q)) / (order - 1) <= bound


@given(st.floats(1e-6, 1.0), st.floats(1e-3, 100.0), st.integers(2, 300))
@example(1 - 2.0**-53, 1.0, 2)
@settings(max_examples=60, deadline=None)
def test_sampling_as_the_formula_is_written(rate: float, scale: float, order: int) -> None:
    """The sum that is computed is the published formula, and never worse than no sampling."""

    def curve(orders):
        return orders / (2 * scale**2)

    found = divergences.poisson_sampled(curve, rate, order)
    assert found <= order / (2 * scale**2)
    if rate < 1:
        j = np.arange(2.0, order + 1)
        terms = (
            gammaln(order + 1)
            - gammaln(j + 1)
            - gammaln(order - j + 1)
            + (order - j) * math.log1p(-rate)
            + j * math.log(rate)
            + (j - 1) * curve(j)
        )
        first = (order - 1) * math.log1p(-rate) + math.log1p((order - 1) * rate)
        written = float(logsumexp([first, *terms])) / (order - 1)
        assert found == pytest.approx(min(written, order / (2 * scale**2)), rel=1e-8, abs=1e-11)


# The gate.


def skellam_event(q: float, z: float, steps: int, *, scale: float = 1e6) -> PoissonSampledSkellam:
    """A mechanism of noise multiplier z whose sensitivities are ``scale`` ring units."""
    return PoissonSampledSkellam(
        sampling_rate=q, l2_sensitivity=scale, l1_sensitivity=100 * scale, variance=(z * scale) ** 2, steps=steps
    )


def discrete_event(q: float, z: float, steps: int, *, parties: int = 4, scale: float = 1e6):
    """The same with as much noise from so many parties."""
    return PoissonSampledDiscreteGaussian(
        sampling_rate=q,
        l2_sensitivity=scale,
        local_deviation=z * scale / math.sqrt(parties),
        parties=parties,
        dimensions=10**6,
        steps=steps,
    )


KINDS = pytest.mark.parametrize("make", [skellam_event, discrete_event])


@KINDS
@pytest.mark.parametrize(("q", "z", "steps"), [(0.02, 1.0, 50), (0.02, 1.0, 2500), (0.3, 5.0, 20), (1.0, 12.0, 7)])
def test_fine_integer_noise_costs_what_gaussian_noise_costs(make, q: float, z: float, steps: int) -> None:
    """In large units integer noise of the same multiplier has the Gaussian's epsilon, 1.61 and 6.93 among them, or up
    to 3 % more where the best order is a fraction."""
    gaussian = rdp_epsilon([PoissonSampledGaussian(sampling_rate=q, noise_multiplier=z, steps=steps)], DELTA)
    found = rdp_epsilon([make(q, z, steps)], DELTA)
    assert gaussian * (1 - 1e-9) <= found <= 1.03 * gaussian
    assert make(q, z, steps).noise_multiplier == pytest.approx(z)


def test_coarse_units_cost_more() -> None:
    """Skellam noise of few ring units costs more at the same multiplier, the more so the coarser."""
    coarse, middle, fine = (rdp_epsilon([skellam_event(0.1, 1.0, 10, scale=scale)], DELTA) for scale in (10, 300, 1e6))
    assert coarse > 1.05 * middle
    assert middle > fine


@KINDS
def test_fractional_orders_lie_between(make) -> None:
    """Between whole orders the bound lies on the line that convexity allows, below order 2 it is that of 2."""
    from dp.accountants import _divergence

    mechanism = make(0.1, 1.0, 1)
    curve = [(order - 1) * _divergence(mechanism, order) for order in (3.0, 3.5, 4.0)]
    assert curve[1] == pytest.approx((curve[0] + curve[2]) / 2, rel=1e-9)
    assert _divergence(mechanism, 1.4) == pytest.approx(_divergence(mechanism, 2.0), rel=1e-9)
    assert all(_divergence(mechanism, order) > 0 for order in ORDERS)


@KINDS
def test_all_kinds_compose(make) -> None:
    """Local and shared releases add up in any order and split: more than each alone, less than the sum of both."""
    local = PoissonSampledGaussian(sampling_rate=0.3, noise_multiplier=4.0, steps=20)
    shared = make(0.3, 4.0, 20)
    both = rdp_epsilon([local, shared], DELTA)
    assert (
        both
        == rdp_epsilon([shared, local], DELTA)
        == rdp_epsilon([make(0.3, 4.0, 5), local, make(0.3, 4.0, 15)], DELTA)
    )
    assert max(rdp_epsilon([local], DELTA), rdp_epsilon([shared], DELTA)) < both
    assert both < rdp_epsilon([local], DELTA / 2) + rdp_epsilon([shared], DELTA / 2)
    twice = PoissonSampledGaussian(sampling_rate=0.3, noise_multiplier=4.0, steps=40)
    assert both == pytest.approx(rdp_epsilon([twice], DELTA), rel=0.01)


@KINDS
def test_the_other_accountants_show_no_figure(make) -> None:
    """PRV and PLD answer infinity as soon as one release has integer noise, and the total is RDP's alone."""
    history = [PoissonSampledGaussian(sampling_rate=0.3, noise_multiplier=4.0, steps=20), make(0.3, 4.0, 20)]
    assert Prv().bounds(history, DELTA) == (0.0, math.inf)
    assert Pld().epsilon(history, DELTA) == math.inf
    rdp, prv, pld = totals(history, DELTA)
    assert rdp.epsilon < math.inf
    assert prv.epsilon == pld.epsilon == math.inf


@KINDS
@pytest.mark.parametrize("smaller", [{"q": 0.05}, {"steps": 9}, {"z": 1.1}])
def test_less_is_cheaper(make, smaller: dict[str, float]) -> None:
    """A lower rate, fewer steps or more noise cost less."""
    base = {"q": 0.06, "z": 1.0, "steps": 10}
    assert 0 < rdp_epsilon([make(**base | smaller)], DELTA) < rdp_epsilon([make(**base)], DELTA)


@KINDS
@pytest.mark.parametrize("q", [1e-300, 1e-9, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("z", [1e-3, 0.05, 1e4])
@pytest.mark.parametrize("steps", [1, 10**400])
def test_extremes_give_no_nonsense(make, q: float, z: float, steps: int) -> None:
    """Extreme mechanisms have an epsilon of 0 or more, or infinity, never NaN."""
    assert rdp_epsilon([make(q, z, steps)], DELTA) >= 0


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["l2_sensitivity", "l1_sensitivity", "variance", "sampling_rate", "local_deviation"])
def test_events_without_a_guarantee(field: str, wrong: float) -> None:
    """Sensitivities, noise and rates that are no numbers above 0 are refused by name."""
    make = discrete_event if field == "local_deviation" else skellam_event
    fields = {name: getattr(make(0.1, 1.0, 1), name) for name in make(0.1, 1.0, 1).__slots__}
    with pytest.raises(UnsupportedEvent, match=f"{field.partition('_')[0].replace('l2', 'L2').replace('l1', 'L1')}"):
        type(make(0.1, 1.0, 1))(**fields | {field: wrong})


@pytest.mark.parametrize(
    ("field", "wrong"), [("parties", 0), ("dimensions", 0), ("steps", 0), ("local_deviation", 2.9)]
)
def test_discrete_gaussians_that_are_too_narrow_or_too_few(field: str, wrong: float) -> None:
    """No parties, no coordinates and a deviation below 3 are refused."""
    event = discrete_event(0.1, 1.0, 1)
    fields = {name: getattr(event, name) for name in event.__slots__}
    with pytest.raises(UnsupportedEvent, match=field.replace("_", " ")):
        PoissonSampledDiscreteGaussian(**fields | {field: wrong})
