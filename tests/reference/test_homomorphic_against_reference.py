"""Homomorphic rounds against the plain second implementation: every slot that was encrypted, and every total that was
opened, by other code than SEAL's."""

from dataclasses import replace

import numpy as np
import pytest
import reference.homomorphic_reference as homomorphic
import reference.protocol_reference as plain
from support.packed import elements
from support.rounds import HISTOGRAM, UPDATE, StoppedRound

from secureagg import SiteId
from secureagg.homomorphic import Bfv, CiphertextSum, SecretKey
from secureagg.lanes import RingLane
from secureagg.messages import (
    AggregateAgreement,
    CohortKeys,
    EncryptedAggregate,
    KeyedDelivery,
    MaskedInput,
    RoundReceipt,
    SurvivorList,
)
from secureagg.slots import SlotLayout

pytest.importorskip("tenseal", reason="the extra `homomorphic` is not installed")

GONE = SiteId("site-004")


def spec_of(stopped: StoppedRound) -> plain.Round:
    """The round as the reference has it."""
    parameters = stopped.parameters
    return plain.Round(
        consortium=parameters.consortium,
        run=parameters.run,
        number=parameters.round_number,
        members=tuple(
            plain.Member(card.site, card.signing_key, card.transport_key) for card in parameters.roster.values()
        ),
        cohort=tuple(parameters.cohort),
        own_lanes=(
            plain.Lane("update", parameters.lanes["update"].lane.length, plain.FixedPoint(1.0, 16), weighted=True),
            plain.Lane("histogram", 4, plain.Counts(HISTOGRAM.encoding.maximum)),
        ),
        threshold=parameters.threshold,
        max_corrupt=parameters.max_corrupt,
        minimum_survivors=parameters.minimum_survivors,
        model_digest=parameters.model_digest,
        max_weight=parameters.max_weight,
        release_to=parameters.release_to,
    )


def draws(spec: plain.Round, site: str) -> tuple[bytes, bytes, bytes]:
    """What a site drew: its mask key, its self seed, its secret for the encryption key."""
    entropy = plain.counting_entropy(f"0-{site}".encode())
    mask_key, _, seed = entropy(32), entropy(32), entropy(32)
    for _ in range(2 * (spec.threshold - 1)):
        entropy(48)
    return mask_key, seed, entropy(32)


def coefficients_of(key: SecretKey, bits: int) -> list[int]:
    """The secret key itself: the ciphertext (0, q / t) of any key opens to the key's own coefficients."""
    c1 = np.zeros(homomorphic.N, "<u8")
    c1[0] = round(homomorphic.Q / 2**bits)
    slots = key.decrypt(bytes(8 * homomorphic.N) + c1.tobytes(), who="test").tolist()
    found = [{0: 0, 1: 1, 2**bits - 1: -1}[slot] for slot in slots]
    assert {-1, 0, 1} == set(found)
    return found


