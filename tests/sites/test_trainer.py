"""A site's trainer: a whole run fits the budget, nothing gets around the ledger, and the given model stays as it is."""

import sqlite3
import tomllib
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import pytest
import tomli_w
import torch
from support.consortium import make_consortium
from support.ledgers import OTHER, SITE, bodies
from support.rounds import StoppedRound

import sites.trainer
from dp.budget import PrivacyBudget
from dp.errors import BudgetExhausted, LedgerMismatch, LedgerUnavailable, ReservationMisused
from dp.ledger import Ledger, read_ledger, verify
from secureagg import Identity
from secureagg.testing import CountingEntropy
from sites import recipe
from sites.config import LEDGER, open_site
from sites.datasets.heart import Hospital
from sites.errors import ConfigurationError, DatasetError
from sites.model_state import ModelSpec, model_digest
from sites.trainer import Examples, LocalTrainer, fingerprint, heart_model, initial_heart_model, predict, trainer_for

TRAINING = recipe.TRAINING
PRIVACY = recipe.PRIVACY
CLEAR = msgspec.structs.replace(PRIVACY, mode="none")
PATIENTS, HELD_OUT = 80, 20


def hospital():
    """Made-up patients whose first feature tells their label."""
    generator = np.random.default_rng(5)
    features = generator.normal(size=(PATIENTS + HELD_OUT, 13)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.float32)
    return Hospital(
        name="made-up",
        train_features=features[:PATIENTS],
        train_labels=labels[:PATIENTS],
        test_features=features[PATIENTS:],
        test_labels=labels[PATIENTS:],
    )


DATA = hospital()


def named(data, identity=SITE):
    """The fingerprint of a hospital's patients."""
    return fingerprint(Examples.of_hospital(data), identity)


def ledger_in(path):
    """The ledger of the made-up patients in this file."""
    return Ledger(path, dataset=named(DATA), site="made-up", signer=SITE)


def releases_in(path):
    """What has been reserved in this file."""
    with ledger_in(path) as ledger:
        return ledger.releases


def new_trainer(ledger=None, *, privacy=PRIVACY, training=TRAINING, epsilon=None, **options):
    """A trainer on the made-up patients."""
    if epsilon is not None:
        privacy = msgspec.structs.replace(privacy, epsilon=epsilon)
    return LocalTrainer(
        name="made-up",
        model=heart_model(),
        data=Examples.of_hospital(DATA),
        held_out=Examples.of_hospital(DATA, held_out=True),
        training=training,
        privacy=privacy,
        ledger=ledger,
        **options,
    )


def same(one, other):
    """Whether two states are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All planned rounds of a run, with a restart after the fourth: ledger, results, noise per round, epsilons."""
    path = tmp_path_factory.mktemp("run") / LEDGER
    trainer, state = new_trainer(ledger_in(path)), heart_model().state_dict()
    results, noises, at_restart = [], [], None
    for number in range(1, TRAINING.rounds + 1):
        if number == 5:
            trainer = new_trainer(ledger_in(path))
            at_restart = trainer.epsilon
        result = trainer.train(state, run="run", round_number=number)
        state = result.state
        results.append(result)
        noises.append(trainer.noise_multiplier)
    return path, results, noises, at_restart


@pytest.fixture
def spent(run, tmp_path):
    """A copy of the ledger after the whole run."""
    path = tmp_path / LEDGER
    with closing(sqlite3.connect(run[0])) as source, closing(sqlite3.connect(path)) as copy:
        source.backup(copy)
    return path


def test_the_planned_rounds_fit_the_budget(run):
    """Epsilon grows with every round, never exceeds the budget, and the last planned round uses it up to 1%."""
    _, results, _, _ = run
    epsilons = [result.epsilon for result in results]
    assert len(epsilons) == TRAINING.rounds
    assert all(earlier < later for earlier, later in pairwise(epsilons))
    assert 0.99 * PRIVACY.epsilon <= epsilons[-1] <= PRIVACY.epsilon


def test_every_round_is_booked(run):
    """The ledger has one release per round, as it was done: steps, sampling rate and noise."""
    path, _, noises, _ = run
    releases = releases_in(path)
    assert [(release.run, release.round_number) for release in releases] == [("run", number) for number in range(1, 11)]
    assert {release.event.steps for release in releases} == {TRAINING.local_steps}
    assert {release.event.sampling_rate for release in releases} == {TRAINING.batch_size / PATIENTS}
    assert [release.event.noise_multiplier for release in releases] == noises


