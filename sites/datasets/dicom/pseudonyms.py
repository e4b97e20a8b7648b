"""Patients, studies, series, instances and files by names that mean nothing outside the site."""

import csv
import hmac
import secrets
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

from secureagg.labels import frame
from sites.datasets.dicom.records import Identifiers
from sites.errors import ConfigurationError, DatasetError
from sites.files import create_private, read_private

SECRET_FILE: Final = "dicom.secret"  # noqa: S105  a name
SECRET_BYTES: Final = 32
_LABEL: Final = b"secureagg/v1/dicom/"  # of whatever protocol: an index outlives it


class Pseudonyms:
    """HMAC-SHA-256 under the site's secret, with a label for each kind of name.

    A plain hash of a patient's number could be undone by trying all numbers; this cannot, by whoever lacks the secret.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def __repr__(self) -> str:
        return "Pseudonyms(...)"

    @classmethod
    def of_site(cls, state: Path) -> "Pseudonyms":
        """With the secret in the site's state folder, made at the first use; KeyFileError if others can read it."""
        path = state / SECRET_FILE
        try:
            state.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigurationError(f"{state}: cannot be made: {error.strerror}") from error
        if not path.exists():
            create_private(path, secrets.token_bytes(SECRET_BYTES))
        secret = read_private(path)
        if len(secret) != SECRET_BYTES:
            raise DatasetError(f"{path}: found {len(secret)} bytes, expected the {SECRET_BYTES} of a secret")
        return cls(secret)

    def of(self, kind: bytes, *parts: bytes) -> bytes:
        """The pseudonym (32 bytes) of what ``parts`` name."""
        return hmac.digest(self._secret, frame(_LABEL + kind, *parts), "sha256")

    def of_text(self, kind: bytes, *parts: str) -> bytes:
        """The pseudonym of names that differ in case and surrounding blanks only, or not at all."""
        return self.of(kind, *(normal(part).encode("utf-8", "surrogatepass") for part in parts))

    def patient(self, identifiers: Identifiers) -> tuple[bytes, bool] | None:
        """The patient's key, and whether the study had to stand in for a missing PatientID; None without either.

        Keys are of (IssuerOfPatientID, PatientID), since hospitals number their patients independently.
        """
        if normal(identifiers.patient):
            return self.of_text(b"patient", identifiers.issuer, identifiers.patient), False
        if normal(identifiers.study):
            return self.of_text(b"patient-of-study", identifiers.study), True
        return None

    def part_of(self, patient: bytes) -> float:
        """A number in [0, 1) that decides which part of the data a patient is in, the same whoever else is there."""
        return int.from_bytes(self.of(b"split", patient)[:6], "big") / 2**48

    @property
    def fingerprint(self) -> str:
        """What tells whether two secrets are the same."""
        return sha256(self.of(b"secret")).hexdigest()


def normal(name: str) -> str:
    """``name`` without surrounding blanks and padding, whatever its case."""
    return name.strip(" \0\t\r\n").casefold()


def load_merges(path: Path, pseudonyms: Pseudonyms) -> dict[bytes, bytes]:
    """Patients' keys that stand for the same person, each with the key that all of them take.

    A CSV with the columns ``patient`` and ``same_as``, and where issuers are used ``issuer`` and ``same_as_issuer``.
    Raises DatasetError naming line and column.
    """
    first: dict[bytes, bytes] = {}

    def root(key: bytes) -> bytes:
        while (above := first.get(key, key)) != key:
            key = above
        return key

    for line, row in csv_rows(path, what="merge table"):
        if not normal(row.get("patient", "")) or not normal(row.get("same_as", "")):
            raise DatasetError(f"merge table, line {line}: expected something in the columns patient and same_as")
        keys = sorted(
            root(pseudonyms.of_text(b"patient", row.get(issuer, ""), row[patient]))
            for issuer, patient in (("issuer", "patient"), ("same_as_issuer", "same_as"))
        )
        first[keys[1]] = keys[0]
    return {key: root(key) for key in first}


def csv_rows(path: Path, *, what: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields by column of each row of a CSV file; DatasetError that repeats nothing of its content."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames is None or len(set(reader.fieldnames)) != len(reader.fieldnames):
                raise DatasetError(f"{what}: expected a first line that names each column once")
            for row in reader:
                if None in row or None in row.values():
                    raise DatasetError(f"{what}, line {reader.line_num}: expected as many fields as columns")
                yield reader.line_num, {str(name): str(value) for name, value in row.items()}
    except OSError as error:
        raise DatasetError(f"{what}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise DatasetError(f"{what}: not a CSV file in UTF-8") from None
