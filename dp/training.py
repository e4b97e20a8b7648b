"""DP-SGD through Opacus, with patients as the unit and noise from a CSPRNG.

Each step samples every patient with probability q by a secret coin, takes at most K of that patient's rows (images,
visits), a random K where there are more, averages the gradients of these rows, and clips that average to C.  The sum
over patients, plus Gaussian noise of deviation z C, is divided by the expected number of patients q n (Abadi et al.,
CCS 2016).  So a patient moves the sum by at most C, however many rows there are; with rows as the unit a patient
with many images would lose many times the epsilon that is accounted for.

Opacus gives a gradient for each row and drives the optimizer; sampling, clipping, noise, step count and empty batches
are decided here.  Clipping and summing are in double precision on the grid of ``dp.noise``, so that sums are exact:
they do not depend on the order of the patients or on how a batch was cut to fit into memory.

``clipped_gradient_sum`` is one such step without its noise, for sites that share noise (``dp.shared``).
"""

import math
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.gradients import Loss, forget_gradients, refuse_coupled, row_gradients
from dp.layers import refuse_layers
from dp.noise import LARGEST, GaussianNoise, csprng
from dp.shared import ClippedSum
from dp.views import Augmentation

BATCH_ROWS: Final = 256
PIECE: Final = 1 << 17  # numbers of double precision: 1 MiB, the fastest of 128 KiB to 4 MiB
SUM_GRID: Final = 2.0**-20  # of the clip norm per coordinate


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a site trains in one round: steps at a learning rate, and each patient's chance to be in a step."""

    steps: int
    learning_rate: float
    sampling_rate: float


