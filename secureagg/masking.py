"""Self masks and pairwise masks over one lane.

A masked input is  x_u + self_u + sum over v < u of p_uv - sum over v > u of p_uv,  word by word, modulo a power of two:
the site with the larger name adds the mask that two sites share, the one with the smaller name subtracts it, so that
the sum over both contains it no more (Bonawitz et al., CCS 2017, section 4).  Masks are uniform words, so a masked
input is uniform whatever x_u is.  A word of x_u has several values for its digits, see ``lanes``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from secureagg.agreement import pairwise_mask_key, self_mask_key
from secureagg.identity import SiteId
from secureagg.keystream import Keystream, Room, Spread, block_words, in_parts, parts_of
from secureagg.lanes import RingLane, Words
from secureagg.packing import pack
from secureagg.parameters import RoundParameters

SLOTS_LANE: Final = "/slots"  # in place of a lane's name, for the slots of a homomorphic sum, which hold all lanes

MaskKey = tuple[bytes, int]  # a 32-byte AES key, and +1 to add its keystream or -1 to subtract it


def pairwise_sign(site: SiteId, neighbour: SiteId) -> int:
    """+1 if ``site`` adds the mask it shares with ``neighbour``, -1 if it subtracts it."""
    return 1 if site > neighbour else -1


def masks_of_input(
    parameters: RoundParameters, *, site: SiteId, lane: str, self_seed: bytes, secrets: Mapping[SiteId, bytes]
) -> list[MaskKey]:
    """What ``site`` adds to one lane: its self mask, and a pairwise mask for each neighbour's agreed secret."""
    masks = [(self_mask_key(parameters, self_seed, lane=lane, site=site), 1)]
    for neighbour, secret in secrets.items():
        key = pairwise_mask_key(parameters, secret, lane=lane, one=site, other=neighbour)
        masks.append((key, pairwise_sign(site, neighbour)))
    return masks


def apply_masks(words: Words, masks: Iterable[MaskKey], *, start: int = 0, spread: Spread = map) -> None:
    """Add or subtract each mask's keystream to ``words`` in place, modulo the machine word; the caller reduces them.

    ``start``: which element of the masked vector ``words`` begin with, a multiple of 16.
    """
    keys = list(masks)

    def mask(part: slice) -> None:
        apply = _masks_from(keys, slice(part.start + start, part.stop + start), words.dtype)
        for block in _blocks(part, words.dtype):
            apply(words[block])

    in_parts(mask, _parts(words), spread)


def unmasked_total(
    ring_lane: RingLane, words: Words, masks: Iterable[MaskKey], *, spread: Spread = map
) -> npt.NDArray[np.int64]:
    """The integers that are the digits of masked words once ``masks`` are applied to these, in place."""
    keys = list(masks)
    total = np.empty(ring_lane.lane.length, np.int64)

    def unmask(part: slice) -> None:
        apply = _masks_from(keys, part, words.dtype)
        for block in _blocks(part, words.dtype):
            apply(words[block])
            ring_lane.split(words[block], total[_values(ring_lane, block)])

    in_parts(unmask, _parts(words), spread)
    return total


def masked_and_packed(
    ring_lane: RingLane, values: Words, masks: Iterable[MaskKey], *, spread: Spread = map
) -> Iterator[memoryview]:
    """Words of ``values`` under ``masks``, packed, piece by piece; ``values`` stay as they are and no second vector is
    made."""
    keys, word = list(masks), ring_lane.masked_word

    def piece(block: slice) -> memoryview:
        words = ring_lane.join(values[_values(ring_lane, block)])
        _masks_from(keys, block, word)(words)
        return pack(ring_lane, ring_lane.reduce(words))

    # One block for each thread at a time, however many threads there are.
    yield from spread(piece, _blocks(slice(0, ring_lane.masked_length), word))


def _values(ring_lane: RingLane, block: slice) -> slice:
    """Where the digits of a block of words lie among the lane's values."""
    return slice(block.start * ring_lane.digits, min(block.stop * ring_lane.digits, ring_lane.lane.length))


def _parts(words: Words) -> list[slice]:
    return parts_of(len(words), block_words(words.dtype))


def _blocks(part: slice, word: "np.dtype[np.unsignedinteger]") -> Iterator[slice]:
    """``part`` cut into blocks that stay in cache for all that is done to them."""
    block = block_words(word)
    for start in range(part.start, part.stop, block):
        yield slice(start, min(start + block, part.stop))


def _masks_from(keys: list[MaskKey], part: slice, word: "np.dtype[np.unsignedinteger]") -> Callable[[Words], None]:
    """A function that applies all keystreams to the first block of ``part``, and to the next at its next call."""
    streams = [(Keystream(key, offset=part.start * word.itemsize), sign) for key, sign in keys]
    room = Room(word, min(block_words(word), part.stop - part.start))

    def apply(block: Words) -> None:
        for stream, sign in streams:
            mask = stream.next(room, len(block))
            if sign > 0:
                block += mask
            else:
                block -= mask

    return apply
