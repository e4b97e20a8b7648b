"""The index of a folder of images: each file is an image or has a named reason, and no file ends the run."""

import gzip
import os
import re
import shutil
import sqlite3
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from pydicom import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    GrayscaleSoftcopyPresentationStateStorage,
    RTPlanStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    TwelveLeadECGWaveformStorage,
    UltrasoundImageStorage,
)
from support.broken_decoder import CRASHING_FILE, HANGING_FILE
from support.dicom_files import SHIPPED, image, save

from sites.datasets.dicom import ImagePlan, Limits, Reason, index_folder
from sites.datasets.dicom.cache import planned
from sites.datasets.dicom.records import Found, Images, MakeImages, ReadHeaders
from sites.datasets.dicom.workers import Workers
from sites.errors import DatasetError

LIMITS = Limits(file_bytes=1 << 20, frames=8, pixels=1 << 14, volume_voxels=1 << 16)
KEEP_ALL = Limits(keep_derived=True, keep_suspected_text=True)
# Two of 12 bits whose lossy JPEG gdcm refuses, and one whose only fragment ends in what a sequence ends with.
UNDECODABLE = ("JPEG-lossy.dcm", "JPGExtended.dcm", "JPEG2000-embedded-sequence-delimiter.dcm")


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two processes for all tests here."""
    with Workers(2) as pool:
        yield pool


def _cut(dataset: Dataset, path: Path, *, at: float) -> None:
    save(dataset, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * at)])


def _object(sop_class: str, **attributes: object) -> Dataset:
    none = dict.fromkeys(("PixelData", "Rows", "Columns", "BitsAllocated"))
    return image(SOPClassUID=sop_class, **none, **attributes)


def _deflated_bomb(path: Path) -> None:
    dataset = image(np.zeros((8, 8), np.uint8))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    save(dataset, path)
    squeezed = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    start = path.read_bytes()
    meta = start[: start.index(b"1.2.840.10008.1.2.1.99") + 22]
    padding = squeezed.compress(bytes(1 << 28)) + squeezed.flush()
    path.write_bytes(meta + padding)


# Name of a broken file: its reason, and how it is made.
BROKEN: dict[str, tuple[Reason, Callable[[Path], object]]] = {
    "empty": (Reason.EMPTY, lambda path: path.write_bytes(b"")),
    "no preamble": (Reason.NO_PREAMBLE, lambda path: path.write_bytes(b"PNG" * 200)),
    "preamble only": (Reason.OTHER_OBJECT, lambda path: path.write_bytes(bytes(128) + b"DICM")),
    "shorter than a preamble": (Reason.NO_PREAMBLE, lambda path: path.write_bytes(b"DICM")),
    "gzip": (Reason.NO_PREAMBLE, lambda path: path.write_bytes(gzip.compress(bytes(500)))),
    "cut in the pixels": (Reason.TRUNCATED, lambda path: _cut(image(), path, at=0.95)),
    "cut in the header": (Reason.NO_PIXELS, lambda path: _cut(image(), path, at=0.6)),
    "report": (Reason.REPORT, lambda path: save(_object(BasicTextSRStorage), path)),
    "plan of radiotherapy": (Reason.RADIOTHERAPY, lambda path: save(_object(RTPlanStorage), path)),
    "document": (Reason.DOCUMENT, lambda path: save(_object(EncapsulatedPDFStorage), path)),
    "presentation": (
        Reason.PRESENTATION,
        lambda path: save(_object(GrayscaleSoftcopyPresentationStateStorage), path),
    ),
    "waveform": (Reason.WAVEFORM, lambda path: save(_object(TwelveLeadECGWaveformStorage), path)),
    "segmentation": (Reason.SEGMENTATION, lambda path: save(image(SOPClassUID=SegmentationStorage), path)),
    "private class": (Reason.OTHER_OBJECT, lambda path: save(image(SOPClassUID="1.2.3.4"), path)),
    "no pixels": (Reason.NO_PIXELS, lambda path: save(image(PixelData=None), path)),
    "zero frames": (Reason.NO_FRAMES, lambda path: save(image(NumberOfFrames=0), path)),
    "negative frames": (Reason.BAD_ATTRIBUTES, lambda path: save(image(NumberOfFrames=-1), path)),
    "zero rows": (Reason.BAD_ATTRIBUTES, lambda path: save(image(Rows=0), path)),
    "no bits": (Reason.BAD_ATTRIBUTES, lambda path: save(image(BitsAllocated=None), path)),
    "odd bits": (Reason.BAD_ATTRIBUTES, lambda path: save(image(BitsAllocated=12), path)),
    "no instance": (Reason.BAD_ATTRIBUTES, lambda path: save(image(SOPInstanceUID=""), path)),
    "colour without samples": (Reason.PHOTOMETRIC, lambda path: save(image(PhotometricInterpretation="RGB"), path)),
    "unknown photometric": (Reason.PHOTOMETRIC, lambda path: save(image(PhotometricInterpretation="CMYK"), path)),
    "bomb by size": (Reason.TOO_MANY_PIXELS, lambda path: save(image(Rows=65535, Columns=65535), path)),
    "bomb by frames": (Reason.TOO_MANY_FRAMES, lambda path: save(image(NumberOfFrames=2**31 - 1), path)),
    "bomb by bytes": (Reason.FILE_TOO_LARGE, lambda path: path.write_bytes(bytes(LIMITS.file_bytes + 1))),
    "localizer": (
        Reason.LOCALIZER,
        lambda path: save(image(modality="CT", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), path),
    ),
    "derived": (Reason.DERIVED, lambda path: save(image(modality="MR", ImageType=["DERIVED", "PRIMARY"]), path)),
    "ultrasound": (
        Reason.BURNED_IN,
        lambda path: save(image(SOPClassUID=UltrasoundImageStorage, Modality="US"), path),
    ),
    "secondary capture": (Reason.BURNED_IN, lambda path: save(image(SOPClassUID=SecondaryCaptureImageStorage), path)),
    "screen save": (
        Reason.BURNED_IN,
        lambda path: save(image(ImageType=["ORIGINAL", "PRIMARY", "SCREEN SAVE"]), path),
    ),
    "annotated": (Reason.BURNED_IN, lambda path: save(image(BurnedInAnnotation="YES"), path)),
    "nobody's": (Reason.NO_PATIENT, lambda path: save(image(PatientID="", StudyInstanceUID=""), path)),
    "own transfer syntax": (
        Reason.NO_DECODER,
        lambda path: path.write_bytes(
            save(image(), path).read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.826.0.1.3.1.2.3\0")
        ),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_counted_under_its_reason(name: str, workers: Workers, tmp_path: Path) -> None:
    """Beside a whole file, a broken one is counted under its own reason, and the whole one is an image."""
    reason, make = BROKEN[name]
    folder = tmp_path / "images"
    save(image(number=99), folder / "whole")
    make(folder / "broken")
    index = index_folder(folder, tmp_path / "state", limits=LIMITS, workers=workers)
    assert index.refused == {reason: 1}
    assert len(index.images) == 1


def test_all_broken_files_together(workers: Workers, tmp_path: Path) -> None:
    """In one folder the reasons add up, and files are images or refused, each once."""
    for place, (_, make) in enumerate(BROKEN.values()):
        make(tmp_path / f"{place}")
    save(image(number=99), tmp_path / "whole")
    index = index_folder(tmp_path, tmp_path.parent / f"{tmp_path.name}-state", limits=LIMITS, workers=workers)
    assert index.refused == Counter(reason for reason, _ in BROKEN.values())
    assert index.files == len(index.images) + index.refused.total() == len(BROKEN) + 1


def test_a_deflated_bomb_costs_itself(tmp_path: Path) -> None:
    """A small file that inflates beyond the worker's memory is refused for it; the file beside it is an image."""
    _deflated_bomb(tmp_path / "bomb")
    save(image(), tmp_path / "whole")
    with Workers(1, memory_bytes=500 << 20) as pool:
        index = index_folder(tmp_path, tmp_path.parent / f"{tmp_path.name}-state", workers=pool)
    assert index.refused == {Reason.MEMORY: 1}
    assert len(index.images) == 1


