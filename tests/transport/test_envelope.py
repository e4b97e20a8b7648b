"""Cutting messages into chunks and putting them together again, for honest and for hostile bytes."""

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.envelope import HEADER_BYTES, Limits, Reassembler, split
from transport.errors import FrameTooLarge, MalformedFrame

WHO = "site-a"
SMALL = Limits(chunk_bytes=16, message_bytes=256, frames=4)
FRAMES = (b"first", b"", b"a third frame that needs several chunks")
HUGE = 2**64 - 1

some_frames = st.lists(st.binary(max_size=80), min_size=1, max_size=6)
# Mostly headers that nearly make sense: random 24 bytes would all fail at the announced length.
a_number = st.one_of(st.integers(0, 40), st.integers(0, HUGE))
a_header = st.one_of(
    st.tuples(a_number, a_number, a_number).map(lambda fields: header(*fields)), st.binary(max_size=2 * HEADER_BYTES)
)
a_table = st.tuples(st.integers(0, 2**32 - 1) | st.integers(0, 5), st.lists(a_number, max_size=5)).map(
    lambda table: struct.pack(f"<I{len(table[1])}Q", table[0], *table[1])
)


def header(number: int, offset: int, total: int) -> bytes:
    """A chunk header as the module's docstring lays it out."""
    return struct.pack("<QQQ", number, offset, total)


def stream_of(*frames: bytes) -> bytes:
    """A message's stream as the module's docstring lays it out."""
    return struct.pack(f"<I{len(frames)}Q", len(frames), *map(len, frames)) + b"".join(frames)


def chunks_of(frames, *, number=1, limits=SMALL):
    """The chunks of a message as they arrive at the other end."""
    return [(head, bytes(chunk)) for head, chunk in split(frames, number=number, limits=limits)]


def take_all(reassembler, chunks):
    """Give every chunk to the reassembler; its answers."""
    return [reassembler.take(head, chunk, who=WHO) for head, chunk in chunks]


def give_whole(stream: bytes, limits: Limits):
    """Give a fresh reassembler this stream in one chunk; its answer."""
    return Reassembler(limits).take(header(1, 0, len(stream)), stream, who=WHO)


@pytest.fixture
def reassembler():
    """A reassembler with the small limits."""
    return Reassembler(SMALL)


@given(messages=st.lists(some_frames, min_size=1, max_size=3), chunk_bytes=st.integers(1, 120))
def test_round_trip(messages, chunk_bytes):
    """Whatever the frames and the chunk size, each message comes back whole, and only with its last chunk."""
    limits = Limits(chunk_bytes=chunk_bytes)
    one = Reassembler(limits)
    for number, frames in enumerate(messages):
        *before, last = take_all(one, chunks_of(frames, number=number, limits=limits))
        assert before == [None] * len(before)
        assert last == tuple(frames)


@given(frames=some_frames, chunk_bytes=st.integers(1, 120))
def test_layout(frames, chunk_bytes):
    """The chunks are the documented stream, in order, none larger than the limit and none empty."""
    stream = stream_of(*frames)
    chunks = chunks_of(frames, number=7, limits=Limits(chunk_bytes=chunk_bytes))
    assert b"".join(chunk for _, chunk in chunks) == stream
    assert all(0 < len(chunk) <= chunk_bytes for _, chunk in chunks)
    offsets = range(0, len(stream), chunk_bytes)
    assert [head for head, _ in chunks] == [header(7, offset, len(stream)) for offset in offsets]


@given(values=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20), chunk_bytes=st.integers(1, 50))
def test_memoryviews_count_in_bytes(values, chunk_bytes):
    """A memoryview of wider items arrives as its bytes, not as its number of items."""
    packed = struct.pack(f"={len(values)}i", *values)
    view = memoryview(packed).cast("i") if values else memoryview(packed)
    limits = Limits(chunk_bytes=chunk_bytes)
    assert take_all(Reassembler(limits), chunks_of([view], limits=limits))[-1] == (packed,)


def test_sender_refuses_too_many_frames():
    """As many frames as allowed may be sent, and one more is refused before the first chunk."""
    assert chunks_of([b""] * SMALL.frames)
    with pytest.raises(FrameTooLarge, match="5 frames, expected at most 4"):
        split([b""] * (SMALL.frames + 1), number=1, limits=SMALL)


def test_sender_refuses_too_many_bytes():
    """A message of exactly the limit, table included, may be sent, and one more byte is refused before the first
    chunk."""
    room = SMALL.message_bytes - len(stream_of(b""))
    assert take_all(Reassembler(SMALL), chunks_of([bytes(room)]))[-1] == (bytes(room),)
    with pytest.raises(FrameTooLarge, match="257 bytes, expected at most 256"):
        split([bytes(room + 1)], number=1, limits=SMALL)


