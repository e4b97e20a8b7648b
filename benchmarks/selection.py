"""Choosing hyper-parameters on validation rows, many runs at once.

Runs over several splits and draws of the noise are trained side by side: of logistic regression, whose closed gradient
makes that one product of matrices (``Splits``), and of the X-rays' network (``benchmarks.images``).  Noise is a float64
normal of the variance that the real mechanism has, and numpy's generator is seeded: this code is for choosing only.
What is published is trained by the real parts (``benchmarks.federations``), to which tests compare it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import rankdata

from benchmarks.federations import Configuration, Task, gaussian, plan_of, site_rate

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Column = Literal["local only", "local", "shared", "unshared"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Splits:
    """Training rows of all sites after one another: ``features`` (rows, d), with a column of ones; ``labels`` (rows,);
    ``site`` (rows,), the number of each row's site; ``training`` (runs, rows): whether a run trains on a row, or is
    judged on it.  Trained is logistic regression, from zero weights."""

    features: Floats
    labels: Floats
    site: npt.NDArray[np.int64]
    training: Bools

    @classmethod
    def of(cls, task: Task, *, splits: int, draws: int, share: float = 0.25, seed: int = 2026) -> "Splits":
        """``splits`` random choices of ``share`` of each site's rows for validation, each with ``draws`` runs."""
        features = task.pooled.features.numpy().astype(np.float64)
        site, training = left_out(task, splits=splits, draws=draws, share=share, seed=seed)
        return cls(
            features=np.hstack([features, np.ones((len(site), 1))]),
            labels=task.pooled.targets.numpy().astype(np.float64),
            site=site,
            training=training,
        )

    @property
    def start(self) -> Floats:
        """Where each run starts (runs, d)."""
        return np.zeros((len(self.training), self.features.shape[1]))

    def gradient_sums(self, weights: Floats, present: Bools, *, clip_norm: float | None) -> Floats:
        """The sums (runs, d) of the gradients of the ``present`` rows (runs, rows), each clipped, at ``weights``."""
        slopes = expit(weights @ self.features.T) - self.labels
        if clip_norm is not None:
            norms = np.abs(slopes) * np.linalg.norm(self.features, axis=1)
            slopes *= np.minimum(1.0, clip_norm / np.maximum(norms, 1e-30))
        sums: Floats = (slopes * present) @ self.features
        return sums

    def scores(self, weights: Floats) -> Floats:
        """The logits (runs, rows) of each row by the model of its site, of ``weights`` (sites, runs, d)."""
        return np.einsum("nrd,nd->rn", weights[self.site], self.features)


def left_out(task: Task, *, splits: int, draws: int, share: float, seed: int) -> tuple[npt.NDArray[np.int64], Bools]:
    """``site`` and ``training`` of ``Splits``."""
    site = np.repeat(np.arange(len(task.sites)), [len(one.targets) for one in task.sites.values()])
    generator = np.random.default_rng(seed)
    training = np.ones((splits, len(site)), bool)
    for row in training:
        for number in range(len(task.sites)):
            mine = np.flatnonzero(site == number)
            row[generator.choice(mine, round(share * len(mine)), replace=False)] = False
    return site, np.repeat(training, draws, axis=0)


def descend(
    data: Splits,
    rows: Bools,
    chosen: Configuration,
    *,
    start: Floats,
    steps: int,
    rate: float,
    batch: float,
    deviation: float | None,
    coins: np.random.Generator,
) -> Floats:
    """``steps`` from ``start`` (runs, d) on ``rows`` (runs, rows): the sum of a sample, clipped and with noise of this
    ``deviation``, neither for None, over ``batch``."""
    weights = start.copy()
    clip_norm = None if deviation is None else chosen.clip_norm
    for _ in range(steps):
        present = rows if rate == 1 else rows & (coins.random(rows.shape) < rate)
        moved = data.gradient_sums(weights, present, clip_norm=clip_norm)
        if deviation is not None:
            moved += deviation * coins.standard_normal(moved.shape)
        weights -= chosen.learning_rate / batch * moved
    return weights


def train(column: Column, task: Task, data: Splits, chosen: Configuration, epsilon: float | None, seed: int) -> Floats:
    """The weights (sites, runs, d) of each site's model after the column's training; all the same but for "local
    only"."""
    coins = np.random.default_rng(seed)
    sites, start = len(task.sites), data.start
    mine = [data.training & (data.site == number) for number in range(sites)]
    counts = [int(rows[0].sum()) for rows in mine]
    total = sum(counts)
    if column in ("shared", "unshared"):
        deviation = None
        if epsilon is not None:
            dropouts = 1 if column == "shared" else sites - 2
            plan = plan_of(task, chosen, epsilon=epsilon, dropouts=dropouts)
            deviation = plan.error_of_sum
        batch = max(1, round(chosen.share * total))
        end = descend(
            data,
            data.training,
            chosen,
            start=start,
            steps=chosen.steps,
            rate=chosen.share,
            batch=batch,
            deviation=deviation,
            coins=coins,
        )
        return np.broadcast_to(end, (sites, *end.shape))

    def step(number: int, at: Floats, steps: int) -> Floats:
        rate = site_rate(counts[number], chosen, sites=sites, total=total)
        deviation = None
        if epsilon is not None:
            deviation = chosen.clip_norm * gaussian(
                epsilon=epsilon, delta=task.delta, sampling_rate=rate, steps=chosen.steps
            )
        return descend(
            data,
            mine[number],
            chosen,
            start=at,
            steps=steps,
            rate=rate,
            batch=rate * counts[number],
            deviation=deviation,
            coins=coins,
        )

    if column == "local only":
        return np.stack([step(number, start, chosen.steps) for number in range(sites)])
    rounds = max(1, chosen.steps // task.local_steps)
    for _ in range(rounds):
        ends = [step(number, start, task.local_steps) for number in range(sites)]
        start = sum(count / total * end for count, end in zip(counts, ends, strict=True))
    return np.broadcast_to(start, (sites, *start.shape))


def judged(data: Splits, weights: Floats) -> tuple[float, float]:
    """AUC and balanced accuracy on each run's validation rows of all sites, each row scored by its site's model; means
    over runs."""
    scores = data.scores(weights)
    areas, balanced = [], []
    for of_all, training in zip(scores, data.training, strict=True):
        positive, score = data.labels[~training] == 1, of_all[~training]
        ranks = rankdata(score)
        pairs = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
        areas.append(pairs / (positive.sum() * (~positive).sum()))
        right = (score >= 0) == positive
        balanced.append((right[positive].mean() + right[~positive].mean()) / 2)
    return float(np.mean(areas)), float(np.mean(balanced))
