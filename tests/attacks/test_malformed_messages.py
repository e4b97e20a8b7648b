"""Attack: what arrives is no message: cut, too long, of wrong types, in another encoding, or meant for the other side.

Everything goes the way that the network's bytes go: frames, ``decode_from_site`` and ``Coordinator.receive`` on one
side, frames, ``decode_from_coordinator`` and ``Participant.receive`` on the other.
"""

from collections.abc import Callable, Iterable
from hashlib import sha256

import msgspec
import numpy as np
import pytest
from support.rounds import StoppedRound
from support.uploads import bytes_of

from secureagg import MalformedMessage, UnexpectedMessage
from secureagg.codec import HEADER_BYTES, decode_from_coordinator, decode_from_site, encode, sign
from secureagg.messages import (
    AggregateAgreement,
    AggregateReport,
    AggregateSignature,
    CohortKeys,
    EncryptedAggregate,
    EncryptedShares,
    KeyAdvertisement,
    MaskedInput,
    RoundReceipt,
    ShareDelivery,
    SurvivorList,
    SurvivorSignature,
    ToCoordinator,
    ToSite,
    UnmaskRequest,
    UnmaskShares,
)
from secureagg.phases import Aborted, AwaitingUnmaskRequest
from secureagg.slots import COEFFICIENT_MODULUS, SLOTS

replace = msgspec.structs.replace
pytestmark = pytest.mark.usefixtures("backend")
BEFORE: dict[type[ToCoordinator], type[ToSite] | None] = {
    KeyAdvertisement: None,
    EncryptedShares: CohortKeys,
    MaskedInput: ShareDelivery,
    SurvivorSignature: SurvivorList,
    UnmaskShares: UnmaskRequest,
}
TO_SITE = (CohortKeys, ShareDelivery, SurvivorList, UnmaskRequest, RoundReceipt)
OPENING = {AggregateSignature: EncryptedAggregate, AggregateReport: AggregateAgreement}  # with the homomorphic backend
Frames = list[bytes]


def at(kind: type[ToCoordinator]) -> StoppedRound:
    """A round whose coordinator waits for ``kind``; the honest messages are pending."""
    stopped = StoppedRound()
    if (before := (BEFORE | OPENING)[kind]) is not None:
        stopped.deliver(stopped.until(before))
    return stopped


def to_coordinator(stopped: StoppedRound, frames: Frames) -> None:
    """The coordinator takes ``frames`` that the first site's connection delivers."""
    stopped.coordinator.receive(decode_from_site(frames), sender=stopped.sites[0])


def to_site(stopped: StoppedRound, frames: Frames) -> list[ToCoordinator]:
    """The first site takes ``frames`` that the coordinator's connection delivers."""
    return stopped.participants[stopped.sites[0]].receive(decode_from_coordinator(frames))


def survivors_and_sum(stopped: StoppedRound) -> tuple[str, ...]:
    """Who is in the released sum, which is exactly the sum of their inputs in every lane."""
    survivors = stopped.aggregate.survivors
    stopped.check_sum(survivors)
    return survivors


def state(stopped: StoppedRound) -> tuple[object, ...]:
    """All that the coordinator has collected so far."""
    phase = stopped.coordinator.phase
    sums = bytes_of(getattr(phase, "sums", {}))
    return id(phase), stopped.coordinator.expected, dict(phase.received), sums


def cut(frames: Frames) -> Iterable[Frames]:
    """Every beginning of the first frame but the whole."""
    return ([frames[0][:end], *frames[1:]] for end in range(len(frames[0])))


def longer(frames: Frames) -> Iterable[Frames]:
    """Something behind the message: a byte, the message again, a frame."""
    header, *chunks = frames
    return ([header + b"\0", *chunks], [header + b"\xc0", *chunks], [header * 2, *chunks], [*frames, b""], frames * 2)


