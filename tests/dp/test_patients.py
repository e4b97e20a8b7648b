"""Patients with several rows as the unit of DP-SGD, for each kind of layer, against gradients found one by one."""

import copy
import math
import re
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from opacus.layers import DPLSTM
from scipy import stats
from torch import Tensor, nn

from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.noise import GaussianNoise
from dp.shared import decode, encode, plan_shared_noise
from dp.training import SUM_GRID, Plan, clipped_gradient_sum, train_private
from secureagg.testing import CountingEntropy

FALSE_ALARM = 1e-6
HARDLY_ANY = 1e-7
ROWS_EACH = (3, 1, 2, 1, 4, 2)
PATIENTS = [f"patient {number}" for number, rows in enumerate(ROWS_EACH) for _ in range(rows)]


def squared(predictions: Tensor, targets: Tensor) -> Tensor:
    """Sum of squared errors."""
    return ((predictions - targets) ** 2).sum()


class Recurrent(nn.Module):
    """The last output of a recurrent layer, and a linear layer on top."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.top = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, time, 3) to (n, 2)."""
        return self.top(self.layer(x)[0][:, -1])


class Scaled(nn.Module):
    """A layer that Opacus has no rule for, with a parameter of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(x * self.scale)


LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)),
    "group norm": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2)),
    "embedding": lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 2)),
    "lstm": lambda: Recurrent(DPLSTM(3, 4, batch_first=True)),
    "scalar": lambda: nn.Sequential(nn.Linear(3, 2), Scaled()),
}


def make(kind: str) -> nn.Module:
    """A model with such a layer, in double precision, from fixed random parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LAYERS[kind]().double()


def data_for(kind: str, rows: int = len(PATIENTS)) -> tuple[Tensor, Tensor]:
    """Random features that fit the model, and targets (rows, 2)."""
    generator = torch.Generator().manual_seed(1)
    shape = {"linear": (3,), "scalar": (3,), "lstm": (5, 3), "embedding": (5,)}.get(kind, (2, 4, 4))
    if kind == "embedding":
        features = torch.randint(0, 9, (rows, *shape), generator=generator)
    else:
        features = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
    return features, torch.randn(rows, 2, generator=generator, dtype=torch.float64)


def vector(tensors) -> np.ndarray:
    """All numbers of these tensors, as one vector."""
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in tensors])


def train(model, features, targets, patients, *, loss=squared, q=1.0, z=HARDLY_ANY, steps=1, **options) -> np.ndarray:
    """The sum of clipped gradients of each step, as the change of a trained copy of the model tells."""
    trained = copy.deepcopy(model)
    people = len(set(patients))
    train_private(
        trained,
        loss,
        features,
        targets,
        patients=patients,
        plan=Plan(steps=steps, learning_rate=q * people, sampling_rate=q),
        event=PoissonSampledGaussian(sampling_rate=q, noise_multiplier=z, steps=steps),
        **{"clip_norm": 1.0, "max_rows_per_patient": 4, "entropy": CountingEntropy(0)} | options,
    )
    assert list(trained.state_dict()) == list(model.state_dict())
    return vector(model.parameters()) - vector(trained.parameters())


def gradient(model, features, targets, row: int) -> np.ndarray:
    """One row's gradient, by plain autograd without Opacus."""
    loss = squared(model(features[row : row + 1]), targets[row : row + 1])
    return vector(torch.autograd.grad(loss, list(model.parameters())))


def by_hand(model, features, targets, patients, clip: float) -> np.ndarray:
    """Each patient's mean gradient, scaled down to ``clip`` where it is longer, and added up."""
    total = np.zeros(sum(p.numel() for p in model.parameters()))
    for patient in set(patients):
        rows = [row for row, owner in enumerate(patients) if owner == patient]
        mean = np.mean([gradient(model, features, targets, row) for row in rows], axis=0)
        total += mean * min(1.0, clip / np.linalg.norm(mean))
    return total


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("clip", [0.5, 3.0, 1e3])
def test_a_step_is_the_sum_of_clipped_means_of_patients(kind: str, clip: float) -> None:
    """Through every kind of layer, a step is what plain autograd gives row by row, averaged over each patient's rows,
    clipped, and added up."""
    model, (features, targets) = make(kind), data_for(kind)
    changed = train(model, features, targets, PATIENTS, clip_norm=clip, z=HARDLY_ANY / clip)
    expected = by_hand(model, features, targets, PATIENTS, clip)
    np.testing.assert_allclose(changed, expected, atol=1e-6)
    assert np.linalg.norm(expected) > 0.3


