"""What is to be learned: targets from a CSV file, missing ones as NaN."""

from dataclasses import dataclass, field
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Final, Literal

import msgspec

from sites.datasets.dicom.index import DicomIndex, IndexedImage
from sites.datasets.dicom.pseudonyms import csv_rows, normal
from sites.errors import DatasetError

KEYS: Final = ("patient", "study", "series", "instance")
Kind = Literal["classification", "ordinal", "regression"]


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One column of the CSV: its name, what kind of target it is, and the names of its classes, an ordinal's from the
    least up; a regression has none.  Raises DatasetError for one that cannot be."""

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        needed = self.kind != "regression"
        if needed != (len(self.classes) >= 2) or len(set(map(normal, self.classes))) != len(self.classes):
            raise DatasetError(
                f"target {self.name}, {self.kind}: found {len(self.classes)} classes, expected "
                f"{'at least 2, all different' if needed else 'none'}"
            )

    @classmethod
    def parse(cls, text: str) -> "Target":
        """From the command line: ``NAME=a,b`` for classes, ``NAME=a<b<c`` for an ordinal, ``NAME`` for a number."""
        name, equals, classes = text.partition("=")
        if not equals:
            return cls(name, "regression")
        ordinal = "<" in classes
        return cls(name, "ordinal" if ordinal else "classification", tuple(classes.split("<" if ordinal else ",")))

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for it: one for a number or two classes, one less than an ordinal's classes
        (a logit of "above this one" each), else one for each class."""
        if self.kind == "regression":
            return 1
        return len(self.classes) - 1 if self.kind == "ordinal" or len(self.classes) == 2 else len(self.classes)

    def value(self, text: str) -> float | None:
        """The number of a class, or the number; NaN for a blank; None if it is neither."""
        if not normal(text):
            return nan
        if self.kind == "regression":
            try:
                number = float(text)
            except ValueError:
                return None
            return number if isfinite(number) else None
        names = [normal(name) for name in self.classes]
        return float(names.index(normal(text))) if normal(text) in names else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """``values``: by pseudonym of what ``key`` says, a number for each of ``targets``, NaN where it is missing."""

    key: str
    targets: tuple[Target, ...]
    values: dict[bytes, tuple[float, ...]] = field(repr=False)

    def of(self, image: IndexedImage) -> tuple[float, ...] | None:
        """The targets of an image; None if it has none at all."""
        return self.values.get(getattr(image, self.key))


def load_labels(path: Path, targets: tuple[Target, ...], index: DicomIndex) -> Labels:
    """Targets of an index's images from a CSV with one key column, ``patient`` (beside it ``issuer``, where issuers are
    used), ``study``, ``series`` or ``instance``, and a column for each target; a blank is a missing label.

    Raises DatasetError with line and column, and nothing that stands there.
    """
    if not targets or len({target.name for target in targets}) != len(targets):
        raise DatasetError(f"labels: found {len(targets)} targets, expected at least one, each column once")
    values: dict[bytes, tuple[float, ...]] = {}
    key = ""
    for line, row in csv_rows(path, what="labels"):
        if not key:
            key = _key_column(row, targets)
        numbers = []
        for target in targets:
            number = target.value(row[target.name])
            if number is None:
                expected = "a finite number" if target.kind == "regression" else f"one of {len(target.classes)} classes"
                raise DatasetError(f"labels, line {line}, column {target.name}: expected {expected}, or nothing")
            numbers.append(number)
        if not normal(row[key]):
            raise DatasetError(f"labels, line {line}, column {key}: expected a key, found a blank")
        if all(map(isnan, numbers)):
            continue
        issuer = (row.get("issuer", ""),) if key == "patient" else ()
        name = index.pseudonyms.of_text(key.encode(), *issuer, row[key])
        name = index.same_person.get(name, name)
        # NaN differs from itself; a line that is there twice is harmless, two opinions are not.
        if name in values and repr(values[name]) != repr(tuple(numbers)):
            raise DatasetError(f"labels, line {line}: other values than an earlier line has for the same {key}")
        values[name] = tuple(numbers)
    return Labels(key=key or KEYS[0], targets=targets, values=values)


def _key_column(row: dict[str, str], targets: tuple[Target, ...]) -> str:
    keys = [name for name in KEYS if name in row]
    if len(keys) != 1:
        raise DatasetError(f"labels: found {len(keys)} key columns, expected one of {', '.join(KEYS)}")
    missing = [target.name for target in targets if target.name not in row]
    if missing:
        raise DatasetError(f"labels: expected a column {missing[0]}")
    return keys[0]
