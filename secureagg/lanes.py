"""Lanes: the named vectors of a round, each with its own encoding and its own ring.

A lane's ring is the integers modulo 2^b, where b is the least width in which the sum over the whole cohort cannot wrap
around.  A lane for which no such width exists is refused when it is built; nothing can overflow later.

What is masked, sent and added are words of several values side by side, as many as 64 bits have room for: the values
are the word's digits to the base 2^b, and the sum over all sites has the values' sums as its digits.
"""

import re
from dataclasses import dataclass
from numbers import Real
from operator import index
from typing import Final, SupportsIndex

import numpy as np
import numpy.typing as npt

from secureagg.errors import ParameterError

MINIMUM_RING_BITS: Final = 8
MAXIMUM_RING_BITS: Final = 64
CANARY: Final = "canary"
WEIGHT: Final = "weight"
CLIPPED: Final = "/clipped"

Words = npt.NDArray[np.unsignedinteger]

_NAME = re.compile(r"[a-z][a-z0-9._-]{0,63}(?:/clipped)?")


def integer(value: SupportsIndex, *, what: str) -> int:
    """``value`` as a Python integer, also from numpy's; ParameterError naming ``what`` for anything else."""
    # A numpy integer kept as it is would wrap around in the arithmetic that rules out wrapping.
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise ParameterError(f"{what}: found {value!r}, expected an integer")
    return index(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPoint:
    """Real values in [-value_range, value_range] as integers of ``value_bits`` bits, stochastically rounded.

    A value x becomes x * levels / value_range, rounded up or down at random so that the expectation is exact.
    ``clip``: move values outside the range to its edge and count them in a lane of their own, instead of refusing them.
    """

    value_range: float
    value_bits: int = 16
    clip: bool = False

    def __post_init__(self) -> None:
        found: object = self.value_range
        # Far from these bounds no product or quotient of a range, a level and a total leaves what a double can hold.
        if not isinstance(found, Real) or not 2.0**-100 <= float(found) <= 2.0**100:
            raise ParameterError(f"value_range: found {found!r}, expected a number from 2^-100 to 2^100")
        object.__setattr__(self, "value_bits", integer(self.value_bits, what="value_bits"))
        if not 2 <= self.value_bits <= 32:
            raise ParameterError(f"value_bits: found {self.value_bits}, expected 2 to 32")

    @property
    def levels(self) -> int:
        """The largest encoded integer; the least is its negative."""
        return (1 << (self.value_bits - 1)) - 1

    @property
    def step(self) -> float:
        """The real difference of two neighbouring integers: one quantisation step."""
        return self.value_range / self.levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Integers from 0 to ``maximum``: counts and histograms."""

    maximum: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "maximum", integer(self.maximum, what="counts, maximum"))
        if not 1 <= self.maximum < 1 << 62:
            raise ParameterError(f"counts: found a maximum of {self.maximum}, expected 1 to 2^62 - 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RingElements:
    """Integers modulo 2^``ring_bits``, 8 to 63, encoded by the caller, who answers for their sum fitting the ring.

    For noise that must be added before masking and whose law rounding or clipping would change.
    """

    ring_bits: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "ring_bits", integer(self.ring_bits, what="ring elements, ring_bits"))
        if not MINIMUM_RING_BITS <= self.ring_bits < MAXIMUM_RING_BITS:
            raise ParameterError(f"ring elements: found {self.ring_bits} ring bits, expected 8 to 63")


Encoding = FixedPoint | Counts | RingElements


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One named vector of a round: ``length`` numbers under ``encoding``.

    ``weighted``: each site multiplies its encoded values by its hidden weight.
    ``minimum_ring_bits``: a floor for the ring, above what the sum needs.
    """

    name: str
    length: int
    encoding: Encoding
    weighted: bool = False
    minimum_ring_bits: int = MINIMUM_RING_BITS

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ParameterError(f"lane name {self.name!r}: expected a-z followed by up to 63 of a-z 0-9 . _ -")
        object.__setattr__(self, "length", integer(self.length, what=f"lane {self.name}, length"))
        if not 1 <= self.length < 1 << 40:
            raise ParameterError(f"lane {self.name}: found length {self.length}, expected 1 to 2^40 - 1")
        if not MINIMUM_RING_BITS <= self.minimum_ring_bits <= MAXIMUM_RING_BITS:
            raise ParameterError(
                f"lane {self.name}: found {self.minimum_ring_bits} minimum ring bits, expected 8 to 64"
            )
        # Stops a weight from multiplying noise, and a ring in which a sum would not wrap where its parts did.
        if isinstance(self.encoding, RingElements) and (self.weighted or self.minimum_ring_bits != MINIMUM_RING_BITS):
            raise ParameterError(f"lane {self.name}: ring elements have their own ring and no weight")

    @property
    def signed(self) -> bool:
        """Whether ring elements stand for integers on both sides of 0."""
        return not isinstance(self.encoding, Counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RingLane:
    """A lane together with the ring that holds its sum over a given cohort.

    Machine words are the narrowest unsigned little-endian ones with enough bits.  Arithmetic runs modulo the machine
    word and is reduced at the end: what counts is modulo a power of two that divides it, so the result is the same.
    """

    lane: Lane
    ring_bits: int

    @classmethod
    def for_cohort(cls, lane: Lane, *, cohort_size: int, max_weight: int) -> "RingLane":
        """The least ring in which ``cohort_size`` inputs of weight up to ``max_weight`` cannot wrap.

        Raises ParameterError, with the inequality and its numbers, if that takes more than 64 bits, or if the total
        would not fit a signed 64-bit integer.
        """
        if isinstance(lane.encoding, RingElements):
            return cls(lane=lane, ring_bits=lane.encoding.ring_bits)
        largest = lane.encoding.levels if isinstance(lane.encoding, FixedPoint) else lane.encoding.maximum
        weight = max_weight if lane.weighted else 1
        total = cohort_size * weight * largest
        if total >= 1 << 63:
            raise ParameterError(
                f"lane {lane.name}: a sum can reach sites x weight x value = {cohort_size} x {weight} x {largest} "
                f"= {total}, expected below 2^63 = {1 << 63}; use fewer value bits or a smaller largest weight"
            )
        # Signed totals lie in [-total, total], counts in [0, total].
        states = 2 * total + 1 if lane.signed else total + 1
        needed = (states - 1).bit_length()
        return cls(lane=lane, ring_bits=max(lane.minimum_ring_bits, needed))

    @property
    def word(self) -> np.dtype[np.unsignedinteger]:
        """The machine word that holds one value: an integer modulo the word, negative ones from its top down."""
        return _machine_word(self.ring_bits)

    @property
    def digits(self) -> int:
        """How many values one masked word holds."""
        # Ring elements may wrap in a sum, and would carry into the next digit.
        return 1 if isinstance(self.lane.encoding, RingElements) else 64 // self.ring_bits

    @property
    def masked_bits(self) -> int:
        """Masked words are integers modulo 2 to this."""
        return self.digits * self.ring_bits

    @property
    def masked_word(self) -> np.dtype[np.unsignedinteger]:
        """The machine word that holds one masked word."""
        return _machine_word(self.masked_bits)

    @property
    def masked_length(self) -> int:
        """Masked words of the lane.  Digits of the last one that no value is left for are 0."""
        return -(-self.lane.length // self.digits)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed vector on the wire."""
        return -(-self.masked_length * self.masked_bits // 8)

    def join(self, values: Words) -> Words:
        """New words of which ``values`` are the digits, the first the lowest; not reduced."""
        if self.digits == 1:
            return values.copy()
        integers = values.view(f"<i{values.itemsize}") if self.lane.signed else values
        words = np.zeros(-(-len(values) // self.digits), np.int64)
        wide = np.empty_like(words)  # numpy is faster at copying to another width than at adding across two
        for digit in reversed(range(self.digits)):
            own = integers[digit :: self.digits]
            words <<= self.ring_bits
            wide[: len(own)] = own
            words[: len(own)] += wide[: len(own)]
        return words.view(np.uint64)

    def split(self, words: Words, out: npt.NDArray[np.int64]) -> None:
        """Put the integers that are the digits of ``words`` into ``out``: centred around 0 for a signed lane, from 0 up
        for counts."""
        # With half the base added to each, no digit is negative, and none borrows from the next.
        half = 1 << (self.ring_bits - 1) if self.lane.signed else 0
        halves = sum(half << (digit * self.ring_bits) for digit in range(self.digits))
        wide = words.astype(np.uint64)
        wide += np.uint64(halves)
        integers = out.view(np.uint64)
        for digit in range(self.digits):
            own = integers[digit :: self.digits]
            np.right_shift(wide[: len(own)], np.uint64(digit * self.ring_bits), out=own)
        integers &= np.uint64((1 << self.ring_bits) - 1)
        integers -= np.uint64(half)

    def reduce(self, words: Words) -> Words:
        """Reduce masked words from the machine word to ``masked_bits``, in place."""
        if self.masked_bits < 8 * words.itemsize:
            words &= words.dtype.type((1 << self.masked_bits) - 1)
        return words

    def lift(self, values: Words) -> npt.NDArray[np.int64]:
        """The integers that values modulo 2^``ring_bits`` or any multiple of it stand for: centred around 0 for a
        signed lane, from 0 up for counts."""
        integers = values.astype(np.uint64).view(np.int64)
        integers <<= 64 - self.ring_bits
        if self.lane.signed:
            # The ring's highest bit is the sign now: it comes back with its copies behind it.
            integers >>= 64 - self.ring_bits
        else:
            integers.view(np.uint64)[:] >>= np.uint64(64 - self.ring_bits)
        return integers


def _machine_word(bits: int) -> np.dtype[np.unsignedinteger]:
    for size in (1, 2, 4):
        if bits <= 8 * size:
            return np.dtype(f"<u{size}")
    return np.dtype("<u8")
