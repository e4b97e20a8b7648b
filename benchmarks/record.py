"""What a benchmark has measured: every repetition, on which machine and with which versions; as a table and as JSON."""

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = RESULTS / "quick"  # not committed: quick runs are for a look
PACKAGES = ("cryptography", "matplotlib", "numpy", "opacus", "pyzmq", "tenseal", "torch")

Where = str | int | float


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity: ``values`` of all repetitions, in ``unit``; or a ``text`` where there is no number.

    ``wanted``: a bound for the median, such as ">= 8"; ``at``: what it was measured at (system, sites, length, ...).
    """

    name: str
    values: Sequence[float] = ()
    unit: str = ""
    wanted: str = ""
    at: Mapping[str, Where] = field(default_factory=dict)
    text: str = ""

    @property
    def median(self) -> float:
        """Of all repetitions."""
        return statistics.median(self.values)

    @property
    def mean(self) -> float:
        """Of all repetitions."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The standard deviation of the repetitions, which are a sample."""
        return statistics.stdev(self.values)

    @property
    def label(self) -> str:
        """Its name and what it was measured at."""
        where = ", ".join(
            f"{value:,} {name}" if isinstance(value, int) else f"{value}" for name, value in self.at.items()
        )
        return f"{self.name} ({where})" if where else self.name

    @property
    def met(self) -> bool | None:
        """Whether the median is as wanted, None where nothing is."""
        if not self.wanted or not self.values:
            return None
        relation, bound = self.wanted.split()
        return self.median >= float(bound) if relation == ">=" else self.median <= float(bound)

    def as_json(self) -> dict[str, object]:
        """The repetitions and what they come to."""
        known = {"name": self.name, "unit": self.unit, "at": dict(self.at), "wanted": self.wanted, "text": self.text}
        result: dict[str, object] = {name: value for name, value in known.items() if value}
        if self.values:
            result |= {"median": self.median, "least": min(self.values), "most": max(self.values)}
            result |= {"values": list(self.values)}
        if self.met is not None:
            result["met"] = self.met
        return result


@dataclass(frozen=True, slots=True)
class Record:
    """All figures of one run of one benchmark."""

    benchmark: str
    title: str
    figures: Sequence[Figure]
    full: bool

    def of(self, name: str, **at: Where) -> Figure:
        """The figure of this name, measured at ``at``, numbers or their texts; KeyError for none or more than one."""
        found = [
            each
            for each in self.figures
            if each.name == name and all(str(each.at.get(key)) == str(value) for key, value in at.items())
        ]
        if len(found) != 1:
            raise KeyError(f"{self.benchmark}: found {len(found)} figures {name!r} at {at}, expected one")
        return found[0]

    def write(self, folder: Path | None = None) -> Path:
        """Write ``NAME.json`` into ``folder``: by default the committed results, or for a quick run those of a look."""
        folder = folder or (RESULTS if self.full else QUICK_RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": self.benchmark,
            "title": self.title,
            "run": "full" if self.full else "quick",
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "figures": [each.as_json() for each in self.figures],
        }
        path = folder / f"{self.benchmark}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    def aims(self) -> "Grid":
        """The figures that have a bound."""
        return replace(self, title="What was wanted", figures=[each for each in self.figures if each.wanted]).grid()

    def grid(self) -> "Grid":
        """All figures: medians and spread (least to most)."""
        rows = []
        for each in self.figures:
            if not each.values:
                rows.append([each.label, each.text, "", ""])
                continue
            spread = f"{shown(min(each.values))} to {shown(max(each.values))}" if len(each.values) > 1 else ""
            # A quick run's vectors are short: there it shows what a round costs at all.
            met = each.met if self.full else None
            verdict = {None: "", True: f"{each.wanted}: met", False: f"{each.wanted}: missed"}[met]
            rows.append([each.label, f"{shown(each.median)} {each.unit}".strip(), spread, verdict])
        return Grid(self.title, ["figure", "median", "least to most", "wanted"], rows)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts, for a terminal or a document."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def print(self, console: Console) -> None:
        """In a terminal."""
        table = Table(title=self.title, title_justify="left")
        for heading in self.headings:
            table.add_column(heading)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        """In a document."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def across(title: str, figures: Sequence[Figure], key: str) -> Grid:
    """The medians of ``figures``: a row for each name, a column for each value of ``key`` that they are measured at."""
    columns = list(dict.fromkeys(str(each.at[key]) for each in figures))
    rows: dict[str, dict[str, str]] = {}
    for each in figures:
        name = f"{each.name}, {each.unit}" if each.unit else each.name
        rows.setdefault(name, {})[str(each.at[key])] = shown(each.median)
    return Grid(title, ["", *columns], [[name, *(row.get(each, "") for each in columns)] for name, row in rows.items()])


def load(path: Path) -> Record:
    """A record that ``write`` wrote."""
    return of_content(json.loads(path.read_text()))


def of_content(content: Mapping[str, Any]) -> Record:
    """A record, of its JSON."""
    figures = [
        Figure(**{name: each[name] for name in ("name", "values", "unit", "wanted", "at", "text") if name in each})
        for each in content["figures"]
    ]
    return Record(content["benchmark"], content["title"], figures, content["run"] == "full")


def shown(value: float) -> str:
    """Three significant digits, without an exponent from a thousandth to a billion."""
    if value == 0 or not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def ratios(numerators: Iterable[float], denominators: Iterable[float]) -> list[float]:
    """Of what was measured in the same turn."""
    return [one / other for one, other in zip(numerators, denominators, strict=True)]


def commit() -> str:
    """The commit of this tree, with a "+" if something was changed since; "unknown" outside a checkout."""
    try:
        ran = [
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S607
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "*.py"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return ran[0] + ("+" if ran[1] else "")


def machine() -> dict[str, object]:
    """What was measured on: processor, cores this process may use, memory in GB, load at the end, system."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    flags = set(found.get("flags", "").split())
    return {
        "processor": re.sub(r"\s+", " ", found.get("model name", platform.processor() or "unknown")),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": sorted(flags & {"aes", "vaes", "avx2", "avx512f", "sha_ni"}),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "load": [round(value, 2) for value in os.getloadavg()],
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on, where installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
