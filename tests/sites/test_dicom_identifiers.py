"""Names that are planted wherever a folder of images can hold any must turn up nowhere else."""

import logging
import sys
from collections.abc import Iterator
from hashlib import md5, sha1, sha256
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset
from support.broken_decoder import CRASHING_ROWS
from support.commands import run_command
from support.dicom_files import image, save, slices

from sites.datasets.dicom import ImageDataset, ImagePlan, Target, build_cache, index_folder, load_labels
from sites.datasets.dicom.workers import Workers
from sites.errors import DatasetError

NUMBER, NAME, PLACE, WORD = "ZQ8841907", "Vexelbrandt", "Quillhaven", "Xylotrask"
UIDS = "1.2.826.0.1.3680043.8.498.77001"
PLANTED = (NUMBER, NAME, PLACE, WORD, UIDS, "19391217", "20190823", "ZQFOLDER", "ZQFILE")
CSV_WORD = "Grumbelstein"


def said(dataset: Dataset, number: int) -> Dataset:
    """``dataset`` with something planted in each attribute that could be quoted."""
    dataset.PatientID, dataset.PatientName, dataset.IssuerOfPatientID = f"{NUMBER}-{number % 3}", NAME, PLACE
    dataset.PatientBirthDate, dataset.StudyDate = "19391217", "20190823"
    dataset.InstitutionName = dataset.StationName = dataset.OperatorsName = PLACE
    dataset.Manufacturer, dataset.ManufacturerModelName = f"Siemens {WORD}", WORD
    dataset.StudyDescription = dataset.SeriesDescription = dataset.ImageComments = f"{NAME} {WORD}"
    dataset.PatientSex = WORD
    dataset.StudyInstanceUID = f"{UIDS}.1.{number % 3}"
    dataset.SeriesInstanceUID = f"{UIDS}.2.{number}"
    dataset.SOPInstanceUID = f"{UIDS}.3.{number}"
    dataset.add_new((0x0009, 0x0010), "LO", WORD)
    dataset.add_new((0x0009, 0x1001), "LT", f"{NAME} {NUMBER}")
    return dataset


def planted_folder(folder: Path) -> None:
    """Whole images, and files that are broken in ways in which a parser likes to quote what it found."""
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    made = [said(image(pixels), number) for number in range(6)]
    made += [said(one, 10) for one in slices(4)]
    for place, one in enumerate(made[6:]):
        one.SOPInstanceUID = f"{UIDS}.4.{place}"
    made[1].Modality = WORD.upper()[:9]
    made[2].ImageType = [WORD.upper(), NAME.upper()]
    for number, one in enumerate(made):
        save(one, folder / f"ZQFOLDER {NAME}" / f"ZQFILE {NUMBER} {number}.dcm")
    broken = {
        "class": said(image(SOPClassUID=f"{UIDS}.9"), 20),
        "photometric": said(image(PhotometricInterpretation=WORD.upper()), 21),
        "crash": said(image(np.zeros((CRASHING_ROWS, 8), np.uint8)), 22),
        "frames": said(image(NumberOfFrames=0), 23),
    }
    for name, one in broken.items():
        save(one, folder / f"{NAME} {name}")
    whole = (folder / f"ZQFOLDER {NAME}" / f"ZQFILE {NUMBER} 0.dcm").read_bytes()
    (folder / f"{NAME} cut").write_bytes(whole[:700])
    (folder / f"{NAME} text").write_text(f"{NAME} {NUMBER}")
    # A number of rows, a date and a UID that are not what their attributes may hold.
    (folder / f"{NAME} bad date").write_bytes(whole.replace(b"20190823", b"XYLOTRAS"))
    (folder / f"{NAME} bad uid").write_bytes(
        whole.replace(b"1.2.826.0.1.3680043.8.498.77001.3", b"Vexelbrandt.3680043.8.498.77001.3")
    )
    (folder / f"{NAME} bad decimal").write_bytes(
        save(said(image(pixels, WindowCenter="12345678", WindowWidth="10"), 24), folder / "whole")
        .read_bytes()
        .replace(b"12345678", b"Xylotras")
    )
    (folder / "link to Vexelbrandt").symlink_to(folder / f"{NAME} text")


def leaks(data: bytes) -> list[str]:
    """What is planted and found in ``data``: as text of one or two bytes, in any case, or as a plain hash."""
    lower = data.lower()
    found = []
    for word in (*PLANTED, CSV_WORD, f"{NUMBER}-0", f"{UIDS}.3.0", f"{UIDS}.1.0"):
        forms = [word.lower().encode(), word.encode("utf-16-le"), word.lower().encode("utf-16-le")]
        hashes = [algorithm(word.encode()) for algorithm in (md5, sha1, sha256)]
        hashes += [algorithm(word.lower().encode()) for algorithm in (md5, sha1, sha256)]
        if any(form in lower or form in data for form in forms) or any(
            one.digest() in data or one.hexdigest().encode() in lower for one in hashes
        ):
            found.append(word)
    return found


