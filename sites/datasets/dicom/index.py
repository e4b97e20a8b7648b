"""Which files of a folder are usable images, remembered between runs.

The index is a small SQLite file in the site's state folder.  It holds no path and no identifier: each file is known by
the HMAC of its path, so that only whoever has the folder and the secret can say which file a row is.  A file whose size
and time of change are the same is not read again; one that is gone leaves the index.
"""

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from secureagg.labels import digest
from sites.datasets.dicom.pseudonyms import Pseudonyms, load_merges
from sites.datasets.dicom.records import Found, Header, Headers, Limits, ReadHeaders, Reason, Refused
from sites.datasets.dicom.workers import Workers
from sites.errors import DatasetError

INDEX_FILE: Final = "dicom.sqlite"
FORM: Final = "1"  # of the tables and of what is read from a header
BATCH: Final = 32  # files that a worker reads in one task
_COMMIT_EVERY: Final = 2048
_TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS form (value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS files (file BLOB PRIMARY KEY, size INTEGER NOT NULL, changed INTEGER NOT NULL, "
    "reason TEXT, patient BLOB, by_study INTEGER, study BLOB, series BLOB, instance BLOB, header BLOB) WITHOUT ROWID",
)
_COLUMNS: Final = "file, size, changed, reason, patient, by_study, study, series, instance, header"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedImage:
    """A usable file: where it is, and whose, by pseudonyms; ``file`` and ``version`` tell whether it has changed."""

    path: bytes = field(repr=False)
    file: bytes = field(repr=False)
    version: tuple[int, int] = field(repr=False)
    patient: bytes = field(repr=False)
    study: bytes = field(repr=False)
    series: bytes = field(repr=False)
    instance: bytes = field(repr=False)
    header: Header = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomIndex:
    """What is usable in a folder, and how many files are not, by reason.

    ``read``, ``unchanged``, ``removed``: files that this run has read, did not need to, and has found gone.
    ``patients_by_study``: patients without a PatientID, for whom a study had to stand in: one person may be several of
    these.
    """

    images: list[IndexedImage] = field(repr=False)
    refused: Counter[Reason]
    files: int
    read: int
    unchanged: int
    removed: int
    patients_by_study: int
    limits: Limits
    pseudonyms: Pseudonyms = field(repr=False)
    same_person: Mapping[bytes, bytes] = field(repr=False)

    @property
    def patients(self) -> int:
        """How many patients there are images of."""
        return len({image.patient for image in self.images})


def index_folder(
    folder: Path,
    state: Path,
    *,
    limits: Limits | None = None,
    merges: Path | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> DicomIndex:
    """Index all files below ``folder``; the index and the secret behind its pseudonyms lie in ``state``.

    ``merges``: a CSV of patients who have several numbers (``load_merges``); ``progress``: called with the files done
    and to do.  Raises DatasetError for a folder that cannot be read and an index of another secret; a bad file is
    counted under its Reason, never more.
    """
    limits = limits or Limits()
    # Stops the index, which changes with every run, from being read as one of the files.
    if state.resolve().is_relative_to(folder.resolve()):
        raise DatasetError("DICOM folder: the state folder lies within it, expected one elsewhere")
    pseudonyms = Pseudonyms.of_site(state)
    same_person = {} if merges is None else load_merges(merges, pseudonyms)
    seen, passed_over = _files_in(folder, pseudonyms)
    try:
        with (
            closing(sqlite3.connect(state / INDEX_FILE)) as table,
            nullcontext(workers) if workers else Workers() as pool,
        ):
            (state / INDEX_FILE).chmod(0o600)
            _prepare(table, limits, pseudonyms)
            known = {row[0]: (row[1], row[2]) for row in table.execute("SELECT file, size, changed FROM files")}
            gone = known.keys() - seen.keys()
            table.executemany("DELETE FROM files WHERE file = ?", [(file,) for file in gone])
            fresh = [file for file, (_, *version) in seen.items() if known.get(file) != tuple(version)]
            for done, row in enumerate(_read(fresh, seen, limits, pseudonyms, pool), start=1):
                table.execute(f"INSERT OR REPLACE INTO files ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)", row)  # noqa: S608
                if done % _COMMIT_EVERY == 0:
                    table.commit()  # what was read is not lost when this run is stopped
                if progress is not None:
                    progress(done, len(fresh))
            table.commit()
            images, refused, by_study = _usable(table, seen, same_person)
    except sqlite3.DatabaseError as error:
        raise DatasetError(
            f"{state / INDEX_FILE}: {error}, expected an index that can be written; it may be deleted, to be made anew"
        ) from None
    refused += passed_over
    return DicomIndex(
        images=images,
        refused=+refused,
        files=len(seen) + passed_over.total(),
        read=len(fresh),
        unchanged=len(seen) - len(fresh),
        removed=len(gone),
        patients_by_study=by_study,
        limits=limits,
        pseudonyms=pseudonyms,
        same_person=same_person,
    )


_Seen = dict[bytes, tuple[bytes, int, int]]


def _files_in(folder: Path, pseudonyms: Pseudonyms) -> tuple[_Seen, Counter[Reason]]:
    """Path, size and time of change of each regular file by its pseudonym, and how much else there is."""
    root = os.fsencode(folder.resolve())
    seen: _Seen = {}
    passed_over: Counter[Reason] = Counter()
    todo = [root]
    while todo:
        current = todo.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        found = entry.stat(follow_symlinks=False)
                        # The whole path: archives give many files one date, and folders often have the same names.
                        name = pseudonyms.of(b"file", entry.path)
                        seen[name] = (entry.path, found.st_size, found.st_mtime_ns)
                    else:
                        # Stops a link out of the folder, or in a circle, from bringing in what was not meant.
                        passed_over[Reason.LINK] += 1
        except OSError as error:
            if current == root:
                # Not by its name, which is often a patient's.
                raise DatasetError(f"DICOM folder: cannot be read: {error.strerror}") from None
            passed_over[Reason.FOLDER] += 1
    return seen, passed_over


def _prepare(table: sqlite3.Connection, limits: Limits, pseudonyms: Pseudonyms) -> None:
    """Make the tables, or empty them where they were made with other limits; DatasetError for another secret."""
    for statement in _TABLES:
        table.execute(statement)
    form = [FORM, digest(msgspec.json.encode(limits)).hex(), pseudonyms.fingerprint]
    found = [row[0] for row in table.execute("SELECT value FROM form")]
    if found and found[2:] != form[2:]:
        raise DatasetError(
            "DICOM index: it was made under another secret than the state folder's, which would count patients twice; "
            "put the secret back, or delete the index and all caches"
        )
    if found != form:
        table.execute("DELETE FROM form")
        table.execute("DELETE FROM files")
        table.executemany("INSERT INTO form VALUES (?)", [(value,) for value in form])


def _read(
    files: list[bytes], seen: _Seen, limits: Limits, pseudonyms: Pseudonyms, pool: Workers
) -> Iterator[tuple[object, ...]]:
    """The row of each of ``files``, read by the workers in batches."""
    batches = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    for batch, answers in _headers(batches, seen, limits, pool):
        # Whoever was lost with others is tried alone, so that only one of them is blamed.
        if isinstance(answers, Refused) and len(batch) > 1:
            alone = [[file] for file in batch]
            yield from (
                row for one, found in _headers(alone, seen, limits, pool) for row in _rows(one, found, seen, pseudonyms)
            )
        else:
            yield from _rows(batch, answers, seen, pseudonyms)


def _headers(
    batches: Iterable[list[bytes]], seen: _Seen, limits: Limits, pool: Workers
) -> Iterator[tuple[list[bytes], Headers | Refused]]:
    tasks = ((batch, ReadHeaders([seen[file][0] for file in batch], limits), limits.seconds) for batch in batches)
    for batch, answer in pool.run(tasks):
        whole = isinstance(answer, Refused) or (isinstance(answer, Headers) and len(answer.found) == len(batch))
        yield batch, answer if whole and isinstance(answer, Headers | Refused) else Refused(Reason.CRASHED)


def _rows(
    batch: list[bytes], answer: Headers | Refused, seen: _Seen, pseudonyms: Pseudonyms
) -> Iterator[tuple[object, ...]]:
    answers = answer.found if isinstance(answer, Headers) else [answer] * len(batch)
    for file, found in zip(batch, answers, strict=True):
        yield (file, *seen[file][1:], *_fields(found, pseudonyms))


def _fields(found: Found | Refused, pseudonyms: Pseudonyms) -> tuple[object, ...]:
    if isinstance(found, Refused):
        return (found.reason.name, *[None] * 6)
    named = found.identifiers
    patient = pseudonyms.patient(named)
    if patient is None:
        return (Reason.NO_PATIENT.name, *[None] * 6)
    names = [pseudonyms.of_text(kind, name) for kind, name in _kinds(named.study, named.series, named.instance)]
    return (None, *patient, *names, msgspec.msgpack.encode(found.header))


def _kinds(study: str, series: str, instance: str) -> list[tuple[bytes, str]]:
    return [(b"study", study), (b"series", series), (b"instance", instance)]


def _usable(
    table: sqlite3.Connection, seen: _Seen, same_person: dict[bytes, bytes]
) -> tuple[list[IndexedImage], Counter[Reason], int]:
    """The images, one for each SOP instance; how many files are none, by reason; and patients without a PatientID."""
    counts = table.execute("SELECT reason, COUNT(*) FROM files WHERE reason IS NOT NULL GROUP BY reason")
    refused: Counter[Reason] = Counter({Reason[name]: count for name, count in counts})
    headers = msgspec.msgpack.Decoder(Header)
    instances: dict[bytes, IndexedImage] = {}
    by_study: set[bytes] = set()
    # In the order of the files' pseudonyms: of several files of one instance, always the same one stays.
    for file, size, changed, _, patient, of_study, study, series, instance, header in table.execute(
        f"SELECT {_COLUMNS} FROM files WHERE reason IS NULL ORDER BY file"  # noqa: S608
    ):
        if instance in instances:
            refused[Reason.DUPLICATE] += 1
            continue
        if of_study:
            by_study.add(patient)
        instances[instance] = IndexedImage(
            path=seen[file][0],
            file=file,
            version=(size, changed),
            patient=same_person.get(patient, patient),
            study=study,
            series=series,
            instance=instance,
            header=headers.decode(header),
        )
    return list(instances.values()), refused, len(by_study)
