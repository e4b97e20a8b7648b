"""A round to be measured: its sites and its coordinator, before the first message."""

import os
from dataclasses import dataclass

from secureagg import (
    Card,
    Coordinator,
    FixedPoint,
    Identity,
    Lane,
    Participant,
    Roster,
    RoundParameters,
    SiteId,
    site_id,
)
from secureagg.keystream import Spread
from secureagg.parameters import Backend, Graph
from secureagg.testing import MemoryJournal

LANE = "update"


@dataclass(frozen=True, slots=True)
class Machines:
    """Both sides of one round."""

    parameters: RoundParameters
    participants: dict[SiteId, Participant]
    coordinator: Coordinator


def machines(
    sites: int, length: int, *, graph: Graph = "auto", spread: Spread = map, backend: Backend = "masked"
) -> Machines:
    """``sites`` of default thresholds with one lane of ``length`` values of 16 bits in [-1, 1]."""
    identities = {site_id(f"site-{index:05d}"): Identity.generate() for index in range(sites)}
    parameters = RoundParameters.create(
        consortium="benchmark",
        run="benchmark",
        round_number=1,
        roster=Roster(Card.issue(site, key, os.urandom(32)) for site, key in identities.items()),
        cohort=identities,
        lanes=[Lane(name=LANE, length=length, encoding=FixedPoint(value_range=1.0, value_bits=16))],
        model_digest=bytes(32),
        graph=graph,
        backend=backend,
    )
    participants = {
        site: Participant(site=site, identity=key, parameters=parameters, journal=MemoryJournal())
        for site, key in identities.items()
    }
    return Machines(parameters, participants, Coordinator(parameters=parameters, spread=spread))
