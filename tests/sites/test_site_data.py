"""A site that trains on a folder of DICOM studies, as the manifest's [images] says, with patients as the unit."""

import stat
import tomllib
from contextlib import closing
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import tomli_w
import torch
from support.consortium import make_consortium
from support.xray_studies import IMAGES, PLAN, VIEWS, write_some

from dp.budget import BudgetGuard, PrivacyBudget
from dp.errors import BudgetExhausted
from dp.events import PoissonSampledGaussian
from dp.ledger import Release, read_ledger, verify
from secureagg.testing import CountingEntropy
from sites.config import DicomData, LocalPrivacy, NoPrivacy, Personalisation, open_site
from sites.datasets.dicom import ImageDataset, Target
from sites.errors import ConfigurationError, ManifestError
from sites.files import create_private
from sites.manifest import Images, Manifest, load_images
from sites.models import initial_image_model
from sites.personalisation import PERSONAL_MODEL, personalise
from sites.recipe import PRIVACY, TRAINING
from sites.site_data import CACHE, augmentation_of, held_out_of, prepare_images, scored, site_data
from sites.trainer import ledger_of, trainer_for
from sites.xray_studies import FINDING

SITE = "hospital-6"  # the smallest with many of both classes
NAMES = (SITE, "b", "c")
ROUND = msgspec.structs.replace(TRAINING, rounds=1, batch_size=8)


def consortium(folder, *, images=IMAGES, initial=None, **changes):
    """A consortium that sees images by ``images``, or not for None, and the SITE.toml of SITE with its studies."""
    tables = {"training": ROUND, **({} if images is None else {"images": images}), **changes}
    model = initial_image_model(images or IMAGES) if initial is None else initial
    made = make_consortium(folder, names=NAMES, initial=model, **tables)
    path = made.site_configs[SITE]
    data = {"kind": "dicom", "folder": f"../studies/{SITE}/images", "labels": f"../studies/{SITE}/labels.csv"}
    path.write_text(tomli_w.dumps({**tomllib.loads(path.read_text()), "data": data}))
    return path


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A folder with the studies of one hospital."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "studies").mkdir()
    write_some(folder / "studies", SITE, rows=900)
    return folder


@pytest.fixture(scope="module")
def site(studies):
    """That hospital, with its images prepared."""
    opened = open_site(consortium(studies, images=msgspec.structs.replace(IMAGES, augmentation=VIEWS)))
    create_private(opened.state / "dicom.secret", bytes(32))  # always the same patients in each part
    prepare_images(opened)
    return opened


def test_rows_and_patients(site, studies):
    """All images are rows, a patient's in one part only; at most so many as the plan allows are used in a step."""
    found = site_data(site)
    rows = len(found.data.targets) + len(found.held_out.targets)
    lines = (studies / "studies" / SITE / "labels.csv").read_text().splitlines()[1:]
    files = list((studies / "studies" / SITE / "images").rglob("*.dcm"))
    assert rows == len(files)
    assert len(set(found.data.owners)) + len(set(found.held_out.owners)) == len(lines)
    assert not set(found.data.owners) & set(found.held_out.owners)
    assert found.max_rows_per_patient == PLAN.images_per_patient
    assert found.augmentation.of_class.keys() == {0.0}


def test_a_private_round_books_patients(site):
    """A round of the site's program is booked with its patients' sampling rate in the ledger, whose data is known by
    the site's secret; held-out images are scored."""
    trainer = trainer_for(site)
    found = site_data(site)
    assert trainer.patients == len(set(found.data.owners))
    assert trainer.patients < len(found.data.targets) / 2
    state = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    result = trainer.train(state, run="run", round_number=1)
    assert result.examples == trainer.patients
    assert 0.9 < result.epsilon <= PRIVACY.epsilon
    entries = verify(read_ledger(site.ledger)).entries
    (booked,) = [entry for entry in entries if entry["kind"] == "reserve"]
    assert booked["event"]["sampling_rate"] == pytest.approx(8 / trainer.patients)
    scores, labels = trainer.evaluate(result.state)
    assert len(scores) == len(labels) == len(found.held_out.targets)
    assert set(labels.tolist()) == {0, 1}
    trainer.close()


def test_what_is_fixed_is_computed_once(site):
    """Without views the rows have been through the model's fixed part; what is predicted is the same."""
    manifest = msgspec.structs.replace(site.manifest, images=IMAGES)
    found, whole = site_data(replace(site, manifest=manifest)), site_data(site)
    assert whole.front is None
    assert found.data.features.shape == (len(whole.data.targets), 784)
    state = {"linear.weight": torch.randn(1, 784), "linear.bias": torch.ones(1)}
    for one in (found, whole):
        one.model.load_state_dict(state)
    assert torch.allclose(found.model(found.data.features), whole.model(whole.data.features), atol=1e-5)


