"""A machine's keys: `NAME.keys` holds both secrets and stays, `NAME.card` is public and is handed out."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from secureagg import Card, Identity, SecureAggregationError, SiteId, site_id
from sites.errors import KeyFileError
from sites.files import create_private, read_private, write_atomic
from transport import generate_keypair, public_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The private keys of one machine: Ed25519 identity and 32-byte CURVE secret."""

    site: SiteId
    identity: Identity
    transport_secret: bytes = field(repr=False)

    @property
    def card(self) -> Card:
        """The public card, signed."""
        return Card.issue(self.site, self.identity, public_key(self.transport_secret))


def generate_keys(name: str) -> Keys:
    """Fresh keys for the machine called ``name``; ParameterError for a name that is not one."""
    return Keys(site=site_id(name), identity=Identity.generate(), transport_secret=generate_keypair()[1])


def save_keys(keys: Keys, folder: Path) -> tuple[Path, Path]:
    """Write `NAME.keys` (mode 600) and `NAME.card` into ``folder``; returns both paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeyFileError(f"{folder}: cannot be made: {error.strerror}") from error
    private, public = folder / f"{keys.site}.keys", folder / f"{keys.site}.card"
    secrets = {
        "name": keys.site,
        "signing_key": keys.identity.private_bytes().hex(),
        "transport_key": keys.transport_secret.hex(),
    }
    create_private(private, b"# Private keys. They never leave this machine.\n" + tomli_w.dumps(secrets).encode())
    write_atomic(public, tomli_w.dumps(card_fields(keys.card)).encode())
    return private, public


def load_keys(path: Path) -> Keys:
    """The keys in a `NAME.keys` file; KeyFileError naming it if it is exposed, missing or malformed."""
    fields = _fields(path, read_private(path), {"name", "signing_key", "transport_key"})
    try:
        secret = bytes.fromhex(fields["transport_key"])
        identity = Identity.from_private_bytes(bytes.fromhex(fields["signing_key"]))
        keys = Keys(site=site_id(fields["name"]), identity=identity, transport_secret=secret)
        _ = keys.card
    except (ValueError, TypeError) as error:
        raise KeyFileError(f"{path}: not a file of private keys as `secureagg keygen` writes it") from error
    return keys


def card_fields(card: Card) -> dict[str, str]:
    """A card as the fields of a TOML table, keys in hexadecimal."""
    return {
        "name": card.site,
        "signing_key": card.signing_key.hex(),
        "transport_key": card.transport_key.hex(),
        "signature": card.signature.hex(),
    }


def load_card(path: Path) -> Card:
    """The card in a `NAME.card` file, checked; KeyFileError naming it otherwise."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read: {error.strerror}") from error
    fields = _fields(path, data, {"name", "signing_key", "transport_key", "signature"})
    try:
        card = Card(
            site=site_id(fields["name"]),
            signing_key=bytes.fromhex(fields["signing_key"]),
            transport_key=bytes.fromhex(fields["transport_key"]),
            signature=bytes.fromhex(fields["signature"]),
        )
        card.check()
    except (ValueError, TypeError, SecureAggregationError) as error:
        raise KeyFileError(f"{path}: not a valid card: {error}") from error
    return card


def _fields(path: Path, data: bytes, expected: set[str]) -> dict[str, Any]:
    try:
        fields = tomllib.loads(data.decode())
    except ValueError as error:
        raise KeyFileError(f"{path}: not a TOML file") from error
    if fields.keys() != expected:
        raise KeyFileError(f"{path}: found the fields {sorted(fields)}, expected {sorted(expected)}")
    return fields
