"""What a folder of images is worth for training, in counts and bands: for a data manager, at the site only.

Nothing here names anybody, but a count of one says something of one person: it is not meant to leave the site.
"""

from collections import Counter
from io import BytesIO
from math import inf, isnan
from statistics import median
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from sites.datasets.dicom.cache import planned
from sites.datasets.dicom.index import DicomIndex, Progress
from sites.datasets.dicom.labels import Labels
from sites.datasets.dicom.records import Descriptors, ImagePlan, Images, Reason, Refused
from sites.datasets.dicom.workers import Workers

THUMBNAIL: Final = ImagePlan(shape=(96, 96), images_per_patient=1)
_EVERY_IMAGE: Final = 1 << 30
_VOLUMES: Final = ImagePlan(shape=(1, 1, 1), images_per_patient=_EVERY_IMAGE)
_MOST_SIZES: Final = 8
_SHEET_COLUMNS: Final = 8
_SHEET_IMAGES: Final = 64


class Spread(msgspec.Struct, frozen=True):
    """The least, the median and the most."""

    least: int
    median: float
    most: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Counts only.  ``refused``: files by reason; ``volumes`` and ``no_volume``: series and multi-frame files that can
    be stacked, and the others by reason; ``decoded`` and ``not_decoded``: what came of trying some; ``labels``: images
    by class for each target; ``descriptors``: patients by band."""

    files: int
    files_read: int
    files_unchanged: int
    files_removed: int
    refused: dict[str, int]
    images: int
    frames: int
    patients: int
    patients_by_study: int
    images_per_patient: Spread | None
    sizes: dict[str, int]
    volumes: int
    no_volume: dict[str, int]
    decoded: int
    not_decoded: dict[str, int]
    decoders: dict[str, int]
    labels: dict[str, dict[str, int]]
    descriptors: dict[str, dict[str, int]]


def summarise(
    index: DicomIndex,
    *,
    labels: Labels | None = None,
    decode: int | None = _SHEET_IMAGES,
    workers: Workers,
    progress: Progress | None = None,
) -> tuple[Summary, list[npt.NDArray[np.uint8]]]:
    """The summary of an index, and some thumbnails (rows, columns).

    ``decode``: try one frame each of so many patients, or every frame of every image (None).
    """
    thumbnails, decoders, not_decoded = _decoded(index, decode, workers, progress)
    per_patient = Counter(image.patient for image in index.images).values()
    volumes, no_volume = planned(index, _VOLUMES)
    sizes = Counter(f"{image.header.rows} x {image.header.columns}" for image in index.images)
    common = dict(sizes.most_common(_MOST_SIZES))
    if rest := sizes.total() - sum(common.values()):
        common["other"] = rest
    summary = Summary(
        files=index.files,
        files_read=index.read,
        files_unchanged=index.unchanged,
        files_removed=index.removed,
        refused=_by_count(index.refused),
        images=len(index.images),
        frames=sum(image.header.frames for image in index.images),
        patients=index.patients,
        patients_by_study=index.patients_by_study,
        images_per_patient=Spread(min(per_patient), median(per_patient), max(per_patient)) if per_patient else None,
        sizes=common,
        volumes=len(volumes),
        no_volume=_by_count(no_volume),
        decoded=decoders.total(),
        not_decoded=_by_count(not_decoded),
        decoders=dict(decoders.most_common()),
        labels={} if labels is None else _balance(index, labels),
        descriptors={field: _patients_by_band(index, field) for field in Descriptors.__struct_fields__},
    )
    return summary, thumbnails


def contact_sheet(thumbnails: list[npt.NDArray[np.uint8]]) -> bytes:
    """The thumbnails side by side as a PNG file, without any text."""
    from PIL import Image  # noqa: PLC0415

    rows, columns = THUMBNAIL.shape
    lines = -(-len(thumbnails) // _SHEET_COLUMNS)
    sheet = np.zeros((max(1, lines) * (rows + 1), _SHEET_COLUMNS * (columns + 1)), np.uint8)
    for place, one in enumerate(thumbnails):
        top, left = place // _SHEET_COLUMNS * (rows + 1), place % _SHEET_COLUMNS * (columns + 1)
        sheet[top : top + rows, left : left + columns] = one
    file = BytesIO()
    Image.fromarray(sheet).save(file, format="PNG")
    return file.getvalue()


def _decoded(
    index: DicomIndex, most: int | None, workers: Workers, progress: Progress | None
) -> tuple[list[npt.NDArray[np.uint8]], Counter[str], Counter[Reason]]:
    """Thumbnails, how many frames each decoder gave, and how many files gave none, by reason."""
    plan = THUMBNAIL if most is not None else msgspec.structs.replace(THUMBNAIL, images_per_patient=_EVERY_IMAGE)
    samples, _ = planned(index, plan)
    samples = samples[:most]
    tasks = ((one, one.task(plan, index.limits), index.limits.seconds) for one in samples)
    thumbnails: list[npt.NDArray[np.uint8]] = []
    decoders: Counter[str] = Counter()
    refused: Counter[Reason] = Counter()
    for done, (_, answer) in enumerate(workers.run(tasks), start=1):
        if isinstance(answer, Images):
            decoders[answer.decoder] += answer.count
            if len(thumbnails) < _SHEET_IMAGES:
                values = np.frombuffer(answer.values, "<f4")[: plan.shape[0] * plan.shape[1]]
                thumbnails.append((values.reshape(plan.shape) * 255).astype(np.uint8))
        elif isinstance(answer, Refused):
            refused[answer.reason] += 1
        if progress is not None:
            progress(done, len(samples))
    return thumbnails, decoders, refused


def _balance(index: DicomIndex, labels: Labels) -> dict[str, dict[str, int]]:
    """Images by class, or for a number with one, and without a label."""
    found: dict[str, dict[str, int]] = {}
    for place, target in enumerate(labels.targets):
        counts = dict.fromkeys(target.classes or ("a number",), 0) | {"no label": 0}
        for image in index.images:
            values = labels.of(image)
            if values is None or isnan(values[place]):
                counts["no label"] += 1
            else:
                counts[target.classes[int(values[place])] if target.classes else "a number"] += 1
        found[target.name] = counts
    return found


def _patients_by_band(index: DicomIndex, field: str) -> dict[str, int]:
    """Patients who have at least one image in each band, so that one may be in several."""
    bands: dict[str, set[bytes]] = {}
    for image in index.images:
        bands.setdefault(getattr(image.header.descriptors, field), set()).add(image.patient)
    counts = _by_count(Counter({band: len(patients) for band, patients in bands.items()}))
    return dict(sorted(counts.items(), key=lambda found: _place(found[0])))


def _place(band: str) -> tuple[float, bool]:
    """Where a band of numbers is among its like; what is none comes behind, as it was."""
    numbers = (int(word) for word in band.split() if word.isdigit())
    return next(numbers, inf), not band.startswith("below")


def _by_count(counts: Counter[Reason] | Counter[str]) -> dict[str, int]:
    return {str(name): count for name, count in sorted(counts.items(), key=lambda found: (-found[1], found[0]))}
