"""Attack: a masked input comes in pieces that break off, are wrong, out of place, too many or somebody else's."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from support.rounds import StoppedRound
from support.uploads import Uploading, header_of

from secureagg import (
    AuthenticationFailed,
    Coordinator,
    DuplicateMessage,
    MalformedMessage,
    RoundAborted,
    SiteId,
    UnexpectedMessage,
)
from secureagg.codec import sign
from secureagg.messages import CohortKeys, MaskedInput, ShareDelivery, SurvivorList
from secureagg.phases import Aborted, CheckingConsistency, CoordinatorFinished
from secureagg.slots import FRESH_BYTES
from secureagg.upload import Upload

replace = msgspec.structs.replace
pytestmark = pytest.mark.usefixtures("backend")
CHUNKS = 4
SIZE = {"masked": 12, "homomorphic": FRESH_BYTES // 4}
LIAR = SiteId("site-001")


@pytest.fixture
def uploading(backend: str, monkeypatch: pytest.MonkeyPatch) -> Uploading:
    """Four sites whose masked inputs, of four chunks each, are due."""
    monkeypatch.setattr(MaskedInput, "CHUNK_BYTES", SIZE[backend])
    prepared = Uploading()
    assert {len(message.chunks) for message in prepared.inputs_of.values()} == {CHUNKS}
    return prepared


def others(uploading: Uploading) -> list[SiteId]:
    """The sites but the one that misbehaves."""
    return [site for site in uploading.sites if site != LIAR]


def flipped(chunk: bytes) -> bytes:
    """One bit changed."""
    return bytes([chunk[0] ^ 1]) + chunk[1:]


@pytest.mark.parametrize("taken", range(CHUNKS))
@pytest.mark.parametrize("how", ["deadline", "dropped", "others first", "round given up"])
def test_an_upload_that_breaks_off(uploading: Uploading, taken: int, how: str) -> None:
    """After the header and any number of chunks but all, the sum is untouched, the round ends with exactly the others'
    sum, and the spool file is gone.

    Stopped by ``Upload``, which ``Coordinator._take_chunk`` adds only when it is whole.
    """
    before = uploading.sums()
    if how == "others first":
        for site in others(uploading):
            uploading.coordinator.receive(uploading.inputs_of[site], sender=site)
        before = uploading.sums()
    message = uploading.begin(LIAR)
    for chunk in message.chunks[:taken]:
        assert uploading.coordinator.receive_chunk(chunk, sender=LIAR) == []
    assert uploading.sums() == before
    assert LIAR in uploading.coordinator.expected
    assert uploading.spools.open == 1
    if how == "dropped":
        uploading.coordinator.drop(LIAR)
        assert uploading.spools.open == 0
    if how == "round given up":
        uploading.coordinator.close_phase()
        assert isinstance(uploading.coordinator.phase, Aborted)
        assert uploading.spools.open == 0
        return
    if how == "others first":
        uploading.pending = []
        uploading.deliver({item.recipient: item.message for item in uploading.coordinator.close_phase()})
    else:
        uploading.pending = [pair for pair in uploading.pending if pair[0] != LIAR]
    uploading.check_release(others(uploading))


@pytest.mark.parametrize("place", range(CHUNKS))
def test_a_wrong_chunk(uploading: Uploading, place: int) -> None:
    """A chunk that the site has not signed is refused naming the site, nothing of the upload is in the sum, and the
    right one can begin again.

    Stopped by the digest in ``Upload.take``.
    """
    before = uploading.sums()
    message = uploading.begin(LIAR)
    for chunk in message.chunks[:place]:
        uploading.coordinator.receive_chunk(chunk, sender=LIAR)
    found = f"participant {LIAR}, CollectingMaskedInputs: chunk {place + 1} of {CHUNKS}: a chunk is not the one"
    with pytest.raises(AuthenticationFailed, match=found):
        uploading.coordinator.receive_chunk(flipped(message.chunks[place]), sender=LIAR)
    assert uploading.sums() == before
    assert uploading.spools.open == 0
    with pytest.raises(UnexpectedMessage, match=f"participant {LIAR}, .*a chunk without a masked input"):
        uploading.coordinator.receive_chunk(message.chunks[place], sender=LIAR)
    uploading.check_release(uploading.sites)


@pytest.mark.parametrize("place", range(CHUNKS))
@pytest.mark.parametrize("found", range(CHUNKS))
def test_a_chunk_out_of_its_place(uploading: Uploading, place: int, found: int) -> None:
    """A chunk of the same input in another's place, as after a connection that broke, ends the upload without blaming
    the site, which begins again.

    Stopped by the digest in ``Upload.take``.
    """
    message = uploading.begin(LIAR)
    for chunk in message.chunks[:place]:
        uploading.coordinator.receive_chunk(chunk, sender=LIAR)
    if found == place:
        uploading.coordinator.receive_chunk(message.chunks[found], sender=LIAR)
    else:
        with pytest.raises(UnexpectedMessage, match=f"chunk {place + 1} of {CHUNKS}: found another chunk"):
            uploading.coordinator.receive_chunk(message.chunks[found], sender=LIAR)
        assert uploading.spools.open == 0
    if (found, place) == (CHUNKS - 1, CHUNKS - 1):
        uploading.pending = [pair for pair in uploading.pending if pair[0] != LIAR]
    uploading.check_release(uploading.sites)


def test_a_chunk_too_many(uploading: Uploading) -> None:
    """A chunk behind the last one is refused, and the sum stays as it is."""
    message = uploading.begin(LIAR)
    for chunk in message.chunks:
        uploading.coordinator.receive_chunk(chunk, sender=LIAR)
    after = uploading.sums()
    for chunk in (message.chunks[-1], message.chunks[0], b""):
        with pytest.raises(UnexpectedMessage, match="a chunk without a masked input"):
            uploading.coordinator.receive_chunk(chunk, sender=LIAR)
    assert uploading.sums() == after
    uploading.pending = [pair for pair in uploading.pending if pair[0] != LIAR]
    uploading.check_release(uploading.sites)


def test_a_chunk_without_a_header(uploading: Uploading) -> None:
    """A chunk before any header, of a site that was dropped, of nobody in the cohort, or over another site's connection
    while that one's upload runs, is refused and changes nothing."""
    message, peer = uploading.inputs_of[LIAR], others(uploading)[0]
    with pytest.raises(UnexpectedMessage, match=f"participant {LIAR}, .*a chunk without a masked input"):
        uploading.coordinator.receive_chunk(message.chunks[0], sender=LIAR)
    with pytest.raises(UnexpectedMessage, match="participant stranger"):
        uploading.coordinator.receive_chunk(message.chunks[0], sender=SiteId("stranger"))
    uploading.begin(LIAR)
    with pytest.raises(UnexpectedMessage, match=f"participant {peer}"):
        uploading.coordinator.receive_chunk(message.chunks[0], sender=peer)
    uploading.coordinator.receive_chunk(message.chunks[0], sender=LIAR)
    uploading.coordinator.drop(LIAR)
    with pytest.raises(UnexpectedMessage, match=f"participant {LIAR}"):
        uploading.coordinator.receive_chunk(message.chunks[1], sender=LIAR)
    with pytest.raises(UnexpectedMessage, match="does not wait for"):
        uploading.coordinator.receive(header_of(message), sender=LIAR)
    uploading.pending = [pair for pair in uploading.pending if pair[0] != LIAR]
    uploading.check_release(others(uploading))


