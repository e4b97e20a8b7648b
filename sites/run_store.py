"""What a coordinator must not forget: which run and round it is in, and the model that the finished rounds made.

Facts are in SQLite with ``synchronous=FULL``: a round is begun on disk before anybody hears of it, and finished on disk
before the next one begins, so that after a crash no round is counted twice and no number is used again.  The model and
what the server optimizer remembers lie beside it in a file of their own for each round, named in the database with its
SHA-256; the last round's file goes when the next one's is there.  `rounds.jsonl` is the log for people to read: the
database's records, one a line.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Final

from secureagg import SiteId
from sites.errors import ConfigurationError
from sites.files import write_atomic
from sites.manifest import Manifest

DATABASE: Final = "run.sqlite"
LOG: Final = "rounds.jsonl"

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, manifest BLOB NOT NULL, rules BLOB NOT NULL, begun INTEGER NOT NULL, over TEXT,
    model_name BLOB NOT NULL, file TEXT, file_sha256 BLOB, holders TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (run TEXT NOT NULL, number INTEGER NOT NULL, record BLOB NOT NULL,
    PRIMARY KEY (run, number));
CREATE TABLE IF NOT EXISTS excluded (run TEXT NOT NULL, site TEXT NOT NULL, code TEXT NOT NULL,
    PRIMARY KEY (run, site));
"""

