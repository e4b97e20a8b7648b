"""Pictures for reports."""

import math
from collections.abc import Iterator
from xml.etree import ElementTree as ET

import pytest

from sites.plots import Mark, accountants_plot, comparison_plot, composition_plot, epsilon_plot, releases_plot

SVG = "{http://www.w3.org/2000/svg}"


def drawn(**changes: object) -> ET.Element:
    """The picture's XML."""
    values: dict[str, object] = {"spent": 0.25, "budget": 1.0, "title": "Epsilon", **changes}
    return ET.fromstring(epsilon_plot(values.pop("after_round", [0.5, 0.75, 1.0]), **values))  # type: ignore[arg-type]  # noqa: S314


def test_the_curve_goes_through_each_round() -> None:
    """The curve starts at what is spent and has a corner per round, higher for a higher epsilon, up to the budget."""
    picture = drawn()
    (curve,) = picture.iter(f"{SVG}polyline")
    corners = [tuple(map(float, corner.split(","))) for corner in curve.attrib["points"].split()]
    assert len(corners) == 4
    across = [x for x, _ in corners]
    up = [y for _, y in corners]
    assert across == sorted(set(across))
    assert up == sorted(set(up), reverse=True)
    assert up[0] - up[1] == pytest.approx(up[2] - up[3], abs=0.2)
    (budget,) = (line for line in picture.iter(f"{SVG}line") if "stroke-dasharray" in line.attrib)
    assert float(budget.attrib["y1"]) == up[-1]


@pytest.mark.parametrize("budget", [1e-3, 0.7, 3.0, 250.0])
@pytest.mark.parametrize("rounds", [1, 2, 7, 1000])
def test_everything_is_inside_and_has_ticks(budget: float, rounds: int) -> None:
    """Whatever the scale, all points lie in the picture, and both axes have some labels."""
    picture = drawn(after_round=[budget * number / rounds for number in range(1, rounds + 1)], budget=budget, spent=0.0)
    width, height = (float(picture.attrib[name]) for name in ("width", "height"))
    (curve,) = picture.iter(f"{SVG}polyline")
    for corner in curve.attrib["points"].split():
        x, y = map(float, corner.split(","))
        assert 0 < x < width
        assert 0 < y < height
    labels = [text.text for text in picture.iter(f"{SVG}text")]
    assert 6 <= len(labels) <= 25
    assert f"budget {budget:g}" in labels


def test_a_title_is_text() -> None:
    """Signs that mean something in XML stay text."""
    (title,) = drawn(title="a < b & c").iter(f"{SVG}title")
    assert title.text == "a < b & c"


def mark(cumulative: float, *, epsilon: float = 0.5, budget: float | None = 1.0, refused: bool = False) -> Mark:
    """One release of a picture."""
    return Mark(epsilon=epsilon, cumulative=cumulative, budget=budget, refused=refused)


def points(picture: ET.Element) -> Iterator[tuple[float, float]]:
    """Every point of every line and bar."""
    for curve in [*picture.iter(f"{SVG}polyline"), *picture.iter(f"{SVG}polygon")]:
        for corner in curve.attrib["points"].split():
            x, y = map(float, corner.split(","))
            yield x, y
    for bar in picture.iter(f"{SVG}rect"):
        x, y, wide, high = (float(bar.attrib[name]) for name in ("x", "y", "width", "height"))
        assert wide >= 0
        assert high >= 0
        yield from ((x, y), (x + wide, y + high))
    for text in picture.iter(f"{SVG}text"):
        yield float(text.attrib["x"]), float(text.attrib["y"])


MARKS = {
    "none": [],
    "one": [mark(0.9)],
    "five hundred": [mark(number / 500, epsilon=0.1) for number in range(1, 501)],
    "refused alone": [mark(7.0, refused=True)],
    "far too much": [mark(0.5), mark(1e9, epsilon=1e9, refused=True)],
    "no bound": [mark(0.5), mark(math.inf, epsilon=math.inf), mark(math.inf)],
    "no budget": [mark(0.5, budget=None), mark(0.7, budget=None)],
    "boundless": [mark(math.inf, epsilon=math.inf, budget=math.inf)],
    "nothing spent": [mark(0.0, epsilon=0.0, budget=None)],
    "tiny": [mark(1e-12, epsilon=1e-12, budget=1e-11)],
}


@pytest.mark.parametrize("marks", MARKS.values(), ids=MARKS)
def test_everything_is_inside(marks: list[Mark]) -> None:
    """Whatever is drawn, all of it lies in the picture, at finite places, and no label is a number that is none."""
    for svg in (
        composition_plot(marks, title="a & b"),
        releases_plot(marks, title="a & b"),
        accountants_plot([("RDP", mark.cumulative) for mark in marks[-3:]], budget=math.inf, title="a & b"),
        accountants_plot([("RDP", mark.cumulative) for mark in marks[-3:]], budget=0.7, title="a & b"),
    ):
        picture = ET.fromstring(svg)  # noqa: S314
        width, height = (float(picture.attrib[name]) for name in ("width", "height"))
        for x, y in points(picture):
            assert 0 <= x <= width
            assert 0 <= y <= height
        assert picture.findtext(f"{SVG}title") == "a & b"
        assert picture.attrib["role"] == "img"
        assert "nan" not in svg
        assert ">inf" not in svg


