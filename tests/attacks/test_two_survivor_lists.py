"""Attack: a site is shown as alive to some and as dropped to others, to collect both kinds of its shares.

Whoever holds ``threshold`` shares of a site's self seed and of its mask key removes both masks from its masked input
and reads it.
"""

import msgspec
import pytest
from support.rounds import StoppedRound

from secureagg import (
    AuthenticationFailed,
    InconsistentSurvivors,
    MalformedMessage,
    SiteId,
    ThresholdNotMet,
    UnexpectedMessage,
    labels,
)
from secureagg.codec import encode
from secureagg.messages import MaskedInput, SurvivorList, SurvivorSignature, UnmaskRequest, UnmaskShares

replace = msgspec.structs.replace
pytestmark = pytest.mark.usefixtures("backend")


def lists(n: int = 4) -> tuple[StoppedRound, SurvivorList]:
    """A round at the survivor list, and the honest list."""
    stopped = StoppedRound(n)
    message = stopped.until(SurvivorList)[stopped.sites[0]]
    assert isinstance(message, SurvivorList)
    return stopped, message


def without(message: SurvivorList, victim: SiteId) -> SurvivorList:
    """The list without one site."""
    return replace(message, survivors=tuple(pair for pair in message.survivors if pair[0] != victim))


def signature(stopped: StoppedRound, site: SiteId, shown: SurvivorList) -> bytes:
    """The signature of ``site`` on the list it is shown."""
    answer = stopped.answers(site, shown)[0]
    assert isinstance(answer, SurvivorSignature)
    return answer.list_signature


def request(stopped: StoppedRound, signatures: dict[SiteId, bytes]) -> UnmaskRequest:
    """An unmask request with these signatures."""
    return UnmaskRequest(context=stopped.parameters.context, list_signatures=tuple(sorted(signatures.items())))


def test_two_lists_shown_to_two_halves() -> None:
    """Half of the sites are shown a list with the victim, half one without: neither list gathers a threshold.

    Stopped by the signature and threshold checks in ``Participant._reveal_shares``.
    """
    stopped, honest = lists(7)
    victim = stopped.sites[6]
    short = without(honest, victim)
    one, other = stopped.sites[:3], stopped.sites[3:6]
    on_honest = {site: signature(stopped, site, honest) for site in (*one, victim)}
    on_short = {site: signature(stopped, site, short) for site in other}
    for site, own in ((one[0], on_honest), (other[0], on_short)):
        with pytest.raises(ThresholdNotMet, match="signatures on the survivor list, expected at least 5"):
            stopped.answers(site, request(stopped, own))
    for site in (one[1], other[1]):
        with pytest.raises((AuthenticationFailed, InconsistentSurvivors)):
            stopped.answers(site, request(stopped, {**on_honest, **on_short}))


def test_colluders_sign_both_lists() -> None:
    """With ``max_corrupt`` sites signing both lists, still at most one of them reaches the threshold.

    Stopped by ``2t > n + c``, checked in ``check_thresholds``.
    """
    stopped, honest = lists(7)
    victim, corrupt = stopped.sites[6], stopped.sites[0]
    assert stopped.parameters.max_corrupt >= 1
    short = without(honest, victim)
    signed = stopped.identities[corrupt].sign(labels.SURVIVORS, stopped.parameters.context, encode(short)[0])
    on_short = {corrupt: signed, **{site: signature(stopped, site, short) for site in stopped.sites[1:4]}}
    on_honest = {site: signature(stopped, site, honest) for site in stopped.sites[4:7]}
    on_honest[corrupt] = stopped.identities[corrupt].sign(
        labels.SURVIVORS, stopped.parameters.context, encode(honest)[0]
    )
    assert len(on_short) + len(on_honest) == 7 + 1
    with pytest.raises(ThresholdNotMet):
        stopped.answers(stopped.sites[1], request(stopped, on_short))
    with pytest.raises(ThresholdNotMet):
        stopped.answers(stopped.sites[4], request(stopped, on_honest))


def test_a_site_signs_one_list() -> None:
    """A second list, however reasonable, is refused by the site that has signed one.

    Stopped by the transition table: the site no longer waits for a list.
    """
    stopped, honest = lists()
    site = stopped.sites[0]
    signature(stopped, site, honest)
    with pytest.raises(UnexpectedMessage):
        stopped.answers(site, without(honest, stopped.sites[3]))