@pytest.mark.parametrize("total", [SMALL.message_bytes + 1, HUGE])
def test_receiver_refuses_an_announced_length_beyond_the_limit(reassembler, total):
    """A chunk that announces more than the limit is refused at once, naming who sent it."""
    with pytest.raises(FrameTooLarge, match=f"{WHO}: a message of {total} bytes, expected at most 256"):
        reassembler.take(header(1, 0, total), b"x", who=WHO)


@pytest.mark.parametrize("size", [0, SMALL.chunk_bytes + 1])
def test_receiver_refuses_a_chunk_of_another_size(reassembler, size):
    """An empty chunk and one larger than the limit are refused."""
    with pytest.raises(MalformedFrame, match=f"{WHO}: a chunk of {size} bytes, expected 1 to 16"):
        reassembler.take(header(1, 0, 64), bytes(size), who=WHO)


@pytest.mark.parametrize("size", [0, HEADER_BYTES - 1, HEADER_BYTES + 1])
def test_receiver_refuses_a_header_of_another_length(reassembler, size):
    """A header shorter or longer than the layout is refused."""
    with pytest.raises(MalformedFrame, match=f"{WHO}: a chunk header of {size} bytes, expected 24"):
        reassembler.take(bytes(size), b"x", who=WHO)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(lambda chunks, _: chunks[2], id="one-skipped"),
        pytest.param(lambda chunks, _: (header(1, 8, 72), chunks[1][1]), id="overlapping"),
        pytest.param(lambda _, other: other[1], id="another-message"),
        pytest.param(lambda chunks, _: (header(1, 16, 73), chunks[1][1]), id="another-length"),
        pytest.param(lambda chunks, _: (header(1, HUGE, 72), chunks[1][1]), id="absurd-offset"),
    ],
)
def test_a_chunk_that_does_not_continue(reassembler, second):
    """A chunk that does not continue the message before it is refused, and nothing is kept of that message."""
    chunks, other = chunks_of(FRAMES, number=1), chunks_of(FRAMES, number=2)
    assert len(stream_of(*FRAMES)) == 72  # what the headers above announce, but for "another-length"
    reassembler.take(*chunks[0], who=WHO)
    with pytest.raises(MalformedFrame, match=f"{WHO}: a chunk that does not continue"):
        reassembler.take(*second(chunks, other), who=WHO)
    with pytest.raises(MalformedFrame):
        reassembler.take(*chunks[1], who=WHO)


def test_a_message_cannot_begin_in_its_middle(reassembler):
    """The first chunk of a connection must have offset 0."""
    with pytest.raises(MalformedFrame, match="does not continue"):
        reassembler.take(*chunks_of(FRAMES)[1], who=WHO)


def test_a_repeated_chunk(reassembler):
    """A chunk that comes twice is refused."""
    chunks = chunks_of(FRAMES)
    take_all(reassembler, chunks[:2])
    with pytest.raises(MalformedFrame, match="does not continue"):
        reassembler.take(*chunks[1], who=WHO)


def test_a_finished_message_cannot_be_continued(reassembler):
    """After its last chunk a message is over: another chunk of it is refused."""
    chunks = chunks_of(FRAMES)
    assert take_all(reassembler, chunks)[-1] == FRAMES
    with pytest.raises(MalformedFrame, match="does not continue"):
        reassembler.take(*chunks[-1], who=WHO)


@pytest.mark.parametrize("total", [0, 9])
def test_more_bytes_than_announced_in_the_first_chunk(reassembler, total):
    """A first chunk longer than the message it announces is refused."""
    with pytest.raises(MalformedFrame, match=f"{WHO}: 10 bytes of a message of {total}"):
        reassembler.take(header(1, 0, total), bytes(10), who=WHO)


def test_more_bytes_than_announced_in_the_last_chunk(reassembler):
    """A last chunk that goes beyond the announced length is refused."""
    reassembler.take(header(1, 0, 20), bytes(16), who=WHO)
    with pytest.raises(MalformedFrame, match=f"{WHO}: 21 bytes of a message of 20"):
        reassembler.take(header(1, 16, 20), bytes(5), who=WHO)


@pytest.mark.parametrize("number", [1, 2])
def test_offset_zero_begins_again(reassembler, number):
    """A chunk with offset 0 drops the unfinished message, with the same number or another, and its own arrives."""
    take_all(reassembler, chunks_of((b"x" * 60,))[:2])
    assert take_all(reassembler, chunks_of(FRAMES, number=number))[-1] == FRAMES


