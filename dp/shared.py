"""Noise that sites share: each adds a part, the sum is opened with all of it, and nobody could open less.

In each step a site clips every patient's gradient to C and adds up those of one Poisson sample.  It then

1. moves each coordinate of the sum into [-X, X],
2. multiplies by the scale s, a power of two, so that nothing is rounded,
3. rounds each coordinate up with the probability of its fraction, whatever comes out,
4. adds integer noise of deviation S,
5. reduces modulo 2^b, the ring of the secure sum.

**Sensitivity.**  Steps 1 and 2 leave of a patient at most s C in L2 norm.  With the same coins, two numbers that are x
apart round to integers less than x + 1 apart: D2 = s C + sqrt(d) over d coordinates, and since integers are no larger
than their squares, D1 = D2 min(sqrt(d), D2) (``dp.divergences`` says why the coins may be the same).  The noise comes
after the rounding: rounding is no post-processing of a sum that it is not yet added to.

**Who knows what.**  Of n sites up to n_D drop out and up to c work for the coordinator, and all know their own noise:
of the noise in a sum, h = n - n_D - c parts at least are unknown, of variance h S^2 together.  A round with fewer than
h + c survivors must end before anything is opened.  A site that is merely curious knows one part, so c is at least 1.

**The ring.**  No sum may wrap around: 2^(b-1) > s n X + t + n, with n for the rounding and t for the noise: d T sums
of n parts stay below t = L/3 + sqrt(L^2/9 + 2 n S^2 L), L = ln(2 d T 2^40), but for a chance of 2^-40 (Bernstein's
inequality as in ``dp.integer_noise``).  The coarser the units, the more noise the same epsilon takes; the plan has the
least ring in which that is at most some per cent more than in the finest, and the largest s that fits it.

**One step for one sum.**  The noise of a single site is far too little for it alone, and only the sum is covered: a
second step that starts from a site's own first one depends on data that no noise covers.  So a plan counts secure sums,
there is no number of local steps, and what is encoded is a ``ClippedSum``: of gradients at a model that all sites have
(``dp.training.clipped_gradient_sum``), or, where the unit is the site, its whole update, clipped (``clipped_update``).
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from dp.accountants import least_noise, rdp_epsilon
from dp.errors import UnsupportedEvent
from dp.events import LEAST_LOCAL_DEVIATION, IntegerEvent, PoissonSampledDiscreteGaussian, PoissonSampledSkellam
from dp.integer_noise import LARGEST_DEVIATION, IntegerNoise, Mechanism
from dp.noise import csprng

Unit = Literal["patient", "record", "site"]
Adversary = Literal["outsider", "curious site", "coordinator"]
ADVERSARIES: Final[tuple[Adversary, ...]] = get_args(Adversary)

SMALLEST_RING: Final = 8
LARGEST_RING: Final = 64
MOST_INFLATION: Final = 0.01
_FINEST: Final = 1e12  # ring units of the clip norm, in which integer noise costs what it costs in the limit
_BLOCK: Final = 1 << 14


@dataclass(frozen=True, slots=True, eq=False)
class ClippedSum:
    """What one site adds to one secure sum: ``values`` (d,), float64, in which one unit counts for at most the clip
    norm.  Made by ``dp.training.clipped_gradient_sum`` and ``clipped_update``; nothing else is ever encoded."""

    values: npt.NDArray[np.float64] = field(repr=False)


def unknown_parts(adversary: Adversary, *, survivors: int, colluders: int) -> int:
    """How many of the survivors' parts of the noise ``adversary`` does not know: an outsider, none of the sites; a
    curious site, which knows its own; the coordinator with ``colluders`` sites."""
    return survivors - {"outsider": 0, "curious site": 1, "coordinator": colluders}[adversary]


def opened_variance(adversary: Adversary, *, survivors: int, colluders: int, local_deviation: float) -> float:
    """Variance of the noise that an opened sum has for ``adversary``, in ring units squared."""
    return unknown_parts(adversary, survivors=survivors, colluders=colluders) * local_deviation**2


def seen_by(event: IntegerEvent, adversary: Adversary, *, survivors: int, colluders: int, honest: int) -> IntegerEvent:
    """What an event that was booked against the coordinator, with ``honest`` unknown parts of the noise, is to
    ``adversary``, when ``survivors`` parts were in the sum."""
    parts = unknown_parts(adversary, survivors=survivors, colluders=colluders)
    if isinstance(event, PoissonSampledSkellam):
        return replace(event, variance=event.variance * parts / honest)
    return replace(event, parties=parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTask:
    """What sites want to compute together, and how privately.

    ``epsilon`` at ``delta``: the most that all ``steps`` secure sums may cost per ``unit``, against the coordinator
    with ``colluders`` (c) sites; ``dimensions``: d; ``sites``: n, of which ``dropouts`` (n_D) may be missing;
    ``clip_norm``: C and ``coordinate_clip``: X, in the gradient's units; ``sampling_rates`` and ``expected_batches``:
    each site's q, and q times its number of units.  The unit "site" takes part with all it has, q and the batch are 1,
    and its neighbour is the site that adds zeros and its noise: that a site takes part is not hidden.

    Raises UnsupportedEvent, with what was found and expected, for a task that means nothing or protects nobody.
    """

    mechanism: Mechanism
    unit: Unit
    epsilon: float
    delta: float
    steps: int
    dimensions: int
    sites: int
    dropouts: int
    colluders: int
    clip_norm: float
    coordinate_clip: float
    sampling_rates: tuple[float, ...]
    expected_batches: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("mechanism", self.mechanism, get_args(Mechanism)),
            ("unit", self.unit, get_args(Unit)),
        ):
            _need(value in choices, f"{name} {value!r}", " or ".join(choices))
        for name, number in (
            ("epsilon", self.epsilon),
            ("clip norm", self.clip_norm),
            *(("expected batch", batch) for batch in self.expected_batches),
            ("coordinate clip", self.coordinate_clip),
        ):
            _need(math.isfinite(number) and number > 0, f"{name} {number}", "a finite number above 0")
        _need(0 < self.delta < 1, f"delta {self.delta}", "above 0 and below 1")
        # Far from these bounds no product here leaves what a double can hold.
        _need(2.0**-100 <= self.clip_norm <= 2.0**100, f"clip norm {self.clip_norm:g}", "2^-100 to 2^100")
        for name, count, least, most in (
            ("steps", self.steps, 1, 10**9),
            ("dimensions", self.dimensions, 1, 2**40),
            ("sites", self.sites, 2, 10**6),
            ("dropouts", self.dropouts, 0, self.sites),
            # Every site sees the sum and knows its own noise.
            ("colluders", self.colluders, 1, self.sites),
        ):
            whole = isinstance(count, int) and not isinstance(count, bool)
            _need(whole and least <= count <= most, f"{name} {count}", f"an integer from {least} to {most}")
        _need(
            self.honest >= 1,
            f"h = n - n_D - c = {self.sites} - {self.dropouts} - {self.colluders} = {self.honest}",
            "1 or more honest survivors, whose noise nobody else knows",
        )
        for name, values in (("sampling rates", self.sampling_rates), ("expected batches", self.expected_batches)):
            _need(len(values) == self.sites, f"{len(values)} {name}", f"one for each of {self.sites} sites")
        for rate in self.sampling_rates:
            _need(0 < rate <= 1, f"sampling rate {rate}", "above 0 and at most 1")
        if self.unit == "site":
            alone = {*self.sampling_rates, *self.expected_batches} == {1.0}
            _need(alone, "a sampling rate or batch of a whole site other than 1", "1, as a site is not sampled")

    @property
    def honest(self) -> int:
        """h: how many parts of the noise the coordinator never knows."""
        return self.sites - self.dropouts - self.colluders

    @property
    def minimum_survivors(self) -> int:
        """h + c: with fewer a round must end before anything is opened."""
        return self.sites - self.dropouts


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedNoisePlan(SharedTask):
    """A task with the numbers that solve it, which all sites must agree on; an object exists only if it holds.

    ``scale``: s, ring units per unit of the gradient, a power of two; ``ring_bits``: b; ``local_deviation``: S, of the
    noise that each site adds, in ring units.  Raises UnsupportedEvent, naming the inequality, if one is violated.
    """

    scale: float
    ring_bits: int
    local_deviation: float

    def __post_init__(self) -> None:
        SharedTask.__post_init__(self)
        _need(math.frexp(self.scale)[0] == 0.5, f"scale {self.scale}", "a power of two")
        _need(
            LEAST_LOCAL_DEVIATION <= self.local_deviation <= LARGEST_DEVIATION,
            f"local deviation S = {self.local_deviation:.4g}",
            f"{LEAST_LOCAL_DEVIATION:g} to {LARGEST_DEVIATION:g} ring units",
        )
        whole = isinstance(self.ring_bits, int) and SMALLEST_RING <= self.ring_bits <= LARGEST_RING
        _need(whole, f"a ring of {self.ring_bits} bits", f"{SMALLEST_RING} to {LARGEST_RING}")
        # Stops a sum from wrapping around, which no decoding would notice.
        _need(
            self.largest_sum < 2.0 ** (self.ring_bits - 1),
            f"sums up to s n X + t + n = {self.largest_sum:.6g}",
            f"less than half the ring of {self.ring_bits} bits, {2.0 ** (self.ring_bits - 1):.6g}",
        )
        found = max(self.epsilons("coordinator"))
        _need(found <= self.epsilon, f"epsilon {found:.6g}", f"at most {self.epsilon:g} at delta {self.delta:g}")

    @property
    def l2_sensitivity(self) -> float:
        """D2, in ring units."""
        return l2_sensitivity(self, self.scale)

    @property
    def l1_sensitivity(self) -> float:
        """D1, in ring units."""
        return self.l2_sensitivity * min(math.sqrt(self.dimensions), self.l2_sensitivity)

    @property
    def noise_multiplier(self) -> float:
        """sigma: deviation of the noise that the coordinator never knows, in units of the clip norm."""
        return math.sqrt(self.honest) * self.local_deviation / (self.scale * self.clip_norm)

    @property
    def largest_sum(self) -> float:
        """s n X + t + n, in ring units: what no coordinate exceeds, but for a chance of 2^-40 in all steps together."""
        return self.scale * self.sites * self.coordinate_clip + _noise_bound(self, self.local_deviation) + self.sites

    @property
    def error_of_sum(self) -> float:
        """Deviation of a decoded coordinate, if all sites survive: noise and rounding, in the gradient's units."""
        return math.sqrt(self.sites * (self.local_deviation**2 + 0.25)) / self.scale

    @property
    def error_of_mean(self) -> float:
        """The same of the sum divided by the expected number of units of all sites."""
        return self.error_of_sum / sum(self.expected_batches)

    def event(self, *, sampling_rate: float, steps: int, adversary: Adversary = "coordinator") -> IntegerEvent:
        """What ``steps`` opened sums over the fewest survivors are to ``adversary``, for units that are sampled with
        ``sampling_rate``: what a site books in its ledger."""
        return event_of(
            self,
            scale=self.scale,
            local_deviation=self.local_deviation,
            parts=unknown_parts(adversary, survivors=self.minimum_survivors, colluders=self.colluders),
            sampling_rate=sampling_rate,
            steps=steps,
        )

    def epsilons(self, adversary: Adversary) -> tuple[float, ...]:
        """Epsilon of all steps at ``delta`` against ``adversary``, for each site's units, in the sites' order."""
        by_rate = {
            rate: rdp_epsilon([self.event(sampling_rate=rate, steps=self.steps, adversary=adversary)], self.delta)
            for rate in set(self.sampling_rates)
        }
        return tuple(by_rate[rate] for rate in self.sampling_rates)


