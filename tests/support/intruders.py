"""Those who want to disturb a coordinator: strangers, floods, holders of a roster key; each in threads of its own."""

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

import transport
from transport import COORDINATOR, PeerUnreachable


class Intruder:
    """Does ``act`` again and again, in ``threads`` threads, while its ``with`` block runs; ``times``: how often."""

    def __init__(self, act: Callable[[ExitStack], None], *, threads: int = 1) -> None:
        self._act = act
        self._stop = threading.Event()
        self.times = 0
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def _run(self) -> None:
        with ExitStack() as stack:
            while not self._stop.is_set():
                with suppress(OSError, PeerUnreachable):
                    self._act(stack)
                self.times += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)


def _place(address: str) -> tuple[str, int]:
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    return host, int(port)


def silent_connections(address: str, *, most: int = 200) -> Callable[[ExitStack], None]:
    """Connections that say nothing, up to so many at a time."""
    held: list[socket.socket] = []

    def act(stack: ExitStack) -> None:
        held.append(stack.enter_context(socket.create_connection(_place(address), timeout=1)))
        if len(held) > most:
            held.pop(0).close()

    return act


def half_handshakes(address: str) -> Callable[[ExitStack], None]:
    """A ZMTP greeting that announces CURVE, a HELLO full of noise, and gone."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)
    hello = b"\x04\xc8" + b"\x05HELLO" + bytes(range(194))

    def act(_stack: ExitStack) -> None:
        with socket.create_connection(_place(address), timeout=1) as one:
            one.sendall(greeting + hello)
            one.settimeout(0.2)
            with suppress(OSError):
                while one.recv(4096):
                    pass

    return act


def huge_frames(address: str) -> Callable[[ExitStack], None]:
    """A frame that announces an exabyte, and as much of it as is taken."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)

    def act(_stack: ExitStack) -> None:
        with socket.create_connection(_place(address), timeout=1) as one:
            one.sendall(greeting + b"\x02" + (1 << 60).to_bytes(8, "big"))
            one.settimeout(0.2)
            for _ in range(64):
                one.sendall(bytes(1 << 16))

    return act


def strangers(address: str, server_key: bytes) -> Callable[[ExitStack], None]:
    """Whole handshakes with keys that nobody knows."""

    def act(_stack: ExitStack) -> None:
        _, secret = transport.generate_keypair()
        with transport.connect(address, secret_key=secret, server_key=server_key) as one:
            one.send(COORDINATOR, [b"let me in"])
            for _ in range(50):
                if "does not admit" in (one.why_silent() or ""):
                    return
                one.receive(0.02)

    return act


def impostors(address: str, server_key: bytes, stolen: bytes) -> Callable[[ExitStack], None]:
    """Another program with the transport key of a site that is there."""

    def act(_stack: ExitStack) -> None:
        with transport.connect(address, secret_key=stolen, server_key=server_key) as one:
            one.send(COORDINATOR, [b"C", b"I am the site", b""])
            for _ in range(10):
                one.receive(0.02)

    return act
