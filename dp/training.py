"""DP-SGD through Opacus, with patients as the unit and noise from a CSPRNG.

Each step samples every patient with probability q by a secret coin, takes at most K of that patient's rows (images,
visits), a random K where there are more, averages the gradients of these rows, and clips that average to C.  The sum
over patients, plus Gaussian noise of deviation z C, is divided by the expected number of patients q n (Abadi et al.,
CCS 2016).  So a patient moves the sum by at most C, however many rows there are; with rows as the unit a patient
with many images would lose many times the epsilon that is accounted for.

Opacus gives a gradient for each row and drives the optimizer; sampling, clipping, noise, step count and empty batches
are decided here.  Clipping and summing are in double precision on the grid of ``dp.noise``, so that sums are exact:
they do not depend on the order of the patients or on how a batch was cut to fit into memory.
"""

import math
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.gradients import Loss, forget_gradients, refuse_coupled, row_gradients
from dp.noise import GaussianNoise, csprng

BATCH_ROWS: Final = 256
PIECE: Final = 1 << 16  # numbers of double precision: 512 KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a site trains in one round: steps at a learning rate, and each patient's chance to be in a step."""

    steps: int
    learning_rate: float
    sampling_rate: float


class _PatientOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus has no types
    """Opacus' optimizer, with patients in place of rows, and our sums and noise in place of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, noise: GaussianNoise, **options: object) -> None:
        super().__init__(optimizer, **options)
        self._noise = noise
        self.take([])

    def take(self, rows_each: Sequence[int]) -> None:
        """How many rows of the next batch are each patient's, in their order."""
        self._counts = torch.tensor(rows_each, dtype=torch.int64)
        self._owners = torch.from_numpy(np.repeat(np.arange(len(rows_each)), rows_each))

    def clip_and_accumulate(self) -> None:
        """Add each patient's mean gradient, clipped and rounded to the grid, to ``summed_grad``."""
        squares = torch.zeros(len(self._counts), dtype=torch.float64)
        for p in self.params:
            for _, piece in self._pieces(p):
                squares += torch.linalg.vector_norm(piece, dim=1).square().cpu()
        norms = squares.sqrt()
        # Stops one patient's values from turning the sum into NaN, which no clipping bounds.
        unfit = ~torch.isfinite(norms)
        in_steps = (self.max_grad_norm / norms).clamp(max=1.0) / self._noise.grid
        for p in self.params:
            if p.summed_grad is None:
                p.summed_grad = torch.zeros_like(p, dtype=torch.float64, memory_format=torch.contiguous_format)
            total = p.summed_grad.view(-1)
            for place, piece in self._pieces(p):
                steps = piece.mul_(in_steps.to(p.device).unsqueeze(1)).round_()
                if unfit.any():
                    steps[unfit.to(p.device)] = 0.0
                total[place] += steps.sum(dim=0) * self._noise.grid

    def _pieces(self, p: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The mean gradient (patients, ...) of each patient's rows in fresh double precision, a few coordinates at a
        time, so that it stays in the processor's cache."""
        rows = self._get_flat_grad_sample(p).reshape(len(self._owners), p.numel())
        width = max(1, PIECE // max(1, len(rows)))
        for start in range(0, p.numel(), width):
            place = slice(start, start + width)
            piece = rows[:, place].to(torch.float64, copy=True)
            if len(self._owners) != len(self._counts):  # otherwise one row each
                summed = piece.new_zeros((len(self._counts), piece.shape[1]))
                piece = summed.index_add_(0, self._owners.to(p.device), piece)
                piece /= self._counts.to(p.device).unsqueeze(1)
            yield place, piece

    def add_noise(self) -> None:
        """Release each parameter's sum."""
        for p in self.params:
            released = torch.from_numpy(self._noise.release(p.summed_grad.cpu().numpy()))
            p.grad = released.to(p.device, p.dtype).view_as(p)


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
    max_rows_per_patient: int = 1,
    max_batch_rows: int = BATCH_ROWS,
    entropy: Callable[[int], bytes] = os.urandom,
) -> None:
    """Train ``model`` in place for the steps of ``event``, which must have been booked before.

    ``features`` and ``targets``: a row per image or visit; ``patients``: whose each row is; ``loss``: predictions and
    targets of some rows to the SUM of their losses; ``max_rows_per_patient``: K; ``max_batch_rows``: how many rows are
    in memory at once, which changes the time only.  A patient whose gradient is not finite contributes nothing to a
    step.  Raises UnsupportedEvent, before anything is sampled, for a plan that is not the booked event, numbers that
    are no bounds, a layer that mixes rows or that Opacus has no per-row gradient for, and a loss that couples rows.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise UnsupportedEvent(f"training: found clip norm {clip_norm}, expected a finite number above 0")
    if (plan.steps, plan.sampling_rate) != (event.steps, event.sampling_rate):
        raise UnsupportedEvent(
            f"training: {plan.steps} steps at sampling rate {plan.sampling_rate:.4g}, booked were {event.steps} at "
            f"{event.sampling_rate:.4g}"
        )
    if not 1 <= max_rows_per_patient <= max_batch_rows:
        raise UnsupportedEvent(
            f"training: found at most {max_rows_per_patient} rows of a patient and {max_batch_rows} of a batch, "
            "expected 1 or more of a patient, and no more than of a batch, which a patient is never split over"
        )
    if not (len(patients) == len(features) == len(targets) > 0):
        raise UnsupportedEvent(
            f"training: found {len(features)} rows of features, {len(targets)} of targets and {len(patients)} "
            "patients' keys, expected as many of each, and some"
        )
    model.train()
    _refuse_layers(model)
    rows_of_patient = _rows_of_patient(patients)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    noise = GaussianNoise(
        clip_norm=clip_norm,
        noise_multiplier=event.noise_multiplier,
        dimensions=sum(parameter.numel() for parameter in trained),
        entropy=entropy,
    )
    if len(rows_of_patient) * clip_norm > noise.largest_sum / 2:
        raise UnsupportedEvent(
            f"training: found {len(rows_of_patient)} patients at clip norm {clip_norm:g} and noise multiplier "
            f"{event.noise_multiplier:g}, expected more noise or fewer patients, so that sums are exact in float64"
        )
    coins = csprng(entropy)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # torch tells that inputs need no gradients, which is so for data.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            refuse_coupled(wrapped, loss, features, targets, most_rows=max_batch_rows)
            optimizer = _PatientOptimizer(
                torch.optim.SGD(trained, lr=plan.learning_rate),
                noise=noise,
                noise_multiplier=event.noise_multiplier,
                max_grad_norm=clip_norm,
                expected_batch_size=event.sampling_rate * len(rows_of_patient),
            )
            for _ in range(event.steps):
                chosen = _sample(rows_of_patient, event.sampling_rate, max_rows_per_patient, coins)
                for batch, is_last in _batches(chosen, max_batch_rows):
                    optimizer.zero_grad(set_to_none=True)  # keeps the sum of the step's batches before
                    optimizer.take([len(rows) for rows in batch])
                    if batch:
                        rows = torch.from_numpy(np.concatenate(batch))
                        row_gradients(
                            wrapped, loss, features[rows.to(features.device)], targets[rows.to(targets.device)]
                        )
                    else:
                        # An empty batch is a step like any other: it is noised and it counts.
                        for parameter in trained:
                            vars(parameter)["grad_sample"] = parameter.new_zeros((0, *parameter.shape))
                    optimizer.signal_skip_step(not is_last)
                    optimizer.step()
    finally:
        forget_gradients(wrapped)
        for parameter in trained:
            vars(parameter).pop("summed_grad", None)
        wrapped.to_standard_module()


def _refuse_layers(model: nn.Module) -> None:
    """Raise UnsupportedEvent for a layer that mixes patients, or whose gradients of rows Opacus cannot know."""
    # Opacus looks at layers with trainable parameters only; statistics over a batch mix patients without any.
    errors = [f"{type(module).__name__} keeps statistics over patients" for module in model.modules() if _mixes(module)]
    if errors:
        raise UnsupportedEvent(
            f"model: {errors[0]}; every patient's gradient must depend on that patient alone, so use GroupNorm in "
            "place of BatchNorm"
        )
    unsupported = [*ModuleValidator.validate(model, strict=False), *GradSampleModule.validate(model, strict=False)]
    if unsupported:
        raise UnsupportedEvent(
            f"model: {unsupported[0]}; use opacus.layers.DPLSTM in place of nn.LSTM (DPGRU, DPMultiheadAttention "
            "likewise), or let opacus.validators.ModuleValidator.fix replace the layer"
        )


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "track_running_stats", False) is True


def _rows_of_patient(patients: Sequence[Hashable]) -> list[npt.NDArray[np.int64]]:
    """The rows of each patient, patients in the order in which they first appear."""
    rows: dict[Hashable, list[int]] = {}
    for row, patient in enumerate(patients):
        rows.setdefault(patient, []).append(row)
    return [np.array(of_one, dtype=np.int64) for of_one in rows.values()]


def _sample(
    rows_of_patient: list[npt.NDArray[np.int64]], rate: float, most: int, coins: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """A Poisson sample of the patients, and of each at most ``most`` rows, each set of so many equally likely."""
    present = np.flatnonzero(coins.random(len(rows_of_patient)) < rate).tolist()
    sampled = (rows_of_patient[patient] for patient in present)
    return [rows if len(rows) <= most else coins.choice(rows, most, replace=False, shuffle=False) for rows in sampled]


def _batches(
    chosen: Sequence[npt.NDArray[np.int64]], most_rows: int
) -> Iterator[tuple[Sequence[npt.NDArray[np.int64]], bool]]:
    """The patients' rows in batches of at most ``most_rows``, no patient split, and whether it is the last; one empty
    batch for nobody."""
    start = 0
    while True:
        rows = 0
        end = next(
            (at for at in range(start, len(chosen)) if (rows := rows + len(chosen[at])) > most_rows), len(chosen)
        )
        yield chosen[start:end], end == len(chosen)
        if end == len(chosen):
            return
        start = end


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
