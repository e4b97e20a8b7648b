"""Metrics from summed counts: what scikit-learn computes from the scores, up to the stated error of the bins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from secureagg import ParameterError
from sites.evaluation import Metrics, count_correct, evaluate_scores, metrics_from_counts, score_histogram

bin_counts = st.integers(1, 50).map(lambda half: 2 * half)
dtypes = st.sampled_from([np.float32, np.float64])
BEFORE_HALF = [np.nextafter(dtype(0.5), dtype(0)) for dtype in (np.float32, np.float64)]


@st.composite
def predictions(draw, *, both_classes=False):
    """Scores and labels of 0 to 40 patients, edges and ties among the scores."""
    dtype = draw(dtypes)
    score = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.5, 1.0, 0.25, float(BEFORE_HALF[0])]))
    pairs = draw(st.lists(st.tuples(score, st.integers(0, 1)), min_size=0, max_size=40))
    if both_classes:
        pairs += [(draw(score), 0), (draw(score), 1)]
    return np.array([pair[0] for pair in pairs], dtype), np.array([pair[1] for pair in pairs], np.int64)


def same_bin_share(histogram):
    """Share of pairs of a negative and a positive that fall into one bin."""
    return float((histogram[0] * histogram[1]).sum() / histogram.sum(axis=1).prod())


@given(predictions(both_classes=True), bin_counts)
def test_auc_against_scikit_learn(prediction, bins):
    """The AUC is scikit-learn's up to half the share of pairs within one bin."""
    scores, labels = prediction
    error = abs(evaluate_scores(scores, labels, bins).auc - roc_auc_score(labels, scores))
    assert error <= same_bin_share(score_histogram(scores, labels, bins)) / 2 + 1e-12


@given(
    st.lists(st.tuples(st.integers(0, 49), st.integers(0, 1)), max_size=40),
    st.tuples(st.integers(0, 49), st.integers(0, 49)),
)
def test_auc_of_bin_centres(pairs, ends):
    """Where scores of one bin are equal, the AUC is exact."""
    pairs = [*pairs, (ends[0], 0), (ends[1], 1)]
    scores = np.array([(index + 0.5) / 50 for index, _ in pairs])
    labels = np.array([label for _, label in pairs])
    assert evaluate_scores(scores, labels, 50).auc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@given(predictions(both_classes=True), bin_counts)
def test_accuracies_against_scikit_learn(prediction, bins):
    """Accuracy and balanced accuracy are scikit-learn's at the threshold 0.5, however few the bins."""
    scores, labels = prediction
    metrics = evaluate_scores(scores, labels, bins)
    decisions = (scores >= 0.5).astype(int)
    assert metrics.accuracy == pytest.approx(accuracy_score(labels, decisions), abs=1e-12)
    assert metrics.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, decisions), abs=1e-12)


