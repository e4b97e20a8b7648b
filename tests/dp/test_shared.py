"""Noise that sites share: plans that keep their inequalities, and sums that are opened as planned."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dp.accountants import rdp_epsilon
from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import PoissonSampledDiscreteGaussian, PoissonSampledGaussian, PoissonSampledSkellam
from dp.integer_noise import IntegerNoise
from dp.shared import (
    ADVERSARIES,
    ClippedSum,
    SharedNoisePlan,
    clipped_update,
    decode,
    encode,
    opened_variance,
    plan_shared_noise,
    unknown_parts,
)
from secureagg.testing import CountingEntropy

TASK = {
    "epsilon": 1.0,
    "delta": 1e-5,
    "steps": 100,
    "dimensions": 2000,
    "sites": 6,
    "dropouts": 2,
    "colluders": 1,
    "clip_norm": 1.0,
    "sampling_rate": 0.1,
    "expected_batch": 16.0,
}
SITE = {"unit": "site", "sampling_rate": 1.0, "expected_batch": 1.0, "steps": 5, "epsilon": 8.0}
PLAN = plan_shared_noise(**TASK)
kinds = st.sampled_from(["skellam", "discrete gaussian"])


def entropy(seed: int = 0) -> CountingEntropy:
    """Fixed bytes."""
    return CountingEntropy(seed)


# The solver.


@st.composite
def tasks(draw) -> dict[str, object]:
    """Any sensible task."""
    sites = draw(st.integers(2, 60))
    colluders = draw(st.integers(1, sites - 1))
    rates = draw(st.lists(st.floats(0.005, 1.0), min_size=sites, max_size=sites) | st.floats(0.005, 1.0))
    return {
        "epsilon": draw(st.floats(0.1, 20.0)),
        "delta": 10.0 ** -draw(st.integers(4, 9)),
        "steps": draw(st.integers(1, 10_000)),
        "dimensions": draw(st.integers(1, 2**30)),
        "sites": sites,
        "colluders": colluders,
        "dropouts": draw(st.integers(0, sites - colluders - 1)),
        "clip_norm": draw(st.floats(1e-3, 1e3)),
        "sampling_rate": rates,
        "expected_batch": draw(st.floats(1.0, 1e4)),
        "mechanism": draw(kinds),
    }


@given(tasks())
@settings(max_examples=25, deadline=None)
def test_every_plan_keeps_its_inequalities(task: dict[str, object]) -> None:
    """Whatever is asked, the plan spends at most epsilon for the unit that is sampled most, hardly less; no sum leaves
    the ring; its noise is at most 1 % more than in the finest units; a smaller ring or a larger scale would not do."""
    plan = plan_shared_noise(**task)
    assert plan.honest == task["sites"] - task["dropouts"] - task["colluders"] >= 1
    epsilons = plan.epsilons("coordinator")
    assert 0.98 * task["epsilon"] < max(epsilons) <= task["epsilon"]
    assert epsilons[plan.sampling_rates.index(max(plan.sampling_rates))] == max(epsilons)
    log = math.log(2 * plan.dimensions * plan.steps) + 40 * math.log(2)
    published = math.sqrt(2 * log) * math.sqrt(plan.sites) * plan.local_deviation
    needed = plan.scale * plan.sites * plan.coordinate_clip + published + plan.sites
    assert needed <= plan.largest_sum < 2.0 ** (plan.ring_bits - 1)
    assert plan.largest_sum > 0.45 * 2.0 ** (plan.ring_bits - 1)
    assert plan.scale * plan.clip_norm >= 100 * math.sqrt(plan.dimensions)
    finest = plan_shared_noise(**task, most_inflation=1e-3).noise_multiplier
    assert plan.noise_multiplier <= 1.012 * finest
    with pytest.raises(UnsupportedEvent, match=f"no ring of 8 to {plan.ring_bits - 1} bits"):
        plan_shared_noise(**task, ring_bits_max=plan.ring_bits - 1)
    with pytest.raises(UnsupportedEvent, match=r"sums up to s n X \+ t \+ n"):
        replace(plan, scale=4 * plan.scale, local_deviation=4 * plan.local_deviation)


@given(tasks())
@settings(max_examples=10, deadline=None)
def test_less_noise_is_no_plan(task: dict[str, object]) -> None:
    """With 2 % less noise the plan would exceed epsilon, and cannot be constructed."""
    plan = plan_shared_noise(**task)
    with pytest.raises(UnsupportedEvent, match=r"found epsilon .*, expected at most"):
        replace(plan, local_deviation=0.98 * plan.local_deviation)


@pytest.mark.parametrize("mechanism", ["skellam", "discrete gaussian"])
@pytest.mark.parametrize(
    "harder",
    [{"steps": 200}, {"sampling_rate": 0.2}, {"epsilon": 0.5}, {"delta": 1e-7}, {"colluders": 2}, {"dropouts": 3}],
)
def test_what_is_harder_takes_more_noise(mechanism: str, harder: dict[str, float]) -> None:
    """More steps, a higher rate, less epsilon or delta, more colluders and more dropouts raise each site's noise."""
    easy = plan_shared_noise(**TASK, mechanism=mechanism)
    hard = plan_shared_noise(**TASK | harder, mechanism=mechanism)
    assert hard.local_deviation / hard.scale > 1.05 * easy.local_deviation / easy.scale
    assert hard.error_of_sum > 1.05 * easy.error_of_sum


