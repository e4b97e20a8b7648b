"""Self masks and pairwise masks over one lane.

A masked input is  x_u + self_u + sum over v < u of p_uv - sum over v > u of p_uv  in the lane's ring: the site with the
larger name adds the mask that two sites share, the one with the smaller name subtracts it, so that the sum over both
contains it no more (Bonawitz et al., CCS 2017, section 4).  Rings are powers of two and masks are uniform words, so a
masked input is uniform whatever x_u is.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from secureagg.agreement import pairwise_mask_key, self_mask_key
from secureagg.identity import SiteId
from secureagg.keystream import Keystream, Spread, block_words, in_parts, parts_of
from secureagg.lanes import RingLane, Words
from secureagg.packing import pack
from secureagg.parameters import RoundParameters

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


def apply_masks(words: Words, masks: Iterable[MaskKey], *, spread: Spread = map) -> None:
    """Add or subtract each mask's keystream to ``words`` in place, modulo the word; the caller reduces to the ring."""
    keys = list(masks)
    in_parts(lambda part: _mask(words[part], keys, start=part.start), _parts(words), spread)


def unmasked_total(
    ring_lane: RingLane, words: Words, masks: Iterable[MaskKey], *, spread: Spread = map
) -> npt.NDArray[np.int64]:
    """The integers that ``words`` stand for once ``masks`` are applied to them, in place."""
    keys = list(masks)
    total = np.empty(len(words), np.int64)

    def unmask(part: slice) -> None:
        _mask(words[part], keys, start=part.start)
        total[part] = ring_lane.lift(ring_lane.reduce(words[part]))

    in_parts(unmask, _parts(words), spread)
    return total


def masked_and_packed(
    ring_lane: RingLane, words: Words, masks: Iterable[MaskKey], *, spread: Spread = map
) -> Iterator[bytes]:
    """``words`` under ``masks``, packed, piece by piece; ``words`` stay as they are and no second vector is made."""
    keys = list(masks)
    block = block_words(words.dtype)

    def piece(part: slice) -> bytes:
        own = words[part].copy()
        _mask(own, keys, start=part.start)
        return pack(ring_lane, ring_lane.reduce(own))

    # One block for each thread at a time, however many threads there are.
    yield from spread(piece, [slice(start, min(start + block, len(words))) for start in range(0, len(words), block)])


def _parts(words: Words) -> list[slice]:
    return parts_of(len(words), block_words(words.dtype))


def _mask(words: Words, keys: list[MaskKey], *, start: int) -> None:
    """Apply the keystreams from element ``start`` on: all of them to one block in cache, then to the next."""
    streams = [(Keystream(key, offset=start * words.itemsize), sign) for key, sign in keys]
    block = block_words(words.dtype)
    buffer = np.empty(min(block, len(words)), words.dtype)
    for at in range(0, len(words), block):
        target = words[at : at + block]
        mask = buffer[: len(target)]
        for stream, sign in streams:
            stream.fill(mask)
            if sign > 0:
                target += mask
            else:
                target -= mask
