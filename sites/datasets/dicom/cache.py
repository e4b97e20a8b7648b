"""An index's images, decoded once by a plan, as memory-mapped rows; and how patients and parts are laid out in them.

A cache is a folder that only the site's user can read: `features.npy` (rows, channels, ...) and `targets.npy` (rows,
targets) as float32, `patients.npy` (rows,) as numbers without a meaning elsewhere, and `card.json`.  Rows that are
trained on come first, then validation, then held out: each part is one piece of the files, and is never copied.
"""

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from math import nan, prod
from pathlib import Path
from typing import BinaryIO, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from sites.datasets.dicom.index import DicomIndex, IndexedImage, Progress
from sites.datasets.dicom.labels import Labels, Target
from sites.datasets.dicom.records import (
    SAME_DIRECTION,
    ImagePlan,
    Images,
    Limits,
    MakeImages,
    Reason,
    Refused,
    evenly_spaced,
)
from sites.datasets.dicom.workers import Workers
from sites.errors import DatasetError
from sites.files import write_atomic

Part = Literal["train", "validation", "held out"]
PARTS: Final[tuple[Part, ...]] = ("train", "validation", "held out")
CARD_FILE: Final = "card.json"
FEATURES_FILE: Final = "features.npy"
TARGETS_FILE: Final = "targets.npy"
PATIENTS_FILE: Final = "patients.npy"
_FRAMES_IN_A_TASK: Final = 32


class CacheCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a cache was made of: plan, targets, the rows and patients of each part, what was left out by reason, and who
    decoded how many rows.  ``source`` changes with any of the files, labels or the plan."""

    plan: ImagePlan
    targets: list[Target]
    rows: dict[str, int]
    patients: dict[str, int]
    refused: dict[str, int]
    decoders: dict[str, int]
    source: str

    def part(self, part: Part) -> slice:
        """Where a part's rows are."""
        start = sum(self.rows[before] for before in PARTS[: PARTS.index(part)])
        return slice(start, start + self.rows[part])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What becomes the rows of one task: frames of one file each a row, or of a series one volume."""

    patient: bytes
    images: Sequence[IndexedImage]
    frames: Sequence[Sequence[int]]
    distance: float | None
    targets: tuple[float, ...]

    @property
    def rows(self) -> int:
        """How many examples it gives, unless it cannot be decoded."""
        return 1 if self.distance is not None else sum(map(len, self.frames))

    def task(self, plan: ImagePlan, limits: Limits) -> MakeImages:
        """What a worker is asked."""
        files = [(image.path, list(frames)) for image, frames in zip(self.images, self.frames, strict=True)]
        return MakeImages(files, plan, limits, self.distance)


def build_cache(
    index: DicomIndex,
    plan: ImagePlan,
    folder: Path,
    *,
    labels: Labels | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> CacheCard:
    """Decode what ``plan`` asks for into the cache ``folder``; one that was made of the same is kept as it is.

    ``labels``: images without any are left out; ``progress``: called with the rows done and to do, at most.  Raises
    DatasetError if no row is left to train on.
    """
    samples, refused = planned(index, plan, labels)
    targets = () if labels is None else labels.targets
    source = _source(samples, plan, index.limits, targets)
    if (folder / CARD_FILE).exists() and (card := load_card(folder)).source == source:
        return card
    temporary = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, mode=0o700)
        with nullcontext(workers) if workers else Workers() as pool:
            card = _write(temporary, samples, index, plan, targets, refused, source, pool, progress)
        if not card.rows["train"]:
            raise DatasetError(
                f"DICOM cache: found {sum(card.rows.values())} rows, none of them to train on, expected some; "
                "`secureagg data inspect` says what is refused and why"
            )
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return card


def load_card(folder: Path) -> CacheCard:
    """What a cache was made of; DatasetError if ``folder`` is none."""
    try:
        return msgspec.json.decode((folder / CARD_FILE).read_bytes(), type=CacheCard)
    except OSError as error:
        raise DatasetError(f"{folder / CARD_FILE}: cannot be read: {error.strerror}, expected a cache") from None
    except (msgspec.DecodeError, DatasetError) as error:
        raise DatasetError(f"{folder / CARD_FILE}: not the card of a cache: {error}") from None


def load_arrays(
    folder: Path, card: CacheCard
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Features, memory-mapped (writing changes this process's view only), targets and patients; DatasetError if they
    are not what the card says."""
    rows = sum(card.rows.values())
    try:
        features = np.load(folder / FEATURES_FILE, mmap_mode="c", allow_pickle=False)
        targets = np.load(folder / TARGETS_FILE, allow_pickle=False)
        patients = np.load(folder / PATIENTS_FILE, allow_pickle=False)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read: {error.strerror}, expected a cache") from None
    except ValueError:
        raise DatasetError(f"{folder}: a file is cut off or not an array, expected a cache; build it anew") from None
    found = (features.shape, targets.shape, patients.shape)
    expected = ((rows, *card.plan.example_shape), (rows, len(card.targets)), (rows,))
    if found != expected or features.dtype != np.dtype("<f4"):
        raise DatasetError(f"{folder}: found arrays of {found}, expected {expected}; build the cache anew")
    return features, targets, patients


