"""A site's trainer: a whole run fits the budget, nothing gets around the ledger, and the given model stays as it is."""

import tomllib
from itertools import pairwise

import msgspec
import numpy as np
import pytest
import tomli_w
import torch
from support.consortium import make_consortium

from dp.errors import BudgetExhausted
from dp.ledger import Ledger
from sites import recipe
from sites.config import open_site
from sites.datasets.heart import Hospital
from sites.errors import ConfigurationError, DatasetError
from sites.model_state import ModelSpec
from sites.trainer import LEDGER, LocalTrainer, heart_model, initial_heart_model, predict, trainer_for

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


def new_trainer(ledger=None, *, privacy=PRIVACY, training=TRAINING, epsilon=None):
    """A trainer on the made-up patients."""
    if epsilon is not None:
        privacy = msgspec.structs.replace(privacy, epsilon=epsilon)
    return LocalTrainer(model=heart_model(), data=DATA, training=training, privacy=privacy, ledger=ledger)


def same(one, other):
    """Whether two states are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All planned rounds of a run, with a restart after the fourth: ledger, results, noise per round, epsilons."""
    path = tmp_path_factory.mktemp("run") / LEDGER
    trainer, state = new_trainer(Ledger(path)), heart_model().state_dict()
    results, noises, at_restart = [], [], None
    for number in range(1, TRAINING.rounds + 1):
        if number == 5:
            trainer = new_trainer(Ledger(path))
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
    path.write_bytes(run[0].read_bytes())
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
    releases = Ledger(path).releases
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
    """A round more than planned is refused, and nothing is booked or trained."""
    before = spent.read_bytes()
    trainer, state = new_trainer(Ledger(spent)), heart_model().state_dict()
    with pytest.raises(BudgetExhausted, match="round 11 of run run"):
        trainer.train(state, run="run", round_number=11)
    assert spent.read_bytes() == before
    assert trainer.epsilon == pytest.approx(PRIVACY.epsilon, rel=0.01)
    assert trainer.epsilon <= PRIVACY.epsilon


def test_a_new_run_on_a_spent_ledger(spent):
    """A new run does not begin on data whose ledger already holds more than the budget, and nothing is booked."""
    before = spent.read_bytes()
    trainer = new_trainer(Ledger(spent), epsilon=0.9)
    with pytest.raises(BudgetExhausted, match="is spent"):
        trainer.train(heart_model().state_dict(), run="another", round_number=1)
    assert spent.read_bytes() == before


def test_a_new_run_after_a_finished_one(spent):
    """What a finished run leaves of its budget, a fraction of a per cent, is not enough for another: it is refused."""
    before = spent.read_bytes()
    with pytest.raises(BudgetExhausted, match=r"epsilon (0\.99\d*|1) is spent, expected at most 1 at delta 0\.001"):
        new_trainer(Ledger(spent)).train(heart_model().state_dict(), run="another", round_number=1)
    assert spent.read_bytes() == before


def test_a_new_run_on_a_partly_spent_ledger(tmp_path):
    """A second run gets what the first has left, by more noise: both together stay within the budget."""
    short = msgspec.structs.replace(TRAINING, rounds=2)
    half = PRIVACY.epsilon / 2
    path, state = tmp_path / LEDGER, heart_model().state_dict()
    first, second = new_trainer(Ledger(path), training=short, epsilon=half), None
    for number in (1, 2):
        first.train(state, run="first", round_number=number)
    assert first.epsilon <= half
    second = new_trainer(Ledger(path), training=short)
    for number in (1, 2):
        second.train(state, run="second", round_number=number)
    assert 0.99 * PRIVACY.epsilon <= second.epsilon <= PRIVACY.epsilon
    with pytest.raises(BudgetExhausted):
        second.train(state, run="second", round_number=3)


def test_a_round_is_booked_before_it_is_trained(tmp_path, monkeypatch):
    """A crash while training leaves the round in the ledger; a refused round samples nobody."""
    seen = []

    def crash(*_, **__):
        seen.append(len(Ledger(tmp_path / LEDGER).releases))
        raise KeyboardInterrupt

    monkeypatch.setattr("sites.trainer.train_private", crash)
    one_round = msgspec.structs.replace(TRAINING, rounds=1)
    trainer = new_trainer(Ledger(tmp_path / LEDGER), training=one_round)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(heart_model().state_dict(), run="run", round_number=1)
    with pytest.raises(BudgetExhausted):
        trainer.train(heart_model().state_dict(), run="run", round_number=1)
    assert seen == [1]
    assert len(Ledger(tmp_path / LEDGER).releases) == 1


def test_no_ledger():
    """Without a ledger a trainer with differential privacy is not made at all."""
    with pytest.raises(ConfigurationError, match="made-up: privacy mode local, but no ledger"):
        new_trainer(None)


@pytest.mark.parametrize("privacy", [PRIVACY, CLEAR], ids=["local", "none"])
def test_the_given_state_stays(tmp_path, privacy):
    """Training leaves the state that it begins with, and former results, as they are."""
    trainer = new_trainer(Ledger(tmp_path / LEDGER) if privacy is PRIVACY else None, privacy=privacy)
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
    assert predict(heart_model(), state, DATA.test_features) == pytest.approx(expected, rel=1e-5)


def test_a_hospital_smaller_than_a_batch(tmp_path):
    """A hospital with fewer patients than a batch samples all of them, and books a sampling rate of 1."""
    large = msgspec.structs.replace(TRAINING, batch_size=1000, rounds=1)
    trainer = new_trainer(Ledger(tmp_path / LEDGER), training=large)
    trainer.train(heart_model().state_dict(), run="run", round_number=1)
    assert Ledger(tmp_path / LEDGER).events[0].sampling_rate == 1.0


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
    assert len(Ledger(path.parent / "own" / "state" / LEDGER).releases) == 1
    with pytest.raises(BudgetExhausted, match=r"expected at most 1 at delta 0\.001"):
        trainer_for(site).train(heart_model().state_dict(), run="run", round_number=2)


def test_a_hospital_without_privacy(tmp_path):
    """Where all have agreed on none, a hospital trains in clear and keeps no ledger."""
    path = make_consortium(tmp_path, hospitals=True, privacy=CLEAR).site_configs["switzerland"]
    trainer = trainer_for(open_site(path))
    assert trainer.train(heart_model().state_dict(), run="run", round_number=1).epsilon is None
    assert not (path.parent / LEDGER).exists()
