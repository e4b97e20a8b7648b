"""The census: what is counted, what of the sums is published, and that nobody's counts are given twice."""

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.consortium import make_consortium
from support.dicom_files import image, save

from secureagg import ParameterError
from secureagg.phases import Aggregate
from sites import census
from sites.config import open_site
from sites.datasets.dicom import Target, headers, index_folder, load_labels
from sites.datasets.dicom.workers import Workers
from sites.errors import DatasetError, ManifestError
from sites.manifest import Census, Manifest
from sites.recipe import POLICY, census_table
from sites.rounds import round_parameters

PLAN = Census(labels={"finding": ["no", "yes"]})


def aggregate(counts: list[dict[str, dict[str, int]]], plan: Census) -> Aggregate:
    """What a round over sites with these counts opens."""
    inputs = [census.encode(one, plan) for one in counts]
    totals = {lane: np.sum([one[lane] for one in inputs], axis=0) for lane in inputs[0]}
    return Aggregate(totals=totals, means={}, survivors=tuple("abcdefgh"[: len(counts)]), digest=bytes(32))


def counts_of(patients: int, **changes: dict[str, int]) -> dict[str, dict[str, int]]:
    """Counts of a site whose patients are all unknown in every variable, but for ``changes``."""
    own = {
        name: {census.UNKNOWN if census.UNKNOWN in found else found[0]: patients}
        for name, found in census.cells(PLAN).items()
    }
    return own | changes


@pytest.fixture(scope="module")
def consortium(tmp_path_factory):
    """A consortium of four with a census."""
    return make_consortium(tmp_path_factory.mktemp("consortium"), census=PLAN)


# --- counting ---


def test_bands_are_those_of_the_headers() -> None:
    """Each band that a header can be put into is a cell, or one that is meant to be "other"."""
    cells = census.cells(PLAN)
    for maker in headers._MAKERS.values():
        assert maker in cells["manufacturer"]
    assert set(cells["modality"]) - {"other", "unknown", "several"} <= headers._MODALITIES
    for field, keyword, values in (
        ("kvp", "KVP", range(20, 200)),
        ("field_strength", "MagneticFieldStrength", np.arange(0, 12, 0.25)),
        ("slice_thickness", "SliceThickness", np.arange(0, 12, 0.25)),
    ):
        for value in values:
            assert getattr(headers._descriptors(image(**{keyword: str(value)})), field) in cells[field]
    for age in range(120):
        assert headers._descriptors(image(PatientAge=f"{age:03d}Y")).age in cells["age"]
    for year in range(1990, 2050):
        assert headers._descriptors(image(StudyDate=f"{year}0101")).year in cells["year"]
    for sex in ("F", "M", "O", ""):
        assert headers._descriptors(image(PatientSex=sex)).sex in cells["sex"]


def test_each_patient_is_counted_once_per_variable(tmp_path: Path) -> None:
    """Patients, not images, are counted, in the band that they share or in "several"; a label beside images without one
    is that patient's; every variable has the same total."""
    images = tmp_path / "images"
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    for number, (patient, year) in enumerate([("A", 2011), ("A", 2012), ("B", 2011), ("B", 2016), ("C", 1985)]):
        one = image(pixels, number=number, patient=patient, StudyDate=f"{year}0101", PatientSex="F")
        save(one, images / str(number))
    (tmp_path / "labels.csv").write_text(f"instance,finding\n{one.SOPInstanceUID},yes\n")
    with Workers(1) as pool:
        index = index_folder(images, tmp_path / "state", workers=pool)
    labels = load_labels(tmp_path / "labels.csv", (Target("finding", "classification", ("no", "yes")),), index)
    found = census.count_patients(index, labels, PLAN)
    assert found["year"] == {"2010 to 2014": 1, "several": 1, "other": 1}
    assert found["sex"] == {"female": 3}
    assert found["modality"] == {"DX": 3}
    assert found["images_per_patient"] == {"2 to 3": 2, "1": 1}
    assert found["label finding"] == {"no label": 2, "yes": 1}
    for name, own in census.cells(PLAN).items():
        assert list(found[name]) == [cell for cell in own if cell in found[name]]
    assert found.keys() == census.cells(PLAN).keys()
    assert {sum(own.values()) for own in found.values()} == {3}
    census.encode(found, PLAN)
    with pytest.raises(DatasetError, match="found the labels none, expected those of the manifest"):
        census.count_patients(index, None, PLAN)


