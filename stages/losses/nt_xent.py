"""NT-Xent, the contrastive loss of SimCLR, and the accuracy of the task that it sets (Chen et al. 2020)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.losses.gather import gather_rows, mean_over_processes, world


def nt_xent(view_a: Tensor, view_b: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020, equation 1 and algorithm 1).

    Each of the 2N rows is to recognise its other view among the other 2N - 1 rows by cosine similarity. Within a
    process group the rows are those of all processes (each with the same N); the value is the mean over the global
    batch, the same on every process, and backward leaves `processes` times its derivative, so that DDP's averaging
    is exact. Computed in float32 (float64 if given) under any autocast.

    Args:
        view_a, view_b: [N, D], of any length; row i of one and row i of the other are views of one image.
        temperature: above 0.

    Returns:
        A scalar.
    """
    _check(view_a, view_b)
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    with torch.autocast(view_a.device.type, enabled=False):
        rows = _unit_rows(view_a, view_b)
        own, positive = _positions(len(view_a), rows.device)
        losses = _RowLosses.apply(rows, gather_rows(rows), own, positive, temperature)
        return mean_over_processes(losses.mean())


@torch.no_grad()
def contrastive_accuracy(view_a: Tensor, view_b: Tensor, chunk_rows: int = 1024) -> Tensor:
    """Share of the 2N rows (of all processes) whose most similar other row is their other view.

    A tie does not count: where all rows are one, the accuracy is 0. In a process group all must call it.

    Args:
        view_a, view_b: [N, D], as for `nt_xent`.
        chunk_rows: rows that are compared at a time, which bounds the memory.

    Returns:
        A scalar without gradient, on the device of the views.
    """
    _check(view_a, view_b)
    with torch.autocast(view_a.device.type, enabled=False):
        rows = _unit_rows(view_a, view_b)
        columns = gather_rows(rows)
        own, positive = _positions(len(view_a), rows.device)
        correct = rows.new_zeros(())
        for part, own_part, positive_part in zip(
            rows.split(chunk_rows), own.split(chunk_rows), positive.split(chunk_rows), strict=True
        ):
            similarities = part @ columns.T
            to_positive = similarities.gather(1, positive_part[:, None])
            similarities.scatter_(1, torch.stack([own_part, positive_part], dim=1), -torch.inf)
            correct += (similarities < to_positive).all(dim=1).sum()
        return mean_over_processes(correct / len(rows))


def _check(view_a: Tensor, view_b: Tensor) -> None:
    if view_a.ndim != 2 or view_a.shape != view_b.shape or len(view_a) == 0:
        raise ValueError(f"two views are [N, D] each with N above 0, not {[*view_a.shape]} and {[*view_b.shape]}")


def _unit_rows(view_a: Tensor, view_b: Tensor) -> Tensor:
    """Both views below each other, of length 1: [2N, D]"""
    rows = torch.cat([view_a, view_b])
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


def _positions(pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[2N], [2N]: where among the gathered rows each of this process's rows stands, and where its other view."""
    places = torch.arange(2 * pairs, device=device)
    first = world()[0] * 2 * pairs
    return first + places, first + places.roll(pairs)


class _RowLosses(torch.autograd.Function):
    """Cross-entropy of each row against all columns but its own. One matrix [rows, columns] is held, not several."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, own: Tensor, positive: Tensor, temperature: float) -> Tensor:
        logits = (rows @ columns.T).div_(temperature)
        to_positive = logits.gather(1, positive[:, None])
        logits.scatter_(1, own[:, None], -torch.inf)
        # The row's largest as shift: a fixed one would lose whole rows to underflow at low temperatures.
        largest = logits.amax(dim=1, keepdim=True)
        probabilities = logits.sub_(largest).exp_()
        total = probabilities.sum(dim=1, keepdim=True)
        losses = (total.log() + largest - to_positive).squeeze(1)
        # What is left is the derivative by the logits: softmax minus one at the positive.
        derivative = probabilities.div_(total)
        derivative.scatter_add_(1, positive[:, None], derivative.new_full((len(rows), 1), -1.0))
        ctx.save_for_backward(rows, columns, derivative)
        ctx.temperature = temperature
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, columns, derivative = ctx.saved_tensors
        weights = gradient[:, None] / ctx.temperature
        with torch.autocast(rows.device.type, enabled=False):
            grad_rows = (derivative @ columns) * weights
            grad_columns = derivative.T @ (rows * weights)
        return grad_rows, grad_columns, None, None, None
