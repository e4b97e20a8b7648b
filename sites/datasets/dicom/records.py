"""What passes between the modules here, and between the site's process and its workers."""

from enum import StrEnum
from itertools import pairwise
from math import isclose, isfinite
from typing import Annotated, Final

import msgspec

from sites.errors import DatasetError

Positive = Annotated[int, msgspec.Meta(ge=1)]


class Reason(StrEnum):
    """Why a file or a series gives no image.  The words are all that is ever said about it."""

    LINK = "a link or special file, not followed"
    FOLDER = "folder that cannot be read"
    UNREADABLE = "cannot be opened"
    EMPTY = "empty file"
    FILE_TOO_LARGE = "file larger than the limit"
    NO_PREAMBLE = "no DICOM preamble"
    BAD_HEADER = "header cannot be parsed"
    DIRECTORY = "DICOMDIR"
    REPORT = "structured report"
    DOCUMENT = "encapsulated document"
    PRESENTATION = "presentation state"
    RADIOTHERAPY = "radiotherapy object"
    WAVEFORM = "waveform"
    SEGMENTATION = "segmentation"
    OTHER_OBJECT = "not an image class"
    NO_PIXELS = "no pixel data"
    NO_FRAMES = "zero frames"
    BAD_ATTRIBUTES = "pixel attributes missing or impossible"
    PHOTOMETRIC = "photometric interpretation not supported or contradicted"
    TOO_MANY_FRAMES = "more frames than the limit"
    TOO_MANY_PIXELS = "more pixels than the limit"
    TRUNCATED = "truncated"
    NO_PATIENT = "neither patient nor study"
    LOCALIZER = "localizer"
    DERIVED = "derived or secondary image"
    BURNED_IN = "burned-in text suspected"
    DUPLICATE = "duplicate SOP instance"
    NO_DECODER = "no decoder for the transfer syntax"
    DECODER_FAILED = "decoder refused the pixels"
    CRASHED = "decoder crashed"
    TIMED_OUT = "decoder timed out"
    MEMORY = "needs more memory than the limit"
    MODALITY = "modality not in the plan"
    NO_SPACING = "no pixel spacing"
    NO_GEOMETRY = "no slice positions"
    MIXED_SERIES = "slices of a series do not fit together"
    REPEATED_POSITION = "several slices at one position"
    UNEVEN_SPACING = "uneven slice spacing"
    ONE_SLICE = "single slice, expected a volume"
    NO_LABEL = "no label"
    OVER_CAP = "beyond the cap on images per patient"


class Refusal(Exception):
    """Ends the reading of a file; does not leave the worker."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file may ask for, checked before anything is decoded; ``seconds``: of one file's reading or decoding.

    Images that are derived, or that may have text burned in, are left out unless the site says otherwise here.
    """

    file_bytes: Positive = 1 << 30
    frames: Positive = 4096
    pixels: Positive = 1 << 26  # Rows * Columns of one frame
    volume_voxels: Positive = 1 << 28  # of one image or series in memory as float32: 1 GiB
    seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 30.0
    keep_derived: bool = False
    keep_suspected_text: bool = False


class ImagePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How every site of a consortium makes tensors of its images; nothing in it is computed from a site's data.

    ``shape``: (rows, columns) for one image per frame, (slices, rows, columns) for one volume per series or multi-frame
    file.  ``spacing``: in mm, along the same axes; without it the whole image is fitted into the shape, keeping its
    proportions in the plane.  ``hu_centre``, ``hu_width``: the window of CT, in Hounsfield units.  ``mean``,
    ``deviation``: subtracted from and divided by at the end, where values are in [0, 1].  ``modalities``: none for all.
    ``held_out``, ``validation``: shares of the patients.  Raises DatasetError for a plan that is none.
    """

    shape: tuple[Positive, ...]
    spacing: tuple[float, ...] | None = None
    channels: int = 1
    hu_centre: float = 40.0
    hu_width: float = 400.0
    mean: float = 0.0
    deviation: float = 1.0
    modalities: tuple[str, ...] = ()
    images_per_patient: Positive = 16
    held_out: float = 0.2
    validation: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.hu_centre, self.hu_width, self.mean, self.deviation, *(self.spacing or ()))
        usable = (
            len(self.shape) in {2, 3}
            and (self.spacing is None or (len(self.spacing) == len(self.shape) and min(self.spacing) > 0))
            and self.channels in {1, 3}
            and all(isfinite(number) for number in numbers)
            and self.hu_width > 0
            and self.deviation > 0
            and min(self.held_out, self.validation) >= 0
            and self.held_out + self.validation < 1
        )
        if not usable:
            raise DatasetError(
                "image plan: expected a shape of 2 or 3 axes, as many spacings above 0 or none, 1 or 3 channels, "
                "finite numbers, a window and a deviation above 0, and shares that leave some patients to train on"
            )

    @property
    def makes_volumes(self) -> bool:
        """Whether an example is a volume, not one frame."""
        return len(self.shape) == 3

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example: (channels, rows, columns) or (channels, slices, rows, columns)."""
        return (self.channels, *self.shape)


