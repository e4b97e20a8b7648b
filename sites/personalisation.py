"""A site's own version of the final model: trained on for a few steps on its own patients, and never sent anywhere.

With differential privacy it is booked as a run of its own before a patient is sampled: whoever is given the personal
model, or sees what it predicts, learns of a patient what the ledger then says in all.

How good the sites' own versions are, the consortium learns for all of them together, if its manifest says
``personalised`` in [evaluation].  The round after the training then sums each site's evaluation counts of the final
model and of its own version of it, on the same held-out rows.  A site that has no version of its own is not in that
sum.  So that nothing can be subtracted from it, it is the only one that held-out rows are in: training rounds under
such a manifest evaluate nothing, no other evaluation is allowed, and a site gives its counts once under a manifest,
however often it is asked.
"""

import os
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from safetensors.torch import save

from secureagg.identity import Entropy
from sites.config import OpenSite
from sites.errors import ConfigurationError
from sites.evaluation import Metrics, evaluate_scores
from sites.files import PRIVATE_MODE, write_atomic
from sites.manifest import Privacy, Training
from sites.model_state import State
from sites.site_data import site_data
from sites.trainer import LocalTrainer, ledger_of

PERSONAL_MODEL: Final = "personal.safetensors"  # in the state folder, readable for the site's user only
PURPOSE: Final = "personalise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Personalised:
    """How the final model did on this site's held-out rows ``before`` and ``after``, and the epsilon of it alone."""

    before: Metrics
    after: Metrics
    epsilon: float | None


def personalise(site: OpenSite, final: State, *, run: str, entropy: Entropy = os.urandom) -> Personalised:
    """Train the ``final`` model of ``run`` on as SITE.toml's [personalisation] says; the result is in the state folder.

    Asked again for the same run it gives the same model.  Raises ConfigurationError without such a table, or where
    whole sites are the unit, and BudgetExhausted, before a patient is sampled, where the site's budget has no room.
    """
    plan, mode = site.config.personalisation, site.manifest.privacy.mode
    if plan is None or mode == "site":
        raise ConfigurationError(
            f"site {site.name}: found {'no [personalisation]' if plan is None else 'mode site'}, expected a table "
            "[personalisation] in its configuration, and patients as the unit"
        )
    found = site_data(site)
    ledger = None if mode == "none" else ledger_of(site, found.dataset)
    trainer = LocalTrainer(
        name=site.name,
        training=Training(
            rounds=1,
            local_steps=plan.steps,
            batch_size=plan.batch_size,
            learning_rate=plan.learning_rate,
            server_optimizer="average",
            server_learning_rate=1.0,
        ),
        privacy=Privacy(
            mode="none" if mode == "none" else "local",
            epsilon=plan.epsilon,
            delta=plan.delta,
            clip_norm=site.manifest.privacy.clip_norm,
        ),
        ledger=ledger,
        budget=site.budget,
        consortium=site.manifest.consortium.name,
        manifest_sha256=site.manifest.digest.hex(),
        purpose=PURPOSE,
        entropy=entropy,
        **found.options,
    )
    with closing(trainer):
        result = trainer.train(final, run=f"{PURPOSE} {run}", round_number=1)
    bins = site.manifest.evaluation.histogram_bins
    write_atomic(site.state / PERSONAL_MODEL, save(dict(result.state)), mode=PRIVATE_MODE)
    before, after = (evaluate_scores(*trainer.evaluate(state), bins) for state in (final, result.state))
    return Personalised(before=before, after=after, epsilon=result.epsilon)
