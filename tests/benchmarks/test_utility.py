"""The measurement of quality: what stands for a federation in it is what sites do, and its quick run ends with all
columns."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from benchmarks import choosing, federations, utility, xrays
from benchmarks.federations import Configuration, Task, alone, central, own_noise, plan_of, shared_gradients
from benchmarks.images import Images
from benchmarks.selection import Splits, judged, train
from dp.errors import UnsupportedEvent
from dp.shared import plan_shared_noise
from dp.training import clipped_gradient_sum
from secureagg.testing import CountingEntropy
from sites.datasets.heart import load_hospitals
from sites.manifest import Privacy, Training
from sites.model_state import ModelSpec
from sites.reference import throwaway_ledger
from sites.rounds import UPDATE, mean_update
from sites.server_optimizer import ServerOptimizer
from sites.trainer import LocalTrainer, SharedTrainer, heart_model

CHOSEN = Configuration(steps=4, learning_rate=0.4, clip_norm=0.5, share=0.5)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are small: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task() -> Task:
    """The four hospitals."""
    return utility.heart()


def vector(state):
    """A state of the heart model as one vector."""
    return np.concatenate([state["weight"].numpy().ravel(), state["bias"].numpy()])


def test_shared_is_what_sites_do(task, tmp_path):
    """The model of the column "shared" is, to the last bit, that of the sites' trainers behind their ledgers, of the
    update that sites and coordinator take from an opened sum, and of the server's optimizer."""
    plan = plan_of(task, CHOSEN, epsilon=1.0, dropouts=1)
    spec = ModelSpec((("weight", (1, 13)), ("bias", (1,))))
    training = Training(
        rounds=4,
        local_steps=1,
        batch_size=round(0.5 * task.rows),
        learning_rate=0.4,
        server_optimizer="average",
        server_learning_rate=1.0,
    )
    trainers = [
        SharedTrainer(
            training=training,
            noise=plan,
            spec=spec,
            name=name,
            model=heart_model(),
            data=task.sites[name],
            privacy=Privacy(mode="shared", epsilon=1.0, delta=1e-3, clip_norm=0.5),
            ledger=throwaway_ledger(hospital, tmp_path),
            entropy=CountingEntropy(f"shared 3 {name}".encode()),
        )
        for name, hospital in load_hospitals().items()
    ]
    server = ServerOptimizer("average", 1.0, np.zeros(14, np.float32))
    for number in range(1, 5):
        state = spec.restore(server.vector)
        parts = [trainer.train(state, run="run", round_number=number).elements for trainer in trainers]
        opened = np.sum(parts, axis=0, dtype=np.uint64) & np.uint64(2**plan.ring_bits - 1)
        aggregate = SimpleNamespace(totals={UPDATE: opened}, survivors=frozenset("abcd"))
        server.step(mean_update(SimpleNamespace(noise_plan=plan, training=training), aggregate))
    found = shared_gradients(task, CHOSEN, plan=plan, seed=3)
    assert np.array_equal(vector(found), server.vector)
    assert np.abs(server.vector).max() > 0.01


@pytest.mark.parametrize("epsilon", [1.0, None])
def test_local_is_what_sites_do(task, tmp_path, epsilon):
    """The model of the column "local", and of "FedAvg" without privacy, is that of the sites' trainers and of the mean
    by numbers of patients."""
    batch = round(0.5 * task.rows / 4)
    training = Training(
        rounds=2,
        local_steps=2,
        batch_size=batch,
        learning_rate=0.4,
        server_optimizer="average",
        server_learning_rate=1.0,
    )
    trainers = {
        name: LocalTrainer(
            training=training,
            name=name,
            model=heart_model(),
            data=task.sites[name],
            privacy=Privacy(mode="none" if epsilon is None else "local", epsilon=1.0, delta=1e-3, clip_norm=0.5),
            ledger=None if epsilon is None else throwaway_ledger(hospital, tmp_path),
            entropy=CountingEntropy(f"local 3 {name}".encode()),
        )
        for name, hospital in load_hospitals().items()
    }
    state = heart_model().state_dict()
    for number in (1, 2):
        results = {name: one.train(state, run="run", round_number=number) for name, one in trainers.items()}
        weights = {name: result.examples / task.rows for name, result in results.items()}
        state = {key: sum(weights[name] * results[name].state[key] for name in results) for key in state}
    found = own_noise(task, CHOSEN, epsilon=epsilon, seed=3)
    np.testing.assert_allclose(vector(found), vector(state), rtol=1e-5, atol=1e-6)


