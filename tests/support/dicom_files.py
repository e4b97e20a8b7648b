"""DICOM files made for tests, and the ones that come with pydicom."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom.data
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    MRImageStorage,
)

SHIPPED = Path(pydicom.data.__file__).parent / "test_files"
SOP_CLASSES = {"CT": CTImageStorage, "DX": DigitalXRayImageStorageForPresentation, "MR": MRImageStorage}
ROOT = "1.2.826.0.1.3680043.8.498."


def image(
    pixels: npt.NDArray[np.integer] | None = None,
    *,
    number: int = 1,
    patient: str = "P1",
    series: int = 1,
    modality: str = "DX",
    **attributes: object,
) -> Dataset:
    """An image of one frame (rows, columns), or several (frames, rows, columns), number ``number`` of its series; an
    attribute that is None is left out."""
    stored = np.arange(64, dtype=np.uint16).reshape(8, 8) if pixels is None else pixels
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = SOP_CLASSES[modality]
    dataset.SOPInstanceUID = f"{ROOT}{series}.{number}"
    dataset.StudyInstanceUID = f"{ROOT}100.{patient.encode().hex(' ').replace(' ', '').translate(_DIGITS)}"[:64]
    dataset.SeriesInstanceUID = f"{ROOT}200.{series}"
    dataset.PatientID = patient
    dataset.Modality = modality
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        dataset.NumberOfFrames = len(stored)
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.add_new("PixelData", "OW", stored.astype(stored.dtype.newbyteorder("<")).tobytes())
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPClassUID = UID(dataset.get("SOPClassUID", ""))
    dataset.file_meta.MediaStorageSOPInstanceUID = f"{ROOT}1"
    return dataset


_DIGITS = str.maketrans("abcdef", "123456")


def save(dataset: Dataset, path: Path) -> Path:
    """Write a whole DICOM file, with preamble."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def slices(count: int, *, distance: float = 2.0, **attributes: object) -> Iterator[Dataset]:
    """An axial series whose pixels are the number of the slice, from the feet up, numbered from the head down."""
    for place in range(count):
        yield image(
            np.full((8, 8), place, np.int16),
            **{
                "modality": "CT",
                "number": count - place,
                "InstanceNumber": count - place,
                "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "ImagePositionPatient": [-4, -4, 10 + place * distance],
                "PixelSpacing": [1.0, 1.0],
                **attributes,
            },
        )
