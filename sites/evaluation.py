"""Evaluation by counts that can be summed: nothing else about a site's predictions leaves it.

The sums of right decisions and of examples give the accuracy.  Scores fall into bins of equal width over [0, 1]; from
the two summed histograms come AUC and balanced accuracy.  An even number of bins puts the decision threshold 0.5 on an
edge, so the balanced accuracy is exact; the AUC counts a pair within one bin as half right, an error of at most half
the share of such pairs.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from secureagg import ParameterError

DECISION: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """AUC, accuracy and balanced accuracy; None where a class is missing."""

    auc: float | None
    accuracy: float | None
    balanced_accuracy: float | None


def score_histogram(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.number], bins: int
) -> npt.NDArray[np.int64]:
    """Counts of shape (2, ``bins``): row 0 the negatives' scores, row 1 the positives'.

    ``scores``: (n,) in [0, 1]; ``labels``: (n,) of 0 and 1.  Raises ParameterError for others, without naming their
    values.
    """
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ParameterError(f"evaluation: scores {scores.shape} and labels {labels.shape}, expected two of (n,)")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ParameterError("evaluation: found a score outside [0, 1], expected probabilities")
    if not np.isin(labels, (0, 1)).all():
        raise ParameterError("evaluation: found a label that is neither 0 nor 1")
    if bins < 2 or bins % 2:
        raise ParameterError(f"evaluation: found {bins} bins, expected an even number")
    index = np.minimum((scores * bins).astype(np.int64), bins - 1)
    return np.stack([np.bincount(index[labels == label], minlength=bins) for label in (0, 1)]).astype(np.int64)


def metrics_from_counts(*, correct: int, total: int, histogram: npt.NDArray[np.int64]) -> Metrics:
    """The metrics of summed counts: right decisions out of how many, and the histogram of shape (2, bins)."""
    if total == 0:
        return Metrics(auc=None, accuracy=None, balanced_accuracy=None)
    negatives, positives = histogram
    bins = len(negatives)
    of = histogram.sum(axis=1)
    if (of == 0).any():
        return Metrics(auc=None, accuracy=correct / total, balanced_accuracy=None)
    right = np.array([negatives[: bins // 2].sum(), positives[bins // 2 :].sum()])
    lower_negatives = np.cumsum(negatives) - negatives
    pairs = (positives * (lower_negatives + negatives / 2)).sum()
    return Metrics(auc=float(pairs / of.prod()), accuracy=correct / total, balanced_accuracy=float((right / of).mean()))


def evaluate_scores(scores: npt.NDArray[np.floating], labels: npt.NDArray[np.number], bins: int) -> Metrics:
    """The metrics of one set of scores in [0, 1] and 0/1 labels, computed exactly as those of summed counts."""
    histogram = score_histogram(scores, labels, bins)
    return metrics_from_counts(correct=count_correct(scores, labels), total=len(labels), histogram=histogram)


def count_correct(scores: npt.NDArray[np.floating], labels: npt.NDArray[np.number]) -> int:
    """How many decisions at 0.5 are right."""
    return int(np.sum((scores >= DECISION) == (labels == 1)))
