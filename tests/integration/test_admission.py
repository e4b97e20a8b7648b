"""Whoever is not admitted, comes twice, or floods the coordinator does not disturb a running round."""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

import pytest
from support.federation import PATIENT, Program, Together
from support.intruders import (
    Intruder,
    half_handshakes,
    huge_frames,
    impostors,
    silent_connections,
    strangers,
)

from secureagg import codec
from secureagg.messages import KeyAdvertisement
from sites import control
from sites.control import Hello
from sites.coordinator_loop import MESSAGES_PER_PHASE, TOO_MANY
from sites.participant_loop import Federation
from transport import Endpoint, PeerId


def training_under(intruder: Intruder, *, least: int) -> Program:
    """A program whose site submits only once the intruder, who comes in the first round, has acted in each round."""

    def program(federation: Federation) -> None:
        with ExitStack() as stack:
            for training_round in federation.rounds():
                if training_round.number == 1:
                    stack.enter_context(intruder)
                target, deadline = intruder.times + least, time.monotonic() + 25
                while intruder.times < target and time.monotonic() < deadline:
                    time.sleep(0.005)
                assert intruder.times >= target
                training_round.submit(training_round.global_state, examples=10)

    return program


@pytest.mark.parametrize(
    ("kind", "threads", "least"),
    [("silent", 1, 100), ("half", 4, 20), ("huge", 2, 5), ("strangers", 2, 4), ("impostors", 2, 2)],
)
def test_a_round_goes_on_under(tmp_path, kind: str, threads: int, least: int) -> None:
    """Silent connections, broken handshakes, endless frames, unknown keys, and a second machine with the key of a site
    that is there: in the middle of each round of a federation that finishes with everybody in each sum."""
    together = Together(tmp_path, rounds=2, deadlines=PATIENT)
    manifest = together.consortium.manifest
    address, server_key = manifest.coordinator.address, manifest.coordinator.card.transport_key
    act = {
        "silent": lambda: silent_connections(address),
        "half": lambda: half_handshakes(address),
        "huge": lambda: huge_frames(address),
        "strangers": lambda: strangers(address, server_key),
        "impostors": lambda: impostors(address, server_key, together.consortium.keys["b"].transport_secret),
    }[kind]()
    together.programs["a"] = training_under(Intruder(act, threads=threads), least=least)
    together.run()
    assert together.failure is None
    assert together.errors == {}
    assert ["".join(record.survivors) for record in together.records] == ["abcd"] * 3
    assert all(record.refused == record.dropped == {} for record in together.records)
    assert together.endpoint.violations == {}
    assert set(together.endpoint.rivals) == ({"b"} if kind == "impostors" else set())
    assert any("b: another machine" in text for text in together.said) == (kind == "impostors")


class Flooding:
    """An endpoint of a site that sends one message far too often."""

    def __init__(self, endpoint: Endpoint, digest: bytes) -> None:
        self._endpoint, self._digest = endpoint, digest

    def send(self, peer: PeerId, frames: Sequence[bytes]) -> None:
        """Send it, and behind an advertisement the flood."""
        self._endpoint.send(peer, frames)
        if frames[0] == control.ROUND and isinstance(codec.decode_from_site(frames[1:]), KeyAdvertisement):
            for _ in range(3 * MESSAGES_PER_PHASE):
                self._endpoint.send(peer, control.encode(Hello(manifest_digest=self._digest)))

    def __getattr__(self, name: str) -> object:
        return getattr(self._endpoint, name)


def test_a_site_that_floods(tmp_path) -> None:
    """A site of the roster that sends far more messages than a phase needs is excluded and told so; the others' rounds
    go on, without waiting for a deadline."""
    together = Together(
        tmp_path,
        rounds=2,
        deadlines=PATIENT,
        wrap={"d": lambda real, site: Flooding(real, site.manifest.digest)},
    ).run()
    assert together.failure is None
    assert f"refuses site d ({TOO_MANY})" in str(together.errors["d"])
    assert together.errors.keys() == {"d"}
    assert ["".join(record.survivors) for record in together.records] == ["abc"] * 3
    assert sum(together.records[0].seconds.values()) < PATIENT.phase_seconds


LIMITED = """
import resource
from sites.programs import allow_many_connections

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
allow_many_connections()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""


def test_many_connections_are_allowed() -> None:
    """The coordinator's program takes as many descriptors as it may have, so that silent connections use up none that
    it needs."""
    subprocess.run([sys.executable, "-c", LIMITED], check=True, timeout=100)
