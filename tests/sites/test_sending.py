"""What the participant loop does with what is long: a masked input goes header first, then chunk by chunk, and neither
that nor a model is held longer, or more often, than it has to be."""

import threading
import tracemalloc
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from secureagg import SiteId
from secureagg.codec import decode_from_site, encode
from secureagg.messages import KeyAdvertisement, MaskedInput
from sites import control, participant_loop
from sites.model_state import ModelSpec
from sites.participant_loop import LOG, Round, _Session
from transport import PeerId

CHUNKS, SIZE = 16, 1 << 20


class Watching:
    """An endpoint that sends nothing: it notes what it is given and how much memory is in use then."""

    def __init__(self) -> None:
        self.tags: list[bytes] = []
        self.headers: list[object] = []
        self.chunks: list[tuple[bytes, int, int]] = []
        self.in_use: list[int] = []

    def send(self, _peer: PeerId, frames: Sequence[bytes]) -> None:
        """Note it."""
        tag, *rest = frames
        self.tags.append(tag)
        if tag == control.ROUND:
            self.headers.append(decode_from_site(rest, streamed=True))
        else:
            context, chunk = control.decode_chunk(rest)
            self.chunks.append((context, chunk[0], len(chunk)))
        self.in_use.append(tracemalloc.get_traced_memory()[0])


def test_chunks_are_sent_in_order_and_given_free() -> None:
    """The header goes before its chunks and everything else as one message; no chunk is kept once it is handed over."""
    session = _Session.__new__(_Session)  # without a site, whose keys and state play no part here
    session._endpoint = endpoint = Watching()
    context, site = b"c" * 32, SiteId("a")
    before = KeyAdvertisement(context=context, sender=site, mask_key=b"m", channel_key=b"k")
    digests = tuple(bytes([place]) for place in range(CHUNKS))
    tracemalloc.start()
    try:
        messages = [
            before,
            MaskedInput(
                context=context,
                sender=site,
                chunk_digests=digests,
                chunks=tuple(bytes([place]) * SIZE for place in range(CHUNKS)),
            ),
        ]
        session._send_round(messages)
    finally:
        tracemalloc.stop()
    assert messages == []
    assert endpoint.tags == [control.ROUND, control.ROUND, *[control.CHUNK] * CHUNKS]
    assert endpoint.headers == [before, MaskedInput(context=context, sender=site, chunk_digests=digests)]
    assert endpoint.chunks == [(context, place, SIZE) for place in range(CHUNKS)]
    assert endpoint.in_use[0] > CHUNKS * SIZE
    for place, in_use in enumerate(endpoint.in_use[2:]):
        assert in_use < (CHUNKS - place) * SIZE + SIZE // 2
    assert encode(before) == encode(endpoint.headers[0])


class Discarding:
    """An endpoint that only notes that what waits was to be forgotten."""

    def __init__(self) -> None:
        self.discarded = 0

    def discard_waiting(self, _peer: PeerId) -> int:
        """Note it."""
        self.discarded += 1
        return 0


@pytest.mark.parametrize(("number", "left"), [(3, True), (2, False), (4, False)])
def test_given_up(tmp_path: Path, number: int, left: bool) -> None:
    """A site that is told that a round goes on without it leaves exactly that round, and what still waits to be sent
    does not hold up the next one."""
    session = _Session.__new__(_Session)
    session._endpoint = endpoint = Discarding()
    session._changed, session.history, session._participant = threading.Condition(), [], None
    parameters = SimpleNamespace(run="run", round_number=3)
    session._task = task = SimpleNamespace(parameters=parameters, purpose="train", began=0.0)
    session.site = SimpleNamespace(state=tmp_path)
    session._take(tuple(control.encode(control.GivenUp(run="run", round_number=number))))
    assert endpoint.discarded == left
    assert session._task is (None if left else task)
    assert [entry.result for entry in session.history] == ["unfinished"] * left
    assert (tmp_path / LOG).exists() == left


@pytest.mark.parametrize(("waiting", "due", "said"), [(1, 0.0, 0), (0, 1e18, 0), (0, 0.0, 1)])
def test_no_hello_while_something_waits(waiting: int, due: float, said: int) -> None:
    """Hello is said when it is due and nothing else waits to be heard: over a dead line nothing piles up."""
    heard: list[bytes] = []
    session = _Session.__new__(_Session)
    session._endpoint = SimpleNamespace(
        pending=lambda _peer: waiting, send=lambda _peer, frames: heard.append(frames[0])
    )
    session.site = SimpleNamespace(manifest=SimpleNamespace(digest=bytes(32)))
    session._hello_due = due
    session._say_hello()
    assert heard == [control.CONTROL] * said


def test_a_submitted_state_becomes_one_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is encoded is the difference to the global model, and the only vector that is made of the state."""
    length = 1 << 20
    model = np.linspace(-1, 1, length, dtype=np.float32)
    session = SimpleNamespace(
        site=SimpleNamespace(
            manifest=SimpleNamespace(
                privacy=SimpleNamespace(shares_noise=False, mode="none"), training=SimpleNamespace(rounds=1)
            )
        ),
        spec=ModelSpec.of({"weight": (length,)}),
        spread=map,
        hand_over=lambda _task, _encoded: None,
    )
    parameters = SimpleNamespace(run="run", round_number=1)
    training_round = Round(session=session, task=SimpleNamespace(parameters=parameters, vector=model, counts={}))
    given: list[np.ndarray] = []
    monkeypatch.setattr(
        participant_loop, "encode_input", lambda _parameters, values, **_: given.append(values[participant_loop.UPDATE])
    )
    trained = {"weight": training_round.global_state["weight"] + 0.25}
    tracemalloc.start()
    try:
        training_round.submit(trained, examples=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.abs(given[0] - 0.25).max() < 1e-6
    assert peak < 1.1 * model.nbytes


def test_what_was_taken_is_not_held_while_waiting() -> None:
    """A message that was dealt with is gone while the session waits for the next one: it may be the model."""

    class Message:
        frames = (control.CONTROL,)

    held: list[weakref.ref[Message]] = []
    alive: list[bool] = []
    session = _Session.__new__(_Session)
    session._stop, session._changed, session._inbox, session._over = threading.Event(), threading.Condition(), [], True
    session._say_hello, session._take = lambda: None, lambda _frames: None

    def receive(_seconds: float) -> Message:
        alive.extend(each() is not None for each in held)
        if alive:
            session._stop.set()
        message = Message()
        held.append(weakref.ref(message))
        return message

    session._endpoint = SimpleNamespace(receive=receive)
    session._loop()
    assert alive == [False]
