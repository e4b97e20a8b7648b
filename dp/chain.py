"""The rows of a ledger: each holds its predecessor's hash and the site's signature, and can be checked anywhere.

A row's body is canonical JSON.  Its hash is SHA-256 over a label, the hash of the row before it and the body, each
preceded by its length; the site signs the hash (Ed25519).  So a row that is edited, moved, taken out or brought in from
elsewhere shows, unless it is the last one that is taken out: for that somebody else has to hold the head, the hash of
the last row.  Checking needs no torch, no secret key and no database.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from typing import Any, Final, Literal, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dp.errors import LedgerTampered

LABEL: Final = b"secureagg/v1/ledger"
FORMAT: Final = 1
GENESIS: Final = "0" * 64
SHOWN: Final = 16

Kind = Literal["open", "reserve", "commit", "sent", "audit", "note"]
KINDS: Final[tuple[Kind, ...]] = ("open", "reserve", "commit", "sent", "audit", "note")
Tampering = Literal["empty", "edited", "signature", "other key", "other ledger", "moved", "removed", "tail removed"]
Entry = Mapping[str, Any]


class Signer(Protocol):
    """A site's identity, as far as a ledger needs it."""

    @property
    def public_key(self) -> bytes:
        """The 32-byte Ed25519 public key."""

    def sign(self, label: bytes, part: bytes, /) -> bytes:
        """64-byte Ed25519 signature over ``framed(label, part)``."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is stored; ``previous`` and ``hash`` (32 bytes) and ``signature`` (64 bytes) in hexadecimal."""

    sequence: int
    previous: str
    body: str
    hash: str
    signature: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with row number ``row``, counted from 1."""

    row: int
    what: Tampering
    text: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.text}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found in a ledger: its first row's fields (empty without one), those of all readable rows, the hash of
    the last row, and everything that is wrong, by row."""

    opening: Entry
    entries: tuple[Entry, ...]
    head: str
    problems: tuple[Problem, ...]

    def check(self, who: str) -> None:
        """Raise LedgerTampered, naming ``who`` and the first problem, unless there is none."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise LedgerTampered(f"{who}, {self.problems[0]}{more}")


def framed(*parts: bytes) -> bytes:
    """Join ``parts``, each preceded by its length as 8 bytes, little-endian, as everything is that a site signs."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def canonical(fields: Entry) -> str:
    """``fields`` as JSON with sorted keys, no white space, ASCII only; ValueError for a number that JSON has not."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)


def hash_of(previous: str, body: str) -> bytes:
    """A row's hash (32 bytes)."""
    return sha256(framed(LABEL, previous.encode(), body.encode("utf-8", "surrogatepass"))).digest()


def new_row(entry: Entry, *, previous: str, signer: Signer) -> Row:
    """The row of ``entry``, which has its ``sequence``, signed."""
    body = canonical(entry)
    hashed = hash_of(previous, body)
    return Row(entry["sequence"], previous, body, hashed.hex(), signer.sign(LABEL, hashed).hex())


def verify(rows: Iterable[Row], *, head: str | None = None, public_key: bytes | None = None) -> Verification:
    """Check all ``rows``, in their order, and say what was found; raises nothing, see ``Verification.check``.

    ``head``: noted elsewhere earlier; a ledger that still has this row has lost none of those before it.
    ``public_key``: of the site that the ledger must be of; without it, the one that the ledger names is believed.
    """
    verifier = Verifier(public_key)
    for row in rows:
        verifier.take(row)
    return verifier.found(head)


