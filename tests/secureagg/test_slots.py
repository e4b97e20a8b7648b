"""Lanes as slots, and masks modulo the plaintext modulus; everything of a homomorphic sum but the encryption."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.keystreams import keystream
from support.slots import round_parameters, vectors_of

from secureagg import Counts, FixedPoint, Lane, ParameterError, RingElements
from secureagg.homomorphic import mask_slots
from secureagg.lanes import CANARY, RingLane
from secureagg.slots import COEFFICIENT_MODULUS, SLOTS, SlotLane, slot_bits

KEY, OTHER = bytes(range(32)), bytes(32)


# --- the inequality ---


@pytest.mark.parametrize("size", [3, 4, 31, 32, 100, 1000, 10_000, (COEFFICIENT_MODULUS // 2**40 - 3) // 43])
def test_decryption_cannot_fail_at_any_size(size: int) -> None:
    """The slots of every cohort keep t (43 n + 3) within q, and one bit more would not."""
    room = (1 << slot_bits(size)) * (43 * size + 3)
    assert room <= COEFFICIENT_MODULUS < 2 * room


@given(st.integers(40, 52))
def test_the_inequality_decides_at_its_edge(bits: int) -> None:
    """The largest cohort for which the inequality holds has slots of so many bits, one site more has fewer."""
    largest = (COEFFICIENT_MODULUS // 2**bits - 3) // 43
    assert slot_bits(largest) == bits
    if bits > 40:
        assert slot_bits(largest + 1) == bits - 1


def test_too_large_a_cohort_is_refused() -> None:
    """Beyond the narrowest slots there is no sum, and the error has the inequality's numbers."""
    largest = (COEFFICIENT_MODULUS // 2**40 - 3) // 43
    with pytest.raises(ParameterError, match=rf"{largest + 1} sites.*expected at most q = {COEFFICIENT_MODULUS}"):
        slot_bits(largest + 1)


def test_security_margin() -> None:
    """Dimension and modulus are within the homomorphic encryption standard's bound for 128 bits: 109 bits of q for a
    dimension of 4,096, and even its 75 for 192 bits."""
    assert SLOTS == 4096
    assert COEFFICIENT_MODULUS.bit_length() <= 75


# --- layout ---


@st.composite
def lanes(draw: st.DrawFn) -> tuple[SlotLane, int, int]:
    """A lane of any encoding in its slots, with the size of the cohort and the largest weight."""
    cohort_size = draw(st.sampled_from([3, 4, 31, 32, 100, 1000, 10_000]))
    weighted = draw(st.booleans())
    encoding = draw(
        st.one_of(
            st.builds(FixedPoint, value_range=st.just(1.0), value_bits=st.integers(2, 32)),
            st.builds(Counts, maximum=st.integers(1, 2**40)),
            st.builds(RingElements, ring_bits=st.integers(8, 63)),
        )
    )
    weighted = weighted and not isinstance(encoding, RingElements)
    floor = 8 if isinstance(encoding, RingElements) else draw(st.sampled_from([8, 30, 64]))
    lane = Lane(
        name="x", length=draw(st.integers(1, 50)), encoding=encoding, weighted=weighted, minimum_ring_bits=floor
    )
    max_weight = draw(st.integers(1, 200))
    ring_lane = RingLane.for_cohort(lane, cohort_size=cohort_size, max_weight=max_weight)
    bits = slot_bits(cohort_size)
    own = SlotLane.for_cohort(ring_lane, cohort_size=cohort_size, max_weight=max_weight, slot_bits=bits)
    return own, cohort_size, max_weight


@given(lanes(), st.data())
def test_largest_sums_are_exact(case: tuple[SlotLane, int, int], data: st.DataObject) -> None:
    """The whole cohort with the largest, the least or any values in between: each slot's sum stays below the modulus,
    and every total is the sum of the integers."""
    lane, cohort_size, max_weight = case
    length = lane.ring_lane.lane.length
    weight = max_weight if lane.ring_lane.lane.weighted else 1
    match lane.ring_lane.lane.encoding:
        case FixedPoint(levels=levels):
            least, most = -levels * weight, levels * weight
        case Counts(maximum=maximum):
            least, most = 0, maximum * weight
        case _:
            most = ((1 << (lane.ring_lane.ring_bits - 1)) - 1) // cohort_size
            least = -most
    survivors = data.draw(st.integers(1, cohort_size))
    # Everyone but one site has the same value at an index, so that no vector for each of 10,000 is needed.
    common = np.array(data.draw(st.lists(st.sampled_from([least, most, 0]), min_size=length, max_size=length)), object)
    own = np.array(data.draw(st.lists(st.integers(least, most), min_size=length, max_size=length)), object)
    sums = np.zeros(lane.slots, object)
    for values, count in ((common, survivors - 1), (own, 1)):
        written = np.zeros(lane.slots, np.uint64)
        words = (values % (1 << lane.ring_lane.ring_bits)).astype(np.uint64).astype(lane.ring_lane.word)
        lane.write(words, 0, written)
        sums += written.astype(object) * count
    assert max(sums) < 1 << slot_bits(cohort_size)
    read = np.zeros(length, np.uint64)
    lane.read(sums.astype(np.uint64), 0, read)
    assert lane.total(read, survivors=survivors).tolist() == (common * (survivors - 1) + own).tolist()


@given(lanes(), st.integers(1, 60))
def test_pieces_make_the_whole(case: tuple[SlotLane, int, int], step: int) -> None:
    """Slots written and read a few at a time are those written and read at once."""
    lane, _, _ = case
    bound = 1 << min(lane.ring_lane.ring_bits, 62)
    values = np.random.default_rng(step).integers(0, bound, lane.ring_lane.lane.length).astype(lane.ring_lane.word)
    whole, pieces = np.zeros(lane.slots, np.uint64), np.zeros(lane.slots, np.uint64)
    lane.write(values, 0, whole)
    read, read_in_pieces = np.zeros(len(values), np.uint64), np.zeros(len(values), np.uint64)
    lane.read(whole, 0, read)
    for start in range(0, lane.slots, step):
        lane.write(values, start, pieces[start : start + step])
        lane.read(whole[start : start + step], start, read_in_pieces)
    np.testing.assert_array_equal(whole, pieces)
    np.testing.assert_array_equal(read, read_in_pieces)


@pytest.mark.parametrize(("size", "per_slot"), [(3, 2), (16, 2), (32, 2), (100, 2), (1000, 1)])
def test_values_in_a_slot(size: int, per_slot: int) -> None:
    """Two 16-bit values share a slot up to at least 32 sites, so a value takes half of a slot's 8 bytes."""
    lane = RingLane.for_cohort(
        Lane(name="x", length=10, encoding=FixedPoint(value_range=1)), cohort_size=size, max_weight=1
    )
    own = SlotLane.for_cohort(lane, cohort_size=size, max_weight=1, slot_bits=slot_bits(size))
    assert own.per_slot == per_slot


def test_a_whole_rounds_lanes_add_up() -> None:
    """All lanes of a round, written in blocks of ciphertexts and summed, give the totals of the masked backend."""
    parameters = round_parameters(length=200_000)
    layout = parameters.slot_layout
    vectors = [vectors_of(parameters, seed) for seed in range(4)]
    sums = layout.empty_sums()
    assert len(list(layout.blocks())) > 1
    for rows in layout.blocks():
        layout.take_sums(sum(layout.slots_of(vector, rows) for vector in vectors), rows, sums)
    totals = layout.totals(sums, survivors=4)
    for name, ring_lane in parameters.lanes.items():
        expected = np.zeros(ring_lane.lane.length, ring_lane.word)
        for vector in vectors:
            expected += vector[name]
        np.testing.assert_array_equal(totals[name], ring_lane.lift(expected))
    assert totals[CANARY].tolist() == [4]


def test_canary_takes_at_least_64_bits() -> None:
    """The canary's slots have together no fewer bits than its ring, so that wrong masks pass it no more often."""
    layout = round_parameters().slot_layout
    _, canary = layout.lanes[CANARY]
    assert canary.slots * layout.slot_bits >= 64


# --- masks ---


def test_masks_are_the_keystreams_words() -> None:
    """Slot number i of all ciphertexts gets word i of the keystream, 8 bytes, modulo t, whichever ciphertexts are asked
    for; a mask is exactly uniform therefore."""
    layout = round_parameters(length=200_000).slot_layout
    stream = keystream(KEY, "<u8", 5 * SLOTS)
    for sign in (1, -1):
        slots = np.arange(3 * SLOTS, dtype=np.uint64)
        mask_slots(layout, slots, [(KEY, sign)], range(2, 5))
        expected = (np.arange(3 * SLOTS) + sign * stream[2 * SLOTS :].astype(object)) % (1 << layout.slot_bits)
        assert slots.tolist() == expected.tolist()


def test_masks_cancel() -> None:
    """What is added and subtracted again leaves the slots as they were, at both ends of their range too."""
    layout = round_parameters(length=20_000).slot_layout
    slots = np.random.default_rng(0).integers(0, 1 << layout.slot_bits, 2 * SLOTS, dtype=np.uint64)
    slots[:2] = 0, (1 << layout.slot_bits) - 1
    before = slots.copy()
    mask_slots(layout, slots, [(KEY, 1), (OTHER, -1)], range(1, 3))
    assert (slots != before).mean() > 0.99
    mask_slots(layout, slots, [(KEY, -1), (OTHER, 1)], range(1, 3))
    np.testing.assert_array_equal(slots, before)


def test_masks_differ_between_keys_and_ciphertexts() -> None:
    """No mask is seen twice: not under another key, and not in another ciphertext."""
    layout = round_parameters(length=20_000).slot_layout
    masks = np.zeros((2, 2 * SLOTS), np.uint64)
    for row, key in zip(masks, (KEY, OTHER), strict=True):
        mask_slots(layout, row, [(key, 1)], range(2))
    assert len(np.unique(masks)) == masks.size