def part_of(index: DicomIndex, plan: ImagePlan, patient: bytes) -> Part:
    """The part that a patient, with all images, is in."""
    place = index.pseudonyms.part_of(patient)
    if place < plan.held_out:
        return "held out"
    return "validation" if place < plan.held_out + plan.validation else "train"


def planned(index: DicomIndex, plan: ImagePlan, labels: Labels | None = None) -> tuple[list[Sample], Counter[Reason]]:
    """What is to be decoded, part by part and patient by patient, and what else the plan leaves out, by reason.

    Reasons count files, except those about a volume and the cap, which count volumes or frames.
    """
    refused: Counter[Reason] = Counter()
    if labels is not None and labels.key == "instance" and plan.makes_volumes:
        raise DatasetError(
            "labels: found labels of instances, expected labels of patients, studies or series of volumes"
        )
    by_patient: dict[bytes, list[Sample]] = defaultdict(list)
    chosen = [image for image in index.images if _is_chosen(image, plan, labels, refused)]
    for found in _volumes(chosen, labels) if plan.makes_volumes else _frames(chosen, labels):
        if isinstance(found, Reason):
            refused[found] += 1
        else:
            by_patient[found.patient].append(found)
    samples = []
    for patient in sorted(by_patient, key=lambda key: (PARTS.index(part_of(index, plan, key)), key)):
        kept = _capped(by_patient[patient], plan.images_per_patient, index)
        refused[Reason.OVER_CAP] += sum(one.rows for one in by_patient[patient]) - sum(one.rows for one in kept)
        samples += kept
    return samples, +refused


def _is_chosen(image: IndexedImage, plan: ImagePlan, labels: Labels | None, refused: Counter[Reason]) -> bool:
    if plan.modalities and image.header.descriptors.modality not in plan.modalities:
        refused[Reason.MODALITY] += 1
    elif plan.spacing is not None and image.header.spacing is None:
        refused[Reason.NO_SPACING] += 1
    elif labels is not None and labels.of(image) is None:
        refused[Reason.NO_LABEL] += 1
    else:
        return True
    return False


def _targets(image: IndexedImage, labels: Labels | None) -> tuple[float, ...]:
    return (labels.of(image) or (nan,)) if labels is not None else ()


def _frames(images: Iterable[IndexedImage], labels: Labels | None) -> Iterator[Sample]:
    for image in images:
        frames = range(image.header.frames)
        yield Sample(
            patient=image.patient, images=[image], frames=[frames], distance=None, targets=_targets(image, labels)
        )


def _volumes(images: Iterable[IndexedImage], labels: Labels | None) -> Iterator[Sample | Reason]:
    """One sample, or the reason why not, for each multi-frame file and each series of the other files."""
    series: dict[tuple[bytes, bytes], list[IndexedImage]] = defaultdict(list)
    for image in images:
        alone = image.instance if image.header.frames > 1 else b""
        series[image.series, alone].append(image)
    for stack in series.values():
        slices = [(image, frame) for image in stack for frame in range(image.header.frames)]
        order = _order(stack)
        if isinstance(order, Reason):
            yield order
            continue
        places, distance = order
        yield Sample(
            patient=stack[0].patient,
            images=[slices[place][0] for place in places] if len(stack) > 1 else stack,
            frames=[[slices[place][1]] for place in places] if len(stack) > 1 else [[slices[p][1] for p in places]],
            distance=distance,
            targets=_targets(stack[0], labels),
        )


def _order(stack: Sequence[IndexedImage]) -> tuple[list[int], float] | Reason:
    first = stack[0].header
    if first.orientation is None or any(one.header.positions is None for one in stack):
        return Reason.NO_GEOMETRY
    for one in stack:
        header = one.header
        if (header.rows, header.columns, header.colour) != (first.rows, first.columns, first.colour) or not (
            _near(header.orientation, first.orientation)
            and _near(header.spacing, first.spacing)
            and one.patient == stack[0].patient
        ):
            return Reason.MIXED_SERIES
    return evenly_spaced([position for one in stack for position in one.header.positions or ()])


