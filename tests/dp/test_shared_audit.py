"""The one-run audit of shared noise, from what the coordinator and a colluding site see.

The audited site holds the canaries.  In each round it, an honest site and a colluding one encode their clipped sums by
the real parts; the fourth site of the plan has dropped out, so that the sum has no more noise than was planned for.
What is scored is the decoded sum without the colluding site's part, which it tells the coordinator.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from dp.audit import AuditPlan, AuditResult, audit
from dp.integer_noise import IntegerNoise
from dp.shared import ClippedSum, SharedNoisePlan, decode, encode, plan_shared_noise
from dp.training import clipped_gradient_sum
from secureagg.testing import CountingEntropy

PATIENTS = 20
CLIP_NORM = 0.7
SITES = {"sites": 4, "dropouts": 1, "colluders": 1}
SMALL = AuditPlan(canaries=1200, canaries_per_training=100, guesses=200, rounds=8, steps=1)
FULL = AuditPlan(canaries=150_000, canaries_per_training=2_500, guesses=3_000, rounds=16, steps=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are small: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def squared(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of squared errors."""
    return ((predictions.squeeze(1) - targets) ** 2).sum()


def data() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model and the rows of the audited site's patients."""
    generator = torch.Generator().manual_seed(1)
    model = nn.utils.skip_init(nn.Linear, 4, 1)
    nn.init.zeros_(model.bias)
    nn.init.ones_(model.weight)
    return model, torch.randn(PATIENTS, 4, generator=generator), torch.randn(PATIENTS, generator=generator)


class Round:
    """What is audited in place of ``dp.training.train_private``: one round, as the coordinator sees it, moves the
    model.  ``same_key``: the three sites' noise comes from one key, so that a colluding site knows all of it."""

    def __init__(self, plan: SharedNoisePlan, *, same_key: bool = False) -> None:
        self.plan, self.same_key, self.rounds = plan, same_key, 0

    def __call__(self, model, loss, features, targets, *, patients, plan, event, clip_norm, entropy) -> None:
        """One step with the shared noise; what Gaussian noise would have cost does not matter."""
        assert (plan.steps, plan.sampling_rate) == (event.steps, self.plan.sampling_rates[0]) == (1, 0.5)
        self.rounds += 1
        audited = clipped_gradient_sum(
            model,
            loss,
            features,
            targets,
            patients=patients,
            sampling_rate=plan.sampling_rate,
            clip_norm=clip_norm,
            entropy=entropy,
        )
        nothing = ClippedSum(np.zeros(self.plan.dimensions))
        parts = []
        for site, total in (("audited", audited), ("honest", nothing), ("colluding", nothing)):
            key = CountingEntropy(f"one key {self.rounds}".encode()) if self.same_key else entropy
            parts.append(encode(total, self.plan, entropy=key))
            assert site
        opened = np.sum(parts, axis=0, dtype=np.uint64)
        known = parts[-1] * np.uint64(3 if self.same_key else 1)
        view = decode(opened - known, self.plan)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(trained) - torch.from_numpy(plan.learning_rate * view).float(), trained
        )


def shared_noise(plan: AuditPlan, **changes: object) -> SharedNoisePlan:
    """The noise that sites share for what the audit runs: the model's five numbers, and one for each canary."""
    return plan_shared_noise(
        **{
            "epsilon": plan.epsilon,
            "delta": plan.delta,
            "steps": plan.rounds,
            "dimensions": 5 + plan.canaries_per_training,
            **SITES,
            "clip_norm": CLIP_NORM,
            "sampling_rate": plan.sampling_rate,
            "expected_batch": 10.0,
            "coordinate_clip": 10 * CLIP_NORM,
            **changes,
        }
    )


def audited(plan: AuditPlan = SMALL, *, seed: int = 0, same_key: bool = False) -> tuple[AuditResult, float]:
    """The audit of shared noise, and the epsilon that is claimed against the coordinator with a colluding site."""
    model, features, targets = data()
    noise = shared_noise(plan)
    result = audit(
        Round(noise, same_key=same_key),
        model,
        squared,
        features,
        targets,
        patients=range(PATIENTS),
        plan=plan,
        clip_norm=CLIP_NORM,
        learning_rate=0.3,
        entropy=CountingEntropy(seed),
    )
    claimed = max(noise.epsilons("coordinator"))
    assert 0.97 * plan.epsilon < claimed <= plan.epsilon
    return result, claimed


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """No site adds noise."""
    monkeypatch.setattr(IntegerNoise, "draw", lambda _, count: np.zeros(count, np.int64))


def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site's noise has half of its deviation."""
    original = IntegerNoise.__init__
    monkeypatch.setattr(
        IntegerNoise,
        "__init__",
        lambda self, *, deviation, **options: original(self, deviation=deviation / 2, **options),
    )


@pytest.mark.parametrize("seed", range(3))
def test_shared_noise_stands(seed: int) -> None:
    """Against the coordinator and a colluding site, the bound is below the claimed epsilon in every seed.

    Even the theorem allows no more than 1 failure in 20.
    """
    result, claimed = audited(seed=seed)
    assert result.epsilon_lower_bound < 0.8 * claimed


def test_noise_that_all_sites_leave_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sites' noise the claim is contradicted by far: rounding alone hides nothing."""
    without_noise(monkeypatch)
    result, claimed = audited()
    assert result.epsilon_lower_bound > 2 * claimed


def test_sites_with_one_key_are_caught() -> None:
    """Where all sites draw from the same key, a colluding site subtracts everybody's noise, and the claim falls."""
    result, claimed = audited(same_key=True)
    assert result.epsilon_lower_bound > 2 * claimed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_shared_noise_stands_at_full_size(seed: int) -> None:
    """With 150,000 canaries the bound is still below the claimed epsilon."""
    result, claimed = audited(FULL, seed=seed)
    assert result.epsilon_lower_bound <= claimed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("breaking", [without_noise, halved])
def test_broken_shared_noise_is_caught_at_full_size(breaking, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 150,000 canaries even noise of half the deviation at all sites is caught."""
    breaking(monkeypatch)
    result, claimed = audited(FULL)
    assert result.epsilon_lower_bound > claimed
