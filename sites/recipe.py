"""The recipe for the four heart hospitals, which is also what `secureagg consortium create` fills in.

docs/design.md says how it was chosen; `python -m benchmarks recipe` measures it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from dp.integer_noise import Mechanism
from dp.shared import plan_shared_noise
from secureagg import Card
from sites.errors import ManifestError
from sites.manifest import (
    Census,
    Consortium,
    Deadlines,
    Encoding,
    Evaluation,
    Manifest,
    Model,
    Noise,
    Policy,
    Privacy,
    Tensor,
    Training,
)
from sites.model_state import ModelSpec, model_digest

POLICY: Final = Policy(
    minimum_cohort=3,
    max_corrupt=1,
    minimum_survivors=3,
    graph="auto",
    dropout_percent=10,
    backend="masked",
    release_to="coordinator",
)
ENCODING: Final = Encoding(value_bits=16, value_range=2.0, out_of_range="clip", max_examples=100_000)
EVALUATION: Final = Evaluation(histogram_bins=200, max_examples=100_000, personalised=False)
TRAINING: Final = Training(
    rounds=10,
    local_steps=2,
    batch_size=64,
    learning_rate=0.3,
    server_optimizer="average",
    server_learning_rate=1.0,
)
PRIVACY: Final = Privacy(mode="local", epsilon=1.0, delta=1e-3, clip_norm=0.5)
SHARED_TRAINING: Final = msgspec.structs.replace(TRAINING, rounds=20, local_steps=1, batch_size=243)
SITE_TRAINING: Final = msgspec.structs.replace(TRAINING, rounds=1, local_steps=2, learning_rate=1.0)
SAMPLING_RATE: Final = 0.5  # of patients in a step, with shared noise: 243 of 486
HOMOMORPHIC: Final = msgspec.structs.replace(POLICY, backend="homomorphic", release_to="sites")
DEADLINES: Final = Deadlines(join_seconds=60.0, phase_seconds=30.0, training_seconds=60.0)


def new_manifest(
    *,
    name: str,
    coordinator: Card,
    address: str,
    cards: list[Card],
    initial: bytes,
    changes: Mapping[str, msgspec.Struct] | None = None,
    noise: Mapping[str, Any] | None = None,
) -> Manifest:
    """An unsigned manifest that trains the model of the safetensors bytes ``initial`` by this recipe.

    ``changes``: tables, by their name in the manifest, that replace the recipe's.  The noise that sites share, where
    the privacy mode is "shared" or "site", is solved for with the options ``noise`` of ``shared_noise``.  Raises
    ManifestError, ShapeMismatch, or UnsupportedEvent or BudgetExhausted where there is no such noise.
    """
    spec = ModelSpec.of_bytes(initial, who="initial model")
    spec.from_bytes(initial, who="initial model")  # only float32 tensors travel
    tables: dict[str, msgspec.Struct] = {
        "consortium": Consortium(name=name, revision=1, follows=""),
        "policy": POLICY,
        "encoding": ENCODING,
        "evaluation": EVALUATION,
        "training": TRAINING,
        "privacy": PRIVACY,
        "deadlines": DEADLINES,
        "model": Model(
            tensors=[Tensor(name=name, shape=list(shape)) for name, shape in spec.tensors],
            initial_sha256=model_digest(initial).hex(),
        ),
        **(changes or {}),
    }
    privacy = tables["privacy"]
    if isinstance(privacy, Privacy) and privacy.shares_noise and "noise" not in tables:
        tables["noise"] = shared = shared_noise(tables, sites=len(cards), dimensions=spec.length, **(noise or {}))
        # No round begins that could not end.
        policy: Any = tables["policy"]
        least = max(policy.minimum_cohort, len(cards) - shared.max_dropouts)
        tables["policy"] = msgspec.structs.replace(policy, minimum_cohort=least)
    return Manifest.create(coordinator=coordinator, address=address, cards=cards, **tables)


def census_table(labels: Sequence[str], *, max_corrupt: int) -> Census:
    """A census of patients and of ``labels``, each as "NAME=class,class"; ManifestError for one that is none."""
    classes = {name: listed.split(",") for name, _, listed in (text.partition("=") for text in labels)}
    fields = {"labels": classes, "minimum_sites": max(3, max_corrupt + 2)}
    try:
        return msgspec.convert(fields, Census)
    except msgspec.ValidationError as error:
        raise ManifestError(f"census: {error}") from error


def recipe_of(mode: str) -> tuple[Training, Privacy]:
    """What of the recipe depends on the privacy mode; ManifestError for one that does not exist."""
    training = {"shared": SHARED_TRAINING, "site": SITE_TRAINING}.get(mode, TRAINING)
    unit = "site" if mode == "site" else "patient"
    try:
        privacy = msgspec.convert({**msgspec.to_builtins(PRIVACY), "mode": mode, "unit": unit}, Privacy)
    except msgspec.ValidationError as error:
        raise ManifestError(f"privacy mode: found {mode!r}, expected local, shared, site or none") from error
    return training, privacy


def shared_noise(
    tables: Mapping[str, Any],
    *,
    sites: int,
    dimensions: int,
    sampling_rate: float = SAMPLING_RATE,
    max_dropouts: int | None = None,
    mechanism: Mechanism = "skellam",
) -> Noise:
    """The least noise that keeps what the ``tables`` of a manifest promise; takes seconds.

    ``max_dropouts``: by default as many as leave the policy's least number of survivors.
    """
    privacy, training, policy = tables["privacy"], tables["training"], tables["policy"]
    of_patients = privacy.unit == "patient"
    plan = plan_shared_noise(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        steps=training.rounds,
        dimensions=dimensions,
        sites=sites,
        dropouts=max(0, sites - policy.minimum_survivors) if max_dropouts is None else max_dropouts,
        colluders=max(1, policy.max_corrupt),
        clip_norm=privacy.clip_norm,
        sampling_rate=sampling_rate if of_patients else 1.0,
        expected_batch=training.batch_size / sites if of_patients else 1.0,
        # All patients of a step may be one site's.
        coordinate_clip=privacy.clip_norm * (training.batch_size if of_patients else 1),
        mechanism=mechanism,
        unit=privacy.unit,
        ring_bits_max=63,
    )
    return Noise(
        mechanism=plan.mechanism,
        sampling_rate=max(plan.sampling_rates),
        max_dropouts=plan.dropouts,
        coordinate_clip=plan.coordinate_clip,
        scale=plan.scale,
        ring_bits=plan.ring_bits,
        local_deviation=plan.local_deviation,
    )
