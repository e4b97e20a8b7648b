"""The summing machine: one bad site must not spoil the round for the others."""

from collections.abc import Callable
from hashlib import sha256

import msgspec
import numpy as np
import pytest
from support.rounds import StoppedRound

from secureagg import (
    AuthenticationFailed,
    DuplicateMessage,
    MalformedMessage,
    ThresholdNotMet,
    UnexpectedMessage,
)
from secureagg.codec import sign
from secureagg.messages import (
    CohortKeys,
    EncryptedShares,
    KeyAdvertisement,
    MaskedInput,
    RoundFailed,
    RoundReceipt,
    ShareDelivery,
    SurvivorList,
    SurvivorSignature,
    ToCoordinator,
    ToSite,
    UnmaskRequest,
    UnmaskShares,
)
from secureagg.phases import Aborted, CoordinatorFinished

replace = msgspec.structs.replace
BEFORE: dict[type, type[ToSite] | None] = {
    KeyAdvertisement: None,
    EncryptedShares: CohortKeys,
    MaskedInput: ShareDelivery,
    SurvivorSignature: SurvivorList,
    UnmaskShares: UnmaskRequest,
}


def waiting_for(kind: type[ToCoordinator], **options: object) -> StoppedRound:
    """A round whose coordinator waits for ``kind``; the honest messages are pending."""
    stopped = StoppedRound(**options)
    if (before := BEFORE[kind]) is not None:
        stopped.deliver(stopped.until(before))
    return stopped


def flip(value: bytes) -> bytes:
    """One bit changed."""
    return bytes([value[0] ^ 1]) + value[1:]


def first_bytes(pairs: tuple[tuple[str, bytes], ...]) -> tuple[tuple[str, bytes], ...]:
    """One bit changed in the first pair."""
    return ((pairs[0][0], flip(pairs[0][1])), *pairs[1:])


def copy_of_another_key(stopped: StoppedRound, message: KeyAdvertisement) -> KeyAdvertisement:
    """The second site is heard first; the message repeats its key."""
    other = stopped.pending[1][1]
    assert isinstance(other, KeyAdvertisement)
    stopped.coordinator.receive(other, sender=stopped.sites[1])
    del stopped.pending[1]
    return replace(message, mask_key=other.channel_key)


Bad = Callable[[StoppedRound, ToCoordinator], ToCoordinator]
BAD_CONTENTS: dict[str, tuple[type, Bad, type, str]] = {
    "one key twice": (
        KeyAdvertisement,
        lambda _, m: replace(m, channel_key=m.mask_key),
        AuthenticationFailed,
        "advertised twice",
    ),
    "a peer's key": (KeyAdvertisement, copy_of_another_key, AuthenticationFailed, "advertised twice"),
    "low order": (
        KeyAdvertisement,
        lambda _, m: replace(m, mask_key=bytes(32)),
        AuthenticationFailed,
        "mask key: not an X25519 key",
    ),
    "short key": (KeyAdvertisement, lambda _, m: replace(m, channel_key=b"k"), AuthenticationFailed, "channel key"),
    "a share missing": (
        EncryptedShares,
        lambda _, m: replace(m, ciphertexts=m.ciphertexts[1:]),
        MalformedMessage,
        "shares for 2 peers, expected 3",
    ),
    "a peer twice": (
        EncryptedShares,
        lambda _, m: replace(m, ciphertexts=(m.ciphertexts[0], *m.ciphertexts)),
        MalformedMessage,
        "names repeat",
    ),
    "short commitment": (
        EncryptedShares,
        lambda _, m: replace(m, commitment=b"x"),
        MalformedMessage,
        "commitment of 1 bytes, expected 32",
    ),
    "changed chunk": (
        MaskedInput,
        lambda _, m: replace(m, chunks=(flip(m.chunks[0]),)),
        AuthenticationFailed,
        "a chunk is not the one that was signed",
    ),
    "wrong signature on the list": (
        SurvivorSignature,
        lambda _, m: replace(m, list_signature=flip(m.list_signature)),
        AuthenticationFailed,
        "does not verify",
    ),
    "a share of too few": (
        UnmaskShares,
        lambda _, m: replace(m, self_seed_shares=m.self_seed_shares[1:]),
        MalformedMessage,
        "self-seed shares of 3 sites, expected 4",
    ),
    "a survivor's mask key": (
        UnmaskShares,
        lambda _, m: replace(m, mask_key_shares=m.self_seed_shares[:1]),
        MalformedMessage,
        "mask-key shares of 1 sites, expected 0",
    ),
    "no field element": (
        UnmaskShares,
        lambda _, m: replace(m, self_seed_shares=((m.self_seed_shares[0][0], b"\xff" * 33), *m.self_seed_shares[1:])),
        MalformedMessage,
        "not a share",
    ),
}


