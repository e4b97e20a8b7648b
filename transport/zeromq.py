"""The transport over ZeroMQ: a ROUTER at the coordinator, a DEALER at each site, CURVE between them.

CURVE (curvezmq.org, after CurveCP) encrypts and authenticates both ways with fresh keys per connection.  The
coordinator admits only the public keys it is given, through ZAP (rfc.zeromq.org/spec/27), and a site connects only to
the key it expects.  Who sent a message is read from the key that its connection was authenticated with.

Connections come and go; what is said over them goes on, see ``transport.link``.  Links are tended while ``receive``
runs: whoever sends without ever receiving is stopped by the credit that it does not hear of.
"""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Self

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from transport.backoff import Backoff
from transport.endpoint import COORDINATOR, Delivery, PeerId
from transport.envelope import Limits
from transport.errors import AddressUnusable, FrameTooLarge, MalformedFrame, PeerUnreachable
from transport.link import INITIAL_CREDIT, UNKNOWN, CreditPool, Frame, Kind, Link, read_frame

KEY_BYTES: Final = 32
_CURVE_BYTES: Final = 64  # a MESSAGE command's name, flags, nonce and authenticator take 33
_HANDSHAKE_BYTES: Final = 1024  # CURVE's own commands stay below 300
_HIGHEST_PORT: Final = 65535
_NOT_YET: Final = "not connected yet"
LINGER_SECONDS: Final = 3
PROBE_SECONDS: Final = 0.5  # without a byte, until it is looked whether a connection stands, and between two looks
HANDSHAKE_SECONDS: Final = 15  # of a connection that has not got further; a slow link takes one or two
FIRST_WAIT_SECONDS: Final = 0.2  # before the second attempt to connect
MOST_WAIT_SECONDS: Final = 10.0
GRACE_SECONDS: Final = 30.0  # for a site to come back while messages for it are still taken
HEARTBEAT_MILLISECONDS: Final = 5000
STALL_SECONDS: Final = 20.0  # without a byte, while others wait, until a site's credit is taken back
TEND_MILLISECONDS: Final = 100  # most of a wait in which nothing but messages is looked at
TEND_SECONDS: Final = TEND_MILLISECONDS / 1000
WINDOW: Final = 1 << 20  # most bytes under way to one peer
LEAST_WINDOW: Final = 16 << 10
_ZAP_DOMAIN: Final = "secureagg"
_EVENTS: Final = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_NOT_ADMITTED: Final = "the coordinator does not admit this site's transport key"
_NO_HANDSHAKE: Final = (
    "the handshake fails: the coordinator has another transport key than expected, or is no coordinator, or the line "
    "breaks each time"
)
_RIVAL: Final = "another machine is connected with this site's transport key"


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
    """What both ends share: the context, counting, and moving frames between sockets and links."""

    def __init__(self, *, secret_key: bytes, limits: Limits) -> None:
        self._limits = limits
        self._secret_key = secret_key
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._closed = False
        self.bytes_received: dict[PeerId, int] = {}
        self.violations: dict[PeerId, int] = {}
        self.rivals: dict[PeerId, int] = {}

    @property
    @abstractmethod
    def _links(self) -> Mapping[PeerId, Link]:
        """The link to each peer that there is one to."""

    @property
    def bytes_sent(self) -> dict[PeerId, int]:
        """See ``Endpoint.bytes_sent``."""
        return {peer: link.bytes_sent for peer, link in self._links.items() if link.bytes_sent}

    @property
    def bytes_sent_again(self) -> dict[PeerId, int]:
        """See ``Endpoint.bytes_sent_again``."""
        return {peer: link.bytes_sent_again for peer, link in self._links.items() if link.bytes_sent_again}

    def _new_socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.curve_secretkey = z85.encode(self._secret_key)
        socket.curve_publickey = z85.encode(public_key(self._secret_key))
        # libzmq drops a connection that sends a larger frame before buffering it; CURVE adds a few bytes to each.
        largest = max(self._limits.chunk_bytes + _CURVE_BYTES, _HANDSHAKE_BYTES)
        socket.setsockopt(zmq.MAXMSGSIZE, largest)
        socket.sndhwm = 0  # a send never blocks the loop; how much is under way, the links decide
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_SECONDS * 1000)
        # From the start: a connection that ends before the socket is closed keeps the linger of that moment, and with
        # libzmq's default, for ever, what was sent into it just then would hold `close` for ever.
        socket.linger = LINGER_SECONDS * 1000
        return socket

    def receive(self, timeout: float) -> Delivery | None:
        """See ``Endpoint.receive``.  What breaks the rules is dropped and counted."""
        self._check_open()
        deadline = time.monotonic() + timeout
        while True:
            self._tend()
            if (delivery := self._take_frame(max(0.0, deadline - time.monotonic()))) is not None:
                return delivery
            # A flood of frames must not hold the caller beyond its time-out.
            if time.monotonic() >= deadline:
                return None

    def _take_data(self, peer: PeerId, link: Link, frame: Frame, parts: list[bytes]) -> Delivery | None:
        before = link.arrived
        message = link.take(frame, parts)
        if link.arrived > before:
            self.bytes_received[peer] = self.bytes_received.get(peer, 0) + sum(map(len, parts[1:]))
        return None if message is None else Delivery(peer, message)

    def _note_violation(self, peer: PeerId) -> None:
        # One bad peer must not stop the others; its message is gone, its connection stays.
        self.violations[peer] = self.violations.get(peer, 0) + 1

    def _check_open(self) -> None:
        if self._closed:
            raise PeerUnreachable("endpoint: closed")

    @abstractmethod
    def _tend(self) -> None:
        """Do what time or the network asks for, and send what may leave."""

    @abstractmethod
    def _take_frame(self, timeout: float) -> Delivery | None:
        """Wait for one frame and take it; returns the message that it completes."""

    @abstractmethod
    def why_silent(self) -> str | None:
        """See ``Endpoint.why_silent``."""

    def pending(self, peer: PeerId) -> int:
        """See ``Endpoint.pending``."""
        link = self._links.get(peer)
        return 0 if link is None else link.pending

    def discard_waiting(self, peer: PeerId) -> int:
        """See ``Endpoint.discard_waiting``."""
        link = self._links.get(peer)
        return 0 if link is None else link.discard_waiting()

    def flush(self, peers: Iterable[PeerId], *, patience: float) -> frozenset[PeerId]:
        """See ``Endpoint.flush``."""
        waited_for = {peer: self._links[peer] for peer in peers if peer in self._links}
        confirmed, since = -1, time.monotonic()
        while True:
            self._tend()
            late = frozenset(peer for peer, link in waited_for.items() if link.pending and not self._has_left(peer))
            progress = sum(link.progress for link in waited_for.values()) - len(late)
            if progress > confirmed:
                confirmed, since = progress, time.monotonic()
            if not late or time.monotonic() - since > patience or self._is_hopeless:
                return late
            self._take_frame(TEND_SECONDS)

    @property
    def _is_hopeless(self) -> bool:
        """Whether the connection has failed, so that there is nothing to wait for."""
        return False

    @abstractmethod
    def _has_left(self, peer: PeerId) -> bool:
        """Whether ``peer`` has said goodbye, or is gone for so long that nobody need wait."""

    def close(self) -> None:
        """See ``Endpoint.close``."""
        if not self._closed:
            self._close_sockets()
            self._closed = True
            self._context.term()

    @abstractmethod
    def _close_sockets(self) -> None:
        """Let go out what can, and close all that uses the context."""

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