@given(st.lists(predictions(), min_size=1, max_size=5), bin_counts)
def test_sums_of_parts(parts, bins):
    """The summed counts of the sites are those of all patients together, and so are the metrics."""
    scores = np.concatenate([part[0].astype(np.float64) for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    summed = sum(score_histogram(*part, bins) for part in parts)
    correct, total = sum(count_correct(*part) for part in parts), sum(len(part[1]) for part in parts)
    assert summed.sum() == total == len(labels)
    assert correct == count_correct(scores, labels)
    # In float32 the bin of a score on an edge may be the next one: compare parts of one precision.
    if all(part[0].dtype == np.float64 for part in parts):
        assert (summed == score_histogram(scores, labels, bins)).all()
        whole = evaluate_scores(scores, labels, bins)
        assert metrics_from_counts(correct=correct, total=total, histogram=summed) == whole


def test_the_histogram_by_hand():
    """Row 0 counts the negatives' scores, row 1 the positives', in bins of equal width."""
    scores = np.array([0.0, 0.24, 0.25, 0.5, 0.74, 0.75, 1.0, 0.1])
    labels = np.array([0, 1, 0, 1, 0, 0, 1, 1])
    histogram = score_histogram(scores, labels, 4)
    assert histogram.tolist() == [[1, 1, 1, 1], [2, 0, 1, 1]]
    assert histogram.dtype == np.int64


@pytest.mark.parametrize("bins", [2, 6, 200, 1 << 16])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_on_the_edges(bins, dtype):
    """0 is in the first bin, 1 in the last, 0.5 counts as positive in count and histogram alike, the number just
    below it as negative."""
    below = np.nextafter(dtype(0.5), dtype(0))
    scores = np.array([0.0, below, 0.5, 1.0], dtype)
    histogram = score_histogram(scores, np.ones(4, int), bins)[1]
    assert histogram[0] >= 1
    assert histogram[-1] >= 1
    assert (histogram[: bins // 2].sum(), histogram[bins // 2 :].sum()) == (2, 2)
    assert count_correct(scores, np.ones(4, int)) == 2
    assert count_correct(scores, np.zeros(4, int)) == 2


def test_perfect_and_worst_scores():
    """Perfect scores give 1 throughout, reversed ones 0, equal ones an AUC of one half."""
    labels = np.array([0, 0, 1, 1, 1])
    perfect = Metrics(auc=1.0, accuracy=1.0, balanced_accuracy=1.0)
    assert evaluate_scores(np.where(labels == 1, 0.9, 0.1), labels, 10) == perfect
    assert evaluate_scores(np.where(labels == 1, 0.1, 0.9), labels, 10) == Metrics(
        auc=0.0, accuracy=0.0, balanced_accuracy=0.0
    )
    assert evaluate_scores(np.full(5, 0.5), labels, 10).auc == 0.5


@pytest.mark.parametrize("label", [0, 1])
def test_a_missing_class(label):
    """Without patients of one class there is an accuracy, but neither AUC nor balanced accuracy."""
    metrics = evaluate_scores(np.array([0.2, 0.4, 0.9]), np.full(3, label), 10)
    assert metrics == Metrics(auc=None, accuracy=[2 / 3, 1 / 3][label], balanced_accuracy=None)


def test_no_patients():
    """Without patients there is no metric."""
    assert evaluate_scores(np.array([]), np.array([]), 10) == Metrics(auc=None, accuracy=None, balanced_accuracy=None)


def test_float_labels():
    """Labels may be the data set's own floats."""
    scores, labels = np.array([0.1, 0.9, 0.8]), np.array([0, 1, 0])
    assert evaluate_scores(scores, labels.astype(np.float32), 10) == evaluate_scores(scores, labels, 10)


BAD = {
    "above 1": ([0.5, 1.234567], [0, 1], 10, "score outside"),
    "below 0": ([0.5, -1.234567], [0, 1], 10, "score outside"),
    "NaN": ([0.5, float("nan")], [0, 1], 10, "score outside"),
    "infinite": ([0.5, float("inf")], [0, 1], 10, "score outside"),
    "label 1234567": ([0.5, 0.5], [0, 1234567], 10, "label that is neither"),
    "label 0.1234567": ([0.5, 0.5], [0, 0.1234567], 10, "label that is neither"),
    "NaN label": ([0.5, 0.5], [0, float("nan")], 10, "label that is neither"),
    "fewer labels": ([0.5, 0.5], [0], 10, r"scores \(2,\) and labels \(1,\)"),
    "two columns": ([[0.5, 0.5]], [[0, 1]], 10, r"scores \(1, 2\) and labels \(1, 2\)"),
    "odd bins": ([0.5, 0.5], [0, 1], 9, "found 9 bins, expected an even number"),
    "no bins": ([0.5, 0.5], [0, 1], 0, "found 0 bins, expected an even number"),
}


@pytest.mark.parametrize(("scores", "labels", "bins", "match"), BAD.values(), ids=BAD)
def test_bad_inputs(scores, labels, bins, match):
    """Unfit scores, labels or bins are refused, and no patient's value is in the text."""
    with pytest.raises(ParameterError, match=match) as refused:
        score_histogram(np.array(scores), np.array(labels), bins)
    assert "234567" not in str(refused.value)
    assert "nan" not in str(refused.value)
