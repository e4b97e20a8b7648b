"""What the loops see of a connection, and the in-memory twin that tests use in its place."""

import queue
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NewType, Protocol, Self

from transport.envelope import Limits, Reassembler, split
from transport.errors import PeerUnreachable

PeerId = NewType("PeerId", str)

COORDINATOR: Final = PeerId("coordinator")  # the one peer of a site's endpoint


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message: ``peer``, authenticated by the connection and never by what it wrote, and its frames (at least
    one)."""

    peer: PeerId
    frames: tuple[bytes, ...] = field(repr=False)


class Endpoint(Protocol):
    """One end of the transport.  All methods belong to one thread.

    What was sent arrives once and in order, also when the connection breaks in between and comes back.
    ``bytes_sent`` and ``bytes_received``: per peer, with the headers of chunks, each chunk counted once.
    """

    @property
    def bytes_sent(self) -> Mapping[PeerId, int]:
        """Bytes sent so far, per peer."""

    @property
    def bytes_received(self) -> Mapping[PeerId, int]:
        """Bytes received so far, per peer."""

    @property
    def bytes_sent_again(self) -> Mapping[PeerId, int]:
        """Bytes that had to be sent once more after a connection broke, per peer."""

    @property
    def rivals(self) -> Mapping[PeerId, int]:
        """Per peer how often another machine came with its key and was refused."""

    @property
    def violations(self) -> Mapping[PeerId, int]:
        """Per peer how many of its messages were dropped because they broke the framing or a limit."""

    def send(self, peer: PeerId, frames: Sequence[bytes | memoryview]) -> None:
        """Queue one message for ``peer``; bytes are kept by reference until the peer has confirmed them.

        Raises PeerUnreachable for a peer that has not connected, has left or is gone for long, or when closed,
        FrameTooLarge beyond the limits, MalformedFrame for no frames at all.
        """

    def receive(self, timeout: float) -> Delivery | None:
        """The next message, or None if none arrives within ``timeout`` seconds; PeerUnreachable when closed."""

    def why_silent(self) -> str | None:
        """Why nothing can arrive at present, in a sentence; None if the connection stands or nothing is known."""

    def pending(self, peer: PeerId) -> int:
        """How many messages ``peer`` has not confirmed."""

    def discard_waiting(self, peer: PeerId) -> int:
        """Forget the messages for ``peer`` that have not begun to leave; how many."""

    def flush(self, peers: Iterable[PeerId], *, patience: float) -> frozenset[PeerId]:
        """Wait until ``peers`` have confirmed everything, or none of them takes anything for ``patience`` seconds.

        Returns those that have not; messages that arrive meanwhile are dropped.
        """

    def close(self) -> None:
        """Let what is queued go out while peers take it, and close; may be called twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class MemoryNetwork:
    """A coordinator and its sites in one process, with the limits and the semantics of the real transport."""

    def __init__(self, peers: Iterable[PeerId], limits: Limits | None = None) -> None:
        limits = limits or Limits()
        names = list(peers)
        boxes: dict[PeerId, queue.SimpleQueue[Delivery]] = {name: queue.SimpleQueue() for name in (*names, COORDINATOR)}
        self.coordinator = MemoryEndpoint(
            COORDINATOR, boxes[COORDINATOR], {name: boxes[name] for name in names}, limits
        )
        self._sites = {
            name: MemoryEndpoint(name, boxes[name], {COORDINATOR: boxes[COORDINATOR]}, limits) for name in names
        }

    def site(self, peer: PeerId) -> "MemoryEndpoint":
        """The endpoint of one site."""
        return self._sites[peer]


class MemoryEndpoint:
    """An ``Endpoint`` over queues."""

    def __init__(
        self,
        name: PeerId,
        inbox: "queue.SimpleQueue[Delivery]",
        outboxes: "Mapping[PeerId, queue.SimpleQueue[Delivery]]",
        limits: Limits,
    ) -> None:
        self._name = name
        self._inbox = inbox
        self._outboxes = outboxes
        self._limits = limits
        self._closed = False
        self.bytes_sent: dict[PeerId, int] = {}
        self.bytes_received: dict[PeerId, int] = {}
        self.bytes_sent_again: dict[PeerId, int] = {}
        self.violations: dict[PeerId, int] = {}
        self.rivals: dict[PeerId, int] = {}

    def send(self, peer: PeerId, frames: Sequence[bytes | memoryview]) -> None:
        """See ``Endpoint.send``."""
        if self._closed:
            raise PeerUnreachable("endpoint: closed")
        if peer not in self._outboxes:
            raise PeerUnreachable(f"{peer}: no connection from {self._name}")
        assembled = Reassembler(self._limits)
        for header, chunk in split(frames, number=0, limits=self._limits):
            self.bytes_sent[peer] = self.bytes_sent.get(peer, 0) + len(header) + len(chunk)
            if (message := assembled.take(header, bytes(chunk), who=self._name)) is not None:
                self._outboxes[peer].put(Delivery(self._name, message))

    def receive(self, timeout: float) -> Delivery | None:
        """See ``Endpoint.receive``."""
        if self._closed:
            raise PeerUnreachable("endpoint: closed")
        try:
            delivery = self._inbox.get(timeout=max(timeout, 0.0)) if timeout > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None
        size = sum(len(header) + len(chunk) for header, chunk in split(delivery.frames, number=0, limits=self._limits))
        self.bytes_received[delivery.peer] = self.bytes_received.get(delivery.peer, 0) + size
        return delivery

    def why_silent(self) -> str | None:
        """See ``Endpoint.why_silent``."""
        return None

    def pending(self, peer: PeerId) -> int:
        """See ``Endpoint.pending``."""
        del peer  # a queue confirms at once
        return 0

    def discard_waiting(self, peer: PeerId) -> int:
        """See ``Endpoint.discard_waiting``."""
        del peer
        return 0

    def flush(self, peers: Iterable[PeerId], *, patience: float) -> frozenset[PeerId]:
        """See ``Endpoint.flush``."""
        del peers, patience
        return frozenset()

    def close(self) -> None:
        """See ``Endpoint.close``."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