def test_the_curve_steps_up_at_each_release_and_not_at_refused_ones() -> None:
    """The level over each release's band is its cumulative epsilon; a refused one leaves it, and has a cross."""
    picture = ET.fromstring(composition_plot([mark(0.25), mark(0.9, refused=True), mark(0.5)], title="x"))  # noqa: S314
    spent, limit = picture.iter(f"{SVG}polyline")
    levels = [float(corner.split(",")[1]) for corner in spent.attrib["points"].split()]
    bottom, top = levels[0], float(limit.attrib["points"].split(",")[1].split()[0])
    assert [round((bottom - level) / (bottom - top), 2) for level in levels] == [0, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5]
    assert len(list(picture.iter(f"{SVG}path"))) == 1


def test_a_budget_that_changes_is_drawn_as_it_was() -> None:
    """The budget's line steps where the budget did, with both labels."""
    picture = ET.fromstring(composition_plot([mark(0.2), mark(0.3, budget=0.5)], title="x"))  # noqa: S314
    _, limit = picture.iter(f"{SVG}polyline")
    assert len({corner.split(",")[1] for corner in limit.attrib["points"].split()}) == 2
    assert {"budget 1", "budget 0.5"} <= {text.text for text in picture.iter(f"{SVG}text")}


def test_bars_are_as_long_as_their_numbers() -> None:
    """Bars are proportional to epsilon; refused ones are hollow, and an accountant without a figure has none."""
    bars = ET.fromstring(  # noqa: S314
        releases_plot([mark(1, epsilon=0.4), mark(1, epsilon=0.6, refused=True), mark(1, epsilon=0.2)], title="x")
    ).iter(f"{SVG}rect")
    heights, fills = zip(*((float(bar.attrib["height"]), bar.attrib["fill"]) for bar in bars), strict=True)
    assert heights == pytest.approx([2 * heights[2], 3 * heights[2], heights[2]], abs=0.3)
    assert fills == ("#1f5fa8", "none", "#1f5fa8")
    picture = ET.fromstring(  # noqa: S314
        accountants_plot([("RDP", 0.8), ("PRV", 0.4), ("PLD", math.inf)], budget=1.0, title="x")
    )
    rdp, prv = picture.iter(f"{SVG}rect")
    assert float(rdp.attrib["width"]) == pytest.approx(2 * float(prv.attrib["width"]), abs=0.2)
    labels = [text.text for text in picture.iter(f"{SVG}text")]
    assert labels == ["RDP", "0.8", "PRV", "0.4", "PLD", "not computed", "budget 1"]


def test_what_was_refused_does_not_dwarf_what_was_not() -> None:
    """A refused release that asked for a thousand times as much leaves the others readable."""
    marks = [mark(0.5), mark(900.0, epsilon=900.0, refused=True), mark(0.8)]
    for svg in (composition_plot(marks, title="x"), releases_plot(marks, title="x")):
        up = [text.text or "" for text in ET.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314
        assert max(float(text) for text in up if text.replace(".", "").isdigit()) <= 3


@pytest.mark.parametrize("scale", [1e-3, 0.02, 1.0, 400.0])
def test_a_comparison_shows_every_series_with_its_errors(scale: float) -> None:
    """Each series is a line with a point and an error bar of the right length for each place, higher for more; levels
    go across; all have their names, and everything lies in the picture."""
    series = {
        "one": [(0, 0.5 * scale, 0.01 * scale), (1, 0.7 * scale, 0.02 * scale), (2, 0.8 * scale, 0.0)],
        "<two>": [(1, 0.6 * scale, 0.04 * scale)],
    }
    text = comparison_plot(series, levels={"all": 0.9 * scale}, places=["a", "b", "c"], across="x", up="y", title="T")
    picture = ET.fromstring(text)  # noqa: S314
    words = [element.text for element in picture.iter(f"{SVG}text")]
    assert {"one", "<two>", "all", "a", "b", "c", "x", "y", "T"} <= set(words)
    circles = [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in picture.iter(f"{SVG}circle")]
    assert len(circles) == 4
    (ax, ay), (bx, by), (cx, cy), (_, two) = circles
    assert ax < bx < cx
    assert ay > two > by > cy
    unit = (ay - by) / 0.2
    assert (two - by) / unit == pytest.approx(0.1, abs=0.01)
    bars = [
        abs(float(line.attrib["y1"]) - float(line.attrib["y2"])) / unit
        for line in picture.iter(f"{SVG}line")
        if line.attrib.get("stroke-width") == "1.5"
    ]
    assert bars == pytest.approx([0.02, 0.04, 0.0, 0.08], abs=0.01)
    width, height = (float(picture.attrib[name]) for name in ("width", "height"))
    for line in picture.iter(f"{SVG}line"):
        assert all(0 <= float(line.attrib[x]) <= width for x in ("x1", "x2"))
        assert all(0 <= float(line.attrib[y]) <= height for y in ("y1", "y2"))


@pytest.mark.parametrize("value", [0.7, 1.0])
def test_a_comparison_of_equal_values_is_drawn(value: float) -> None:
    """Where all values are one number, the picture still has an axis."""
    picture = ET.fromstring(  # noqa: S314
        comparison_plot({"one": [(0, value, 0.0)]}, levels={}, places=["a"], across="x", up="y", title="T")
    )
    assert len(list(picture.iter(f"{SVG}circle"))) == 1
