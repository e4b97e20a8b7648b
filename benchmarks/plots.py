"""Plots of records, as SVG and PNG: one column of a paper wide, or both."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing

from benchmarks.record import Record

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
    "encrypt, decrypt (BFV)": (COLOURS[1], ("encrypt, decrypt (BFV)",)),
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


DRAWN: dict[str, Draw] = {"round": _round}
