"""All lanes of a round as one vector of integers modulo a prime t: the plaintext of a homomorphic sum.

BFV with batching adds vectors of N = 4,096 *slots*, integers modulo a prime t with t = 1 modulo 2N.  A site's input
becomes slots, the slots get masks uniform modulo t, and only then are they encrypted (``homomorphic``).  Whoever has
the key without the masks learns therefore no more than the coordinator of the masked backend does: every masked slot
is uniform whatever is below the masks.

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

which holds for every t that ``plain_modulus`` returns; no probability is involved.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from secureagg.errors import ParameterError, RoundAborted
from secureagg.keystream import BLOCK_BYTES, Keystream
from secureagg.lanes import Counts, FixedPoint, RingLane, Words
from secureagg.masking import MaskKey
from secureagg.parameters import RoundParameters

SLOTS: Final = (
    4096  # of one ciphertext, N: a ring of dimension N and a q of 60 bits have well over 128 bits of security
)
COEFFICIENT_MODULUS: Final = 2**60 - 16383  # q: the largest prime below 2^60 that is 1 modulo 2N
LARGEST_ERROR: Final = 21  # of one coefficient of a fresh ciphertext

# Bits -> the largest prime t of so many bits that is 1 modulo 2N, as its distance from the power of two.
_DISTANCES: Final = {
    52: 221183,
    51: 131071,
    50: 16383,
    49: 204799,
    48: 16383,
    47: 81919,
    46: 507903,
    45: 204799,
    44: 16383,
    43: 163839,
    42: 24575,
    41: 65535,
}
PLAIN_MODULI: Final = tuple((1 << bits) - distance for bits, distance in _DISTANCES.items())

# A word of a mask is refused with a chance below 2^-24; that of 4,104 words nine are, is below 2^-125.
_SPARE_WORDS: Final = 8
_ROW_WORDS: Final = SLOTS + _SPARE_WORDS
_ROW_BYTES: Final = 8 * _ROW_WORDS
ROWS_AT_ONCE: Final = BLOCK_BYTES // _ROW_BYTES
_MASKS_BEFORE_REDUCTION: Final = 1 << 10  # of less than 2^52 each, which a signed 64-bit integer holds

Slots = npt.NDArray[np.int64]


def plain_modulus(cohort_size: int) -> int:
    """The largest prime t listed with which sums over the cohort always decrypt: the more bits a slot has, the more
    values fit into it, and nothing gets slower.  ParameterError, with the inequality, if the cohort is too large."""
    factor = (2 * LARGEST_ERROR + 1) * cohort_size + 3
    for modulus in PLAIN_MODULI:
        # Stops a sum whose decryption could fail, which would be wrong and would say something about the key.
        if modulus * factor <= COEFFICIENT_MODULUS:
            return modulus
    raise ParameterError(
        f"homomorphic sum: {cohort_size} sites, found t (43 n + 3) = {PLAIN_MODULI[-1]} x {factor} = "
        f"{PLAIN_MODULI[-1] * factor}, expected at most q = {COEFFICIENT_MODULUS}; a decryption could fail"
    )


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
    def for_cohort(cls, ring_lane: RingLane, *, cohort_size: int, max_weight: int, modulus: int) -> Self:
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
        slot_bits = modulus.bit_length() - 1
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
        """Put the digits of the ring elements ``words``, which must be reduced, into ``out``: the lane's slots from
        ``start`` on."""
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
                out[place] |= digits.view(np.int64)

    def read(self, slots: Slots, start: int, sums: npt.NDArray[np.uint64]) -> None:
        """Take the sums of digits from ``slots``, the lane's from ``start`` on, into ``sums``, which begin as zeros;
        they are modulo 2^64."""
        for values, place, shift in self._pieces(start, len(slots)):
            digits = slots[place].astype(np.uint64)
            if self.parts > 1:
                sums[values] += digits << np.uint64(shift)
            else:
                sums[values] = digits >> np.uint64(shift) & np.uint64((1 << self.digit_bits) - 1)

    def total(self, sums: npt.NDArray[np.uint64], *, survivors: int) -> npt.NDArray[np.int64]:
        """The integers that the ``survivors``' ring elements add up to; ``sums`` are used up."""
        sums -= np.uint64(survivors * self.offset % (1 << 64))
        return self.ring_lane.lift(self.ring_lane.reduce(sums))

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

    ``modulus``: t; ``lanes``: lane name -> first slot and layout; ``ciphertexts``: of 4,096 slots each, the last one
    filled up with zeros.
    """

    modulus: int
    lanes: Mapping[str, tuple[int, SlotLane]]
    ciphertexts: int

    @classmethod
    def of(cls, parameters: RoundParameters) -> Self:
        """The layout of a round; ParameterError if its cohort is too large for exact homomorphic sums."""
        modulus, lanes, start = plain_modulus(len(parameters.cohort)), {}, 0
        for name, ring_lane in parameters.lanes.items():
            lane = SlotLane.for_cohort(
                ring_lane,
                cohort_size=len(parameters.cohort),
                max_weight=parameters.max_weight or 1,
                modulus=modulus,
            )
            lanes[name] = (start, lane)
            start += lane.slots
        return cls(modulus=modulus, lanes=MappingProxyType(lanes), ciphertexts=-(-start // SLOTS))

    def blocks(self) -> Iterator[range]:
        """The numbers of the ciphertexts, as many at a time as are worth masking together."""
        for first in range(0, self.ciphertexts, ROWS_AT_ONCE):
            yield range(first, min(first + ROWS_AT_ONCE, self.ciphertexts))

    def slots_of(self, vectors: Mapping[str, Words], rows: range) -> Slots:
        """The slots of the ciphertexts ``rows``, of shape (rows, 4096), from each lane's reduced ring elements."""
        slots = np.zeros((len(rows), SLOTS), np.int64)
        for name, lane, start, place in self._overlaps(rows):
            lane.write(vectors[name], start, slots.reshape(-1)[place])
        return slots

    def empty_sums(self) -> dict[str, npt.NDArray[np.uint64]]:
        """Zeros for ``take_sums`` to fill: lane name -> one for each value."""
        return {name: np.zeros(lane.ring_lane.lane.length, np.uint64) for name, (_, lane) in self.lanes.items()}

    def take_sums(self, slots: Slots, rows: range, sums: Mapping[str, npt.NDArray[np.uint64]]) -> None:
        """Put the sums in ``slots``, of shape (rows, 4096) and without masks, into those of each lane's values."""
        for name, lane, start, place in self._overlaps(rows):
            lane.read(slots.reshape(-1)[place], start, sums[name])

    def totals(self, sums: Mapping[str, npt.NDArray[np.uint64]], *, survivors: int) -> dict[str, npt.NDArray[np.int64]]:
        """Lane name -> the survivors' exact integer sums; ``sums``, all of them taken, are used up."""
        return {name: lane.total(sums[name], survivors=survivors) for name, (_, lane) in self.lanes.items()}

    def _overlaps(self, rows: range) -> Iterator[tuple[str, SlotLane, int, slice]]:
        """Each lane with slots in ``rows``: its name, the first of these slots in the lane, and their places there."""
        begin, end = rows.start * SLOTS, rows.stop * SLOTS
        for name, (first, lane) in self.lanes.items():
            start, stop = max(first, begin), min(first + lane.slots, end)
            if start < stop:
                yield name, lane, start - first, slice(start - begin, stop - begin)


