"""A whole round in process, through the real machines and the real codec, for tests of code that embeds this
package."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final, Unpack

import numpy as np
import numpy.typing as npt

from secureagg.codec import decode_from_coordinator, decode_from_site, encode
from secureagg.coordinator import MESSAGE_OF_PHASE, Coordinator, Outbound
from secureagg.encoding import EncodedInput, encode_input
from secureagg.errors import ParameterError, RoundReplayed, ShapeMismatch
from secureagg.identity import Card, Entropy, Identity, Roster, SiteId, site_id
from secureagg.lanes import FixedPoint, Lane, integer
from secureagg.messages import ToCoordinator
from secureagg.parameters import Backend, Release, RoundParameters, ThresholdOptions
from secureagg.participant import Participant
from secureagg.phases import Aborted, Aggregate, CoordinatorFinished, ParticipantFinished

_ALL_PHASES: Final = tuple(MESSAGE_OF_PHASE)
PHASES: Final = _ALL_PHASES[:5]  # of the coordinator
HOMOMORPHIC_PHASES: Final = _ALL_PHASES
LANE: Final = "update"


class CountingEntropy:
    """Deterministic bytes for reproducible tests: SHA-256 of ``seed`` and a counter.  Never for production."""

    def __init__(self, seed: bytes | int = 0) -> None:
        self._seed = seed if isinstance(seed, bytes) else str(seed).encode()
        self._calls = 0

    def __call__(self, length: int) -> bytes:
        """The next ``length`` bytes."""
        self._calls += 1
        prefix = self._seed + self._calls.to_bytes(8, "little")
        blocks = (sha256(prefix + block.to_bytes(8, "little")).digest() for block in range(-(-length // 32)))
        return b"".join(blocks)[:length]


class MemoryJournal:
    """A journal that lives as long as the process."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}
        self._answered: set[tuple[str, int]] = set()

    def begin(self, run: str, round_number: int) -> None:
        """See ``Journal.begin``."""
        if round_number <= self._begun.get(run, 0):
            raise RoundReplayed(f"round {round_number} of run {run} was begun before")
        self._begun[run] = round_number

    def answer(self, run: str, round_number: int) -> None:
        """See ``Journal.answer``."""
        if (run, round_number) in self._answered:
            raise RoundReplayed(f"round {round_number} of run {run} was answered before")
        self._answered.add((run, round_number))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundOutcome:
    """What a finished round released, and what only this in-process helper can know beside it.

    ``aggregate``: float64 mean over the survivors, weighted if weights were given; ``total``: the exact integer sum;
    ``survivors``: who is in it; ``bytes_sent``: per site; ``encoded``: each survivor's integers before masking (times
    its weight), which add up to ``total``; ``transcript``: per site the encoded messages that the coordinator
    received, each as its frames.
    """

    aggregate: npt.NDArray[np.float64]
    total: npt.NDArray[np.int64]
    survivors: tuple[str, ...]
    bytes_sent: Mapping[str, int]
    encoded: Mapping[str, npt.NDArray[np.int64]] = field(repr=False)
    transcript: Mapping[str, tuple[tuple[bytes, ...], ...]] = field(repr=False)


