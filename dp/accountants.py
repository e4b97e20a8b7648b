"""Epsilon of a history of releases, by three accountants that rest on different mathematics.

``Rdp`` decides what may be released: fast, never too low, the same today and tomorrow.  It adds up Renyi divergences
(Mironov 2017; subsampling after Mironov, Talwar, Zhang 2019; conversion after Canonne, Kamath, Steinke 2020, prop. 12).
``Prv`` and ``Pld`` stand beside it in reports: both compose the distribution of the privacy loss itself by fast Fourier
transforms and are nearly exact, Prv after Gopi, Lee, Wutschitz 2021, Pld after Koskela et al. 2020 with the rounding
of Doroshenko et al. 2022.  The gap to Rdp is what the gate's caution costs.  Histories with integer noise are for Rdp
alone (``dp.divergences``): in many coordinates such noise has no known distribution of the privacy loss.

Every figure is an upper bound; infinity means that an accountant can show none in bounded time and precision, never
that there is none.  Libraries are imported when first needed, and none of them imports torch.
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Final, Protocol

import numpy as np

from dp import divergences
from dp.errors import BudgetExhausted, UnsupportedEvent
from dp.events import Event, IntegerEvent, PoissonSampledGaussian, PoissonSampledSkellam

# Small orders are best for large epsilons, large ones for small epsilons.
ORDERS: Final = (
    *(1 + thousandth / 1000 for thousandth in (11, 13, 15, 17)),
    *(1 + hundredth / 100 for hundredth in range(2, 10)),
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *(float(order) for order in range(11, 64)),
    *(float(order) for order in range(64, 513, 16)),
    *(float(round(512 * 2 ** (eighth / 8))) for eighth in range(1, 41)),
)
SMALLEST_NOISE_MULTIPLIER: Final = 0.05
LARGEST_NOISE_MULTIPLIER: Final = 1e5
USED_UP: Final = 0.99
# Added to (order - 1) times each divergence, of which floating point and a series cut short lose up to some 1e-13.
_ROUNDING: Final = 1e-12

RELATIVE_ERROR: Final = 0.01
_LEAST_SCALE: Final = 0.1
_DELTA_SHARE: Final = 1e-3
_SMALLEST_DELTA: Final = 1e-10  # below, rounding in the Fourier transforms would decide
_LARGEST_LOSS: Final = 700.0  # beyond, its exponential is no float64
_MOST_POINTS: Final = 2**20  # of the grid, all mechanisms together; some five seconds
_COARSEST: Final = 10.0
_MOST_STEPS: Final = 10**9

# Each mechanism as an event of one step, and its steps.
_History = tuple[tuple[Event, int], ...]


class Accountant(Protocol):
    """Turns a history into epsilon."""

    @property
    def name(self) -> str:
        """Short name for tables."""

    @property
    def version(self) -> str:
        """The library behind it and its version."""

    def epsilon(self, events: Iterable[Event], delta: float) -> float:
        """An epsilon at ``delta`` of all ``events`` on the same data together: 0 for none, infinity if it can show no
        bound, as all but ``Rdp`` for integer noise.

        Neither the order of the events nor how their steps are split matters.  Raises UnsupportedEvent for a delta
        outside (0, 1).
        """


@dataclass(frozen=True, slots=True)
class Rdp:
    """Renyi differential privacy through dp-accounting, and through prv-accountant at fractional orders: the gate."""

    @property
    def name(self) -> str:
        """``RDP``."""
        return "RDP"

    @property
    def version(self) -> str:
        """Both packages with their versions."""
        return f"{_version('dp-accounting')}, {_version('prv-accountant')}"

    def epsilon(self, events: Iterable[Event], delta: float) -> float:
        """The least bound over ORDERS; some hundredths of a second for a mechanism that it sees first."""
        return _rdp_epsilon(_merged(events, delta), delta)


@dataclass(frozen=True, slots=True)
class Prv:
    """Composed privacy random variables, by the package of that name's authors."""

    @property
    def name(self) -> str:
        """``PRV``."""
        return "PRV"

    @property
    def version(self) -> str:
        """prv-accountant and its version."""
        return _version("prv-accountant")

    def epsilon(self, events: Iterable[Event], delta: float) -> float:
        """The upper end of ``bounds``."""
        return self.bounds(events, delta)[1]

    def bounds(self, events: Iterable[Event], delta: float) -> tuple[float, float]:
        """A lower and an upper bound on epsilon, RELATIVE_ERROR of the RDP epsilon from their middle, at least 0.001.

        Up to 10 times that where the grid would have too many points.  Beyond that, for a delta below 1e-10, and for an
        epsilon of some hundred (the package does not integrate so far), 0 and infinity.
        """
        merged = _merged(events, delta)
        if not merged:
            return 0.0, 0.0
        grid = _grid(merged, delta)
        if grid is None:
            return 0.0, math.inf
        from prv_accountant import (  # noqa: PLC0415
            GaussianMechanism,
            PoissonSubsampledGaussianMechanism,
            PRVAccountant,
        )

        counts = [steps for _, _, steps in grid.mechanisms]
        try:
            with _quiet():
                accountant = PRVAccountant(
                    [
                        GaussianMechanism(z) if q == 1 else PoissonSubsampledGaussianMechanism(q, z)
                        for q, z, _ in grid.mechanisms
                    ],
                    eps_error=grid.error,
                    delta_error=_DELTA_SHARE * delta,
                    max_self_compositions=counts,
                    # The package's own search for this bound can take minutes; ours meets the same condition.
                    eps_max=grid.largest_loss,
                )
                lower, _, upper = accountant.compute_epsilon(delta, counts)
        except (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError):  # how it says that it cannot
            return 0.0, math.inf
        # Stops a NaN or an interval upside down, which would pass each comparison with a budget.
        if not lower <= upper < math.inf:
            return 0.0, math.inf
        return max(0.0, lower), max(0.0, upper)