def test_a_parser_may_crash_or_hang(tmp_path: Path) -> None:
    """A file that crashes or hangs whoever reads its header is counted alone, though many are read in one task."""
    folder = tmp_path / "images"
    for number in range(40):
        save(image(number=number), folder / str(number))
    (folder / "crashing").write_bytes(CRASHING_FILE)
    (folder / "hanging").write_bytes(HANGING_FILE)
    with Workers(2, program=(sys.executable, "-m", "support.broken_decoder")) as pool:
        index = index_folder(folder, tmp_path / "state", limits=Limits(seconds=2.0), workers=pool)
    assert index.refused == {Reason.CRASHED: 1, Reason.TIMED_OUT: 1}
    assert len(index.images) == 40


def test_links_are_not_followed(workers: Workers, tmp_path: Path) -> None:
    """A link to a file, to a folder or in a circle is counted, not followed; so is a pipe, which would block."""
    folder = tmp_path / "images"
    whole = save(image(), tmp_path / "elsewhere" / "whole")
    folder.mkdir()
    (folder / "file").symlink_to(whole)
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    index = index_folder(folder, tmp_path / "state", workers=workers)
    assert index.refused == {Reason.LINK: 3}
    assert not index.images


def test_one_instance_is_one_image(workers: Workers, tmp_path: Path) -> None:
    """Of several files with one SOP instance one stays, and another takes its place when that is deleted."""
    folder = tmp_path / "images"
    for name in "abc":
        save(image(), folder / name)
    for left in (3, 2, 1):
        index = index_folder(folder, tmp_path / "state", workers=workers)
        assert len(index.images) == 1
        assert index.refused[Reason.DUPLICATE] == left - 1
        Path(os.fsdecode(index.images[0].path)).unlink()


