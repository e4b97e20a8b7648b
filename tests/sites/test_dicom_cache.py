"""The cache: patients, parts and caps, labels, volumes, and decoders that crash; and training on its rows."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.broken_decoder import CRASHING_ROWS, HANGING_ROWS, LYING_ROWS, SHORT_ROWS
from support.dicom_files import image, save, slices
from torch import nn

from dp.events import PoissonSampledGaussian
from dp.training import Plan, train_private
from sites.datasets.dicom import (
    DicomIndex,
    ImageDataset,
    ImagePlan,
    Limits,
    Reason,
    Target,
    TargetLoss,
    build_cache,
    index_folder,
    load_card,
    load_labels,
)
from sites.datasets.dicom.cache import PARTS, part_of, planned
from sites.datasets.dicom.records import Images, MakeImages
from sites.datasets.dicom.workers import Workers
from sites.errors import DatasetError

PLAN = ImagePlan(shape=(8, 8), held_out=0.0)
FINDING = Target("finding", "classification", ("no", "yes"))


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two processes for all tests here."""
    with Workers(2) as pool:
        yield pool


def indexed(folder: Path, workers: Workers, *, limits: Limits | None = None) -> DicomIndex:
    """The index of ``folder / "images"``, with its state beside it."""
    return index_folder(folder / "images", folder / "state", limits=limits, workers=workers)


def people(folder: Path, rows: dict[str, int], **attributes: object) -> None:
    """So many X-rays of each patient, each one's pixels all the same number."""
    for number, patient in enumerate(name for name, count in rows.items() for _ in range(count)):
        pixels = np.full((8, 8), 10 + number, np.uint8)
        one = image(pixels, number=number, patient=patient, series=number + 1, **attributes)
        save(one, folder / "images" / patient / f"{number}")


def test_a_decoder_may_crash_hang_or_lie(tmp_path: Path) -> None:
    """A file that crashes its decoder, one that hangs it and two whose decoder answers nonsense are each counted; every
    other file is in the cache, in its place."""
    people(tmp_path, dict.fromkeys("ABCDEF", 2))
    for number, rows in enumerate((CRASHING_ROWS, HANGING_ROWS, LYING_ROWS, SHORT_ROWS)):
        pixels = np.zeros((rows, 8), np.uint8)
        save(image(pixels, number=number, series=90, patient="B"), tmp_path / "images" / f"broken{number}")
    with Workers(2, program=(sys.executable, "-m", "support.broken_decoder")) as pool:
        index = indexed(tmp_path, pool, limits=Limits(seconds=4.0))
        assert not index.refused
        card = build_cache(index, PLAN, tmp_path / "cache", workers=pool)
    assert card.refused == {Reason.CRASHED.value: 3, Reason.TIMED_OUT.value: 1}
    assert card.rows["train"] == 12
    data = ImageDataset(tmp_path / "cache")
    assert sorted((data.features[:, 0, 0, 0] * 255 - 10).round().tolist()) == list(range(12))


def test_whoever_stops_does_not_wait_for_a_decoder(tmp_path: Path) -> None:
    """Whoever stops listening has the workers back at once though decoders hang, and these go on with other tasks."""
    people(tmp_path, {"A": 1})
    save(image(np.zeros((HANGING_ROWS, 8), np.uint8), number=9, series=9), tmp_path / "images" / "hanging")
    with Workers(2, program=(sys.executable, "-m", "support.broken_decoder")) as pool:
        index = indexed(tmp_path, pool)
        whole, hanging = sorted(index.images, key=lambda one: one.header.rows)
        hours = 1e4
        tasks = [(one, MakeImages([(one.path, [0])], PLAN, Limits()), hours) for one in [whole, *[hanging] * 20]]
        for _ in range(2):
            answers = pool.run(tasks)
            assert isinstance(next(answers)[1], Images)
            answers.close()


