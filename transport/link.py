"""Messages that arrive once and in order although connections break, and never faster than the receiver has room for.

One ``Link`` is one end of what two peers say to each other, over any number of connections one after the other.  Like
TCP above TCP, in both directions: bytes have positions, the receiver tells up to where it has them (``received``), up
to where whole messages were handed on (``delivered``), and how far the sender may go (``allowed``); after a new
connection the sender goes on where the receiver is.  It is no second TCP: within a connection nothing is lost or out of
order, so there are no timers here, and neither sockets nor clocks.

    frame   kind (1 byte), session (16), epoch (16), position (8), received (8), delivered (8), allowed (8), wanted (8),
            backlog (8), all little-endian; behind the kind DATA a chunk's header and bytes as in ``transport.envelope``

    DATA    the bytes at ``position``                            both ways
    NEWS    nothing but the numbers that every frame has         both ways
    RESUME  the first frame of a connection                      site to coordinator
    REWIND  go on from ``received``; answers RESUME, or a gap    both ways
    BYE     this session is over                                 site to coordinator
    REFUSED another session of this peer stands                  coordinator to site

``session`` names a site's program, chosen at random when it starts; ``epoch`` what the coordinator remembers of it.
An epoch that is new to the site means that the coordinator was restarted: messages that had begun to leave are void.

A message begins only when the receiver's credit covers all of it, ``wanted`` asks for that, and ``backlog`` says how
much more waits.  So whoever has begun can finish, and no two peers wait for each other.  Up to INITIAL_CREDIT bytes
never have to be asked for: the messages of the protocol but for masked inputs and the model.
"""

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from transport.envelope import Limits, Outgoing, Reassembler
from transport.errors import FrameTooLarge, MalformedFrame

_FRAME: Final = struct.Struct("<B16s16s6Q")
FRAME_BYTES: Final = _FRAME.size
INITIAL_CREDIT: Final = 64 << 10
UNKNOWN: Final = bytes(16)


class Kind(IntEnum):
    """What a frame is."""

    DATA = 1
    NEWS = 2
    RESUME = 3
    REWIND = 4
    BYE = 5
    REFUSED = 6


@dataclass(frozen=True, slots=True)
class Frame:
    """The numbers of one frame, see the module."""

    kind: int
    session: bytes
    epoch: bytes
    position: int = 0
    received: int = 0
    delivered: int = 0
    allowed: int = 0
    wanted: int = 0
    backlog: int = 0

    @property
    def packed(self) -> bytes:
        """Its bytes."""
        numbers = (self.position, self.received, self.delivered, self.allowed, self.wanted, self.backlog)
        return _FRAME.pack(self.kind, self.session, self.epoch, *numbers)


def read_frame(parts: Sequence[bytes], *, who: str) -> Frame:
    """The frame at the head of ``parts``; MalformedFrame naming ``who`` unless it is one with the parts of its kind."""
    if not parts or len(parts[0]) != FRAME_BYTES:
        raise MalformedFrame(f"{who}: not a frame of a link, expected one of {FRAME_BYTES} bytes")
    frame = Frame(*_FRAME.unpack(parts[0]))
    if frame.kind not in Kind.__members__.values() or len(parts) != (3 if frame.kind == Kind.DATA else 1):
        raise MalformedFrame(f"{who}: a frame of kind {frame.kind} in {len(parts)} parts")
    return frame


class CreditPool:
    """Shares ``total`` bytes among links: what their peers may send, and what has arrived of unfinished messages.

    ``share``: how far one link may go ahead of the message that it needs next.  Raises FrameTooLarge for a total that
    could not hold the initial credit of ``links`` peers and one of their largest messages.
    """

    def __init__(self, total: int, *, links: int, limits: Limits) -> None:
        needed = links * INITIAL_CREDIT + limits.message_bytes
        if total < needed:
            raise FrameTooLarge(f"memory for {links} peers: {total} bytes, expected at least {needed}")
        self.free = total - links * INITIAL_CREDIT
        self.share = total // links
        self._waiting: dict[Link, None] = {}  # in the order in which they asked

    def wait(self, link: "Link") -> None:
        """Let ``link`` wait for its turn."""
        self._waiting.setdefault(link)
        self.serve()

    def forget(self, link: "Link") -> None:
        """Let ``link`` wait no longer."""
        self._waiting.pop(link, None)

    def serve(self) -> None:
        """Give credit to those who wait, first come first served: nobody is passed by, however large its message."""
        while self._waiting:
            link = next(iter(self._waiting))
            if not link.take_credit():
                return
            del self._waiting[link]

    @property
    def anybody_waits(self) -> bool:
        """Whether the pool is empty for somebody."""
        return bool(self._waiting)


