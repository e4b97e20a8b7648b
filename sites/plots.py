"""Small pictures for reports, as SVG text: no plotting library, no network, readable in any browser."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH: Final = 640
_HEIGHT: Final = 360
_LEFT: Final = 64
_RIGHT: Final = 24
_TOP: Final = 48
_BOTTOM: Final = 52
# Of a page, where a picture may be as narrow as a telephone.
_NARROW: Final = 480
_LOW: Final = 264
_LEFT_NARROW: Final = 60
_RIGHT_NARROW: Final = 12
_TOP_NARROW: Final = 24
_BAR: Final = 4.0  # pixels from which on a bar stands by itself
# Dark enough on white to be told apart by whoever sees no red; line styles and shapes say it too.
_COLOURS: Final = ("#7a5195", "#b3261e", "#1f5fa8", "#0b7a75", "#c77700", "#444444", "#888888", "#c2478d")
_DASHES: Final = ("2 3", "none", "none", "8 3", "10 3 2 3", "none", "2 3")
_LEGEND: Final = 210
_SPENT: Final = "#1f5fa8"
_LIMIT: Final = "#b3261e"
_REFUSED_ABOVE: Final = 1.6  # of all else: how far up a refused release is drawn where it is, not at the top


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One release in a picture: its ``epsilon`` alone, the ``cumulative`` one with all before it (of a refused release:
    what was asked), and the ``budget`` at its time, if it is known.  Infinity is drawn at the top."""

    epsilon: float
    cumulative: float
    budget: float | None
    refused: bool