def test_fewer_signatures_than_the_threshold() -> None:
    """With one signature too few nothing is revealed.  Stopped by the count in ``Participant._reveal_shares``."""
    stopped, honest = lists()
    signatures = {site: signature(stopped, site, honest) for site in stopped.sites[:2]}
    with pytest.raises(ThresholdNotMet, match="2 signatures on the survivor list, expected at least 3"):
        stopped.answers(stopped.sites[0], request(stopped, signatures))


def test_one_signature_counted_several_times() -> None:
    """A signature under several names does not verify, the same name twice is malformed.

    Stopped by ``verify`` with each signer's own key, and by ``named``.
    """
    stopped, honest = lists()
    a, b, c, _ = stopped.sites
    one = signature(stopped, a, honest)
    two = signature(stopped, b, honest)
    with pytest.raises(AuthenticationFailed, match="survivor signature of site-001"):
        stopped.answers(a, request(stopped, {a: one, b: one, c: one}))
    twice = UnmaskRequest(context=stopped.parameters.context, list_signatures=((a, one), (a, one), (b, two)))
    with pytest.raises(MalformedMessage, match="repeat"):
        stopped.answers(b, twice)


def test_signatures_of_an_earlier_round() -> None:
    """Signatures on the list of another round, over the same sites, are refused.

    Stopped by the context under each signature.
    """
    earlier, old_list = lists()
    old = {site: signature(earlier, site, old_list) for site in earlier.sites}
    stopped = StoppedRound(run="another run")
    stopped.deliver(stopped.until(SurvivorList))
    with pytest.raises(AuthenticationFailed, match="survivor signature of site-000"):
        stopped.answers(stopped.sites[0], request(stopped, old))


def test_a_signer_who_is_no_survivor() -> None:
    """The signature of a site outside the list does not count.  Stopped by the check of signers."""
    stopped = StoppedRound(7)
    stopped.silent[stopped.sites[6]] = object
    stopped.pending = [pair for pair in stopped.pending if pair[0] != stopped.sites[6]]
    honest = stopped.until(SurvivorList)[stopped.sites[0]]
    signed = stopped.identities[stopped.sites[6]].sign(labels.SURVIVORS, stopped.parameters.context, encode(honest)[0])
    signatures = {site: signature(stopped, site, honest) for site in stopped.sites[:4]}
    with pytest.raises(InconsistentSurvivors, match="site-006, who is not a survivor"):
        stopped.answers(stopped.sites[0], request(stopped, {**signatures, stopped.sites[6]: signed}))


@pytest.mark.parametrize("shown", ["without me", "other digest", "stranger", "too few", "out of order", "bad digest"])
def test_a_list_that_cannot_be_true(shown: str) -> None:
    """A list without this site's own input, with a stranger, or too short is not signed.

    Stopped by the checks in ``Participant._sign_survivors``.
    """
    stopped, honest = lists()
    first, *others = honest.survivors
    changed, error = {
        "without me": (others, InconsistentSurvivors),
        "other digest": ([(first[0], bytes(32)), *others], InconsistentSurvivors),
        "stranger": ([*honest.survivors, (SiteId("zzz"), bytes(32))], InconsistentSurvivors),
        "too few": (honest.survivors[:2], ThresholdNotMet),
        "out of order": ([*others, first], MalformedMessage),
        "bad digest": ([first, (others[0][0], b"x"), *others[1:]], MalformedMessage),
    }[shown]
    with pytest.raises(error):
        stopped.answers(stopped.sites[0], replace(honest, survivors=tuple(changed)))


def test_never_both_kinds_of_share_of_one_site() -> None:
    """In an answer each sharer appears once: survivors with self-seed shares, dropouts with mask-key shares."""
    stopped = StoppedRound(6)
    stopped.silent[stopped.sites[5]] = MaskedInput
    asked = stopped.until(UnmaskRequest)
    for site, message in asked.items():
        (answer,) = stopped.answers(site, message)
        assert isinstance(answer, UnmaskShares)
        alive, gone = ({name for name, _ in part} for part in (answer.self_seed_shares, answer.mask_key_shares))
        assert alive == set(stopped.sites[:5])
        assert gone == {stopped.sites[5]}