def test_each_site_s_noise_is_enough_alone(task):
    """In the column "unshared" every part of the noise is as large as that of a plan with one honest site."""
    whole, shared = (plan_of(task, CHOSEN, epsilon=1.0, dropouts=dropouts) for dropouts in (2, 0))
    assert (whole.honest, shared.honest) == (1, 3)
    assert whole.local_deviation / whole.scale == pytest.approx(whole.noise_multiplier * 0.5)
    assert whole.local_deviation / whole.scale == pytest.approx(
        np.sqrt(3) * shared.local_deviation / shared.scale, 0.02
    )


# Everybody is in every step, and there is next to no noise: then nothing is left to chance.
EVERYBODY = Configuration(steps=4, learning_rate=0.5, clip_norm=0.7, share=1.0)


def of_everybody(task) -> Splits:
    """One run that trains on all rows."""
    rows = Splits.of(task, splits=1, draws=1)
    return Splits(features=rows.features, labels=rows.labels, site=rows.site, training=np.ones((1, task.rows), bool))


@pytest.mark.parametrize("column", ["local only", "local", "shared"])
def test_the_choosing_trains_what_is_measured(task, column, monkeypatch):
    """With all patients in each step and hardly any noise, the fast training that hyper-parameters are chosen by ends
    where the real one does."""
    everybody = EVERYBODY if column == "shared" else replace(EVERYBODY, share=2.0)  # of the sites' mean size
    monkeypatch.setattr(federations, "noise_multiplier_for", lambda **_: 1e-6)
    federations.gaussian.cache_clear()
    try:
        found = train(column, task, of_everybody(task), everybody, 1e5, 1)
        plan = plan_shared_noise(
            epsilon=1e5,
            delta=1e-3,
            steps=4,
            dimensions=14,
            sites=4,
            dropouts=1,
            colluders=1,
            clip_norm=0.7,
            sampling_rate=1.0,
            expected_batch=task.rows / 4,
        )
        if column == "local only":
            expected = list(alone(task, everybody, epsilon=1.0, seed=1).values())
        elif column == "local":
            expected = [own_noise(task, everybody, epsilon=1.0, seed=1)] * 4
        else:
            expected = [shared_gradients(task, everybody, plan=plan, seed=1)] * 4
    finally:
        federations.gaussian.cache_clear()
    tolerance = 5e-3 if column == "shared" else 1e-4
    np.testing.assert_allclose(found[:, 0], [vector(one) for one in expected], atol=tolerance)


def test_the_choosing_samples_and_noises_as_much(task):
    """Over many runs of one step, the fast training moves the model as far and as variably as the real one: means and
    deviations agree within 5 standard errors."""
    one = Configuration(steps=1, learning_rate=1.0, clip_norm=0.5, share=0.5)
    rows = of_everybody(task)
    many = Splits(
        features=rows.features, labels=rows.labels, site=rows.site, training=np.repeat(rows.training, 4000, axis=0)
    )
    fast = train("shared", task, many, one, 1.0, 5)[0]
    plan = plan_of(task, one, epsilon=1.0, dropouts=1)
    real = np.array([vector(shared_gradients(task, one, plan=plan, seed=seed)) for seed in range(40)])
    error = fast.std(axis=0) / np.sqrt(40)
    assert (np.abs(real.mean(axis=0) - fast.mean(axis=0)) < 5 * error).all()
    ratio = real.std(axis=0).mean() / fast.std(axis=0).mean()
    assert abs(ratio - 1) < 5 / np.sqrt(2 * 40 * 14)


