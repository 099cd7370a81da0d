"""Muon: momentum whose moves of weight matrices are made orthogonal (Jordan et al. 2024).

"Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon. torch's own (2.9)
takes matrices only, no kernels of convolutions, and iterates in bfloat16, which CPUs are slow at.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stages.models.momentum import MomentumOptimiser

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration (Jordan's): they lift small singular values fastest, and end between 0.7
and 1.2 rather than at 1."""
ITERATIONS = 5
SMALLEST_NORM = 1e-7


class Muon(MomentumOptimiser):
    """With momentum m, a tensor w with gradient g moves by

        v = m v + g;  u = g + m v;  w = w - rate x (m(u) + decay x w)

    where m(u) of a matrix [R, C] (a kernel counts as one, [out, in x height x width]) is u with all singular values
    brought near 1, times sqrt(max(1, R / C)); and u itself in groups with `orthogonal` False (biases, norms).
    """

    def __init__(self, parameters: Iterable[dict[str, Any]], lr: float, momentum: float, weight_decay: float):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "orthogonal": True}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            parameters, gradients, velocities = self._moving(group["params"])
            if not parameters:
                continue
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, gradients)
            moves = [*torch._foreach_add(gradients, velocities, alpha=group["momentum"])]
            if group["orthogonal"]:
                moves = [orthogonal(move.flatten(1)).view_as(move) for move in moves]
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, moves, alpha=-group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """[R, C] with the same singular vectors, singular values near 1, times sqrt(max(1, R / C)).

    Small ones stay smaller: what is below about 1/1000 of the norm has not come up after five iterations. In single
    precision the norm of the error is below a thousandth of the result's (the usual bfloat16 has a hundredth).
    """
    rows, columns = matrix.shape
    wide = matrix if rows <= columns else matrix.T
    wide = wide / wide.norm().clamp(min=SMALLEST_NORM)
    first, third, fifth = QUINTIC
    # X <- P X with P = a I + b G + c G G and G = X X^T, so that the next G is P G P. All of them are polynomials of the
    # first G: what is iterated on stays as small as the short side, however wide the kernel, and X is multiplied once.
    gram = wide @ wide.T
    product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for iteration in range(ITERATIONS):
        step = torch.addmm(gram, gram, gram, beta=third, alpha=fifth)
        step.diagonal().add_(first)
        product = step @ product
        if iteration + 1 < ITERATIONS:
            gram = step @ gram @ step
    wide = product @ wide
    return (wide if rows <= columns else wide.T) * max(1.0, rows / columns) ** 0.5
