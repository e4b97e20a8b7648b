"""Keystreams in one piece."""

import numpy as np

from secureagg.keystream import Keystream, Room
from secureagg.lanes import Words


def keystream(key: bytes, word: str, length: int, *, offset: int = 0) -> Words:
    """``length`` words of the keystream of ``key``, from byte ``offset`` on."""
    room = Room(np.dtype(word), length)
    return Keystream(key, offset=offset).next(room, length)
