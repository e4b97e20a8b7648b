"""From the securely aggregated mean update to the next global model, by torch.optim.

The mean update is the negative of a gradient (Reddi et al., Adaptive Federated Optimization, ICLR 2021): plain
averaging is SGD with learning rate 1, FedAvgM adds momentum, FedAdam is Adam.
"""

from collections.abc import Callable
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from secureagg import ParameterError, ShapeMismatch

_OPTIMIZERS: Final[dict[str, Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer]]] = {
    "average": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99), eps=1e-3),
}
NAMES: Final = tuple(_OPTIMIZERS)
_VECTOR: Final = "vector"


class ServerOptimizer:
    """The global model as one flat vector, moved by one mean update per round."""

    def __init__(self, name: str, learning_rate: float, vector: npt.NDArray[np.float32]) -> None:
        if name not in _OPTIMIZERS:
            raise ParameterError(f"server optimizer: found {name!r}, expected one of {', '.join(NAMES)}")
        self._parameter = torch.nn.Parameter(torch.from_numpy(vector.copy()))
        self._optimizer = _OPTIMIZERS[name]([self._parameter], learning_rate)

    @property
    def vector(self) -> npt.NDArray[np.float32]:
        """The current global model; a copy."""
        return self._parameter.detach().numpy().copy()

    def step(self, mean_update: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Apply one mean update (float64, flat) and return the new global model."""
        self._parameter.grad = torch.from_numpy(-mean_update).to(torch.float32)
        self._optimizer.step()
        return self.vector

    def to_bytes(self) -> bytes:
        """The model and what the optimizer remembers, as a safetensors file."""
        remembered = self._optimizer.state[self._parameter]
        tensors = {name: value for name, value in remembered.items() if isinstance(value, torch.Tensor)}
        return save({_VECTOR: self._parameter.detach(), **tensors})

    @classmethod
    def from_bytes(cls, data: bytes, name: str, learning_rate: float, *, length: int, who: str) -> Self:
        """What ``to_bytes`` gave, of a model of ``length`` numbers; ShapeMismatch naming ``who`` for anything else."""
        try:
            tensors = load(data)
        except (SafetensorError, KeyError) as error:
            raise ShapeMismatch(f"{who}: not a server optimizer") from error
        vector = tensors.pop(_VECTOR, torch.empty(0))
        shapes = {vector.shape, *(tensor.shape for tensor in tensors.values() if tensor.ndim)}
        if shapes != {(length,)} or vector.dtype != torch.float32:
            raise ShapeMismatch(f"{who}: found tensors of {sorted(map(tuple, shapes))}, expected float32 ({length},)")
        made = cls(name, learning_rate, vector.numpy())
        made._optimizer.state[made._parameter].update(tensors)
        return made
