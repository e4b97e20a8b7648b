"""What every ``Endpoint`` promises, checked on the in-memory twin and on ZeroMQ alike."""

import threading
import time
from contextlib import ExitStack

import pytest
from support.pumping import arrival

import transport
from transport import (
    COORDINATOR,
    Delivery,
    FrameTooLarge,
    Limits,
    MalformedFrame,
    MemoryNetwork,
    PeerId,
    PeerUnreachable,
)

ANNA, BERT, NOBODY = PeerId("anna"), PeerId("bert"), PeerId("nobody")
MIXED = [b"header", b"", bytes(range(256)) * 5, b"\x00"]
SMALL = Limits(chunk_bytes=512, message_bytes=4000, frames=4)
PATIENCE = 5.0  # seconds; what arrives at all arrives in milliseconds


class MemoryWorld:
    """Endpoints of a MemoryNetwork."""

    def __init__(self, stack, limits):
        network = MemoryNetwork([ANNA, BERT], limits)
        self.coordinator = stack.enter_context(network.coordinator)
        self._sites = {name: stack.enter_context(network.site(name)) for name in (ANNA, BERT)}

    def site(self, name):
        """One site's endpoint."""
        return self._sites[name]


class ZmqWorld:
    """Endpoints over ZeroMQ on the loopback interface; a site connects when it is first asked for."""

    def __init__(self, stack, limits):
        self._stack, self._limits, self._sites = stack, limits, {}
        self._server_key, secret = transport.generate_keypair()
        self._keys = {name: transport.generate_keypair() for name in (ANNA, BERT)}
        peers = {name: public for name, (public, _) in self._keys.items()}
        self.coordinator = stack.enter_context(
            transport.listen("tcp://127.0.0.1:0", secret_key=secret, peers=peers, limits=limits)
        )

    def site(self, name):
        """One site's endpoint."""
        if name not in self._sites:
            site = transport.connect(
                self.coordinator.address,
                secret_key=self._keys[name][1],
                server_key=self._server_key,
                limits=self._limits,
            )
            self._sites[name] = self._stack.enter_context(site)
        return self._sites[name]


@pytest.fixture(params=[MemoryWorld, ZmqWorld], ids=["memory", "zeromq"])
def world(request):
    """Makes a coordinator and sites with the given limits; all are closed at the end, the last one first."""
    with ExitStack() as stack:
        yield lambda limits=None: request.param(stack, limits)


def introduce(one, name):
    """Let a site say hello, so that the coordinator knows the way to it; returns the site's endpoint."""
    site = one.site(name)
    site.send(COORDINATOR, [b"hello"])
    assert one.coordinator.receive(PATIENCE) == Delivery(name, (b"hello",))
    return site


def test_frames_to_the_coordinator(world):
    """A message of several frames, an empty one among them, reaches the coordinator intact with its sender's name."""
    one = world()
    for name in (ANNA, BERT):
        one.site(name).send(COORDINATOR, [*MIXED, name.encode()])
        assert one.coordinator.receive(PATIENCE) == Delivery(name, (*MIXED, name.encode()))


def test_frames_to_a_site(world):
    """A message of several frames, an empty one among them, reaches the site it is for, intact, and no other site."""
    one = world()
    anna, bert = introduce(one, ANNA), introduce(one, BERT)
    one.coordinator.send(BERT, [*MIXED, b"for bert"])
    one.coordinator.send(ANNA, [*MIXED, b"for anna"])
    assert anna.receive(PATIENCE) == Delivery(COORDINATOR, (*MIXED, b"for anna"))
    assert bert.receive(PATIENCE) == Delivery(COORDINATOR, (*MIXED, b"for bert"))
    assert anna.receive(0.05) is None
    assert bert.receive(0.0) is None


@pytest.mark.parametrize("frames", [[b""], [b"", b"", b""]])
def test_only_empty_frames(world, frames):
    """A message of nothing but empty frames arrives with all of them."""
    one = world()
    one.site(ANNA).send(COORDINATOR, frames)
    assert one.coordinator.receive(PATIENCE) == Delivery(ANNA, tuple(frames))


def test_frames_are_bytes_and_keep_their_value(world):
    """A frame given as a memoryview arrives as bytes, as it was when it was sent."""
    one = world()
    buffer = bytearray(b"as it was")
    one.site(ANNA).send(COORDINATOR, [memoryview(buffer)])
    buffer[:] = b"  altered"
    delivery = one.coordinator.receive(PATIENCE)
    assert delivery == Delivery(ANNA, (b"as it was",))
    assert type(delivery.frames[0]) is bytes


