"""Floats to ring integers and back.

Encoding is the only place where a site's numbers meet the protocol.  It refuses what its lane does not allow and says
where and by how much, never what the value was.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from secureagg.errors import ParameterError, ShapeMismatch, ValueOutOfRange
from secureagg.identity import Entropy
from secureagg.keystream import Keystream, Room, Spread, in_parts, parts_of
from secureagg.lanes import CANARY, CLIPPED, WEIGHT, Counts, FixedPoint, Lane, RingElements, RingLane, Words, integer
from secureagg.parameters import RoundParameters

__all__ = ["Counts", "EncodedInput", "FixedPoint", "Lane", "RingElements", "decode_total", "encode_input"]

_UINT32, _INT32, _INT64 = np.dtype("<u4"), np.dtype("<i4"), np.dtype("<i8")
# The block's buffers stay in cache, and a second thread has time to work; a multiple of the cipher's 16 bytes.
_BLOCK_VALUES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedInput:
    """One site's lanes as integers modulo each lane's word, not yet masked: as secret as the update itself."""

    vectors: Mapping[str, Words] = field(repr=False)


def encode_input(
    parameters: RoundParameters,
    values: Mapping[str, npt.ArrayLike],
    *,
    weight: int | None = None,
    entropy: Entropy = os.urandom,
    spread: Spread = map,
) -> EncodedInput:
    """Encode ``values`` (lane name -> 1-D array) for a round; adds the canary, the weight and the clip counts itself.

    ``weight``: an integer from 0 to the round's ``max_weight``; given exactly when the round has one.  ``spread`` puts
    the work on several cores, see ``keystream``.
    Raises ParameterError for missing or unknown lanes or an unfit weight, ShapeMismatch for a wrong length and
    ValueOutOfRange for a value that is not finite or, unless the lane clips, out of range.
    """
    automatic = {CANARY, WEIGHT, *(name for name in parameters.lanes if name.endswith(CLIPPED))}
    expected = set(parameters.lanes) - automatic
    if set(values) != expected:
        raise ParameterError(f"lanes: found {sorted(values)}, expected {sorted(expected)}")
    if (weight is None) != (parameters.max_weight is None):
        wanted = "no weight" if parameters.max_weight is None else f"one from 0 to {parameters.max_weight}"
        raise ParameterError(f"weight: found {'none' if weight is None else 'one'}, expected {wanted}")
    weight = None if weight is None else integer(weight, what="weight")
    if weight is not None and parameters.max_weight is not None and not 0 <= weight <= parameters.max_weight:
        # The weight itself is private to the site; say which side it is on.
        side = "below 0" if weight < 0 else f"above {parameters.max_weight}"
        raise ValueOutOfRange(f"weight: found a value {side}, expected 0 to {parameters.max_weight}")

    vectors: dict[str, Words] = {}
    for name in sorted(expected):
        ring_lane = parameters.lanes[name]
        lane = ring_lane.lane
        array = np.asarray(values[name])
        if array.shape != (lane.length,):
            raise ShapeMismatch(f"lane {name}: found shape {array.shape}, expected ({lane.length},)")
        if isinstance(lane.encoding, FixedPoint):
            vectors[name], clipped = _encode_fixed_point(ring_lane, lane.encoding, array, entropy(32), spread)
            if lane.encoding.clip:
                vectors[name + CLIPPED] = _single(parameters.lanes[name + CLIPPED], clipped)
        else:
            most = lane.encoding.maximum if isinstance(lane.encoding, Counts) else (1 << ring_lane.ring_bits) - 1
            vectors[name] = _encode_integers(ring_lane, array, most=most)
        if lane.weighted and weight is not None:
            vectors[name] *= vectors[name].dtype.type(weight)
    if weight is not None:
        vectors[WEIGHT] = _single(parameters.lanes[WEIGHT], weight)
    vectors[CANARY] = _single(parameters.lanes[CANARY], 1)
    return EncodedInput(vectors=vectors)


def decode_total(
    ring_lane: RingLane,
    total: npt.NDArray[np.int64],
    *,
    survivors: int,
    weight: int | None,
    spread: Spread = map,
) -> npt.NDArray[np.float64]:
    """The mean that an exact integer ``total`` stands for, as float64 in the lane's units.

    The divisor is the survivors' summed ``weight`` for a weighted lane, else their number.
    """
    lane = ring_lane.lane
    divisor = weight if lane.weighted and weight is not None else survivors
    if divisor == 0:
        raise ParameterError(
            f"lane {lane.name}: the survivors' weights add up to 0, so their weighted mean is undefined"
        )
    unit = lane.encoding.step if isinstance(lane.encoding, FixedPoint) else 1.0
    mean = np.empty(len(total))

    def decode_part(part: slice) -> None:
        np.divide(total[part], divisor, out=mean[part])
        mean[part] *= unit

    in_parts(decode_part, parts_of(len(total), _BLOCK_VALUES), spread)
    return mean


def _encode_fixed_point(
    ring_lane: RingLane, encoding: FixedPoint, values: npt.NDArray[np.generic], coin_key: bytes, spread: Spread
) -> tuple[Words, int]:
    """The integers of ``values`` and how many were clipped; block by block, so that memory stays at one block."""
    if not np.issubdtype(values.dtype, np.floating) and not np.issubdtype(values.dtype, np.integer):
        raise ParameterError(f"lane {ring_lane.lane.name}: found dtype {values.dtype}, expected real numbers")
    words = np.empty(values.shape, ring_lane.word)

    def encode_part(part: slice) -> int:
        coins = Keystream(coin_key, offset=part.start * _UINT32.itemsize)
        buffers = _Buffers(min(_BLOCK_VALUES, part.stop - part.start))
        clipped = 0
        for start in range(part.start, part.stop, _BLOCK_VALUES):
            block = slice(start, min(start + _BLOCK_VALUES, part.stop))
            clipped += _encode_block(ring_lane, encoding, values[block], words[block], coins, start, buffers)
        return clipped

    return words, sum(spread(encode_part, parts_of(len(values), _BLOCK_VALUES)))


class _Buffers:
    """Memory for one block, used again for the next: fresh memory costs more than the arithmetic on it."""

    def __init__(self, size: int) -> None:
        self.scaled, self.fixed, self.coins = np.empty(size), np.empty(size, _INT64), Room(_UINT32, size)


def _encode_block(
    ring_lane: RingLane,
    encoding: FixedPoint,
    values: npt.NDArray[np.generic],
    words: Words,
    coins: Keystream,
    start: int,
    buffers: _Buffers,
) -> int:
    """Write the integers of one block, which begins at index ``start``, into ``words``; returns how many were
    clipped."""
    size = len(values)
    scaled, fixed = buffers.scaled[:size], buffers.fixed[:size]
    scaled[:] = values
    clipped = 0
    # Two comparisons that a NaN fails too; only then is it worth finding out what is wrong.
    if not (float(values.max()) <= encoding.value_range and float(values.min()) >= -encoding.value_range):
        clipped = _clip(ring_lane.lane.name, encoding, scaled, start)
    unit, edge = encoding.levels / encoding.value_range * 2.0**32, encoding.levels * 2.0**32
    scaled *= unit
    if unit * encoding.value_range > edge:  # by one ulp
        np.clip(scaled, -edge, edge, out=scaled)
    np.ceil(scaled, out=scaled)
    np.copyto(fixed, scaled, casting="unsafe")
    # x - coin / 2^32, rounded up: above x with probability equal to its fraction, to within 2^-32.  The upper half of
    # an integer is the integer divided by 2^32 and rounded down, so the difference is taken the other way round.
    np.subtract(coins.next(buffers.coins, size), fixed, out=fixed)
    np.negative(fixed.view(_INT32)[1::2], out=words.view(f"<i{words.itemsize}"), casting="unsafe")
    return clipped


def _clip(name: str, encoding: FixedPoint, block: npt.NDArray[np.float64], start: int) -> int:
    """Move the values of ``block`` that are out of range to its edge, and return how many; or raise for the first."""
    unfit = ~np.isfinite(block)
    if unfit.any():
        index = start + int(np.flatnonzero(unfit)[0])
        raise ValueOutOfRange(
            f"lane {name}, index {index}: found a value that is not finite, expected finite numbers",
            lane=name,
            index=index,
        )
    outside = np.flatnonzero(np.abs(block) > encoding.value_range)
    if not encoding.clip:
        first = int(outside[0])
        excess = float(abs(block[first]) - encoding.value_range)
        raise ValueOutOfRange(
            f"lane {name}, index {start + first}: found a magnitude {excess:.3g} above the range, "
            f"expected at most {encoding.value_range:g}",
            lane=name,
            index=start + first,
        )
    np.clip(block, -encoding.value_range, encoding.value_range, out=block)
    return len(outside)


def _encode_integers(ring_lane: RingLane, values: npt.NDArray[np.generic], *, most: int) -> Words:
    """``values``, which must all be integers from 0 to ``most``, as they are."""
    name = ring_lane.lane.name
    if not np.issubdtype(values.dtype, np.integer):
        raise ParameterError(f"lane {name}: found dtype {values.dtype}, expected integers")
    outside: npt.NDArray[np.bool_] = np.less(values, 0) | np.greater(values, most)
    if outside.any():
        index = int(np.flatnonzero(outside)[0])
        side = "below 0" if np.less(values[index], 0) else f"above {most}"
        raise ValueOutOfRange(
            f"lane {name}, index {index}: found an integer {side}, expected 0 to {most}",
            lane=name,
            index=index,
        )
    return values.astype(ring_lane.word)


def _single(ring_lane: RingLane, value: int) -> Words:
    return np.array([value], ring_lane.word)
