"""Control messages: they arrive as they were sent, anything else is MalformedMessage, and nobody speaks for others."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secureagg import MalformedMessage
from sites.control import (
    CHUNK,
    CONTROL,
    HEADER_BYTES,
    ROUND,
    CopyRequest,
    FederationOver,
    GivenUp,
    Hello,
    ModelCopy,
    Refused,
    StartRound,
    Withdraw,
    decode_chunk,
    decode_from_coordinator,
    decode_from_site,
    encode,
    encode_chunk,
)

DECODERS = [decode_from_site, decode_from_coordinator]
MODEL = bytes(range(256))
RELAYED = [  # of a site, by way of the coordinator
    CopyRequest(run="run", site="a", key=bytes(32), signature=bytes(64)),
    ModelCopy(site="a", donor="b", signature=bytes(64), payload=MODEL),
]
FROM_SITE = [
    Hello(manifest_digest=bytes(32)),
    Withdraw(run="run", round_number=3, leaving=True),
    Withdraw(run="run", round_number=(1 << 63) - 1, leaving=False),
]
FROM_COORDINATOR = [
    StartRound(run="run", round_number=3, purpose="train", cohort=("a", "b", "c"), payload=MODEL),
    StartRound(run="run", round_number=4, purpose="evaluate", cohort=(), payload=b""),
    GivenUp(run="run", round_number=4),
    FederationOver(code="finished", payload=MODEL),
    Refused(code="manifest"),
    StartRound(run="run", round_number=3, purpose="train", cohort=("a", "b", "c"), model_name=bytes(32)),
    FederationOver(code="finished", model_name=bytes(32)),
]


def identify(message):
    """The name of a message in a test's name."""
    return type(message).__name__


def repacked(message, change):
    """The frames behind the tag with the header's list of fields changed."""
    _, header, payload = encode(message)
    return [msgspec.msgpack.encode(change(msgspec.msgpack.decode(header))), payload]


@pytest.mark.parametrize("message", FROM_SITE + RELAYED, ids=identify)
def test_from_a_site(message):
    """A site's message arrives as it was sent."""
    tag, *frames = encode(message)
    assert tag == CONTROL
    assert decode_from_site(frames) == message


@pytest.mark.parametrize("message", FROM_COORDINATOR + RELAYED, ids=identify)
def test_from_the_coordinator(message):
    """The coordinator's message arrives as it was sent, the model included."""
    tag, *frames = encode(message)
    assert tag == CONTROL
    assert decode_from_coordinator(frames) == message


@given(st.text(), st.integers(0, (1 << 64) - 1), st.lists(st.text()), st.binary())
def test_any_fields(run, number, cohort, payload):
    """Messages of any text and number arrive as they were sent."""
    message = StartRound(run=run, round_number=number, purpose="train", cohort=tuple(cohort), payload=payload)
    assert decode_from_coordinator(encode(message)[1:]) == message


@pytest.mark.parametrize("message", FROM_SITE, ids=identify)
def test_a_site_does_not_speak_for_the_coordinator(message):
    """A site's message is none of the coordinator's."""
    with pytest.raises(MalformedMessage, match="not one that a coordinator sends"):
        decode_from_coordinator(encode(message)[1:])


@pytest.mark.parametrize("message", FROM_COORDINATOR, ids=identify)
def test_the_coordinator_does_not_speak_for_a_site(message):
    """The coordinator's message is none of a site's."""
    with pytest.raises(MalformedMessage, match="not one that a site sends"):
        decode_from_site(encode(message)[1:])


def test_the_tags_differ():
    """Control messages, messages of the protocol and chunks cannot be taken for each other."""
    assert {len(tag) for tag in (CONTROL, ROUND, CHUNK)} == {1}
    assert len({CONTROL, ROUND, CHUNK}) == 3


def test_a_chunk():
    """A chunk arrives with its context; with any other number of frames it is refused."""
    tag, *frames = encode_chunk(b"c" * 32, b"chunk")
    assert tag == CHUNK
    assert decode_chunk(frames) == (b"c" * 32, b"chunk")
    for wrong in ([], frames[:1], [*frames, b""]):
        with pytest.raises(MalformedMessage, match=f"chunk: {len(wrong)} frames, expected a context and a chunk"):
            decode_chunk(wrong)


