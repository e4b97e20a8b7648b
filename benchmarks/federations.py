"""Federations in one process, made of the parts that sites train with, for measurements of quality.

Gradients, clipping, sampling, noise, encoding and decoding are those of ``dp``; what a site does in a round is what
``sites.trainer`` does, without a ledger, which changes no number.  Encoded sums are added modulo the ring here, which
is what a secure sum opens: that the protocol's sums are exact is tested where the protocol is.  Whether a loss couples
rows is tried once for each run, not in every round.  Randomness comes from seeded streams, so that a run can be
repeated.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import dp.training
from dp.accountants import noise_multiplier_for
from dp.events import PoissonSampledGaussian
from dp.gradients import Loss
from dp.shared import SharedNoisePlan, decode, encode, plan_shared_noise
from dp.training import Plan, clipped_gradient_sum, train_plain, train_private
from secureagg.testing import CountingEntropy
from sites.model_state import ModelSpec, State
from sites.trainer import Examples, binary_loss

Floats = npt.NDArray[np.float64]
UNCLIPPED = 2.0**10  # longer than any gradient here


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What is chosen on validation patients: ``steps`` in all; ``share`` of all patients in a step, which is each
    patient's chance where the step is one of all sites together, and else each site's expected batch is that share of
    the sites' mean size, or all it has."""

    steps: int
    learning_rate: float
    clip_norm: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """Sites with their training rows and those they are judged on, in the same order; ``model``: from a seed;
    ``loss``: predictions and targets of some rows to the sum of their losses."""

    sites: Mapping[str, Examples]
    held_out: Mapping[str, Examples]
    model: Callable[[int], nn.Module]
    delta: float
    local_steps: int
    loss: Loss = binary_loss

    @property
    def rows(self) -> int:
        """Of all sites together; each is another patient's."""
        return sum(len(site.targets) for site in self.sites.values())

    @property
    def pooled(self) -> Examples:
        """All sites' training rows in one place."""
        every = list(self.sites.values())
        return Examples(
            features=torch.cat([site.features for site in every]), targets=torch.cat([site.targets for site in every])
        )

    @property
    def dimensions(self) -> int:
        """How many numbers the model has."""
        return sum(parameter.numel() for parameter in self.model(0).parameters())


@contextmanager
def probing_once() -> Iterator[None]:
    """``dp.gradients.refuse_coupled`` for the first round only: it changes no number, and takes most of the time of a
    small round."""
    probe, probed = dp.training.refuse_coupled, False

    def first_only(*arguments: object, **options: object) -> None:
        nonlocal probed
        if not probed:
            probe(*arguments, **options)
            probed = True

    with mock.patch.object(dp.training, "refuse_coupled", first_only):
        yield


@cache
def gaussian(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The noise multiplier that this costs; takes a fifth of a second once."""
    return noise_multiplier_for(epsilon=epsilon, delta=delta, sampling_rate=sampling_rate, steps=steps)


def site_rate(rows: int, chosen: Configuration, *, sites: int, total: int) -> float:
    """A site's sampling rate where each site steps by itself."""
    return min(1.0, max(1, round(chosen.share * total / sites)) / rows)


@cache
def shared_plan(  # the arguments are a plan's
    chosen: Configuration,
    *,
    epsilon: float,
    delta: float,
    dimensions: int,
    sites: int,
    rows: int,
    dropouts: int,
    colluders: int = 1,
) -> SharedNoisePlan:
    """The shared noise of a federation of equal expectations, as ``sites.recipe`` asks for it."""
    batch = max(1, round(chosen.share * rows))
    return plan_shared_noise(
        epsilon=epsilon,
        delta=delta,
        steps=chosen.steps,
        dimensions=dimensions,
        sites=sites,
        dropouts=dropouts,
        colluders=colluders,
        clip_norm=chosen.clip_norm,
        sampling_rate=chosen.share,
        expected_batch=batch / sites,
        coordinate_clip=chosen.clip_norm * batch,
        ring_bits_max=63,
    )


def plan_of(task: Task, chosen: Configuration, *, epsilon: float, dropouts: int) -> SharedNoisePlan:
    """The shared noise of ``task``'s sites of which ``dropouts`` may be missing, against one colluder."""
    return shared_plan(
        chosen,
        epsilon=epsilon,
        delta=task.delta,
        dimensions=task.dimensions,
        sites=len(task.sites),
        rows=task.rows,
        dropouts=dropouts,
    )


@probing_once()
def shared_gradients(
    task: Task, chosen: Configuration, *, plan: SharedNoisePlan | None, seed: int, entropy_of: str = "shared"
) -> State:
    """The model of ``privacy.mode = "shared"`` with this noise; without a ``plan`` neither clipped nor noised.

    Every site survives every round: dropouts are planned for only.
    """
    model = task.model(seed)
    spec = ModelSpec(tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters()))
    vector = spec.flatten(model.state_dict(), who="model")
    entropies = {name: CountingEntropy(f"{entropy_of} {seed} {name}".encode()) for name in task.sites}
    batch = max(1, round(chosen.share * task.rows))
    for _ in range(chosen.steps):
        model.load_state_dict(spec.restore(vector))
        opened = np.zeros(spec.length, np.uint64)
        clear = np.zeros(spec.length)
        for name, site in task.sites.items():
            total = clipped_gradient_sum(
                model,
                task.loss,
                site.features,
                site.targets,
                patients=site.owners,
                sampling_rate=chosen.share,
                clip_norm=UNCLIPPED if plan is None else chosen.clip_norm,
                entropy=entropies[name],
            )
            if plan is None:
                clear += total.values
            else:
                opened += encode(total, plan, entropy=entropies[name])  # modulo 2^64, and so modulo the ring
        summed = clear if plan is None else decode(opened, plan)
        vector = vector + (-chosen.learning_rate * summed / batch).astype(np.float32)
    return spec.restore(vector)


