"""Attack: coordinator, sites, or both together, misuse the encryption of homomorphic rounds.

Whoever has the key reads ciphertexts, so masks lie below them; and whoever has the key answers questions, so all sites
answer one question together, once enough of them have signed it.
"""

from collections.abc import Callable, Mapping
from itertools import combinations

import msgspec
import numpy as np
import pytest
from support.rounds import StoppedRound

from secureagg import (
    AuthenticationFailed,
    DuplicateMessage,
    InconsistentSurvivors,
    MalformedMessage,
    Participant,
    RoundAborted,
    SiteId,
    ThresholdNotMet,
    UnexpectedMessage,
    labels,
)
from secureagg.agreement import digest_key, encryption_key_seed, open_shares, seal_shares
from secureagg.codec import encode, sign
from secureagg.commitments import secret_commitment
from secureagg.homomorphic import (
    Bfv,
    CiphertextSum,
    SecretKey,
    SumReader,
    mask_slots,
    masked_and_encrypted,
    round_key,
    sum_digest,
)
from secureagg.lanes import CANARY
from secureagg.masking import SLOTS_LANE
from secureagg.messages import (
    AggregateAgreement,
    AggregateReport,
    AggregateSignature,
    CohortKeys,
    EncryptedAggregate,
    EncryptedShares,
    KeyedDelivery,
    KeyedShares,
    KeyRelease,
    MaskedInput,
    RoundReceipt,
    ShareDelivery,
    SurvivorList,
    ToSite,
    UnmaskRequest,
)
from secureagg.participant import chunk_digests, input_digest
from secureagg.phases import (
    Aborted,
    AwaitingAgreement,
    AwaitingSurvivors,
    CoordinatorFinished,
    OpeningAggregate,
    ParticipantFinished,
)
from secureagg.shamir import SHARE_BYTES
from secureagg.slots import COEFFICIENT_MODULUS, FRESH_BYTES, SLOTS, SUMMED_BYTES, SlotLayout, Slots
from secureagg.upload import Upload

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["homomorphic"], indirect=True),
]
replace = msgspec.structs.replace
FIRST, LIAR = SiteId("site-000"), SiteId("site-003")  # whose secret the key is made of, and who means harm


def secret_of(stopped: StoppedRound, site: SiteId) -> bytes:
    """What a colluding site has to make the key of."""
    secret: bytes = stopped.participants[site].phase.encryption_secret
    return secret


def signed_by(stopped: StoppedRound, site: SiteId, message: AggregateSignature, **changes: object) -> object:
    """``message`` as ``site`` would sign it with ``changes``."""
    return sign(replace(message, sender=site, **changes), stopped.identities[site])


def sums_of(layout: SlotLayout, slots: Slots) -> Mapping[str, np.ndarray]:
    """The digits' sums in the slots of the only ciphertext."""
    sums = layout.empty_sums()
    layout.take_sums(slots, range(1), sums)
    return sums


# --- who has the key ---

# chi-square with 255 degrees of freedom exceeds this with a chance of 5e-8.
CHI_SQUARE_LIMIT = 395.0


def chi_square(slots: Slots) -> float:
    """Of the lower five bytes of each slot, against uniform bytes."""
    counts = np.bincount(slots.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :5].ravel(), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


def opened(stopped: StoppedRound, key: SecretKey, ciphertexts: list[bytes]) -> Slots:
    """The slots of a sum of fresh ciphertexts of one site each, decrypted."""
    total = CiphertextSum(Bfv(stopped.parameters.slot_layout.slot_bits), 1)
    for ciphertext in ciphertexts:
        total.add(0, ciphertext, who="attacker")
    return key.decrypt(total.ciphertext(0), who="attacker")


def test_with_the_key_every_input_and_every_partial_sum_is_uniform() -> None:
    """A coordinator to which a site has given the key decrypts what the others sent, each alone and every sum of some:
    uniform slots, by a chi-square test (14 of them, fixed entropy, false alarms below 1e-6).

    Held by ``Participant._masked_lanes``, which masks the slots before they are encrypted.
    """
    stopped = StoppedRound()
    stopped.deliver(stopped.until(ShareDelivery))
    key = round_key(stopped.parameters, secret_of(stopped, LIAR))
    sent = [message.chunks[0] for _, message in stopped.pending]
    for size in range(1, len(sent) + 1):
        for some in combinations(sent, size):
            assert chi_square(opened(stopped, key, list(some))) < CHI_SQUARE_LIMIT


def test_without_masks_the_key_reads_every_input() -> None:
    """The same attack on the same inputs, encrypted but not masked as frameworks with one key in every kit have it,
    gives each site's update: that is what the test above can see."""
    stopped = StoppedRound()
    stopped.deliver(stopped.until(ShareDelivery))
    key, layout = round_key(stopped.parameters, secret_of(stopped, LIAR)), stopped.parameters.slot_layout
    for site in stopped.sites:
        (bare,) = masked_and_encrypted(key, layout, stopped.inputs[site].vectors, [])
        slots = opened(stopped, key, [bare])
        assert chi_square(slots) > CHI_SQUARE_LIMIT
        totals = layout.totals(sums_of(layout, slots), survivors=1)
        for name, lane in stopped.parameters.lanes.items():
            np.testing.assert_array_equal(totals[name], lane.lift(stopped.inputs[site].vectors[name]))