def test_a_restart_within_a_run(run):
    """A trainer that continues a run after a restart keeps its noise and knows what was spent."""
    _, results, noises, at_restart = run
    assert len(set(noises)) == 1
    assert at_restart == pytest.approx(results[3].epsilon)


def test_an_extra_round(spent):
    """A round more than planned is refused, with a row that says so, and nothing is reserved or trained."""
    before = releases_in(spent)
    trainer, state = new_trainer(ledger_in(spent)), heart_model().state_dict()
    with pytest.raises(BudgetExhausted, match="round 11 of run run"):
        trainer.train(state, run="run", round_number=11)
    assert releases_in(spent) == before
    assert (bodies(spent)[-1]["round_number"], bodies(spent)[-1]["decision"]) == (11, "refused")
    assert trainer.epsilon == pytest.approx(PRIVACY.epsilon, rel=0.01)
    assert trainer.epsilon <= PRIVACY.epsilon


def test_a_new_run_on_a_spent_ledger(spent):
    """A new run does not begin on data whose ledger already holds more than the budget, and nothing is reserved."""
    before = releases_in(spent)
    trainer = new_trainer(ledger_in(spent), epsilon=0.9)
    with pytest.raises(BudgetExhausted, match="is spent"):
        trainer.train(heart_model().state_dict(), run="another", round_number=1)
    assert releases_in(spent) == before
    assert "is spent" in bodies(spent)[-1]["content"]["refused"]


def test_a_new_run_after_a_finished_one(spent):
    """What a finished run leaves of its budget, a fraction of a per cent, is not enough for another: it is refused."""
    before = releases_in(spent)
    with pytest.raises(BudgetExhausted, match=r"epsilon (0\.99\d*|1) is spent, expected at most 1 at delta 0\.001"):
        new_trainer(ledger_in(spent)).train(heart_model().state_dict(), run="another", round_number=1)
    assert releases_in(spent) == before


def test_a_new_run_on_a_partly_spent_ledger(tmp_path):
    """A second run gets what the first has left, by more noise: both together stay within the budget."""
    short = msgspec.structs.replace(TRAINING, rounds=2)
    half = PRIVACY.epsilon / 2
    path, state = tmp_path / LEDGER, heart_model().state_dict()
    first, second = new_trainer(ledger_in(path), training=short, epsilon=half), None
    for number in (1, 2):
        first.train(state, run="first", round_number=number)
    assert first.epsilon <= half
    second = new_trainer(ledger_in(path), training=short)
    for number in (1, 2):
        second.train(state, run="second", round_number=number)
    assert 0.99 * PRIVACY.epsilon <= second.epsilon <= PRIVACY.epsilon
    with pytest.raises(BudgetExhausted):
        second.train(state, run="second", round_number=3)


def test_a_round_is_booked_before_it_is_trained(tmp_path, monkeypatch):
    """A crash while training leaves the round in the ledger; a refused round samples nobody."""
    seen = []

    def crash(*_, **__):
        seen.append(len(releases_in(tmp_path / LEDGER)))
        raise KeyboardInterrupt

    monkeypatch.setattr("sites.trainer.train_private", crash)
    one_round = msgspec.structs.replace(TRAINING, rounds=1)
    trainer = new_trainer(ledger_in(tmp_path / LEDGER), training=one_round)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(heart_model().state_dict(), run="run", round_number=1)
    with pytest.raises(BudgetExhausted):
        trainer.train(heart_model().state_dict(), run="run", round_number=1)
    assert seen == [1]
    assert len(releases_in(tmp_path / LEDGER)) == 1


def test_what_is_booked_of_a_round(tmp_path):
    """A reservation names consortium, manifest, version, model, cohort, thresholds, clip norm and generator."""
    one_round = msgspec.structs.replace(TRAINING, rounds=1)
    parameters = StoppedRound(4).parameters
    trainer = new_trainer(ledger_in(tmp_path / LEDGER), training=one_round, consortium="c", manifest_sha256="e" * 64)
    trainer.train(heart_model().state_dict(), run="run", round_number=1, parameters=parameters)
    (found,) = releases_in(tmp_path / LEDGER)
    assert (found.consortium, found.manifest_sha256, found.library_version) == ("c", "e" * 64, "0.1.0")
    assert (found.cohort, found.threshold, found.max_corrupt) == (4, parameters.threshold, parameters.max_corrupt)
    assert (found.clip_norm, found.unit, found.purpose) == (PRIVACY.clip_norm, "patient", "train")
    assert found.model_sha256 == model_digest(initial_heart_model()).hex()
    assert "AES" in found.random_generator