class _Batch:
    """Whose the rows are that have gradients: so many rows of one patient, then so many of the next."""

    def __init__(self, rows_each: Sequence[int]) -> None:
        self._counts = torch.tensor(rows_each, dtype=torch.float64)
        self._owners = torch.from_numpy(np.repeat(np.arange(len(rows_each)), rows_each))

    def add_clipped(self, parameters: Sequence[Tensor], totals: Sequence[Tensor], *, most: float, grid: float) -> None:
        """Add each patient's mean gradient, clipped to ``most`` over all parameters together and rounded to the grid,
        to the flat ``totals`` of double precision, one for each parameter."""
        squares = torch.zeros(len(self._counts), dtype=torch.float64)
        for p in parameters:
            for _, piece in self._pieces(p):
                squares += torch.linalg.vector_norm(piece, dim=1).square().cpu()
        norms = squares.sqrt()
        # Stops one patient's values from turning the sum into NaN, which no clipping bounds.
        unfit = ~torch.isfinite(norms)
        in_steps = (most / norms).clamp(max=1.0) / grid
        for p, total in zip(parameters, totals, strict=True):
            for place, piece in self._pieces(p):
                steps = piece.mul_(in_steps.to(p.device).unsqueeze(1)).round_()
                if unfit.any():
                    steps[unfit.to(p.device)] = 0.0
                total[place] += steps.sum(dim=0) * grid

    def _pieces(self, p: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The mean gradient (patients, ...) of each patient's rows in fresh double precision, a few coordinates at a
        time, so that it stays in the processor's cache."""
        rows = vars(p)["grad_sample"].reshape(len(self._owners), p.numel())
        width = max(1, PIECE // max(1, len(rows)))
        for start in range(0, p.numel(), width):
            place = slice(start, start + width)
            piece = rows[:, place].to(torch.float64, copy=True)
            if len(self._owners) != len(self._counts):  # otherwise one row each
                summed = piece.new_zeros((len(self._counts), piece.shape[1]))
                piece = summed.index_add_(0, self._owners.to(p.device), piece)
                piece /= self._counts.to(p.device).unsqueeze(1)
            yield place, piece


class _PatientOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus has no types
    """Opacus' optimizer, with patients in place of rows, and our sums and noise in place of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, noise: GaussianNoise, **options: object) -> None:
        super().__init__(optimizer, **options)
        self._noise = noise
        self.take([])

    def take(self, rows_each: Sequence[int]) -> None:
        """How many rows of the next batch are each patient's, in their order."""
        self._batch = _Batch(rows_each)

    def clip_and_accumulate(self) -> None:
        """Add each patient's mean gradient, clipped and rounded to the grid, to ``summed_grad``."""
        for p in self.params:
            if p.summed_grad is None:
                p.summed_grad = torch.zeros_like(p, dtype=torch.float64, memory_format=torch.contiguous_format)
        totals = [p.summed_grad.view(-1) for p in self.params]
        self._batch.add_clipped(self.params, totals, most=self.max_grad_norm, grid=self._noise.grid)

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
    augmentation: Augmentation | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
) -> None:
    """Train ``model`` in place for the steps of ``event``, which must have been booked before.

    ``features`` and ``targets``: a row per image or visit; ``patients``: whose each row is; ``loss``: predictions and
    targets of some rows to the SUM of their losses; ``max_rows_per_patient``: K; ``max_batch_rows``: how many rows are
    in memory at once, which changes the time only; ``augmentation``: views of rows, which are rows of the same patient.
    A patient whose gradient is not finite contributes nothing to a step.  Raises UnsupportedEvent, before anything is
    sampled, for a plan that is not the booked event, numbers that are no bounds, a layer that mixes rows or that Opacus
    has no per-row gradient for, and a loss that couples rows.
    """
    if (plan.steps, plan.sampling_rate) != (event.steps, event.sampling_rate):
        raise UnsupportedEvent(
            f"training: {plan.steps} steps at sampling rate {plan.sampling_rate:.4g}, booked were {event.steps} at "
            f"{event.sampling_rate:.4g}"
        )
    rows_of_patient, views = _rows_of_patient(
        features,
        targets,
        patients,
        clip_norm=clip_norm,
        most=max_rows_per_patient,
        most_of_batch=max_batch_rows,
        augmentation=augmentation,
    )
    model.train()
    refuse_layers(model)
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
    with _with_row_gradients(model, loss, features, targets, most_rows=max_batch_rows) as wrapped:
        optimizer = _PatientOptimizer(
            torch.optim.SGD(trained, lr=plan.learning_rate),
            noise=noise,
            noise_multiplier=event.noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=event.sampling_rate * len(rows_of_patient),
        )
        for _ in range(event.steps):
            chosen = _sample(rows_of_patient, event.sampling_rate, max_rows_per_patient, coins, views)
            for batch, is_last in _batches(chosen, max_batch_rows):
                optimizer.zero_grad(set_to_none=True)  # keeps the sum of the step's batches before
                optimizer.take([len(rows) for rows in batch])
                _find_gradients(wrapped, loss, features, targets, batch, augmentation)
                optimizer.signal_skip_step(not is_last)
                optimizer.step()


def clipped_gradient_sum(
    model: nn.Module,
    loss: Loss,
    features: Tensor,
    targets: Tensor,
    *,
    patients: Sequence[Hashable],
    sampling_rate: float,
    clip_norm: float,
    max_rows_per_patient: int = 1,
    max_batch_rows: int = BATCH_ROWS,
    augmentation: Augmentation | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
) -> ClippedSum:
    """The sum (d,) over one Poisson sample of the patients, of each one's mean gradient clipped to ``clip_norm``; not
    noised, so for ``dp.shared.encode`` only, after it was booked.

    Coordinates are those of the trained parameters, in the model's order; the model stays as it is, in training mode.
    Arguments and errors are those of ``train_private``; ``sampling_rate``: each patient's chance q in (0, 1].  Sums are
    exact: gradients lie on a grid of a power of two, and are clipped to as much less as moving them there can add.
    """
    if not 0 < sampling_rate <= 1:
        raise UnsupportedEvent(f"training: found sampling rate {sampling_rate}, expected above 0 and at most 1")
    rows_of_patient, views = _rows_of_patient(
        features,
        targets,
        patients,
        clip_norm=clip_norm,
        most=max_rows_per_patient,
        most_of_batch=max_batch_rows,
        augmentation=augmentation,
    )
    model.train()
    refuse_layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dimensions = sum(parameter.numel() for parameter in trained)
    spacing = SUM_GRID * clip_norm / math.sqrt(max(1, dimensions))
    grid = math.ldexp(0.5, math.frexp(spacing)[1])
    if not (dimensions and 2.0**-900 < grid < 2.0**900 and len(rows_of_patient) * clip_norm <= LARGEST * grid):
        raise UnsupportedEvent(
            f"training: found {len(rows_of_patient)} patients, {dimensions} coordinates and clip norm {clip_norm:g}, "
            "expected some coordinates, and few enough of both that sums are exact in float64"
        )
    totals = [parameter.new_zeros(parameter.numel(), dtype=torch.float64) for parameter in trained]
    with _with_row_gradients(model, loss, features, targets, most_rows=max_batch_rows) as wrapped:
        chosen = _sample(rows_of_patient, sampling_rate, max_rows_per_patient, csprng(entropy), views)
        for batch, _ in _batches(chosen, max_batch_rows):
            _find_gradients(wrapped, loss, features, targets, batch, augmentation)
            owners = _Batch([len(rows) for rows in batch])
            owners.add_clipped(trained, totals, most=clip_norm * (1 - SUM_GRID), grid=grid)
    return ClippedSum(torch.cat([total.cpu() for total in totals]).numpy())


@contextmanager
def _with_row_gradients(
    model: nn.Module, loss: Loss, features: Tensor, targets: Tensor, *, most_rows: int
) -> Iterator[GradSampleModule]:
    """The model wrapped so that it finds a gradient for each row, and as it was afterwards; refuses coupled rows."""
    wrapped = GradSampleModule(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # torch tells that inputs need no gradients, which is so for data.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            refuse_coupled(wrapped, loss, features, targets, most_rows=most_rows)
            yield wrapped
    finally:
        forget_gradients(wrapped)
        for parameter in model.parameters():
            vars(parameter).pop("summed_grad", None)
        wrapped.to_standard_module()


def _find_gradients(
    wrapped: GradSampleModule,
    loss: Loss,
    features: Tensor,
    targets: Tensor,
    batch: Sequence[npt.NDArray[np.int64]],
    augmentation: Augmentation | None,
) -> None:
    """Leave in each trained parameter's ``grad_sample`` the gradients of these patients' rows, or of views of them."""
    if batch:
        rows = torch.from_numpy(np.concatenate(batch))
        inputs, labels = features[rows.to(features.device)], targets[rows.to(targets.device)]
        row_gradients(wrapped, loss, inputs if augmentation is None else augmentation.view(inputs, labels), labels)
    else:
        # An empty batch is a step like any other: it is noised and it counts.
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                vars(parameter)["grad_sample"] = parameter.new_zeros((0, *parameter.shape))


def _rows_of_patient(
    features: Tensor,
    targets: Tensor,
    patients: Sequence[Hashable],
    *,
    clip_norm: float,
    most: int,
    most_of_batch: int,
    augmentation: Augmentation | None,
) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64] | None]:
    """The rows of each patient, patients in the order in which they first appear, and how many views each row has, None
    for one each; UnsupportedEvent for numbers that are no bounds and data that does not fit together."""
    views = None if augmentation is None else augmentation.counts(targets)
    most_views = 1 if views is None else int(views.max(initial=1))
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise UnsupportedEvent(f"training: found clip norm {clip_norm}, expected a finite number above 0")
    if not 1 <= most <= most * most_views <= most_of_batch:
        raise UnsupportedEvent(
            f"training: found at most {most} rows of a patient and {most_of_batch} of a batch, "
            f"expected 1 or more of a patient, and with {most_views} views of each no more than of a batch, which a "
            "patient is never split over"
        )
    if not (len(patients) == len(features) == len(targets) > 0):
        raise UnsupportedEvent(
            f"training: found {len(features)} rows of features, {len(targets)} of targets and {len(patients)} "
            "patients' keys, expected as many of each, and some"
        )
    rows: dict[Hashable, list[int]] = {}
    for row, patient in enumerate(patients):
        rows.setdefault(patient, []).append(row)
    return [np.array(of_one, dtype=np.int64) for of_one in rows.values()], views