def test_more_images_are_the_same_collection(site, studies, tmp_path):
    """A collection that has grown keeps its name in the ledger, so that nothing that was spent is forgotten; with
    another secret it has another name."""
    before = site_data(site).dataset
    lines = (studies / "studies" / SITE / "labels.csv").read_text().splitlines()
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("\n".join(lines[:-5]) + "\n")
    data = msgspec.structs.replace(site.config.data, labels=str(fewer))
    found = site_data(replace(site, config=msgspec.structs.replace(site.config, data=data)))
    assert found.dataset == before
    assert len(found.data.targets) + len(found.held_out.targets) < len(lines) * 3 - 12
    elsewhere = msgspec.structs.replace(site.config.data, index=str(tmp_path / "index"))
    assert site_data(replace(site, config=msgspec.structs.replace(site.config, data=elsewhere))).dataset != before
    prepare_images(site)


def test_what_is_scored(site):
    """Evaluation is about the first target with two classes, and counts rows where it is known only."""
    dose, grade = Target("dose", "regression"), Target("grade", "ordinal", ("a", "b", "c"))
    assert scored([FINDING]) == (0, 0)
    assert scored([dose, grade, FINDING]) == (2, 3)
    assert scored([dose, grade]) == (None, 0)
    targets = np.load(site.state / CACHE / "targets.npy")
    part = ImageDataset(site.state / CACHE, "held out")
    first = sum(part.card.rows[name] for name in ("train", "validation"))
    try:
        spoilt = targets.copy()
        spoilt[first] = np.nan
        np.save(site.state / CACHE / "targets.npy", spoilt)
        known = held_out_of(site.state / CACHE, [FINDING])
        assert len(known.targets) == len(known.patients) == len(part) - 1
        assert held_out_of(site.state / CACHE, [grade]) is None
    finally:
        np.save(site.state / CACHE / "targets.npy", targets)


def test_declared_views():
    """Views are those of the named classes of the first target, "*" those of the others."""
    declared = [*VIEWS, msgspec.structs.replace(VIEWS[0], of="*", views=3)]
    views = augmentation_of(msgspec.structs.replace(IMAGES, augmentation=declared))
    assert (views.of_class[0.0].count, views.otherwise.count) == (2, 3)
    assert augmentation_of(IMAGES) is None


def test_the_manifest(site, studies, tmp_path):
    """[images] survives the file, is part of what is signed, and comes from a TOML file of its own."""
    manifest = Manifest.load(studies / "manifest.toml")
    manifest.check()
    other = msgspec.structs.replace(IMAGES, plan=msgspec.structs.replace(PLAN, mean=0.1))
    assert msgspec.structs.replace(manifest, images=other).digest != manifest.digest
    text = 'model = "small-cnn"\n[plan]\nshape = [28, 28]\n[[targets]]\nname = "x"\nkind = "regression"\n'
    (tmp_path / "images.toml").write_text(text)
    assert load_images(tmp_path / "images.toml").targets == [Target("x", "regression")]
    (tmp_path / "images.toml").write_text(text.replace("28, 28", "28, 0"))
    with pytest.raises(ManifestError, match=r"images\.toml: .*shape"):
        load_images(tmp_path / "images.toml")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"images": None}, ManifestError, r"found no \[images\]"),
        (
            {"initial": initial_image_model(Images(model="small-cnn", plan=PLAN, targets=[FINDING]))},
            ManifestError,
            "are not those of filter-bank",
        ),
        (
            {"images": msgspec.structs.replace(IMAGES, plan=msgspec.structs.replace(PLAN, images_per_patient=500))},
            ManifestError,
            "500 images of a patient in 1 views, expected at most 256",
        ),
    ],
)
def test_manifests_that_do_not_fit(tmp_path, options, error, match):
    """Without [images], with another model's tensors, or with more images of a patient than a batch holds, nothing is
    read at all."""
    path = consortium(tmp_path, **options)
    with pytest.raises(error, match=match):
        trainer_for(open_site(path))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"targets": [FINDING, FINDING]}, "listed twice"),
        ({"augmentation": [*VIEWS, *VIEWS]}, "listed twice"),
        (
            {"augmentation": [msgspec.structs.replace(VIEWS[0], of="maybe")]},
            r"'maybe' in \[images\], expected one of \*, no",
        ),
    ],
)
def test_images_that_contradict_themselves(tmp_path, change, match):
    """A target or class that is there twice, and a class that the target does not have, are refused."""
    with pytest.raises(ManifestError, match=match):
        consortium(tmp_path, images=msgspec.structs.replace(IMAGES, **change), initial=initial_image_model(IMAGES))


