"""The comparison with other systems: the questions and answers between the environments, the arithmetic on a made-up
peer, and, where a peer is installed, its script."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import answering, compare
from benchmarks.peers.answering import Spent
from benchmarks.peers.asking import ENVIRONMENTS, HERE, NOT_INSTALLED, Peer, PeerRefused, PeerUnavailable
from benchmarks.peers.compare import AFTER, BEFORE, SYSTEMS, Inputs, Size, compared
from benchmarks.peers.ours import whole_round
from benchmarks.record import Figure, Record

SPENT = {"wall": 4.0, "processor": 2.0}
MADE_UP = f"""
import sys
print("a banner on its way in")
print('{{"not": "an answer"}}')
sys.path.insert(0, {str(HERE)!r})
from answering import answer

def whole_round(path, sites, missing=0, scheme="x"):
    print("noise", flush=True)
    spent = {SPENT!r}
    if missing:
        return {{"survived": False, "failed": "one is missing"}}
    return {{"client": spent, "server": spent, "bytes": 8.0, "error": 0.5, "survived": True, "opened": 0.25}}

def refuse():
    raise ValueError("this cannot\\nbe done")

def vanish():
    sys.exit("gone for good")

answer(["numpy"], {{"round": whole_round, "refuse": refuse, "vanish": vanish}})
"""
SYSTEM = replace(
    next(system for system in SYSTEMS if system.name == "Fed-BioMed LOM"),
    name="Made Up",
    peer="made_up",
    quick=Size(sites=5, values=1000, repeats=3),
    tried={"what was read": ("round", "opened")},
)


@pytest.fixture
def ask(tmp_path):
    """Asks the made-up peer, whose environment is this one."""
    python = tmp_path / "made_up" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o700)
    (tmp_path / "drive_made_up.py").write_text(MADE_UP)
    return lambda name: Peer(name, environments=tmp_path, scripts=tmp_path)


def found(figures: list[Figure], name: str) -> Figure:
    """The figure of this name about the peer itself."""
    (figure,) = [each for each in figures if each.name == name and "ours" not in str(each.at["system"])]
    return figure


def test_only_answers_are_taken_for_answers(ask):
    """What a peer prints, before it is ready and while it works, does not end up in an answer."""
    with ask("made_up") as peer:
        assert set(peer.versions) == {"numpy", "python"}
        for _ in range(2):
            assert peer.ask("round", path="", sites=3)["bytes"] == 8.0


def test_an_error_is_an_answer(ask):
    """What a peer's code ends with comes back in one line, and the peer goes on."""
    with ask("made_up") as peer:
        with pytest.raises(PeerRefused, match=r"^ValueError: this cannot be done$"):
            peer.ask("refuse")
        assert peer.ask("round", path="", sites=3)["survived"]


def test_a_peer_that_ends_is_named_with_its_last_words(ask):
    """A script that ends while it is asked is unavailable, with what it said last; so it is when asked again."""
    with ask("made_up") as peer:
        for _ in range(2):
            with pytest.raises(PeerUnavailable, match="made_up ended with 1: gone for good"):
                peer.ask("vanish")


def test_a_script_that_does_not_start(ask, tmp_path):
    """A script whose imports fail is unavailable, with the error."""
    (tmp_path / "drive_made_up.py").write_text("import no_such_module_anywhere")
    with pytest.raises(PeerUnavailable, match="No module named 'no_such_module_anywhere'"):
        ask("made_up")


