"""Whole rounds over sockets: what is measured is a round that was right, and its figures are what was spent in it."""

import itertools
import math
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

from benchmarks import limits, plots
from benchmarks.federated_rounds import OTHER, PLAIN, Lap, Spent, _Mark, _results, _Training, federate, resnet18, spent
from benchmarks.record import Figure, Record
from benchmarks.round import MASKED_INPUT, costs, floors, where
from sites.model_state import ModelSpec

VALUES = 2000


def lap(scale: float, **steps: float) -> Lap:
    """A made-up lap of two sites, everything ``scale`` times as much."""
    sites = [
        Spent(cpu=scale * cpu, sent=10**6, received=2 * 10**6, peak=int(scale * 1e6), steps=steps) for cpu in (1, 3)
    ]
    summing = Spent(cpu=5 * scale, sent=0, received=0, peak=int(scale * 4e6), steps=steps)
    return Lap(seconds=7 * scale, sites=sites, coordinator=summing)


STEPS = {**dict.fromkeys(MASKED_INPUT, 0.1), "model": 0.2, OTHER: 0.3}


def test_a_round_of_processes() -> None:
    """Masked and plain rounds of real processes end, each with the right aggregate; masked updates are shorter than
    float32 and its steps add up to the time of the process."""
    tensors = {"weight": (VALUES // 10, 10)}
    plain = federate(PLAIN, sites=3, tensors=tensors, laps=1)
    (masked,) = federate("masked", sites=3, tensors=tensors, laps=1, profiled=True)
    assert len(plain) == 1
    for site in plain[0].sites:
        assert 4 * VALUES < site.sent < 4.1 * VALUES
        assert site.steps == {}
    for each in (*masked.sites, masked.coordinator):
        assert each.cpu > 0
        assert math.isclose(sum(each.steps.values()), each.cpu, rel_tol=1e-6)
        assert each.steps[OTHER] < 0.9 * each.cpu
    for site in masked.sites:
        assert (
            min(site.steps[name] for name in ("encode", "masks", "pack", "hash", "sign, verify", "model", "frames")) > 0
        )
        assert site.received > 4 * VALUES
    assert min(masked.coordinator.steps[name] for name in ("unpack, add", "spool", "decode", "rebuild secrets")) > 0
    assert masked.seconds > 0


def test_a_wrong_aggregate_is_noticed() -> None:
    """Training goes on only from a model that was moved by the mean of all sites' updates."""
    spec = ModelSpec.of({"weight": (50,)})
    sites = [_Training(number, sites=3, spec=spec, step=1e-6) for number in range(3)]
    model = {"weight": torch.zeros(50)}
    trained = [site.train(model)["weight"] for site in sites]
    right = {"weight": sum(trained) / 3}
    sites[0].train(right)
    with pytest.raises(AssertionError, match="wrong aggregate: off by"):
        sites[1].train({"weight": right["weight"] + torch.eye(50)[7] * 1e-5})


def test_what_was_spent_lies_between_two_marks() -> None:
    """Times, bytes and steps are differences; memory is the peak beyond what was there when the lap began."""
    steps = {"masks": 1.0}
    before = _Mark(arrived=0, began=1, cpu=2, sent=10, received=20, resident=1000, peak=5000, steps=steps)
    after = _Mark(
        arrived=9, began=9, cpu=6, sent=30, received=25, resident=9000, peak=4000, steps={"masks": 2.5, "pack": 1}
    )
    assert spent(before, after) == Spent(
        cpu=4, sent=20, received=5, peak=3000, steps={"masks": 1.5, "pack": 1, OTHER: 1.5}
    )


def test_a_process_that_fails_ends_the_measurement() -> None:
    """What went wrong in a process is told."""
    pipes = [Pipe(duplex=False) for _ in range(2)]
    pipes[1][1].send("Traceback: the reason")
    with pytest.raises(RuntimeError, match="masked: a process failed\nTraceback: the reason"):
        _results([here for here, _ in pipes], "masked")


def test_resnet18_is_as_large_as_resnet18() -> None:
    """The model has the parameters of torchvision's."""
    assert sum(map(math.prod, resnet18().values())) == 11_689_512


def figures() -> list[Figure]:
    """Of made-up laps, of which the masked ones took twice as much as plain's, and the homomorphic ones ten times."""
    laps = {"masked": [lap(2), lap(4)], "homomorphic": [lap(10), lap(20)], PLAIN: [lap(1), lap(2)]}
    reached = [Figure(f"limit: {limits.ENCRYPTED}, {whom}", [2.0], "s/GB") for whom in (limits.SENDS, limits.RECEIVES)]
    profiled = {"masked": [lap(1, **STEPS)], PLAIN: [lap(1, **STEPS)]}
    return [
        *costs(laps),
        *floors(laps["masked"], profiled["masked"], reached, length=1000, repeats=1),
        *where(profiled),
    ]


def test_costs_are_means_over_sites_and_ratios_of_the_same_turn() -> None:
    """Every repetition is kept; ratios are of laps of the same turn."""
    record = Record("round", "", figures(), full=False)
    assert list(record.of("processor time of a site", system="masked").values) == [4, 8]
    assert list(record.of("wall time of the round", system=PLAIN).values) == [7, 14]
    assert list(record.of("processor time of a site, of plain's", system="homomorphic").values) == [10, 10]
    assert list(record.of("up from a site, of plain's", system="masked").values) == [1, 1]
    sent = record.of("floor of a site: encrypt and send its bytes").median
    assert math.isclose(sent, 0.001 * 2)
    ratio = record.of("masked: processor time of a site / read, keystreams, write")
    floor = 4 / ratio.values[0]
    assert math.isclose(
        record.of(f"masked: its steps {', '.join(MASKED_INPUT)} / read, keystreams, write").median, 0.5 / floor
    )
    assert math.isclose(record.of("share of processor time in no named step", system="masked", who="site").median, 0.3)
    names = [each.name for each in record.figures if each.at == {"system": "masked", "who": "coordinator"}]
    assert names[-2] == f"step: {OTHER}"


def test_plots_are_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    """A record gives its plots as SVG and PNG, with units, and the same bytes for the same figures."""
    record = Record("round", "", figures(), full=False)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    drawn = [plots.draw(record, folder) for folder in folders]
    assert [path.name for path in drawn[0]] == [
        "round-cost.svg",
        "round-cost.png",
        "round-steps.svg",
        "round-steps.png",
    ]
    for one, other in zip(*drawn, strict=True):
        assert one.read_bytes() == other.read_bytes()
    texts = [path.read_text() for path in drawn[0] if path.suffix == ".svg"]
    for text, words in itertools.zip_longest(
        texts,
        (("processor time, s", "peak memory, MB", "homomorphic"), ("processor time of one round in s", "masked, site")),
    ):
        assert all(f">{word}<" in text for word in words)


def test_bytes_go_through_sockets_and_the_transport() -> None:
    """Both ways move what they are asked to, in time that is counted at both ends."""
    for move in (limits.tcp, limits.encrypted):
        assert min(move(1 << 20)) > 0
