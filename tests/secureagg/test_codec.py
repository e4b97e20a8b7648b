"""Bytes and messages."""

import typing
from importlib.util import find_spec

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secureagg import AuthenticationFailed, Identity, MalformedMessage, SiteId, messages
from secureagg.codec import (
    HEADER_BYTES,
    check_signature,
    decode_from_coordinator,
    decode_from_site,
    encode,
    sign,
)
from secureagg.testing import CountingEntropy, run_round

KEY = Identity.generate(CountingEntropy(5))
TRANSCRIPT = run_round({name: [0.5, -0.5] for name in "abc"}, value_range=1.0, entropy=CountingEntropy(6)).transcript
FRAMES = [frames for sent in TRANSCRIPT.values() for frames in sent]
if find_spec("tenseal"):
    for whom in ("sites", "coordinator"):
        outcome = run_round({name: [0.5] for name in "abc"}, value_range=1.0, backend="homomorphic", release_to=whom)
        FRAMES += outcome.transcript["a"]


def test_a_round_has_five_kinds_of_site_messages() -> None:
    """The transcript has one of each message of a site, in order."""
    kinds = [type(decode_from_site(frames)) for frames in TRANSCRIPT["a"]]
    assert kinds == list(typing.get_args(messages.ToCoordinator))[:5]


@given(st.sampled_from(FRAMES), st.data())
def test_what_decodes_encodes_to_the_same_bytes(frames: tuple[bytes, ...], data: st.DataObject) -> None:
    """One changed byte anywhere in a header is refused, or is another message with that one encoding."""
    header = bytearray(frames[0])
    header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = decode_from_site([bytes(header), *frames[1:]])
    except MalformedMessage:
        return
    assert encode(message) == [bytes(header), *frames[1:]]


@given(st.lists(st.binary(max_size=300), max_size=3))
def test_arbitrary_bytes_are_a_message_or_malformed(frames: list[bytes]) -> None:
    """No bytes make a decoder end with anything but a message or MalformedMessage."""
    for decode in (decode_from_site, decode_from_coordinator):
        try:
            message = decode(frames)
        except MalformedMessage:
            continue
        assert encode(message) == frames


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        encode(messages.SurvivorSignature(context=b"c", sender=SiteId("a"), list_signature=bytes(HEADER_BYTES))),
        [b"\xdd\xff\xff\xff\xff"],  # an array of four billion elements, in five bytes
        [b"\x91" * 5000],  # arrays in arrays
        [b"\xc6\xff\xff\xff\xff"],  # four gigabytes of binary, in five bytes
        [FRAMES[0][0], b"a frame too many"],
        [FRAMES[0][0] + b"\x00"],
        [FRAMES[0][0][:-1]],
    ],
    ids=["none", "empty", "too-long", "huge-array", "nested", "huge-binary", "frame-behind", "byte-behind", "cut"],
)
def test_hostile_frames_are_refused(frames: list[bytes]) -> None:
    """Each is refused as malformed, quickly and without the memory that it announces."""
    with pytest.raises(MalformedMessage):
        decode_from_site(frames)


def test_other_encodings_of_the_same_message_are_refused() -> None:
    """A longer form of the same array header decodes to the same message, so it is refused as not canonical."""
    header = FRAMES[0][0]
    assert header[0] & 0xF0 == 0x90
    longer = b"\xdc\x00" + bytes([header[0] & 0x0F]) + header[1:]
    with pytest.raises(MalformedMessage, match="canonical"):
        decode_from_site([longer])


def test_chunks_travel_behind_the_header_only() -> None:
    """A masked input whose header carries chunks, or with another number of frames, is refused."""
    masked = messages.MaskedInput(context=b"c", sender=SiteId("a"), chunk_digests=(b"d",), chunks=(b"x",))
    assert decode_from_site(encode(masked)) == masked
    inside = msgspec.msgpack.encode(masked)
    for frames in ([inside, b"x"], encode(masked)[:1], [*encode(masked), b"y"]):
        with pytest.raises(MalformedMessage):
            decode_from_site(frames)


