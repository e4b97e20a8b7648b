"""Attack: the coordinator puts its own keys in a site's place, to read shares and remove masks (man in the middle)."""

import msgspec
import pytest
from support.rounds import StoppedRound

from secureagg import AuthenticationFailed
from secureagg.agreement import KeyPair
from secureagg.codec import sign
from secureagg.messages import CohortKeys
from secureagg.testing import CountingEntropy

ENTROPY = CountingEntropy(b"attacker")
replace = msgspec.structs.replace
pytestmark = pytest.mark.usefixtures("backend")


def relayed(stopped: StoppedRound) -> CohortKeys:
    """What the coordinator relays to the first site."""
    message = stopped.until(CohortKeys)[stopped.sites[0]]
    assert isinstance(message, CohortKeys)
    return message


@pytest.mark.parametrize("field", ["mask_key", "channel_key"])
@pytest.mark.parametrize("signed_by", ["nobody", "another site"])
def test_another_key_in_a_peers_advertisement(field: str, signed_by: str) -> None:
    """A peer's advertisement with the coordinator's key is refused, with the old signature and with a colluder's.

    Stopped by the signature check against the pinned roster in ``Participant._share_secrets``.
    """
    stopped = StoppedRound()
    message = relayed(stopped)
    forged = replace(message.advertisements[1], **{field: KeyPair.generate(ENTROPY).public})
    if signed_by == "another site":
        forged = sign(forged, stopped.identities[stopped.sites[2]])
    advertisements = (message.advertisements[0], forged, *message.advertisements[2:])
    with pytest.raises(AuthenticationFailed, match="site-001, KeyAdvertisement: the signature does not verify"):
        stopped.answers(stopped.sites[0], replace(message, advertisements=advertisements))


def test_the_own_advertisement_exchanged() -> None:
    """A site that is shown its own advertisement left out, while the others count it, refuses.

    Stopped by the comparison with the own advertisement in ``Participant._share_secrets``.
    """
    stopped = StoppedRound()
    message = relayed(stopped)
    with pytest.raises(AuthenticationFailed, match="own advertisement is missing or changed"):
        stopped.answers(stopped.sites[0], replace(message, advertisements=message.advertisements[1:]))


def test_a_colluding_site_doubles_a_key() -> None:
    """A colluder that advertises a peer's key, whose masks would coincide, is noticed by every site.

    Stopped by the comparison of all keys in ``Participant._share_secrets``.
    """
    stopped = StoppedRound()
    message = relayed(stopped)
    copied = replace(message.advertisements[3], mask_key=message.advertisements[1].mask_key)
    copied = sign(copied, stopped.identities[stopped.sites[3]])
    with pytest.raises(AuthenticationFailed, match="a key is advertised twice"):
        stopped.answers(stopped.sites[0], replace(message, advertisements=(*message.advertisements[:3], copied)))


@pytest.mark.parametrize("field", ["mask_key", "channel_key"])
def test_a_colluding_site_advertises_a_key_of_low_order(field: str) -> None:
    """A colluder's key with which the agreed secret would be known to all is refused, naming it.

    Stopped by ``KeyPair.agree``.
    """
    stopped = StoppedRound()
    message = relayed(stopped)
    weak = sign(replace(message.advertisements[3], **{field: bytes(32)}), stopped.identities[stopped.sites[3]])
    with pytest.raises(AuthenticationFailed, match="key of site-003: not an X25519 key"):
        stopped.answers(stopped.sites[0], replace(message, advertisements=(*message.advertisements[:3], weak)))
