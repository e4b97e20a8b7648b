"""Federations on the homomorphic backend over real sockets: the sites open the sums, and hold the model if nobody else
may."""

import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.federation import QUICK, Together, expected_model, moving

from secureagg import codec
from secureagg.messages import (
    AggregateReport,
    AggregateSignature,
    KeyRelease,
    RoundReceipt,
    ToCoordinator,
    UnmaskShares,
)
from sites import control
from sites.control import ModelCopy
from sites.coordinator_loop import RoundRecord
from sites.evaluation import evaluate_scores
from sites.recipe import ENCODING, HOMOMORPHIC, TRAINING
from transport import Delivery, Endpoint, PeerId

pytest.importorskip("tenseal", reason="the extra `homomorphic` is not installed")

STEP = ENCODING.value_range / (2**15 - 1)
TO_ALL = msgspec.structs.replace(HOMOMORPHIC, release_to="coordinator")


def assert_model(together: Together, survivors: Sequence[str], *, at: str = "abcd") -> None:
    """The final model of these sites stands where rounds with these survivors lead, the same at each."""
    states = [together.final[name] for name in at]
    for state in states:
        for key, tensor in state.items():
            np.testing.assert_allclose(tensor.numpy(), expected_model(survivors), atol=STEP * len(survivors) + 1e-6)
            assert torch.equal(tensor, states[0][key])


@pytest.mark.parametrize("policy", [HOMOMORPHIC, TO_ALL], ids=["sites", "coordinator"])
def test_everybody_finishes(tmp_path: Path, policy: msgspec.Struct) -> None:
    """Four sites end with the model that the weighted means lead to.  The coordinator has it, and the metrics, only
    where the sites release them; otherwise every site has both, and no file of the coordinator's holds the model."""
    random = np.random.default_rng(5)
    held_out = {name: (random.random(40), random.integers(0, 2, 40)) for name in "abcd"}
    evaluate = {name: lambda _, n=name: held_out[n] for name in "abcd"}
    together = Together(tmp_path, rounds=3, evaluate=evaluate, policy=policy).run()
    assert together.failure is None
    assert together.errors == {}
    assert_model(together, ["abcd"] * 3)
    scores, labels = (np.concatenate(parts) for parts in zip(*held_out.values(), strict=True))
    expected = evaluate_scores(scores, labels, together.consortium.manifest.evaluation.histogram_bins)
    released = policy is TO_ALL
    assert [record.metrics for record in together.records] == [expected if released else None] * 4
    assert [record.examples for record in together.records] == ([100, 100, 100, None] if released else [None] * 4)
    for history in together.history.values():
        assert [(entry.result, entry.survivors, entry.metrics) for entry in history] == [("finished", 4, expected)] * 4
    kept = tmp_path / "state" / "model.safetensors"
    assert kept.exists() == released


@pytest.mark.parametrize(
    ("message", "phase"),
    [
        pytest.param(UnmaskShares, "Unmasking", marks=pytest.mark.slow),
        (AggregateSignature, "Decrypting"),
        (AggregateReport, "Opening"),
        (KeyRelease, "Opening"),
    ],
)
def test_a_machine_fails(tmp_path: Path, message: type[ToCoordinator], phase: str) -> None:
    """A site that falls silent while the sum is opened is in it, and ends no round: the others open it."""
    policy = TO_ALL if message is KeyRelease else HOMOMORPHIC
    together = Together(tmp_path, rounds=2, fails={"d": (message, 1)}, policy=policy).run()
    assert together.failure is None
    assert together.errors.keys() <= {"d"}
    assert [record.dropped for record in together.records] == [{"d": phase}, {}, {}]
    assert_model(together, ["abcd", "abc"], at="abc")


