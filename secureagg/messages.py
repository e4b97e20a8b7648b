"""What crosses the wire, in order.  Site messages carry the sender and its signature; the coordinator's carry none.

The coordinator's word is never trusted, so its messages need no signature of their own: each is either checked against
what the site knows, or consists of things that other sites signed.  Fields named ``context`` hold the round's 32-byte
context; a signature covers the whole message but itself.  A round has the messages of one graph only.
"""

from itertools import pairwise
from typing import ClassVar

import msgspec

from secureagg.errors import MalformedMessage
from secureagg.identity import SiteId

Named = tuple[tuple[SiteId, bytes], ...]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages: an immutable record, encoded as an array that starts with its type's tag."""

    context: bytes


class SiteMessage(Message, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """Base of what a site sends to the coordinator."""

    sender: SiteId
    signature: bytes = b""


class KeyAdvertisement(SiteMessage, frozen=True, tag="key-advertisement", array_like=True, kw_only=True):
    """Message 0: the site's fresh X25519 public keys for masks and for channels, 32 bytes each."""

    mask_key: bytes
    channel_key: bytes


class CohortKeys(Message, frozen=True, tag="cohort-keys", array_like=True, kw_only=True):
    """The coordinator relays every advertisement it accepted."""

    advertisements: tuple[KeyAdvertisement, ...]


class EncryptedShares(SiteMessage, frozen=True, tag="encrypted-shares", array_like=True, kw_only=True):
    """Message 1: for each peer, the sealed shares of the mask secret key and of the self seed; commitments to the seed
    and, for each peer and the sender itself, to its shares (64 bytes)."""

    commitment: bytes
    share_commitments: Named
    ciphertexts: Named


class ShareDelivery(Message, frozen=True, tag="share-delivery", array_like=True, kw_only=True):
    """The coordinator relays to one site what each other sharer sealed for it, and the sharer's commitments to it."""

    share_commitments: Named
    ciphertexts: Named


class MaskedInput(SiteMessage, frozen=True, tag="masked-input", array_like=True, kw_only=True):
    """Message 2: the lanes under the sender's masks, packed or encrypted, cut into chunks; the signature
    covers the chunks' digests.

    The chunks travel as raw frames behind the message; they are empty in its encoding.  Without any, the message begins
    an upload, whose chunks follow one by one.
    """

    CHUNK_BYTES: ClassVar[int] = 1 << 20

    chunk_digests: tuple[bytes, ...]
    chunks: tuple[bytes, ...] = ()


class SurvivorList(Message, frozen=True, tag="survivor-list", array_like=True, kw_only=True):
    """Whose masked inputs the coordinator has: site -> digest of its input, in order of name."""

    survivors: Named


class SurvivorSignature(SiteMessage, frozen=True, tag="survivor-signature", array_like=True, kw_only=True):
    """Message 3: the site's one signature of the round on a survivor list."""

    list_signature: bytes


class UnmaskRequest(Message, frozen=True, tag="unmask-request", array_like=True, kw_only=True):
    """The survivors' signatures on the list, which prove that all were shown the same one."""

    list_signatures: Named


class UnmaskShares(SiteMessage, frozen=True, tag="unmask-shares", array_like=True, kw_only=True):
    """Message 4: the shares of each survivor's self seed and of each dropout's mask secret key; never both of one
    site."""

    self_seed_shares: Named
    mask_key_shares: Named


class RoundReceipt(Message, frozen=True, tag="round-receipt", array_like=True, kw_only=True):
    """Message 5: what the coordinator released."""

    survivors: int
    canary: int
    aggregate_digest: bytes


# --- what differs on the sparse graph; positions are places in the cohort, from 1, in ascending order ---

Positions = tuple[int, ...]


class SparseAdvertisement(KeyAdvertisement, frozen=True, tag="sparse-advertisement", array_like=True, kw_only=True):
    """Message 0: the keys, and the neighbours that the site drew as holders of its shares."""

    neighbours: Positions


class SparseKeys(Message, frozen=True, tag="sparse-keys", array_like=True, kw_only=True):
    """The coordinator relays to one site its own advertisement, its holders' and those of the sites that drew it."""

    advertisements: tuple[SparseAdvertisement, ...]


class SparseDelivery(ShareDelivery, frozen=True, tag="sparse-delivery", array_like=True, kw_only=True):
    """What those who drew the site sealed for it, and which of its own holders shared too."""

    sharers: Positions


class Inclusion(SiteMessage, frozen=True, tag="inclusion", array_like=True, kw_only=True):
    """The site's statement to its holders: the masks that it shares with these of them are in its masked input."""

    neighbours: Positions


class SparseInput(MaskedInput, frozen=True, tag="sparse-input", array_like=True, kw_only=True):
    """Message 2: the masked input, and the statement that the coordinator passes on to the site's holders."""

    inclusion: Inclusion


class SparseSurvivors(Message, frozen=True, tag="sparse-survivors", array_like=True, kw_only=True):
    """Whose masked inputs the coordinator has, among the sites whose shares the recipient holds: their statements."""

    inclusions: tuple[Inclusion, ...]


class Acknowledgement(SiteMessage, frozen=True, tag="acknowledgement", array_like=True, kw_only=True):
    """Message 3: the site takes these for survivors; it will reveal the share of their self seed, if any."""

    survivors: Positions


class AcknowledgementList(Message, frozen=True, tag="acknowledgement-list", array_like=True, kw_only=True):
    """What the recipient's own holders acknowledged."""

    acknowledgements: tuple[Acknowledgement, ...]


class SparseReceipt(RoundReceipt, frozen=True, tag="sparse-receipt", array_like=True, kw_only=True):
    """Message 5, and which graph the round ran on: the number of holders and the threshold among them."""

    neighbours: int
    threshold: int


# --- what differs with the homomorphic backend ---


class KeyedShares(EncryptedShares, frozen=True, tag="keyed-shares", array_like=True, kw_only=True):
    """Message 1: to each peer's shares, a 32-byte secret is sealed, the same for all; and the commitment to it."""

    secret_commitment: bytes


class KeyedDelivery(ShareDelivery, frozen=True, tag="keyed-delivery", array_like=True, kw_only=True):
    """What each other sharer sealed for one site, and its commitment to the secret in it."""

    secret_commitments: Named


class EncryptedAggregate(Message, frozen=True, tag="encrypted-aggregate", array_like=True, kw_only=True):
    """The sum of all ciphertexts, without masks, for the sites to sign and then to open.

    Its chunks travel as raw frames behind the message, or one by one; they are empty in its encoding.
    """

    chunks: tuple[bytes, ...] = ()


class AggregateSignature(SiteMessage, frozen=True, tag="aggregate-signature", array_like=True, kw_only=True):
    """Message 5: SHA-256 of the ciphertexts of the one sum that the site will open.  It says nothing of what is in
    them."""

    ciphertext_digest: bytes


class AggregateAgreement(Message, frozen=True, tag="aggregate-agreement", array_like=True, kw_only=True):
    """The statements of those who were sent the same ciphertexts."""

    signatures: tuple[AggregateSignature, ...]


class AggregateReport(SiteMessage, frozen=True, tag="aggregate-report", array_like=True, kw_only=True):
    """Message 6: digest of the aggregate that the site opened, under a key that only sites have."""

    aggregate_digest: bytes


class KeyRelease(AggregateReport, frozen=True, tag="key-release", array_like=True, kw_only=True):
    """Message 6 where the coordinator is given the aggregate too: also what the encryption key is made of."""

    secret: bytes


class RoundFailed(Message, frozen=True, tag="round-failed", array_like=True, kw_only=True):
    """The round ended without a release; ``code`` is that of the error."""

    code: str


ToCoordinator = (
    KeyAdvertisement
    | EncryptedShares
    | MaskedInput
    | SurvivorSignature
    | UnmaskShares
    | SparseAdvertisement
    | SparseInput
    | Acknowledgement
    | KeyedShares
    | AggregateSignature
    | AggregateReport
    | KeyRelease
)
ToSite = (
    CohortKeys
    | ShareDelivery
    | SurvivorList
    | UnmaskRequest
    | RoundReceipt
    | RoundFailed
    | SparseKeys
    | SparseDelivery
    | SparseSurvivors
    | AcknowledgementList
    | SparseReceipt
    | KeyedDelivery
    | EncryptedAggregate
    | AggregateAgreement
)
AnyMessage = ToCoordinator | ToSite


def named(pairs: Named, *, who: str) -> dict[SiteId, bytes]:
    """``pairs`` as a dict; MalformedMessage naming ``who`` unless the names are in strictly ascending order."""
    names = [name for name, _ in pairs]
    if any(first >= second for first, second in pairwise(names)):
        raise MalformedMessage(f"{who}: names repeat or are out of order")
    return dict(pairs)