def oversized(frames: Frames) -> Iterable[Frames]:
    """A header above the limit, and a few bytes that announce gigabytes or endless nesting."""
    fields = msgspec.msgpack.decode(frames[0])
    fields[1] = bytes(HEADER_BYTES)
    announced = (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff")
    tag = frames[0][: 2 + len(msgspec.msgpack.decode(frames[0])[0])]
    yield [msgspec.msgpack.encode(fields), *frames[1:]]
    for start in announced:
        yield [start, *frames[1:]]
        yield [tag + start, *frames[1:]]
    for nested in (b"\x91", b"\x81", b"\xdd\0\0\0\1"):
        yield [nested * 100_000, *frames[1:]]
        yield [tag + nested * 100_000, *frames[1:]]


def wrong_types(frames: Frames) -> Iterable[Frames]:
    """Every field in turn as nothing, a fraction, a truth value, a map and text that is none; a field more or less."""
    fields = msgspec.msgpack.decode(frames[0])
    for place in range(len(fields)):
        for value in (None, 1.5, True, {"a": 1}, msgspec.Raw(b"\xa2\xff\xfe"), [[[]]], [None]):
            changed = [*fields[:place], value, *fields[place + 1 :]]
            yield [msgspec.msgpack.encode(changed), *frames[1:]]
    for changed in (fields[:-1], [*fields, b""], [*fields, []], fields[1:], fields[0], [fields], [], {}, None, b"x"):
        yield [msgspec.msgpack.encode(changed), *frames[1:]]
    yield [msgspec.msgpack.encode({str(place): value for place, value in enumerate(fields)}), *frames[1:]]
    yield from ([], [b""], [b"", *frames])


def other_encodings(frames: Frames) -> Iterable[Frames]:
    """The same array with a longer header, and each field with the longest header of its type."""
    header = frames[0]
    fields = msgspec.msgpack.decode(header)
    yield [b"\xdc\0" + bytes([len(fields)]) + header[1:], *frames[1:]]
    yield [b"\xdd\0\0\0" + bytes([len(fields)]) + header[1:], *frames[1:]]
    for place, value in enumerate(fields):
        raw = [msgspec.Raw(msgspec.msgpack.encode(field)) for field in fields]
        raw[place] = msgspec.Raw(longest(value))
        yield [msgspec.msgpack.encode(raw), *frames[1:]]


def longest(value: object) -> bytes:
    """``value`` in MessagePack under the longest header of its type."""
    match value:
        case bytes():
            return b"\xc6" + len(value).to_bytes(4, "big") + value
        case str():
            return b"\xdb" + len(value.encode()).to_bytes(4, "big") + value.encode()
        case int():
            return b"\xcf" + value.to_bytes(8, "big")
        case list():
            return b"\xdd" + len(value).to_bytes(4, "big") + b"".join(map(msgspec.msgpack.encode, value))
    raise AssertionError(value)


GARBAGE: dict[str, Callable[[Frames], Iterable[Frames]]] = {
    "cut": cut,
    "longer": longer,
    "oversized": oversized,
    "wrong types": wrong_types,
    "other encodings": other_encodings,
}


@pytest.mark.parametrize("kind", BEFORE)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_at_the_coordinator(garbage: str, kind: type[ToCoordinator]) -> None:
    """None of it is a message, nothing that was collected changes, and the round ends with the sum of all.

    Stopped by ``_decode``: the typed decoder, the size limit, the number of frames and the canonical form.
    """
    check_garbage_at_the_coordinator(garbage, kind)


@pytest.mark.parametrize("backend", ["homomorphic"], indirect=True)
@pytest.mark.parametrize("kind", OPENING)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_while_the_sum_is_opened(garbage: str, kind: type[ToCoordinator]) -> None:
    """The same for what sites say of the encrypted sum and of what is in it."""
    check_garbage_at_the_coordinator(garbage, kind)


def check_garbage_at_the_coordinator(garbage: str, kind: type[ToCoordinator]) -> None:
    """In place of ``kind``."""
    stopped = at(kind)
    (own, good), (peer, other), *_ = stopped.pending
    assert isinstance(good, kind)
    stopped.coordinator.receive(decode_from_site(encode(other)), sender=peer)
    before = state(stopped)
    for frames in GARBAGE[garbage](encode(good)):
        with pytest.raises(MalformedMessage, match=r"^(message|masked input): "):
            to_coordinator(stopped, frames)
        assert state(stopped) == before
    stopped.pending = [pair for pair in stopped.pending if pair[0] != peer]
    assert own in stopped.coordinator.expected
    stopped.finish()
    assert survivors_and_sum(stopped) == tuple(stopped.sites)


@pytest.mark.parametrize("kind", TO_SITE)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_at_a_site(garbage: str, kind: type[ToSite]) -> None:
    """None of it is a message, so the machine never sees it, answers nothing, and takes the honest message afterwards.

    Stopped by ``_decode``: the typed decoder, the size limit, the number of frames and the canonical form.
    """
    check_garbage_at_a_site(garbage, kind)


@pytest.mark.parametrize("backend", ["homomorphic"], indirect=True)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_place_of_the_agreement(garbage: str) -> None:
    """The same for the signatures on the encrypted sum; ``test_homomorphic_rounds.py`` looks at what is no
    such sum."""
    check_garbage_at_a_site(garbage, AggregateAgreement)


def check_garbage_at_a_site(garbage: str, kind: type[ToSite]) -> None:
    """In place of ``kind``."""
    stopped = StoppedRound()
    messages = stopped.until(kind)
    site = stopped.sites[0]
    before = stopped.participants[site].phase
    for frames in GARBAGE[garbage](encode(messages[site])):
        with pytest.raises(MalformedMessage, match=r"^message: "):
            to_site(stopped, frames)
        assert stopped.participants[site].phase is before
    stopped.deliver(messages)
    stopped.finish()
    assert survivors_and_sum(stopped) == tuple(stopped.sites)
    assert type(stopped.participants[site].phase).__name__ == "ParticipantFinished"


@pytest.mark.parametrize("kind", TO_SITE)
def test_reflected_to_the_other_direction(kind: type[ToSite]) -> None:
    """Each side's messages, sent back to it or to its like, are none that it can receive.

    Stopped by the two types of message, ``ToCoordinator`` and ``ToSite``, which share no tag.
    """
    stopped = StoppedRound()
    messages = stopped.until(kind)
    site = stopped.sites[0]
    phase = stopped.participants[site].phase
    before = state(stopped) if kind is not RoundReceipt else None
    for message in messages.values():
        with pytest.raises(MalformedMessage, match="not one of the protocol's messages"):
            to_coordinator(stopped, encode(message))
    assert before is None or state(stopped) == before
    twin = StoppedRound()
    while twin.pending:
        for _, message in twin.pending:
            with pytest.raises(MalformedMessage, match="not one of the protocol's messages"):
                to_site(stopped, encode(message))
        twin.deliver(twin.collect())
    assert stopped.participants[site].phase is phase
    stopped.deliver(messages)
    stopped.finish()
    assert survivors_and_sum(stopped) == tuple(stopped.sites)


def with_lanes(message: MaskedInput, packed: bytes) -> MaskedInput:
    """The masked input with these bytes in one chunk."""
    return replace(message, chunks=(packed,), chunk_digests=(sha256(packed).digest(),))


@pytest.mark.parametrize("wrong", ["no chunks", "cut", "longer", "all ones", "a filling bit"])
def test_a_signed_input_that_is_no_vector(wrong: str) -> None:
    """Rightly encoded and signed, but not the packed lanes or ciphertexts of the round: refused before anything is
    added.

    Stopped by the checks of number and sizes in ``Upload``, and by ``check_filling`` or ``check_fresh``.
    """
    stopped = at(MaskedInput)
    (site, good), (peer, other), *_ = stopped.pending
    stopped.coordinator.receive(other, sender=peer)
    packed = good.chunks[0]
    if StoppedRound.backend == "homomorphic":
        # The last coefficient is one that no ciphertext has.
        filled = packed[: 8 * (SLOTS - 1)] + COEFFICIENT_MODULUS.to_bytes(8, "little") + packed[8 * SLOTS :]
    else:
        filled = with_a_filling_bit(stopped, packed)
    bad = {
        "no chunks": replace(good, chunks=(), chunk_digests=()),
        "cut": with_lanes(good, packed[:-1]),
        "longer": with_lanes(good, packed + b"\0"),
        "all ones": with_lanes(good, b"\xff" * len(packed)),
        "a filling bit": with_lanes(good, filled),
    }[wrong]
    before = state(stopped)
    found = "bytes of lanes|bits are not zero|a ciphertext with a coefficient of"
    with pytest.raises(MalformedMessage, match=f"{site}, CollectingMaskedInputs.*({found})"):
        to_coordinator(stopped, encode(sign(bad, stopped.identities[site])))
    assert state(stopped) == before
    stopped.pending = [pair for pair in stopped.pending if pair[0] != peer]
    stopped.finish()
    assert survivors_and_sum(stopped) == tuple(stopped.sites)


def with_a_filling_bit(stopped: StoppedRound, packed: bytes) -> bytes:
    """Packed lanes with a bit set behind the last value of one."""
    lanes = list(stopped.parameters.lanes.values())
    ends = np.cumsum([lane.packed_bytes for lane in lanes])
    assert ends[-1] == len(packed)
    # The last byte of the first lane whose bits do not fill whole bytes.
    last = next(end - 1 for end, lane in zip(ends, lanes, strict=True) if lane.masked_length * lane.masked_bits % 8)
    return packed[:last] + bytes([packed[last] | 0x80]) + packed[last + 1 :]


def repeated(message: ToSite, field: str) -> ToSite:
    """``message`` with the first element of a field twice."""
    values = getattr(message, field)
    return replace(message, **{field: (values[0], *values)})


def turned(message: ToSite, field: str) -> ToSite:
    """``message`` with a field in the opposite order."""
    return replace(message, **{field: tuple(reversed(getattr(message, field)))})


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        (CohortKeys, repeated, "advertisements"),
        *((ShareDelivery, change, "ciphertexts") for change in (repeated, turned)),
        *((SurvivorList, change, "survivors") for change in (repeated, turned)),
        *((UnmaskRequest, change, "list_signatures") for change in (repeated, turned)),
    ],
)
def test_rightly_encoded_names_that_repeat_or_are_turned(
    kind: type[ToSite], change: Callable[[ToSite, str], ToSite], field: str
) -> None:
    """Somebody named twice, or names out of order: the site ends the round, reveals nothing then or later, and the
    others' sum is right.

    Stopped by ``named``, and for advertisements by the count in ``Participant._share_secrets``.
    """
    stopped = StoppedRound()
    messages = stopped.until(kind)
    site = stopped.sites[0]
    with pytest.raises(MalformedMessage):
        to_site(stopped, encode(change(messages[site], field)))
    participant = stopped.participants[site]
    assert isinstance(participant.phase, Aborted)
    assert participant._input is None
    with pytest.raises(UnexpectedMessage):
        to_site(stopped, encode(messages[site]))
    # It has answered no unmask request: the journal still takes the note of one.
    stopped.journals[site].answer(stopped.parameters.run, stopped.parameters.round_number)
    stopped.deliver({other: message for other, message in messages.items() if other != site})
    assert all(sender != site for sender, _ in stopped.pending)
    stopped.finish()
    sent_its_input = kind in (SurvivorList, UnmaskRequest)
    assert survivors_and_sum(stopped) == tuple(stopped.sites if sent_its_input else stopped.sites[1:])


def test_a_digest_that_is_none() -> None:
    """A list whose digests have other lengths is not signed: it could not name an input.

    Stopped by the length of each digest, checked in ``Participant._sign_survivors``.
    """
    for length in (0, 31, 33, 1 << 19):
        stopped = StoppedRound()
        honest = stopped.until(SurvivorList)[stopped.sites[0]]
        (peer, _) = honest.survivors[-1]
        changed = replace(honest, survivors=(*honest.survivors[:-1], (peer, bytes(length))))
        with pytest.raises(MalformedMessage, match="an input digest"):
            to_site(stopped, encode(changed))
        phase = stopped.participants[stopped.sites[0]].phase
        assert isinstance(phase, Aborted)
        assert not isinstance(phase, AwaitingUnmaskRequest)
