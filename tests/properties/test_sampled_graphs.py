"""What the planner of sparse graphs promises, counted on graphs that are drawn as sites draw them.

At a low level of security the bad events happen often enough to be counted; at the true one they never do.
"""

from collections.abc import Iterator
from fractions import Fraction
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from secureagg.graph import (
    MOST_DEALERS_PER_NEIGHBOUR,
    Neighbourhood,
    choose_neighbourhood,
    draw_neighbours,
    least_honest_survivors,
)

# n, colluding, dropouts, bits of security and of correctness: here the planner's steps come near to what it may risk.
COARSE = [(60, 14, 6, 6), (80, 10, 16, 5), (80, 8, 8, 3), (100, 12, 20, 3), (100, 18, 10, 3), (100, 4, 10, 4)]


def plan(n: int, corrupt: int, dropouts: int, **options: int | bool) -> Neighbourhood:
    """The neighbourhood that the planner chooses; there is one."""
    found = choose_neighbourhood(n, corrupt=Fraction(corrupt, n), dropouts=Fraction(dropouts, n), **options)
    assert found is not None
    return found


def graphs(count: int, n: int, k: int, *, at_once: int = 500) -> Iterator[np.ndarray]:
    """``count`` graphs, in parts: [graph, site, holder] -> whether the site drew the holder."""
    random = np.random.default_rng(n * k)
    for first in range(0, count, at_once):
        weights = random.random((min(at_once, count - first), n, n), dtype=np.float32)
        weights[:, np.arange(n), np.arange(n)] = 2  # nobody draws itself
        drawn = np.zeros(weights.shape, dtype=bool)
        np.put_along_axis(drawn, np.argpartition(weights, k, axis=2)[:, :, :k], True, axis=2)
        yield drawn


def in_pieces(drawn: np.ndarray) -> np.ndarray:
    """Of each graph, whether some sites are out of the first one's reach along edges in either direction."""
    edges = (drawn | drawn.transpose(0, 2, 1)).astype(np.float32)
    reached = np.zeros((*drawn.shape[:2], 1), dtype=np.float32)
    reached[:, 0] = 1
    while ((further := (reached + edges @ reached > 0).astype(np.float32)) != reached).any():
        reached = further
    return ~reached.all(axis=(1, 2))


def happenings(drawn: np.ndarray, chosen: Neighbourhood, corrupt: int, dropouts: int) -> np.ndarray:
    """Of each graph, whether an honest site has too many colluding holders, the honest survivors' graph falls apart,
    some site is left without enough holders.  The first sites collude, the last drop out."""
    n = drawn.shape[1]
    colluding = drawn[:, corrupt:, :corrupt].sum(axis=2)
    alive = drawn[:, :, : n - dropouts].sum(axis=2)
    return np.array(
        [
            (2 * chosen.threshold <= chosen.neighbours + colluding).any(axis=1),
            in_pieces(drawn[:, corrupt : n - dropouts, corrupt : n - dropouts]),
            (alive < chosen.threshold).any(axis=1),
        ]
    )


def most(trials: int, bits: int) -> float:
    """As many of ``trials`` as an event of chance 2^-``bits`` stays below, but for four standard deviations."""
    chance = 2.0**-bits
    return trials * chance + 4 * sqrt(trials * chance)


@pytest.mark.parametrize(("n", "corrupt", "dropouts", "bits"), COARSE)
def test_bad_graphs_are_as_rare_as_planned(n: int, corrupt: int, dropouts: int, bits: int) -> None:
    """Neither too many colluding holders, nor survivors in pieces, nor a site without enough holders is more frequent
    than the level that was asked for; the first is at least half as frequent, so that this counts something."""
    trials = 10_000
    chosen = plan(n, corrupt, dropouts, security_bits=bits, correctness_bits=bits)
    found = sum(
        happenings(drawn, chosen, corrupt, dropouts).sum(axis=1) for drawn in graphs(trials, n, chosen.neighbours)
    )
    exceeded, apart, too_few = found
    assert trials * 2.0 ** -(bits + 1) / 2 < exceeded <= most(trials, bits + 1)
    assert apart <= most(trials, bits + 1)
    assert too_few <= most(trials, bits)


def test_thin_graphs_fall_apart() -> None:
    """With too few neighbours for the sites that are lost, the survivors' graph is in pieces more often than not."""
    (drawn,) = graphs(500, 40, 2)
    assert in_pieces(drawn[:, 10:30, 10:30]).mean() > 0.5
    assert not in_pieces(drawn).all()


