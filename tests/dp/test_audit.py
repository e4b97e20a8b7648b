"""The lower bound that an audit proves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp.audit import epsilon_lower_bound
from dp.errors import UnsupportedEvent


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "expected"),
    [
        (100, 100, 100, 3.49),
        (1000, 100, 100, 3.47),
        (1000, 100, 90, 1.63),
        (1000, 200, 170, 1.40),
        (5000, 500, 500, 4.98),
    ],
)
def test_known_bounds(canaries: int, guesses: int, correct: int, expected: float) -> None:
    """The bound is that of the formula, the term with delta included: values computed independently."""
    found = epsilon_lower_bound(canaries=canaries, guesses=guesses, correct=correct, delta=1e-5)
    assert found == pytest.approx(expected, abs=0.005)


def test_delta_counts() -> None:
    """With many canaries a delta lets a mechanism guess more, so the same guesses prove less."""
    bounds = [epsilon_lower_bound(canaries=5000, guesses=500, correct=450, delta=delta) for delta in (0.0, 1e-5, 1e-3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[1] > bounds[2]


@given(st.integers(1, 300), st.data())
def test_more_right_guesses_prove_more(guesses: int, data: st.DataObject) -> None:
    """One more right guess never lowers the bound, and half of them right prove nothing."""
    correct = data.draw(st.integers(0, guesses - 1))
    one, more = (
        epsilon_lower_bound(canaries=guesses, guesses=guesses, correct=right, delta=1e-6)
        for right in (correct, correct + 1)
    )
    assert one <= more
    assert epsilon_lower_bound(canaries=guesses, guesses=guesses, correct=guesses // 2, delta=1e-6) == 0


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta"),
    [(10, 11, 5, 1e-5), (10, 5, 6, 1e-5), (10, 0, 0, 1e-5), (10, 5, -1, 1e-5), (10, 5, 5, 1.0), (10, 5, 5, -0.1)],
)
def test_numbers_that_are_no_audit(canaries: int, guesses: int, correct: int, delta: float) -> None:
    """More right than guessed, more guessed than there are, or a delta that is none, is refused."""
    with pytest.raises(UnsupportedEvent, match="audit: found"):
        epsilon_lower_bound(canaries=canaries, guesses=guesses, correct=correct, delta=delta)
