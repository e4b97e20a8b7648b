"""Censuses over real sockets and real machines: who is in the sum, and what is left on whose disk."""

import json
from functools import partial
from pathlib import Path

import msgspec
import pytest
from support.commands import run_command
from support.federation import PATIENT, Together

from sites import census
from sites.config import open_site
from sites.datasets.phantoms import PhantomPlan, write_phantoms
from sites.manifest import Census, Manifest

PLAN = Census(labels={"disease": ["no", "yes"]})


def prepare(together: Together, names: str) -> None:
    """Each site of these names has 20 patients: a 1 woman, b 2, ..."""
    for name in names:
        women = 1 + "abcd".index(name)
        counts = {variable: {cells[0]: women, cells[1]: 20 - women} for variable, cells in census.cells(PLAN).items()}
        site = open_site(together.consortium.site_configs[name])
        site.state.mkdir(parents=True, exist_ok=True)
        census.prepare(site, counts)


def states(together: Together) -> dict[str, Path]:
    """The state folder of each site."""
    return {name: open_site(path).state for name, path in together.consortium.site_configs.items()}


def test_all_are_counted(tmp_path: Path) -> None:
    """The last round sums everybody's counts; the coordinator has the table, and each site has used up its own."""
    together = Together(tmp_path, rounds=1, deadlines=PATIENT, census=PLAN)
    prepare(together, "abcd")
    together.run()
    assert (together.failure, together.errors) == (None, {})
    assert [record.purpose for record in together.records] == ["train", "evaluate", "census"]
    table = census.load_table(tmp_path / "state" / census.TABLE)
    assert (table.patients, table.sites) == (80, 4)
    assert table.variables["sex"] == {"female": 10, "male": 70}
    for state in states(together).values():
        assert not (state / census.CONTRIBUTION).exists()
        assert (state / census.GIVEN).exists()


def test_who_prepared_nothing_is_not_in_the_sum(tmp_path: Path) -> None:
    """A site without counts leaves the round, instead of adding zeros; with too few left nothing is published, and the
    model of the run is none the worse for it."""
    together = Together(tmp_path, rounds=1, deadlines=PATIENT, census=PLAN)
    prepare(together, "abc")
    together.run()
    assert together.failure is None
    assert together.records[-1].survivors == ("a", "b", "c")
    table = census.load_table(tmp_path / "state" / census.TABLE)
    assert (table.patients, table.sites) == (60, 3)
    assert table.variables["sex"] == {}  # 6 women

    again = Together(tmp_path / "again", rounds=1, deadlines=PATIENT, census=PLAN)
    prepare(again, "ab")
    again.run()
    assert again.failure is None
    assert again.records[-1].error
    assert not (tmp_path / "again" / "state" / census.TABLE).exists()
    assert again.final.keys() == set("abcd")


def test_from_files_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """`data federate` at each site, a run, and `data census`: the sums are those of the phantoms' truth."""
    run = partial(run_command, monkeypatch, capfd)
    truth = write_phantoms(tmp_path / "out", PhantomPlan(sites=4, patients=12, images=1, size=16))
    together = Together(tmp_path / "run", rounds=1, deadlines=PATIENT, census=PLAN)
    for name, scanner in zip("abcd", truth.scanners, strict=True):
        own = tmp_path / "out" / scanner.site
        status, out, error = run(
            "data", "federate", own / "images", "--config", together.consortium.site_configs[name],
            "--labels", own / "labels.csv", "--workers", "1",
        )  # fmt: skip
        assert status == 0, error
        assert "once" in out
    together.run()
    assert (together.failure, together.errors) == (None, {})
    file = tmp_path / "run" / "state" / census.TABLE
    found = json.loads(file.read_text())["variables"]
    ill = sum(one.disease for one in truth.patients)
    women = sum(one.subgroup == "F" for one in truth.patients)
    assert found["label disease"] == {"yes": ill, "no": 48 - ill}
    assert found["sex"] == {"female": women, "male": 48 - women}
    assert found["modality"] == {"CT": 48}
    assert found["manufacturer"] == {}  # each scanner is one hospital's
    status, out, error = run("data", "census", file)
    assert status == 0, error
    assert "48 patients of 4 sites" in out
    assert "not published" in out


def test_where_only_sites_open_sums(tmp_path: Path) -> None:
    """With the homomorphic backend each site has the table, and the coordinator has none."""
    from sites.recipe import HOMOMORPHIC

    together = Together(tmp_path, rounds=1, deadlines=PATIENT, census=PLAN, policy=HOMOMORPHIC)
    prepare(together, "abcd")
    together.run()
    assert (together.failure, together.errors) == (None, {})
    assert not (tmp_path / "state" / census.TABLE).exists()
    tables = [census.load_table(state / census.TABLE) for state in states(together).values()]
    assert {table.patients for table in tables} == {80}
    assert msgspec.to_builtins(tables[0].variables["sex"]) == {"female": 10, "male": 70}


def test_a_consortium_that_asks_for_a_census(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """`consortium create --census-label` puts the census into the manifest; without the option there is none."""
    run = partial(run_command, monkeypatch, capfd)
    for name in ("sum", "a", "b", "c"):
        assert run("keygen", name, "--out", tmp_path)[0] == 0
    for options, found in (([], msgspec.UNSET), (["--census-label", "disease=no,yes"], PLAN), (["--census"], Census())):
        status, _, error = run(
            "consortium", "create", tmp_path / "manifest.toml", "--name", "Test",
            "--coordinator", tmp_path / "sum.card", "--address", "tcp://127.0.0.1:5555",
            *(tmp_path / f"{name}.card" for name in "abc"), *options,
        )  # fmt: skip
        assert status == 0, error
        assert Manifest.load(tmp_path / "manifest.toml").census == found
