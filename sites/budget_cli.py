"""The command line's `budget` commands; what takes a second to import is imported inside them."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

if TYPE_CHECKING:
    from dp.chain import Row, Verification
    from dp.planning import BudgetPlan

budget_app = typer.Typer(
    help="What training will cost a site's privacy budget, and what it has cost.", no_args_is_help=True
)
out = Console(highlight=False)

LedgerFile = Annotated[Path, typer.Argument(help="A ledger's ledger.sqlite, or what `ledger export` wrote.")]
RosterFile = Annotated[
    Path | None, typer.Option(help="A manifest that lists the site: the ledger must be signed by its key.")
]
NotedHead = Annotated[str | None, typer.Option(help="A head that was noted earlier: no row up to it may be missing.")]

_ROUNDS_SHOWN: Final = 20


def _positive(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a finite number above 0.")
    return value


def _probability(value: float) -> float:
    if not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not above 0 and below 1.")
    return value


def _svg(value: Path | None) -> Path | None:
    if value is not None and value.suffix.lower() != ".svg":
        raise typer.BadParameter(f"{value} does not end in .svg, the one format that is written.")
    return value


def _html(value: Path) -> Path:
    if value.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"{value} does not end in .html, the one format that is written.")
    return value


@budget_app.command(
    name="plan",
    epilog="[bold]Example[/bold]: [cyan]secureagg budget plan --patients 30 --batch 8 --rounds 10 --steps 2 "
    "--epsilon 1 --delta 0.001[/cyan]",
)
def plan_command(
    patients: Annotated[int, typer.Option(min=1, help="Patients that the site trains on.")],
    batch: Annotated[int, typer.Option(min=1, help="Expected patients in a step.")],
    rounds: Annotated[int, typer.Option(min=1, max=100_000, help="Training rounds.")],
    steps: Annotated[int, typer.Option(min=1, max=1_000_000, help="Steps of the site in a round.")],
    epsilon: Annotated[float, typer.Option(callback=_positive, help="The most that the site spends, ledger included.")],
    delta: Annotated[float, typer.Option(callback=_probability, help="The delta that goes with epsilon.")],
    clip_norm: Annotated[float, typer.Option(callback=_positive, help="Bound on one patient's gradient.")] = 1.0,
    ledger: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The site's ledger: what it has spent.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plan to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=_svg, help="Also draw epsilon over the rounds into this .svg file.")
    ] = None,
) -> None:
    """Show the noise that a plan needs, epsilon after each round, and what other batch sizes would cost."""
    from dp.ledger import events_in  # noqa: PLC0415
    from dp.planning import plan  # noqa: PLC0415
    from sites.files import write_atomic  # noqa: PLC0415
    from sites.plots import epsilon_plot  # noqa: PLC0415

    planned = plan(
        patients=patients,
        batch_size=batch,
        rounds=rounds,
        steps=steps,
        epsilon=epsilon,
        delta=delta,
        clip_norm=clip_norm,
        spent=() if ledger is None else events_in(ledger),
    )
    _print(planned)
    if json_file is not None:
        write_atomic(json_file, json.dumps(_finite(asdict(planned)), indent=2).encode() + b"\n")
        out.print(f"{json_file}  the plan", soft_wrap=True)
    if plot is not None:
        title = f"Epsilon by RDP at delta {delta:g}: {patients} patients, batch {batch}"
        write_atomic(plot, epsilon_plot(planned.after_round, spent=planned.spent, budget=epsilon, title=title).encode())
        out.print(f"{plot}  epsilon over the rounds", soft_wrap=True)


@budget_app.command(
    name="check",
    epilog="[bold]Example[/bold]: [cyan]secureagg budget check ledger.sqlite --roster manifest.toml --head HEAD[/cyan]",
)
def check_command(
    ledger: LedgerFile,
    roster: RosterFile = None,
    head: NotedHead = None,
) -> None:
    """Check a ledger without trusting it: chain, signatures, and every claimed epsilon, recomputed.

    Status 0 only if all of it holds.
    """
    from dp.chain import verify  # noqa: PLC0415
    from dp.claims import recompute  # noqa: PLC0415
    from dp.errors import LedgerTampered  # noqa: PLC0415

    rows = read_rows(ledger)
    # The first row says whose ledger it claims to be; that all of it is, the key has to show.
    site = verify(rows[:1]).opening.get("site")
    key = None if roster is None or site is None else _key_in(roster, site=str(site))
    found = verified(ledger, rows, public_key=key, head=head)
    print_verified(found)
    if roster is None:
        out.print("Without --roster nothing says whose key this is.", soft_wrap=True)
    checked = recompute(found.entries)
    for text in checked.wrong:
        out.print(text, soft_wrap=True, markup=False)
    if checked.wrong:
        raise LedgerTampered(f"ledger {ledger}: {len(checked.wrong)} of its claims do not hold")
    if checked.delta is None:
        out.print("Nothing was released.")
        return
    out.print(
        f"claims recomputed: {checked.claims}; all hold; epsilon {checked.claimed:.4g} at delta {checked.delta:g}"
    )
    for total in checked.totals:
        out.print(f"{total.name}: {_shown(total.epsilon, '.4g')} ({total.version})", soft_wrap=True, markup=False)


@budget_app.command(
    name="report",
    epilog="[bold]Example[/bold]: [cyan]secureagg budget report ledger.sqlite --out report.html --roster manifest.toml "
    "--head HEAD[/cyan]",
)
def report_command(
    ledger: LedgerFile,
    target: Annotated[Path, typer.Option("--out", callback=_html, help="The .html file to write.")],
    roster: RosterFile = None,
    head: NotedHead = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write what the page says to this file.")
    ] = None,
) -> None:
    """Write the page that a privacy officer reads and signs: one HTML file, everything in it recomputed.

    It is written whatever is found.  Status 0 only if the ledger holds, no audit contradicts it and the budget is kept.
    """
    from dp.errors import BudgetExhausted, LedgerTampered  # noqa: PLC0415
    from sites.files import write_atomic  # noqa: PLC0415
    from sites.manifest import Manifest  # noqa: PLC0415
    from sites.reports.facts import Verdict  # noqa: PLC0415
    from sites.reports.page import as_json, render  # noqa: PLC0415
    from sites.reports.reading import facts_of  # noqa: PLC0415

    facts = facts_of(read_rows(ledger), manifest=None if roster is None else Manifest.load(roster), head=head)
    write_atomic(target, render(facts).encode())
    out.print(f"{target}  {facts.verdict.lower()}: epsilon {facts.spent:.4g} spent", soft_wrap=True, markup=False)
    if json_file is not None:
        write_atomic(json_file, json.dumps(_finite(as_json(facts)), indent=2).encode() + b"\n")
        out.print(f"{json_file}  the same for machines", soft_wrap=True, markup=False)
    found = [*facts.problems, *facts.wrong]
    for text in found:
        out.print(text, soft_wrap=True, markup=False)
    match facts.verdict:
        case Verdict.TAMPERED | Verdict.WRONG | Verdict.CONTRADICTED:
            raise LedgerTampered(f"ledger {ledger}: {facts.verdict.lower()} ({len(found)} findings); {target} says it")
        case Verdict.EXCEEDED:
            raise BudgetExhausted(
                f"ledger {ledger}: epsilon {facts.spent:.4g} is spent, expected at most {facts.budget}"
            )


def _key_in(roster: Path, *, site: str) -> bytes:
    """The signing key that a manifest, signed by all its sites, lists for ``site``."""
    from secureagg.identity import site_id  # noqa: PLC0415
    from sites.errors import ManifestError  # noqa: PLC0415
    from sites.manifest import Manifest  # noqa: PLC0415

    manifest = Manifest.load(roster)
    manifest.check()
    name = site_id(site)
    if name not in manifest.roster:
        raise ManifestError(f"{roster}: lists {', '.join(manifest.roster)}, expected {site}, whose ledger this is")
    return manifest.roster[name].signing_key


def read_rows(path: Path) -> "list[Row]":
    """The rows of a ledger's file or of an export, unchecked."""
    from dp.ledger import read_export, read_ledger  # noqa: PLC0415

    is_database = path.is_file() and _starts_with(path, b"SQLite format 3\0")
    return read_ledger(path) if is_database or path.suffix == ".sqlite" else read_export(path)


