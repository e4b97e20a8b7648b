"""Attack: a site that was given up comes back with its late message, or its machine is fed the round it has missed.

Counted late, its input would enter a sum that its masks were removed from: the coordinator could read it.
"""

import msgspec
import pytest
from support.rounds import StoppedRound
from support.uploads import bytes_of

from secureagg import (
    InconsistentSurvivors,
    LocalProtocolError,
    RemoteProtocolError,
    SecureAggregationError,
    SiteId,
    UnexpectedMessage,
)
from secureagg.codec import decode_from_site, encode
from secureagg.messages import (
    AggregateAgreement,
    AggregateReport,
    AggregateSignature,
    CohortKeys,
    EncryptedAggregate,
    EncryptedShares,
    KeyAdvertisement,
    MaskedInput,
    RoundFailed,
    RoundReceipt,
    ShareDelivery,
    SurvivorList,
    SurvivorSignature,
    ToCoordinator,
    ToSite,
    UnmaskRequest,
    UnmaskShares,
)
from secureagg.phases import (
    Aborted,
    AwaitingCohortKeys,
    AwaitingInput,
    AwaitingShares,
    AwaitingSurvivors,
)

replace = msgspec.structs.replace
pytestmark = pytest.mark.usefixtures("backend")
KINDS = (KeyAdvertisement, EncryptedShares, MaskedInput, SurvivorSignature, UnmaskShares)
VICTIM = SiteId("site-003")


def sent_by_victim() -> list[ToCoordinator]:
    """All messages of the victim in a round in which nobody is late."""
    twin, sent = StoppedRound(), []
    while twin.pending:
        sent += [message for site, message in twin.pending if site == VICTIM]
        twin.deliver(twin.collect())
    kinds = KINDS if StoppedRound.backend == "masked" else (*KINDS, AggregateSignature, AggregateReport)
    assert all(isinstance(message, kind) for message, kind in zip(sent, kinds, strict=True))
    return sent


def state(stopped: StoppedRound) -> tuple[object, ...]:
    """All that the coordinator has collected so far."""
    phase = stopped.coordinator.phase
    sums = bytes_of(getattr(phase, "sums", {}))
    return id(phase), stopped.coordinator.expected, dict(getattr(phase, "received", {})), sums


def refused(stopped: StoppedRound, messages: list[ToCoordinator]) -> None:
    """The coordinator refuses each of the victim's ``messages`` and stays as it was."""
    before = state(stopped)
    for message in messages:
        with pytest.raises(UnexpectedMessage, match=f"participant {VICTIM}"):
            stopped.coordinator.receive(decode_from_site(encode(message)), sender=VICTIM)
        assert state(stopped) == before


@pytest.mark.parametrize("given_up", ["its connection was lost", "its time was up"])
@pytest.mark.parametrize("missed", KINDS)
def test_late_in_every_later_phase(missed: type[ToCoordinator], given_up: str) -> None:
    """Whatever the site says from then on, in whichever phase, is refused; the sum is exactly the survivors'.

    A site that has sent its masked input is one of them.  Stopped by ``Coordinator.expected`` and the phase table, in
    ``Coordinator.receive``.
    """
    check_late_from(missed, given_up)


@pytest.mark.parametrize("backend", ["homomorphic"], indirect=True)
@pytest.mark.parametrize("given_up", ["its connection was lost", "its time was up"])
@pytest.mark.parametrize("missed", [AggregateSignature, AggregateReport])
def test_late_when_the_sum_is_opened(missed: type[ToCoordinator], given_up: str) -> None:
    """The same for a site that has revealed its shares, and does not help to open the encrypted sum."""
    check_late_from(missed, given_up)


def check_late_from(missed: type[ToCoordinator], given_up: str) -> None:
    """From the message ``missed`` on, what the site sends is late."""
    sent = sent_by_victim()
    first = next(number for number, message in enumerate(sent) if isinstance(message, missed))
    late = sent[first:]
    stopped = StoppedRound()
    for number, on_time in enumerate(sent):
        kind = type(on_time)
        if number >= first:
            stopped.pending = [pair for pair in stopped.pending if pair[0] != VICTIM]
            if number == first and given_up == "its connection was lost":
                assert stopped.coordinator.drop(VICTIM) == []
            site, message = stopped.pending.pop(0)
            assert isinstance(message, kind)
            stopped.coordinator.receive(message, sender=site)
            if number > first or given_up == "its connection was lost":
                refused(stopped, late)
        stopped.deliver(stopped.collect())
    refused(stopped, late)
    stopped.check_sum(stopped.sites if first > 2 else stopped.sites[:3])


def test_late_after_a_round_that_failed() -> None:
    """After a round without a release nothing is taken any more, though the missing input would have completed it.

    Stopped by the phase table: ``Aborted`` takes nothing.
    """
    stopped = StoppedRound(silent={VICTIM: MaskedInput, SiteId("site-002"): MaskedInput})
    while stopped.pending:
        stopped.deliver(stopped.collect())
    assert isinstance(stopped.coordinator.phase, Aborted)
    refused(stopped, sent_by_victim())
    assert stopped.coordinator.close_phase() == []
    assert stopped.coordinator.drop(VICTIM) == []
    assert isinstance(stopped.coordinator.phase, Aborted)


STUCK: dict[type, type[ToCoordinator]] = {
    AwaitingCohortKeys: KeyAdvertisement,
    AwaitingShares: EncryptedShares,
    AwaitingInput: MaskedInput,
    AwaitingSurvivors: MaskedInput,
}
TO_SITE = (CohortKeys, ShareDelivery, SurvivorList, UnmaskRequest, RoundReceipt, RoundFailed)


