"""What an attacker can really learn from a private training run: a lower bound on its epsilon.

After Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023.
Canaries join the training data, each by a fair coin that only the site knows.  Whoever guesses more of the coins from
what was released than the claimed epsilon allows has shown that the claim is wrong.  One run is enough: the coins of
many canaries take the place of many runs.
"""

import math
from typing import Final

import numpy as np

from dp.errors import UnsupportedEvent

CONFIDENCE: Final = 0.95
_LARGEST: Final = 50.0  # no number of guesses that anybody can make proves more


def epsilon_lower_bound(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon, at ``delta``, that ``correct`` of ``guesses`` right about ``canaries`` coins contradict.

    A mechanism of that epsilon or less would guess as well with a chance below 1 - ``confidence``; 0 if it may well be
    chance.  Raises UnsupportedEvent for numbers that are no audit.
    """
    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise UnsupportedEvent(
            f"audit: found {correct} right of {guesses} guesses about {canaries} canaries, expected no more right than "
            "guessed and no more guessed than there are, and at least one guess"
        )
    if not (0 <= delta < 1 and 0 < confidence < 1):
        raise UnsupportedEvent(f"audit: found delta {delta} at confidence {confidence}, expected both between 0 and 1")

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
