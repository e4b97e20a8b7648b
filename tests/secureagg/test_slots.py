"""Lanes as slots, and masks modulo the plaintext modulus; everything of a homomorphic sum but the encryption."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.slots import round_parameters, vectors_of

from secureagg import Counts, FixedPoint, Lane, ParameterError, RingElements, RoundAborted
from secureagg import slots as module
from secureagg.keystream import Keystream
from secureagg.lanes import CANARY, RingLane
from secureagg.slots import (
    COEFFICIENT_MODULUS,
    PLAIN_MODULI,
    ROWS_AT_ONCE,
    SLOTS,
    SlotLane,
    SlotLayout,
    mask_slots,
    plain_modulus,
)

KEY, OTHER = bytes(range(32)), bytes(32)


def is_prime(number: int) -> bool:
    """Miller and Rabin's test with the bases that decide every number below 2^64."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        powers = [pow(base, odd << step, number) for step in range(twos)]
        if powers[0] != 1 and number - 1 not in powers:
            return False
    return True


# --- the inequality ---


def test_moduli_are_the_largest_batching_primes() -> None:
    """Each modulus is prime and 1 modulo 2N, and no larger number of its bits is both."""
    for modulus in (*PLAIN_MODULI, COEFFICIENT_MODULUS):
        above = range(modulus, 1 << modulus.bit_length(), 2 * SLOTS)
        assert modulus % (2 * SLOTS) == 1
        assert [number for number in above if is_prime(number)] == [modulus]


