"""A coordinator that goes away at the worst moments and is started again: training goes on from the last finished
round."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.consortium import Consortium
from support.faulty_link import Faults, FaultyLink
from support.federation import INITIAL, PATIENT, Together, expected_model

from secureagg import Coordinator, Outbound
from secureagg.messages import RoundReceipt
from sites.coordinator_loop import CoordinatorLoop, RoundRecord
from sites.errors import ConfigurationError
from sites.manifest import Policy
from sites.recipe import ENCODING, HOMOMORPHIC, POLICY, TRAINING
from sites.run_store import RunStore
from transport import PeerId, listen

STEP = ENCODING.value_range / (2**15 - 1)
ROUNDS = 4


class Crash(BaseException):
    """The coordinator's machine goes away."""


def crash_after(method: str, number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Let the machine go away once this method of the store has been called for a round."""

    def install(patch: pytest.MonkeyPatch) -> None:
        real = getattr(RunStore, method)

        def crashing(self: RunStore, run: str, current: int, *rest: object) -> None:
            real(self, run, current, *rest)
            if current == number:
                raise Crash

        patch.setattr(RunStore, method, crashing)

    return install


def crash_before_the_end_of(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Let the machine go away when a round was summed, before that is on disk."""

    def install(patch: pytest.MonkeyPatch) -> None:
        real = RunStore.finish

        def crashing(self: RunStore, run: str, current: int, *rest: object) -> None:
            if current == number:
                raise Crash
            real(self, run, current, *rest)

        patch.setattr(RunStore, "finish", crashing)

    return install


class Restarted(Together):
    """A federation whose coordinator crashes once and is started again; ``records`` are of both processes."""

    def __init__(self, folder: Path, install: Callable[[pytest.MonkeyPatch], None], **tables: object) -> None:
        super().__init__(folder, rounds=ROUNDS, coordinator=self._twice, **{"deadlines": PATIENT, **tables})
        self._install = install

    def _twice(self, consortium: Consortium) -> None:
        with pytest.MonkeyPatch.context() as patch:
            self._install(patch)
            with pytest.raises(Crash):
                self._once(consortium)
        self._once(consortium)

    def _once(self, consortium: Consortium) -> None:
        manifest = consortium.manifest
        peers = {PeerId(site): card.transport_key for site, card in manifest.roster.items()}
        secret = consortium.keys["sum"].transport_secret
        with listen(manifest.coordinator.address, secret_key=secret, peers=peers) as endpoint:
            CoordinatorLoop(
                manifest=manifest,
                endpoint=endpoint,
                initial=INITIAL,
                state=self.folder / "state",
                notify=self.said.append,
            ).run()


def logged(folder: Path) -> list[RoundRecord]:
    """The coordinator's log."""
    lines = (folder / "state" / "rounds.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=RoundRecord) for line in lines]


@pytest.mark.parametrize("policy", [POLICY, HOMOMORPHIC], ids=["masked", "homomorphic"])
@pytest.mark.parametrize(
    ("install", "lost"),
    [(crash_after("begin", 2), [2]), (crash_before_the_end_of(2), [2]), (crash_after("finish", 2), [])],
    ids=["begun", "summed", "finished"],
)
def test_training_goes_on(
    tmp_path: Path, policy: Policy, install: Callable[[pytest.MonkeyPatch], None], lost: list[int]
) -> None:
    """Whether a round was begun, summed or finished when the machine went away: the run, its numbers and the server
    optimizer's momentum go on; a round that was finished on disk counts once, and one that was not, not at all, at
    every site alike."""
    if policy is HOMOMORPHIC:
        pytest.importorskip("tenseal", reason="the extra `homomorphic` is not installed")
    training = msgspec.structs.replace(TRAINING, rounds=ROUNDS, server_optimizer="momentum", server_learning_rate=0.5)
    together = Restarted(tmp_path, install, training=training, policy=policy).run()
    assert together.failure is None
    assert together.errors == {}
    records = logged(tmp_path)
    assert [record.number for record in records] == [1, 2, 3, 4, 5]
    assert len({record.run for record in records}) == 1
    assert [record.number for record in records if record.error == "interrupted"] == lost
    assert f"run {records[0].run} goes on with round 3" in together.said
    # By hand: FedAvgM with momentum 0.9 over the rounds that count, all of which have the same mean update.
    update, velocity, model = expected_model(["abcd"]), 0.0, 0.0
    for _ in range(ROUNDS - len(lost)):
        velocity = 0.9 * velocity + update
        model += 0.5 * velocity
    states = list(together.final.values())
    assert len(states) == 4
    for state in states:
        for key, tensor in state.items():
            np.testing.assert_allclose(tensor.numpy(), model, atol=10 * STEP)
            assert torch.equal(tensor, states[0][key])


def test_away_while_it_tells_of_the_end(tmp_path: Path) -> None:
    """A coordinator that goes away before all sites know that the run is over, and is started again, tells them, and
    begins no run anew."""

    def install(patch: pytest.MonkeyPatch) -> None:
        def crashing(_self: CoordinatorLoop, _code: str) -> None:
            raise Crash

        patch.setattr(CoordinatorLoop, "_say_over", crashing)

    together = Restarted(tmp_path, install).run()
    assert together.failure is None
    assert together.errors == {}
    assert [record.number for record in logged(tmp_path)] == [1, 2, 3, 4, 5]
    assert len(together.final) == 4


def test_a_sum_that_nobody_heard_of(tmp_path: Path) -> None:
    """Where the sites hold the model, a round whose receipts reach no site is none, even if the coordinator goes away
    then: the run goes on from the model that they have."""
    pytest.importorskip("tenseal", reason="the extra `homomorphic` is not installed")
    lines: list[FaultyLink] = []

    def install(patch: pytest.MonkeyPatch) -> None:
        real = CoordinatorLoop._deliver

        def cut_off(self: CoordinatorLoop, machine: Coordinator, record: RoundRecord, outbound: list[Outbound]) -> None:
            if record.number == 2 and any(isinstance(item.message, RoundReceipt) for item in outbound):
                for line in together.lines.values():
                    line.down = True
                    line.cut()
                lines.extend(together.lines.values())
            real(self, machine, record, outbound)

        patch.setattr(CoordinatorLoop, "_deliver", cut_off)
        crash_after("finish", 2)(patch)

    class Reconnected(Restarted):
        def _once(self, consortium: Consortium) -> None:
            for line in lines:
                line.down = False
            super()._once(consortium)

    deadlines = msgspec.structs.replace(PATIENT, join_seconds=40.0, phase_seconds=3.0)
    through = dict.fromkeys("abcd", Faults())
    together = Reconnected(tmp_path, install, policy=HOMOMORPHIC, through=through, deadlines=deadlines)
    together.run()
    assert together.failure is None
    assert together.errors == {}
    records = logged(tmp_path)
    assert [(record.number, record.error) for record in records] == [
        *[(1, ""), (2, "unconfirmed"), (3, ""), (4, ""), (5, "")]
    ]
    for state in together.final.values():
        for tensor in state.values():
            np.testing.assert_allclose(tensor.numpy(), expected_model(["abcd"] * 3), atol=10 * STEP)


@pytest.mark.parametrize("policy", [POLICY, HOMOMORPHIC], ids=["masked", "homomorphic"])
def test_a_finished_run_is_not_begun_again(tmp_path: Path, policy: Policy) -> None:
    """A coordinator that is started after the end trains nothing: it tells the sites that come, who may have missed it,
    that the run is over, and they have its model."""
    if policy is HOMOMORPHIC:
        pytest.importorskip("tenseal", reason="the extra `homomorphic` is not installed")
    together = Together(tmp_path, rounds=1, policy=policy).run()
    first = {name: state["weight"] for name, state in together.final.items()}
    together.final.clear()
    together.run()
    assert together.failure is None
    assert together.errors == {}
    assert [record.number for record in logged(tmp_path)] == [1, 2]
    assert any("is over" in text for text in together.said)
    assert together.final.keys() == first.keys() == set("abcd")
    for name, state in together.final.items():
        assert torch.equal(state["weight"], first[name])


def test_a_new_run_after_the_end(tmp_path: Path) -> None:
    """Only asked for is another run begun, from the initial model, in the same log."""
    together = Together(tmp_path, rounds=1).run()
    together.new_run = True
    together.run()
    assert together.failure is None
    assert [record.number for record in together.records] == [1, 2, 1, 2]
    assert together.records[0].run != together.records[2].run


def test_a_damaged_model_ends_the_start(tmp_path: Path) -> None:
    """A coordinator whose model is damaged says which file it is and begins nothing."""

    def install(patch: pytest.MonkeyPatch) -> None:
        real = RunStore.begin

        def crashing(self: RunStore, run: str, number: int) -> None:
            real(self, run, number)
            if number == 2:
                (path,) = (tmp_path / "state").glob("optimizer-*.safetensors")
                path.write_bytes(path.read_bytes()[:-1])
                raise Crash

        patch.setattr(RunStore, "begin", crashing)

    together = Restarted(tmp_path, install)
    together.run()
    assert isinstance(together.failure, ConfigurationError)
    assert "optimizer-" in str(together.failure)
    assert "damaged" in str(together.failure)
    assert [record.number for record in logged(tmp_path)] == [1]