@dataclass(frozen=True, slots=True)
class Pld:
    """Composed privacy loss distributions through dp-accounting, rounded up."""

    @property
    def name(self) -> str:
        """``PLD``."""
        return "PLD"

    @property
    def version(self) -> str:
        """dp-accounting and its version."""
        return _version("dp-accounting")

    def epsilon(self, events: Iterable[Event], delta: float) -> float:
        """At most RELATIVE_ERROR of the RDP epsilon (at least 0.001) too high; bounds on delta and size as for
        ``Prv.bounds``."""
        merged = _merged(events, delta)
        if not merged:
            return 0.0
        grid = _grid(merged, delta)
        if grid is None:
            return math.inf
        from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415

        total = privacy_loss_distribution.identity(grid.mesh)
        try:
            for q, z, steps in grid.mechanisms:
                # Without sampling, many steps are one with less noise.
                noise, times = (z / math.sqrt(steps), 1) if q == 1 else (z, steps)
                # What the library tabulates of one step reaches ten deviations far.
                reach = 10 / noise + 1 / (2 * noise**2)
                if reach > min(_LARGEST_LOSS, _MOST_POINTS / 4 * grid.mesh):
                    return math.inf
                with _quiet():
                    one = privacy_loss_distribution.from_gaussian_mechanism(
                        noise, sampling_prob=q, value_discretization_interval=grid.mesh
                    )
                    total = total.compose(one.self_compose(times))
            # The rest of delta covers what floating point does to the sums.
            epsilon = float(total.get_epsilon_for_delta((1 - _DELTA_SHARE) * delta))
        except (ArithmeticError, ValueError):  # how it says that it cannot
            return math.inf
        # Stops a NaN, which would pass each comparison with a budget.
        return epsilon if epsilon >= 0 else math.inf


ACCOUNTANTS: Final[tuple[Accountant, ...]] = (Rdp(), Prv(), Pld())


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountantTotal:
    """The epsilon of a history by one accountant; infinity if it shows none."""

    name: str
    version: str
    epsilon: float


def totals(events: Sequence[Event], delta: float) -> tuple[AccountantTotal, ...]:
    """What each accountant makes of all ``events`` together."""
    return tuple(
        AccountantTotal(name=each.name, version=each.version, epsilon=each.epsilon(events, delta))
        for each in ACCOUNTANTS
    )


def rdp_epsilon(events: Iterable[Event], delta: float) -> float:
    """The epsilon at ``delta`` of all ``events`` on the same data together, by the gate; 0 for none."""
    return Rdp().epsilon(events, delta)


