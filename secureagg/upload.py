"""A masked input on its way: on disk until it is whole, so that one that breaks off leaves no trace in the sum.

This is the one file that the protocol core writes.  It has no name that others could open, and is gone once closed.
"""

import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import IO

from secureagg.errors import AuthenticationFailed, LocalProtocolError, MalformedMessage, UnexpectedMessage
from secureagg.keystream import Spread
from secureagg.lanes import Words
from secureagg.messages import MaskedInput
from secureagg.packing import add_packed, check_filling
from secureagg.parameters import RoundParameters

Spool = Callable[[], IO[bytes]]  # opens an empty file for reading and writing, as ``tempfile.TemporaryFile`` does


class Upload:
    """The chunks of one masked input, taken in order.  In memory: one chunk while they come, one block while added.

    ``digests``: the SHA-256 of each chunk, which the site has signed.
    """

    def __init__(self, digests: tuple[bytes, ...], *, parameters: RoundParameters, spool: Spool, who: str) -> None:
        """MalformedMessage naming ``who`` unless there are as many chunks as the round's lanes fill."""
        size, lanes = MaskedInput.CHUNK_BYTES, parameters.packed_bytes
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
        """Store the next chunk, and check the lanes once it was the last.

        Raises, naming ``who``, UnexpectedMessage for a chunk out of its place, AuthenticationFailed for one that was
        not signed and MalformedMessage for one of another size or lanes that are not zero behind their last value.
        The upload is of no use then and must be closed.
        """
        digest = sha256(chunk).digest()
        place = f"{who}: chunk {self._taken + 1} of {len(self.digests)}"
        if self.digests[self._taken : self._taken + 1] != (digest,):
            # Nobody's fault: what a broken connection had taken along is missing.
            if digest in self.digests:
                raise UnexpectedMessage(f"{place}: found another chunk of this input in its place")
            raise AuthenticationFailed(f"{place}: a chunk is not the one that was signed")
        expected = min(MaskedInput.CHUNK_BYTES, self._parameters.packed_bytes - self._taken * MaskedInput.CHUNK_BYTES)
        if len(chunk) != expected:
            raise MalformedMessage(f"{place}: {len(chunk)} bytes of lanes, expected {expected}")
        self._file.write(chunk)
        self._taken += 1
        if self.whole:
            self._file.flush()
            end = 0
            for ring_lane in self._parameters.lanes.values():
                end += ring_lane.packed_bytes
                check_filling(ring_lane, self._read(end - 1, 1)[0], who=who)

    def add_to(self, sums: Mapping[str, Words], *, spread: Spread = map) -> None:
        """Add the whole input to ``sums`` (lane -> running sum modulo the word), in place, block by block.

        LocalProtocolError unless it is whole; OSError if the file cannot be read, when a part may have been added.
        """
        if not self.whole:
            raise LocalProtocolError(f"upload: added after {self._taken} of {len(self.digests)} chunks")
        begin = 0
        for name, ring_lane in self._parameters.lanes.items():

            def read(offset: int, size: int, begin: int = begin) -> bytes:
                return self._read(begin + offset, size)

            add_packed(sums[name], ring_lane, read, spread=spread)
            begin += ring_lane.packed_bytes

    def close(self) -> None:
        """Give the file free, and with it all that has arrived."""
        self._file.close()

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"spool file: {len(data)} bytes at {offset}, expected {size}")
        return data
