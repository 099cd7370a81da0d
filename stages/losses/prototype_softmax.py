"""Softmax over cosines to very many prototypes: its sums over all classes but a row's own, part by part.

A loss of margin softmax is log(1 + exp(others - own)): `others` is the logarithm of the sum of exp(scale x cosine) over
the other classes, `own` the row's own logit, whatever a margin made of it. Sums and gradients are those of plain
matrix products; normalising, exponentials and sums happen to parts of the classes that stay in a processor's cache, and
of [classes, N] only the exponentials are kept.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CLASSES_AT_ONCE = 1024
LARGEST_DIRECT_SCALE = 40.0
"""Up to here exp(scale (cosine - 1)), at least e^-80, does not vanish in float32: no row needs a shift of its own."""
LEAST_LENGTH = 1e-12


class Sums(NamedTuple):
    """Of each row.

    Attributes:
        others: [N], log of the sum of exp(scale x cosine) over the other classes.
        own: [N], cosine to the own prototype.
        nearest: [N], the largest cosine to another; without gradient.
    """

    others: Tensor
    own: Tensor
    nearest: Tensor


def sums_over_classes(embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Sums:
    """Cosines of embeddings [N, D] to prototypes [classes, D], both of any length, in sums.

    Args:
        labels: int64 [N], 0 to classes - 1.
        scale: above 0.
    """
    return Sums(*_Sums.apply(F.normalize(embeddings, dim=1), weight, labels, scale))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, ...]:
        lengths = torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(LEAST_LENGTH)  # [C, 1]
        own_directions = weight[labels] / lengths[labels]
        own = (rows * own_directions).sum(dim=1)
        bits = scale / math.log(2)  # exponentials are to base 2: torch's exp2 is faster on CPUs
        scaled = (bits * rows).T.contiguous()  # [D, N]
        values = rows.new_empty(len(weight), len(rows))  # [C, N]
        nearest, totals = rows.new_full((len(rows),), -torch.inf), rows.new_zeros(len(rows))
        is_direct = scale <= LARGEST_DIRECT_SCALE
        for part in _parts(len(weight)):
            torch.mm(weight[part] / lengths[part], scaled, out=values[part])
            columns, places = _own_in(part, labels)
            values[part][places, columns] = -torch.inf
            nearest = torch.maximum(nearest, values[part].amax(dim=0))
            if is_direct:
                totals += values[part].sub_(bits).exp2_().sum(dim=0)
        shift = rows.new_full((len(rows),), bits)
        if not is_direct:
            shift = nearest.clamp_min(-bits)  # finite, where there is no other class
            for part in _parts(len(weight)):
                totals += values[part].sub_(shift).exp2_().sum(dim=0)
        ctx.save_for_backward(rows, weight, lengths, labels, own_directions, values, totals)
        ctx.scale = scale
        nearest = nearest / bits
        ctx.mark_non_differentiable(nearest)
        return totals.log() + shift * math.log(2), own, nearest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_others: Tensor, to_own: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, lengths, labels, own_directions, values, totals = ctx.saved_tensors
        # Where there is no other class the sum is 0, and so are all its terms.
        coefficients = (ctx.scale * to_others / totals.clamp_min(torch.finfo(totals.dtype).tiny))[:, None]
        weighted = rows * coefficients  # [N, D]
        to_rows, to_weight = torch.zeros_like(rows), torch.empty_like(weight)
        own_weighted = rows * to_own[:, None]
        for part in _parts(len(weight)):
            directions = weight[part] / lengths[part]
            to_rows.addmm_(values[part].T, directions)
            to_directions = torch.mm(values[part], weighted, out=to_weight[part])
            columns, places = _own_in(part, labels)
            to_directions.index_add_(0, places, own_weighted[columns])
            # Of a direction only what is across it counts.
            along = (to_directions * directions).sum(dim=1, keepdim=True)
            to_directions.addcmul_(directions, along, value=-1).div_(lengths[part])
        to_rows = to_rows * coefficients + own_directions * to_own[:, None]
        return to_rows, to_weight, None, None


def _parts(classes: int) -> list[slice]:
    return [slice(first, min(first + CLASSES_AT_ONCE, classes)) for first in range(0, classes, CLASSES_AT_ONCE)]


def _own_in(part: slice, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows whose own class lies in a part of the classes, and where in it."""
    columns = ((labels >= part.start) & (labels < part.stop)).nonzero()[:, 0]
    return columns, labels[columns] - part.start
