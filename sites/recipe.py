"""The recipe for the four heart hospitals, which is also what `secureagg consortium create` fills in.

docs/design.md says how it was chosen; `python -m benchmarks recipe` measures it.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from secureagg import Card
from sites.manifest import (
    Consortium,
    Deadlines,
    Encoding,
    Evaluation,
    Manifest,
    Model,
    Policy,
    Privacy,
    Tensor,
    Training,
)
from sites.model_state import ModelSpec, model_digest

POLICY: Final = Policy(minimum_cohort=3, max_corrupt=1, minimum_survivors=3, graph="auto", dropout_percent=10)
ENCODING: Final = Encoding(value_bits=16, value_range=2.0, out_of_range="clip", max_examples=100_000)
EVALUATION: Final = Evaluation(histogram_bins=200, max_examples=100_000)
TRAINING: Final = Training(
    rounds=10,
    local_steps=2,
    batch_size=64,
    learning_rate=0.3,
    server_optimizer="average",
    server_learning_rate=1.0,
)
PRIVACY: Final = Privacy(mode="local", epsilon=1.0, delta=1e-3, clip_norm=0.5)
DEADLINES: Final = Deadlines(join_seconds=60.0, phase_seconds=30.0, training_seconds=60.0)


def new_manifest(
    *,
    name: str,
    coordinator: Card,
    address: str,
    cards: list[Card],
    initial: bytes,
    changes: Mapping[str, msgspec.Struct] | None = None,
) -> Manifest:
    """An unsigned manifest that trains the model of the safetensors bytes ``initial`` by this recipe.

    ``changes``: tables, by their name in the manifest, that replace the recipe's.  Raises ManifestError or
    ShapeMismatch.
    """
    spec = ModelSpec.of_bytes(initial, who="initial model")
    spec.from_bytes(initial, who="initial model")  # only float32 tensors travel
    tables: dict[str, msgspec.Struct] = {
        "consortium": Consortium(name=name),
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
    return Manifest.create(coordinator=coordinator, address=address, cards=cards, **tables)