@pytest.mark.parametrize("release_to", ["sites", "coordinator"])
def test_a_whole_round(release_to: str) -> None:
    """Of a round with a dropout the reference predicts each slot under its masks as it was encrypted, opens the sum
    that the sites were sent, finds in it the survivors' exact integers, and has the digests that the sites sign."""
    stopped = StoppedRound(
        5, backend="homomorphic", release_to=release_to, length=9000, silent={GONE: MaskedInput}, max_weight=12
    )
    spec = spec_of(stopped)
    assert stopped.parameters.lanes["update"].lane.encoding == UPDATE.encoding
    assert stopped.parameters.context == spec.context
    assert stopped.parameters.slot_layout.ciphertexts == homomorphic.ciphertexts(spec) == 2
    first = min(stopped.sites)
    secret = draws(spec, first)[2]

    stopped.deliver(stopped.until(CohortKeys))
    for site, message in stopped.pending:
        own = draws(spec, site)[2]
        assert message.secret_commitment == homomorphic.secret_commitment(spec.context, site, own)
    bits = homomorphic.slot_bits(5)
    bfv = Bfv(bits)
    key = SecretKey(bfv, homomorphic.key_seed(spec.roster, spec.context, secret))
    coefficients = coefficients_of(key, bits)

    stopped.deliver(stopped.until(KeyedDelivery))
    sent = dict(stopped.pending)
    encoded = {site: elements(stopped.inputs[site], stopped.parameters) for site in stopped.sites}
    for site, message in sent.items():
        mask_key, seed, _ = draws(spec, site)
        masks = [(plain.derive(spec.roster, spec.context, seed, "self-mask", "/slots", site), 1)]
        for peer in stopped.sites:
            if peer != site:
                shared = plain.x25519(mask_key, plain.x25519_public(draws(spec, peer)[0]))
                names = "/slots", *sorted((site, peer))
                pairwise = plain.derive(spec.roster, spec.context, shared, "pairwise-mask", *names)
                masks.append((pairwise, 1 if site > peer else -1))
        expected = homomorphic.add_masks(spec, homomorphic.slots_of(spec, encoded[site]), masks)
        # SEAL makes the second half of a fresh ciphertext of its seed; the rest is the reference's.
        raw = b"".join(message.chunks)
        size = len(raw) // 2
        for number in range(2):
            alone = CiphertextSum(bfv, 1)
            alone.add(0, raw[number * size : (number + 1) * size], who="test")
            found = homomorphic.decrypt(spec, coefficients, alone.ciphertext(0))
            assert found == expected[number * homomorphic.N : (number + 1) * homomorphic.N]

    stopped.deliver(stopped.until(SurvivorList))
    messages = stopped.until(EncryptedAggregate)
    chunks = messages[first].chunks
    summed = b"".join(chunks)
    slots = []
    for start in range(0, len(summed), 16 * homomorphic.N):
        slots += homomorphic.decrypt(spec, coefficients, summed[start : start + 16 * homomorphic.N])
    survivors = [site for site in stopped.sites if site != GONE]
    totals = homomorphic.totals_of(spec, slots, len(survivors))
    for lane in spec.lanes:
        lift = stopped.parameters.lanes[lane.name].lift
        expected = sum(lift(stopped.inputs[site].vectors[lane.name]) for site in survivors)
        assert totals[lane.name] == expected.tolist()

    stopped.deliver(messages)
    for _, message in stopped.pending:
        assert message.ciphertext_digest == homomorphic.ciphertext_digest(chunks)
    stopped.deliver(stopped.until(AggregateAgreement))
    digest = homomorphic.aggregate_digest(spec, homomorphic.digest_key(spec.roster, spec.context, secret), totals)
    assert [message.aggregate_digest for _, message in stopped.pending] == [digest] * len(survivors)
    if release_to == "coordinator":
        assert {message.secret for _, message in stopped.pending} == {secret}
    assert {message.aggregate_digest for message in stopped.until(RoundReceipt).values()} == {digest}


@pytest.mark.parametrize("n", [3, 4, 31, 32, 100, 333, 1000])
def test_the_places_of_lanes(n: int) -> None:
    """Width of slots and place of each lane are the same on both sides, up to the largest cohort."""
    spec = replace(spec_of(StoppedRound(4, backend="homomorphic")), cohort=tuple(f"site-{index}" for index in range(n)))
    ring_lanes = {
        name: RingLane.for_cohort(ring_lane.lane, cohort_size=n, max_weight=10)
        for name, ring_lane in StoppedRound(4).parameters.lanes.items()
    }
    made = SlotLayout.of(ring_lanes, cohort_size=n, max_weight=10)
    assert made.slot_bits == homomorphic.slot_bits(n)
    for place in homomorphic.layout(spec):
        first, lane = made.lanes[place.lane.name]
        assert (first, lane.slots, lane.digit_bits, lane.offset) == (
            place.first,
            place.slots,
            place.width,
            place.offset,
        )