def test_torch_lstm_gives_the_same_gradients() -> None:
    """The recurrent layer that is allowed computes torch's own LSTM, whose gradients are those that are clipped."""
    model, (features, targets) = make("lstm"), data_for("lstm")
    original = Recurrent(nn.LSTM(3, 4, batch_first=True)).double()
    original.load_state_dict(model.state_dict(), strict=False)
    changed = train(model, features, targets, PATIENTS)
    names = [re.sub(r"l0\.(..)\.(\w+)", r"\2_\1_l0", name) for name, _ in model.named_parameters()]
    parameters = dict(original.named_parameters())
    expected = np.zeros_like(changed)
    for patient in set(PATIENTS):
        rows = [row for row, owner in enumerate(PATIENTS) if owner == patient]
        loss = squared(original(features[rows]), targets[rows]) / len(rows)
        mean = vector(torch.autograd.grad(loss, [parameters[name] for name in names]))
        expected += mean * min(1.0, 1 / np.linalg.norm(mean))
    np.testing.assert_allclose(changed, expected, atol=1e-6)


@pytest.mark.parametrize("copies", [2, 7, 50])
@pytest.mark.parametrize("clip", [0.1, 1e3])
def test_copies_of_an_image_change_nothing(copies: int, clip: float) -> None:
    """A patient with one image or with 50 copies of it moves the sum by the same vector, which is no longer than C."""
    model, (features, targets) = make("convolution"), data_for("convolution", 4)
    options = {"clip_norm": clip, "z": HARDLY_ANY / clip, "max_rows_per_patient": 50}
    once = train(model, features, targets, range(4), **options)
    rows = torch.tensor([0, 1, 2] + [3] * copies)
    many = train(model, features[rows], targets[rows], rows.tolist(), **options)
    without = train(model, features[:3], targets[:3], range(3), **options)
    np.testing.assert_allclose(many, once, atol=1e-9)
    influence = np.linalg.norm(many - without)
    assert influence <= clip * (1 + 2**-12)
    assert influence == pytest.approx(min(clip, np.linalg.norm(gradient(model, features, targets, 3))), rel=1e-5)


@pytest.mark.parametrize("bound", [4, 5, 7, 12])
@pytest.mark.parametrize("kind", ["linear", "convolution", "lstm"])
def test_the_bound_on_memory_changes_nothing(kind: str, bound: int) -> None:
    """In pieces of at most so many rows the same model comes out as in one piece, over steps with noise, bit for bit
    as far as the grid goes."""
    model, (features, targets) = make(kind), data_for(kind)
    options = {"q": 0.7, "z": 1.0, "steps": 3}
    whole = train(model, features, targets, PATIENTS, **options)
    pieces = train(model, features, targets, PATIENTS, max_batch_rows=bound, **options)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-12)
    assert np.abs(whole).max() > 0.1


def test_sums_are_exact(monkeypatch) -> None:
    """What noise is added to lies on the grid, and is the same to the last bit in any order of the patients and cut
    into any pieces."""
    sums = []

    def release(noise: GaussianNoise, total: np.ndarray) -> np.ndarray:
        assert np.array_equal(total / noise.grid, np.rint(total / noise.grid))
        sums[-1].append(total.copy())
        return total

    monkeypatch.setattr(GaussianNoise, "release", release)
    model, (features, targets) = make("linear"), data_for("linear", 60)
    for order in (torch.arange(60), torch.arange(59, -1, -1)):
        for piece in (1 << 17, 70, 1):
            monkeypatch.setattr("dp.training.PIECE", piece)
            sums.append([])
            train(model, features[order], targets[order], order.tolist(), z=1.0)
    assert all(np.array_equal(a, b) for other in sums[1:] for a, b in zip(sums[0], other, strict=True))


@pytest.fixture
def seen(monkeypatch):
    """Which rows the loss is called with, batch by batch, without the calls that only look for coupling."""
    monkeypatch.setattr("dp.training.refuse_coupled", lambda *_, **__: None)
    return []


