"""The command line's `data`: what a site's images are worth, for the site's own eyes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sites.errors import DatasetError
from sites.files import PRIVATE_MODE, write_atomic, write_json

if TYPE_CHECKING:
    from sites.datasets.dicom.index import Progress as Report
    from sites.datasets.dicom.summary import Summary

data_app = typer.Typer(help="Look at the images that a site could train on.", no_args_is_help=True)
out = Console(highlight=False)
err = Console(stderr=True)


@data_app.callback()
def data() -> None:
    """Look at the images that a site could train on."""


@data_app.command(
    epilog="[bold]Example[/bold]: [cyan]secureagg data inspect IMAGES --state STATE --labels findings.csv "
    "--target finding=no,yes[/cyan]"
)
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of DICOM files, with all that is below it.")],
    state: Annotated[Path, typer.Option(help="The site's state folder, for the index and the secret behind it.")],
    labels: Annotated[
        Path | None, typer.Option(help="CSV with a column patient, study, series or instance, and one per target.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A column of it: NAME=no,yes for classes, NAME=low<mid<high if ordered, NAME for a number."),
    ] = None,
    merges: Annotated[
        Path | None,
        typer.Option(help="CSV of patients with several numbers: patient, same_as (issuer, same_as_issuer)."),
    ] = None,
    decode: Annotated[int, typer.Option(min=0, help="Try to decode one image each of so many patients.")] = 64,
    decode_all: Annotated[bool, typer.Option("--decode-all", help="Try to decode every image.")] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a PNG of decoded images; look at it, then delete it.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read and decode.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the summary to this file.")] = None,
) -> None:
    """Say what of a folder can be trained on, what not and why, in counts and bands; nothing leaves this machine."""
    from sites.datasets.dicom.index import index_folder  # noqa: PLC0415
    from sites.datasets.dicom.labels import Target, load_labels  # noqa: PLC0415
    from sites.datasets.dicom.summary import contact_sheet, summarise  # noqa: PLC0415
    from sites.datasets.dicom.workers import Workers  # noqa: PLC0415

    targets = tuple(Target.parse(text) for text in target or [])
    if (labels is None) != (not targets):
        raise DatasetError("labels: expected both --labels and --target, or neither")
    with Workers(workers) as pool:
        with _progress("reading") as report:
            index = index_folder(folder, state, merges=merges, workers=pool, progress=report)
        found = None if labels is None else load_labels(labels, targets, index)
        with _progress("decoding") as report:
            summary, thumbnails = summarise(
                index, labels=found, decode=None if decode_all else decode, workers=pool, progress=report
            )
    if json_file is not None:
        write_json(json_file, summary, mode=PRIVATE_MODE)
    if sheet is not None:
        write_atomic(sheet, contact_sheet(thumbnails), mode=PRIVATE_MODE)
    _print(summary)


@data_app.command(
    epilog="[bold]Example[/bold]: [cyan]secureagg data federate IMAGES --config SITE.toml --labels findings.csv[/cyan]"
)
def federate(
    folder: Annotated[Path, typer.Argument(help="Folder of DICOM files, with all that is below it.")],
    config: Annotated[Path, typer.Option(help="The site's SITE.toml, which names the manifest and the state folder.")],
    labels: Annotated[Path | None, typer.Option(help="CSV with the labels that the manifest's census counts.")] = None,
    merges: Annotated[
        Path | None,
        typer.Option(help="CSV of patients with several numbers: patient, same_as (issuer, same_as_issuer)."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read.")] = None,
) -> None:
    """Prepare this site's counts for the consortium's census, to be summed in secret by the next `secureagg site`."""
    from sites.census import census_of, count_patients, prepare  # noqa: PLC0415
    from sites.config import open_site  # noqa: PLC0415
    from sites.datasets.dicom.index import index_folder  # noqa: PLC0415
    from sites.datasets.dicom.labels import Target, load_labels  # noqa: PLC0415
    from sites.datasets.dicom.workers import Workers  # noqa: PLC0415

    site = open_site(config)
    census = census_of(site.manifest)
    targets = tuple(Target(name, "classification", tuple(classes)) for name, classes in census.labels.items())
    with Workers(workers) as pool, _progress("reading") as report:
        index = index_folder(folder, site.state, merges=merges, workers=pool, progress=report)
    found = load_labels(labels, targets, index) if labels is not None and targets else None
    counts = count_patients(index, found, census)
    path = prepare(site, counts)
    _print_counts(f"Patients of {site.name}", counts)
    out.print(
        f"This is in {path}, for this site only.  The next census takes it into its sum, once; counts below "
        f"{census.minimum_patients} patients or {census.minimum_sites} sites are not published.",
        soft_wrap=True,
    )


@data_app.command(epilog="[bold]Example[/bold]: [cyan]secureagg data census STATE/census.json[/cyan]")
def census(file: Annotated[Path, typer.Argument(help="The census.json that a run has left.")]) -> None:
    """Print a consortium's census."""
    from sites.census import load_table  # noqa: PLC0415

    table = load_table(file)
    _print_counts(f"{table.consortium}: {table.patients:,} patients of {table.sites} sites", table.variables)
    out.print(
        f"A cell that is missing has fewer than {table.minimum_patients} patients, perhaps none, or patients of fewer "
        f"than {table.minimum_sites} sites, or was left out so that others cannot be computed.",
        soft_wrap=True,
    )


