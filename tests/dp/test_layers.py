"""Layers that cannot be trained with patients as the unit: named, with what to put in their place, and replaced."""

import pytest
import torch
from opacus.layers import DPLSTM
from torch import Tensor, nn

from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.layers import refuse_layers, repaired
from dp.training import Plan, train_private


class Block(nn.Module):
    """A residual block as torchvision has them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Of images (n, channels, rows, columns)."""
        found = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(images)))))
        return torch.relu(found + images)


def network() -> nn.Module:
    """A small network of the kind that torchvision has."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Sequential(Block(6)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1)
    )


def train(model: nn.Module) -> None:
    """One private step on made-up images."""
    generator = torch.Generator().manual_seed(1)
    train_private(
        model,
        lambda predictions, targets: ((predictions.squeeze(1) - targets) ** 2).sum(),
        torch.randn(6, 1, 8, 8, generator=generator),
        torch.randn(6, generator=generator),
        patients=range(6),
        plan=Plan(steps=1, learning_rate=0.1, sampling_rate=1.0),
        event=PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=1.0, steps=1),
        clip_norm=1.0,
    )


def test_the_layer_is_named_with_its_remedy() -> None:
    """The error names the first unfit layer by its place in the model, its type, what to write instead, and how many
    more there are."""
    match = (
        r"model, 1\.0\.bn1 \(BatchNorm2d\): .* here nn\.GroupNorm\(2, 6\); and 2 more such layers; dp\.layers\.repaired"
    )
    with pytest.raises(UnsupportedEvent, match=match):
        refuse_layers(network())


def test_layers_that_work_in_place() -> None:
    """A layer that writes over its input, under which Opacus breaks, is named and not left to break in training."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 1))
    with pytest.raises(UnsupportedEvent, match=r"model, 1 \(ReLU\): works in place, .* use ReLU\(inplace=False\)"):
        train(model)
    model[1].inplace = False
    train(model)


def test_a_repaired_model_trains() -> None:
    """A repaired copy has no unfit layer left, trains, and leaves the model that it was made of as it was."""
    model = network()
    with pytest.raises(UnsupportedEvent):
        train(model)
    copy = repaired(model)
    assert isinstance(model[1][0].bn1, nn.BatchNorm2d)
    assert isinstance(copy[1][0].bn1, nn.GroupNorm)
    assert torch.equal(copy[0].weight, model[0].weight)
    train(copy)
    assert not torch.equal(copy[0].weight, model[0].weight)


def test_statistics_without_weights_are_repaired_too() -> None:
    """A normalisation without weights, which Opacus does not look at, is replaced as well."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(144, 1))
    train(repaired(model))


def test_recurrent_layers_are_repaired() -> None:
    """torch's own recurrent layer gives way to the one of Opacus."""
    assert isinstance(repaired(nn.Sequential(nn.LSTM(3, 4)))[0], DPLSTM)


def test_frozen_layers_may_be_what_they_are() -> None:
    """A recurrent layer that is not trained needs no gradients of rows."""
    frozen = nn.LSTM(3, 4).requires_grad_(False)
    refuse_layers(nn.ModuleList([frozen, nn.Linear(4, 1)]))
