"""Ring elements <-> packed bytes: value i of a b-bit lane is bits i*b to (i+1)*b of one little-endian bit stream.

The last byte is filled up with zero bits.  A group of values that fills whole 64-bit words is the unit of work: for
each value's place in the group, one shift and one OR over all groups of a block at once.
"""

from math import gcd
from typing import Final

import numpy as np

from secureagg.errors import MalformedMessage
from secureagg.lanes import RingLane, Words

_U64 = np.dtype("<u8")
# A block of both forms stays in cache while its groups are passed over once for each place; a multiple of 64 values
# begins on a byte in every ring.
_BLOCK_VALUES: Final = 64 * 1024


def pack(ring_lane: RingLane, words: Words) -> bytes:
    """The packed bytes of ring elements, which must already be reduced: of a whole lane, or of a part that begins on a
    byte."""
    bits = ring_lane.ring_bits
    if bits == 8 * words.dtype.itemsize:
        return words.tobytes()
    per_group, group_words = _group(bits)
    block = _BLOCK_VALUES // per_group * per_group
    packed = bytearray()
    for start in range(0, len(words), block):
        part = words[start : start + block]
        groups = -(-len(part) // per_group)
        values = np.zeros(groups * per_group, _U64)
        values[: len(part)] = part
        table = values.reshape(groups, per_group)
        streams = np.zeros((groups, group_words), _U64)
        for place in range(per_group):
            word, shift = divmod(place * bits, 64)
            streams[:, word] |= table[:, place] << np.uint64(shift)
            if shift + bits > 64:
                streams[:, word + 1] |= table[:, place] >> np.uint64(64 - shift)
        packed += streams.data.cast("B")
    return bytes(packed[: -(-len(words) * bits // 8)])


def check_packed(ring_lane: RingLane, packed: bytes | memoryview, *, who: str) -> None:
    """Raise MalformedMessage naming ``who`` unless ``packed`` is what ``pack`` gives for some ring elements."""
    if len(packed) != ring_lane.packed_bytes:
        raise MalformedMessage(
            f"{who}, lane {ring_lane.lane.name}: {len(packed)} packed bytes, expected {ring_lane.packed_bytes}"
        )
    # One vector has one encoding: the filling bits are zero.
    if (spare := -ring_lane.lane.length * ring_lane.ring_bits % 8) and packed[-1] >> (8 - spare):
        raise MalformedMessage(f"{who}, lane {ring_lane.lane.name}: the last {spare} bits are not zero")


def add_packed(total: Words, ring_lane: RingLane, packed: bytes | memoryview) -> None:
    """Add the ring elements of ``packed``, which must have been checked, to ``total`` in place, block by block."""
    bits, word = ring_lane.ring_bits, ring_lane.word
    if bits == 8 * word.itemsize:
        total += np.frombuffer(packed, word)
        return
    per_group, group_words = _group(bits)
    block = _BLOCK_VALUES // per_group * per_group
    mask = np.uint64((1 << bits) - 1)
    raw = np.frombuffer(packed, np.uint8)
    for start in range(0, len(total), block):
        part = total[start : start + block]
        groups = -(-len(part) // per_group)
        padded = np.zeros(groups * group_words * 8, np.uint8)
        source = raw[start * bits // 8 : (start + block) * bits // 8]
        padded[: len(source)] = source
        table = padded.view(_U64).reshape(groups, group_words)
        values = np.empty((groups, per_group), word)
        for place in range(per_group):
            index, shift = divmod(place * bits, 64)
            column = table[:, index] >> np.uint64(shift)
            if shift + bits > 64:
                column |= table[:, index + 1] << np.uint64(64 - shift)
            values[:, place] = column & mask
        part += values.reshape(-1)[: len(part)]


def _group(bits: int) -> tuple[int, int]:
    """The fewest values of ``bits`` bits that fill whole 64-bit words, and how many words they fill."""
    common = gcd(bits, 64)
    return 64 // common, bits // common
