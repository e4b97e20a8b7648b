"""Discrete-time hazards: the likelihood by hand, no coupling, and training on simulated follow-up."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.survival import hazard_loss, survival_curves, survival_targets
from dp.training import Plan, train_private
from secureagg.testing import CountingEntropy

ENDS = torch.tensor([1.0, 2.0, 4.0])


def test_targets_by_hand() -> None:
    """A time belongs to the interval that it lies in, one at an end to the next; after the last end nothing is an
    event."""
    times = torch.tensor([0.0, 0.5, 1.0, 3.9, 4.0, 9.0])
    targets = survival_targets(times, torch.tensor([1, 0, 1, 1, 1, 0]), ends=ENDS)
    assert targets.tolist() == [[0, 1], [0, 0], [1, 1], [2, 1], [3, 0], [3, 0]]


@pytest.mark.parametrize(
    ("target", "likelihood"),
    [
        ((0, 1), 0.1),
        ((1, 1), 0.9 * 0.2),
        ((2, 1), 0.9 * 0.8 * 0.3),
        ((0, 0), 1.0),
        ((1, 0), 0.9),
        ((2, 0), 0.9 * 0.8),
        ((3, 0), 0.9 * 0.8 * 0.7),
    ],
)
def test_likelihood_by_hand(target: tuple[int, int], likelihood: float) -> None:
    """With hazards 0.1, 0.2, 0.3 the loss is minus the log of the chance to see just this follow-up."""
    logits = torch.logit(torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64))
    assert float(hazard_loss(logits, torch.tensor([target]))) == pytest.approx(-math.log(likelihood), abs=1e-12)


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_chances_of_all_ends_add_up_to_one(logits: list[float]) -> None:
    """An event in one of the intervals or survival of them all: the likelihoods add up to 1."""
    predictions = torch.tensor([logits], dtype=torch.float64)
    ends = [(interval, 1) for interval in range(len(logits))] + [(len(logits), 0)]
    chances = [math.exp(-float(hazard_loss(predictions, torch.tensor([end])))) for end in ends]
    assert sum(chances) == pytest.approx(1, abs=1e-12)
    assert float(survival_curves(predictions)[0, -1]) == pytest.approx(chances[-1], abs=1e-12)


def test_the_loss_is_a_sum_over_patients() -> None:
    """Together the loss of patients is the sum of their losses alone, and of nobody 0."""
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.tensor([[0, 1], [1, 1], [2, 1], [0, 0], [1, 0], [2, 0], [3, 0], [3, 0], [1, 1]])
    alone = sum(float(hazard_loss(logits[i : i + 1], targets[i : i + 1])) for i in range(9))
    assert float(hazard_loss(logits, targets)) == pytest.approx(alone, abs=1e-12)
    assert float(hazard_loss(logits[:0], targets[:0])) == 0


def test_extreme_logits_stay_finite() -> None:
    """Hazards next to 0 and 1 give a finite loss and gradients."""
    logits = torch.tensor([[90.0, -90.0, 90.0], [-90.0, 90.0, -90.0]], requires_grad=True)
    loss = hazard_loss(logits, torch.tensor([[2, 1], [3, 0]]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("times", "events", "ends", "match"),
    [
        ([1.0], [1], [], "intervals: found ends"),
        ([1.0], [1], [2.0, 2.0], "intervals: found ends"),
        ([1.0], [1], [0.0, 2.0], "intervals: found ends"),
        ([1.0, 2.0], [1], [2.0], "one of each per row"),
        ([-1.0], [1], [2.0], "negative or not finite"),
        ([float("nan")], [1], [2.0], "negative or not finite"),
    ],
)
def test_follow_up_that_makes_no_sense_is_refused(times, events, ends, match: str) -> None:
    """Intervals that do not ascend from above 0, times that are none, and lists of unequal length are refused."""
    with pytest.raises(UnsupportedEvent, match=match):
        survival_targets(torch.tensor(times), torch.tensor(events), ends=torch.tensor(ends))


def simulated(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, times and events: exponential survival, its log rate linear in the features, half of it censored."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(rows, 5))
    time = random.exponential(np.exp(-features @ np.array([1.0, -0.8, 0.5, 0.0, 0.0])))
    censoring = random.exponential(1.0, size=rows)
    observed = np.minimum(time, censoring)
    return torch.from_numpy(features).float(), torch.from_numpy(observed), torch.from_numpy(time <= censoring)


def concordance(risk: np.ndarray, times: np.ndarray, events: np.ndarray) -> float:
    """Of the pairs whose order is known, the share in which the one with the earlier event has the higher risk."""
    known = events[:, None] & (times[:, None] < times[None, :])
    higher = (risk[:, None] > risk[None, :]) + 0.5 * (risk[:, None] == risk[None, :])
    return float((higher * known).sum() / known.sum())


@pytest.mark.parametrize(("noise", "least"), [(1e-6, 0.77), (3.0, 0.75)])
def test_private_training_learns_to_rank(noise: float, least: float) -> None:
    """On simulated follow-up, a model trained from zero weights ranks new patients nearly as well as the true risk,
    which reaches 0.79, without noise and with it."""
    features, times, events = simulated(600, 1)
    ends = torch.quantile(times, torch.tensor([0.15, 0.3, 0.5, 0.7, 0.9], dtype=times.dtype))
    model = nn.Linear(5, len(ends))
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    train_private(
        model,
        hazard_loss,
        features,
        survival_targets(times, events, ends=ends),
        patients=range(600),
        plan=Plan(steps=60, learning_rate=1.0, sampling_rate=0.5),
        event=PoissonSampledGaussian(sampling_rate=0.5, noise_multiplier=noise, steps=60),
        clip_norm=1.0,
        entropy=CountingEntropy(1),
    )
    new, new_times, new_events = simulated(600, 2)
    with torch.no_grad():
        curves = survival_curves(model(new))
    assert (curves.diff(dim=1) <= 0).all()
    risk = -curves.sum(dim=1).numpy()
    assert concordance(risk, new_times.numpy(), new_events.numpy()) > least
    best = concordance((new.numpy() @ np.array([1.0, -0.8, 0.5, 0, 0])), new_times.numpy(), new_events.numpy())
    assert best == pytest.approx(0.79, abs=0.01)
