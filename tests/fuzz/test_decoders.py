"""Everything that takes bytes from a peer: bytes of any kind give a message or the documented error, and never cost
more memory than a header may have.

The corpus is what real rounds on both graphs put on the wire.  ``SECUREAGG_FUZZ_EXAMPLES`` is the number of examples
of each test; where it is set, they differ from run to run.
"""

import os
import resource
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from support.packed import unpack
from support.rounds import StoppedRound

from secureagg import Counts, Lane, MalformedMessage
from secureagg.codec import HEADER_BYTES, decode_from_coordinator, decode_from_site, encode
from secureagg.lanes import RingLane
from secureagg.messages import MaskedInput
from secureagg.packing import pack
from sites import control
from sites.control import FederationOver, Hello, Refused, StartRound, Withdraw
from transport.envelope import Limits, Reassembler, split
from transport.errors import FrameTooLarge, MalformedFrame

EXAMPLES = int(os.environ.get("SECUREAGG_FUZZ_EXAMPLES", "250"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="SECUREAGG_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.timeout(180 + EXAMPLES // 10)

Frames = list[bytes]


def corpus() -> tuple[list[Frames], list[Frames]]:
    """What sites and coordinator sent in a round of 4 sites with a dropout, one of 17 without, one on the sparse graph,
    two with the homomorphic backend, and one that failed."""
    from_site: list[Frames] = []
    from_coordinator: list[Frames] = []
    small = StoppedRound(4)
    small.silent[small.sites[3]] = MaskedInput
    rounds = [small, StoppedRound(17), StoppedRound(6, graph="sparse")]
    if find_spec("tenseal"):
        rounds += [StoppedRound(4, backend="homomorphic", release_to=whom) for whom in ("sites", "coordinator")]
    for stopped in rounds:
        while stopped.pending:
            from_site += [encode(message) for _, message in stopped.pending]
            outbound = stopped.collect()
            from_coordinator += [encode(message) for message in outbound.values()]
            stopped.deliver(outbound)
    failed = StoppedRound(3).coordinator.close_phase()
    from_coordinator += [encode(item.message) for item in failed]
    return from_site, from_coordinator


FROM_SITE, FROM_COORDINATOR = corpus()
CONTROL_FROM_SITE = [
    control.encode(message)[1:]
    for message in (
        Hello(manifest_digest=bytes(range(32))),
        Withdraw(run="run", round_number=3, leaving=True),
        Withdraw(run="run", round_number=(1 << 63) - 1, leaving=False),
    )
]
CONTROL_FROM_COORDINATOR = [
    control.encode(message)[1:]
    for message in (
        StartRound(run="run", round_number=300, purpose="train", cohort=("a", "b", "c"), payload=bytes(40)),
        StartRound(run="run", round_number=4, purpose="evaluate", cohort=("site",) * 20),
        FederationOver(code="finished", payload=bytes(40)),
        Refused(code="manifest"),
    )
]

DECODERS = [decode_from_site, decode_from_coordinator, control.decode_from_site, control.decode_from_coordinator]

# --- hostile bytes ---

# Heads of MessagePack objects that announce up to four billion bytes, elements or pairs: bin, str, array, map, ext.
HUGE = [head + b"\xff\xff\xff\xff" for head in (b"\xc6", b"\xdb", b"\xdd", b"\xdf", b"\xc9")]
HUGE += [head + b"\x7f\xff\xff\xff" for head in (b"\xc6", b"\xdb", b"\xdd", b"\xdf", b"\xc9")]
HUGE += [head + b"\xff\xff" for head in (b"\xc5", b"\xda", b"\xdc", b"\xde", b"\xc8")]
# Heads behind which one byte is a length, or that hold a length themselves.
LENGTH_BEHIND = b"\xc4\xc5\xc6\xd9\xda\xdb\xdc\xdd"

atoms = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=70)
)
trees = st.recursive(
    atoms,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def paths(tree: object, here: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The place of every node in nested lists."""
    found = [here]
    if isinstance(tree, list):
        for index, inner in enumerate(tree):
            found += paths(inner, (*here, index))
    return found


def changed_tree(draw: st.DrawFn, header: bytes, other: bytes) -> bytes:
    """``header`` with one node replaced, removed, repeated, wrapped, or exchanged with one of ``other``."""
    try:
        tree, donor = msgspec.msgpack.decode(header), msgspec.msgpack.decode(other)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError):
        return header
    place = draw(st.sampled_from(paths(tree)))
    if not place:
        return msgspec.msgpack.encode([tree])
    parent = tree
    for index in place[:-1]:
        parent = parent[index]
    where, kind = place[-1], draw(st.sampled_from(["replace", "remove", "repeat", "wrap", "swap", "graft", "nest"]))
    match kind:
        case "replace":
            parent[where] = draw(trees)
        case "remove":
            del parent[where]
        case "repeat":
            parent[where:where] = [parent[where]] * draw(st.sampled_from([1, 2, 20]))
        case "wrap":
            parent[where] = [parent[where]]
        case "swap":
            parent[where], parent[0] = parent[0], parent[where]
        case "graft":
            for index in draw(st.sampled_from(paths(donor))):
                donor = donor[index]
            parent[where] = donor
        case "nest":
            parent[where] = msgspec.msgpack.encode(parent[where])
    return msgspec.msgpack.encode(tree)


def changed_bytes(draw: st.DrawFn, header: bytes, other: bytes) -> bytes:
    """``header`` with a change that knows bytes only, or where MessagePack keeps its lengths."""
    at = draw(st.integers(0, len(header)))
    kind = draw(st.sampled_from(["set", "cut", "extend", "insert", "delete", "splice", "length", "huge", "deep"]))
    match kind:
        case "set" if at < len(header):
            return header[:at] + bytes([draw(st.integers(0, 255))]) + header[at + 1 :]
        case "cut":
            return header[:at]
        case "extend":
            return header + draw(st.binary(min_size=1, max_size=9) | st.just(header))
        case "insert":
            return header[:at] + draw(st.binary(min_size=1, max_size=9)) + header[at:]
        case "delete":
            return header[:at] + header[at + draw(st.integers(1, 70)) :]
        case "splice":
            return header[:at] + other[draw(st.integers(0, len(other))) :]
        case "length":
            lengths = [index for index, byte in enumerate(header) if byte in LENGTH_BEHIND or 0x90 <= byte <= 0xBF]
            if lengths:
                at = draw(st.sampled_from(lengths))
                at += header[at] in LENGTH_BEHIND
                by = draw(st.sampled_from([-1, 1, 8, 64, 128]))
                return header[:at] + bytes((byte + by) % 256 for byte in header[at : at + 1]) + header[at + 1 :]
        case "huge":
            return header[:at] + draw(st.sampled_from(HUGE)) + header[at + draw(st.sampled_from([0, 1, 2, 5])) :]
        case "deep":
            return header[:at] + draw(st.sampled_from([b"\x91", b"\x81\xa0"])) * draw(st.sampled_from([3, 5000]))
    return header


@st.composite
def hostile(draw: st.DrawFn, seeds: Sequence[Frames]) -> Frames:
    """The frames of a real message after one to three changes, or arbitrary ones."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.lists(st.binary(max_size=300), max_size=3))
    frames = list(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        other = draw(st.sampled_from(seeds))
        kind = draw(st.sampled_from(["tree", "tree", "bytes", "bytes", "frames"]))
        if kind == "frames" or not frames:
            which = draw(st.integers(0, len(frames)))
            match draw(st.sampled_from(["drop", "add", "repeat", "empty"])):
                case "drop":
                    frames = frames[:which] + frames[which + 1 :]
                case "add":
                    frames = [*frames[:which], *other, *frames[which:]]
                case "repeat":
                    frames = frames[: which + 1] + frames[which:]
                case "empty":
                    frames[which : which + 1] = [b""]
        else:
            frames[0] = (changed_tree if kind == "tree" else changed_bytes)(draw, frames[0], other[0])
    return frames


# --- the protocol's messages ---


@pytest.mark.parametrize("decode", [decode_from_site, decode_from_coordinator])
def test_the_corpus_decodes(decode: Callable[[Frames], object]) -> None:
    """What a real round put on the wire decodes, and encodes to the same frames; all kinds of message are there."""
    seeds = FROM_SITE if decode is decode_from_site else FROM_COORDINATOR
    messages = [decode(frames) for frames in seeds]
    assert [encode(message) for message in messages] == seeds
    expected = 8 if decode is decode_from_site else 11
    if find_spec("tenseal"):
        expected += 4 if decode is decode_from_site else 3
    assert len({type(message) for message in messages}) == expected


@fuzz
@given(frames=hostile(FROM_SITE + FROM_COORDINATOR))
def test_hostile_messages(frames: Frames) -> None:
    """Whatever bytes come, either decoder gives a message whose one encoding they are, or MalformedMessage."""
    for decode in (decode_from_site, decode_from_coordinator):
        try:
            message = decode(frames)
        except MalformedMessage:
            continue
        event(type(message).__name__)
        assert encode(message) == frames


@fuzz
@given(frames=st.lists(st.binary(max_size=300), max_size=3))
def test_arbitrary_messages(frames: Frames) -> None:
    """The same for bytes that are like no message at all."""
    for decode in (decode_from_site, decode_from_coordinator):
        try:
            message = decode(frames)
        except MalformedMessage:
            continue
        assert encode(message) == frames


@fuzz
@given(frames=hostile(CONTROL_FROM_SITE + CONTROL_FROM_COORDINATOR))
def test_hostile_control_messages(frames: Frames) -> None:
    """Whatever bytes come, a control decoder gives a message, or MalformedMessage; what it gives arrives unchanged if
    it is sent on."""
    for decode in (control.decode_from_site, control.decode_from_coordinator):
        try:
            message = decode(frames)
        except MalformedMessage:
            continue
        event(type(message).__name__)
        assert message.payload == frames[1]
        assert decode(control.encode(message)[1:]) == message


# --- chunks ---

LIMITS = Limits(chunk_bytes=64, message_bytes=600, frames=8)
HEADER = struct.Struct("<QQQ")
numbers = st.integers(0, 700) | st.sampled_from([1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1])


@st.composite
def chunks(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    """The chunks of up to three messages with some of their headers, tables and bytes changed, or out of place."""
    sent: list[tuple[bytes, bytes]] = []
    for number in range(draw(st.integers(1, 3))):
        frames = draw(st.lists(st.binary(max_size=100), min_size=1, max_size=4))
        sent += [(header, bytes(chunk)) for header, chunk in split(frames, number=number, limits=LIMITS)]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(sent) - 1))
        header, chunk = sent[at]
        match draw(st.sampled_from(["number", "bytes", "table", "cut", "long", "header", "repeat", "lose", "move"])):
            case "number" if len(header) == HEADER.size:
                fields = list(HEADER.unpack(header))
                fields[draw(st.integers(0, 2))] = draw(numbers)
                sent[at] = HEADER.pack(*fields), chunk
            case "bytes":
                sent[at] = header, draw(st.binary(max_size=70))
            case "table":  # the count of frames, or the length of one
                where, size = draw(st.sampled_from([(0, 4), (4, 8), (12, 8)]))
                value = (draw(numbers) % (1 << 8 * size)).to_bytes(size, "little")
                sent[at] = header, chunk[:where] + value + chunk[where + size :]
            case "cut":
                sent[at] = header, chunk[: draw(st.integers(0, len(chunk)))]
            case "long":
                sent[at] = header, chunk + draw(st.binary(min_size=1, max_size=70))
            case "header":
                sent[at] = draw(st.binary(max_size=30)), chunk
            case "repeat":
                sent.insert(at, sent[at])
            case "lose" if len(sent) > 1:
                del sent[at]
            case "move":
                sent.append(sent.pop(at))
    return sent


@fuzz
@given(sent=chunks())
def test_hostile_chunks(sent: list[tuple[bytes, bytes]]) -> None:
    """A reassembler gives frames that are exactly the bytes of the chunks before, or MalformedFrame or FrameTooLarge;
    afterwards it takes an honest message."""
    one = Reassembler(LIMITS)
    for index, (header, chunk) in enumerate(sent):
        try:
            frames = one.take(header, chunk, who="peer")
        except (MalformedFrame, FrameTooLarge):
            continue
        if frames is not None:
            event("frames")
            number, _, total = HEADER.unpack(header)
            again = list(split(frames, number=number, limits=LIMITS))
            stream = b"".join(chunk for _, chunk in again)
            assert len(stream) == total
            assert b"".join(chunk for _, chunk in sent[: index + 1]).endswith(stream)
    honest = list(split([b"honest", b""], number=9, limits=LIMITS))
    assert [one.take(header, bytes(chunk), who="peer") for header, chunk in honest][-1] == (b"honest", b"")


# --- packed lanes ---


@fuzz
@given(bits=st.integers(8, 64), length=st.integers(1, 40), data=st.data())
def test_hostile_packed_lanes(bits: int, length: int, data: st.DataObject) -> None:
    """Packed bytes of any length and content are words whose one packing they are, or MalformedMessage."""
    lane = RingLane(lane=Lane(name="x", length=length, encoding=Counts(maximum=1)), ring_bits=bits)
    exact = lane.packed_bytes
    size = data.draw(st.just(exact) | st.integers(0, exact + 9))
    packed = data.draw(st.binary(min_size=size, max_size=size))
    spare = -lane.masked_length * lane.masked_bits % 8
    if size == exact and spare and data.draw(st.booleans()):
        packed = packed[:-1] + bytes([packed[-1] & 0xFF >> spare])
    right = size == exact and not (spare and packed[-1] >> 8 - spare)
    try:
        words = unpack(lane, packed, who="peer")
    except MalformedMessage:
        assert not right
        return
    assert right
    assert words.shape == (lane.masked_length,)
    assert words.dtype == lane.masked_word
    assert all(int(word) >> lane.masked_bits == 0 for word in words)
    assert pack(lane, words) == packed
    np.testing.assert_array_equal(unpack(lane, memoryview(packed), who="peer"), words)


# --- memory ---


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Within, neither Python's allocators nor the address space of the process grow by more than ``limit`` bytes,
    for the latter rounded up by what an allocator takes from the system at once."""
    statm = Path("/proc/self/statm")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + limit + (64 << 20), hard))
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert peak <= limit, f"{peak} bytes"


def test_the_measure_measures() -> None:
    """Whoever takes more than the limit is found out, by the count or by the system."""
    with pytest.raises(AssertionError, match="bytes"), at_most(1 << 20):
        bytearray(2 << 20)
    with pytest.raises(MemoryError), at_most(1 << 20):
        np.empty(1 << 32, np.uint8)


@pytest.mark.parametrize("head", HUGE, ids=bytes.hex)
@pytest.mark.parametrize(
    "decode",
    DECODERS,
    ids=lambda decode: f"{decode.__module__}.{decode.__name__}",
)
def test_announced_gigabytes(decode: Callable[[Frames], object], head: bytes) -> None:
    """A length of gigabytes, anywhere in a small message, is refused for less memory than a header may have."""
    seeds = FROM_SITE[:5] + FROM_COORDINATOR[:5] + CONTROL_FROM_SITE + CONTROL_FROM_COORDINATOR
    cuts = [frames[0][:at] + head for frames in seeds for at in range(0, min(len(frames[0]), 64))]
    for announced in dict.fromkeys(cuts):
        with at_most(HEADER_BYTES):
            try:
                decode([announced, b""])
            except MalformedMessage:
                refused = True
            try:
                decode([announced])
            except MalformedMessage:
                continue
        raise AssertionError(f"{announced.hex()} is a message")
    assert refused


@fuzz
@given(frames=hostile(FROM_SITE + FROM_COORDINATOR + CONTROL_FROM_SITE + CONTROL_FROM_COORDINATOR))
@example(frames=[b"\x91" * 100_000])
@example(frames=[b"\x91" * 100_000, b""])
def test_memory_of_hostile_messages(frames: Frames) -> None:
    """No changed message of a few kilobytes costs any decoder more memory than a header may have."""
    with at_most(HEADER_BYTES):
        for decode in DECODERS:
            try:
                decode(frames)
            except MalformedMessage:
                continue


def test_header_above_the_cap_is_not_parsed() -> None:
    """A header of more than the cap is refused before anything is made of it."""
    header = b"\xdd\x00\x80\x00\x01" + bytes(HEADER_BYTES + 1)
    for decode in DECODERS:
        with at_most(1 << 16), pytest.raises(MalformedMessage):
            decode([header, b""])


@pytest.mark.parametrize("total", [100, 256 << 20, (256 << 20) + 1, (1 << 64) - 1])
def test_announced_chunks(total: int) -> None:
    """A chunk of a few bytes that announces a large message, many frames or a long one costs next to nothing."""
    one = Reassembler(Limits(message_bytes=256 << 20))
    table = struct.pack("<IQ", 4096, (1 << 64) - 1)
    with at_most(1 << 16):
        for count in range(50):
            for stream in (table, struct.pack("<IQ", (1 << 32) - 1, 256 << 20), b"\xff" * 12):
                try:
                    assert one.take(HEADER.pack(count, 0, total), stream, who="peer") is None
                except FrameTooLarge:
                    assert total > 256 << 20
                with pytest.raises(MalformedFrame):
                    Reassembler(Limits()).take(HEADER.pack(count, 0, len(stream)), stream, who="peer")


@pytest.mark.parametrize("bits", [8, 20, 33, 64])
def test_a_lane_of_gigabytes(bits: int) -> None:
    """A few bytes in place of a lane of 2^39 elements are refused before room for the lane is made."""
    lane = RingLane(lane=Lane(name="x", length=1 << 39, encoding=Counts(maximum=1)), ring_bits=bits)
    with at_most(1 << 16), pytest.raises(MalformedMessage):
        unpack(lane, b"few bytes", who="peer")
