"""What optimisers of our own have in common: a velocity for each parameter, and lists of tensors to work on."""

import torch
from torch import Tensor


class MomentumOptimiser(torch.optim.Optimizer):
    """Keeps a velocity, zeros at first, of each parameter's own memory format."""

    def _moving(self, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of the parameters those that have a gradient, with their gradients and velocities."""
        moving = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        return [one for one, _ in moving], [grad for _, grad in moving], [self._velocity(one) for one, _ in moving]

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]
