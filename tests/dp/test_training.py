"""DP-SGD: what is refused, what one patient can change, and how much noise there is.

Models here are made with torch's seeded generator, which only starts them; coins and noise come from the entropy.
"""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.training import Plan, train_plain, train_private
from secureagg.testing import CountingEntropy

FALSE_ALARM = 1e-6
HARDLY_ANY = 1e-9


def squared(predictions: Tensor, targets: Tensor) -> Tensor:
    """Sum of squared errors."""
    return ((predictions - targets) ** 2).sum()


def linear(predictions: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient does not depend on the parameters of a linear model: features times target."""
    return (predictions * targets).sum()


def nothing(predictions: Tensor, _targets: Tensor) -> Tensor:
    """A loss with zero gradients."""
    return predictions.sum() * 0


def make(*modules: nn.Module, seed: int = 0) -> nn.Module:
    """These modules in sequence, by default a network of two layers, with fixed initial parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(*modules) if modules else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        return model


def data(rows: int = 8, columns: int = 3) -> tuple[Tensor, Tensor]:
    """Features and targets of so many patients."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=generator), torch.randn(rows, 1, generator=generator)


def vector(model: nn.Module) -> np.ndarray:
    """All parameters, as one vector of double precision."""
    return np.concatenate([p.detach().numpy().astype(np.float64).ravel() for p in model.parameters()])


def private(model, loss, features, targets, **options) -> np.ndarray:
    """Train a copy of ``model`` and return the change of its parameters."""
    defaults = {"q": 1.0, "z": 1.0, "steps": 1, "rate": 0.5, "clip": 1.0, "seed": 0}
    o = defaults | options
    trained = copy.deepcopy(model)
    train_private(
        trained,
        loss,
        features,
        targets,
        patients=range(len(features)),
        plan=Plan(steps=o["steps"], learning_rate=o["rate"], sampling_rate=o["q"]),
        event=PoissonSampledGaussian(sampling_rate=o["q"], noise_multiplier=o["z"], steps=o["steps"]),
        clip_norm=o["clip"],
        entropy=CountingEntropy(o["seed"]),
    )
    return vector(trained) - vector(model)


def gradient_of(model, loss, features, targets) -> np.ndarray:
    """The gradient of the loss over these rows, by plain autograd."""
    gradients = torch.autograd.grad(loss(model(features), targets), list(model.parameters()))
    return np.concatenate([g.numpy().astype(np.float64).ravel() for g in gradients])


def clipped_sum(model, loss, features, targets, clip: float) -> np.ndarray:
    """Each patient's whole gradient, one at a time, scaled down to ``clip`` where it is longer, and added up."""
    rows = [gradient_of(model, loss, features[i : i + 1], targets[i : i + 1]) for i in range(len(features))]
    return sum(row * min(1.0, clip / np.linalg.norm(row)) for row in rows)


def assert_deviation(values: np.ndarray, deviation: float) -> None:
    """The sum of squares is in the chi-square interval that right noise leaves with probability FALSE_ALARM."""
    squares = float(np.sum((values / deviation) ** 2))
    low, high = stats.chi2.ppf(FALSE_ALARM / 2, values.size), stats.chi2.isf(FALSE_ALARM / 2, values.size)
    assert low < squares < high, np.sqrt(squares / values.size)


def refused(model, match: str, *, patients=range(8), plan=None, event=None) -> None:
    """Training is refused with this message, and leaves the model as it was."""
    before = copy.deepcopy(model.state_dict())
    features, targets = data()
    with pytest.raises(UnsupportedEvent, match=match):
        train_private(
            model,
            squared,
            features,
            targets,
            patients=patients,
            plan=plan or Plan(steps=2, learning_rate=0.1, sampling_rate=0.5),
            event=event or PoissonSampledGaussian(sampling_rate=0.5, noise_multiplier=1.0, steps=2),
            clip_norm=1.0,
        )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_batchnorm_is_refused():
    """A layer that mixes patients is refused with a hint to GroupNorm, wherever it is in the model."""
    refused(make(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), "use GroupNorm")
    refused(make(nn.Sequential(nn.Sequential(nn.BatchNorm1d(3))), nn.Linear(3, 1)), "use GroupNorm")


@pytest.mark.parametrize(("steps", "rate"), [(3, 0.5), (1, 0.5), (2, 0.6), (2, 0.5000001), (5, 0.1)])
def test_a_plan_that_was_not_booked_is_refused(steps, rate):
    """Other steps or another sampling rate than the booked event's are refused, with both in the message."""
    plan = Plan(steps=steps, learning_rate=0.1, sampling_rate=rate)
    refused(make(), rf"{steps} steps.*booked were 2 at 0\.5", plan=plan)


@pytest.mark.parametrize("clip", [0.01, 1.0, 3.0, 1e4])
def test_a_step_is_the_clipped_gradient_step(clip):
    """With every patient and hardly any noise, a step is the sum of clipped gradients over n, times the rate."""
    model, (features, targets) = make(), data()
    expected = -0.5 * clipped_sum(model, squared, features, targets, clip) / 8
    changed = private(model, squared, features, targets, clip=clip, z=1e-6 / clip)
    assert np.allclose(changed, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max() + 1e-6)


def test_some_gradients_are_clipped_and_some_are_not():
    """The clip norm 3 of the test above lies between the patients' gradient norms, so that it shows both."""
    model, (features, targets) = make(), data()
    norms = [np.linalg.norm(gradient_of(model, squared, features[i : i + 1], targets[i : i + 1])) for i in range(8)]
    assert min(norms) < 3 < max(norms)


def test_steps_follow_each_other():
    """Three steps with hardly any noise are three hand-computed clipped steps, each from where the last one led."""
    model, (features, targets) = make(), data()
    changed = private(model, squared, features, targets, steps=3, rate=0.1, z=HARDLY_ANY)
    walked = copy.deepcopy(model)
    for _ in range(3):
        step = -0.1 * clipped_sum(walked, squared, features, targets, 1.0) / 8
        moved = torch.from_numpy(vector(walked) + step).to(torch.float32)
        nn.utils.vector_to_parameters(moved, walked.parameters())
    assert np.allclose(changed, vector(walked) - vector(model), rtol=1e-4, atol=1e-6)


def batches_of(train, *, rows: int, q: float, steps: int, **options) -> list[list[int]]:
    """Which patients were in each batch that was not empty, as the loss saw them."""
    seen = []

    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        seen.append([int(target) for target in targets])
        return predictions.sum() * 0

    plan = Plan(steps=steps, learning_rate=0.1, sampling_rate=q)
    train(make(nn.Linear(1, 1)), loss, torch.zeros(rows, 1), torch.arange(rows), plan=plan, **options)
    return seen


def private_options(rows: int, q: float, steps: int) -> dict:
    """What train_private needs beside what train_plain does."""
    event = PoissonSampledGaussian(sampling_rate=q, noise_multiplier=1.0, steps=steps)
    return {"patients": range(rows), "event": event, "clip_norm": 1.0}


@pytest.fixture
def no_probe(monkeypatch):
    """For a loss that notes its calls: without those that only find out whether it couples rows."""
    monkeypatch.setattr("dp.training.refuse_coupled", lambda *_, **__: None)


@pytest.mark.parametrize("trainer", ["private", "plain"])
def test_batches_are_poisson_samples(trainer, no_probe):
    """Each patient is in a step with chance q, independently of the others; false alarm 1e-6 for each of three."""
    rows, q, steps = 40, 0.2, 500
    options = private_options(rows, q, steps) if trainer == "private" else {}
    train = train_private if trainer == "private" else train_plain
    batches = batches_of(train, rows=rows, q=q, steps=steps, entropy=CountingEntropy(21), **options)
    assert all(len(set(batch)) == len(batch) for batch in batches)
    present = np.zeros((steps, rows))
    for step, batch in enumerate(batches):
        present[step, batch] = 1
    assert stats.binomtest(int(present.sum()), steps * rows, q).pvalue > FALSE_ALARM
    for patient in range(rows):
        assert stats.binomtest(int(present[:, patient].sum()), steps, q).pvalue > FALSE_ALARM / rows
    # Sizes of fixed-size or shuffled batches would vary too little.
    spread = float(np.sum((present.sum(axis=1) - rows * q) ** 2) / (rows * q * (1 - q)))
    assert stats.norm.sf(abs(spread - steps) / np.sqrt(2 * steps)) > FALSE_ALARM / 2


@pytest.mark.parametrize("q", [0.3, 1.0])
def test_divisor_is_the_expected_batch_size(q, no_probe):
    """The sum is divided by q n, exactly and not truncated, whatever the size of the batch was."""
    model, (features, _) = make(nn.Linear(3, 1, bias=False)), data(7)
    batches = []

    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        batches.append(targets.tolist())
        return predictions.sum()

    changed = private(model, loss, features, torch.arange(7), q=q, z=1e-9, clip=1e3, seed=3)
    (batch,) = batches
    assert len(batch) != pytest.approx(7 * 0.3)
    expected = -0.5 * features[batch].numpy().astype(np.float64).sum(axis=0) / (q * 7)
    assert np.allclose(changed, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(("q", "steps"), [(1.0, 1), (1.0, 5), (0.5, 6)])
def test_influence_of_one_patient_is_bounded(q, steps, size):
    """With and without one patient's gradient, and the same coins and noise, parameters differ by at most
    rate C / (q n) a step."""
    model, (features, targets) = make(nn.Linear(3, 1)), data(8)
    present, absent = targets.clone(), targets.clone()
    present[2], absent[2] = size, 0.0
    options = {"q": q, "steps": steps, "rate": 0.5, "clip": 0.7, "seed": 5}
    difference = private(model, linear, features, present, **options) - private(
        model, linear, features, absent, **options
    )
    most = steps * 0.5 * 0.7 / (q * 8)
    norm = np.linalg.norm(difference)
    assert norm <= most * (1 + 2**-12) + 1e-6
    if q == 1 and size >= 1:
        assert norm >= most * (1 - 2**-12) - 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_influence_is_bounded_in_a_deep_model(seed):
    """Also through several layers, whose gradients are clipped together, one patient moves at most rate C / n."""
    model, (features, targets) = make(seed=seed), data(8)
    other, far = features.clone(), targets.clone()
    other[2], far[2] = 5.0, 1e3
    with_it = private(model, squared, other, far, clip=0.7)
    base = private(model, lambda p, t: squared(p[t[:, 0] < 500], t[t[:, 0] < 500]), other, far, clip=0.7)
    assert 0.9 * 0.5 * 0.7 / 8 < np.linalg.norm(with_it - base) <= 0.5 * 0.7 / 8 * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize(
    ("q", "z", "clip", "rate", "steps"),
    [(1.0, 1.0, 1.0, 1.0, 1), (1.0, 2.5, 0.3, 0.1, 1), (0.25, 0.8, 4.0, 0.5, 1), (0.25, 1.5, 2.0, 0.2, 4)],
)
def test_noise_has_the_right_scale(q, z, clip, rate, steps):
    """Without gradients, parameters move by normal noise of deviation rate z C sqrt(steps) / (q n), false alarm
    1e-6 for scale and 1e-6 for shape."""
    model, (features, targets) = make(nn.Linear(100, 200)), (torch.ones(8, 100), torch.ones(8, 1))
    nn.utils.vector_to_parameters(torch.zeros(20200), model.parameters())
    changed = private(model, nothing, features, targets, q=q, z=z, clip=clip, rate=rate, steps=steps, seed=8)
    deviation = rate * z * clip * np.sqrt(steps) / (q * 8)
    assert_deviation(changed, deviation)
    assert stats.kstest(changed / deviation, "norm").pvalue > FALSE_ALARM


def test_noise_is_added_to_gradients():
    """With gradients present, the noise on top of the clipped step has the same scale, false alarm 1e-6."""
    model, (features, _) = make(nn.Linear(50, 20)), data(8, 50)
    targets = torch.ones(8, 20)
    expected = -0.5 * clipped_sum(model, linear, features, targets, 2.0) / 8
    changed = private(model, linear, features, targets, z=3.0, clip=2.0, seed=9)
    assert_deviation(changed - expected, 0.5 * 3.0 * 2.0 / 8)


def test_noise_of_parameters_is_independent():
    """Parameters of the same shape get noise of their own, false alarm 1e-6."""
    model = make(nn.Linear(60, 60, bias=False), nn.Linear(60, 60, bias=False))
    changed = private(model, nothing, torch.ones(4, 60), torch.ones(4, 1), rate=1.0, seed=10)
    one, other = changed.reshape(2, 3600) * 4
    assert abs(np.sum(one * other)) / 60 < stats.norm.isf(FALSE_ALARM / 2)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_empty_batch_is_noised(steps, no_probe):
    """Steps in which nobody is sampled never see data, and still add noise of the full scale, false alarm 1e-6."""
    model, q = make(nn.Linear(100, 100)), 1e-9
    nn.utils.vector_to_parameters(torch.zeros(10100), model.parameters())

    def loss(_predictions: Tensor, _targets: Tensor) -> Tensor:
        raise AssertionError("somebody was sampled")

    changed = private(model, loss, torch.ones(8, 100), torch.ones(8, 1), q=q, z=2.0, rate=q, steps=steps, seed=12)
    assert_deviation(changed, 2.0 * np.sqrt(steps) / 8)


def test_injected_entropy_reproduces():
    """The same entropy gives the same model, bit for bit, and other entropy gives another one."""
    model, (features, targets) = make(), data()
    one, same, other = (private(model, squared, features, targets, q=0.5, steps=3, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.any(one == other)


def test_global_seeds_do_not_decide_the_noise():
    """Two sites that train under the same torch and numpy seeds add uncorrelated noise, false alarm 1e-6."""
    features, targets = torch.zeros(8, 100), torch.zeros(8, 1)
    runs = []
    for _ in range(2):
        model = make(nn.Linear(100, 200))
        with torch.random.fork_rng():
            torch.manual_seed(7)
            np.random.seed(7)
            train_private(
                model,
                nothing,
                features,
                targets,
                plan=Plan(steps=1, learning_rate=0.5, sampling_rate=1.0),
                **private_options(8, 1.0, 1),
            )
        runs.append(vector(model) - vector(make(nn.Linear(100, 200))))
    assert abs(np.corrcoef(*runs)[0, 1]) < stats.norm.isf(FALSE_ALARM / 2) / np.sqrt(20200)


@pytest.mark.parametrize("trainer", ["private", "plain"])
def test_global_seeds_do_not_decide_the_batches(trainer, no_probe):
    """Two runs under the same torch and numpy seeds sample other patients; equal by chance in 2^-200."""
    options = private_options(100, 0.5, 2) if trainer == "private" else {}
    train = train_private if trainer == "private" else train_plain
    runs = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            np.random.seed(7)
            runs.append(batches_of(train, rows=100, q=0.5, steps=2, **options))
    assert runs[0] != runs[1]


def assert_plain(model: nn.Module, pristine: nn.Module) -> None:
    """The model is an ordinary one: same keys, no hooks, nothing per patient on its parameters."""
    assert list(model.state_dict()) == list(pristine.state_dict())
    for module, original in zip(model.modules(), pristine.modules(), strict=True):
        assert type(module) is type(original)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert not module._backward_pre_hooks
    features, targets = data()
    for parameter in model.parameters():
        parameter.grad = None
    squared(model(features), targets).backward()
    for parameter in model.parameters():
        assert getattr(parameter, "grad_sample", None) is None
        assert getattr(parameter, "summed_grad", None) is None
    by_hand = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])
    assert np.allclose(by_hand, gradient_of(copy.deepcopy(model), squared, features, targets), rtol=1e-6)


@pytest.mark.parametrize("q", [1.0, 0.5, 1e-9])
def test_the_model_is_ordinary_afterwards(q):
    """After training the model keeps no hooks and no gradients of patients, and can be used, copied and trained."""
    model, (features, targets) = make(), data()
    options = {"plan": Plan(steps=2, learning_rate=1e-9, sampling_rate=q), **private_options(8, q, 2)}
    for _ in range(2):
        train_private(model, squared, features, targets, entropy=CountingEntropy(2), **options)
        gradients = [p.grad for p in model.parameters()]
        assert all(gradient is None or not gradient.any() for gradient in gradients)
        assert_plain(model, make())


def test_the_model_is_ordinary_after_a_failure():
    """If the loss raises, the error comes through, and the model has neither hooks nor gradients of patients."""
    model, (features, targets) = make(), data()
    before = vector(model)

    def loss(_predictions: Tensor, _targets: Tensor) -> Tensor:
        raise ZeroDivisionError("in the loss")

    plan = Plan(steps=1, learning_rate=0.5, sampling_rate=1.0)
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        train_private(model, loss, features, targets, plan=plan, **private_options(8, 1.0, 1))
    assert np.array_equal(vector(model), before)
    assert_plain(model, make())


def test_frozen_parameters_stay():
    """Parameters that ask for no gradient do not move, and the others do."""
    model, (features, targets) = make(), data()
    model[0].requires_grad_(False)
    changed = private(model, squared, features, targets)
    frozen = sum(p.numel() for p in model[0].parameters())
    assert not changed[:frozen].any()
    assert changed[frozen:].all()


def test_inputs_are_left_alone():
    """Training changes neither features nor targets."""
    features, targets = data()
    copies = features.clone(), targets.clone()
    private(make(), squared, features, targets, q=0.5, steps=3)
    assert torch.equal(features, copies[0])
    assert torch.equal(targets, copies[1])


@pytest.mark.parametrize("steps", [1, 4])
def test_plain_training_is_gradient_descent(steps):
    """With every patient, plain training is hand-computed descent on the mean loss, without clipping or noise."""
    model, (features, targets) = make(), data()
    walked = copy.deepcopy(model)
    train_plain(model, squared, features, targets, plan=Plan(steps=steps, learning_rate=0.05, sampling_rate=1.0))
    for _ in range(steps):
        step = -0.05 * gradient_of(walked, squared, features, targets) / 8
        moved = torch.from_numpy(vector(walked) + step).to(torch.float32)
        nn.utils.vector_to_parameters(moved, walked.parameters())
    assert np.allclose(vector(model), vector(walked), rtol=1e-5, atol=1e-6)


def test_plain_training_divides_by_the_expected_batch_size():
    """Plain training divides a batch's sum by q n, whatever the size of the batch was."""
    model, (features, _) = make(nn.Linear(3, 1, bias=False)), data(7)
    before, batches = vector(model), []

    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        batches.append(targets.tolist())
        return predictions.sum()

    plan = Plan(steps=1, learning_rate=0.5, sampling_rate=0.3)
    train_plain(model, loss, features, torch.arange(7), plan=plan, entropy=CountingEntropy(1))
    (batch,) = batches
    expected = -0.5 * features[batch].numpy().astype(np.float64).sum(axis=0) / (0.3 * 7)
    assert np.allclose(vector(model) - before, expected, rtol=1e-4, atol=1e-6)


def test_plain_training_does_nothing_in_an_empty_batch():
    """Steps in which nobody is sampled leave a plainly trained model where it is."""
    model, (features, targets) = make(), data()
    before = vector(model)
    plan = Plan(steps=5, learning_rate=0.5, sampling_rate=1e-9)
    train_plain(model, squared, features, targets, plan=plan, entropy=CountingEntropy(1))
    assert np.array_equal(vector(model), before)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4, affine=False),
        nn.BatchNorm1d(4, affine=False, track_running_stats=False),
        nn.InstanceNorm1d(4, track_running_stats=True),
    ],
    ids=["no weights", "no statistics", "instance"],
)
def test_statistics_over_patients_are_refused_without_weights_too(layer: nn.Module) -> None:
    """A layer that mixes patients is refused even where it has nothing to train, and so looks harmless to Opacus."""
    refused(make(nn.Linear(3, 4), layer, nn.Linear(4, 1)), "GroupNorm in place of BatchNorm")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_one_patient_cannot_ruin_the_model(value: float) -> None:
    """Whatever one patient's values are, the model stays finite and moves as without that patient, or nearly so."""
    features, targets = data()
    spoiled = features.clone()
    spoiled[3] = value
    moved = private(make(), squared, spoiled, targets, z=HARDLY_ANY, steps=3)
    others = [0, 1, 2, 4, 5, 6, 7]
    without = private(make(), squared, features[others], targets[others], z=HARDLY_ANY, steps=3, rate=0.5 * 7 / 8)
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved - without) <= 3 * 0.5 * 1.0 / 8 * 1.5


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_the_clip_norm_is_a_bound(clip: float) -> None:
    """A clip norm that bounds nothing is refused."""
    features, targets = data()
    with pytest.raises(UnsupportedEvent, match="clip norm"):
        private(make(), squared, features, targets, clip=clip)