def run_round(
    updates: Mapping[str, npt.ArrayLike],
    *,
    value_range: float,
    value_bits: int = 16,
    weights: Mapping[str, int] | None = None,
    max_weight: int | None = None,
    dropouts: Mapping[str, str] | None = None,
    backend: Backend = "masked",
    release_to: Release | None = None,
    entropy: Entropy = os.urandom,
    **thresholds: Unpack[ThresholdOptions],
) -> RoundOutcome:
    """Aggregate ``updates`` (site name -> 1-D float array, all of one length) in one round and return its outcome.

    ``weights``: site -> integer from 0 to ``max_weight`` (default: the largest given).  ``dropouts``: site -> the
    coordinator phase in which it stops answering.  ``backend``, ``release_to``: see ``RoundParameters``; sums that only
    the sites open are those of a site.  ``thresholds`` and their defaults: see
    ``secureagg.parameters.choose_thresholds``.  The same entropy bytes give the same round, with the masked backend
    byte for byte.

    Raises what a real round raises: ParameterError before it begins (ValueOutOfRange, ShapeMismatch for bad updates),
    and RoundAborted, among them ThresholdNotMet, when it ends without a release.
    """
    vectors = {site_id(name): np.asarray(update) for name, update in updates.items()}
    sites = sorted(vectors)
    for what, named in (("weights", weights), ("dropouts", dropouts)):
        if unknown := (named or {}).keys() - vectors.keys():
            raise ParameterError(f"{what}: {', '.join(sorted(unknown))} not among the {len(sites)} sites")
    if weights is not None and (missing := vectors.keys() - weights.keys()):
        raise ParameterError(f"weights: none for {', '.join(sorted(missing))}")
    phases = PHASES if backend == "masked" else HOMOMORPHIC_PHASES
    silent_from = {SiteId(name): _phase_index(name, phase, phases) for name, phase in (dropouts or {}).items()}
    shapes = {vector.shape for vector in vectors.values()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ShapeMismatch(f"updates: found shapes {sorted(shapes)}, expected 1-D arrays of one length")
    if weights is not None:
        weights = {name: integer(weight, what=f"weight of {name}") for name, weight in weights.items()}
        max_weight = max(1, *weights.values()) if max_weight is None else max_weight

    identities = {site: Identity.generate(entropy) for site in sites}
    roster = Roster(Card.issue(site, identities[site], entropy(32)) for site in sites)
    encoding = FixedPoint(value_range=value_range, value_bits=value_bits)
    length = len(next(iter(vectors.values()), ()))
    parameters = RoundParameters.create(
        consortium="in-process",
        run="testing",
        round_number=1,
        roster=roster,
        cohort=sites,
        lanes=[Lane(name=LANE, length=length, encoding=encoding, weighted=weights is not None)],
        model_digest=bytes(32),
        max_weight=max_weight if weights is not None else None,
        backend=backend,
        release_to=release_to,
        **thresholds,
    )
    inputs = {
        site: encode_input(
            parameters, {LANE: vectors[site]}, weight=None if weights is None else weights[site], entropy=entropy
        )
        for site in sites
    }
    participants = {
        site: Participant(
            site=site, identity=identities[site], parameters=parameters, journal=MemoryJournal(), entropy=entropy
        )
        for site in sites
    }
    return _run(parameters, participants, inputs, silent_from)


def _run(
    parameters: RoundParameters,
    participants: Mapping[SiteId, Participant],
    inputs: Mapping[SiteId, EncodedInput],
    silent_from: Mapping[SiteId, int],
) -> RoundOutcome:
    coordinator = Coordinator(parameters=parameters)
    transcript: dict[SiteId, list[tuple[bytes, ...]]] = {site: [] for site in participants}
    pending: list[tuple[SiteId, ToCoordinator]] = []
    for site, participant in participants.items():
        pending += [(site, message) for message in participant.start()]
        pending += [(site, message) for message in participant.submit(inputs[site])]

    def answers(outbound: list[Outbound]) -> None:
        for item in outbound:
            message = decode_from_coordinator(encode(item.message))
            pending.extend((item.recipient, reply) for reply in participants[item.recipient].receive(message))

    phase: Any = coordinator.phase
    while not isinstance(phase, CoordinatorFinished | Aborted):
        now = _ALL_PHASES.index(type(phase).__name__)
        speaking = [(site, message) for site, message in pending if silent_from.get(site, len(_ALL_PHASES)) > now]
        pending.clear()
        for site, message in speaking:
            frames = encode(message)
            transcript[site].append(tuple(frames))
            answers(coordinator.receive(decode_from_site(frames), sender=site))
        if coordinator.phase is phase:
            answers(coordinator.close_phase())
        phase = coordinator.phase
    if isinstance(phase, Aborted):
        raise phase.error

    aggregate = phase.aggregate
    if not aggregate.totals:
        aggregate = next(opened for opened in map(_opened, participants.values()) if opened is not None)
    ring_lane = parameters.lanes[LANE]
    return RoundOutcome(
        aggregate=aggregate.means[LANE],
        total=aggregate.totals[LANE],
        survivors=aggregate.survivors,
        bytes_sent={site: sum(len(frame) for frames in sent for frame in frames) for site, sent in transcript.items()},
        encoded={site: ring_lane.lift(inputs[site].vectors[LANE]) for site in aggregate.survivors},
        transcript={site: tuple(sent) for site, sent in transcript.items()},
    )


def _opened(participant: Participant) -> Aggregate | None:
    return participant.phase.aggregate if isinstance(participant.phase, ParticipantFinished) else None


def _phase_index(site: str, phase: str, phases: tuple[str, ...]) -> int:
    if phase not in phases:
        raise ParameterError(f"dropouts: {site} in phase {phase!r}, expected one of {', '.join(phases)}")
    return phases.index(phase)