def noting(seen):
    """A loss without gradients that notes the targets, which are row numbers here."""

    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets[:, 0].long().tolist())
        return predictions.sum() * 0

    return loss


def numbered(rows: int) -> tuple[Tensor, Tensor]:
    """Features of which nothing depends, and each row's number as its target."""
    return torch.zeros(rows, 3, dtype=torch.float64), torch.arange(rows).view(-1, 1)


@pytest.mark.parametrize("bound", [4, 5, 7])
def test_no_batch_is_too_large_and_no_patient_is_split(bound: int, seen) -> None:
    """Never more rows at once than allowed, all rows of a patient at once, and no batch that would have had room."""
    features, targets = numbered(len(PATIENTS))
    train(make("linear"), features, targets, PATIENTS, loss=noting(seen), max_batch_rows=bound)
    assert sorted(row for batch in seen for row in batch) == list(range(len(PATIENTS)))
    people = [{PATIENTS[row] for row in batch} for batch in seen]
    assert sum(len(each) for each in people) == len(set(PATIENTS))
    assert all(len(batch) <= bound for batch in seen)
    for batch, following in pairwise(seen):
        assert len(batch) + PATIENTS.count(PATIENTS[following[0]]) > bound


def test_one_noise_for_a_step_in_pieces() -> None:
    """A step cut into many pieces is noised once, false alarm 1e-6."""
    model = nn.Sequential(nn.Linear(100, 100)).double()
    features, targets = torch.zeros(12, 100, dtype=torch.float64), torch.zeros(12, 1, dtype=torch.float64)
    changed = train(model, features, targets, range(12), loss=lambda p, _: p.sum() * 0, z=2.0, max_batch_rows=4)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], changed.size)
    assert low < np.sum((changed / 2.0) ** 2) < high


def test_patients_are_sampled_not_rows(seen) -> None:
    """However many rows a patient has, that patient is in a step with chance q, with at most K rows, each of them
    equally likely, and another choice each time; false alarms 1e-6 each."""
    rows_each, q, steps, most = (1, 2, 3, 10, 40), 0.4, 600, 3
    patients = [patient for patient, rows in enumerate(rows_each) for _ in range(rows)]
    features, targets = numbered(len(patients))
    options = {"q": q, "z": 1.0, "steps": steps, "max_rows_per_patient": most, "max_batch_rows": 10**6}
    train(make("linear"), features, targets, patients, loss=noting(seen), **options)
    present, hits = np.zeros(len(rows_each)), np.zeros(len(patients))
    for batch in seen:
        assert len(set(batch)) == len(batch)
        owners, counts = np.unique([patients[row] for row in batch], return_counts=True)
        present[owners] += 1
        assert [min(most, rows_each[owner]) for owner in owners] == counts.tolist()
        hits[batch] += 1
    for patient in range(len(rows_each)):
        assert stats.binomtest(int(present[patient]), steps, q).pvalue > FALSE_ALARM
        own = hits[[row for row, owner in enumerate(patients) if owner == patient]]
        # Without replacement the counts vary less than a multinomial's, by the factor that the statistic is divided by.
        spread = ((own - own.mean()) ** 2).sum() / own.mean()
        if len(own) > most:
            free = 1 - most / len(own)
            low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(own) - 1)
            assert low < spread / free * (len(own) - 1) / len(own) < high
        else:
            assert spread == 0


