"""Pictures for reports."""

from xml.etree import ElementTree as ET

import pytest

from sites.plots import epsilon_plot

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
