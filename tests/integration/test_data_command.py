"""`secureagg data inspect`: counts of what is usable, what not and why."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import run_command
from support.dicom_files import image, save, slices

from sites.datasets.dicom.summary import _place

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; returns its exit status, standard output and standard error."""
    return partial(run_command, monkeypatch, capfd)


def folder_in(folder: Path) -> Path:
    """Two X-rays of A, three of B, a series of 4 slices of C, a text file and an image with text in it."""
    images = folder / "images"
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    for number, patient in enumerate("AABBB"):
        save(image(pixels, number=number, patient=patient, PatientSex="F", KVP="70"), images / f"{number}")
    for place, one in enumerate(slices(4, patient="C", series=5, Manufacturer="Siemens")):
        save(one, images / "C" / f"{place}")
    (images / "notes.txt").write_text("no image")
    save(image(number=50, BurnedInAnnotation="YES"), images / "text")
    return images


def test_what_a_folder_is_worth(run: Run, tmp_path: Path) -> None:
    """The summary has what is usable, whose, why the rest is not, and how it is spread, in numbers that are right."""
    images, file, sheet = folder_in(tmp_path), tmp_path / "summary.json", tmp_path / "sheet.png"
    (tmp_path / "labels.csv").write_text("patient,finding\nA,yes\nB,no\n")
    status, out, error = run(
        "data", "inspect", images, "--state", tmp_path / "state", "--json", file, "--sheet", sheet,
        "--labels", tmp_path / "labels.csv", "--target", "finding=no,yes", "--decode-all",
    )  # fmt: skip
    assert status == 0, error
    found = json.loads(file.read_text())
    assert (found["files"], found["images"], found["frames"], found["patients"]) == (11, 9, 9, 3)
    assert found["refused"] == {"burned-in text suspected": 1, "no DICOM preamble": 1}
    assert found["images_per_patient"] == {"least": 2, "median": 3.0, "most": 4}
    assert (found["volumes"], found["no_volume"]) == (1, {"no slice positions": 1})
    assert (found["decoded"], found["not_decoded"]) == (9, {})
    assert found["labels"] == {"finding": {"no": 3, "yes": 2, "no label": 4}}
    assert found["descriptors"]["modality"] == {"DX": 2, "CT": 1}
    assert found["descriptors"]["kvp"] == {"60 to 80 kV": 2, "unknown": 1}
    assert found["descriptors"]["manufacturer"] == {"unknown": 2, "siemens": 1}
    assert re.search(r"burned-in text suspected\s*│\s*1", out)
    assert "nothing was sent" in out
    assert np.asarray(Image.open(sheet)).std() > 0
    assert sheet.stat().st_mode & 0o777 == file.stat().st_mode & 0o777 == 0o600


def test_a_second_look_reads_nothing(run: Run, tmp_path: Path) -> None:
    """The index is kept: nothing is read twice, and nothing decoded where nobody asks for it."""
    images, file = folder_in(tmp_path), tmp_path / "summary.json"
    for _ in range(2):
        arguments = ("--state", tmp_path / "state", "--json", file, "--decode", "0")
        status, _, error = run("data", "inspect", images, *arguments)
        assert status == 0, error
    found = json.loads(file.read_text())
    assert (found["files_read"], found["files_unchanged"], found["decoded"]) == (0, 11, 0)


def test_one_image_of_each_patient_is_tried(run: Run, tmp_path: Path) -> None:
    """By default one image each of some patients is decoded."""
    images, file = folder_in(tmp_path), tmp_path / "summary.json"
    run("data", "inspect", images, "--state", tmp_path / "state", "--json", file)
    assert json.loads(file.read_text())["decoded"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--target", "finding=no,yes"), "both --labels and --target"),
        (("--labels", "labels.csv", "--target", "finding=yes"), "at least 2"),
        (("--labels", "labels.csv", "--target", "finding"), "labels: cannot be read"),
    ],
)
def test_wrong_use_is_one_sentence(run: Run, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    """What cannot be meant ends with one sentence and status 1."""
    status, _, error = run("data", "inspect", folder_in(tmp_path), "--state", tmp_path / "state", *arguments)
    assert (status, error.count("\n")) == (1, 1)
    assert sentence in error


def test_without_the_extra(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pydicom is not installed, the command says what to install."""
    monkeypatch.setattr("sites.datasets.dicom.workers.find_spec", lambda name: None)
    status, _, error = run("data", "inspect", folder_in(tmp_path), "--state", tmp_path / "state")
    assert status == 1
    assert "secureagg[dicom]" in error


def test_the_command_line_needs_neither_torch_nor_pydicom() -> None:
    """An installation without the extras has the whole command line, and indexing does not wait for torch."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'pydicom', 'PIL', 'gdcm']));"
        "import sites.cli, sites.datasets.dicom.summary"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_bands_are_shown_in_their_order() -> None:
    """Bands of numbers come from the least to the most, whatever has none behind them, otherwise as it was."""
    found = ["unknown", "80 years or more", "10 to 20 years", "below 10 years"]
    assert sorted(found, key=_place) == ["below 10 years", "10 to 20 years", "80 years or more", "unknown"]
    assert sorted(["ge", "agfa"], key=_place) == ["ge", "agfa"]


def test_phantoms_are_inspected_without_a_refusal(run: Run, tmp_path: Path) -> None:
    """`data phantom` writes what `data inspect` takes as it is, labels included, and the truth beside it."""
    status, out, error = run(
        "data", "phantom", "--out", tmp_path / "out", "--sites", "3", "--patients", "5", "--images", "2",
        "--bias", "1", "--pairs", "1",
    )  # fmt: skip
    assert status == 0, error
    truth = json.loads((tmp_path / "out" / "truth.json").read_text())
    ill = sum(one["disease"] for one in truth["patients"])
    assert f"15 patients of 3 hospitals, {ill} of them ill" in out
    assert "6 counterfactual twins" in out
    own, file = tmp_path / "out" / "hospital-1", tmp_path / "summary.json"
    status, out, error = run(
        "data", "inspect", own / "images", "--state", tmp_path / "state", "--json", file, "--decode-all",
        "--labels", own / "labels.csv", "--target", "disease=no,yes",
    )  # fmt: skip
    assert status == 0, error
    found = json.loads(file.read_text())
    assert (found["images"], found["patients"], found["volumes"], found["decoded"]) == (10, 5, 5, 10)
    assert found["refused"] == found["not_decoded"] == found["no_volume"] == {}
    assert found["labels"]["disease"]["no label"] == 0
    ages = list(found["descriptors"]["age"])
    assert ages == sorted(ages)