def epsilon_plot(after_round: Sequence[float], *, spent: float, budget: float, title: str) -> str:
    """SVG of epsilon before the first round (``spent``) and after each one, under the line of the ``budget``.

    All values are finite; there is at least one round.
    """
    values = [spent, *after_round]
    rounds = len(after_round)
    highest = 1.1 * max(budget, *values)

    def x(number: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * number / rounds

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / highest

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        *_heading(title),
    ]
    for value in _ticks(highest):
        parts += _level(_WIDTH - _RIGHT, y(value), f"{value:g}")
    parts += [
        f'<text x="{x(number):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{number:g}</text>'
        for number in _ticks(rounds)
        if number == int(number)
    ]
    corners = " ".join(f"{x(number):.1f},{y(value):.1f}" for number, value in enumerate(values))
    parts += [
        _line(_LEFT, y(0), _WIDTH - _RIGHT, y(0), "#444444"),
        _line(_LEFT, y(budget), _WIDTH - _RIGHT, y(budget), "#b3261e", 'stroke-dasharray="6 4"'),
        f'<text x="{_LEFT + 6}" y="{y(budget) - 6:.1f}" fill="#b3261e">budget {budget:g}</text>',
        f'<polyline points="{corners}" fill="none" stroke="#1f5fa8" stroke-width="2"/>',
        *_captions(_WIDTH - _RIGHT, "rounds", "epsilon"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def composition_plot(marks: Sequence[Mark], *, title: str) -> str:
    """SVG of epsilon over all releases, one step each, under the line of the budget; crosses for refused ones."""
    spent = [mark.cumulative for mark in marks if not mark.refused]
    known = [mark.budget for mark in marks if mark.budget is not None and math.isfinite(mark.budget)]
    refused = [mark.cumulative for mark in marks if mark.refused]
    chart = _Chart(len(marks), _highest([*spent, *known], refused), title)
    chart.axes("release No.", "epsilon, all together")
    corners, limits = [(0.0, 0.0)], known[:1]
    for number, mark in enumerate(marks):
        level = corners[-1][1] if mark.refused else mark.cumulative
        corners += [(number, level), (number + 1, level)]
        limits.append(mark.budget if mark.budget in known else limits[-1] if limits else math.inf)
    chart.area(corners)
    chart.polyline(corners, _SPENT)
    if known:
        chart.polyline([(n + end, limit) for n, limit in enumerate(limits[1:]) for end in (0, 1)], _LIMIT, "6 4")
        chart.label(0, limits[0], f"budget {limits[0]:.4g}", _LIMIT)
        if limits[-1] != limits[0]:
            chart.label(len(marks), limits[-1], f"budget {limits[-1]:.4g}", _LIMIT, end=True)
    for number, mark in enumerate(marks):
        if mark.refused:
            chart.cross(number + 0.5, mark.cumulative)
        elif not math.isfinite(mark.cumulative):
            chart.label(number + 0.5, math.inf, "no bound", _SPENT)
            break
    return chart.svg()


def releases_plot(marks: Sequence[Mark], *, title: str) -> str:
    """SVG of each release's epsilon alone, one bar each; those of refused ones are hollow."""
    refused = [mark.epsilon for mark in marks if mark.refused]
    chart = _Chart(len(marks), _highest([mark.epsilon for mark in marks if not mark.refused], refused), title)
    chart.axes("release No.", "epsilon, each alone")
    apart = chart.x(1) - chart.x(0) >= _BAR
    if not apart:  # so narrow that seams would show: one area instead
        levels = [0.0 if mark.refused else mark.epsilon for mark in marks]
        chart.area([(n + end, level) for n, level in enumerate(levels) for end in (0, 1)], opacity=1)
    for number, mark in enumerate(marks):
        if apart or mark.refused:
            chart.bar(number, mark.epsilon, hollow=mark.refused)
    if any(not math.isfinite(mark.epsilon) for mark in marks):
        chart.label(0, math.inf, "bars that end up here have no bound", _SPENT)
    return chart.svg()


def accountants_plot(epsilons: Sequence[tuple[str, float]], *, budget: float | None, title: str) -> str:
    """SVG of one horizontal bar per accountant, each with its name, and the line of the budget."""
    left, right, row, top = 60, 100, 30, 28
    height = top + row * len(epsilons) + 8
    limits = [] if budget is None or not math.isfinite(budget) else [budget]
    highest = 1.05 * max([*limits, *(value for _, value in epsilons if math.isfinite(value))], default=0.0) or 1.0

    def x(value: float) -> float:
        return left + (_NARROW - left - right) * min(value / highest, 1.0)

    parts = []
    for number, (name, value) in enumerate(epsilons):
        y = top + row * number
        parts.append(f'<text x="{left - 8}" y="{y + 18}" text-anchor="end">{escape(name)}</text>')
        if math.isfinite(value):
            parts.append(
                f'<rect x="{left}" y="{y + 5}" width="{x(value) - left:.1f}" height="{row - 10}" fill="{_SPENT}"/>'
            )
        shown = f"{value:.4g}" if math.isfinite(value) else "not computed"
        parts.append(f'<text x="{_NARROW - right + 8}" y="{y + 18}">{shown}</text>')
    parts.append(_line(left, top, left, height - 8, "#444444"))
    for limit in limits:
        parts += [
            _line(x(limit), top - 4, x(limit), height - 8, _LIMIT, 'stroke-width="2" stroke-dasharray="6 4"'),
            f'<text x="{x(limit):.1f}" y="{top - 10}" text-anchor="middle" fill="{_LIMIT}">budget {limit:.4g}</text>',
        ]
    return _svg(_NARROW, height, title, parts)


def comparison_plot(
    series: Mapping[str, Sequence[tuple[int, float, float]]],
    *,
    levels: Mapping[str, float],
    places: Sequence[str],
    across: str,
    up: str,
    title: str,
) -> str:
    """SVG of several ``series`` of (place, mean, standard error), each a line with error bars, over named ``places``;
    ``levels`` are dashed lines across.

    All values are finite; there is at least one place and one series.
    """
    ends = [mean + sign * error for points in series.values() for _, mean, error in points for sign in (-1, 1)]
    lowest, highest = min([*ends, *levels.values()]), max([*ends, *levels.values()])
    step = _step(highest - lowest or 1.0)
    lowest = step * math.floor(lowest / step)
    highest = max(step * math.ceil(highest / step), lowest + step)
    right, bottom = _WIDTH - _LEGEND, _HEIGHT - _BOTTOM

    def x(place: float) -> float:
        return _LEFT + (right - _LEFT) * (place + 0.5) / len(places)

    def y(value: float) -> float:
        return bottom - (bottom - _TOP) * (value - lowest) / (highest - lowest)

    parts = _heading(title)
    for number in range(round((highest - lowest) / step) + 1):
        value = lowest + number * step
        parts += _level(right, y(value), f"{value:.4g}")
    parts += [
        f'<text x="{x(place):.1f}" y="{bottom + 18}" text-anchor="middle">{escape(name)}</text>'
        for place, name in enumerate(places)
    ]
    parts += _captions(right, across, up)
    lines = [*series, *levels]
    for number, name in enumerate(lines):
        colour, dashes = _COLOURS[number % len(_COLOURS)], "6 4" if name in levels else _DASHES[number % len(_DASHES)]
        style = f'stroke-width="2" stroke-dasharray="{dashes}"'
        top = _TOP + 18 * number
        parts += [
            _line(right + 12, top, right + 36, top, colour, style),
            f'<text x="{right + 42}" y="{top + 4}">{escape(name)}</text>',
        ]
        if name in levels:
            parts.append(_line(_LEFT, y(levels[name]), right, y(levels[name]), colour, style))
            continue
        # Beside each other, so that error bars can be told apart.
        shift = 0.05 * (number - (len(series) - 1) / 2)
        points = [(x(place + shift), mean, error) for place, mean, error in series[name]]
        corners = " ".join(f"{at:.1f},{y(mean):.1f}" for at, mean, _ in points)
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" {style}/>')
        for at, mean, error in points:
            parts.append(_line(at, y(mean - error), at, y(mean + error), colour, 'stroke-width="1.5"'))
            parts.append(f'<circle cx="{at:.1f}" cy="{y(mean):.1f}" r="3" fill="{colour}"/>')
    return _svg(_WIDTH, _HEIGHT, title, parts)


class _Chart:
    """Axes for ``count`` releases, each a band of its own, and epsilon from 0 to ``highest``."""

    def __init__(self, count: int, highest: float, title: str) -> None:
        self._count = max(count, 1)
        self._highest = highest if highest > 0 else 1.0
        self._title = title
        self._parts: list[str] = []

    def x(self, number: float) -> float:
        return _LEFT_NARROW + (_NARROW - _LEFT_NARROW - _RIGHT_NARROW) * number / self._count

    def y(self, value: float) -> float:
        bottom = _LOW - _BOTTOM
        return bottom - (bottom - _TOP_NARROW) * min(value / self._highest, 1.0)

    def axes(self, across: str, up: str) -> None:
        for value in _ticks(self._highest):
            self._parts += [
                _line(self.x(0), self.y(value), self.x(self._count), self.y(value), "#dddddd"),
                f'<text x="{self.x(0) - 8:.1f}" y="{self.y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>',
            ]
        every = max(1, int(_ticks(self._count)[1]))
        numbers = {1, self._count, *range(every, self._count, every)}
        # None so near to the first or the last that they would overlap.
        numbers -= {n for n in numbers if 0 < n - 1 < every / 2 or 0 < self._count - n < every / 2}
        self._parts += [
            f'<text x="{self.x(number - 0.5):.1f}" y="{_LOW - _BOTTOM + 18}" text-anchor="middle">{number}</text>'
            for number in sorted(numbers)
        ]
        middle = (_TOP_NARROW + _LOW - _BOTTOM) / 2
        self._parts += [
            _line(self.x(0), self.y(0), self.x(self._count), self.y(0), "#444444"),
            f'<text x="{self.x(self._count / 2):.1f}" y="{_LOW - 12}" text-anchor="middle">{across}</text>',
            f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{up}</text>',
        ]

    def polyline(self, corners: Sequence[tuple[float, float]], colour: str, dashes: str = "none") -> None:
        self._parts.append(
            f'<polyline points="{self._points(corners)}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dashes}"/>'
        )

    def area(self, corners: Sequence[tuple[float, float]], *, opacity: float = 0.1) -> None:
        closed = [(0.0, 0.0), *corners, (corners[-1][0], 0.0)]
        self._parts.append(f'<polygon points="{self._points(closed)}" fill="{_SPENT}" fill-opacity="{opacity}"/>')

    def bar(self, number: int, value: float, *, hollow: bool) -> None:
        wide = self.x(1) - self.x(0)
        paint = f'fill="none" stroke="{_LIMIT}"' if hollow else f'fill="{_SPENT}"'
        self._parts.append(
            f'<rect x="{self.x(number + 0.1):.2f}" y="{self.y(value):.1f}" width="{0.8 * wide:.2f}" '
            f'height="{self.y(0) - self.y(value):.1f}" {paint}/>'
        )

    def cross(self, number: float, value: float) -> None:
        x, y = self.x(number), self.y(value)
        self._parts.append(
            f'<path d="M{x - 4:.1f} {y - 4:.1f} l8 8 m0 -8 l-8 8" fill="none" stroke="{_LIMIT}" stroke-width="2"/>'
        )

    def label(self, number: float, value: float, text: str, colour: str, *, end: bool = False) -> None:
        anchor, shift = ("end", -6) if end else ("start", 6)
        self._parts.append(
            f'<text x="{self.x(number) + shift:.1f}" y="{self.y(value) - 6:.1f}" text-anchor="{anchor}" '
            f'fill="{colour}">{text}</text>'
        )

    def svg(self) -> str:
        return _svg(_NARROW, _LOW, self._title, self._parts)

    def _points(self, corners: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(number):.1f},{self.y(value):.1f}" for number, value in corners)


def _highest(values: Sequence[float], refused: Sequence[float]) -> float:
    """The end of an axis for ``values``, and for what was refused unless that would dwarf them."""
    most = max((value for value in values if math.isfinite(value)), default=0.0)
    asked = max((value for value in refused if math.isfinite(value)), default=0.0)
    return 1.15 * (max(most, min(asked, _REFUSED_ABOVE * most)) if most > 0 else asked)


def _heading(title: str) -> list[str]:
    """A large picture's ground and title."""
    return [
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="14">{escape(title)}</text>',
    ]


def _level(right: float, y: float, text: str) -> list[str]:
    """A large picture's line at one value, and the value."""
    return [
        _line(_LEFT, y, right, y, "#dddddd"),
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>',
    ]


def _captions(right: float, across: str, up: str) -> list[str]:
    """What a large picture's axes show."""
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return [
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(across)}</text>',
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(up)}</text>',
    ]


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A picture for a page, which has its caption beside it; the title is for whoever cannot see it."""
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            *parts,
            "</svg>\n",
        )
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {extra}/>'


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to at most ``highest``, some five of them."""
    step = _step(highest)
    return [number * step for number in range(int(highest / step) + 1)]


def _step(length: float) -> float:
    """A round number of which some five make up ``length``."""
    power = 10.0 ** math.floor(math.log10(length / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= length / 6)