class Verifier:
    """Checks rows one after the other, so that a ledger that grows is not read again from its beginning."""

    def __init__(self, public_key: bytes | None = None) -> None:
        self._expected_key = public_key
        self._key: Ed25519PublicKey | None = None
        self._opening: Entry = {}
        self._last: Row | None = None
        self._entries: list[Entry] = []
        self._hashes: set[str] = set()
        self._seen: set[int] = set()
        self._problems: list[Problem] = []

    @property
    def last(self) -> Row | None:
        """The row that was taken last."""
        return self._last

    def take(self, row: Row) -> Entry | None:
        """Check the next row, and return its fields if it is sound."""
        before, authentic = len(self._problems), False
        entry = self._fields(row)
        if entry is None:
            self._note(row, "edited", "is not canonical JSON as a ledger writes it")
        else:
            if not self._opening:
                self._open(row, entry)
            authentic = self._check(row, entry)
            self._entries.append(entry)
        # A row that was moved is where it belongs, and missing nowhere; of any other only its place is known.
        self._seen.add(entry["sequence"] if entry is not None and authentic else row.sequence)
        self._hashes.add(row.hash)
        self._last = row
        return entry if len(self._problems) == before else None

    def found(self, head: str | None = None) -> Verification:
        """What has been found in all rows taken."""
        problems = list(self._problems)
        if self._last is None:
            problems.append(Problem(1, "empty", "is missing: there are no rows"))
        present = {number for number in self._seen if number >= 1}
        if missing := max(present, default=0) - len(present):
            first = next(number for number in count(1) if number not in present)
            others = f", and {missing - 1} more" if missing > 1 else ""
            problems.append(Problem(first, "removed", f"is missing{others}"))
        # Stops a removed tail, which leaves a chain that is whole.
        if head is not None and head not in self._hashes:
            last = 0 if self._last is None else self._last.sequence
            text = f"is missing: no row has the noted head {head[:SHOWN]}..., the last one here is row {last}"
            problems.append(Problem(last + 1, "tail removed", text))
        ordered = sorted(problems, key=lambda problem: problem.row)
        return Verification(
            opening=self._opening,
            entries=tuple(self._entries),
            head=GENESIS if self._last is None else self._last.hash,
            problems=tuple(ordered),
        )

    def _note(self, row: Row, what: Tampering, text: str) -> None:
        self._problems.append(Problem(row.sequence, what, text))

    @staticmethod
    def _fields(row: Row) -> Entry | None:
        """The fields of a row that is in the form in which a ledger writes it."""
        try:
            entry = json.loads(row.body)
            in_form = (
                canonical(entry) == row.body
                and isinstance(entry["ledger"], str)
                and type(entry["sequence"]) is int
                and entry["kind"] in KINDS
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return entry if in_form else None

    def _open(self, row: Row, entry: Entry) -> None:
        """Take the key and the ledger's name from the first row."""
        self._opening = entry
        named = entry.get("public_key")
        try:
            self._key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(named if isinstance(named, str) else ""))
        except ValueError:
            self._note(row, "edited", "opens no ledger: it names no public key")
        else:
            # Stops a ledger that somebody else has written and signed from its first row on.
            if self._expected_key is not None and named != self._expected_key.hex():
                text = (
                    f"the ledger is of the key {str(named)[:SHOWN]}..., expected {self._expected_key.hex()[:SHOWN]}..."
                )
                self._note(row, "other key", text)
        if (entry["kind"], entry.get("format")) != ("open", FORMAT):
            self._note(row, "edited", f"found kind {entry['kind']} and format {entry.get('format')}, expected open, 1")

    def _check(self, row: Row, entry: Entry) -> bool:
        """Whether the row is one of this ledger, wherever it stands."""
        name, number, last = self._opening["ledger"], entry["sequence"], self._last
        # Stops rows of another ledger, even of the same site.
        if entry["ledger"] != name:
            text = f"belongs to the ledger {entry['ledger'][:SHOWN]}..., expected one of {name[:SHOWN]}..."
            self._note(row, "other ledger", text)
            return False
        hashed = hash_of(row.previous, row.body)
        # Stops a row that was edited, if its hash was left as it was ...
        if hashed.hex() != row.hash:
            self._note(row, "edited", "its contents are not those that were hashed and signed")
            return False
        # ... and if it was made to fit.
        if self._key is not None and not _signed(self._key, row.signature, hashed):
            key = self._opening["public_key"][:SHOWN]
            self._note(row, "signature", f"is not signed by the ledger's key {key}...: edited, or signed by another")
            return False
        expected = GENESIS if last is None else last.hash
        # Stops rows in another order, and a row a second time.
        if number != row.sequence or (last is not None and number <= last.sequence):
            place = row.sequence if last is None or last.sequence < row.sequence else last.sequence + 1
            self._note(row, "moved", f"row {number} of this ledger stands in the place of row {place}")
        # Stops two ends of one ledger, such as those of a restored backup, from being joined.
        elif row.previous != expected and (last is None or number == last.sequence + 1):
            text = f"follows a row with the hash {row.previous[:SHOWN]}..., found {expected[:SHOWN]}... before it"
            self._note(row, "moved", text)
        return True


def _signed(key: Ed25519PublicKey, signature: str, hashed: bytes) -> bool:
    try:
        key.verify(bytes.fromhex(signature), framed(LABEL, hashed))
    except (InvalidSignature, ValueError):
        return False
    return True
