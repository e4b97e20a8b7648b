"""The one-run audit of the private training that a site has installed, on its own patients, into its own ledger."""

import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Final

import torch

from dp.audit import AuditPlan, AuditResult, audit
from dp.training import train_private
from secureagg.identity import Entropy
from sites.config import OpenSite
from sites.errors import ConfigurationError
from sites.site_data import site_data
from sites.trainer import RANDOM_GENERATOR, ledger_of

METHOD: Final = "Steinke, Nasr, Jagielski 2023, one run; Dirac canaries"


def audit_site(
    site: OpenSite,
    plan: AuditPlan,
    *,
    entropy: Entropy = os.urandom,
    progress: Callable[[int], None] = lambda _: None,
) -> AuditResult:
    """Audit the training of ``site`` on its data, model, clip norm and learning rate, and write the result, whatever it
    is, into its ledger.

    Nothing that was trained is kept, so it costs no budget.  The row has the number of right guesses, never a coin or a
    score.  Raises ConfigurationError for a site without differential privacy or data, and what ``dp.audit.audit`` does.
    """
    privacy, training = site.manifest.privacy, site.manifest.training
    if privacy.mode != "local":
        raise ConfigurationError(
            f"site {site.name}: privacy mode {privacy.mode} in its manifest, expected local: what is audited is a "
            "training whose noise is the site's own"
        )
    found = site_data(site)
    data = found.data
    with ledger_of(site, found.dataset) as ledger:
        result = audit(
            train_private,
            found.model,
            found.loss,
            data.features,
            data.targets,
            patients=data.owners,
            plan=plan,
            clip_norm=privacy.clip_norm,
            learning_rate=training.learning_rate,
            entropy=entropy,
            progress=progress,
        )
        ledger.record(
            "audit",
            {
                "method": METHOD,
                "canaries": plan.canaries,
                "trainings": plan.trainings,
                "guesses": plan.guesses,
                "correct": result.correct,
                "delta": plan.delta,
                "confidence": plan.confidence,
                "epsilon_lower_bound": result.epsilon_lower_bound,
                "claimed_epsilon": result.claimed_epsilon,
                "holds": result.holds,
                "mechanism": "PoissonSampledGaussian",
                "rounds": plan.rounds,
                "steps": plan.steps,
                "sampling_rate": plan.sampling_rate,
                "noise_multiplier": result.noise_multiplier,
                "clip_norm": privacy.clip_norm,
                "learning_rate": training.learning_rate,
                "patients": len(set(data.owners)),
                "unit": privacy.unit,
                "released": "nothing: every trained model was dropped",
                "random_generator": RANDOM_GENERATOR,
                "library_version": version("secureagg"),
                "opacus_version": version("opacus"),
                "torch_version": torch.__version__,
                "consortium": site.manifest.consortium.name,
                "manifest_sha256": site.manifest.digest.hex(),
            },
        )
    return result