def test_rows_go_with_their_patients(workers: Workers, tmp_path: Path) -> None:
    """Each row's patient is the one whose image it is, the same number for all rows of one person."""
    people(tmp_path, {"A": 3, "B": 1, "C": 2})
    build_cache(indexed(tmp_path, workers), PLAN, tmp_path / "cache", workers=workers)
    data = ImageDataset(tmp_path / "cache")
    rows = {}
    for (features, _), patient in zip(data, data.patients, strict=True):
        rows.setdefault(patient, set()).add(round(float(features.mean()) * 255) - 10)
    assert sorted(rows.values(), key=min) == [{0, 1, 2}, {3}, {4, 5}]


def test_a_patient_is_in_one_part(workers: Workers, tmp_path: Path) -> None:
    """Train, validation and held out share no patient, have the plan's shares of them, and a patient who joins moves
    nobody."""
    people(tmp_path, {f"P{number}": 2 for number in range(120)})
    plan = ImagePlan(shape=(8, 8), held_out=0.3, validation=0.2)
    index = indexed(tmp_path, workers)
    card = build_cache(index, plan, tmp_path / "cache", workers=workers)
    # 120 patients: below 10 or above 74 of a share of 0.3, and likewise for the others, by chance in 1 of 10^6 runs.
    assert 12 < card.patients["held out"] < 66
    assert 4 < card.patients["validation"] < 52
    assert {part: 2 * count for part, count in card.patients.items()} == card.rows
    parts = [set(ImageDataset(tmp_path / "cache", part).patients) for part in PARTS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 120
    before = {image.patient: part_of(index, plan, image.patient) for image in index.images}
    save(image(number=999, patient="new"), tmp_path / "images" / "new")
    later = indexed(tmp_path, workers)
    assert before.items() <= {one.patient: part_of(later, plan, one.patient) for one in later.images}.items()


def test_no_patient_has_more_than_the_cap(workers: Workers, tmp_path: Path) -> None:
    """Images beyond the cap are counted, not decoded; the same ones are kept each time; frames count as images."""
    people(tmp_path, {"A": 7, "B": 2})
    frames = np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8)
    save(image(frames, number=70, series=70, patient="C"), tmp_path / "images" / "C")
    index = indexed(tmp_path, workers)
    plan = ImagePlan(shape=(8, 8), held_out=0.0, images_per_patient=3)
    card = build_cache(index, plan, tmp_path / "cache", workers=workers)
    assert sorted(Counter(ImageDataset(tmp_path / "cache").patients).values()) == [2, 3, 3]
    assert card.refused == {Reason.OVER_CAP.value: 4 + 2}
    assert planned(index, plan) == planned(index, plan)


def test_an_unchanged_cache_is_kept(workers: Workers, tmp_path: Path) -> None:
    """A cache of the same files, labels and plan is not decoded again; any change makes it anew."""
    people(tmp_path, {"A": 2, "B": 2})
    index, folder, decoded = indexed(tmp_path, workers), tmp_path / "cache", []

    def build(index: DicomIndex, plan: ImagePlan = PLAN) -> bool:
        decoded.clear()
        build_cache(index, plan, folder, workers=workers, progress=lambda done, total: decoded.append(done))
        return bool(decoded)

    assert build(index)
    assert not build(indexed(tmp_path, workers))
    assert build(index, ImagePlan(shape=(8, 8), held_out=0.0, mean=0.1))
    assert build(index)
    people(tmp_path, {"A": 2, "B": 3})
    assert build(indexed(tmp_path, workers))
    assert len(ImageDataset(folder)) == 5


def test_a_build_that_fails_leaves_the_old_cache(workers: Workers, tmp_path: Path) -> None:
    """A plan without any row is an error; the cache that was there still is, and nothing half made lies beside it."""
    people(tmp_path, {"A": 2})
    index = indexed(tmp_path, workers)
    card = build_cache(index, PLAN, tmp_path / "cache", workers=workers)
    with pytest.raises(DatasetError, match="none of them to train on"):
        build_cache(index, ImagePlan(shape=(8, 8), modalities=("CT",)), tmp_path / "cache", workers=workers)
    assert load_card(tmp_path / "cache") == card
    assert {one.name for one in tmp_path.iterdir()} == {"images", "state", "cache"}


def test_a_cache_is_private(workers: Workers, tmp_path: Path) -> None:
    """Only the owner can read what is, after all, patients' images."""
    people(tmp_path, {"A": 2})
    build_cache(indexed(tmp_path, workers), PLAN, tmp_path / "cache", workers=workers)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert {one.stat().st_mode & 0o777 for one in (tmp_path / "cache").iterdir()} == {0o600}


