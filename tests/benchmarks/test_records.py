"""What is measured is written whole, and what documents quote of it is what was written."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks import quotes, record, utility
from benchmarks.quotes import documents, updated
from benchmarks.record import Figure, Record, load, shown
from benchmarks.turns import by_turns

FIGURES = [
    Figure("time", [3.0, 1.0, 2.0], "s", wanted="<= 2", at={"system": "masked", "sites": 8}),
    Figure("time", [5.0, 4.0, 6.0], "s", wanted="<= 2", at={"system": "plain", "sites": 8}),
    Figure("share", [0.25]),
    Figure("dropouts", text="fails: the round ends"),
]
QUOTED = (
    '[2.0 s](results/noise.json "time @ system=masked, sites=8"), [1 to 3](results/noise.json "time @ system=masked"), '
    '[2000 ms](results/noise.json "time @ system=masked"), [2.00 ± 1.00 s](results/noise.json "time @ system=masked"), '
    '[25 %](results/noise.json "share")'
).replace("2000", "2,000")


@pytest.fixture
def some(tmp_path):
    """A record, and the folder that has its JSON in ``results``."""
    made = Record("noise", "Some figures", FIGURES, full=True)
    made.write(tmp_path / "results")
    return made


def test_every_repetition_is_written(some, tmp_path):
    """The JSON has all repetitions, where and on what they were measured; reading it gives the record again."""
    path = tmp_path / "results" / "noise.json"
    content = json.loads(path.read_text())
    first = content["figures"][0]
    assert (first["values"], first["median"], first["least"], first["most"]) == ([3.0, 1.0, 2.0], 2.0, 1.0, 3.0)
    assert first["met"] is True
    assert content["figures"][1]["met"] is False
    assert "met" not in content["figures"][2]
    assert content["machine"]["cores"] >= 1
    assert content["versions"]["numpy"]
    assert content["commit"]
    assert load(path) == some


def test_quick_runs_do_not_touch_the_committed_results(monkeypatch, tmp_path):
    """Without --full, what is written is not what documents quote."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "QUICK_RESULTS", tmp_path / "quick")
    assert Record("noise", "", FIGURES, full=False).write() == tmp_path / "quick" / "noise.json"
    assert Record("noise", "", FIGURES, full=True).write() == tmp_path / "noise.json"


def test_table_says_what_was_missed(some):
    """A bound that the median does not meet is said to be missed; where there is no number the reason stands."""
    console = Console(file=io.StringIO(), width=160)
    some.grid().print(console)
    printed = console.file.getvalue()
    assert re.search(r"time \(masked, 8 sites\).*2\.00 s.*1\.00 to 3\.00.*<= 2: met", printed)
    assert re.search(r"time \(plain, 8 sites\).*<= 2: missed", printed)
    assert "fails: the round ends" in printed


def test_bounds_are_asked_of_full_runs_only(some):
    """A quick run's table says neither met nor missed; aims are the figures that have a bound."""
    assert [row[-1] for row in some.grid().rows] == ["<= 2: met", "<= 2: missed", "", ""]
    assert [row[-1] for row in replace(some, full=False).grid().rows] == [""] * 4
    assert [row[0] for row in some.aims().rows] == ["time (masked, 8 sites)", "time (plain, 8 sites)"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.0, "1.00"), (0.01234, "0.0123"), (123.4, "123"), (12345.6, "12,346"), (3e-9, "3e-09"), (100, "100")],
)
def test_shown(value, text):
    """Three significant digits."""
    assert shown(value) == text


def test_of_wants_one_figure(some):
    """A figure is found by its name and what it was measured at, and two are none."""
    assert some.of("time", system="plain").median == 5.0
    with pytest.raises(KeyError, match="found 2 figures 'time'"):
        some.of("time", sites=8)


def test_turns_go_round():
    """Functions are called by turns, and the first turn is not counted."""
    calls = []
    ticks = iter(range(100))
    times = by_turns(
        2, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, clock=lambda: float(next(ticks))
    )
    assert calls == ["a", "b"] * 3
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_quoted_figures(some, tmp_path):
    """Median, least and most, mean and deviation, other units: what is right stays, and what is not is put right."""
    assert updated(QUOTED, tmp_path) == QUOTED
    wrong = re.sub(r"\[(\S+)", lambda match: "[" + re.sub(r"\d", "7", match[1]), QUOTED)
    assert wrong != QUOTED
    assert updated(wrong, tmp_path) == QUOTED


