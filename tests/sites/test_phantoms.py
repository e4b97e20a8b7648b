"""Phantoms: every effect is in the files as strong as was asked, and nothing else is."""

from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from scipy.stats import binom

from sites.datasets import phantoms
from sites.datasets.dicom import Limits, Target, index_folder, load_labels
from sites.datasets.dicom.pixels import make_images
from sites.datasets.dicom.records import ImagePlan, Images, MakeImages
from sites.datasets.dicom.workers import Workers
from sites.datasets.phantoms import BIAS_HU, DISEASE_HU, PhantomPatient, PhantomPlan, Truth, write_phantoms
from sites.errors import DatasetError

FALSE_ALARM = 1e-6
WINDOW = ImagePlan(shape=(64, 64), hu_centre=0.0, hu_width=2000.0)  # nothing within a body is cut off
SMALL = PhantomPlan(sites=3, patients=4, images=2, pairs=2, bias=1.0)


def decoded(folder: Path, site: str, patient: str, plan: ImagePlan = WINDOW) -> npt.NDArray[np.float64]:
    """A patient's images (images, 64, 64) in HU, as the pipeline decodes them."""
    files = sorted((folder / site / "images" / patient).iterdir())
    rows = []
    for file in files:
        answer = make_images(MakeImages(files=[(bytes(file), [0])], plan=plan, limits=Limits()))
        assert isinstance(answer, Images)
        rows.append(np.frombuffer(answer.values, "<f4").reshape(plan.shape))
    return (np.stack(rows).astype(np.float64) - 0.5) * plan.hu_width + plan.hu_centre


def within(truth: Truth, one: PhantomPatient, kind: str) -> npt.NDArray[np.bool_]:
    """Where (images, 64, 64) the effect ``kind`` of a patient may be, from what truth.json says in mm."""
    spacing = next(scanner.spacing for scanner in truth.scanners if scanner.site == one.site)
    spot = one.disease_spot if kind == "disease" else one.bias_spot
    along = (np.arange(64) - 31.5) * spacing
    z, y, x = np.meshgrid((np.arange(2) - 0.5) * 10.0, along, along, indexing="ij")
    return (x - spot.x) ** 2 + (y - spot.y) ** 2 + (z - spot.z) ** 2 < spot.radius**2


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_twins_differ_only_where_they_should(tmp_path: Path, strength: float) -> None:
    """The decoded images of a patient and a twin differ within the spot of what was changed, by the strength that was
    asked, the right way round, and nowhere else; at strength 0 they do not differ."""
    truth = write_phantoms(tmp_path / "out", msgspec.structs.replace(SMALL, disease=strength, bias=strength))
    patients = {one.patient: one for one in truth.patients}
    assert len(truth.twins) == 3 * 2 * 2
    for twin in truth.twins:
        original = patients[twin.twin_of]
        changed = twin.changed
        assert getattr(twin, changed) != getattr(original, changed)
        same = {"patient": "", "twin_of": "", "changed": "", changed: False}
        assert msgspec.structs.replace(twin, **same) == msgspec.structs.replace(original, **same)
        difference = decoded(tmp_path / "out" / "counterfactuals", twin.site, twin.patient) - decoded(
            tmp_path / "out", twin.site, original.patient
        )
        spot = within(truth, original, changed)
        assert np.abs(difference[~spot]).max() < 0.1  # float32 and a window of 16 bits: 2000 HU / 65536
        height = strength * (DISEASE_HU if changed == "disease" else BIAS_HU)
        sign = 1 if getattr(twin, changed) else -1
        # Up to 8 mm from a slice's plane and 5 more, and up to 5 mm within it, the spot is lower than in its middle.
        assert 0.4 * height - 1.1 <= (sign * difference).max() <= height + 1.1
        assert (sign * difference).min() > -1.1  # stored values are whole HU


