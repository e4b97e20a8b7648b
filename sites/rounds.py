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
    only what is noised; an evaluation round sums the counts only; a census round, the last one of a run, sums counts of
    patients.
    """
    members = [SiteId(site) for site in cohort]
    # Stops a coordinator that forms a smaller cohort than every site signed for.
    if len(members) < manifest.policy.minimum_cohort:
        raise ParameterError(
            f"round {round_number}: a cohort of {len(members)} sites, expected at least "
            f"{manifest.policy.minimum_cohort}"
        )
    # Stops a coordinator that goes on asking for updates after the rounds that every site signed for.
    planned = manifest.training.rounds
    if round_number > planned + {"train": 0, "evaluate": 1, "census": 2}[purpose]:
        raise ParameterError(f"round {round_number}, {purpose}: the manifest has {planned} training rounds")
    # Stops one that asks for a census that nobody signed for, or for several.
    if purpose == "census" and (not isinstance(manifest.census, Census) or round_number != planned + 2):
        raise ParameterError(f"round {round_number}, census: the manifest has none, or not in this round")
    bound = Counts(maximum=manifest.evaluation.max_examples)
    lanes = [
        Lane(name=CORRECT, length=1, encoding=bound),
        Lane(name=TOTAL, length=1, encoding=bound),
        Lane(name=HISTOGRAM, length=2 * manifest.evaluation.histogram_bins, encoding=bound),
    ]
    plan, weighted = manifest.noise_plan, False
    if purpose == "census":
        lanes = census.lanes(census.census_of(manifest))
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


def metrics_of(aggregate: Aggregate) -> Metrics | None:
    """What a round's summed counts say about the model it started from; None if it had none."""
    totals = aggregate.totals
    if TOTAL not in totals:
        return None
    return metrics_from_counts(
        correct=int(totals[CORRECT][0]),
        total=int(totals[TOTAL][0]),
        histogram=totals[HISTOGRAM].reshape(2, -1),
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
