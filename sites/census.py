"""The census of a consortium: how many patients of which kind all sites have together, and nothing of any one of them.

Each variable (modality, age band, the classes of a label, ...) puts every patient into exactly one of its cells, which
are fixed here and in the signed manifest, never by a site's data.  A site's counts are one input of one secure round;
beside them goes, for each cell, whether the site has anybody in it.  Of the sums, a cell is published only if it has
enough patients of enough sites (primary suppression), and the cells of a variable that are not published have together
either nobody or enough patients, in at least two cells: what is missing from the total gives none of them away
(complementary suppression; Hundepool et al., Statistical Disclosure Control, 2012, chapter 4).

A sum of which other sums are known can be undone.  So a site gives its counts once: what `secureagg data federate` has
written is used up before it is sent, and a coordinator that asks again, with another cohort, is given nothing.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
import numpy.typing as npt

from secureagg import Aggregate, Counts, Lane
from sites.errors import DatasetError
from sites.files import PRIVATE_MODE, sync_folder, write_json
from sites.manifest import NO_LABEL, SEVERAL, Census, Manifest

if TYPE_CHECKING:
    from sites.config import OpenSite
    from sites.datasets.dicom.index import DicomIndex
    from sites.datasets.dicom.labels import Labels

log = logging.getLogger("secureagg.site")

PATIENTS_LANE: Final = "census"
SITES_LANE: Final = "census-sites"
TABLE: Final = "census.json"
CONTRIBUTION: Final = "census-contribution.json"
GIVEN: Final = "census-given.json"
OTHER: Final = "other"
UNKNOWN: Final = "unknown"
LABEL: Final = "label "


def _bands(unit: str, *edges: int) -> tuple[str, ...]:
    between = (f"{low} to {high} {unit}" for low, high in pairwise(edges))
    return (f"below {edges[0]} {unit}", *between, f"{edges[-1]} {unit} or more")


_MODALITIES: Final = ("CT", "MR", "PT", "NM", "CR", "DX", "MG", "US", "XA", "RF")
_MAKERS: Final = (
    *("agfa", "canon", "carestream", "fujifilm", "ge", "hologic", "konica minolta"),
    *("philips", "samsung", "shimadzu", "siemens", "united imaging"),
)
_IMAGES: Final = (("1", 1), ("2 to 3", 3), ("4 to 15", 15), ("16 to 63", 63), ("64 to 255", 255))
_MOST_IMAGES: Final = "256 or more"
# The bands of sites.datasets.dicom.headers, which the sites fill in; whatever is in none of them is "other".
_DESCRIPTORS: Final[dict[str, tuple[str, ...]]] = {
    "modality": _MODALITIES,
    "manufacturer": _MAKERS,
    "kvp": _bands("kV", 60, 80, 100, 120, 140),
    "field_strength": _bands("T", 1, 2, 4),
    "slice_thickness": _bands("mm", 1, 2, 3, 5),
    "sex": ("female", "male"),
    "age": _bands("years", *range(10, 90, 10)),
    "year": tuple(f"{start} to {start + 4}" for start in range(1990, 2050, 5)),
}

Counted = dict[str, dict[str, int]]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """What is published: ``patients`` in all, and by variable and cell; a cell that is not there has fewer than
    ``minimum_patients``, perhaps none, or patients of fewer than ``minimum_sites``, or was left out so that these
    cannot be told.  ``sites``: how many are in the sums."""

    consortium: str
    manifest: str
    run: str
    sites: int
    minimum_patients: int
    minimum_sites: int
    patients: int
    variables: Counted


class Contribution(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One site's counts, for a census under the manifest of this digest; stays with the site."""

    manifest: str
    counts: Counted


def cells(census: Census) -> dict[str, tuple[str, ...]]:
    """The cells of each variable, in the order of the lanes."""
    descriptors = {name: (*bands, OTHER, UNKNOWN, SEVERAL) for name, bands in _DESCRIPTORS.items()}
    images = {"images_per_patient": (*(name for name, _ in _IMAGES), _MOST_IMAGES)}
    labels = {f"{LABEL}{name}": (*classes, NO_LABEL, SEVERAL) for name, classes in census.labels.items()}
    return descriptors | images | labels


