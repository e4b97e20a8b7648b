"""A site's durable record of what it has released from its data.

It belongs to the data, not to a run: a new run, model, consortium or process continues it.  The life of a release is
reserve (on the disk BEFORE the data is sampled) -> train -> commit (with the hash of the update, and the update itself
in the outbox) -> send -> sent.  Whatever happens in between, the record says the truth or more: a reservation counts
as spent, whether an update came of it or not.  A round that is asked again gets the update that is in the outbox, byte
for byte; one whose update is no longer kept is refused, and one that was only reserved needs a reservation of its own.
So no reservation ever stands for two draws of the noise, and no released round has two.

The rows are chained and signed (``dp.chain``) in one SQLite file, whose transactions are on the disk when they end.
"""

import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from dp.chain import FORMAT, GENESIS, Entry, Kind, Row, Signer, Verification, Verifier, new_row, verify
from dp.errors import LedgerMismatch, LedgerTampered, LedgerUnavailable, ReservationMisused
from dp.events import Event, PoissonSampledDiscreteGaussian, PoissonSampledGaussian, PoissonSampledSkellam
from dp.rows import COLUMNS, SCHEMA, read_export, read_ledger, restore, row_of, text_of, verify_export, write_export

__all__ = [
    "Claim",
    "Committed",
    "Ledger",
    "Release",
    "Reservation",
    "Row",
    "Signer",
    "Verification",
    "events_in",
    "read_export",
    "read_ledger",
    "release_of",
    "restore",
    "verify",
    "verify_export",
    "write_export",
]

