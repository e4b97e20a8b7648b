"""Who is admitted, who is believed, and what a broken or hostile connection can do over ZeroMQ."""

import itertools
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest
import zmq
from support.faulty_link import Faults, FaultyLink
from support.pumping import arrival
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

import transport
from transport import COORDINATOR, AddressUnusable, Delivery, Limits, PeerId, PeerUnreachable
from transport.envelope import split
from transport.link import UNKNOWN, Frame, Kind
from transport.zeromq import LINGER_SECONDS

ANNA, BERT = PeerId("anna"), PeerId("bert")
LOOPBACK = "tcp://127.0.0.1:0"
LIMITS = Limits(chunk_bytes=1024, message_bytes=8192, frames=8)
PATIENCE = 5.0  # seconds; what happens at all happens in milliseconds
REFUSED = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Hospital:
    """Key pairs of a coordinator and of three sites, of which anna and bert are listed."""

    def __init__(self, stack):
        self._stack = stack
        self.server_key, self.server_secret = transport.generate_keypair()
        self.keys = {name: transport.generate_keypair() for name in (ANNA, BERT, "stranger")}

    def listen(self, address=LOOPBACK, limits=LIMITS):
        """The coordinator's endpoint."""
        peers = {name: self.keys[name][0] for name in (ANNA, BERT)}
        return self._stack.enter_context(
            transport.listen(address, secret_key=self.server_secret, peers=peers, limits=limits)
        )

    def connect(self, address, name, server_key=None):
        """The endpoint of a site that has the key of ``name``."""
        return self._stack.enter_context(
            transport.connect(
                address, secret_key=self.keys[name][1], server_key=server_key or self.server_key, limits=LIMITS
            )
        )

    def raw(self, address, name=None, *, routing_id=b"", kind=zmq.DEALER):
        """A plain socket to ``address``: with the key of ``name``, or without CURVE; and its monitor."""
        context = self._stack.enter_context(zmq.Context())
        raw = self._stack.enter_context(context.socket(kind))
        raw.linger = 0
        if name is not None:
            public, secret = self.keys[name]
            raw.curve_publickey, raw.curve_secretkey = z85.encode(public), z85.encode(secret)
            raw.curve_serverkey = z85.encode(self.server_key)
        if routing_id:
            raw.routing_id = routing_id
        monitor = self._stack.enter_context(raw.get_monitor_socket(REFUSED))
        monitor.linger = 0
        raw.connect(address)
        if name is not None:
            raw.send_multipart([link_frame(Kind.RESUME)])
        return raw, monitor


@pytest.fixture
def hospital():
    """Makes endpoints and plain sockets, and closes them at the end."""
    with ExitStack() as stack:
        yield Hospital(stack)


@contextmanager
def bound_but_deaf():
    """A loopback address that refuses connections, and that nobody else can take meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{holder.getsockname()[1]}"


def silence(site, expected):
    """The site's reason for silence, as soon as it says ``expected`` or when patience ends."""
    deadline = time.monotonic() + PATIENCE
    while expected not in (site.why_silent() or "") and time.monotonic() < deadline:
        assert site.receive(0.01) is None
    return site.why_silent()