def test_accuracy_is_that_of_pooled_data() -> None:
    """The noise that is never known is that of DP-SGD on the pooled data, but for 1 %; what honest dropouts and
    colluders would have taken away comes on top."""
    gaussian = rdp_epsilon([PoissonSampledGaussian(sampling_rate=0.1, noise_multiplier=1.01 * 4, steps=100)], 1e-5)
    plan = plan_shared_noise(**TASK | {"epsilon": gaussian})
    assert plan.noise_multiplier == pytest.approx(1.01 * 4, rel=0.015)
    expected = plan.noise_multiplier * plan.clip_norm * math.sqrt(6 / 3) / (6 * 16.0)
    assert plan.error_of_mean == pytest.approx(expected, rel=1e-6)


def test_published_inflation() -> None:
    """At 2^30 coordinates and a scale near 1.8e7 rounding inflates the sensitivity by 0.2 %, without any rotation; in a
    ring of 16 bits a far smaller model cannot be had at all."""
    plan = plan_shared_noise(**TASK | {"dimensions": 2**30}, most_inflation=0.002)
    assert plan.scale == 2.0**24
    assert plan.l2_sensitivity / (plan.scale * plan.clip_norm) == pytest.approx(1.00195, abs=1e-5)
    with pytest.raises(UnsupportedEvent, match=r"s n X \+ t \+ n < 2\^15 asks for a scale .* rounding adds sqrt\(d\)"):
        plan_shared_noise(**TASK | {"dimensions": 10**6}, ring_bits_max=16)


def test_sensitivities() -> None:
    """D2 = s C + sqrt(d), and D1 is the lesser of sqrt(d) D2 and D2^2."""
    assert PLAN.l2_sensitivity == PLAN.scale * PLAN.clip_norm + math.sqrt(2000)
    assert PLAN.l1_sensitivity == PLAN.l2_sensitivity * math.sqrt(2000)
    few = replace(PLAN, dimensions=10**6, scale=256.0, local_deviation=PLAN.local_deviation, ring_bits=32, epsilon=1e9)
    assert few.l2_sensitivity == 1256
    assert few.l1_sensitivity == 1256 * 1000
    coarse = replace(few, scale=2.0**-4, local_deviation=4000.0)
    assert coarse.l1_sensitivity == pytest.approx(1000.0625 * 1000)
    assert replace(few, dimensions=4, scale=0.25, clip_norm=0.25, local_deviation=3e3).l1_sensitivity == 2.0625 * 2


def test_parts_and_variances_per_adversary() -> None:
    """An outsider knows no noise, a curious site its own, the coordinator that of c sites."""
    assert [unknown_parts(a, survivors=10, colluders=3) for a in ADVERSARIES] == [10, 9, 7]
    assert [opened_variance(a, survivors=10, colluders=3, local_deviation=4.0) for a in ADVERSARIES] == [160, 144, 112]


