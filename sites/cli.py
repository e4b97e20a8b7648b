"""The command line `secureagg`: keygen, consortium, coordinator, status, site, doctor, audit, ledger, budget, data and
demo.

Every failure that a user can cause is one sentence on standard error and exit status 1; a wrong option is status 2.
What takes seconds to import is imported inside the command that needs it.
"""

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from dp.errors import PrivacyError
from secureagg import SecureAggregationError
from sites.audit_cli import audit_app
from sites.budget_cli import LedgerFile, NotedHead, budget_app, print_verified, read_rows, verified
from sites.data_cli import data_app
from sites.errors import SiteError
from transport import TransportError

if TYPE_CHECKING:
    from dp.ledger import Row
    from sites.coordinator_loop import RoundRecord
    from sites.manifest import Manifest

app = typer.Typer(
    help="Hospitals train one model together; nobody, the coordinator included, sees one hospital's update.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
consortium_app = typer.Typer(help="Create, sign and read the manifest that all sites agree on.", no_args_is_help=True)
app.add_typer(consortium_app, name="consortium")
ledger_app = typer.Typer(help="Check and move the record of what a site has released.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")
app.add_typer(budget_app, name="budget")
app.add_typer(audit_app)
app.add_typer(data_app, name="data")

out = Console(highlight=False)

_OF_TRAINING: Final = {"opacus", "safetensors", "sklearn", "torch"}  # what the extra of that name installs


class Mode(StrEnum):
    """Modes of differential privacy."""

    LOCAL = "local"
    SHARED = "shared"
    SITE = "site"
    NONE = "none"


class BackendChoice(StrEnum):
    """How sums are made."""

    MASKED = "masked"
    HOMOMORPHIC = "homomorphic"


class Data(StrEnum):
    """Built-in data sets."""

    HEART = "heart"
    XRAY = "xray"
    PHANTOM = "phantom"


def main() -> NoReturn:
    """Run the command line; exits with 0, 1 for a failure, 2 for wrong usage."""
    try:
        app(prog_name="secureagg")
    except (SecureAggregationError, SiteError, PrivacyError, TransportError) as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in _OF_TRAINING:
            raise
        _fail(f"this command needs {error.name}, which is not installed; pip install 'secureagg[train]' brings it")
    except KeyboardInterrupt:
        _fail("stopped by the user")
    except OSError as error:
        _fail(f"{error.filename or 'system'}: {error.strerror or error}")
    sys.exit(0)


def _fail(sentence: str) -> NoReturn:
    sys.stderr.write(f"Error: {sentence}\n")
    sys.exit(1)


def _example(text: str) -> str:
    return f"[bold]Example[/bold]: [cyan]{escape(text)}[/cyan]"


@app.command(epilog=_example("secureagg keygen hospital-a --out keys/"))
def keygen(
    name: Annotated[str, typer.Argument(help="The machine's name: a-z 0-9 . _ -, up to 64 characters.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the two files.")] = Path(),
) -> None:
    """Make the keys of a site or a coordinator: NAME.keys stays (mode 600), NAME.card is handed out."""
    from sites.keys import generate_keys, save_keys  # noqa: PLC0415

    private, public = save_keys(generate_keys(name), folder)
    out.print(f"{private}  private keys, never leaves this machine", soft_wrap=True)
    out.print(f"{public}  public card, hand it to whoever creates the manifest", soft_wrap=True)


@consortium_app.command(
    epilog=_example(
        "secureagg consortium create manifest.toml --name 'Heart' --coordinator c.card --address tcp://sum.example:5555"
        " a.card b.card c.card"
    )
)
def create(
    manifest: Annotated[Path, typer.Argument(help="File to write.")],
    cards: Annotated[list[Path], typer.Argument(help="The public card of each site; at least three.")],
    name: Annotated[str, typer.Option(help="The consortium's name.")],
    coordinator: Annotated[Path, typer.Option(help="The coordinator's public card.")],
    address: Annotated[str, typer.Option(help="Where the coordinator listens: tcp://host:port.")],
    initial: Annotated[
        Path | None,
        typer.Option(
            help="safetensors file of the model to start from; without it, that of --images or the heart data is made."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="TOML file with the [images] that all sites see theirs by; see docs/dicom.md.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Training rounds.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Steps of each site in a round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Expected size of a Poisson-sampled batch.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the sites' steps.")] = None,
    server_optimizer: Annotated[str | None, typer.Option(help="average, momentum or adam.")] = None,
    server_learning_rate: Annotated[float | None, typer.Option(help="Of the server optimizer.")] = None,
    mode: Annotated[str, typer.Option(help="Differential privacy: local, shared, site or none.")] = "local",
    sampling_rate: Annotated[
        float | None, typer.Option(help="Mode shared: each patient's chance to be in a round.")
    ] = None,
    max_dropouts: Annotated[
        int | None, typer.Option(help="Modes shared and site: most sites that may be missing from a round.")
    ] = None,
    mechanism: Annotated[
        str, typer.Option(help="Modes shared and site: skellam or 'discrete gaussian' noise.")
    ] = "skellam",
    epsilon: Annotated[float | None, typer.Option(help="The most that each site spends.")] = None,
    delta: Annotated[float | None, typer.Option(help="The delta that goes with epsilon.")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Bound on one patient's gradient.")] = None,
    value_bits: Annotated[int | None, typer.Option(help="Bits of an encoded value.")] = None,
    value_range: Annotated[float | None, typer.Option(help="Largest magnitude of an update's value.")] = None,
    out_of_range: Annotated[str | None, typer.Option(help="error or clip.")] = None,
    minimum_cohort: Annotated[int | None, typer.Option(help="Fewest sites in a round.")] = None,
    max_corrupt: Annotated[int | None, typer.Option(help="Most sites that may collude with the coordinator.")] = None,
    minimum_survivors: Annotated[int | None, typer.Option(help="Fewest sites in a released sum.")] = None,
    graph: Annotated[str | None, typer.Option(help="auto (sparse above 100 sites), complete or sparse.")] = None,
    dropout_percent: Annotated[
        int | None, typer.Option(help="Share of a large cohort that a round on the sparse graph survives losing.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="masked, or homomorphic: encrypted sums that only the sites can open.")
    ] = "masked",
    release_to: Annotated[
        str | None,
        typer.Option(help="Backend homomorphic: sites (nobody else sees the model, the default) or coordinator."),
    ] = None,
    personalised: Annotated[
        bool,
        typer.Option(
            "--personalised", help="Evaluate the final model beside the sites' own versions of it, only then."
        ),
    ] = False,
    census: Annotated[
        bool, typer.Option("--census", help="Also count the sites' patients together, at the end of a run.")
    ] = False,
    census_label: Annotated[
        list[str] | None, typer.Option(help="NAME=no,yes: a label whose classes that census counts; with --census.")
    ] = None,
) -> None:
    """Write an unsigned manifest.  Options that are not given take the heart recipe's value; see the file."""
    from sites import recipe  # noqa: PLC0415
    from sites.files import write_atomic  # noqa: PLC0415
    from sites.keys import load_card  # noqa: PLC0415
    from sites.manifest import load_images  # noqa: PLC0415

    seen = None if images is None else load_images(images)
    if initial is None:
        initial = manifest.parent / "initial.safetensors"
        if seen is None:
            from sites.trainer import initial_heart_model  # noqa: PLC0415

            write_atomic(initial, initial_heart_model())
            out.print(f"{initial}  the heart data's model, all weights zero", soft_wrap=True)
        else:
            from sites.models import initial_image_model  # noqa: PLC0415

            write_atomic(initial, initial_image_model(seen))
            out.print(f"{initial}  the model {seen.model}", soft_wrap=True)
    training, privacy = recipe.recipe_of(mode)
    changes: dict[str, Any] = {
        **({} if seen is None else {"images": seen}),
        "training": _changed(
            training,
            rounds=rounds,
            local_steps=local_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            server_optimizer=server_optimizer,
            server_learning_rate=server_learning_rate,
        ),
        "privacy": _changed(privacy, epsilon=epsilon, delta=delta, clip_norm=clip_norm),
        "encoding": _changed(
            recipe.ENCODING, value_bits=value_bits, value_range=value_range, out_of_range=out_of_range
        ),
        "policy": _changed(
            recipe.POLICY,
            minimum_cohort=minimum_cohort,
            max_corrupt=max_corrupt,
            minimum_survivors=minimum_survivors,
            graph=graph,
            dropout_percent=dropout_percent,
            backend=backend,
            release_to=release_to or ("sites" if backend == "homomorphic" else "coordinator"),
        ),
    }
    if personalised:
        changes["evaluation"] = _changed(recipe.EVALUATION, personalised=True)
    if census or census_label:
        changes["census"] = recipe.census_table(census_label or [], max_corrupt=changes["policy"].max_corrupt)
    noise: dict[str, Any] = {"max_dropouts": max_dropouts, "mechanism": mechanism}
    if sampling_rate is not None:
        noise["sampling_rate"] = sampling_rate
    created = recipe.new_manifest(
        name=name,
        coordinator=load_card(coordinator),
        address=address,
        cards=[load_card(card) for card in cards],
        initial=initial.read_bytes(),
        changes=changes,
        noise=noise,
    )
    created.save(manifest)
    out.print(f"{manifest}  every site reads it and runs `secureagg consortium sign`", soft_wrap=True)


@consortium_app.command(
    epilog=_example("secureagg consortium revise manifest.toml revised.toml --revoke hospital-c --card hospital-a.card")
)
def revise(
    manifest: Annotated[Path, typer.Argument(help="The manifest in force.")],
    revised: Annotated[Path, typer.Argument(help="File to write.")],
    revoke: Annotated[list[str] | None, typer.Option(help="A site that is out from the next round on.")] = None,
    card: Annotated[list[Path] | None, typer.Option(help="New public card of a site, or card of a new site.")] = None,
) -> None:
    """Write the next revision of a manifest, unsigned: sites revoked, added or with new keys, all else as it was.

    Once all its sites have signed it, coordinator and sites are started again with it, and the run goes on.
    """
    from sites.keys import load_card  # noqa: PLC0415
    from sites.manifest import Manifest  # noqa: PLC0415

    before = Manifest.load(manifest)
    after = before.revised(revoke=revoke or (), cards=[load_card(path) for path in card or ()])
    after.save(revised)
    for what, sites in after.changes_from(before).items():
        if sites:
            out.print(f"{what}: {', '.join(sites)}", soft_wrap=True)
    number = after.consortium.revision
    out.print(f"{revised}  revision {number}; every site in it runs `secureagg consortium sign`", soft_wrap=True)


@consortium_app.command(
    epilog=_example("secureagg consortium sign manifest.toml --keys hospital-a.keys --site-config SITE.toml")
)
def sign(
    manifest: Annotated[Path, typer.Argument(help="The manifest; the signature is added to the file.")],
    keys: Annotated[Path, typer.Option(help="The signing site's private keys.")],
    site_config: Annotated[
        Path | None, typer.Option(help="Also write a SITE.toml that pins exactly this manifest.")
    ] = None,
    heart: Annotated[
        str | None,
        typer.Option(
            metavar="HOSPITAL", help="In that SITE.toml: train on this hospital's heart data with `secureagg site`."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="In that SITE.toml: train on the DICOM files below this folder; with --labels.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV of the targets of those images.")] = None,
) -> None:
    """Sign a manifest for one site, and print the digest to compare with the other sites by telephone."""
    from sites.config import DicomData, HeartData, OwnData, save_config  # noqa: PLC0415
    from sites.errors import ConfigurationError  # noqa: PLC0415
    from sites.keys import load_keys  # noqa: PLC0415
    from sites.manifest import Manifest  # noqa: PLC0415

    own = load_keys(keys)
    signed = Manifest.load(manifest).sign(own.identity, own.site)
    if (images is None) != (labels is None) or (images is not None and heart is not None):
        raise ConfigurationError("sign: expected --images and --labels together, or --heart, or none of them")
    if site_config is not None:
        data: OwnData | None = None if heart is None else HeartData(hospital=heart)
        if images is not None and labels is not None:
            data = DicomData(folder=str(images.resolve()), labels=str(labels.resolve()))
        save_config(site_config, manifest=signed, manifest_path=manifest, keys=keys, site=own.site, data=data)
    signed.save(manifest)
    out.print(f"signed by {own.site}; digest {signed.digest.hex()}", soft_wrap=True)
    missing = signed.unsigned_by
    out.print(f"still to sign: {', '.join(missing)}" if missing else "all sites have signed", soft_wrap=True)


@consortium_app.command(epilog=_example("secureagg consortium show manifest.toml"))
def show(manifest: Annotated[Path, typer.Argument(help="The manifest.")]) -> None:
    """Print what a manifest says and who has signed it; status 1 unless everybody has signed exactly this."""
    from sites.manifest import Manifest  # noqa: PLC0415

    loaded = Manifest.load(manifest)
    _print_manifest(loaded)
    loaded.check()


@app.command(epilog=_example("secureagg coordinator manifest.toml --keys sum.keys --initial initial.safetensors"))
def coordinator(
    manifest: Annotated[Path, typer.Argument(help="The manifest that every site has signed.")],
    keys: Annotated[Path, typer.Option(help="The coordinator's private keys.")],
    initial: Annotated[Path, typer.Option(help="safetensors file of the model to start from.")],
    state: Annotated[Path, typer.Option(help="Folder for the model and the log of rounds.")] = Path("coordinator"),
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Begin anew, even if a run in that folder was interrupted or is over.")
    ] = False,
    memory: Annotated[int, typer.Option(min=1, help="MiB that messages under way may take, over all sites.")] = 256,
) -> None:
    """Coordinate one training run; ends after the last round.  After a crash it goes on with that run.

    Started again after the end, it gives the model to sites that have missed the end, and trains nothing.
    """
    from sites.programs import MODEL, run_coordinator  # noqa: PLC0415

    _log_to_stderr()
    run_coordinator(
        manifest,
        keys=keys,
        initial=initial,
        state=state,
        new_run=new_run,
        report=_print_round,
        notify=_say,
        memory_bytes=memory << 20,
    )
    model = state / MODEL
    _say(f"finished; the model is {model}" if model.exists() else "finished; the sites have the model, nobody else")


@app.command(epilog=_example("secureagg status manifest.toml --state coordinator/"))
def status(
    manifest: Annotated[Path, typer.Argument(help="The manifest that the coordinator runs.")],
    state: Annotated[Path, typer.Option(help="The coordinator's state folder.")] = Path("coordinator"),
    json: Annotated[bool, typer.Option("--json", help="Print the coordinator's own file instead of a table.")] = False,
) -> None:
    """Show what a coordinator on this machine is doing: phase, sites present, last round; status 1 if it is gone."""
    from sites.manifest import Manifest  # noqa: PLC0415
    from sites.status import is_running, read_status, status_table  # noqa: PLC0415

    loaded = Manifest.load(manifest)
    found = read_status(loaded, state)
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")
    else:
        out.print(status_table(found, loaded))
    if not found.over and not is_running(found):
        raise typer.Exit(1)


@app.command(epilog=_example("secureagg site SITE.toml"))
def site(
    config: Annotated[Path, typer.Argument(help="The site's configuration.")],
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Only read and decode the images, so that no run waits for it.")
    ] = False,
    stop_answering: Annotated[str | None, typer.Option(hidden=True, help="PHASE:ROUND to die in.")] = None,
) -> None:
    """Take part in one training run with this site's data; ends with the run."""
    from sites.programs import prepare_site, run_site, stop_at  # noqa: PLC0415

    _log_to_stderr()
    if prepare:
        _say(f"ready: {prepare_site(config)}")
        return
    summary = run_site(config, report=_say, stop_answering=None if stop_answering is None else stop_at(stop_answering))
    spent = "no differential privacy" if summary.epsilon is None else f"epsilon {summary.epsilon:.3f} spent so far"
    _say(f"finished; {summary.patients} patients, {spent} at delta {summary.delta:g}")


@app.command(epilog=_example("secureagg doctor SITE.toml"))
def doctor(
    config: Annotated[Path, typer.Argument(help="The site's configuration.")],
    patience: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds to wait for the coordinator.")] = 10.0,
) -> None:
    """Check what can be wrong before a run: versions, keys, manifest, clock, coordinator; status 1 if something is."""
    from rich.table import Table  # noqa: PLC0415

    from sites.doctor import examine  # noqa: PLC0415

    table = Table("", "check", "found", "what to do")
    findings = examine(config, patience=patience)
    for finding in findings:
        mark = "[green]good[/green]" if finding.good else "[bold red]BAD[/bold red]"
        table.add_row(mark, finding.check, escape(finding.found), escape(finding.advice))
    out.print(table)
    if bad := [finding.check for finding in findings if not finding.good]:
        _fail(f"{config}: {len(bad)} of {len(findings)} checks are bad: {', '.join(bad)}")


@app.command(epilog=_example("secureagg demo --epsilon 2 --drop va:CollectingMaskedInputs --json result.json"))
def demo(
    rounds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Training rounds; by default 10, or the mode's own number.")
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Each hospital's privacy budget, over all rounds; by default 1 for heart, else 8."),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(help="Noise of each hospital's own, or shared by all, per patient or per whole site; or none."),
    ] = Mode.LOCAL,
    backend: Annotated[
        BackendChoice, typer.Option(help="Masked sums, or homomorphic ones that the coordinator cannot read either.")
    ] = BackendChoice.MASKED,
    data: Annotated[Data, typer.Option(help="Which data.")] = Data.HEART,
    npz: Annotated[
        Path | None, typer.Option(help="Data xray: pneumoniamnist.npz of MedMNIST v2, to be made DICOM studies of.")
    ] = None,
    data_folder: Annotated[
        Path | None, typer.Option(help="Folder with UCI's original files; without it, the installed copy is used.")
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE:PHASE", help="Let a hospital's machine fail in this phase of the middle round."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Leave manifest, keys, every state and the model in this folder.")
    ] = None,
) -> None:
    """Watch hospitals train one model under differential privacy, each in a process of its own: four real ones on heart
    data, seven on X-rays, or four made-up ones on phantoms."""
    from sites.demo import run_demo  # noqa: PLC0415
    from sites.demo_data import demo_data  # noqa: PLC0415

    run_demo(
        demo_data(data.value, folder=data_folder, npz=npz),
        console=out,
        mode=mode.value,
        backend="masked" if backend is BackendChoice.MASKED else "homomorphic",
        rounds=rounds,
        epsilon=epsilon,
        drops=drop or [],
        json_file=json_file,
        keep=keep,
    )


