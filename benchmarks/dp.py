"""What a step of patient-level DP-SGD costs, beside plain Opacus and plain PyTorch on batches of as many rows.

All on one thread, in processor time, by turns.  PyTorch makes ordinary SGD steps.  Opacus' GradSampleModule and
DPOptimizer are given rows that were sampled before, in the batches that ours has on average, without the data loader
that its PrivacyEngine puts around them; its secure mode draws noise from a CSPRNG, as ours always does.  Ours is
``dp.training.train_private`` whole: secret sampling of patients, clipping by patient in double precision, noise.  What
it does once before the first step (probing the loss for coupled rows, and the like) is not part of a step; it is in
"the first step and all before it".
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from benchmarks.record import Figure, Record, ratios
from benchmarks.turns import by_turns
from dp.events import PoissonSampledGaussian
from dp.training import Plan, clipped_gradient_sum, train_private
from sites.models import filter_bank, small_cnn

PATIENTS, BATCH = 2000, 128  # rows in a batch
SIZE = 64
CLIP_NORM, NOISE_MULTIPLIER, LEARNING_RATE = 1.0, 1.0, 0.1
MODELS: dict[str, Callable[[], nn.Module]] = {
    "filter bank": lambda: filter_bank(1, 2, 1),
    "small CNN": lambda: small_cnn(1, 2, 1),
    "CNN of width 64": lambda: small_cnn(1, 2, 1, width=64),
}


def summed_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """The sum over rows of the logistic loss."""
    return nn.functional.binary_cross_entropy_with_logits(predictions.squeeze(1), targets, reduction="sum")


class Steps:
    """Steps of each way on random images, ``rows`` of them of each patient."""

    def __init__(self, model: str, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._features = torch.randn(PATIENTS, 1, SIZE, SIZE, generator=generator)
        self._targets = torch.randint(0, 2, (PATIENTS,), generator=generator).float()
        self._patients = np.repeat(np.arange(PATIENTS // rows + 1), rows)[:PATIENTS].tolist()
        self._rows, self._make = rows, MODELS[model]

    def _batches(self, steps: int) -> list[Tensor]:
        drawn = np.random.default_rng(1).random((steps, PATIENTS)) < BATCH / PATIENTS
        return [torch.from_numpy(np.flatnonzero(each)) for each in drawn]

    def pytorch(self, steps: int) -> None:
        """Ordinary steps."""
        model = self._make().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        for rows in self._batches(steps):
            optimizer.zero_grad()
            (summed_loss(model(self._features[rows]), self._targets[rows]) / BATCH).backward()
            optimizer.step()

    def opacus(self, steps: int, *, secure: bool = False) -> None:
        """Rows as the unit."""
        model = GradSampleModule(self._make().train(), loss_reduction="sum")
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=CLIP_NORM,
            expected_batch_size=BATCH,
            secure_mode=secure,
        )
        with warnings.catch_warnings():
            # torch tells that inputs need no gradients, which is so for data.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            for rows in self._batches(steps):
                optimizer.zero_grad()
                summed_loss(model(self._features[rows]), self._targets[rows]).backward()
                optimizer.step()

    def ours(self, steps: int) -> None:
        """Patients as the unit."""
        rate = BATCH / PATIENTS
        train_private(
            self._make(),
            summed_loss,
            self._features,
            self._targets,
            patients=self._patients,
            plan=Plan(steps=steps, learning_rate=LEARNING_RATE, sampling_rate=rate),
            event=PoissonSampledGaussian(noise_multiplier=NOISE_MULTIPLIER, sampling_rate=rate, steps=steps),
            clip_norm=CLIP_NORM,
            max_rows_per_patient=self._rows,
        )

    def shared(self) -> None:
        """A site's part of one step in the mode "shared", all of it."""
        clipped_gradient_sum(
            self._make(),
            summed_loss,
            self._features,
            self._targets,
            patients=self._patients,
            sampling_rate=BATCH / PATIENTS,
            clip_norm=CLIP_NORM,
            max_rows_per_patient=self._rows,
        )


def compared(model: str, rows: int, *, steps: int, repeats: int) -> list[Figure]:
    """A step of each way, by the difference between ``steps + 1`` steps and one."""
    made = Steps(model, rows)
    ways: dict[str, Callable[[int], None]] = {
        "PyTorch": made.pytorch,
        "Opacus": made.opacus,
        "Opacus, secure mode": lambda count: made.opacus(count, secure=True),
        "ours": made.ours,
    }
    functions: dict[str, Callable[[], object]] = {"shared": made.shared}
    for name, way in ways.items():
        functions |= {f"{name}, one": lambda way=way: way(1), f"{name}, more": lambda way=way: way(steps + 1)}
    times = by_turns(repeats, functions, clock=time.process_time)
    step = {
        name: [(more - one) / steps for more, one in zip(times[f"{name}, more"], times[f"{name}, one"], strict=True)]
        for name in ways
    }
    at = {"model": model, "rows per patient": rows}
    figures = [Figure(f"{name}, a step", [1000 * each for each in step[name]], "ms", at=at) for name in ways]
    return [
        *figures,
        Figure("ours / Opacus", ratios(step["ours"], step["Opacus"]), wanted="<= 1.15", at=at),
        Figure("ours / Opacus, secure mode", ratios(step["ours"], step["Opacus, secure mode"]), at=at),
        Figure("ours / PyTorch", ratios(step["ours"], step["PyTorch"]), at=at),
        Figure("ours, the first step and all before it", [1000 * each for each in times["ours, one"]], "ms", at=at),
        Figure("mode shared, a site's whole step", [1000 * each for each in times["shared"]], "ms", at=at),
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    """In which torch uses one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def measure(*, full: bool) -> Record:
    """Each model, with one row of each patient and with three."""
    cases = [("small CNN", 1), ("small CNN", 3)]
    if full:
        cases += [("filter bank", 1), ("filter bank", 3), ("CNN of width 64", 3)]
    figures = [
        figure
        for model, rows in cases
        for figure in compared(model, rows, steps=8 if full else 5, repeats=7 if full else 3)
    ]
    title = f"DP-SGD on images of {SIZE} x {SIZE} pixels, {BATCH} rows in a batch, one thread"
    return Record("dp", title, figures, full)