@pytest.mark.parametrize("colluders", [1, 2, 3])
def test_epsilon_per_adversary_and_site(colluders: int) -> None:
    """The coordinator with c sites costs most, an outsider least; with one colluder it equals a curious site; sites
    that sample less pay less."""
    rates = [0.05, 0.1, 0.02, 0.1, 0.1, 0.01]
    plan = plan_shared_noise(**TASK | {"sampling_rate": rates, "colluders": colluders})
    outsider, curious, coordinator = (plan.epsilons(adversary) for adversary in ADVERSARIES)
    assert all(a < b <= c for a, b, c in zip(outsider, curious, coordinator, strict=True))
    assert (curious == coordinator) == (colluders == 1)
    assert np.argsort(coordinator, stable=True).tolist() == np.argsort(rates, stable=True).tolist()
    assert coordinator[0] == rdp_epsilon([plan.event(sampling_rate=0.05, steps=100)], plan.delta)


def test_events_for_the_ledger() -> None:
    """What is booked is what the coordinator sees: the steps asked for, h parts of the noise, both sensitivities."""
    one = PLAN.event(sampling_rate=0.1, steps=1)
    assert one == PoissonSampledSkellam(
        sampling_rate=0.1,
        l2_sensitivity=PLAN.l2_sensitivity,
        l1_sensitivity=PLAN.l1_sensitivity,
        variance=3 * PLAN.local_deviation**2,
        steps=1,
    )
    assert rdp_epsilon([one] * 100, 1e-5) == max(PLAN.epsilons("coordinator"))
    other = plan_shared_noise(**TASK, mechanism="discrete gaussian")
    assert other.event(sampling_rate=0.1, steps=1, adversary="outsider") == PoissonSampledDiscreteGaussian(
        sampling_rate=0.1,
        l2_sensitivity=other.l2_sensitivity,
        local_deviation=other.local_deviation,
        parties=4,
        dimensions=2000,
        steps=1,
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"colluders": 0}, "colluders 0, expected an integer from 1"),
        ({"dropouts": 5}, r"h = n - n_D - c = 6 - 5 - 1 = 0, expected 1 or more"),
        ({"dropouts": -1}, "dropouts -1"),
        ({"sites": 1}, "sites 1"),
        ({"steps": 0}, "steps 0"),
        ({"steps": True}, "steps True"),
        ({"dimensions": 0}, "dimensions 0"),
        ({"dimensions": 2.5}, "dimensions 2.5"),
        ({"sampling_rate": 0.0}, "sampling rate 0.0"),
        ({"sampling_rate": 1.01}, "sampling rate 1.01"),
        ({"sampling_rate": math.nan}, "sampling rate nan"),
        ({"sampling_rate": [0.1] * 5}, "5 sampling rates, expected one for each of 6 sites"),
        ({"expected_batch": [1.0] * 7}, "7 expected batches"),
        ({"expected_batch": 0.0}, "expected batch 0.0"),
        ({"coordinate_clip": 0.0}, "coordinate clip 0.0"),
        ({"coordinate_clip": math.nan}, "coordinate clip nan"),
        ({"clip_norm": math.inf}, "clip norm inf"),
        ({"clip_norm": 1e-40}, "clip norm 1e-40, expected 2"),
        ({"epsilon": 0.0}, "epsilon 0.0"),
        ({"delta": 1.0}, "delta 1.0"),
        ({"mechanism": "laplace"}, "mechanism 'laplace', expected skellam or discrete gaussian"),
        ({"unit": "row"}, "unit 'row', expected patient or record or site"),
        ({"most_inflation": 0.0}, "largest inflation 0.0, expected 0.001 to 10"),
        ({"most_inflation": math.inf}, "largest inflation inf"),
        ({"unit": "site"}, "a sampling rate or batch of a whole site other than 1"),
        ({"ring_bits_max": 7}, "no ring of 8 to 7 bits"),
        ({"coordinate_clip": 1e30}, r"s n X \+ t \+ n < 2\^63"),
    ],
)
def test_tasks_without_a_plan(change: dict[str, object], text: str) -> None:
    """What is meaningless, protects nobody or fits no ring is refused, and what was found is named."""
    with pytest.raises(UnsupportedEvent, match=text):
        plan_shared_noise(**TASK | change)


