"""DP-SGD through Opacus, with patients as the unit and noise from a CSPRNG.

Each step samples every patient with probability q by a secret coin, clips each sampled patient's gradient to C, adds
Gaussian noise of deviation z C to the sum, and divides by the expected batch size q n (Abadi et al., CCS 2016).  Opacus
gives per-example gradients and clips them; sampling, noise, step count and empty batches are decided here.
"""

import math
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.noise import GaussianNoise, csprng

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a site trains in one round: steps at a learning rate, and each patient's chance to be in a step."""

    steps: int
    learning_rate: float
    sampling_rate: float


class _CsprngOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus has no types
    """Opacus' optimizer with our noise in place of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, noise: GaussianNoise, **options: object) -> None:
        super().__init__(optimizer, **options)
        self._noise = noise

    def add_noise(self) -> None:
        """Add noise of deviation z C to each parameter's summed gradient, in double precision."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            drawn = torch.from_numpy(self._noise.draw(tuple(parameter.shape), deviation=deviation))
            summed = parameter.summed_grad.to(torch.float64).view_as(parameter)
            parameter.grad = (summed + drawn.to(summed.device)).to(parameter.dtype)


def train_private(
    model: nn.Module,
    loss: Loss,
    features: Tensor,
    targets: Tensor,
    *,
    patients: Sequence[Hashable],
    plan: Plan,
    event: PoissonSampledGaussian,
    clip_norm: float,
    entropy: Callable[[int], bytes] = os.urandom,
) -> None:
    """Train ``model`` in place for the steps of ``event``, which must have been booked before.

    ``features`` and ``targets``: a row per patient; ``patients``: a key per row; ``loss``: predictions and targets of
    a batch to the SUM of the patients' losses.  A patient whose gradient is not finite contributes nothing to a step.
    Raises UnsupportedEvent for a plan that is not the booked event, an unfit ``clip_norm``, several rows of one
    patient, and layers that mix patients.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise UnsupportedEvent(f"training: found clip norm {clip_norm}, expected a finite number above 0")
    if (plan.steps, plan.sampling_rate) != (event.steps, event.sampling_rate):
        raise UnsupportedEvent(
            f"training: {plan.steps} steps at sampling rate {plan.sampling_rate:.4g}, booked were {event.steps} at "
            f"{event.sampling_rate:.4g}"
        )
    # Stops several rows of one patient from each being clipped as if they were different people.
    if len(set(patients)) != len(patients):
        raise UnsupportedEvent(
            f"training: {len(patients)} rows of {len(set(patients))} patients, expected one row per patient; merge a "
            "patient's rows first"
        )
    model.train()
    errors = [str(error) for error in ModuleValidator.validate(model, strict=False)]
    # Opacus looks at layers with trainable parameters only; statistics over a batch mix patients without any.
    errors += [
        f"{type(module).__name__} keeps statistics over patients" for module in model.modules() if _mixes(module)
    ]
    if errors:
        raise UnsupportedEvent(
            f"model: {errors[0]}; every patient's gradient must depend on that patient alone, so use GroupNorm in "
            "place of BatchNorm"
        )
    wrapped = GradSampleModule(model, loss_reduction="sum")
    try:
        optimizer = _CsprngOptimizer(
            torch.optim.SGD(model.parameters(), lr=plan.learning_rate),
            noise=GaussianNoise(entropy),
            noise_multiplier=event.noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=event.sampling_rate * len(patients),
        )
        coins = csprng(entropy)
        for _ in range(event.steps):
            chosen = torch.from_numpy(coins.random(len(patients)) < event.sampling_rate)
            optimizer.zero_grad()
            if chosen.any():
                with warnings.catch_warnings():
                    # torch tells that inputs need no gradients, which is so for data.
                    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
                    torch.autograd.backward(loss(wrapped(features[chosen]), targets[chosen]))
                _leave_out_what_cannot_be_clipped(model)
            else:
                # An empty batch is a step like any other: it is noised and it counts.
                for parameter in model.parameters():
                    parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
            optimizer.step()
        optimizer.zero_grad()
    finally:
        wrapped.to_standard_module()


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "track_running_stats", False) is True


def _leave_out_what_cannot_be_clipped(model: nn.Module) -> None:
    """Zero the gradient of each sampled patient in whom any part of it is not finite."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    samples: list[Tensor] = [getattr(parameter, "grad_sample") for parameter in trained]  # noqa: B009  Opacus adds it
    finite = torch.stack([torch.isfinite(sample).flatten(start_dim=1).all(dim=1) for sample in samples]).all(dim=0)
    # Stops one patient's values from turning the sum into NaN, which no clipping bounds.
    for sample in samples:
        sample[~finite] = 0


def train_plain(
    model: nn.Module,
    loss: Loss,
    features: Tensor,
    targets: Tensor,
    *,
    plan: Plan,
    entropy: Callable[[int], bytes] = os.urandom,
) -> None:
    """The same training without clipping and noise: no differential privacy."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.learning_rate)
    coins = csprng(entropy)
    for _ in range(plan.steps):
        chosen = torch.from_numpy(coins.random(len(targets)) < plan.sampling_rate)
        optimizer.zero_grad()
        if chosen.any():
            summed = loss(model(features[chosen]), targets[chosen])
            torch.autograd.backward(summed / (plan.sampling_rate * len(targets)))
            optimizer.step()
