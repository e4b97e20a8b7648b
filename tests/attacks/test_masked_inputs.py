"""Attack: a masked input is changed, exchanged, repeated, moved to another round or made too large on its way."""

import dataclasses
from hashlib import sha256

import msgspec
import numpy as np
import pytest
from support.rounds import StoppedRound

from secureagg import (
    AuthenticationFailed,
    DuplicateMessage,
    InconsistentSurvivors,
    MalformedMessage,
    RoundAborted,
    UnexpectedMessage,
)
from secureagg.codec import sign
from secureagg.messages import AggregateAgreement, MaskedInput, RoundReceipt, ShareDelivery, SurvivorList
from secureagg.participant import input_digest
from secureagg.phases import Aborted
from secureagg.slots import SLOTS

replace = msgspec.structs.replace
pytestmark = pytest.mark.usefixtures("backend")


def at_the_inputs(**options: object) -> StoppedRound:
    """A round whose masked inputs are pending."""
    stopped = StoppedRound(**options)
    stopped.deliver(stopped.until(ShareDelivery))
    return stopped


def test_changed_on_the_way() -> None:
    """A changed byte is noticed.  Stopped by the signed digest of each chunk in ``Upload.take``."""
    stopped = at_the_inputs()
    site, message = stopped.pending[0]
    chunk = bytearray(message.chunks[0])
    chunk[5] ^= 1
    with pytest.raises(AuthenticationFailed, match="a chunk is not the one that was signed"):
        stopped.coordinator.receive(replace(message, chunks=(bytes(chunk),)), sender=site)


def test_repeated_and_late() -> None:
    """A second copy is not added again, a copy after the phase is not added at all.

    Stopped by ``DuplicateMessage`` and the phase table.
    """
    stopped = at_the_inputs()
    site, message = stopped.pending[0]
    stopped.coordinator.receive(message, sender=site)
    with pytest.raises(DuplicateMessage):
        stopped.coordinator.receive(message, sender=site)
    stopped.pending.pop(0)
    stopped.until(SurvivorList)
    with pytest.raises(UnexpectedMessage):
        stopped.coordinator.receive(message, sender=site)


def test_replayed_from_an_earlier_round() -> None:
    """A masked input of another round is refused.  Stopped by the context."""
    site, old = at_the_inputs(run="earlier").pending[0]
    with pytest.raises(UnexpectedMessage, match="another round"):
        at_the_inputs().coordinator.receive(old, sender=site)


@pytest.mark.parametrize("how", ["larger", "cut in two", "empty chunk", "many empty chunks"])
def test_cut_in_another_way(how: str) -> None:
    """An input of another size, or the right one cut into other chunks than all are, is refused before it is summed.

    Stopped by the checks of number and sizes in ``Upload``.
    """
    stopped = at_the_inputs()
    site, message = stopped.pending[0]
    (whole,) = message.chunks
    chunks = {
        "larger": (bytes(MaskedInput.CHUNK_BYTES + 1),),
        "cut in two": (whole[:1], whole[1:]),
        "empty chunk": (whole, b""),
        "many empty chunks": (*(b"",) * 1000, whole),
    }[how]
    digests = tuple(sha256(chunk).digest() for chunk in chunks)
    other = sign(replace(message, chunks=chunks, chunk_digests=digests), stopped.identities[site])
    size = len(whole)
    found = {
        "larger": f"chunk 1 of 1: 1048577 bytes of lanes, expected {size}",
        "cut in two": f"2 chunks, expected 1 for {size} bytes of lanes in chunks of 1048576",
        "empty chunk": "2 chunks, expected 1",
        "many empty chunks": "1001 chunks, expected 1",
    }[how]
    with pytest.raises(MalformedMessage, match=f"participant {site}, .*{found}"):
        stopped.coordinator.receive(other, sender=site)


def test_another_input_in_a_sites_name() -> None:
    """A survivor list that names another input than the one a site sent is not signed by that site.

    Stopped by the digest of the own input in ``Participant._sign_survivors``.
    """
    stopped = StoppedRound()
    honest = stopped.until(SurvivorList)[stopped.sites[0]]
    forged = input_digest((sha256(b"another input").digest(),))
    survivors = tuple((name, forged if name == stopped.sites[0] else digest) for name, digest in honest.survivors)
    with pytest.raises(InconsistentSurvivors, match="own input"):
        stopped.answers(stopped.sites[0], replace(honest, survivors=survivors))


def test_a_colluder_that_masks_wrongly() -> None:
    """A site whose masks do not cancel spoils the sum, and nothing is released: by the coordinator, or by the sites
    that opened it.

    Stopped by the canary in ``aggregate_of``.
    """
    stopped = at_the_inputs()
    site, message = stopped.pending.pop(0)
    packed = bytearray(np.random.default_rng(1).bytes(stopped.parameters.input_bytes))
    if StoppedRound.backend == "masked":
        for end in np.cumsum([lane.packed_bytes for lane in stopped.parameters.lanes.values()]):
            packed[end - 1] = 0  # keep the filling bits zero
    else:
        packed[7 : 8 * SLOTS : 8] = bytes(SLOTS)  # keep the coefficients below q
    chunk = bytes(packed)
    bad = sign(replace(message, chunks=(chunk,), chunk_digests=(sha256(chunk).digest(),)), stopped.identities[site])
    # The colluder goes on as if this had been its input, so that the round reaches its end.
    stopped.participants[site]._phase = replace_digest(stopped.participants[site].phase, bad)
    stopped.pending.append((site, bad))
    if StoppedRound.backend == "masked":
        stopped.finish()
        assert isinstance(stopped.coordinator.phase, Aborted)
        assert isinstance(stopped.coordinator.phase.error, RoundAborted)
        assert "canary" in str(stopped.coordinator.phase.error)
        return
    for recipient, agreement in stopped.until(AggregateAgreement).items():
        with pytest.raises(RoundAborted, match=f"{recipient}, AwaitingAgreement, .*canary"):
            stopped.answers(recipient, agreement)
        assert isinstance(stopped.participants[recipient].phase, Aborted)
    stopped.collect()
    assert isinstance(stopped.coordinator.phase, Aborted)


def replace_digest(phase: object, message: MaskedInput) -> object:
    """The phase of a site that takes ``message`` for its own input."""
    return dataclasses.replace(phase, input_digest=input_digest(message.chunk_digests))


@pytest.mark.parametrize("change", [{"survivors": 3}, {"canary": 3}, {"survivors": 5, "canary": 5}])
def test_a_receipt_for_another_sum(change: dict[str, int]) -> None:
    """A receipt whose numbers are not those of the signed list is refused, so that the site knows.

    Stopped by the comparison in ``Participant._take_receipt``.
    """
    stopped = StoppedRound()
    receipt = stopped.until(RoundReceipt)[stopped.sites[0]]
    with pytest.raises(InconsistentSurvivors, match="expected 4"):
        stopped.answers(stopped.sites[0], replace(receipt, **change))