_Card = Annotated[Path | None, typer.Option(help="The site's public card: the ledger must be signed by its key.")]


@ledger_app.command("verify", epilog=_example("secureagg ledger verify ledger.sqlite --card hospital-a.card"))
def verify_ledger(ledger: LedgerFile, card: _Card = None, head: NotedHead = None) -> None:
    """Check every row's place, hash and signature; names each row that is wrong, with status 1."""
    _verified(ledger, card, head)


@ledger_app.command("export", epilog=_example("secureagg ledger export ledger.sqlite ledger.jsonl"))
def export_ledger(
    ledger: LedgerFile, target: Annotated[Path, typer.Argument(help="File to write: JSON Lines.")], card: _Card = None
) -> None:
    """Write all rows for somebody else to verify, after checking them; updates that are not yet sent stay here."""
    from dp.ledger import write_export  # noqa: PLC0415

    write_export(target, _verified(ledger, card, None))


@ledger_app.command("restore", epilog=_example("secureagg ledger restore ledger.jsonl ledger.sqlite --head HEAD"))
def restore_ledger(
    export: Annotated[Path, typer.Argument(help="What `ledger export` wrote.")],
    ledger: Annotated[Path, typer.Argument(help="The ledger's file to make; it must not be there.")],
    card: _Card = None,
    head: NotedHead = None,
) -> None:
    """Make a ledger from an export, for a site that moves to another machine."""
    from dp.ledger import restore  # noqa: PLC0415

    _verified(export, card, head)
    restore(export, ledger, head=head)