@data_app.command(epilog="[bold]Example[/bold]: [cyan]secureagg data phantom --out PHANTOMS --bias 1[/cyan]")
def phantom(
    folder: Annotated[Path, typer.Option("--out", help="New folder for the files.")],
    sites: Annotated[int, typer.Option(help="Hospitals.")] = 4,
    patients: Annotated[int, typer.Option(help="Patients of each.")] = 60,
    images: Annotated[int, typer.Option(help="CT slices of each patient.")] = 3,
    size: Annotated[int, typer.Option(help="Rows and columns of a slice.")] = 64,
    disease: Annotated[float, typer.Option(help="Strength of the disease in the image, 0 for none.")] = 1.0,
    prevalence: Annotated[float, typer.Option(help="Share of the patients who are ill.")] = 0.5,
    prevalence_gap: Annotated[float, typer.Option(help="By how much more of the women than of the men are ill.")] = 0.4,
    women: Annotated[float, typer.Option(help="Share of the subgroup.")] = 0.5,
    site_effect: Annotated[float, typer.Option(help="Strength of what scanners do to images, 0 for none.")] = 1.0,
    bias: Annotated[float, typer.Option(help="Strength of the bias in the image, 0 for none.")] = 0.0,
    correlation: Annotated[float, typer.Option(help="By how much more women than men have the bias.")] = 0.8,
    pairs: Annotated[int, typer.Option(help="Patients of each hospital who get counterfactual twins.")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed and options give the same files.")] = 0,
) -> None:
    """Write made-up hospitals as DICOM files, with a disease, scanners and a bias of known strengths."""
    from sites.datasets.phantoms import LABELS, TRUTH, TWINS, PhantomPlan, write_phantoms  # noqa: PLC0415

    plan = PhantomPlan(
        sites=sites, patients=patients, images=images, size=size, disease=disease, prevalence=prevalence,
        prevalence_gap=prevalence_gap, women=women, site_effect=site_effect, bias=bias, correlation=correlation,
        pairs=pairs, seed=seed,
    )  # fmt: skip
    truth = write_phantoms(folder, plan)
    ill = sum(one.disease for one in truth.patients)
    out.print(
        f"{len(truth.patients):,} patients of {sites} hospitals, {ill:,} of them ill, in {folder}", soft_wrap=True
    )
    out.print(f"HOSPITAL/{LABELS} has who is ill, {TRUTH} all that is true", soft_wrap=True)
    if truth.twins:
        out.print(f"{len(truth.twins):,} counterfactual twins in {folder / TWINS}", soft_wrap=True)


@contextmanager
def _progress(what: str) -> "Iterator[Report]":
    """A bar on standard error while something is done, if somebody is looking."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_counts(title: str, counts: dict[str, dict[str, int]]) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table("variable", "patients", title=title, title_justify="left")
    for name, own in counts.items():
        told = ", ".join(f"{cell}: {count:,}" for cell, count in own.items())
        table.add_row(name.replace("_", " "), told or "not published")
    out.print(table)


def _print(summary: "Summary") -> None:
    from rich.table import Table  # noqa: PLC0415

    def counts(found: dict[str, int]) -> str:
        return ", ".join(f"{name}: {count:,}" for name, count in found.items()) or "none"

    table = Table(show_header=False, title="Images that can be trained on", title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row(
        "files", f"{summary.files:,} ({summary.files_read:,} read now, {summary.files_unchanged:,} unchanged)"
    )
    table.add_row("images", f"{summary.images:,} files with {summary.frames:,} frames", style="bold")
    table.add_row("patients", f"{summary.patients:,}", style="bold")
    if summary.patients_by_study:
        table.add_row("without PatientID", f"{summary.patients_by_study:,} studies, each counted as a patient")
    if spread := summary.images_per_patient:
        table.add_row("images per patient", f"{spread.least:,} to {spread.most:,}, median {spread.median:g}")
    table.add_row("rows x columns", counts(summary.sizes))
    table.add_row("volumes", f"{summary.volumes:,}; not stacked: {counts(summary.no_volume)}")
    table.add_row("decoded to try", f"{summary.decoded:,} ({counts(summary.decoders)})")
    for name, balance in summary.labels.items():
        table.add_row(f"label {name}", counts(balance))
    for name, bands in summary.descriptors.items():
        table.add_row(name.replace("_", " "), counts(bands))
    out.print(table)
    for title, refused in (("Files left out", summary.refused), ("Images that do not decode", summary.not_decoded)):
        if refused:
            reasons = Table("reason", "files", title=title, title_justify="left")
            for reason, count in refused.items():
                reasons.add_row(reason, f"{count:,}")
            out.print(reasons)
    out.print("Descriptors count patients. All of this is for this site only: nothing was sent.", soft_wrap=True)
