"""Plots of records, as SVG and PNG: one column of a paper wide, or both."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, NullFormatter

from benchmarks.record import Record, Where

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "font.size": 8,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "benchmarks",  # the same figures give the same file
}
FORMATS: dict[str, dict[str, object]] = {"svg": {"Date": None}, "png": {"Software": None}}

Draw = Callable[[Record], Iterator[tuple[str, Drawing]]]  # what the plots of a record are called, and each of them
ONE_COLUMN, TWO_COLUMNS = 3.5, 7.16  # inches
SYSTEM_COLOURS = {"masked": COLOURS[0], "masked, weighted": COLOURS[5], "homomorphic": COLOURS[1], "plain": COLOURS[2]}


def draw(record: Record, folder: Path) -> list[Path]:
    """Draw what there is to see of a record into ``folder``."""
    paths = []
    if record.benchmark in DRAWN:
        with mpl.rc_context(STYLE):
            for name, drawing in DRAWN[record.benchmark](record):
                for suffix, metadata in FORMATS.items():
                    paths.append(folder / f"{record.benchmark}-{name}.{suffix}")
                    drawing.savefig(paths[-1], metadata=metadata)
    return paths


# --- a round ---

# What is drawn as one: its colour, and the steps that it stands for.
STEPS = {
    "keys, shares, signatures": ("#F0E442", ("keys, shares", "sign, verify", "rebuild secrets")),
    "encode, decode": (COLOURS[4], ("encode", "decode")),
    "masks": (COLOURS[0], ("masks",)),
    "pack, unpack, add": (COLOURS[5], ("pack", "unpack, add")),
    "hash": (COLOURS[3], ("hash",)),
    "ciphertexts (BFV)": (COLOURS[1], ("ciphertexts (BFV)",)),
    "model": (COLOURS[2], ("model",)),
    "disk": ("#7A5195", ("spool", "state on disk")),
    "frames": ("#444444", ("frames",)),
    "encrypted socket": ("#888888", ("encrypted socket",)),
    "other": ("#D0D0D0", ("other",)),
}


def _where(record: Record) -> Drawing:
    """Where a round's processor time goes, as a stacked bar for each system's site and coordinator."""
    steps = [each for each in record.figures if each.name.startswith("step: ")]
    rows = list(dict.fromkeys((str(each.at["system"]), str(each.at["who"])) for each in steps))
    seconds = {
        row: {
            name: sum(
                each.median
                for each in steps
                if (each.at["system"], each.at["who"]) == row and each.name.removeprefix("step: ") in members
            )
            for name, (_, members) in STEPS.items()
        }
        for row in rows
    }
    drawing = Drawing(figsize=(TWO_COLUMNS, 1.3 + 0.3 * len(rows)))
    axes = drawing.subplots()
    ends = dict.fromkeys(rows, 0.0)
    for name, (colour, _) in STEPS.items():
        widths = [seconds[row][name] for row in rows]
        if max(widths) > 0.005 * max(sum(each.values()) for each in seconds.values()):
            lefts = [ends[row] for row in rows]
            axes.barh(range(len(rows)), widths, left=lefts, color=colour, edgecolor="white", linewidth=0.4, label=name)
        for row, width in zip(rows, widths, strict=True):
            ends[row] += max(0.0, width)
    axes.set_yticks(range(len(rows)), [f"{system}, {who}" for system, who in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("processor time of one round in s")
    drawing.legend(loc="outside lower center", ncols=5, fontsize=7)
    return drawing


def _bars(record: Record, quantities: dict[str, tuple[str, Sequence[str]]]) -> Drawing:
    """Panels side by side, each with the bars of all systems for each of some figures; whiskers: least to most."""
    systems = [name for name in SYSTEM_COLOURS if any(each.at.get("system") == name for each in record.figures)]
    drawing = Drawing(figsize=(TWO_COLUMNS, 2.2))
    panels = drawing.subplots(1, len(quantities), width_ratios=[1 + len(names) for _, names in quantities.values()])
    for axes, (label, (unit, names)) in zip(panels, quantities.items(), strict=True):
        for place, system in enumerate(systems):
            found = [record.of(name, system=system) for name in names]
            spread = [
                [each.median - min(each.values) for each in found],
                [max(each.values) - each.median for each in found],
            ]
            axes.bar(
                [index + (place - (len(systems) - 1) / 2) * 0.8 / len(systems) for index in range(len(names))],
                [each.median for each in found],
                width=0.8 / len(systems),
                yerr=spread,
                error_kw={"linewidth": 0.7},
                color=SYSTEM_COLOURS[system],
                label=system if axes is panels[0] else None,
            )
        axes.set_title(f"{label}, {unit}", fontsize=8)
        axes.set_xticks(range(len(names)), [_short(name) for name in names])
        axes.grid(visible=False, axis="x")
    drawing.legend(loc="outside lower center", ncols=len(systems))
    return drawing


def _short(name: str) -> str:
    for word in ("coordinator", "up", "down", "round"):
        if word in name.split(",", maxsplit=1)[0].split():
            return word
    return "site"


def _round(record: Record) -> Iterator[tuple[str, Drawing]]:
    yield (
        "cost",
        _bars(
            record,
            {
                "processor time": ("s", ("processor time of a site", "processor time of the coordinator")),
                "wall time": ("s", ("wall time of the round",)),
                "bytes of a site": ("MB", ("up from a site", "down to a site")),
                "peak memory": (
                    "MB",
                    (
                        "peak memory of a site, beyond what it had",
                        "peak memory of the coordinator, beyond what it had",
                    ),
                ),
            },
        ),
    )
    yield "steps", _where(record)


# --- lengths and cohorts ---

SCALE_STYLES = {  # colour, line and marker of each system
    "masked": (COLOURS[0], "-", "o"),
    "masked, complete": (COLOURS[0], "-", "o"),
    "masked, sparse": (COLOURS[5], "--", "s"),
    "homomorphic": (COLOURS[1], "-.", "^"),
}


def _lines(axes: Axes, record: Record, name: str, along: str, **at: Where) -> None:
    """One line for each system of the medians of ``name`` against ``along``, with whiskers from least to most."""
    for system, (colour, line, marker) in SCALE_STYLES.items():
        found = [each for each in record.figures if each.name == name and each.at.get("system") == system]
        found = sorted((each for each in found if at.items() <= each.at.items()), key=lambda each: each.at[along])
        if found:
            medians = [each.median for each in found]
            spread = [
                [each.median - min(each.values) for each in found],
                [max(each.values) - each.median for each in found],
            ]
            axes.errorbar(
                [each.at[along] for each in found],
                medians,
                yerr=spread,
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=3,
                linewidth=1.2,
                elinewidth=0.7,
                label=system,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_locator(LogLocator(10, subs=(1.0,) if along == "values" or axis is axes.xaxis else (1.0, 3.0)))
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.6g}") if along == "sites" else LogFormatterMathtext()
        )


def _legend(drawing: Drawing, columns: int = 3) -> None:
    """One for all panels."""
    known = {}
    for axes in drawing.axes:
        handles, labels = axes.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    drawing.legend(known.values(), known.keys(), loc="outside lower center", ncols=columns, fontsize=7)


def _length(record: Record) -> Drawing:
    """Time of an input, at the site and at the coordinator, against its length."""
    drawing = Drawing(figsize=(TWO_COLUMNS, 2.6))
    panels = drawing.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(
        panels,
        (
            ("processor time of a site's input", "a site"),
            ("processor time of the coordinator for each input", "the coordinator, for each site"),
        ),
        strict=True,
    ):
        _lines(axes, record, name, "values")
        floor = [each for each in record.figures if each.name.endswith("keystreams at the rate of AES alone")]
        if axes is panels[0]:
            axes.plot(
                [each.at["values"] for each in floor],
                [each.median for each in floor],
                color="black",
                linestyle=":",
                label="AES-256-CTR alone, 16 keystreams",
            )
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("values in the vector")
    panels[0].set_ylabel("processor time in s")
    _legend(drawing)
    return drawing


def _sites(record: Record) -> Drawing:
    """Time and bytes of a whole round against the number of sites."""
    drawing = Drawing(figsize=(TWO_COLUMNS, 4.3))
    most = max(int(each.at["values"]) for each in record.figures if each.name == "up from a site")
    for axes, (name, title, label, values) in zip(
        drawing.subplots(2, 2, sharex=True).flat,
        (
            ("processor time of a site", f"a site, {most:,} values", "processor time in s", most),
            ("processor time of the coordinator", f"the coordinator, {most:,} values", "processor time in s", most),
            ("up from a site", "up from a site, 16 values: keys, shares, signatures", "KB", 16),
            ("down to a site", "down to a site, 16 values", "KB", 16),
        ),
        strict=True,
    ):
        _lines(axes, record, name, "sites", values=values)
        axes.set_title(title, fontsize=8)
        axes.set_ylabel(label)
        if values == 16:
            axes.set_xlabel("sites")
    _legend(drawing)
    return drawing


def _memory(record: Record) -> Drawing:
    """Peak memory against the length of the vector."""
    drawing = Drawing(figsize=(TWO_COLUMNS, 2.2))
    panels = drawing.subplots(1, 2, sharey=True)
    for axes, who in zip(panels, ("a site", "the coordinator"), strict=True):
        _lines(axes, record, f"peak memory of {who} / float32", "values")
        axes.set_yscale("linear")
        axes.set_title(who, fontsize=8)
        axes.set_xlabel("values in the vector")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("peak / float32 vector")
    _legend(drawing)
    return drawing


def _predicted(record: Record) -> Drawing:
    """How far the cost model is off, and what it says of a site over two links."""
    drawing = Drawing(figsize=(TWO_COLUMNS, 3.0))
    errors, times = drawing.subplots(1, 2)
    names = ["processor time of a site", "processor time of the coordinator", "up from a site", "down to a site"]
    for place, name in enumerate(names):
        for kind, colour, marker, side in (("fitted", "#888888", "x", -0.15), ("checked", COLOURS[0], "o", 0.15)):
            found = [each.median for each in record.figures if each.name == f"model, {kind}: {name}"]
            errors.plot(
                [100 * each for each in found],
                [place + side] * len(found),
                color=colour,
                marker=marker,
                markersize=3.5,
                linestyle="",
                markerfacecolor="none",
                label=f"{kind} rounds" if place == 0 else None,
            )
    errors.set_yticks(range(len(names)), ["site, time", "coordinator, time", "site, up", "site, down"])
    errors.invert_yaxis()
    errors.axvline(0, color="black", linewidth=0.7)
    errors.set_xlabel("predicted beyond measured in %")
    figures = [each for each in record.figures if each.name == "predicted: a site's time, model and input included"]
    for sites, colour in zip((16, 1000, 10_000), (COLOURS[0], COLOURS[1], COLOURS[2]), strict=True):
        for link, line in (("100 Mbit/s", "--"), ("1 Gbit/s", "-")):
            found = [each for each in figures if each.at["sites"] == sites and each.at["link"] == link]
            times.loglog(
                [each.at["values"] for each in found],
                [each.median for each in found],
                color=colour,
                linestyle=line,
                linewidth=1.2,
                label=f"{sites:,} sites, {link}",
            )
            for each in found:
                measured = each.at["range"] == "measured"
                times.plot(
                    each.at["values"],
                    each.median,
                    "o",
                    markersize=3.5,
                    color=colour,
                    markerfacecolor=colour if measured else "white",
                )
    times.set_xlabel("values in the vector")
    times.set_ylabel("predicted time of a site in s")
    times.set_title("hollow: beyond what was measured", fontsize=8)
    _legend(drawing, columns=4)
    return drawing


def _scale(record: Record) -> Iterator[tuple[str, Drawing]]:
    yield "length", _length(record)
    yield "sites", _sites(record)
    yield "memory", _memory(record)
    yield "model", _predicted(record)


DRAWN: dict[str, Draw] = {"round": _round, "scale": _scale}
