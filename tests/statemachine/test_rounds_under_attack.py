"""Whole rounds over a network and under a coordinator that do what they like.

Hypothesis drives real participants and a real coordinator through the real codec, message by message.  Everything in
flight can arrive in any order, twice, changed, late, at the wrong site or never; sites crash and come back; some sites
collude with the coordinator, which shows different sites different things.  After each step the promises of
docs/protocol.md are checked against everything that any site ever sent.  The complete graph and the sparse one have
a machine each; what both share stands in ``RoundsUnderAttack``.
"""

import copy
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import ClassVar
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.rounds import HISTOGRAM, UPDATE, StoppedRound, names

from secureagg import (
    Aggregate,
    Card,
    Coordinator,
    Identity,
    MalformedMessage,
    Participant,
    RemoteProtocolError,
    RoundAborted,
    RoundParameters,
    RoundReplayed,
    SecureAggregationError,
    SiteId,
    encode_input,
)
from secureagg.codec import decode_from_coordinator, decode_from_site, encode, sign
from secureagg.coordinator import Outbound
from secureagg.graph import draw_neighbours
from secureagg.identity import Roster
from secureagg.messages import (
    Acknowledgement,
    AcknowledgementList,
    AggregateAgreement,
    AggregateReport,
    AggregateSignature,
    EncryptedAggregate,
    Inclusion,
    SparseAdvertisement,
    SparseDelivery,
    SparseInput,
    SparseSurvivors,
    SurvivorList,
    SurvivorSignature,
    ToCoordinator,
    ToSite,
    UnmaskRequest,
    UnmaskShares,
)
from secureagg.parameters import Backend, default_threshold, largest_max_corrupt
from secureagg.phases import (
    Aborted,
    AdvertisingKeys,
    AwaitingAcknowledgements,
    AwaitingAgreement,
    AwaitingCohortKeys,
    AwaitingInput,
    AwaitingShares,
    AwaitingSurvivors,
    AwaitingUnmaskRequest,
    CheckingConsistency,
    CollectingMaskedInputs,
    CoordinatorFinished,
    Decrypting,
    ParticipantFinished,
    SharingKeys,
    Unmasking,
)
from secureagg.testing import CountingEntropy, MemoryJournal

ROUNDS = 3
EXAMPLES = 300
SPARSE_EXAMPLES = 200
HOMOMORPHIC_EXAMPLES = 80
STEPS = 40

# A true request, to be filled with other signatures; so this file names no other field that it may have.
SOME_REQUEST = next(iter(StoppedRound(3).until(UnmaskRequest).values()))

some = st.integers(0, 59)  # an index, to be taken modulo the length of whatever is indexed
mask = st.integers(0, 63)  # a subset of at most six
few = st.sampled_from([1 << index for index in range(6)]) | mask  # the same, often a single one
ways = st.sampled_from(["true", "anyway", "changed", "replayed"])  # to come by a statement, see _stated

Statement = Inclusion | Acknowledgement

# The draws of seven sites on which a cut comes nearest to success: the first three and the last three know each other,
# the one in the middle and one site on the other side; and that cut: near, far and gone.
FRAGILE = {
    **{1: (2, 3, 4, 5), 2: (1, 3, 4, 6), 3: (1, 2, 4, 7)},
    **{4: (1, 2, 3, 5), 5: (1, 4, 6, 7), 6: (2, 4, 5, 7), 7: (3, 4, 5, 6)},
}
CUT = (0b0000111, 0b1110000, 0b0001000)


@dataclasses.dataclass(frozen=True, eq=False)
class Flight:
    """One message on the connection of ``site``, in either direction."""

    site: SiteId
    to_coordinator: bool
    frames: tuple[bytes, ...]


def shortened(message: ToSite, leave_out: int) -> ToSite:
    """``message`` with some entries of its collections left out: those whose bit in ``leave_out`` is set."""
    lists = {name: getattr(message, name) for name in message.__struct_fields__}
    changes = {
        name: tuple(entry for index, entry in enumerate(value) if not leave_out >> index & 1)
        for name, value in lists.items()
        if isinstance(value, tuple)
    }
    return msgspec.structs.replace(message, **changes)


def flipped(frames: tuple[bytes, ...], where: int, bit: int) -> tuple[bytes, ...]:
    """``frames`` with one bit changed; ``where``, a fraction of 1000, says at which byte."""
    which = where % len(frames)
    if not frames[which]:
        return frames
    changed = bytearray(frames[which])
    changed[where * len(changed) // 1000] ^= 1 << bit
    return (*frames[:which], bytes(changed), *frames[which + 1 :])


def leaves(value: object) -> Iterator[object]:
    """Every object that ``value`` holds and that is no container, without what a site has for life or may publish."""
    if isinstance(value, SecureAggregationError | Identity | RoundParameters | MemoryJournal | CountingEntropy):
        return
    inside: list[object] = []
    if isinstance(value, Mapping):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    elif not isinstance(value, type) and not callable(value):
        inside = list(getattr(value, "__dict__", {}).values())
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        inside += [getattr(value, name) for name in slots if hasattr(value, name)]
    if not inside:
        yield value
    for item in inside:
        yield from leaves(item)


class RoundsUnderAttack(RuleBasedStateMachine):
    """A run of up to three rounds of one cohort, on either graph.

    ``colluders``: up to ``max_corrupt`` sites that give the coordinator all they hold, and sign for it whatever their
    machine would sign, as often as it likes.  ``malice``: how many more of the steps that can cost the round a site
    are left in this round, so that many rounds get to their end.  ``answers``: every unmask answer ever given.
    ``holders``: of each round and site, who may have shares of it.
    """

    tally: ClassVar[Counter[str]]
    backend: ClassVar[Backend] = "masked"

    def _begin_run(self, n: int, *, threshold: int, max_corrupt: int, minimum_survivors: int) -> None:
        entropy = CountingEntropy(n)
        self.sites = names(n)
        self.identities = {site: Identity.generate(entropy) for site in self.sites}
        self.roster = Roster(Card.issue(site, key, entropy(32)) for site, key in self.identities.items())
        self.journals = {site: MemoryJournal() for site in self.sites}
        self.threshold, self.max_corrupt, self.minimum_survivors = threshold, max_corrupt, minimum_survivors
        self.colluders = frozenset(self.sites[index - self.max_corrupt] for index in range(self.max_corrupt))
        self.number = self.released = 0
        self.pool: list[Flight] = []
        self.delivered: list[Flight] = []
        self.answers: dict[tuple[int, SiteId], list[UnmaskShares]] = defaultdict(list)
        self.holders: dict[tuple[int, SiteId], frozenset[SiteId]] = {}

    # --- the rounds ---

    def _parameters(self, **thresholds: int) -> RoundParameters:
        return RoundParameters.create(
            consortium="test",
            run="run",
            round_number=self.number,
            roster=self.roster,
            cohort=self.sites,
            lanes=[UPDATE, HISTOGRAM],
            model_digest=bytes(32),
            max_weight=10,
            backend=self.backend,
            **thresholds,
        )

    def _begin_round(self, malice: int, training: int) -> None:
        self.number += 1
        self.delivered += self.pool  # still on the wire: an adversary may deliver it any time
        self.pool = []
        self.malice = (0, 1, 2, 4, 8, 16)[malice % 6]
        self.silent: set[SiteId] = set()
        self.parameters = self._parameters()
        self.coordinator = Coordinator(parameters=self.parameters)
        self.participants = {site: self._machine(site) for site in self.sites}
        self.inputs = {
            site: encode_input(
                self.parameters,
                {"update": np.linspace(-1, 1, 5) * (index + 1) / 7, "histogram": np.arange(4) * self.number + index},
                weight=1 + (index + self.number) % 10,
                entropy=CountingEntropy(index),
            )
            for index, site in enumerate(self.sites)
        }
        # What the adversary has of this round: machines as they were before they signed or answered.
        self.unsigned: dict[SiteId, Participant] = {}
        self.unanswered: dict[SiteId, Participant] = {}
        for site, participant in self.participants.items():
            self._take(site, participant.start())
        self.training = {site for index, site in enumerate(self.sites) if training >> index & 1}
        for site in self.sites:
            if site not in self.training:
                self._submit(site)

    def _machine(self, site: SiteId) -> Participant:
        return Participant(
            site=site,
            identity=self.identities[site],
            parameters=self.parameters,
            journal=self.journals[site],
            entropy=CountingEntropy(f"{self.number}-{site}".encode()),
        )

    def _submit(self, site: SiteId) -> None:
        self.training.discard(site)
        participant = self.participants[site]
        if isinstance(participant.phase, AwaitingCohortKeys | AwaitingShares | AwaitingInput):
            self._take(site, participant.submit(self.inputs[site]))

    @property
    def over(self) -> bool:
        """Whether the coordinator has nothing more to wait for."""
        return isinstance(self.coordinator.phase, CoordinatorFinished | Aborted)

    # --- the network ---

    def _take(self, site: SiteId, messages: Iterable[ToCoordinator]) -> None:
        """Note what ``site`` sends, and put it on its way."""
        for message in messages:
            self._put(site, encode(message), to_coordinator=True)
            self._note(site, message)

    def _note(self, site: SiteId, message: ToCoordinator) -> None:
        if isinstance(message, UnmaskShares):
            self.tally["answers"] += 1
            self.answers[self.number, site].append(message)

    def _put(self, site: SiteId, frames: list[bytes], *, to_coordinator: bool) -> None:
        self.pool.append(Flight(site, to_coordinator, tuple(frames)))

    def _send(self, outbound: list[Outbound]) -> None:
        for item in outbound:
            self._put(item.recipient, encode(item.message), to_coordinator=False)

    def _deliver(self, flight: Flight) -> None:
        if flight in self.pool:
            self.pool.remove(flight)
            self.delivered.append(flight)
        if flight.to_coordinator:
            self._to_coordinator(flight.site, flight.frames)
        else:
            self._to_site(flight.site, flight.frames)

    def _to_coordinator(self, connection: SiteId, frames: tuple[bytes, ...]) -> None:
        phase = self.coordinator.phase
        received = dict(getattr(phase, "received", {}))
        try:
            self._send(self.coordinator.receive(decode_from_site(frames), sender=connection))
        except RemoteProtocolError:
            self.tally["refused by the coordinator"] += 1
            assert self.coordinator.phase is phase
            assert getattr(phase, "received", {}) == received

    def _to_site(self, site: SiteId, frames: tuple[bytes, ...]) -> None:
        participant = self.participants[site]
        try:
            message = decode_from_coordinator(frames)
        except MalformedMessage:
            return
        if isinstance(participant.phase, AwaitingSurvivors):
            self.unsigned[site] = copy.copy(participant)
        if isinstance(participant.phase, AwaitingUnmaskRequest | AwaitingAcknowledgements):
            self.unanswered[site] = copy.copy(participant)
        try:
            replies = participant.receive(message)
        except (RemoteProtocolError, RoundAborted) as error:
            self.tally["refused by a site"] += 1
            self.tally[f"refused by a site: {type(error).__name__}"] += 1
            assert isinstance(participant.phase, Aborted)
            return
        self._accepted(site, message)
        self._take(site, replies)

    def _accepted(self, site: SiteId, message: ToSite) -> None:
        """``site`` has taken ``message`` for true."""

    def _advance(self) -> None:
        """Deliver in order what is in flight until the coordinator's phase ends, by time-out if need be."""
        phase = self.coordinator.phase
        while self.coordinator.phase is phase:
            flight = next((flight for flight in self.pool if flight.site not in self.silent), None)
            if flight is None:
                break
            self._deliver(flight)
        if self.coordinator.phase is phase and not self.training - self.silent:
            self._send(self.coordinator.close_phase())

    def _reach(self, *phases: type) -> bool:
        """Go on honestly until the coordinator is in one of ``phases``; False if the round does not get there."""
        while not isinstance(self.coordinator.phase, phases) and not self.over:
            for site in sorted(self.training):
                self._submit(site)
            self._advance()
        return isinstance(self.coordinator.phase, phases)

    def _pick(self, which: int, *, to_coordinator: bool, delivered: bool = False) -> Flight | None:
        flights = [flight for flight in self.pool if flight.to_coordinator is to_coordinator]
        if delivered:
            flights = [flight for flight in self.delivered if flight.to_coordinator is to_coordinator]
        return flights[which % len(flights)] if flights else None

    # --- steps of an ordinary day ---

    @rule()
    def advance(self) -> None:
        """The coordinator's phase comes to its end."""
        self._advance()

    @rule()
    def advance_once_more(self) -> None:
        """The same, so that it happens more often."""
        self._advance()

    @precondition(lambda self: self.pool)
    @rule(which=some, count=st.integers(1, 6))
    def deliver(self, which: int, count: int) -> None:
        """Some messages arrive, whichever they are."""
        for _ in range(min(count, len(self.pool))):
            self._deliver(self.pool[which % len(self.pool)])

    @precondition(lambda self: self.training)
    @rule(which=some)
    def submit(self, which: int) -> None:
        """A site is done with training."""
        self._submit(sorted(self.training)[which % len(self.training)])

    @rule(which=some)
    def fall_silent_or_return(self, which: int) -> None:
        """A site's connection hangs, or its messages arrive late after all."""
        self.silent ^= {self.sites[which % len(self.sites)]}

    @precondition(lambda self: self.number < ROUNDS and (self.over or self.malice))
    @rule(malice=mask, training=mask)
    def begin_next_round(self, malice: int, training: int) -> None:
        """The next round of the same run, on the same journals."""
        self._begin_round(malice, training)

    # --- steps of an adversary that cost it nothing: the coordinator refuses and stays as it was ---

    @rule(which=some, old=st.booleans())
    def repeat_to_coordinator(self, which: int, old: bool) -> None:
        """A message of a site arrives twice, or once more long after, also in a later round."""
        if flight := self._pick(which, to_coordinator=True, delivered=old):
            self._to_coordinator(flight.site, flight.frames)

    @rule(which=some, connection=some, old=st.booleans())
    def speak_for_another(self, which: int, connection: int, old: bool) -> None:
        """A message of one site arrives over the connection of another."""
        if flight := self._pick(which, to_coordinator=True, delivered=old):
            self._to_coordinator(self.sites[connection % len(self.sites)], flight.frames)

    @rule(which=some, where=st.integers(0, 999), bit=st.integers(0, 7))
    def flip_to_coordinator(self, which: int, where: int, bit: int) -> None:
        """A message of a site arrives with one bit changed."""
        if flight := self._pick(which, to_coordinator=True):
            self._to_coordinator(flight.site, flipped(flight.frames, where, bit))

    # --- steps that may cost the round a site ---

    def _hurt(self) -> None:
        self.malice -= 1
        self.tally["hostile steps"] += 1

    @precondition(lambda self: self.malice)
    @rule()
    def deadline(self) -> None:
        """The phase's time is up, whoever has answered."""
        self._hurt()
        self._send(self.coordinator.close_phase())

    @precondition(lambda self: self.malice)
    @rule(which=some)
    def leave(self, which: int) -> None:
        """The coordinator no longer waits for a site."""
        self._hurt()
        self._send(self.coordinator.drop(self.sites[which % len(self.sites)]))

    @precondition(lambda self: self.malice and self.pool)
    @rule(which=some)
    def lose(self, which: int) -> None:
        """A message does not arrive."""
        self._hurt()
        self.delivered.append(self.pool.pop(which % len(self.pool)))

    @precondition(lambda self: self.malice)
    @rule(which=some, old=st.booleans(), site=st.none() | some)
    def repeat_to_site(self, which: int, old: bool, site: int | None) -> None:
        """A message of the coordinator arrives twice, long after, in a later round, or at another site."""
        if flight := self._pick(which, to_coordinator=False, delivered=old):
            self._hurt()
            self._to_site(flight.site if site is None else self.sites[site % len(self.sites)], flight.frames)

    @precondition(lambda self: self.malice)
    @rule(which=some, where=st.integers(0, 999), bit=st.integers(0, 7))
    def flip_to_site(self, which: int, where: int, bit: int) -> None:
        """A message of the coordinator arrives with one bit changed."""
        if flight := self._pick(which, to_coordinator=False):
            self._hurt()
            self._to_site(flight.site, flipped(flight.frames, where, bit))

    @precondition(lambda self: self.malice)
    @rule(which=some, leave_out=mask, instead=st.booleans())
    def leave_out(self, which: int, leave_out: int, instead: bool) -> None:
        """The coordinator leaves out keys, shares, survivors or signatures, in place of the true message or before
        it."""
        if flight := self._pick(which, to_coordinator=False):
            self._hurt()
            if instead:
                self.pool.remove(flight)
            message = shortened(decode_from_coordinator(flight.frames), leave_out)
            self._to_site(flight.site, tuple(encode(message)))

    @precondition(lambda self: self.malice)
    @rule(which=some)
    def crash(self, which: int) -> None:
        """A site crashes; what comes up again has its journal, and so refuses to begin this round."""
        self._hurt()
        site = self.sites[which % len(self.sites)]
        self.participants[site] = self._machine(site)
        self.unsigned.pop(site, None)
        self.unanswered.pop(site, None)
        with pytest.raises(RoundReplayed):
            self.participants[site].start()
        self.tally["restarts"] += 1

    # --- what must hold ---

    def _known(self, number: int, kind: str) -> set[SiteId]:
        """Honest sites of whose secret, of the ``kind`` in an answer, the adversary has enough shares."""
        shares = {site: set(self.colluders & self.holders[number, site]) for site in self.sites}
        for (of, holder), answers in self.answers.items():
            for answer in answers:
                for owner, _ in getattr(answer, kind) if of == number else ():
                    shares[owner].add(holder)
        return {site for site in self.sites if len(shares[site]) >= self.threshold} - self.colluders

    @invariant()
    def released_is_the_exact_sum(self) -> None:
        """What the coordinator released is the survivors' exact sum in every lane."""
        if isinstance(self.coordinator.phase, CoordinatorFinished):
            assert len(self.coordinator.phase.aggregate.survivors) >= self.parameters.minimum_survivors
            for aggregate in self._released():
                assert aggregate.survivors == self.coordinator.phase.aggregate.survivors
                assert aggregate.totals.keys() == self.parameters.lanes.keys()
                for name, lane in self.parameters.lanes.items():
                    total = sum(lane.lift(self.inputs[site].vectors[name]) for site in aggregate.survivors)
                    np.testing.assert_array_equal(aggregate.totals[name], total)
        else:
            finished = [p for p in self.participants.values() if isinstance(p.phase, ParticipantFinished)]
            assert not finished, "a site believes in a release that never was"

    def _released(self) -> list[Aggregate]:
        """What anybody takes for this round's sum."""
        return [self.coordinator.phase.aggregate]

    @invariant()
    def one_answer_per_site_and_round(self) -> None:
        """No site gives two answers in one round, and no answer has both kinds of share of one site."""
        for (number, site), answers in self.answers.items():
            assert len(answers) == 1, f"round {number}: {len(answers)} answers of {site}"
            alive, gone = (dict(part) for part in (answers[0].self_seed_shares, answers[0].mask_key_shares))
            assert not alive.keys() & gone.keys(), f"round {number}: both kinds of share from {site}"

    @invariant()
    def no_victim_is_unmasked(self) -> None:
        """All answers of a round and all that the colluders hold never unmask one site: of one of its two secrets there
        are fewer shares than the threshold."""
        for number in range(1, self.number + 1):
            unmasked = self._known(number, "self_seed_shares") & self._known(number, "mask_key_shares")
            assert not unmasked, f"round {number}: {unmasked} unmasked"

    @invariant()
    def aborted_holds_no_secret(self) -> None:
        """Nothing is left in a site that gave up, but the reason: no bytes, no numbers of an update, no key."""
        for site, participant in self.participants.items():
            if isinstance(participant.phase, Aborted):
                assert [field.name for field in dataclasses.fields(participant.phase)] == ["error"]
                kept = [
                    type(leaf) for leaf in leaves(vars(participant)) if not isinstance(leaf, str | int | type | None)
                ]
                assert not kept, f"{site} keeps {kept}"

    def _check_all(self) -> None:
        self.released_is_the_exact_sum()
        self.one_answer_per_site_and_round()
        self.no_victim_is_unmasked()
        self.aborted_holds_no_secret()

    def teardown(self) -> None:
        """Everybody comes back and what is still in flight arrives in order, so that the round ends."""
        if not hasattr(self, "training"):
            return
        self.silent = set()
        for site in sorted(self.training):
            self._submit(site)
        while not self.over:
            self._advance()
        for flight in list(self.pool):
            self._deliver(flight)
        self._check_all()
        kind = type(self.coordinator.phase).__name__
        event(f"the last round: {kind}")
        self.tally["runs"] += 1
        self.tally["rounds"] += self.number
        self.tally[kind] += 1
        if kind == "CoordinatorFinished" and len(self.coordinator.phase.aggregate.survivors) < len(self.sites):
            self.tally["released with dropouts"] += 1


class CompleteRoundsUnderAttack(RoundsUnderAttack):
    """Rounds on the complete graph: everyone holds shares of everyone, and signs one list of survivors."""

    tally: ClassVar[Counter[str]] = Counter()

    @initialize(n=st.integers(3, 6), frugal=st.booleans(), spare=some, corrupt=some, malice=mask, training=mask)
    def begin(self, n: int, frugal: bool, spare: int, corrupt: int, malice: int, training: int) -> None:
        """A run begins: thresholds are the defaults, or the lowest that are allowed; the minimum of survivors may be
        above them."""
        threshold = default_threshold(n)
        max_corrupt = corrupt % (max(0, largest_max_corrupt(n, threshold)) + 1)
        threshold = max((n + max_corrupt) // 2 + 1, 2) if frugal else threshold
        minimum_survivors = min(n, max(threshold, max_corrupt + 2) + spare % 4 // 3)
        self._begin_run(n, threshold=threshold, max_corrupt=max_corrupt, minimum_survivors=minimum_survivors)
        self._begin_round(malice, training)

    def _parameters(self) -> RoundParameters:
        return super()._parameters(
            threshold=self.threshold, max_corrupt=self.max_corrupt, minimum_survivors=self.minimum_survivors
        )

    def _begin_round(self, malice: int, training: int) -> None:
        # What the adversary knows of this round: true survivor lists, and who signed what.
        self.lists: list[SurvivorList] = []
        self.signed: dict[SiteId, SurvivorList] = {}
        self.signatures: dict[SurvivorList, dict[SiteId, bytes]] = defaultdict(dict)
        super()._begin_round(malice, training)
        self.holders |= {(self.number, site): frozenset(self.sites) for site in self.sites}

    def _send(self, outbound: list[Outbound]) -> None:
        self.lists += [item.message for item in outbound if isinstance(item.message, SurvivorList)]
        super()._send(outbound)

    def _note(self, site: SiteId, message: ToCoordinator) -> None:
        super()._note(site, message)
        if isinstance(message, SurvivorSignature):
            self.signed[site] = self.participants[site].phase.survivors
            self.signatures[self.signed[site]][site] = message.list_signature

    # Steps of the coordinator's that only mean something late in the round: the round goes on until they do.

    def _show(self, site: SiteId, message: ToSite) -> None:
        self.tally["lists shown"] += 1
        self._to_site(site, tuple(encode(message)))

    def _ask(self, site: SiteId, leave_out: int, *, foreign: bool, survivors_only: bool = False) -> None:
        """Ask ``site`` to unmask with the signatures on the list that it signed, the colluders' included; ``foreign``:
        also with those on other lists; ``survivors_only``: only those of sites on its list."""
        own = self.signed[site]
        gathered = dict(self.signatures[own])
        for colluder in self.colluders & self.unsigned.keys():
            try:
                (signed,) = copy.copy(self.unsigned[colluder]).receive(own)
            except (RemoteProtocolError, RoundAborted):
                continue
            gathered[colluder] = signed.list_signature
        if foreign:
            for others in self.signatures.values():
                gathered = {**others, **gathered}
        if survivors_only:
            survivors = dict(own.survivors)
            gathered = {site: signature for site, signature in gathered.items() if site in survivors}
        signatures = tuple(pair for index, pair in enumerate(sorted(gathered.items())) if not leave_out >> index & 1)
        request = msgspec.structs.replace(SOME_REQUEST, context=self.parameters.context, list_signatures=signatures)
        self.tally["requests forged"] += 1
        self._to_site(site, tuple(encode(request)))

    @precondition(lambda self: self.malice and not self.over)
    @rule(site=some, leave_out=mask)
    def show_another_list(self, site: int, leave_out: int) -> None:
        """The coordinator shows a site a survivor list of its own making, as its first or as its second."""
        if self._reach(CheckingConsistency, Unmasking):
            self._hurt()
            self._show(self.sites[site % len(self.sites)], shortened(self.lists[0], leave_out))

    @precondition(lambda self: self.malice and not self.over)
    @rule(which=some, leave_out=mask, foreign=st.booleans())
    def ask_with_other_signatures(self, which: int, leave_out: int, foreign: bool) -> None:
        """The coordinator asks a site to unmask with fewer signatures, or with such as were given on another list."""
        if self._reach(Unmasking) and self.signed:
            self._hurt()
            site = sorted(self.signed)[which % len(self.signed)]
            self._ask(site, leave_out, foreign=foreign)

    @precondition(lambda self: self.malice and not self.over)
    @rule(victim=some, half=mask | st.just(63))
    def split_the_sites(self, victim: int, half: int) -> None:
        """The coordinator shows one victim as alive to some of the sites and as dropped to the others, and asks all."""
        self._split(victim, half, foreign=False)

    @precondition(lambda self: self.malice and not self.over)
    @rule(victim=some, half=mask)
    def split_the_sites_and_mix(self, victim: int, half: int) -> None:
        """The same, and it fills up the signatures on each list with those on the other."""
        self._split(victim, half, foreign=True)

    def _split(self, victim: int, half: int, *, foreign: bool) -> None:
        if self._reach(CheckingConsistency):
            self._hurt()
            honest = self.lists[0]
            short = shortened(honest, 1 << victim % len(self.sites))
            for index, site in enumerate(self.sites):
                if isinstance(self.participants[site].phase, AwaitingSurvivors):
                    self._show(site, short if half >> index & 1 else honest)
            for site in sorted(self.signed):
                self._ask(site, 0, foreign=foreign, survivors_only=True)

    @precondition(lambda self: self.malice and (self.unanswered or not self.over))
    @rule(which=some, leave_out=mask)
    def forget_the_answer(self, which: int, leave_out: int) -> None:
        """A site goes back to before its answer, with the journal as it is now, and is asked again."""
        if self._reach(Unmasking):
            for flight in [flight for flight in self.pool if not flight.to_coordinator]:
                self._deliver(flight)
        if self.unanswered:
            self._hurt()
            site = sorted(self.unanswered)[which % len(self.unanswered)]
            self.participants[site] = copy.copy(self.unanswered[site])
            self._ask(site, leave_out & leave_out >> 1, foreign=False)
            self.tally["asked again"] += 1

    # --- what must hold on this graph ---

    @invariant()
    def one_list_per_round(self) -> None:
        """All answers of a round are about one set of survivors, each answerer among them, and large enough."""
        for number in range(1, self.number + 1):
            sets = {
                frozenset(victim for victim, _ in answer.self_seed_shares)
                for (of, _), answers in self.answers.items()
                for answer in answers
                if of == number
            }
            assert len(sets) <= 1, f"round {number}: answers on {len(sets)} different lists"
            assert all(len(survivors) >= self.parameters.minimum_survivors for survivors in sets)
            assert all(site in survivors for survivors in sets for of, site in self.answers if of == number)

    def _check_all(self) -> None:
        super()._check_all()
        self.one_list_per_round()


class HomomorphicRoundsUnderAttack(CompleteRoundsUnderAttack):
    """Rounds on the complete graph whose sum only the sites open.

    ``sums``: the encrypted ones that the honest coordinator sent in this round; ``signed_sums``: digest of one -> who
    signed it; ``opened``: round and site -> the digest of the one that it opened.
    """

    tally: ClassVar[Counter[str]] = Counter()
    backend: ClassVar[Backend] = "homomorphic"

    def _begin_run(self, n: int, **thresholds: int) -> None:
        self.opened: dict[tuple[int, SiteId], bytes] = {}
        super()._begin_run(n, **thresholds)

    def _begin_round(self, malice: int, training: int) -> None:
        self.sums: list[EncryptedAggregate] = []
        self.signed_sums: dict[bytes, dict[SiteId, AggregateSignature]] = defaultdict(dict)
        super()._begin_round(malice, training)

    def _send(self, outbound: list[Outbound]) -> None:
        self.sums += [item.message for item in outbound if isinstance(item.message, EncryptedAggregate)]
        super()._send(outbound)

    def _note(self, site: SiteId, message: ToCoordinator) -> None:
        super()._note(site, message)
        match message:
            case AggregateSignature(ciphertext_digest=digest):
                assert all(site not in signers for signers in self.signed_sums.values()), f"{site} signed two sums"
                self.signed_sums[digest][site] = message
            case AggregateReport():
                (digest,) = (digest for digest, signers in self.signed_sums.items() if site in signers)
                self.opened[self.number, site] = digest
                self.tally["sums opened"] += 1

    def _released(self) -> list[Aggregate]:
        assert not self.coordinator.phase.aggregate.totals, "the coordinator has the sum"
        phases = [participant.phase for participant in self.participants.values()]
        return [phase.aggregate for phase in phases if isinstance(phase, ParticipantFinished)]

    @precondition(lambda self: self.malice and not self.over)
    @rule(sites=mask, place=st.integers(0, 3), byte=st.integers(0, 6))
    def send_another_sum(self, sites: int, place: int, byte: int) -> None:
        """The coordinator sends some sites a sum of its own making, as their first or as their second."""
        if self._reach(Decrypting):
            self._hurt()
            (chunk,) = self.sums[0].chunks
            changed = bytearray(chunk)
            changed[8 * place + byte] ^= 1
            message = msgspec.structs.replace(self.sums[0], chunks=(bytes(changed),))
            for index, site in enumerate(self.sites):
                if sites >> index & 1:
                    self.tally["other sums sent"] += 1
                    self._to_site(site, tuple(encode(message)))

    @precondition(lambda self: self.malice and not self.over)
    @rule(which=some, leave_out=mask, foreign=st.booleans())
    def ask_to_open(self, which: int, leave_out: int, foreign: bool) -> None:
        """The coordinator asks a site to open what it signed, with what signatures there are on it, those that the
        colluders would give included; ``foreign``: also with those on other sums."""
        if not self._reach(Decrypting):
            return
        for flight in [flight for flight in self.pool if not flight.to_coordinator]:
            self._deliver(flight)
        waiting = [site for site in self.sites if isinstance(self.participants[site].phase, AwaitingAgreement)]
        if waiting:
            self._hurt()
            site = waiting[which % len(waiting)]
            (digest,) = (digest for digest, signers in self.signed_sums.items() if site in signers)
            gathered = dict(self.signed_sums[digest])
            for colluder in self.colluders:
                own = AggregateSignature(context=self.parameters.context, sender=colluder, ciphertext_digest=digest)
                gathered[colluder] = sign(own, self.identities[colluder])
            if foreign:
                for others in self.signed_sums.values():
                    gathered = {**others, **gathered}
            kept = [
                message for index, (_, message) in enumerate(sorted(gathered.items())) if not leave_out >> index & 1
            ]
            self.tally["asked to open"] += 1
            agreement = AggregateAgreement(context=self.parameters.context, signatures=tuple(kept))
            self._to_site(site, tuple(encode(agreement)))

    @invariant()
    def honest_sites_open_one_sum(self) -> None:
        """All honest sites that open anything in a round open the same ciphertexts: they answer one question."""
        for number in range(1, self.number + 1):
            found = {
                digest for (of, site), digest in self.opened.items() if of == number and site not in self.colluders
            }
            assert len(found) <= 1, f"round {number}: {len(found)} sums were opened"

    def _check_all(self) -> None:
        super()._check_all()
        self.honest_sites_open_one_sum()


class SparseRoundsUnderAttack(RoundsUnderAttack):
    """Rounds on the sparse graph: each site draws its holders, and hears of its neighbours only.

    Six or seven sites draw four holders each, of whom three suffice: far below the level of security that
    ``choose_neighbourhood`` gives, but with ``2t > k + c``, and with more than half of the honest sites in every set of
    sites that have three holders each in it or colluding.  So all that the machines' logic promises must hold.
    ``fragile``: whether the draws are the adversary's dream in place of random ones.
    """

    tally: ClassVar[Counter[str]] = Counter()

    @initialize(max_corrupt=st.integers(0, 1), fragile=st.booleans(), malice=mask, training=mask)
    def begin(self, max_corrupt: int, fragile: bool, malice: int, training: int) -> None:
        """A run begins, with the largest minimum of survivors that the graph enforces."""
        # Of each round and site: the sites with whom its input has a mask, its inclusion, its acknowledgement.
        self.masks: dict[tuple[int, SiteId], set[SiteId]] = {}
        self.included: dict[tuple[int, SiteId], Inclusion] = {}
        self.acknowledged: dict[tuple[int, SiteId], Acknowledgement] = {}
        self.fragile = fragile
        self._begin_run(6 + fragile, threshold=3, max_corrupt=max_corrupt, minimum_survivors=4 - max_corrupt)
        self._begin_round(malice, training)

    def _parameters(self) -> RoundParameters:
        return dataclasses.replace(
            super()._parameters(),
            neighbours=4,
            threshold=self.threshold,
            max_corrupt=self.max_corrupt,
            minimum_survivors=self.minimum_survivors,
        )

    def _begin_round(self, malice: int, training: int) -> None:
        def draw(*, position: int, **others: object) -> tuple[int, ...]:
            return FRAGILE[position] if self.fragile else draw_neighbours(position=position, **others)

        with mock.patch("secureagg.participant.draw_neighbours", draw):
            super()._begin_round(malice, training)

    def _at(self, positions: Iterable[int]) -> frozenset[SiteId]:
        return frozenset(self.sites[position - 1] for position in positions)

    def _subset(self, bits: int) -> frozenset[SiteId]:
        return frozenset(site for index, site in enumerate(self.sites) if bits >> index & 1)

    def _note(self, site: SiteId, message: ToCoordinator) -> None:
        super()._note(site, message)
        match message:
            case SparseAdvertisement():
                self.holders[self.number, site] = self._at(message.neighbours)
            case SparseInput():
                self.included[self.number, site] = message.inclusion
            case Acknowledgement():
                self.acknowledged[self.number, site] = message

    def _accepted(self, site: SiteId, message: ToSite) -> None:
        if isinstance(message, SparseDelivery):
            self.masks[self.number, site] = {*dict(message.ciphertexts), *self._at(message.sharers)}

    # Steps of the coordinator's that only mean something late in the round: the round goes on until they do.

    def _stated(
        self, by: SiteId, about: SiteId, said: Mapping[tuple[int, SiteId], Statement], how: str
    ) -> Statement | None:
        """The statement of ``by`` that names ``about``.  Without one it depends on ``how``: "true" gives none, "anyway"
        the one that does not name it, "changed" that one with the name put in, "replayed" one of an earlier round."""
        position = self.parameters.positions[about]
        now = said.get((self.number, by))
        field = "neighbours" if said is self.included else "survivors"
        if now and position in getattr(now, field):
            return now
        if how == "replayed":
            earlier = (said.get((number, by)) for number in range(self.number - 1, 0, -1))
            return next((item for item in earlier if item and position in getattr(item, field)), None)
        if now and how == "changed":
            return msgspec.structs.replace(now, **{field: tuple(sorted((position, *getattr(now, field))))})
        return now if how == "anyway" else None

    def _show(self, site: SiteId, *, how: str, without: Container[SiteId] = ()) -> None:
        """Show ``site`` the inclusions of its dealers but those ``without``."""
        dealers = [peer for peer in self.masks.get((self.number, site), ()) if site in self.holders[self.number, peer]]
        shown = [self._stated(dealer, site, self.included, how) for dealer in sorted(dealers) if dealer not in without]
        message = SparseSurvivors(context=self.parameters.context, inclusions=tuple(filter(None, shown)))
        self.tally["inclusions shown"] += 1
        self._to_site(site, tuple(encode(message)))

    def _ask(self, site: SiteId, *, how: str, without: Container[SiteId] = ()) -> None:
        """Ask ``site`` to reveal, with the acknowledgements of its holders but those ``without``; the colluders'
        acknowledge everyone."""
        own = self.included.get((self.number, site))
        shown = []
        for holder in sorted(self._at(own.neighbours if own else ())):
            item = self._stated(holder, site, self.acknowledged, how)
            if holder in self.colluders:
                everyone = tuple(self.parameters.positions.values())
                item = Acknowledgement(context=self.parameters.context, sender=holder, survivors=everyone)
                item = sign(item, self.identities[holder])
            if holder not in without:
                shown.append(item)
        message = AcknowledgementList(context=self.parameters.context, acknowledgements=tuple(filter(None, shown)))
        self.tally["acknowledgements shown"] += 1
        self._to_site(site, tuple(encode(message)))

    def _lie_to_all(self, gone: Container[SiteId], half: Container[SiteId], *, shown: str, asked: str) -> None:
        """Show everyone the inclusions, those in ``half`` without those ``gone``, and ask everyone; ``shown``,
        ``asked``: how to come by the inclusions and by the acknowledgements."""
        for site in self.sites:
            if isinstance(self.participants[site].phase, AwaitingSurvivors):
                self._show(site, how=shown, without=gone if site in half else ())
        for site in self.sites:
            if isinstance(self.participants[site].phase, AwaitingAcknowledgements):
                self._ask(site, how=asked)

    @precondition(lambda self: self.malice and (self._early or self.number < ROUNDS))
    @rule(cut=st.tuples(few, few, few) | st.just(CUT), how=ways)
    def cut_the_graph(self, cut: tuple[int, int, int], how: str) -> None:
        """The coordinator tells those near that those far did not share, as many of them as they put up with; then it
        goes on by itself, with some called dropped.  All that in the next round if it is too late in this one."""
        if not self._early:
            self._begin_round(malice=1, training=0)
        if not self._reach(CollectingMaskedInputs):
            return
        self._hurt()
        self.tally["graph cut"] += 1
        near, far, gone = map(self._subset, cut)
        for flight in [flight for flight in self.pool if not flight.to_coordinator]:
            message = decode_from_coordinator(flight.frames)
            if not isinstance(message, SparseDelivery):
                continue
            self.pool.remove(flight)
            sharers = self._at(message.sharers)
            heard_of = sorted(sharers - far) + sorted(sharers & far)
            hidden = far - set(heard_of[: self.threshold]) if flight.site in near else ()
            changed = msgspec.structs.replace(
                message,
                sharers=tuple(position for position in message.sharers if self.sites[position - 1] not in hidden),
                share_commitments=tuple(pair for pair in message.share_commitments if pair[0] not in hidden),
                ciphertexts=tuple(pair for pair in message.ciphertexts if pair[0] not in hidden),
            )
            self._to_site(flight.site, tuple(encode(changed)))
        for site in sorted(self.training):
            self._submit(site)
        self._lie_to_all(gone, self.sites, shown=how, asked="true")

    @property
    def _early(self) -> bool:
        return isinstance(self.coordinator.phase, AdvertisingKeys | SharingKeys)

    @precondition(lambda self: self.malice and (not self.over or self.number < ROUNDS))
    @rule(gone=few, half=mask | st.just(-1), how=ways)
    def split_the_sites(self, gone: int, half: int, how: str) -> None:
        """The coordinator shows some as alive to some of the sites and as dropped to the others, and asks all; in the
        next round if this one is over."""
        if self.over:
            self._begin_round(malice=1, training=0)
        if self._reach(CheckingConsistency):
            self._hurt()
            self.tally["sites split"] += 1
            self._lie_to_all(self._subset(gone), self._subset(half), shown="true", asked=how)

    @precondition(lambda self: self.malice and not self.over)
    @rule(site=some, leave_out=few, how=ways)
    def show_other_inclusions(self, site: int, leave_out: int, how: str) -> None:
        """The coordinator shows a site some of the inclusions, or others, as its first or its second."""
        if self._reach(CheckingConsistency, Unmasking):
            self._hurt()
            self._show(self.sites[site % len(self.sites)], how=how, without=self._subset(leave_out))

    @precondition(lambda self: self.malice and not self.over)
    @rule(site=some, leave_out=few, how=ways)
    def ask_with_other_acknowledgements(self, site: int, leave_out: int, how: str) -> None:
        """The coordinator asks a site to reveal with some of the acknowledgements, or with others."""
        if self._reach(Unmasking):
            self._hurt()
            self._ask(self.sites[site % len(self.sites)], how=how, without=self._subset(leave_out))

    @precondition(lambda self: self.malice and (self.unanswered or not self.over))
    @rule(which=some, leave_out=mask)
    def forget_the_answer(self, which: int, leave_out: int) -> None:
        """A site goes back to before its answer, with the journal as it is now, and is asked again."""
        if self._reach(Unmasking):
            for flight in [flight for flight in self.pool if not flight.to_coordinator]:
                self._deliver(flight)
        if self.unanswered:
            self._hurt()
            site = sorted(self.unanswered)[which % len(self.unanswered)]
            self.participants[site] = copy.copy(self.unanswered[site])
            self._ask(site, how="true", without=self._subset(leave_out & leave_out >> 1))
            self.tally["asked again"] += 1

    # --- what must hold on this graph ---

    @invariant()
    def who_reveals_is_never_dropped(self) -> None:
        """Of an honest site that revealed anything, the mask key stays secret."""
        for number in range(1, self.number + 1):
            lost = {site for of, site in self.answers if of == number} & self._known(number, "mask_key_shares")
            assert not lost, f"round {number}: {lost} revealed shares and lost their mask keys"

    @invariant()
    def every_sum_is_closed(self) -> None:
        """Each site in a sum that the coordinator can read has enough of its holders in the sum or among the colluders;
        there is one such sum at most."""
        for number in range(1, self.number + 1):
            sums = self._readable(number)
            for found in sums:
                for site in found:
                    inside = self.holders[number, site] & (found | self.colluders)
                    assert len(inside) >= self.threshold, f"round {number}: {site} in the sum over {found}"
                assert len(found) >= self.minimum_survivors
            assert len(sums) <= 1, f"round {number}: {sums} can be read"

    def _readable(self, number: int) -> set[frozenset[SiteId]]:
        """The smallest sets of honest sites over whose inputs, with the colluders' shares and all that was revealed,
        no mask is left that the coordinator does not know."""
        secret = set(self.sites) - self.colluders - self._known(number, "mask_key_shares")
        # Site -> the sites with whom it has a mask in its input that stays secret.
        masks = {
            site: self.masks[number, site] & secret if site in secret else set()
            for of, site in self.included
            if of == number and site not in self.colluders
        }
        # A mask that only one of the two has in its input never goes away.
        both = {site for site in masks if all(site in masks.get(peer, ()) for peer in masks[site])}
        bare = both & self._known(number, "self_seed_shares")
        sums = set()
        for site in masks:
            found = {site}
            while more := {peer for member in found & bare for peer in masks[member]} - found:
                found |= more
            if found <= bare:
                sums.add(frozenset(found))
        return sums

    def _check_all(self) -> None:
        super()._check_all()
        self.who_reveals_is_never_dropped()
        self.every_sum_is_closed()
        if self._readable(self.number):
            self.tally["sums readable"] += 1


def attack(machine: type[RoundsUnderAttack], *, examples: int, happens: Iterable[str], rarest: float = 0.02) -> None:
    """Run ``machine``; what ``happens`` stands for must really happen, in more than ``rarest`` of the runs, on rounds
    many of which end with a release."""
    tally = machine.tally
    tally.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert tally["CoordinatorFinished"] > 0.2 * tally["runs"], tally
    for what in ("released with dropouts", "asked again", "restarts", *happens):
        assert tally[what] > rarest * tally["runs"], tally


@pytest.mark.timeout(600)  # a failure is worth the minutes that it takes to find its shortest form
def test_rounds_under_attack() -> None:
    """Whatever network, coordinator and colluding sites do, a round gives the exact sum or nothing and unmasks nobody;
    and the attacks really happen, on rounds many of which end with a release."""
    attack(CompleteRoundsUnderAttack, examples=EXAMPLES, happens=["lists shown", "requests forged"])


HOMOMORPHIC_HAPPENS = ["lists shown", "requests forged", "sums opened", "other sums sent", "asked to open"]


@pytest.mark.timeout(600)
def test_homomorphic_rounds_under_attack() -> None:
    """The same where only the sites open the sum, and all honest ones open one sum at most."""
    pytest.importorskip("tenseal")
    attack(HomomorphicRoundsUnderAttack, examples=HOMOMORPHIC_EXAMPLES, happens=HOMOMORPHIC_HAPPENS, rarest=0.005)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_homomorphic_rounds_under_attack() -> None:
    """The same, more of them."""
    pytest.importorskip("tenseal")
    attack(HomomorphicRoundsUnderAttack, examples=EXAMPLES, happens=HOMOMORPHIC_HAPPENS)


@pytest.mark.timeout(600)
def test_sparse_rounds_under_attack() -> None:
    """The same on the sparse graph, where what the coordinator can read is also one sum at most, over sites that have
    enough of their holders in it."""
    attack(
        SparseRoundsUnderAttack,
        examples=SPARSE_EXAMPLES,
        happens=["inclusions shown", "acknowledgements shown", "graph cut", "sites split", "sums readable"],
    )
