"""Made-up hospitals as real DICOM files, whose truth is known: a measured difference can be checked against it.

After the idea of SimBA (Stanley, Wilms and Forkert 2023): everybody has an anatomy of their own, to which a disease, a
scanner and a bias are added, each of a chosen strength.  The chain that makes an unfair model is in the data, link by
link, and is broken by any option that is 0:

    subgroup (sex) --correlation--> bias, a bright spot in one organ, seen in the image if its strength is not 0
    subgroup (sex) --prevalence_gap--> disease, a bright spot in another organ

A classifier that sees the bias can guess the subgroup, and so raises more false alarms in the one that is ill more
often.  A counterfactual twin is the same body under the same noise with one thing changed, so that their files differ
within one spot and nowhere else.

Every patient has a random stream of their own, from which everything is drawn in one order whatever the options:
changing one option moves that effect only.
"""

import csv
from collections.abc import Iterator
from hashlib import sha256
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from sites.errors import DatasetError

Floats = npt.NDArray[np.float64]
Change = Literal["disease", "bias"]

TRUTH: Final = "truth.json"
LABELS: Final = "labels.csv"
IMAGES: Final = "images"
TWINS: Final = "counterfactuals"
FIELD_OF_VIEW: Final = 384.0  # mm, at a site without a scanner effect
SLICE_DISTANCE: Final = 10.0  # mm
DISEASE_HU: Final = 60.0  # in the middle of the spot, at strength 1
BIAS_HU: Final = 60.0
OFFSET_HU: Final = 25.0  # the most that a scanner of strength 1 moves all values
NOISE_HU: Final = 15.0
_AIR: Final = -1000.0
_INTERCEPT: Final = -1024
_ORGAN: Final = {"disease": (-68.0, -8.0), "bias": (72.0, 12.0)}  # mm from the middle: to the left, and down
_SCANNERS: Final = (("SIEMENS", 120), ("GE MEDICAL SYSTEMS", 120), ("Philips", 100), ("Canon Medical Systems", 135))


class PhantomPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many phantoms, and what is true of them.

    ``sites``, ``patients`` of each, ``images`` (axial CT slices) of each patient, of ``size`` x ``size`` pixels;
    ``pairs``: patients of each site with two counterfactual twins, one with the other disease, one with the other bias.
    ``disease``, ``bias``, ``site_effect``: strengths, 0 for none.  ``prevalence``: of the disease in all, higher by
    ``prevalence_gap`` in women than in men; ``women``: share of the subgroup; ``correlation``: by how much more
    probable the bias is in women than in men (the phi coefficient where ``women`` is 1/2).  Raises DatasetError for a
    plan that is none.
    """

    sites: int = 4
    patients: int = 60
    images: int = 3
    size: int = 64
    pairs: int = 0
    disease: float = 1.0
    prevalence: float = 0.5
    prevalence_gap: float = 0.0
    women: float = 0.5
    site_effect: float = 1.0
    bias: float = 0.0
    correlation: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("sites", 1, 1000),
            ("patients", 1, 100_000),
            ("images", 1, 15),
            ("size", 16, 1024),
            ("pairs", 0, self.patients),
            ("seed", 0, 1 << 63),
            ("disease", 0, 10),
            ("bias", 0, 10),
            ("site_effect", 0, 2),
            ("prevalence", 0, 1),
            ("prevalence_gap", -1, 1),
            ("women", 0, 1),
            ("correlation", -1, 1),
        ):
            found = getattr(self, name)
            if not isfinite(found) or not least <= found <= most:
                raise DatasetError(f"phantoms, {name}: found {found}, expected {least} to {most}")
        for woman in (False, True):
            if not 0 <= self.prevalence_of(woman) <= 1:
                raise DatasetError(
                    f"phantoms: found a prevalence of {self.prevalence_of(woman):g} in "
                    f"{'women' if woman else 'men'}, expected 0 to 1; use a smaller gap"
                )

    def prevalence_of(self, woman: bool) -> float:
        """The probability of the disease in one subgroup."""
        return self.prevalence + self.prevalence_gap * ((1 - self.women) if woman else -self.women)

    def bias_of(self, woman: bool) -> float:
        """The probability of the bias in one subgroup."""
        return (1 + self.correlation) / 2 if woman else (1 - self.correlation) / 2


class Scanner(msgspec.Struct, frozen=True, kw_only=True):
    """What one site's device does to every image: adds ``offset`` HU and noise of deviation ``noise`` HU, of which
    ``grain`` (0 to 1) is smooth over 3 x 3 pixels; ``spacing``: mm between pixels."""

    site: str
    manufacturer: str
    kvp: int
    offset: float
    noise: float
    grain: float
    spacing: float


class Spot(msgspec.Struct, frozen=True):
    """Where an effect is: middle in mm (x to the patient's left, y to the back, z to the head), radius in mm."""

    x: float
    y: float
    z: float
    radius: float


class PhantomPatient(msgspec.Struct, frozen=True, kw_only=True):
    """What is true of one patient: ``subgroup`` is the sex, "F" or "M"; the spots are where disease and bias are, or
    would be.  ``twin_of``: whose counterfactual this is, ``changed`` in one thing; both empty for a patient."""

    site: str
    patient: str
    number: int
    subgroup: Literal["F", "M"]
    age: int
    disease: bool
    bias: bool
    disease_spot: Spot
    bias_spot: Spot
    twin_of: str = ""
    changed: Literal["", "disease", "bias"] = ""


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a set of phantoms: what `truth.json` holds."""

    plan: PhantomPlan
    scanners: list[Scanner]
    patients: list[PhantomPatient]
    twins: list[PhantomPatient]


def write_phantoms(folder: Path, plan: PhantomPlan | None = None) -> Truth:
    """Write the phantoms of ``plan`` into ``folder``, which must be empty or new, and return what is true of them.

    ``folder``/SITE/images has a folder of files for each patient, ``folder``/SITE/labels.csv the columns patient and
    disease (no, yes); the counterfactual twins lie in ``folder``/counterfactuals in the same way, outside of what a
    site trains on; ``folder``/truth.json says the rest.  The same plan gives the same bytes.
    """
    plan = plan or PhantomPlan()
    if folder.exists() and any(folder.iterdir()):
        raise DatasetError(f"{folder}: not empty, expected a new folder for the phantoms")
    scanners = [scanner_of(plan, site) for site in range(plan.sites)]
    patients: list[PhantomPatient] = []
    twins: list[PhantomPatient] = []
    for site, scanner in enumerate(scanners):
        own = [_drawn(plan, site, number) for number in range(plan.patients)]
        others = [_twin(one, change) for one in own[: plan.pairs] for change in _CHANGES]
        _write_site(folder / scanner.site, plan, scanner, own)
        if others:
            _write_site(folder / TWINS / scanner.site, plan, scanner, others)
        patients += own
        twins += others
    truth = Truth(plan=plan, scanners=scanners, patients=patients, twins=twins)
    (folder / TRUTH).write_bytes(msgspec.json.format(msgspec.json.encode(truth)) + b"\n")
    return truth


def load_truth(folder: Path) -> Truth:
    """What `truth.json` of a folder of phantoms says; DatasetError if it is none."""
    try:
        return msgspec.json.decode((folder / TRUTH).read_bytes(), type=Truth)
    except OSError as error:
        raise DatasetError(f"{folder / TRUTH}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise DatasetError(f"{folder / TRUTH}: {error}") from error


_CHANGES: Final[tuple[Change, ...]] = ("disease", "bias")


def scanner_of(plan: PhantomPlan, site: int) -> Scanner:
    """The device of a site: its three effects are spread evenly over the sites, each in another order."""

    def place(shift: int) -> float:  # -1 to 1, times the strength; 0 for a site that is alone
        return plan.site_effect * (2 * ((site + shift) % plan.sites) / (plan.sites - 1) - 1) if plan.sites > 1 else 0.0

    manufacturer, kvp = _SCANNERS[site % len(_SCANNERS)]
    return Scanner(
        site=f"hospital-{site + 1}",
        manufacturer=manufacturer,
        kvp=kvp,
        offset=OFFSET_HU * place(0),
        noise=NOISE_HU * 2 ** (0.7 * place(1)),
        grain=0.5 + 0.25 * place(1),
        spacing=FIELD_OF_VIEW / plan.size * (1 + 0.1 * place(2)),
    )


def _drawn(plan: PhantomPlan, site: int, number: int) -> PhantomPatient:
    random = np.random.default_rng([plan.seed, site, number, 0])
    uniform = random.random(3)
    woman = bool(uniform[0] < plan.women)
    return PhantomPatient(
        site=f"hospital-{site + 1}",
        patient=f"phantom-{site + 1}-{number + 1:05d}",
        number=number,
        subgroup="F" if woman else "M",
        age=int(random.integers(30, 85)),
        disease=bool(uniform[1] < plan.prevalence_of(woman)),
        bias=bool(uniform[2] < plan.bias_of(woman)),
        disease_spot=_spot("disease", random),
        bias_spot=_spot("bias", random),
    )


def _spot(kind: Change, random: np.random.Generator) -> Spot:
    middle = np.array([*_ORGAN[kind], 0.0]) + random.normal(0.0, 4.0, 3).clip(-8, 8)
    return Spot(*(round(float(value), 3) for value in (*middle, random.uniform(26, 34))))


def _twin(one: PhantomPatient, change: Change) -> PhantomPatient:
    other = {change: not getattr(one, change)}
    return msgspec.structs.replace(
        one, patient=f"{one.patient}-other-{change}", twin_of=one.patient, changed=change, **other
    )


def render(plan: PhantomPlan, scanner: Scanner, one: PhantomPatient) -> npt.NDArray[np.uint16]:
    """The stored pixels of one patient's slices, from the feet up: (images, size, size), HU above -1024."""
    site = int(one.site.rpartition("-")[2]) - 1
    random = np.random.default_rng([plan.seed, site, one.number, 1])
    along = (np.arange(plan.size) - (plan.size - 1) / 2) * scanner.spacing
    z, y, x = np.meshgrid(slice_positions(plan), along, along, indexing="ij")
    values = _body(x, y, z, random)
    values += one.disease * plan.disease * DISEASE_HU * _shape(one.disease_spot, x, y, z)
    values += one.bias * plan.bias * BIAS_HU * _shape(one.bias_spot, x, y, z)
    values += scanner.offset + scanner.noise * _texture(random, values.shape, scanner.grain)
    return (np.clip(np.rint(values), _INTERCEPT, 3071) - _INTERCEPT).astype(np.uint16)


def slice_positions(plan: PhantomPlan) -> Floats:
    """Where a patient's slices are, in mm from the middle towards the head."""
    positions: Floats = (np.arange(plan.images, dtype=np.float64) - (plan.images - 1) / 2) * SLICE_DISTANCE
    return positions


def _body(x: Floats, y: Floats, z: Floats, random: np.random.Generator) -> Floats:
    """A trunk in HU with a spine and two organs, of a size, position and texture of its own."""
    width, depth = random.normal(1.0, 0.05, 2).clip(0.88, 1.12) * (150.0, 112.0)
    left, down = random.normal(0.0, 2.5, 2).clip(-6, 6)
    x, y = x - left, y - down
    slimmer = np.sqrt(1 - (z / 240.0) ** 2)
    inside = _soft((x / width) ** 2 + (y / depth) ** 2, slimmer**2)
    values = np.full(x.shape, 40.0)
    for amplitude in random.normal(0.0, 6.0, 4):
        along = random.normal(0.0, 0.03, 3)  # radians a mm: waves of some 20 cm
        values += amplitude * np.cos(along[0] * x + along[1] * y + along[2] * z + random.uniform(0, 2 * np.pi))
    for (middle_x, middle_y), (half_x, half_y), above in (
        (_ORGAN["disease"], (56.0, 50.0), 30.0),
        (_ORGAN["bias"], (42.0, 46.0), 20.0),
        ((0.0, 66.0), (19.0, 17.0), 210.0),
    ):
        size = random.normal(1.0, 0.04, 2).clip(0.9, 1.1)
        distance = ((x - middle_x) / (half_x * size[0])) ** 2 + ((y - middle_y) / (half_y * size[1])) ** 2
        values += above * _soft(distance, 1.0)
    result: Floats = _AIR + inside * (values - _AIR)
    return result


def _soft(distance: Floats, edge: Floats | float) -> Floats:
    """1 within, 0 without, and in between where a pixel has both."""
    result: Floats = np.clip((edge - distance) / 0.12 + 0.5, 0.0, 1.0)
    return result


def _shape(spot: Spot, x: Floats, y: Floats, z: Floats) -> Floats:
    """1 in the middle of a spot, falling smoothly to exactly 0 at its radius."""
    squared = ((x - spot.x) ** 2 + (y - spot.y) ** 2 + (z - spot.z) ** 2) / spot.radius**2
    result: Floats = np.clip(1 - squared, 0.0, None) ** 2
    return result


def _texture(random: np.random.Generator, shape: tuple[int, ...], grain: float) -> Floats:
    """Noise of deviation 1: white, mixed with its mean over 3 x 3 pixels."""
    white = random.standard_normal(shape)
    smooth = sum(np.roll(white, (down, right), (1, 2)) for down in (-1, 0, 1) for right in (-1, 0, 1)) / 3
    # Of unit deviation each, and correlated by 1/3, since a pixel is a ninth of its neighbourhood's sum.
    mixed = (1 - grain) * white + grain * smooth
    result: Floats = mixed / np.sqrt((1 - grain) ** 2 + grain**2 + 2 * grain * (1 - grain) / 3)
    return result


# --- files ---


def _write_site(folder: Path, plan: PhantomPlan, scanner: Scanner, patients: list[PhantomPatient]) -> None:
    form = sha256(msgspec.json.encode(plan)).hexdigest()
    rows = StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(["patient", "disease"])
    for one in patients:
        own = folder / IMAGES / one.patient
        own.mkdir(parents=True)
        for number, dataset in enumerate(_datasets(plan, form, scanner, one), start=1):
            dataset.save_as(own / f"{number:03d}.dcm", enforce_file_format=True)
        table.writerow([one.patient, "yes" if one.disease else "no"])
    (folder / LABELS).write_text(rows.getvalue())


def _datasets(plan: PhantomPlan, form: str, scanner: Scanner, one: PhantomPatient) -> Iterator[Dataset]:
    """One CT image of PS3.3 A.3 for each slice; UIDs depend on the plan, so that no two sets share one."""
    day = f"{2018 + one.number % 7}{1 + one.number % 12:02d}15"

    def uid(*names: object) -> UID:
        return generate_uid(entropy_srcs=[form, one.patient, *map(str, names)])

    places = slice_positions(plan)
    corner = -(plan.size - 1) / 2 * scanner.spacing
    for number, stored in enumerate(render(plan, scanner, one)):
        instance = uid("instance", number)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = instance
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset = Dataset()
        dataset.file_meta = meta
        values: dict[str, Any] = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": instance,
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "StudyDate": day,
            "StudyTime": "120000",
            "AccessionNumber": "",
            "ReferringPhysicianName": "",
            "Modality": "CT",
            "Manufacturer": scanner.manufacturer,
            "PatientName": f"Phantom^{one.patient}",
            "PatientID": one.patient,
            "PatientBirthDate": f"{int(day[:4]) - one.age}0101",
            "PatientSex": one.subgroup,
            "PatientAge": f"{one.age:03d}Y",
            "QualityControlSubject": "YES",  # not a living one
            "StudyInstanceUID": uid("study"),
            "SeriesInstanceUID": uid("series"),
            "FrameOfReferenceUID": uid("frame"),
            "PositionReferenceIndicator": "",
            "StudyID": "1",
            "SeriesNumber": 1,
            "AcquisitionNumber": 1,
            "InstanceNumber": number + 1,
            "PatientPosition": "HFS",
            "KVP": scanner.kvp,
            "SliceThickness": SLICE_DISTANCE,
            "PixelSpacing": [round(scanner.spacing, 6)] * 2,
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [round(corner, 6), round(corner, 6), float(places[number])],
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "Rows": plan.size,
            "Columns": plan.size,
            "BitsAllocated": 16,
            "BitsStored": 12,
            "HighBit": 11,
            "PixelRepresentation": 0,
            "RescaleIntercept": _INTERCEPT,
            "RescaleSlope": 1,
            "RescaleType": "HU",
            "BurnedInAnnotation": "NO",
        }
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        dataset.add_new("PixelData", "OW", stored.astype("<u2").tobytes())
        yield dataset
