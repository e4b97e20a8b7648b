"""Neighbours and thresholds of large cohorts."""

from fractions import Fraction

import pytest

from secureagg import ParameterError
from secureagg.graph import Neighbourhood, choose_neighbourhood


@pytest.mark.parametrize(
    ("n", "corrupt", "dropouts", "active", "k", "t"),
    [
        (100, "0.05", "0.05", True, 16, 11),
        (1000, "0.05", "0.05", True, 52, 37),
        (10_000, "0.05", "0.05", True, 62, 44),
        (100, "0.30", "0.30", True, 92, 62),
        (1000, "0.30", "0.30", True, 872, 584),
        (1000, "0.33", "0.05", True, 132, 109),
        (100, "0.05", "0.33", True, 72, 39),
        (1000, "0.05", "0.33", True, 398, 223),
        (100, "0.05", "0.05", False, 12, 6),
        (1000, "0.05", "0.05", False, 30, 17),
        (1000, "0.33", "0.33", False, 286, 150),
        (200, "0.10", "0.10", True, 56, 39),
        (500, "0.10", "0.10", True, 82, 57),
        (1000, "0.10", "0.10", True, 96, 67),
        (5000, "0.10", "0.10", True, 116, 81),
    ],
)
def test_known_values(n: int, corrupt: str, dropouts: str, active: bool, k: int, t: int) -> None:
    """The neighbourhood is the one that the analysis of Bell et al. gives for these cohorts."""
    found = choose_neighbourhood(n, corrupt=Fraction(corrupt), dropouts=Fraction(dropouts), active=active)
    assert found == Neighbourhood(k, t)


def test_small_or_fragile_cohorts_need_everybody() -> None:
    """Where no sparse graph is safe, none is proposed: the complete one is needed."""
    for n in (3, 10, 20):
        assert choose_neighbourhood(n, corrupt=Fraction("0.3"), dropouts=Fraction("0.3")) is None


@pytest.mark.parametrize(
    ("n", "corrupt", "dropouts", "text"),
    [
        (2, "0.1", "0.1", "cohort: found 2 sites"),
        (100, "1", "0.1", "corrupt: found a share of 1"),
        (100, "-1/10", "0.1", "corrupt: found a share of -1/10"),
        (100, "0.1", "1", "dropouts: found a share of 1"),
    ],
)
def test_impossible_plans(n: int, corrupt: str, dropouts: str, text: str) -> None:
    """A cohort or share that makes no sense is refused with what was found."""
    with pytest.raises(ParameterError, match=text):
        choose_neighbourhood(n, corrupt=Fraction(corrupt), dropouts=Fraction(dropouts))


def test_the_threshold_excludes_two_sets() -> None:
    """Against an active coordinator, t of k is always more than half, with corrupt neighbours counted twice."""
    for n in (200, 400, 800):
        found = choose_neighbourhood(n, corrupt=Fraction("0.1"), dropouts=Fraction("0.1"))
        assert found is not None
        assert 2 * found.threshold > found.neighbours + found.neighbours // 10
        assert found.threshold <= found.neighbours < n - 1
