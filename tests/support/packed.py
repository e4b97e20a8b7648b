"""Unpacking as a function of its own, from the steps in which the coordinator does it."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from secureagg import Counts, Lane, RingElements
from secureagg.encoding import EncodedInput
from secureagg.errors import MalformedMessage
from secureagg.lanes import RingLane, Words
from secureagg.packing import add_packed, check_filling
from secureagg.parameters import RoundParameters


def words_of(bits: int, length: int) -> RingLane:
    """A lane of so many masked words of this width, each with one value."""
    encoding = RingElements(ring_bits=bits) if bits < 64 else Counts(maximum=1)
    return RingLane(lane=Lane(name="x", length=length, encoding=encoding), ring_bits=bits)


def unpack(ring_lane: RingLane, packed: bytes | memoryview, *, who: str) -> Words:
    """The masked words of packed bytes; MalformedMessage naming ``who`` for bytes that are none."""
    if len(packed) != ring_lane.packed_bytes:
        raise MalformedMessage(f"{who}: {len(packed)} packed bytes, expected {ring_lane.packed_bytes}")
    check_filling(ring_lane, packed[-1], who=who)
    total = np.zeros(ring_lane.masked_length, ring_lane.masked_word)
    add_packed(total, ring_lane, reader(packed))
    return ring_lane.reduce(total)


def elements(encoded: EncodedInput, parameters: RoundParameters) -> dict[str, list[int]]:
    """Lane -> ring elements of a site's input, whose vectors are integers modulo the machine word; in their order."""
    return {
        name: [value % 2**lane.ring_bits for value in encoded.vectors[name].tolist()]
        for name, lane in parameters.lanes.items()
    }


def integers(ring_lane: RingLane, words: Words) -> npt.NDArray[np.int64]:
    """The integers that masked words without masks hold."""
    found = np.empty(ring_lane.lane.length, np.int64)
    ring_lane.split(words, found)
    return found


def reader(packed: bytes | memoryview) -> Callable[[int, int], bytes | memoryview]:
    """What ``add_packed`` reads blocks with."""
    return lambda offset, size: packed[offset : offset + size]
