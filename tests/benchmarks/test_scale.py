"""Growth of vectors and cohorts, and the cost model: its arithmetic, its fit, and its use on real rounds."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks import cost_model, plots, scale
from benchmarks.cost_model import Constants, Shape
from benchmarks.record import Figure, Record
from benchmarks.scale import INPUT, LONG, SITE_SECONDS, UP, Cohort, checks, cohorts, lengths, predictions, whole_round
from secureagg.graph import choose_neighbourhood
from secureagg.testing import run_round

NONE = Constants(**cost_model.zeros())
ROUND = Shape(n=5, d=80, k=4, t=4, s=1, b=20, sparse=False)
ENCRYPTED = replace(ROUND, c=2)


def test_shapes_are_those_of_real_rounds() -> None:
    """What the model takes for a round is what the library chooses for it."""
    assert Shape.of(16, 1000) == Shape(n=16, d=1000, k=15, t=11, s=2, b=20, sparse=False)
    assert Shape.of(3, 1000).s == 0
    sparse = Shape.of(200, 1000)
    assert (sparse.k, sparse.t, sparse.s, sparse.sparse) == (56, 39, 20, True)
    assert math.isclose(sparse.v, 2 * 56 - 56**2 / 199)
    assert Shape.of(16, 4096 * 4, backend="homomorphic").c == 2


@pytest.mark.slow
def test_the_largest_graph_is_the_one_that_is_chosen() -> None:
    """What stands in the model to save a minute is what that minute gives."""
    for sites, known in cost_model.SLOWLY_CHOSEN.items():
        tenth = Fraction(1, 10)
        assert choose_neighbourhood(sites, corrupt=tenth, dropouts=tenth, one_sum=True) == known


@pytest.mark.parametrize(
    ("name", "shape", "site", "coordinator"),
    [
        ("encode", ROUND, 80, 0),
        ("pack", ROUND, 80, 0),
        ("mask", ROUND, 5 * 216, (4 + 4) * 216),  # 4 self masks, and those of one dropout with 4 survivors
        ("hash", ROUND, 203, 0),  # 27 words of 60 bits
        ("take", ROUND, 0, 4 * 203),
        ("add", ROUND, 0, 4 * 80),
        ("release", ROUND, 0, 80),
        ("site", ROUND, 1, 0),
        ("neighbour", ROUND, 4, 0),
        ("holder", ROUND, 4, 0),
        ("share", ROUND, 16, 0),
        ("setup", ROUND, 0, 0),
        ("member", ROUND, 0, 5),
        ("edge", ROUND, 0, 20),
        ("coefficient", ROUND, 0, 16),
        ("coefficient", replace(ROUND, sparse=True), 0, 5 * 16),
        ("agreement", ROUND, 0, 4),
        ("encrypt", ENCRYPTED, 2, 0),
        ("open", ENCRYPTED, 2, 0),
        ("pack", ENCRYPTED, 0, 0),
        ("encode", ENCRYPTED, 80, 0),
        ("mask", ENCRYPTED, 5 * 65536, 8 * 65536),
        ("hash", ENCRYPTED, 2 * (32832 + 65536), 0),
        ("load", ENCRYPTED, 0, 4 * 2),
        ("release_ciphertext", ENCRYPTED, 0, 2),
    ],
)
def test_times_by_hand(name: str, shape: Shape, site: float, coordinator: float) -> None:
    """How often each constant is counted, with all others at zero."""
    one = replace(NONE, **{name: 1.0})
    assert math.isclose(cost_model.site_seconds(one, shape), site)
    assert math.isclose(cost_model.coordinator_seconds(one, shape), coordinator)


def test_an_input_alone_by_hand() -> None:
    """A site's input has the values' part, and the setting up of its masks in place of the messages."""
    assert cost_model.input_seconds(replace(NONE, encode=1, setup=100), ROUND) == 80 + 5 * 100
    assert cost_model.input_seconds(replace(NONE, neighbour=1, site=1, open=1), ENCRYPTED) == 0


def test_bytes_and_links_by_hand() -> None:
    """A site's bytes take its link's time both ways, with the model down; the coordinator's link takes those of all."""
    known = replace(NONE, up=10, up_neighbour=1, up_holder=2, down=20, down_neighbour=3, down_holder=4)
    up, down = 203 + 32 * 203 / 2**20 + 10 + 4 + 8, 20 + 12 + 16
    assert math.isclose(cost_model.bytes_up(known, ROUND), up)
    assert math.isclose(cost_model.bytes_down(known, ROUND), down)
    lists = replace(NONE, down_entry=1.0)
    assert cost_model.bytes_down(lists, ROUND) == 0
    sparse = replace(ROUND, sparse=True, n=9)
    assert math.isclose(cost_model.bytes_down(lists, sparse), sparse.v * 4 + 2 * 16)
    site, coordinator = cost_model.round_seconds(known, ROUND, bits_per_second=8.0)
    assert math.isclose(site, up + down + 320)
    assert math.isclose(coordinator, 5 * (up + down + 320))
    costly = replace(known, send=1.0)
    site_more, coordinator_more = cost_model.round_seconds(costly, ROUND, bits_per_second=8.0)
    assert math.isclose(site_more - site, up)
    assert math.isclose(coordinator_more - coordinator, 5 * (down + 320))