@pytest.mark.parametrize("before", [CohortKeys, ShareDelivery, SurvivorList])
def test_a_chunk_in_another_phase(before: type) -> None:
    """A chunk before masked inputs are due, or after, is refused."""
    stopped = StoppedRound()
    stopped.until(before)
    if before is ShareDelivery:
        stopped.coordinator.close_phase()
        assert isinstance(stopped.coordinator.phase, Aborted)
    with pytest.raises(UnexpectedMessage, match=f"{type(stopped.coordinator.phase).__name__}: a chunk without"):
        stopped.coordinator.receive_chunk(b"chunk", sender=LIAR)


@pytest.mark.parametrize("count", [0, 1, CHUNKS - 1, CHUNKS + 1])
def test_a_header_for_another_size(uploading: Uploading, count: int) -> None:
    """A signed header of too few or too many chunks is refused before a file is opened.

    Stopped by the number of digests in ``Upload``.
    """
    header = header_of(uploading.inputs_of[LIAR])
    digests = (header.chunk_digests * 2)[:count]
    bad = sign(replace(header, chunk_digests=digests), uploading.identities[LIAR])
    size = uploading.parameters.input_bytes
    with pytest.raises(
        MalformedMessage,
        match=f"participant {LIAR}, .*: {count} chunks, expected 4 for {size} bytes of lanes in chunks of ",
    ):
        uploading.coordinator.receive(bad, sender=LIAR)
    assert uploading.spools.files == []
    uploading.check_release(uploading.sites)


