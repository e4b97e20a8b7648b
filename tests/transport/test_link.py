"""Links: whatever connections do, every message arrives once and in order, and nobody sends more than was granted."""

from collections import deque
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.envelope import Limits
from transport.errors import FrameTooLarge, MalformedFrame
from transport.link import FRAME_BYTES, INITIAL_CREDIT, UNKNOWN, CreditPool, Frame, Kind, Link, read_frame

LIMITS = Limits(chunk_bytes=4096, message_bytes=1 << 18)
WINDOW = 16 << 10
SITES = 3


class World:
    """A coordinator's links and its sites', and between them connections that lose everything on their way."""

    def __init__(self, *, total: int | None = None) -> None:
        least = SITES * INITIAL_CREDIT + LIMITS.message_bytes
        self.total = total or least
        self.pool = CreditPool(self.total, links=SITES, limits=LIMITS)
        self.sites = [self._link(bytes([number]) * 16, UNKNOWN, None) for number in range(SITES)]
        self.ends = [
            self._link(site.session, bytes([number + 9]) * 16, self.pool) for number, site in enumerate(self.sites)
        ]
        self.up: list[deque[list[bytes]]] = [deque() for _ in range(SITES)]
        self.down: list[deque[list[bytes]]] = [deque() for _ in range(SITES)]
        self.got: list[list[bytes]] = [[] for _ in range(SITES)]  # at the coordinator
        self.got_down: list[list[bytes]] = [[] for _ in range(SITES)]
        self.connected = [False] * SITES
        self.epochs = 0

    def _link(self, session: bytes, epoch: bytes, pool: CreditPool | None) -> Link:
        pool = pool or CreditPool(2 * LIMITS.message_bytes + INITIAL_CREDIT, links=1, limits=LIMITS)
        return Link(session=session, epoch=epoch, sends=LIMITS, takes=LIMITS, pool=pool, window=WINDOW, who="peer")

    def connect(self, number: int) -> None:
        """A new connection of this site; whatever is on the way over the old one is lost."""
        self.cut(number)
        site = self.sites[number]
        if site.epoch == UNKNOWN:
            site.restart()
        self.up[number].append([site.frame(Kind.RESUME).packed])
        self.connected[number] = True

    def cut(self, number: int) -> None:
        """The connection breaks."""
        self.up[number].clear()
        self.down[number].clear()
        self.connected[number] = False
        self.sites[number].detach()
        self.ends[number].detach()

    def restart_coordinator(self) -> None:
        """The coordinator's program begins anew: all connections break, and it remembers nothing."""
        self.pool = CreditPool(self.total, links=SITES, limits=LIMITS)
        for number, site in enumerate(self.sites):
            self.cut(number)
            self.epochs += 1
            self.ends[number] = self._link(site.session, bytes([100 + self.epochs]) * 16, self.pool)

    def step(self, number: int) -> bool:
        """Let one frame of this site's leave each end, and one arrive at each; whether anything moved."""
        if not self.connected[number]:
            return False
        site, end, moved = self.sites[number], self.ends[number], False
        for link, way in ((site, self.up[number]), (end, self.down[number])):
            if (parts := link.outgoing()) is not None:
                way.append(parts)
                moved = True
        if self.up[number]:
            parts, moved = self.up[number].popleft(), True
            frame = read_frame(parts, who="site")
            if frame.kind == Kind.RESUME:
                end.answer_resume()
                if frame.epoch in (UNKNOWN, end.epoch):
                    end.take(frame, ())
            elif (message := end.take(frame, parts)) is not None:
                self.got[number].append(message[0])
        if self.down[number]:
            parts, moved = self.down[number].popleft(), True
            frame = read_frame(parts, who="coordinator")
            if not site.attached or site.epoch == UNKNOWN:
                assert frame.kind == Kind.REWIND
                first = site.epoch == UNKNOWN
                site.adopt(frame)
                frame = replace(frame, kind=Kind.NEWS) if first else frame
            if (message := site.take(frame, parts)) is not None:
                self.got_down[number].append(message[0])
        self.check()
        return moved

    def check(self) -> None:
        """No more credit is out than the pool has, and no more has arrived than credit."""
        extra = sum(max(0, end._granted - end._delivered - INITIAL_CREDIT) for end in self.ends)
        assert self.pool.free + extra == self.total - SITES * INITIAL_CREDIT
        assert self.pool.free >= 0
        for end in self.ends:
            assert end._received <= end._granted

    def run(self) -> None:
        """Until nothing moves any more."""
        while sum(self.step(number) for number in range(SITES)):
            pass


def message(size: int, index: int) -> bytes:
    """A message that tells its place."""
    return index.to_bytes(4, "little") + bytes(size)