def test_noise_too_narrow_for_integers() -> None:
    """Where many sites need so little noise that a part would be narrower than 3, a wider ring is taken, or none."""
    task = TASK | {"dimensions": 1, "sites": 2000, "dropouts": 0, "epsilon": 60.0, "sampling_rate": 0.001, "steps": 1}
    plan = plan_shared_noise(**task, most_inflation=0.3)
    assert plan.local_deviation >= 3
    with pytest.raises(UnsupportedEvent, match=r"each site's noise has a deviation of .*, expected 3 or more"):
        plan_shared_noise(**task, most_inflation=0.3, ring_bits_max=plan.ring_bits - 1)


def test_a_ring_that_only_the_noise_makes_too_coarse() -> None:
    """Where rounding costs less than 1 % but Skellam's own last term does not, a wider ring is taken too."""
    task = TASK | {"dimensions": 1, "sites": 3, "dropouts": 0, "epsilon": 200.0, "sampling_rate": 1.0, "steps": 1}
    task |= {"expected_batch": 4.0}
    plan = plan_shared_noise(**task)
    finest = plan_shared_noise(**task, most_inflation=1e-3).noise_multiplier
    assert plan.noise_multiplier < 1.01 * finest
    with pytest.raises(UnsupportedEvent, match=r"scale s of at most 128, at which the noise has a deviation of"):
        plan_shared_noise(**task, ring_bits_max=plan.ring_bits - 1)


def test_no_noise_is_enough() -> None:
    """An epsilon that no noise reaches is refused with the numbers."""
    with pytest.raises(BudgetExhausted, match="the least that these can cost"):
        plan_shared_noise(**TASK | {"epsilon": 1e-7})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"scale": 3.0}, "scale 3.0, expected a power of two"),
        ({"scale": -4.0}, "scale -4.0"),
        ({"scale": math.nan}, "scale nan"),
        ({"local_deviation": 2.9}, "local deviation S = 2.9, expected 3 to"),
        ({"local_deviation": math.nan}, "local deviation S = nan"),
        ({"ring_bits": PLAN.ring_bits - 1}, "less than half the ring"),
        ({"ring_bits": 65}, "a ring of 65 bits, expected 8 to 64"),
        ({"ring_bits": 32.0}, "a ring of 32.0 bits"),
        ({"steps": 200}, "found epsilon"),
        ({"colluders": 2}, "found epsilon"),
        ({"dropouts": 3}, "found epsilon"),
        ({"sampling_rates": (0.1,) * 5 + (0.2,)}, "found epsilon"),
    ],
)
def test_a_plan_that_does_not_hold_cannot_exist(change: dict[str, object], text: str) -> None:
    """A plan that came from elsewhere is checked like one's own: nobody can hold one that breaks an inequality."""
    with pytest.raises(UnsupportedEvent, match=text):
        replace(PLAN, **change)


# Sums.


def site_plan() -> SharedNoisePlan:
    """A plan whose unit is the site."""
    return plan_shared_noise(**TASK | SITE)


