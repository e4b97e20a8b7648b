"""What this machine can do at best: the cipher, copying memory, and loopback TCP with and without encryption."""

import multiprocessing
import resource
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

import transport
from benchmarks.masking import raw_cipher
from benchmarks.record import Figure
from benchmarks.turns import by_turns
from transport import COORDINATOR, PeerId

PIECE_BYTES = 1 << 20
SITE = PeerId("site")
ENCRYPTED = "loopback TCP, encrypted by the transport"
SENDS, RECEIVES = "processor time of who sends", "processor time of who receives"

Moved = tuple[float, float, float]  # seconds, and processor seconds of who sent and of who received


def _tcp_sink(total: int, pipe: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            began, left, room = time.process_time(), total, bytearray(PIECE_BYTES)
            while left:
                left -= connection.recv_into(room)
            connection.sendall(b"!")
            pipe.send(time.process_time() - began)


def tcp(total: int) -> Moved:
    """Send so many bytes to another process through a socket."""
    here, there = multiprocessing.Pipe()
    sink = _started(_tcp_sink, total, there)
    piece = memoryview(bytes(PIECE_BYTES))
    with socket.create_connection(("127.0.0.1", here.recv())) as connection:
        began, worked, left = time.perf_counter(), time.process_time(), total
        while left:
            connection.sendall(piece[: min(left, PIECE_BYTES)])
            left -= min(left, PIECE_BYTES)
        connection.recv(1)
        spent = time.perf_counter() - began, time.process_time() - worked, here.recv()
    sink.join()
    return spent


def _encrypted_sink(total: int, secret: bytes, site: bytes, pipe: Connection) -> None:
    with transport.listen("tcp://127.0.0.1:0", secret_key=secret, peers={SITE: site}) as endpoint:
        pipe.send(endpoint.address)
        endpoint.receive(60.0)
        began, left = time.process_time(), total
        while left:
            if (delivery := endpoint.receive(1.0)) is not None:
                left -= len(delivery.frames[0])
        endpoint.send(SITE, [b"!"])
        pipe.send(time.process_time() - began)
        endpoint.flush([SITE], patience=5.0)


def encrypted(total: int) -> Moved:
    """Send so many bytes to another process through the transport, as a site does."""
    server, secret = transport.generate_keypair()
    site, site_secret = transport.generate_keypair()
    here, there = multiprocessing.Pipe()
    sink = _started(_encrypted_sink, total, secret, site, there)
    piece = bytes(PIECE_BYTES)
    with transport.connect(here.recv(), secret_key=site_secret, server_key=server) as endpoint:
        endpoint.send(COORDINATOR, [b"hello"])
        while endpoint.pending(COORDINATOR):
            endpoint.receive(0.01)
        began, worked = time.perf_counter(), time.process_time()
        for start in range(0, total, PIECE_BYTES):
            endpoint.send(COORDINATOR, [piece[: total - start]])
        while endpoint.receive(1.0) is None:
            pass
        spent = time.perf_counter() - began, time.process_time() - worked, here.recv()
    sink.join()
    return spent


def _started(program: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=program, args=arguments, daemon=True)
    process.start()
    return process


def _touch(total: int, pipe: Connection) -> None:
    room = np.empty(total, np.uint8)
    began = time.process_time()
    room[:: resource.getpagesize()] = 1
    pipe.send(time.process_time() - began)


def first_touch(total: int) -> float:
    """Processor seconds in which a new process is given so much memory, page by page."""
    here, there = multiprocessing.Pipe()
    process = _started(_touch, total, there)
    seconds: float = here.recv()
    process.join()
    return seconds


def measure(total: int, repeats: int) -> list[Figure]:
    """Rates over ``total`` bytes, and processor seconds per gigabyte."""
    source, room = np.ones(total, np.uint8), np.empty(total, np.uint8)
    times = by_turns(
        repeats, {"aes": lambda: raw_cipher(total), "copy": lambda: np.copyto(room, source)}, time.process_time
    )
    gigabytes = total / 1e9
    figures = [
        Figure("limit: AES-256-CTR on one core", [gigabytes / each for each in times["aes"]], "GB/s"),
        Figure("limit: copy in memory on one core", [gigabytes / each for each in times["copy"]], "GB/s"),
        Figure("limit: first touch of memory", [first_touch(total) / gigabytes for _ in range(repeats)], "s/GB"),
    ]
    turns = [(tcp(total), encrypted(total)) for _ in range(repeats)]
    for name, which in (("loopback TCP", 0), (ENCRYPTED, 1)):
        moved = [turn[which] for turn in turns]
        figures += [
            Figure(f"limit: {name}", [gigabytes / seconds for seconds, _, _ in moved], "GB/s"),
            Figure(f"limit: {name}, {SENDS}", [sent / gigabytes for _, sent, _ in moved], "s/GB"),
            Figure(f"limit: {name}, {RECEIVES}", [taken / gigabytes for _, _, taken in moved], "s/GB"),
        ]
    return figures
