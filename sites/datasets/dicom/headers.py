"""A file's header, read in a worker: what is kept of it, or why it is refused."""

import os
import re
from collections.abc import Callable
from math import isfinite
from typing import Any, Final

import numpy as np
from pydicom import Dataset, config, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.tag import Tag
from pydicom.uid import UID

from sites.datasets.dicom.records import Descriptors, Found, Header, Identifiers, Limits, Reason, Refusal, Refused

# A value that breaks its own rules is judged here, where it matters; warnings would quote it.
config.settings.reading_validation_mode = config.IGNORE

_KEYWORDS: Final = (
    "SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID StudyDate Modality Manufacturer PatientID "
    "IssuerOfPatientID PatientBirthDate PatientSex PatientAge SliceThickness KVP MagneticFieldStrength "
    "StudyInstanceUID SeriesInstanceUID ImagePositionPatient ImageOrientationPatient SamplesPerPixel "
    "PhotometricInterpretation NumberOfFrames Rows Columns PixelSpacing ImagerPixelSpacing "
    "NominalScannedPixelSpacing BitsAllocated BitsStored PixelRepresentation BurnedInAnnotation "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence"
)
_OVERLAY_ROWS: Final = [Tag(group, 0x0010) for group in range(0x6000, 0x6020, 2)]
_TAGS: Final = [*(Tag(keyword) for keyword in _KEYWORDS.split()), *_OVERLAY_ROWS]

# Words of a SOP class's name, in the order in which they decide.
_OBJECTS: Final = (
    ("Storage Directory", Reason.DIRECTORY),
    ("Presentation State", Reason.PRESENTATION),
    ("Encapsulated", Reason.DOCUMENT),
    ("Segmentation", Reason.SEGMENTATION),
    ("RT Image", Reason.RADIOTHERAPY),
    ("RT ", Reason.RADIOTHERAPY),
    ("Waveform", Reason.WAVEFORM),
    ("ECG", Reason.WAVEFORM),
    (" SR ", Reason.REPORT),
    ("Report", Reason.REPORT),
)
_SAMPLES: Final = {
    "MONOCHROME1": 1,
    "MONOCHROME2": 1,
    "PALETTE COLOR": 1,
    "RGB": 3,
    "YBR_FULL": 3,
    "YBR_FULL_422": 3,
    "YBR_ICT": 3,
    "YBR_RCT": 3,
}
# Slices that were computed from others, and overviews, belong to no volume.  In X-rays DERIVED is usual.
_CROSS_SECTIONAL: Final = {"CT", "MR", "PT", "NM"}
_SUSPECT_MODALITIES: Final = {"US", "IVUS", "XA", "RF", "ES", "SC"}
_MODALITIES: Final = _CROSS_SECTIONAL | _SUSPECT_MODALITIES | {"CR", "DX", "MG", "IO", "PX", "XC", "OP", "SM", "OT"}

_MAKERS: Final = {
    "siemens": "siemens",
    "ge medical": "ge",
    "ge health": "ge",
    "philips": "philips",
    "canon": "canon",
    "toshiba": "canon",
    "fuji": "fujifilm",
    "hitachi": "fujifilm",
    "agfa": "agfa",
    "carestream": "carestream",
    "kodak": "carestream",
    "hologic": "hologic",
    "lorad": "hologic",
    "konica": "konica minolta",
    "samsung": "samsung",
    "shimadzu": "shimadzu",
    "united imaging": "united imaging",
}
UNKNOWN: Final = "unknown"


def read_header(path: bytes, limits: Limits) -> Found | Refused:
    """What is kept of the file's header, or why there is nothing; never raises, and never says what was in it."""
    try:
        return _read(path, limits)
    except Refusal as refusal:
        return Refused(refusal.reason)
    except Exception as error:
        # The last stands for whatever else a parser meets in a file that anybody may have made.
        return Refused(next((reason for kind, reason in _CAUSES if isinstance(error, kind)), Reason.BAD_HEADER))


_CAUSES: Final = (
    (InvalidDicomError, Reason.NO_PREAMBLE),
    (EOFError, Reason.TRUNCATED),
    (MemoryError, Reason.MEMORY),
    (OSError, Reason.UNREADABLE),
)


def _refuse_if(found: object, reason: Reason) -> None:
    if found:
        raise Refusal(reason)


