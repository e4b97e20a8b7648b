"""AES-256-CTR as a stream of uniform machine words, and long vectors in parts that several cores can work on.

Every key here is derived for one purpose and used for one stream, so that no counter block can come twice under it.
Block i of the stream lies in stretch i // STRETCH_BLOCKS; its counter block is the stretch's number as 12 bytes and
2 + i % STRETCH_BLOCKS as 4, big-endian.  That is the layout of GCM, whose code in OpenSSL is much the fastest way to
counter mode on processors with wide AES instructions: a stretch is what GCM encrypts zeros to, the stretch's number
being its nonce.

A part of a vector reads its own part of the stream, so the result is the same whatever order the parts are worked on
in.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from secureagg.errors import LocalProtocolError
from secureagg.lanes import Words

_AES_BYTES: Final = 16
_TAG_BYTES: Final = 16
STRETCH_BYTES: Final = 512 * 1024
STRETCH_BLOCKS: Final = STRETCH_BYTES // _AES_BYTES
_FIRST: Final = 2  # counter of a stretch: GCM has 1 for its tag
_ZEROS = bytes(STRETCH_BYTES)
# A block of the accumulator stays in cache while every neighbour's keystream passes over it, and is long enough for a
# second thread to work meanwhile: measured from 32 KiB to 16 MiB.  Of whole stretches, so that each begins with one.
BLOCK_BYTES: Final = STRETCH_BYTES
_PARTS: Final = 16

_Result = TypeVar("_Result")


class Spread(Protocol):
    """Applies a function to each of several parts: ``map``, or a thread pool's ``map`` on several cores."""

    def __call__(self, function: Callable[[slice], _Result], parts: Iterable[slice], /) -> Iterable[_Result]:
        """The results in the order of the parts."""


def parts_of(length: int, block: int) -> list[slice]:
    """A vector of ``length`` cut into at most 16 parts, each but the last of whole blocks of ``block`` elements."""
    size = max(1, -(-length // (_PARTS * block))) * block
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def in_parts(work: Callable[[slice], None], parts: Iterable[slice], spread: Spread) -> None:
    """Do ``work`` on each part, and return when all of it is done."""
    for _ in spread(work, parts):
        pass


class Room:
    """Memory for ``length`` words of a keystream at a time; behind them GCM puts its tag, which nobody reads."""

    def __init__(self, word: "np.dtype[np.unsignedinteger]", length: int) -> None:
        memory = np.empty(length * word.itemsize + _TAG_BYTES, np.uint8)
        self.raw, self.words = memory.data, memory[:-_TAG_BYTES].view(word)


class Keystream:
    """The AES-256-CTR keystream of a 32-byte key, read once from ``offset`` (in bytes, a multiple of 16) to the end."""

    def __init__(self, key: bytes, *, offset: int = 0) -> None:
        self._gcm = AESGCM(key) if _gcm_is_faster() else None
        self._ctr = partial(Cipher, AES256(key))
        self._position = offset

    def next(self, room: Room, length: int) -> Words:
        """The next ``length`` words of the stream, little-endian, in ``room``: until that is filled again.

        LocalProtocolError after a reading that did not end with a block of 16 bytes: it was the last.
        """
        if self._position % _AES_BYTES:
            raise LocalProtocolError(f"keystream: read on from byte {self._position}, expected a multiple of 16")
        words = room.words[:length]
        done = 0
        while done < words.nbytes:
            stretch, within = divmod(self._position, STRETCH_BYTES)
            size = min(words.nbytes - done, STRETCH_BYTES - within)
            nonce, zeros = stretch.to_bytes(12, "big"), memoryview(_ZEROS)[:size]
            if self._gcm is not None and within == 0:
                self._gcm.encrypt_into(nonce, zeros, None, room.raw[done : done + size + _TAG_BYTES])
            else:
                counter = (_FIRST + within // _AES_BYTES).to_bytes(4, "big")
                self._ctr(CTR(nonce + counter)).encryptor().update_into(zeros, room.raw[done : done + size])
            done += size
            self._position += size
        return words


@cache
def _gcm_is_faster() -> bool:
    """Whether the system names the instructions that OpenSSL's fast code for GCM is made of.  Without them it takes
    half as long again as that for CTR."""
    try:
        named = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return {"vaes", "vpclmulqdq", "avx512vl"} <= set(named)


def block_words(word: "np.dtype[np.unsignedinteger]") -> int:
    """Words of ``word`` that make one block."""
    return BLOCK_BYTES // word.itemsize