@probing_once()
def own_noise(task: Task, chosen: Configuration, *, epsilon: float | None, seed: int) -> State:
    """The model of ``privacy.mode = "local"``, or of "none" without ``epsilon``, which is FedAvg: in each round every
    site takes ``task.local_steps`` steps, and the models are averaged by the sites' rows."""
    model = task.model(seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    entropies = {name: CountingEntropy(f"local {seed} {name}".encode()) for name in task.sites}
    for _ in range(max(1, chosen.steps // task.local_steps)):
        summed = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        for name, site in task.sites.items():
            model.load_state_dict(state)
            rate = site_rate(len(site.targets), chosen, sites=len(task.sites), total=task.rows)
            _train(model, site, chosen, task, rate=rate, steps=task.local_steps, epsilon=epsilon, by=entropies[name])
            for key, tensor in model.state_dict().items():
                summed[key] += len(site.targets) / task.rows * tensor.double()
        state = {name: tensor.float() for name, tensor in summed.items()}
    return state


def alone(task: Task, chosen: Configuration, *, epsilon: float | None, seed: int) -> dict[str, State]:
    """Each site's model, trained on its own rows only."""
    states = {}
    for name, site in task.sites.items():
        model = task.model(seed)
        rate = site_rate(len(site.targets), chosen, sites=len(task.sites), total=task.rows)
        entropy = CountingEntropy(f"alone {seed} {name}".encode())
        _train(model, site, chosen, task, rate=rate, steps=chosen.steps, epsilon=epsilon, by=entropy)
        states[name] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return states


def central(
    task: Task, chosen: Configuration, *, epsilon: float | None, seed: int, noise_multiplier: float | None = None
) -> State:
    """The model of all rows in one place: central DP-SGD, or without ``epsilon`` without privacy.  With a
    ``noise_multiplier`` that is taken in place of the one for ``epsilon``."""
    model = task.model(seed)
    _train(
        model,
        task.pooled,
        chosen,
        task,
        rate=chosen.share,
        steps=chosen.steps,
        epsilon=epsilon,
        by=CountingEntropy(f"central {seed}".encode()),
        noise_multiplier=noise_multiplier,
    )
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def _train(
    model: nn.Module,
    data: Examples,
    chosen: Configuration,
    task: Task,
    *,
    rate: float,
    steps: int,
    epsilon: float | None,
    by: CountingEntropy,
    noise_multiplier: float | None = None,
) -> None:
    """``steps`` of the configuration's, with the noise that all of its steps cost."""
    plan = Plan(steps=steps, learning_rate=chosen.learning_rate, sampling_rate=rate)
    if epsilon is None and noise_multiplier is None:
        train_plain(model, task.loss, data.features, data.targets, plan=plan, entropy=by)
        return
    if noise_multiplier is None:
        noise_multiplier = gaussian(epsilon=epsilon, delta=task.delta, sampling_rate=rate, steps=chosen.steps)
    event = PoissonSampledGaussian(sampling_rate=rate, noise_multiplier=noise_multiplier, steps=steps)
    train_private(
        model,
        task.loss,
        data.features,
        data.targets,
        patients=data.owners,
        plan=plan,
        event=event,
        clip_norm=chosen.clip_norm,
        entropy=by,
    )