def plan_shared_noise(
    *,
    epsilon: float,
    delta: float,
    steps: int,
    dimensions: int,
    sites: int,
    dropouts: int,
    colluders: int,
    clip_norm: float,
    sampling_rate: float | Sequence[float],
    expected_batch: float | Sequence[float],
    coordinate_clip: float | None = None,
    mechanism: Mechanism = "skellam",
    unit: Unit = "patient",
    ring_bits_max: int = LARGEST_RING,
    most_inflation: float = MOST_INFLATION,
) -> SharedNoisePlan:
    """The least noise for a ``SharedTask`` in the least ring of at most ``ring_bits_max`` bits in which its deviation
    is at most ``most_inflation`` more than in the finest, and the largest power of two as scale in that ring.

    ``sampling_rate`` and ``expected_batch``: one for all sites, or one each.  ``coordinate_clip``: by default C times
    the largest expected batch, which no coordinate reaches unless all gradients lie along it; each halving saves at
    most a bit of the ring.

    Raises UnsupportedEvent, naming what is violated, where there is no such ring, and BudgetExhausted where no noise
    reaches epsilon.  Takes a second or two.
    """
    rates, batches = (_for_each(value, sites) for value in (sampling_rate, expected_batch))
    task = SharedTask(
        mechanism=mechanism,
        unit=unit,
        epsilon=epsilon,
        delta=delta,
        steps=steps,
        dimensions=dimensions,
        sites=sites,
        dropouts=dropouts,
        colluders=colluders,
        clip_norm=clip_norm,
        coordinate_clip=clip_norm * max(batches, default=1.0) if coordinate_clip is None else coordinate_clip,
        sampling_rates=rates,
        expected_batches=batches,
    )
    # The least noise is found to within 0.1 %.
    _need(1e-3 <= most_inflation <= 10, f"largest inflation {most_inflation}", "0.001 to 10")
    finest = _least_deviation(task, _FINEST / clip_norm) / _FINEST
    allowed = finest * (1 + most_inflation)
    refusal = "none is allowed"
    for bits in range(SMALLEST_RING, min(ring_bits_max, LARGEST_RING) + 1):
        scale = _largest_scale(task, bits, allowed)
        refusal = f"s n X + t + n < 2^{bits - 1} asks for a scale s of at most {scale:.4g}, at which "
        if scale * clip_norm * most_inflation < math.sqrt(dimensions):
            refusal += f"rounding adds sqrt(d) = {math.sqrt(dimensions):.4g} to s C = {scale * clip_norm:.4g}"
            continue
        deviation = _least_deviation(task, scale)
        local = deviation / math.sqrt(task.honest) * (1 + 2.0**-40)  # more than rounding takes away
        if local < LEAST_LOCAL_DEVIATION:
            refusal += f"each site's noise has a deviation of {local:.4g}, expected {LEAST_LOCAL_DEVIATION:g} or more"
        elif deviation > allowed * scale * clip_norm:
            refusal += f"the noise has a deviation of {deviation / (scale * clip_norm):.4g} C"
        else:
            asked = {name: getattr(task, name) for name in SharedTask.__dataclass_fields__}
            return SharedNoisePlan(**asked, scale=scale, ring_bits=bits, local_deviation=local)
    raise UnsupportedEvent(
        f"shared noise: found no ring of {SMALLEST_RING} to {ring_bits_max} bits: {refusal}; expected a deviation of "
        f"at most {1 + most_inflation:g} times {finest:.4g} C; allow a wider ring, a coordinate clip below "
        f"{task.coordinate_clip:.4g} or more inflation"
    )