def test_a_peer_sees_nothing_of_this_project(ask, tmp_path):
    """A peer runs in a folder of its own, and PYTHONPATH, which names our packages, does not reach it."""
    (tmp_path / "drive_made_up.py").write_text(
        MADE_UP.replace(
            "ValueError(", "ValueError(__import__('os').environ.get('PYTHONPATH'), __import__('os').getcwd(), "
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "/ours")
        peer = ask("made_up")
    with peer, pytest.raises(PeerRefused) as refused:
        peer.ask("refuse")
    assert "(None, " in str(refused.value)
    assert str(Path.cwd()) not in str(refused.value)


def test_what_is_not_installed_says_so(tmp_path):
    """Each system without an environment gets one cell, which names the command that installs it."""
    figures = compared(
        "made_up",
        [SYSTEM, replace(SYSTEM, name="Other")],
        Inputs(tmp_path),
        full=False,
        ask=lambda name: Peer(name, environments=tmp_path),
    )
    assert [(each.name, each.text, each.at) for each in figures] == [
        ("not measured", NOT_INSTALLED, {"system": name}) for name in ("Made Up", "Other")
    ]
    assert "make bench-peers" in NOT_INSTALLED


def test_ratios_are_of_the_same_turn(ask, tmp_path, monkeypatch):
    """Theirs over ours for times, ours over theirs for bytes, each of the round beside it."""
    ours = iter([1.0, 0.5, 0.25])

    def our_round(rows, sites, *, backend="masked", silent=None):
        assert rows.shape == (compare.ROWS, 1000)
        assert (sites, backend) == (5, "masked")
        spent = {"wall": 1.0, "processor": next(ours)}
        return {"client": spent, "server": spent, "bytes": 2.0, "error": 1e-5}

    monkeypatch.setattr(compare, "whole_round", our_round)
    figures = compared("made_up", [SYSTEM], Inputs(tmp_path), full=False, ask=ask)
    at = {"system": "Made Up", "sites": 5, "values": 1000}
    assert found(figures, "client").values == [2.0] * 3
    assert found(figures, "client").at == at
    assert list(found(figures, "client / ours").values) == [2.0, 4.0, 8.0]
    assert list(found(figures, "our bytes up / theirs").values) == [0.25] * 3
    assert found(figures, "largest error of the mean").values == [0.5] * 3
    (beside,) = [each for each in figures if each.name == "client" and "ours" in each.at["system"]]
    assert list(beside.values) == [1.0, 0.5, 0.25]
    assert found(figures, AFTER).text == "fails: one is missing"
    assert found(figures, BEFORE).text.startswith("none: ")
    assert found(figures, "what was read").values == [0.25]


def test_a_part_that_fails_costs_only_its_own_cells(ask, tmp_path):
    """A question that a peer refuses leaves a cell that says why, and the other parts are measured."""
    system = replace(SYSTEM, asked={"unknown": 1}, gone={}, tried={})
    figures = compared("made_up", [system], Inputs(tmp_path), full=False, ask=ask)
    assert "unexpected keyword argument 'unknown'" in found(figures, "costs").text
    assert found(figures, compare.READS).text == SYSTEM.reads
    assert "python" in found(figures, "versions").text


def test_a_bound_is_of_the_ratio_it_names(ask, tmp_path, monkeypatch):
    """What is wanted of a system stands at its ratio to ours, and at no other."""
    monkeypatch.setattr(
        compare, "whole_round", lambda *_, **__: {"client": SPENT, "server": SPENT, "bytes": 2, "error": 0}
    )
    system = replace(SYSTEM, wanted={"client / ours": ">= 8"})
    figures = compared("made_up", [system], Inputs(tmp_path), full=False, ask=ask)
    assert found(figures, "client / ours").met is False
    assert [each.name for each in figures if each.wanted] == ["client / ours"]


def test_time_is_added_up_and_can_be_paused(monkeypatch):
    """Blocks add up; what is paused is not counted."""
    clocks = {"perf_counter": itertools.count(0, 1), "process_time": itertools.count(0, 10)}  # a step at each look
    for name, ticks in clocks.items():
        monkeypatch.setattr(answering.time, name, lambda ticks=ticks: next(ticks))
    spent = Spent()
    for _ in range(2):
        with spent, spent.paused():
            pass
    assert spent.each(2) == {"wall": 2, "processor": 20}  # three steps each, of which one was paused


@pytest.mark.parametrize("backend", ["masked", "homomorphic"])
def test_our_round_is_a_round(backend):
    """Our side sends as many bytes as its encoding says, is right to its rounding, and counts those who stayed."""
    rows = np.random.default_rng(1).uniform(-1, 1, (4, 20_000)).astype(np.float32)
    result = whole_round(rows, 5, backend=backend, silent={4: "CollectingMaskedInputs"})
    assert result["survived"]
    assert result["error"] < 2**-15
    assert (2.3 if backend == "masked" else 4) < result["bytes"] < 6
    assert 0 < result["unmask"]["wall"] < result["server"]["wall"] * 5
    assert 0 < result["input"]["wall"] < result["client"]["wall"]


def test_our_round_fails_below_the_threshold():
    """Dropouts beyond the threshold end the round, and the measurement says so."""
    rows = np.zeros((4, 100), np.float32)
    result = whole_round(rows, 5, silent=dict.fromkeys((2, 3, 4), "CollectingMaskedInputs"))
    assert not result["survived"]
    assert "ThresholdNotMet" in result["failed"]


def test_every_peer_has_a_script_and_pinned_requirements():
    """What the table names can be installed and asked; every requirement is pinned."""
    for name in {system.peer for system in SYSTEMS}:
        assert (HERE / f"drive_{name}.py").exists()
        lines = (HERE / "requirements" / f"{name}.txt").read_text().splitlines()
        assert all("==" in line for line in lines if not line.startswith("#"))


# --- what needs the peers' environments ---


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files of updates."""
    return Inputs(tmp_path_factory.mktemp("inputs"))


def started(name: str) -> Peer:
    """The script of an installed peer."""
    if not (ENVIRONMENTS / name / ".ready").exists():
        pytest.skip(f"{name} is {NOT_INSTALLED}")
    return Peer(name)


ERRORS = {"flower": 1e-5, "nvflare": 1e-5, "fedbiomed": 2e-3, "declearn": 1e-6}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ERRORS))
def test_a_peer_is_driven_rightly(name, inputs):
    """Each system of a peer averages to within its own rounding, and what is claimed of it is what it does."""
    with started(name) as peer:
        for system in (each for each in SYSTEMS if each.peer == name):
            path = str(inputs.path(system.trial))
            result = peer.ask("round", path=path, **system.arguments(4))
            assert result["survived"]
            assert result["error"] < ERRORS[name]
            assert result["bytes"] > 8
            assert result["client"]["processor"] > 0 < result["server"]["processor"]
            figures = {figure.name: figure for figure in compare.protection(system, peer, inputs)}
            survives = {each for each in (BEFORE, AFTER) if figures[each].text == compare.SURVIVES}
            assert survives == ({AFTER} if name in ("flower", "nvflare") else set())
            for each in system.tried:
                (value,) = figures[each].values
                assert value in (32, 28) if each.startswith("bits") else value < 2e-3


@pytest.mark.slow
def test_flowers_functions_are_those_of_its_mod(inputs):
    """The functions alone send as many bytes as the mod does, in less time."""
    with started("flower") as peer:
        alone = peer.ask("functions", path=str(inputs.path(100_000)), neighbours=7)
        threshold = {"sites": 8, "threshold": 6, "silent": {}}
        whole = peer.ask("round", path=str(inputs.path(100_000)), **threshold)
        assert alone["bytes"] == pytest.approx(whole["bytes"], rel=0.01)
        assert alone["client"]["processor"] < whole["client"]["processor"]
        shared = peer.ask("secrets", holders=10, threshold=7)
        assert shared["share"]["processor"] > 0 < shared["reconstruct"]["processor"]


def test_the_scripts_compile():
    """Scripts whose packages are not here are Python at least."""
    for script in sorted(HERE.glob("drive_*.py")):
        done = subprocess.run([sys.executable, "-m", "py_compile", script], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()


def test_an_answer_is_one_line(tmp_path):
    """The script's side answers each line of its input with a line of JSON, and ends with its input."""
    script = tmp_path / "script.py"
    script.write_text(MADE_UP)
    questions = "".join(json.dumps({"command": "round", "path": "", "sites": 1}) + "\n" for _ in range(2))
    done = subprocess.run([sys.executable, script], input=questions, capture_output=True, text=True, check=True)
    replies = [json.loads(line) for line in done.stdout.splitlines()[1:]]
    assert [set(each) for each in replies] == [{"not"}, {"ready"}, {"answer"}, {"answer"}]
    assert "noise" in done.stderr


def test_tables_show_each_system_beside_ours():
    """A system that was measured has a row with ours beside it, one that was not the reason; aims are listed."""
    flower = {"system": "Flower SecAgg+", "sites": 16, "values": 100}
    ours = {**flower, "system": "ours masked beside Flower SecAgg+"}
    measured = [
        Figure(name, [value], "s", at=at)
        for name in ("client", "bytes up per parameter", "largest error of the mean")
        for value, at in ((8.0, flower), (2.0, ours))
    ]
    figures = [
        *measured,
        Figure("client / ours", [4.0], wanted=">= 8", at=flower),
        Figure("server / ours", [3.0], at=flower),
        Figure("not measured", text="not installed; make bench-peers", at={"system": "NVFlare HE"}),
    ]
    costs, aims, _ = compare.tables(Record("peers", "", figures, full=True))
    rows = {row[0]: list(row[1:]) for row in costs.rows}
    pair = "8.00 (2.00)"
    assert rows["Flower SecAgg+"] == ["16 x 100", pair, "4.00", "3.00", pair, pair]
    assert rows["NVFlare HE"][0] == "not installed; make bench-peers"
    assert [row[-1] for row in aims.rows] == [">= 8: missed"]