def mask_slots(slots: Slots, masks: Iterable[MaskKey], *, first: int, modulus: int) -> None:
    """Add or subtract each mask to ``slots`` in place, modulo the prime ``modulus``.

    ``slots``: of shape (rows, 4096), at most ROWS_AT_ONCE rows, those of the ciphertexts from number ``first`` on.

    A mask is exactly uniform: each ciphertext has 4,104 words of 64 bits of the key's AES-256-CTR keystream for its
    own; of each word the lowest bits, as many as t has, are an integer, those that are t or more are left out, and the
    first 4,096 others are the mask.  RoundAborted if there are fewer, with a chance below 2^-125.
    """
    buffer = np.empty((len(slots), _ROW_WORDS), "<u8")
    lowest = np.uint64((1 << modulus.bit_length()) - 1)
    for number, (key, sign) in enumerate(masks, start=1):
        Keystream(key, offset=first * _ROW_BYTES).fill(buffer)
        np.bitwise_and(buffer, lowest, out=buffer)
        if buffer.max() >= modulus:
            for row in buffer:
                _leave_out(row, modulus)
        mask = buffer[:, :SLOTS].view(np.int64)
        if sign > 0:
            slots += mask
        else:
            slots -= mask
        if number % _MASKS_BEFORE_REDUCTION == 0:
            np.remainder(slots, modulus, out=slots)
    np.remainder(slots, modulus, out=slots)


def _leave_out(row: npt.NDArray[np.uint64], modulus: int) -> None:
    """Move the first 4,096 words below ``modulus`` to the front of ``row``."""
    kept = row[row < modulus]
    if len(kept) < SLOTS:
        raise RoundAborted(f"mask: {len(kept)} of {len(row)} words below the modulus, expected {SLOTS}")
    row[:SLOTS] = kept[:SLOTS]
