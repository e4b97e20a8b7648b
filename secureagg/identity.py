"""Long-term identities of the sites (Ed25519) and the pinned roster that says whose they are.

The roster is the root of trust of a round: a site believes a key because the roster that it pinned lists it,
never because the coordinator relays it.  A card binds a site's transport key to its identity by a signature,
so that whoever checks the roster also knows which connection is whose.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NewType, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from secureagg import labels
from secureagg.errors import AuthenticationFailed, ParameterError

SiteId = NewType("SiteId", str)
Entropy = Callable[[int], bytes]

KEY_BYTES: Final = 32
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")


def site_id(name: str) -> SiteId:
    """``name`` as a site's name: 1 to 64 of ``a-z 0-9 . _ -``, beginning and ending with a letter or digit.

    Raises ParameterError for anything else: names enter file names, logs and key derivations.
    """
    if not _NAME.fullmatch(name):
        raise ParameterError(
            f"site name {name!r}: expected 1 to 64 of a-z 0-9 . _ -, with a letter or digit at both ends"
        )
    return SiteId(name)


class Identity:
    """A site's signing key.  The private half never leaves this object but through ``private_bytes``."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls, entropy: Entropy = os.urandom) -> Self:
        """A fresh identity from 32 bytes of ``entropy``."""
        return cls.from_private_bytes(entropy(KEY_BYTES))

    @classmethod
    def from_private_bytes(cls, seed: bytes) -> Self:
        """The identity of a 32-byte Ed25519 seed (RFC 8032); ParameterError for another length."""
        if len(seed) != KEY_BYTES:
            raise ParameterError(f"identity key: {len(seed)} bytes, expected {KEY_BYTES}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def private_bytes(self) -> bytes:
        """The 32-byte seed, for the one file that keeps it."""
        return self._key.private_bytes_raw()

    @cached_property
    def public_key(self) -> bytes:
        """The 32-byte public key that the roster lists."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, label: bytes, *parts: bytes) -> bytes:
        """64-byte signature over ``label`` and the framed ``parts``."""
        return self._key.sign(labels.frame(label, *parts))

    def __repr__(self) -> str:
        return f"Identity(public_key={self.public_key.hex()})"


def verify(public_key: bytes, signature: bytes, label: bytes, *parts: bytes, who: str) -> None:
    """Return if ``signature`` is ``public_key``'s over ``label`` and ``parts``; else AuthenticationFailed naming
    ``who``."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, labels.frame(label, *parts))
    except (InvalidSignature, ValueError) as error:
        raise AuthenticationFailed(f"{who}: the signature does not verify") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a site hands out: its name, its signing key, its transport key, and a signature that ties them together.

    ``signing_key``: 32 bytes Ed25519; ``transport_key``: 32 bytes, the public key of its encrypted connections;
    ``signature``: 64 bytes.
    """

    site: SiteId
    signing_key: bytes
    transport_key: bytes
    signature: bytes = field(repr=False)

    @classmethod
    def issue(cls, site: SiteId, identity: Identity, transport_key: bytes) -> Self:
        """Sign a card for ``site``."""
        signature = identity.sign(labels.CARD, site.encode(), identity.public_key, transport_key)
        return cls(site=site, signing_key=identity.public_key, transport_key=transport_key, signature=signature)

    def check(self) -> None:
        """Raise unless the name and key sizes are sound and the card is signed by its own signing key."""
        site_id(self.site)
        for name, key in (("signing key", self.signing_key), ("transport key", self.transport_key)):
            if len(key) != KEY_BYTES:
                raise ParameterError(f"card of {self.site}: {name} has {len(key)} bytes, expected {KEY_BYTES}")
        # Stops a roster entry that pairs a site's identity with somebody else's connection.
        verify(
            self.signing_key,
            self.signature,
            labels.CARD,
            self.site.encode(),
            self.signing_key,
            self.transport_key,
            who=f"card of {self.site}",
        )


class Roster(Mapping[SiteId, Card]):
    """Everyone in the consortium: site -> card, checked when built, ordered by name."""

    def __init__(self, cards: Iterable[Card]) -> None:
        """Raise ParameterError for a repeated name or key, AuthenticationFailed for a card that does not verify."""
        ordered = sorted(cards, key=lambda card: card.site)
        for card in ordered:
            card.check()
        for what, values in (
            ("site name", [str(card.site) for card in ordered]),
            ("signing key", [card.signing_key.hex() for card in ordered]),
            ("transport key", [card.transport_key.hex() for card in ordered]),
        ):
            # One machine under two names would count twice towards every threshold.
            if repeated := {value for value in values if values.count(value) > 1}:
                raise ParameterError(f"roster: {what} listed more than once: {', '.join(sorted(repeated))}")
        self._cards = {card.site: card for card in ordered}

    def __getitem__(self, site: SiteId) -> Card:
        return self._cards[site]

    def __iter__(self) -> Iterator[SiteId]:
        return iter(self._cards)

    def __len__(self) -> int:
        return len(self._cards)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all names and keys in order of name."""
        parts = [
            part for card in self._cards.values() for part in (card.site.encode(), card.signing_key, card.transport_key)
        ]
        return labels.digest(labels.ROSTER, *parts)
