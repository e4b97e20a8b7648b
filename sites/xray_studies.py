"""PneumoniaMNIST as the DICOM studies of seven hospitals, for demonstrations, tests and benchmarks.

Source: MedMNIST v2 (CC BY 4.0; Kermany et al., Cell 2018; Yang et al., Scientific Data 2023), the file
`pneumoniamnist.npz`: chest X-rays of 28 x 28 pixels, with pneumonia or without.  It names no patients, so that three
images of one class and one hospital are made a patient's here.  Hospitals differ in size, in the share of pneumonia,
and in what their devices write: maker, bits, photometric interpretation, window, compression, numbering of patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from sites.datasets.dicom.labels import Target
from sites.errors import DatasetError

HOSPITALS: Final = tuple(f"hospital-{number}" for number in range(1, 8))
# Of all images with pneumonia and of all without, in hundredths: sizes from 3 % to 30 %, pneumonia in 73 to 98 %.
PNEUMONIA: Final = (30, 24, 18, 12, 8, 5, 3)
NORMAL: Final = (14, 27, 8, 29, 2, 17, 3)
IMAGES_PER_PATIENT: Final = 3
FINDING: Final = Target("pneumonia", "classification", ("no", "yes"))
LABELS_FILE: Final = "labels.csv"
IMAGES_FOLDER: Final = "images"
_UID_ROOT: Final = "1.2.826.0.1.3680043.8.498.7."  # pydicom's own

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class XrayPart:
    """Images (n, 28, 28) of 8 bits, their labels (n,) 0 or 1, and whose each is (n,)."""

    images: npt.NDArray[np.uint8]
    labels: Ints
    patients: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendor:
    """What a hospital's device writes.  ``stored``: stored values of one grey level."""

    maker: str
    bits: int = 8
    stored: int = 1
    inverted: bool = False
    compressed: bool = False
    issuer: str = ""


VENDORS: Final = (
    Vendor(maker="FUJIFILM Corporation", bits=10, stored=4),
    Vendor(maker="Agfa-Gevaert", bits=12, stored=16, inverted=True, issuer="MPI-2"),
    Vendor(maker="Carestream Health", bits=12, stored=12, compressed=True),
    Vendor(maker="Philips Medical Systems", bits=15, stored=128, inverted=True),
    Vendor(maker="KONICA MINOLTA", bits=12, stored=16, issuer="MPI-5"),
    Vendor(maker="SIEMENS", compressed=True),
    Vendor(maker="Canon Inc.", bits=14, stored=50),
)


def load_xrays(file: Path) -> dict[str, XrayPart]:
    """The hospitals' patients by name, and those to test on as "test"; DatasetError for a file that is none."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = {part: np.asarray(arrays[f"{part}_images"], np.uint8) for part in ("train", "test")}
            labels = {part: arrays[f"{part}_labels"].reshape(-1).astype(np.int64) for part in ("train", "test")}
    except OSError as error:
        raise DatasetError(f"X-rays: {file}: {error.strerror}, expected pneumoniamnist.npz of MedMNIST v2") from error
    except (KeyError, ValueError) as error:
        raise DatasetError(f"X-rays: {file}: not the file pneumoniamnist.npz of MedMNIST v2") from error
    chosen = dict(zip(HOSPITALS, split(labels["train"]), strict=True))
    parts = {name: ("train", rows) for name, rows in chosen.items()}
    parts["test"] = ("test", np.arange(len(labels["test"])))
    return {
        name: XrayPart(images=images[part][rows], labels=labels[part][rows], patients=_patients(labels[part][rows]))
        for name, (part, rows) in parts.items()
    }


def split(labels: Ints, seed: int = 2026) -> list[Ints]:
    """The rows of each hospital: of each class, shuffled, the hospital's hundredths."""
    generator = np.random.default_rng(seed)
    parts: list[list[Ints]] = [[] for _ in HOSPITALS]
    for label, hundredths in ((0, NORMAL), (1, PNEUMONIA)):
        rows = generator.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum(hundredths) / 100 * len(rows)).astype(int)[:-1]
        for part, chosen in zip(parts, np.split(rows, ends), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]


