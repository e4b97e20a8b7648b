"""AES-256-CTR as a stream of uniform machine words.

Every key here is derived for one purpose and used for one stream, so the counter starts at zero each time: a nonce
would have nothing to separate.
"""

from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from secureagg.lanes import Words

# A block of the accumulator stays in cache while every neighbour's keystream passes over it; 16 MiB blocks lose a
# third.
BLOCK_BYTES: Final = 256 * 1024
_ZEROS = bytes(BLOCK_BYTES)
_AES_BYTES: Final = 16


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