@pytest.mark.parametrize("damage", ["card.json", "features.npy", "targets.npy", "patients.npy"])
def test_a_damaged_cache_is_refused(damage: str, workers: Workers, tmp_path: Path) -> None:
    """A cache with a file cut off, or replaced by one of another shape, is not trained on."""
    people(tmp_path, {"A": 2})
    build_cache(indexed(tmp_path, workers), PLAN, tmp_path / "cache", workers=workers)
    file = tmp_path / "cache" / damage
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DatasetError, match="cache"):
        ImageDataset(tmp_path / "cache")
    np.save(file.with_suffix(".npy"), np.zeros((3, 3), np.float32))
    with pytest.raises(DatasetError, match="cache"):
        ImageDataset(tmp_path / "cache")


def test_a_part_without_rows_is_an_error(workers: Workers, tmp_path: Path) -> None:
    """Nobody evaluates on nothing without noticing."""
    people(tmp_path, {"A": 2})
    build_cache(indexed(tmp_path, workers), PLAN, tmp_path / "cache", workers=workers)
    with pytest.raises(DatasetError, match="held out"):
        ImageDataset(tmp_path / "cache", "held out")


# Series as volumes.


def test_a_series_is_one_volume_from_the_feet_up(workers: Workers, tmp_path: Path) -> None:
    """Slices are stacked by position along the normal, whatever their InstanceNumber and their files' names say."""
    for place, one in enumerate(slices(6)):
        save(one, tmp_path / "images" / f"{(place * 5) % 6}.dcm")
    plan = ImagePlan(shape=(6, 8, 8), hu_centre=2.5, hu_width=5.0, held_out=0.0)
    card = build_cache(indexed(tmp_path, workers), plan, tmp_path / "cache", workers=workers)
    assert (card.rows["train"], card.refused) == (1, {})
    (volume, _) = ImageDataset(tmp_path / "cache")[0]
    np.testing.assert_allclose(volume[0, :, 4, 4], np.arange(6) / 5, atol=1e-6)


def test_oblique_slices_are_ordered_along_their_own_normal(workers: Workers, tmp_path: Path) -> None:
    """The normal is that of the slices, not an axis of the patient: here z runs against it."""
    turned = [1.0, 0.0, 0.0, 0.0, -0.8, -0.6]  # its normal is (0, 0.6, -0.8)
    for place, one in enumerate(slices(5, ImageOrientationPatient=turned)):
        one.ImagePositionPatient = [0, 0.6 * 2 * place, -0.8 * 2 * place]
        save(one, tmp_path / "images" / f"{place}")
    plan = ImagePlan(shape=(5, 8, 8), hu_centre=2.0, hu_width=4.0, held_out=0.0)
    build_cache(indexed(tmp_path, workers), plan, tmp_path / "cache", workers=workers)
    (volume, _) = ImageDataset(tmp_path / "cache")[0]
    np.testing.assert_allclose(volume[0, :, 4, 4], np.arange(5) / 4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ImagePositionPatient": [-4, -4, 10]}, Reason.REPEATED_POSITION),
        ({"ImagePositionPatient": [-4, -4, 99]}, Reason.UNEVEN_SPACING),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}, Reason.MIXED_SERIES),
        ({"PixelSpacing": [2.0, 2.0]}, Reason.MIXED_SERIES),
        ({"PatientID": "P2"}, Reason.MIXED_SERIES),
        ({"ImagePositionPatient": None}, Reason.NO_GEOMETRY),
    ],
)
def test_a_series_that_is_no_volume(
    change: dict[str, object], reason: Reason, workers: Workers, tmp_path: Path
) -> None:
    """A series with one slice that does not belong is refused as a volume, for its reason; its slices stay usable."""
    for place, one in enumerate(slices(5, **{})):
        if place == 3:
            for keyword, value in change.items():
                setattr(one, keyword, value) if value is not None else delattr(one, keyword)
        save(one, tmp_path / "images" / f"{place}")
    for place, one in enumerate(slices(4, series=2)):
        save(one, tmp_path / "images" / f"whole{place}")
    index = indexed(tmp_path, workers)
    samples, refused = planned(index, ImagePlan(shape=(4, 8, 8)))
    assert (len(samples), refused) == (1, {reason: 1})
    samples, refused = planned(index, ImagePlan(shape=(8, 8)))
    assert (len(samples), refused) == (9, {})


