"""A site's durable memory of the rounds it took part in: what a crash must not make it forget.

SQLite with ``synchronous=FULL``: when a method returns, the fact is on disk, so it is safe to send what depends on it.
"""

import sqlite3
from pathlib import Path

from secureagg import RoundReplayed
from sites.errors import ConfigurationError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS begun (run TEXT PRIMARY KEY, round_number INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS answered (run TEXT NOT NULL, round_number INTEGER NOT NULL, PRIMARY KEY (run, round_number));
"""


class SqliteJournal:
    """The ``secureagg.Journal`` of one site, in one file; may be used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal; ConfigurationError naming the file if it is not one."""
        try:
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise ConfigurationError(
                f"journal {path}: {error}, expected a readable and writable SQLite file"
            ) from error

    def begin(self, run: str, round_number: int) -> None:
        """See ``secureagg.Journal.begin``."""
        # One statement, so that two processes cannot both pass.
        changed = self._database.execute(
            "INSERT INTO begun VALUES (?1, ?2) ON CONFLICT (run) DO UPDATE SET round_number = ?2 WHERE round_number "
            "< ?2",
            (run, round_number),
        ).rowcount
        if changed != 1:
            raise RoundReplayed(f"journal: round {round_number} of run {run} is not above the last one begun")

    def answer(self, run: str, round_number: int) -> None:
        """See ``secureagg.Journal.answer``."""
        try:
            self._database.execute("INSERT INTO answered VALUES (?, ?)", (run, round_number))
        except sqlite3.IntegrityError as error:
            raise RoundReplayed(f"journal: round {round_number} of run {run} was answered before") from error

    def close(self) -> None:
        """Close the file."""
        self._database.close()