def test_paths_into_other_json(tmp_path):
    """Results that are no record are quoted by the way to a number, or to a mean and a deviation."""
    (tmp_path / "old.json").write_text(json.dumps({"runs": [{"AUC": {"mean": 0.93412, "sd": 0.0049}, "rounds": 12}]}))
    text = '[0.934 ± 0.005](old.json "runs/0/AUC") [0.93](old.json "runs/0/AUC") [12](old.json "runs/0/rounds")'
    assert updated(text, tmp_path) == text


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('[1](results/noise.json "nothing")', KeyError),
        ('[1](results/noise.json "time")', KeyError),
        ('[1](results/noise.json "dropouts")', KeyError),
        ('[1 and 2](results/noise.json "share")', ValueError),
        ('[none](results/noise.json "share")', ValueError),
    ],
)
def test_a_figure_that_is_not_there(some, tmp_path, text, error):
    """What the results do not have cannot be quoted."""
    with pytest.raises(error):
        updated(text, tmp_path)


def test_tables_are_made_of_the_results(some, tmp_path, monkeypatch):
    """Between the marks stands the table of the record, whatever stood there before."""
    monkeypatch.setattr(quotes, "RESULTS", tmp_path / "results")
    text = updated("<!-- figures: noise -->\nold\n<!-- end of figures -->\n", tmp_path)
    assert "| time (plain, 8 sites) | 5.00 s | 4.00 to 6.00 | <= 2: missed |" in text
    assert "old" not in text


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_documents_quote_the_results(path):
    """Every figure that a document quotes is that of the committed results."""
    assert updated(path.read_text(), path.parent) == path.read_text()


@pytest.mark.parametrize("data", ["heart", "xray"])
def test_tables_of_quality_are_those_of_the_results(data):
    """Every cell of docs/utility.md is what the JSON of its section comes to."""
    report = json.loads((record.RESULTS / f"utility-{data}.json").read_text())
    section = next(
        part
        for part in (record.ROOT / "docs" / "utility.md").read_text().split("\n## ")
        if f"utility-{data}.json" in part
    )
    compared = 0
    for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        heading, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        for name, *cells in rows:
            metric = heading[0].removesuffix(", epsilon")
            if heading[0] == "difference, measure":
                pair, metric = name.rsplit(", ", 1)
                found = {row[0]: row for row in utility.differences(report, *pair.split(" - "), metric)}
                expected = [f"{found[key][1]:+.3f} ({found[key][3]:+.1f})" for key in heading[1:]]
            elif metric in utility.METRICS:
                epsilon = None if name == "none" else float(name)
                summaries = {each["column"]: each["summary"] for each in report["cells"] if each["epsilon"] == epsilon}
                expected = [
                    utility.text_of(summaries[column][metric]) if column in summaries else "" for column in heading[1:]
                ]
            else:
                continue
            assert cells == expected, (heading[0], name)
            compared += len(cells)
    assert compared > 100


def test_the_runs_of_chaos_are_those_of_the_results():
    """The table of docs/reliability.md has each run as the JSON does."""
    text = (record.ROOT / "docs" / "reliability.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| (masked|homomorphic)", line)]
    found = [[cell.strip() for cell in row] for row in rows]
    runs = json.loads((record.RESULTS / "chaos.json").read_text())["runs"]
    assert len(found) == len(runs) == 6
    for row, run in zip(found, runs, strict=True):
        tally = run["tally"]
        expected = [tally["rounds"], tally["released"], tally["interrupted"], tally["failed"]]
        assert [int(cell) for cell in row[2:6]] == expected
        assert [int(row[1]), int(row[9]), int(row[10])] == [run["seed"], run["restarts"], tally["models"]]
        assert int(row[12]) == round(run["seconds"])


_UNQUOTED = re.compile(
    r"```.*?```|<!-- figures: .*?<!-- end of figures -->|`[^`]*`|!?\[[^\]]*\]\([^)]*\)"  # code, tables, links
    # versions, licences, bounds
    r"|(?:Python|CC BY|Apache|Version|Flower|NVFlare|Fed-BioMed|DecLearn|epsilon|delta|at most)[ -][\d.]+",
    re.DOTALL,
)


@pytest.mark.parametrize("name", ["README.md", "docs/backends.md", "docs/benchmarks.md"])
def test_no_figure_without_its_result(name):
    """Whatever looks measured in these documents is quoted from the results."""
    prose = _UNQUOTED.sub(" ", (record.ROOT / name).read_text())
    assert re.findall(r"\d+\.\d+|[\d,]+ (?:m?s|MB|GB|GB/s|%|times|minutes)\b", prose) == []