def _verified(path: Path, card: Path | None, head: str | None) -> "list[Row]":
    """The rows of a ledger or an export, after saying what they are; LedgerTampered if anything is wrong."""
    from sites.keys import load_card  # noqa: PLC0415

    rows = read_rows(path)
    key = None if card is None else load_card(card).signing_key
    print_verified(verified(path, rows, public_key=key, head=head))
    return rows


def _changed(table: msgspec.Struct, **fields: object) -> msgspec.Struct:
    return msgspec.structs.replace(table, **{name: value for name, value in fields.items() if value is not None})


def _print_manifest(manifest: "Manifest") -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(show_header=False, title=f"Consortium {manifest.consortium.name}", title_justify="left")
    sections = ("policy", "encoding", "evaluation", "training", "privacy", "noise", "images", "census", "deadlines")
    tables = msgspec.to_builtins(manifest)
    for section, fields in ((section, tables[section]) for section in sections if section in tables):
        table.add_row(section, ", ".join(f"{name} {_told(value)}" for name, value in fields.items()))
    shapes = ", ".join(f"{tensor.name} {'x'.join(map(str, tensor.shape))}" for tensor in manifest.model.tensors)
    table.add_row("model", shapes)
    table.add_row("coordinator", f"{manifest.coordinator.name} at {manifest.coordinator.address}")
    signed = {entry.site for entry in manifest.signatures}
    sites = (f"{entry.name} ({'signed' if entry.name in signed else 'not signed'})" for entry in manifest.sites)
    table.add_row("sites", ", ".join(sites))
    out.print(table)
    out.print(f"digest {manifest.digest.hex()}", soft_wrap=True)