def clipped_update(update: npt.NDArray[np.float64], plan: SharedNoisePlan) -> ClippedSum:
    """A site's whole ``update``, shortened to the clip norm where it is longer: the sum where the unit is the site.

    Raises UnsupportedEvent for another unit and for a coordinate that is not finite.
    """
    _need(plan.unit == "site", f"an update of a whole site where the unit is the {plan.unit}", "the unit site")
    values = np.asarray(update, dtype=np.float64)
    largest = float(np.abs(values).max(initial=0.0))
    _need(math.isfinite(largest), "a coordinate that is not finite", "finite numbers")
    if largest == 0:
        return ClippedSum(np.zeros_like(values))
    # By the largest coordinate first: squares of what a double can hold may not be finite.
    norm = largest * float(np.linalg.norm(values / largest))
    # Less by more than all that rounding can add.
    return ClippedSum(values * min(1.0, plan.clip_norm * (1 - 2.0**-40) / norm))


def encode(
    total: ClippedSum, plan: SharedNoisePlan, *, entropy: Callable[[int], bytes] = os.urandom
) -> npt.NDArray[np.uint64]:
    """One site's ``total`` (d,) with its part of the noise, as ring elements (d,): one release of one step.

    ``entropy`` keys the coins of the rounding and the noise, afresh for each call.  Raises UnsupportedEvent for another
    shape and for a coordinate that is not finite.
    """
    # Stops an update of several steps, or anything else that was not clipped as the plan counts on.
    _need(isinstance(total, ClippedSum), f"a {type(total).__name__}", "a ClippedSum, of one step")
    values = total.values
    _need(values.shape == (plan.dimensions,), f"a sum of shape {values.shape}", f"({plan.dimensions},)")
    coins = csprng(entropy)
    noise = IntegerNoise(mechanism=plan.mechanism, deviation=plan.local_deviation, entropy=entropy)
    elements = np.empty(plan.dimensions, np.int64)
    for start in range(0, plan.dimensions, _BLOCK):
        block = values[start : start + _BLOCK]
        _need(bool(np.isfinite(block).all()), "a coordinate that is not finite", "finite numbers")
        block = np.clip(block, -plan.coordinate_clip, plan.coordinate_clip) * plan.scale
        floor = np.floor(block)
        rounded = floor.astype(np.int64) + (coins.random(len(block)) < block - floor)
        elements[start : start + _BLOCK] = rounded + noise.draw(len(block))
    elements &= np.int64(-1 if plan.ring_bits == LARGEST_RING else (1 << plan.ring_bits) - 1)
    return elements.view(np.uint64)


