"""DP-SGD with patients as the unit."""

import numpy as np
import pytest
import torch
from torch import nn

from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.training import Plan, train_plain, train_private
from secureagg.testing import CountingEntropy

PATIENTS, FEATURES = 40, 6
RATE, CLIP = 0.25, 0.5
ALMOST_NONE = 1e-12  # of noise: as good as none, and still an event


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and 0/1 targets."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(PATIENTS, FEATURES, generator=generator) * 3
    return features, (torch.rand(PATIENTS, generator=generator) < 0.5).float()


def model() -> nn.Module:
    """Logistic regression from zero."""
    linear = nn.Linear(FEATURES, 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed logistic loss."""
    return nn.functional.binary_cross_entropy_with_logits(logits.squeeze(1), targets, reduction="sum")


def flat(module: nn.Module) -> np.ndarray:
    """All parameters as one vector."""
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in module.parameters()])


def train(
    features: torch.Tensor,
    targets: torch.Tensor,
    *,
    q: float = 1.0,
    z: float = ALMOST_NONE,
    steps: int = 1,
    module: nn.Module | None = None,
    **options: object,
) -> np.ndarray:
    """Train from zero and return how far the parameters moved."""
    module = module or model()
    before = flat(module)
    arguments = {
        "patients": range(len(targets)),
        "plan": Plan(steps=steps, learning_rate=RATE, sampling_rate=q),
        "event": PoissonSampledGaussian(sampling_rate=q, noise_multiplier=z, steps=steps),
        "clip_norm": CLIP,
        **options,
    }
    train_private(module, loss, features, targets, **arguments)  # type: ignore[arg-type]
    return flat(module) - before


def clipped_gradients(features: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Each patient's gradient at zero weights, clipped to CLIP: (0.5 - y) (x, 1), by hand."""
    rows = (0.5 - targets.numpy())[:, None] * np.c_[features.numpy(), np.ones(len(targets))]
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.minimum(1, CLIP / norms)


def test_a_step_is_the_sum_of_clipped_gradients() -> None:
    """Without noise and with everybody in the batch, a step is the hand-computed one."""
    features, targets = data()
    assert (np.linalg.norm(np.c_[features, np.ones(PATIENTS)], axis=1) / 2 > CLIP).sum() > 10  # clipping matters
    expected = -RATE * clipped_gradients(features, targets).sum(axis=0) / PATIENTS
    np.testing.assert_allclose(train(features, targets), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("patient", [0, 7, 39])
def test_one_patient_moves_a_step_by_a_bounded_amount(patient: int) -> None:
    """Whatever one patient's values are, exchanging them moves a step by at most 2 x rate x clip / expected batch."""
    features, targets = data()
    extreme = features.clone()
    extreme[patient] = 1e4
    moved = np.linalg.norm(train(features, targets) - train(extreme, targets))
    assert moved <= 2 * RATE * CLIP / PATIENTS * 1.001


@pytest.mark.parametrize(("q", "z"), [(1.0, 2.0), (0.5, 8.0)])
def test_noise_has_the_booked_scale(q: float, z: float) -> None:
    """With zero gradients only the noise moves the parameters: its deviation is rate x z x clip / (q n).

    7,000 fixed draws; 6 standard errors have a false-alarm probability below 1e-8.
    """
    features, targets = torch.zeros(PATIENTS, 999), torch.full((PATIENTS,), 0.5)
    module = nn.Linear(999, 7)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)

    def nothing(logits: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
        return (logits * 0).sum()

    before = flat(module)
    train_private(
        module,
        nothing,
        features,
        targets,
        patients=range(PATIENTS),
        plan=Plan(steps=1, learning_rate=RATE, sampling_rate=q),
        event=PoissonSampledGaussian(sampling_rate=q, noise_multiplier=z, steps=1),
        clip_norm=CLIP,
        entropy=CountingEntropy(1),
    )
    moved = flat(module) - before
    expected = RATE * z * CLIP / (q * PATIENTS)
    assert moved.std() == pytest.approx(expected, rel=6 / np.sqrt(2 * moved.size))


def test_an_empty_batch_is_noised_too() -> None:
    """A step that samples nobody adds noise like any other: its absence would tell that nobody was there."""
    features, targets = data()
    moved = train(features, targets, q=1e-12, z=1e-12)  # the expected batch is as small as the noise
    assert (moved != 0).all()


def test_seeds_do_not_repeat_a_training() -> None:
    """Sampling and noise do not come from torch's generator: the same seed gives two different results."""
    features, targets = data()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(train(features, targets, q=0.5, z=1.0, steps=3))
    assert not (results[0] == results[1]).any()


def test_entropy_repeats_a_training() -> None:
    """With injected entropy a training can be repeated exactly."""
    features, targets = data()
    one, other = (train(features, targets, q=0.5, z=1.0, steps=3, entropy=CountingEntropy(2)) for _ in range(2))
    assert (one == other).all()


def test_sampling_takes_each_patient_with_the_booked_rate() -> None:
    """Over 400 steps each patient is in a fifth of the batches, within 6 standard deviations (below 1e-7 for all)."""
    steps, seen = 400, np.zeros(PATIENTS)

    def watching(logits: torch.Tensor, who: torch.Tensor) -> torch.Tensor:
        seen[who.long().numpy()] += 1
        return logits.sum()

    train_private(
        model(),
        watching,
        data()[0],
        torch.arange(PATIENTS).float(),
        patients=range(PATIENTS),
        plan=Plan(steps=steps, learning_rate=RATE, sampling_rate=0.2),
        event=PoissonSampledGaussian(sampling_rate=0.2, noise_multiplier=1.0, steps=steps),
        clip_norm=CLIP,
        entropy=CountingEntropy(5),
    )
    assert (np.abs(seen - 0.2 * steps) < 6 * np.sqrt(steps * 0.16)).all()
    assert seen.std() > 0


def test_several_rows_of_one_patient_are_refused() -> None:
    """Two rows with one patient's key would be protected as two people: refused, with both numbers."""
    features, targets = data()
    with pytest.raises(UnsupportedEvent, match="40 rows of 39 patients, expected one row per patient"):
        train(features, targets, patients=[*range(39), 0])


def test_layers_that_mix_patients_are_refused() -> None:
    """A model with BatchNorm has no per-patient gradient: refused, with a way out."""
    features, targets = data()
    mixed = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.raises(UnsupportedEvent, match="GroupNorm in place of BatchNorm"):
        train(features, targets, module=mixed)


@pytest.mark.parametrize("plan", [{"steps": 2, "sampling_rate": 1.0}, {"steps": 1, "sampling_rate": 0.9}])
def test_only_what_was_booked_is_trained(plan: dict[str, float]) -> None:
    """More steps or another sampling rate than the booked ones are refused, and nothing is trained."""
    features, targets = data()
    module = model()
    with pytest.raises(UnsupportedEvent, match="booked were 1 at 1"):
        train(features, targets, module=module, plan=Plan(learning_rate=RATE, **plan))
    assert not flat(module).any()


def test_the_model_is_as_usable_as_before() -> None:
    """After private training the model has its own names, no hooks, and trains and predicts as usual."""
    features, targets = data()
    module = model()
    names = list(module.state_dict())
    train(features, targets, module=module, z=1.0)
    assert list(module.state_dict()) == names
    assert not module._forward_hooks
    assert not module._backward_hooks
    loss(module(features), targets).backward()
    assert module.weight.grad is not None
    train(features, targets, module=module, z=1.0)


def test_plain_training_is_sgd() -> None:
    """Without privacy and with everybody in the batch, a step is that of gradient descent on the mean loss."""
    features, targets = data()
    module, reference = model(), model()
    train_plain(module, loss, features, targets, plan=Plan(steps=1, learning_rate=RATE, sampling_rate=1.0))
    (loss(reference(features), targets) / PATIENTS).backward()
    expected = -RATE * np.concatenate([parameter.grad.numpy().ravel() for parameter in reference.parameters()])
    np.testing.assert_allclose(flat(module), expected, rtol=1e-5, atol=1e-8)