def test_with_the_key_the_coordinator_reads_the_aggregate_and_no_more() -> None:
    """Coordinator and one site together have the exact sum, as with the masked backend; and each single input without
    the self mask, which the unmask shares take away, is as uniform as before: its pairwise masks are on it.

    Held by one kind of share of each site in ``Participant._reveal``.
    """
    stopped = StoppedRound()
    stopped.deliver(stopped.until(ShareDelivery))
    sent = {site: message.chunks[0] for site, message in stopped.pending}
    key, layout = round_key(stopped.parameters, secret_of(stopped, LIAR)), stopped.parameters.slot_layout
    stopped.deliver(stopped.until(UnmaskRequest))
    last, answer = stopped.pending.pop()
    for site, message in stopped.pending:
        stopped.coordinator.receive(message, sender=site)
    self_masks = stopped.coordinator._masks(stopped.coordinator.phase)(SLOTS_LANE)
    everything = opened(stopped, key, list(sent.values()))
    for (site, ciphertext), mask in zip(sent.items(), self_masks, strict=True):
        slots = opened(stopped, key, [ciphertext])
        mask_slots(layout, slots, [mask], range(1))
        mask_slots(layout, everything, [mask], range(1))
        assert chi_square(slots) < CHI_SQUARE_LIMIT, site
    totals = layout.totals(sums_of(layout, everything), survivors=4)
    stopped.pending = []
    stopped.deliver({item.recipient: item.message for item in stopped.coordinator.receive(answer, sender=last)})
    stopped.finish()
    stopped.check_sum(stopped.sites)
    for name, total in stopped.aggregate.totals.items():
        np.testing.assert_array_equal(total, totals[name])


def test_the_coordinator_is_never_sent_what_the_key_is_made_of() -> None:
    """Where only sites are to have the sum, nothing that the coordinator hears or relays contains the secret, nor a key
    that is derived of it, nor the aggregate's integers."""
    stopped = StoppedRound()
    heard = []
    secrets: set[bytes] = set()
    while stopped.pending:
        heard += [message for _, message in stopped.pending]
        secrets |= {
            one.phase.encryption_secret
            for one in stopped.participants.values()
            if hasattr(one.phase, "encryption_secret")
        }
        stopped.deliver(stopped.collect())
    assert isinstance(stopped.coordinator.phase, CoordinatorFinished)
    assert not stopped.coordinator.phase.aggregate.totals
    raw = b"".join(frame for message in heard for frame in encode(message))
    keys = [encryption_key_seed(stopped.parameters, secret) for secret in secrets if secret]
    keys += [digest_key(stopped.parameters, secret) for secret in secrets if secret]
    assert len(keys) == 2 * 4  # each site's own, of which one became the round's
    for needle in [*filter(None, secrets), *keys, stopped.aggregate.totals["update"].tobytes()]:
        assert needle not in raw
    assert not any(isinstance(message, KeyRelease) for message in heard)


# --- whose secret the key is made of ---


def at_the_shares() -> tuple[StoppedRound, KeyedShares]:
    """A round whose shares are pending; the first sharer's, taken out."""
    stopped = StoppedRound()
    stopped.deliver(stopped.until(CohortKeys))
    site, message = stopped.pending.pop(0)
    assert site == FIRST
    assert isinstance(message, KeyedShares)
    return stopped, message


def with_another_secret(stopped: StoppedRound, message: KeyedShares, victim: SiteId) -> KeyedShares:
    """The first sharer's message, in which another secret is sealed for the victim."""
    phase = stopped.participants[FIRST].phase
    sealed = dict(message.ciphertexts)
    honest = stopped.participants[victim].phase.channel_secrets[FIRST]
    assert honest == phase.channel_secrets[victim]
    plain = open_shares(stopped.parameters, honest, sealed[victim], sender=FIRST, recipient=victim)
    plain = plain[: 2 * SHARE_BYTES] + b"\1" * 32
    sealed[victim] = seal_shares(stopped.parameters, honest, plain, sender=FIRST, recipient=victim)
    return sign(replace(message, ciphertexts=tuple(sorted(sealed.items()))), stopped.identities[FIRST])


def test_a_dealer_that_gives_one_site_another_secret() -> None:
    """The site that got it says so and whose fault it is, and the others finish without it.

    Stopped by ``Participant._check_secrets``.
    """
    stopped, message = at_the_shares()
    stopped.pending.append((FIRST, with_another_secret(stopped, message, LIAR)))
    deliveries = stopped.until(KeyedDelivery)
    with pytest.raises(AuthenticationFailed, match=f"not the secret that {FIRST} committed to"):
        stopped.answers(LIAR, deliveries.pop(LIAR))
    assert isinstance(stopped.participants[LIAR].phase, Aborted)
    stopped.deliver(deliveries)
    stopped.finish()
    stopped.check_sum(stopped.sites[:3])


def test_a_dealer_and_the_coordinator_give_one_site_another_secret() -> None:
    """With the commitment exchanged to fit, the site has another key than the others.  The sum is then none for anybody
    and nobody says anything about it; it shows the two, who know both keys, nothing that the masks would hide.

    Stopped by the canary in ``aggregate_of``.
    """
    stopped, message = at_the_shares()
    stopped.pending.append((FIRST, with_another_secret(stopped, message, LIAR)))
    deliveries = stopped.until(KeyedDelivery)
    other = secret_commitment(stopped.parameters, FIRST, b"\1" * 32)
    (name, _), *others = deliveries[LIAR].secret_commitments
    assert name == FIRST
    deliveries[LIAR] = replace(deliveries[LIAR], secret_commitments=((FIRST, other), *others))
    stopped.deliver(deliveries)
    assert len({secret_of(stopped, site) for site in stopped.sites}) == 2
    check_that_nobody_opens(stopped)


def check_that_nobody_opens(stopped: StoppedRound) -> None:
    """The rest of the round: the sites agree on the encrypted sum, and then none of them has anything to report."""
    for site, agreement in stopped.until(AggregateAgreement).items():
        with pytest.raises(RoundAborted, match=f"{site}, AwaitingAgreement, .* the canary lane"):
            stopped.answers(site, agreement)
        assert isinstance(stopped.participants[site].phase, Aborted)
    assert stopped.pending == []
    stopped.collect()
    assert isinstance(stopped.coordinator.phase, Aborted)


