"""One masked input on its way: what is stored when, and what is added."""

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import pytest
from support.rounds import StoppedRound
from support.uploads import Spools

from secureagg import AuthenticationFailed, Counts, Lane, LocalProtocolError, MalformedMessage, UnexpectedMessage
from secureagg.messages import MaskedInput
from secureagg.packing import pack
from secureagg.parameters import RoundParameters
from secureagg.upload import Upload

WHO = "participant x"
BITS = (9, 20, 33, 64)  # of the lanes below, with 3 sites: several words, and a whole one
LENGTHS = (5, 300_001, 17, 70_000)


@pytest.fixture(scope="module")
def parameters() -> RoundParameters:
    """A round with lanes of several rings, longer than a block and shorter."""
    lanes = [
        Lane(name=f"lane{index}", length=length, encoding=Counts(maximum=1), minimum_ring_bits=bits)
        for index, (bits, length) in enumerate(zip(BITS, LENGTHS, strict=True))
    ]
    return RoundParameters.create(**{**StoppedRound(3).options, "lanes": lanes, "max_weight": None})


def vectors_of(parameters: RoundParameters, seed: int) -> dict[str, np.ndarray]:
    """Masked words for every lane."""
    random = np.random.default_rng(seed)
    return {
        name: random.integers(0, 2**lane.masked_bits, lane.masked_length, np.uint64).astype(lane.masked_word)
        for name, lane in parameters.lanes.items()
    }


def packed_of(parameters: RoundParameters, vectors: dict[str, np.ndarray]) -> bytes:
    """The packed lanes in order."""
    return b"".join(pack(lane, vectors[name]) for name, lane in parameters.lanes.items())


def cut(packed: bytes) -> list[bytes]:
    """The chunks of a packed vector."""
    size = MaskedInput.CHUNK_BYTES
    return [packed[at : at + size] for at in range(0, len(packed), size)]


def begun(parameters: RoundParameters, chunks: list[bytes], spools: Spools | None = None) -> Upload:
    """An upload that waits for these chunks."""
    digests = tuple(sha256(chunk).digest() for chunk in chunks)
    return Upload(digests, parameters=parameters, spool=spools or Spools(), who=WHO)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 100_000, 8191])
@pytest.mark.parametrize("threads", [0, 3])
def test_what_is_added(
    parameters: RoundParameters, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, threads: int
) -> None:
    """However it was cut and however many threads add it, exactly the lanes of the input are added to what is there."""
    monkeypatch.setattr(MaskedInput, "CHUNK_BYTES", chunk_bytes)
    vectors, sums = vectors_of(parameters, 1), vectors_of(parameters, 2)
    expected = {name: vectors[name] + sums[name] for name in sums}
    chunks = cut(packed_of(parameters, vectors))
    upload = begun(parameters, chunks)
    for chunk in chunks:
        assert not upload.whole
        upload.take(chunk, who=WHO)
    assert upload.whole
    with ThreadPoolExecutor(max(1, threads)) as pool:
        upload.add_to(sums, spread=pool.map if threads else map)
    for name, words in sums.items():
        reduce = parameters.lanes[name].reduce
        np.testing.assert_array_equal(reduce(words), reduce(expected[name]))


def test_a_size_of_whole_chunks(parameters: RoundParameters, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector that ends with a chunk has no empty one behind it."""
    size = parameters.input_bytes
    divisor = next(divisor for divisor in range(2, size) if size % divisor == 0)
    monkeypatch.setattr(MaskedInput, "CHUNK_BYTES", size // divisor)
    chunks = cut(packed_of(parameters, vectors_of(parameters, 1)))
    assert len(chunks) == divisor
    upload = begun(parameters, chunks)
    for chunk in chunks:
        upload.take(chunk, who=WHO)
    assert upload.whole
    with pytest.raises(MalformedMessage, match=f"{WHO}: {divisor + 1} chunks, expected {divisor}"):
        begun(parameters, [*chunks, b""])


def test_nothing_refused_is_stored(parameters: RoundParameters) -> None:
    """A chunk that was not signed, is out of place, or has another size is refused before a byte is written."""
    first, *rest = cut(packed_of(parameters, vectors_of(parameters, 1)))
    assert rest
    for bad, chunks, error in (
        (bytes(len(first)), [first, *rest], AuthenticationFailed),
        (rest[0], [first, *rest], UnexpectedMessage),
        (first + b"\0", [first + b"\0", *rest], MalformedMessage),
        (first[:-1], [first[:-1], *rest], MalformedMessage),
        (b"", [b"", *rest], MalformedMessage),
    ):
        spools = Spools()
        upload = begun(parameters, chunks, spools)
        with pytest.raises(error, match=f"{WHO}: chunk 1 of {len(chunks)}: "):
            upload.take(bad, who=WHO)
        assert spools.files[0].tell() == 0
        assert not upload.whole


def test_behind_the_last_chunk(parameters: RoundParameters) -> None:
    """A whole upload takes nothing more."""
    chunks = cut(packed_of(parameters, vectors_of(parameters, 1)))
    upload = begun(parameters, chunks)
    for chunk in chunks:
        upload.take(chunk, who=WHO)
    with pytest.raises(UnexpectedMessage):
        upload.take(chunks[-1], who=WHO)
    with pytest.raises(AuthenticationFailed):
        upload.take(b"", who=WHO)


def test_filling_bits_of_every_lane(parameters: RoundParameters) -> None:
    """A bit behind the last value of any lane is refused with the last chunk, naming the lane."""
    packed, end, tried = packed_of(parameters, vectors_of(parameters, 1)), 0, 0
    for name, lane in parameters.lanes.items():
        end += lane.packed_bytes
        if not lane.masked_length * lane.masked_bits % 8:
            continue
        *chunks, last = cut(packed[: end - 1] + bytes([packed[end - 1] | 0x80]) + packed[end:])
        upload = begun(parameters, [*chunks, last])
        for chunk in chunks:
            upload.take(chunk, who=WHO)
        with pytest.raises(MalformedMessage, match=f"{WHO}, lane {name}: the last . bits are not zero"):
            upload.take(last, who=WHO)
        tried += 1
    assert tried == 3


def test_only_a_whole_upload_is_added(parameters: RoundParameters) -> None:
    """Before the last chunk nothing is added, whoever asks for it."""
    *chunks, _ = all_chunks = cut(packed_of(parameters, vectors_of(parameters, 1)))
    upload, sums = begun(parameters, all_chunks), vectors_of(parameters, 2)
    before = {name: words.copy() for name, words in sums.items()}
    for taken in range(len(all_chunks)):
        with pytest.raises(LocalProtocolError, match=f"added after {taken} of {len(all_chunks)} chunks"):
            upload.add_to(sums)
        if taken < len(chunks):
            upload.take(chunks[taken], who=WHO)
    for name, words in sums.items():
        np.testing.assert_array_equal(words, before[name])


def test_closing(parameters: RoundParameters) -> None:
    """The file is open from the header on, and closed with the upload, also twice."""
    spools = Spools()
    upload = begun(parameters, cut(packed_of(parameters, vectors_of(parameters, 1))), spools)
    assert spools.open == 1
    upload.close()
    upload.close()
    assert spools.open == 0