def test_counts_that_are_none() -> None:
    """Cells that the consortium has not got, negative counts and more patients than were agreed on do not go out."""
    for bad in ({"PET": 1}, {"CT": -1}, {"CT": PLAN.max_patients, "MR": 1}):
        with pytest.raises(DatasetError, match="census, modality"):
            census.encode({"modality": bad}, PLAN)


# --- what is published ---

CELLS = "abcdef"
cell = st.tuples(st.one_of(st.just(0), st.integers(1, 12), st.integers(0, 60)), st.integers(1, 6)).map(
    lambda found: (found[0], min(found))
)  # patients, and sites that have any


@given(st.lists(cell, min_size=1, max_size=6), st.integers(2, 20), st.integers(3, 5))
def test_nothing_withheld_can_be_computed(found: list[tuple[int, int]], least: int, sites: int) -> None:
    """Whatever the sums: a published cell has enough patients and sites; and whoever knows the total too finds the
    others' sum to be nobody, or of at least two cells with enough patients and, in one of them, sites."""
    plan = Census(minimum_patients=least, minimum_sites=sites)
    patients = {name: count for name, (count, _) in zip(CELLS, found, strict=False)}
    of = {name: count for name, (_, count) in zip(CELLS, found, strict=False)}
    shown = census.published(patients, of, plan)
    assert all(shown[name] == patients[name] >= least and of[name] >= sites for name in shown)
    hidden = patients.keys() - shown.keys()
    rest = sum(patients.values()) - sum(shown.values())
    if shown and rest:
        assert len(hidden) >= 2
        assert rest >= least
        assert max(of[name] for name in hidden) >= sites


@pytest.mark.parametrize(
    ("patients", "sites", "shown"),
    [
        ({"a": 50, "b": 40, "c": 0}, {"a": 4, "b": 4, "c": 0}, "ab"),  # all but nobody
        ({"a": 50, "b": 40, "c": 9}, {"a": 4, "b": 4, "c": 4}, "a"),  # b would give c away
        ({"a": 50, "b": 40, "c": 9, "d": 9}, {"a": 4, "b": 4, "c": 4, "d": 4}, "ab"),  # c and d hide each other
        ({"a": 50, "b": 40, "c": 9, "d": 9}, {"a": 4, "b": 4, "c": 2, "d": 2}, "a"),  # but may be one hospital's
        ({"a": 50, "b": 40, "c": 90}, {"a": 4, "b": 4, "c": 2}, "a"),  # a hospital or two alone have c
        ({"a": 50, "b": 3}, {"a": 4, "b": 3}, ""),
        ({"a": 10, "b": 10}, {"a": 3, "b": 3}, "ab"),  # the thresholds themselves are enough
    ],
)
def test_what_is_withheld(patients: dict[str, int], sites: dict[str, int], shown: str) -> None:
    """Known answers for 10 patients of 3 sites."""
    assert "".join(sorted(census.published(patients, sites, Census()))) == shown


def test_a_table_of_sums(consortium) -> None:
    """The table has the sums of all sites, the small cells withheld; it survives being written and read."""
    one = counts_of(20, sex={"female": 14, "male": 6}, modality={"CT": 19, "MR": 1})
    table = census.table_of(consortium.manifest, aggregate([one] * 4, PLAN), run="run")
    assert (table.patients, table.sites) == (80, 4)
    assert table.variables["sex"] == {"female": 56, "male": 24}
    assert table.variables["modality"] == {}  # 4 of MR would be 80 less those of CT
    assert table.variables["kvp"] == {"unknown": 80}
    assert table.manifest == consortium.manifest.digest.hex()