def test_decryption_cannot_fail_at_any_size() -> None:
    """The modulus of every cohort keeps t (43 n + 3) within q, and the next larger one would not."""
    for size in (3, 4, 32, *((COEFFICIENT_MODULUS // t - 3) // 43 + step for t in PLAIN_MODULI for step in (0, 1))):
        if size > (COEFFICIENT_MODULUS // PLAIN_MODULI[-1] - 3) // 43:
            continue
        chosen = plain_modulus(size)
        larger = [t for t in PLAIN_MODULI if t > chosen]
        assert chosen * (43 * size + 3) <= COEFFICIENT_MODULUS
        assert all(t * (43 * size + 3) > COEFFICIENT_MODULUS for t in larger)


def test_too_large_a_cohort_is_refused() -> None:
    """Beyond the last modulus there is no sum, and the error has the inequality's numbers."""
    largest = (COEFFICIENT_MODULUS // PLAIN_MODULI[-1] - 3) // 43
    assert plain_modulus(largest) == PLAIN_MODULI[-1]
    with pytest.raises(ParameterError, match=rf"{largest + 1} sites.*expected at most q = {COEFFICIENT_MODULUS}"):
        plain_modulus(largest + 1)


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
    modulus = plain_modulus(cohort_size)
    own = SlotLane.for_cohort(ring_lane, cohort_size=cohort_size, max_weight=max_weight, modulus=modulus)
    return own, cohort_size, max_weight


@given(lanes(), st.data())
def test_largest_sums_are_exact(case: tuple[SlotLane, int, int], data: st.DataObject) -> None:
    """The whole cohort with the largest, the least or any values in between: each slot's sum stays below the modulus,
    and every total is the sum of the integers."""
    lane, cohort_size, max_weight = case
    length, modulus = lane.ring_lane.lane.length, plain_modulus(cohort_size)
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
        written = np.zeros(lane.slots, np.int64)
        words = (values % (1 << lane.ring_lane.ring_bits)).astype(np.uint64).astype(lane.ring_lane.word)
        lane.write(words, 0, written)
        sums += written.astype(object) * count
    assert max(sums) < modulus
    read = np.zeros(length, np.uint64)
    lane.read(sums.astype(np.int64), 0, read)
    assert lane.total(read, survivors=survivors).tolist() == (common * (survivors - 1) + own).tolist()


@given(lanes(), st.integers(1, 60))
def test_pieces_make_the_whole(case: tuple[SlotLane, int, int], step: int) -> None:
    """Slots written and read a few at a time are those written and read at once."""
    lane, _, _ = case
    bound = 1 << min(lane.ring_lane.ring_bits, 62)
    values = np.random.default_rng(step).integers(0, bound, lane.ring_lane.lane.length).astype(lane.ring_lane.word)
    whole, pieces = np.zeros(lane.slots, np.int64), np.zeros(lane.slots, np.int64)
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
    own = SlotLane.for_cohort(lane, cohort_size=size, max_weight=1, modulus=plain_modulus(size))
    assert own.per_slot == per_slot


def test_a_whole_rounds_lanes_add_up() -> None:
    """All lanes of a round, written in blocks of ciphertexts and summed, give the totals of the masked backend."""
    parameters = round_parameters(length=200_000)
    layout = SlotLayout.of(parameters)
    vectors = [vectors_of(parameters, seed) for seed in range(4)]
    sums = layout.empty_sums()
    assert layout.ciphertexts > ROWS_AT_ONCE
    for rows in layout.blocks():
        layout.take_sums(sum(layout.slots_of(vector, rows) for vector in vectors), rows, sums)
    totals = layout.totals(sums, survivors=4)
    for name, ring_lane in parameters.lanes.items():
        expected = np.zeros(ring_lane.lane.length, ring_lane.word)
        for vector in vectors:
            expected += vector[name]
        np.testing.assert_array_equal(totals[name], ring_lane.lift(ring_lane.reduce(expected)))
    assert totals[CANARY].tolist() == [4]


def test_canary_takes_at_least_64_bits() -> None:
    """The canary's slots have together no fewer bits than its ring, so that wrong masks pass it no more often."""
    layout = SlotLayout.of(round_parameters())
    _, canary = layout.lanes[CANARY]
    assert canary.slots * (layout.modulus.bit_length() - 1) >= 64


# --- masks ---


def reference_mask(key: bytes, row: int, modulus: int) -> list[int]:
    """One ciphertext's mask straight from its definition."""
    words = np.empty(SLOTS + 8, "<u8")
    Keystream(key, offset=row * words.nbytes).fill(words)
    lowest = [int(word) % (1 << modulus.bit_length()) for word in words]
    return [word for word in lowest if word < modulus][:SLOTS]


@pytest.mark.parametrize("modulus", [PLAIN_MODULI[0], PLAIN_MODULI[6], (1 << 40) * 1023 // 1024])
def test_masks_are_the_specified_integers(modulus: int) -> None:
    """A mask is its definition's, whichever ciphertexts it is asked for; also where words are left out, as is common
    with the last of these moduli."""
    slots = np.zeros((3, SLOTS), np.int64)
    mask_slots(slots, [(KEY, 1)], first=2, modulus=modulus)
    assert [row.tolist() for row in slots] == [reference_mask(KEY, row, modulus) for row in (2, 3, 4)]


def test_masks_cancel() -> None:
    """What is added and subtracted again leaves the slots as they were, at both ends of their range too, and for so
    many masks that their plain sum would not fit 64 bits."""
    modulus = PLAIN_MODULI[0]
    slots = np.random.default_rng(0).integers(0, modulus, (1, SLOTS))
    slots[0, :2] = 0, modulus - 1
    before = slots.copy()
    keys = [number.to_bytes(32, "little") for number in range(6000)]
    mask_slots(slots, [(key, 1) for key in keys], first=0, modulus=modulus)
    assert (slots != before).mean() > 0.99
    assert slots.min() >= 0
    assert slots.max() < modulus
    mask_slots(slots, [(key, -1) for key in keys], first=0, modulus=modulus)
    np.testing.assert_array_equal(slots, before)


def test_masks_differ_between_keys_and_ciphertexts() -> None:
    """No mask is seen twice: not under another key, and not in another ciphertext."""
    masks = np.zeros((4, SLOTS), np.int64)
    mask_slots(masks[:2], [(KEY, 1)], first=0, modulus=PLAIN_MODULI[0])
    mask_slots(masks[2:], [(OTHER, 1)], first=0, modulus=PLAIN_MODULI[0])
    assert len(np.unique(masks)) == masks.size


def test_masked_slots_are_uniform() -> None:
    """Masks fill all 64 parts of the range alike: chi-squared, with a false alarm below 1e-6 (and fixed keys)."""
    modulus = PLAIN_MODULI[4]
    slots = np.zeros((ROWS_AT_ONCE, SLOTS), np.int64)
    mask_slots(slots, [(KEY, 1), (OTHER, -1)], first=0, modulus=modulus)
    observed = np.bincount(slots.reshape(-1) * 64 // modulus, minlength=64)
    expected = slots.size / 64
    # The 1 - 1e-6 quantile of chi-squared with 63 degrees of freedom.
    assert ((observed - expected) ** 2 / expected).sum() < 132.2


def test_a_mask_with_too_few_words_ends_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """If more words are left out than there are spare ones, nothing is masked with what is missing."""

    def all_ones(_: Keystream, words: np.ndarray) -> None:
        words[...] = 2**64 - 1

    monkeypatch.setattr(module.Keystream, "fill", all_ones)
    with pytest.raises(RoundAborted, match=f"0 of {SLOTS + 8} words"):
        mask_slots(np.zeros((1, SLOTS), np.int64), [(KEY, 1)], first=0, modulus=PLAIN_MODULI[0])