def decode(total: npt.NDArray[np.integer], plan: SharedNoisePlan) -> npt.NDArray[np.float64]:
    """The sum (d,) that opened ring elements ``total`` (d,), reduced or not, stand for, in the gradient's units.

    For a mean, divide by the sum of the survivors' ``expected_batches``, never by what was in a batch.
    """
    _need(total.shape == (plan.dimensions,), f"a total of shape {total.shape}", f"({plan.dimensions},)")
    integers = total.astype(np.int64)
    # The ring's highest bit becomes the sign.
    integers <<= LARGEST_RING - plan.ring_bits
    integers >>= LARGEST_RING - plan.ring_bits
    return integers / plan.scale


def l2_sensitivity(task: SharedTask, scale: float) -> float:
    """D2 at this scale, in ring units."""
    return scale * task.clip_norm + math.sqrt(task.dimensions)


def event_of(
    task: SharedTask, *, scale: float, local_deviation: float, parts: int, sampling_rate: float, steps: int
) -> IntegerEvent:
    """``steps`` sums in which ``parts`` of the noise are unknown."""
    l2 = l2_sensitivity(task, scale)
    if task.mechanism == "skellam":
        return PoissonSampledSkellam(
            sampling_rate=sampling_rate,
            l2_sensitivity=l2,
            l1_sensitivity=l2 * min(math.sqrt(task.dimensions), l2),
            variance=parts * local_deviation**2,
            steps=steps,
        )
    return PoissonSampledDiscreteGaussian(
        sampling_rate=sampling_rate,
        l2_sensitivity=l2,
        local_deviation=local_deviation,
        parties=parts,
        dimensions=task.dimensions,
        steps=steps,
    )


