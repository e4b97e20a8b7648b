"""Attack: sites that do not exist, or one site counted twice, fill a cohort whose honest members are few."""

import msgspec
import pytest
from support.rounds import StoppedRound

from secureagg import Identity, MalformedMessage, SiteId, ThresholdNotMet, UnexpectedMessage
from secureagg.agreement import KeyPair
from secureagg.codec import sign
from secureagg.messages import CohortKeys, KeyAdvertisement
from secureagg.testing import CountingEntropy

replace = msgspec.structs.replace
pytestmark = pytest.mark.usefixtures("backend")


def test_an_invented_site() -> None:
    """An advertisement of a site outside the cohort is refused however it is signed.

    Stopped by the membership check in ``Participant._share_secrets``.
    """
    stopped, entropy = StoppedRound(), CountingEntropy(b"attacker")
    message = stopped.until(CohortKeys)[stopped.sites[0]]
    invented = KeyAdvertisement(
        context=stopped.parameters.context,
        sender=SiteId("sybil"),
        mask_key=KeyPair.generate(entropy).public,
        channel_key=KeyPair.generate(entropy).public,
    )
    invented = sign(invented, Identity.generate(entropy))
    with pytest.raises(UnexpectedMessage, match="sybil, who is not in the cohort"):
        stopped.answers(stopped.sites[0], replace(message, advertisements=(*message.advertisements, invented)))


def test_a_site_listed_twice() -> None:
    """The same advertisement twice does not count as two sites.

    Stopped by the duplicate check in ``Participant._share_secrets``.
    """
    stopped = StoppedRound()
    message = stopped.until(CohortKeys)[stopped.sites[0]]
    twice = (*message.advertisements[:3], message.advertisements[2])
    with pytest.raises(MalformedMessage, match="listed twice"):
        stopped.answers(stopped.sites[0], replace(message, advertisements=twice))


def test_a_cohort_shrunk_below_the_minimum() -> None:
    """Relaying too few advertisements, so that the sum would cover fewer sites than agreed, is refused.

    Stopped by ``Participant._need``.
    """
    stopped = StoppedRound()
    message = stopped.until(CohortKeys)[stopped.sites[0]]
    with pytest.raises(ThresholdNotMet, match="2 holders who advertised, expected at least 3"):
        stopped.answers(stopped.sites[0], replace(message, advertisements=message.advertisements[:2]))