@pytest.mark.parametrize("change", ["missing", "one too many", "turned", "swapped"])
def test_a_delivery_with_other_commitments_to_secrets(change: str) -> None:
    """A site takes commitments of exactly those whose shares it gets, and each must fit.

    Stopped by ``Participant._check_secrets``.
    """
    stopped = StoppedRound()
    message = stopped.until(KeyedDelivery)[FIRST]
    (b, of_b), (c, of_c), last = message.secret_commitments
    error, commitments = {
        "missing": (MalformedMessage, (last,)),
        "one too many": (MalformedMessage, (*message.secret_commitments, (SiteId("zzz"), bytes(32)))),
        "turned": (MalformedMessage, (last, (c, of_c), (b, of_b))),
        "swapped": (AuthenticationFailed, ((b, of_c), (c, of_b), last)),
    }[change]
    with pytest.raises(error):
        stopped.answers(FIRST, replace(message, secret_commitments=commitments))
    assert isinstance(stopped.participants[FIRST].phase, Aborted)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_commitment_to_a_secret_that_can_hold_nobody(length: int) -> None:
    """A commitment of another size is refused, naming the sender.  Stopped in ``Coordinator._collect_shares``."""
    stopped, message = at_the_shares()
    bad = sign(replace(message, secret_commitment=bytes(length)), stopped.identities[FIRST])
    with pytest.raises(MalformedMessage, match=f"participant {FIRST}, SharingKeys: a commitment of {length} bytes"):
        stopped.coordinator.receive(bad, sender=FIRST)


def test_shares_without_a_secret() -> None:
    """What is sealed has a secret behind the shares, or it is refused, naming who sealed it.

    Stopped by the size in ``Participant._take_shares``.
    """
    stopped = StoppedRound()
    deliveries = stopped.until(KeyedDelivery)
    other = SiteId("site-001")
    channel = stopped.participants[FIRST].phase.channel_secrets[other]
    sealed = seal_shares(stopped.parameters, channel, bytes(2 * SHARE_BYTES), sender=other, recipient=FIRST)
    _, *others = deliveries[FIRST].ciphertexts
    with pytest.raises(MalformedMessage, match=f"66 bytes of shares from {other}, expected 98"):
        stopped.answers(FIRST, replace(deliveries[FIRST], ciphertexts=((other, sealed), *others)))


def test_the_first_sharer_is_kept_from_some() -> None:
    """The coordinator tells one site that the first sharer dropped out, so that it makes its key of another's secret.
    It signs no list with the first sharer, and without that site the others finish.

    Stopped by the check of sharers in ``Participant._sign_survivors``.
    """
    stopped = StoppedRound()
    deliveries = stopped.until(KeyedDelivery)
    message = deliveries[LIAR]
    deliveries[LIAR] = replace(
        message,
        ciphertexts=message.ciphertexts[1:],
        share_commitments=message.share_commitments[1:],
        secret_commitments=message.secret_commitments[1:],
    )
    stopped.deliver(deliveries)
    assert secret_of(stopped, LIAR) != secret_of(stopped, FIRST)
    with pytest.raises(InconsistentSurvivors, match=f"{FIRST} survived without having shared"):
        stopped.answers(LIAR, stopped.until(SurvivorList)[LIAR])


# --- sites that are told something else ---


@pytest.mark.parametrize("change", [{"release_to": "coordinator"}, {"backend": "masked"}])
def test_a_site_with_another_backend_or_release(change: dict[str, object]) -> None:
    """A site whose manifest gives the sum to others than the coordinator's says takes no part.

    Stopped by the context, which both are part of.
    """
    stopped = StoppedRound(change_for={FIRST: change})
    site, advertisement = stopped.pending.pop(0)
    with pytest.raises(UnexpectedMessage, match="another round, model or parameters"):
        stopped.coordinator.receive(advertisement, sender=site)
    with pytest.raises(UnexpectedMessage, match="of another round or other parameters"):
        stopped.answers(FIRST, stopped.until(CohortKeys)[SiteId("site-001")])


def test_shares_of_the_other_backend() -> None:
    """A message of the masked backend has no place, whoever sends it.  Stopped by the tables of transitions."""
    stopped, message = at_the_shares()
    fields = {name: getattr(message, name) for name in message.__struct_fields__ if name != "secret_commitment"}
    plain = sign(EncryptedShares(**fields), stopped.identities[FIRST])
    with pytest.raises(UnexpectedMessage, match="EncryptedShares, which has no place"):
        stopped.coordinator.receive(plain, sender=FIRST)
    stopped.pending.append((FIRST, message))
    delivery = stopped.until(ShareDelivery)[FIRST]
    fields = {name: getattr(delivery, name) for name in delivery.__struct_fields__ if name != "secret_commitments"}
    with pytest.raises(UnexpectedMessage, match="ShareDelivery, which has no place"):
        stopped.answers(FIRST, ShareDelivery(**fields))


# --- inputs that are no ciphertexts of this round ---


def spoiled(stopped: StoppedRound, chunk: bytes) -> None:
    """The liar's input becomes ``chunk``, and it goes on as if that had been its own."""
    number = next(number for number, (site, _) in enumerate(stopped.pending) if site == LIAR)
    _, message = stopped.pending.pop(number)
    digests = chunk_digests((chunk,))
    bad = sign(replace(message, chunks=(chunk,), chunk_digests=digests), stopped.identities[LIAR])
    phase = stopped.participants[LIAR].phase
    assert isinstance(phase, AwaitingSurvivors)
    stopped.participants[LIAR]._phase = AwaitingSurvivors(
        phase.holders, phase.held, input_digest(digests), phase.encryption_secret
    )
    stopped.pending.append((LIAR, bad))