# Labels.


def labelled(folder: Path, workers: Workers, text: str, *targets: Target) -> tuple[DicomIndex, object]:
    """The index of a folder, and the labels of a CSV of that text."""
    index = indexed(folder, workers)
    (folder / "labels.csv").write_text(text)
    return index, load_labels(folder / "labels.csv", targets or (FINDING,), index)


@pytest.mark.parametrize("key", ["patient", "study", "series", "instance"])
def test_labels_go_by_any_key(key: str, workers: Workers, tmp_path: Path) -> None:
    """Labels of a patient, study, series or instance are those of all its images, in any case and order of columns."""
    people(tmp_path, {"A": 2, "B": 2})
    ids = {
        "patient": ["a ", "B"],
        "study": [str(image(patient=name).StudyInstanceUID) for name in "AB"],
        "series": [str(image(series=number).SeriesInstanceUID) for number in (1, 2, 3, 4)],
        "instance": [str(image(number=number, series=number + 1).SOPInstanceUID) for number in range(4)],
    }[key]
    half = len(ids) // 2
    lines = [f"{'YES' if place >= half else 'no'},{name}" for place, name in enumerate(ids)]
    index, labels = labelled(tmp_path, workers, "\n".join([f"finding,{key}", *lines]))
    build_cache(index, PLAN, tmp_path / "cache", labels=labels, workers=workers)
    data = ImageDataset(tmp_path / "cache")
    assert {round(float(x.mean()) * 255) - 10: float(y) for x, y in data} == {0: 0, 1: 0, 2: 1, 3: 1}


def test_missing_labels_are_masked_or_left_out(workers: Workers, tmp_path: Path) -> None:
    """A row with some of its targets stays, with NaN for the others; one without any is left out and counted."""
    people(tmp_path, {"A": 1, "B": 1, "C": 1, "D": 1})
    targets = (FINDING, Target("grade", "ordinal", ("low", "mid", "high")), Target("dose", "regression"))
    text = "patient,finding,grade,dose\nA,yes,mid,1.5\nB,,high,\nC,,,\nX,no,low,3\n"
    index, labels = labelled(tmp_path, workers, text, *targets)
    card = build_cache(index, PLAN, tmp_path / "cache", labels=labels, workers=workers)
    assert card.refused == {Reason.NO_LABEL.value: 2}
    found = sorted(ImageDataset(tmp_path / "cache").targets.tolist(), key=str)
    assert str(found) == str(sorted([[1.0, 1.0, 1.5], [float("nan"), 2.0, float("nan")]], key=str))


def test_labels_follow_merged_patients(workers: Workers, tmp_path: Path) -> None:
    """A label under any number of a person is that of all the person's images; two that differ are an error."""
    people(tmp_path, {"A": 1, "B": 1, "C": 1})
    merges, table = tmp_path / "merges.csv", tmp_path / "labels.csv"
    merges.write_text("patient,same_as\nA,B\nB,C\n")
    index = index_folder(tmp_path / "images", tmp_path / "state", merges=merges, workers=workers)
    for number in "ABC":
        table.write_text(f"patient,finding\n{number},yes\n")
        labels = load_labels(table, (FINDING,), index)
        assert [labels.of(image) for image in index.images] == [(1.0,)] * 3
    table.write_text("patient,finding\nA,yes\nC,no\n")
    with pytest.raises(DatasetError, match="line 3: other values"):
        load_labels(table, (FINDING,), index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,finding\nDOE,maybe\n", "line 2, column finding: expected one of 2 classes"),
        ("patient,finding\nDOE,yes\nDOE,no\n", "line 3: other values"),
        ("patient,finding\n,yes\n", "line 2, column patient"),
        ("patient,study,finding\nDOE,1,yes\n", "found 2 key columns"),
        ("name,finding\nDOE,yes\n", "found 0 key columns"),
        ("patient,other\nDOE,yes\n", "a column finding"),
        ("patient,finding\nDOE\n", "line 2: expected as many fields"),
        ("patient,patient\nDOE,DOE\n", "names each column once"),
        ('patient,finding\n"DOE,yes\n', "not a CSV file"),
    ],
)
def test_labels_that_cannot_be_right(text: str, message: str, workers: Workers, tmp_path: Path) -> None:
    """A wrong file of labels is an error that names line and column, and nobody."""
    people(tmp_path, {"A": 1})
    with pytest.raises(DatasetError, match=message) as raised:
        labelled(tmp_path, workers, text)
    assert "DOE" not in str(raised.value)