def smallest_closed(drawn: np.ndarray, threshold: int, corrupt: int) -> np.ndarray:
    """Of each graph, the number of sites in the smallest set of honest ones of whom each drew ``threshold`` holders in
    it or colluding, by looking at every set; n + 1 if there is none."""
    n = drawn.shape[1]
    holders = (drawn << np.arange(n)).sum(axis=2)  # of each site, as a bit mask
    sets = np.arange(1, 1 << (n - corrupt)) << corrupt
    smallest = np.full(len(drawn), n + 1)
    for chosen in sets:
        members = [site for site in range(n) if chosen >> site & 1]
        inside = np.bitwise_count(holders[:, members] & (chosen | (1 << corrupt) - 1))
        closed = (inside >= threshold).all(axis=1)
        smallest[closed] = np.minimum(smallest[closed], len(members))
    return smallest


@pytest.mark.parametrize(
    ("n", "k", "t", "corrupt", "bits"),
    [(8, 4, 3, 1, 4), (9, 4, 3, 0, 4), (10, 4, 3, 0, 5), (10, 6, 5, 2, 4), (11, 6, 4, 0, 4), (11, 4, 3, 0, 6)],
)
def test_small_closed_sets_are_as_rare_as_planned(n: int, k: int, t: int, corrupt: int, bits: int) -> None:
    """A sum over fewer honest sites than ``least_honest_survivors`` says is no more frequent than planned; over that
    many or a few more, some graphs do give one."""
    trials = 10_000
    least = least_honest_survivors(n, k, t, corrupt, security_bits=bits)
    sizes = np.concatenate([smallest_closed(drawn, t, corrupt) for drawn in graphs(trials, n, k)])
    assert (sizes < least).sum() <= most(trials, bits + 1)
    assert (sizes <= least + 1).any()


@pytest.mark.parametrize("n", [101, 150, 200, 400])
@pytest.mark.parametrize(
    ("corrupt", "dropouts"), [(0, 0.01), (0.01, 0.01), (0.05, 0.05), (0.1, 0.1), (0.1, 0.2), (0.2, 0.1)]
)
def test_one_sum(n: int, corrupt: float, dropouts: float) -> None:
    """With ``one_sum`` every sum covers more than half of the honest sites."""
    colluding = int(corrupt * n)
    chosen = plan(n, colluding, int(dropouts * n), one_sum=True)
    assert 2 * least_honest_survivors(n, chosen.neighbours, chosen.threshold, colluding) > n - colluding


def test_nothing_bad_at_the_true_level() -> None:
    """Of some hundred graphs at the level that rounds run at none is bad, and nobody is drawn nearly as often as a site
    puts up with."""
    chosen = plan(200, 20, 20, one_sum=True)
    for drawn in graphs(300, 200, chosen.neighbours, at_once=100):
        assert not happenings(drawn, chosen, 20, 20).any()
        assert drawn.sum(axis=1).max() < MOST_DEALERS_PER_NEIGHBOUR * chosen.neighbours / 2


def test_nobody_is_drawn_too_often() -> None:
    """Even with the fewest neighbours that rounds run with, no more than one in a thousand rounds has a site that more
    sites draw than it puts up with."""
    k = plan(1000, 0, 1, one_sum=True).neighbours
    for n in (101, 1000, 10_000):
        assert n * stats.binom.sf(MOST_DEALERS_PER_NEIGHBOUR * k, n - 1, k / (n - 1)) < 1e-3


@pytest.mark.parametrize(("position", "n", "k"), [(1, 12, 8), (5, 9, 3), (30, 30, 6)])
def test_draws_are_uniform(position: int, n: int, k: int) -> None:
    """A site draws ``k`` different others in order, never itself, and everyone equally often."""
    random, trials = np.random.default_rng(k), 5000
    counted = np.zeros(n + 1)
    for _ in range(trials):
        drawn = draw_neighbours(position=position, cohort_size=n, neighbours=k, entropy=random.bytes)
        assert len(drawn) == k
        assert list(drawn) == sorted(set(drawn) - {position})
        counted[list(drawn)] += 1
    assert counted[0] == counted[position] == 0
    others, share = np.delete(counted, [0, position]), k / (n - 1)
    # Without replacement the counts of one draw depend on each other, which the first factor makes up for.
    squares = (n - 2) / (n - 1) * ((others - trials * share) ** 2).sum() / (trials * share * (1 - share))
    assert 1e-4 < stats.chi2.sf(squares, n - 2) < 1 - 1e-4
