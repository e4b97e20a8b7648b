"""The site's side of one round: five messages out, seven with the homomorphic backend, and a check before each.

    Created -> AwaitingCohortKeys -> AwaitingShares -> AwaitingInput -> AwaitingSurvivors
            -> AwaitingUnmaskRequest -> AwaitingReceipt -> ParticipantFinished, or Aborted

With the homomorphic backend, AwaitingUnmaskRequest -> AwaitingAggregate -> OpeningAggregate -> AwaitingAgreement
-> AwaitingReceipt: the site opens the encrypted sum, but only once enough others have signed that they were sent the
same one.  Whoever has the key answers whatever is asked of it; so all sites answer one question together.

Whatever the coordinator sends is checked against what the site knows by itself.  One bad message ends the round for
this site: the phase becomes ``Aborted``, which holds no secret, and the error is raised.  ``COMPLETE``, ``SPARSE`` and
``HOMOMORPHIC`` at the end are the whole list of what may happen when.

A site's ``holders`` have shares of its secrets, its ``dealers`` gave it shares of theirs.  On the complete graph both
are everyone, the site itself among its holders; on the sparse graph it draws its holders, and those that drew it are
its dealers.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from hashlib import sha256
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeVar

import msgspec

from secureagg import labels
from secureagg.aggregate import aggregate_of
from secureagg.agreement import KeyPair, digest_key, open_shares, seal_shares
from secureagg.codec import check_signature, encode, sign
from secureagg.commitments import check_share_commitments, secret_commitment, seed_commitment, share_commitments
from secureagg.encoding import EncodedInput
from secureagg.errors import (
    AuthenticationFailed,
    InconsistentSurvivors,
    LocalProtocolError,
    MalformedMessage,
    ParameterError,
    RoundAborted,
    SecureAggregationError,
    ThresholdNotMet,
    UnexpectedMessage,
)
from secureagg.graph import MOST_DEALERS_PER_NEIGHBOUR, draw_neighbours
from secureagg.homomorphic import SumReader, masked_and_encrypted, round_key
from secureagg.identity import Entropy, Identity, SiteId, verify
from secureagg.keystream import Spread, parts_of
from secureagg.masking import SLOTS_LANE, masked_and_packed, masks_of_input
from secureagg.messages import (
    Acknowledgement,
    AcknowledgementList,
    AggregateAgreement,
    AggregateReport,
    AggregateSignature,
    CohortKeys,
    EncryptedAggregate,
    EncryptedShares,
    Inclusion,
    KeyAdvertisement,
    KeyedDelivery,
    KeyedShares,
    KeyRelease,
    MaskedInput,
    Positions,
    RoundFailed,
    RoundReceipt,
    ShareDelivery,
    SiteMessage,
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
from secureagg.phases import (
    Aborted,
    AwaitingAcknowledgements,
    AwaitingAggregate,
    AwaitingAgreement,
    AwaitingCohortKeys,
    AwaitingInput,
    AwaitingReceipt,
    AwaitingShares,
    AwaitingSurvivors,
    AwaitingUnmaskRequest,
    Created,
    HeldShares,
    OpeningAggregate,
    ParticipantFinished,
    ParticipantPhase,
)
from secureagg.shamir import SECRET_BYTES, SHARE_BYTES, check_share, share

_Message = TypeVar("_Message", bound=SiteMessage)
_Phase = TypeVar("_Phase", bound=ParticipantPhase)
_Step = tuple[_Phase, list[ToCoordinator]]


class Journal(Protocol):
    """What a participant must remember across a crash; each method returns only once the fact is durable."""

    def begin(self, run: str, round_number: int) -> None:
        """Note that a round begins; RoundReplayed unless its number is above every one begun in this run."""

    def answer(self, run: str, round_number: int) -> None:
        """Note that the round's unmask request is about to be answered; RoundReplayed if it was before."""