def _sample(
    rows_of_patient: list[npt.NDArray[np.int64]],
    rate: float,
    most: int,
    coins: np.random.Generator,
    views: npt.NDArray[np.int64] | None,
) -> list[npt.NDArray[np.int64]]:
    """A Poisson sample of the patients, and of each at most ``most`` rows, each set of so many equally likely; a row as
    often as it has ``views``."""
    present = np.flatnonzero(coins.random(len(rows_of_patient)) < rate).tolist()
    sampled = (rows_of_patient[patient] for patient in present)
    chosen = [rows if len(rows) <= most else coins.choice(rows, most, replace=False, shuffle=False) for rows in sampled]
    return chosen if views is None else [np.repeat(rows, views[rows]) for rows in chosen]


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
    augmentation: Augmentation | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
) -> None:
    """The same training without clipping and noise: no differential privacy.  A sampled row is seen in one view."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.learning_rate)
    coins = csprng(entropy)
    for _ in range(plan.steps):
        chosen = torch.from_numpy(coins.random(len(targets)) < plan.sampling_rate)
        optimizer.zero_grad()
        if chosen.any():
            inputs, labels = features[chosen], targets[chosen]
            summed = loss(model(inputs if augmentation is None else augmentation.view(inputs, labels)), labels)
            torch.autograd.backward(summed / (plan.sampling_rate * len(targets)))
            optimizer.step()
