"""Unpacking as a function of its own, from the two steps in which the coordinator does it."""

from collections.abc import Callable

import numpy as np

from secureagg.lanes import RingLane, Words
from secureagg.packing import add_packed, check_packed


def unpack(ring_lane: RingLane, packed: bytes | memoryview, *, who: str) -> Words:
    """The ring elements of packed bytes; MalformedMessage naming ``who`` for bytes that are none."""
    check_packed(ring_lane, packed, who=who)
    total = np.zeros(ring_lane.lane.length, ring_lane.word)
    add_packed(total, ring_lane, reader(packed))
    return ring_lane.reduce(total)


def reader(packed: bytes | memoryview) -> Callable[[int, int], bytes | memoryview]:
    """What ``add_packed`` reads blocks with."""
    return lambda offset, size: packed[offset : offset + size]