sizes = st.integers(0, 9_000) | st.integers(0, LIMITS.message_bytes - 100)
events = st.one_of(
    st.tuples(st.just("send"), st.integers(0, SITES - 1), sizes),
    st.tuples(st.just("reply"), st.integers(0, SITES - 1), sizes),
    st.tuples(st.just("steps"), st.integers(0, SITES - 1), st.integers(1, 60)),
    st.tuples(st.sampled_from(["cut", "connect", "revoke"]), st.integers(0, SITES - 1), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(events, max_size=40))
def test_everything_arrives_once_and_in_order(history) -> None:
    """Whatever breaks, is revoked or waits in between, once the connections stand every message has arrived exactly
    once, in order, in both directions, and all credit is back."""
    world = World()
    sent: list[list[bytes]] = [[] for _ in range(SITES)]
    replied: list[list[bytes]] = [[] for _ in range(SITES)]
    for what, number, amount in history:
        if what == "send":
            sent[number].append(message(amount, len(sent[number])))
            world.sites[number].queue([sent[number][-1]])
        elif what == "reply":
            replied[number].append(message(amount, len(replied[number])))
            world.ends[number].queue([replied[number][-1]])
        elif what == "steps":
            for _ in range(amount):
                world.step(number)
        elif what == "revoke":
            world.ends[number].revoke()
        else:
            getattr(world, what)(number)
    for number in range(SITES):
        if not world.connected[number]:
            world.connect(number)
    world.run()
    assert world.got == sent
    assert world.got_down == replied
    for link in (*world.sites, *world.ends):
        assert link.pending == 0
        assert link.all_has_left
        assert not link.holds_credit
    assert world.pool.free == world.total - SITES * INITIAL_CREDIT
    assert not world.pool.anybody_waits


@pytest.mark.parametrize("cut_after", [1, 5, 17, 40])
def test_resuming_sends_only_what_is_missing(cut_after: int) -> None:
    """After a cut no more is sent again than was on the way."""
    world = World()
    world.connect(0)
    for index in range(20):
        world.sites[0].queue([message(20_000, index)])
    for _ in range(cut_after):
        world.step(0)
    world.connect(0)
    world.run()
    assert [len(one) for one in world.got[0]] == [20_004] * 20
    assert 0 < world.sites[0].bytes_sent_again <= WINDOW + LIMITS.chunk_bytes


def test_a_restarted_coordinator() -> None:
    """A coordinator that was restarted gets what had not begun to leave, and nothing that began with the old one."""
    world = World()
    world.connect(0)
    for index in range(3):
        world.sites[0].queue([message(100_000, index)])
    for _ in range(5):
        world.step(0)
    world.restart_coordinator()
    world.sites[0].queue([message(7, 3)])
    world.connect(0)
    world.run()
    assert [int.from_bytes(one[:4], "little") for one in world.got[0]] == [1, 2, 3]
    assert world.sites[0].pending == 0


def test_credit_is_served_in_order_of_asking() -> None:
    """Of three who need all the credit there is, one sends at a time, and each its turn; small messages pass."""
    world = World()
    large = LIMITS.message_bytes - 100
    for number in range(SITES):
        world.connect(number)
        world.sites[number].queue([message(10, 0)])
        world.sites[number].queue([message(large, 1)])
    world.run()
    assert [[len(one) for one in got] for got in world.got] == [[14, large + 4]] * SITES


def test_a_holder_that_is_silent_keeps_nobody_waiting() -> None:
    """Once its credit is revoked the next one sends; it begins its message again when it is back."""
    world = World()
    large = LIMITS.message_bytes - 100
    for number in (0, 1):
        world.connect(number)
        world.sites[number].queue([message(large, 0)])
    for _ in range(12):
        world.step(0)
    assert world.ends[0].holds_credit
    for _ in range(300):
        world.step(1)
    assert world.got[1] == []
    assert world.pool.anybody_waits
    world.ends[0].revoke()
    for _ in range(300):
        world.step(1)
    assert len(world.got[1]) == 1
    world.run()
    assert len(world.got[0]) == 1


def test_more_than_the_credit() -> None:
    """Bytes beyond the credit are refused and not kept, and what was begun is lost."""
    world = World()
    end, site = world.ends[0], world.sites[0]
    site._allowed = 1 << 40  # a site that grants itself what it likes
    site._window = 1 << 40
    site.restart()
    site._allowed = 1 << 40
    site.queue([message(3 * INITIAL_CREDIT, 0)])
    taken, refused = 0, 0
    while (parts := site.outgoing()) is not None:
        try:
            assert end.take(read_frame(parts, who="site"), parts) is None
            taken += 1
        except FrameTooLarge:
            refused += 1
            assert end.arrived == 0
            break
    assert refused == 1
    assert taken * LIMITS.chunk_bytes <= INITIAL_CREDIT


def test_a_wish_beyond_the_largest_message() -> None:
    """Who wants more than any message needs is granted one largest message at most."""
    world = World()
    wish = Frame(Kind.NEWS, world.sites[0].session, UNKNOWN, wanted=1 << 60, backlog=1 << 60)
    world.ends[0].take(wish, ())
    assert world.ends[0]._granted == INITIAL_CREDIT + LIMITS.message_bytes
    world.check()
    assert not world.pool.anybody_waits


def test_a_pool_too_small() -> None:
    """A pool that could not hold every peer's initial credit and one largest message is refused when it is made."""
    least = SITES * INITIAL_CREDIT + LIMITS.message_bytes
    with pytest.raises(FrameTooLarge, match=f"{least - 1} bytes, expected at least {least}"):
        CreditPool(least - 1, links=SITES, limits=LIMITS)


def test_discarding_what_waits() -> None:
    """What has not begun to leave can be forgotten; what has begun arrives, and so does what comes later."""
    world = World()
    world.connect(0)
    for index in range(6):
        world.sites[0].queue([message(50_000, index)])
    for _ in range(3):
        world.step(0)
    dropped = world.sites[0].discard_waiting()
    assert 0 < dropped < 6
    world.sites[0].queue([message(5, 99)])
    world.run()
    numbers = [int.from_bytes(one[:4], "little") for one in world.got[0]]
    assert numbers == [*range(6 - dropped), 99]


@given(
    st.lists(
        st.builds(
            Frame,
            st.integers(0, 7),
            st.just(b"s" * 16),
            st.sampled_from([UNKNOWN, b"e" * 16]),
            *[st.integers(0, 5000) | st.integers(0, 2**64 - 1)] * 6,
        ),
        max_size=15,
    )
)
def test_hostile_numbers(frames) -> None:
    """Whatever numbers a peer's frames have, the link refuses them with an error of its own or goes on, and neither
    gives nor takes more than it may."""
    world = World()
    end = world.ends[0]
    end.queue([message(30_000, 0)])
    end.answer_resume()
    for frame in frames:
        parts = [frame.packed, b"x" * 24, b"chunk"] if frame.kind == Kind.DATA else [frame.packed]
        with suppress(MalformedFrame, FrameTooLarge):
            end.take(read_frame(parts, who="peer"), parts)
        for _ in range(20):
            if end.outgoing() is None:
                break
        world.check()
        assert end._cursor <= end._end


@given(st.lists(st.binary(max_size=2 * FRAME_BYTES), max_size=4))
def test_arbitrary_parts(parts) -> None:
    """Any parts are a frame or MalformedFrame."""
    with suppress(MalformedFrame):
        assert read_frame(parts, who="peer").packed == parts[0]


def test_what_was_confirmed_is_not_sent_again() -> None:
    """A peer that wants bytes again of a message that it has confirmed is refused, and nothing changes."""
    world = World()
    world.connect(0)
    site = world.sites[0]
    for index in range(2):
        site.queue([message(1_000, index)])
    world.run()
    site.queue([message(1_000, 2)])
    back = Frame(Kind.REWIND, site.session, site.epoch, allowed=INITIAL_CREDIT)
    with pytest.raises(MalformedFrame, match="wants 0 again, which it has confirmed"):
        site.take(back, ())
    world.run()
    assert len(world.got[0]) == 3


@pytest.mark.parametrize("lost", [0, 3, 5])
def test_a_frame_that_was_dropped(lost: int) -> None:
    """When a frame is missing within a connection, the receiver asks once for what is missing and takes nothing else
    before; all arrives once and in order."""
    world = World()
    world.connect(0)
    world.run()
    for index in range(4):
        world.sites[0].queue([message(12_000, index)])
    for _ in range(lost):
        world.step(0)
    dropped = world.sites[0].outgoing()
    assert dropped is not None
    assert dropped[0][0] == Kind.DATA
    world.run()
    assert [int.from_bytes(one[:4], "little") for one in world.got[0]] == [0, 1, 2, 3]
    assert world.sites[0].pending == 0


def test_no_more_under_way_than_the_window() -> None:
    """However much credit there is, no more leaves than the window before the peer confirms some of it."""
    world = World()
    world.connect(0)
    world.run()
    site = world.sites[0]
    site.queue([message(3 * WINDOW, 0)])
    under_way = 0
    while (parts := site.outgoing()) is not None:
        under_way += len(parts[2])
    assert under_way == WINDOW
