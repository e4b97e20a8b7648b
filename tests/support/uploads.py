"""Masked inputs in pieces, and spool files that a test can look at."""

from tempfile import TemporaryFile
from typing import IO

import msgspec

from secureagg import Coordinator, SiteId
from secureagg.homomorphic import CiphertextSum
from secureagg.messages import MaskedInput, ShareDelivery
from secureagg.upload import Sums
from support.rounds import StoppedRound


class Spools:
    """Opens spool files, and remembers them."""

    def __init__(self) -> None:
        self.files: list[IO[bytes]] = []

    def __call__(self) -> IO[bytes]:
        """A new one."""
        self.files.append(TemporaryFile())  # noqa: SIM115 - who asked for it closes it
        return self.files[-1]

    @property
    def open(self) -> int:
        """How many are not closed."""
        return sum(not file.closed for file in self.files)


class Uploading(StoppedRound):
    """A round whose masked inputs are due: ``inputs_of`` has each site's, ``spools`` the coordinator's files."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.spools = Spools()
        self.coordinator = Coordinator(parameters=self.parameters, spool=self.spools)
        self.deliver(self.until(ShareDelivery))
        self.inputs_of: dict[SiteId, MaskedInput] = dict(self.pending)

    def begin(self, site: SiteId) -> MaskedInput:
        """Give the coordinator the header of a site's masked input; returns the whole."""
        message = self.inputs_of[site]
        self.coordinator.receive(header_of(message), sender=site)
        return message

    def sums(self) -> list[bytes | None]:
        """The running sums as they are."""
        return bytes_of(self.coordinator.phase.sums)

    def check_release(self, survivors: list[SiteId]) -> None:
        """Run the rest honestly: the sum is exactly that of ``survivors``, and no file is left open."""
        self.finish()
        self.check_sum(survivors)
        assert self.spools.open == 0


def bytes_of(sums: Sums) -> list[bytes | None]:
    """The running sums of lanes or of ciphertexts, as they are."""
    if isinstance(sums, CiphertextSum):
        return [None if one is None else sums.ciphertext(number) for number, one in enumerate(sums._sums)]
    return [words.tobytes() for words in sums.values()]


def header_of(message: MaskedInput) -> MaskedInput:
    """The masked input without its chunks, as it travels."""
    return msgspec.structs.replace(message, chunks=())