class Identifiers(msgspec.Struct, frozen=True):
    """What names a file's patient, study, series and instance; replaced by pseudonyms at once, never kept."""

    issuer: str
    patient: str
    study: str
    series: str
    instance: str

    def __repr__(self) -> str:
        return "Identifiers(...)"


class Descriptors(msgspec.Struct, frozen=True, kw_only=True):
    """What may differ between hospitals, each in bands; the only values of a header that a summary shows."""

    modality: str
    manufacturer: str
    kvp: str
    field_strength: str
    slice_thickness: str
    sex: str
    age: str
    year: str


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of an image's header.

    ``spacing``: mm between rows and between columns; ``orientation``: direction cosines of a row and of a column;
    ``positions``: mm along the normal of both, for each frame (PS3.3 C.7.6.2.1.1); ``syntax``: the transfer syntax.
    """

    rows: int
    columns: int
    frames: int
    colour: bool
    spacing: tuple[float, float] | None
    orientation: tuple[float, ...] | None
    positions: tuple[float, ...] | None
    syntax: str
    descriptors: Descriptors


class Refused(msgspec.Struct, frozen=True, tag=True):
    """No image, and why."""

    reason: Reason


class Found(msgspec.Struct, frozen=True, tag=True):
    """An image file."""

    identifiers: Identifiers
    header: Header


class ReadHeaders(msgspec.Struct, frozen=True, tag=True):
    """Asks a worker for the headers of some files; it answers with Headers."""

    paths: list[bytes]
    limits: Limits


class Headers(msgspec.Struct, frozen=True, tag=True):
    """A worker's answer: one for each path, in their order."""

    found: list[Found | Refused]


class MakeImages(msgspec.Struct, frozen=True, tag=True):
    """Asks a worker for examples: of each frame of the one file, or of all frames of all files one volume.

    ``files``: path, and frames in the order of the volume; ``distance``: mm between them, if it is known.
    """

    files: list[tuple[bytes, list[int]]]
    plan: ImagePlan
    limits: Limits
    distance: float | None = None


class Images(msgspec.Struct, frozen=True, tag=True):
    """A worker's answer: ``count`` examples of the plan's shape, as little-endian float32, and who decoded them."""

    count: int
    values: bytes
    decoder: str


Task = ReadHeaders | MakeImages
Answer = Headers | Images | Refused

SAME_DIRECTION: Final = 1e-3
SAME_PLACE: Final = 1e-2  # mm
UNEVEN: Final = 0.02  # of the distance between slices; or SAME_PLACE, whichever is more


def evenly_spaced(positions: list[float]) -> tuple[list[int], float] | Reason:
    """The order of slices along their normal, from the least position up, and the distance between them in mm.

    Positions come from ImagePositionPatient, since InstanceNumber may run either way, or by time.
    """
    if len(positions) < 2:
        return Reason.ONE_SLICE
    order = sorted(range(len(positions)), key=positions.__getitem__)
    gaps = [positions[b] - positions[a] for a, b in pairwise(order)]
    distance = (positions[order[-1]] - positions[order[0]]) / len(gaps)
    if min(gaps) < SAME_PLACE:
        return Reason.REPEATED_POSITION
    if not all(isclose(gap, distance, rel_tol=UNEVEN, abs_tol=SAME_PLACE) for gap in gaps):
        return Reason.UNEVEN_SPACING
    return order, distance