@pytest.mark.parametrize("place", range(CHUNKS))
@pytest.mark.parametrize("change", [-1, 1])
def test_a_signed_chunk_of_another_size(uploading: Uploading, place: int, change: int) -> None:
    """A chunk that was signed but is a byte shorter or longer than its place is refused, and no byte of it is stored.

    Stopped by the size in ``Upload.take``.
    """
    message = uploading.inputs_of[LIAR]
    chunks = list(message.chunks)
    chunks[place] = chunks[place][:-1] if change < 0 else chunks[place] + b"\0"
    digests = tuple(sha256(chunk).digest() for chunk in chunks)
    bad = sign(replace(header_of(message), chunk_digests=digests), uploading.identities[LIAR])
    uploading.coordinator.receive(bad, sender=LIAR)
    for chunk in chunks[:place]:
        uploading.coordinator.receive_chunk(chunk, sender=LIAR)
    size = len(message.chunks[place])
    with pytest.raises(MalformedMessage, match=f"{LIAR}, .*: {size + change} bytes of lanes, expected {size}"):
        uploading.coordinator.receive_chunk(chunks[place], sender=LIAR)
    assert uploading.spools.open == 0
    uploading.check_release(uploading.sites)


def test_a_message_with_some_of_its_chunks(uploading: Uploading) -> None:
    """A masked input comes with all its chunks or with none: with some, or more, it is refused as a whole.

    Stopped by the number of chunks in ``Coordinator._collect_input``.
    """
    message, before = uploading.inputs_of[LIAR], uploading.sums()
    for chunks in (message.chunks[:1], message.chunks[:-1], (*message.chunks, b""), (*message.chunks, b"x")):
        with pytest.raises(MalformedMessage, match=f"{LIAR}, .*: {len(chunks)} chunks, expected {CHUNKS}"):
            uploading.coordinator.receive(replace(message, chunks=chunks), sender=LIAR)
    assert uploading.sums() == before
    assert uploading.spools.files == []
    uploading.check_release(uploading.sites)


@pytest.mark.parametrize("taken", range(CHUNKS))
@pytest.mark.parametrize("again", ["in chunks", "as a whole"])
def test_beginning_again(uploading: Uploading, taken: int, again: str) -> None:
    """A site that reconnects and sends the same header once more begins from its first chunk; the first file is gone,
    and the input is in the sum once."""
    message = uploading.begin(LIAR)
    for chunk in message.chunks[:taken]:
        uploading.coordinator.receive_chunk(chunk, sender=LIAR)
    if again == "as a whole":
        uploading.coordinator.receive(message, sender=LIAR)
    else:
        uploading.begin(LIAR)
        assert [file.closed for file in uploading.spools.files] == [True, False]
        for chunk in message.chunks:
            uploading.coordinator.receive_chunk(chunk, sender=LIAR)
    with pytest.raises(DuplicateMessage, match="a second MaskedInput"):
        uploading.begin(LIAR)
    uploading.pending = [pair for pair in uploading.pending if pair[0] != LIAR]
    uploading.check_release(uploading.sites)