def _near(found: tuple[float, ...] | None, expected: tuple[float, ...] | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return bool(np.allclose(found, expected, atol=SAME_DIRECTION))


def _capped(samples: list[Sample], most: int, index: DicomIndex) -> list[Sample]:
    """At most ``most`` rows of a patient: frames, or volumes, in an order that the site's secret decides."""

    def place(sample: Sample, frame: int) -> bytes:
        return index.pseudonyms.of(b"cap", sample.images[0].instance, frame.to_bytes(4, "little"))

    if samples[0].distance is not None:
        return sorted(samples, key=lambda sample: place(sample, 0))[:most]
    frames = [(sample, frame) for sample in samples for frame in sample.frames[0]]
    frames = sorted(frames, key=lambda found: place(*found))[:most]
    kept: dict[bytes, tuple[Sample, list[int]]] = {}
    for sample, frame in frames:
        kept.setdefault(sample.images[0].instance, (sample, []))[1].append(frame)
    return [
        Sample(
            patient=sample.patient,
            images=sample.images,
            frames=[sorted(of_one)[start : start + _FRAMES_IN_A_TASK]],
            distance=None,
            targets=sample.targets,
        )
        for sample, of_one in kept.values()
        for start in range(0, len(of_one), _FRAMES_IN_A_TASK)
    ]


def _source(samples: Iterable[Sample], plan: ImagePlan, limits: Limits, targets: Sequence[Target]) -> str:
    """A fingerprint of all that decides what a cache holds."""
    hashed = sha256(msgspec.json.encode([plan, limits, list(targets)]))
    for sample in samples:
        for image, frames in zip(sample.images, sample.frames, strict=True):
            hashed.update(image.file + sample.patient + repr((image.version, list(frames))).encode())
        hashed.update(repr(sample.targets).encode())
    return hashed.hexdigest()


def _write(
    folder: Path,
    samples: list[Sample],
    index: DicomIndex,
    plan: ImagePlan,
    targets: Sequence[Target],
    refused: Counter[Reason],
    source: str,
    pool: Workers,
    progress: Progress | None,
) -> CacheCard:
    """Write the files of a cache, rows in the order of ``samples``."""
    limits = index.limits
    expected = sum(sample.rows for sample in samples)
    decoders: Counter[str] = Counter()
    owners: list[bytes] = []
    values: list[tuple[float, ...]] = []
    done = 0
    tasks = ((one, one.task(plan, limits), limits.seconds * (1 + len(one.images) / 32)) for one in samples)
    with open(folder / FEATURES_FILE, "xb", opener=_private) as file:
        start = _write_header(file, (expected, *plan.example_shape))
        for sample, answer in pool.run(tasks):
            done += sample.rows
            if isinstance(answer, Images) and _is_of(answer, sample, plan):
                file.write(answer.values)
                decoders[answer.decoder] += answer.count
                owners += [sample.patient] * answer.count
                values += [sample.targets] * answer.count
            else:
                refused[answer.reason if isinstance(answer, Refused) else Reason.CRASHED] += 1
            if progress is not None:
                progress(done, expected)
        file.seek(0)
        if _write_header(file, (len(owners), *plan.example_shape)) != start:
            raise DatasetError("DICOM cache: the array's header has another length than was left for it")
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(owners))}
    for name, array in (
        (TARGETS_FILE, np.array(values, np.float32).reshape(len(owners), len(targets))),
        (PATIENTS_FILE, np.array([numbers[owner] for owner in owners], np.int64)),
    ):
        with open(folder / name, "xb", opener=_private) as file:
            np.save(file, array, allow_pickle=False)
    rows = Counter(part_of(index, plan, owner) for owner in owners)
    patients = Counter(part_of(index, plan, owner) for owner in numbers)
    card = CacheCard(
        plan=plan,
        targets=list(targets),
        rows={part: rows[part] for part in PARTS},
        patients={part: patients[part] for part in PARTS},
        refused={reason.value: count for reason, count in sorted((index.refused + refused).items())},
        decoders=dict(sorted(decoders.items())),
        source=source,
    )
    write_atomic(folder / CARD_FILE, msgspec.json.format(msgspec.json.encode(card)), mode=0o600)
    return card


def _is_of(answer: Images, sample: Sample, plan: ImagePlan) -> bool:
    """Whether a worker has answered what was asked; one that was taken over may not."""
    return answer.count == sample.rows and len(answer.values) == 4 * answer.count * prod(plan.example_shape)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> int:
    """Write the header of a float32 array; where its values begin.  numpy leaves room for any number of rows."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.tell()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
