"""Attack: the coordinator alters, swaps, reflects or withholds the encrypted shares that it relays."""

import msgspec
import pytest
from support.rounds import StoppedRound

from secureagg import AuthenticationFailed, MalformedMessage, SecureAggregationError, ThresholdNotMet, UnexpectedMessage
from secureagg.agreement import KeyPair, seal_shares
from secureagg.messages import ShareDelivery
from secureagg.phases import Aborted, AwaitingShares
from secureagg.shamir import SHARE_BYTES

replace = msgspec.structs.replace
pytestmark = pytest.mark.usefixtures("backend")


def delivered() -> tuple[StoppedRound, dict[str, ShareDelivery]]:
    """A round at the share delivery, and the honest messages."""
    stopped = StoppedRound()
    return stopped, stopped.until(ShareDelivery)


def refuse(stopped: StoppedRound, message: ShareDelivery, error: type[Exception], text: str) -> None:
    """The first site refuses ``message`` and ends the round."""
    site = stopped.sites[0]
    with pytest.raises(error, match=text):
        stopped.answers(site, message)
    assert isinstance(stopped.participants[site].phase, Aborted)


def test_swapped_between_peers() -> None:
    """Shares of two senders exchanged do not open.  Stopped by the names in key and associated data."""
    stopped, messages = delivered()
    (b, from_b), (c, from_c), last = messages[stopped.sites[0]].ciphertexts
    refuse(
        stopped,
        replace(messages[stopped.sites[0]], ciphertexts=((b, from_c), (c, from_b), last)),
        AuthenticationFailed,
        "shares from site-001 to site-000",
    )


def test_reflected_to_their_sender() -> None:
    """A site's own ciphertext, sent back as its peer's, does not open.  Stopped by one key per direction."""
    stopped, messages = delivered()
    own = dict(messages[stopped.sites[1]].ciphertexts)[stopped.sites[0]]
    first, *others = messages[stopped.sites[0]].ciphertexts
    refuse(
        stopped,
        replace(messages[stopped.sites[0]], ciphertexts=((first[0], own), *others)),
        AuthenticationFailed,
        "does not open",
    )


def test_meant_for_another_recipient() -> None:
    """What a peer sealed for another site does not open here.  Stopped by the channel key of the pair."""
    stopped, messages = delivered()
    for_c = dict(messages[stopped.sites[2]].ciphertexts)[stopped.sites[1]]
    (b, _), *others = messages[stopped.sites[0]].ciphertexts
    refuse(
        stopped,
        replace(messages[stopped.sites[0]], ciphertexts=((b, for_c), *others)),
        AuthenticationFailed,
        "does not open",
    )


def test_replayed_from_an_earlier_round() -> None:
    """Ciphertexts of another run do not open.  Stopped by fresh keys and the context in the derivation."""
    stopped, _ = delivered()
    earlier = StoppedRound(seed=1, run="earlier").until(ShareDelivery)
    old = replace(earlier[stopped.sites[0]], context=stopped.parameters.context)
    refuse(stopped, old, AuthenticationFailed, "does not open")


@pytest.mark.parametrize("position", [0, 40, -1])
def test_one_bit_changed(position: int) -> None:
    """A single changed bit anywhere is noticed.  Stopped by the authenticator of ChaCha20-Poly1305."""
    stopped, messages = delivered()
    (b, sealed), *others = messages[stopped.sites[0]].ciphertexts
    changed = bytearray(sealed)
    changed[position] ^= 1
    refuse(
        stopped,
        replace(messages[stopped.sites[0]], ciphertexts=((b, bytes(changed)), *others)),
        AuthenticationFailed,
        "does not open",
    )


def test_withheld_from_one_site() -> None:
    """Withholding so many that the sum would shrink below the minimum is refused.  Stopped by ``Participant._need``."""
    stopped, messages = delivered()
    message = messages[stopped.sites[0]]
    withheld = replace(message, ciphertexts=message.ciphertexts[:1], share_commitments=message.share_commitments[:1])
    refuse(stopped, withheld, ThresholdNotMet, "2 holders who shared, expected")


def test_of_a_site_that_never_advertised() -> None:
    """Shares in the name of a site whose keys this site has not seen are refused.

    Stopped by the check of senders in ``Participant._take_shares``.
    """
    stopped, messages = delivered()
    message = messages[stopped.sites[0]]
    extra = {field: (*getattr(message, field), ("zzz", b"x")) for field in ("ciphertexts", "share_commitments")}
    refuse(stopped, replace(message, **extra), UnexpectedMessage, "shares of zzz, of whom this site is no holder")


@pytest.mark.parametrize("change", ["missing", "swapped"])
def test_with_other_commitments(change: str) -> None:
    """A site that is shown other commitments than its peers made, to be blamed later, refuses.

    Stopped by ``check_share_commitments`` in ``Participant._take_shares``.
    """
    stopped, messages = delivered()
    message = messages[stopped.sites[0]]
    (b, of_b), (c, of_c), last = message.share_commitments
    if change == "missing":
        refuse(stopped, replace(message, share_commitments=(last,)), MalformedMessage, "commitments of 1 sharers")
    else:
        swapped = replace(message, share_commitments=((b, of_c), (c, of_b), last))
        refuse(stopped, swapped, AuthenticationFailed, "not the share that site-001 committed to for site-000")


@pytest.mark.parametrize(
    ("plain", "text"), [(b"short", "5 bytes of shares"), (b"\xff" * 66, "share of site-001: not a share")]
)
def test_a_colluding_peer_seals_nonsense(plain: bytes, text: str) -> None:
    """Rightly sealed contents that are no shares are refused, naming the sender.  Stopped by ``check_share``."""
    stopped, messages = delivered()
    a, b = stopped.sites[:2]
    phase = stopped.participants[b].phase
    assert isinstance(phase, AwaitingShares)
    if len(plain) == 2 * SHARE_BYTES:
        plain += phase.encryption_secret
    sealed = seal_shares(stopped.parameters, phase.channel_secrets[a], plain, sender=b, recipient=a)
    (_, _), *others = messages[a].ciphertexts
    refuse(stopped, replace(messages[a], ciphertexts=((b, sealed), *others)), MalformedMessage, text)


def test_the_coordinator_cannot_seal_shares_itself() -> None:
    """Without a site's channel key nothing can be sealed in its name.  Stopped by the key agreement."""
    stopped, messages = delivered()
    a, b = stopped.sites[:2]
    guess = KeyPair(b"coordinator's own secret".ljust(32)).agree(KeyPair(b"x" * 32).public, who="x")
    sealed = seal_shares(stopped.parameters, guess, bytes(66), sender=b, recipient=a)
    (_, _), *others = messages[a].ciphertexts
    refuse(stopped, replace(messages[a], ciphertexts=((b, sealed), *others)), SecureAggregationError, "does not open")
