"""What a round is: thresholds, lanes, context."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rounds import UPDATE, StoppedRound

from secureagg import Card, Counts, FixedPoint, Identity, Lane, ParameterError, Roster, RoundParameters, SiteId
from secureagg.parameters import (
    Thresholds,
    check_thresholds,
    choose_thresholds,
    default_threshold,
    largest_max_corrupt,
)
from secureagg.slots import FRESH_BYTES
from secureagg.testing import CountingEntropy


@given(st.integers(3, 1000))
def test_defaults_are_safe(n: int) -> None:
    """The default threshold and what follows from it satisfy every inequality, for every cohort size."""
    t = default_threshold(n)
    c = largest_max_corrupt(n, t)
    check_thresholds(cohort_size=n, threshold=t, max_corrupt=c, minimum_survivors=max(t, c + 2))
    assert (t, 0 <= c < t) == (2 * n // 3 + 1, True)


@pytest.mark.parametrize(
    ("n", "t", "c", "h", "text"),
    [
        (2, 2, 0, 2, "cohort: found 2 sites, expected 3 to 1000"),
        (1001, 700, 0, 700, "cohort: found 1001"),
        (4, 3, -1, 3, "max_corrupt: found -1"),
        (4, 5, 0, 5, "threshold: found 5, expected at most the cohort size 4"),
        (4, 2, 0, 3, r"2t = 2 x 2 = 4, expected above n \+ c = 4 \+ 0 = 4"),
        (4, 3, 2, 4, r"2t = 2 x 3 = 6, expected above n \+ c = 4 \+ 2 = 6"),
        (4, 3, 1, 2, "minimum_survivors: found 2, expected at least .* = 3"),
        (9, 7, 4, 5, "minimum_survivors: found 5, expected at least .* = 7"),
        (4, 3, 1, 5, "minimum_survivors: found 5, expected at most"),
    ],
)
def test_unsafe_thresholds_are_refused_with_their_numbers(n: int, t: int, c: int, h: int, text: str) -> None:
    """Each inequality that a round's secrecy rests on is checked, and the error shows it with its numbers."""
    with pytest.raises(ParameterError, match=text):
        check_thresholds(cohort_size=n, threshold=t, max_corrupt=c, minimum_survivors=h)


@given(st.integers(3, 60), st.data())
def test_whatever_is_accepted_is_safe(n: int, data: st.DataObject) -> None:
    """No accepted quadruple lets two lists gather t signatures each, or releases a sum with one honest member."""
    t, c, h = (data.draw(st.integers(0, n + 1)) for _ in range(3))
    try:
        check_thresholds(cohort_size=n, threshold=t, max_corrupt=c, minimum_survivors=h)
    except ParameterError:
        return
    honest_signatures = n - c
    assert t + t > honest_signatures + 2 * c  # c corrupt sites may sign both lists, each honest one signs one
    assert h - c >= 2


OTHER = Identity.generate(CountingEntropy(99))