class Participant:
    """One site in one round.

    ``parameters`` are the site's own; ``journal`` outlives the process; ``minimum_survivors`` may raise the
    round's minimum for this site, never lower it; ``spread`` puts the masking on several cores, see ``keystream``.
    """

    def __init__(
        self,
        *,
        site: SiteId,
        identity: Identity,
        parameters: RoundParameters,
        journal: Journal,
        minimum_survivors: int = 0,
        entropy: Entropy = os.urandom,
        spread: Spread = map,
    ) -> None:
        """Raise ParameterError unless ``site`` is in the cohort under ``identity`` and the cohort can meet its
        minimum."""
        if site not in parameters.positions:
            raise ParameterError(f"participant {site}: not in the round's cohort")
        if parameters.roster[site].signing_key != identity.public_key:
            raise ParameterError(f"participant {site}: the roster lists another signing key for this site")
        # Stops a coordinator that forms a cohort too small for the site's own rule.
        needed = max(parameters.threshold, parameters.minimum_survivors, minimum_survivors)
        if parameters.neighbours is None and len(parameters.cohort) < needed:
            raise ThresholdNotMet(
                f"participant {site}: a cohort of {len(parameters.cohort)} sites, expected at least {needed}"
            )
        # On the sparse graph no site sees the whole cohort: more than what the graph enforces cannot be asked for.
        if parameters.neighbours is not None and parameters.minimum_survivors < minimum_survivors:
            raise ThresholdNotMet(
                f"participant {site}: a graph that enforces {parameters.minimum_survivors} survivors, expected at "
                f"least {minimum_survivors}"
            )
        self._needed = needed if parameters.neighbours is None else parameters.threshold
        self._site = site
        self._identity = identity
        self._parameters = parameters
        self._journal = journal
        self._entropy = entropy
        self._spread = spread
        self._phase: ParticipantPhase = Created()
        self._input: EncodedInput | None = None

    @property
    def phase(self) -> ParticipantPhase:
        """The current phase."""
        return self._phase

    def start(self) -> list[ToCoordinator]:
        """Begin the round: returns the key advertisement.  RoundReplayed if the journal knows this round already."""
        if not isinstance(self._phase, Created):
            raise LocalProtocolError(f"participant {self._site}: started in phase {self._name()}, expected Created")
        # Stops a round that is run twice, which would give two answers for one set of inputs.
        self._journal.begin(self._parameters.run, self._parameters.round_number)
        parameters = self._parameters
        mask_key, channel_key = KeyPair.generate(self._entropy), KeyPair.generate(self._entropy)
        advertisement = KeyAdvertisement(
            context=parameters.context,
            sender=self._site,
            mask_key=mask_key.public,
            channel_key=channel_key.public,
        )
        if parameters.neighbours is not None:
            # Drawn before the coordinator has said anything, by this site alone: a graph cannot be ground.
            drawn = draw_neighbours(
                position=parameters.positions[self._site],
                cohort_size=len(parameters.cohort),
                neighbours=parameters.neighbours,
                entropy=self._entropy,
            )
            advertisement = SparseAdvertisement(**msgspec.structs.asdict(advertisement), neighbours=drawn)
        advertisement = self._sign(advertisement)
        self._phase = AwaitingCohortKeys(mask_key, channel_key, advertisement)
        return [advertisement]

    def submit(self, encoded: EncodedInput) -> list[ToCoordinator]:
        """Hand over this round's input, at any time before it is due; returns the masked input once it can be sent.

        ``encoded``: from ``encode_input`` with the same parameters.  A second input is a LocalProtocolError: two inputs
        under the same masks would reveal their difference.
        """
        expecting = isinstance(self._phase, AwaitingCohortKeys | AwaitingShares | AwaitingInput)
        if not expecting or self._input is not None:
            raise LocalProtocolError(
                f"participant {self._site}: an input in phase {self._name()}, expected one before it is due"
            )
        self._input = encoded
        return self._advance(self._phase, [])

    def receive(self, message: ToSite) -> list[ToCoordinator]:
        """Take one message of the coordinator; returns what to send back.

        Raises RemoteProtocolError or RoundAborted when the message is refused; the phase is ``Aborted`` then.
        """
        try:
            if message.context != self._parameters.context:
                raise UnexpectedMessage(self._who(f"{type(message).__name__} of another round or other parameters"))
            handler = _table(self._parameters).get((type(self._phase), type(message)))
            if handler is None:
                raise UnexpectedMessage(self._who(f"found {type(message).__name__}, which has no place in this phase"))
            phase, replies = handler(self, self._phase, message)
        except SecureAggregationError as error:
            self._abort(error)
            raise
        replies = self._advance(phase, replies)
        for chunk in message.chunks if isinstance(message, EncryptedAggregate) else ():
            replies += self.receive_chunk(chunk)
        return replies

    def receive_chunk(self, chunk: bytes) -> list[ToCoordinator]:
        """Take the next chunk of the encrypted aggregate that began to come; returns what to send back.

        Raises as ``receive`` does.
        """
        try:
            if not isinstance(self._phase, OpeningAggregate):
                raise UnexpectedMessage(self._who("a chunk without an encrypted aggregate that it belongs to"))
            self._phase.reader.take(chunk, who=self._who("encrypted aggregate"))
            if not self._phase.reader.whole:
                return []
            phase, replies = self._sign_ciphertexts(self._phase)
        except SecureAggregationError as error:
            self._abort(error)
            raise
        return self._advance(phase, replies)

    # --- one handler per transition ---

    def _share_secrets(self, phase: AwaitingCohortKeys, message: CohortKeys | SparseKeys) -> _Step[AwaitingShares]:
        """Message 1: check everyone's keys, then share the own secrets among the holders who advertised."""
        parameters = self._parameters
        advertisements = {advertisement.sender: advertisement for advertisement in message.advertisements}
        if len(advertisements) != len(message.advertisements):
            raise MalformedMessage(self._who("an advertisement is listed twice"))
        # Stops Sybil sites outside the cohort.
        if strangers := advertisements.keys() - parameters.positions.keys():
            raise UnexpectedMessage(self._who(f"an advertisement of {min(strangers)}, who is not in the cohort"))
        holders, dealers = self._holders_and_dealers(advertisements)
        self._need(len(holders), "holders who advertised")
        for sender, advertisement in advertisements.items():
            # Stops an advertisement of another round, model or policy.
            if advertisement.context != parameters.context:
                raise AuthenticationFailed(self._who(f"the advertisement of {sender} is bound to another context"))
            # Stops substituted keys (man in the middle): only the identity in the pinned roster can have signed them.
            check_signature(advertisement, parameters.roster[sender].signing_key)
        # Stops a coordinator that replaced or dropped this site's own keys in what it shows the others.
        if advertisements.get(self._site) != phase.advertisement:
            raise AuthenticationFailed(self._who("the own advertisement is missing or changed"))
        keys = [key for item in advertisements.values() for key in (item.mask_key, item.channel_key)]
        # Stops one key in two roles or at two sites, whose masks or channels would coincide.
        if len(set(keys)) != len(keys):
            raise AuthenticationFailed(self._who("a key is advertised twice"))

        peers = sorted(advertisements.keys() - {self._site})
        # Stops keys of low order: ``agree`` refuses them.
        mask_secrets = {
            peer: phase.mask_key.agree(advertisements[peer].mask_key, who=self._who(f"mask key of {peer}"))
            for peer in peers
        }
        channel_secrets = {
            peer: phase.channel_key.agree(advertisements[peer].channel_key, who=self._who(f"channel key of {peer}"))
            for peer in peers
        }
        self_seed = self._entropy(SECRET_BYTES)
        positions = self._parameters.positions_of(holders)
        mask_key_shares, seed_shares = (
            share(secret, threshold=parameters.threshold, positions=positions, entropy=self._entropy)
            for secret in (phase.mask_key.secret_bytes(), self_seed)
        )
        homomorphic = parameters.backend == "homomorphic"
        encryption_secret = self._entropy(SECRET_BYTES) if homomorphic else b""
        ciphertexts, commitments = [], []
        held = {}
        for holder in sorted(holders):
            position = parameters.positions[holder]
            mask_key_share, seed_share = mask_key_shares[position], seed_shares[position]
            committed = share_commitments(
                parameters, owner=self._site, holder=holder, mask_key=mask_key_share, self_seed=seed_share
            )
            commitments.append((holder, committed))
            if holder == self._site:
                held[holder] = HeldShares(mask_key_share, seed_share)
            else:
                sealed = seal_shares(
                    parameters,
                    channel_secrets[holder],
                    mask_key_share + seed_share + encryption_secret,
                    sender=self._site,
                    recipient=holder,
                )
                ciphertexts.append((holder, sealed))
        reply = EncryptedShares(
            context=parameters.context,
            sender=self._site,
            commitment=seed_commitment(parameters, self._site, self_seed),
            share_commitments=tuple(commitments),
            ciphertexts=tuple(ciphertexts),
        )
        if homomorphic:
            committed = secret_commitment(parameters, self._site, encryption_secret)
            reply = KeyedShares(**msgspec.structs.asdict(reply), secret_commitment=committed)
        following = AwaitingShares(
            mask_secrets, channel_secrets, self_seed, holders, dealers, MappingProxyType(held), encryption_secret
        )
        return following, [self._sign(reply)]

    def _take_shares(
        self, phase: AwaitingShares, message: ShareDelivery | SparseDelivery | KeyedDelivery
    ) -> _Step[AwaitingInput]:
        """Open every dealer's shares; whoever sent none has dropped out and gets no pairwise mask."""
        delivered = named(message.ciphertexts, who=self._who("share delivery"))
        committed = named(message.share_commitments, who=self._who("share commitments"))
        if committed.keys() != delivered.keys():
            raise MalformedMessage(self._who(f"commitments of {len(committed)} sharers, expected {len(delivered)}"))
        alive = {self._site, *delivered}
        if isinstance(message, SparseDelivery):
            # Of a holder that did not draw this site, the coordinator's word is all there is: a holder called dead is
            # one that the input has no mask with, and to which no inclusion is stated.
            alive |= self._sites(message.sharers, among=phase.holders, what="sharers")
        if strangers := delivered.keys() - phase.dealers:
            raise UnexpectedMessage(self._who(f"shares of {min(strangers)}, of whom this site is no holder"))
        holders = phase.holders & alive
        self._need(len(holders), "holders who shared")
        held = dict(phase.held)
        secrets = {self._site: phase.encryption_secret}
        expected = 2 * SHARE_BYTES + len(phase.encryption_secret)
        for sender, sealed in delivered.items():
            shares = open_shares(
                self._parameters, phase.channel_secrets[sender], sealed, sender=sender, recipient=self._site
            )
            if len(shares) != expected:
                raise MalformedMessage(self._who(f"{len(shares)} bytes of shares from {sender}, expected {expected}"))
            held[sender] = HeldShares(shares[:SHARE_BYTES], shares[SHARE_BYTES : 2 * SHARE_BYTES])
            secrets[sender] = shares[2 * SHARE_BYTES :]
            for value in (held[sender].mask_key, held[sender].self_seed):
                check_share(value, who=self._who(f"share of {sender}"))
            # Stops a site that deals one share and commits to another, to have this site blamed for it.
            check_share_commitments(
                self._parameters,
                committed[sender],
                owner=sender,
                holder=self._site,
                mask_key=held[sender].mask_key,
                self_seed=held[sender].self_seed,
                who=self._who(f"share of {sender}"),
            )
        if isinstance(message, KeyedDelivery):
            self._check_secrets(secrets, message)
        mask_secrets = {peer: phase.mask_secrets[peer] for peer in sorted(alive - {self._site})}
        # The key is made by the first of those who shared; every one of them has all that it takes.
        secret = secrets[min(secrets)]
        return AwaitingInput(mask_secrets, phase.self_seed, holders, MappingProxyType(held), secret), []

    def _check_secrets(self, secrets: Mapping[SiteId, bytes], message: KeyedDelivery) -> None:
        committed = named(message.secret_commitments, who=self._who("secret commitments"))
        if committed.keys() != secrets.keys() - {self._site}:
            raise MalformedMessage(self._who(f"{len(committed)} secret commitments, expected {len(secrets) - 1}"))
        for sender, commitment in committed.items():
            # Stops a site that gives each other one another key: with an honest coordinator all see one commitment.
            if secret_commitment(self._parameters, sender, secrets[sender]) != commitment:
                raise AuthenticationFailed(self._who(f"not the secret that {sender} committed to"))

    def _send_masked_input(self, phase: AwaitingInput, encoded: EncodedInput) -> _Step[AwaitingSurvivors]:
        """Message 2: the input under the self mask and a pairwise mask with every other sharer."""
        chunks = tuple(_cut(self._masked_lanes(phase, encoded), MaskedInput.CHUNK_BYTES))
        digests = chunk_digests(chunks, spread=self._spread)
        message = MaskedInput(context=self._parameters.context, sender=self._site, chunk_digests=digests, chunks=chunks)
        if self._parameters.neighbours is not None:
            inclusion = Inclusion(
                context=self._parameters.context,
                sender=self._site,
                neighbours=self._parameters.positions_of(phase.holders),
            )
            message = SparseInput(**msgspec.structs.asdict(message), inclusion=self._sign(inclusion))
        following = AwaitingSurvivors(phase.holders, phase.held, input_digest(digests), phase.encryption_secret)
        return following, [self._sign(message)]

    def _masked_lanes(self, phase: AwaitingInput, encoded: EncodedInput) -> Iterator[memoryview]:
        """All lanes in their order, masked and packed, or masked and encrypted, piece by piece."""
        if self._parameters.backend == "homomorphic":
            masks = masks_of_input(
                self._parameters,
                site=self._site,
                lane=SLOTS_LANE,
                self_seed=phase.self_seed,
                secrets=phase.mask_secrets,
            )
            key, layout = round_key(self._parameters, phase.encryption_secret), self._parameters.slot_layout
            for ciphertext in masked_and_encrypted(key, layout, encoded.vectors, masks, spread=self._spread):
                yield memoryview(ciphertext)
            return
        for name, ring_lane in self._parameters.lanes.items():
            masks = masks_of_input(
                self._parameters, site=self._site, lane=name, self_seed=phase.self_seed, secrets=phase.mask_secrets
            )
            yield from masked_and_packed(ring_lane, encoded.vectors[name], masks, spread=self._spread)

    def _sign_survivors(self, phase: AwaitingSurvivors, message: SurvivorList) -> _Step[AwaitingUnmaskRequest]:
        """Message 3 on the complete graph: sign the one list of survivors that this site will help to unmask."""
        survivors = named(message.survivors, who=self._who("survivor list"))
        self._need(len(survivors), "survivors")
        if unknown := survivors.keys() - phase.held.keys():
            raise InconsistentSurvivors(self._who(f"{', '.join(sorted(unknown))} survived without having shared keys"))
        # Stops a coordinator that counts another input in this site's name.
        if survivors.get(self._site) != phase.input_digest:
            raise InconsistentSurvivors(self._who("the own input is missing from the survivors or is another one"))
        if any(len(digest) != DIGEST_BYTES for digest in survivors.values()):
            raise MalformedMessage(self._who(f"an input digest that has not {DIGEST_BYTES} bytes"))
        signature = self._identity.sign(labels.SURVIVORS, self._parameters.context, encode(message)[0])
        reply = SurvivorSignature(context=self._parameters.context, sender=self._site, list_signature=signature)
        return AwaitingUnmaskRequest(phase.held, message, phase.encryption_secret), [self._sign(reply)]

    def _reveal_shares(self, phase: AwaitingUnmaskRequest, message: UnmaskRequest) -> _Step[AwaitingReceipt]:
        """Message 4 on the complete graph, once ``threshold`` sites have signed this very list of survivors."""
        survivors = self._signed_survivors(phase, message)
        return AwaitingReceipt(len(survivors)), self._reveal(phase.held, survivors)

    def _reveal_keyed(self, phase: AwaitingUnmaskRequest, message: UnmaskRequest) -> _Step[AwaitingAggregate]:
        """Message 4 with the homomorphic backend, as on the complete graph."""
        survivors = self._signed_survivors(phase, message)
        return AwaitingAggregate(survivors, phase.encryption_secret), self._reveal(phase.held, survivors)

    def _signed_survivors(self, phase: AwaitingUnmaskRequest, message: UnmaskRequest) -> tuple[SiteId, ...]:
        """The survivors, if ``threshold`` of them have signed the list that this site has."""
        parameters = self._parameters
        survivors = tuple(site for site, _ in phase.survivors.survivors)
        signatures = named(message.list_signatures, who=self._who("unmask request"))
        signed = encode(phase.survivors)[0]
        for signer, signature in signatures.items():
            if signer not in survivors:
                raise InconsistentSurvivors(self._who(f"a survivor signature of {signer}, who is not a survivor"))
            # Stops different survivor lists to different sites, and signatures of another round: with fewer than
            # ``threshold`` signatures on this list and context nothing is revealed.
            verify(
                parameters.roster[signer].signing_key,
                signature,
                labels.SURVIVORS,
                parameters.context,
                signed,
                who=self._who(f"survivor signature of {signer}"),
            )
        # Any two lists with ``threshold`` signatures each would share an honest signer, who signs one list only.
        if len(signatures) < parameters.threshold:
            raise ThresholdNotMet(
                self._who(
                    f"{len(signatures)} signatures on the survivor list, expected at least {parameters.threshold}"
                )
            )
        return survivors

    def _acknowledge(self, phase: AwaitingSurvivors, message: SparseSurvivors) -> _Step[AwaitingAcknowledgements]:
        """Message 3 on the sparse graph: say which dealers this site takes for survivors."""
        survivors = self._senders(message.inclusions, "inclusions")
        for inclusion in message.inclusions:
            if inclusion.sender not in phase.held:
                raise InconsistentSurvivors(self._who(f"{inclusion.sender} survived without having dealt to this site"))
            # Stops a survivor whose masked input has no mask with this site: with enough of such holders, the
            # coordinator would cut the graph in two and read the sum of each part.
            self._check_statement(inclusion, inclusion.neighbours)
        reply = Acknowledgement(
            context=self._parameters.context, sender=self._site, survivors=self._parameters.positions_of(survivors)
        )
        return AwaitingAcknowledgements(phase.holders, phase.held, frozenset(survivors)), [self._sign(reply)]

    def _reveal_acknowledged(
        self, phase: AwaitingAcknowledgements, message: AcknowledgementList
    ) -> _Step[AwaitingReceipt]:
        """Message 4 on the sparse graph, once ``threshold`` of its own holders take this site for a survivor."""
        senders = self._senders(message.acknowledgements, "acknowledgements")
        for item in message.acknowledgements:
            if item.sender not in phase.holders:
                raise InconsistentSurvivors(self._who(f"an acknowledgement of {item.sender}, who is no holder"))
            self._check_statement(item, item.survivors)
        # Stops a coordinator that calls this site dropped to some and alive to others: so many honest holders will
        # reveal its self seed only that too few are left for its mask key.
        self._need(len(senders), "acknowledgements")
        return AwaitingReceipt(len(phase.survivors)), self._reveal(phase.held, sorted(phase.survivors))

    def _reveal(self, held: Mapping[SiteId, HeldShares], survivors: Sequence[SiteId]) -> list[ToCoordinator]:
        """Message 4: one kind of share of each site whose shares this one holds."""
        # Stops a second answer, also after a crash: noted before anything leaves.
        self._journal.answer(self._parameters.run, self._parameters.round_number)
        # Dropouts are derived here, not taken from a message, so no site can be named as survivor and as dropout:
        # holding both kinds of share of one site would unmask that site alone.
        dropouts = sorted(held.keys() - set(survivors))
        reply = UnmaskShares(
            context=self._parameters.context,
            sender=self._site,
            self_seed_shares=tuple((site, held[site].self_seed) for site in survivors),
            mask_key_shares=tuple((site, held[site].mask_key) for site in dropouts),
        )
        return [self._sign(reply)]

    def _open_aggregate(self, phase: AwaitingAggregate, _message: EncryptedAggregate) -> _Step[OpeningAggregate]:
        """The encrypted sum begins to come; its chunks follow."""
        reader = SumReader(round_key(self._parameters, phase.encryption_secret), self._parameters.slot_layout)
        return OpeningAggregate(phase.survivors, phase.encryption_secret, reader), []

    def _sign_ciphertexts(self, phase: OpeningAggregate) -> _Step[AwaitingAgreement]:
        """Message 5 with the homomorphic backend: sign the one encrypted sum that this site will open."""
        # Says nothing of what is in it.  A site that answered with the canary, or with a digest of the aggregate, would
        # tell whether a guess of the coordinator's, put in the canary's place, is right; and each site another guess.
        reply = AggregateSignature(
            context=self._parameters.context, sender=self._site, ciphertext_digest=phase.reader.digest
        )
        return AwaitingAgreement(phase.survivors, phase.encryption_secret, phase.reader), [self._sign(reply)]

    def _open_agreed(self, phase: AwaitingAgreement, message: AggregateAgreement) -> _Step[AwaitingReceipt]:
        """Message 6 with the homomorphic backend, once ``threshold`` sites have signed this very sum: open it and
        report it, with the key if the coordinator is to have the aggregate too."""
        parameters = self._parameters
        senders = self._senders(message.signatures, "aggregate signatures")
        for item in message.signatures:
            if item.sender not in phase.survivors:
                raise InconsistentSurvivors(
                    self._who(f"an aggregate signature of {item.sender}, who is not a survivor")
                )
            self._check_relayed(item)
            # Stops a coordinator that sends each site another sum: it would learn the answers to as many questions, or
            # leave some sites with a model that others do not have.
            if item.ciphertext_digest != phase.reader.digest:
                raise AuthenticationFailed(self._who(f"{item.sender} was sent another aggregate"))
        # Any two sums with ``threshold`` signatures each would share an honest signer, who signs one only.
        if len(senders) < parameters.threshold:
            raise ThresholdNotMet(
                self._who(f"{len(senders)} signatures on the aggregate, expected at least {parameters.threshold}")
            )
        aggregate = aggregate_of(
            parameters,
            phase.reader.totals(survivors=len(phase.survivors)),
            survivors=phase.survivors,
            digest_key=digest_key(parameters, phase.encryption_secret),
            spread=self._spread,
            who=self._who("encrypted aggregate"),
        )
        report = AggregateReport(context=parameters.context, sender=self._site, aggregate_digest=aggregate.digest)
        if parameters.release_to == "coordinator":
            report = KeyRelease(**msgspec.structs.asdict(report), secret=phase.encryption_secret)
        return AwaitingReceipt(len(phase.survivors), aggregate), [self._sign(report)]

    def _take_receipt(self, phase: AwaitingReceipt, message: RoundReceipt) -> _Step[ParticipantFinished]:
        """The last message: the coordinator released the sum over the list that was signed, and the masks cancelled in
        it."""
        if not message.survivors == message.canary == phase.survivors:
            raise InconsistentSurvivors(
                self._who(
                    f"a receipt for {message.survivors} survivors with canary {message.canary}, "
                    f"expected {phase.survivors}"
                )
            )
        # Stops a coordinator that says another aggregate than the one it was given.
        if phase.aggregate is not None and message.aggregate_digest != phase.aggregate.digest:
            raise AuthenticationFailed(self._who("a receipt for another aggregate than the one that was opened"))
        return ParticipantFinished(message, phase.aggregate), []

    def _take_sparse_receipt(self, phase: AwaitingReceipt, message: SparseReceipt) -> _Step[ParticipantFinished]:
        """Message 5 on the sparse graph, on which no site knows the number of survivors by itself."""
        parameters = self._parameters
        if message.survivors != message.canary or message.survivors < parameters.minimum_survivors:
            raise InconsistentSurvivors(
                self._who(
                    f"a receipt for {message.survivors} survivors with canary {message.canary}, expected the same, "
                    f"at least {parameters.minimum_survivors}"
                )
            )
        if (message.neighbours, message.threshold) != (parameters.neighbours, parameters.threshold):
            raise InconsistentSurvivors(
                self._who(
                    f"a receipt for {message.neighbours} neighbours and threshold {message.threshold}, expected "
                    f"{parameters.neighbours} and {parameters.threshold}"
                )
            )
        return ParticipantFinished(message), []

    def _take_failure(self, _phase: ParticipantPhase, message: RoundFailed) -> _Step[Aborted]:
        return Aborted(RoundAborted(self._who(f"the coordinator ended the round ({message.code[:64]!r})"))), []

    # --- helpers ---

    def _holders_and_dealers(
        self, advertisements: Mapping[SiteId, KeyAdvertisement]
    ) -> tuple[frozenset[SiteId], frozenset[SiteId]]:
        """Who gets shares of this site, and who may deal to it, among those who advertised."""
        parameters = self._parameters
        if parameters.neighbours is None:
            return frozenset(advertisements), frozenset(advertisements) - {self._site}
        drawn = {
            sender: item.neighbours for sender, item in advertisements.items() if isinstance(item, SparseAdvertisement)
        }
        for sender, neighbours in drawn.items():
            parameters.check_drawn(sender, neighbours, who=self._who(f"advertisement of {sender}"))
        own = parameters.positions[self._site]
        holders = frozenset(site for site in drawn if parameters.positions[site] in drawn.get(self._site, ()))
        dealers = frozenset(site for site, neighbours in drawn.items() if own in neighbours)
        if strangers := advertisements.keys() - holders - dealers - {self._site}:
            raise UnexpectedMessage(self._who(f"an advertisement of {min(strangers)}, who is no neighbour"))
        # Stops a site from being made to work for a crowd of colluders.
        most = MOST_DEALERS_PER_NEIGHBOUR * parameters.neighbours
        if len(dealers) > most:
            raise UnexpectedMessage(self._who(f"{len(dealers)} sites that drew this one, expected at most {most}"))
        return holders, dealers

    def _senders(self, statements: Sequence[SiteMessage], what: str) -> list[SiteId]:
        senders = [statement.sender for statement in statements]
        if senders != sorted(set(senders)):
            raise MalformedMessage(self._who(f"{what} repeat or are out of order"))
        return senders

    def _check_statement(self, statement: Inclusion | Acknowledgement, about: Positions) -> None:
        """Raise unless ``statement`` belongs to this round, is its sender's, and is about this site among others."""
        self._check_relayed(statement)
        if self._parameters.positions[self._site] not in about:
            raise InconsistentSurvivors(self._who(f"the statement of {statement.sender} is not about this site"))

    def _check_relayed(self, statement: SiteMessage) -> None:
        """Raise AuthenticationFailed unless ``statement`` belongs to this round and is its sender's."""
        if statement.context != self._parameters.context:
            raise AuthenticationFailed(self._who(f"a statement of {statement.sender} bound to another context"))
        check_signature(statement, self._parameters.roster[statement.sender].signing_key)

    def _sites(self, positions: Positions, *, among: frozenset[SiteId], what: str) -> set[SiteId]:
        sites = {site for site in among if self._parameters.positions[site] in positions}
        if self._parameters.positions_of(sites) != positions:
            raise MalformedMessage(self._who(f"{what}: {len(positions)} positions, only {len(sites)} of holders"))
        return sites

    def _advance(self, phase: ParticipantPhase, replies: list[ToCoordinator]) -> list[ToCoordinator]:
        if isinstance(phase, AwaitingInput) and self._input is not None:
            phase, more = self._send_masked_input(phase, self._input)
            replies = [*replies, *more]
        if not isinstance(phase, AwaitingCohortKeys | AwaitingShares | AwaitingInput):
            self._input = None
        self._phase = phase
        return replies

    def _abort(self, error: SecureAggregationError) -> None:
        # A copy has no traceback, whose frames would keep the secrets of the phase that failed.
        self._phase, self._input = Aborted(copy(error)), None

    def _need(self, found: int, what: str) -> None:
        # Stops a coordinator that shrinks the set a sum is taken over.
        if found < self._needed:
            raise ThresholdNotMet(self._who(f"{found} {what}, expected at least {self._needed}"))

    def _sign(self, message: _Message) -> _Message:
        return sign(message, self._identity)

    def _name(self) -> str:
        return type(self._phase).__name__

    def _who(self, found: str) -> str:
        return f"participant {self._site}, {self._name()}, from the coordinator: {found}"