def test_files_are_what_render_says(tmp_path: Path) -> None:
    """The pipeline reads from the files, in HU, what was rendered."""
    truth = write_phantoms(tmp_path / "out", SMALL)
    one, scanner = truth.patients[0], truth.scanners[0]
    expected = phantoms.render(SMALL, scanner, one).astype(float) - 1024
    np.testing.assert_allclose(decoded(tmp_path / "out", one.site, one.patient), expected.clip(-1000, 1000), atol=0.1)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_scanners_differ_as_they_should(tmp_path: Path, strength: float) -> None:
    """The sites' means, noise and pixel sizes are those of truth.json, and of one kind only without a site effect."""
    plan = PhantomPlan(sites=3, patients=12, images=2, disease=0, site_effect=strength)
    truth = write_phantoms(tmp_path / "out", plan)
    found, sizes = [], []
    for scanner in truth.scanners:
        bodies = [one for one in truth.patients if one.site == scanner.site]
        images = np.concatenate([decoded(tmp_path / "out", one.site, one.patient) for one in bodies])
        # Far from organs and edges, in front of the spine.
        middle = images[:, 28:33, 30:34]
        found.append((middle.mean() - 40, middle.std(axis=(1, 2)).mean()))
        sizes.append(np.sqrt((images > -300).mean(axis=(0, 1, 2))) * scanner.spacing)
        header = pydicom.dcmread(next((tmp_path / "out" / scanner.site).rglob("*.dcm")), stop_before_pixels=True)
        assert list(header.PixelSpacing) == pytest.approx([scanner.spacing] * 2, abs=1e-5)
        assert header.Manufacturer == scanner.manufacturer
    offsets = np.array([scanner.offset for scanner in truth.scanners])
    noises = np.array([scanner.noise for scanner in truth.scanners])
    assert np.ptp(offsets) == pytest.approx(50 * strength)
    assert len({scanner.spacing for scanner in truth.scanners}) == (3 if strength else 1)
    np.testing.assert_allclose([mean for mean, _ in found], offsets, atol=12)
    assert np.ptp(np.array([noise for _, noise in found]) / noises) < 0.35
    assert np.ptp(noises) == pytest.approx(phantoms.NOISE_HU * (2**0.7 - 2**-0.7) * strength)
    # In mm the bodies are as large at every site.
    assert np.ptp(sizes) / np.mean(sizes) < 0.08


def in_binomial_bounds(count: int, trials: int, probability: float, tests: int) -> bool:
    """Whether a count is one that ``tests`` right programs would not see once in a million."""
    low, high = binom.ppf([FALSE_ALARM / tests / 2, 1 - FALSE_ALARM / tests / 2], trials, probability)
    return bool(low <= count <= high)


@pytest.mark.parametrize(
    "plan",
    [
        PhantomPlan(correlation=0.8, prevalence=0.4, prevalence_gap=0.4, women=0.3),
        PhantomPlan(correlation=-0.5, prevalence=0.2),
        PhantomPlan(),
    ],
)
def test_who_has_what_is_as_often_as_asked(plan: PhantomPlan) -> None:
    """Subgroup, disease and bias are as frequent, and the last two as tied to the first, as the plan says."""
    people = [phantoms._drawn(plan, site, number) for site in range(4) for number in range(1500)]
    women, men = ([one for one in people if one.subgroup == which] for which in "FM")
    assert in_binomial_bounds(len(women), len(people), plan.women, 7)
    for group, woman in ((women, True), (men, False)):
        shift = plan.correlation / 2 if woman else -plan.correlation / 2
        assert in_binomial_bounds(sum(one.bias for one in group), len(group), 0.5 + shift, 7)
        share = plan.prevalence + plan.prevalence_gap * ((1 - plan.women) if woman else -plan.women)
        assert in_binomial_bounds(sum(one.disease for one in group), len(group), share, 7)
        # Who is ill has the bias no more often than the others of the subgroup.
        both = sum(one.disease and one.bias for one in group)
        assert in_binomial_bounds(both, len(group), share * (0.5 + shift), 7)
    # All in all the prevalence is the one that was asked for, whatever the gap.
    assert plan.women * plan.prevalence_of(True) + (1 - plan.women) * plan.prevalence_of(False) == pytest.approx(
        plan.prevalence
    )


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """Two folders of one plan are the same; another seed gives other images; another strength other UIDs, since they
    are other images, but the same people."""

    def contents(name: str) -> dict[str, str]:
        folder = tmp_path / name
        return {
            str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file()
        }

    plan = PhantomPlan(sites=2, patients=2, images=1)
    truths = [
        write_phantoms(tmp_path / name, changed)
        for name, changed in (
            ("a", plan),
            ("b", plan),
            ("c", msgspec.structs.replace(plan, seed=1)),
            ("d", msgspec.structs.replace(plan, disease=2.0)),
        )
    ]
    assert contents("a") == contents("b")
    images = [name for name in contents("a") if name.endswith(".dcm")]
    assert all(contents("a")[name] != contents("c")[name] for name in images)
    assert truths[3].patients == truths[0].patients
    assert truths[2].patients != truths[0].patients
    uids = [{pydicom.dcmread(tmp_path / which / name).SOPInstanceUID for name in images} for which in "ad"]
    assert len(uids[0]) == len(images)
    assert not uids[0] & uids[1]
    assert phantoms.load_truth(tmp_path / "a") == truths[0]


