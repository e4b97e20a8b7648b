"""What an attacker can really learn from a private training run: a lower bound on its epsilon.

After Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023.
Canaries join the training data, each by a fair coin that only the site knows.  Whoever guesses more of the coins from
what was released than the claimed epsilon allows has shown that the claim is wrong.  One run is enough: the coins of
many canaries take the place of many runs.

``audit`` does it to the site's own training.  It spreads the canaries over several trainings, each with all of the
site's patients, since time and memory grow with the square of the canaries in one.  Whether one canary is there changes
one of these trainings only, and they share no randomness, so all together are as private about it as one is, and count
as the one run of the theorem.

Noise that two trainings have in common, as two sites with the same seed would, shows too: where there are enough
trainings, each score is compared with those of the same coordinate in the others.

The bound is far from tight: noise has to be about half of what it should be before it is contradicted.  The default
plan is one where half is, reliably; docs/design.md has the numbers.
"""

import math
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from dp.accountants import noise_multiplier_for, rdp_epsilon
from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dp.canaries import PrivateTraining
    from dp.gradients import Loss

CONFIDENCE: Final = 0.95
ENOUGH_TO_COMPARE: Final = 10  # trainings: with fewer, the others' own noise would hide much
_LARGEST: Final = 50.0  # no number of guesses that anybody can make proves more


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPlan:
    """What is run and guessed.  ``canaries`` are spread over trainings of ``canaries_per_training`` each, of ``rounds``
    rounds of ``steps`` steps at ``sampling_rate``; the noise is what the accountant asks for ``epsilon`` at ``delta``.

    Half of the ``guesses`` say "was there" of the highest scores, half "was not" of the lowest.  Raises
    UnsupportedEvent for numbers that are no audit.
    """

    canaries: int = 150_000
    guesses: int = 3_000
    rounds: int = 8
    steps: int = 2
    sampling_rate: float = 0.5
    epsilon: float = 1.5
    delta: float = 1e-5
    confidence: float = CONFIDENCE
    canaries_per_training: int = 2_500

    def __post_init__(self) -> None:
        for name, count in (("guesses", self.guesses), ("rounds", self.rounds)):
            if count < 2 or count % 2:
                raise UnsupportedEvent(f"audit: found {name} {count}, expected an even number of 2 or more")
        for name, count in (("steps", self.steps), ("canaries per training", self.canaries_per_training)):
            if count < 1:
                raise UnsupportedEvent(f"audit: found {name} {count}, expected 1 or more")
        if self.canaries % self.canaries_per_training:
            raise UnsupportedEvent(
                f"audit: found {self.canaries} canaries, expected a multiple of the {self.canaries_per_training} of a "
                "training"
            )
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise UnsupportedEvent(f"audit: found epsilon {self.epsilon}, expected a finite number above 0")
        _check(self.canaries, self.guesses, self.guesses, self.delta, self.confidence)

    @property
    def trainings(self) -> int:
        """How many trainings the canaries are spread over."""
        return self.canaries // self.canaries_per_training


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """How many of the plan's guesses were ``correct``, the ``epsilon_lower_bound`` that this proves, and the
    ``claimed_epsilon`` of exactly what was run, with this ``noise_multiplier``, both at the plan's delta."""

    plan: AuditPlan
    noise_multiplier: float
    claimed_epsilon: float
    correct: int
    epsilon_lower_bound: float

    @property
    def holds(self) -> bool:
        """Whether the bound leaves the claim standing."""
        return self.epsilon_lower_bound <= self.claimed_epsilon


