"""Noise that sites share, from the signed manifest to the ledger."""

from contextlib import closing

import msgspec
import numpy as np
import pytest
import torch
from support.consortium import make_consortium

from dp.accountants import rdp_epsilon
from dp.errors import BudgetExhausted
from dp.ledger import read_ledger, verify
from dp.shared import ADVERSARIES, decode, opened_variance, seen_by
from secureagg import Aggregate, ParameterError, RingElements, encode_input
from sites import recipe
from sites.config import open_site, save_config
from sites.errors import ManifestError
from sites.manifest import Manifest
from sites.model_state import ModelSpec
from sites.reports.page import render
from sites.reports.reading import facts_of
from sites.rounds import UPDATE, mean_update, model_spec, round_parameters
from sites.trainer import Examples, heart_model, trainer_of

SHORT = {"rounds": 4}


def tables(mode, **training):
    """The recipe's tables for a mode, of a short run."""
    recipe_training, privacy = recipe.recipe_of(mode)
    return {"training": msgspec.structs.replace(recipe_training, **SHORT, **training), "privacy": privacy}


@pytest.fixture(scope="module", params=["shared", "site"])
def consortium(request, tmp_path_factory):
    """A consortium of four that shares its noise."""
    return make_consortium(tmp_path_factory.mktemp(request.param), **tables(request.param))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One whose unit is the patient."""
    return make_consortium(tmp_path_factory.mktemp("of-patients"), **tables("shared"))


def changed(manifest, table, **fields):
    """The manifest with other fields in one of its tables, unsigned."""
    return msgspec.structs.replace(
        manifest, signatures=[], **{table: msgspec.structs.replace(getattr(manifest, table), **fields)}
    )


def contents(manifest):
    """Check everything but the signatures."""
    manifest._check_contents("it")


def examples(patients=40, rows=1, seed=0):
    """Made-up patients with ``rows`` rows each."""
    generator = np.random.default_rng(seed)
    features = torch.from_numpy(generator.normal(size=(patients * rows, 13)).astype(np.float32))
    targets = torch.from_numpy((np.arange(patients * rows) % 2).astype(np.float32))
    return Examples(features=features, targets=targets, patients=np.repeat(np.arange(patients), rows).tolist())


def states(count=1):
    """States of the heart model to train from."""
    return [
        {name: torch.full_like(tensor, 0.1 * number) for name, tensor in heart_model().state_dict().items()}
        for number in range(count)
    ]


# --- what the consortium agrees on ---


def test_the_manifest_holds_the_whole_plan(consortium, tmp_path):
    """Mode, unit and every number of the noise are in the manifest, survive the file, and keep the promise."""
    manifest = consortium.manifest
    manifest.save(tmp_path / "again.toml")
    again = Manifest.load(tmp_path / "again.toml")
    assert again == manifest
    assert again.digest == manifest.digest
    plan = again.noise_plan
    assert (plan.unit == "site") == (manifest.privacy.mode == "site")
    assert (plan.sites, plan.dropouts, plan.colluders, plan.honest) == (4, 1, 1, 2)
    assert 0.95 < max(plan.epsilons("coordinator")) <= manifest.privacy.epsilon


def test_every_number_of_the_noise_is_signed(shared):
    """A change of any field of the plan gives another digest than the one that sites have signed and pinned."""
    noise = msgspec.to_builtins(shared.manifest.noise)
    for name, value in noise.items():
        other = "discrete gaussian" if isinstance(value, str) else value + 1
        assert changed(shared.manifest, "noise", **{name: other}).digest != shared.manifest.digest
    assert len(noise) == 7


@pytest.mark.parametrize(
    ("table", "fields", "text"),
    [
        ("noise", {"local_deviation": 0.5}, r"\[noise\]: .*expected 3 to"),
        ("noise", {"max_dropouts": 2}, "expected at most 1 at delta"),
        ("noise", {"sampling_rate": 1.0}, "expected at most 1 at delta"),
        ("noise", {"ring_bits": 12}, "half the ring of 12 bits"),
        ("privacy", {"epsilon": 0.9}, "expected at most 0.9 at delta"),
        ("privacy", {"clip_norm": 1.0}, "expected"),
        ("training", {"rounds": 5}, "expected at most 1 at delta"),
        ("policy", {"max_corrupt": 2}, "expected"),
        ("training", {"local_steps": 2}, "found mode shared with 2 local steps, expected 1"),
        ("privacy", {"mode": "local"}, r"found one as \[noise\] and mode local"),
        ("privacy", {"mode": "none"}, r"found one as \[noise\] and mode none"),
        ("privacy", {"unit": "site"}, "found mode shared with unit site"),
    ],
    ids=str,
)
def test_no_plan_that_does_not_keep_the_promise(shared, table, fields, text):
    """A manifest whose noise is too little for what it promises, by any of its numbers, or that lets sites take several
    steps under noise that covers one, is refused with what is violated."""
    with pytest.raises(ManifestError, match=text):
        contents(changed(shared.manifest, table, **fields))


def test_no_sharing_without_noise(shared):
    """A mode that shares noise needs the plan."""
    with pytest.raises(ManifestError, match=r"found none as \[noise\] and mode shared"):
        contents(msgspec.structs.replace(shared.manifest, noise=msgspec.UNSET, signatures=[]))


@pytest.mark.parametrize("mode", ["shared", "site", "local"])
@pytest.mark.parametrize("own", ["shared", "site", "local"])
def test_a_site_s_own_mode(tmp_path, mode, own):
    """A site takes part where the guarantee is no weaker than its own: noise of its own is no weaker than shared, a
    whole site no less than a patient; nothing else is."""
    made = make_consortium(tmp_path, **tables(mode))
    path = made.site_configs["a"]
    path.write_text(path.read_text().replace(f'mode = "{mode}"', f'mode = "{own}"'))
    if mode == own or own == "shared":
        assert open_site(path).manifest.privacy.mode == mode
    else:
        with pytest.raises(ManifestError, match=f"differential privacy: {mode}, expected mode {own}, since"):
            open_site(path)


def test_a_new_site_asks_for_what_it_signs(tmp_path):
    """SITE.toml takes mode and bounds from the manifest that is signed first, and keeps them."""
    shared = make_consortium(tmp_path, **tables("shared"))
    path = shared.site_configs["b"]
    assert 'mode = "shared"' in path.read_text()
    keys = shared.manifest_path.with_name("b.keys")
    weaker = changed(shared.manifest, "privacy", epsilon=50.0)
    save_config(path, manifest=weaker, manifest_path=shared.manifest_path, keys=keys, site="b", data=None)
    assert "epsilon = 1.0" in path.read_text()


def test_rounds_open_nothing_below_the_plan_s_survivors(consortium):
    """A training round sums ring elements alone, of the plan's ring, and both sides want as many survivors as the noise
    was planned for; a smaller cohort gives no round."""
    manifest = consortium.manifest
    asked = {"run": "run", "round_number": 1, "purpose": "train", "model_digest": bytes(32)}
    lowered = changed(manifest, "policy", minimum_survivors=3)
    parameters = round_parameters(lowered, cohort="abcd", **asked)
    assert parameters.minimum_survivors == manifest.noise_plan.minimum_survivors == 3
    assert set(parameters.lanes) == {UPDATE, "canary"}
    assert parameters.lanes[UPDATE].lane.encoding == RingElements(ring_bits=manifest.noise.ring_bits)
    assert parameters.max_weight is None
    nobody_may_drop = msgspec.structs.replace(
        manifest,
        noise=recipe.shared_noise(
            {"privacy": manifest.privacy, "training": manifest.training, "policy": manifest.policy},
            sites=4,
            dimensions=14,
            max_dropouts=0,
        ),
    )
    assert round_parameters(nobody_may_drop, cohort="abcd", **asked).minimum_survivors == 4
    with pytest.raises(ParameterError, match="minimum_survivors: found 4, expected at most the cohort size 3"):
        round_parameters(nobody_may_drop, cohort="abc", **asked)


# --- what a site submits ---


def test_a_sum_of_sites_is_their_gradients_and_the_planned_noise(shared):
    """Four sites' submissions, added in the ring, decode to the sum of their clipped gradients in the consortium's
    order of tensors, with noise of the planned variance.

    False-alarm probability of the chi-square bounds: below 1e-6.
    """
    plan, spec = shared.manifest.noise_plan, model_spec(shared.manifest)
    assert [name for name, _ in spec.tensors] == ["bias", "weight"]  # another order than the model's own
    data = examples()
    trainers = [trainer_of(open_site(shared.site_configs[name]), heart_model(), data) for name in "abcd"]
    draws = []
    for trainer in trainers:
        trainer._sampling_rate = 1.0  # everybody, so that the sum is known
    for _ in range(60):
        parts = [np.frombuffer(trainer._update(states()[0], None), "<u8") for trainer in trainers]
        draws.append(decode(np.sum(parts, axis=0, dtype=np.uint64), plan))
    for trainer in trainers:
        trainer.close()
    # By hand: at zero weights a patient's gradient is (1/2 - label) (1, features), clipped to C.
    rows = np.column_stack([np.ones(40), data.features.numpy()]).astype(np.float64)
    gradients = (0.5 - data.targets.numpy())[:, None] * rows
    gradients *= np.minimum(1, plan.clip_norm / np.linalg.norm(gradients, axis=1))[:, None]
    noise = np.array(draws) - 4 * gradients.sum(axis=0)
    expected = opened_variance("outsider", survivors=4, colluders=1, local_deviation=plan.local_deviation)
    expected = (expected + 4 * 0.25) / plan.scale**2
    count = noise.size
    assert abs((noise**2).sum() / expected - count) < 5.5 * np.sqrt(2 * count) + 0.01 * count
    assert np.abs(noise.mean(axis=0)).max() < 6 * np.sqrt(expected / len(draws))


def test_several_rows_are_one_patient(tmp_path):
    """A patient with many rows moves what is submitted by no more than one with a single row can."""
    made = make_consortium(tmp_path, **tables("shared"))
    plan, site = made.manifest.noise_plan, open_site(made.site_configs["a"])
    data = examples(patients=1, rows=5)
    trainer = trainer_of(site, heart_model(), data, max_rows_per_patient=5)
    with closing(trainer):
        trainer._sampling_rate = 1.0
        assert np.linalg.norm(trainer._gradient_sum().values) <= plan.clip_norm


def test_a_whole_update_is_clipped(tmp_path):
    """In mode site what a site moves the model by is clipped to C, however far it trained."""
    made = make_consortium(tmp_path, **tables("site", learning_rate=100.0))
    trainer = trainer_of(open_site(made.site_configs["a"]), heart_model(), examples())
    with closing(trainer):
        trainer._model.load_state_dict(states()[0])
        norm = np.linalg.norm(trainer._whole_update(states()[0]).values)
        assert made.manifest.privacy.clip_norm * (1 - 1e-6) < norm <= made.manifest.privacy.clip_norm


def test_a_run_in_the_ledger(consortium):
    """Each round is booked with the plan's numbers before it is made, the planned rounds spend the budget, one more is
    refused, and the same round again gives the same bytes; what the sum turned out to be is kept with its sending."""
    site = open_site(consortium.site_configs["d"])
    plan, begin = site.manifest.noise_plan, states(6)
    with closing(trainer_of(site, heart_model(), examples())) as trainer:
        for number in range(1, 5):
            first = trainer.train(begin[number], run="run", round_number=number)
            again = trainer.train(begin[number], run="run", round_number=number)
            assert (first.elements == again.elements).all()
            assert first.elements.max() < 1 << plan.ring_bits
            trainer.mark_sent({("run", number): 3})
        with pytest.raises(BudgetExhausted, match="expected at most 1 at delta"):
            trainer.train(begin[5], run="run", round_number=5)
        assert 0.95 < trainer.epsilon <= 1
    found = verify(read_ledger(site.ledger))
    found.check("it")
    kinds = [entry["kind"] for entry in found.entries]
    assert kinds == ["open", *["reserve", "commit", "sent"] * 4, "reserve"]
    booked = found.entries[1]
    assert (booked["mode"], booked["unit"]) == (site.manifest.privacy.mode, site.manifest.privacy.unit)
    assert (booked["sites"], booked["max_dropouts"], booked["honest"]) == (4, 1, 2)
    assert (booked["ring_bits"], booked["scale"]) == (plan.ring_bits, plan.scale)
    realised = found.entries[3]["realised"]
    assert realised["survivors"] == 3
    assert realised["noise_variance"] == {
        who: (3 - known) * plan.local_deviation**2 for who, known in zip(ADVERSARIES, (0, 1, 1), strict=True)
    }


def test_shared_and_own_noise_in_one_ledger(tmp_path):
    """Releases of both modes from the same data count together, against the site's own bound for the data."""
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    one, two = make_consortium(tmp_path / "one", **tables("shared")), make_consortium(tmp_path / "two")
    data, ledger = examples(), str(tmp_path / "ledger.sqlite")
    keys = one.manifest_path.with_name("a.keys")
    keys.write_bytes(two.manifest_path.with_name("a.keys").read_bytes())
    site = open_site(two.site_configs["a"])
    object.__setattr__(site, "config", msgspec.structs.replace(site.config, ledger=ledger))
    with closing(trainer_of(site, heart_model(), data)) as trainer:
        trainer.train(states()[0], run="local", round_number=1)
        alone = trainer.epsilon
    other = open_site(two.site_configs["a"])
    object.__setattr__(other, "config", msgspec.structs.replace(other.config, ledger=ledger))
    object.__setattr__(other, "manifest", one.manifest)
    with closing(trainer_of(other, heart_model(), data)) as trainer:
        trainer.train(states()[0], run="shared", round_number=1)
        releases = trainer._guard.ledger.releases
        assert trainer.epsilon == rdp_epsilon([release.event for release in releases], 1e-3) > alone
    assert [type(release.event).__name__ for release in releases] == ["PoissonSampledGaussian", "PoissonSampledSkellam"]


