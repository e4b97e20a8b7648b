"""Masked words <-> packed bytes: word i, of b bits, is bits i*b to (i+1)*b of one little-endian bit stream.

The last byte is filled up with zero bits.  After at most 8 words the stream is at a byte's beginning again: all words
at the same place of such a group are handled at once, each through a window of whole bytes around its bits.
"""

from collections.abc import Callable, Iterator
from math import gcd
from typing import Final

import numpy as np
import numpy.typing as npt

from secureagg.errors import MalformedMessage
from secureagg.keystream import Spread, in_parts, parts_of
from secureagg.lanes import RingLane, Words

# A block of both forms stays in cache while its groups are passed over once for each place; a multiple of 8 values
# begins on a byte in every ring.
_BLOCK_VALUES: Final = 64 * 1024
_WINDOW_BYTES: Final = 8  # of the widest window, which may reach beyond the last value

_Bytes = npt.NDArray[np.uint8]

Read = Callable[[int, int], bytes | memoryview]  # (offset, size) -> that many of the packed bytes, from there on


def pack(ring_lane: RingLane, words: Words) -> memoryview:
    """The packed bytes of masked words, which must already be reduced: of a whole lane, or of a part that begins on a
    byte.  They may share memory with ``words``."""
    bits = ring_lane.masked_bits
    if bits == 8 * words.dtype.itemsize:
        return words.data.cast("B")
    size = -(-len(words) * bits // 8)
    stream = np.zeros(size + _WINDOW_BYTES, np.uint8)
    for start in range(0, len(words), _BLOCK_VALUES):
        part = words[start : start + _BLOCK_VALUES]
        for values, window, shift, spill in _windows(part, stream[start * bits // 8 :], bits):
            wide = values.astype(window.dtype)
            np.bitwise_or(window, wide << window.dtype.type(shift), out=window)
            if spill is not None:
                np.bitwise_or(spill, (wide >> window.dtype.type(64 - shift)).astype(np.uint8), out=spill)
    return stream[:size].data


def check_filling(ring_lane: RingLane, last: int, *, who: str) -> None:
    """Raise MalformedMessage naming ``who`` unless the bits behind the last word, in the ``last`` byte, are zero."""
    # One vector has one encoding.
    if (spare := -ring_lane.masked_length * ring_lane.masked_bits % 8) and last >> (8 - spare):
        raise MalformedMessage(f"{who}, lane {ring_lane.lane.name}: the last {spare} bits are not zero")


def add_packed(total: Words, ring_lane: RingLane, read: Read, *, spread: Spread = map) -> None:
    """Add the masked words of packed bytes, which must have been checked, to ``total`` in place, block by block.

    Modulo the machine word.
    ``read`` gives the bytes of one block at a time, and is called by the threads of ``spread``.
    """
    bits = ring_lane.masked_bits

    def add_part(part: slice) -> None:
        # Room for the windows that reach beyond the last value.  What lies there is above a word's bits.
        stream = np.zeros(-(-min(_BLOCK_VALUES, part.stop - part.start) * bits // 8) + 2 * _WINDOW_BYTES, np.uint8)
        for start in range(part.start, part.stop, _BLOCK_VALUES):
            block = total[start : min(start + _BLOCK_VALUES, part.stop)]
            source = np.frombuffer(read(start * bits // 8, -(-len(block) * bits // 8)), np.uint8)
            if bits == 8 * total.dtype.itemsize:
                block += source.view(total.dtype)
                continue
            stream[: len(source)] = source
            for values, window, shift, spill in _windows(block, stream, bits):
                own = window >> window.dtype.type(shift) if shift else window
                if spill is not None:
                    own |= spill.astype(window.dtype) << window.dtype.type(64 - shift)
                np.add(values, own, out=values, dtype=values.dtype, casting="same_kind")

    in_parts(add_part, parts_of(len(total), _BLOCK_VALUES), spread)


def _windows(values: Words, stream: _Bytes, bits: int) -> Iterator[tuple[Words, Words, int, _Bytes | None]]:
    """For each place in a group: the values there, the windows that hold their bits, how far these are shifted in them,
    and the bytes behind the windows where they reach beyond."""
    word = np.dtype("<u4") if bits + 7 <= 32 else np.dtype("<u8")
    per_group = 8 // gcd(bits, 8)
    # Windows at one place are written at once, so they must not overlap.
    while per_group * bits < 8 * word.itemsize:
        per_group *= 2
    stride = per_group * bits // 8
    for place in range(min(per_group, len(values))):
        own = values[place::per_group]
        first, shift = divmod(place * bits, 8)
        window: Words = np.ndarray((len(own),), word, stream, first, (stride,))
        spill = None
        if shift + bits > 64:
            spill = np.ndarray((len(own),), np.uint8, stream, first + _WINDOW_BYTES, (stride,))
        yield own, window, shift, spill