def test_nothing_to_prepare(tmp_path):
    """A site whose data is not DICOM files is told so."""
    path = consortium(tmp_path)
    fields = tomllib.loads(path.read_text())
    path.write_text(tomli_w.dumps({**fields, "data": {"kind": "heart", "hospital": "va"}}))
    with pytest.raises(ConfigurationError, match="is not of kind dicom"):
        prepare_images(open_site(path))


def test_the_site_s_own_fields(tmp_path):
    """SITE.toml says where images and labels are, who is the same person, and which images are wanted all the same."""
    path = consortium(tmp_path)
    data = open_site(path).config.data
    assert data == DicomData(folder=f"../studies/{SITE}/images", labels=f"../studies/{SITE}/labels.csv")


# The site's own version of the model


OWN = Personalisation(epsilon=0.5, delta=1e-3, steps=3, batch_size=10, learning_rate=0.5)


def own(site, folder, *, mode="local", epsilon=9.0, plan=OWN):
    """``site`` with its state in ``folder``, which is new, with this budget, and with a personalisation."""
    privacy = NoPrivacy() if mode == "none" else LocalPrivacy(epsilon=epsilon, delta=1e-3)
    index = str(site.state.resolve())
    config = msgspec.structs.replace(
        site.config,
        state=str(folder),
        privacy=privacy,
        personalisation=plan,
        data=msgspec.structs.replace(site.config.data, index=index),
    )
    unit = "site" if mode == "site" else "patient"
    offered = msgspec.structs.replace(site.manifest.privacy, mode=mode, unit=unit)
    manifest = msgspec.structs.replace(site.manifest, privacy=offered, images=IMAGES)
    return replace(site, config=config, manifest=manifest)


def final_state():
    """A final model that has learnt nothing."""
    return {"linear.weight": torch.zeros(1, 784), "linear.bias": torch.zeros(1)}


def test_a_personal_model(site, tmp_path):
    """It is booked before anybody is sampled as a run of its own, costs what was allowed, is better at home, and only
    its owner can read it; asked again, the same model comes without another cost."""
    mine = own(site, tmp_path / "state")
    found = personalise(mine, final_state(), run="r", entropy=CountingEntropy(b"p"))
    assert found.before.auc == 0.5
    assert found.after.auc > 0.8
    assert 0.49 < found.epsilon <= 0.5
    (booked,) = [entry for entry in verify(read_ledger(mine.ledger)).entries if entry["kind"] == "reserve"]
    assert (booked["purpose"], booked["run"], booked["event"]["steps"]) == ("personalise", "personalise r", 3)
    file = mine.state / PERSONAL_MODEL
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()
    assert personalise(mine, final_state(), run="r") == found
    assert file.read_bytes() == before
    assert len([one for one in verify(read_ledger(mine.ledger)).entries if one["kind"] == "reserve"]) == 1


def test_no_room_for_a_personal_model(site, tmp_path, monkeypatch):
    """Where the site's own budget has no room nobody is sampled and no model is written."""
    monkeypatch.delattr("sites.trainer.train_private")
    mine = own(site, tmp_path / "state", epsilon=0.4)
    with closing(ledger_of(mine, site_data(mine).dataset)) as ledger:
        event = PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=10.0, steps=1)
        guard = BudgetGuard(PrivacyBudget(0.5, 1e-3), ledger)
        guard.authorize(Release(run="before", round_number=1, event=event))
        spent = guard.spent
    with pytest.raises(BudgetExhausted):
        personalise(own(site, tmp_path / "state", epsilon=spent), final_state(), run="r")
    assert not (mine.state / PERSONAL_MODEL).exists()


def test_a_personal_model_without_privacy(site, tmp_path):
    """Where all have agreed on no privacy, it is trained in clear and no ledger is made."""
    gentle = msgspec.structs.replace(OWN, steps=30, learning_rate=0.005)
    mine = own(site, tmp_path / "state", mode="none", plan=gentle)
    found = personalise(mine, final_state(), run="r")
    assert found.epsilon is None
    assert found.after.auc > 0.8
    assert not mine.ledger.exists()


@pytest.mark.parametrize(
    ("mode", "plan", "match"), [("local", None, r"no \[personalisation\]"), ("site", OWN, "mode site")]
)
def test_no_personal_model(site, tmp_path, mode, plan, match):
    """Without a table in SITE.toml, and where whole sites are the unit, there is none."""
    with pytest.raises(ConfigurationError, match=match):
        personalise(own(site, tmp_path / "state", mode=mode, plan=plan), final_state(), run="r")