def test_every_opened_sum_has_the_variance_that_is_planned() -> None:
    """With 0 to n_D dropouts, the decoded sum is the survivors' exact sum plus noise and rounding of the planned
    variance and mean 0: chi-square, false alarm 1e-6 each; coordinates are independent of each other."""
    plan = plan_shared_noise(**TASK | {"dimensions": 50_000})
    generator = np.random.default_rng(0)
    totals = [ClippedSum(generator.normal(size=50_000) * 0.01) for _ in range(6)]
    parts = [encode(total, plan, entropy=entropy(site)) for site, total in enumerate(totals)]
    for survivors in (4, 5, 6):
        opened = decode(np.sum(parts[:survivors], axis=0, dtype=np.uint64), plan)
        error = (opened - np.sum([total.values for total in totals[:survivors]], axis=0)) * plan.scale
        variance = opened_variance("outsider", survivors=survivors, colluders=1, local_deviation=plan.local_deviation)
        assert variance >= 3 * plan.local_deviation**2
        low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], 50_000)
        assert low < (error**2).sum() / (variance + survivors / 6) < high  # of uniform fractions rounding has 1/6
        assert abs(error.mean()) < 5 * math.sqrt(variance / 50_000)
        assert abs(np.corrcoef(error[1:], error[:-1])[0, 1]) < 5 / math.sqrt(50_000)
    assert plan.error_of_sum == pytest.approx(math.sqrt(variance) / plan.scale, rel=1e-6)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise, so that only rounding is left."""
    monkeypatch.setattr(IntegerNoise, "draw", lambda _, count: np.zeros(count, np.int64))


@given(st.lists(st.floats(-30.0, 30.0), min_size=8, max_size=8), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_without_noise_each_coordinate_is_next_to_itself(values: list[float], seed: int) -> None:
    """Clipping, scaling, rounding, reducing and decoding move a coordinate inside the range by less than a ring unit,
    and one outside to its edge."""
    plan = replace(PLAN, dimensions=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IntegerNoise, "draw", lambda _, count: np.zeros(count, np.int64))
        elements = encode(ClippedSum(np.array(values)), plan, entropy=entropy(seed))
    assert elements.dtype == np.uint64
    assert elements.max() < 2**plan.ring_bits
    moved = decode(elements, plan) - np.clip(values, -plan.coordinate_clip, plan.coordinate_clip)
    assert np.abs(moved).max() * plan.scale < 1


@pytest.mark.usefixtures("quiet")
def test_rounding_is_fair() -> None:
    """A fraction is rounded up as often as it is large, and whole numbers stay; 5 standard errors."""
    plan = replace(PLAN, dimensions=200_000, epsilon=100.0, ring_bits=32)
    for fraction in (0.0, 0.25, 0.9):
        up = decode(encode(ClippedSum(np.full(200_000, (7 + fraction) / plan.scale)), plan, entropy=entropy()), plan)
        share = float((up * plan.scale - 7).mean())
        assert abs(share - fraction) <= 5 * math.sqrt(fraction * (1 - fraction) / 200_000)


@pytest.mark.usefixtures("quiet")
def test_the_same_coins_keep_neighbours_close() -> None:
    """With the same coins, sums that differ by one patient of norm C differ by at most D2 once they are rounded."""
    for seed in range(20):
        generator = np.random.default_rng(seed)
        one = generator.normal(size=2000)
        patient = generator.normal(size=2000)
        other = one + patient / np.linalg.norm(patient) * PLAN.clip_norm
        a, b = (decode(encode(ClippedSum(each), PLAN, entropy=entropy(seed)), PLAN) for each in (one, other))
        assert np.linalg.norm(a - b) * PLAN.scale <= PLAN.l2_sensitivity


def test_noise_is_added_to_what_is_rounded() -> None:
    """Ring elements are whole numbers of units whatever the sum is: a last bit of an element says nothing of it."""
    totals = [ClippedSum(np.full(2000, value)) for value in (0.0, 1 / 3)]
    for total in totals:
        bits = np.concatenate([encode(total, PLAN, entropy=entropy(seed)) & 15 for seed in range(40)])
        assert stats.chisquare(np.bincount(bits.astype(np.int64), minlength=16)).pvalue > 1e-6


@pytest.mark.parametrize("bits", [31, 32, 33, 63, 64])
def test_rings_of_any_width(bits: int) -> None:
    """In every ring the sum of reduced elements stands for the sum, negative ones too, reduced or not."""
    plan = replace(PLAN, ring_bits=bits)
    total = ClippedSum(np.linspace(-2, 2, 2000))
    parts = [encode(total, plan, entropy=entropy(seed)) for seed in range(5)]
    assert max(part.max() for part in parts) >= 2 ** (bits - 1)  # negative numbers are there
    wrapped = np.sum(parts, axis=0, dtype=np.uint64)
    reduced = wrapped & np.uint64(2**bits - 1)
    for words in (wrapped, reduced, reduced.view(np.int64)):
        assert np.abs(decode(words, plan) - 5 * total.values).max() < 6 * plan.error_of_sum
    if bits <= 32:
        assert np.array_equal(decode(reduced.astype(np.uint32), plan), decode(reduced, plan))


def test_entropy_keys_each_encoding() -> None:
    """The same entropy gives the same elements; the system's never does; rounding and noise have different keys."""
    total = ClippedSum(np.zeros(2000))
    first = encode(total, PLAN, entropy=entropy(1))
    assert np.array_equal(encode(total, PLAN, entropy=entropy(1)), first)
    for other in (encode(total, PLAN, entropy=entropy(2)), encode(total, PLAN), encode(total, PLAN)):
        assert np.mean(other == first) < 0.01
    source, keys = entropy(3), []
    encode(total, PLAN, entropy=lambda length: keys.append(source(length)) or keys[-1])
    assert len(set(keys)) == len(keys) == 2


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_sums_that_are_no_numbers_are_refused(wrong: float) -> None:
    """A coordinate that is not finite is refused rather than clipped, wherever it is."""
    plan = plan_shared_noise(**TASK | {"dimensions": 20_000})
    for place in (0, 19_999):
        total = np.zeros(20_000)
        total[place] = wrong
        with pytest.raises(UnsupportedEvent, match="a coordinate that is not finite"):
            encode(ClippedSum(total), plan)
        with pytest.raises(UnsupportedEvent, match="a coordinate that is not finite"):
            clipped_update(total, replace(site_plan(), dimensions=2000))