def test_instances_label_no_volume(workers: Workers, tmp_path: Path) -> None:
    """A volume has no label of an instance, and none is made up."""
    people(tmp_path, {"A": 1})
    index, labels = labelled(tmp_path, workers, "instance,finding\n1.2,yes\n")
    with pytest.raises(DatasetError, match="instances"):
        planned(index, ImagePlan(shape=(2, 8, 8)), labels)


@pytest.mark.parametrize(
    ("text", "target", "outputs"),
    [
        ("age", Target("age", "regression"), 1),
        ("finding=no,yes", FINDING, 1),
        ("view=ap,pa,lateral", Target("view", "classification", ("ap", "pa", "lateral")), 3),
        ("grade=low<mid<high", Target("grade", "ordinal", ("low", "mid", "high")), 2),
    ],
)
def test_targets_are_written_on_the_command_line(text: str, target: Target, outputs: int) -> None:
    """The three kinds of target, and how many numbers a model has to give for each."""
    assert Target.parse(text) == target
    assert target.outputs == outputs


@pytest.mark.parametrize("text", ["finding=yes", "finding=yes,yes", "grade=a<A"])
def test_targets_need_different_classes(text: str) -> None:
    """One class, or the same twice, is nothing to learn."""
    with pytest.raises(DatasetError, match="classes"):
        Target.parse(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (8,)},
        {"shape": (8, 8), "spacing": (1.0,)},
        {"shape": (8, 8), "spacing": (0.0, 1.0)},
        {"shape": (8, 8), "deviation": 0.0},
        {"shape": (8, 8), "mean": float("nan")},
        {"shape": (8, 8), "hu_width": -1.0},
        {"shape": (8, 8), "channels": 2},
        {"shape": (8, 8), "held_out": 0.6, "validation": 0.4},
    ],
)
def test_a_plan_that_is_none(wrong: dict[str, object]) -> None:
    """A plan that no image can follow is refused when it is made."""
    with pytest.raises(DatasetError, match="image plan"):
        ImagePlan(**wrong)


# Losses and training.

SEVERAL = (
    FINDING,
    Target("view", "classification", ("ap", "pa", "lateral")),
    Target("grade", "ordinal", ("low", "mid", "high")),
    Target("dose", "regression"),
)


def test_the_loss_of_several_targets() -> None:
    """Each kind has its own loss, computed here by hand, and the sum is over rows and targets."""
    loss = TargetLoss(SEVERAL)
    assert loss.outputs == 1 + 3 + 2 + 1
    outputs = torch.tensor([[0.3, 1.0, 2.0, -1.0, 0.4, -0.2, 2.5]])
    log_sigmoid = nn.functional.logsigmoid
    by_hand = (
        -log_sigmoid(torch.tensor(0.3))
        - (2.0 - torch.logsumexp(torch.tensor([1.0, 2.0, -1.0]), 0))
        - log_sigmoid(torch.tensor(0.4))
        - log_sigmoid(torch.tensor(0.2))
        + (2.5 - 4.0) ** 2
    )
    torch.testing.assert_close(loss(outputs, torch.tensor([[1.0, 1.0, 1.0, 4.0]])), by_hand)
    with pytest.raises(DatasetError, match="expected"):
        loss(outputs[:, :3], torch.tensor([[1.0, 1.0, 1.0, 4.0]]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 6), missing=st.floats(0, 1))
