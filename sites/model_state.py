"""A model's tensors <-> one flat vector, and <-> safetensors bytes.

Only float32 tensors travel, in the order that the consortium's manifest lists them.  Received bytes are parsed by
safetensors, which holds no code; nothing is ever unpickled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from math import prod
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from secureagg import ParameterError, ShapeMismatch

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The tensors that a consortium trains: (name, shape) in the order in which they are flattened."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Sequence[int]]) -> Self:
        """The specification of tensors given as name -> shape."""
        return cls(tuple((name, tuple(shape)) for name, shape in tensors.items()))

    @classmethod
    def of_bytes(cls, data: bytes, *, who: str) -> Self:
        """The specification of a safetensors file, in order of name; ShapeMismatch naming ``who`` if it is none."""
        return cls.of({name: array.shape for name, array in sorted(_load(data, who=who).items())})

    @property
    def length(self) -> int:
        """Numbers in the flat vector."""
        return sum(prod(shape) for _, shape in self.tensors)

    def locate(self, index: int) -> str:
        """Which tensor the flat ``index`` belongs to, for error messages."""
        ends = accumulate(prod(shape) for _, shape in self.tensors)
        for (name, shape), end in zip(self.tensors, ends, strict=True):
            if index < end:
                return f"tensor {name}, element {index - end + prod(shape)}"
        raise ParameterError(f"model: no tensor at index {index} of {self.length}")

    def flatten(self, state: Mapping[str, torch.Tensor], *, who: str) -> npt.NDArray[np.float32]:
        """The flat float32 vector of ``state``.

        Raises ShapeMismatch, naming ``who`` and the first tensor, unless names, shapes and dtype are the consortium's.
        """
        expected = dict(self.tensors)
        if missing := expected.keys() - state.keys():
            raise ShapeMismatch(f"{who}: tensor {min(missing)} is missing, expected {len(expected)} tensors")
        if extra := state.keys() - expected.keys():
            raise ShapeMismatch(f"{who}: tensor {min(extra)} is not part of the consortium's model")
        parts = []
        for name, shape in self.tensors:
            tensor = state[name].detach().cpu()
            if tuple(tensor.shape) != shape:
                raise ShapeMismatch(f"{who}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
            if tensor.dtype != torch.float32:
                raise ShapeMismatch(f"{who}: tensor {name} has dtype {tensor.dtype}, expected torch.float32")
            parts.append(tensor.numpy().reshape(-1))
        return np.concatenate(parts)

    def restore(self, vector: npt.NDArray[np.float32]) -> State:
        """The tensors of a flat vector, as copies."""
        state, start = {}, 0
        for name, shape in self.tensors:
            end = start + prod(shape)
            state[name] = torch.from_numpy(vector[start:end].reshape(shape).copy())
            start = end
        return state

    def to_bytes(self, vector: npt.NDArray[np.float32]) -> bytes:
        """The safetensors file of a flat vector."""
        return save({name: tensor.numpy() for name, tensor in self.restore(vector).items()})

    def from_bytes(self, data: bytes, *, who: str) -> npt.NDArray[np.float32]:
        """The flat vector of a safetensors file; ShapeMismatch naming ``who`` if it is another model or no such
        file."""
        return self.flatten({name: torch.from_numpy(array) for name, array in _load(data, who=who).items()}, who=who)


def _load(data: bytes, *, who: str) -> dict[str, npt.NDArray[np.generic]]:
    try:
        return load(data)
    except (SafetensorError, KeyError) as error:  # a KeyError stands for a dtype that numpy does not have
        raise ShapeMismatch(f"{who}: not a safetensors file of float32 tensors") from error


def model_digest(data: bytes) -> bytes:
    """SHA-256 of a model's safetensors bytes, as it enters a round's context."""
    return sha256(data).digest()
