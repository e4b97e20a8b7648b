"""Plots of records, as SVG and PNG."""

from collections.abc import Callable, Iterator
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
    "figure.dpi": 150,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "benchmarks",  # the same figures give the same file
}
FORMATS: dict[str, dict[str, object]] = {"svg": {"Date": None}, "png": {"Software": None}}

Draw = Callable[[Record], Iterator[tuple[str, Drawing]]]  # what the plots of a record are called, and each of them
DRAWN: dict[str, Draw] = {}


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