def test_the_divisor_counts_patients() -> None:
    """The sum is divided by the expected number of patients q n, not of rows, and not truncated."""
    model, (features, targets) = make("linear"), data_for("linear")
    trained = copy.deepcopy(model)
    train_private(
        trained,
        squared,
        features,
        targets,
        patients=PATIENTS,
        plan=Plan(steps=1, learning_rate=1.0, sampling_rate=1.0),
        event=PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=HARDLY_ANY, steps=1),
        clip_norm=1.0,
        max_rows_per_patient=4,
    )
    changed = vector(model.parameters()) - vector(trained.parameters())
    np.testing.assert_allclose(changed, by_hand(model, features, targets, PATIENTS, 1.0) / len(ROWS_EACH), atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_a_patient_with_one_spoiled_image_contributes_nothing(value: float) -> None:
    """Where one of a patient's rows gives no finite gradient, the patient is left out, and nobody else is touched."""
    model, (features, targets) = make("linear"), data_for("linear")
    spoiled = targets.clone()
    spoiled[4] = value  # a row of patient 2
    others = [row for row, owner in enumerate(PATIENTS) if owner != "patient 2"]
    changed = train(model, features, spoiled, PATIENTS)
    kept = [PATIENTS[row] for row in others]
    np.testing.assert_allclose(changed, by_hand(model, features[others], targets[others], kept, 1.0), atol=1e-6)


def test_keys_may_be_anything_and_in_any_order() -> None:
    """Patients are told apart by their keys, whose rows need not be neighbours."""
    model, (features, targets) = make("linear"), data_for("linear")
    order = torch.randperm(len(PATIENTS), generator=torch.Generator().manual_seed(3))
    shuffled = [(PATIENTS[row], 7) for row in order]
    changed = train(model, features[order], targets[order], shuffled)
    np.testing.assert_allclose(changed, by_hand(model, features, targets, PATIENTS, 1.0), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_rows_per_patient": 0}, "at most 0 rows of a patient"),
        ({"max_rows_per_patient": 5, "max_batch_rows": 4}, "5 rows of a patient and 4 of a batch"),
        ({"patients": PATIENTS[1:]}, "13 rows of features, 13 of targets and 12 patients' keys"),
        ({"patients": [], "rows": 0}, "0 rows of features"),
        ({"clip_norm": -1.0}, "clip norm -1"),
        ({"z": 1e-16}, "expected more noise or fewer patients"),
    ],
)
def test_bounds_that_are_none_are_refused(options, match: str) -> None:
    """Without a row, a key for each, room for a patient, a clip norm, or exact sums there is no training."""
    rows = options.pop("rows", len(PATIENTS))
    features, targets = data_for("linear", rows)
    patients = options.pop("patients", PATIENTS)
    with pytest.raises(UnsupportedEvent, match=match):
        train(make("linear"), features, targets, patients, **options)


def test_one_row_of_each_patient_by_default(seen) -> None:
    """Unless more are allowed, a step sees one row of each patient."""
    features, targets = numbered(len(PATIENTS))
    event = PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=1.0, steps=1)
    plan = Plan(steps=1, learning_rate=1.0, sampling_rate=1.0)
    options = {"patients": PATIENTS, "plan": plan, "event": event, "clip_norm": 1.0}
    train_private(make("linear"), noting(seen), features, targets, **options)
    assert sorted(PATIENTS[row] for row in seen[0]) == sorted(set(PATIENTS))


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4, batch_first=True), nn.GRU(3, 4, batch_first=True)])
def test_recurrent_layers_without_rows_are_refused(layer: nn.Module) -> None:
    """torch's own recurrent layers have no gradients per row; the error names the layer and what has them."""
    name = type(layer).__name__
    with pytest.raises(UnsupportedEvent, match=rf"\({name}\): .* use opacus.layers.DP{name} in place of nn.{name}"):
        train(Recurrent(layer).double(), *data_for("lstm"), PATIENTS)


def test_a_layer_with_buffers_is_refused() -> None:
    """A trained layer that keeps numbers of its own beside its parameters might keep patients' there."""
    layer = nn.Linear(3, 2)
    layer.register_buffer("memory", torch.zeros(3))
    with pytest.raises(UnsupportedEvent, match="layer with buffers"):
        train(nn.Sequential(layer).double(), *data_for("linear"), PATIENTS)


def test_a_failure_halfway_leaves_nothing_behind() -> None:
    """After a loss that failed in the second batch of a step, the model trains as if nothing had been."""
    model, (features, targets) = make("linear"), data_for("linear")
    expected = train(model, features[:4], targets[:4], PATIENTS[:4])
    calls = []

    def failing(predictions: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(targets))
        if len(calls) > 25:
            raise ZeroDivisionError("in the loss")
        return squared(predictions, targets)

    options = {"patients": PATIENTS, "clip_norm": 1.0, "max_rows_per_patient": 4, "max_batch_rows": 4}
    plan = Plan(steps=9, learning_rate=1e-12, sampling_rate=1.0)
    event = PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=1e-4, steps=9)
    with pytest.raises(ZeroDivisionError):
        train_private(model, failing, features, targets, plan=plan, event=event, **options)
    for parameter in model.parameters():
        assert not {"grad_sample", "summed_grad", "_forward_counter"} & set(vars(parameter))
    for module in model.modules():
        assert not {"activations", "max_batch_len"} & set(vars(module))
    assert math.isfinite(float(vector(model.parameters()).sum()))
    np.testing.assert_allclose(train(model, features[:4], targets[:4], PATIENTS[:4]), expected, atol=1e-6)


