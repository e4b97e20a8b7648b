"""The transport over ZeroMQ: a ROUTER at the coordinator, a DEALER at each site, CURVE between them.

CURVE (curvezmq.org, after CurveCP) encrypts and authenticates both ways with fresh keys per connection.  The
coordinator admits only the public keys it is given, through ZAP (rfc.zeromq.org/spec/27), and a site connects only to
the key it expects.  Who sent a message is read from the key that its connection was authenticated with.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from transport.endpoint import COORDINATOR, Delivery, PeerId
from transport.envelope import Limits, Reassembler, split
from transport.errors import AddressUnusable, FrameTooLarge, MalformedFrame, PeerUnreachable

KEY_BYTES: Final = 32
_CURVE_BYTES: Final = 64  # a MESSAGE command's name, flags, nonce and authenticator take 33
_HANDSHAKE_BYTES: Final = 1024  # CURVE's own commands stay below 300
_HIGHEST_PORT: Final = 65535
_NOT_YET: Final = "not connected yet"
LINGER_MILLISECONDS: Final = 3000
_ZAP_DOMAIN: Final = "secureagg"
_EVENTS: Final = (
    zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_NOT_ADMITTED: Final = "the coordinator does not admit this site's transport key"
_NO_HANDSHAKE: Final = (
    "the handshake fails: the coordinator has another transport key than expected, or is no coordinator"
)


def generate_keypair() -> tuple[bytes, bytes]:
    """A fresh CURVE key pair: (public, secret), 32 bytes each."""
    public, secret = zmq.curve_keypair()
    return z85.decode(public), z85.decode(secret)


def public_key(secret_key: bytes) -> bytes:
    """The public key of a 32-byte CURVE secret key."""
    return z85.decode(zmq.curve_public(z85.encode(secret_key)))


def listen(
    address: str, *, secret_key: bytes, peers: Mapping[PeerId, bytes], limits: Limits | None = None
) -> "RouterEndpoint":
    """The coordinator's endpoint at ``address`` ("tcp://host:port", port 0 for any free one).

    ``peers``: each peer's 32-byte public key; nobody else is admitted.  Raises AddressUnusable.
    """
    _check_address(address)
    return RouterEndpoint(address, secret_key=secret_key, peers=peers, limits=limits or Limits())


def connect(address: str, *, secret_key: bytes, server_key: bytes, limits: Limits | None = None) -> "DealerEndpoint":
    """A site's endpoint; returns at once and keeps trying to reach the coordinator whose public key is ``server_key``.

    Raises AddressUnusable for what is not an address.
    """
    _check_address(address)
    return DealerEndpoint(address, secret_key=secret_key, server_key=server_key, limits=limits or Limits())


def _check_address(address: str) -> None:
    # libzmq would cut a port to 16 bits.
    scheme, _, port = address.rpartition(":")
    if not scheme.startswith("tcp://") or not port.isdigit() or int(port) > _HIGHEST_PORT:
        raise AddressUnusable(f"address {address}: not one; expected tcp://host:port with a port up to {_HIGHEST_PORT}")


class _ZmqEndpoint(ABC):
    """What both ends share: the context, the socket, chunking, counting, closing."""

    def __init__(self, kind: int, *, secret_key: bytes, limits: Limits) -> None:
        self._limits = limits
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(kind)
        self._sent_messages = 0
        self._reassemblers: dict[PeerId, Reassembler] = {}
        self.bytes_sent: dict[PeerId, int] = {}
        self.bytes_received: dict[PeerId, int] = {}
        self.violations: dict[PeerId, int] = {}
        self._socket.curve_secretkey = z85.encode(secret_key)
        self._socket.curve_publickey = z85.encode(public_key(secret_key))
        # libzmq drops a connection that sends a larger frame before buffering it; CURVE adds a few bytes to each.
        self._socket.setsockopt(zmq.MAXMSGSIZE, max(limits.chunk_bytes + _CURVE_BYTES, _HANDSHAKE_BYTES))
        # A send never blocks the loop: what a slow peer has not taken waits in memory, at most the messages of a round.
        # What peers send waits in their kernel's buffers beyond a few chunks.
        self._socket.sndhwm, self._socket.rcvhwm = 0, 16
        # A dead connection is noticed within 15 s, by libzmq's own thread, whatever this process is busy with.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)

    def receive(self, timeout: float) -> Delivery | None:
        """See ``Endpoint.receive``.  What breaks the framing is dropped and counted."""
        self._check_open()
        deadline = time.monotonic() + timeout
        while True:
            left = max(0, round((deadline - time.monotonic()) * 1000))
            if not self._socket.poll(left):
                return None
            peer, parts = self._take()
            if peer is not None and (message := self._reassemble(peer, parts)) is not None:
                return Delivery(peer, message)
            # A flood of pieces must not hold the caller beyond its time-out.
            if time.monotonic() >= deadline:
                return None

    def _reassemble(self, peer: PeerId, parts: list[bytes]) -> tuple[bytes, ...] | None:
        self.bytes_received[peer] = self.bytes_received.get(peer, 0) + sum(map(len, parts))
        try:
            if len(parts) != 2:
                raise MalformedFrame(f"{peer}: {len(parts)} frames in a chunk, expected 2")
            return self._reassemblers.setdefault(peer, Reassembler(self._limits)).take(*parts, who=peer)
        except (MalformedFrame, FrameTooLarge):
            # One bad peer must not stop the others; its message is gone, its connection stays.
            self.violations[peer] = self.violations.get(peer, 0) + 1
            return None

    def _check_open(self) -> None:
        if self._socket.closed:
            raise PeerUnreachable("endpoint: closed")

    @abstractmethod
    def _take(self) -> tuple[PeerId | None, list[bytes]]:
        """The next chunk and who sent it; None for a sender that is not to be believed."""

    @abstractmethod
    def why_silent(self) -> str | None:
        """See ``Endpoint.why_silent``."""

    def _send(self, peer: PeerId, prefix: list[bytes], frames: Sequence[bytes | memoryview]) -> None:
        self._check_open()
        self._sent_messages += 1
        for header, chunk in split(frames, number=self._sent_messages, limits=self._limits):
            try:
                # Never waits: a socket whose handshake was refused has nowhere to queue, and would wait for ever.
                self._socket.send_multipart([*prefix, header, chunk], zmq.DONTWAIT)
            except zmq.ZMQError as error:
                raise PeerUnreachable(f"{peer}: {self.why_silent() or 'no connection'}") from error
            self.bytes_sent[peer] = self.bytes_sent.get(peer, 0) + len(header) + len(chunk)

    def close(self) -> None:
        """See ``Endpoint.close``."""
        if not self._socket.closed:
            # Where the connection has failed, nothing can go out, so there is nothing to wait for.
            reason = self.why_silent()
            failed = reason is not None and not reason.endswith(_NOT_YET)
            self._socket.close(linger=0 if failed else LINGER_MILLISECONDS)
            self._closing()
            self._context.term()

    @abstractmethod
    def _closing(self) -> None:
        """Close what else uses the context."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Admission:
    """ZAP's credentials provider: the keys of the roster and no others."""

    def __init__(self, keys: frozenset[bytes]) -> None:
        self._keys = keys

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether the z85 public ``key`` may connect."""
        return key in self._keys


class RouterEndpoint(_ZmqEndpoint):
    """The coordinator's end."""

    def __init__(self, address: str, *, secret_key: bytes, peers: Mapping[PeerId, bytes], limits: Limits) -> None:
        super().__init__(zmq.ROUTER, secret_key=secret_key, limits=limits)
        self._peers = {z85.encode(key).decode(): peer for peer, key in peers.items()}
        self._routes: dict[PeerId, bytes] = {}
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        # Stops strangers: their handshake ends before a byte of theirs is read.
        admission = _Admission(frozenset(name.encode() for name in self._peers))
        self._authenticator.configure_curve_callback(domain=_ZAP_DOMAIN, credentials_provider=admission)
        self._socket.curve_server = True
        # Without a running authenticator libzmq would admit everybody; this makes it admit nobody.
        self._socket.zap_domain = _ZAP_DOMAIN.encode()
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._socket.router_mandatory = True
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            reason = zmq.strerror(error.errno or 0)
            raise AddressUnusable(f"address {address}: {reason}; expected a free one of this machine") from error
        self.address = bytes(self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def send(self, peer: PeerId, frames: Sequence[bytes | memoryview]) -> None:
        """See ``Endpoint.send``."""
        if peer not in self._routes:
            raise PeerUnreachable(f"{peer}: has not connected")
        self._send(peer, [self._routes[peer]], frames)

    def why_silent(self) -> str | None:
        """See ``Endpoint.why_silent``."""
        return None

    def _take(self) -> tuple[PeerId | None, list[bytes]]:
        route, *parts = self._socket.recv_multipart(copy=False)
        if not parts:
            return None, []
        # Stops one site from speaking as another: the name comes from the key that CURVE authenticated.
        try:
            peer = self._peers[str(parts[0].get("User-Id"))]
        except (zmq.ZMQError, KeyError):
            return None, []
        self._routes[peer] = route.bytes
        return peer, [part.bytes for part in parts]

    def _closing(self) -> None:
        self._authenticator.stop()


class DealerEndpoint(_ZmqEndpoint):
    """A site's end; its one peer is COORDINATOR."""

    def __init__(self, address: str, *, secret_key: bytes, server_key: bytes, limits: Limits) -> None:
        super().__init__(zmq.DEALER, secret_key=secret_key, limits=limits)
        self._address = address
        self._socket.curve_serverkey = z85.encode(server_key)
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 100, 2000
        self._silent: str | None = f"{address}: {_NOT_YET}"
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            reason = zmq.strerror(error.errno or 0)
            raise AddressUnusable(f"address {address}: {reason}; expected tcp://host:port") from error

    def send(self, peer: PeerId, frames: Sequence[bytes | memoryview]) -> None:
        """See ``Endpoint.send``."""
        if peer != COORDINATOR:
            raise PeerUnreachable(f"{peer}: a site is connected to the coordinator only")
        self._send(peer, [], frames)

    def why_silent(self) -> str | None:
        """See ``Endpoint.why_silent``."""
        while not self._socket.closed and self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._silent = None
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._silent = f"{self._address}: {_NOT_ADMITTED}"
            elif event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                self._silent = f"{self._address}: {_NO_HANDSHAKE}"
            elif event == zmq.EVENT_DISCONNECTED and self._silent is None:
                self._silent = f"{self._address}: the connection was lost"
            elif event == zmq.EVENT_CONNECT_RETRIED and not (self._silent or "").endswith(
                (_NOT_ADMITTED, _NO_HANDSHAKE)
            ):
                self._silent = f"{self._address}: nothing answers there"
        return self._silent

    def _take(self) -> tuple[PeerId | None, list[bytes]]:
        return COORDINATOR, self._socket.recv_multipart()

    def _closing(self) -> None:
        self._monitor.close(linger=0)
