"""Attack: a colluding site gives wrong shares or wrong commitments, so that a wrong sum would be released, the round
would fail for all, or another site would be blamed."""

import msgspec
import pytest
from support.rounds import StoppedRound

from secureagg import AuthenticationFailed, MalformedMessage
from secureagg.agreement import seal_shares
from secureagg.codec import sign
from secureagg.commitments import share_commitments
from secureagg.messages import CohortKeys, EncryptedShares, MaskedInput, ShareDelivery, UnmaskRequest
from secureagg.phases import Aborted, AwaitingShares, CoordinatorFinished
from secureagg.shamir import PRIME, share
from secureagg.testing import CountingEntropy

replace = msgspec.structs.replace
pytestmark = pytest.mark.usefixtures("backend")


def shifted(share: bytes) -> bytes:
    """A field element, but of another secret (X25519 ignores the lowest three bits)."""
    return ((int.from_bytes(share, "little") + 2**100) % PRIME).to_bytes(33, "little")


@pytest.mark.parametrize("kind", ["self_seed_shares", "mask_key_shares"])
def test_a_wrong_share_in_an_answer(kind: str) -> None:
    """A holder that reveals another share than it accepted is refused and named; the round goes on without it.

    Stopped by ``check_share_commitments`` in ``Coordinator._collect_unmask_shares``.
    """
    stopped = StoppedRound(7)
    stopped.silent[stopped.sites[6]] = MaskedInput
    stopped.deliver(stopped.until(UnmaskRequest))
    site, answer = stopped.pending.pop(0)
    (first, share), *others = getattr(answer, kind)
    bad = sign(replace(answer, **{kind: ((first, shifted(share)), *others)}), stopped.identities[site])
    what = kind.removesuffix("_shares").replace("_", "-")
    with pytest.raises(AuthenticationFailed, match=f"participant {site}, Unmasking: {what} share of {first}: not the"):
        stopped.coordinator.receive(bad, sender=site)
    stopped.finish()
    assert isinstance(stopped.coordinator.phase, CoordinatorFinished)
    assert stopped.coordinator.phase.aggregate.survivors == tuple(stopped.sites[:6])


def dealing(stopped: StoppedRound) -> tuple[str, EncryptedShares]:
    """The first site's pending shares, taken out of the honest messages."""
    stopped.deliver(stopped.until(CohortKeys))
    site, message = stopped.pending.pop(0)
    assert isinstance(message, EncryptedShares)
    return site, message


def test_a_wrong_commitment_to_the_seed() -> None:
    """A site that commits to another seed than it shared spoils the round, nothing is released, and it is blamed.

    Stopped by ``seed_commitment`` in ``Coordinator._masks``.
    """
    stopped = StoppedRound()
    site, message = dealing(stopped)
    stopped.pending.append((site, sign(replace(message, commitment=bytes(32)), stopped.identities[site])))
    stopped.finish()
    assert isinstance(stopped.coordinator.phase, Aborted)
    error = stopped.coordinator.phase.error
    assert isinstance(error, AuthenticationFailed)
    assert f"self seed of {site}" in str(error)
    assert error.blamed == site


def test_a_dropout_that_dealt_another_key() -> None:
    """A site that shares another mask key than it advertised, and drops out, spoils the round and is blamed.

    Stopped by the comparison with the advertised key in ``Coordinator._masks``.
    """
    stopped = StoppedRound()
    liar = stopped.sites[3]
    stopped.deliver(stopped.until(CohortKeys))
    phase = stopped.participants[liar].phase
    assert isinstance(phase, AwaitingShares)
    forged = deal_again(stopped, liar, phase)
    stopped.pending = [(site, forged if site == liar else message) for site, message in stopped.pending]
    stopped.silent[liar] = MaskedInput
    stopped.finish()
    assert isinstance(stopped.coordinator.phase, Aborted)
    error = stopped.coordinator.phase.error
    assert isinstance(error, AuthenticationFailed)
    assert error.blamed == liar
    assert f"mask key of {liar}" in str(error)


def deal_again(stopped: StoppedRound, liar: str, phase: AwaitingShares) -> EncryptedShares:
    """The shares of random secrets, sealed and committed to as the protocol has it."""
    parameters, entropy = stopped.parameters, CountingEntropy(b"liar")
    positions = list(parameters.positions.values())
    keys, seeds = (
        share(entropy(32), threshold=parameters.threshold, positions=positions, entropy=entropy) for _ in range(2)
    )
    commitments, ciphertexts = [], []
    for holder, at in parameters.positions.items():
        mask_key, self_seed = keys[at], seeds[at]
        committed = share_commitments(parameters, owner=liar, holder=holder, mask_key=mask_key, self_seed=self_seed)
        commitments.append((holder, committed))
        if holder != liar:
            secret = phase.channel_secrets[holder]
            plain = mask_key + self_seed + phase.encryption_secret
            ciphertexts.append((holder, seal_shares(parameters, secret, plain, sender=liar, recipient=holder)))
    honest = dict(stopped.pending)[liar]
    message = replace(
        honest,
        commitment=bytes(32),
        share_commitments=tuple(commitments),
        ciphertexts=tuple(ciphertexts),
    )
    return sign(message, stopped.identities[liar])


def test_one_share_dealt_and_another_committed_to() -> None:
    """A site that deals a holder another share than it commits to, to have it blamed, is noticed by that holder.

    Stopped by ``check_share_commitments`` in ``Participant._take_shares``.
    """
    stopped = StoppedRound()
    site, message = dealing(stopped)
    (first, value), *others = message.share_commitments
    second, *rest = others
    swapped = ((first, value), (second[0], bytes(64)), *rest)
    stopped.pending.append((site, sign(replace(message, share_commitments=swapped), stopped.identities[site])))
    deliveries = stopped.until(ShareDelivery)
    with pytest.raises(AuthenticationFailed, match=f"share of {site}: not the share that {site} committed to"):
        stopped.answers(second[0], deliveries[second[0]])


@pytest.mark.parametrize("change", ["missing", "short", "stranger"])
def test_commitments_that_cannot_hold_anyone(change: str) -> None:
    """Commitments for other holders than the cohort, or of another size, are refused, naming the sender.

    Stopped by the check of holders in ``Coordinator._collect_shares``.
    """
    stopped = StoppedRound()
    site, message = dealing(stopped)
    first, *others = message.share_commitments
    changed = {
        "missing": others,
        "short": [(first[0], b"x"), *others],
        "stranger": [*message.share_commitments, ("zzz", bytes(64))],
    }[change]
    bad = sign(replace(message, share_commitments=tuple(changed)), stopped.identities[site])
    with pytest.raises(MalformedMessage, match=f"participant {site}, SharingKeys: share commitments for"):
        stopped.coordinator.receive(bad, sender=site)
