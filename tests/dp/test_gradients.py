"""Losses and models in which one row's gradient depends on other rows, or is not what Opacus says, are refused."""

import copy

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.gradients import refuse_coupled
from dp.training import Plan, train_private

ROWS = 40
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def make(*modules: nn.Module) -> nn.Module:
    """A model of these modules with fixed random parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*modules) if modules else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        return model


def features() -> Tensor:
    """Random features."""
    return torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1))


def classes() -> Tensor:
    """One class in ten is 1."""
    return (torch.arange(ROWS) % 10 == 3).long()


def follow_up() -> Tensor:
    """Times, and an event for one in ten."""
    return torch.stack([torch.arange(ROWS) * 0.7 % 5, classes().float()], dim=1)


def cross_entropy(predictions: Tensor, targets: Tensor) -> Tensor:
    """The sum over rows."""
    return nn.functional.cross_entropy(predictions, targets, reduction="sum")


def constant_weights(predictions: Tensor, targets: Tensor) -> Tensor:
    """Class weights that no batch changes."""
    return nn.functional.cross_entropy(predictions, targets, weight=torch.tensor([1.0, 9.0]), reduction="sum")


def mean(predictions: Tensor, targets: Tensor) -> Tensor:
    """The mean over rows, which is torch's default."""
    return nn.functional.cross_entropy(predictions, targets)


def counted_weights(predictions: Tensor, targets: Tensor) -> Tensor:
    """Class weights from the classes in the batch."""
    counts = torch.bincount(targets, minlength=2).clamp(min=1)
    return nn.functional.cross_entropy(predictions, targets, weight=len(targets) / (2.0 * counts), reduction="sum")


def cox(predictions: Tensor, targets: Tensor) -> Tensor:
    """Cox' negative partial log-likelihood, Breslow's form."""
    risk, time, event = predictions[:, 0], targets[:, 0], targets[:, 1]
    at_risk = (time[None, :] >= time[:, None]).float()
    return -(event * (risk - torch.log((at_risk * risk.exp()[None, :]).sum(dim=1)))).sum()


def contrastive(predictions: Tensor, targets: Tensor) -> Tensor:
    """InfoNCE of each row against all others."""
    similar = predictions @ predictions.T
    return nn.functional.cross_entropy(similar, torch.arange(len(targets)), reduction="sum")


def ranking(predictions: Tensor, targets: Tensor) -> Tensor:
    """A hinge over all pairs of a positive and a negative."""
    scores = predictions[:, 0]
    return torch.relu(1 - scores[targets == 1][:, None] + scores[targets == 0][None, :]).sum()


def check(model: nn.Module, loss, x: Tensor, y: Tensor, most_rows: int = 256) -> None:
    """Look for coupling, and see that the model and torch's seeds stay as they were."""
    before, seed = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    wrapped = GradSampleModule(model, loss_reduction="sum")
    try:
        refuse_coupled(wrapped, loss, x, y, most_rows=most_rows)
    finally:
        wrapped.to_standard_module()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(seed, torch.random.get_rng_state())


@pytest.mark.parametrize("loss", [mean, counted_weights, cox, contrastive, ranking])
@pytest.mark.parametrize("most_rows", [2, 5, 256])
def test_losses_that_couple_rows_are_refused(loss, most_rows: int) -> None:
    """A loss that compares, counts or averages over the batch is refused with what to use instead, even where events
    are rare and few rows fit."""
    targets = follow_up() if loss is cox else classes()
    with pytest.raises(UnsupportedEvent, match=r"not the sum of their losses alone.*discrete-time hazard"):
        check(make(), loss, features(), targets, most_rows)


@pytest.mark.parametrize("loss", [cross_entropy, constant_weights])
@pytest.mark.parametrize("most_rows", [1, 2, 256])
def test_sums_over_rows_pass(loss, most_rows: int) -> None:
    """A loss that is a sum over rows passes, and is tried on no more rows at once than a batch may have."""
    rows = []

    def noted(predictions: Tensor, targets: Tensor) -> Tensor:
        rows.append(len(targets))
        return loss(predictions, targets)

    check(make(), noted, features(), classes(), most_rows)
    assert max(rows) == min(most_rows, 12)