def _told(value: object) -> str:
    """A field of a manifest, with what is inside it, as people read it."""
    if isinstance(value, dict):
        return f"({', '.join(f'{name} {_told(part)}' for name, part in value.items())})"
    if isinstance(value, list | tuple):
        return " and ".join(map(_told, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _print_round(record: "RoundRecord") -> None:
    names = {"train": "training", "evaluate": "evaluation", "personalise": "personal models", "census": "census"}
    what = names[record.purpose]
    seconds = sum(record.seconds.values())
    if record.error:
        _say(f"round {record.number}, {what}: ended without a release ({record.error}) after {seconds:.1f} s")
        return
    auc = record.metrics.auc if record.metrics is not None else None
    metric = "" if auc is None else f", AUC of the model before it {auc:.3f}"
    if record.personal_metrics is not None and record.personal_metrics.auc is not None:
        metric += f", of the sites' own models {record.personal_metrics.auc:.3f}"
    # Who has nothing to give leaves those rounds.
    gone = "left" if record.purpose in ("personalise", "census") else "stopped answering"
    dropped = "".join(f", {site} {gone} in {phase}" for site, phase in sorted(record.dropped.items()))
    _say(f"round {record.number}, {what}: {len(record.survivors)} sites summed in {seconds:.1f} s{metric}{dropped}")


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, markup=False)


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")


if __name__ == "__main__":
    main()