def refused(monitor, coordinator):
    """Whether the connection is refused or dropped; the coordinator, who must receive nothing, goes on meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert coordinator.receive(0.01) is None
        if monitor.poll(0):
            return parse_monitor_message(monitor.recv_multipart())["event"] & REFUSED != 0
    return False


def passes(site, coordinator, name, text=b"still here"):
    """Check that a message gets through from ``site`` to the coordinator and one back."""
    site.send(COORDINATOR, [text])
    assert arrival(coordinator, site) == Delivery(name, (text,))
    coordinator.send(name, [b"re: " + text])
    assert arrival(site, coordinator) == Delivery(COORDINATOR, (b"re: " + text,))


SESSION = b"session of a raw"


def link_frame(kind, position=0):
    """The head of a frame of a plain socket."""
    return Frame(kind, SESSION, UNKNOWN, position=position).packed


def chunks(*frames, position=0):
    """A well-formed message as multipart messages of a plain socket."""
    made = []
    for header, chunk in split(frames, number=1, limits=LIMITS):
        made.append([link_frame(Kind.DATA, position), header, bytes(chunk)])
        position += len(chunk)
    return made


def answered(raw):
    """What a plain socket gets next that carries a message, as the bytes of its chunk."""
    while raw.poll(PATIENCE * 1000):
        parts = raw.recv_multipart()
        if parts[0][0] == Kind.DATA:
            return parts[2]
    return None


def test_keys():
    """A key pair is fresh each time, 32 bytes each, and the public key follows from the secret one."""
    (public, secret), (other, _) = transport.generate_keypair(), transport.generate_keypair()
    assert len(public) == len(secret) == 32
    assert transport.public_key(secret) == public
    assert len({public, secret, other}) == 3


def test_a_stranger_is_not_admitted(hospital):
    """Nothing of a site whose key is not listed arrives, the site says why, and cannot send any more."""
    coordinator = hospital.listen()
    stranger = hospital.connect(coordinator.address, "stranger")
    stranger.send(COORDINATOR, [b"let me in"])
    reason = silence(stranger, "does not admit")
    assert reason == f"{coordinator.address}: the coordinator does not admit this site's transport key"
    assert coordinator.receive(0.05) is None
    assert (coordinator.bytes_received, coordinator.violations) == ({}, {})
    with pytest.raises(PeerUnreachable, match="does not admit"):
        stranger.send(COORDINATOR, [b"let me in"])
    passes(hospital.connect(coordinator.address, ANNA), coordinator, ANNA)


def test_refused_before_a_word_is_said(hospital, monkeypatch):
    """A site that is refused before it has sent anything, as happens on a busy machine, says why, too."""
    coordinator = hospital.listen()
    connect = zmq.Socket.connect

    def slowly(socket, address):
        connect(socket, address)
        deadline = time.monotonic() + PATIENCE
        while address == coordinator.address and socket.poll(1, zmq.POLLOUT):  # until libzmq has taken the pipe away
            assert time.monotonic() < deadline

    monkeypatch.setattr(zmq.Socket, "connect", slowly)
    assert "does not admit" in silence(hospital.connect(coordinator.address, "stranger"), "does not admit")


def test_wrong_server_key(hospital):
    """A site that expects another coordinator's key sends nothing to this one, says why, and closes quickly."""
    coordinator = hospital.listen()
    site = hospital.connect(coordinator.address, ANNA, server_key=hospital.keys["stranger"][0])
    site.send(COORDINATOR, [b"for another"])
    reason = silence(site, "handshake fails")
    assert reason.startswith(f"{coordinator.address}: the handshake fails: the coordinator has another transport key")
    assert coordinator.receive(0.05) is None
    assert coordinator.bytes_received == {}
    begin = time.monotonic()
    site.close()
    assert time.monotonic() - begin < 1.0


def test_lines_that_break_in_the_handshake(hospital):
    """They cost time only: what was sent before and after such a failure arrives once the line holds."""
    coordinator = hospital.listen()
    with FaultyLink(coordinator.address, Faults(cuts=(100, 200))) as line:
        site = hospital.connect(line.address, ANNA)
        site.send(COORDINATOR, [b"before"])
        assert "handshake fails" in silence(site, "handshake fails")
        site.send(COORDINATOR, [b"after"])
        for expected in (b"before", b"after"):
            assert arrival(coordinator, site) == Delivery(ANNA, (expected,))
        assert line.connections == 3


def test_the_name_comes_from_the_key(hospital):
    """Two sites that swap keys swap names, whatever they write, and answers go to the key's holder."""
    coordinator = hospital.listen()
    sites = {"anna": hospital.connect(coordinator.address, BERT), "bert": hospital.connect(coordinator.address, ANNA)}
    for claims, key_of in (("anna", BERT), ("bert", ANNA)):
        sites[claims].send(COORDINATOR, [f"I am {claims}".encode()])
        assert coordinator.receive(PATIENCE) == Delivery(key_of, (f"I am {claims}".encode(),))
    coordinator.send(ANNA, [b"to anna's key"])
    assert sites["bert"].receive(PATIENCE) == Delivery(COORDINATOR, (b"to anna's key",))
    assert sites["anna"].receive(0.05) is None


@pytest.mark.parametrize("routing_id", [b"bert", b"coordinator"])
def test_a_chosen_routing_id_gives_no_other_name(hospital, routing_id):
    """A listed site that picks another's name as its ZeroMQ routing id still appears under its own name."""
    coordinator = hospital.listen()
    raw, _ = hospital.raw(coordinator.address, ANNA, routing_id=routing_id)
    raw.send_multipart(chunks(b"I am bert")[0])
    assert coordinator.receive(PATIENCE) == Delivery(ANNA, (b"I am bert",))
    with pytest.raises(PeerUnreachable, match=BERT):
        coordinator.send(BERT, [b"secret"])


