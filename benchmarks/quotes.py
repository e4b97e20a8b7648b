"""Figures that documents quote from the committed results, which `python -m benchmarks quote` brings up to date.

A quoted figure is a link whose title says which figure of the JSON it is:

    [6.5](../benchmarks/results/peers.json "Flower / ours, client")                             its median
    [6.1 to 7.0](../benchmarks/results/peers.json "Flower / ours, client")                      least and most
    [25 ms](results/round.json "wall time @ system=masked, sites=8")                            one measured at these
    [0.934 ± 0.005](../benchmarks/results/xray-private.json "columns/shared/AUC")               a path into other JSON

It keeps the unit and the decimals that it is written with.  Between ``<!-- figures: NAME -->`` and
``<!-- end of figures -->`` stand the tables of ``results/NAME.json``; where NAME is ``aims``, all figures that have a
bound.
"""

import json
import re
from importlib import import_module
from pathlib import Path

from benchmarks.record import RESULTS, ROOT, Grid, Record, load, of_content

QUOTED = re.compile(r'\[([^\]]+)\]\(([^)\s]+\.json) "([^"]+)"\)')
TABLE = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
AIMS = "aims"
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_FACTORS = {
    ("s", "ms"): 1e3,
    ("s", "minutes"): 1 / 60,
    ("B", "KB"): 1e-3,
    ("B", "MB"): 1e-6,
    ("B", "GB"): 1e-9,
    ("", "%"): 100.0,
    ("", "MiB"): 2.0**-20,  # of bytes in other JSON
}


def documents() -> list[Path]:
    """Where figures are quoted."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def updated(text: str, folder: Path) -> str:
    """``text`` of a document in ``folder`` with all quoted figures and tables as the results have them.

    Raises KeyError for a figure that the results do not have, and ValueError for a quotation that says nothing."""

    def quotation(match: re.Match[str]) -> str:
        words, link, name = match.groups()
        return f'[{_quoted(words, folder / link, name)}]({link} "{name}")'

    def table(match: re.Match[str]) -> str:
        made = [aims()] if match[2] == AIMS else grids(load(RESULTS / f"{match[2]}.json"))
        return match[1] + "\n".join(grid.markdown() for grid in made) + match[3]

    return QUOTED.sub(quotation, TABLE.sub(table, text))


def aims() -> Grid:
    """Every figure of the committed records that a bound is set for, and whether it is met."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        if "benchmark" in content:
            record = of_content(content)
            rows += [[record.benchmark, *row] for row in record.aims().rows]
    return Grid("Aims", ["benchmark", "figure", "median", "least to most", "wanted"], rows)


def grids(record: Record) -> list[Grid]:
    """The tables of a record: those that its benchmark makes, or one of all its figures."""
    module = import_module(f"benchmarks.{record.benchmark}")
    made: list[Grid] = module.tables(record) if hasattr(module, "tables") else [record.grid()]
    return made


def _quoted(words: str, path: Path, name: str) -> str:
    """``words`` with its numbers as the figure has them."""
    values, unit = _figure(path, name, words)
    written = re.sub(r"[\d.,±\s]|\bto\b", "", words)
    factor = _FACTORS.get((unit, written), 1.0)
    numbers = iter(values)
    if len(_NUMBER.findall(words)) != len(values):
        raise ValueError(f"{words!r}: expected {len(values)} numbers for {name!r}")

    def number(match: re.Match[str]) -> str:
        decimals = len(match[0].partition(".")[2])
        return f"{next(numbers) * factor:,.{decimals}f}"

    return _NUMBER.sub(number, words)


def _figure(path: Path, name: str, words: str) -> tuple[list[float], str]:
    """The numbers of a figure that ``words`` have room for, and their unit."""
    content = json.loads(path.read_text())
    if "figures" not in content:
        for key in name.split("/"):
            content = content[int(key)] if isinstance(content, list) else content[key]
        if isinstance(content, dict):
            return [content["mean"], content["sd"]][: 2 if "±" in words else 1], ""
        return [float(content)], ""
    name, _, where = name.partition(" @ ")
    wanted = dict(each.split("=") for each in where.split(", ")) if where else {}
    figure = of_content(content).of(name, **wanted)
    if not figure.values:
        raise KeyError(f"{path.name}: found the figure {name!r} at {where!r} without a value, expected one")
    if " to " in words:
        return [min(figure.values), max(figure.values)], figure.unit
    if "±" in words:
        return [figure.mean, figure.deviation], figure.unit
    return [figure.median], figure.unit
