"""Health of a representation without labels: its effective rank, its spread on the sphere, its dead dimensions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RANKME_EPSILON = 1e-7
"""Garrido et al. 2023, equation 1 with the constant for float32."""


@dataclass(frozen=True)
class DimensionCounts:
    """How many dimensions there are and how many say nothing."""

    total: int
    constant: int
    """Those of one value for all samples, up to float32 rounding; the dead ones among them."""
    dead: int
    """Those that are 0 for all samples (a ReLU that never opens)."""


@torch.no_grad()
def singular_spectrum(features: Tensor) -> Tensor:
    """[N, D] -> [min(N, D)] singular values, largest first, in float64 on the CPU; features are not centred."""
    _check(features)
    return torch.linalg.svdvals(features.to("cpu", torch.float64))


def rankme(features: Tensor) -> float:
    """Effective rank of [N, D]: exp of the entropy of the singular values as shares (Garrido et al. 2023, equation 1).

    From 1 (all on one line) to min(N, D); N should be several times D. All features 0: 1.
    """
    spectrum = singular_spectrum(features)
    if spectrum.sum() == 0:
        return 1.0
    shares = spectrum / spectrum.sum() + RANKME_EPSILON
    return torch.exp(-(shares * shares.log()).sum()).item()


@torch.no_grad()
def alignment(view_a: Tensor, view_b: Tensor) -> float:
    """Mean squared distance of the two views' unit vectors (Wang and Isola 2020, equation 3, exponent 2).

    From 0 (views agree) to 4. Small is good only while uniformity is low as well.

    Args:
        view_a, view_b: [N, D], row i of both from one image, of any length.
    """
    _check(view_a)
    if view_a.shape != view_b.shape:
        raise ValueError(f"two views have one shape, not {[*view_a.shape]} and {[*view_b.shape]}")
    return (_unit_rows(view_a) - _unit_rows(view_b)).square().sum(dim=1).mean().item()


@torch.no_grad()
def uniformity(features: Tensor, largest_rows: int = 2048) -> float:
    """Log of the mean of exp(-2 squared distance) over all pairs of unit vectors (Wang and Isola 2020, equation 4).

    From 0 (all in one place) down to about -4 (spread over the sphere); lower is more uniform.

    Args:
        features: [N, D], of any length; N at least 2.
        largest_rows: only so many rows, the first, are compared: memory grows with their square.
    """
    _check(features)
    rows = _unit_rows(features[:largest_rows])
    if len(rows) < 2:
        raise ValueError("uniformity compares pairs: two rows at least")
    first, second = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
    squared_distances = 2 - 2 * (rows @ rows.T)[first, second]
    return (torch.logsumexp(-2 * squared_distances, dim=0) - torch.log(rows.new_tensor(len(first)))).item()


@torch.no_grad()
def count_dimensions(features: Tensor) -> DimensionCounts:
    """Count the dimensions of [N, D] that are constant and those that are dead."""
    _check(features)
    largest = features.amax(dim=0)
    smallest = features.amin(dim=0)
    magnitude = torch.maximum(largest.abs(), smallest.abs())
    constant = largest - smallest <= 1e-6 * magnitude
    dead = magnitude == 0
    return DimensionCounts(features.shape[1], int(constant.sum()), int(dead.sum()))


def _check(features: Tensor) -> None:
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features are [N, D] with N and D above 0, not {[*features.shape]}")


def _unit_rows(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