def test_a_ciphertext_of_another_round() -> None:
    """An input encrypted under another round's key spoils the sum; no site opens it, and nothing is released.

    Stopped by the canary in ``aggregate_of``.
    """
    earlier = StoppedRound(run="earlier")
    earlier.deliver(earlier.until(ShareDelivery))
    old = dict(earlier.pending)[LIAR].chunks[0]
    stopped = StoppedRound()
    stopped.deliver(stopped.until(ShareDelivery))
    spoiled(stopped, old)
    check_that_nobody_opens(stopped)


def hostile(ciphertext: bytes) -> dict[str, bytes]:
    """Bytes that are no fresh ciphertext, and as many as one."""
    over = COEFFICIENT_MODULUS.to_bytes(8, "little")
    return {
        "first coefficient": over + ciphertext[8:],
        "last coefficient": ciphertext[: 8 * (SLOTS - 1)] + over + ciphertext[8 * SLOTS :],
        "all ones": b"\xff" * FRESH_BYTES,
        "SEAL's own format": b"\x5e\xa1\x10\x04\x03".ljust(FRESH_BYTES, b"\xff"),
    }


@pytest.mark.parametrize("what", hostile(bytes(FRESH_BYTES)))
def test_foreign_bytes_as_an_input(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed bytes of the right size that are no ciphertext are refused before SEAL sees them, naming the site, and the
    round ends with the others' sum.

    Stopped by ``check_fresh`` in ``Upload._check``.
    """
    stopped = StoppedRound()
    stopped.deliver(stopped.until(ShareDelivery))
    spoiled(stopped, hostile(stopped.pending[0][1].chunks[0])[what])
    _, bad = stopped.pending.pop()
    with monkeypatch.context() as patched:
        patched.setattr(Bfv, "_read", lambda *_: pytest.fail("SEAL was asked"))
        with pytest.raises(MalformedMessage, match=f"participant {LIAR}, .*, ciphertext 1: a ciphertext with a coef"):
            stopped.coordinator.receive(bad, sender=LIAR)
    stopped.finish()
    stopped.check_sum(stopped.sites[:3])


def test_random_ciphertexts_are_inputs_like_any_other() -> None:
    """Any coefficients below q are a ciphertext: what a liar makes up spoils the sum, ends no process and opens to
    nobody."""
    for seed in range(3):
        stopped = StoppedRound()
        stopped.deliver(stopped.until(ShareDelivery))
        made_up = np.random.default_rng(seed).integers(0, COEFFICIENT_MODULUS, SLOTS, dtype=np.uint64)
        spoiled(stopped, made_up.tobytes() + bytes([seed]) * 64)
        check_that_nobody_opens(stopped)


# --- the encrypted sum on its way to the sites ---


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> tuple[StoppedRound, dict[SiteId, ToSite]]:
    """A round of which the encrypted sum, in four chunks of one ciphertext each, is due; and that, for each site."""
    monkeypatch.setattr(SumReader, "CHUNK_CIPHERTEXTS", 1)
    stopped = StoppedRound(length=30_000)
    messages = stopped.until(EncryptedAggregate)
    assert [len(chunk) for chunk in messages[FIRST].chunks] == [SUMMED_BYTES] * len(messages[FIRST].chunks)
    assert len(messages[FIRST].chunks) == 4
    return stopped, messages


Pieces = tuple[StoppedRound, dict[SiteId, ToSite]]


def header_of(message: ToSite) -> EncryptedAggregate:
    """The encrypted sum without its chunks, as it travels."""
    assert isinstance(message, EncryptedAggregate)
    return replace(message, chunks=())


@pytest.mark.parametrize("begun", range(5))
def test_chunks_one_by_one(in_pieces: Pieces, begun: int) -> None:
    """However many chunks come with the message and however many behind it, the site answers once, after the last, with
    the digest of all; and the round ends with the exact sum."""
    stopped, messages = in_pieces
    chunks = messages[FIRST].chunks
    site = stopped.participants[FIRST]
    answers = site.receive(replace(messages.pop(FIRST), chunks=chunks[:begun]))
    for chunk in chunks[begun:]:
        assert answers == []
        assert isinstance(site.phase, OpeningAggregate)
        answers = site.receive_chunk(chunk)
    (answer,) = answers
    assert isinstance(answer, AggregateSignature)
    assert answer.ciphertext_digest == sum_digest(chunks)
    stopped.pending.append((FIRST, answer))
    stopped.deliver(messages)
    stopped.finish()
    stopped.check_sum(stopped.sites)


@pytest.mark.parametrize("change", ["short", "long", "two at once", "empty", "coefficient", "all ones"])
@pytest.mark.parametrize("place", [0, 3])
def test_a_chunk_that_is_none(in_pieces: Pieces, place: int, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of another size or with a coefficient of q ends the round for the site before SEAL sees it; nothing is
    signed.

    Stopped by ``SumReader.take`` and ``_check``.
    """
    stopped, messages = in_pieces
    good = messages[FIRST].chunks
    site = stopped.participants[FIRST]
    site.receive(replace(messages[FIRST], chunks=good[:place]))
    bad = {
        "short": good[place][:-1],
        "long": good[place] + b"\0",
        "two at once": good[place] * 2,
        "empty": b"",
        "coefficient": good[place][:-8] + COEFFICIENT_MODULUS.to_bytes(8, "little"),
        "all ones": b"\xff" * SUMMED_BYTES,
    }[change]
    monkeypatch.setattr(Bfv, "_read", lambda *_: pytest.fail("SEAL was asked"))
    with pytest.raises(MalformedMessage, match=f"participant {FIRST}, OpeningAggregate, .*encrypted aggregate"):
        site.receive_chunk(bad)
    assert isinstance(site.phase, Aborted)


@pytest.mark.parametrize("at", [SurvivorList, EncryptedAggregate, AggregateAgreement, RoundReceipt])
def test_a_chunk_without_its_message(in_pieces: Pieces, at: type[ToSite]) -> None:
    """A chunk before the encrypted sum is announced, behind the last one, or later ends the round for the site.

    Stopped by the phase in ``Participant.receive_chunk``.
    """
    chunk = in_pieces[1][FIRST].chunks[0]
    stopped = StoppedRound(length=30_000)
    stopped.until(at)
    with pytest.raises(UnexpectedMessage, match="a chunk without an encrypted aggregate"):
        stopped.participants[FIRST].receive_chunk(chunk)
    assert isinstance(stopped.participants[FIRST].phase, Aborted)


def test_a_chunk_too_many(in_pieces: Pieces) -> None:
    """An encrypted sum with a chunk more than the round has is refused as a whole: no answer leaves.

    Stopped by the phase in ``Participant.receive_chunk``.
    """
    stopped, messages = in_pieces
    with pytest.raises(UnexpectedMessage, match="a chunk without an encrypted aggregate"):
        stopped.answers(FIRST, replace(messages[FIRST], chunks=messages[FIRST].chunks * 2))
    assert isinstance(stopped.participants[FIRST].phase, Aborted)


def test_a_second_encrypted_sum(in_pieces: Pieces) -> None:
    """A site opens one sum in a round: a second one, while the first comes in or after it, ends the round for it.

    Stopped by the transition table.
    """
    stopped, messages = in_pieces
    first, second = stopped.sites[:2]
    stopped.participants[first].receive(header_of(messages[first]))
    stopped.answers(second, messages[second])
    for site in (first, second):
        with pytest.raises(UnexpectedMessage, match="EncryptedAggregate, which has no place"):
            stopped.answers(site, messages[site])
        assert isinstance(stopped.participants[site].phase, Aborted)


@pytest.mark.parametrize("change", ["turned", "twice", "last missing"])
def test_chunks_out_of_order(in_pieces: Pieces, change: str) -> None:
    """One site gets the chunks in another order, or one twice and another not at all: what it signs is not what the
    others have, and it opens nothing; without its last chunk it signs nothing.

    Stopped by the digest in ``Participant._open_agreed``.
    """
    stopped, messages = in_pieces
    chunks = messages[FIRST].chunks
    changed = {
        "turned": chunks[::-1],
        "twice": (chunks[0], chunks[0], *chunks[2:]),
        "last missing": chunks[:-1],
    }[change]
    answers = stopped.answers(FIRST, replace(messages.pop(FIRST), chunks=changed))
    if change == "last missing":
        assert answers == []
        assert isinstance(stopped.participants[FIRST].phase, OpeningAggregate)
        return
    stopped.deliver(messages)
    agreement = stopped.until(AggregateAgreement)[LIAR]
    with pytest.raises(AuthenticationFailed, match="was sent another aggregate"):
        stopped.answers(FIRST, agreement)


# --- the sites as an oracle ---


def rotated(ciphertext: bytes, by: int) -> bytes:
    """The ciphertext whose slot number i is slot ``by`` + i of this one; no key is needed for that."""
    halves = np.frombuffer(ciphertext, "<u8").reshape(2, SLOTS).astype(object)
    turned = np.concatenate([halves[:, by:], (-halves[:, :by]) % COEFFICIENT_MODULUS], axis=1)
    return turned.astype("<u8").tobytes()


def with_added(stopped: StoppedRound, ciphertext: bytes, slots: Mapping[int, int]) -> bytes:
    """The ciphertext with integers added to some of its slots; no key is needed for that either."""
    coefficients = np.frombuffer(ciphertext, "<u8").astype(object)
    for place, number in slots.items():
        scaled = COEFFICIENT_MODULUS * number // (1 << stopped.parameters.slot_layout.slot_bits)
        coefficients[place] = (coefficients[place] + scaled) % COEFFICIENT_MODULUS
    return coefficients.astype("<u8").tobytes()


def guesses(stopped: StoppedRound, aggregate: EncryptedAggregate, right: Slots) -> dict[str, bytes]:
    """Sums in which a slot of the histogram stands in the canary's place, less a guess of what it holds: the canary
    holds if the guess is right."""
    layout = stopped.parameters.slot_layout
    (canary, lane), (histogram, _) = layout.lanes[CANARY], layout.lanes["histogram"]
    assert (canary, lane.slots) == (0, 2)
    moved = rotated(aggregate.chunks[0], histogram)
    values = right[histogram : histogram + 2].tolist()
    survivors = len(stopped.sites)
    return {
        "right": with_added(stopped, moved, {0: survivors - values[0], 1: -values[1]}),
        "wrong": with_added(stopped, moved, {0: survivors - values[0] - 1, 1: -values[1]}),
    }


def test_no_site_tells_whether_a_guess_is_right() -> None:
    """The coordinator moves a slot of the histogram to the canary's place, takes a guess away from it, and sends every
    site another guess.  Each site signs what it was sent, whatever is in it, and opens nothing: it would take
    ``threshold`` signatures on the same guess.

    Stopped by ``Participant._sign_ciphertexts``, which looks at no slot, and by the digest in
    ``Participant._open_agreed``.  The first part is the control: whoever looked would know.
    """
    stopped = StoppedRound()
    secret = secret_of_all(stopped)
    messages = stopped.until(EncryptedAggregate)
    key, layout = round_key(stopped.parameters, secret), stopped.parameters.slot_layout
    made = guesses(stopped, messages[FIRST], key.decrypt(messages[FIRST].chunks[0], who="control"))
    canaries = {
        name: int(layout.totals(sums_of(layout, key.decrypt(chunk, who="control")), survivors=4)[CANARY][0])
        for name, chunk in made.items()
    }
    assert canaries["right"] == 4
    assert canaries["wrong"] == 3

    answers = {}
    for site, name in zip(stopped.sites, ["right", "wrong", "right", "wrong"], strict=True):
        (answers[site],) = stopped.answers(site, replace(messages[site], chunks=(made[name],)))
        unsigned = AggregateSignature(
            context=stopped.parameters.context, sender=site, ciphertext_digest=sum_digest((made[name],))
        )
        assert answers[site] == sign(unsigned, stopped.identities[site])
        assert isinstance(stopped.participants[site].phase, AwaitingAgreement)
    for site in stopped.sites:
        own = [answer for answer in answers.values() if answer.ciphertext_digest == answers[site].ciphertext_digest]
        assert len(own) == 2 < stopped.parameters.threshold
        agreement = AggregateAgreement(context=stopped.parameters.context, signatures=tuple(own))
        with pytest.raises(ThresholdNotMet, match="2 signatures on the aggregate, expected at least 3"):
            stopped.answers(site, agreement)
        assert isinstance(stopped.participants[site].phase, Aborted)


def secret_of_all(stopped: StoppedRound) -> bytes:
    """What the round's key is made of; the round is at its inputs then."""
    stopped.deliver(stopped.until(ShareDelivery))
    (secret,) = {secret_of(stopped, site) for site in stopped.sites}
    return secret


def test_a_guess_that_all_are_asked_costs_the_round() -> None:
    """Asked all together, the sites answer one question: a wrong guess ends the round for every one of them, without a
    report and without the key.

    Stopped by the canary in ``aggregate_of``.
    """
    stopped = StoppedRound(release_to="coordinator")
    secret = secret_of_all(stopped)
    messages = stopped.until(EncryptedAggregate)
    slots = round_key(stopped.parameters, secret).decrypt(messages[FIRST].chunks[0], who="control")
    wrong = guesses(stopped, messages[FIRST], slots)["wrong"]
    check_that_all_refuse(stopped, {site: replace(message, chunks=(wrong,)) for site, message in messages.items()})


def check_that_all_refuse(stopped: StoppedRound, messages: Mapping[SiteId, ToSite]) -> None:
    """All sites sign the encrypted sum in ``messages``, and with all signatures none of them opens it."""
    signatures = tuple(answer for site, message in messages.items() for answer in stopped.answers(site, message))
    agreement = AggregateAgreement(context=stopped.parameters.context, signatures=signatures)
    for site in stopped.sites:
        with pytest.raises(RoundAborted, match="the canary lane does not equal the 4 survivors"):
            stopped.answers(site, agreement)
        assert isinstance(stopped.participants[site].phase, Aborted)


def test_another_sum_to_one_site() -> None:
    """One site is sent the sum with something added, so that it alone would go on with another model: it refuses the
    others' signatures, and they refuse its.

    Stopped by the digest in ``Participant._open_agreed``.
    """
    stopped = StoppedRound()
    messages = stopped.until(EncryptedAggregate)
    place, _ = stopped.parameters.slot_layout.lanes["update"]
    other = with_added(stopped, messages[LIAR].chunks[0], {place: 5})
    messages[LIAR] = replace(messages[LIAR], chunks=(other,))
    answers = {site: stopped.answers(site, message)[0] for site, message in messages.items()}
    with pytest.raises(AuthenticationFailed, match=f"participant {LIAR}, .* a signature on other ciphertexts"):
        stopped.coordinator.receive(answers[LIAR], sender=LIAR)
    everyone = AggregateAgreement(context=stopped.parameters.context, signatures=tuple(answers.values()))
    for site, refused in ((LIAR, FIRST), (FIRST, LIAR)):
        with pytest.raises(AuthenticationFailed, match=f"{refused} was sent another aggregate"):
            stopped.answers(site, everyone)


def test_a_partial_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that leaves one survivor's ciphertexts out of the sum, to compare it with the whole one, has masks
    left in it: nobody opens it.

    Stopped by the canary in ``aggregate_of``, below which are the pairwise masks.
    """
    add_to = Upload.add_to
    added = []

    def all_but_one(upload: Upload, *args: object, **options: object) -> None:
        added.append(upload)
        if len(added) != 2:
            add_to(upload, *args, **options)

    monkeypatch.setattr(Upload, "add_to", all_but_one)
    check_that_nobody_opens(StoppedRound())


@pytest.mark.parametrize("envelope", ["old", "new"])
def test_an_aggregate_of_an_earlier_round(envelope: str) -> None:
    """The same sites are sent the sum of an earlier round: as it was it has no place, under this round's context nobody
    opens it.

    Stopped by the context in ``Participant.receive`` and by the canary in ``aggregate_of``: the key is another one.
    """
    earlier = StoppedRound(run="earlier")
    old = earlier.until(EncryptedAggregate)
    stopped = StoppedRound()
    stopped.until(EncryptedAggregate)
    if envelope == "old":
        with pytest.raises(UnexpectedMessage, match="of another round"):
            stopped.answers(FIRST, old[FIRST])
    else:
        context = stopped.parameters.context
        check_that_all_refuse(stopped, {site: replace(message, context=context) for site, message in old.items()})


# --- the agreement ---


def agreed() -> tuple[StoppedRound, AggregateAgreement]:
    """A round whose agreement is due, and that."""
    stopped = StoppedRound()
    message = stopped.until(AggregateAgreement)[FIRST]
    assert isinstance(message, AggregateAgreement)
    return stopped, message


def test_a_withheld_agreement() -> None:
    """Without the agreement a site says nothing of the sum, and takes no receipt for one.

    Stopped by the transition table.
    """
    stopped, _ = agreed()
    site = stopped.participants[FIRST]
    assert isinstance(site.phase, AwaitingAgreement)
    receipt = RoundReceipt(context=stopped.parameters.context, survivors=4, canary=4, aggregate_digest=bytes(32))
    with pytest.raises(UnexpectedMessage, match="RoundReceipt, which has no place"):
        stopped.answers(FIRST, receipt)


def unsigned(_: StoppedRound, message: AggregateSignature) -> object:
    """Another site's signature under its name."""
    return replace(message, sender=LIAR)


def of_another_round(stopped: StoppedRound, message: AggregateSignature) -> object:
    """Rightly signed, for another round."""
    return signed_by(stopped, LIAR, message, context=bytes(32))


def on_another_sum(stopped: StoppedRound, message: AggregateSignature) -> object:
    """Rightly signed, on another sum."""
    return signed_by(stopped, LIAR, message, ciphertext_digest=bytes(32))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (unsigned, "AggregateSignature: the signature does not verify"),
        (of_another_round, f"a statement of {LIAR} bound to another context"),
        (on_another_sum, f"{LIAR} was sent another aggregate"),
    ],
)
def test_signatures_that_do_not_count(
    change: Callable[[StoppedRound, AggregateSignature], AggregateSignature], text: str
) -> None:
    """Beside enough true signatures, too, one that is not its sender's, for this round and on this sum ends the round
    for the site.

    Stopped by ``_check_relayed`` and the digest in ``Participant._open_agreed``.
    """
    stopped, message = agreed()
    *others, _ = message.signatures
    with pytest.raises(AuthenticationFailed, match=text):
        stopped.answers(FIRST, replace(message, signatures=(*others, change(stopped, others[0]))))
    assert isinstance(stopped.participants[FIRST].phase, Aborted)


