"""Packing of masked words into bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.packed import integers, unpack, words_of

from secureagg import Counts, Lane, MalformedMessage
from secureagg.lanes import RingLane
from secureagg.packing import pack


def reference(values: list[int], bits: int) -> bytes:
    """The layout straight from its definition, with the bits written out, the last value's first."""
    stream = "".join(f"{value:0{bits}b}" for value in reversed(values))
    return int(stream, 2).to_bytes(-(-len(values) * bits // 8), "little")


@st.composite
def vectors(draw: st.DrawFn) -> tuple[RingLane, list[int]]:
    """A lane of any ring width and elements for it."""
    bits = draw(st.integers(8, 64))
    values = draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=200))
    return words_of(bits, len(values)), values


@given(vectors())
def test_layout_is_the_specified_bit_stream(case: tuple[RingLane, list[int]]) -> None:
    """Packing gives the documented little-endian bit stream for every ring width, and unpacking inverts it."""
    lane, values = case
    packed = pack(lane, np.array(values, lane.word))
    assert packed == reference(values, lane.ring_bits)
    assert unpack(lane, packed, who="test").tolist() == values


@pytest.mark.parametrize("bits", [9, 12, 20, 24, 33, 40, 63])
def test_long_vectors(bits: int) -> None:
    """Vectors of several blocks have the same layout as short ones, at the seams too."""
    length = 3 * 64 * 1024 + 5
    lane = words_of(bits, length)
    values = np.random.default_rng(bits).integers(0, 2**bits, length, dtype=np.uint64).astype(lane.word)
    packed = pack(lane, values)
    assert packed == reference(values.tolist(), bits)
    np.testing.assert_array_equal(unpack(lane, packed, who="x"), values)


@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size_is_refused(change: int) -> None:
    """Bytes of any other size than the lane's are refused, and the error names who sent them."""
    lane = words_of(20, 5)
    with pytest.raises(MalformedMessage, match=r"hospital.*packed bytes, expected 13"):
        unpack(lane, bytes(13 + change), who="hospital")


def test_filling_bits_are_zero() -> None:
    """One vector has one encoding: a bit set behind the last value is refused."""
    lane = words_of(20, 1)
    assert unpack(lane, bytes([255, 255, 15]), who="x").tolist() == [2**20 - 1]
    with pytest.raises(MalformedMessage, match="last 4 bits"):
        unpack(lane, bytes([0, 0, 16]), who="x")


@pytest.mark.parametrize(("bits", "length", "size"), [(20, 3, 8), (20, 4, 15), (9, 1, 8), (22, 2, 6), (33, 2, 9)])
def test_several_values_in_a_word(bits: int, length: int, size: int) -> None:
    """The words of a lane have as many values as 64 bits hold, all with as many bits, whether a value is left for each
    digit or not."""
    lane = RingLane(lane=Lane(name="x", length=length, encoding=Counts(maximum=1)), ring_bits=bits)
    values = np.arange(1, length + 1).astype(lane.word)
    packed = pack(lane, lane.join(values))
    assert len(packed) == lane.packed_bytes == size
    assert int.from_bytes(packed, "little") == sum((place + 1) << (place * bits) for place in range(length))
    assert integers(lane, unpack(lane, packed, who="x")).tolist() == values.tolist()