def test_a_taken_routing_id_does_not_redirect(hospital):
    """A site that takes the routing id of another one's connection receives nothing that is meant for that one."""
    coordinator = hospital.listen()
    first, _ = hospital.raw(coordinator.address, BERT, routing_id=b"same")
    first.send_multipart(chunks(b"I am here")[0])
    assert coordinator.receive(PATIENCE) == Delivery(BERT, (b"I am here",))
    thief, _ = hospital.raw(coordinator.address, ANNA, routing_id=b"same")
    thief.send_multipart(chunks(b"I am bert")[0])
    assert coordinator.receive(0.2) in (None, Delivery(ANNA, (b"I am bert",)))
    coordinator.send(BERT, [b"for bert"])
    assert answered(first).endswith(b"for bert")
    while thief.poll(50):
        assert b"for bert" not in b"".join(thief.recv_multipart())


@pytest.mark.parametrize("kind", [zmq.DEALER, zmq.REQ], ids=["dealer", "req"])
def test_without_curve(hospital, kind):
    """A plain socket without CURVE gets nothing through, and listed sites are not disturbed."""
    coordinator = hospital.listen()
    raw, monitor = hospital.raw(coordinator.address, kind=kind)
    with suppress(zmq.Again):  # it may be refused already, and has nowhere to queue then
        raw.send_multipart(chunks(b"in the clear")[0], zmq.DONTWAIT)
    assert refused(monitor, coordinator)
    assert (coordinator.bytes_received, coordinator.violations) == ({}, {})
    passes(hospital.connect(coordinator.address, ANNA), coordinator, ANNA)


def test_bytes_that_are_not_zeromq(hospital):
    """A connection that speaks another protocol is dropped, and listed sites are not disturbed."""
    coordinator = hospital.listen()
    host, port = coordinator.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"\xff" * 4096)
        passes(hospital.connect(coordinator.address, ANNA), coordinator, ANNA)
    assert coordinator.bytes_received.keys() == {ANNA}


def test_port_in_use(hospital):
    """Listening at a port in use raises AddressUnusable naming the address, and leaves its owner alone."""
    coordinator = hospital.listen()
    with pytest.raises(AddressUnusable, match=re.escape(coordinator.address) + ": Address already in use"):
        hospital.listen(coordinator.address)
    passes(hospital.connect(coordinator.address, ANNA), coordinator, ANNA)


@pytest.mark.parametrize(
    "address", ["", "nowhere", "tcp://127.0.0.1", "tcp://127.0.0.1:port", "udp://127.0.0.1:9", "tcp://127.0.0.1:65536"]
)
def test_not_an_address(hospital, address):
    """What is no address can be neither listened at nor connected to; the error names it, quickly."""
    begin = time.monotonic()
    with pytest.raises(AddressUnusable, match=f"^address {re.escape(address)}: .*; expected"):
        hospital.listen(address)
    with pytest.raises(AddressUnusable, match=f"^address {re.escape(address)}: .*; expected tcp://host:port"):
        hospital.connect(address, ANNA)
    assert time.monotonic() - begin < 1.0


def test_not_this_machines_address(hospital):
    """Listening at another machine's address raises AddressUnusable naming it."""
    with pytest.raises(AddressUnusable, match=re.escape("tcp://192.0.2.1:0")):  # TEST-NET-1 of RFC 5737
        hospital.listen("tcp://192.0.2.1:0")


def test_the_real_address(hospital):
    """With port 0 the endpoint says which port it got."""
    first, second = hospital.listen(), hospital.listen()
    assert re.fullmatch(r"tcp://127\.0\.0\.1:[1-9]\d*", first.address)
    assert first.address != second.address


def test_nothing_listens(hospital):
    """Where nothing listens a site connects without an error, says that nothing answers, and closes quickly although
    a message waits."""
    with bound_but_deaf() as address:
        site = hospital.connect(address, ANNA)
        assert site.why_silent().startswith(f"{address}: ")
        site.send(COORDINATOR, [b"anybody there?"])
        assert silence(site, "nothing answers") == f"{address}: nothing answers there"
        begin = time.monotonic()
        site.close()
        assert time.monotonic() - begin < 1.0