def test_every_shipped_file_is_an_image_or_has_a_reason(workers: Workers, tmp_path: Path) -> None:
    """Of pydicom's own files, in every transfer syntax and many of them broken, each gives an image or a reason."""
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    index = index_folder(SHIPPED, tmp_path / "state", workers=workers)
    assert index.files == len(files) == len(index.images) + index.refused.total() > 150
    plan = ImagePlan(shape=(16, 16))
    headers = workers.run((file, ReadHeaders([os.fsencode(file)], KEEP_ALL), 60) for file in files)
    images = [
        (file, range(one.header.frames)) for file, answer in headers for one in answer.found if isinstance(one, Found)
    ]
    tasks = ((file, MakeImages([(os.fsencode(file), list(frames))], plan, KEEP_ALL), 60) for file, frames in images)
    decoders, failed = Counter(), {}
    for file, answer in workers.run(tasks):
        if isinstance(answer, Images):
            decoders[answer.decoder.split()[0]] += 1
            assert np.isfinite(np.frombuffer(answer.values, "<f4")).all()
        else:
            failed[file.name] = answer.reason
    assert failed == dict.fromkeys(UNDECODABLE, Reason.DECODER_FAILED)
    assert decoders.keys() == {"pydicom", "python-gdcm", "pylibjpeg-openjpeg", "pyjpegls"}
    assert decoders.total() + len(failed) == len(images) > 60


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CT_small.dcm", None),
        ("MR_truncated.dcm", Reason.TRUNCATED),
        ("rtdose.dcm", Reason.RADIOTHERAPY),
        ("rtplan.dcm", Reason.RADIOTHERAPY),
        ("reportsi.dcm", Reason.REPORT),
        ("waveform_ecg.dcm", Reason.WAVEFORM),
        ("liver_1frame.dcm", Reason.SEGMENTATION),
        ("no_meta.dcm", Reason.NO_PREAMBLE),
        ("examples_overlay.dcm", Reason.DERIVED),
        ("examples_rgb_color.dcm", Reason.BURNED_IN),
        ("dicomdirtests/DICOMDIR", Reason.DIRECTORY),
    ],
)
def test_shipped_files_have_the_right_reason(
    name: str, reason: Reason | None, workers: Workers, tmp_path: Path
) -> None:
    """Known files are what they are."""
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(SHIPPED / name, folder)
    index = index_folder(folder, tmp_path / "state", workers=workers)
    assert index.refused == ({} if reason is None else {reason: 1})


