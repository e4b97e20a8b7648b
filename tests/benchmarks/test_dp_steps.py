"""The measurement of DP-SGD steps compares steps that train the same model on as many rows."""

import pytest
import torch

from benchmarks import dp
from benchmarks.dp import Steps, compared


def test_every_way_trains(monkeypatch):
    """Each way changes all weights of its model: none is a step that was skipped."""
    models = []

    def weights(model):
        return [each.detach().clone() for each in model.parameters() if each.ndim > 1]

    def kept():
        models.append(dp.small_cnn(1, 2, 1, width=4))
        return models[-1]

    monkeypatch.setitem(dp.MODELS, "small CNN", kept)
    monkeypatch.setattr(dp, "PATIENTS", 300)
    monkeypatch.setattr(dp, "SIZE", 16)
    made = Steps("small CNN", 3)
    for way in (made.pytorch, made.opacus, made.ours):
        torch.manual_seed(0)
        before = weights(dp.small_cnn(1, 2, 1, width=4))
        torch.manual_seed(0)
        way(1)
        after = weights(models[-1])
        assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True)), way


def test_figures(monkeypatch):
    """Ratios are of the times that stand beside them, and the bound is on the one to plain Opacus."""
    monkeypatch.setattr(dp, "PATIENTS", 300)
    monkeypatch.setattr(dp, "SIZE", 16)
    monkeypatch.setattr(dp, "BATCH", 16)
    found = {each.name: each for each in compared("filter bank", 1, steps=2, repeats=3)}
    assert {name for name, each in found.items() if each.wanted} == {"ours / Opacus"}
    expected = [
        one / other for one, other in zip(found["ours, a step"].values, found["Opacus, a step"].values, strict=True)
    ]
    assert found["ours / Opacus"].values == pytest.approx(expected)