def files_below(folder: Path) -> Iterator[bytes]:
    """Name and content of each file, those that SQLite leaves beside its own too."""
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder)).encode()
        if path.is_file():
            yield path.read_bytes()


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    """What looks for leaks finds the planted words in the images themselves, and hashes of them."""
    planted_folder(tmp_path / "images")
    found = {word for data in files_below(tmp_path / "images") for word in leaks(data)}
    assert found >= set(PLANTED)
    assert leaks(sha256(NUMBER.encode()).digest()) == [NUMBER]
    assert leaks(NAME.encode("utf-16-le")) == [NAME]


def test_nothing_planted_is_kept_or_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Indexing, labelling, caching and loading leave no planted word in state, cache, logs, warnings, output, errors or
    what the objects say of themselves."""
    caplog.set_level(logging.DEBUG)
    folder = tmp_path / "images"
    planted_folder(folder)
    table = tmp_path / "labels.csv"
    lines = [f"{NUMBER}-{number},{PLACE},2,{CSV_WORD}" for number in range(3)]
    table.write_text("\n".join(["patient,issuer,grade,comment", *lines]))
    merges = tmp_path / "merges.csv"
    merges.write_text(f"patient,same_as,issuer,same_as_issuer\n{NUMBER}-1,{NUMBER}-2,{PLACE},{PLACE}\n")
    out = tmp_path / "out"
    with Workers(2, program=(sys.executable, "-m", "support.broken_decoder")) as pool:
        index = index_folder(folder, out / "state", merges=merges, workers=pool)
        labels = load_labels(table, (Target("grade", "regression"),), index)
        card = build_cache(index, ImagePlan(shape=(8, 8), held_out=0.0), out / "cache", labels=labels, workers=pool)
    data = ImageDataset(out / "cache")
    assert len(index.images) > 10
    assert len(data) > 10
    assert index.patients == 2
    assert len(index.refused) >= 5
    captured = capfd.readouterr()
    texts = [captured.out, captured.err, caplog.text, *(str(one.message) for one in recwarn.list)]
    texts += [repr(index), repr(index.images), repr(labels), repr(card), repr(data.patients), repr(vars(data))]
    assert not [word for text in texts for word in leaks(text.encode())]
    found = list(files_below(out))
    assert len(found) > 8
    assert not [word for content in found for word in leaks(content)]


@pytest.mark.parametrize("bad", ["no folder", "labels", "merges", "label value", "no target"])
def test_no_error_repeats_what_was_given(bad: str, tmp_path: Path) -> None:
    """Errors about folders, tables and values quote none of them."""
    folder = tmp_path / f"{NAME} {NUMBER}"
    planted_folder(folder / "images")
    table = tmp_path / "table.csv"
    table.write_text(
        f"patient,grade\n{NUMBER}-0,{CSV_WORD}\n" if bad == "label value" else f"{NAME},{CSV_WORD}\n{NAME}\n"
    )

    def use(pool: Workers) -> None:
        index_folder(folder / (PLACE if bad == "no folder" else "images"), tmp_path / "state", workers=pool)
        merges = table if bad == "merges" else None
        index = index_folder(folder / "images", tmp_path / "state", merges=merges, workers=pool)
        load_labels(table, (Target("nothing" if bad == "no target" else "grade", "regression"),), index)

    with Workers(1) as pool, pytest.raises(DatasetError) as raised:
        use(pool)
    assert not leaks(str(raised.value).encode())
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_the_command_says_nothing_planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`secureagg data inspect` prints and writes counts and pictures only, for whole folders and for missing ones."""
    folder, out = tmp_path / "images", tmp_path / "out"
    planted_folder(folder)
    labels = tmp_path / "labels.csv"
    labels.write_text(f"patient,issuer,grade,comment\n{NUMBER}-0,{PLACE},2,{CSV_WORD}\n")
    arguments = ["--state", out / "state", "--labels", labels, "--target", "grade", "--decode-all"]
    arguments += ["--json", out / "summary.json", "--sheet", out / "sheet.png"]
    status, printed, errors = run_command(monkeypatch, capfd, "data", "inspect", folder, *arguments)
    assert status == 0, errors
    status, _, failed = run_command(monkeypatch, capfd, "data", "inspect", folder / f"{NAME} gone", *arguments)
    assert status == 1
    assert not [word for text in (printed, errors, failed) for word in leaks(text.encode())]
    assert not [word for content in files_below(out) for word in leaks(content)]
    assert (out / "sheet.png").read_bytes()[:4] == b"\x89PNG"