def audit(
    train: "PrivateTraining",
    model: "nn.Module",
    loss: "Loss",
    features: "Tensor",
    targets: "Tensor",
    *,
    patients: Sequence[Hashable],
    plan: AuditPlan,
    clip_norm: float,
    learning_rate: float,
    entropy: Callable[[int], bytes] = os.urandom,
    progress: Callable[[int], None] = lambda _: None,
) -> AuditResult:
    """Audit ``train`` (``dp.training.train_private``) on a site's model, loss and rows; nothing is released.

    ``model`` stays as it is, and what is trained is dropped.  ``entropy``: for coins and noise; ``progress``: is told
    how many of the plan's trainings are finished.  Raises UnsupportedEvent for what ``train`` refuses, for scores
    that are no numbers, and for a plan in which even right guesses could not contradict the claim, and BudgetExhausted
    for one that no noise fits.
    """
    from dp.canaries import canary_scores  # noqa: PLC0415  torch, which the ledger's readers must not need
    from dp.noise import csprng  # noqa: PLC0415
    from dp.training import Plan  # noqa: PLC0415

    noise = noise_multiplier_for(
        epsilon=plan.epsilon, delta=plan.delta, sampling_rate=plan.sampling_rate, steps=plan.rounds * plan.steps
    )

    def event(steps: int) -> PoissonSampledGaussian:
        return PoissonSampledGaussian(sampling_rate=plan.sampling_rate, noise_multiplier=noise, steps=steps)

    claimed = rdp_epsilon([event(plan.rounds * plan.steps)], plan.delta)
    # Stops an audit that nothing could fail.
    if (most := _proved_by(plan, plan.guesses)) <= claimed:
        raise UnsupportedEvent(
            f"audit: found a plan that could prove epsilon {most:.3g} at most, expected one that could contradict the "
            f"claimed {claimed:.3g}; take more guesses, fewer canaries, or a smaller epsilon or delta"
        )
    # The coins: they stay in this function, and only the number of right guesses leaves it.
    included = csprng(entropy).random((plan.trainings, plan.canaries_per_training)) < 0.5
    scores = np.empty(included.shape)
    for number in range(plan.trainings):
        scores[number] = canary_scores(
            train,
            model,
            loss,
            features,
            targets,
            patients=patients,
            included=included[number],
            rounds=plan.rounds,
            plan=Plan(steps=plan.steps, learning_rate=learning_rate, sampling_rate=plan.sampling_rate),
            event=event(plan.steps),
            clip_norm=clip_norm,
            entropy=entropy,
        )
        progress(number + 1)
    if plan.trainings >= ENOUGH_TO_COMPARE:
        scores -= scores.mean(axis=0)
    correct = _right_guesses(scores.ravel(), included.ravel(), plan.guesses)
    return AuditResult(
        plan=plan,
        noise_multiplier=noise,
        claimed_epsilon=claimed,
        correct=correct,
        epsilon_lower_bound=_proved_by(plan, correct),
    )


def _proved_by(plan: AuditPlan, correct: int) -> float:
    return epsilon_lower_bound(
        canaries=plan.canaries,
        guesses=plan.guesses,
        correct=correct,
        delta=plan.delta,
        confidence=plan.confidence,
    )


def _right_guesses(scores: npt.NDArray[np.float64], included: npt.NDArray[np.bool_], guesses: int) -> int:
    # Stops a training that ended in NaN from passing for one that nothing was learnt from.
    if not np.isfinite(scores).all():
        raise UnsupportedEvent("audit: found a model that is not finite after training, expected numbers to guess from")
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(np.count_nonzero(~included[order[:half]]) + np.count_nonzero(included[order[-half:]]))


def epsilon_lower_bound(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon, at ``delta``, that ``correct`` of ``guesses`` right about ``canaries`` coins contradict.

    A mechanism of that epsilon or less would guess as well with a chance below 1 - ``confidence``; 0 if it may well be
    chance.  Raises UnsupportedEvent for numbers that are no audit.
    """
    _check(canaries, guesses, correct, delta, confidence)

    def likely(epsilon: float) -> bool:
        return _chance(epsilon, canaries, guesses, correct, delta) >= 1 - confidence

    if likely(0.0):
        return 0.0
    low, high = 0.0, _LARGEST
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if likely(middle) else (middle, high)
    return low


def _chance(epsilon: float, canaries: int, guesses: int, correct: int, delta: float) -> float:
    """The most likely that ``correct`` or more guesses are right, for any mechanism of (epsilon, delta)."""
    from scipy.stats import binom  # noqa: PLC0415  takes a second, which the ledger must not wait for

    right = 1 / (1 + math.exp(-epsilon))  # of one guess, if delta were 0
    if correct == 0:
        return 1.0
    # Each way in which delta may have helped: by i more right guesses than the binomial law gives.
    below = float(binom.cdf(correct - 1, guesses, right))
    helped = np.arange(1, correct + 1)
    between = below - binom.cdf(correct - 1 - helped, guesses, right)
    return 1 - below + 2 * canaries * delta * float(np.max(between / helped))


def _check(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> None:
    """Raise UnsupportedEvent for numbers that are no audit."""
    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise UnsupportedEvent(
            f"audit: found {correct} right of {guesses} guesses about {canaries} canaries, expected no more right than "
            "guessed and no more guessed than there are, and at least one guess"
        )
    if not (0 <= delta < 1 and 0 < confidence < 1):
        raise UnsupportedEvent(f"audit: found delta {delta} at confidence {confidence}, expected both between 0 and 1")