def test_too_few_or_repeated_signatures() -> None:
    """One too few open nothing; one counted twice, or out of order, is no message.

    Stopped by the count and by ``Participant._senders`` in ``Participant._open_agreed``.
    """
    for error, pick in (
        (ThresholdNotMet, [0, 1]),
        (ThresholdNotMet, []),
        (MalformedMessage, [0, 0, 1]),
        (MalformedMessage, [1, 0, 2]),
    ):
        stopped, message = agreed()
        with pytest.raises(error):
            stopped.answers(FIRST, replace(message, signatures=tuple(message.signatures[index] for index in pick)))
        assert isinstance(stopped.participants[FIRST].phase, Aborted)


def test_a_signer_who_is_no_survivor() -> None:
    """The signature of a dropout does not count.  Stopped by the check of signers in ``Participant._open_agreed``."""
    stopped = StoppedRound(silent={LIAR: MaskedInput})
    message = stopped.until(AggregateAgreement)[FIRST]
    extra = signed_by(stopped, LIAR, message.signatures[0])
    with pytest.raises(InconsistentSurvivors, match=f"{LIAR}, who is not a survivor"):
        stopped.answers(FIRST, replace(message, signatures=(*message.signatures, extra)))


def test_an_agreement_twice() -> None:
    """A second agreement is refused: one report leaves a site.  Stopped by the transition table."""
    stopped, message = agreed()
    (report,) = stopped.answers(FIRST, message)
    assert type(report) is AggregateReport
    with pytest.raises(UnexpectedMessage):
        stopped.answers(FIRST, message)


