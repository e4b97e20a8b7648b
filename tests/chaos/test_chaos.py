"""Federations of processes that are killed, stopped and cut off; `make chaos` runs many more rounds of it."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from support.chaos import COORDINATOR, KINDS, SITES, Chaos, Fault, draw_faults, draw_lines
from support.chaos_programs import Nursery

from sites import recipe
from sites.manifest import Policy

ROUNDS = 12
# One of each kind, in an order in which each meets a federation that goes on.
FAULTS = [
    Fault(after=1, delay=0.1, kind="kill site", whom=("a",), seconds=0.2),
    Fault(after=2, delay=0.0, kind="cut line", whom=("b",), seconds=0.0),
    Fault(after=3, delay=0.1, kind="kill coordinator", whom=(COORDINATOR,), seconds=0.1),
    Fault(after=4, delay=0.0, kind="stop site", whom=("c",), seconds=1.0),
    Fault(after=5, delay=0.0, kind="line down", whom=("d",), seconds=1.0),
    Fault(after=6, delay=0.1, kind="kill several", whom=("a", "b", COORDINATOR), seconds=0.3),
    Fault(after=8, delay=0.0, kind="stop coordinator", whom=(COORDINATOR,), seconds=1.0),
    Fault(after=9, delay=0.0, kind="cut all lines", whom=SITES, seconds=0.0),
    Fault(after=10, delay=0.1, kind="kill all", whom=(*SITES, COORDINATOR), seconds=0.5),
    Fault(after=ROUNDS + 1, delay=0.0, kind="kill coordinator", whom=(COORDINATOR,), seconds=0.1),
]
needs_tenseal = pytest.mark.skipif(find_spec("tenseal") is None, reason="the extra `homomorphic` is not installed")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("policy", "ledgers"),
    [(recipe.POLICY, False), (recipe.POLICY, True), pytest.param(recipe.HOMOMORPHIC, False, marks=needs_tenseal)],
    ids=["masked", "ledgers", "homomorphic"],
)
def test_a_federation_survives(tmp_path: Path, policy: Policy, ledgers: bool) -> None:
    """Through one fault of each kind: every sum is the survivors' or none, no round counts twice, no number is used
    twice, nothing is released that is not booked, and the run comes to its end."""
    lines = draw_lines(1, SITES)
    with (
        Nursery() as nursery,
        Chaos(
            tmp_path, nursery, seed=1, rounds=ROUNDS, policy=policy, ledgers=ledgers, faults=FAULTS, lines=lines
        ) as chaos,
    ):
        outcome = chaos.run()
    assert outcome.injected.keys() >= KINDS.keys() - {"kill coordinator"}
    assert outcome.tally.rounds == ROUNDS + 1
    assert outcome.tally.released >= 4
    assert outcome.tally.models >= 3 * outcome.tally.released
    assert outcome.with_final_model >= 1
    assert not ledgers or outcome.tally.draws >= outcome.tally.released


def test_a_seed_draws_the_same_faults() -> None:
    """The same seed gives the same faults and lines, another one others; all kinds come up."""
    first, again, other = (draw_faults(seed, rounds=100, names=SITES, every=2.0) for seed in (1, 1, 2))
    assert first == again != other
    assert draw_lines(1, SITES) == draw_lines(1, SITES) != draw_lines(2, SITES)
    assert {fault.kind for seed in range(5) for fault in draw_faults(seed, rounds=100, names=SITES, every=2.0)} == {
        *KINDS
    }