def lanes(census: Census) -> list[Lane]:
    """The lanes of a census round."""
    length = sum(map(len, cells(census).values()))
    return [
        Lane(name=PATIENTS_LANE, length=length, encoding=Counts(maximum=census.max_patients)),
        Lane(name=SITES_LANE, length=length, encoding=Counts(maximum=1)),
    ]


# --- at a site ---


def count_patients(index: "DicomIndex", labels: "Labels | None", census: Census) -> Counted:
    """How many of an index's patients are in each cell, in the order of ``cells``; those with none are left out.

    A patient is in the one band that all images share, or in "several".  Raises DatasetError where there is no patient,
    or labels are not those of the manifest.
    """
    if not index.images:
        raise DatasetError("census: found no patient, expected at least one")
    found = {} if labels is None else {target.name: target.classes for target in labels.targets}
    if found != {name: tuple(classes) for name, classes in census.labels.items()}:
        raise DatasetError(
            f"census: found the labels {', '.join(sorted(found)) or 'none'}, expected those of the manifest, with its "
            f"classes: {', '.join(sorted(census.labels)) or 'none'}"
        )
    kinds: dict[str, dict[bytes, set[str]]] = {}
    images: Counter[bytes] = Counter()
    for image in index.images:
        images[image.patient] += image.header.frames
        for name, bands in _DESCRIPTORS.items():
            band = getattr(image.header.descriptors, name)
            known = band if band in bands or band == UNKNOWN else OTHER
            kinds.setdefault(name, {}).setdefault(image.patient, set()).add(known)
        if labels is not None:
            values = labels.of(image)
            for place, target in enumerate(labels.targets):
                none = values is None or isnan(values[place])
                label = NO_LABEL if none or values is None else target.classes[int(values[place])]
                kinds.setdefault(f"{LABEL}{target.name}", {}).setdefault(image.patient, set()).add(label)
    counted = {name: _one_each(patients.values()) for name, patients in kinds.items()}
    sizes = (next((name for name, most in _IMAGES if count <= most), _MOST_IMAGES) for count in images.values())
    counted["images_per_patient"] = dict(Counter(sizes))
    return {
        name: {cell: counted[name][cell] for cell in own if cell in counted[name]}
        for name, own in cells(census).items()
    }


def _one_each(patients: Iterable[set[str]]) -> dict[str, int]:
    """In which cell each patient is, counted: a label beside images without one is that label."""
    found: Counter[str] = Counter()
    for kinds in patients:
        known = kinds - {NO_LABEL} or kinds
        found[next(iter(known)) if len(known) == 1 else SEVERAL] += 1
    return dict(found)


def prepare(site: "OpenSite", counts: Counted) -> Path:
    """Leave ``counts`` for the next census of the site's manifest, once; returns the file, for the site's own people.

    Raises DatasetError for a manifest without a census and more patients than it allows.
    """
    encode(counts, census_of(site.manifest))
    path = site.state / CONTRIBUTION
    contribution = Contribution(manifest=site.manifest.digest.hex(), counts=counts)
    write_json(path, contribution, mode=PRIVATE_MODE)
    return path


def census_of(manifest: Manifest) -> Census:
    """The manifest's table [census]; DatasetError where it has none."""
    if not isinstance(manifest.census, Census):
        raise DatasetError(f"manifest of {manifest.consortium.name}: has no [census], so that no counts are summed")
    return manifest.census


def encode(counts: Counted, census: Census) -> dict[str, npt.NDArray[np.int64]]:
    """The inputs of the lanes: patients of each cell, and whether there are any."""
    for name, own in cells(census).items():
        found = counts.get(name, {})
        if unknown := found.keys() - set(own):
            raise DatasetError(f"census, {name}: found {len(unknown)} cells that are none of the consortium's")
        if min(found.values(), default=0) < 0 or sum(found.values()) > census.max_patients:
            raise DatasetError(f"census, {name}: expected 0 to {census.max_patients} patients")
    values = [counts.get(name, {}).get(cell, 0) for name, own in cells(census).items() for cell in own]
    patients = np.array(values, np.int64)
    return {PATIENTS_LANE: patients, SITES_LANE: (patients > 0).astype(np.int64)}