def test_every_file_is_taken_and_labelled(tmp_path: Path) -> None:
    """The index refuses none of a site's files, nor of the twins', finds the patients with all their images, and the
    CSV labels each as the truth says."""
    truth = write_phantoms(tmp_path / "out", SMALL)
    target = Target("disease", "classification", ("no", "yes"))
    with Workers(1) as pool:
        for part, people in (("", truth.patients), ("counterfactuals", truth.twins)):
            folder = tmp_path / "out" / part / "hospital-2"
            index = index_folder(folder / "images", tmp_path / f"state{part}", workers=pool)
            assert index.refused.total() == 0
            own = [one for one in people if one.site == "hospital-2"]
            assert (index.files, index.patients, len(index.images)) == (8, 4, 8)
            labels = load_labels(folder / "labels.csv", (target,), index)
            for one in own:
                key = index.pseudonyms.of_text(b"patient", "", one.patient)
                assert labels.values[key] == (float(one.disease),)
                found = [image for image in index.images if image.patient == key]
                assert {image.header.descriptors.sex for image in found} == {
                    "female" if one.subgroup == "F" else "male"
                }
                assert {image.header.descriptors.modality for image in found} == {"CT"}
                assert len({image.series for image in found}) == 1
                assert all(image.header.positions is not None for image in found)


def gap(plan: PhantomPlan, prepared: list[PhantomPatient]) -> float:
    """How much more often a linear classifier of the pixels calls healthy women ill than healthy men."""
    scanners = [phantoms.scanner_of(plan, site) for site in range(plan.sites)]
    by_site = {scanner.site: scanner for scanner in scanners}
    images = np.stack([phantoms.render(plan, by_site[one.site], one)[0] for one in prepared]).astype(float)
    features = images.reshape(len(images), -1)
    features = (features - features.mean(axis=0)) / (features.std(axis=0) + 5)
    ill = np.array([one.disease for one in prepared])
    woman = np.array([one.subgroup == "F" for one in prepared])
    train = np.arange(len(ill)) % 2 == 0
    # Ridge regression, on the halves of the patients.
    left = features[train]
    weights = np.linalg.solve(left.T @ left + 300 * np.eye(left.shape[1]), left.T @ (ill[train] - 0.5))
    alarm = (features @ weights > 0) & ~train & ~ill
    return float(
        alarm[woman].sum() / (~ill & ~train & woman).sum() - alarm[~woman].sum() / (~ill & ~train & ~woman).sum()
    )


def test_the_gap_grows_with_the_bias() -> None:
    """A linear classifier raises more false alarms in the subgroup the more of the bias is in the image; without a bias
    in the image, or one that is not tied to the subgroup, both groups are treated alike."""
    base = PhantomPlan(
        sites=2, patients=400, images=1, size=16, disease=0.5, site_effect=0, prevalence_gap=0.5, correlation=0.9
    )
    gaps = {}
    for name, changes in {
        "none": {"bias": 0.0},
        "some": {"bias": 0.7},
        "full": {"bias": 2.0},
        "not tied": {"bias": 2.0, "correlation": 0.0},
        "no cause": {"bias": 2.0, "prevalence_gap": 0.0},
    }.items():
        plan = msgspec.structs.replace(base, **changes)
        people = [phantoms._drawn(plan, site, number) for site in range(2) for number in range(400)]
        gaps[name] = gap(plan, people)
    assert abs(gaps["none"]) < 0.12
    assert gaps["none"] + 0.1 < gaps["some"] < gaps["full"] - 0.05
    assert gaps["full"] > 0.3
    assert abs(gaps["not tied"]) < 0.12
    assert abs(gaps["no cause"]) < 0.12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sites", 0),
        ("patients", 0),
        ("images", 16),
        ("size", 15),
        ("pairs", 61),
        ("disease", -0.1),
        ("bias", float("nan")),
        ("site_effect", 2.1),
        ("prevalence", 1.1),
        ("correlation", -1.1),
        ("women", 2.0),
        ("seed", -1),
    ],
)
def test_a_plan_that_is_none(field: str, value: float) -> None:
    """An option out of its range is refused by name, with what was found."""
    with pytest.raises(DatasetError, match=f"phantoms, {field}: found {value}"):
        PhantomPlan(**{field: value})


def test_a_gap_that_leaves_no_probability() -> None:
    """A gap that would need more than all to be ill is refused."""
    with pytest.raises(DatasetError, match=r"prevalence of 1\.15 in women"):
        PhantomPlan(prevalence=0.9, prevalence_gap=0.5)


def test_a_folder_that_has_something_in_it(tmp_path: Path) -> None:
    """Nothing is written among other files, and a folder without a truth is an error of one sentence."""
    (tmp_path / "images").mkdir()
    with pytest.raises(DatasetError, match="not empty"):
        write_phantoms(tmp_path, SMALL)
    with pytest.raises(DatasetError, match=r"truth\.json"):
        phantoms.load_truth(tmp_path)