def test_a_message_in_chunks(world):
    """A message of 5 MB, several chunks, arrives intact in both directions, between small ones that keep their
    place."""
    one = world()
    large = bytes(range(251)) * 20_000
    anna = introduce(one, ANNA)
    for sender, receiver, to, name in (
        (anna, one.coordinator, COORDINATOR, ANNA),
        (one.coordinator, anna, ANNA, COORDINATOR),
    ):
        for frames in ([b"before"], [b"", large, b"tail"], [b"after"]):
            sender.send(to, frames)
        assert receiver.receive(PATIENCE) == Delivery(name, (b"before",))
        arrived = arrival(receiver, sender)
        # Not one comparison of deliveries: a failure would print 5 MB.
        assert (arrived.peer, len(arrived.frames)) == (name, 3)
        assert (arrived.frames[0], arrived.frames[2]) == (b"", b"tail")
        assert (arrived.frames[1] == large) is True
        assert arrival(receiver, sender) == Delivery(name, (b"after",))


def test_order_per_peer(world):
    """Many messages of two sites that send by turns each arrive once, each site's in the order it sent them."""
    one, count = world(SMALL), 200
    for number in range(count):
        for name in (ANNA, BERT):
            one.site(name).send(COORDINATOR, [str(number).encode(), bytes(5 * number)])
    seen = {ANNA: [], BERT: []}
    for _ in range(2 * count):
        delivery = arrival(one.coordinator, one.site(ANNA), one.site(BERT))
        seen[delivery.peer].append(delivery.frames)
    expected = [(str(number).encode(), bytes(5 * number)) for number in range(count)]
    assert seen == {ANNA: expected, BERT: expected}
    assert one.coordinator.receive(0.05) is None
    assert one.coordinator.violations == {}


def test_order_to_sites(world):
    """Many messages to two sites by turns arrive at each in the order they were sent."""
    one, count = world(SMALL), 200
    sites = {name: introduce(one, name) for name in (ANNA, BERT)}
    for number in range(count):
        for name in sites:
            one.coordinator.send(name, [name.encode(), bytes(5 * number)])
    for name, site in sites.items():
        for number in range(count):
            assert arrival(site, one.coordinator) == Delivery(COORDINATOR, (name.encode(), bytes(5 * number)))
        assert site.receive(0.05) is None


@pytest.mark.parametrize("timeout", [0.0, 0.05])
def test_nothing_there(world, timeout):
    """Without a message ``receive`` returns None, after the timeout and not long after."""
    one = world()
    site = introduce(one, ANNA)
    for endpoint in (one.coordinator, site):
        begin = time.monotonic()
        assert endpoint.receive(timeout) is None
        assert timeout * 0.9 <= time.monotonic() - begin < timeout + 1.0


def test_unknown_peer(world):
    """Sending to a name that is no peer raises PeerUnreachable naming it, and counts nothing."""
    one = world()
    site = introduce(one, ANNA)
    sent = dict(site.bytes_sent)
    for endpoint, to in ((one.coordinator, NOBODY), (one.coordinator, COORDINATOR), (site, BERT), (site, ANNA)):
        with pytest.raises(PeerUnreachable, match=to):
            endpoint.send(to, [b"x"])
    assert one.coordinator.bytes_sent == {}
    assert site.bytes_sent == sent


@pytest.mark.parametrize("frames", [[bytes(4000)], [b""] * 5], ids=["bytes", "frames"])
def test_a_message_over_the_limits(world, frames):
    """A message over the limits raises FrameTooLarge at its sender, nothing of it arrives, and the next one does."""
    one = world(SMALL)
    anna = introduce(one, ANNA)
    for sender, receiver, to, name in (
        (anna, one.coordinator, COORDINATOR, ANNA),
        (one.coordinator, anna, ANNA, COORDINATOR),
    ):
        before = dict(sender.bytes_sent)
        with pytest.raises(FrameTooLarge, match="expected at most"):
            sender.send(to, frames)
        assert sender.bytes_sent == before
        sender.send(to, [b"next"])
        assert receiver.receive(PATIENCE) == Delivery(name, (b"next",))
        assert receiver.receive(0.05) is None
        assert receiver.violations == {}


def test_a_message_of_exactly_the_limit(world):
    """The largest message that the limits allow, framing included, arrives."""
    one = world(SMALL)
    frames = (bytes(4000 - 4 - 2 * 8), b"")
    one.site(ANNA).send(COORDINATOR, frames)
    assert one.coordinator.receive(PATIENCE) == Delivery(ANNA, frames)