def noise_multiplier_for(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    spent: Sequence[Event] = (),
) -> float:
    """The least noise multiplier, to within 0.1 %, for which ``steps`` more steps after ``spent`` stay within
    ``epsilon`` by the gate; never below 0.05.

    Raises BudgetExhausted, with the numbers, if no noise multiplier does.
    """

    return least_noise(
        lambda z: PoissonSampledGaussian(sampling_rate=sampling_rate, noise_multiplier=z, steps=steps),
        epsilon=epsilon,
        delta=delta,
        spent=spent,
    )


def least_noise(
    with_noise: Callable[[float], Event], *, epsilon: float, delta: float, spent: Sequence[Event] = ()
) -> float:
    """The least noise multiplier, as for ``noise_multiplier_for``, of the mechanism that ``with_noise`` makes of one.

    Epsilon must fall as it grows.
    """

    def total(noise_multiplier: float) -> float:
        return rdp_epsilon([*spent, with_noise(noise_multiplier)], delta)

    so_far = rdp_epsilon(spent, delta)
    high = 1.0
    event = with_noise(high)
    found = f"noise for {event.steps} steps at sampling rate {event.sampling_rate:.4g}: epsilon {so_far:.4g} is spent"
    allowed = f"expected at most {epsilon:g} at delta {delta:g}"
    # What this function leaves over of a budget is no budget for another run, which would release nothing but noise.
    if so_far > USED_UP * epsilon:
        raise BudgetExhausted(f"{found}, {allowed}")
    while (least := total(high)) > epsilon:
        if high > LARGEST_NOISE_MULTIPLIER:
            raise BudgetExhausted(f"{found} and the least that these can cost leads to {least:.4g}, {allowed}")
        high *= 2
    low = high / 2
    while total(low) <= epsilon:
        if low <= SMALLEST_NOISE_MULTIPLIER:
            return SMALLEST_NOISE_MULTIPLIER
        low, high = low / 2, low
    from scipy.optimize import brentq  # noqa: PLC0415  as the accountants' libraries

    tolerance = low / 4000
    # Epsilon falls about as 1 / z does, so this is nearly a line.
    root = float(brentq(lambda z: epsilon / max(total(z), 1e-300) - 1, low, high, xtol=tolerance))
    while total(root) > epsilon:
        root += tolerance
    return root


def _version(package: str) -> str:
    return f"{package} {version(package)}"


def _merged(events: Iterable[Event], delta: float) -> _History:
    """Each mechanism and its steps, in a fixed order."""
    if not 0 < delta < 1:
        raise UnsupportedEvent(f"delta: found {delta}, expected above 0 and below 1")
    steps: Counter[Event] = Counter()
    for event in events:
        steps[replace(event, steps=1)] += event.steps
    return tuple(sorted(steps.items(), key=lambda item: (type(item[0]).__name__, astuple(item[0]))))


def _gaussians(history: _History) -> list[tuple[float, float, int]]:
    """Sampling rate, noise multiplier and steps of each mechanism; none at all if one of them is no Gaussian."""
    found = [
        (mechanism.sampling_rate, mechanism.noise_multiplier, steps)
        for mechanism, steps in history
        if isinstance(mechanism, PoissonSampledGaussian)
    ]
    return found if len(found) == len(history) else []


def _rdp_epsilon(history: _History, delta: float) -> float:
    if not history:
        return 0.0

    def bound(index: int) -> float:
        found.append(_bound(history, delta, ORDERS[index]))
        return found[-1]

    # A small divergence bounds the total variation, and a delta above that needs no epsilon at all, at any order.
    found: list[float] = []
    if bound(0) == 0:
        return 0.0
    # (order - 1) times the bound is convex in the order, so the bound falls until its minimum and rises from there.
    # Whether or not rounding leads the search astray, each bound that it finds holds.
    low, high = 0, len(ORDERS) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if bound(middle + 1) < bound(middle) else (low, middle)
    return min(found)


def _bound(history: _History, delta: float, order: float) -> float:
    """Epsilon by the divergence of this order."""
    from dp_accounting.rdp import compute_epsilon  # noqa: PLC0415  takes a second

    divergence = sum((steps if steps < 1e300 else math.inf) * _divergence(each, order) for each, steps in history)
    with _quiet():
        return float(compute_epsilon([order], [divergence], delta)[0])