def test_missing_targets_add_nothing(seed: int, rows: int, missing: float) -> None:
    """A loss is the sum over rows of each row's loss alone, a missing target changes neither value nor gradient of the
    others, and the gradient is finite even where nothing is known."""
    generator = np.random.default_rng(seed)
    loss = TargetLoss(SEVERAL)
    outputs = torch.tensor(generator.normal(size=(rows, loss.outputs)), requires_grad=True)
    values = np.stack(
        [generator.integers(0, 2, rows), *generator.integers(0, 3, (2, rows)), generator.normal(size=rows)]
    )
    known = generator.random(values.shape) >= missing
    targets = torch.tensor(np.where(known, values, np.nan).T)
    whole = loss(outputs, targets)
    torch.testing.assert_close(whole, sum(loss(outputs[[row]], targets[[row]]) for row in range(rows)))
    (gradient,) = torch.autograd.grad(whole, outputs)
    assert gradient.isfinite().all()
    ends = np.cumsum([0] + [target.outputs for target in SEVERAL])
    for place in range(len(SEVERAL)):
        part = gradient[:, ends[place] : ends[place + 1]]
        assert ((part != 0).any(dim=1).numpy() <= known[place]).all()


def test_a_cache_trains_under_differential_privacy(workers: Workers, tmp_path: Path) -> None:
    """Rows, patients and a loss with missing targets go through DP-SGD as they are, and the model moves."""
    people(tmp_path, {"A": 3, "B": 2, "C": 1, "D": 2})
    text = "patient,finding,dose\nA,yes,1.5\nB,,2\nC,no,\nD,no,1\n"
    index, labels = labelled(tmp_path, workers, text, FINDING, Target("dose", "regression"))
    build_cache(index, PLAN, tmp_path / "cache", labels=labels, workers=workers)
    examples = ImageDataset(tmp_path / "cache").examples()
    assert len(set(examples.owners)) == 4
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    before = model[1].weight.detach().clone()
    train_private(
        model,
        TargetLoss(labels.targets),
        examples.features,
        examples.targets,
        patients=examples.owners,
        plan=Plan(steps=2, learning_rate=0.1, sampling_rate=1.0),
        event=PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=0.1, steps=2),
        clip_norm=1.0,
        max_rows_per_patient=2,
    )
    assert model[1].weight.isfinite().all()
    assert not torch.equal(model[1].weight, before)


def test_training_does_not_change_the_cache(workers: Workers, tmp_path: Path) -> None:
    """What is written into the tensors stays in this process."""
    people(tmp_path, {"A": 2})
    build_cache(indexed(tmp_path, workers), PLAN, tmp_path / "cache", workers=workers)
    data = ImageDataset(tmp_path / "cache")
    before = (tmp_path / "cache" / "features.npy").read_bytes()
    data.features.zero_()
    assert (tmp_path / "cache" / "features.npy").read_bytes() == before


def test_batches_come_as_from_any_data_set(workers: Workers, tmp_path: Path) -> None:
    """torch's loader takes it."""
    people(tmp_path, {"A": 3, "B": 2})
    build_cache(indexed(tmp_path, workers), PLAN, tmp_path / "cache", workers=workers)
    batches = list(torch.utils.data.DataLoader(ImageDataset(tmp_path / "cache"), batch_size=2))
    assert [tuple(features.shape) for features, _ in batches] == [(2, 1, 8, 8), (2, 1, 8, 8), (1, 1, 8, 8)]


def test_the_documents_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the document tells an engineer to write works, from a folder to a loss."""
    for number in range(24):
        save(image(number=number, patient=f"P{number}"), tmp_path / "IMAGES" / str(number))
    lines = [f"P{number},{('no', 'yes')[number % 2]}" for number in range(24)]
    (tmp_path / "findings.csv").write_text("\n".join(["patient,finding", *lines]))
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "dicom.md").read_text()
    names: dict[str, object] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)  # noqa: S102  our own document
    examples, loss = names["examples"], names["loss"]
    assert examples.features.shape[1:] == (1, 64, 64)
    assert len(set(examples.owners)) == names["card"].patients["train"]
    assert loss(torch.zeros(len(examples.features), 1), examples.targets) > 0
