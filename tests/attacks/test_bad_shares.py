"""Attack: a colluding site gives wrong shares or a wrong commitment, so that a wrong sum would be released."""

import msgspec
import pytest
from support.rounds import StoppedRound

from secureagg import AuthenticationFailed
from secureagg.codec import sign
from secureagg.messages import CohortKeys, EncryptedShares, MaskedInput, UnmaskRequest
from secureagg.phases import Aborted
from secureagg.shamir import PRIME

replace = msgspec.structs.replace


def shifted(pairs: tuple[tuple[str, bytes], ...]) -> tuple[tuple[str, bytes], ...]:
    """Every share moved by 2^100: field elements, but of another secret (X25519 ignores the lowest three bits)."""
    return tuple(
        (name, ((int.from_bytes(value, "little") + 2**100) % PRIME).to_bytes(33, "little")) for name, value in pairs
    )


@pytest.mark.parametrize("kind", ["self_seed_shares", "mask_key_shares"])
def test_a_wrong_share_in_an_answer(kind: str) -> None:
    """Nothing is released, and the error names the secret and the holders whose shares were used.

    Stopped by the comparison with the commitment and with the advertised key in ``Coordinator._unmask``.
    """
    stopped = StoppedRound()
    stopped.silent[stopped.sites[3]] = MaskedInput
    stopped.deliver(stopped.until(UnmaskRequest))
    site, answer = stopped.pending.pop(0)
    bad = sign(replace(answer, **{kind: shifted(getattr(answer, kind))}), stopped.identities[site])
    stopped.pending.append((site, bad))
    stopped.collect()
    assert isinstance(stopped.coordinator.phase, Aborted)
    error = stopped.coordinator.phase.error
    assert isinstance(error, AuthenticationFailed)
    assert {"self_seed_shares": "self seed of site-000", "mask_key_shares": "mask key of site-003"}[kind] in str(error)
    assert "site-000, site-001, site-002" in str(error)


def test_a_wrong_commitment() -> None:
    """A site that commits to another seed than it shared spoils the round, and is named.

    Stopped by the comparison with the commitment in ``Coordinator._unmask``.
    """
    stopped = StoppedRound()
    stopped.deliver(stopped.until(CohortKeys))
    site, message = stopped.pending.pop(0)
    assert isinstance(message, EncryptedShares)
    stopped.pending.append((site, sign(replace(message, commitment=bytes(32)), stopped.identities[site])))
    stopped.finish()
    assert isinstance(stopped.coordinator.phase, Aborted)
    assert f"self seed of {site}" in str(stopped.coordinator.phase.error)
    assert "committed" in str(stopped.coordinator.phase.error)