def _read(path: bytes, limits: Limits) -> Found:
    with open(path, "rb") as file:  # noqa: PTH123  not every name of a file is text
        size = os.fstat(file.fileno()).st_size
        _refuse_if(size == 0, Reason.EMPTY)
        _refuse_if(size > limits.file_bytes, Reason.FILE_TOO_LARGE)
        _refuse_if(file.read(132)[128:] != b"DICM", Reason.NO_PREAMBLE)
        file.seek(0)
        dataset = dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
        after_header = file.tell()
    sop_class = _sop_class(dataset)
    rows, columns, frames = _size(dataset, limits)
    colour, sample_bytes = _samples(dataset)
    syntax = UID(dataset.file_meta.get("TransferSyntaxUID", ""))
    _refuse_if(syntax.is_private or not syntax.is_transfer_syntax, Reason.NO_DECODER)
    # Of compressed pixels the decoder says whether they are whole.
    if not syntax.is_encapsulated and not syntax.is_deflated:
        remaining = size - after_header
        _refuse_if(remaining == 0, Reason.NO_PIXELS)
        _refuse_if(remaining < rows * columns * frames * sample_bytes, Reason.TRUNCATED)
    identifiers = Identifiers(
        *(
            _text(dataset, keyword)
            for keyword in ("IssuerOfPatientID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
        )
    )
    _refuse_if(not identifiers.instance, Reason.BAD_ATTRIBUTES)
    descriptors = _descriptors(dataset)
    _refuse_by_type(dataset, descriptors.modality, sop_class, limits)
    orientation, positions = _geometry(dataset, frames)
    header = Header(
        rows=rows,
        columns=columns,
        frames=frames,
        colour=colour,
        spacing=_spacing(dataset),
        orientation=orientation,
        positions=positions,
        syntax=str(syntax),
        descriptors=descriptors,
    )
    return Found(identifiers, header)


def _sop_class(dataset: Dataset) -> str:
    """The name of an image's SOP class."""
    uid = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or ""
    name = UID(str(uid)).name
    for words, reason in _OBJECTS:
        _refuse_if(words in f"{name} ", reason)
    _refuse_if("Image Storage" not in name, Reason.OTHER_OBJECT)
    return name


def _size(dataset: Dataset, limits: Limits) -> tuple[int, int, int]:
    """Rows, columns and frames, which nothing is allocated by before they are within the limits."""
    if dataset.get("Rows") is None and dataset.get("Columns") is None:
        raise Refusal(Reason.NO_PIXELS)
    rows, columns = _whole(dataset, "Rows"), _whole(dataset, "Columns")
    frames = _whole(dataset, "NumberOfFrames", 1)
    _refuse_if(frames == 0, Reason.NO_FRAMES)
    _refuse_if(min(rows, columns, frames) < 1, Reason.BAD_ATTRIBUTES)
    _refuse_if(frames > limits.frames, Reason.TOO_MANY_FRAMES)
    _refuse_if(rows * columns > limits.pixels, Reason.TOO_MANY_PIXELS)
    return rows, columns, frames


def _samples(dataset: Dataset) -> tuple[bool, float]:
    """Whether pixels have colour, and how many bytes each takes uncompressed."""
    photometric, samples = _text(dataset, "PhotometricInterpretation"), _whole(dataset, "SamplesPerPixel", 1)
    _refuse_if(_SAMPLES.get(photometric) != samples, Reason.PHOTOMETRIC)
    allocated = _whole(dataset, "BitsAllocated")
    stored = _whole(dataset, "BitsStored", allocated)
    sign = _whole(dataset, "PixelRepresentation", 0)
    _refuse_if(
        allocated not in {8, 16, 32} or not 1 <= stored <= allocated or sign not in {0, 1}, Reason.BAD_ATTRIBUTES
    )
    stored_samples = 2 if photometric == "YBR_FULL_422" else samples
    return not photometric.startswith("MONOCHROME"), stored_samples * allocated / 8


def _refuse_by_type(dataset: Dataset, modality: str, sop_class: str, limits: Limits) -> None:
    image_type = [str(value).strip().upper() for value in _values(dataset, "ImageType")]
    _refuse_if("LOCALIZER" in image_type, Reason.LOCALIZER)
    derived = modality in _CROSS_SECTIONAL and not {"DERIVED", "SECONDARY"}.isdisjoint(image_type[:2])
    _refuse_if(derived and not limits.keep_derived, Reason.DERIVED)
    # Stops names that a device has drawn into the picture, where no rule about headers finds them.
    annotation = _text(dataset, "BurnedInAnnotation").upper()
    suspect = (
        modality in _SUSPECT_MODALITIES
        or "Secondary Capture" in sop_class
        or "SCREEN SAVE" in image_type
        or any(tag in dataset for tag in _OVERLAY_ROWS)
    )
    burned_in = annotation == "YES" or (suspect and annotation != "NO")
    _refuse_if(burned_in and not limits.keep_suspected_text, Reason.BURNED_IN)


def _geometry(dataset: Dataset, frames: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """The plane's orientation and each frame's position along its normal; None where the file has none."""
    planes = [frame_attributes(dataset, frame) for frame in range(frames if _has_groups(dataset) else 1)]
    orientations = [_numbers(plane, "ImageOrientationPatient", 6) for plane in planes]
    places = [_numbers(plane, "ImagePositionPatient", 3) for plane in planes]
    first = orientations[0]
    if first is None or len(planes) != frames or any(place is None for place in places):
        return None, None
    if any(other is None or not np.allclose(first, other, atol=1e-3) for other in orientations):
        return None, None
    normal = np.cross(first[:3], first[3:])
    if not np.isclose(np.linalg.norm(normal), 1.0, atol=1e-2):
        return None, None
    return first, tuple(float(np.dot(normal, place)) for place in places if place is not None)


def _has_groups(dataset: Dataset) -> bool:
    return "PerFrameFunctionalGroupsSequence" in dataset or "SharedFunctionalGroupsSequence" in dataset


_GROUPS: Final = (
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelValueTransformationSequence",
    "FrameVOILUTSequence",
)


def frame_attributes(dataset: Dataset, frame: int) -> Dataset:
    """The attributes that hold for one frame: the functional groups of an enhanced multi-frame file, its own before the
    shared ones, over those of the file (PS3.3 C.7.6.16)."""
    if not _has_groups(dataset):
        return dataset
    merged = Dataset()
    merged.update(dataset)
    shared, own = dataset.get("SharedFunctionalGroupsSequence") or [], dataset.get("PerFrameFunctionalGroupsSequence")
    for groups in [*shared[:1], *(own[frame : frame + 1] if own else [])]:
        for keyword in _GROUPS:
            for item in (groups.get(keyword) or [])[:1]:
                merged.update(item)
    return merged


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    plane = frame_attributes(dataset, 0)
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        found = _numbers(plane, keyword, 2)
        if found is not None and min(found) > 0:
            return found[0], found[1]
    return None


def _descriptors(dataset: Dataset) -> Descriptors:
    modality = _text(dataset, "Modality").upper()
    maker = _text(dataset, "Manufacturer").casefold()
    sex = _text(dataset, "PatientSex").upper()
    plane = frame_attributes(dataset, 0)
    return Descriptors(
        # Only known words: a field may hold anything, a name too.
        modality=modality if modality in _MODALITIES else "other",
        manufacturer=next((family for word, family in _MAKERS.items() if word in maker), "other" if maker else UNKNOWN),
        kvp=_band(_number(dataset, "KVP"), (60, 80, 100, 120, 140), "kV"),
        field_strength=_band(_number(dataset, "MagneticFieldStrength"), (1, 2, 4), "T"),
        slice_thickness=_band(_number(plane, "SliceThickness"), (1, 2, 3, 5), "mm"),
        sex={"F": "female", "M": "male", "O": "other"}.get(sex, UNKNOWN),
        age=_band(_age(dataset), tuple(range(10, 90, 10)), "years"),
        year=_year(dataset),
    )


def _band(value: float | None, edges: tuple[int, ...], unit: str) -> str:
    """The half-open band between two of ``edges`` in which ``value`` lies."""
    if value is None or not isfinite(value) or value < 0:
        return UNKNOWN
    above = next((place for place, edge in enumerate(edges) if value < edge), len(edges))
    if above == 0:
        return f"below {edges[0]} {unit}"
    return f"{edges[-1]} {unit} or more" if above == len(edges) else f"{edges[above - 1]} to {edges[above]} {unit}"


def _age(dataset: Dataset) -> float | None:
    stated = re.fullmatch(r"(\d{1,3})([DWMY])", _text(dataset, "PatientAge").upper())
    if stated:
        return int(stated[1]) / {"D": 365.25, "W": 52.2, "M": 12.0, "Y": 1.0}[stated[2]]
    born, studied = (
        re.match(r"(\d{4})(\d{2})(\d{2})", _text(dataset, key)) for key in ("PatientBirthDate", "StudyDate")
    )
    if born is None or studied is None:
        return None
    years = int(studied[1]) - int(born[1])
    return float(years - ((studied[2], studied[3]) < (born[2], born[3])))


def _year(dataset: Dataset) -> str:
    found = re.match(r"(19|20)\d\d", _text(dataset, "StudyDate"))
    if found is None:
        return UNKNOWN
    start = int(found[0]) // 5 * 5
    return f"{start} to {start + 4}"


def _values(dataset: Dataset, keyword: str) -> list[Any]:
    value = dataset.get(keyword)
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    return list(value) if hasattr(value, "__iter__") else [value]


def _text(dataset: Dataset, keyword: str) -> str:
    return "\\".join(str(value) for value in _values(dataset, keyword)).strip(" \0")


def _converted(dataset: Dataset, keyword: str, convert: Callable[[Any], float]) -> list[float]:
    try:
        return [convert(value) for value in _values(dataset, keyword)]
    except (ValueError, TypeError, OverflowError):
        return []


def _number(dataset: Dataset, keyword: str) -> float | None:
    found = _converted(dataset, keyword, float)
    return found[0] if found else None


def _numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    found = _converted(dataset, keyword, float)
    return tuple(found) if len(found) == count and all(isfinite(number) for number in found) else None


def _whole(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    """A whole number; the default where the attribute is absent."""
    try:
        values = _values(dataset, keyword)
        if values:
            return int(values[0])
    except (ValueError, TypeError, OverflowError):
        raise Refusal(Reason.BAD_ATTRIBUTES) from None
    if default is None:
        raise Refusal(Reason.BAD_ATTRIBUTES)
    return default
