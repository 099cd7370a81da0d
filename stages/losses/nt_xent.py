"""NT-Xent, the contrastive loss of SimCLR, and the accuracy of the task that it sets (Chen et al. 2020)."""

import math

import torch
from torch import Tensor, distributed

from stages.losses.gather import mean_over_processes, world
from stages.losses.similarity_tiles import bits_at, log2_sum_of_others, share_of_tiles, similarities, views_in_bits


def nt_xent(view_a: Tensor, view_b: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020, equation 1 and algorithm 1).

    Each of the 2N rows is to recognise its other view among the other 2N - 1 rows by cosine similarity. Within a
    process group the rows are those of all processes (each with the same N); the value is the mean over the global
    batch, the same on every process, and backward leaves `processes` times its derivative, so that DDP's averaging
    is exact. Computed in float32 (float64 if given) under any autocast; memory is linear in N.

    Args:
        view_a, view_b: [N, D], of any length; row i of one and row i of the other are views of one image.
        temperature: above 0.

    Returns:
        A scalar.

    Raises:
        ValueError: views that are not two of one shape, or a temperature that is not above 0.
    """
    bits = bits_at(temperature)
    with torch.autocast(view_a.device.type, enabled=False):
        views = views_in_bits(view_a, view_b, bits)  # [2, N, D], N of all processes from here
        to_all = log2_sum_of_others(views.flatten(0, 1), bits)  # [2N]
        first, second = views
        to_positive = (first * second).sum(dim=1)  # [N], the same for both rows
        return mean_over_processes((to_all.mean() - to_positive.mean()) * math.log(2))


@torch.no_grad()
def contrastive_accuracy(view_a: Tensor, view_b: Tensor) -> Tensor:
    """Share of the 2N rows (of all processes) whose most similar other row is their other view.

    A tie does not count: where all rows are one, the accuracy is 0. In a process group all must call it. Memory is
    linear in N.

    Args:
        view_a, view_b: [N, D], as for `nt_xent`.

    Returns:
        A scalar without gradient, on the device of the views.
    """
    with torch.autocast(view_a.device.type, enabled=False):
        rows = views_in_bits(view_a, view_b, bits=1.0).flatten(0, 1)
        pairs = len(rows) // 2
        to_positive, to_nearest = rows.new_full((2, 2 * pairs), -torch.inf)
        for tile, values in similarities(rows, share_of_tiles(len(rows), rows.device)):
            # Pairs of views lie on the diagonals `pairs` away from the matrix's own, which is left out in any case.
            for apart in (pairs, -pairs):
                first = max(tile.rows.start, tile.columns.start - apart)
                last = min(tile.rows.stop, tile.columns.stop - apart)
                if first < last:
                    diagonal = values.diagonal(apart + tile.rows.start - tile.columns.start)
                    to_positive[first:last] = diagonal
                    to_positive[first + apart : last + apart] = diagonal
                    diagonal.fill_(-torch.inf)
            if tile.is_diagonal:
                values.fill_diagonal_(-torch.inf)
            for part, dim in tile.sides:
                to_nearest[part] = torch.maximum(to_nearest[part], values.amax(dim=dim))
        if world()[1] > 1:
            distributed.all_reduce(to_positive, distributed.ReduceOp.MAX)
            distributed.all_reduce(to_nearest, distributed.ReduceOp.MAX)
        return mean_over_processes((to_nearest < to_positive).to(rows.dtype).mean())
