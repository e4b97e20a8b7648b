"""A TCP proxy that is as bad a line as it is told to be, the same one each time for the same seed.

What happens is tied to bytes, not to moments: after so many bytes of the site the line stalls, breaks, or another one
takes a copy.  TCP makes of lost packets what this makes of bytes: pauses of a round trip or a time-out, and, rarely, a
reset; the bytes that arrive are right.  So packet loss is imitated here by its effects; no packet is ever lost.
"""

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Final, Self

SEGMENT: Final = 1448  # bytes of a TCP segment on Ethernet
PIECE: Final = 8 * SEGMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """One line: ``delay`` (seconds each way, before the first byte of a burst), ``bytes_per_second`` each way,
    ``loss`` (chance of a segment to be lost), and what happens to the site's bytes at which count of them: ``stalls``
    (seconds), ``cuts`` (resets, after which the site has to come back) and ``copies`` (all that this connection has
    carried is sent over a second one of the proxy's own).
    """

    seed: int = 0
    delay: float = 0.0
    bytes_per_second: float = 0.0
    loss: float = 0.0
    stalls: tuple[tuple[int, float], ...] = ()
    cuts: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()


def slow_and_lossy(seed: int, *, cuts: tuple[int, ...] = ()) -> Faults:
    """2 Mbit/s, 25 ms each way, 5 % of the segments lost."""
    return Faults(seed=seed, delay=0.025, bytes_per_second=250_000, loss=0.05, cuts=cuts)


class FaultyLink:
    """Listens at ``address`` and carries what comes to ``target`` ("tcp://host:port") and back; ``connections``: how
    many the site has opened; ``carried``: the site's bytes; ``lost``: segments that were lost, in imitation; ``down``:
    whether new connections are refused for now."""

    def __init__(self, target: str, faults: Faults) -> None:
        host, port = target.removeprefix("tcp://").rsplit(":", 1)
        self._target = (host, int(port))
        self._faults = faults
        self._events = sorted(
            [(at, "stall", seconds) for at, seconds in faults.stalls]
            + [(at, "cut", 0.0) for at in faults.cuts]
            + [(at, "copy", 0.0) for at in faults.copies]
        )
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = self.carried = self.lost = 0
        self.down = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def cut(self) -> None:
        """Reset all connections."""
        with self._lock:
            for end in self._open:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def _accept(self) -> None:
        while not self._closed:
            try:
                site, _ = self._listener.accept()
            except OSError:
                return
            if self.down:
                site.close()
                continue
            self.connections += 1
            try:
                coordinator = socket.create_connection(self._target, timeout=5)
            except OSError:
                site.close()
                continue
            coordinator.settimeout(None)
            for end in (site, coordinator):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            with self._lock:
                self._open |= {site, coordinator}
            seed = f"{self._faults.seed}/{self.connections}"
            self._run(self._carry, site, coordinator, random.Random(seed + "up"), True)  # noqa: S311
            self._run(self._carry, coordinator, site, random.Random(seed + "down"), False)  # noqa: S311

    def _run(self, function, *arguments) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _carry(self, source: socket.socket, sink: socket.socket, chance: random.Random, upward: bool) -> None:
        seen = bytearray()
        with suppress(OSError):
            while piece := source.recv(PIECE):
                time.sleep(self._seconds(len(piece), chance))
                for part in self._parts(piece) if upward else [piece]:
                    if self._copies_due:
                        seen += part
                    sink.sendall(part)
                    if upward and not self._after(part, seen):
                        return
        for end in (source, sink):
            with self._lock:
                self._open.discard(end)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    @property
    def _copies_due(self) -> bool:
        return any(what == "copy" for _, what, _ in self._events)

    def _parts(self, piece: bytes) -> Iterator[bytes]:
        """The piece, cut where something is to happen."""
        places = [at - self.carried for at, _, _ in self._events]
        cuts = sorted({0, len(piece), *(place for place in places if 0 < place < len(piece))})
        yield from (piece[begin:end] for begin, end in pairwise(cuts))

    def _after(self, part: bytes, seen: bytearray) -> bool:
        """Let happen what is due; whether the connection goes on."""
        self.carried += len(part)
        while self._events and self._events[0][0] <= self.carried:
            _, what, seconds = self._events.pop(0)
            if what == "stall":
                time.sleep(seconds)
            elif what == "copy":
                with suppress(OSError), socket.create_connection(self._target, timeout=5) as second:
                    second.sendall(bytes(seen))
                    second.settimeout(1.0)
                    while second.recv(4096):
                        pass
            else:
                self.cut()
                return False
        return True

    def _seconds(self, size: int, chance: random.Random) -> float:
        """How long these bytes are under way: one round trip for most losses, a time-out where a segment is lost again
        and again or the last of its burst, as with SACK."""
        faults = self._faults
        seconds = faults.delay + (size / faults.bytes_per_second if faults.bytes_per_second else 0.0)
        for _ in range(-(-size // SEGMENT)):
            if faults.loss and chance.random() < faults.loss:
                self.lost += 1
                seconds += 2 * faults.delay
                timeout = 0.2 + 2 * faults.delay
                while chance.random() < max(faults.loss, 0.1):
                    seconds += timeout
                    timeout = min(2 * timeout, 5.0)
        return seconds