BUSY_SECONDS: Final = 60.0
RESERVED: Final = "reserved"  # the decision of a row that counts as spent
_MECHANISMS: Final[dict[str, Callable[..., Event]]] = {
    kind.__name__: kind for kind in (PoissonSampledGaussian, PoissonSampledSkellam, PoissonSampledDiscreteGaussian)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What a site is about to release: which round of which run it is for, and what its mechanism is.

    ``model_sha256``: of the model that training starts from; ``manifest_sha256``: of the consortium's rules;
    ``cohort``: sites in the round; ``threshold`` and ``max_corrupt``: of the secure sum; ``clip_norm``: bound on one
    unit's gradient; ``neighbouring``: what neighbouring data sets differ by.  ``mode``: of privacy.  Of noise that
    sites share: how many ``sites`` it was planned for, of which ``max_dropouts`` may be missing and ``honest`` ones'
    parts at least are not known to the coordinator, and what ``dp.shared.SharedNoisePlan`` says of ``dimensions``,
    ``ring_bits``, ``scale`` and ``local_deviation``.  None: not known to the caller, or not so.
    """

    run: str
    round_number: int
    event: Event
    purpose: str = "train"
    unit: str = "patient"
    neighbouring: str = "add or remove one"
    consortium: str | None = None
    library_version: str | None = None
    model_sha256: str | None = None
    manifest_sha256: str | None = None
    cohort: int | None = None
    threshold: int | None = None
    max_corrupt: int | None = None
    clip_norm: float | None = None
    random_generator: str | None = None
    mode: str | None = None
    sites: int | None = None
    max_dropouts: int | None = None
    honest: int | None = None
    dimensions: int | None = None
    ring_bits: int | None = None
    scale: float | None = None
    local_deviation: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a release was said to cost when it was decided on: ``epsilon`` alone, ``cumulative_epsilon`` with everything
    before it, both at ``delta``, of ``budget_epsilon``; inf where no finite one holds.  ``refused``: why, or None."""

    delta: float
    epsilon: float
    cumulative_epsilon: float
    budget_epsilon: float
    refused: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """The row that admits one draw of the noise for one ``release``."""

    sequence: int
    release: Release
    claim: Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """An update that is finished and not known to be sent; ``reservation``: number of the row that admitted it."""

    reservation: int
    release: Release
    update_sha256: str


class Ledger:
    """The releases from one data set, in one file, which is verified when opened and created if it is not there.

    Several processes may have one file open; an object belongs to the thread that made it.
    """

    def __init__(
        self,
        path: Path,
        *,
        dataset: str,
        site: str,
        signer: Signer,
        unit: str = "patient",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``dataset``: fingerprint of the training data (SHA-256, hexadecimal); ``unit``: of privacy; ``site``: its
        name; ``signer``: its identity.

        Raises LedgerTampered, naming file and row, unless each row is as it was written and in its place,
        LedgerMismatch if the ledger is of other data, another unit or another site, and LedgerUnavailable if it cannot
        be read.
        """
        self._path = path
        self._signer = signer
        self._clock = clock
        self._verifier = Verifier()
        self._opening: Entry = {}
        self._reserved: dict[int, Release] = {}
        self._released: dict[tuple[str, int, str | None], int] = {}
        self._unsent: dict[int, Committed] = {}
        self._own: set[int] = set()
        opening = {"dataset": dataset, "unit": unit, "site": site, "public_key": signer.public_key.hex()}
        with self._reported():
            self._database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            self._open(opening)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @property
    def releases(self) -> tuple[Release, ...]:
        """Everything that is reserved, and so counts as released, oldest first."""
        return tuple(self._reserved.values())

    @property
    def events(self) -> tuple[Event, ...]:
        """What all of it cost."""
        return tuple(release.event for release in self._reserved.values())

    @property
    def unsent(self) -> tuple[Committed, ...]:
        """The updates that are in the outbox, oldest first."""
        return tuple(self._unsent.values())

    @property
    def head(self) -> str:
        """Hash of the last row, in hexadecimal: note it elsewhere, and a removed tail shows."""
        last = self._verifier.last
        return GENESIS if last is None else last.hash

    def refresh(self) -> None:
        """Read what other processes have written since."""
        with self._transaction("DEFERRED"):
            pass

    def reserve(self, release: Release, judge: Callable[[Sequence[Release]], Claim]) -> Reservation:
        """Record ``release`` as spent, or as refused, by what ``judge`` makes of it and of everything before it.

        When this returns the row is on the disk.  No other process can write meanwhile, so that two never both get what
        the budget has only once.  For ``BudgetGuard``, which is what decides.
        """
        # Stops a release that protects something else than what this ledger counts.
        if release.unit != self._opening["unit"]:
            raise LedgerMismatch(f"{self._who}: a release per {release.unit}, expected one per {self._opening['unit']}")
        with self._transaction("IMMEDIATE"):
            claim = judge(self.releases)
            row = self._append("reserve", {**_release_fields(release), **_claim_fields(claim)})
        self._take(row)
        if claim.refused is None:
            self._own.add(row.sequence)
        return Reservation(sequence=row.sequence, release=release, claim=claim)

    def commit(self, reservation: Reservation, update: bytes) -> Committed:
        """Record the hash of the finished ``update`` and keep its bytes; both are on the disk when this returns, and
        only then may it be sent.

        Earlier updates of the same run are dropped: their rounds are over.  Raises ReservationMisused for a
        reservation that this object did not make or that has its update, and for a round that has one already.
        """
        number, digest = reservation.sequence, sha256(update).hexdigest()
        # Stops a second draw under one reservation, by this process or by one that was restarted.
        if number not in self._own:
            raise ReservationMisused(
                f"{self._who}: update {digest[:16]}... for row {number}, expected an open reservation that was "
                "made here; a round that is trained again needs one of its own"
            )
        self._own.discard(number)
        with self._transaction("IMMEDIATE"):
            # Stops two processes from each releasing an update of their own for one round.
            if (first := self._released.get(_round_of(reservation.release))) is not None:
                raise ReservationMisused(
                    f"{self._who}: update {digest[:16]}... for round {reservation.release.round_number} of run "
                    f"{reservation.release.run}, which has the one that row {first} admitted"
                )
            row = self._append("commit", {"reservation": number, "update_sha256": digest})
            over = [(number,) for number in self._superseded_by(reservation.release.run)]
            self._database.executemany("DELETE FROM outbox WHERE reservation = ?", over)
            self._database.execute("INSERT INTO outbox VALUES (?, ?)", (number, update))
        self._take(row)
        return self._unsent[number]

    def committed(self, *, run: str, round_number: int, model_sha256: str | None) -> Committed | None:
        """The update that is in the outbox for this round from this model, or None if it never had one.

        Raises ReservationMisused if it had one that is no longer kept: it was sent, or a later round took its place.
        """
        self.refresh()
        number = self._released.get((run, round_number, model_sha256))
        if number is None:
            return None
        # Stops a second draw of the noise for a round that was released: the mean of two has less of it.
        if number not in self._unsent:
            raise ReservationMisused(
                f"{self._who}: round {round_number} of run {run} was released by row {number} and its update is no "
                "longer kept; a released round is not trained again"
            )
        return self._unsent[number]

    def update(self, committed: Committed) -> bytes:
        """The bytes that were committed, to be sent again; LedgerTampered if they are gone or others."""
        with self._reported():
            found = self._database.execute(
                "SELECT content FROM outbox WHERE reservation = ?", (committed.reservation,)
            ).fetchone()
        content = found[0] if found is not None and isinstance(found[0], bytes) else b""
        digest, expected = sha256(content).hexdigest(), committed.update_sha256
        # Stops an update that was exchanged on the disk.
        if digest != expected:
            raise LedgerTampered(
                f"{self._who}, outbox of row {committed.reservation}: {len(content)} bytes with SHA-256 "
                f"{digest[:16]}..., expected the update with {expected[:16]}..."
            )
        return content

    def mark_sent(self, committed: Committed, realised: Entry | None = None) -> None:
        """Record that an update went out, and delete its bytes; nothing happens if that was done before.

        ``realised``: what is known of the sum that it became part of.
        """
        with self._transaction("IMMEDIATE"):
            if committed.reservation not in self._unsent:
                return
            known = {"realised": realised} if realised else {}
            row = self._append("sent", {"reservation": committed.reservation, **known})
            self._database.execute("DELETE FROM outbox WHERE reservation = ?", (committed.reservation,))
        self._take(row)

    def record(self, kind: Literal["audit", "note"], content: Entry) -> None:
        """Add a row that costs nothing: the result of an audit, or what somebody wants to be found here."""
        with self._transaction("IMMEDIATE"):
            row = self._append(kind, {"content": content})
        self._take(row)

    def export(self, path: Path) -> None:
        """Write all rows as JSON Lines, for ``verify_export`` elsewhere; the outbox stays here."""
        with self._transaction("DEFERRED"):
            rows = self._rows()
        write_export(path, rows)

    # --- the file ---

    @property
    def _who(self) -> str:
        return f"ledger {self._path}"

    def _open(self, expected: dict[str, str]) -> None:
        with self._reported():
            (mode,) = self._database.execute("PRAGMA journal_mode=WAL").fetchone()
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.text_factory = text_of
        if mode != "wal":
            raise LedgerUnavailable(f"{self._who}: journal mode {mode}, expected wal; keep it on a local disk")
        row = None
        with self._transaction("IMMEDIATE", new=True):
            if self._verifier.last is None:
                fields = {**expected, "ledger": secrets.token_hex(16), "format": FORMAT}
                row = self._append("open", fields)
        if row is not None:
            self._take(row)
        found = {name: self._opening.get(name) for name in expected}
        # Stops the budget of one data set from being spent on another, and a ledger that another site has written.
        for name, value in expected.items():
            if found[name] != value:
                raise LedgerMismatch(
                    f"{self._who}: {name.replace('_', ' ')}: found {str(found[name])[:64]}, expected {value}; a ledger "
                    "is of one data set, one unit, one site"
                )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Errors of the database as errors of the ledger."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise LedgerUnavailable(f"{self._who}: {error}, expected a file that can be read and written") from error
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.ProgrammingError):
                raise
            raise LedgerTampered(f"{self._who}: {error}, expected the SQLite file that was written") from error

    @contextmanager
    def _transaction(self, kind: Literal["IMMEDIATE", "DEFERRED"], *, new: bool = False) -> Iterator[None]:
        """One transaction that begins with reading what is new; it is on the disk in the end, or has not happened.

        IMMEDIATE excludes all other writers.  ``new``: the tables are made if the file has none.
        """
        with self._reported():
            self._database.execute(f"BEGIN {kind}")
            try:
                self._check_tables(new=new)
                self._read_new()
                yield
                self._database.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # the error that ended it may have rolled it back
                    self._database.execute("ROLLBACK")
                raise

    def _check_tables(self, *, new: bool) -> None:
        found = dict(self._database.execute("SELECT name, sql FROM sqlite_master"))
        if new and not found:
            for statement in SCHEMA.values():
                self._database.execute(statement)
        # Stops triggers that undo what is written, and tables that were taken away and begun anew.
        elif found != SCHEMA:
            differing = sorted(name for name in found.keys() | SCHEMA.keys() if found.get(name) != SCHEMA.get(name))
            raise LedgerTampered(f"{self._who}: {', '.join(differing)} altered, expected the tables rows and outbox")
        # Stops a ledger whose rows were all removed from passing for a new one.
        elif self._verifier.last is None and self._database.execute("SELECT count(*) FROM rows").fetchone() == (0,):
            raise LedgerTampered(f"{self._who}, row 1: is missing: there are no rows")

    def _rows(self, where: str = "1") -> list[Row]:
        found = self._database.execute(f"SELECT {COLUMNS} FROM rows WHERE {where} ORDER BY sequence")  # noqa: S608
        return [row_of(values) for values in found]

    def _read_new(self) -> None:
        """Take the rows behind the last one that is known, which must still be there."""
        last = self._verifier.last
        if last is not None:
            # Stops a tail that is removed while this program runs.
            if self._rows(f"sequence = {last.sequence}") != [last]:
                raise LedgerTampered(f"{self._who}, row {last.sequence}: is missing or altered since it was last read")
            rows = self._rows(f"sequence > {last.sequence}")
        else:
            rows = self._rows()
        for row in rows:
            self._take(row)
        if rows:
            self._verifier.found().check(self._who)

    def _append(self, kind: Kind, content: Mapping[str, object]) -> Row:
        """Insert one row; it is to be taken when the transaction is over."""
        last = self._verifier.last
        entry = {
            "ledger": self._opening.get("ledger"),
            **content,
            "kind": kind,
            "sequence": 1 if last is None else last.sequence + 1,
            "time": self._clock().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        row = new_row(entry, previous=self.head, signer=self._signer)
        self._database.execute(
            f"INSERT INTO rows ({COLUMNS}) VALUES (?, ?, ?, ?, ?)",  # noqa: S608
            (row.sequence, row.previous, row.body, row.hash, row.signature),
        )
        return row

    # --- what the rows say ---

    def _take(self, row: Row) -> None:
        entry = self._verifier.take(row)
        if entry is None:
            self._verifier.found().check(self._who)
        else:
            try:
                self._apply(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise LedgerTampered(
                    f"{self._who}, row {row.sequence}: signed, but not as this version writes it: {error}"
                ) from error

    def _apply(self, entry: Entry) -> None:
        match entry["kind"]:
            case "open":
                self._opening = entry
            case "reserve":
                if entry["decision"] == RESERVED:
                    self._reserved[entry["sequence"]] = release_of(entry)
            case "commit":
                number, digest = entry["reservation"], entry["update_sha256"]
                release = self._reserved[number]
                if _round_of(release) in self._released:
                    raise ValueError(f"a second update of round {release.round_number} of run {release.run}")
                for over in self._superseded_by(release.run):
                    del self._unsent[over]
                self._released[_round_of(release)] = number
                self._unsent[number] = Committed(reservation=number, release=release, update_sha256=digest)
            case "sent":
                del self._unsent[entry["reservation"]]

    def _superseded_by(self, run: str) -> list[int]:
        return [number for number, committed in self._unsent.items() if committed.release.run == run]


def events_in(path: Path) -> tuple[Event, ...]:
    """What all that is reserved in a ledger's file cost, for whoever has no key: nothing is changed, all is checked.

    Raises LedgerUnavailable if it cannot be read, LedgerTampered if it is not as the site wrote it.
    """
    checked = verify(read_ledger(path))
    checked.check(f"ledger {path}")
    reserved = (entry for entry in checked.entries if entry["kind"] == "reserve" and entry["decision"] == RESERVED)
    return tuple(release_of(entry).event for entry in reserved)


def _round_of(release: Release) -> tuple[str, int, str | None]:
    return release.run, release.round_number, release.model_sha256


def _release_fields(release: Release) -> dict[str, object]:
    known = {name: value for name, value in asdict(release).items() if value is not None}
    return {**known, "event": {"mechanism": type(release.event).__name__, **asdict(release.event)}}


def release_of(entry: Entry) -> Release:
    """The release that a verified row of kind "reserve" describes."""
    known = {field.name: entry[field.name] for field in fields(Release) if field.name in entry}
    event = dict(entry["event"])
    return Release(**{**known, "event": _MECHANISMS[event.pop("mechanism")](**event)})


def _claim_fields(claim: Claim) -> dict[str, object]:
    """A claim as a row's fields; JSON has no infinity, so that one is written as its name."""
    numbers = {name: value for name, value in asdict(claim).items() if value is not None}
    written = {name: str(value) if value == float("inf") else value for name, value in numbers.items()}
    return {**written, "decision": RESERVED if claim.refused is None else "refused"}