@lru_cache(maxsize=100_000)
def _divergence(mechanism: Event, order: float) -> float:
    """An upper bound on one step's Renyi divergence of this order; a run repeats its mechanism."""
    try:
        with _quiet():
            if isinstance(mechanism, PoissonSampledGaussian):
                found = _gaussian_divergence(mechanism.sampling_rate, mechanism.noise_multiplier, order)
            else:
                found = _integer_divergence(mechanism, order)
    except (ArithmeticError, ValueError):  # noise whose square is no float64
        return math.inf
    bound = found + _ROUNDING / (order - 1)
    # Stops a NaN and a divergence below 0, which the conversion would take for perfect privacy.
    return bound if bound > 0 else math.inf


def _gaussian_divergence(q: float, z: float, order: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent  # noqa: PLC0415
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415
    from prv_accountant import PoissonSubsampledGaussianMechanism  # noqa: PLC0415

    if order.is_integer() or q == 1 or not 0.05 <= z <= 1000:
        accountant = RdpAccountant([order]).compose(PoissonSampledDpEvent(q, GaussianDpEvent(z)))
        return float(accountant._rdp[0])  # it has no other way to ask
    # dp-accounting's bound at these orders is up to twice as large, or missing where q is about 1/2.  This series is
    # exact, and short for any noise that matters.
    return float(PoissonSubsampledGaussianMechanism(q, z).rdp(order))


def _integer_divergence(mechanism: IntegerEvent, order: float) -> float:
    """At whole orders that of ``dp.divergences``; between them, (order - 1) times it lies below the line."""
    if not order.is_integer():
        below, above = math.floor(order), math.ceil(order)
        upper = (order - below) * (above - 1) * _divergence(mechanism, float(above))
        lower = (above - order) * (below - 1) * _divergence(mechanism, float(below)) if below > 1 else 0.0
        return (lower + upper) / (order - 1)

    def curve(orders: divergences.Floats) -> divergences.Floats:
        if isinstance(mechanism, PoissonSampledSkellam):
            return divergences.skellam(
                orders, l2=mechanism.l2_sensitivity, l1=mechanism.l1_sensitivity, variance=mechanism.variance
            )
        return divergences.discrete_gaussian(
            orders,
            l2=mechanism.l2_sensitivity,
            local_deviation=mechanism.local_deviation,
            parties=mechanism.parties,
            dimensions=mechanism.dimensions,
        )

    return divergences.poisson_sampled(curve, mechanism.sampling_rate, int(order))


@dataclass(frozen=True, slots=True)
class _Grid:
    """Privacy losses from ``-largest_loss`` to ``largest_loss``, ``mesh`` apart, for an error of ``error``, and whose
    they are: sampling rate, noise multiplier and steps of each mechanism."""

    mechanisms: Sequence[tuple[float, float, int]]
    largest_loss: float
    mesh: float
    error: float


def _grid(history: _History, delta: float) -> _Grid | None:
    """The grid of Gopi et al. 2021, theorem 5.5 and remark 5.6; None if it would take too long or overflow, or if a
    mechanism is no Gaussian."""
    mechanisms, steps = _gaussians(history), sum(count for _, count in history)
    if not mechanisms or delta < _SMALLEST_DELTA or steps > _MOST_STEPS:
        return None
    share = _DELTA_SHARE * delta
    error = RELATIVE_ERROR * max(_rdp_epsilon(history, delta), _LEAST_SCALE)
    losses = [_rdp_epsilon(((mechanism, 1),), share / 8 / steps) for mechanism, _ in history]
    largest_loss = 3 + max(error, _rdp_epsilon(history, share / 4), *losses)
    if not largest_loss <= _LARGEST_LOSS:
        return None
    mesh = error / math.sqrt(steps / 2 * math.log(12 / share))
    coarser = max(1.0, len(history) * 2 * largest_loss / mesh / _MOST_POINTS)
    return _Grid(mechanisms, largest_loss, coarser * mesh, coarser * error) if coarser <= _COARSEST else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' remarks on overflow and orders left out: their results are checked instead."""
    logger = logging.getLogger("absl")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled
