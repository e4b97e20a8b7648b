"""The summing side of one round.  It may lie, so nothing here protects a site: the participant's checks do.

    AdvertisingKeys -> SharingKeys -> CollectingMaskedInputs -> CheckingConsistency -> Unmasking
                    -> CoordinatorFinished, or Aborted

With the homomorphic backend, Unmasking -> Decrypting -> Opening -> CoordinatorFinished: the sites sign the encrypted
sum, then they open it.

What an honest coordinator checks, it checks so that one bad site cannot spoil the round for the others: a bad message
is refused with the state unchanged.  A phase ends when everyone still expected has answered, or when ``close_phase``
says that the time is up; then the round goes on with those who answered, or ends without a release.

Who holds shares of whom is what tells the sparse graph from the complete one; ``COMPLETE``, ``SPARSE`` and
``HOMOMORPHIC`` at the end say which message is collected when.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from copy import copy
from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryFile
from typing import Any, Final

import msgspec

from secureagg import labels
from secureagg.aggregate import aggregate_of
from secureagg.agreement import KeyPair, digest_key, pairwise_mask_key, self_mask_key
from secureagg.codec import check_signature, encode
from secureagg.commitments import COMMITMENTS_BYTES, check_share_commitments, secret_commitment, seed_commitment
from secureagg.errors import (
    AuthenticationFailed,
    DuplicateMessage,
    MalformedMessage,
    RoundAborted,
    SecureAggregationError,
    ThresholdNotMet,
    UnexpectedMessage,
)
from secureagg.homomorphic import CiphertextSum, SumReader, round_key, sum_digest, unmask_sum
from secureagg.identity import SiteId, verify
from secureagg.keystream import Spread
from secureagg.lanes import CANARY
from secureagg.masking import SLOTS_LANE, MaskKey, pairwise_sign, unmasked_total
from secureagg.messages import (
    Acknowledgement,
    AcknowledgementList,
    AggregateAgreement,
    AggregateReport,
    AggregateSignature,
    CohortKeys,
    EncryptedAggregate,
    EncryptedShares,
    KeyAdvertisement,
    KeyedDelivery,
    KeyedShares,
    KeyRelease,
    MaskedInput,
    RoundFailed,
    RoundReceipt,
    ShareDelivery,
    SparseAdvertisement,
    SparseDelivery,
    SparseInput,
    SparseKeys,
    SparseReceipt,
    SparseSurvivors,
    SurvivorList,
    SurvivorSignature,
    ToCoordinator,
    ToSite,
    UnmaskRequest,
    UnmaskShares,
    named,
)
from secureagg.parameters import DIGEST_BYTES, RoundParameters
from secureagg.participant import input_digest
from secureagg.phases import (
    Aborted,
    AdvertisingKeys,
    Aggregate,
    CheckingConsistency,
    CollectingMaskedInputs,
    CollectingPhase,
    CoordinatorFinished,
    CoordinatorPhase,
    Dealing,
    Decrypting,
    Opening,
    SharingKeys,
    Unmasking,
)
from secureagg.shamir import check_share, lagrange_coefficients, reconstruct
from secureagg.upload import Spool, Upload, empty_sums

__all__ = ["MESSAGE_OF_PHASE", "Aggregate", "Coordinator", "Outbound"]


@dataclass(frozen=True, slots=True)
class Outbound:
    """A message and the site it is for."""

    recipient: SiteId
    message: ToSite


class Coordinator:
    """One round, summed: collects masked inputs and releases their exact sum or nothing.

    ``spread`` puts the adding and unmasking on several cores, see ``keystream``; ``spool`` opens the file that holds a
    masked input until it is whole.
    """

    def __init__(self, *, parameters: RoundParameters, spread: Spread = map, spool: Spool = TemporaryFile) -> None:
        self._parameters = parameters
        self._spread = spread
        self._spool = spool
        self._collectors = _collectors(parameters)
        self._phase: CoordinatorPhase = AdvertisingKeys()
        self._gone: set[SiteId] = set()
        self._coefficients = cache(lagrange_coefficients)  # on the complete graph all secrets share one set

    @property
    def context(self) -> bytes:
        """The round's context, 32 bytes."""
        return self._parameters.context

    @property
    def phase(self) -> CoordinatorPhase:
        """The current phase."""
        return self._phase

    @property
    def expected(self) -> frozenset[SiteId]:
        """The sites whose message the current phase still waits for."""
        match self._phase:
            case AdvertisingKeys():
                asked: Iterable[SiteId] = self._parameters.cohort
            case SharingKeys(advertisements=advertisements):
                asked = advertisements
            case CollectingMaskedInputs(dealings=dealings):
                asked = dealings
            case CheckingConsistency(survivors=survivors):
                asked = (site for site, _ in survivors.survivors)
            case Unmasking(signers=signers):
                asked = signers
            case Decrypting(asked=asked) | Opening(asked=asked):
                pass
            case _:
                return frozenset()
        return frozenset(asked) - self._phase.received.keys() - self._gone

    def receive(self, message: ToCoordinator, *, sender: SiteId) -> list[Outbound]:
        """Take one message of ``sender``, the peer that the transport authenticated; returns what to send.

        A masked input may come with all its chunks or with none, which then follow through ``receive_chunk``.
        Raises RemoteProtocolError, naming the sender, for a message that is refused; the state is unchanged then, but
        that a refused chunk ends its upload.
        """
        phase = self._phase
        who = f"participant {sender}, {type(phase).__name__}"
        if message.sender != sender:
            raise AuthenticationFailed(f"{who}: found a message signed as {message.sender}, expected {sender}")
        if message.context != self._parameters.context:
            raise UnexpectedMessage(f"{who}: {type(message).__name__} of another round, model or parameters")
        handler = self._collectors.get((type(phase), type(message)))
        if handler is None or isinstance(phase, CoordinatorFinished | Aborted):
            raise UnexpectedMessage(f"{who}: found {type(message).__name__}, which has no place in this phase")
        if sender in phase.received:
            raise DuplicateMessage(f"{who}: a second {type(message).__name__}")
        if sender not in self.expected:
            raise UnexpectedMessage(f"{who}: {type(message).__name__} of a site that this phase does not wait for")
        check_signature(message, self._parameters.roster[sender].signing_key)
        handler(self, phase, message, who)
        return [] if self.expected else self._end_phase(phase)

    def receive_chunk(self, chunk: bytes, *, sender: SiteId) -> list[Outbound]:
        """Take the next chunk of the masked input that ``sender`` is sending; returns what to send.

        Raises RemoteProtocolError, naming the sender, for a chunk that is refused; its upload is discarded then and
        nothing of it is in the sum.  OSError if the spool file fails: on the way in this upload is discarded, on the
        way out the round is over.
        """
        phase = self._phase
        who = f"participant {sender}, {type(phase).__name__}"
        if not isinstance(phase, CollectingMaskedInputs) or sender not in phase.uploads:
            raise UnexpectedMessage(f"{who}: a chunk without a masked input that it belongs to")
        self._take_chunk(phase, sender, chunk, who)
        return [] if self.expected else self._end_phase(phase)

    def drop(self, site: SiteId) -> list[Outbound]:
        """Stop waiting for ``site``: it left or its connection is gone; returns what to send if that ends the phase."""
        self._gone.add(site)
        if isinstance(self._phase, CollectingMaskedInputs):
            self._discard(self._phase, site)
        if isinstance(self._phase, CoordinatorFinished | Aborted) or self.expected:
            return []
        return self._end_phase(self._phase)

    def close_phase(self) -> list[Outbound]:
        """The phase's time is up: go on with those who answered, or abort; returns what to send."""
        if isinstance(self._phase, CoordinatorFinished | Aborted):
            return []
        return self._end_phase(self._phase)

    # --- collecting: check one message, then remember it ---

    def _collect_advertisement(self, phase: AdvertisingKeys, message: KeyAdvertisement, who: str) -> None:
        used = {key for item in phase.received.values() for key in (item.mask_key, item.channel_key)}
        keys = {message.mask_key, message.channel_key}
        # Stops a site that copies a peer's key, which every other site would refuse the round for.
        if len(keys) != 2 or keys & used:
            raise AuthenticationFailed(f"{who}: a key that is advertised twice")
        probe = KeyPair(bytes(range(32)))
        for name, key in (("mask", message.mask_key), ("channel", message.channel_key)):
            probe.agree(key, who=f"{who}: {name} key")
        if isinstance(message, SparseAdvertisement):
            self._parameters.check_drawn(message.sender, message.neighbours, who=who)
        phase.received[message.sender] = message

    def _collect_shares(self, phase: SharingKeys, message: EncryptedShares, who: str) -> None:
        holders = self._holders(phase.advertisements[message.sender]) & phase.advertisements.keys()
        recipients = named(message.ciphertexts, who=who).keys()
        if recipients != holders - {message.sender}:
            raise MalformedMessage(
                f"{who}: shares for {len(recipients)} peers, expected {len(holders - {message.sender})}"
            )
        if len(message.commitment) != DIGEST_BYTES:
            raise MalformedMessage(f"{who}: a commitment of {len(message.commitment)} bytes, expected {DIGEST_BYTES}")
        committed = named(message.share_commitments, who=who)
        if committed.keys() != holders or {*map(len, committed.values())} != {COMMITMENTS_BYTES}:
            raise MalformedMessage(
                f"{who}: share commitments for {len(committed)} holders, expected {COMMITMENTS_BYTES} bytes for each "
                f"of {len(holders)}"
            )
        if isinstance(message, KeyedShares) and len(message.secret_commitment) != DIGEST_BYTES:
            raise MalformedMessage(
                f"{who}: a commitment of {len(message.secret_commitment)} bytes, expected {DIGEST_BYTES}"
            )
        phase.received[message.sender] = message

    def _collect_input(self, phase: CollectingMaskedInputs, message: MaskedInput, who: str) -> None:
        if message.chunks and len(message.chunks) != len(message.chunk_digests):
            raise MalformedMessage(f"{who}: {len(message.chunks)} chunks, expected {len(message.chunk_digests)}")
        running = phase.uploads.get(message.sender)
        if running is not None and running.digests != message.chunk_digests:
            raise DuplicateMessage(f"{who}: another MaskedInput than the one that is being received")
        if isinstance(message, SparseInput):
            self._check_inclusion(phase, message, who)
            phase.inclusions[message.sender] = message.inclusion
        # The same one once more: a site that reconnected begins again.
        upload = Upload(message.chunk_digests, parameters=self._parameters, spool=self._spool, who=who)
        self._discard(phase, message.sender)
        phase.uploads[message.sender] = upload
        for chunk in message.chunks:
            self._take_chunk(phase, message.sender, chunk, who)

    def _take_chunk(self, phase: CollectingMaskedInputs, sender: SiteId, chunk: bytes, who: str) -> None:
        upload = phase.uploads[sender]
        try:
            upload.take(chunk, who=who)
        except BaseException:
            self._discard(phase, sender)
            raise
        # Everything is checked before the first lane is added: a refused or broken upload leaves no trace in the sum.
        if upload.whole:
            try:
                upload.add_to(phase.sums, spread=self._spread)
            except BaseException:
                # Stops a sum that may have a part of this input in it.
                self._discard(phase, *phase.uploads)
                self._phase = Aborted(RoundAborted(f"{who}: the input cannot be read back from its spool file"))
                raise
            self._discard(phase, sender)
            phase.received[sender] = input_digest(upload.digests)

    @staticmethod
    def _discard(phase: CollectingMaskedInputs, *sites: SiteId) -> None:
        for site in sites:
            if (upload := phase.uploads.pop(site, None)) is not None:
                upload.close()

    def _check_inclusion(self, phase: CollectingMaskedInputs, message: SparseInput, who: str) -> None:
        stated = message.inclusion
        # Stops a statement that the site's holders would refuse: it is refused here, and its sender is known.
        if (stated.sender, stated.context) != (message.sender, message.context):
            raise AuthenticationFailed(f"{who}: an inclusion stated by {stated.sender} or in another context")
        check_signature(stated, self._parameters.roster[message.sender].signing_key)
        expected = phase.dealings[message.sender].share_commitments.keys() & phase.dealings.keys()
        if stated.neighbours != self._parameters.positions_of(expected):
            raise MalformedMessage(f"{who}: {len(stated.neighbours)} holders included, expected {len(expected)}")

    def _collect_signature(self, phase: CheckingConsistency, message: SurvivorSignature, who: str) -> None:
        key = self._parameters.roster[message.sender].signing_key
        signed = encode(phase.survivors)[0]
        verify(key, message.list_signature, labels.SURVIVORS, self._parameters.context, signed, who=who)
        phase.received[message.sender] = message.list_signature

    def _collect_acknowledgement(self, phase: CheckingConsistency, message: Acknowledgement, who: str) -> None:
        expected = self._parameters.positions_of(
            phase.dealings[message.sender].held & dict(phase.survivors.survivors).keys()
        )
        if message.survivors != expected:
            raise MalformedMessage(f"{who}: {len(message.survivors)} survivors, expected {len(expected)}")
        phase.received[message.sender] = message

    def _collect_unmask_shares(self, phase: Unmasking, message: UnmaskShares, who: str) -> None:
        held = phase.dealings[message.sender].held
        survivors = held & {site for site, _ in phase.survivors.survivors}
        for kind, found, expected in (
            ("self_seed", message.self_seed_shares, survivors),
            ("mask_key", message.mask_key_shares, held - survivors),
        ):
            what = f"{who}: {kind.replace('_', '-')} share"
            shares = named(found, who=who)
            if shares.keys() != expected:
                raise MalformedMessage(f"{what}s of {len(shares)} sites, expected {len(expected)}")
            for owner, value in shares.items():
                check_share(value, who=f"{what} of {owner}")
                # Stops a bad share from spoiling the round: it is refused here, and its sender is known.
                check_share_commitments(
                    self._parameters,
                    phase.dealings[owner].share_commitments[message.sender],
                    owner=owner,
                    holder=message.sender,
                    who=f"{what} of {owner}",
                    **{kind: value},
                )
        phase.received[message.sender] = message

    def _collect_aggregate_signature(self, phase: Decrypting, message: AggregateSignature, who: str) -> None:
        # Stops a signature for which every other site would refuse the agreement.
        if message.ciphertext_digest != phase.digest:
            raise AuthenticationFailed(f"{who}: a signature on other ciphertexts than were sent")
        phase.received[message.sender] = message

    def _collect_report(self, phase: Opening, message: AggregateReport, who: str) -> None:
        expected = KeyRelease if self._parameters.release_to == "coordinator" else AggregateReport
        if type(message) is not expected:
            raise UnexpectedMessage(f"{who}: found {type(message).__name__}, expected {expected.__name__}")
        if len(message.aggregate_digest) != DIGEST_BYTES:
            raise MalformedMessage(f"{who}: a digest of {len(message.aggregate_digest)} bytes, expected {DIGEST_BYTES}")
        if isinstance(message, KeyRelease):
            dealer = min(phase.dealings)
            # Stops a site that releases another key, with which the sum would open to something else.
            if secret_commitment(self._parameters, dealer, message.secret) != phase.dealings[dealer].secret_commitment:
                raise AuthenticationFailed(f"{who}: not the secret that {dealer} committed to")
        phase.received[message.sender] = message

    # --- ending a phase: go on with those who answered ---

    def _end_phase(self, phase: CollectingPhase) -> list[Outbound]:
        if isinstance(phase, CollectingMaskedInputs):
            self._discard(phase, *phase.uploads)
        try:
            self._phase, outbound = self._next(phase)
        except SecureAggregationError as error:
            self._phase = Aborted(copy(error))  # without the traceback, whose frames would keep reconstructed secrets
            return self._to(self._parameters.cohort, RoundFailed(context=self._parameters.context, code=error.code))
        return outbound

    def _next(self, phase: CollectingPhase) -> tuple[CoordinatorPhase, list[Outbound]]:
        received = phase.received
        # The signatures and unmask shares need the threshold only; until then a set is formed that the sum is over.
        forming = isinstance(phase, AdvertisingKeys | SharingKeys | CollectingMaskedInputs)
        needed = self._parameters.minimum_survivors if forming else self._parameters.threshold
        if len(received) < needed:
            raise ThresholdNotMet(
                f"coordinator, {type(phase).__name__}: {len(received)} of {len(self._parameters.cohort)} sites "
                f"answered, expected at least {needed}"
            )
        result: tuple[CoordinatorPhase, list[Outbound]]
        match phase:
            case AdvertisingKeys():
                result = self._keys_shown(phase)
            case SharingKeys():
                result = self._shares_delivered(phase)
            case CollectingMaskedInputs():
                result = self._survivors_shown(phase)
            case CheckingConsistency():
                result = self._shares_asked_for(phase)
            case Unmasking():
                result = self._unmasked(phase)
            case Decrypting():
                result = self._agreed(phase)
            case Opening():
                result = self._opened(phase)
        return result

    def _released(self, aggregate: Aggregate, helped: Iterable[SiteId]) -> tuple[CoordinatorFinished, list[Outbound]]:
        """Tell those who helped to the end what was released."""
        survivors = len(aggregate.survivors)
        receipt = RoundReceipt(
            context=self._parameters.context,
            survivors=survivors,
            # What a coordinator cannot read has been checked by the sites.
            canary=int(aggregate.totals[CANARY][0]) if aggregate.totals else survivors,
            aggregate_digest=aggregate.digest,
        )
        if self._parameters.neighbours is not None:
            receipt = SparseReceipt(
                **msgspec.structs.asdict(receipt),
                neighbours=self._parameters.neighbours,
                threshold=self._parameters.threshold,
            )
        return CoordinatorFinished(aggregate), self._to(sorted(helped), receipt)

    def _keys_shown(self, phase: AdvertisingKeys) -> tuple[SharingKeys, list[Outbound]]:
        """Show everyone the keys of its neighbours."""
        holders = {site: self._holders(advertisement) for site, advertisement in phase.received.items()}
        taking_part = self._recoverable(holders, phase)
        advertisements = {site: phase.received[site] for site in taking_part}
        outbound = self._left_out(phase.received.keys() - set(taking_part))
        if self._parameters.neighbours is None:
            keys = CohortKeys(context=self._parameters.context, advertisements=tuple(advertisements.values()))
            return SharingKeys(advertisements), outbound + self._to(taking_part, keys)
        neighbours = {site: {site, *holders[site]} for site in taking_part}
        for site in taking_part:
            for holder in holders[site] & advertisements.keys():
                neighbours[holder].add(site)
        for site in taking_part:
            shown = [advertisements[peer] for peer in sorted(neighbours[site] & advertisements.keys())]
            sparse = tuple(item for item in shown if isinstance(item, SparseAdvertisement))
            outbound += self._to([site], SparseKeys(context=self._parameters.context, advertisements=sparse))
        return SharingKeys(advertisements), outbound

    def _shares_delivered(self, phase: SharingKeys) -> tuple[CollectingMaskedInputs, list[Outbound]]:
        """Hand to each sharer what its dealers sealed for it."""
        committed = {site: dict(message.share_commitments) for site, message in phase.received.items()}
        sealed = {site: dict(message.ciphertexts) for site, message in phase.received.items()}
        keyed = {site: message for site, message in phase.received.items() if isinstance(message, KeyedShares)}
        secrets = {site: message.secret_commitment for site, message in keyed.items()}
        sharers = self._recoverable({site: holders.keys() for site, holders in committed.items()}, phase)
        outbound = self._left_out(phase.received.keys() - set(sharers))
        held: defaultdict[SiteId, list[SiteId]] = defaultdict(list)
        for site in sharers:
            for holder in committed[site]:
                held[holder].append(site)
        for site in sharers:
            dealers = [dealer for dealer in held[site] if dealer != site]
            delivery = ShareDelivery(
                context=self._parameters.context,
                share_commitments=tuple((dealer, committed[dealer][site]) for dealer in dealers),
                ciphertexts=tuple((dealer, sealed[dealer][site]) for dealer in dealers),
            )
            if self._parameters.backend == "homomorphic":
                delivery = KeyedDelivery(
                    **msgspec.structs.asdict(delivery),
                    secret_commitments=tuple((dealer, secrets[dealer]) for dealer in dealers),
                )
            if self._parameters.neighbours is not None:
                alive = self._parameters.positions_of(committed[site].keys() & set(sharers))
                delivery = SparseDelivery(**msgspec.structs.asdict(delivery), sharers=alive)
            outbound += self._to([site], delivery)
        dealings = {
            site: Dealing(
                mask_key=phase.advertisements[site].mask_key,
                seed_commitment=phase.received[site].commitment,
                share_commitments=committed[site],
                held=frozenset(held[site]),
                secret_commitment=secrets.get(site, b""),
            )
            for site in sharers
        }
        return CollectingMaskedInputs(dealings=dealings, sums=empty_sums(self._parameters)), outbound

    def _survivors_shown(self, phase: CollectingMaskedInputs) -> tuple[CheckingConsistency, list[Outbound]]:
        """Show the survivors the list of them, or on the sparse graph what those they hold shares of stated."""
        context = self._parameters.context
        survivors = SurvivorList(context=context, survivors=tuple(sorted(phase.received.items())))
        following = CheckingConsistency(phase.dealings, phase.sums, survivors)
        if self._parameters.neighbours is None:
            return following, self._to(sorted(phase.received), survivors)
        stated = {site: phase.inclusions[site] for site in phase.received}
        outbound = []
        for site in sorted(stated):
            inclusions = tuple(stated[dealer] for dealer in sorted(phase.dealings[site].held & stated.keys()))
            outbound += self._to([site], SparseSurvivors(context=context, inclusions=inclusions))
        return following, outbound

    def _shares_asked_for(self, phase: CheckingConsistency) -> tuple[Unmasking, list[Outbound]]:
        """Pass on what proves to a site that it may reveal its shares, and note whom that reaches."""
        context, received = self._parameters.context, sorted(phase.received)
        outbound = []
        if self._parameters.neighbours is None:
            signatures = tuple((site, item) for site, item in sorted(phase.received.items()) if isinstance(item, bytes))
            outbound = self._to(received, UnmaskRequest(context=context, list_signatures=signatures))
        else:
            acknowledged = {site: item for site, item in phase.received.items() if isinstance(item, Acknowledgement)}
            for site in received:
                holders = sorted(phase.dealings[site].share_commitments.keys() & acknowledged.keys())
                if len(holders) >= self._parameters.threshold:
                    own = tuple(acknowledged[holder] for holder in holders)
                    outbound += self._to([site], AcknowledgementList(context=context, acknowledgements=own))
        asked = frozenset(item.recipient for item in outbound)
        for site, dealing in phase.dealings.items():
            # Nothing is opened that could not be opened in full.
            if len(asked & dealing.share_commitments.keys()) < self._parameters.threshold:
                raise ThresholdNotMet(f"coordinator, CheckingConsistency: too few holders of {site} are left")
        return Unmasking(phase.dealings, phase.sums, phase.survivors, asked), outbound

    def _holders(self, advertisement: KeyAdvertisement) -> frozenset[SiteId]:
        """Who is to get shares of the site that advertised."""
        cohort = self._parameters.cohort
        if isinstance(advertisement, SparseAdvertisement):
            return frozenset(cohort[position - 1] for position in advertisement.neighbours)
        return frozenset(cohort)

    def _recoverable(self, holders: Mapping[SiteId, AbstractSet[SiteId]], phase: CollectingPhase) -> list[SiteId]:
        """Those of ``holders`` with ``threshold`` holders among themselves, in order of name.

        The others must not take part: masks that they share could never be removed.
        """
        remaining = set(holders)
        while lost := {site for site in remaining if len(remaining & holders[site]) < self._parameters.threshold}:
            remaining -= lost
        if len(remaining) < self._parameters.minimum_survivors:
            raise ThresholdNotMet(
                f"coordinator, {type(phase).__name__}: {len(remaining)} sites with enough holders, expected at least "
                f"{self._parameters.minimum_survivors}"
            )
        return sorted(remaining)

    def _left_out(self, sites: Iterable[SiteId]) -> list[Outbound]:
        return self._to(sorted(sites), RoundFailed(context=self._parameters.context, code=ThresholdNotMet.code))

    def _recover(
        self, phase: Unmasking, revealed: Mapping[SiteId, Mapping[SiteId, bytes]], owner: SiteId, what: str
    ) -> tuple[bytes, str]:
        """A secret of ``owner`` from what its first ``threshold`` holders ``revealed``, and where it comes from."""
        threshold = self._parameters.threshold
        holders = tuple(sorted(phase.dealings[owner].share_commitments.keys() & revealed.keys())[:threshold])
        if len(holders) < threshold:
            raise ThresholdNotMet(
                f"coordinator, Unmasking: {len(holders)} shares of the {what} of {owner}, expected {threshold}"
            )
        who = f"{what} of {owner}, from the shares of {', '.join(holders)}"
        positions = self._parameters.positions_of(holders)
        shares = {position: revealed[holder][owner] for position, holder in zip(positions, holders, strict=True)}
        return reconstruct(shares, self._coefficients(positions), owner=owner, who=who), who

    def _masks(self, phase: Unmasking) -> Callable[[str], list[MaskKey]]:
        """What takes off the masks that did not cancel in a lane: each survivor's self mask and each dropout's pairwise
        masks, from the shares that were revealed."""
        parameters = self._parameters
        survivors = tuple(site for site, _ in phase.survivors.survivors)
        seed_shares = {holder: dict(message.self_seed_shares) for holder, message in phase.received.items()}
        key_shares = {holder: dict(message.mask_key_shares) for holder, message in phase.received.items()}

        seeds: dict[SiteId, bytes] = {}
        for site in survivors:
            seeds[site], who = self._recover(phase, seed_shares, site, "self seed")
            # Stops a site that dealt shares of another seed from turning the sum into a wrong one.
            if seed_commitment(parameters, site, seeds[site]) != phase.dealings[site].seed_commitment:
                raise AuthenticationFailed(f"{who}: not the seed that it committed to", blamed=site)
        secrets: dict[SiteId, dict[SiteId, bytes]] = {}
        for site in sorted(phase.dealings.keys() - seeds.keys()):
            secret_key, who = self._recover(phase, key_shares, site, "mask key")
            key = KeyPair(secret_key)
            if key.public != phase.dealings[site].mask_key:
                raise AuthenticationFailed(f"{who}: not the key that it advertised", blamed=site)
            dealers = phase.dealings[site].held
            secrets[site] = {
                peer: key.agree(phase.dealings[peer].mask_key, who=f"mask key of {peer}")
                for peer in survivors
                if peer in dealers or peer in phase.dealings[site].share_commitments
            }

        def masks_of(lane: str) -> list[MaskKey]:
            masks: list[MaskKey] = []
            for site, seed in seeds.items():
                masks.append((self_mask_key(parameters, seed, lane=lane, site=site), -1))
            for dropout, agreed in secrets.items():
                for peer, secret in agreed.items():
                    key_bytes = pairwise_mask_key(parameters, secret, lane=lane, one=dropout, other=peer)
                    masks.append((key_bytes, -pairwise_sign(peer, dropout)))
            return masks

        return masks_of

    def _unmasked(self, phase: Unmasking) -> tuple[Decrypting | CoordinatorFinished, list[Outbound]]:
        """Take all masks off the sum; release it, or let the sites open it."""
        parameters, masks_of = self._parameters, self._masks(phase)
        if isinstance(phase.sums, CiphertextSum):
            unmask_sum(phase.sums, parameters.slot_layout, masks_of(SLOTS_LANE), spread=self._spread)
            message = EncryptedAggregate(context=parameters.context, chunks=phase.sums.chunks())
            asked = frozenset(phase.received)
            digest = sum_digest(message.chunks)
            following = Decrypting(phase.dealings, message.chunks, digest, phase.survivors, asked)
            return following, self._to(sorted(asked), message)
        totals = {
            name: unmasked_total(ring_lane, phase.sums[name], masks_of(name), spread=self._spread)
            for name, ring_lane in parameters.lanes.items()
        }
        survivors = tuple(site for site, _ in phase.survivors.survivors)
        aggregate = aggregate_of(
            parameters, totals, survivors=survivors, spread=self._spread, who="coordinator, Unmasking"
        )
        return self._released(aggregate, phase.received)

    def _agreed(self, phase: Decrypting) -> tuple[Opening, list[Outbound]]:
        """Show the signers that they were sent the same sum, which they may open then."""
        signatures = tuple(message for _, message in sorted(phase.received.items()))
        agreement = AggregateAgreement(context=self._parameters.context, signatures=signatures)
        following = Opening(phase.dealings, phase.chunks, phase.survivors, frozenset(phase.received))
        return following, self._to(sorted(phase.received), agreement)

    def _opened(self, phase: Opening) -> tuple[CoordinatorFinished, list[Outbound]]:
        """Release what at least ``threshold`` sites report, opened here as well if they released the key."""
        found = Counter(message.aggregate_digest for message in phase.received.values())
        digest, count = found.most_common(1)[0]
        if count < self._parameters.threshold:
            raise ThresholdNotMet(
                f"coordinator, Opening: {count} of {len(phase.received)} sites opened the same aggregate, expected at "
                f"least {self._parameters.threshold}"
            )
        agreeing = {site: message for site, message in phase.received.items() if message.aggregate_digest == digest}
        secrets = [message.secret for message in agreeing.values() if isinstance(message, KeyRelease)]
        survivors = tuple(site for site, _ in phase.survivors.survivors)
        aggregate = self._open(phase, secrets[0], survivors) if secrets else Aggregate({}, {}, survivors, digest)
        # Stops a sum other than the one that the sites opened.
        if aggregate.digest != digest:
            raise RoundAborted("coordinator, Opening: not the aggregate that the sites opened")
        finished, receipts = self._released(aggregate, agreeing)
        return finished, self._left_out(phase.received.keys() - agreeing.keys()) + receipts

    def _open(self, phase: Opening, secret: bytes, survivors: tuple[SiteId, ...]) -> Aggregate:
        """Decrypt the sum with the key that is made of ``secret``."""
        parameters = self._parameters
        reader = SumReader(round_key(parameters, secret), parameters.slot_layout)
        for chunk in phase.chunks:
            reader.take(chunk, who="coordinator, Opening")
        return aggregate_of(
            parameters,
            reader.totals(survivors=len(survivors)),
            survivors=survivors,
            digest_key=digest_key(parameters, secret),
            spread=self._spread,
            who="coordinator, Opening",
        )

    @staticmethod
    def _to(recipients: Iterable[SiteId], message: ToSite) -> list[Outbound]:
        return [Outbound(recipient, message) for recipient in recipients]


