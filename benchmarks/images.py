"""Choosing hyper-parameters of the X-rays' network on validation images: several runs side by side.

Every image has the weights of its run for itself, so that the derivative by them is that image's own gradient, and
convolutions are products of matrices with the image's patches.  Tests compare it to the real network and clipping.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.federations import Task
from benchmarks.selection import Bools, Floats, Splits, left_out

SHAPES = ((16, 25), (16,), (16,), (16,), (16, 144), (16,), (16,), (16,), (144,), (1,))  # of ``xrays.network``
GROUPS = 4
PIECE = 256  # images at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Images(Splits):
    """As ``Splits``, of a task whose model is ``benchmarks.xrays.network``; ``patches`` (rows, 25, 196) of the images,
    which are also the ``features``."""

    task: Task
    patches: Tensor

    @classmethod
    def of(cls, task: Task, *, splits: int, draws: int, share: float = 0.2, seed: int = 2026) -> "Images":
        """``splits`` random choices of ``share`` of each site's images for validation, each with ``draws`` runs."""
        pooled = task.pooled
        site, training = left_out(task, splits=splits, draws=draws, share=share, seed=seed)
        return cls(
            features=pooled.features.numpy(),
            labels=pooled.targets.numpy(),
            site=site,
            training=training,
            task=task,
            patches=functional.unfold(pooled.features, 5, stride=2, padding=2),
        )

    @property
    def start(self) -> Floats:
        """Each run has a network of its own to start from."""
        models = [self.task.model(run) for run in range(len(self.training))]
        flat = [torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) for model in models]
        return torch.stack(flat).double().numpy()

    def gradient_sums(self, weights: Floats, present: Bools, *, clip_norm: float | None) -> Floats:
        """The sums (runs, d) of the gradients of the ``present`` images (runs, rows), each clipped, at ``weights``."""
        of_run = torch.tensor(weights, dtype=torch.float32)
        targets = torch.from_numpy(self.labels)
        sums = torch.zeros(weights.shape, dtype=torch.float64)
        for runs, rows in zip(*(torch.from_numpy(at).split(PIECE) for at in np.nonzero(present)), strict=True):
            own = of_run[runs].requires_grad_()
            losses = self.task.loss(logits(own, self.patches[rows]).unsqueeze(1), targets[rows])
            (gradients,) = torch.autograd.grad(losses, own)
            if clip_norm is not None:
                norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
                gradients = gradients * (clip_norm / norms).clamp(max=1.0)
            sums.index_add_(0, runs, gradients.double())
        return sums.numpy()

    @torch.no_grad()
    def scores(self, weights: Floats) -> Floats:
        """The logits (runs, rows) of the images that a run is judged on, by the model of their site; the others' are
        not a number."""
        found = np.full(self.training.shape, np.nan)
        of_site = torch.tensor(weights, dtype=torch.float32)
        for runs, rows in zip(*(torch.from_numpy(at).split(PIECE) for at in np.nonzero(~self.training)), strict=True):
            own = of_site[torch.from_numpy(self.site)[rows], runs]
            found[runs, rows] = logits(own, self.patches[rows])
        return found


def logits(weights: Tensor, patches: Tensor) -> Tensor:
    """Those of ``xrays.network`` (images,), each image by weights (images, d) of its own."""
    pieces = weights.split([prod(shape) for shape in SHAPES], dim=1)
    one, one_bias, scale, shift, two, two_bias, scale_two, shift_two, last, bias = (
        piece.unflatten(1, shape) for piece, shape in zip(pieces, SHAPES, strict=True)
    )
    found = _normalised(torch.baddbmm(one_bias.unsqueeze(2), one, patches), scale, shift)
    between = functional.unfold(found.unflatten(2, (14, 14)), 3, stride=2, padding=1)
    found = _normalised(torch.baddbmm(two_bias.unsqueeze(2), two, between), scale_two, shift_two)
    pooled = functional.avg_pool2d(found.unflatten(2, (7, 7)), 2).flatten(1)
    return (pooled * last).sum(dim=1) + bias.squeeze(1)


def _normalised(found: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.relu(functional.group_norm(found, GROUPS) * scale.unsqueeze(2) + shift.unsqueeze(2))
