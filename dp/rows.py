"""A ledger's rows in files: the SQLite file of the site, and JSON Lines for an officer's machine or a new one.

Nothing here needs the site's secret key.
"""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

from dp.chain import Row, Verification, verify
from dp.errors import LedgerTampered, LedgerUnavailable

SCHEMA: Final = {
    "outbox": "CREATE TABLE outbox (reservation INTEGER PRIMARY KEY, content BLOB NOT NULL)",
    "rows": (
        "CREATE TABLE rows (sequence INTEGER PRIMARY KEY, previous TEXT NOT NULL, body TEXT NOT NULL, "
        "hash TEXT NOT NULL, signature TEXT NOT NULL)"
    ),
}
COLUMNS: Final = "sequence, previous, body, hash, signature"


def read_ledger(path: Path) -> list[Row]:
    """The rows of a ledger's file, unchecked, without changing it; LedgerUnavailable or LedgerTampered if it has
    none."""
    # A file that no program has open may lie where nothing can be written.
    whole = not path.with_name(f"{path.name}-wal").exists()
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' * whole}", uri=True)) as file:
            file.text_factory = text_of
            return [row_of(values) for values in file.execute(f"SELECT {COLUMNS} FROM rows ORDER BY sequence")]  # noqa: S608
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            raise LedgerUnavailable(f"ledger {path}: {error}, expected a ledger that can be read") from error
        raise LedgerTampered(f"ledger {path}: {error}, expected the SQLite file that was written") from error


def write_export(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON Lines; LedgerUnavailable if that fails."""
    try:
        path.write_text("".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows))
    except OSError as error:
        raise LedgerUnavailable(f"export {path}: {error.strerror}, expected a file that can be written") from error


def read_export(path: Path) -> list[Row]:
    """The rows of an exported ledger, unchecked; LedgerUnavailable or LedgerTampered, with the line, if it is none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise LedgerUnavailable(f"export {path}: {error.strerror}, expected a file that can be read") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            rows.append(row_of([values.pop(field.name) for field in fields(Row)]))
            in_form = not values
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            in_form = False
        if not in_form:
            raise LedgerTampered(f"export {path}, line {number}: not a row as a ledger exports it")
    return rows


def verify_export(path: Path, *, head: str | None = None, public_key: bytes | None = None) -> Verification:
    """Check an exported ledger; see ``verify``."""
    return verify(read_export(path), head=head, public_key=public_key)


def restore(export: Path, path: Path, *, head: str | None = None, public_key: bytes | None = None) -> None:
    """Make the ledger's file from an export, after checking it; LedgerUnavailable if there is one already."""
    rows = read_export(export)
    verify(rows, head=head, public_key=public_key).check(f"export {export}")
    # Stops a ledger from being replaced by an older state of itself.
    if path.exists():
        raise LedgerUnavailable(f"ledger {path}: exists already, expected a new file; nothing was restored")
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as file:
            file.execute("PRAGMA journal_mode=WAL")
            file.execute("PRAGMA synchronous=FULL")
            file.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.values():
                file.execute(statement)
            values = [(row.sequence, row.previous, row.body, row.hash, row.signature) for row in rows]
            file.executemany(f"INSERT INTO rows ({COLUMNS}) VALUES (?, ?, ?, ?, ?)", values)  # noqa: S608
            file.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise LedgerUnavailable(f"ledger {path}: {error}, expected a file that can be written") from error


def text_of(data: bytes) -> str:
    """A text column, whatever somebody has put there."""
    return data.decode("utf-8", "replace")


def row_of(values: Sequence[Any]) -> Row:
    """The row of a table's or a line's values, in the order of its fields."""
    sequence, *texts = values
    return Row(int(sequence), *(str(text) for text in texts))
