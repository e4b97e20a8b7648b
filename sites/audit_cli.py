"""The command line's `audit`; torch is imported inside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from dp.audit import AuditPlan
from dp.errors import AuditFailed
from sites.config import OpenSite, open_site

if TYPE_CHECKING:
    from dp.audit import AuditResult

audit_app = typer.Typer()
out = Console(highlight=False)
err = Console(stderr=True)

DEFAULT: Final = AuditPlan()


@audit_app.command(
    name="audit", epilog="[bold]Example[/bold]: [cyan]secureagg audit SITE.toml[/cyan]  (a minute, on one core)"
)
def audit_command(
    config: Annotated[Path, typer.Argument(help="The site's configuration.")],
    canaries: Annotated[
        int,
        typer.Option(
            min=2,
            help=f"Made-up patients; a multiple of {DEFAULT.canaries_per_training}, or fewer, for one training.",
        ),
    ] = DEFAULT.canaries,
    guesses: Annotated[
        int, typer.Option(min=2, help="Guesses: half that a canary was there, half that it was not.")
    ] = DEFAULT.guesses,
    rounds: Annotated[int, typer.Option(min=2, max=1000, help="Rounds of a training; even.")] = DEFAULT.rounds,
    epsilon: Annotated[float, typer.Option(help="The epsilon that the audited trainings claim.")] = DEFAULT.epsilon,
    delta: Annotated[float, typer.Option(help="The delta that goes with it.")] = DEFAULT.delta,
    confidence: Annotated[float, typer.Option(help="Of the lower bound.")] = DEFAULT.confidence,
) -> None:
    """Try to prove this site's private training wrong, on its own data, and write the outcome into its ledger.

    Trains with made-up patients, each in or out by a secret coin, and guesses the coins from the models that come out.
    The models are dropped: nothing is released and no budget is spent.  Status 1 if the guesses contradict the epsilon.
    """
    from rich.progress import Progress  # noqa: PLC0415

    plan = AuditPlan(
        canaries=canaries,
        guesses=guesses,
        rounds=rounds,
        epsilon=epsilon,
        delta=delta,
        confidence=confidence,
        canaries_per_training=min(canaries, DEFAULT.canaries_per_training),
    )
    site = open_site(config)

    import torch  # noqa: PLC0415

    from sites.audit import audit_site  # noqa: PLC0415

    torch.set_num_threads(1)  # tensors are small: threads would wait for each other more than they work
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("trainings", total=plan.trainings)
        result = audit_site(site, plan, progress=lambda finished: bar.update(task, completed=finished))
    _print(site, result)
    if not result.holds:
        raise AuditFailed(
            f"site {site.name}: THE AUDIT FAILED: an attacker who sees the models learns more than epsilon "
            f"{result.claimed_epsilon:.3g} allows (at least {result.epsilon_lower_bound:.3g}, at {confidence:.0%} "
            "confidence); do not train or release with this installation, and find out what it does to sampling, "
            f"clipping or noise; the result is in {site.ledger}"
        )


def _print(site: OpenSite, result: "AuditResult") -> None:
    from rich.table import Table  # noqa: PLC0415

    plan, privacy = result.plan, site.manifest.privacy
    table = Table(show_header=False, title=f"Audit of the private training at {site.name}", title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    trainings = "1 training" if plan.trainings == 1 else f"{plan.trainings} trainings"
    table.add_row("canaries", f"{plan.canaries:,} in {trainings} of {plan.rounds} rounds of {plan.steps} steps")
    table.add_row(
        "mechanism",
        f"sampling rate {plan.sampling_rate:g}, clip norm {privacy.clip_norm:g}, noise multiplier "
        f"{result.noise_multiplier:.4g}",
    )
    table.add_row("right guesses", f"{result.correct:,} of {plan.guesses:,}")
    table.add_row("epsilon claimed", f"{result.claimed_epsilon:.3f} at delta {plan.delta:g}")
    table.add_row(
        "epsilon proved", f"{result.epsilon_lower_bound:.3f} or more, at {plan.confidence:.0%} confidence", style="bold"
    )
    table.add_row("outcome", "the claim stands" if result.holds else "THE CLAIM IS CONTRADICTED", style="bold")
    out.print(table)
    out.print(
        "This tries the code that is installed here (sampling, clipping, noise) with noise of the audit's own, not the "
        "epsilon of your past or future runs, and it is no proof of privacy: a bound below the claim says that this "
        "attack found nothing, and noise that is only somewhat too small would not show. The trained models were "
        "dropped: nothing was released, and no budget was spent.",
        soft_wrap=True,
    )
    out.print(f"{site.ledger}  has the signed result", soft_wrap=True)
