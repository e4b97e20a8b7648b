"""What the transport does for many sites at a time: memory, speed, bad lines, and disturbers.

    python -m benchmarks transport [--sites 100] [--mebibytes 8] [--json FILE]

The coordinator is a process of its own, so that its peak memory is its own; all sites share another one, in which each
is served by turns.  Lines and disturbers are those of the tests (tests/support), over the loopback interface.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

import transport
from transport import COORDINATOR, DealerEndpoint, Limits, PeerId

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.faulty_link import Faults, FaultyLink, slow_and_lossy
from support.intruders import (
    Intruder,
    half_handshakes,
    huge_frames,
    impostors,
    silent_connections,
    strangers,
)

MESSAGE = 1 << 20


def _coordinate(pipe: Connection, secret: bytes, peers: dict[PeerId, bytes], memory_bytes: int, expected: int) -> None:
    """Take so many messages, one after the other, and tell peak memory beyond that before the first, in bytes."""
    with transport.listen(
        "tcp://127.0.0.1:0", secret_key=secret, peers=peers, limits=Limits(memory_bytes=memory_bytes)
    ) as endpoint:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send(endpoint.address)
        taken = 0
        while taken < expected:
            taken += endpoint.receive(1.0) is not None
        endpoint.receive(0.5)
        pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)


class Measurement:
    """A coordinator in a process and its sites in this one; ``seconds`` until everything has arrived, ``grown``: by how
    much the coordinator's memory grew."""

    def __init__(
        self, *, sites: int, messages: int, memory_bytes: int = 256 << 20, faults: Faults | None = None
    ) -> None:
        self._server_key, secret = transport.generate_keypair()
        self.keys = {PeerId(f"site-{number}"): transport.generate_keypair() for number in range(sites)}
        self._messages, self._faults = messages, faults
        here, there = multiprocessing.Pipe()
        peers = {name: public for name, (public, _) in self.keys.items()}
        self._process = multiprocessing.get_context("spawn").Process(
            target=_coordinate, args=(there, secret, peers, memory_bytes, sites * messages)
        )
        self._process.start()
        self._pipe = here
        self.address: str = here.recv()
        self.server_key = self._server_key
        self.seconds = 0.0
        self.again = 0
        self.grown = 0

    def run(self) -> "Measurement":
        """Let every site send its messages."""
        with ExitStack() as stack:
            address = self.address
            if self._faults is not None:
                address = stack.enter_context(FaultyLink(address, self._faults)).address
            sites: list[DealerEndpoint] = [
                stack.enter_context(transport.connect(address, secret_key=secret, server_key=self._server_key))
                for _, secret in self.keys.values()
            ]
            payload = bytes(MESSAGE)
            began = time.monotonic()
            for site in sites:
                for _ in range(self._messages):
                    site.send(COORDINATOR, [payload])
            while late := [site for site in sites if site.pending(COORDINATOR)]:
                for site in late:
                    site.receive(0.001 if len(late) < 5 else 0.0)
            self.seconds = time.monotonic() - began
            self.again = sum(site.bytes_sent_again.get(COORDINATOR, 0) for site in sites)
        self.grown = self._pipe.recv()
        self._process.join()
        return self


def memory(sites: int, messages: int) -> list[dict[str, object]]:
    """All sites at once, with more and with less room."""
    rows: list[dict[str, object]] = []
    for room in (32 << 20, 64 << 20, 256 << 20):
        done = Measurement(sites=sites, messages=messages, memory_bytes=room).run()
        rows.append(
            {
                "what": f"{sites} sites, {messages} MiB each, memory {room >> 20} MiB",
                "seconds": done.seconds,
                "MB/s": sites * messages * MESSAGE / done.seconds / 1e6,
                "coordinator grew by, MB": done.grown / 1e6,
            }
        )
    return rows


def lines() -> list[dict[str, object]]:
    """One site that uploads 4 MiB."""
    cuts = (600_000, 1_700_000, 3_100_000)
    cases = {
        "2 Mbit/s": Faults(bytes_per_second=250_000, delay=0.025),
        "2 Mbit/s, 5 % loss": slow_and_lossy(1),
        "2 Mbit/s, 5 % loss, 3 cuts": slow_and_lossy(1, cuts=cuts),
    }
    rows: list[dict[str, object]] = []
    for name, faults in cases.items():
        done = Measurement(sites=1, messages=4, faults=faults).run()
        row = {"what": f"4 MiB up at {name}", "seconds": done.seconds, "MB sent again": done.again / 1e6}
        rows.append(row)
    return rows


def disturbers() -> list[dict[str, object]]:
    """Four sites that upload 32 MiB each, while somebody disturbs; the median of three runs."""

    def seconds(kind: str) -> tuple[float, int]:
        done = Measurement(sites=4, messages=32)
        stolen = next(iter(done.keys.values()))[1]
        acts = {
            "silent connections": lambda: silent_connections(done.address),
            "broken handshakes": lambda: half_handshakes(done.address),
            "endless frames": lambda: huge_frames(done.address),
            "unknown keys": lambda: strangers(done.address, done.server_key),
            "a roster key used twice": lambda: impostors(done.address, done.server_key, stolen),
        }
        if kind not in acts:
            return done.run().seconds, 0
        with Intruder(acts[kind](), threads=2) as intruder:
            return done.run().seconds, intruder.times

    rows: list[dict[str, object]] = []
    for kind in ("nobody", "silent connections", "broken handshakes", "endless frames", "unknown keys"):
        runs = sorted(seconds(kind) for _ in range(3))
        rows.append({"what": f"4 sites, 32 MiB each, disturbed by {kind}", "seconds": runs[1][0], "times": runs[1][1]})
    return rows


def main() -> None:
    """Measure, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--mebibytes", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [*memory(options.sites, options.mebibytes), *lines(), *disturbers()]
    table = Table("what", "figures")
    for row in rows:
        shown = (
            f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        table.add_row(str(row["what"]), ", ".join(list(shown)[1:]))
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