class Link:
    """See the module.  ``sends`` and ``takes``: limits of what goes out and comes in; ``window``: most bytes under way
    that the peer has not confirmed; ``chunk_bytes``: of a chunk that goes out.
    """

    def __init__(
        self, *, session: bytes, epoch: bytes, sends: Limits, takes: Limits, pool: CreditPool, window: int, who: str
    ) -> None:
        self.session, self.epoch, self._who = session, epoch, who
        self._sends, self._pool, self._window = sends, pool, window
        self._chunk_bytes = min(sends.chunk_bytes, window)
        self._largest = takes.message_bytes
        self._reassembler = Reassembler(takes)
        self.attached = False  # whether frames may leave now
        self.news_due = False
        self.bytes_sent = self.bytes_sent_again = 0
        self._numbered = 0
        self._begin()

    def _begin(self) -> None:
        # What goes out: messages that have begun to leave and are not confirmed, those that wait; positions.
        self._sent: deque[tuple[int, Outgoing]] = deque()
        self._waiting: deque[tuple[int, Outgoing]] = deque()
        self._end = self._cursor = self._furthest = self._confirmed = 0
        self._allowed = INITIAL_CREDIT
        self._asked = 0
        # What comes in.
        self._received = self._delivered = 0
        self._granted = INITIAL_CREDIT
        self._wanted = self._backlog = 0
        self._rewind_due = self._gap = False

    # --- what goes out ---

    def queue(self, frames: Sequence[bytes | memoryview]) -> None:
        """Let a message wait for its turn; raises as ``Outgoing`` does."""
        message = Outgoing(frames, number=self._numbered, limits=self._sends)
        self._numbered += 1
        self._waiting.append((self._end, message))
        self._end += message.total

    @property
    def pending(self) -> int:
        """How many messages the peer has not confirmed."""
        return len(self._sent) + len(self._waiting)

    @property
    def all_has_left(self) -> bool:
        """Whether nothing waits."""
        return self._cursor == self._end

    @property
    def progress(self) -> int:
        """Up to where the peer has confirmed what it got."""
        return self._confirmed

    def discard_waiting(self) -> int:
        """Forget the messages that have not begun to leave; how many."""
        count = len(self._waiting)
        if count:
            self._end = self._waiting[0][0]
            self._waiting.clear()
        return count

    def outgoing(self) -> list[bytes] | None:
        """The next frame that may leave, or None; call until then."""
        if not self.attached:
            return None
        if self._rewind_due:
            self._rewind_due = self.news_due = False
            return [self.frame(Kind.REWIND).packed]
        if (data := self._next_chunk()) is not None:
            return data
        if self.news_due or self._asked < self._wish:
            self.news_due = False
            return [self.frame(Kind.NEWS).packed]
        return None

    def _next_chunk(self) -> list[bytes] | None:
        if self._cursor - self._confirmed >= self._window:
            return None
        if not self._sent or self._cursor == self._sent[-1][0] + self._sent[-1][1].total:
            if not self._waiting or self._waiting[0][0] + self._waiting[0][1].total > self._allowed:
                return None
            self._sent.append(self._waiting.popleft())
        begin, message = self._sent[-1]
        header, chunk = message.chunk(self._cursor - begin, self._chunk_bytes)
        frame = self.frame(Kind.DATA).packed
        self.news_due = False
        again = min(len(chunk), max(0, self._furthest - self._cursor))
        self.bytes_sent_again += again
        self.bytes_sent += len(chunk) + len(header) if not again else 0
        self._cursor += len(chunk)
        self._furthest = max(self._furthest, self._cursor)
        return [frame, header, chunk]

    @property
    def _wish(self) -> int:
        """Where the next message ends, if it needs more credit; 0 if none does."""
        end = self._waiting[0][0] + self._waiting[0][1].total if self._waiting else 0
        return end if end > self._allowed else 0

    def frame(self, kind: Kind) -> Frame:
        """A frame of this kind with the numbers of the moment."""
        self._asked = wish = self._wish
        return Frame(
            kind=kind,
            session=self.session,
            epoch=self.epoch,
            position=self._cursor,
            received=self._received,
            delivered=self._delivered,
            allowed=self._granted,
            wanted=wish,
            backlog=self._end,
        )

    @property
    def _oldest(self) -> int:
        """Where the first message begins that the peer has not confirmed as a whole."""
        return next((held[0][0] for held in (self._sent, self._waiting) if held), self._end)

    def _drop_delivered(self, delivered: int) -> None:
        while self._sent and self._sent[0][0] + self._sent[0][1].total <= min(delivered, self._cursor):
            self._sent.popleft()

    def _rewind(self, frame: Frame) -> None:
        """Go on where the peer is."""
        self._cursor = self._confirmed = frame.received
        while self._sent and self._sent[-1][0] >= frame.received:
            self._waiting.appendleft(self._sent.pop())
        while self._waiting and self._waiting[0][0] < frame.received:
            self._sent.append(self._waiting.popleft())
        self._drop_delivered(frame.delivered)
        self._allowed = frame.allowed
        self._asked = 0

    # --- what comes in ---

    def take(self, frame: Frame, parts: Sequence[bytes]) -> tuple[bytes, ...] | None:
        """Take one frame of the peer's; returns the message that it completes, or None.

        Raises MalformedFrame or FrameTooLarge for what breaks the rules; what there was of that message is dropped.
        """
        if frame.delivered > frame.received or frame.received > self._furthest:
            raise MalformedFrame(f"{self._who}: confirms {frame.received} bytes, {self._furthest} were sent")
        if frame.kind in (Kind.REWIND, Kind.RESUME):
            if frame.received < self._oldest:
                raise MalformedFrame(f"{self._who}: wants {frame.received} again, which it has confirmed")
            self._rewind(frame)
        else:
            self._confirmed = max(self._confirmed, min(frame.received, self._cursor))
            self._drop_delivered(frame.delivered)
            self._allowed = max(self._allowed, frame.allowed)
        self._hear_wish(frame)
        return self._take_data(frame, parts[1], parts[2]) if frame.kind == Kind.DATA else None

    def _hear_wish(self, frame: Frame) -> None:
        # Stops a wish that could never be granted from keeping all others waiting.
        self._wanted = min(frame.wanted, self._granted + self._largest)
        self._backlog = frame.backlog
        if self._wanted > self._granted:
            self._pool.wait(self)

    def _take_data(self, frame: Frame, header: bytes, chunk: bytes) -> tuple[bytes, ...] | None:
        if frame.position != self._received:
            # Behind: sent again, and here already.  Ahead: something is missing, and it has to come first.
            if frame.position > self._received and not self._gap:
                self._gap = self._rewind_due = True
            self.news_due = True
            return None
        # Stops a peer from sending more than there is room for; nothing of it is kept.
        if self._received + len(chunk) > self._granted:
            self._lose_begun()
            raise FrameTooLarge(f"{self._who}: {len(chunk)} bytes beyond the credit of {self._granted}")
        try:
            message = self._reassembler.take(header, chunk, who=self._who)
        except (MalformedFrame, FrameTooLarge):
            self._lose_begun()
            raise
        self._gap, self.news_due = False, True
        self._received += len(chunk)
        if message is not None:
            before = self._granted - self._delivered
            self._delivered = self._received
            self._granted = max(self._granted, self._delivered + INITIAL_CREDIT)
            self._give_back(before)
        return message

    def take_credit(self) -> bool:
        """Take from the pool what the peer's next message needs, and more if there is; whether there was enough."""
        needed = self._wanted - self._granted
        if needed > self._pool.free:
            return False
        if needed > 0:
            further = min(self._backlog, self._delivered + self._pool.share) - self._granted
            credit = min(max(needed, further), self._pool.free)
            self._pool.free -= credit
            self._granted += credit
            self.news_due = True
        return True

    @property
    def holds_credit(self) -> bool:
        """Whether it has more than every link has."""
        return self._granted - self._delivered > INITIAL_CREDIT

    @property
    def arrived(self) -> int:
        """Up to where bytes have arrived."""
        return self._received

    def revoke(self) -> None:
        """Take back what the peer may send, and forget the message that it has begun; it will send that again."""
        before = self._granted - self._delivered
        self._lose_begun()
        self._granted = self._delivered + INITIAL_CREDIT
        self._rewind_due = True
        self._give_back(before)

    def _lose_begun(self) -> None:
        self._reassembler.drop()
        self._received = self._delivered
        self._gap = False

    def _give_back(self, before: int) -> None:
        self._pool.free += before - (self._granted - self._delivered)
        self._pool.serve()

    # --- connections ---

    def detach(self) -> None:
        """The connection is gone."""
        self.attached = False

    def answer_resume(self) -> None:
        """The peer has come over a new connection: tell it where to go on."""
        self.attached = self._rewind_due = True
        self._gap = False

    def adopt(self, frame: Frame) -> None:
        """Take up the coordinator's answer to RESUME: go on where it is, or begin anew with one that was restarted."""
        if self.epoch == UNKNOWN:
            self.epoch = frame.epoch
        elif self.epoch != frame.epoch:
            self.epoch = frame.epoch
            waiting = [message for _, message in self._waiting]
            self.close()
            self._begin()
            for message in waiting:
                self._waiting.append((self._end, message))
                self._end += message.total
        self.attached = True

    def restart(self) -> None:
        """Send from the beginning, over a first connection: nothing is known of what earlier attempts brought."""
        self._rewind(Frame(Kind.REWIND, self.session, UNKNOWN, allowed=INITIAL_CREDIT))
        self.attached = True

    def close(self) -> None:
        """Give back all credit but the initial one, and forget what has begun to arrive."""
        before = self._granted - self._delivered
        self._lose_begun()
        self._granted = self._delivered + INITIAL_CREDIT
        self._pool.forget(self)
        self._give_back(before)
