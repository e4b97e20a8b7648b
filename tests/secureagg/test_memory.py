"""Memory of a masked input, as tracemalloc counts it: at the site that makes it and at the coordinator that adds it."""

import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from support.uploads import header_of

from secureagg import (
    Card,
    Coordinator,
    FixedPoint,
    Identity,
    Lane,
    Participant,
    Roster,
    RoundParameters,
    encode_input,
    site_id,
)
from secureagg.homomorphic import SumReader
from secureagg.keystream import Spread
from secureagg.messages import EncryptedAggregate
from secureagg.parameters import Backend
from secureagg.phases import AwaitingAggregate, AwaitingAgreement, CollectingMaskedInputs
from secureagg.testing import CountingEntropy, MemoryJournal

SITES = [site_id(name) for name in "abc"]


@contextmanager
def peak() -> Iterator[list[int]]:
    """The list has, afterwards, the most bytes in use inside the block beyond those that were in use before it."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


class LongRound:
    """Three sites with one lane of 16-bit values, up to their masked inputs; ``encoded``: an input."""

    def __init__(self, length: int, spread: Spread = map, backend: Backend = "masked") -> None:
        entropy = CountingEntropy(1)
        keys = {site: Identity.generate(entropy) for site in SITES}
        self.parameters = RoundParameters.create(
            consortium="test",
            run="run",
            round_number=1,
            roster=Roster(Card.issue(site, key, entropy(32)) for site, key in keys.items()),
            cohort=SITES,
            lanes=[Lane(name="update", length=length, encoding=FixedPoint(value_range=1.0))],
            model_digest=bytes(32),
            backend=backend,
        )
        self.coordinator = Coordinator(parameters=self.parameters, spread=spread)
        self.participants = {
            site: Participant(
                site=site, identity=keys[site], parameters=self.parameters, journal=MemoryJournal(), spread=spread
            )
            for site in SITES
        }
        pending = [(site, message) for site, one in self.participants.items() for message in one.start()]
        while not isinstance(self.coordinator.phase, CollectingMaskedInputs):
            outbound = [out for site, message in pending for out in self.coordinator.receive(message, sender=site)]
            pending = [
                (out.recipient, message)
                for out in outbound
                for message in self.participants[out.recipient].receive(out.message)
            ]
        self.encoded = encode_input(self.parameters, {"update": np.linspace(-1, 1, length)})


@pytest.mark.parametrize(("length", "threads"), [(1 << 22, 0), (1 << 23, 2), (1 << 24, 6)])
def test_a_masked_input_and_its_upload(length: int, threads: int) -> None:
    """Beyond its encoded input a site needs at most 1.5 times its packed vector; the coordinator one running sum, and
    beyond it a block for each upload and each thread, however long the vector is."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        prepared = LongRound(length, pool.map if threads else map)
        packed = prepared.parameters.input_bytes
        first, second = SITES[:2]
        with peak() as found:
            (message,) = prepared.participants[first].submit(prepared.encoded)
        assert packed < found[0] <= 1.5 * packed
        (other,) = prepared.participants[second].submit(prepared.encoded)
        coordinator = prepared.coordinator
        with peak() as found:
            coordinator.receive(header_of(message), sender=first)
            coordinator.receive(header_of(other), sender=second)
            for one, two in zip(message.chunks, other.chunks, strict=True):
                if one is not message.chunks[-1]:
                    coordinator.receive_chunk(two, sender=second)
                coordinator.receive_chunk(one, sender=first)
    assert coordinator.phase.received.keys() == {first}
    assert sum(words.nbytes for words in coordinator.phase.sums.values()) == 8 * -(-length // 3) + 8
    assert found[0] <= (4 + threads) << 20 < packed


@pytest.mark.parametrize("length", [1 << 20, pytest.param(1 << 22, marks=pytest.mark.slow)])
def test_ciphertexts_on_their_way(length: int) -> None:
    """With the homomorphic backend a site needs at most 1.5 times its ciphertexts, and the coordinator a block for each
    upload, however many there are; its running sum is SEAL's, which is not counted here.  A site that opens the sum
    needs 8 bytes for each value and a few chunks."""
    pytest.importorskip("tenseal")
    prepared = LongRound(length, backend="homomorphic")
    size = prepared.parameters.input_bytes
    first, second = SITES[:2]
    with peak() as found:
        (message,) = prepared.participants[first].submit(prepared.encoded)
    assert size < found[0] <= 1.5 * size
    coordinator = prepared.coordinator
    with peak() as found:
        coordinator.receive(header_of(message), sender=first)
        for chunk in message.chunks:
            coordinator.receive_chunk(chunk, sender=first)
    assert coordinator.phase.received.keys() == {first}
    assert found[0] <= 3 << 20 < size
    with peak() as found:
        chunks = coordinator.phase.sums.chunks()
    assert found[0] <= sum(map(len, chunks)) + (3 << 20)
    site = prepared.participants[second]
    site._phase = AwaitingAggregate(tuple(SITES), site.phase.encryption_secret)
    with peak() as found:
        site.receive(EncryptedAggregate(context=prepared.parameters.context))
        assert isinstance(site.phase.reader, SumReader)
        for chunk in chunks:
            site.receive_chunk(chunk)
    assert isinstance(site.phase, AwaitingAgreement)
    assert 8 * length < found[0] <= 8 * length + (2 << 20)