def _cut(pieces: Iterable[memoryview], size: int) -> Iterator[bytes]:
    """What the pieces hold, in chunks of ``size`` bytes, the last one of what is left."""
    held: list[memoryview] = []
    missing = size
    for piece in pieces:
        rest = piece
        while len(rest) >= missing:
            yield b"".join([*held, rest[:missing]])
            held, rest, missing = [], rest[missing:], size
        held.append(rest)
        missing -= len(rest)
    if missing < size:
        yield b"".join(held)


def chunk_digests(chunks: Sequence[bytes], *, spread: Spread = map) -> tuple[bytes, ...]:
    """SHA-256 of each chunk of a masked input."""
    hashes = spread(lambda part: [sha256(chunk).digest() for chunk in chunks[part]], parts_of(len(chunks), 1))
    return tuple(chain.from_iterable(hashes))


def input_digest(digests: tuple[bytes, ...]) -> bytes:
    """SHA-256 over the digests of a masked input's chunks: what a survivor list names an input by."""
    return sha256(b"".join(digests)).digest()


def _table(parameters: RoundParameters) -> "_Transitions":
    if parameters.backend == "homomorphic":
        return HOMOMORPHIC
    return COMPLETE if parameters.neighbours is None else SPARSE


_Handler = Callable[[Participant, Any, Any], _Step[ParticipantPhase]]
_Transitions = dict[tuple[type, type], _Handler]