def _need(holds: bool, found: str, expected: str) -> None:
    if not holds:
        raise UnsupportedEvent(f"shared noise: found {found}, expected {expected}")


def _for_each(value: float | Sequence[float], sites: int) -> tuple[float, ...]:
    if isinstance(value, int | float):
        return (float(value),) * sites if isinstance(sites, int) else ()
    return tuple(map(float, value))


def _log_chance(task: SharedTask) -> float:
    """L: minus the logarithm of the chance that one coordinate of one step may have to leave the ring."""
    return math.log(2 * task.dimensions * task.steps) + 40 * math.log(2)


def _noise_bound(task: SharedTask, local_deviation: float) -> float:
    """t: what n parts of the noise together stay below, in all coordinates of all steps."""
    log = _log_chance(task)
    return log / 3 + math.sqrt(log**2 / 9 + 2 * log * task.sites * local_deviation**2)


def _largest_scale(task: SharedTask, ring_bits: int, deviation: float) -> float:
    """The largest power of two as s with s n X + t + n < 2^(b-1), if the noise that is never known has this
    ``deviation``, in units of the clip norm; 0 if there is none."""
    log = _log_chance(task)
    # t is below 2 L / 3 + sqrt(2 n L) S, and S = s C deviation / sqrt(h).
    room = 2.0 ** (ring_bits - 1) * (1 - 2.0**-30) - task.sites - 2 * log / 3
    local = task.clip_norm * deviation / math.sqrt(task.honest)
    each = task.sites * task.coordinate_clip + math.sqrt(2 * task.sites * log) * local
    return math.ldexp(1.0, math.frexp(room / each)[1] - 1) if room > 0 else 0.0


def _least_deviation(task: SharedTask, scale: float) -> float:
    """The least deviation, in ring units, of noise that is never known, with which the task keeps its epsilon."""
    l2 = l2_sensitivity(task, scale)

    def with_noise(multiplier: float) -> IntegerEvent:
        return event_of(
            task,
            scale=scale,
            # Less is refused, once the search has ended.
            local_deviation=max(LEAST_LOCAL_DEVIATION, multiplier * l2 / math.sqrt(task.honest)),
            parts=task.honest,
            sampling_rate=max(task.sampling_rates),
            steps=task.steps,
        )

    return l2 * least_noise(with_noise, epsilon=task.epsilon, delta=task.delta)