def test_a_coordinator_that_comes_later(hospital):
    """A site may connect and send before the coordinator listens; it gets through when that one is there."""
    early = hospital.listen()
    address = early.address
    early.close()
    site = hospital.connect(address, ANNA)
    site.send(COORDINATOR, [b"early"])
    assert "nothing answers" in silence(site, "nothing answers")
    coordinator = hospital.listen(address)
    assert arrival(coordinator, site) == Delivery(ANNA, (b"early",))
    assert coordinator.receive(0.0) is None
    assert site.receive(0.05) is None
    assert site.why_silent() is None


def test_a_listed_site_that_has_not_connected(hospital):
    """Sending to a listed site before it has sent anything raises PeerUnreachable naming it."""
    coordinator = hospital.listen()
    with pytest.raises(PeerUnreachable, match="anna: has not connected"):
        coordinator.send(ANNA, [b"x"])


def test_a_site_that_left(hospital):
    """Sending to a site that has closed its connection soon raises PeerUnreachable, and other sites are reached."""
    coordinator = hospital.listen()
    anna, bert = (hospital.connect(coordinator.address, name) for name in (ANNA, BERT))
    passes(anna, coordinator, ANNA)
    passes(bert, coordinator, BERT)
    anna.close()

    def send_until_it_fails():
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            coordinator.send(ANNA, [b"x"])
            assert coordinator.receive(0.01) is None

    with pytest.raises(PeerUnreachable, match=ANNA):
        send_until_it_fails()
    passes(bert, coordinator, BERT)


DATA = link_frame(Kind.DATA)
GARBAGE = {
    "empty": [b""],
    "one-frame": [b"garbage"],
    "no-chunk": [DATA],
    "four-frames": [*chunks(b"good")[0], b"and more"],
    "many-frames": [b"x"] * 500,
    "delimiter-first": [b"", *chunks(b"good")[0]],
    "short-frame": [DATA[:-1], *chunks(b"good")[0][1:]],
    "unknown-kind": [b"\0" + DATA[1:]],
    "another-unknown-kind": [b"\x07" + DATA[1:]],
    "news-with-a-chunk": [link_frame(Kind.NEWS), *chunks(b"good")[0][1:]],
    "another-epoch": [Frame(Kind.NEWS, SESSION, b"e" * 16).packed],
    "confirms-what-was-not-sent": [Frame(Kind.NEWS, SESSION, UNKNOWN, received=1 << 40).packed],
    "delivered-before-received": [Frame(Kind.NEWS, SESSION, UNKNOWN, delivered=1).packed],
    "rewinds-to-what-was-not-sent": [Frame(Kind.REWIND, SESSION, UNKNOWN, received=1 << 40).packed],
    "no-header": [DATA, b"", b"chunk"],
    "short-header": [DATA, b"\xff" * 23, b"chunk"],
    "random-header": [DATA, b"\xff" * 24, b"chunk"],
    "empty-chunk": [DATA, struct.pack("<QQQ", 1, 0, 12), b""],
    "middle-of-a-message": [DATA, struct.pack("<QQQ", 1, 100, 1000), b"chunk"],
    "too-long-a-message": [DATA, struct.pack("<QQQ", 1, 0, LIMITS.message_bytes + 1), b"chunk"],
    "more-than-announced": [DATA, struct.pack("<QQQ", 1, 0, 4), b"chunk"],
    "no-frames-inside": [DATA, struct.pack("<QQQ", 1, 0, 4), struct.pack("<I", 0)],
    "too-many-frames-inside": [DATA, struct.pack("<QQQ", 1, 0, 76), struct.pack("<I", 9) + bytes(72)],
    "chunk-over-the-limit": [DATA, struct.pack("<QQQ", 1, 0, 2000), bytes(LIMITS.chunk_bytes + 1)],
}