def test_sums_that_are_not_published(consortium, tmp_path: Path) -> None:
    """Too few patients, too few sites, or variables that count different patients: no table, and a sentence."""
    manifest = consortium.manifest
    garbled = counts_of(20, sex={"female": 21})
    for counts, reason in (
        ([counts_of(2)] * 4, "too few"),
        ([counts_of(50)] * 2, "too few"),
        ([counts_of(20)] * 3 + [garbled], "different sums"),
    ):
        with pytest.raises(DatasetError, match=reason):
            census.table_of(manifest, aggregate(counts, PLAN), run="run")
        assert reason in census.write_table(manifest, aggregate(counts, PLAN), run="run", state=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "census of 80 patients" in census.write_table(
        manifest, aggregate([counts_of(20)] * 4, PLAN), run="run", state=tmp_path
    )
    assert census.load_table(tmp_path / census.TABLE).patients == 80


# --- giving ---


def test_counts_are_given_once(consortium) -> None:
    """What was prepared is given once, under the manifest it was prepared for, and only its owner can read it."""
    site = open_site(consortium.site_configs["a"])
    assert census.take_contribution(site) is None
    path = census.prepare(site, counts_of(20))
    assert path.stat().st_mode & 0o077 == 0
    other = msgspec.structs.replace(
        site.manifest, consortium=msgspec.structs.replace(site.manifest.consortium, name="x")
    )
    assert census.take_contribution(dataclasses.replace(site, manifest=other)) is None
    inputs = census.take_contribution(site)
    assert inputs is not None
    assert int(inputs[census.PATIENTS_LANE].sum()) == 20 * len(census.cells(PLAN))
    assert census.take_contribution(site) is None
    census.prepare(site, counts_of(20))
    path.write_text("{")
    assert census.take_contribution(site) is None


# --- agreement ---


def parameters(manifest: Manifest, number: int):
    """A census round of this number."""
    return round_parameters(
        manifest, run="run", round_number=number, purpose="census", cohort="abcd", model_digest=bytes(32)
    )


def test_the_census_is_one_round_that_all_signed_for(consortium) -> None:
    """Only the round after the evaluation is one, only with [census] in the manifest; it sums nothing else."""
    manifest = consortium.manifest
    last = manifest.training.rounds + 2
    one = parameters(manifest, last)
    assert {name for name in one.lanes if name != "canary"} == {census.PATIENTS_LANE, census.SITES_LANE}
    for number in (1, last - 1, last + 1):
        with pytest.raises(ParameterError):
            parameters(manifest, number)
    without = msgspec.structs.replace(manifest, census=msgspec.UNSET)
    with pytest.raises(ParameterError, match="has none"):
        parameters(without, last)
    with pytest.raises(DatasetError, match=r"has no \[census\]"):
        census.census_of(without)


def test_a_manifest_whose_census_shows_too_much(tmp_path: Path) -> None:
    """Cells of so few sites that those who collude can subtract their own are refused, as are ambiguous classes."""
    policy = msgspec.structs.replace(POLICY, max_corrupt=2, minimum_survivors=4)
    with pytest.raises(ManifestError, match="expected at least 4, since 2 sites may collude"):
        make_consortium(tmp_path / "a", names="abcdefg", policy=policy, census=Census())
    for number, classes in enumerate((["no", "no"], ["no", "several"], ["no", "no label"])):
        with pytest.raises(ManifestError, match="label finding"):
            make_consortium(tmp_path / f"b{number}", census=Census(labels={"finding": classes}))
    with pytest.raises(ManifestError, match="minimum_sites"):
        make_consortium(tmp_path / "c", census=Census(minimum_sites=2))


@pytest.mark.parametrize(
    "change", [{"minimum_patients": 9}, {"minimum_sites": 4}, {"max_patients": 5}, {"labels": {"finding": ["no", "x"]}}]
)
def test_every_field_of_a_census_is_signed(consortium, change: dict[str, object]) -> None:
    """A census that differs in any field, or is not there, is not what was signed."""
    consortium.manifest.check()
    for other in (msgspec.structs.replace(PLAN, **change), msgspec.UNSET):
        with pytest.raises(ManifestError, match="altered after signing"):
            msgspec.structs.replace(consortium.manifest, census=other).check()


def test_a_census_from_options() -> None:
    """Labels are named with their classes, and cells are of two sites more than may collude."""
    assert census_table(["finding=no,yes"], max_corrupt=1) == PLAN
    assert census_table([], max_corrupt=3) == Census(minimum_sites=5)
    with pytest.raises(ManifestError, match="census"):
        census_table(["finding"], max_corrupt=1)
