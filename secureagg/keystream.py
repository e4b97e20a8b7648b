"""AES-256-CTR as a stream of uniform machine words, and long vectors in parts that several cores can work on.

Every key here is derived for one purpose and used for one stream, so the counter starts at zero each time: a nonce
would have nothing to separate.  A part of a vector reads its own part of the stream, so the result is the same
whatever order the parts are worked on in.
"""

from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from secureagg.lanes import Words

# A block of the accumulator stays in cache while every neighbour's keystream passes over it, and is long enough for a
# second thread to work meanwhile: measured from 32 KiB to 16 MiB.
BLOCK_BYTES: Final = 512 * 1024
_ZEROS = bytes(BLOCK_BYTES)
_AES_BYTES: Final = 16
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


class Keystream:
    """The AES-256-CTR keystream of a 32-byte key, read once from ``offset`` (in bytes, a multiple of 16) to the end."""

    def __init__(self, key: bytes, *, offset: int = 0) -> None:
        counter = (offset // _AES_BYTES).to_bytes(_AES_BYTES, "big")
        self._encryptor = Cipher(AES256(key), CTR(counter)).encryptor()

    def fill(self, words: Words) -> None:
        """Overwrite ``words`` (at most BLOCK_BYTES, contiguous) with the next bytes of the stream, little-endian."""
        raw = words.data.cast("B")
        self._encryptor.update_into(memoryview(_ZEROS)[: len(raw)], raw)


def block_words(word: "np.dtype[np.unsignedinteger]") -> int:
    """Words of ``word`` that make one block."""
    return BLOCK_BYTES // word.itemsize