# Sums for sites that share noise.


def summed(model, features, targets, patients, *, loss=squared, q=1.0, seed=0, **options) -> np.ndarray:
    """One sum of a copy of the model, which must stay as it is."""
    copied = copy.deepcopy(model)
    found = clipped_gradient_sum(
        copied,
        loss,
        features,
        targets,
        patients=patients,
        sampling_rate=q,
        **{"clip_norm": 1.0, "max_rows_per_patient": 4, "entropy": CountingEntropy(seed)} | options,
    ).values
    assert all(
        torch.equal(a, b) for a, b in zip(copied.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert not any(vars(parameter).get("grad_sample") is not None for parameter in copied.parameters())
    assert (found.dtype, found.shape) == (np.float64, (sum(p.numel() for p in model.parameters()),))
    return found


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("clip", [0.5, 3.0, 1e3])
def test_the_sum_is_that_of_clipped_means_of_patients(kind: str, clip: float) -> None:
    """Through every kind of layer, the sum is what plain autograd gives row by row, averaged over each patient's rows,
    clipped, and added up, in the order of the model's parameters."""
    model, (features, targets) = make(kind), data_for(kind)
    found = summed(model, features, targets, PATIENTS, clip_norm=clip)
    expected = by_hand(model, features, targets, PATIENTS, clip)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * clip)
    assert np.linalg.norm(expected) > 0.3


def test_frozen_parameters_have_no_coordinates() -> None:
    """Only what is trained is in the sum, which is otherwise the same."""
    model, (features, targets) = make("linear"), data_for("linear")
    whole = summed(model, features, targets, PATIENTS, clip_norm=1e3)
    model[0].weight.requires_grad_(False)
    part = clipped_gradient_sum(
        model, squared, features, targets, patients=PATIENTS, sampling_rate=1.0, clip_norm=1e3, max_rows_per_patient=4
    )
    np.testing.assert_allclose(part.values, whole[12:], rtol=0, atol=3e-3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UnsupportedEvent, match="0 coordinates"):
        clipped_gradient_sum(model, squared, features, targets, patients=range(13), sampling_rate=1.0, clip_norm=1.0)


@pytest.mark.parametrize("bound", [4, 5, 7, 12])
@pytest.mark.parametrize("q", [1.0, 0.6])
def test_sums_in_pieces_are_the_same(bound: int, q: float) -> None:
    """Cut into pieces of any size the sum is the same to the last bit, and lies on a grid of a power of two."""
    model, (features, targets) = make("convolution"), data_for("convolution")
    whole = summed(model, features, targets, PATIENTS, q=q)
    assert np.array_equal(summed(model, features, targets, PATIENTS, q=q, max_batch_rows=bound), whole)
    grid = 2.0 ** math.floor(math.log2(SUM_GRID / math.sqrt(len(whole))))
    assert np.array_equal(whole / grid, np.rint(whole / grid))
    assert np.abs(whole).max() > 0.01


@pytest.mark.parametrize("copies", [1, 50])
@pytest.mark.parametrize("clip", [0.1, 1e3])
def test_a_patient_moves_the_sum_by_at_most_the_clip_norm(copies: int, clip: float) -> None:
    """One image or 50 copies of it move the sum by the same vector; it is no longer than C in exact arithmetic, however
    its gradient is rounded to the grid."""
    model, (features, targets) = make("convolution"), data_for("convolution", 4)
    options = {"clip_norm": clip, "max_rows_per_patient": 50}
    rows = torch.tensor([0, 1, 2] + [3] * copies)
    many = summed(model, features[rows], targets[rows], rows.tolist(), **options)
    without = summed(model, features[:3], targets[:3], range(3), **options)
    moved = many - without  # exact, as both lie on the grid
    assert sum(Fraction(each) ** 2 for each in moved.tolist()) <= Fraction(clip) ** 2
    length = min(clip, float(np.linalg.norm(gradient(model, features, targets, 3))))
    assert np.linalg.norm(moved) == pytest.approx(length, rel=1e-5)


def test_each_sum_has_a_sample_of_its_own(seen) -> None:
    """Each patient is in a sum with chance q, by other coins each time; false alarm 1e-6."""
    features, targets = numbered(200)
    for seed in range(50):
        summed(make("linear"), features, targets, range(200), loss=noting(seen), q=0.3, seed=seed, max_batch_rows=200)
    present = np.bincount([row for batch in seen for row in batch], minlength=200)
    low, high = stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], 200 * 50, 0.3)
    assert low <= present.sum() <= high
    assert stats.chisquare(present).pvalue > FALSE_ALARM
    assert len({tuple(batch) for batch in seen}) == len(seen)