def take_contribution(site: "OpenSite") -> dict[str, npt.NDArray[np.int64]] | None:
    """The lanes' inputs that ``prepare`` has left, which are used up by this; None if there are none for this
    manifest."""
    path = site.state / CONTRIBUTION
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Contribution)
    except FileNotFoundError:
        log.warning("census: nothing to give; `secureagg data federate` prepares it")
        return None
    except (OSError, msgspec.DecodeError):
        log.warning("census: %s cannot be read; `secureagg data federate` writes it anew", CONTRIBUTION)
        return None
    if found.manifest != site.manifest.digest.hex():
        log.warning("census: what was prepared is for another manifest; `secureagg data federate` prepares it anew")
        return None
    try:
        inputs = encode(found.counts, census_of(site.manifest))
    except DatasetError as error:
        log.warning("%s", error)
        return None
    # Stops a second sum, over other sites, whose difference to the first would be one site's counts: gone from the
    # disk before anything is sent.
    path.replace(site.state / GIVEN)
    sync_folder(site.state)
    return inputs


# --- of the sums ---


def table_of(manifest: Manifest, aggregate: Aggregate, *, run: str) -> Table:
    """What of a census round's sums is published.

    Raises DatasetError, and publishes nothing, where they are too few sites' or patients', or contradict each other.
    """
    census = census_of(manifest)
    patients, sites = (_by_cell(aggregate.totals[lane], census) for lane in (PATIENTS_LANE, SITES_LANE))
    totals = {sum(own.values()) for own in patients.values()}
    # Stops sums that a site has garbled: every variable counts the same patients.
    if len(totals) != 1:
        raise DatasetError("census: its variables have different sums; a site counted wrongly, so nothing is published")
    total = totals.pop()
    if total < census.minimum_patients or len(aggregate.survivors) < census.minimum_sites:
        raise DatasetError(
            f"census: found too few patients or sites, expected {census.minimum_patients} of {census.minimum_sites}"
        )
    return Table(
        consortium=manifest.consortium.name,
        manifest=manifest.digest.hex(),
        run=run,
        sites=len(aggregate.survivors),
        minimum_patients=census.minimum_patients,
        minimum_sites=census.minimum_sites,
        patients=total,
        variables={name: published(own, sites[name], census) for name, own in patients.items()},
    )


def published(patients: Mapping[str, int], sites: Mapping[str, int], census: Census) -> dict[str, int]:
    """The cells of one variable that may be seen beside their total, by cell.

    ``patients``: of each cell; ``sites``: how many sites have any.
    """
    shown = {
        cell: count
        for cell, count in patients.items()
        if count >= census.minimum_patients and sites[cell] >= census.minimum_sites
    }
    while shown:
        hidden = patients.keys() - shown.keys()
        rest = sum(patients[cell] for cell in hidden)
        # What is missing from the total is known, too: it has to be of as many patients and sites as a cell.  By how
        # many sites the hidden cells are shared is known for each of them only, so that the largest counts.  One cell
        # alone is never enough, or it would be shown.
        enough = rest >= census.minimum_patients and max(sites[cell] for cell in hidden) >= census.minimum_sites
        if rest == 0 or enough:
            break
        del shown[min(shown, key=lambda cell: (shown[cell], cell))]
    return shown


def write_table(manifest: Manifest, aggregate: Aggregate, *, run: str, state: Path) -> str:
    """Publish a census round's sums in `census.json` of ``state``, or do not; returns a line that says which."""
    try:
        table = table_of(manifest, aggregate, run=run)
    except DatasetError as error:
        return str(error)
    write_json(state / TABLE, table)
    return f"census of {table.patients:,} patients of {table.sites} sites: {state / TABLE}"


def load_table(path: Path) -> Table:
    """A table that ``write_table`` wrote; DatasetError for anything else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Table)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise DatasetError(f"{path}: not a census: {error}") from error


def _by_cell(total: npt.NDArray[np.int64], census: Census) -> Counted:
    places = iter(total.tolist())
    return {name: {cell: next(places) for cell in own} for name, own in cells(census).items()}