def _patients(labels: Ints) -> Ints:
    """A patient's number for each row: threes of one class, in order."""
    patients, count = np.zeros(len(labels), np.int64), 0
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        patients[rows] = count + np.arange(len(rows)) // IMAGES_PER_PATIENT
        count = int(patients[rows[-1]]) + 1
    return patients


def write_studies(part: XrayPart, folder: Path, *, vendor: Vendor, root: int) -> None:
    """Write a part as `images/` with one CR study for each patient, and `labels.csv`.

    ``root``: a number that no other hospital has, so that no UID is given twice.
    """
    owners = part.patients.tolist()
    names = {patient: f"{root}{patient:05d}" for patient in owners}
    for row, patient in enumerate(owners):
        path = folder / IMAGES_FOLDER / names[patient] / f"{row:05d}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(
            path, part.images[row], vendor=vendor, patient=names[patient], uid=f"{_UID_ROOT}{root}.{patient}", row=row
        )
    of_patient = dict(zip(owners, part.labels.tolist(), strict=True))
    lines = [f"{names[patient]},{vendor.issuer},{FINDING.classes[label]}" for patient, label in of_patient.items()]
    (folder / LABELS_FILE).write_text("\n".join([f"patient,issuer,{FINDING.name}", *lines]) + "\n", encoding="utf-8")


def _write(path: Path, pixels: npt.NDArray[np.uint8], *, vendor: Vendor, patient: str, uid: str, row: int) -> None:
    """One file of the study ``uid``; seen through its window it is what ``pixels`` were."""
    from pydicom import Dataset  # noqa: PLC0415  of the extra `dicom`
    from pydicom.dataset import FileMetaDataset  # noqa: PLC0415
    from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian, RLELossless  # noqa: PLC0415

    brightest = 255 * vendor.stored
    values = pixels.astype(np.uint16) * vendor.stored
    if vendor.inverted:
        values = (brightest - values).astype(np.uint16)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, UID(f"{uid}.{row}")
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid, f"{uid}.0"
    dataset.PatientID, dataset.Modality, dataset.Manufacturer = patient, "CR", vendor.maker
    if vendor.issuer:
        dataset.IssuerOfPatientID = vendor.issuer
    dataset.ImageType = ["DERIVED", "PRIMARY"]  # as processed radiographs call themselves
    dataset.BurnedInAnnotation = "NO"
    dataset.ImagerPixelSpacing = [12.5, 12.5]
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.PhotometricInterpretation = "MONOCHROME1" if vendor.inverted else "MONOCHROME2"
    dataset.BitsAllocated = 8 if vendor.bits == 8 else 16
    dataset.BitsStored, dataset.HighBit = vendor.bits, vendor.bits - 1
    # PS3.3 C.11.2.1.2.1: from 0 to the brightest value.
    dataset.WindowCenter, dataset.WindowWidth = brightest / 2 + 0.5, brightest + 1
    stored = values.astype("u1" if dataset.BitsAllocated == 8 else "<u2")
    dataset.add_new("PixelData", "OB" if dataset.BitsAllocated == 8 else "OW", stored.tobytes())
    if vendor.compressed:
        dataset.compress(RLELossless, stored, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)


def write_hospitals(parts: dict[str, XrayPart], folder: Path, *, names: Sequence[str] = (*HOSPITALS, "test")) -> None:
    """Write the studies of these hospitals below ``folder``, each in a folder of its name; "test" has the first
    vendor's."""
    for name in names:
        number = HOSPITALS.index(name) if name in HOSPITALS else len(HOSPITALS)
        write_studies(parts[name], folder / name, vendor=VENDORS[number % len(VENDORS)], root=number + 1)