# --- reports, keys and receipts ---


def test_a_report_confirms_no_guess() -> None:
    """Who knows every total of the aggregate, but not the key, cannot tell it from a report or a receipt: the digest of
    the same totals in a round with other secrets is another one, and it is not the digest without a key.

    Held by ``digest_key`` in ``Participant._open_agreed``.
    """
    digests = []
    first = StoppedRound()
    for seed in (1, 2):
        stopped = StoppedRound(seed=seed, identities=first.identities, roster=first.roster)
        assert stopped.parameters.context == first.parameters.context
        for site in stopped.sites:
            stopped.participants[site]._input = first.inputs[site]
        receipt = stopped.until(RoundReceipt)[FIRST]
        assert isinstance(receipt, RoundReceipt)
        totals = stopped.aggregate.totals
        parts = [part for name, total in totals.items() for part in (name.encode(), total.astype("<i8").tobytes())]
        for label in (labels.AGGREGATE, labels.OPENED_AGGREGATE):
            assert receipt.aggregate_digest != labels.digest(label, stopped.parameters.context, *parts)
            assert receipt.aggregate_digest != labels.digest(label, stopped.parameters.context, b"", *parts)
        digests.append(receipt.aggregate_digest)
    assert digests[0] != digests[1]


def opening(release_to: str) -> StoppedRound:
    """A round whose reports are pending."""
    stopped = StoppedRound(release_to=release_to)
    stopped.deliver(stopped.until(AggregateAgreement))
    return stopped


