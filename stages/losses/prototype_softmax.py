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
"""Their products stay in a processor's cache."""
CLASSES_AT_ONCE_ON_ACCELERATORS = 131_072
"""There few starts of kernels count more: directions of 64 MiB for 128 dimensions."""
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


def classes_at_once(device: torch.device) -> int:
    """How many classes a part has."""
    return CLASSES_AT_ONCE if device.type == "cpu" else CLASSES_AT_ONCE_ON_ACCELERATORS


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
        for part in _parts(weight):
            torch.mm(weight[part] / lengths[part], scaled, out=values[part])
            places, is_inside = _own_in(part, labels)
            there = values[part].gather(0, places[None])
            values[part].scatter_(0, places[None], there.masked_fill(is_inside, -torch.inf))
            nearest = torch.maximum(nearest, values[part].amax(dim=0))
            if is_direct:
                totals += values[part].sub_(bits).exp2_().sum(dim=0)
        shift = rows.new_full((len(rows),), bits)
        if not is_direct:
            shift = nearest.clamp_min(-bits)  # finite, where there is no other class
            for part in _parts(weight):
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
        for part in _parts(weight):
            directions = weight[part] / lengths[part]
            to_rows.addmm_(values[part].T, directions)
            _across(torch.mm(values[part], weighted, out=to_weight[part]), directions, lengths[part])
        to_weight.index_add_(0, labels, _across(rows * to_own[:, None], own_directions, lengths[labels]))
        to_rows = to_rows * coefficients + own_directions * to_own[:, None]
        return to_rows, to_weight, None, None


def _across(to_directions: Tensor, directions: Tensor, lengths: Tensor) -> Tensor:
    """Gradients of directions [n, D] as those of vectors of lengths [n, 1], in place: what is along them falls away."""
    along = (to_directions * directions).sum(dim=1, keepdim=True)
    return to_directions.addcmul_(directions, along, value=-1).div_(lengths)


def _parts(weight: Tensor) -> list[slice]:
    classes, at_once = len(weight), classes_at_once(weight.device)
    return [slice(first, min(first + at_once, classes)) for first in range(0, classes, at_once)]


def _own_in(part: slice, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row: the place of its own class in a part of the classes, or another one, and whether it lies there.

    No tensor is made whose size depends on values: an accelerator would have to be waited for, to learn of it.
    """
    places = labels - part.start
    inside = places.clamp(0, part.stop - part.start - 1)
    return inside, inside == places