@pytest.mark.parametrize(
    "bad",
    [
        (b"", b"x"),
        (header(1, 0, 0), b""),
        (header(1, 0, HUGE), b"x"),
        (header(1, 3, 30), b"x"),
        (header(1, 0, 4), bytes(4)),
    ],
)
def test_recovers_after_an_error(reassembler, bad):
    """After a refused chunk the next whole message arrives."""
    with pytest.raises((MalformedFrame, FrameTooLarge)):
        reassembler.take(*bad, who=WHO)
    assert take_all(reassembler, chunks_of(FRAMES))[-1] == FRAMES


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"\x01\x00\x00", id="shorter-than-the-count"),
        pytest.param(stream_of(), id="no-frames"),
        pytest.param(stream_of(*[b""] * (SMALL.frames + 1)), id="too-many-frames"),
        pytest.param(struct.pack("<I", 2**32 - 1), id="absurd-count"),
        pytest.param(struct.pack("<IQ", 2, 0), id="table-cut-short"),
        pytest.param(stream_of(b"abc")[:-1], id="frame-cut-short"),
        pytest.param(stream_of(b"abc") + b"d", id="bytes-left-over"),
        pytest.param(struct.pack("<IQQ", 2, HUGE, 1), id="lengths-that-wrap-to-zero"),
    ],
)
def test_receiver_refuses_a_wrong_table(stream):
    """A stream whose table does not describe it exactly is refused, naming who sent it."""
    with pytest.raises(MalformedFrame, match=WHO):
        give_whole(stream, Limits(chunk_bytes=256, message_bytes=256, frames=SMALL.frames))


@settings(max_examples=300)
@given(
    chunks=st.lists(
        st.one_of(
            st.tuples(a_header, st.binary(max_size=40)),
            st.tuples(st.integers(0, 3).map(lambda number: header(number, 0, 20)), st.binary(min_size=20, max_size=20)),
        ),
        max_size=8,
    )
)
def test_arbitrary_chunks(chunks):
    """Whatever bytes arrive, there is a message, None or one of the two errors, and then a good message still
    arrives."""
    one = Reassembler(Limits(chunk_bytes=32, message_bytes=64, frames=3))
    for head, chunk in chunks:
        try:
            frames = one.take(head, chunk, who=WHO)
        except (MalformedFrame, FrameTooLarge) as error:
            assert str(error).startswith(f"{WHO}: ")  # noqa: PT017 - both outcomes are right, whichever comes
        else:
            assert frames is None or 0 < len(frames) <= 3
    assert take_all(one, [(header(9, 0, 13), stream_of(b"y"))])[-1] == (b"y",)


@settings(max_examples=300)
@given(table=a_table, rest=st.binary(max_size=60))
def test_arbitrary_streams(table, rest):
    """A complete stream with any table gives exactly the frames that it describes, or MalformedFrame."""
    stream = table + rest
    try:
        frames = give_whole(stream, Limits(chunk_bytes=200, message_bytes=200))
    except MalformedFrame:
        return
    assert stream_of(*frames) == stream


@given(frames=some_frames, chunk_bytes=st.integers(1, 40), data=st.data())
def test_one_changed_header_byte(frames, chunk_bytes, data):
    """With one byte of one header changed the message arrives whole or not at all, never altered."""
    limits = Limits(chunk_bytes=chunk_bytes, message_bytes=1000)
    chunks = chunks_of(frames, limits=limits)
    which = data.draw(st.integers(0, len(chunks) - 1))
    where, flip = data.draw(st.integers(0, HEADER_BYTES - 1)), data.draw(st.integers(1, 255))
    changed = bytearray(chunks[which][0])
    changed[where] ^= flip
    chunks[which] = (bytes(changed), chunks[which][1])
    one = Reassembler(limits)
    for chunk in chunks:
        try:
            answer = one.take(*chunk, who=WHO)
        except (MalformedFrame, FrameTooLarge):
            continue
        assert answer is None or answer == tuple(frames)


def test_a_long_message_is_not_copied_as_a_whole():
    """Splitting a message of many chunks holds one of them at a time."""
    frames = [bytes(100), bytes(32 << 20), b"", bytes(1 << 20)]
    tracemalloc.start()
    try:
        assert sum(len(chunk) for _, chunk in split(frames, number=1, limits=Limits(message_bytes=64 << 20))) == len(
            stream_of()
        ) + 4 * 8 + (100 + (33 << 20))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_defaults():
    """The limits that apply unless others are agreed are the documented ones."""
    assert Limits() == Limits(chunk_bytes=1 << 18, message_bytes=8 << 20, frames=4096, memory_bytes=256 << 20)
    assert Limits().of_site == Limits()
    assert Limits(to_site_bytes=5).of_site.message_bytes == 5


def test_a_message_is_put_together_with_one_copy() -> None:
    """What comes in is copied once, from the chunks into its frames: models are long, and sites' memory is not."""
    limits = Limits(chunk_bytes=1 << 16, message_bytes=8 << 20)
    frames = (b"tag", bytes(4 << 20))
    chunks = list(split(frames, number=1, limits=limits))
    reassembler = Reassembler(limits)
    tracemalloc.start()
    try:
        found = [reassembler.take(header, chunk, who=WHO) for header, chunk in chunks]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [None] * (len(chunks) - 1) + [frames]
    assert peak < 1.1 * (4 << 20)
