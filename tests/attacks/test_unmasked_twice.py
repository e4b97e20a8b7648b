"""Attack: the coordinator has a round unmasked twice, or played again, to get shares for a second set of sites."""

import pytest
from support.rounds import StoppedRound

from secureagg import Participant, RoundReplayed, UnexpectedMessage
from secureagg.messages import UnmaskRequest
from secureagg.phases import Aborted, AwaitingAggregate, AwaitingReceipt

pytestmark = pytest.mark.usefixtures("backend")


def test_a_second_request_to_the_same_machine() -> None:
    """The same request again is refused.  Stopped by the transition table."""
    stopped = StoppedRound()
    site = stopped.sites[0]
    message = stopped.until(UnmaskRequest)[site]
    assert stopped.answers(site, message)
    assert isinstance(stopped.participants[site].phase, AwaitingReceipt | AwaitingAggregate)
    with pytest.raises(UnexpectedMessage):
        stopped.answers(site, message)


def test_a_second_request_after_a_restart() -> None:
    """A machine that forgot its answer, but not its journal, gives no second one.

    Stopped by ``Journal.answer``, which is durable before anything leaves.
    """
    stopped = StoppedRound()
    site = stopped.sites[0]
    message = stopped.until(UnmaskRequest)[site]
    stopped.journals[site].answer(stopped.parameters.run, stopped.parameters.round_number)
    with pytest.raises(RoundReplayed, match="answered before"):
        stopped.answers(site, message)
    assert isinstance(stopped.participants[site].phase, Aborted)


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_played_again(number: int) -> None:
    """A new machine refuses a round number that its journal has seen, or one below it.

    Stopped by ``Journal.begin``.
    """
    played = StoppedRound(round_number=2)
    site = played.sites[0]
    again = StoppedRound(round_number=number)
    machine = Participant(
        site=site, identity=again.identities[site], parameters=again.parameters, journal=played.journals[site]
    )
    with pytest.raises(RoundReplayed):
        machine.start()


def test_the_answer_is_noted_before_it_exists() -> None:
    """If the journal cannot be written, no share leaves: the note comes first."""

    class FullDisk:
        def answer(self, run: str, round_number: int) -> None:
            raise OSError("disk full")

    stopped = StoppedRound()
    site = stopped.sites[0]
    message = stopped.until(UnmaskRequest)[site]
    stopped.participants[site]._journal = FullDisk()  # type: ignore[assignment]
    with pytest.raises(OSError, match="disk full"):
        stopped.answers(site, message)