@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_bad_contents_are_refused_and_leave_no_trace(case: str) -> None:
    """A signed but unfit message is refused naming sender and fault; the right one is still taken, the sum right."""
    kind, make_bad, error, text = BAD_CONTENTS[case]
    stopped = waiting_for(kind)
    site, good = stopped.pending[0]
    bad = make_bad(stopped, good)
    if case != "changed chunk":
        bad = sign(bad, stopped.identities[site])
    with pytest.raises(error, match=f"participant {site}, .*{text}"):
        stopped.coordinator.receive(bad, sender=site)
    stopped.finish()
    assert_right_sum(stopped)


def assert_right_sum(stopped: StoppedRound) -> None:
    """The round released exactly the sum of the survivors' encoded inputs."""
    phase = stopped.coordinator.phase
    assert isinstance(phase, CoordinatorFinished)
    survivors = phase.aggregate.survivors
    for lane, ring_lane in stopped.parameters.lanes.items():
        expected = sum(ring_lane.lift(stopped.inputs[site].vectors[lane]) for site in survivors)
        np.testing.assert_array_equal(phase.aggregate.totals[lane], expected)


@pytest.mark.parametrize("length", [-1, 1])
def test_masked_input_of_another_size(length: int) -> None:
    """A masked input with a byte more or less is refused with both numbers."""
    stopped = waiting_for(MaskedInput)
    site, good = stopped.pending[0]
    assert isinstance(good, MaskedInput)
    chunk = good.chunks[0][:-1] if length < 0 else good.chunks[0] + b"\0"
    bad = sign(replace(good, chunks=(chunk,), chunk_digests=(sha256(chunk).digest(),)), stopped.identities[site])
    size = stopped.parameters.input_bytes
    with pytest.raises(MalformedMessage, match=f"chunk 1 of 1: {size + length} bytes of lanes, expected {size}"):
        stopped.coordinator.receive(bad, sender=site)
    stopped.finish()
    assert_right_sum(stopped)