def test_bytes_are_counted(world):
    """What one side counts as sent the other counts as received, per peer: the bytes of the frames and the framing."""
    one = world(SMALL)
    sites = {name: introduce(one, name) for name in (ANNA, BERT)}
    for name, size in ((ANNA, 10), (BERT, 3000)):
        sites[name].send(COORDINATOR, [bytes(size), b""])
        assert one.coordinator.receive(PATIENCE).peer == name
        one.coordinator.send(name, [bytes(size + 100)])
        assert sites[name].receive(PATIENCE).peer == COORDINATOR
    assert one.coordinator.bytes_received == {name: site.bytes_sent[COORDINATOR] for name, site in sites.items()}
    assert one.coordinator.bytes_sent == {name: site.bytes_received[COORDINATOR] for name, site in sites.items()}
    hello = 24 + 4 + 8 + 5
    assert one.coordinator.bytes_received[ANNA] == hello + 24 + (4 + 2 * 8 + 10)
    chunks = -(-(4 + 2 * 8 + 3000) // SMALL.chunk_bytes)
    assert one.coordinator.bytes_received[BERT] == hello + 24 * chunks + (4 + 2 * 8 + 3000)


def test_nothing_is_counted_before_anything_happens(world):
    """A fresh endpoint has sent and received nothing and seen no violation."""
    one = world()
    for endpoint in (one.coordinator, one.site(ANNA)):
        assert (endpoint.bytes_sent, endpoint.bytes_received, endpoint.violations) == ({}, {}, {})


def test_a_standing_connection_is_not_silent(world):
    """While the connection stands there is no reason for silence."""
    one = world()
    site = introduce(one, ANNA)
    assert one.coordinator.why_silent() is None
    assert site.why_silent() is None


def test_close_twice(world):
    """Closing twice, or leaving the context after closing, is fine, whatever happened before."""
    one = world()
    site, idle = introduce(one, ANNA), one.site(BERT)
    for endpoint in (site, idle, one.coordinator):
        with endpoint as same:
            assert same is endpoint
            endpoint.close()
            endpoint.close()


def test_what_was_sent_before_closing_arrives(world):
    """A message sent over a standing connection arrives although its sender closes right after: closing waits for a
    receiver that takes it."""
    one = world()
    site = introduce(one, ANNA)
    site.send(COORDINATOR, [b"last", bytes(2_000_000)])
    closing = threading.Thread(target=site.close)
    closing.start()
    delivery = arrival(one.coordinator)
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert (delivery.peer, delivery.frames[0], len(delivery.frames[1])) == (ANNA, b"last", 2_000_000)


def test_flushing(world):
    """Once everything is confirmed nothing is pending, nobody is late, and there is nothing to discard."""
    one = world()
    site = introduce(one, ANNA)
    one.coordinator.send(ANNA, [b"one"])
    assert arrival(site, one.coordinator) == Delivery(COORDINATOR, (b"one",))
    assert one.coordinator.flush([ANNA, BERT], patience=PATIENCE) == frozenset()
    assert one.coordinator.pending(ANNA) == one.coordinator.pending(BERT) == 0
    assert one.coordinator.discard_waiting(ANNA) == one.coordinator.discard_waiting(BERT) == 0
    assert one.coordinator.bytes_sent_again == one.coordinator.rivals == {}


def test_a_delivery_does_not_print_its_frames(world):
    """The frames of a delivery, masked updates or not, stay out of its repr and so out of logs."""
    one = world()
    one.site(ANNA).send(COORDINATOR, [b"confidential"])
    delivery = one.coordinator.receive(PATIENCE)
    assert delivery.frames == (b"confidential",)
    assert "confidential" not in repr(delivery)
    assert "anna" in repr(delivery)


def test_a_message_sent_before_the_connection_stands_arrives(world):
    """A site that sends and closes at once, before it is connected, still has its message delivered."""
    one = world()
    site = one.site(ANNA)
    site.send(COORDINATOR, [b"only"])
    site.close()
    assert one.coordinator.receive(PATIENCE) == Delivery(ANNA, (b"only",))


def test_no_frames_are_no_message(world):
    """A message without a frame is refused at its sender."""
    one = world()
    site = introduce(one, ANNA)
    with pytest.raises(MalformedFrame, match="no frames"):
        site.send(COORDINATOR, [])
    assert one.coordinator.receive(0.05) is None


def test_a_closed_endpoint_says_so(world):
    """Sending and receiving after closing raise PeerUnreachable, whichever end was closed."""
    one = world()
    site = introduce(one, ANNA)
    for endpoint, peer in ((site, COORDINATOR), (one.coordinator, ANNA)):
        endpoint.close()
        with pytest.raises(PeerUnreachable, match="closed"):
            endpoint.send(peer, [b"x"])
        with pytest.raises(PeerUnreachable, match="closed"):
            endpoint.receive(0.0)


def test_small_chunks(world):
    """Chunks smaller than the handshake's own messages are no obstacle."""
    one = world(Limits(chunk_bytes=16, message_bytes=4000, frames=4))
    one.site(ANNA).send(COORDINATOR, [bytes(1000)])
    assert one.coordinator.receive(PATIENCE) == Delivery(ANNA, (bytes(1000),))