def test_the_same_round_asked_again(tmp_path, monkeypatch):
    """A round whose update is not known to be sent gives the same bytes again, in a new process too, without another
    reservation or draw; asked from another model it is another release; once it was sent it is refused."""
    path, state = tmp_path / LEDGER, heart_model().state_dict()
    first = new_trainer(ledger_in(path), training=msgspec.structs.replace(TRAINING, rounds=2))
    result = first.train(state, run="run", round_number=1)
    first.close()
    again = new_trainer(ledger_in(path))
    with monkeypatch.context() as patch:
        patch.delattr("sites.trainer.train_private")
        repeated = again.train(state, run="run", round_number=1)
    assert same(repeated.state, result.state)
    assert repeated.epsilon == result.epsilon == again.epsilon
    assert len(releases_in(path)) == 1
    other = again.train(result.state, run="run", round_number=1)
    assert not same(other.state, result.state)
    assert len(releases_in(path)) == 2
    again.mark_sent({("run", 2): None, ("other", 1): None})
    assert same(again.train(result.state, run="run", round_number=1).state, other.state)
    again.mark_sent({("run", 1): None})
    for start in (state, result.state):
        with pytest.raises(ReservationMisused, match="a released round is not trained again"):
            again.train(start, run="run", round_number=1)
    assert len(releases_in(path)) == 2


@pytest.mark.parametrize("moment", ["reserve", "commit"])
def test_a_disk_that_fails(tmp_path, monkeypatch, moment):
    """If the reservation cannot be written, nobody is sampled; if the update cannot, nothing comes out, and what was
    drawn is paid for."""
    ledger, drawn = ledger_in(tmp_path / LEDGER), []
    trainer = new_trainer(ledger, training=msgspec.structs.replace(TRAINING, rounds=2))
    real = sites.trainer.train_private

    def train(*arguments, **options):
        drawn.append(options["event"])
        real(*arguments, **options)
        ledger._database.execute("PRAGMA query_only = 1")

    monkeypatch.setattr("sites.trainer.train_private", train)
    if moment == "reserve":
        ledger._database.execute("PRAGMA query_only = 1")
    with pytest.raises(LedgerUnavailable, match="readonly"):
        trainer.train(heart_model().state_dict(), run="run", round_number=1)
    assert len(drawn) == (moment == "commit")
    assert [release.event for release in releases_in(tmp_path / LEDGER)] == drawn
    monkeypatch.setattr("sites.trainer.train_private", real)
    ledger._database.execute("PRAGMA query_only = 0")
    trainer.train(heart_model().state_dict(), run="run", round_number=1)
    assert len(releases_in(tmp_path / LEDGER)) == 1 + len(drawn)


def test_a_run_within_the_site_s_own_budget(tmp_path):
    """A run spends what the manifest says, its noise is chosen for that, and the data's own budget holds over all runs;
    what a run declares is its own epsilon."""
    short = msgspec.structs.replace(TRAINING, rounds=1)
    path, state = tmp_path / LEDGER, heart_model().state_dict()
    own, epsilons = PrivacyBudget(1.6, 1e-2), []
    half = msgspec.structs.replace(PRIVACY, epsilon=0.5)
    for run in ("first", "second"):
        trainer = new_trainer(ledger_in(path), training=short, privacy=half, budget=own)
        result = trainer.train(state, run=run, round_number=1)
        assert 0.99 * 0.5 <= result.epsilon <= 0.5
        assert trainer.delta == 1e-2
        epsilons.append(trainer.epsilon)
        with pytest.raises(BudgetExhausted, match=r"spent by this run .* at most 0\.5 at delta 0\.001"):
            trainer.train(result.state, run=run, round_number=2)
    assert epsilons[0] < epsilons[1] <= 1.6
    tight = new_trainer(ledger_in(path), training=short, privacy=half, budget=PrivacyBudget(epsilons[1], 1e-2))
    with pytest.raises(BudgetExhausted, match=f"expected at most {epsilons[1]:g} at delta 0.01"):
        tight.train(state, run="third", round_number=1)


def test_data_keeps_its_name():
    """The same data of the same site has the same name in every version: under another one, a ledger would know nothing
    of what it has cost."""
    data = Examples(features=torch.tensor([[0.5, 1.0], [-2.0, 3.0]]), targets=torch.tensor([0.0, 1.0]))
    site = Identity.generate(CountingEntropy(b"site"))
    assert fingerprint(data, site) == "6eecd2fb2b367e1e608f44978b93cdc19de59ed832fc7ff52c214a089dc86c97"