def test_overlays_make_text_suspect(workers: Workers, tmp_path: Path) -> None:
    """An image with an overlay plane may carry text, unless the file says NO."""
    folder = tmp_path / "images"
    for number, says in enumerate((None, "NO")):
        dataset = image(number=number, **({} if says is None else {"BurnedInAnnotation": says}))
        dataset.add_new((0x6004, 0x0010), "US", 8)
        save(dataset, folder / str(number))
    index = index_folder(folder, tmp_path / "state", workers=workers)
    assert (len(index.images), index.refused) == (1, {Reason.BURNED_IN: 1})


def test_derived_x_rays_are_images(workers: Workers, tmp_path: Path) -> None:
    """A processed X-ray calls itself derived, and is what a radiologist sees."""
    save(image(ImageType=["DERIVED", "PRIMARY"]), tmp_path / "images" / "a")
    assert len(index_folder(tmp_path / "images", tmp_path / "state", workers=workers).images) == 1


def test_unchanged_files_are_not_read_again(workers: Workers, tmp_path: Path) -> None:
    """Of a second run only new and changed files are read, and deleted ones leave; refused ones too stay known."""
    folder, state = tmp_path / "images", tmp_path / "state"
    for number in range(5):
        save(image(number=number), folder / f"{number % 2}" / f"{number}.dcm")
    (folder / "notes.txt").write_text("no image")
    seen = []
    first = index_folder(folder, state, workers=workers, progress=lambda done, total: seen.append((done, total)))
    assert (first.read, first.unchanged, first.removed, len(first.images)) == (6, 0, 0, 5)
    assert seen == [(done, 6) for done in range(1, 7)]
    again = index_folder(folder, state, workers=workers)
    assert (again.read, again.unchanged, again.removed) == (0, 6, 0)
    assert (again.images, again.refused) == (first.images, first.refused)
    (folder / "0" / "0.dcm").unlink()
    (folder / "notes.txt").unlink()
    save(image(number=77, patient="P2"), folder / "1" / "1.dcm")
    save(image(number=9), folder / "9.dcm")
    third = index_folder(folder, state, workers=workers)
    assert (third.read, third.unchanged, third.removed, len(third.images), third.patients) == (2, 3, 2, 5, 2)
    assert not third.refused


def test_another_folder_is_read_anew(workers: Workers, tmp_path: Path) -> None:
    """A file of the same name, size and date in another folder is not taken for the one that was indexed."""
    found = []
    for patient in "AB":
        path = save(image(patient=patient), tmp_path / patient / "image.dcm")
        os.utime(path, (1e9, 1e9))
        found.append(index_folder(tmp_path / patient, tmp_path / "state", workers=workers).images[0].patient)
    assert found[0] != found[1]


