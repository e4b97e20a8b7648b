"""Where processor time goes: each thread's is split among named functions, without what they call."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import transport
from benchmarks.stopwatch import Stopwatch, io_seconds
from secureagg import packing
from secureagg.lanes import RingLane


class Clock:
    """A clock that only its user moves; one for all threads."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """At zero."""
    return Clock()


def test_a_function_s_time_is_without_that_of_others(clock: Clock) -> None:
    """What a named function calls under another name is the other's; what it calls unnamed is its own."""
    watch = Stopwatch(clock)

    def tick(seconds: float) -> None:
        clock.now += seconds

    inner = watch.wrap(lambda: tick(5), "inner")

    def outer() -> None:
        tick(1)
        inner()
        tick(2)

    watch.wrap(outer, "outer")()
    tick(100)
    assert watch.spent == {"outer": 3, "inner": 5}


def test_a_function_that_fails_is_left(clock: Clock) -> None:
    """An error ends the function that raised it."""
    watch = Stopwatch(clock)

    def fail() -> None:
        clock.now += 1
        raise ValueError("failed")

    def outer() -> None:
        with pytest.raises(ValueError, match="failed"):
            failing()
        clock.now += 10

    failing = watch.wrap(fail, "failing")
    watch.wrap(outer, "outer")()
    assert watch.spent == {"failing": 1, "outer": 10}


def test_a_generator_counts_while_it_runs(clock: Clock) -> None:
    """Only the steps of a generator are its own, not what its user does between them."""
    watch = Stopwatch(clock)

    def count() -> object:
        for number in range(3):
            clock.now += 1
            yield number

    found = []
    for number in watch.wrap(count, "count")():
        clock.now += 100
        found.append(number)
    assert found == [0, 1, 2]
    assert watch.spent == {"count": 3}


def test_functions_of_a_program_are_named_and_put_back(clock: Clock) -> None:
    """A function is timed wherever modules and tables hold it, a thread pool works under the name of who hands it work,
    and nothing is left behind."""
    watch, before, submit = Stopwatch(clock), packing.pack, ThreadPoolExecutor.submit
    from secureagg import masking, participant

    tables = dict(participant.COMPLETE)
    method = RingLane.reduce
    watch.install(
        {
            "pack": ["secureagg.packing:pack"],
            "reduce": ["secureagg.lanes:RingLane.reduce"],
            "shares": ["secureagg.participant:Participant._share_secrets"],
        }
    )
    try:
        assert packing.pack is masking.pack is not before
        assert RingLane.reduce is not method
        changed = [key for key, value in participant.COMPLETE.items() if value is not tables[key]]
        assert len(changed) == 1
        names = []

        def work(_: int) -> None:
            names.append((threading.current_thread() is threading.main_thread(), watch._names[-1]))

        with ThreadPoolExecutor(1) as pool:
            watch.wrap(lambda: list(pool.map(work, range(2))), "outer")()
        assert names == [(False, "outer")] * 2
    finally:
        watch.remove()
    assert packing.pack is masking.pack is before
    assert (RingLane.reduce, ThreadPoolExecutor.submit, participant.COMPLETE) == (method, submit, tables)


def test_threads_of_sockets_are_counted() -> None:
    """The threads that encrypt and move frames cost something once a message has gone through a socket."""
    server, secret = transport.generate_keypair()
    site, site_secret = transport.generate_keypair()
    name = transport.PeerId("site")
    with (
        transport.listen("tcp://127.0.0.1:0", secret_key=secret, peers={name: site}) as here,
        transport.connect(here.address, secret_key=site_secret, server_key=server) as there,
    ):
        before = io_seconds()
        there.send(transport.COORDINATOR, [bytes(1 << 20)])
        while here.receive(0.05) is None:
            there.receive(0.0)
        assert io_seconds() > before