@dataclass(slots=True)
class _Route:
    """A peer's link, libzmq's name of its connection, since when that is gone, when bytes last arrived, and when it was
    last looked whether the connection stands."""

    link: Link
    route: bytes
    gone_since: float | None = None
    active: float = 0.0
    probed: float = 0.0


class RouterEndpoint(_ZmqEndpoint):
    """The coordinator's end."""

    def __init__(self, address: str, *, secret_key: bytes, peers: Mapping[PeerId, bytes], limits: Limits) -> None:
        self._peers = {z85.encode(key).decode(): peer for peer, key in peers.items()}
        self._routes: dict[PeerId, _Route] = {}
        count = max(1, len(peers))
        self._pool = CreditPool(limits.memory_bytes // 2, links=count, limits=limits)
        self._window = max(LEAST_WINDOW, min(WINDOW, limits.memory_bytes // 4 // count))
        super().__init__(secret_key=secret_key, limits=limits)
        self._socket = self._new_socket(zmq.ROUTER)
        # What a peer sends without credit waits in its kernel's buffers beyond a few chunks.
        self._socket.rcvhwm = 16
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

    @property
    def _links(self) -> Mapping[PeerId, Link]:
        return {peer: route.link for peer, route in self._routes.items()}

    def send(self, peer: PeerId, frames: Sequence[bytes | memoryview]) -> None:
        """See ``Endpoint.send``."""
        self._check_open()
        if peer not in self._routes:
            raise PeerUnreachable(f"{peer}: has not connected")
        route = self._routes[peer]
        if route.gone_since is not None and time.monotonic() - route.gone_since > GRACE_SECONDS:
            raise PeerUnreachable(f"{peer}: its connection is gone for {GRACE_SECONDS:g} s")
        route.link.queue(frames)
        self._send_to(route)

    def why_silent(self) -> str | None:
        """See ``Endpoint.why_silent``."""
        return None

    def _tend(self) -> None:
        now = time.monotonic()
        for route in self._routes.values():
            # Stops those who hold credit and send nothing from keeping the others waiting.
            if self._pool.anybody_waits and route.link.holds_credit and now - route.active > STALL_SECONDS:
                route.active = now
                route.link.revoke()
        for route in self._routes.values():
            self._send_to(route)

    def _send_to(self, route: _Route) -> None:
        while (parts := route.link.outgoing()) is not None:
            if not self._send_frame(route.route, parts):
                route.link.detach()
                route.gone_since = time.monotonic()

    def _send_frame(self, route: bytes, parts: list[bytes]) -> bool:
        """Whether the connection still stands."""
        try:
            self._socket.send_multipart([route, *parts], zmq.DONTWAIT)
        except zmq.ZMQError:
            return False
        return True

    def _take_frame(self, timeout: float) -> Delivery | None:
        if not self._socket.poll(min(round(timeout * 1000), TEND_MILLISECONDS)):
            return None
        name, *messages = self._socket.recv_multipart(copy=False)
        if not messages:
            return None
        # Stops one site from speaking as another: the name comes from the key that CURVE authenticated.
        try:
            peer = self._peers[str(messages[0].get("User-Id"))]
        except (zmq.ZMQError, KeyError):
            return None
        parts = [message.bytes for message in messages]
        try:
            return self._take_parts(peer, name.bytes, read_frame(parts, who=peer), parts)
        except (MalformedFrame, FrameTooLarge):
            self._note_violation(peer)
            return None

    def _take_parts(self, peer: PeerId, name: bytes, frame: Frame, parts: list[bytes]) -> Delivery | None:
        route = self._routes.get(peer)
        if frame.kind == Kind.RESUME:
            self._resume(peer, route, name, frame)
            return None
        if route is None or (route.route, route.link.session) != (name, frame.session):
            return None  # late, of a connection that was given up, or of a rival
        if frame.kind == Kind.BYE:
            route.link.close()
            del self._routes[peer]
            return None
        if frame.epoch not in (UNKNOWN, route.link.epoch):
            raise MalformedFrame(f"{peer}: a frame of another epoch")
        delivery = self._take_data(peer, route.link, frame, parts)
        route.active = time.monotonic()
        self._send_to(route)
        return delivery

    def _resume(self, peer: PeerId, route: _Route | None, name: bytes, frame: Frame) -> None:
        """A new connection of ``peer``: of the program that is known, or of another one."""
        if route is not None and (route.link.session, frame.epoch in (UNKNOWN, route.link.epoch)) == (
            frame.session,
            True,
        ):
            route.route, route.gone_since, route.active = name, None, time.monotonic()
            route.link.answer_resume()
            route.link.take(frame, ())
            self._send_to(route)
            return
        # Stops a second machine with this site's key from pushing the first one out while that is there.
        if route is not None and route.link.session != frame.session and self._stands(route):
            self.rivals[peer] = self.rivals.get(peer, 0) + 1
            self._send_frame(name, [Frame(Kind.REFUSED, frame.session, UNKNOWN).packed])
            return
        if route is not None:
            route.link.close()
        link = Link(
            session=frame.session,
            epoch=secrets.token_bytes(16),
            sends=self._limits.of_site,
            takes=self._limits,
            pool=self._pool,
            window=self._window,
            who=peer,
        )
        self._routes[peer] = _Route(link, name, active=time.monotonic())
        link.answer_resume()
        self._send_to(self._routes[peer])

    def _stands(self, route: _Route) -> bool:
        """Whether the connection is not known to be gone."""
        return route.link.attached and self._send_frame(route.route, [route.link.frame(Kind.NEWS).packed])

    def _has_left(self, peer: PeerId) -> bool:
        route = self._routes.get(peer)
        if route is None:
            return True
        now = time.monotonic()
        if route.link.attached and now - max(route.active, route.probed) > PROBE_SECONDS:
            route.probed = now
            if not self._stands(route):
                route.link.detach()
                route.gone_since = now
        return route.gone_since is not None and now - route.gone_since > LINGER_SECONDS

    def _close_sockets(self) -> None:
        standing = [peer for peer, route in self._routes.items() if route.link.attached]
        self.flush(standing, patience=LINGER_SECONDS)
        self._socket.close()
        self._authenticator.stop()


class DealerEndpoint(_ZmqEndpoint):
    """A site's end; its one peer is COORDINATOR.  Each connection has a socket of its own, all share one link."""

    def __init__(self, address: str, *, secret_key: bytes, server_key: bytes, limits: Limits) -> None:
        super().__init__(secret_key=secret_key, limits=limits)
        self._address = address
        self._server_key = server_key
        self._silent: str | None = f"{address}: {_NOT_YET}"
        self._backoff = Backoff(first=FIRST_WAIT_SECONDS, most=MOST_WAIT_SECONDS)
        receives = limits.of_site
        self._link = Link(
            session=secrets.token_bytes(16),
            epoch=UNKNOWN,
            sends=limits,
            takes=receives,
            pool=CreditPool(2 * receives.message_bytes + INITIAL_CREDIT, links=1, limits=receives),
            window=WINDOW,
            who=COORDINATOR,
        )
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._due = 0.0  # of the next attempt, or of the end of the running one
        try:
            self._attempt()
        except zmq.ZMQError as error:
            self.close()
            reason = zmq.strerror(error.errno or 0)
            raise AddressUnusable(f"address {address}: {reason}; expected tcp://host:port") from error

    @property
    def _links(self) -> Mapping[PeerId, Link]:
        return {COORDINATOR: self._link}

    def send(self, peer: PeerId, frames: Sequence[bytes | memoryview]) -> None:
        """See ``Endpoint.send``."""
        self._check_open()
        if peer != COORDINATOR:
            raise PeerUnreachable(f"{peer}: a site is connected to the coordinator only")
        # A handshake that only failed may be a line that broke in it, as others do: it is tried again.
        if self._refused and (self._silent or "").endswith(_NOT_ADMITTED):
            raise PeerUnreachable(f"{peer}: {self.why_silent()}")
        self._link.queue(frames)
        self._send_all()

    def why_silent(self) -> str | None:
        """See ``Endpoint.why_silent``."""
        self._watch()
        return self._silent

    def _has_left(self, peer: PeerId) -> bool:
        return False

    @property
    def _refused(self) -> bool:
        return (self._silent or "").endswith((_NOT_ADMITTED, _NO_HANDSHAKE))

    @property
    def _is_hopeless(self) -> bool:
        return self._silent is not None and not self._silent.endswith(_NOT_YET)

    # --- connections ---

    def _attempt(self) -> None:
        """Begin a new connection."""
        self._socket = socket = self._new_socket(zmq.DEALER)
        socket.curve_serverkey = z85.encode(self._server_key)
        # A dead connection is noticed within 15 s by libzmq's own threads at both ends, whatever the processes are busy
        # with.  Only this end pings: where libzmq 4.3 both pings and has stopped reading because ``rcvhwm`` is reached,
        # a connection that breaks makes it abort the process (stream_engine_base.cpp, `!_io_error`).
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MILLISECONDS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MILLISECONDS)
        socket.setsockopt(zmq.HEARTBEAT_TTL, 3 * HEARTBEAT_MILLISECONDS)
        socket.rcvhwm = 0
        socket.reconnect_ivl = 3_600_000  # not by libzmq: see `Backoff`
        self._monitor = socket.get_monitor_socket(_EVENTS)
        self._due = time.monotonic() + HANDSHAKE_SECONDS
        socket.connect(self._address)
        if self._link.epoch == UNKNOWN:
            self._link.restart()
        # A coordinator that refuses this site may have done so already: no pipe is left then; the monitor knows why.
        with suppress(zmq.Again):
            socket.send_multipart([self._link.frame(Kind.RESUME).packed], zmq.DONTWAIT)

    def _give_up(self) -> None:
        """Close this connection, and wait before the next."""
        self._link.detach()
        self._due = time.monotonic() + self._backoff.failed()
        self._close_socket(linger=0)

    def _close_socket(self, *, linger: int | None = None) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            if self._monitor is not None:
                self._monitor.close(linger=0)
            self._socket.close(linger=linger)
            self._socket = self._monitor = None

    def _tend(self) -> None:
        self._watch()
        now = time.monotonic()
        if self._socket is None:
            if now >= self._due:
                self._attempt()
        elif self._due and now >= self._due:
            self._silent = self._silent or f"{self._address}: {_NOT_YET}"
            self._give_up()
        self._send_all()

    def _watch(self) -> None:
        """Take note of what happened to the connection."""
        while self._monitor is not None and self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._silent = None
                continue
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._silent = f"{self._address}: {_NOT_ADMITTED}"
            elif event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                self._silent = f"{self._address}: {_NO_HANDSHAKE}"
            elif event == zmq.EVENT_DISCONNECTED and not self._refused:
                self._silent = f"{self._address}: the connection was lost"
            elif event in (zmq.EVENT_CLOSED, zmq.EVENT_CONNECT_RETRIED) and not self._refused:
                self._silent = f"{self._address}: nothing answers there"
            self._give_up()

    def _send_all(self) -> None:
        while self._socket is not None and (parts := self._link.outgoing()) is not None:
            try:
                # Never waits: a socket whose handshake was refused has nowhere to queue, and would wait for ever.
                self._socket.send_multipart(parts, zmq.DONTWAIT)
            except zmq.ZMQError:
                self._watch()
                if self._socket is not None:
                    self._give_up()

    def _take_frame(self, timeout: float) -> Delivery | None:
        left = min(round(timeout * 1000), TEND_MILLISECONDS)
        if self._socket is None or self._monitor is None:
            time.sleep(min(left / 1000, max(0.0, self._due - time.monotonic())))
            return None
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        if self._socket not in dict(poller.poll(left)):
            return None
        parts = self._socket.recv_multipart()
        try:
            delivery = self._take_parts(read_frame(parts, who=COORDINATOR), parts)
        except (MalformedFrame, FrameTooLarge):
            self._note_violation(COORDINATOR)
            return None
        self._send_all()
        return delivery

    def _take_parts(self, frame: Frame, parts: list[bytes]) -> Delivery | None:
        if frame.session != self._link.session:
            raise MalformedFrame(f"{COORDINATOR}: a frame of another session")
        if frame.kind == Kind.REFUSED:
            self._silent = f"{self._address}: {_RIVAL}"
            self._give_up()
            return None
        if self._due:
            if frame.kind != Kind.REWIND:
                raise MalformedFrame(f"{COORDINATOR}: a frame before the answer to RESUME")
            self._due = 0.0
            self._silent = None
            self._backoff.succeeded()
            # Over a first connection nothing can be missing: what has left is on its way.
            first = self._link.epoch == UNKNOWN
            self._link.adopt(frame)
            frame = replace(frame, kind=Kind.NEWS) if first else frame
        elif frame.epoch != self._link.epoch:
            raise MalformedFrame(f"{COORDINATOR}: a frame of another epoch")
        return self._take_data(COORDINATOR, self._link, frame, parts)

    def _close_sockets(self) -> None:
        if self._socket is not None and not self._is_hopeless:
            # What left over a first connection that nobody has answered yet is libzmq's to deliver.
            left_unheard = self._link.all_has_left and self._link.epoch == UNKNOWN
            self.flush([COORDINATOR], patience=0.0 if left_unheard else LINGER_SECONDS)
        if self._socket is not None and self._link.attached:
            with suppress(zmq.ZMQError):
                self._socket.send_multipart([self._link.frame(Kind.BYE).packed], zmq.DONTWAIT)
        # Where the connection has failed, nothing can go out, so there is nothing to wait for.
        self._close_socket(linger=0 if self._is_hopeless else None)
