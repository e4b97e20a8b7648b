"""A site's durable record of what it has released from its data.

One line of JSON per release, each with the SHA-256 of the line before it, appended and flushed to the disk BEFORE the
data is sampled: whatever happens afterwards, the record says the truth or more.  It belongs to the data, not to a run:
a new run, model, consortium or process continues it.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Final

from dp.errors import LedgerTampered, UnsupportedEvent
from dp.events import PoissonSampledGaussian

_GENESIS: Final = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One entry: which round of which run it was for, and what it was."""

    run: str
    round_number: int
    event: PoissonSampledGaussian


class Ledger:
    """The releases in one file, which is read and verified when opened, and created with the first reservation."""

    def __init__(self, path: Path) -> None:
        """Raise LedgerTampered, naming file and line, unless each line is as it was written, in its place.

        A last line without its end is a reservation that a crash interrupted before anything was sampled; it is cut
        off.
        """
        self._path = path
        self._head = _GENESIS
        self._releases: list[Release] = []
        if path.exists():
            with self._locked():
                pass

    @property
    def releases(self) -> tuple[Release, ...]:
        """All entries, oldest first."""
        return tuple(self._releases)

    @property
    def events(self) -> tuple[PoissonSampledGaussian, ...]:
        """What all entries cost."""
        return tuple(release.event for release in self._releases)

    @property
    def head(self) -> str:
        """SHA-256 of the last line, in hexadecimal: note it elsewhere, and a removed tail shows."""
        return self._head

    def reserve(self, release: Release, *, check: Callable[[], None] = lambda: None) -> None:
        """Record ``release``; when this returns it is on the disk and counts as spent, used or not.

        The file is locked meanwhile and read again, so that what other processes have booked is known.  ``check`` is
        called then, and may raise to refuse the release.
        """
        new = not self._path.exists()
        with self._locked() as file:
            check()
            line = self._line(release)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._head = sha256(line).hexdigest()
            self._releases.append(release)
        if new:
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, open for appending and for this process alone, with what all processes have booked read from it."""
        with self._path.open("ab") as file:
            # Stops two processes that each see room for a release which the budget has only once, and one that takes
            # what another is just writing for the torn line of a crash.
            fcntl.flock(file, fcntl.LOCK_EX)
            self._load()
            yield file

    def _line(self, release: Release) -> bytes:
        fields = {"previous": self._head, "mechanism": type(release.event).__name__, **asdict(release)}
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    def _load(self) -> None:
        self._head, self._releases = _GENESIS, []
        data = self._path.read_bytes()
        *lines, torn = data.split(b"\n")
        if torn:
            with self._path.open("r+b") as file:
                file.truncate(len(data) - len(torn))
                os.fsync(file.fileno())
        for number, line in enumerate(lines, start=1):
            try:
                fields: dict[str, Any] = json.loads(line)
                release = Release(
                    run=fields["run"],
                    round_number=fields["round_number"],
                    event=PoissonSampledGaussian(**fields["event"]),
                )
                same = self._line(release) == line + b"\n"
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError, UnsupportedEvent) as error:
                raise LedgerTampered(f"ledger {self._path}, line {number}: not an entry as it was written") from error
            # Re-encoding repeats the hash of the line before, so an edited, removed or moved line shows here.
            if not same:
                raise LedgerTampered(f"ledger {self._path}, line {number}: altered, or not in its place")
            self._head = sha256(line + b"\n").hexdigest()
            self._releases.append(release)