@pytest.mark.parametrize("message", FROM_COORDINATOR, ids=identify)
def test_the_model_travels_raw(message):
    """The payload is the last frame alone, never a copy in the header."""
    _, header, payload = encode(message)
    assert payload == message.payload
    assert len(header) < 120


@pytest.mark.parametrize("decode", DECODERS)
@given(frames=st.lists(st.binary(max_size=60), max_size=4))
def test_arbitrary_frames(decode, frames):
    """Any frames are a message or MalformedMessage, nothing else."""
    try:
        message = decode(frames)
    except MalformedMessage:
        return
    assert encode(message)[1:] == frames


@given(data=st.data(), message=st.sampled_from(FROM_SITE + FROM_COORDINATOR))
def test_damaged_headers(data, message):
    """A message with bytes changed, cut or added is a message or MalformedMessage, nothing else."""
    _, header, payload = encode(message)
    start = data.draw(st.integers(0, len(header)))
    end = data.draw(st.integers(start, len(header)))
    damaged = header[:start] + data.draw(st.binary(max_size=8)) + header[end:]
    for decode in DECODERS:
        try:
            decode([damaged, payload])
        except MalformedMessage:
            continue


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("header", [b"\x91" * 100_000, b"\x81\xa1a" * 100_000, b"\x92\xa5hello" * 100_000])
def test_nested_headers(decode, header):
    """Deep nesting is MalformedMessage and does not exhaust the stack."""
    with pytest.raises(MalformedMessage):
        decode([header, b""])


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_number_of_frames(decode, count):
    """A header and a payload are two frames; fewer or more are refused."""
    whole = encode(FROM_SITE[0] if decode is decode_from_site else FROM_COORDINATOR[0])[1:]
    with pytest.raises(MalformedMessage, match=f"{count} frames"):
        decode([*whole, b"more"][:count])


def test_a_header_over_the_limit():
    """A header over the limit is not parsed, one of the limit is."""
    room = HEADER_BYTES - len(encode(Refused(code="x" * 70_000))[1]) + 70_000
    at_limit = Refused(code="x" * room)
    assert len(encode(at_limit)[1]) == HEADER_BYTES
    assert decode_from_coordinator(encode(at_limit)[1:]) == at_limit
    with pytest.raises(MalformedMessage):
        decode_from_coordinator(encode(Refused(code="x" * (room + 1)))[1:])


@pytest.mark.parametrize("message", FROM_SITE + FROM_COORDINATOR, ids=identify)
@pytest.mark.parametrize(
    "change",
    [lambda fields: [*fields, 1], lambda fields: fields[:-1], lambda fields: ["other", *fields[1:]], lambda _: []],
    ids=["a field more", "a field less", "another tag", "no field"],
)
def test_other_fields(message, change):
    """A message with a field too many or too few, or of an unknown kind, is refused on both sides."""
    for decode in DECODERS:
        with pytest.raises(MalformedMessage):
            decode(repacked(message, change))


@pytest.mark.parametrize("value", ["predict", "", 5, None])
def test_another_purpose(value):
    """A round has one of the two purposes."""
    start = FROM_COORDINATOR[0]
    with pytest.raises(MalformedMessage):
        decode_from_coordinator(
            repacked(start, lambda fields: [value if field == "train" else field for field in fields])
        )


def test_one_encoding_per_message():
    """A header that carries a payload of its own, or a longer form of the same array, is refused."""
    hidden = msgspec.msgpack.encode(Hello(manifest_digest=b"x", payload=b"hidden"))
    with pytest.raises(MalformedMessage, match="canonical"):
        decode_from_site([hidden, b""])
    _, header, payload = encode(Hello(manifest_digest=b"x"))
    assert decode_from_site([header, payload]) == Hello(manifest_digest=b"x")
    longer = b"\xdc\x00" + bytes([header[0] & 0x0F]) + header[1:]
    with pytest.raises(MalformedMessage, match="canonical"):
        decode_from_site([longer, payload])
