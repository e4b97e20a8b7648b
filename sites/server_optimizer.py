"""From the securely aggregated mean update to the next global model, by torch.optim.

The mean update is the negative of a gradient (Reddi et al., Adaptive Federated Optimization, ICLR 2021): plain
averaging is SGD with learning rate 1, FedAvgM adds momentum, FedAdam is Adam.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from secureagg import ParameterError

_OPTIMIZERS: Final[dict[str, Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer]]] = {
    "average": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99), eps=1e-3),
}
NAMES: Final = tuple(_OPTIMIZERS)


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
