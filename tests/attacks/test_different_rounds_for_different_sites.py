"""Attack: some sites are shown another model, policy, cohort or round than the others, to tell their updates apart."""

import pytest
from msgspec.structs import replace
from support.rounds import HISTOGRAM, UPDATE, StoppedRound

from secureagg import AuthenticationFailed, FixedPoint, Lane, SiteId, UnexpectedMessage
from secureagg.messages import CohortKeys

pytestmark = pytest.mark.usefixtures("backend")

LANES = {
    "wider range": [Lane(name="update", length=5, encoding=FixedPoint(value_range=2.0), weighted=True), HISTOGRAM],
    "finer encoding": [
        Lane(name="update", length=5, encoding=FixedPoint(value_range=1.0, value_bits=17), weighted=True),
        HISTOGRAM,
    ],
    "no histogram": [UPDATE],
}


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": b"\1" * 32},
        {"threshold": 4},
        {"minimum_survivors": 4},
        {"max_corrupt": 0},
        {"round_number": 7},
        {"run": "another run"},
        {"max_weight": 11},
        {"cohort": [SiteId(f"site-00{index}") for index in range(3)]},
        *({"lanes": lanes} for lanes in LANES.values()),
    ],
    ids=[
        *("model", "threshold", "minimum", "max_corrupt", "round", "run", "max_weight", "cohort"),
        *LANES,
    ],
)
def test_a_site_with_another_view_takes_no_part(change: dict[str, object]) -> None:
    """Whatever differs, the site refuses the others' messages and the coordinator refuses the site's.

    Stopped by the context: ``RoundParameters.context``, compared in ``Participant.receive`` and bound into every
    signature, key and ciphertext.
    """
    victim = SiteId("site-000")
    stopped = StoppedRound(change_for={victim: change})
    site, advertisement = stopped.pending.pop(0)
    with pytest.raises(UnexpectedMessage, match="another round, model or parameters"):
        stopped.coordinator.receive(advertisement, sender=site)
    keys = stopped.until(CohortKeys)
    with pytest.raises(UnexpectedMessage, match="of another round or other parameters"):
        stopped.answers(victim, keys[SiteId("site-001")])


def test_advertisements_of_another_round_under_this_rounds_envelope() -> None:
    """The coordinator's own message may claim this round; the advertisements inside, signed for another, are refused.

    Stopped by the context check of each advertisement in ``Participant._share_secrets``.
    """
    earlier = StoppedRound(run="earlier run").until(CohortKeys)
    stopped = StoppedRound()
    now = stopped.until(CohortKeys)[stopped.sites[0]]
    old = earlier[stopped.sites[0]].advertisements[1]
    mixed = replace(now, advertisements=(now.advertisements[0], old, *now.advertisements[2:]))
    with pytest.raises(AuthenticationFailed, match="advertisement of site-001 is bound to another context"):
        stopped.answers(stopped.sites[0], mixed)