_LAST_RUN: Final = (
    "SELECT run, manifest, rules, begun, model_name, file, file_sha256, holders, over FROM runs"  # as `_checkpoint`
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The global model after a round: its ``name``; ``optimizer``: the model with what the server optimizer remembers,
    None where only the sites have it; ``holders``: the sites that have it then."""

    name: bytes
    optimizer: bytes | None
    holders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where a run stands.

    ``begun``: number of the last round that was begun, 0 for none; ``finished``: of the last one that has a record;
    ``model``: that this led to; ``excluded``: site -> code of the error that proves it misbehaved.
    """

    run: str
    begun: int
    finished: int
    model: Model
    excluded: dict[SiteId, str]


class RunStore:
    """The state folder of one coordinator; one process at a time."""

    def __init__(self, folder: Path) -> None:
        """Open or make ``folder``; ConfigurationError naming the file that is damaged, or that another coordinator
        uses."""
        self._folder = folder
        self._path = folder / DATABASE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_SCHEMA)
            # Takes the lock that is kept from now on.
            self._database.executescript("BEGIN IMMEDIATE; COMMIT")
            found = self._database.execute("PRAGMA quick_check").fetchone()[0]
        except (sqlite3.Error, OSError) as error:
            raise self._damaged(str(error)) from error
        if found != "ok":
            raise self._damaged(str(found).splitlines()[0])

    def unfinished(self, manifest: Manifest) -> Checkpoint | None:
        """Where the last run stands, if it is not over; ConfigurationError if it is under rules that do not go on under
        this manifest, and naming the file that is missing or not what it was."""
        with self._errors():
            row = self._database.execute(f"{_LAST_RUN} WHERE over IS NULL").fetchone()
            if row is None:
                return None
            run, found, rules, *_ = row
            # Stops a run from being dropped in silence when a coordinator is started with another manifest.
            if not manifest.continues(found, rules):
                raise ConfigurationError(
                    f"{self._path}: run {run} is not over, under the manifest with digest {found.hex()[:16]}..., "
                    f"expected that one or its next revision; found {manifest.digest.hex()[:16]}...; --new-run drops it"
                )
            if found != manifest.digest:
                self._database.execute("UPDATE runs SET manifest = ? WHERE run = ?", (manifest.digest, run))
            return self._checkpoint(*row)

    def finished(self, manifest: Manifest) -> Checkpoint | None:
        """How the last run ended, if it is over, under this manifest or the one before it; else None."""
        with self._errors():
            row = self._database.execute(f"{_LAST_RUN} ORDER BY rowid DESC LIMIT 1").fetchone()
            if row is None or row[-1] is None or not manifest.continues(row[1], row[2]):
                return None
            return self._checkpoint(*row)

    def _checkpoint(
        self,
        run: str,
        _manifest: bytes,
        _rules: bytes,
        begun: int,
        model_name: bytes,
        file: str | None,
        digest: bytes,
        holders: str,
        _over: str | None,
    ) -> Checkpoint:
        excluded = dict(self._database.execute("SELECT site, code FROM excluded WHERE run = ?", (run,)))
        finished = self._database.execute("SELECT max(number) FROM rounds WHERE run = ?", (run,)).fetchone()[0]
        return Checkpoint(
            run=run,
            begun=begun,
            finished=finished or 0,
            model=Model(
                name=model_name,
                optimizer=None if file is None else self._read(file, digest),
                holders=tuple(holders.split()),
            ),
            excluded=excluded,
        )

    def start(self, run: str, manifest: Manifest, model: Model) -> None:
        """Begin a run from this model; any other one that was not over is."""
        file, digest = self._write(run, 0, model)
        with self._errors(), self._transaction():
            self._database.execute("UPDATE runs SET over = 'abandoned' WHERE over IS NULL")
            self._database.execute(
                "INSERT INTO runs VALUES (?, ?, ?, 0, NULL, ?, ?, ?, ?)",
                (run, manifest.digest, manifest.rules, model.name, file, digest, " ".join(sorted(model.holders))),
            )
        self._forget_files(file)

    def begin(self, run: str, number: int) -> None:
        """Note that a round begins; returns once it is on disk."""
        with self._errors():
            self._database.execute("UPDATE runs SET begun = ? WHERE run = ?", (number, run))

    def finish(
        self,
        run: str,
        number: int,
        record: bytes,
        moved: Model | None = None,
        excluded: Mapping[SiteId, str] = MappingProxyType({}),
    ) -> None:
        """Note how a round ended, ``record`` being its line of the log, the model if it moved, and who is ``excluded``
        by then: all or nothing."""
        file, digest = (None, None) if moved is None else self._write(run, number, moved)
        with self._errors(), self._transaction():
            self._database.execute("INSERT INTO rounds VALUES (?, ?, ?)", (run, number, record))
            rows = [(run, site, code) for site, code in excluded.items()]
            self._database.executemany("INSERT OR IGNORE INTO excluded VALUES (?, ?, ?)", rows)
            if moved is not None:
                self._database.execute(
                    "UPDATE runs SET model_name = ?, file = ?, file_sha256 = ?, holders = ? WHERE run = ?",
                    (moved.name, file, digest, " ".join(sorted(moved.holders)), run),
                )
        self._append([record])
        if moved is not None:
            self._forget_files(file)

    def end(self, run: str, code: str) -> None:
        """Note that a run is over, and how."""
        with self._errors():
            self._database.execute("UPDATE runs SET over = ? WHERE run = ?", (code, run))

    def complete_log(self) -> None:
        """Give the log the lines that a crash kept from it, and cut off a piece of one."""
        path = self._folder / LOG
        with self._errors():
            records = [row[0] for row in self._database.execute("SELECT record FROM rounds ORDER BY rowid")]
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_atomic(path, whole)
        known = set(whole.split(b"\n"))
        self._append([record for record in records if record not in known])

    def close(self) -> None:
        """Let go of the folder."""
        self._database.close()

    # --- files ---

    def _append(self, records: list[bytes]) -> None:
        with (self._folder / LOG).open("ab") as log:
            log.writelines(record + b"\n" for record in records)

    def _write(self, run: str, number: int, model: Model) -> tuple[str | None, bytes | None]:
        if model.optimizer is None:
            return None, None
        name = f"optimizer-{run}-{number}.safetensors"
        write_atomic(self._folder / name, model.optimizer)
        return name, sha256(model.optimizer).digest()

    def _read(self, file: str, digest: bytes) -> bytes:
        path = self._folder / file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror}, expected the model of the run that goes on") from error
        if sha256(data).digest() != digest:
            raise ConfigurationError(
                f"{path}: damaged, {len(data)} bytes that are not those that were written; restore it, or move "
                f"{self._path} away to begin a new run"
            )
        return data

    def _forget_files(self, kept: str | None) -> None:
        for path in self._folder.glob("optimizer-*.safetensors"):
            if path.name != kept:
                with suppress(OSError):
                    path.unlink()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"state of the coordinator {self._path}: {what}, expected an intact file that no other coordinator uses"
        )
