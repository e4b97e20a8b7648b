"""The site's machine: what it may be asked, in which order.  What a liar may ask stands in tests/attacks."""

import msgspec
import pytest
from support.rounds import StoppedRound

from secureagg import LocalProtocolError, ParameterError, Participant, ThresholdNotMet, UnexpectedMessage
from secureagg.messages import (
    AggregateAgreement,
    CohortKeys,
    EncryptedAggregate,
    EncryptedShares,
    KeyedDelivery,
    MaskedInput,
    RoundFailed,
    RoundReceipt,
    ShareDelivery,
    SurvivorList,
    UnmaskRequest,
)
from secureagg.phases import (
    Aborted,
    AwaitingAggregate,
    AwaitingAgreement,
    AwaitingCohortKeys,
    AwaitingInput,
    AwaitingReceipt,
    AwaitingShares,
    AwaitingSurvivors,
    AwaitingUnmaskRequest,
    Created,
    OpeningAggregate,
    ParticipantFinished,
)
from secureagg.testing import MemoryJournal

KINDS = (CohortKeys, ShareDelivery, SurvivorList, UnmaskRequest, RoundReceipt)
PHASES = (AwaitingCohortKeys, AwaitingShares, AwaitingSurvivors, AwaitingUnmaskRequest, AwaitingReceipt)


def test_phases_follow_the_messages() -> None:
    """Each message of the coordinator moves the site to the next phase, in the one order there is."""
    stopped = StoppedRound()
    site = stopped.sites[0]
    for kind, phase in zip(KINDS, PHASES, strict=True):
        outbound = stopped.until(kind)
        assert type(stopped.participants[site].phase) is phase
        stopped.deliver(outbound)
    assert type(stopped.participants[site].phase) is ParticipantFinished


def all_messages() -> dict[type, object]:
    """One honest message of each kind for the first site, from a finished round."""
    stopped, found = StoppedRound(), {}
    for kind in KINDS:
        outbound = stopped.until(kind)
        found[kind] = outbound[stopped.sites[0]]
        stopped.deliver(outbound)
    return found


