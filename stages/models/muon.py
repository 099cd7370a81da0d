"""Muon: momentum whose moves of weight matrices are made orthogonal (Jordan et al. 2024).

"Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon. torch's own (2.9)
takes matrices only, no kernels of convolutions, and iterates in bfloat16, which CPUs are slow at.
"""

from collections.abc import Iterable, Sequence
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
                flat = orthogonal([move.flatten(1) for move in moves])
                moves = [one.view_as(move) for one, move in zip(flat, moves, strict=True)]
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, moves, alpha=-group["lr"])


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each [R, C] with the same singular vectors, singular values near 1, times sqrt(max(1, R / C)).

    Small ones stay smaller: what is below about 1/1000 of the norm has not come up after five iterations. In single
    precision the norm of the error is below a thousandth of the result's (the usual bfloat16 has a hundredth).
    """
    wide = [one if one.shape[0] <= one.shape[1] else one.T for one in matrices]
    norms = torch._foreach_norm(wide)
    torch._foreach_clamp_min_(norms, SMALLEST_NORM)
    wide = [*torch._foreach_div(wide, norms)]
    by_side: dict[int, list[int]] = {}
    for place, one in enumerate(wide):
        by_side.setdefault(len(one), []).append(place)
    for places in by_side.values():  # side by side: these are many operations on small matrices
        factors = _newton_schulz(torch.stack([wide[place] @ wide[place].T for place in places]))
        for place, factor in zip(places, factors, strict=True):
            wide[place] = factor @ wide[place]
    return [
        (found if one.shape[0] <= one.shape[1] else found.T) * max(1.0, one.shape[0] / one.shape[1]) ** 0.5
        for one, found in zip(matrices, wide, strict=True)
    ]


def _newton_schulz(grams: Tensor) -> Tensor:
    """What X is multiplied by in all iterations together, of G = X X^T: [k, n, n] -> [k, n, n].

    X <- P X with P = a I + b G + c G G, so that the next G is P G P. All of them are polynomials of the first G: what
    is iterated on stays as small as the short side, however wide the kernel.
    """
    first, third, fifth = QUINTIC
    product = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device).expand_as(grams)
    for iteration in range(ITERATIONS):
        step = torch.baddbmm(grams, grams, grams, beta=third, alpha=fifth)
        step.diagonal(dim1=1, dim2=2).add_(first)
        product = step @ product
        if iteration + 1 < ITERATIONS:
            grams = step @ grams @ step
    return product