def test_chunks_of_an_encrypted_sum_travel_behind_the_header_only() -> None:
    """An encrypted sum comes with any number of its chunks, the others following one by one; none is in its header."""
    for chunks in ((), (b"x",), (b"x", b"y")):
        aggregate = messages.EncryptedAggregate(context=b"c", chunks=chunks)
        assert decode_from_coordinator(encode(aggregate)) == aggregate
        assert len(encode(aggregate)) == 1 + len(chunks)
    with pytest.raises(MalformedMessage, match="canonical"):
        decode_from_coordinator([msgspec.msgpack.encode(aggregate)])


def test_a_key_release_is_no_report() -> None:
    """A report with a secret behind it is another message, and the signature of one is none of the other."""
    report = sign(messages.AggregateReport(context=b"c", sender=SiteId("a"), aggregate_digest=b"d"), KEY)
    release = messages.KeyRelease(**msgspec.structs.asdict(report), secret=b"s")
    assert type(decode_from_site(encode(report))) is messages.AggregateReport
    assert decode_from_site(encode(release)) == release
    with pytest.raises(AuthenticationFailed):
        check_signature(release, KEY.public_key)


def test_chunks_that_follow_one_by_one() -> None:
    """Where chunks are streamed, a masked input is its header alone; with chunks among its frames it is refused."""
    masked = messages.MaskedInput(context=b"c", sender=SiteId("a"), chunk_digests=(b"d", b"e"), chunks=(b"x", b"y"))
    header, *chunks = encode(masked)
    assert decode_from_site([header], streamed=True) == msgspec.structs.replace(masked, chunks=())
    for behind in (chunks[:1], chunks):
        with pytest.raises(MalformedMessage, match=f"{1 + len(behind)} frames, expected 1"):
            decode_from_site([header, *behind], streamed=True)


def test_directions_are_separate() -> None:
    """A site's message is none of the coordinator's, and the other way round."""
    with pytest.raises(MalformedMessage):
        decode_from_coordinator(FRAMES[0])
    with pytest.raises(MalformedMessage):
        decode_from_site(encode(messages.RoundFailed(context=b"c", code="x")))


@pytest.mark.parametrize("change", ["context", "sender", "mask_key", "channel_key", "signature"])
def test_a_signature_covers_the_whole_message(change: str) -> None:
    """Whatever is changed in a signed message, its signature no longer verifies."""
    message = sign(
        messages.KeyAdvertisement(context=b"c" * 32, sender=SiteId("a"), mask_key=b"m" * 32, channel_key=b"k" * 32), KEY
    )
    check_signature(message, KEY.public_key)
    changed = SiteId("b") if change == "sender" else b"x" + getattr(message, change)[1:]
    with pytest.raises(AuthenticationFailed):
        check_signature(msgspec.structs.replace(message, **{change: changed}), KEY.public_key)


def test_a_signature_covers_the_type() -> None:
    """The signature of one kind of message is none of another kind with the same fields."""
    signed = sign(messages.SurvivorSignature(context=b"c", sender=SiteId("a"), list_signature=b"x"), KEY)
    other = messages.UnmaskShares(
        context=b"c", sender=SiteId("a"), self_seed_shares=(), mask_key_shares=(), signature=signed.signature
    )
    with pytest.raises(AuthenticationFailed):
        check_signature(other, KEY.public_key)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.binary(max_size=1)), max_size=4))
def test_named_pairs_are_strictly_ordered(pairs: list[tuple[SiteId, bytes]]) -> None:
    """A list of names is accepted exactly if it is in strictly ascending order, so that nobody is named twice."""
    keys = [name for name, _ in pairs]
    if keys == sorted(set(keys)):
        assert messages.named(tuple(pairs), who="x") == dict(pairs)
    else:
        with pytest.raises(MalformedMessage, match="repeat or are out of order"):
            messages.named(tuple(pairs), who="x")