@pytest.mark.parametrize("sent", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("reached", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_out_of_place_ends_the_round(reached: type, sent: type) -> None:
    """Every message that is not the next one is refused, and the machine keeps no secret afterwards."""
    if reached is sent:
        return
    message = all_messages()[sent]
    stopped = StoppedRound()
    stopped.until(reached)
    participant = stopped.participants[stopped.sites[0]]
    with pytest.raises(UnexpectedMessage, match=r"participant site-000, \w+, from the coordinator"):
        stopped.answers(stopped.sites[0], message)
    assert isinstance(participant.phase, Aborted)
    assert participant._input is None


@pytest.mark.parametrize("reached", KINDS, ids=lambda kind: kind.__name__)
def test_a_failed_round_ends_for_the_site(reached: type) -> None:
    """The coordinator may end a round at any time; the site then holds no secret and answers nothing."""
    stopped = StoppedRound()
    stopped.until(reached)
    site = stopped.sites[0]
    failed = RoundFailed(context=stopped.parameters.context, code="threshold-not-met")
    assert stopped.answers(site, failed) == []
    assert isinstance(stopped.participants[site].phase, Aborted)


def test_the_input_may_come_early_or_late_but_once() -> None:
    """The masked input leaves as soon as both the shares and the input are there; a second input is refused."""
    stopped = StoppedRound()
    site = stopped.sites[0]
    late = Participant(
        site=site, identity=stopped.identities[site], parameters=stopped.parameters, journal=MemoryJournal()
    )
    stopped.participants[site] = late
    stopped.pending = [pair for pair in stopped.pending if pair[0] != site]
    assert type(late.phase) is Created
    with pytest.raises(LocalProtocolError, match="in phase Created"):
        late.submit(stopped.inputs[site])
    stopped.pending += [(site, message) for message in late.start()]
    stopped.deliver(stopped.until(ShareDelivery))
    assert type(late.phase) is AwaitingInput
    stopped.pending += [(site, message) for message in late.submit(stopped.inputs[site])]
    assert type(late.phase) is AwaitingSurvivors
    with pytest.raises(LocalProtocolError, match="expected one before it is due"):
        late.submit(stopped.inputs[site])
    stopped.finish()
    assert type(late.phase) is ParticipantFinished


def test_an_early_second_input_is_refused() -> None:
    """Two inputs before any mask exists are refused as well."""
    stopped = StoppedRound()
    site = stopped.sites[0]
    with pytest.raises(LocalProtocolError):
        stopped.participants[site].submit(stopped.inputs[site])


def test_a_machine_starts_once() -> None:
    """Starting twice is a bug of this machine's own side, and said to be one."""
    stopped = StoppedRound()
    with pytest.raises(LocalProtocolError, match="started in phase AwaitingCohortKeys"):
        stopped.participants[stopped.sites[0]].start()


def test_a_site_takes_part_as_itself_only() -> None:
    """A site outside the cohort, or with keys that the roster does not list for it, cannot begin."""
    stopped = StoppedRound()
    a, b = stopped.sites[:2]
    with pytest.raises(ParameterError, match="not in the round's cohort"):
        Participant(
            site="stranger", identity=stopped.identities[a], parameters=stopped.parameters, journal=MemoryJournal()
        )
    with pytest.raises(ParameterError, match="another signing key"):
        Participant(site=b, identity=stopped.identities[a], parameters=stopped.parameters, journal=MemoryJournal())


def test_a_site_may_ask_for_more_survivors_never_fewer() -> None:
    """A site's own minimum is added to the round's: too small a cohort is refused before a key is made."""
    stopped = StoppedRound()
    site = stopped.sites[0]
    common = {"site": site, "identity": stopped.identities[site], "parameters": stopped.parameters}
    with pytest.raises(ThresholdNotMet, match="a cohort of 4 sites, expected at least 5"):
        Participant(**common, journal=MemoryJournal(), minimum_survivors=5)
    Participant(**common, journal=MemoryJournal(), minimum_survivors=1).start()


@pytest.mark.parametrize(("dropped", "kind"), [(EncryptedShares, ShareDelivery), (MaskedInput, SurvivorList)])
def test_a_stricter_site_stops_when_others_are_missing(dropped: type, kind: type) -> None:
    """Where the round could go on with three of four, a site that wants four gives no further answer."""
    stopped = StoppedRound()
    stopped.silent[stopped.sites[3]] = dropped
    strict = stopped.sites[0]
    stopped.participants[strict] = Participant(
        site=strict,
        identity=stopped.identities[strict],
        parameters=stopped.parameters,
        journal=MemoryJournal(),
        minimum_survivors=4,
    )
    stopped.pending = [pair for pair in stopped.pending if pair[0] != strict]
    participant = stopped.participants[strict]
    stopped.pending += [(strict, message) for message in participant.start()]
    participant.submit(stopped.inputs[strict])
    outbound = stopped.until(kind)
    with pytest.raises(ThresholdNotMet, match=r"3 [\w ]+, expected at least 4"):
        stopped.answers(strict, outbound[strict])


def test_an_aborted_machine_keeps_no_frame() -> None:
    """The error that an aborted machine keeps has no traceback, whose frames would hold the failed phase's shares."""
    stopped = StoppedRound()
    message = stopped.until(SurvivorList)[stopped.sites[0]]
    with pytest.raises(ThresholdNotMet) as raised:
        stopped.answers(stopped.sites[0], msgspec.structs.replace(message, survivors=message.survivors[:1]))
    phase = stopped.participants[stopped.sites[0]].phase
    assert isinstance(phase, Aborted)
    assert str(phase.error) == str(raised.value)
    assert type(phase.error) is ThresholdNotMet
    assert phase.error.__traceback__ is phase.error.__context__ is phase.error.__cause__ is None


def test_same_entropy_same_bytes() -> None:
    """The machine is a function of its inputs and its entropy: two runs give the same messages."""
    one, other = StoppedRound(seed=4), StoppedRound(seed=4)
    for kind in KINDS:
        first, second = one.until(kind), other.until(kind)
        assert first == second
        one.deliver(first)
        other.deliver(second)


# --- with the homomorphic backend ---

HOMOMORPHIC_KINDS = (
    CohortKeys,
    KeyedDelivery,
    SurvivorList,
    UnmaskRequest,
    EncryptedAggregate,
    AggregateAgreement,
    RoundReceipt,
)
HOMOMORPHIC_PHASES = (*PHASES[:4], AwaitingAggregate, AwaitingAgreement, AwaitingReceipt)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("backend", ["homomorphic"], indirect=True)
@pytest.mark.parametrize("reached", HOMOMORPHIC_KINDS, ids=lambda kind: kind.__name__)
def test_the_order_of_homomorphic_messages(reached: type) -> None:
    """There too each message moves the site to the next phase, any other one ends the round for it, and so does the end
    that the coordinator puts to it."""
    honest, before = StoppedRound(), {}
    for kind, phase in zip(HOMOMORPHIC_KINDS, HOMOMORPHIC_PHASES, strict=True):
        outbound = honest.until(kind)
        assert type(honest.participants[honest.sites[0]].phase) is phase
        before[kind] = outbound[honest.sites[0]]
        honest.deliver(outbound)
    assert type(honest.participants[honest.sites[0]].phase) is ParticipantFinished
    failed = RoundFailed(context=honest.parameters.context, code="threshold-not-met")
    for sent in (*(message for kind, message in before.items() if kind is not reached), failed):
        stopped = StoppedRound()
        stopped.until(reached)
        participant = stopped.participants[stopped.sites[0]]
        if sent is failed:
            assert stopped.answers(stopped.sites[0], sent) == []
        else:
            with pytest.raises(UnexpectedMessage, match=r"participant site-000, \w+, from the coordinator"):
                stopped.answers(stopped.sites[0], sent)
        assert isinstance(participant.phase, Aborted)
        assert participant._input is None


def test_a_round_that_fails_while_the_sum_comes_in() -> None:
    """Between two chunks of the encrypted sum, too, the coordinator may end the round."""
    pytest.importorskip("tenseal")
    stopped = StoppedRound(backend="homomorphic")
    site = stopped.participants[stopped.sites[0]]
    header = msgspec.structs.replace(stopped.until(EncryptedAggregate)[stopped.sites[0]], chunks=())
    assert site.receive(header) == []
    assert isinstance(site.phase, OpeningAggregate)
    assert site.receive(RoundFailed(context=stopped.parameters.context, code="round-aborted")) == []
    assert isinstance(site.phase, Aborted)
