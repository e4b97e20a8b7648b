"""A whole round of this library, measured as the peers' scripts measure theirs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from benchmarks.peers.answering import Answer, Spent, said
from benchmarks.rounds import LANE, machines
from secureagg import SiteId, encode_input
from secureagg.codec import decode_from_coordinator, decode_from_site, encode
from secureagg.coordinator import MESSAGE_OF_PHASE, Outbound
from secureagg.keystream import Spread
from secureagg.messages import AnyMessage
from secureagg.parameters import Backend
from secureagg.phases import (
    Aborted,
    AdvertisingKeys,
    CollectingMaskedInputs,
    CoordinatorFinished,
    ParticipantFinished,
    SharingKeys,
    Unmasking,
)

PHASES = tuple(MESSAGE_OF_PHASE)


def whole_round(
    rows: np.ndarray,
    sites: int,
    *,
    backend: Backend = "masked",
    silent: Mapping[int, str] | None = None,
    spread: Spread = map,
) -> Answer:
    """A round of ``sites``, the i-th with row i modulo their number; ``silent``: site -> its first unanswered phase.

    Measured: the first site in all phases and until its input is sent, the coordinator in all phases and in unmasking,
    both with the codec.
    """
    made = machines(sites, rows.shape[1], backend=backend, spread=spread)
    names = list(made.participants)
    silent_from = {names[site]: PHASES.index(phase) for site, phase in (silent or {}).items()}
    client, sending, server, unmasking, up = Spent(), Spent(), Spent(), Spent(), 0
    pending: list[tuple[SiteId, list[bytes]]] = []

    def at_site(site: SiteId, act: Callable[[], Iterable[AnyMessage]]) -> None:
        sends = isinstance(coordinator.phase, AdvertisingKeys | SharingKeys | CollectingMaskedInputs)
        measured = (client, sending if sends else Spent()) if site == names[0] else (Spent(), Spent())
        with measured[0], measured[1]:
            pending.extend((site, encode(message)) for message in act())

    def at_coordinator(act: Callable[[], list[Outbound]]) -> None:
        unmasks = unmasking if isinstance(coordinator.phase, Unmasking) else Spent()
        with server, unmasks:
            outbound = [(one.recipient, encode(one.message)) for one in act()]
        for site, frames in outbound:
            at_site(site, lambda: made.participants[site].receive(decode_from_coordinator(frames)))  # noqa: B023

    coordinator = made.coordinator
    for index, (site, participant) in enumerate(made.participants.items()):
        update = rows[index % len(rows)]
        at_site(site, participant.start)
        at_site(site, lambda: participant.submit(encode_input(made.parameters, {LANE: update}, spread=spread)))  # noqa: B023
    phase: Any = coordinator.phase
    while not isinstance(phase, CoordinatorFinished | Aborted):
        now = PHASES.index(type(phase).__name__)
        speaking = [(site, frames) for site, frames in pending if silent_from.get(site, len(PHASES)) > now]
        pending.clear()
        for site, frames in speaking:
            if site == names[0]:
                up += sum(map(len, frames))
            at_coordinator(lambda: coordinator.receive(decode_from_site(frames), sender=site))  # noqa: B023
        if coordinator.phase is phase:
            at_coordinator(coordinator.close_phase)
        phase = coordinator.phase

    result: Answer = {
        "client": client.each(1),
        "input": sending.each(1),
        "server": server.each(sites),
        "unmask": unmasking.each(1),
        "bytes": up / rows.shape[1],
    }
    if isinstance(phase, Aborted):
        return result | {"survived": False, "failed": said(phase.error)}
    last = PHASES.index("CollectingMaskedInputs")
    counted = [index for index, site in enumerate(names) if silent_from.get(site, len(PHASES)) > last]
    ends = [phase, *(one.phase for one in made.participants.values())]
    opened = [end.aggregate for end in ends if isinstance(end, CoordinatorFinished | ParticipantFinished)]
    aggregate = next(each for each in opened if each is not None and each.totals)
    mean = np.mean([rows[index % len(rows)] for index in counted], axis=0, dtype=np.float64)
    error = float(np.abs(aggregate.means[LANE] - mean).max())
    return result | {"survived": len(aggregate.survivors) == len(counted), "error": error}
