"""How the consortium's signed manifest becomes the parameters of one round: the same on both sides, from own copies."""

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from dp.shared import decode
from secureagg import Aggregate, Counts, FixedPoint, Lane, ParameterError, RingElements, RoundParameters, SiteId
from sites import census
from sites.control import Purpose
from sites.evaluation import Metrics, metrics_from_counts
from sites.manifest import Census, Manifest
from sites.model_state import ModelSpec
from transport import Limits

UPDATE: Final = "update"
CORRECT: Final = "correct"
TOTAL: Final = "total"
HISTOGRAM: Final = "histogram"
PERSONAL_CORRECT: Final = "personal-correct"  # of the same examples, by the sites' own versions of the model
PERSONAL_HISTOGRAM: Final = "personal-histogram"
MEMORY_BYTES: Final = 256 << 20  # of messages under way at the coordinator
_BESIDE_THE_MODEL: Final = 8 << 20  # the largest of all other messages, and the names of a model's tensors


def model_spec(manifest: Manifest) -> ModelSpec:
    """The tensors that this consortium trains."""
    return ModelSpec(tuple((tensor.name, tuple(tensor.shape)) for tensor in manifest.model.tensors))


def transport_limits(manifest: Manifest, *, memory_bytes: int = MEMORY_BYTES) -> Limits:
    """The limits of messages that the consortium needs: the model is the largest, and goes to the sites only, but where
    they hold it, with two vectors that the server optimizer remembers, and give it to each other."""
    names = sum(2000 + len(tensor.name) for tensor in manifest.model.tensors)
    model = 4 * model_spec(manifest).length + names
    if manifest.policy.sites_hold_model:
        most = 3 * model + _BESIDE_THE_MODEL
        return Limits(message_bytes=most, to_site_bytes=most, memory_bytes=memory_bytes)
    return Limits(to_site_bytes=model + _BESIDE_THE_MODEL, memory_bytes=memory_bytes)


def round_parameters(
    manifest: Manifest, *, run: str, round_number: int, purpose: Purpose, cohort: Iterable[str], model_digest: bytes
) -> RoundParameters:
    """The parameters of one round of ``purpose`` with ``cohort``; ParameterError if the manifest does not allow it.

    A training round sums the weighted update and the evaluation counts of the incoming model, one with shared noise
    only what is noised; an evaluation round sums the counts only, one of personal models those of the sites' own
    versions beside them; a census round, the last one of a run, sums counts of patients.
    """
    members = [SiteId(site) for site in cohort]
    # Stops a coordinator that forms a smaller cohort than every site signed for.
    if len(members) < manifest.policy.minimum_cohort:
        raise ParameterError(
            f"round {round_number}: a cohort of {len(members)} sites, expected at least "
            f"{manifest.policy.minimum_cohort}"
        )
    # Stops a coordinator that goes on asking for updates after the rounds that every site signed for.
    planned, personalised = manifest.training.rounds, manifest.evaluation.personalised
    if round_number > planned + {"train": 0, "evaluate": 1, "personalise": 1, "census": 2}[purpose]:
        raise ParameterError(f"round {round_number}, {purpose}: the manifest has {planned} training rounds")
    # Stops one that asks for a census that nobody signed for, or for several.
    if purpose == "census" and (not isinstance(manifest.census, Census) or round_number != planned + 2):
        raise ParameterError(f"round {round_number}, census: the manifest has none, or not in this round")
    # Stops one that asks for personal models that nobody signed for, and one that has all sites evaluate the model,
    # too: the difference of the sums would be the counts of the sites without a model of their own, perhaps of one.
    if purpose in ("evaluate", "personalise") and personalised != (purpose == "personalise"):
        raise ParameterError(
            f"round {round_number}, {purpose}: the manifest has the final model evaluated "
            f"{'together with' if personalised else 'without'} personal ones"
        )
    if purpose == "personalise" and round_number != planned + 1:
        raise ParameterError(f"round {round_number}, personalise: expected in round {planned + 1} only")
    lanes = evaluation_lanes(manifest)
    plan, weighted = manifest.noise_plan, False
    if purpose == "census":
        lanes = census.lanes(census.census_of(manifest))
    if purpose == "train" and personalised:
        lanes = []  # for the same reason
    if purpose == "train" and plan is not None:
        # With shared noise a round is one step: the model is evaluated at the end.
        lanes = [Lane(name=UPDATE, length=plan.dimensions, encoding=RingElements(ring_bits=plan.ring_bits))]
    elif purpose == "train":
        weighted = True
        encoding = FixedPoint(
            value_range=manifest.encoding.value_range,
            value_bits=manifest.encoding.value_bits,
            clip=manifest.encoding.out_of_range == "clip",
        )
        lanes.append(Lane(name=UPDATE, length=model_spec(manifest).length, encoding=encoding, weighted=True))
    return RoundParameters.create(
        consortium=f"{manifest.consortium.name}@{manifest.digest.hex()}",
        run=run,
        round_number=round_number,
        roster=manifest.roster,
        cohort=members,
        lanes=lanes,
        model_digest=model_digest,
        max_weight=manifest.encoding.max_examples if weighted else None,
        backend=manifest.policy.backend,
        release_to=manifest.policy.release_to,
        **manifest.thresholds(len(members)),
    )


def evaluation_lanes(manifest: Manifest) -> list[Lane]:
    """The lanes of an evaluation; where the manifest says so, of personal models too."""
    bound, bins = Counts(maximum=manifest.evaluation.max_examples), 2 * manifest.evaluation.histogram_bins
    lengths = {CORRECT: 1, TOTAL: 1, HISTOGRAM: bins}
    if manifest.evaluation.personalised:
        lengths |= {PERSONAL_CORRECT: 1, PERSONAL_HISTOGRAM: bins}
    return [Lane(name=name, length=length, encoding=bound) for name, length in lengths.items()]


def metrics_of(aggregate: Aggregate) -> Metrics | None:
    """What a round's summed counts say about the model it started from; None if it had none."""
    return _metrics_of(aggregate, correct=CORRECT, histogram=HISTOGRAM)


def personal_metrics_of(aggregate: Aggregate) -> Metrics | None:
    """What a round's summed counts say about the sites' own versions of the model, each judged on its own site's
    examples; None if it had none."""
    return _metrics_of(aggregate, correct=PERSONAL_CORRECT, histogram=PERSONAL_HISTOGRAM)


def _metrics_of(aggregate: Aggregate, *, correct: str, histogram: str) -> Metrics | None:
    totals = aggregate.totals
    if histogram not in totals:
        return None
    return metrics_from_counts(
        correct=int(totals[correct][0]),
        total=int(totals[TOTAL][0]),
        histogram=totals[histogram].reshape(2, -1),
    )


def mean_update(manifest: Manifest, aggregate: Aggregate) -> npt.NDArray[np.float64]:
    """By what a training round's sum moves the model, before the server's optimizer.

    With shared noise, patients' gradients are divided by the batch size that the manifest expects, never by what was in
    a batch, and multiplied by the learning rate; whole sites' updates are divided by the survivors.
    """
    plan, training = manifest.noise_plan, manifest.training
    if plan is None:
        return aggregate.means[UPDATE]
    total = decode(aggregate.totals[UPDATE], plan)
    if plan.unit == "site":
        return total / len(aggregate.survivors)
    return -training.learning_rate * total / training.batch_size