# --- what becomes of the sum ---


def test_how_a_sum_moves_the_model(consortium):
    """Patients' gradients are divided by the batch that was expected and taken downhill, whole updates are averaged."""
    manifest = consortium.manifest
    plan, training = manifest.noise_plan, manifest.training
    total = np.arange(14) * int(plan.scale)
    aggregate = Aggregate(survivors=("a", "b", "c"), totals={UPDATE: total}, means={}, digest=b"")
    moved = mean_update(manifest, aggregate)
    if manifest.privacy.mode == "site":
        assert moved == pytest.approx(np.arange(14) / 3)
    else:
        assert moved == pytest.approx(-training.learning_rate * np.arange(14) / training.batch_size)


def test_a_new_manifest_begins_no_round_that_cannot_end(tmp_path):
    """Where fewer dropouts are planned for than the policy allows, the least cohort is what the plan needs."""
    kept = make_consortium(
        tmp_path,
        **tables("shared"),
        noise=recipe.shared_noise(
            {**tables("shared"), "policy": recipe.POLICY}, sites=4, dimensions=14, max_dropouts=1
        ),
    )
    assert kept.manifest.policy.minimum_cohort == 3
    cards = [kept.keys[name].card for name in "abcd"]
    training, privacy = tables("shared").values()
    made = recipe.new_manifest(
        name="x",
        coordinator=kept.keys["sum"].card,
        address="tcp://127.0.0.1:9",
        cards=cards,
        initial=kept.initial_path.read_bytes(),
        changes={"training": training, "privacy": privacy},
        noise={"max_dropouts": 0},
    )
    assert (made.noise.max_dropouts, made.policy.minimum_cohort) == (0, 4)
    assert made.policy.minimum_survivors == recipe.POLICY.minimum_survivors
    with pytest.raises(ManifestError, match="minimum_survivors: found 4, expected at most the cohort size 3"):
        contents(changed(made, "policy", minimum_cohort=3))


