"""Key agreement (X25519), key derivation (HKDF-SHA256) and sealed shares (ChaCha20-Poly1305).

Key pairs live for one round.  Every derived key has a label of its own and is bound to the round's context and to the
two sites in a fixed role, so that each key has one purpose, one direction and one use.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secureagg import labels
from secureagg.errors import AuthenticationFailed
from secureagg.identity import KEY_BYTES, Entropy, SiteId
from secureagg.parameters import RoundParameters

_FIELD = 2**255 - 19  # of Curve25519; X25519 also accepts keys above it, and ignores the highest bit
# Each channel key seals exactly one message, so a constant nonce is never repeated under a key.
_NONCE = bytes(12)


class KeyPair:
    """A fresh X25519 key pair of one round."""

    __slots__ = ("_key", "public")

    def __init__(self, secret: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, entropy: Entropy) -> "KeyPair":
        """A key pair from 32 bytes of ``entropy``."""
        return cls(entropy(KEY_BYTES))

    def secret_bytes(self) -> bytes:
        """The 32 secret bytes, to be shared among the cohort."""
        return self._key.private_bytes_raw()

    def agree(self, public: bytes, *, who: str) -> bytes:
        """The 32-byte secret shared with the holder of ``public``.

        Raises AuthenticationFailed naming ``who`` for a key of low order, with which the secret would be known to all,
        and for a second form of a key, which would be taken for another one.
        """
        if len(public) != KEY_BYTES or int.from_bytes(public, "little") >= _FIELD:
            raise AuthenticationFailed(f"{who}: not an X25519 key in its one form")
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise AuthenticationFailed(f"{who}: not an X25519 key that an agreement may use") from error


def pairwise_mask_key(parameters: RoundParameters, secret: bytes, *, lane: str, one: SiteId, other: SiteId) -> bytes:
    """The 32-byte AES key of the mask that two sites share in one lane; the same from both sides."""
    smaller, larger = sorted((one, other))
    return _derive(parameters, secret, labels.PAIRWISE_MASK, lane.encode(), smaller.encode(), larger.encode())


def self_mask_key(parameters: RoundParameters, seed: bytes, *, lane: str, site: SiteId) -> bytes:
    """The 32-byte AES key of a site's self mask in one lane."""
    return _derive(parameters, seed, labels.SELF_MASK, lane.encode(), site.encode())


def encryption_key_seed(parameters: RoundParameters, secret: bytes) -> bytes:
    """The 64-byte seed of a round's key for homomorphic sums, of a ``secret`` that only the cohort's sites have."""
    return _derive(parameters, secret, labels.ENCRYPTION_KEY, length=64)


def digest_key(parameters: RoundParameters, secret: bytes) -> bytes:
    """The 32 bytes that hide an aggregate in its digest from whoever has not that ``secret``."""
    return _derive(parameters, secret, labels.DIGEST_KEY)


def seal_shares(
    parameters: RoundParameters, secret: bytes, shares: bytes, *, sender: SiteId, recipient: SiteId
) -> bytes:
    """Encrypt ``shares`` from ``sender`` to ``recipient``; ``secret`` is what their channel keys agree on."""
    key = _derive(parameters, secret, labels.CHANNEL, sender.encode(), recipient.encode())
    return ChaCha20Poly1305(key).encrypt(_NONCE, shares, _share_context(parameters, sender, recipient))


def open_shares(
    parameters: RoundParameters, secret: bytes, sealed: bytes, *, sender: SiteId, recipient: SiteId
) -> bytes:
    """Decrypt what ``seal_shares`` made; AuthenticationFailed for anything else."""
    key = _derive(parameters, secret, labels.CHANNEL, sender.encode(), recipient.encode())
    try:
        # Stops shares swapped between peers, directions or rounds, and altered ones.
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, _share_context(parameters, sender, recipient))
    except (InvalidTag, ValueError) as error:
        raise AuthenticationFailed(f"shares from {sender} to {recipient}: the ciphertext does not open") from error


def _share_context(parameters: RoundParameters, sender: SiteId, recipient: SiteId) -> bytes:
    return labels.frame(labels.SHARE, parameters.context, sender.encode(), recipient.encode())


def _derive(parameters: RoundParameters, secret: bytes, label: bytes, *info: bytes, length: int = 32) -> bytes:
    return HKDF(
        algorithm=SHA256(),
        length=length,
        salt=parameters.roster.digest,
        info=labels.frame(label, parameters.context, *info),
    ).derive(secret)
