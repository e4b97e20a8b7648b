"""What a round is: cohort, thresholds, lanes, and the context that binds everything to them.

Each side builds these parameters from its OWN copies of the consortium's manifest, the global model and the roster.
They are never taken from a message: whoever was shown something else arrives at another ``context``, and then no
signature verifies, no ciphertext opens and no mask cancels.

Thresholds (protocol section 3).  n: cohort size, t: threshold, c: number of sites that may collude with the
coordinator. To show one site as alive to some and as dropped to others, a lying coordinator needs t shares of each
kind; honest sites give one kind only, colluding ones both, so at most n + c shares exist: 2t > n + c rules it out.  A
released sum covers at least c + 2 sites, so that it hides each honest one among at least two.  On the sparse graph of
large cohorts (``graph``) each site has k holders of its shares, of whom t suffice, in place of n.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Final, Literal, Self, TypedDict, Unpack, get_args

from secureagg import labels
from secureagg.errors import ParameterError
from secureagg.graph import check_neighbours, choose_neighbourhood, least_honest_survivors
from secureagg.identity import Roster, SiteId
from secureagg.lanes import CANARY, CLIPPED, WEIGHT, Counts, FixedPoint, Lane, RingElements, RingLane, integer
from secureagg.slots import FRESH_BYTES, SlotLayout

MINIMUM_COHORT: Final = 3
MAXIMUM_COHORT: Final = 1000  # on the complete graph, whose shares grow with the square of the cohort
MAXIMUM_SPARSE_COHORT: Final = 10_000
COMPLETE_UP_TO: Final = 100  # sites, unless it is asked for beyond
DIGEST_BYTES: Final = 32

Graph = Literal["auto", "complete", "sparse"]
Backend = Literal["masked", "homomorphic"]
Release = Literal["coordinator", "sites"]


def default_threshold(cohort_size: int) -> int:
    """floor(2n/3) + 1."""
    return 2 * cohort_size // 3 + 1


def largest_max_corrupt(cohort_size: int, threshold: int) -> int:
    """The largest c with 2t > n + c and t >= c + 2; negative if even c = 0 has none."""
    return min(2 * threshold - cohort_size - 1, threshold - 2)


def check_thresholds(*, cohort_size: int, threshold: int, max_corrupt: int, minimum_survivors: int) -> None:
    """Raise ParameterError, with the inequality and its numbers, unless the four numbers are safe together."""
    n, t, c, h = cohort_size, threshold, max_corrupt, minimum_survivors
    if not MINIMUM_COHORT <= n <= MAXIMUM_COHORT:
        raise ParameterError(f"cohort: found {n} sites, expected {MINIMUM_COHORT} to {MAXIMUM_COHORT}")
    if c < 0:
        raise ParameterError(f"max_corrupt: found {c}, expected 0 or more")
    if t > n:
        raise ParameterError(f"threshold: found {t}, expected at most the cohort size {n}")
    if 2 * t <= n + c:
        raise ParameterError(
            f"threshold: found 2t = 2 x {t} = {2 * t}, expected above n + c = {n} + {c} = {n + c}; otherwise a lying "
            "coordinator can show one site as alive to some and as dropped to others"
        )
    if h < max(t, c + 2):
        raise ParameterError(
            f"minimum_survivors: found {h}, expected at least max(threshold, max_corrupt + 2) = {max(t, c + 2)}; "
            "otherwise a released sum may have a single honest member"
        )
    if h > n:
        raise ParameterError(f"minimum_survivors: found {h}, expected at most the cohort size {n}")


def check_backend(backend: Backend, release_to: Release, graph: Graph) -> None:
    """Raise ParameterError unless the three go together."""
    for what, found, known in (("backend", backend, Backend), ("release_to", release_to, Release)):
        if found not in get_args(known):
            raise ParameterError(f"{what}: found {found!r}, expected one of {', '.join(get_args(known))}")
    # Whoever takes off the masks of the masked backend has the sum.
    if backend == "masked" and release_to == "sites":
        raise ParameterError("release_to: found sites with the masked backend, expected the homomorphic one")
    if backend == "homomorphic" and graph == "sparse":
        raise ParameterError("graph: found sparse with the homomorphic backend, expected complete")


class ThresholdOptions(TypedDict, total=False):
    """What ``choose_thresholds`` can be given."""

    graph: Graph
    threshold: int | None
    max_corrupt: int | None
    max_dropouts: int | None
    minimum_survivors: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """The numbers that a round's security rests on.

    ``neighbours``: holders of each site's shares, None for all of the cohort; ``threshold``: of them that reconstruct;
    ``max_corrupt``: sites that may collude with the coordinator; ``minimum_survivors``: sites in a released sum.
    """

    neighbours: int | None
    threshold: int
    max_corrupt: int
    minimum_survivors: int


def choose_thresholds(cohort_size: int, **options: Unpack[ThresholdOptions]) -> Thresholds:
    """Derive what is not given, and check the whole; ParameterError, with the inequality, for what is not safe.

    ``graph``: "auto" is the complete graph up to 100 sites and the sparse one beyond, if one is safe.

    Defaults on the complete graph: threshold floor(2n/3) + 1; max_corrupt the largest that it allows;
    minimum_survivors max(threshold, max_corrupt + 2).  On the sparse graph the threshold follows from max_corrupt and
    ``max_dropouts``, which the round survives (default of both: a tenth of the cohort), and minimum_survivors is the
    number of honest sites that every sum covers.
    """
    n = integer(cohort_size, what="cohort")
    graph = options.get("graph", "auto")
    given = {
        "threshold": options.get("threshold"),
        "max_corrupt": options.get("max_corrupt"),
        "max_dropouts": options.get("max_dropouts"),
        "minimum_survivors": options.get("minimum_survivors"),
    }
    t, c, d, h = (None if value is None else integer(value, what=name) for name, value in given.items())
    if d is not None and not 0 <= d < n:
        raise ParameterError(f"max_dropouts: found {d}, expected 0 to {n - 1}")
    if graph not in ("auto", "complete", "sparse"):
        raise ParameterError(f"graph: found {graph!r}, expected auto, complete or sparse")
    if graph == "sparse" or (graph == "auto" and n > COMPLETE_UP_TO):
        if t is not None:
            raise ParameterError(f"threshold: found {t} on the sparse graph, which derives its own; or graph: complete")
        chosen = _sparse_thresholds(n, max_corrupt=c, max_dropouts=d, minimum_survivors=h)
        if chosen is not None:
            return chosen
        if graph == "sparse":
            raise ParameterError(
                f"graph: no sparse one is safe for {n} sites of which {n // 10 if c is None else c} may collude and "
                f"{n // 10 if d is None else d} drop out, expected fewer or graph: complete"
            )
    t = default_threshold(n) if t is None else t
    c = max(0, largest_max_corrupt(n, t)) if c is None else c
    h = max(t, c + 2) if h is None else h
    check_thresholds(cohort_size=n, threshold=t, max_corrupt=c, minimum_survivors=h)
    if d is not None and n - h < d:
        raise ParameterError(f"max_dropouts: found {d}, expected at most n - minimum_survivors = {n} - {h} = {n - h}")
    return Thresholds(neighbours=None, threshold=t, max_corrupt=c, minimum_survivors=h)


def _sparse_thresholds(
    n: int, *, max_corrupt: int | None, max_dropouts: int | None, minimum_survivors: int | None
) -> Thresholds | None:
    """None if no sparse graph is safe."""
    c = n // 10 if max_corrupt is None else max_corrupt
    d = n // 10 if max_dropouts is None else max_dropouts
    if not MINIMUM_COHORT <= n <= MAXIMUM_SPARSE_COHORT:
        raise ParameterError(f"cohort: found {n} sites, expected {MINIMUM_COHORT} to {MAXIMUM_SPARSE_COHORT}")
    if not 0 <= c < n:
        raise ParameterError(f"max_corrupt: found {c}, expected 0 to {n - 1}")
    chosen = choose_neighbourhood(n, corrupt=Fraction(c, n), dropouts=Fraction(d, n), one_sum=True)
    if chosen is None:
        return None
    k, t = chosen.neighbours, chosen.threshold
    # No site sees the whole cohort, so more than what the graph itself enforces cannot be promised.
    enforced = min(least_honest_survivors(n, k, t, c), n - d)
    h = enforced if minimum_survivors is None else minimum_survivors
    if not c + 2 <= h <= enforced:
        raise ParameterError(
            f"minimum_survivors: found {h}, expected max_corrupt + 2 = {c + 2} to {enforced}, the honest sites that "
            f"every sum covers on a graph of {k} neighbours and threshold {t}"
        )
    return Thresholds(neighbours=k, threshold=t, max_corrupt=c, minimum_survivors=h)


@dataclass(frozen=True, kw_only=True)
class RoundParameters:
    """Everything both sides must agree on before a round; built with ``create``, which derives and checks it.

    ``consortium``: names the consortium and its manifest; ``run``: one training run; ``round_number``: from 1.
    ``cohort``: the round's sites in order of name, each one's Shamir coordinate being its position, from 1.
    ``neighbours``: on the sparse graph the number of each site's holders, of whom ``threshold`` suffice; None on the
    complete graph.  ``lanes``: lane name -> lane and ring, in the order in which they travel.  ``model_digest``:
    SHA-256 of the global model.
    ``backend``: "masked", or "homomorphic" for masked inputs that are encrypted too, whose sum the sites open;
    ``release_to``: who is given what they opened, "sites" only or the "coordinator" too.
    """

    consortium: str
    run: str
    round_number: int
    roster: Roster
    cohort: tuple[SiteId, ...]
    threshold: int
    max_corrupt: int
    minimum_survivors: int
    lanes: Mapping[str, RingLane]
    max_weight: int | None
    model_digest: bytes = field(repr=False)
    neighbours: int | None = None
    backend: Backend = "masked"
    release_to: Release = "coordinator"

    @classmethod
    def create(
        cls,
        *,
        consortium: str,
        run: str,
        round_number: int,
        roster: Roster,
        cohort: Iterable[SiteId],
        lanes: Iterable[Lane],
        model_digest: bytes,
        max_weight: int | None = None,
        backend: Backend = "masked",
        release_to: Release | None = None,
        **thresholds: Unpack[ThresholdOptions],
    ) -> Self:
        """Derive what is not given, add the canary, weight and clip-count lanes, and check the whole.

        For the thresholds and their defaults see ``choose_thresholds``.  ``release_to``: "sites" by default where they
        open the sum.  Raises ParameterError for a round that is unsafe or could wrap.
        """
        members = list(cohort)
        names = tuple(sorted(members))
        if len(set(names)) != len(members):
            raise ParameterError(f"cohort: {len(members)} sites, only {len(set(names))} of them different")
        # Stops Sybil sites: nobody outside the pinned roster can be counted towards a threshold.
        if strangers := [site for site in names if site not in roster]:
            raise ParameterError(f"cohort: {', '.join(strangers)} not in the roster of {len(roster)} sites")
        release_to = release_to or ("sites" if backend == "homomorphic" else "coordinator")
        check_backend(backend, release_to, thresholds.get("graph", "auto"))
        if backend == "homomorphic":
            thresholds["graph"] = "complete"
        chosen = choose_thresholds(len(names), **thresholds)
        round_number = integer(round_number, what="round number")
        max_weight = None if max_weight is None else integer(max_weight, what="max_weight")
        if not 1 <= round_number < 1 << 63:
            raise ParameterError(f"round number: found {round_number}, expected 1 or more")
        if len(model_digest) != DIGEST_BYTES:
            raise ParameterError(f"model digest: {len(model_digest)} bytes, expected {DIGEST_BYTES}")
        if max_weight is not None and max_weight < 1:
            raise ParameterError(f"max_weight: found {max_weight}, expected 1 or more")
        return cls(
            consortium=consortium,
            run=run,
            round_number=round_number,
            roster=roster,
            cohort=names,
            threshold=chosen.threshold,
            max_corrupt=chosen.max_corrupt,
            minimum_survivors=chosen.minimum_survivors,
            neighbours=chosen.neighbours,
            lanes=_ring_lanes(lanes, cohort_size=len(names), max_weight=max_weight),
            max_weight=max_weight,
            model_digest=model_digest,
            backend=backend,
            release_to=release_to,
        )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over thresholds, weights, lanes and backend."""
        numbers = [self.threshold, self.max_corrupt, self.minimum_survivors, self.max_weight or 0]
        if self.neighbours is not None:
            numbers.append(self.neighbours)
        parts = [
            struct.pack(f"<{len(numbers)}q", *numbers),
            *(part for ring_lane in self.lanes.values() for part in _lane_parts(ring_lane)),
        ]
        if self.backend != "masked":
            parts += [self.backend.encode(), self.release_to.encode()]
        return labels.digest(labels.PARAMETERS, *parts)

    @cached_property
    def context(self) -> bytes:
        """The 32 bytes that every signature, key derivation and ciphertext of the round is bound to."""
        # Stops a coordinator that shows other parameters, another model, roster or cohort, or messages of another
        # round, to some of the sites.
        return labels.digest(
            labels.CONTEXT,
            self.consortium.encode(),
            self.run.encode(),
            self.round_number.to_bytes(8, "little"),
            self.digest,
            self.model_digest,
            self.roster.digest,
            *(site.encode() for site in self.cohort),
        )

    @cached_property
    def positions(self) -> Mapping[SiteId, int]:
        """Site -> Shamir coordinate, from 1: coordinate 0 would be the secret itself."""
        return MappingProxyType({site: index for index, site in enumerate(self.cohort, start=1)})

    def positions_of(self, sites: Iterable[SiteId]) -> tuple[int, ...]:
        """The coordinates of ``sites``, ascending."""
        return tuple(self.positions[site] for site in sorted(sites))

    def check_drawn(self, site: SiteId, neighbours: Sequence[int], *, who: str) -> None:
        """Raise MalformedMessage naming ``who`` unless ``site`` can have drawn these holders on the sparse graph."""
        check_neighbours(
            neighbours,
            position=self.positions[site],
            cohort_size=len(self.cohort),
            neighbours=self.neighbours or 0,
            who=who,
        )

    @cached_property
    def slot_layout(self) -> SlotLayout:
        """Where the lanes lie in a homomorphic sum."""
        return SlotLayout.of(self.lanes, cohort_size=len(self.cohort), max_weight=self.max_weight or 1)

    @cached_property
    def input_bytes(self) -> int:
        """Bytes of one site's masked input: packed lanes or ciphertexts."""
        if self.backend == "homomorphic":
            return self.slot_layout.ciphertexts * FRESH_BYTES
        return sum(ring_lane.packed_bytes for ring_lane in self.lanes.values())


