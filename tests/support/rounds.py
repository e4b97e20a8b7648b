"""One round of real machines that a test can stop between any two messages, to lie in the coordinator's place."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import ClassVar

import numpy as np

from secureagg import (
    Card,
    Coordinator,
    Counts,
    FixedPoint,
    Identity,
    Lane,
    Participant,
    Roster,
    RoundParameters,
    SiteId,
    encode_input,
)
from secureagg.codec import decode_from_coordinator, decode_from_site, encode
from secureagg.messages import ToCoordinator, ToSite
from secureagg.parameters import Backend
from secureagg.phases import Aborted, Aggregate, AwaitingReceipt, CoordinatorFinished, ParticipantFinished
from secureagg.testing import CountingEntropy, MemoryJournal

UPDATE = Lane(name="update", length=5, encoding=FixedPoint(value_range=1.0), weighted=True)
HISTOGRAM = Lane(name="histogram", length=4, encoding=Counts(maximum=100))
_OPENED = AwaitingReceipt | ParticipantFinished


def names(count: int) -> list[SiteId]:
    """The names a, b, c, ... of a small cohort, in order."""
    return [SiteId(f"site-{index:03d}") for index in range(count)]


class StoppedRound:
    """``n`` sites and a coordinator.

    ``until(Message)`` runs honestly up to that message of the coordinator and returns it undelivered, per recipient;
    ``deliver`` hands messages to the sites.

    ``length``: of the update; ``change_for``: per site, keyword arguments of RoundParameters.create that differ for
    this site.  ``backend``: of all rounds for which ``options`` name none.
    """

    backend: ClassVar[Backend] = "masked"

    def __init__(
        self,
        n: int = 4,
        *,
        seed: int = 0,
        length: int = UPDATE.length,
        silent: Mapping[SiteId, type] | None = None,
        identities: Mapping[SiteId, Identity] | None = None,
        change_for: Mapping[SiteId, Mapping[str, object]] | None = None,
        **options: object,
    ) -> None:
        entropy = CountingEntropy(seed)
        self.sites = names(n)
        self.identities = dict(identities or {site: Identity.generate(entropy) for site in self.sites})
        self.roster = Roster(Card.issue(site, key, entropy(32)) for site, key in self.identities.items())
        self.options: dict[str, object] = {
            "consortium": "test",
            "run": "run",
            "round_number": 1,
            "roster": self.roster,
            "cohort": self.sites,
            "lanes": [dataclasses.replace(UPDATE, length=length), HISTOGRAM],
            "model_digest": bytes(32),
            "max_weight": 10,
            "backend": self.backend,
            **options,
        }
        self.parameters = RoundParameters.create(**self.options)  # type: ignore[arg-type]
        self.coordinator = Coordinator(parameters=self.parameters)
        self.journals = {site: MemoryJournal() for site in self.sites}
        self.values = {
            site: {"update": np.linspace(-1, 1, length) * (index + 1) / n, "histogram": np.arange(4) + index}
            for index, site in enumerate(self.sites)
        }
        self.weights = {site: 1 + index % 10 for index, site in enumerate(self.sites)}
        self.participants = {}
        self.inputs = {}
        for site in self.sites:
            changes = (change_for or {}).get(site, {})
            own = RoundParameters.create(**{**self.options, **changes})  # type: ignore[arg-type]
            self.participants[site] = Participant(
                site=site,
                identity=self.identities[site],
                parameters=own,
                journal=self.journals[site],
                entropy=CountingEntropy(f"{seed}-{site}".encode()),
            )
            values = {lane: array for lane, array in self.values[site].items() if lane in own.lanes}
            self.inputs[site] = encode_input(own, values, weight=self.weights[site], entropy=entropy)
        self.silent = dict(silent or {})
        self.pending: list[tuple[SiteId, ToCoordinator]] = []
        for site, participant in self.participants.items():
            self.pending += [(site, message) for message in participant.start()]
            self.pending += [(site, message) for message in participant.submit(self.inputs[site])]

    def answers(self, site: SiteId, message: ToSite) -> list[ToCoordinator]:
        """What ``site`` answers to ``message``, which crosses the codec."""
        return self.participants[site].receive(decode_from_coordinator(encode(message)))

    def deliver(self, messages: Mapping[SiteId, ToSite]) -> None:
        """Give each site its message; the answers wait in ``pending``."""
        for site, message in messages.items():
            self.pending += [(site, answer) for answer in self.answers(site, message)]

    def collect(self, *, from_sites: Collection[SiteId] | None = None) -> dict[SiteId, ToSite]:
        """Give the coordinator what is pending, and its deadline; returns what it sends, undelivered."""
        outbound = []
        pending, self.pending = self.pending, []
        phase = self.coordinator.phase
        for site, message in pending:
            if isinstance(message, self.silent.get(site, ())) or (from_sites is not None and site not in from_sites):
                self.silent[site] = object
                continue
            outbound += self.coordinator.receive(decode_from_site(encode(message)), sender=site)
        if self.coordinator.phase is phase:
            outbound += self.coordinator.close_phase()
        return {item.recipient: item.message for item in outbound}

    def until(self, message: type[ToSite]) -> dict[SiteId, ToSite]:
        """Run honestly until the coordinator sends ``message``; returns it per recipient, undelivered."""
        while not isinstance(self.coordinator.phase, Aborted):
            outbound = self.collect()
            if any(isinstance(item, message) for item in outbound.values()):
                return outbound
            self.deliver(outbound)
        raise self.coordinator.phase.error

    def finish(self) -> None:
        """Run honestly to the end."""
        while self.pending:
            self.deliver(self.collect())

    @property
    def aggregate(self) -> Aggregate:
        """What the round released: to the coordinator, or to the sites if it is for them only."""
        phase = self.coordinator.phase
        assert isinstance(phase, CoordinatorFinished)
        opened = [one.phase.aggregate for one in self.participants.values() if isinstance(one.phase, _OPENED)]
        return next(aggregate for aggregate in [phase.aggregate, *filter(None, opened)] if aggregate.totals)

    def check_sum(self, survivors: Collection[SiteId]) -> None:
        """What the round released, to whomever, is exactly the sum of these sites in every lane."""
        finished = [self.coordinator, *self.participants.values()]
        phases = [machine.phase for machine in finished]
        assert isinstance(phases[0], CoordinatorFinished)
        released = [phase.aggregate for phase in phases if isinstance(phase, CoordinatorFinished | _OPENED)]
        for aggregate in filter(None, released):
            assert aggregate.survivors == tuple(survivors)
            for name in aggregate.totals:
                lane = self.parameters.lanes[name]
                expected = sum(lane.lift(self.inputs[site].vectors[name]) for site in survivors)
                np.testing.assert_array_equal(aggregate.totals[name], expected)
        assert self.aggregate.totals.keys() == self.parameters.lanes.keys()