def test_a_fit_finds_the_constants_and_none_below_zero() -> None:
    """Points that follow the model give its constants; a point that would ask for less than nothing gives zero."""
    shapes = [Shape.of(sites, 16, graph=graph) for sites, graph in ((5, "complete"), (40, "complete"), (100, "sparse"))]
    truth = replace(NONE, up=1000.0, up_neighbour=3.0, up_holder=200.0)
    points = [(shape, cost_model.bytes_up(truth, shape) - shape.p - 32 * shape.p / 2**20) for shape in shapes]
    assert cost_model.fitted(cost_model.UP, points) == pytest.approx({"up": 1000, "up_neighbour": 3, "up_holder": 200})
    falling = [(Shape.of(sites, 16), 1000.0 / sites) for sites in (5, 10, 50)]
    assert min(cost_model.fitted(cost_model.UP, falling).values()) >= 0


@pytest.fixture(scope="module")
def measured() -> dict[Cohort, list[Figure]]:
    """A few small cohorts, of both backends."""
    return cohorts(
        [
            Cohort(3, 16, "complete"),
            Cohort(10, 16, "complete", repeats=2),
            Cohort(3, 5000, "complete"),
            Cohort(3, 5000, "complete", "homomorphic"),
        ]
    )


def test_whole_rounds(measured: dict[Cohort, list[Figure]]) -> None:
    """Each round ends with the survivors that are expected; a site's bytes are those that its messages have."""
    for cohort, found in measured.items():
        assert {each.name for each in found} == scale.MODELLED.keys()
        assert all(len(each.values) == cohort.repeats and min(each.values) > 0 for each in found)
    up = {each.name: each.median for each in measured[Cohort(3, 16, "complete")]}[UP]
    run = run_round({f"site-{number:05d}": [0.0] * 16 for number in range(3)}, value_range=1.0)
    # Names of consortium and run, and the model's digest, are in the context only: the messages are as long.
    assert up == pytest.approx(sum(run.bytes_sent.values()) / 3 / 1000, abs=0.002)


def test_dropouts_send_no_input() -> None:
    """A tenth of the sites is not among those whose inputs are summed, and costs the coordinator its masks."""
    shape = Cohort(10, 16, "complete").shape
    assert (shape.s, shape.pairs) == (1, 9)
    assert whole_round(Cohort(10, 16, "complete"))[SITE_SECONDS] > 0  # it compares the survivors itself


def test_lengths() -> None:
    """An input's bytes, its time and what the coordinator does for it are measured for both backends."""
    for backend, bytes_each in (("masked", 2.5), ("homomorphic", 4.0)):
        record = Record("scale", "", lengths(backend, 20_000, 1), full=False)
        assert record.of(INPUT, system=backend, values=20_000).median > 0
        assert bytes_each < record.of("bytes up for each value").median < 1.4 * bytes_each


def test_memory_is_that_of_a_process_of_its_own() -> None:
    """A site needs some vectors beyond its update, and not many."""
    found = scale.peaks("masked", 2_000_000)
    assert 1 < found["a site"] < 3
    assert 4 < found["the coordinator"] < 7


def test_the_model_is_checked_where_it_was_not_fitted(measured: dict[Cohort, list[Figure]], tmp_path: Path) -> None:
    """Errors are relative to what was measured, and called checked only where nothing was fitted; predictions say
    whether they lie within what was measured; plots are drawn of all."""
    fit = [cohort for cohort in measured if cohort.values == 16]
    exact = Constants(**cost_model.zeros() | {"up": 1000.0})
    by_length = [Figure(INPUT, [2.0], "s", at={"system": "masked", "values": 1000})]
    found = checks(exact, measured, fit, by_length)
    record = Record("scale", "", found, full=False)
    for cohort in measured:
        kind = "fitted" if cohort in fit else "checked"
        error = record.of(f"model, {kind}: {UP}", **cohort.at).median
        true = {each.name: each.median for each in measured[cohort]}[UP]
        assert error == pytest.approx(cost_model.bytes_up(exact, cohort.shape) / (1000 * true) - 1)
    assert record.of(f"model, checked: {INPUT}", values=1000).median == pytest.approx(-1)
    assert len(record.of(f"model, checked: {UP}, errors without their sign").values) == 2
    predicted = predictions(replace(exact, encode=1e-9, release=1e-9), most_sites=1000, most_values=10**8)
    within = {(each.at["sites"], each.at["values"]) for each in predicted if each.at["range"] == "measured"}
    assert within == {(16, 10**6), (16, 10**7), (16, 10**8)}
    assert LONG < 10**6
    everything = [
        *(each for length in (1000, 2000) for each in lengths("masked", length, 1)),
        *(each for some in measured.values() for each in some),
        *found,
        *predicted,
    ]
    everything += [
        Figure(f"peak memory of {who} / float32", [2.0], at=each.at)
        for who in ("a site", "the coordinator")
        for each in by_length
    ]
    drawn = plots.draw(Record("scale", "", everything, full=False), tmp_path)
    assert [path.stem for path in drawn[::2]] == ["scale-length", "scale-sites", "scale-memory", "scale-model"]
    assert all(path.stat().st_size > 5000 for path in drawn)
    texts = " ".join(path.read_text() for path in drawn if path.suffix == ".svg")
    assert all(
        f">{label}<" in texts for label in ("processor time in s", "KB", "values in the vector", "sites", "masked")
    )