@pytest.mark.parametrize(
    "change",
    [
        {"consortium": "other"},
        {"run": "other"},
        {"round_number": 2},
        {"model_digest": b"\1" * 32},
        {"max_weight": 11},
        {"threshold": 4},
        {"max_corrupt": 0},
        {"minimum_survivors": 4},
        {"backend": "homomorphic"},
        {"backend": "homomorphic", "release_to": "coordinator"},
        {"lanes": [UPDATE]},
        {"lanes": [UPDATE, Lane(name="histogram", length=4, encoding=Counts(maximum=101))]},
        {"lanes": [UPDATE, Lane(name="histogram", length=5, encoding=Counts(maximum=100))]},
        {"lanes": [UPDATE, Lane(name="histogran", length=4, encoding=Counts(maximum=100))]},
        {"lanes": [Lane(name="update", length=5, encoding=FixedPoint(value_range=1.0))]},
        {"cohort": [SiteId("site-000"), SiteId("site-001"), SiteId("site-002")]},
        {"roster": Roster([*StoppedRound(4).roster.values(), Card.issue(SiteId("site-999"), OTHER, b"t" * 32)])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_is_part_of_the_context(change: dict[str, object]) -> None:
    """Two sides that differ in anything at all have different contexts, so nothing of one fits the other."""
    base = StoppedRound(4)
    other = RoundParameters.create(**{**base.options, **change})
    assert other.context != base.parameters.context


def test_the_context_is_the_same_for_the_same_round() -> None:
    """The order in which cohort and lanes are given does not matter, the content does."""
    base = StoppedRound(4)
    again = RoundParameters.create(
        **{**base.options, "cohort": base.sites[::-1], "lanes": list(base.options["lanes"])[::-1]}
    )
    assert again.context == base.parameters.context
    assert list(again.lanes) == ["canary", "histogram", "update", "weight"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cohort": [SiteId("site-000")] * 3}, "3 sites, only 1 of them different"),
        ({"cohort": [SiteId(f"site-00{i}") for i in range(3)] + [SiteId("sybil")]}, "sybil not in the roster of 4"),
        ({"round_number": 0}, "round number: found 0"),
        ({"model_digest": b"short"}, "model digest: 5 bytes"),
        ({"max_weight": 0}, "max_weight: found 0"),
        ({"backend": "clear"}, "backend: found 'clear', expected one of masked, homomorphic"),
        ({"release_to": "all"}, "release_to: found 'all', expected one of coordinator, sites"),
        ({"release_to": "sites"}, "release_to: found sites with the masked backend, expected the homomorphic one"),
        ({"backend": "homomorphic", "graph": "sparse"}, "graph: found sparse with the homomorphic backend"),
        ({"max_weight": None}, "weighted, but the round has no max_weight"),
        ({"lanes": []}, "lanes: found none"),
        ({"lanes": [UPDATE, UPDATE]}, "names repeat"),
        ({"lanes": [Lane(name="canary", length=1, encoding=Counts(maximum=1))]}, "protocol's own"),
        ({"lanes": [Lane(name="weight", length=1, encoding=Counts(maximum=1))]}, "protocol's own"),
        ({"lanes": [Lane(name="x/clipped", length=1, encoding=Counts(maximum=1))]}, "protocol's own"),
    ],
)
def test_impossible_rounds_are_refused(change: dict[str, object], text: str) -> None:
    """Each impossible round is refused before anything is sent, with what was found."""
    with pytest.raises(ParameterError, match=text):
        RoundParameters.create(**{**StoppedRound(4).options, **change})


def test_who_is_given_the_sum() -> None:
    """The coordinator with the masked backend; with the homomorphic one the sites, and the coordinator if it is said.
    These are three contexts, so nobody can be talked into another release than its own manifest has."""
    made = [
        RoundParameters.create(**{**StoppedRound(4).options, **options})
        for options in (
            {"backend": "masked"},
            {"backend": "homomorphic"},
            {"backend": "homomorphic", "release_to": "coordinator"},
        )
    ]
    assert [parameters.release_to for parameters in made] == ["coordinator", "sites", "coordinator"]
    assert len({parameters.context for parameters in made}) == 3


def test_homomorphic_rounds_run_on_the_complete_graph() -> None:
    """A cohort that would get the sparse graph gets the complete one; its input is as long as its ciphertexts."""
    made = RoundParameters.create(**{**StoppedRound(101, lanes=[UPDATE]).options, "backend": "homomorphic"})
    assert made.neighbours is None
    assert made.threshold == default_threshold(101)
    assert made.input_bytes == 32_832 == made.slot_layout.ciphertexts * FRESH_BYTES


@pytest.mark.parametrize(
    ("cohort_size", "options", "expected"),
    [
        (100, {}, Thresholds(neighbours=None, threshold=67, max_corrupt=33, minimum_survivors=67)),
        (101, {}, Thresholds(neighbours=32, threshold=22, max_corrupt=10, minimum_survivors=52)),
        (101, {"graph": "complete"}, Thresholds(neighbours=None, threshold=68, max_corrupt=34, minimum_survivors=68)),
        # A third of the sites may collude and drop out: no sparse graph of so few is safe.
        (
            101,
            {"max_corrupt": 33, "max_dropouts": 33},
            Thresholds(neighbours=None, threshold=68, max_corrupt=33, minimum_survivors=68),
        ),
        (
            12,
            {"graph": "sparse", "max_corrupt": 0, "max_dropouts": 1, "minimum_survivors": 3},
            Thresholds(neighbours=8, threshold=6, max_corrupt=0, minimum_survivors=3),
        ),
    ],
)
def test_which_graph(cohort_size: int, options: dict[str, Any], expected: Thresholds) -> None:
    """The graph is the complete one up to 100 sites, the sparse one beyond where one is safe, or what was asked for."""
    assert choose_thresholds(cohort_size, **options) == expected


@pytest.mark.parametrize(
    ("cohort_size", "options", "text"),
    [
        (200, {"threshold": 134}, "threshold: found 134 on the sparse graph"),
        (200, {"graph": "dense"}, "graph: found 'dense'"),
        (20, {"graph": "sparse", "max_corrupt": 8, "max_dropouts": 8}, "no sparse one is safe for 20 sites of which 8"),
        (200, {"max_corrupt": -1}, "max_corrupt: found -1, expected 0 to 199"),
        (200, {"max_corrupt": 200}, "max_corrupt: found 200, expected 0 to 199"),
        (200, {"max_dropouts": 200}, "max_dropouts: found 200, expected 0 to 199"),
        (200, {"max_dropouts": -1}, "max_dropouts: found -1"),
        (200, {"minimum_survivors": 112}, r"minimum_survivors: found 112, expected max_corrupt \+ 2 = 22 to 111"),
        (200, {"minimum_survivors": 21}, r"minimum_survivors: found 21, expected max_corrupt \+ 2 = 22"),
        (2, {"graph": "sparse"}, "cohort: found 2 sites, expected 3 to 10000"),
        (10_001, {}, "cohort: found 10001 sites, expected 3 to 10000"),
        (1001, {"graph": "complete"}, "cohort: found 1001 sites, expected 3 to 1000"),
        (10, {"max_dropouts": 4}, r"max_dropouts: found 4, expected at most n - minimum_survivors = 10 - 7 = 3"),
    ],
)
def test_impossible_graphs_are_refused(cohort_size: int, options: dict[str, Any], text: str) -> None:
    """What is unsafe, or could not finish, is refused with the numbers."""
    with pytest.raises(ParameterError, match=text):
        choose_thresholds(cohort_size, **options)


def test_the_graph_is_bound_to_the_context() -> None:
    """Two rounds that differ in the number of neighbours only have nothing in common."""
    one = StoppedRound(12, graph="sparse", max_corrupt=0, max_dropouts=1).parameters
    other = dataclasses.replace(one, neighbours=10)
    assert one.context != other.context
    assert one.digest != dataclasses.replace(one, neighbours=None).digest