def test_a_mode_that_there_is_not():
    """An unknown mode is named with those that exist."""
    with pytest.raises(ManifestError, match="found 'nope', expected local, shared, site or none"):
        recipe.recipe_of("nope")


def test_elements_fit_the_round(consortium):
    """What a trainer makes is what its round encodes: no more bits than the ring has."""
    manifest = consortium.manifest
    parameters = round_parameters(
        manifest, run="run", round_number=1, purpose="train", cohort="abcd", model_digest=bytes(32)
    )
    with closing(trainer_of(open_site(consortium.site_configs["b"]), heart_model(), examples())) as trainer:
        result = trainer.train(states()[0], run="other", round_number=1)
    encoded = encode_input(parameters, {UPDATE: result.elements})
    assert encoded.vectors[UPDATE].tolist() == result.elements.tolist()
    assert ModelSpec.of(dict(model_spec(manifest).tensors)).length == len(result.elements)


# --- what an officer reads ---


def test_epsilon_against_each_adversary(shared, tmp_path):
    """The report recomputes epsilon for each adversary from the parts that were in each sum, or as few as were allowed
    for where that is not known; against all others together there is none; and it says that the noise is shared."""
    site = open_site(shared.site_configs["b"])
    plan, begin = site.manifest.noise_plan, states(5)
    object.__setattr__(site, "config", msgspec.structs.replace(site.config, ledger=str(tmp_path / "l.sqlite")))
    with closing(trainer_of(site, heart_model(), examples())) as trainer:
        for number, survivors in ((1, 4), (2, 3), (3, None)):
            trainer.train(begin[number], run="run", round_number=number)
            trainer.mark_sent({("run", number): survivors})
    facts = facts_of(read_ledger(tmp_path / "l.sqlite"), manifest=site.manifest)
    booked = plan.event(sampling_rate=recipe.SAMPLING_RATE, steps=1)
    for who, known in (("outsider", 0), ("curious site", 1), ("coordinator", 1)):
        events = [seen_by(booked, who, survivors=survivors, colluders=1, honest=plan.honest) for survivors in (4, 3, 3)]
        variance = [(survivors - known) * plan.local_deviation**2 for survivors in (4, 3, 3)]
        assert [event.variance for event in events] == pytest.approx(variance)
        assert facts.against[who] == pytest.approx(rdp_epsilon(events, site.manifest.privacy.delta))
    assert facts.against["outsider"] < facts.against["coordinator"] < facts.spent
    assert facts.shared == 3
    page = " ".join(render(facts).split())
    assert "The sites share the noise of 3 releases" in page
    assert "The coordinator and all other sites together</th>" in page
    assert "no bound" in page
    assert "adds all of the noise itself" not in page