def test_a_stopped_run_keeps_what_it_read(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before the run was stopped is not read again."""
    monkeypatch.setattr("sites.datasets.dicom.index._COMMIT_EVERY", 2)
    folder, state = tmp_path / "images", tmp_path / "state"
    for number in range(6):
        save(image(number=number), folder / str(number))

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folder(folder, state, workers=workers, progress=stop)
    index = index_folder(folder, state, workers=workers)
    assert (index.read, index.unchanged, len(index.images)) == (2, 4, 6)


def test_other_limits_read_everything_anew(workers: Workers, tmp_path: Path) -> None:
    """What was refused under other limits is judged again."""
    folder, state = tmp_path / "images", tmp_path / "state"
    save(image(BurnedInAnnotation="YES"), folder / "a")
    assert index_folder(folder, state, workers=workers).refused == {Reason.BURNED_IN: 1}
    index = index_folder(folder, state, limits=KEEP_ALL, workers=workers)
    assert (index.read, len(index.images)) == (1, 1)


def test_patients_go_by_issuer_and_number(workers: Workers, tmp_path: Path) -> None:
    """Blanks and case do not matter, the issuer does; without a number the study stands in, and is counted."""
    people = [("A", "X1"), ("a ", " x1"), ("B", "X1"), ("", "X1"), ("", ""), ("", "")]
    for number, (issuer, patient) in enumerate(people):
        dataset = image(number=number, IssuerOfPatientID=issuer, StudyInstanceUID=f"1.2.{number}")
        dataset.PatientID = patient
        save(dataset, tmp_path / "images" / str(number))
    index = index_folder(tmp_path / "images", tmp_path / "state", workers=workers)
    assert (len(index.images), index.patients, index.patients_by_study) == (6, 5, 2)


def test_a_table_merges_patients(workers: Workers, tmp_path: Path) -> None:
    """Numbers that the site knows to be one person are one patient, along chains too, without reading files again."""
    folder, state, table = tmp_path / "images", tmp_path / "state", tmp_path / "merges.csv"
    for number, patient in enumerate("ABCDE"):
        save(image(number=number, patient=patient), folder / patient)
    assert index_folder(folder, state, workers=workers).patients == 5
    table.write_text("patient,same_as\nC,B\na,b\nD,X9\n")
    index = index_folder(folder, state, merges=table, workers=workers)
    assert (index.read, index.patients) == (0, 3)
    table.write_text("patient,same_as\nC,\n")
    with pytest.raises(DatasetError, match="merge table, line 2"):
        index_folder(folder, state, merges=table, workers=workers)


def test_another_secret_is_refused(workers: Workers, tmp_path: Path) -> None:
    """An index is not gone on with under another secret, which would make each patient a second one."""
    folder, state = tmp_path / "images", tmp_path / "state"
    save(image(), folder / "a")
    index_folder(folder, state, workers=workers)
    (state / "dicom.secret").unlink()
    with pytest.raises(DatasetError, match="another secret"):
        index_folder(folder, state, workers=workers)


def test_only_the_owner_reads_secret_and_index(workers: Workers, tmp_path: Path) -> None:
    """Secret and index are private files, and an exposed secret is refused."""
    folder, state = tmp_path / "images", tmp_path / "state"
    save(image(), folder / "a")
    index_folder(folder, state, workers=workers)
    assert {stat.S_IMODE((state / name).stat().st_mode) for name in ("dicom.secret", "dicom.sqlite")} == {0o600}
    (state / "dicom.secret").chmod(0o644)
    with pytest.raises(Exception, match="chmod 600"):
        index_folder(folder, state, workers=workers)


def test_pseudonyms_depend_on_the_secret(workers: Workers, tmp_path: Path) -> None:
    """Two sites know one patient by different keys, so that caches cannot be joined."""
    save(image(), tmp_path / "images" / "a")
    keys = {index_folder(tmp_path / "images", tmp_path / site, workers=workers).images[0].patient for site in "AB"}
    assert len(keys) == 2


def test_folders_that_cannot_be_used(workers: Workers, tmp_path: Path) -> None:
    """A missing folder and a state within the folder are errors that do not name the folder."""
    with pytest.raises(DatasetError, match="cannot be read") as raised:
        index_folder(tmp_path / "John Doe", tmp_path / "state", workers=workers)
    assert "Doe" not in str(raised.value)
    with pytest.raises(DatasetError, match="lies within it"):
        index_folder(tmp_path, tmp_path / "state", workers=workers)


def test_a_damaged_index_is_an_error(workers: Workers, tmp_path: Path) -> None:
    """A file that is no index ends the run with one that can be acted upon."""
    folder, state = tmp_path / "images", tmp_path / "state"
    save(image(), folder / "a")
    index_folder(folder, state, workers=workers)
    (state / "dicom.sqlite").write_bytes(b"damaged" * 1000)
    with pytest.raises(DatasetError, match="may be deleted"):
        index_folder(folder, state, workers=workers)


def test_descriptors_are_bands(workers: Workers, tmp_path: Path) -> None:
    """Of what describes devices and patients only a band or a known word is kept."""
    save(
        image(
            Manufacturer="SIEMENS Healthineers of Jane Doe",
            KVP="117.5",
            PatientAge="047Y",
            PatientSex="F",
            StudyDate="20230417",
            SliceThickness="0.625",
            MagneticFieldStrength="2.89",
        ),
        tmp_path / "images" / "a",
    )
    save(
        image(
            number=2,
            Manufacturer="Jane Doe",
            Modality="DOE",
            PatientSex="J",
            PatientBirthDate="19800418",
            StudyDate="20230417",
        ),
        tmp_path / "images" / "b",
    )
    index = index_folder(tmp_path / "images", tmp_path / "state", workers=workers)
    found = sorted((one.header.descriptors for one in index.images), key=lambda one: one.kvp)
    assert [getattr(found[0], name) for name in found[0].__struct_fields__] == [
        "DX", "siemens", "100 to 120 kV", "2 to 4 T", "below 1 mm", "female", "40 to 50 years", "2020 to 2024",
    ]  # fmt: skip
    assert [getattr(found[1], name) for name in found[1].__struct_fields__] == [
        "other", "other", "unknown", "unknown", "unknown", "unknown", "40 to 50 years", "2020 to 2024",
    ]  # fmt: skip


def test_a_worker_that_does_not_start_is_no_broken_file(tmp_path: Path) -> None:
    """An installation that cannot read anything is an error, not a folder of broken files."""
    save(image(), tmp_path / "images" / "a")
    with (
        Workers(1, program=(sys.executable, "-c", "raise SystemExit")) as pool,
        pytest.raises(DatasetError, match="start"),
    ):
        index_folder(tmp_path / "images", tmp_path / "state", workers=pool)


def test_the_index_is_one_table_of_pseudonyms(workers: Workers, tmp_path: Path) -> None:
    """Each name in the index is an HMAC of 32 bytes; nothing else is text or bytes but reasons and headers."""
    save(image(), tmp_path / "images" / "a")
    index_folder(tmp_path / "images", tmp_path / "state", workers=workers)
    with sqlite3.connect(tmp_path / "state" / "dicom.sqlite") as table:
        (row,) = table.execute("SELECT file, patient, study, series, instance FROM files")
    assert {len(name) for name in row} == {32}
    assert len(set(row)) == 5


def test_planning_counts_everything(workers: Workers, tmp_path: Path) -> None:
    """What a plan leaves out and what it takes are together all frames."""
    index = index_folder(SHIPPED, tmp_path / "state", limits=KEEP_ALL, workers=workers)
    samples, refused = planned(index, ImagePlan(shape=(8, 8), images_per_patient=2))
    assert sum(one.rows for one in samples) + refused[Reason.OVER_CAP] == sum(one.header.frames for one in index.images)
    assert max(Counter(one.patient for one in samples for _ in range(one.rows)).values()) == 2


def test_shipped_names_are_those_of_the_package() -> None:
    """The folder that is tested is the one pydicom names, without what it would download."""
    named = {Path(path) for path in pydicom.data.get_testdata_files() if Path(path).is_relative_to(SHIPPED)}
    assert set(SHIPPED.rglob("*.dcm")) <= named


def test_the_document_explains_every_reason() -> None:
    """A data manager finds each reason that a summary can name in the document, and no other."""
    text = (Path(__file__).parents[2] / "docs" / "dicom.md").read_text()
    section = text.split("## What is refused")[1].split("\n## ")[0]
    named = re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE)
    assert [name for name in named if name not in {"reason", "---"}] == [reason.value for reason in Reason]
