"""Opaque frames between authenticated peers; this package knows nothing of rounds, models or privacy."""

from transport.endpoint import COORDINATOR, Delivery, Endpoint, MemoryNetwork, PeerId
from transport.envelope import Limits
from transport.errors import AddressUnusable, FrameTooLarge, MalformedFrame, PeerUnreachable, TransportError
from transport.zeromq import DealerEndpoint, RouterEndpoint, connect, generate_keypair, listen, public_key

__all__ = [
    "COORDINATOR",
    "AddressUnusable",
    "DealerEndpoint",
    "Delivery",
    "Endpoint",
    "FrameTooLarge",
    "Limits",
    "MalformedFrame",
    "MemoryNetwork",
    "PeerId",
    "PeerUnreachable",
    "RouterEndpoint",
    "TransportError",
    "connect",
    "generate_keypair",
    "listen",
    "public_key",
]
