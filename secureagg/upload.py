"""A masked input on its way: on disk until it is whole, so that one that breaks off leaves no trace in the sum.

This is the one file that the protocol core writes.  It has no name that others could open, and is gone once closed.
"""

import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import IO

import numpy as np

from secureagg.errors import AuthenticationFailed, LocalProtocolError, MalformedMessage, UnexpectedMessage
from secureagg.homomorphic import Bfv, CiphertextSum, check_fresh
from secureagg.keystream import Spread
from secureagg.lanes import Words
from secureagg.messages import MaskedInput
from secureagg.packing import add_packed, check_filling
from secureagg.parameters import RoundParameters
from secureagg.slots import FRESH_BYTES

Sums = Mapping[str, Words] | CiphertextSum  # of masked inputs: for each lane, or of their ciphertexts
Spool = Callable[[], IO[bytes]]  # opens an empty file for reading and writing, as ``tempfile.TemporaryFile`` does


def empty_sums(parameters: RoundParameters) -> Sums:
    """Where the round's inputs are added up, before the first."""
    if parameters.backend == "homomorphic":
        layout = parameters.slot_layout
        return CiphertextSum(Bfv(layout.slot_bits), layout.ciphertexts)
    return {name: np.zeros(lane.masked_length, lane.masked_word) for name, lane in parameters.lanes.items()}


class Upload:
    """The chunks of one masked input, taken in order.  In memory: one chunk while they come, one block while added.

    ``digests``: the SHA-256 of each chunk, which the site has signed.
    """

    def __init__(self, digests: tuple[bytes, ...], *, parameters: RoundParameters, spool: Spool, who: str) -> None:
        """MalformedMessage naming ``who`` unless there are as many chunks as the round's inputs fill."""
        size, lanes = MaskedInput.CHUNK_BYTES, parameters.input_bytes
        # Stops an oversized input before any of it is stored, and a second way to cut the same one.
        if len(digests) != -(-lanes // size):
            raise MalformedMessage(
                f"{who}: {len(digests)} chunks, expected {-(-lanes // size)} for {lanes} bytes of lanes in chunks of "
                f"{size}"
            )
        self.digests = digests
        self._parameters = parameters
        self._taken = 0
        self._file = spool()

    @property
    def whole(self) -> bool:
        """Whether every chunk is in, and everything about the input is checked."""
        return self._taken == len(self.digests)

    def take(self, chunk: bytes, *, who: str) -> None:
        """Store the next chunk, and check the whole once it was the last.

        Raises, naming ``who``, UnexpectedMessage for a chunk out of its place, AuthenticationFailed for one that was
        not signed and MalformedMessage for one of another size, for lanes that are not zero behind their last value
        and for what is no ciphertext.  The upload is of no use then and must be closed.
        """
        digest = sha256(chunk).digest()
        place = f"{who}: chunk {self._taken + 1} of {len(self.digests)}"
        if self.digests[self._taken : self._taken + 1] != (digest,):
            # Nobody's fault: what a broken connection had taken along is missing.
            if digest in self.digests:
                raise UnexpectedMessage(f"{place}: found another chunk of this input in its place")
            raise AuthenticationFailed(f"{place}: a chunk is not the one that was signed")
        expected = min(MaskedInput.CHUNK_BYTES, self._parameters.input_bytes - self._taken * MaskedInput.CHUNK_BYTES)
        if len(chunk) != expected:
            raise MalformedMessage(f"{place}: {len(chunk)} bytes of lanes, expected {expected}")
        self._file.write(chunk)
        self._taken += 1
        if self.whole:
            self._file.flush()
            self._check(who)

    def add_to(self, sums: Sums, *, spread: Spread = map) -> None:
        """Add the whole input to ``sums`` (of masked words modulo the machine word), in place, block by block.

        LocalProtocolError unless it is whole; OSError if the file cannot be read, when a part may have been added.
        """
        if not self.whole:
            raise LocalProtocolError(f"upload: added after {self._taken} of {len(self.digests)} chunks")
        if isinstance(sums, CiphertextSum):
            for number in range(self._parameters.slot_layout.ciphertexts):
                sums.add(number, self._read(number * FRESH_BYTES, FRESH_BYTES), who="upload")
            return
        begin = 0
        for name, ring_lane in self._parameters.lanes.items():

            def read(offset: int, size: int, begin: int = begin) -> bytes:
                return self._read(begin + offset, size)

            add_packed(sums[name], ring_lane, read, spread=spread)
            begin += ring_lane.packed_bytes

    def close(self) -> None:
        """Give the file free, and with it all that has arrived."""
        self._file.close()

    def _check(self, who: str) -> None:
        if self._parameters.backend == "homomorphic":
            for number in range(self._parameters.slot_layout.ciphertexts):
                check_fresh(self._read(number * FRESH_BYTES, FRESH_BYTES), who=f"{who}, ciphertext {number + 1}")
        else:
            end = 0
            for ring_lane in self._parameters.lanes.values():
                end += ring_lane.packed_bytes
                check_filling(ring_lane, self._read(end - 1, 1)[0], who=who)

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"spool file: {len(data)} bytes at {offset}, expected {size}")
        return data