# private access: the tables are the class's own, placed behind it so that they can name its methods
COMPLETE: Final[_Transitions] = {
    (AwaitingCohortKeys, CohortKeys): Participant._share_secrets,
    (AwaitingShares, ShareDelivery): Participant._take_shares,
    (AwaitingSurvivors, SurvivorList): Participant._sign_survivors,
    (AwaitingUnmaskRequest, UnmaskRequest): Participant._reveal_shares,
    (AwaitingReceipt, RoundReceipt): Participant._take_receipt,
}
SPARSE: Final[_Transitions] = {
    (AwaitingCohortKeys, SparseKeys): Participant._share_secrets,
    (AwaitingShares, SparseDelivery): Participant._take_shares,
    (AwaitingSurvivors, SparseSurvivors): Participant._acknowledge,
    (AwaitingAcknowledgements, AcknowledgementList): Participant._reveal_acknowledged,
    (AwaitingReceipt, SparseReceipt): Participant._take_sparse_receipt,
}
HOMOMORPHIC: Final[_Transitions] = {
    (AwaitingCohortKeys, CohortKeys): Participant._share_secrets,
    (AwaitingShares, KeyedDelivery): Participant._take_shares,
    (AwaitingSurvivors, SurvivorList): Participant._sign_survivors,
    (AwaitingUnmaskRequest, UnmaskRequest): Participant._reveal_keyed,
    (AwaitingAggregate, EncryptedAggregate): Participant._open_aggregate,
    (AwaitingAgreement, AggregateAgreement): Participant._open_agreed,
    (AwaitingReceipt, RoundReceipt): Participant._take_receipt,
}
for _transitions in (COMPLETE, SPARSE, HOMOMORPHIC):
    _waiting = {phase for phase, _ in _transitions} | {AwaitingInput}
    _transitions.update({(phase, RoundFailed): Participant._take_failure for phase in _waiting})
HOMOMORPHIC[OpeningAggregate, RoundFailed] = Participant._take_failure
