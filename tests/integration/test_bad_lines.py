"""Federations over lines that are slow, lossy, stalled, cut or copied: who is there is in the sum all the same."""

import time

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save
from support.faulty_link import Faults, slow_and_lossy
from support.federation import PATIENT, STRICT, Together, expected_model

from secureagg.messages import MaskedInput
from sites.participant_loop import Federation

STEP = STRICT.value_range / (2**15 - 1)
EVERYBODY = ("a", "b", "c", "d")


def model_of(parameters: int) -> bytes:
    """A model of two tensors with so many numbers in one of them."""
    return save({"weight": torch.zeros(1, parameters), "bias": torch.zeros(1)})


def assert_everybody_in_each_sum(together: Together, rounds: int) -> None:
    """No dropout, no error, and the model that the weighted means lead to, at each site."""
    assert together.failure is None
    assert together.errors == {}
    assert [record.survivors for record in together.records] == [EVERYBODY] * (rounds + 1)
    assert all(record.refused == record.dropped == {} for record in together.records)
    assert together.final.keys() == set(EVERYBODY)
    for state in together.final.values():
        for tensor in state.values():
            np.testing.assert_allclose(tensor.numpy(), expected_model(["abcd"] * rounds), atol=4 * STEP + 1e-6)


def test_an_upload_goes_on_where_it_broke_off(tmp_path, monkeypatch) -> None:
    """A site whose line is cut again and again while its masked input is on its way is in the sum; what is sent again
    is less than what was under way at each cut."""
    monkeypatch.setattr(MaskedInput, "CHUNK_BYTES", 64 << 10)
    cuts = (100_000, 400_000, 700_000, 1_000_000)
    faults = Faults(cuts=cuts, bytes_per_second=2_000_000)
    together = Together(tmp_path, rounds=1, initial=model_of(500_000), deadlines=PATIENT, through={"d": faults}).run()
    assert_everybody_in_each_sum(together, 1)
    line = together.lines["d"]
    assert line.connections == len(cuts) + 1
    packed = together.records[0].bytes_received["d"]
    assert packed > 1_000_000
    # The proxy's and both kernels' buffers were full at each cut; a whole upload sent again would be twice as much.
    assert line.carried < 1.8 * packed


def test_a_line_that_is_cut_in_every_phase(tmp_path) -> None:
    """With cuts between a few hundred bytes nearly every message of a round meets one; none is lost."""
    cuts = tuple(range(2_000, 40_000, 3_000))
    together = Together(tmp_path, rounds=2, deadlines=PATIENT, through={"d": Faults(cuts=cuts)}).run()
    assert_everybody_in_each_sum(together, 2)
    assert together.lines["d"].connections >= 3


def test_a_slow_and_lossy_line(tmp_path) -> None:
    """A site at 2 Mbit/s with 5 % of the segments lost and a cut on its way takes part in each round."""
    together = Together(
        tmp_path,
        rounds=1,
        initial=model_of(20_000),
        deadlines=PATIENT,
        through={"d": slow_and_lossy(7, cuts=(30_000,))},
    ).run()
    assert_everybody_in_each_sum(together, 1)
    assert together.lines["d"].lost > 0
    assert together.lines["d"].connections == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_large_model_over_a_slow_and_lossy_line(tmp_path) -> None:
    """A million numbers, 4 MB down for each round and at the end, 2 MB up, at 2 Mbit/s with 5 % loss and three cuts."""
    deadlines = msgspec.structs.replace(PATIENT, join_seconds=30.0, phase_seconds=300.0, training_seconds=300.0)
    together = Together(
        tmp_path,
        rounds=1,
        initial=model_of(1_000_000),
        deadlines=deadlines,
        through={"d": slow_and_lossy(8, cuts=(200_000, 900_000, 1_800_000))},
    )
    together.patience = 900.0
    assert_everybody_in_each_sum(together.run(), 1)
    assert together.lines["d"].connections == 4


def test_copied_connections(tmp_path) -> None:
    """Somebody on the path who sends a copy of all that a site's connection carried, in the middle of a round, gets
    nothing counted twice and no answer that anybody could use."""
    together = Together(tmp_path, rounds=2, deadlines=PATIENT, through={"d": Faults(copies=(500, 3_000, 9_000))}).run()
    assert_everybody_in_each_sum(together, 2)
    assert together.lines["d"].connections == 1
    assert together.endpoint.violations == together.endpoint.rivals == {}


def test_a_stall_beyond_the_deadline(tmp_path, caplog) -> None:
    """A site whose line stalls for longer than a phase lasts is a dropout of that round, is told so, and takes part in
    a later one by itself."""

    def waiting_for_d(federation: Federation) -> None:
        for training_round in federation.rounds():
            if training_round.number == 2:
                deadline = time.monotonic() + 25
                while sum("d is present" in text for text in together.said) < 2 and time.monotonic() < deadline:
                    time.sleep(0.01)
            training_round.submit(training_round.global_state, examples=1)

    together = Together(
        tmp_path,
        rounds=3,
        deadlines=msgspec.structs.replace(PATIENT, phase_seconds=3.0),
        through={"d": Faults(stalls=((1_600, 5.0),))},
        programs={"a": waiting_for_d},
    )
    together.run()
    assert together.failure is None
    assert together.errors == {}
    assert ["".join(record.survivors) for record in together.records] == ["abc", "abc", "abcd", "abcd"]
    assert together.records[0].dropped.keys() == {"d"}
    assert together.lines["d"].connections == 1
    assert "round 1: too late for the coordinator" in caplog.text
    assert [(entry.number, entry.result) for entry in together.history["d"]] == [
        (1, "unfinished"),
        (3, "finished"),
        (4, "finished"),
    ]
