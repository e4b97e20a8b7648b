"""Messages of several frames <-> chunks of bounded size.

A message is one byte stream, cut into chunks:

    stream  number of frames (4 bytes), length of each (8 bytes each), the frames
    chunk   message number (8), offset in the stream (8), length of the stream (8), the bytes from offset

all little-endian.  A chunk with offset 0 begins a message, so a peer that reconnects simply begins again; every other
chunk must continue where the last one ended.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from transport.errors import FrameTooLarge, MalformedFrame

_HEADER: Final = struct.Struct("<QQQ")
_COUNT: Final = struct.Struct("<I")
_LENGTH: Final = struct.Struct("<Q")
HEADER_BYTES: Final = _HEADER.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a peer may send: bytes of a chunk, bytes and frames of a whole message."""

    chunk_bytes: int = 1 << 20
    message_bytes: int = 256 << 20
    frames: int = 4096


def split(frames: Sequence[bytes | memoryview], *, number: int, limits: Limits) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a message, each as (header, bytes), copied from ``frames`` one by one.

    Raises FrameTooLarge before the first if the message exceeds ``limits``, MalformedFrame if it has no frame.
    """
    table = _COUNT.pack(len(frames)) + b"".join(_LENGTH.pack(memoryview(frame).nbytes) for frame in frames)
    total = len(table) + sum(memoryview(frame).nbytes for frame in frames)
    if not frames:
        raise MalformedFrame("message: no frames, expected at least one")
    if len(frames) > limits.frames:
        raise FrameTooLarge(f"message: {len(frames)} frames, expected at most {limits.frames}")
    if total > limits.message_bytes:
        raise FrameTooLarge(f"message: {total} bytes, expected at most {limits.message_bytes}")
    return _chunks([table, *frames], number, total, limits.chunk_bytes)


def _chunks(frames: Sequence[bytes | memoryview], number: int, total: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    offset, room = 0, size
    pieces: list[memoryview] = []
    for frame in frames:
        view = memoryview(frame)
        rest = view.cast("B") if view.nbytes else view  # no empty view can be cast
        while rest:
            pieces.append(rest[:room])
            rest = rest[room:]
            room -= len(pieces[-1])
            if not room:
                yield _HEADER.pack(number, offset, total), b"".join(pieces)
                offset, room, pieces = offset + size, size, []
    if pieces:
        yield _HEADER.pack(number, offset, total), b"".join(pieces)


class Reassembler:
    """Puts one peer's chunks together again; holds at most one message of at most ``limits.message_bytes``."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
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
        stream = b"".join(self._parts)
        self._reset()
        return self._frames(memoryview(stream), who)

    def _frames(self, stream: memoryview, who: str) -> tuple[bytes, ...]:
        if len(stream) < _COUNT.size:
            raise MalformedFrame(f"{who}: a message of {len(stream)} bytes, expected at least {_COUNT.size}")
        (count,) = _COUNT.unpack_from(stream)
        start = _COUNT.size + count * _LENGTH.size
        if not 0 < count <= self._limits.frames or start > len(stream):
            raise MalformedFrame(f"{who}: a message that announces {count} frames in {len(stream)} bytes")
        lengths = [_LENGTH.unpack_from(stream, _COUNT.size + index * _LENGTH.size)[0] for index in range(count)]
        if start + sum(lengths) != len(stream):
            raise MalformedFrame(f"{who}: frames of {sum(lengths)} bytes in a message with {len(stream) - start}")
        frames = []
        for length in lengths:
            frames.append(bytes(stream[start : start + length]))
            start += length
        return tuple(frames)