@pytest.mark.parametrize("shape", [(), (1999,), (2000, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    """Sums and totals of another shape than (d,) are refused."""
    with pytest.raises(UnsupportedEvent, match=r"a sum of shape .*, expected \(2000,\)"):
        encode(ClippedSum(np.zeros(shape)), PLAN)
    with pytest.raises(UnsupportedEvent, match=r"a total of shape .*, expected \(2000,\)"):
        decode(np.zeros(shape, np.uint64), PLAN)


def test_the_sum_stays_as_it_is() -> None:
    """Encoding and decoding leave their arguments alone."""
    total = np.linspace(-100, 100, 2000)
    copy = total.copy()
    elements = encode(ClippedSum(total), PLAN)
    again = elements.copy()
    decode(elements, PLAN)
    assert np.array_equal(total, copy)
    assert np.array_equal(elements, again)


# The site as the unit.


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=20), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_updates_are_clipped(values: list[float], clip: float) -> None:
    """A whole update is no longer than the clip norm afterwards, in exact arithmetic, points where it did, and stays as
    it is if it was shorter by more than rounding."""
    from fractions import Fraction

    plan = replace(SITE_PLAN, clip_norm=clip, coordinate_clip=clip, epsilon=1e9, ring_bits=40)
    clipped = clipped_update(np.array(values), plan).values
    assert sum(Fraction(value) ** 2 for value in clipped.tolist()) <= Fraction(clip) ** 2
    norm = math.hypot(*values)
    if norm < 0.999 * clip:
        assert clipped.tolist() == values
    elif math.isfinite(norm):
        np.testing.assert_allclose(clipped, np.array(values) * (clip / norm), rtol=1e-9, atol=1e-12 * clip)


SITE_PLAN = site_plan()


def test_only_clipped_sums_are_encoded() -> None:
    """An array of numbers, such as what several steps have changed, is not taken for one step's clipped sum."""
    with pytest.raises(UnsupportedEvent, match="found a ndarray, expected a ClippedSum, of one step"):
        encode(np.zeros(2000), PLAN)  # type: ignore[arg-type]


def test_a_patients_plan_takes_no_update() -> None:
    """Local steps and a patient's guarantee cannot be combined: an update has no place in a plan per patient."""
    with pytest.raises(UnsupportedEvent, match="an update of a whole site where the unit is the patient"):
        clipped_update(np.zeros(2000), PLAN)
    assert clipped_update(np.zeros(2000), SITE_PLAN).values.tolist() == [0.0] * 2000


def test_a_site_costs_what_it_costs_without_sampling() -> None:
    """Per site every step counts in full: the event's sampling rate is 1, C is the coordinates' bound, and the noise is
    that of the Gaussian mechanism over all steps, but for 1 %."""
    event = SITE_PLAN.event(sampling_rate=1.0, steps=5)
    assert event.sampling_rate == 1
    assert SITE_PLAN.coordinate_clip == SITE_PLAN.clip_norm
    gaussian = PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=SITE_PLAN.noise_multiplier, steps=5)
    assert rdp_epsilon([gaussian], SITE_PLAN.delta) == pytest.approx(8.0, rel=0.03)