def test_a_key_of_another_round() -> None:
    """A site that releases something else than the round's key is refused and named; the others' key opens the sum.

    Stopped by ``secret_commitment`` in ``Coordinator._collect_report``.
    """
    stopped = opening("coordinator")
    _, message = stopped.pending.pop()
    assert isinstance(message, KeyRelease)
    bad = sign(replace(message, secret=b"\1" * 32), stopped.identities[LIAR])
    with pytest.raises(AuthenticationFailed, match=f"participant {LIAR}, Opening: not the secret that {FIRST}"):
        stopped.coordinator.receive(bad, sender=LIAR)
    stopped.finish()
    stopped.check_sum(stopped.sites)
    assert stopped.coordinator.phase.aggregate.totals


def test_a_key_that_nobody_asked_for() -> None:
    """Where only sites are given the sum, a key is refused unread; where the coordinator is, a report without one.

    Stopped by the kind of message in ``Coordinator._collect_report``.
    """
    to_sites, to_coordinator = opening("sites"), opening("coordinator")
    _, report = to_sites.pending.pop()
    _, release = to_coordinator.pending.pop()
    key = KeyRelease(**msgspec.structs.asdict(report), secret=bytes(32))
    fields = msgspec.structs.asdict(release)
    del fields["secret"]
    for stopped, message, found in (
        (to_sites, key, "found KeyRelease, expected AggregateReport"),
        (to_coordinator, AggregateReport(**fields), "found AggregateReport, expected KeyRelease"),
    ):
        with pytest.raises(UnexpectedMessage, match=found):
            stopped.coordinator.receive(sign(message, stopped.identities[LIAR]), sender=LIAR)