def _ring_lanes(lanes: Iterable[Lane], *, cohort_size: int, max_weight: int | None) -> Mapping[str, RingLane]:
    own = list(lanes)
    # A canary in a ring of full width: unless every mask cancelled, it differs from the number of survivors, but for a
    # chance of 2^-64.
    added = [Lane(name=CANARY, length=1, encoding=Counts(maximum=1), minimum_ring_bits=64)]
    if max_weight is not None:
        added.append(Lane(name=WEIGHT, length=1, encoding=Counts(maximum=max_weight)))
    for lane in own:
        if lane.name in (CANARY, WEIGHT) or lane.name.endswith(CLIPPED):
            raise ParameterError(f"lane {lane.name}: this name is the protocol's own")
        if lane.weighted and max_weight is None:
            raise ParameterError(f"lane {lane.name}: weighted, but the round has no max_weight")
        if isinstance(lane.encoding, FixedPoint) and lane.encoding.clip:
            added.append(Lane(name=lane.name + CLIPPED, length=1, encoding=Counts(maximum=lane.length)))
    if not own:
        raise ParameterError("lanes: found none, expected at least one")
    ordered = sorted([*own, *added], key=lambda lane: lane.name)
    if len({lane.name for lane in ordered}) != len(ordered):
        raise ParameterError(f"lanes: names repeat in {[lane.name for lane in ordered]}")
    return MappingProxyType(
        {lane.name: RingLane.for_cohort(lane, cohort_size=cohort_size, max_weight=max_weight or 1) for lane in ordered}
    )


def _lane_parts(ring_lane: RingLane) -> tuple[bytes, ...]:
    lane = ring_lane.lane
    match lane.encoding:
        case FixedPoint(value_range=value_range, value_bits=value_bits, clip=clip):
            encoding = b"fixed-point" + struct.pack("<dq?", value_range, value_bits, clip)
        case Counts(maximum=maximum):
            encoding = b"counts" + struct.pack("<q", maximum)
        case RingElements():
            encoding = b"ring-elements"
    numbers = struct.pack("<qq?", lane.length, ring_lane.ring_bits, lane.weighted)
    return lane.name.encode(), numbers, encoding
