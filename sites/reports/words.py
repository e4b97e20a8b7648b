"""Numbers as the page writes them."""

import math
from collections.abc import Sequence


def epsilon(value: float | None) -> str:
    """Four digits; never an infinity."""
    if value is None:
        return "not recorded"
    return f"{value:.4g}" if math.isfinite(value) else "no bound"


def decimal(value: float) -> str:
    """A delta, without an exponent as long as somebody can count the zeros."""
    return f"{value:.8f}".rstrip("0") if 1e-6 <= value < 1 and value == round(value, 8) else f"{value:.2g}"


def percent(share: float) -> str:
    """A share of 1, rounded up to a tenth of a percent, so that what is printed holds."""
    tenths = math.ceil(1000 * share - 1e-9)
    number = "100" if share >= 1 else "almost 100" if tenths >= 1000 else f"{tenths / 10:g}"
    return f"{number}\N{NO-BREAK SPACE}%"


def span(values: Sequence[float]) -> str:
    """The least and the largest of some values."""
    low, high = (f"{value:.4g}" for value in values)
    return low if low == high else f"{low} to {high}"


def when(text: str) -> str:
    """A row's time to the minute; whatever is not one is shown as it is."""
    return f"{text[:10]} {text[11:16]}" if len(text) == len("2026-01-01T00:00:00Z") and text[10:11] == "T" else text


def count(number: int, name: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {name}{'' if number == 1 else 's'}"