@pytest.mark.parametrize("release_to", ["sites", "coordinator"])
def test_a_wrong_report(release_to: str) -> None:
    """A site that reports another aggregate than the others is left without a receipt; theirs is released.

    Stopped by the count in ``Coordinator._opened``.
    """
    stopped = opening(release_to)
    _, message = stopped.pending.pop()
    stopped.pending.append((LIAR, sign(replace(message, aggregate_digest=bytes(32)), stopped.identities[LIAR])))
    outbound = stopped.collect()
    assert {site for site, message in outbound.items() if isinstance(message, RoundReceipt)} == set(stopped.sites[:3])
    stopped.deliver(outbound)
    stopped.check_sum(stopped.sites)
    assert isinstance(stopped.participants[LIAR].phase, Aborted)


def test_reports_of_too_many_aggregates() -> None:
    """Below ``threshold`` equal reports nothing is released.  Stopped by the count in ``Coordinator._opened``."""
    stopped = opening("sites")
    for number in (2, 3):
        site, message = stopped.pending[number]
        bad = sign(replace(message, aggregate_digest=bytes([number]) * 32), stopped.identities[site])
        stopped.pending[number] = site, bad
    stopped.collect()
    phase = stopped.coordinator.phase
    assert isinstance(phase, Aborted)
    assert isinstance(phase.error, ThresholdNotMet)
    assert "2 of 4 sites opened the same aggregate, expected at least 3" in str(phase.error)


def test_a_coordinator_that_opens_something_else() -> None:
    """If what the key opens is not what the sites report, an honest coordinator releases nothing.

    Stopped by the comparison in ``Coordinator._opened``.
    """
    stopped = opening("coordinator")
    stopped.pending = [
        (site, sign(replace(message, aggregate_digest=bytes(32)), stopped.identities[site]))
        for site, message in stopped.pending
    ]
    stopped.collect()
    assert isinstance(stopped.coordinator.phase, Aborted)
    assert "not the aggregate that the sites opened" in str(stopped.coordinator.phase.error)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_report_that_is_no_digest(length: int) -> None:
    """A digest of another size is refused, naming the sender.  Stopped in ``Coordinator._collect_report``."""
    stopped = opening("sites")
    _, message = stopped.pending.pop()
    bad = sign(replace(message, aggregate_digest=bytes(length)), stopped.identities[LIAR])
    with pytest.raises(MalformedMessage, match=f"participant {LIAR}, Opening: a digest of {length} bytes"):
        stopped.coordinator.receive(bad, sender=LIAR)


@pytest.mark.parametrize("due", [EncryptedAggregate, AggregateAgreement])
def test_answers_twice(due: type[ToSite]) -> None:
    """A second signature or report of one site is refused and counts once."""
    stopped = StoppedRound()
    stopped.deliver(stopped.until(due))
    site, message = stopped.pending[0]
    stopped.coordinator.receive(message, sender=site)
    with pytest.raises(DuplicateMessage, match=f"participant {site}, .*a second {type(message).__name__}"):
        stopped.coordinator.receive(message, sender=site)
    stopped.pending.pop(0)
    stopped.finish()
    stopped.check_sum(stopped.sites)


def test_a_receipt_for_another_aggregate() -> None:
    """A receipt with another digest than that of what the site opened is refused, so that the site knows.

    Stopped by the comparison in ``Participant._take_receipt``.
    """
    stopped = StoppedRound()
    receipt = stopped.until(RoundReceipt)[FIRST]
    with pytest.raises(AuthenticationFailed, match="a receipt for another aggregate"):
        stopped.answers(FIRST, replace(receipt, aggregate_digest=bytes(32)))


@pytest.mark.parametrize("release_to", ["sites", "coordinator"])
def test_what_an_honest_round_gives_to_whom(release_to: str) -> None:
    """Every site ends with the exact sum and the same receipt; the coordinator has the sum only if it is to."""
    stopped = StoppedRound(release_to=release_to)
    stopped.finish()
    stopped.check_sum(stopped.sites)
    phases = [one.phase for one in stopped.participants.values()]
    assert all(isinstance(phase, ParticipantFinished) and phase.aggregate for phase in phases)
    assert len({phase.receipt.aggregate_digest for phase in phases}) == 1
    aggregate = stopped.coordinator.phase.aggregate
    assert bool(aggregate.totals) == bool(aggregate.means) == (release_to == "coordinator")


def test_no_secret_is_left_behind() -> None:
    """Once the sum is opened a site holds neither the secret nor a key, nor anything that opens a ciphertext."""
    stopped = StoppedRound()
    secret = secret_of_all(stopped)
    stopped.until(RoundReceipt)
    for participant in stopped.participants.values():
        assert isinstance(participant, Participant)
        held = [getattr(participant.phase, name) for name in participant.phase.__dataclass_fields__]
        assert secret not in held
        assert not any(isinstance(item, SumReader | SecretKey) for item in held)
