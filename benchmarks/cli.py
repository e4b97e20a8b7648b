"""The measurements of this project, each with a table, a JSON of every repetition, and plots."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.quotes import documents, grids, updated
from benchmarks.record import Record

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)

Full = Annotated[
    bool, typer.Option("--full/--quick", help="As long as the committed results took, or a quick look (the default).")
]
Results = Annotated[
    Path | None,
    typer.Option(
        help="Where JSON and plots go: benchmarks/results by default, its folder quick for a quick run.",
        file_okay=False,
    ),
]

OVERHEAD = {
    "masking": "What masking costs a site and the coordinator, against the raw cipher and its physical floors.",
    "homomorphic": "What an exact homomorphic sum costs, against TenSEAL's CKKS with NVFlare's parameters.",
    "round": "A whole round over sockets, masked, homomorphic and plain: processor time, bytes, memory, phases.",
    "scale": "Time and bytes against the length of the vector and the number of sites, and a cost model.",
    "dp": "A step of patient-level DP-SGD, against plain Opacus and plain PyTorch.",
    "peers": "The same update through Flower, NVFlare, Fed-BioMed and DecLearn (`make bench-peers` installs them).",
}
MORE = {
    "noise": "How fast noise is drawn.",
    "recipe": "The figures of `secureagg demo`, over seeds.",
}
OTHERS = {
    "transport": "Many sites, bad lines and disturbers.",
    "chaos": "Rounds of real processes that are killed, stopped and cut off.",
    "utility": "What each privacy mode costs in quality.",
    "dicom": "Indexing, decoding and training on hospital images.",
    "xray": "The X-rays of `secureagg demo --data xray`, over seeds.",
}


def measured(name: str, *, full: bool, results: Path | None) -> None:
    """Run one benchmark, print its table, write its JSON and draw its plots."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    record: Record = import_module(f"benchmarks.{name}").measure(full=full)
    for grid in grids(record):
        grid.print(console)
    path = record.write(results)
    drawn = import_module("benchmarks.plots").draw(record, path.parent)
    console.print(f"Written: {', '.join(str(each) for each in (path, *drawn))}", soft_wrap=True)


def _add(name: str, what: str) -> None:
    @app.command(name, help=what)
    def command(full: Full = False, results: Results = None) -> None:
        measured(name, full=full, results=results)


def _add_other(name: str, what: str) -> None:
    # These have options of their own, which `python -m benchmarks NAME --help` lists.
    @app.command(
        name,
        help=what,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def command(context: typer.Context) -> None:
        sys.argv = [f"python -m benchmarks {name}", *context.args]
        main: Callable[[], None] = import_module(f"benchmarks.{name}").main
        main()


for _name, _what in OVERHEAD.items():
    _add(_name, _what)


@app.command("all")
def everything(full: Full = False, results: Results = None) -> None:
    """All of the above: the overhead of secure aggregation and of differential privacy."""
    for name in OVERHEAD:
        measured(name, full=full, results=results)


for _name, _what in MORE.items():
    _add(_name, _what)
for _name, _what in OTHERS.items():
    _add_other(_name, _what)


@app.command()
def quote() -> None:
    """Bring the figures that README and docs quote up to date with benchmarks/results."""
    for path in documents():
        text = path.read_text()
        if (new := updated(text, path.parent)) != text:
            path.write_text(new)
            print(f"changed: {path}")