@pytest.mark.parametrize("parts", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_of_a_listed_site(hospital, parts):
    """Garbage of a listed site is counted against that site alone; another site and, later, it itself get through."""
    coordinator, times = hospital.listen(), 3
    raw, _ = hospital.raw(coordinator.address, ANNA)
    for _ in range(times):
        raw.send_multipart(parts)
    deadline = time.monotonic() + PATIENCE
    while coordinator.violations.get(ANNA, 0) < times and time.monotonic() < deadline:
        assert coordinator.receive(0.01) is None
    assert coordinator.violations == {ANNA: times}
    assert coordinator.bytes_received == {}
    passes(hospital.connect(coordinator.address, BERT), coordinator, BERT)
    raw.send_multipart(chunks(b"sorry")[0])
    assert coordinator.receive(PATIENCE) == Delivery(ANNA, (b"sorry",))
    assert coordinator.violations == {ANNA: times}


def test_an_oversize_frame_of_a_listed_site(hospital):
    """A frame far over the chunk limit costs the listed site its connection, is not read, and disturbs nobody."""
    coordinator = hospital.listen()
    bert = hospital.connect(coordinator.address, BERT)
    passes(bert, coordinator, BERT)
    raw, monitor = hospital.raw(coordinator.address, ANNA)
    raw.send_multipart([DATA, struct.pack("<QQQ", 1, 0, 2000), bytes(1_000_000)])
    assert refused(monitor, coordinator)
    assert ANNA not in coordinator.bytes_received
    passes(bert, coordinator, BERT)


def test_an_unfinished_message_does_not_hold_up_others(hospital):
    """A site that never finishes its message keeps no other site from getting through."""
    coordinator = hospital.listen()
    raw, _ = hospital.raw(coordinator.address, ANNA)
    first, *rest = chunks(bytes(3000))
    raw.send_multipart(first)
    passes(hospital.connect(coordinator.address, BERT), coordinator, BERT)
    assert coordinator.receive(0.05) is None
    for chunk in rest:
        raw.send_multipart(chunk)
    assert coordinator.receive(PATIENCE) == Delivery(ANNA, (bytes(3000),))
    assert coordinator.violations == {}


def test_chunks_of_two_sites_do_not_mix(hospital):
    """Chunks of two sites that arrive by turns, with the same message number, make up each site's own message."""
    coordinator = hospital.listen()
    raws = {name: hospital.raw(coordinator.address, name)[0] for name in (ANNA, BERT)}
    for index in range(3):
        for name, raw in raws.items():
            raw.send_multipart(chunks(name[0].encode() * 3000)[index])
    got = [coordinator.receive(PATIENCE) for _ in raws]
    assert sorted(got, key=lambda delivery: delivery.peer) == [
        Delivery(ANNA, (b"a" * 3000,)),
        Delivery(BERT, (b"b" * 3000,)),
    ]


def test_a_reconnecting_site_begins_again(hospital):
    """A site that broke off in the middle of a message and comes back with a new connection gets through."""
    coordinator = hospital.listen()
    raw, _ = hospital.raw(coordinator.address, ANNA)
    raw.send_multipart(chunks(bytes(3000))[0])
    deadline = time.monotonic() + PATIENCE
    while ANNA not in coordinator.bytes_received and time.monotonic() < deadline:
        assert coordinator.receive(0.01) is None
    raw.close()
    passes(hospital.connect(coordinator.address, ANNA), coordinator, ANNA)
    assert coordinator.violations == {}


def test_reconnect(hospital):
    """A coordinator that closes and listens again at the same port is reached again by the same endpoint."""
    coordinator = hospital.listen()
    site = hospital.connect(coordinator.address, ANNA)
    passes(site, coordinator, ANNA)
    coordinator.close()
    assert silence(site, coordinator.address)
    again = hospital.listen(coordinator.address)
    passes(site, again, ANNA, b"after the restart")
    assert site.why_silent() is None


def test_a_restart_with_another_key(hospital):
    """After a restart with another key at the same port the site sends nothing there and says why."""
    coordinator = hospital.listen()
    site = hospital.connect(coordinator.address, ANNA)
    passes(site, coordinator, ANNA)
    coordinator.close()
    _, hospital.server_secret = transport.generate_keypair()
    impostor = hospital.listen(coordinator.address)
    assert "handshake fails" in silence(site, "handshake fails")
    assert impostor.receive(0.05) is None
    assert impostor.bytes_received == {}


def test_close_while_the_coordinator_is_gone(hospital):
    """A site closes quickly, with a message waiting, after its coordinator has gone."""
    coordinator = hospital.listen()
    site = hospital.connect(coordinator.address, ANNA)
    passes(site, coordinator, ANNA)
    coordinator.close()
    assert silence(site, coordinator.address)
    site.send(COORDINATOR, [b"too late"])
    begin = time.monotonic()
    site.close()
    assert time.monotonic() - begin < 1.0


def test_no_socket_lingers_for_ever(hospital):
    """From its first moment a socket gives up what it cannot deliver: the setting at its closing comes too late for
    connections that ended before, and closing would wait for them without end."""
    coordinator = hospital.listen()
    site = hospital.connect(coordinator.address, ANNA)
    assert coordinator._socket.linger == site._socket.linger == 1000 * LINGER_SECONDS
    passes(site, coordinator, ANNA)
    site._give_up()
    passes(site, coordinator, ANNA)
    assert site._socket.linger == 1000 * LINGER_SECONDS


def test_secret_keys_do_not_appear_in_repr(hospital):
    """Neither the repr of an endpoint nor the text of an error shows a secret key, in any of its spellings."""
    coordinator = hospital.listen()
    site = hospital.connect(coordinator.address, ANNA)
    with pytest.raises(AddressUnusable) as busy:
        hospital.listen(coordinator.address)
    with pytest.raises(AddressUnusable) as bad:
        hospital.connect("nowhere", ANNA)
    with pytest.raises(PeerUnreachable) as unknown:
        coordinator.send(ANNA, [b"x"])
    texts = [text(shown) for text in (repr, str) for shown in (coordinator, site, busy.value, bad.value, unknown.value)]
    secrets = (hospital.server_secret, hospital.keys[ANNA][1])
    for secret, text in itertools.product(secrets, texts):
        for spelling in (secret.hex(), z85.encode(secret).decode(), repr(secret)[2:-1]):
            assert spelling not in text


def test_memory_of_many_uploads(hospital):
    """While many sites upload more than there is room for, what is under way and not handed on never exceeds the
    configured memory; all of it arrives."""
    names = [PeerId(f"site-{number}") for number in range(12)]
    hospital.keys = {name: transport.generate_keypair() for name in (*names, ANNA, BERT)}
    limits = Limits(chunk_bytes=64 << 10, message_bytes=1 << 20, memory_bytes=6 << 20)
    peers = {name: hospital.keys[name][0] for name in names}
    with ExitStack() as stack:
        coordinator = stack.enter_context(
            transport.listen(LOOPBACK, secret_key=hospital.server_secret, peers=peers, limits=limits)
        )
        sites = {
            name: stack.enter_context(
                transport.connect(
                    coordinator.address,
                    secret_key=hospital.keys[name][1],
                    server_key=hospital.server_key,
                    limits=limits,
                )
            )
            for name in names
        }
        size, count = 600_000, 5
        for site in sites.values():
            for number in range(count):
                site.send(COORDINATOR, [bytes([number]) * size])
        got = {name: [] for name in names}
        most, deadline = 0, time.monotonic() + 60
        while sum(map(len, got.values())) < count * len(names) and time.monotonic() < deadline:
            for site in sites.values():
                assert site.receive(0.0) is None
            # A coordinator that takes one frame for each that every site sends has all the rest under way.
            if (delivery := coordinator.receive(0.0)) is not None:
                got[delivery.peer].append(delivery.frames[0][:1] * (len(delivery.frames[0]) == size))
            handed_on = {name: route.link._delivered for name, route in coordinator._routes.items()}
            most = max(most, sum(site._link._cursor - handed_on.get(name, 0) for name, site in sites.items()))
        assert got == {name: [bytes([number]) for number in range(count)] for name in names}
        assert len(names) * 64 << 10 < most <= limits.memory_bytes // 2
        assert coordinator.violations == {}


def test_a_coordinator_that_is_busy(hospital):
    """Whoever sends to a coordinator that takes nothing stops after the initial credit; nothing is lost."""
    coordinator = hospital.listen(limits=Limits())
    site = hospital._stack.enter_context(
        transport.connect(
            coordinator.address, secret_key=hospital.keys[ANNA][1], server_key=hospital.server_key, limits=Limits()
        )
    )
    for number in range(20):
        site.send(COORDINATOR, [bytes([number]) * 30_000])
    for _ in range(20):
        assert site.receive(0.01) is None
    assert site.bytes_sent[COORDINATOR] <= 64 << 10
    assert site.pending(COORDINATOR) == 20
    assert [arrival(coordinator, site).frames[0][0] for _ in range(20)] == list(range(20))
    assert site.receive(0.2) is None
    assert site.pending(COORDINATOR) == 0


def test_a_second_machine_with_the_same_key(hospital):
    """While a site is there, another program with its key gets nothing through and nothing to read, and says why; once
    the first has gone, it is taken."""
    coordinator = hospital.listen()
    first = hospital.connect(coordinator.address, ANNA)
    passes(first, coordinator, ANNA)
    second = hospital.connect(coordinator.address, ANNA)
    second.send(COORDINATOR, [b"me too"])
    deadline = time.monotonic() + PATIENCE
    while "another machine" not in (second.why_silent() or "") and time.monotonic() < deadline:
        assert coordinator.receive(0.01) is None
        assert second.receive(0.01) is None
        assert first.receive(0.0) is None
    assert second.why_silent().endswith("another machine is connected with this site's transport key")
    assert coordinator.rivals[ANNA] >= 1
    passes(first, coordinator, ANNA, b"undisturbed")
    coordinator.send(ANNA, [b"for the first"])
    assert arrival(first, coordinator, second) == Delivery(COORDINATOR, (b"for the first",))
    closing = threading.Thread(target=first.close)
    closing.start()
    assert arrival(coordinator, second) == Delivery(ANNA, (b"me too",))
    closing.join(PATIENCE)
    passes(second, coordinator, ANNA, b"alone now")


def test_a_crashed_program_is_followed_by_the_next(hospital):
    """A site whose program ended without a word is there again with a new one, at once."""
    coordinator = hospital.listen()
    first = hospital.connect(coordinator.address, ANNA)
    passes(first, coordinator, ANNA)
    first._close_socket(linger=0)  # as the system does for a process that is killed
    passes(hospital.connect(coordinator.address, ANNA), coordinator, ANNA, b"begun anew")


def test_a_site_that_is_gone_for_long(hospital, monkeypatch):
    """Messages for a site whose connection broke wait for it, but not for ever: then sending says so."""
    coordinator = hospital.listen()
    site = hospital.connect(coordinator.address, ANNA)
    passes(site, coordinator, ANNA)
    site._close_socket(linger=0)
    site._due = time.monotonic() + 3600
    deadline = time.monotonic() + PATIENCE
    while coordinator._routes[ANNA].gone_since is None and time.monotonic() < deadline:
        coordinator.send(ANNA, [b"wait for me"])
        assert coordinator.receive(0.01) is None
    monkeypatch.setattr("transport.zeromq.GRACE_SECONDS", -1.0)
    with pytest.raises(PeerUnreachable, match="anna: its connection is gone for"):
        coordinator.send(ANNA, [b"too late"])
    monkeypatch.undo()
    site._due = 0.0
    site._link.detach()
    assert arrival(site, coordinator) == Delivery(COORDINATOR, (b"wait for me",))


def test_a_stalled_upload_gives_way(hospital, monkeypatch):
    """A site that holds all credit and sends nothing loses it to the one that waits, and sends its message later."""
    monkeypatch.setattr("transport.zeromq.STALL_SECONDS", 0.5)
    limits = Limits(chunk_bytes=64 << 10, message_bytes=1 << 20, memory_bytes=(2 << 20) + (4 * 64 << 10))
    coordinator = hospital.listen(limits=limits)
    sites = {
        name: hospital._stack.enter_context(
            transport.connect(
                coordinator.address, secret_key=hospital.keys[name][1], server_key=hospital.server_key, limits=limits
            )
        )
        for name in (ANNA, BERT)
    }
    anna, bert = sites.values()
    anna.send(COORDINATOR, [bytes(900_000)])
    deadline = time.monotonic() + PATIENCE
    while not any(route.link.holds_credit for route in coordinator._routes.values()) and time.monotonic() < deadline:
        assert anna.receive(0.0) is None  # which so never learns of the credit that it is given last
        assert coordinator.receive(0.0) is None
    bert.send(COORDINATOR, [bytes(950_000)])
    assert arrival(coordinator, bert).peer == BERT
    assert arrival(coordinator, anna, bert).peer == ANNA


def test_garbage_of_the_coordinator(hospital):
    """Whatever a coordinator sends that is no frame, of another session, or out of place, is counted and dropped; an
    honest answer behind it is still taken."""
    context = hospital._stack.enter_context(zmq.Context())
    raw = hospital._stack.enter_context(context.socket(zmq.ROUTER))
    raw.linger, raw.curve_server, raw.curve_secretkey = 0, True, z85.encode(hospital.server_secret)
    port = raw.bind_to_random_port("tcp://127.0.0.1")
    site = hospital.connect(f"tcp://127.0.0.1:{port}", ANNA)
    assert site.receive(0.05) is None
    route, resume = raw.recv_multipart()
    session, epoch, other = Frame(*struct.unpack("<B16s16s6Q", resume)).session, b"e" * 16, b"o" * 16

    def data(session, epoch):
        return [Frame(Kind.DATA, session, epoch).packed, *chunks(b"from the coordinator")[0][1:]]

    early = [[b""], [b"x"] * 50, [Frame(Kind.REWIND, other, epoch).packed], data(session, epoch)]
    for parts in early:
        raw.send_multipart([route, *parts])
    raw.send_multipart([route, Frame(Kind.REWIND, session, epoch).packed])
    late = [data(session, other), data(other, epoch), [Frame(Kind.NEWS, session, epoch, received=1 << 40).packed]]
    for parts in late:
        raw.send_multipart([route, *parts])
    raw.send_multipart([route, *data(session, epoch)])
    assert arrival(site) == Delivery(COORDINATOR, (b"from the coordinator",))
    assert site.violations == {COORDINATOR: len(early) + len(late)}


def test_late_frames_of_an_old_connection(hospital):
    """What still comes over a connection after the same program has opened another one is not taken twice."""
    coordinator = hospital.listen()
    old, _ = hospital.raw(coordinator.address, ANNA)
    assert coordinator.receive(0.2) is None
    new, _ = hospital.raw(coordinator.address, ANNA)
    assert coordinator.receive(0.2) is None
    old.send_multipart(chunks(b"old")[0])
    assert coordinator.receive(0.2) is None
    new.send_multipart(chunks(b"new")[0])
    assert coordinator.receive(PATIENCE) == Delivery(ANNA, (b"new",))
    assert coordinator.violations == {}


FULL_AND_GONE = """
import time, zmq, transport, transport.zeromq
from zmq.utils import z85
from transport.link import Frame, Kind, UNKNOWN

transport.zeromq.HEARTBEAT_MILLISECONDS = 200
server_key, secret = transport.generate_keypair()
public, own = transport.generate_keypair()


def fill(raw, parts):
    for _ in range(200):
        raw.send_multipart(parts)
    time.sleep(0.3)
    raw.close(linger=0)
    time.sleep(0.8)


with transport.listen("tcp://127.0.0.1:0", secret_key=secret, peers={"a": public}) as coordinator:
    with zmq.Context() as context:
        raw = context.socket(zmq.DEALER)
        raw.curve_publickey, raw.curve_secretkey = z85.encode(public), z85.encode(own)
        raw.curve_serverkey = z85.encode(server_key)
        raw.connect(coordinator.address)
        fill(raw, [b"x" * 2000])
    while coordinator.receive(0.0) or coordinator.violations.get("a", 0) < 1:
        pass
with zmq.Context() as context:
    raw = context.socket(zmq.ROUTER)
    raw.curve_server, raw.curve_secretkey = True, z85.encode(secret)
    port = raw.bind_to_random_port("tcp://127.0.0.1")
    with transport.connect(f"tcp://127.0.0.1:{port}", secret_key=own, server_key=server_key) as site:
        fill(raw, [raw.recv_multipart()[0], b"x" * 2000])
        site.receive(0.1)
print("alive")
"""


def test_a_full_queue_and_a_broken_connection():
    """Neither end's process is aborted by libzmq when a peer fills its queue and goes while it is busy elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_AND_GONE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("alive\n", "")


def test_nothing_is_sent_twice_over_a_first_connection(hospital):
    """What leaves before the coordinator has answered for the first time is on its way, and is not sent again."""
    coordinator = hospital.listen(limits=Limits())
    site = hospital._stack.enter_context(
        transport.connect(
            coordinator.address, secret_key=hospital.keys[ANNA][1], server_key=hospital.server_key, limits=Limits()
        )
    )
    site.send(COORDINATOR, [bytes(30_000)])
    assert arrival(coordinator, site).peer == ANNA
    passes(site, coordinator, ANNA)
    assert site.pending(COORDINATOR) == 0
    assert site.bytes_sent_again == {}
