"""Layers that DP-SGD cannot train with, by name, and what to put in their place.

A patient's gradient must depend on that patient alone, and there must be one for each row.  Models made for ordinary
training (torchvision's, for example) often have layers for which one of these is not so.
"""

import copy
from math import gcd
from typing import Final

from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

from dp.errors import UnsupportedEvent

GROUPS: Final = 32  # of the normalisation that takes the place of BatchNorm, or fewer (Wu and He, ECCV 2018)
_RECURRENT: Final = {nn.LSTM: "DPLSTM", nn.GRU: "DPGRU", nn.MultiheadAttention: "DPMultiheadAttention"}


def refuse_layers(model: nn.Module) -> None:
    """Raise UnsupportedEvent that names the first layer that cannot be trained with patients as the unit, what is wrong
    with it, what to put in its place, and how many more there are."""
    found = [
        f"{name or 'the model'} ({type(module).__name__}): {problem}"
        for name, module in model.named_modules()
        if (problem := _problem(module)) is not None
    ]
    # Opacus may know of layers that are not listed here.
    of_opacus = (*ModuleValidator.validate(model, strict=False), *GradSampleModule.validate(model, strict=False))
    found = found or [str(error) for error in of_opacus]
    if found:
        others = f"; and {len(found) - 1} more such layers" if len(found) > 1 else ""
        raise UnsupportedEvent(f"model, {found[0]}{others}; dp.layers.repaired(model) replaces what can be replaced")


def repaired(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which what ``refuse_layers`` names is replaced: BatchNorm by GroupNorm, recurrent layers
    and attention by Opacus' own, nothing changed in place.  Weights of replaced normalisations are new: train anew.

    Raises UnsupportedEvent for what has no such replacement.
    """
    fixed: nn.Module = ModuleValidator.fix(copy.deepcopy(model))  # layers with weights
    for name, module in list(fixed.named_modules()):
        if _mixes(module) and name:
            fixed.set_submodule(name, nn.GroupNorm(1, vars(module)["num_features"], affine=False))
        elif vars(module).get("inplace") is True:
            module.inplace = False
    refuse_layers(fixed.train())
    return fixed.train(model.training)


def _problem(module: nn.Module) -> str | None:
    """What is wrong with a layer, itself and not what is in it, and the remedy."""
    if _mixes(module):
        channels = vars(module)["num_features"]
        return (
            "keeps statistics over patients; every patient's gradient must depend on that patient alone, so use "
            f"GroupNorm in place of BatchNorm, here nn.GroupNorm({gcd(GROUPS, channels)}, {channels})"
        )
    if vars(module).get("inplace") is True:
        return f"works in place, where Opacus finds no gradient of each row; use {type(module).__name__}(inplace=False)"
    # By its exact type: Opacus' replacements are derived from what they replace.
    replacement = _RECURRENT.get(type(module))
    if replacement is not None and any(parameter.requires_grad for parameter in module.parameters()):
        return f"has no gradient of each row; use opacus.layers.{replacement} in place of nn.{type(module).__name__}"
    return None


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "track_running_stats", False) is True
