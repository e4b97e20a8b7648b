"""Messages of several frames <-> chunks of bounded size.

A message is one byte stream, cut into chunks:

    stream  number of frames (4 bytes), length of each (8 bytes each), the frames
    chunk   message number (8), offset in the stream (8), length of the stream (8), the bytes from offset

all little-endian.  A chunk with offset 0 begins a message; every other chunk must continue where the last one ended.
Which chunks come at all, and again after a connection broke, is up to ``transport.link``.
"""

import struct
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

from transport.errors import FrameTooLarge, MalformedFrame

_HEADER: Final = struct.Struct("<QQQ")
_COUNT: Final = struct.Struct("<I")
_LENGTH: Final = struct.Struct("<Q")
HEADER_BYTES: Final = _HEADER.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a peer may send: bytes of a chunk, bytes and frames of a whole message.

    ``message_bytes``: of a message to the coordinator; ``to_site_bytes``: of one to a site, the same by default.
    ``memory_bytes``: the most that the coordinator's end holds of messages under way, over all sites together.
    """

    chunk_bytes: int = 1 << 18
    message_bytes: int = 8 << 20
    frames: int = 4096
    to_site_bytes: int | None = None
    memory_bytes: int = 256 << 20

    @property
    def of_site(self) -> "Limits":
        """What the coordinator may send to a site, as the limits of a receiver."""
        return self if self.to_site_bytes is None else replace(self, message_bytes=self.to_site_bytes)


class Outgoing:
    """A message that waits to be sent, held by reference: any of its chunks can be made at any time, also again.

    Raises FrameTooLarge if it exceeds ``limits``, MalformedFrame if it has no frame.  ``total``: bytes of its stream.
    """

    def __init__(self, frames: Sequence[bytes | memoryview], *, number: int, limits: Limits) -> None:
        # A frame that is not ``bytes`` may change before it leaves.
        held = [frame if isinstance(frame, bytes) else bytes(memoryview(frame)) for frame in frames]
        table = _COUNT.pack(len(held)) + b"".join(_LENGTH.pack(len(frame)) for frame in held)
        self.total = len(table) + sum(map(len, held))
        if not held:
            raise MalformedFrame("message: no frames, expected at least one")
        if len(held) > limits.frames:
            raise FrameTooLarge(f"message: {len(held)} frames, expected at most {limits.frames}")
        if self.total > limits.message_bytes:
            raise FrameTooLarge(f"message: {self.total} bytes, expected at most {limits.message_bytes}")
        self._number = number
        self._pieces = [memoryview(piece) for piece in (table, *held) if piece]
        self._ends = list(accumulate(map(len, self._pieces)))

    def chunk(self, offset: int, size: int) -> tuple[bytes, bytes]:
        """The chunk of at most ``size`` bytes at ``offset`` of the stream, as (header, bytes)."""
        parts: list[memoryview] = []
        place, at = bisect_right(self._ends, offset), offset
        while size > 0 and place < len(self._pieces):
            start = at - (self._ends[place] - len(self._pieces[place]))
            parts.append(self._pieces[place][start : start + size])
            at, size, place = at + len(parts[-1]), size - len(parts[-1]), place + 1
        return _HEADER.pack(self._number, offset, self.total), b"".join(parts)


def split(frames: Sequence[bytes | memoryview], *, number: int, limits: Limits) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a message in order, each as (header, bytes); raises as ``Outgoing`` does, before the first."""
    message = Outgoing(frames, number=number, limits=limits)
    return (message.chunk(offset, limits.chunk_bytes) for offset in range(0, message.total, limits.chunk_bytes))


class Reassembler:
    """Puts one peer's chunks together again; holds at most one message of at most ``limits.message_bytes``."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._reset()

    def drop(self) -> None:
        """Forget what there is of a message."""
        self._reset()

    def _reset(self) -> None:
        self._parts: list[bytes] = []
        self._received = 0
        self._number = self._total = -1

    def take(self, header: bytes, chunk: bytes, *, who: str) -> tuple[bytes, ...] | None:
        """Take one chunk; returns the frames of the message that it completes, or None.

        Raises FrameTooLarge or MalformedFrame naming ``who``; what there was of the message is dropped then.
        """
        try:
            return self._take(header, chunk, who)
        except (FrameTooLarge, MalformedFrame):
            self._reset()
            raise

    def _take(self, header: bytes, chunk: bytes, who: str) -> tuple[bytes, ...] | None:
        if len(header) != HEADER_BYTES:
            raise MalformedFrame(f"{who}: a chunk header of {len(header)} bytes, expected {HEADER_BYTES}")
        number, offset, total = _HEADER.unpack(header)
        # Nothing is allocated by what a header announces: memory grows with the bytes that really arrive.
        if total > self._limits.message_bytes:
            raise FrameTooLarge(f"{who}: a message of {total} bytes, expected at most {self._limits.message_bytes}")
        if not 0 < len(chunk) <= self._limits.chunk_bytes:
            raise MalformedFrame(f"{who}: a chunk of {len(chunk)} bytes, expected 1 to {self._limits.chunk_bytes}")
        if offset == 0:
            self._reset()
            self._number, self._total = number, total
        elif (number, offset, total) != (self._number, self._received, self._total):
            raise MalformedFrame(f"{who}: a chunk that does not continue the message before it")
        if self._received + len(chunk) > total:
            raise MalformedFrame(f"{who}: {self._received + len(chunk)} bytes of a message of {total}")
        self._parts.append(chunk)
        self._received += len(chunk)
        if self._received < total:
            return None
        stream = _Stream(self._parts)
        self._reset()
        return self._frames(stream, total, who)

    def _frames(self, stream: "_Stream", total: int, who: str) -> tuple[bytes, ...]:
        if total < _COUNT.size:
            raise MalformedFrame(f"{who}: a message of {total} bytes, expected at least {_COUNT.size}")
        (count,) = _COUNT.unpack(stream.take(_COUNT.size))
        start = _COUNT.size + count * _LENGTH.size
        if not 0 < count <= self._limits.frames or start > total:
            raise MalformedFrame(f"{who}: a message that announces {count} frames in {total} bytes")
        lengths = [_LENGTH.unpack(stream.take(_LENGTH.size))[0] for _ in range(count)]
        if start + sum(lengths) != total:
            raise MalformedFrame(f"{who}: frames of {sum(lengths)} bytes in a message with {total - start}")
        return tuple(stream.take(length) for length in lengths)


class _Stream:
    """The bytes of ``parts`` one after the other, each copied once."""

    def __init__(self, parts: list[bytes]) -> None:
        self._parts: deque[memoryview] = deque(memoryview(part) for part in parts)

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes, which there must be."""
        taken: list[memoryview] = []
        while size > 0:
            part = self._parts.popleft()
            if len(part) > size:
                self._parts.appendleft(part[size:])
                part = part[:size]
            taken.append(part)
            size -= len(part)
        return b"".join(taken)