def test_a_site_that_comes_late_gets_the_model_from_another(tmp_path: Path) -> None:
    """A site that starts after rounds were summed is given the model by one of the others, with what the server
    optimizer remembers, and ends with the same one."""
    started = threading.Event()

    def report(record: RoundRecord) -> None:
        if record.number == 2:
            started.set()

    training = msgspec.structs.replace(TRAINING, rounds=60, server_optimizer="momentum", server_learning_rate=0.1)
    together = Together(
        tmp_path,
        late={"d": started},
        report=report,
        policy=HOMOMORPHIC,
        training=training,
        deadlines=msgspec.structs.replace(QUICK, join_seconds=1.0),
    ).run()
    assert together.failure is None
    assert together.errors == {}
    survivors = ["".join(record.survivors) for record in together.records]
    assert survivors[:2] == ["abc", "abc"]
    assert survivors[-1] == "abcd"
    assert "d has the model from a" in together.said
    states = [together.final[name] for name in "abcd"]
    assert all(torch.equal(state[key], states[0][key]) for state in states for key in state)


class Losing:
    """An endpoint on whose way to the site one message is lost: the first that ``lost`` is true of."""

    def __init__(self, endpoint: Endpoint, lost: type) -> None:
        self._endpoint, self._lost, self.done = endpoint, lost, False

    def receive(self, timeout: float) -> Delivery | None:
        """What arrives, but for what is lost."""
        delivery = self._endpoint.receive(timeout)
        if delivery is None or self.done or delivery.frames[0] != control.ROUND:
            return delivery
        self.done = isinstance(codec.decode_from_coordinator(delivery.frames[1:]), self._lost)
        return None if self.done else delivery

    def __getattr__(self, name: str) -> object:
        return getattr(self._endpoint, name)


def test_a_site_that_misses_one_receipt(tmp_path: Path) -> None:
    """A site to which the end of a round did not come has not moved its model; it says so when the next round begins,
    leaves that round to the others, and is given the model that they have."""
    together = Together(
        tmp_path, rounds=4, wrap={"d": lambda real, _site: Losing(real, RoundReceipt)}, policy=HOMOMORPHIC
    ).run()
    assert together.failure is None
    assert together.errors == {}
    survivors = ["".join(record.survivors) for record in together.records]
    assert survivors == ["abcd", "abc", "abcd", "abcd", "abcd"]
    assert "d has missed a sum and asks the others for the model" in together.said
    assert_model(together, survivors[:4])


class Withholding:
    """An endpoint of a site that gives its model to nobody."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def send(self, peer: PeerId, frames: Sequence[bytes]) -> None:
        """Send anything but a model."""
        if frames[0] != control.CONTROL or not isinstance(control.decode_from_site(frames[1:]), ModelCopy):
            self._endpoint.send(peer, frames)

    def __getattr__(self, name: str) -> object:
        return getattr(self._endpoint, name)


def test_nobody_gives_the_model(tmp_path: Path) -> None:
    """A site that is behind and gets no copy is told so at the end instead of being given an old model; the others are
    held up for no longer than a phase may last."""
    wrap = {name: lambda real, _site: Withholding(real) for name in "abc"}
    wrap["d"] = lambda real, _site: Losing(real, RoundReceipt)
    together = Together(
        tmp_path,
        rounds=2,
        wrap=wrap,
        policy=HOMOMORPHIC,
        deadlines=msgspec.structs.replace(QUICK, phase_seconds=1.0),
    ).run()
    assert together.failure is None
    assert_model(together, ["abcd", "abc"], at="abc")
    assert together.errors.keys() == {"d"}


def test_the_end_has_no_model_in_it(tmp_path: Path) -> None:
    """After the first released sum no message of the coordinator holds a model, not even an old one."""
    payloads: list[int] = []

    class Listening(Losing):
        def receive(self, timeout: float) -> Delivery | None:
            delivery = self._endpoint.receive(timeout)
            if delivery is not None and delivery.frames[0] == control.CONTROL:
                payloads.append(len(control.decode_from_coordinator(delivery.frames[1:]).payload))
            return delivery

    wrap = {"a": lambda real, _site: Listening(real, RoundReceipt)}
    together = Together(tmp_path, rounds=2, wrap=wrap, programs={"a": moving("a")}, policy=HOMOMORPHIC).run()
    assert together.failure is None
    assert payloads[0] > 0
    assert payloads[1:] == [0, 0, 0]