def _starts_with(path: Path, beginning: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(beginning)) == beginning


def verified(
    path: Path, rows: "list[Row]", *, public_key: bytes | None = None, head: str | None = None
) -> "Verification":
    """What the rows of ``path`` hold; says what is wrong, by row, and raises LedgerTampered if anything is."""
    from dp.ledger import verify  # noqa: PLC0415

    found = verify(rows, head=head, public_key=public_key)
    for problem in found.problems:
        out.print(f"row {problem.row}, {problem.what}: {problem.text}", soft_wrap=True, markup=False)
    found.check(f"ledger {path}")
    return found


def print_verified(found: "Verification") -> None:
    """Say whose ledger this is, of which data, and its head."""
    opening = found.opening
    for text in (
        f"{len(found.entries)} rows, all in place and signed by {opening['site']}, key {opening['public_key']}",
        f"data {opening['dataset']}, unit {opening['unit']}",
        f"head {found.head}",
    ):
        out.print(text, soft_wrap=True, markup=False)


def _shown(epsilon: float, form: str) -> str:
    return format(epsilon, form) if math.isfinite(epsilon) else "not computed"


def _finite(value: Any) -> Any:  # noqa: ANN401  JSON is of any type
    """With null for infinity, which JSON does not know: an accountant that shows no bound."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(plan: "BudgetPlan") -> None:
    from rich.table import Table  # noqa: PLC0415

    chosen = plan.planned
    out.print(
        f"Noise multiplier {chosen.noise_multiplier:.4g} keeps {plan.rounds} rounds of {plan.steps} steps within "
        f"epsilon {plan.epsilon:g} at delta {plan.delta:g}; {plan.spent:.4g} is spent already.",
        soft_wrap=True,
    )
    if plan.delta * plan.patients >= 1:
        out.print(
            f"Delta {plan.delta:g} is not below 1/{plan.patients}: it allows a mechanism that publishes a patient.",
            soft_wrap=True,
        )
    out.print("\nOther batch sizes, each with the noise that fits:")
    table = Table()
    table.add_column("batch", justify="right")
    table.add_column("chance to be in a step", justify="right")
    table.add_column("noise multiplier", justify="right")
    table.add_column(f"noise on the mean gradient (clip norm {plan.clip_norm:g})", justify="right")
    table.add_column(f"epsilon at noise {chosen.noise_multiplier:.4g}", justify="right")
    for row in plan.what_if:
        table.add_row(
            f"{row.batch_size}{' (all)' if row.sampling_rate == 1 else ''}",
            f"{row.sampling_rate:.3f}",
            f"{row.noise_multiplier:.4g}",
            f"{row.noise_on_mean:.4g}",
            f"{row.epsilon_at_planned_noise:.4g}",
            style="bold" if row == chosen else None,
        )
    out.print(table)
    out.print("\nEpsilon after each round, by RDP:")
    table = Table()
    table.add_column("round", justify="right")
    table.add_column("epsilon", justify="right")
    apart = math.ceil(plan.rounds / _ROUNDS_SHOWN)
    for number, epsilon in enumerate(plan.after_round, start=1):
        if number % apart == 0 or number == plan.rounds:
            table.add_row(str(number), f"{epsilon:.4f}")
    out.print(table)
    out.print("\nAll rounds together, by three accountants:")
    table = Table()
    table.add_column("accountant")
    table.add_column("epsilon", justify="right")
    table.add_column("library")
    for total in plan.totals:
        name = f"{total.name}{' (decides)' if total.name == 'RDP' else ''}"
        table.add_row(name, _shown(total.epsilon, ".4f"), total.version)
    out.print(table)