def test_a_sum_of_nobody_is_zero() -> None:
    """A sample without any patient gives zeros, not an error."""
    model, (features, targets) = make("linear"), data_for("linear")
    assert not summed(model, features, targets, PATIENTS, q=1e-9).any()


def test_a_patient_without_a_number_adds_nothing() -> None:
    """A patient whose gradient is not finite is left out of the sum."""
    model, (features, targets) = make("linear"), data_for("linear", 6)
    expected = summed(model, features[:5], targets[:5], range(5))
    features[5] = math.nan
    assert np.array_equal(summed(model, features, targets, range(6)), expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"q": 0.0}, "sampling rate 0.0"),
        ({"q": 1.1}, "sampling rate 1.1"),
        ({"clip_norm": 0.0}, "clip norm 0.0"),
        ({"clip_norm": math.nan}, "clip norm nan"),
        ({"clip_norm": 1e-300}, "clip norm 1e-300, expected some coordinates"),
        ({"max_rows_per_patient": 0}, "at most 0 rows of a patient"),
        ({"max_batch_rows": 3}, "and 3 of a batch"),
        ({"patients": range(12)}, "12 patients' keys"),
        ({"loss": lambda p, t: ((p - t) ** 2).mean()}, "loss together is not the sum"),
        ({"model": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()}, "GroupNorm"),
    ],
)
def test_sums_that_no_clipping_bounds_are_refused(options, text: str) -> None:
    """What training refuses is refused for a sum too, before anybody is sampled."""
    features, targets = data_for("linear")
    given = {"model": make("linear"), "patients": PATIENTS} | options

    def coins(length: int) -> bytes:
        raise AssertionError("somebody is sampled")

    with pytest.raises(UnsupportedEvent, match=text):
        summed(given.pop("model"), features, targets, given.pop("patients"), **given, entropy=coins)


def test_too_many_patients_for_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sum of all patients could be rounded, nothing is promised."""
    model, (features, targets) = make("linear"), data_for("linear")
    monkeypatch.setattr("dp.training.LARGEST", 2.0**20)
    with pytest.raises(UnsupportedEvent, match="6 patients, 26 coordinates"):
        summed(model, features, targets, PATIENTS)


def test_sites_that_share_noise_compute_the_pooled_gradient() -> None:
    """Three sites' encoded sums open to the clipped sum over all their patients, with the planned noise and no more:
    chi-square, false alarm 1e-6."""
    generator = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(200, 40)).double()
    features, targets = torch.randn(30, 200, generator=generator).double(), torch.zeros(30, 40).double()
    plan = plan_shared_noise(
        epsilon=4.0,
        delta=1e-5,
        steps=1,
        dimensions=8040,
        sites=3,
        dropouts=0,
        colluders=1,
        clip_norm=2.0,
        sampling_rate=1.0,
        expected_batch=10.0,
    )
    parts = []
    for site in range(3):
        own = slice(10 * site, 10 * site + 10)
        total = clipped_gradient_sum(
            model,
            squared,
            features[own],
            targets[own],
            patients=range(10),
            sampling_rate=1.0,
            clip_norm=plan.clip_norm,
            entropy=CountingEntropy(site),
        )
        parts.append(encode(total, plan, entropy=CountingEntropy(10 + site)))
    opened = decode(np.sum(parts, axis=0, dtype=np.uint64), plan)
    error = (opened - by_hand(model, features, targets, range(30), 2.0)) / plan.error_of_sum
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(error))
    assert low < np.sum(error**2) < high