@pytest.mark.parametrize("kind", BEFORE, ids=lambda kind: kind.__name__)
class TestEnvelope:
    """What is checked of every message, whatever it contains."""

    def test_signature(self, kind: type) -> None:
        """A message whose signature does not verify is refused."""
        stopped = waiting_for(kind)
        site, good = stopped.pending[0]
        with pytest.raises(AuthenticationFailed, match="does not verify"):
            stopped.coordinator.receive(replace(good, signature=flip(good.signature)), sender=site)
        stopped.finish()
        assert_right_sum(stopped)

    def test_sender(self, kind: type) -> None:
        """A message of one site that arrives over another site's connection is refused."""
        stopped = waiting_for(kind)
        site, good = stopped.pending[0]
        with pytest.raises(AuthenticationFailed, match=f"signed as {site}, expected {stopped.sites[1]}"):
            stopped.coordinator.receive(good, sender=stopped.sites[1])

    def test_context(self, kind: type) -> None:
        """A message of another round is refused even if it is signed rightly."""
        stopped = waiting_for(kind)
        site, good = stopped.pending[0]
        foreign = sign(replace(good, context=bytes(32)), stopped.identities[site])
        with pytest.raises(UnexpectedMessage, match="another round"):
            stopped.coordinator.receive(foreign, sender=site)

    def test_duplicate(self, kind: type) -> None:
        """A second message of the same kind is refused; the first one counts."""
        stopped = waiting_for(kind)
        site, good = stopped.pending.pop(0)
        stopped.coordinator.receive(good, sender=site)
        with pytest.raises(DuplicateMessage):
            stopped.coordinator.receive(good, sender=site)
        stopped.finish()
        assert_right_sum(stopped)

    def test_out_of_phase(self, kind: type) -> None:
        """A message in a phase that is not its own is refused."""
        stopped = waiting_for(kind)
        site, good = stopped.pending[0]
        other = waiting_for(EncryptedShares if kind is KeyAdvertisement else KeyAdvertisement)
        with pytest.raises(UnexpectedMessage, match="no place in this phase"):
            other.coordinator.receive(good, sender=site)

    def test_enough_silence_ends_the_round_without_a_release(self, kind: type) -> None:
        """With fewer than the threshold answering, the round aborts, tells the sites, and releases nothing."""
        stopped = waiting_for(kind)
        outbound = stopped.collect(from_sites=stopped.sites[:2])
        assert isinstance(stopped.coordinator.phase, Aborted)
        assert isinstance(stopped.coordinator.phase.error, ThresholdNotMet)
        assert "expected at least 3" in str(stopped.coordinator.phase.error)
        assert all(isinstance(message, RoundFailed) for message in outbound.values())
        assert stopped.coordinator.expected == frozenset()

    def test_a_dropped_site_is_not_waited_for(self, kind: type) -> None:
        """Told that a site is gone, the phase ends with the last of the others, without a deadline."""
        stopped = waiting_for(kind)
        gone, _ = stopped.pending.pop()
        assert gone in stopped.coordinator.expected
        phase = stopped.coordinator.phase
        assert stopped.coordinator.drop(gone) == []
        for site, message in stopped.pending:
            assert stopped.coordinator.phase is phase
            outbound = stopped.coordinator.receive(message, sender=site)
        assert stopped.coordinator.phase is not phase
        assert outbound


def test_a_site_that_was_given_up_cannot_come_back_in_the_round() -> None:
    """A message of a site after the coordinator went on without it is refused; the sum stays the survivors'."""
    stopped = waiting_for(MaskedInput)
    site, late = stopped.pending.pop()
    outbound = stopped.collect()
    with pytest.raises(UnexpectedMessage):
        stopped.coordinator.receive(late, sender=site)
    stopped.deliver(outbound)
    stopped.finish()
    assert_right_sum(stopped)
    assert site not in stopped.coordinator.phase.aggregate.survivors


def test_receipts_go_to_everyone_who_answered() -> None:
    """Whoever answered the unmask request learns how many are in the sum and what was released."""
    stopped = StoppedRound()
    receipts = stopped.until(RoundReceipt)
    aggregate = stopped.coordinator.phase.aggregate
    assert set(receipts) == set(stopped.sites)
    assert {(r.survivors, r.canary, r.aggregate_digest) for r in receipts.values()} == {(4, 4, aggregate.digest)}


@pytest.mark.parametrize("kind", BEFORE, ids=lambda kind: kind.__name__)
def test_a_site_that_was_dropped_is_not_heard_again(kind: type) -> None:
    """A site that was given up while others are still expected is refused in the same phase: its peers may already
    count it as gone."""
    stopped = waiting_for(kind)
    gone, message = stopped.pending.pop(0)
    stopped.coordinator.drop(gone)
    with pytest.raises(UnexpectedMessage, match="this phase does not wait for"):
        stopped.coordinator.receive(message, sender=gone)
