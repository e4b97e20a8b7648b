"""Neighbours and thresholds of large cohorts."""

from fractions import Fraction

import pytest

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