def test_the_fingerprint():
    """The same patients in any order are the same data; another value, label, patient or site's key is not; held-out
    patients do not count."""
    order = np.random.default_rng(1).permutation(PATIENTS)
    name = named(DATA)
    assert len(bytes.fromhex(name)) == 32
    shuffled = replace(
        DATA, train_features=DATA.train_features[order], train_labels=DATA.train_labels[order], test_labels=np.zeros(1)
    )
    assert named(shuffled) == name
    features, labels = DATA.train_features.copy(), DATA.train_labels.copy()
    features[3, 4] += 1e-3
    labels[5] = 1 - labels[5]
    others = [
        named(replace(DATA, train_features=features)),
        named(replace(DATA, train_labels=labels)),
        named(replace(DATA, train_features=DATA.train_features[1:], train_labels=DATA.train_labels[1:])),
        named(DATA, OTHER),
    ]
    assert len({name, *others}) == 5


def test_no_ledger():
    """Without a ledger a trainer with differential privacy is not made at all."""
    with pytest.raises(ConfigurationError, match="made-up: privacy mode local, but no ledger"):
        new_trainer(None)


@pytest.mark.parametrize("privacy", [PRIVACY, CLEAR], ids=["local", "none"])
def test_the_given_state_stays(tmp_path, privacy):
    """Training leaves the state that it begins with, and former results, as they are."""
    trainer = new_trainer(ledger_in(tmp_path / LEDGER) if privacy is PRIVACY else None, privacy=privacy)
    state = {name: torch.full_like(tensor, 0.25) for name, tensor in heart_model().state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    first = trainer.train(state, run="run", round_number=1).state
    assert same(state, kept)
    assert not same(first, state)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    trainer.train(first, run="run", round_number=2)
    trainer.evaluate(state)
    assert same(first, kept)


def test_training_begins_at_the_given_state():
    """Each round begins at the given state, not where the former one ended."""
    trainer = new_trainer(privacy=CLEAR, training=msgspec.structs.replace(TRAINING, learning_rate=1e-12))
    state = {name: torch.full_like(tensor, 0.25) for name, tensor in heart_model().state_dict().items()}
    trainer.train(heart_model().state_dict(), run="run", round_number=1)
    trained = trainer.train(state, run="run", round_number=2).state
    assert all(torch.allclose(trained[name], state[name]) for name in state)


def test_without_privacy(tmp_path):
    """Mode none trains in clear: no epsilon, no noise, any number of rounds, and it learns."""
    trainer, state = new_trainer(privacy=CLEAR), heart_model().state_dict()
    for number in range(1, 2 * TRAINING.rounds + 1):
        result = trainer.train(state, run="run", round_number=number)
        state = result.state
        assert result.epsilon is None
        assert result.examples == PATIENTS
    assert (trainer.epsilon, trainer.noise_multiplier) == (None, None)
    scores, labels = trainer.evaluate(state)
    assert np.mean((scores >= 0.5) == labels) > 0.8


def test_the_result(run):
    """A result holds the consortium's tensors and the number of training patients, and does not print the state."""
    _, results, _, _ = run
    spec = ModelSpec.of_bytes(initial_heart_model(), who="x")
    for result in results:
        assert result.examples == PATIENTS
        assert np.isfinite(spec.flatten(result.state, who="x")).all()
        assert "tensor" not in repr(result)


def test_the_initial_model():
    """The federation starts from the model's own tensors, all zero."""
    spec = ModelSpec.of_bytes(initial_heart_model(), who="x")
    assert dict(spec.tensors) == {"weight": (1, 13), "bias": (1,)}
    assert not spec.from_bytes(initial_heart_model(), who="x").any()


def test_evaluate():
    """Scores are probabilities of the held-out patients, labels theirs; the zero model gives one half to all."""
    scores, labels = new_trainer(privacy=CLEAR).evaluate(heart_model().state_dict())
    assert scores.tolist() == [0.5] * HELD_OUT
    assert labels.tolist() == DATA.test_labels.tolist()
    assert labels.dtype == np.int64
    state = {"weight": torch.eye(1, 13) * 2, "bias": torch.tensor([0.5])}
    expected = 1 / (1 + np.exp(-(2 * DATA.test_features[:, 0].astype(np.float64) + 0.5)))
    assert predict(heart_model(), state, torch.from_numpy(DATA.test_features)) == pytest.approx(expected, rel=1e-5)


def test_a_hospital_smaller_than_a_batch(tmp_path):
    """A hospital with fewer patients than a batch samples all of them, and books a sampling rate of 1."""
    large = msgspec.structs.replace(TRAINING, batch_size=1000, rounds=1)
    trainer = new_trainer(ledger_in(tmp_path / LEDGER), training=large)
    trainer.train(heart_model().state_dict(), run="run", round_number=1)
    assert releases_in(tmp_path / LEDGER)[0].event.sampling_rate == 1.0


# From a site's configuration


def rewritten(path, **changes):
    """Replace fields of a SITE.toml."""
    path.write_text(tomli_w.dumps({**tomllib.loads(path.read_text()), **changes}))
    return path


def test_a_site_without_data(tmp_path):
    """A site whose configuration names no data has no trainer, and is told so."""
    site = open_site(make_consortium(tmp_path).site_configs["a"])
    with pytest.raises(ConfigurationError, match=r"site a: no \[data\]"):
        trainer_for(site)


def test_an_unknown_hospital(tmp_path):
    """A hospital that the data does not have is refused with the names of those that it has."""
    path = make_consortium(tmp_path, hospitals=True).site_configs["va"]
    site = open_site(rewritten(path, data={"kind": "heart", "hospital": "mars"}))
    with pytest.raises(DatasetError, match="found hospital 'mars', expected one of cleveland, hungary"):
        trainer_for(site)


def test_a_folder_without_the_data(tmp_path):
    """A folder of data that is not there is a DatasetError; it is relative to SITE.toml."""
    path = make_consortium(tmp_path, hospitals=True).site_configs["va"]
    site = open_site(rewritten(path, data={"kind": "heart", "hospital": "va", "folder": "none"}))
    with pytest.raises(DatasetError, match=str(path.parent / "none")):
        trainer_for(site)


def test_a_hospital_s_trainer(tmp_path):
    """A hospital trains on its own patients, books beside its SITE.toml, and spends no more than the consortium
    signed, even where its own limit is wider."""
    one_round = msgspec.structs.replace(TRAINING, rounds=1)
    path = make_consortium(tmp_path, hospitals=True, training=one_round).site_configs["switzerland"]
    site = open_site(rewritten(path, privacy={"mode": "local", "epsilon": 50.0, "delta": 0.1}, state="own/state"))
    trainer = trainer_for(site)
    assert (trainer.patients, trainer.epsilon) == (30, 0.0)
    result = trainer.train(heart_model().state_dict(), run="run", round_number=1)
    assert result.examples == 30
    assert 0.99 <= result.epsilon <= 1.0
    found = verify(read_ledger(path.parent / "own" / "state" / LEDGER), public_key=site.keys.identity.public_key)
    found.check("ledger")
    assert (found.opening["site"], found.opening["unit"]) == ("switzerland", "patient")
    (entry,) = (entry for entry in found.entries if entry["kind"] == "reserve")
    assert (entry["consortium"], entry["manifest_sha256"]) == ("Test", site.manifest.digest.hex())
    assert (entry["budget_epsilon"], entry["delta"]) == (50.0, 0.1)
    assert found.head == trainer.ledger_head
    with pytest.raises(BudgetExhausted, match=r"expected at most 1 at delta 0\.001"):
        trainer_for(site).train(heart_model().state_dict(), run="run", round_number=2)


def test_consortia_share_a_ledger(tmp_path):
    """A site in two consortia that names one ledger in both SITE.toml pays for both from one budget, and other data
    under that ledger is refused."""
    one_round = msgspec.structs.replace(TRAINING, rounds=1)
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        consortium = make_consortium(tmp_path / name, hospitals=True, training=one_round)
        paths.append(consortium.site_configs["switzerland"])
    sites_open = [open_site(rewritten(path, ledger=str(tmp_path / "own" / "ledger.sqlite"))) for path in paths]
    # One hospital has one identity; the consortia of the test have given it two.
    second = replace(sites_open[1], keys=sites_open[0].keys)
    trainer_for(sites_open[0]).train(heart_model().state_dict(), run="one", round_number=1)
    with pytest.raises(BudgetExhausted, match="is spent, expected at most 1 at delta"):
        trainer_for(second).train(heart_model().state_dict(), run="two", round_number=1)
    with pytest.raises(LedgerMismatch, match=r"found .*, expected .*; a ledger is of one data set, one unit, one site"):
        trainer_for(sites_open[1])


def test_a_hospital_without_privacy(tmp_path):
    """Where all have agreed on none, a hospital trains in clear and keeps no ledger."""
    path = make_consortium(tmp_path, hospitals=True, privacy=CLEAR).site_configs["switzerland"]
    trainer = trainer_for(open_site(path))
    assert trainer.train(heart_model().state_dict(), run="run", round_number=1).epsilon is None
    assert not (path.parent / LEDGER).exists()