def test_coupled_training_is_refused_before_it_begins() -> None:
    """Private training refuses a coupling loss, and the model stays as it was."""
    model = make()
    before = copy.deepcopy(model.state_dict())
    event = PoissonSampledGaussian(sampling_rate=0.5, noise_multiplier=1.0, steps=2)
    plan = Plan(steps=2, learning_rate=0.1, sampling_rate=0.5)
    with pytest.raises(UnsupportedEvent, match="discrete-time hazard"):
        train_private(model, cox, features(), follow_up(), patients=range(ROWS), plan=plan, event=event, clip_norm=1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Centred(nn.Module):
    """A layer without parameters that takes the batch's mean away."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, ...)."""
        return x - x.mean(dim=0)


class Paired(nn.Module):
    """A layer without parameters that adds every row at an even place to the next one, with no way back."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, ...)."""
        paired = x.clone()
        paired[1::2] += x[0::2][: len(x) // 2].detach()
        return paired


class Positioned(nn.Module):
    """Adds an embedding of the position, looked up once for the batch: no batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3)."""
        return x + self.positions(torch.arange(3)).squeeze(1)


class Borrowing(nn.Module):
    """Uses a layer's weight without calling the layer, beside a call or instead of one."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.calls = calls
        self.owner = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3)."""
        borrowed = nn.functional.linear(x, self.owner.weight)
        return borrowed + self.owner(x) if self.calls else borrowed


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (Centred(), "a row whose gradient depends on other rows, expected the sum"),
        (Paired(), "a row whose gradient depends on other rows, expected the sum"),
        (Positioned(), "positions.weight: found 3 gradients for 12 rows"),
        (Borrowing(calls=False), "owner.weight: found no gradients for 12 rows"),
        (Borrowing(calls=True), "do not add up to the batch's"),
    ],
    ids=["centred", "paired", "positions", "borrowed", "borrowed and called"],
)
def test_models_whose_rows_are_not_their_own_are_refused(layer: nn.Module, match: str) -> None:
    """A layer that mixes rows, one without a batch dimension, and a weight used behind Opacus' back are refused; the
    parameter is named without Opacus' prefix."""
    with pytest.raises(UnsupportedEvent, match=match) as refused:
        check(make(nn.Linear(3, 3), nn.Tanh(), layer, nn.Linear(3, 2)), cross_entropy, features(), classes())
    assert "_module" not in str(refused.value)


def test_dropout_passes() -> None:
    """Random layers do not look like coupling, whatever torch's seed is."""
    check(make(nn.Linear(3, 30), nn.Dropout(), nn.Linear(30, 2)), cross_entropy, features(), classes())


class Spare(nn.Module):
    """Has a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3)."""
        return self.used(x)


def test_layers_that_are_not_used_get_noise_only() -> None:
    """A parameter that the loss does not depend on is trained like any other: zero gradient, and noise."""
    model = Spare()
    before = copy.deepcopy(model.state_dict())
    event = PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=1.0, steps=1)
    plan = Plan(steps=1, learning_rate=0.1, sampling_rate=1.0)
    options = {"patients": range(ROWS), "plan": plan, "event": event, "clip_norm": 1.0}
    train_private(model, cross_entropy, features(), classes(), **options)
    assert all((before[name] != tensor).all() for name, tensor in model.state_dict().items())


def test_a_layer_used_twice_passes() -> None:
    """Weights shared by calling one layer twice have the gradient of both calls."""
    shared = nn.Linear(3, 3)
    check(make(shared, nn.Tanh(), shared, nn.Linear(3, 2)), cross_entropy, features(), classes())


def test_predictions_that_are_not_one_per_row_are_refused() -> None:
    """A model that gives another number of predictions than rows is refused with both numbers."""
    with pytest.raises(UnsupportedEvent, match="24 predictions of 12 rows"):
        check(make(nn.Linear(3, 2), nn.Flatten(0)), lambda p, _: (p**2).sum(), features(), classes())


def test_spoiled_rows_do_not_hide_a_coupling() -> None:
    """Rows without a finite gradient are passed over; if none is left, because all are coupled to one, that is
    refused too."""
    spoiled = features()
    spoiled[0] = float("nan")
    check(make(), cross_entropy, spoiled, classes())
    for loss in (cox, counted_weights, contrastive):
        with pytest.raises(UnsupportedEvent):
            check(make(), loss, spoiled, follow_up() if loss is cox else classes())
    with pytest.raises(UnsupportedEvent, match="no row with a finite gradient"):
        check(make(), cross_entropy, spoiled * float("nan"), classes())
