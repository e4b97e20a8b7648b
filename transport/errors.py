"""Errors of the transport: which peer or address, what was found, what was expected."""

from typing import ClassVar


class TransportError(Exception):
    """Base of every error of this package; never raised itself."""

    code: ClassVar[str] = "transport"


class PeerUnreachable(TransportError):
    """There is no connection to this peer, or none any more."""

    code = "peer-unreachable"


class FrameTooLarge(TransportError):
    """A message exceeds the agreed limits; nothing of it was sent or kept."""

    code = "frame-too-large"


class MalformedFrame(TransportError):
    """Bytes that are not a piece of a message in its place."""

    code = "malformed-frame"


class AddressUnusable(TransportError):
    """The address cannot be listened at or connected to: in use, not this machine's, or not an address."""

    code = "address-unusable"