def test_another_header_during_an_upload(uploading: Uploading) -> None:
    """A site cannot exchange its input while it is being received: another header is refused, and the first upload goes
    on.

    Stopped by the comparison of digests in ``Coordinator._collect_input``.
    """
    message = uploading.begin(LIAR)
    uploading.coordinator.receive_chunk(message.chunks[0], sender=LIAR)
    other = replace(header_of(message), chunk_digests=message.chunk_digests[::-1])
    with pytest.raises(DuplicateMessage, match=f"{LIAR}, .*another MaskedInput than the one that is being received"):
        uploading.coordinator.receive(sign(other, uploading.identities[LIAR]), sender=LIAR)
    for chunk in message.chunks[1:]:
        uploading.coordinator.receive_chunk(chunk, sender=LIAR)
    uploading.pending = [pair for pair in uploading.pending if pair[0] != LIAR]
    uploading.check_release(uploading.sites)


def test_uploads_side_by_side(uploading: Uploading) -> None:
    """Chunks of all sites by turns give the exact sum of all; the phase ends with the last chunk."""
    for site in uploading.sites:
        uploading.begin(site)
    assert uploading.spools.open == len(uploading.sites)
    outbound = []
    for place in range(CHUNKS):
        for site in uploading.sites:
            assert outbound == []
            outbound = uploading.coordinator.receive_chunk(uploading.inputs_of[site].chunks[place], sender=site)
    assert isinstance(uploading.coordinator.phase, CheckingConsistency)
    uploading.pending = []
    uploading.deliver({item.recipient: item.message for item in outbound})
    uploading.check_release(uploading.sites)


def test_a_full_disk(uploading: Uploading) -> None:
    """When a chunk cannot be stored, its upload is gone, the error says why, and the sum is untouched."""
    before = uploading.sums()
    uploading.coordinator._spool = lambda: open("/dev/full", "w+b", buffering=0)  # noqa: PTH123, SIM115
    message = uploading.begin(LIAR)
    with pytest.raises(OSError, match="No space left"):
        uploading.coordinator.receive_chunk(message.chunks[0], sender=LIAR)
    assert uploading.sums() == before
    assert uploading.coordinator.phase.uploads == {}
    uploading.coordinator._spool = uploading.spools
    uploading.check_release(uploading.sites)


def test_a_disk_that_loses_what_was_stored(uploading: Uploading, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the input cannot be read back while it is added, the sum may have a part of it: nothing is released.

    Stopped by the size of each block in ``Upload._read``, and by ``Aborted`` in ``Coordinator._take_chunk``.
    """
    add_to = Upload.add_to

    def losing(upload: Upload, *args: object, **options: object) -> None:
        os.ftruncate(uploading.spools.files[-1].fileno(), 5)
        add_to(upload, *args, **options)

    monkeypatch.setattr(Upload, "add_to", losing)
    uploading.begin(others(uploading)[0])
    message = uploading.begin(LIAR)
    for chunk in message.chunks[:-1]:
        uploading.coordinator.receive_chunk(chunk, sender=LIAR)
    with pytest.raises(OSError, match=r"spool file: [0-9]+ bytes at [0-9]+, expected"):
        uploading.coordinator.receive_chunk(message.chunks[-1], sender=LIAR)
    phase = uploading.coordinator.phase
    assert isinstance(phase, Aborted)
    assert isinstance(phase.error, RoundAborted)
    assert LIAR in str(phase.error)
    assert uploading.coordinator.expected == frozenset()
    assert uploading.coordinator.close_phase() == []
    assert uploading.spools.open == 0


def test_no_descriptor_is_left(uploading: Uploading) -> None:
    """With the default spool files, which have no name, a round of broken and whole uploads leaves none open."""
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    uploading.coordinator._spool = Coordinator(parameters=uploading.parameters)._spool
    uploading.begin(LIAR)
    (upload,) = uploading.coordinator.phase.uploads.values()
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    assert os.fstat(upload._file.fileno()).st_nlink == 0
    uploading.pending = [pair for pair in uploading.pending if pair[0] != LIAR]
    uploading.finish()
    assert isinstance(uploading.coordinator.phase, CoordinatorFinished)
    # The running sum of ciphertexts has a file in memory, which is gone with it.
    assert len(list(Path("/proc/self/fd").iterdir())) == before - (uploading.backend == "homomorphic")


def test_added_by_several_threads(uploading: Uploading) -> None:
    """Blocks of a spool file that several threads read give the same sum."""
    with ThreadPoolExecutor(3) as pool:
        uploading.coordinator._spread = pool.map
        uploading.check_release(uploading.sites)
