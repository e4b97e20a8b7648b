"""Models that a manifest can name, made of layers that DP-SGD can train."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import gcd
from typing import Final

import torch
from safetensors.torch import save
from torch import nn

from sites.errors import ManifestError
from sites.manifest import Images

_CONVOLUTIONS: Final[dict[int, type[nn.Module]]] = {2: nn.Conv2d, 3: nn.Conv3d}
_POOLS: Final[dict[int, type[nn.Module]]] = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
LEAST_MAGNITUDE: Final = 0.05  # in deviations of the image: what is below it is noise
LEAST_SIZE: Final = 8  # along each axis, so that something is left after two halvings


def small_cnn(channels: int, axes: int, outputs: int, *, width: int = 16) -> nn.Module:
    """Three convolutions with GroupNorm, average pooling to 2 along each of 2 or 3 ``axes``, and a linear layer: 14,593
    parameters for one channel, two axes and one output.

    The first layer takes an image's own mean away and divides by its deviation, so that devices may differ in
    brightness and contrast.  It looks at one row only, as GroupNorm does, and has nothing to train.
    """
    convolution, wide = _CONVOLUTIONS[axes], 2 * width
    return nn.Sequential(
        nn.GroupNorm(1, channels, affine=False),
        convolution(channels, width, 5, stride=2, padding=2),
        nn.GroupNorm(gcd(4, width), width),
        nn.ReLU(),
        convolution(width, wide, 3, stride=2, padding=1),
        nn.GroupNorm(gcd(8, wide), wide),
        nn.ReLU(),
        convolution(wide, wide, 3, padding=1),
        nn.GroupNorm(gcd(8, wide), wide),
        nn.ReLU(),
        _POOLS[axes](2),
        nn.Flatten(),
        nn.Linear(wide * 2**axes, outputs),
    )


class FilterBank(nn.Module):
    """How much of each pattern there is in each part of an image: features (n, ``features``) that nobody trains.

    Rows are normalised by their own mean and deviation and filtered by the cosine patterns of ``size`` pixels along
    each axis; of the magnitudes, and of the image itself, the means over a grid of ``cells`` parts along each axis are
    taken, at full and at half resolution, in logarithms where they are magnitudes.  A linear model of them has few
    parameters, and its loss is convex: with the same noise it learns more than a convolutional network (Tramer and
    Boneh, ICLR 2021, for wavelets).
    """

    def __init__(self, channels: int, axes: int, *, size: int, cells: int = 4, levels: int = 2) -> None:
        super().__init__()
        self._axes, self._cells, self._levels = axes, cells, levels
        self._channels, self._size = channels, size
        # Constants, which are no part of the model that sites exchange.
        self._patterns: torch.Tensor
        self.register_buffer("_patterns", _cosines(size, axes), persistent=False)
        self.features = channels * (levels * (size**axes - 1) + 1) * cells**axes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of images (n, channels, ...)."""
        functions = nn.functional
        pool = (functions.adaptive_avg_pool2d, functions.adaptive_avg_pool3d)[self._axes - 2]
        halve = (functions.avg_pool2d, functions.avg_pool3d)[self._axes - 2]
        convolve = (functions.conv2d, functions.conv3d)[self._axes - 2]
        image = functions.group_norm(images, self._channels)
        each = image.reshape(-1, 1, *image.shape[2:])  # a row for each channel
        found = []
        for _ in range(self._levels):
            padded = functions.pad(each, [self._size // 2] * 2 * self._axes, mode="replicate")
            magnitudes = pool(convolve(padded, self._patterns).abs(), self._cells)
            found.append(torch.log(LEAST_MAGNITUDE + magnitudes))
            each = halve(each, 2)
        found.append(pool(each, self._cells))
        return torch.cat(found, dim=1).reshape(len(images), -1)


def _cosines(size: int, axes: int) -> torch.Tensor:
    """The patterns (size^axes - 1, 1, size, ...) of the discrete cosine transform but the constant one, of length 1."""
    places = torch.arange(size, dtype=torch.float64)
    along = torch.stack([torch.cos(torch.pi * (places + 0.5) * frequency / size) for frequency in range(size)])
    along /= torch.linalg.vector_norm(along, dim=1, keepdim=True)
    patterns = along
    for _ in range(axes - 1):
        patterns = torch.einsum("a...,bz->ab...z", patterns, along).flatten(0, 1)
    return patterns[1:, None].float()


def filter_bank(channels: int, axes: int, outputs: int) -> nn.Module:
    """A linear layer on the features of a ``FilterBank``, each image's normalised over all of them: 785 parameters for
    one channel, two axes and one output.  All weights begin at zero."""
    bank = FilterBank(channels, axes, size=5 if axes == 2 else 3)
    linear = nn.Linear(bank.features, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    norm = nn.LayerNorm(bank.features, elementwise_affine=False)
    return nn.Sequential(OrderedDict(bank=bank, norm=norm, linear=linear))


_MODELS: Final[dict[str, Callable[[int, int, int], nn.Module]]] = {"filter-bank": filter_bank, "small-cnn": small_cnn}


def image_model(images: Images, *, seed: int = 0) -> nn.Module:
    """The model that ``images`` names, for its shape and targets, initialised from ``seed``; torch's own generator
    stays as it is.  ManifestError for a model that does not exist or images too small for it."""
    if images.model not in _MODELS:
        raise ManifestError(f"images: found model {images.model!r}, expected one of {', '.join(sorted(_MODELS))}")
    if min(images.plan.shape) < LEAST_SIZE:
        raise ManifestError(
            f"images: found shape {list(images.plan.shape)}, expected at least {LEAST_SIZE} along each axis for "
            f"{images.model}"
        )
    outputs = sum(target.outputs for target in images.targets)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _MODELS[images.model](images.plan.channels, len(images.plan.shape), outputs)


def initial_image_model(images: Images, *, seed: int = 0) -> bytes:
    """The safetensors bytes of ``image_model``: where a federation starts."""
    return save(image_model(images, seed=seed).state_dict())


def without_front(model: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """What of an ``image_model`` is fixed and comes first, if anything does, and the rest, with the same tensors.

    What is fixed can be computed once for each image, and not in each step.
    """
    if not isinstance(model, nn.Sequential) or not isinstance(model[0], FilterBank):
        return None, model
    return model[0], nn.Sequential(OrderedDict(list(model.named_children())[1:]))


class RandomShift:
    """Moves one row (channels, ...) by up to ``most`` pixels each way along each axis, its edge repeated: a transform
    for ``dp.views``."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __call__(self, row: torch.Tensor) -> torch.Tensor:
        """Another view of the row, of its shape."""
        most, axes = self._most, row.ndim - 1
        padded = nn.functional.pad(row[None], [most] * 2 * axes, mode="replicate")[0]
        starts: Sequence[int] = torch.randint(0, 2 * most + 1, (axes,)).tolist()
        places = (slice(start, start + size) for start, size in zip(starts, row.shape[1:], strict=True))
        return padded[(slice(None), *places)]
