"""All lanes of a round as one vector of integers modulo t, a power of two: the plaintext of a homomorphic sum.

A plaintext of BFV is a polynomial of N = 4,096 coefficients modulo t, called *slots* here, and adding ciphertexts adds
them.  A site's input becomes slots, the slots get masks, and only then are they encrypted (``homomorphic``).  Slots are
a ring of a power of two like any lane's, so masks are uniform words of a keystream as everywhere: whoever has the key
without the masks learns no more than the coordinator of the masked backend does.

*From ring elements to digits.*  The ring element of a value x of a signed lane stands for x in [-B, B]; x + B, its
digit, is never negative, and the digits of the whole cohort add up to at most 2nB.  Digits of counts are the counts.
As many digits as fit stand in one slot, each with the room that its sum over the cohort needs, so that no carry ever
leaves it; a digit too wide for a slot is cut into parts.  All sums in a slot stay below t, hence they are exact.

*Why decryption cannot fail.*  Let q be the ciphertexts' modulus, n the size of the cohort.  A fresh symmetric
ciphertext (c0, c1) of m has c0 + c1 s = round(q m / t) + e modulo q, in each coefficient, and SEAL draws e as a
difference of two sums of 21 bits (or from a normal clipped at 19.2): |e| <= 21, always.  Rounding adds at most 1/2.
A sum of n of them, to which the coordinator adds one plaintext (once more 1/2), is q M / t + v modulo q, where M
is the sum modulo t and |v| <= 21 n + n/2 + 1/2.  SEAL decrypts x by f = floor(g t x / q), for a 61-bit prime g > q,
and takes the multiple of g nearest to f: that is M if g t |v| / q + 1 <= (g - 1) / 2, which follows from
2 t |v| <= q - 3.  So it is enough that

    t (43 n + 3) <= q,

which holds for every t of ``slot_bits``; no probability is involved.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from secureagg.errors import ParameterError
from secureagg.keystream import block_words
from secureagg.lanes import Counts, FixedPoint, RingLane, Words

SLOTS: Final = 4096  # of one ciphertext, N: with a q of 60 bits, well over 128 bits of security
COEFFICIENT_MODULUS: Final = 2**60 - 16383  # q: the largest prime below 2^60 that is 1 modulo 2N, as SEAL wants it
LARGEST_ERROR: Final = 21  # of one coefficient of a fresh ciphertext
KEY_SEED_BYTES: Final = 64
FRESH_BYTES: Final = 8 * SLOTS + KEY_SEED_BYTES  # of a ciphertext: the seed of c1 is as long as that of a key
SUMMED_BYTES: Final = 2 * 8 * SLOTS
MINIMUM_SLOT_BITS: Final = 40  # 24,000 sites

_WORD: Final = np.dtype("<u8")
_ROWS_AT_ONCE: Final = block_words(_WORD) // SLOTS

Slots = npt.NDArray[np.uint64]


def slot_bits(cohort_size: int) -> int:
    """The bits of a slot, of which t is the power of two: the most with which sums over the cohort always decrypt,
    since more values fit then and nothing gets slower.  ParameterError, with the inequality, for too large a cohort."""
    factor = (2 * LARGEST_ERROR + 1) * cohort_size + 3
    # The largest power of two in q / factor.  Stops sums whose decryption could fail: wrong, and telling of the key.
    bits = (COEFFICIENT_MODULUS // factor).bit_length() - 1
    if bits < MINIMUM_SLOT_BITS:
        raise ParameterError(
            f"homomorphic sum: {cohort_size} sites, found t (43 n + 3) = 2^{MINIMUM_SLOT_BITS} x {factor} = "
            f"{factor << MINIMUM_SLOT_BITS}, expected at most q = {COEFFICIENT_MODULUS}; a decryption could fail"
        )
    return bits


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLane:
    """How one lane's values lie in its slots.

    ``offset``: what makes a value's digit of it; ``digit_bits``: room for a digit's sum over the cohort, or width of a
    part of a digit; ``per_slot``: digits in one slot; ``parts``: slots for one digit.  One of the two is 1.
    Digit number j of a slot s belongs to value j * slots + s, part number j of value i is in slot j * length + i.
    """

    ring_lane: RingLane
    offset: int
    digit_bits: int
    per_slot: int
    parts: int

    @classmethod
    def for_cohort(cls, ring_lane: RingLane, *, cohort_size: int, max_weight: int, slot_bits: int) -> Self:
        """The layout in which no sum over ``cohort_size`` inputs of weight up to ``max_weight`` leaves its place."""
        lane = ring_lane.lane
        weight = max_weight if lane.weighted else 1
        match lane.encoding:
            case FixedPoint(levels=levels):
                offset, largest = weight * levels, 2 * weight * levels
            case Counts(maximum=maximum):
                offset, largest = 0, weight * maximum
            case _:
                # Taken as centred around 0: what noise of many signs adds up to must not show how many were negative.
                offset, largest = 1 << (ring_lane.ring_bits - 1), (1 << ring_lane.ring_bits) - 1
        needed = max(lane.minimum_ring_bits, (cohort_size * largest).bit_length())
        if needed <= slot_bits:
            return cls(ring_lane=ring_lane, offset=offset, digit_bits=needed, per_slot=slot_bits // needed, parts=1)
        # Each part has room for its own sum: n (2^part_bits - 1) < 2^slot_bits.
        part_bits = slot_bits - cohort_size.bit_length()
        parts = -(-max(lane.minimum_ring_bits, largest.bit_length()) // part_bits)
        return cls(ring_lane=ring_lane, offset=offset, digit_bits=part_bits, per_slot=1, parts=parts)

    @property
    def slots(self) -> int:
        """How many slots the lane takes."""
        return -(-self.ring_lane.lane.length // self.per_slot) * self.parts

    def write(self, words: Words, start: int, out: Slots) -> None:
        """Put the digits of the values ``words`` into ``out``: the lane's slots from ``start`` on."""
        for values, place, shift in self._pieces(start, len(out)):
            digits = words[values].astype(np.uint64)
            digits += np.uint64(self.offset)
            digits &= np.uint64((1 << self.ring_lane.ring_bits) - 1)
            if self.parts > 1:
                digits >>= np.uint64(shift)
                digits &= np.uint64((1 << self.digit_bits) - 1)
                out[place] = digits
            else:
                digits <<= np.uint64(shift)
                out[place] |= digits

    def read(self, slots: Slots, start: int, sums: Slots) -> None:
        """Take the sums of digits from ``slots``, the lane's from ``start`` on, into ``sums``, which begin as zeros;
        they are modulo 2^64."""
        for values, place, shift in self._pieces(start, len(slots)):
            if self.parts > 1:
                sums[values] += slots[place] << np.uint64(shift)
            else:
                sums[values] = slots[place] >> np.uint64(shift) & np.uint64((1 << self.digit_bits) - 1)

    def total(self, sums: Slots, *, survivors: int) -> npt.NDArray[np.int64]:
        """The integers that the ``survivors``' ring elements add up to; ``sums`` are used up."""
        sums -= np.uint64(survivors * self.offset % (1 << 64))
        return self.ring_lane.lift(sums)

    def _pieces(self, start: int, count: int) -> Iterator[tuple[slice, slice, int]]:
        """Values of the lane, where their digits are in ``count`` slots from ``start`` on, and how far shifted."""
        length, stop = self.ring_lane.lane.length, start + count
        if self.parts == 1:
            slots = self.slots
            for digit in range(self.per_slot):
                first, last = digit * slots + start, min(digit * slots + stop, length)
                if first < last:
                    yield slice(first, last), slice(0, last - first), digit * self.digit_bits
            return
        for part in range(start // length, -(-stop // length)):
            first, last = max(start, part * length), min(stop, (part + 1) * length)
            values = slice(first - part * length, last - part * length)
            yield values, slice(first - start, last - start), part * self.digit_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLayout:
    """Where the lanes of a round lie among its slots: one after the other, in order of name.

    ``slot_bits``: of t; ``lanes``: lane name -> first slot and layout; ``ciphertexts``: of 4,096 slots each, the last
    one filled up with zeros.
    """

    slot_bits: int
    lanes: Mapping[str, tuple[int, SlotLane]]
    ciphertexts: int

    @classmethod
    def of(cls, ring_lanes: Mapping[str, RingLane], *, cohort_size: int, max_weight: int) -> Self:
        """The layout of a round's lanes; ParameterError if its cohort is too large for exact homomorphic sums."""
        bits, lanes, start = slot_bits(cohort_size), {}, 0
        for name, ring_lane in ring_lanes.items():
            lane = SlotLane.for_cohort(ring_lane, cohort_size=cohort_size, max_weight=max_weight, slot_bits=bits)
            lanes[name] = (start, lane)
            start += lane.slots
        return cls(slot_bits=bits, lanes=MappingProxyType(lanes), ciphertexts=-(-start // SLOTS))

    def blocks(self) -> Iterator[range]:
        """The numbers of the ciphertexts, as many at a time as are worth masking together."""
        for first in range(0, self.ciphertexts, _ROWS_AT_ONCE):
            yield range(first, min(first + _ROWS_AT_ONCE, self.ciphertexts))

    def slots_of(self, vectors: Mapping[str, Words], rows: range) -> Slots:
        """The slots of the ciphertexts ``rows``, one after the other, from each lane's values."""
        slots = np.zeros(len(rows) * SLOTS, _WORD)
        for name, lane, start, place in self._overlaps(rows):
            lane.write(vectors[name], start, slots[place])
        return slots

    def empty_sums(self) -> dict[str, Slots]:
        """Zeros for ``take_sums`` to fill: lane name -> one for each value."""
        return {name: np.zeros(lane.ring_lane.lane.length, np.uint64) for name, (_, lane) in self.lanes.items()}

    def take_sums(self, slots: Slots, rows: range, sums: Mapping[str, Slots]) -> None:
        """Put the sums in ``slots``, those of the ciphertexts ``rows`` without masks, into each lane's ``sums``."""
        for name, lane, start, place in self._overlaps(rows):
            lane.read(slots[place], start, sums[name])

    def totals(self, sums: Mapping[str, Slots], *, survivors: int) -> dict[str, npt.NDArray[np.int64]]:
        """Lane name -> the survivors' exact integer sums; ``sums``, all of them taken, are used up."""
        return {name: lane.total(sums[name], survivors=survivors) for name, (_, lane) in self.lanes.items()}

    def _overlaps(self, rows: range) -> Iterator[tuple[str, SlotLane, int, slice]]:
        """Each lane with slots in ``rows``: its name, the first of these slots in the lane, and their places there."""
        begin, end = rows.start * SLOTS, rows.stop * SLOTS
        for name, (first, lane) in self.lanes.items():
            start, stop = max(first, begin), min(first + lane.slots, end)
            if start < stop:
                yield name, lane, start - first, slice(start - begin, stop - begin)