def _collectors(parameters: RoundParameters) -> "_Collectors":
    if parameters.backend == "homomorphic":
        return HOMOMORPHIC
    return COMPLETE if parameters.neighbours is None else SPARSE


_Collector = Callable[[Coordinator, Any, Any, str], None]
_Collectors = dict[tuple[type, type], _Collector]

COMPLETE: Final[_Collectors] = {
    (AdvertisingKeys, KeyAdvertisement): Coordinator._collect_advertisement,
    (SharingKeys, EncryptedShares): Coordinator._collect_shares,
    (CollectingMaskedInputs, MaskedInput): Coordinator._collect_input,
    (CheckingConsistency, SurvivorSignature): Coordinator._collect_signature,
    (Unmasking, UnmaskShares): Coordinator._collect_unmask_shares,
}
SPARSE: Final[_Collectors] = {
    (AdvertisingKeys, SparseAdvertisement): Coordinator._collect_advertisement,
    (SharingKeys, EncryptedShares): Coordinator._collect_shares,
    (CollectingMaskedInputs, SparseInput): Coordinator._collect_input,
    (CheckingConsistency, Acknowledgement): Coordinator._collect_acknowledgement,
    (Unmasking, UnmaskShares): Coordinator._collect_unmask_shares,
}
HOMOMORPHIC: Final[_Collectors] = {
    (AdvertisingKeys, KeyAdvertisement): Coordinator._collect_advertisement,
    (SharingKeys, KeyedShares): Coordinator._collect_shares,
    (CollectingMaskedInputs, MaskedInput): Coordinator._collect_input,
    (CheckingConsistency, SurvivorSignature): Coordinator._collect_signature,
    (Unmasking, UnmaskShares): Coordinator._collect_unmask_shares,
    (Decrypting, AggregateSignature): Coordinator._collect_aggregate_signature,
    (Opening, AggregateReport): Coordinator._collect_report,
    (Opening, KeyRelease): Coordinator._collect_report,
}

# Phase by name, in order -> the messages, of one kind of round each, by whose absence it shows that a site stopped
# answering.
MESSAGE_OF_PHASE: Final[dict[str, tuple[type, ...]]] = {
    phase.__name__: tuple(
        dict.fromkeys(message for table in (COMPLETE, SPARSE, HOMOMORPHIC) for at, message in table if at is phase)
    )
    for phase in dict.fromkeys(phase for phase, _ in HOMOMORPHIC)
}
