"""Canaries: patients made up for an audit, whose presence shows in what a training releases if anything does.

Beside the site's model stands a parameter that has one coordinate for each canary.  A canary's gradient lies along its
own coordinate, where nobody else has any, so that nothing but the noise hides it.  It is ten times as long as the clip
norm, so that clipping is tried as well.  Everything else is the training as it is: the site's patients and its model
are trained beside the canaries, and sampling, gradients per row, clipping, noise and optimizer are the real ones.

The gradient points up in one round and down in the next (DP-SGD's guarantee allows gradients that depend on what came
before).  Weighting the rounds with these signs adds up what a canary did, exactly as a plain sum would with fresh
noise; noise that one round has in common with the next cancels.  Each round begins with torch's, numpy's and Python's
own generators, those that engineers seed, as the round before did.  So noise drawn from one of them, which whoever
knows the seed can subtract, cancels too.
"""

import copy
import os
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dp.events import PoissonSampledGaussian
from dp.gradients import Loss
from dp.training import Plan

LENGTH: Final = 10.0  # of a canary's gradient before it is clipped, in clip norms


class PrivateTraining(Protocol):
    """What is audited: ``dp.training.train_private``."""

    def __call__(
        self,
        model: nn.Module,
        loss: Loss,
        features: Tensor,
        targets: Tensor,
        *,
        patients: Sequence[Hashable],
        plan: Plan,
        event: PoissonSampledGaussian,
        clip_norm: float,
        entropy: Callable[[int], bytes],
    ) -> None:
        """Train ``model`` in place."""


class _WithCanaries(nn.Module):
    """The site's model, and beside its predictions one more: the sum over canaries of whether the row is it, times its
    coordinate.  Its input is the numbers of rows: the site's own first, then the canaries'."""

    def __init__(self, model: nn.Module, features: Tensor, canaries: int) -> None:
        super().__init__()
        self.site_model = model
        self.site_features = features
        # Not initialised, which would draw from torch's generator, but set to 0.
        self.canaries = nn.Linear(canaries, 1, bias=False, device="meta").to_empty(device=features.device)
        nn.init.zeros_(self.canaries.weight)
        self.shape = torch.Size()

    def forward(self, rows: Tensor) -> Tensor:
        own = len(self.site_features)
        # Of a canary's row this computes the predictions of some row of the site's, which its loss does not use.
        predictions: Tensor = self.site_model(self.site_features[rows % own])
        self.shape = predictions.shape[1:]
        present = self.canaries.weight.new_zeros(len(rows), self.canaries.in_features)
        (is_canary,) = (rows >= own).nonzero(as_tuple=True)
        present[is_canary, rows[is_canary] - own] = 1
        return torch.cat([predictions.reshape(len(rows), -1), self.canaries(present)], dim=1)


def canary_scores(
    train: PrivateTraining,
    model: nn.Module,
    loss: Loss,
    features: Tensor,
    targets: Tensor,
    *,
    patients: Sequence[Hashable],
    included: npt.NDArray[np.bool_],
    rounds: int,
    plan: Plan,
    event: PoissonSampledGaussian,
    clip_norm: float,
    entropy: Callable[[int], bytes] = os.urandom,
) -> npt.NDArray[np.float64]:
    """Train a copy of ``model`` for ``rounds`` rounds with the ``included`` canaries (canaries,) beside the patients;
    return how much the releases speak for each (canaries,), larger for those that are likelier to have been there.

    ``features``, ``targets`` and ``patients``: the site's, a row each; ``plan`` and ``event``: of one round.  Only what
    leaves a round is looked at, its model; the copy is dropped.
    """
    wrapped = _WithCanaries(copy.deepcopy(model), features, len(included))
    own, present = len(features), np.flatnonzero(included)
    rows = torch.cat([torch.arange(own), own + torch.from_numpy(present)]).to(features.device)
    everybody: list[Hashable] = [*patients, *(object() for _ in present)]  # an object is equal to nobody's key
    scores = torch.zeros(len(included), dtype=torch.float64)
    for number in range(rounds):
        up = 1.0 if number % 2 == 0 else -1.0

        def with_canaries(predictions: Tensor, row: Tensor, push: float = up * LENGTH * clip_norm) -> Tensor:
            real = row < own
            total = push * predictions[~real, -1].sum()
            if real.any():
                total = total + loss(predictions[real, :-1].reshape(-1, *wrapped.shape), targets[row[real]])
            return total

        before = wrapped.canaries.weight.detach().cpu().double().flatten()
        with _generators_restored():
            train(
                wrapped,
                with_canaries,
                rows,
                rows,
                patients=everybody,
                plan=plan,
                event=event,
                clip_norm=clip_norm,
                entropy=entropy,
            )
        after = wrapped.canaries.weight.detach().cpu().double().flatten()
        scores += up * (before - after)  # training goes against the gradient
    return scores.numpy()


@contextmanager
def _generators_restored() -> Iterator[None]:
    """The global generators of torch, numpy and Python are afterwards as they were."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)
