"""Small pictures for reports, as SVG text: no plotting library, no network, readable in any browser."""

import math
from collections.abc import Sequence
from html import escape
from typing import Final

_WIDTH: Final = 640
_HEIGHT: Final = 360
_LEFT: Final = 64
_RIGHT: Final = 24
_TOP: Final = 48
_BOTTOM: Final = 52


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
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="14">{escape(title)}</text>',
    ]
    for value in _ticks(highest):
        parts += [
            _line(_LEFT, y(value), _WIDTH - _RIGHT, y(value), "#dddddd"),
            f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>',
        ]
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
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">rounds</text>',
        f'<text x="16" y="{(_TOP + _HEIGHT - _BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(_TOP + _HEIGHT - _BOTTOM) / 2})">epsilon</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {extra}/>'


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to at most ``highest``, some five of them."""
    power = 10.0 ** math.floor(math.log10(highest / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= highest / 6)
    return [number * step for number in range(int(highest / step) + 1)]