def left_behind(phase: type) -> tuple[StoppedRound, dict[type, ToSite]]:
    """A round that went on without the victim, whose machine still stands in ``phase``, and what the coordinator told
    the others."""
    stopped = StoppedRound(silent={VICTIM: STUCK[phase]})
    if phase is AwaitingInput:
        stopped.participants[VICTIM]._input = None  # it still trains
    told: dict[type, ToSite] = {}
    while stopped.pending:
        outbound = stopped.collect()
        if stopped.sites[0] in outbound:
            message = outbound[stopped.sites[0]]
            told[next(kind for kind in (*TO_SITE, *type(message).__mro__) if isinstance(message, kind))] = message
        stopped.deliver(outbound)
    told[RoundFailed] = RoundFailed(context=stopped.parameters.context, code="threshold-not-met")
    opening = () if StoppedRound.backend == "masked" else (EncryptedAggregate, AggregateAgreement)
    assert set(told) == {*TO_SITE, *opening}
    assert isinstance(stopped.participants[VICTIM].phase, phase)
    stopped.check_sum(stopped.sites[:3])
    return stopped, told


def over(stopped: StoppedRound) -> None:
    """The victim's machine has ended the round, holds neither secret nor input, and has noted no answer."""
    participant = stopped.participants[VICTIM]
    assert isinstance(participant.phase, Aborted)
    assert isinstance(participant.phase.error, SecureAggregationError)
    assert participant._input is None
    with pytest.raises(LocalProtocolError):
        participant.submit(stopped.inputs[VICTIM])
    # The journal would refuse this if the machine had answered an unmask request.
    stopped.journals[VICTIM].answer(stopped.parameters.run, stopped.parameters.round_number)


@pytest.mark.parametrize("message", TO_SITE)
@pytest.mark.parametrize("phase", STUCK)
def test_its_machine_hears_of_the_round_it_has_missed(phase: type, message: type[ToSite]) -> None:
    """A site that was left behind and then hears what the others were told ends the round and says nothing, neither to
    this message nor to any later one, and an update that is ready by then does not leave it.

    Stopped by the transition table, and by the checks for the own entry in ``Participant._share_secrets`` and
    ``Participant._sign_survivors`` and for the own ciphertexts in ``open_shares``.
    """
    stopped, told = left_behind(phase)
    if message is RoundFailed:
        assert stopped.answers(VICTIM, told[message]) == []
    else:
        with pytest.raises(RemoteProtocolError):
            stopped.answers(VICTIM, told[message])
    over(stopped)
    for later in told.values():
        with pytest.raises(UnexpectedMessage):
            stopped.answers(VICTIM, later)


def test_the_list_names_it_no_more() -> None:
    """Its masked input came too late: it does not sign the list without it, so it helps to unmask no sum that lacks it.

    Stopped by the check for the own digest in ``Participant._sign_survivors``.
    """
    stopped, told = left_behind(AwaitingSurvivors)
    with pytest.raises(InconsistentSurvivors, match="own input is missing"):
        stopped.answers(VICTIM, told[SurvivorList])
    with pytest.raises(UnexpectedMessage):
        stopped.answers(VICTIM, told[UnmaskRequest])
    over(stopped)


def test_present_for_itself_and_gone_for_the_others() -> None:
    """The coordinator keeps a site's shares from the others, yet has it send its masked input: no list names both.

    Nobody holds a share of the victim's self seed, the others sign no list with it, and it signs none without.
    Stopped by the check of sharers and of the own digest in ``Participant._sign_survivors``.
    """
    # The same entropy makes the same ciphertexts: these are what the others sealed for the victim.
    delivery = StoppedRound().until(ShareDelivery)[VICTIM]
    stopped = StoppedRound(silent={VICTIM: EncryptedShares})
    stopped.deliver(stopped.until(ShareDelivery))
    (masked,) = stopped.answers(VICTIM, delivery)
    assert isinstance(masked, MaskedInput)
    refused(stopped, [masked])
    lists = stopped.until(SurvivorList)
    digest = stopped.participants[VICTIM].phase.input_digest
    for site in stopped.sites[:2]:
        assert VICTIM not in stopped.participants[site].phase.held
        extended = replace(lists[site], survivors=(*lists[site].survivors, (VICTIM, digest)))
        with pytest.raises(InconsistentSurvivors, match=f"{VICTIM} survived without having shared keys"):
            stopped.answers(site, extended)
    with pytest.raises(InconsistentSurvivors, match="own input is missing"):
        stopped.answers(VICTIM, lists[stopped.sites[0]])
    over(stopped)


def test_a_late_signer_reveals_for_the_one_list() -> None:
    """A site whose signature came too late may still hear the request: it answers for the list that it has signed, with
    one kind of share of each site, and its late answer changes nothing.

    Stopped by ``Participant._reveal_shares``, which knows one list, and by ``Coordinator.expected``.
    """
    stopped = StoppedRound(silent={VICTIM: SurvivorSignature})
    requests = stopped.until(UnmaskRequest)
    assert VICTIM not in requests
    (answer,) = stopped.answers(VICTIM, requests[stopped.sites[0]])
    assert isinstance(answer, UnmaskShares)
    assert [site for site, _ in answer.self_seed_shares] == stopped.sites
    assert answer.mask_key_shares == ()
    refused(stopped, [answer])
    with pytest.raises(UnexpectedMessage):
        stopped.answers(VICTIM, requests[stopped.sites[0]])
    stopped.deliver(requests)
    stopped.finish()
    refused(stopped, [answer])
    stopped.check_sum(stopped.sites)