def test_central_is_pooled(task):
    """The central column trains on all hospitals' rows, with noise that is less than shared noise by the root of the
    sites over the honest ones."""
    assert len(task.pooled.targets) == task.rows == 486
    noise = federations.gaussian(epsilon=1.0, delta=1e-3, sampling_rate=0.5, steps=4)
    for dropouts, honest in ((0, 3), (1, 2)):
        plan = plan_of(task, CHOSEN, epsilon=1.0, dropouts=dropouts)
        assert plan.error_of_sum / (0.5 * noise) == pytest.approx(np.sqrt(4 / honest), rel=0.02)
    first, again, other = (central(task, CHOSEN, epsilon=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], other["weight"])


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A file like the X-rays', of random pixels."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 3882), ("test", 624)):
        arrays[f"{part}_images"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = (generator.random((count, 1)) < 0.8).astype(np.uint8)
    file = tmp_path_factory.mktemp("made-up") / "made-up.npz"
    np.savez(file, **arrays)
    return file, arrays


@pytest.fixture(scope="module")
def few_images(made_up) -> Task:
    """Seven hospitals with 10 images each."""
    whole = xrays.load(made_up[0])
    few = {
        name: replace(one, features=one.features[:10], targets=one.targets[:10]) for name, one in whole.sites.items()
    }
    return replace(whole, sites=few, held_out=few)


def flat(state):
    """A state as one vector."""
    return torch.cat([tensor.flatten() for tensor in state.values()]).numpy()


def test_shared_noise_is_all_that_sets_shared_apart_from_central(few_images, monkeypatch):
    """Where everybody is in every step and the noise is left out, the shared column's network is the central one's:
    clipping, encoding, decoding and the server's steps favour no direction."""
    chosen = Configuration(steps=5, learning_rate=0.5, clip_norm=0.5, share=1.0)
    plan = plan_of(few_images, chosen, epsilon=1.0, dropouts=0)
    monkeypatch.setattr("dp.shared.IntegerNoise", lambda **_: SimpleNamespace(draw=lambda count: np.zeros(count, int)))
    found = flat(shared_gradients(few_images, chosen, plan=plan, seed=1))
    expected = flat(central(few_images, chosen, epsilon=None, seed=1, noise_multiplier=1e-5))
    moved = np.linalg.norm(expected - flat(few_images.model(1).state_dict()))
    assert moved > 0.2
    assert np.linalg.norm(found - expected) < 0.001 * moved


def test_opened_noise_has_no_bias(few_images):
    """Over 60 releases of a step in which nobody is sampled, the 2,945 coordinates of the opened noise have mean 0 and
    the plan's deviation: each within 5.5 standard errors, a false alarm in 10^7."""
    chosen = Configuration(steps=1, learning_rate=1.0, clip_norm=4.0, share=1e-9)
    plan = plan_of(few_images, chosen, epsilon=1.0, dropouts=0)
    start = flat(few_images.model(0).state_dict())
    found = [
        flat(shared_gradients(few_images, chosen, plan=plan, seed=0, entropy_of=str(n))) - start for n in range(60)
    ]
    noise = np.array(found) / plan.error_of_sum  # the expected batch is 1
    assert abs(noise.mean()) * np.sqrt(noise.size) < 5.5
    assert abs(noise.std() - 1) * np.sqrt(2 * noise.size) < 5.5
    assert np.abs(noise.mean(axis=0)).max() * np.sqrt(60) < 6.5  # of 2,945


def test_rows_that_share_gradients_are_refused_here_too(few_images):
    """That a run probes its loss only once does not let a loss pass that couples rows, and the next run probes anew."""
    coupled = replace(few_images, loss=lambda found, targets: few_images.loss(found - found.mean(), targets))
    for _ in range(2):
        shared_gradients(few_images, replace(CHOSEN, steps=1), plan=None, seed=0)
        with pytest.raises(UnsupportedEvent, match="loss"):
            shared_gradients(coupled, CHOSEN, plan=None, seed=0)


def test_pneumonia_counts_a_ninth():
    """The X-rays' loss is the sum of each image's own logistic loss, of those with pneumonia a ninth."""
    logits, targets = torch.tensor([[0.3], [-1.2], [2.0]]), torch.tensor([1.0, 0.0, 1.0])
    each = [np.log1p(np.exp(-0.3)) / 9, np.log1p(np.exp(-1.2)), np.log1p(np.exp(-2.0)) / 9]
    assert float(xrays.weighted_loss(logits, targets)) == pytest.approx(sum(each), rel=1e-5)


@pytest.mark.parametrize("clip_norm", [0.05, 4.0])
def test_the_choosing_finds_the_network_s_gradients(few_images, clip_norm):
    """Gradients of the X-rays' network with each run's weights, clipped, and its scores are those of the real parts."""
    rows = Images.of(few_images, splits=2, draws=1)
    weights, present = rows.start, rows.training
    found = rows.gradient_sums(weights, present, clip_norm=clip_norm)
    scores = rows.scores(np.stack([weights] * 7))
    pooled = few_images.pooled
    for run, training in enumerate(present):
        model = few_images.model(run)
        assert np.array_equal(flat(model.state_dict()), weights[run].astype(np.float32))
        expected = clipped_gradient_sum(
            model,
            few_images.loss,
            pooled.features[training],
            pooled.targets[training],
            patients=range(training.sum()),
            sampling_rate=1.0,
            clip_norm=clip_norm,
        ).values
        np.testing.assert_allclose(found[run], expected, atol=1e-5 * np.abs(expected).max())
        with torch.no_grad():
            logits = model(pooled.features[~training]).squeeze(1).numpy()
        np.testing.assert_allclose(scores[run, ~training], logits, atol=1e-5)


def test_metrics(task):
    """Accuracy is the mean over hospitals of each one's model on its own patients; AUC and balanced accuracy are of all
    patients together, the mean over models where there are several."""
    generator = torch.Generator().manual_seed(1)
    states = {name: {"weight": torch.randn(1, 13, generator=generator), "bias": torch.zeros(1)} for name in task.sites}
    found = utility.judge(task, states)
    features = torch.cat([data.features for data in task.held_out.values()])
    labels = torch.cat([data.targets for data in task.held_out.values()]).numpy()
    scores = [(features @ state["weight"].T).squeeze(1).numpy() for state in states.values()]
    assert found["AUC"] == pytest.approx(np.mean([roc_auc_score(labels, one) for one in scores]), abs=1e-3)
    right = np.mean([balanced_accuracy_score(labels, one >= 0) for one in scores])
    assert found["balanced accuracy"] == pytest.approx(right)
    ends = np.cumsum([0, *(len(data.targets) for data in task.held_out.values())])
    own = [slice(a, b) for a, b in itertools.pairwise(ends)]
    each = [((one[at] >= 0) == labels[at]).mean() for one, at in zip(scores, own, strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean(each))
    together = np.concatenate([one[at] for one, at in zip(scores, own, strict=True)])
    assert found["own AUC"] == pytest.approx(roc_auc_score(labels, together), abs=1e-3)


def test_validation_rows_are_training_rows_that_are_not_trained_on(task):
    """Each split leaves a quarter of each site's training rows out, others each time; nothing held out is in it."""
    rows = Splits.of(task, splits=3, draws=2)
    assert rows.training.shape == (6, 486)
    for number, count in enumerate((199, 172, 30, 85)):
        assert ((~rows.training[:, rows.site == number]).sum(axis=1) == round(count / 4)).all()
    assert np.array_equal(rows.training[0], rows.training[1])
    assert not np.array_equal(rows.training[1], rows.training[2])
    auc, balanced = judged(rows, np.zeros((4, 6, 14)) + np.eye(14)[1])
    labels, scores = rows.labels, rows.features[:, 1]
    left_out = [~one for one in rows.training]
    assert auc == pytest.approx(np.mean([roc_auc_score(labels[one], scores[one]) for one in left_out]))
    assert balanced == pytest.approx(np.mean([balanced_accuracy_score(labels[m], scores[m] >= 0) for m in left_out]))


@pytest.mark.parametrize("data", ["heart", "xray"])
def test_every_column_was_chosen_with_the_same_effort(data):
    """``choices.json`` has a configuration of the grid for every column and epsilon, the best of equally many."""
    found = json.loads(choosing.FILE.read_text())[data]
    for epsilon in utility.EPSILONS[data]:
        grid = list(choosing.configurations(data, private=epsilon is not None))
        for column in utility.columns_at(epsilon):
            row = found[choosing.CHOSEN_BY[column]][choosing.name_of(epsilon)]
            assert row["tried"] == len(grid)
            assert choosing.read(data, column, epsilon) in grid
    sizes = {len(list(choosing.configurations(data, private=private))) for private in (True, False)}
    assert len(sizes) == 1


def test_the_best_is_taken():
    """Of the grid, the configuration with the highest mean of AUC and balanced accuracy is taken."""

    def measure(chosen):
        return (0.9, 0.1) if chosen.steps == 4 else (0.6, 0.5 if chosen.clip_norm == 2.0 else 0.3)

    row = choosing.choose("heart", "shared", 1.0, measure)
    assert (row["configuration"]["steps"], row["configuration"]["clip_norm"], row["tried"]) == (10, 2.0, 192)


def test_hospitals_of_x_rays(made_up):
    """Every image is at one hospital; hospitals differ in size and in the share of pneumonia, alike in both parts."""
    file, arrays = made_up
    task = xrays.load(file)
    for part, sites in (("train", task.sites), ("test", task.held_out)):
        rows = np.concatenate([one.features.numpy()[:, 0].reshape(-1, 784) for one in sites.values()])
        whole = arrays[f"{part}_images"].reshape(-1, 784).astype(np.float32) / 127.5 - 1
        assert np.array_equal(np.sort(rows.sum(axis=1)), np.sort(whole.sum(axis=1)))
        sizes = [len(one.targets) for one in sites.values()]
        ill = [float(one.targets.mean()) for one in sites.values()]
        assert max(sizes) > 8 * min(sizes)
        assert max(ill) - min(ill) > 0.2
    assert task.dimensions == 2945
    assert torch.equal(xrays.network(1)[0].weight, xrays.network(1)[0].weight)


def test_the_quick_run(tmp_path, capsys):
    """The quick run measures every column, and writes figures, tables and pictures."""
    utility.main(["--quick", "--seeds", "1", "--json", str(tmp_path / "u.json"), "--plots", str(tmp_path / "plots")])
    report = json.loads((tmp_path / "u.json").read_text())
    assert {cell["column"] for cell in report["cells"]} == set(utility.COLUMNS)
    for cell in report["cells"]:
        for metric in utility.METRICS:
            found = cell["summary"][metric]
            assert 0.3 < found["mean"] < 1
            assert len(cell["values"][metric]) == report["seeds"] == report["other_seeds"] == 1
    shown = capsys.readouterr().out
    assert "shared - central, AUC" in shown
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "utility-heart-accuracy.svg",
        "utility-heart-auc.svg",
        "utility-heart-balanced-accuracy.svg",
    ]


def test_the_columns_that_are_claimed_to_match_have_most_seeds(task, monkeypatch):
    """Central and shared without dropouts are run over all seeds, the others over as many as they are given."""
    monkeypatch.setattr(utility, "trained", lambda *_: {})
    monkeypatch.setattr(utility, "judge", lambda *_: {"AUC": 0.5})
    report = utility.measure("heart", task, seeds=3, other_seeds=2, epsilons=[1.0, None], json_file=None)
    assert (report["seeds"], report["other_seeds"]) == (3, 2)
    for cell in report["cells"]:
        claimed = cell["column"] in ("shared, no dropouts", "central")
        assert len(cell["values"]["AUC"]) == (3 if claimed else 2)


def test_x_rays_that_are_missing_are_named(monkeypatch, tmp_path, capsys):
    """Without the X-rays the benchmark says which file it looked for."""
    monkeypatch.setenv("SECAGG_SHARED_DATA", str(tmp_path))
    with pytest.raises(SystemExit):
        utility.main(["--quick", "--data", "xray"])
    assert str(tmp_path / "pneumoniamnist.npz") in capsys.readouterr().err


def test_standard_errors():
    """Mean, deviation and standard error are those of the seeds, and differences have both columns' errors."""
    found = utility.summary([1.0, 2.0, 3.0, 4.0])
    assert found == {"mean": 2.5, "sd": pytest.approx(np.sqrt(5 / 3)), "se": pytest.approx(np.sqrt(5 / 12))}
    cells = [
        {"column": name, "epsilon": 1.0, "summary": {"AUC": {"mean": mean, "se": se}}}
        for name, mean, se in (("shared", 0.9, 0.03), ("central", 0.8, 0.04))
    ]
    ((name, above, error, quotient),) = utility.differences({"cells": cells}, "shared", "central", "AUC")
    assert (name, above, error, quotient) == ("1", pytest.approx(0.1), pytest.approx(0.05), pytest.approx(2.0))
