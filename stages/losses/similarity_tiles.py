"""Sums over all pairs of rows of a global batch, tile by tile: what contrastive losses are made of.

The matrix of similarities [M, M] of M unit rows never exists. It is symmetric, so that a tile above the diagonal serves
its rows and its columns, and the one below is not computed. The backward pass computes the tiles again: the weight of
a pair in the gradient, exp(s_ij) (g_i / total_i + g_j / total_j), is symmetric as well. Memory is linear in M.

Across processes every one has all rows, and the tiles are shared out evenly; what the processes found is summed in the
forward pass (totals), and in the backward pass where rows were gathered (`gather_rows`).
"""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from stages.losses.gather import gather_rows, world

LARGEST_EXPONENT_RANGE = 80
"""Similarities lie within 2 / temperature. Below this, exponentials of float32 and sums of millions of them neither
overflow nor vanish, and no shift is needed: e^-40 to e^40 are 4e-18 to 2e17."""

BASE_2 = 1 / math.log(2)
"""Exponentials are taken to base 2: on CPUs torch's exp2 takes a quarter of the time of its exp (MKL's)."""


class Tiling(NamedTuple):
    """How the matrix is cut.

    Attributes:
        rows, columns: of a tile at most.
        kept: exponentials of so many pairs at most are kept for the backward pass, where that saves computing them.
    """

    rows: int
    columns: int
    kept: int


CPU = Tiling(rows=512, columns=1024, kept=2**20)
"""Tiles of 2 MiB in float32, which cores have in their caches; of a half and of twice that the speed is the same."""
GPU = Tiling(rows=4096, columns=4096, kept=2**24)


class Tile(NamedTuple):
    """Pairs of these rows with those columns; on the diagonal of the matrix both are the same."""

    rows: slice
    columns: slice

    @property
    def is_diagonal(self) -> bool:
        return self.rows == self.columns

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def sides(self) -> list[tuple[slice, int]]:
        """What the tile is a part of the sums of, and the dimension to sum over: its rows, and its columns as rows."""
        return [(self.rows, 1)] if self.is_diagonal else [(self.rows, 1), (self.columns, 0)]


def unit_views(view_a: Tensor, view_b: Tensor) -> Tensor:
    """Both views of all processes, rows of length 1, in float32 (float64 if given), the same on every process.

    Args:
        view_a, view_b: [N, D] of this process, N the same on all.

    Returns:
        [2, processes x N, D]

    Raises:
        ValueError: other shapes, or no rows.
    """
    if view_a.ndim != 2 or view_a.shape != view_b.shape or len(view_a) == 0:
        raise ValueError(f"two views are [N, D] each with N above 0, not {[*view_a.shape]} and {[*view_b.shape]}")
    views = torch.stack([view_a, view_b])
    views = F.normalize(views.to(torch.promote_types(views.dtype, torch.float32)), dim=2)
    return gather_rows(views).unflatten(0, (-1, 2)).transpose(0, 1).flatten(1, 2)


def log_sum_exp_of_others(rows: Tensor, temperature: float) -> Tensor:
    """log of the sum over j != i of exp(rows_i . rows_j / temperature), for every row.

    Within a process group each computes its share of the tiles, and all get the same result. Backward leaves, on each
    process, its share of the gradient of the sum of what all processes made of the result: `gather_rows` sums it up.

    Args:
        rows: [M, D] of length 1, float32 or float64, the same on every process; M at least 2, and a multiple of twice
            the number of processes.
        temperature: above 0.

    Returns:
        [M]

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    return _LogSumExpOfOthers.apply(rows, temperature)


def tiling(device: torch.device) -> Tiling:
    return CPU if device.type == "cpu" else GPU


def share_of_tiles(size: int, device: torch.device) -> list[Tile]:
    """This process's tiles of the matrix [size, size]; the tiles of all have each pair {i, j} once, {i, i} included.

    Row blocks stand in a ring. Each is paired with itself and the half of the ring that follows it, so that all have
    the same work; of two that are opposite to each other the first has the pair. In a group there is a multiple of two
    blocks a process, and opposite blocks belong to the same one: the shares are even.
    """
    rank, processes = world()
    largest = tiling(device)
    step = 2 * processes if processes > 1 else 1
    blocks = step * math.ceil(size / (step * largest.rows))
    starts = [block * size // blocks for block in range(blocks + 1)]
    found = []
    for block in range(rank, blocks, processes):
        rows = slice(starts[block], starts[block + 1])
        found.append(Tile(rows, rows))
        last = block + (blocks - 1) // 2 + (blocks % 2 == 0 and block < blocks // 2)
        around = max(last - blocks, -1)  # the ring's end is passed where that is a block
        for first, end in ((starts[block + 1], starts[min(last + 1, blocks)]), (0, starts[around + 1])):
            found += [Tile(rows, columns) for columns in _parts(first, end, largest.columns)]
    return found


def similarities(rows: Tensor, tiles: list[Tile], scale: float, is_kept: bool = False) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with its similarities times `scale`, in a buffer that the next one reuses unless they are kept."""
    buffer = None if is_kept else _buffer(rows, tiles)
    for tile in tiles:
        values = rows.new_empty(tile.shape) if buffer is None else _shaped(buffer, tile)
        yield tile, values.addmm_(rows[tile.rows], rows[tile.columns].T, beta=0, alpha=scale)


class _LogSumExpOfOthers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, temperature: float) -> Tensor:
        ctx.temperature = temperature
        ctx.tiles = share_of_tiles(len(rows), rows.device)
        ctx.is_direct = 2 / temperature < LARGEST_EXPONENT_RANGE
        with torch.autocast(rows.device.type, enabled=False):
            if ctx.is_direct:
                logs, kept = _log_totals(rows, ctx.tiles, BASE_2 / temperature, ctx.needs_input_grad[0])
            else:
                logs, kept = _log_totals_by_maxima(rows, ctx.tiles, BASE_2 / temperature), []
        ctx.save_for_backward(rows, logs, *kept)
        return logs / BASE_2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, logs, *kept = ctx.saved_tensors
        found = torch.zeros_like(rows)
        with torch.autocast(rows.device.type, enabled=False):
            gradient = _summed(gradient.clone(memory_format=torch.contiguous_format))
            buffer = _buffer(rows, ctx.tiles)
            if kept:
                weighted = _weights(zip(ctx.tiles, kept, strict=True), gradient, logs, buffer)
            else:
                again = similarities(rows, ctx.tiles, BASE_2 / ctx.temperature)
                if ctx.is_direct:
                    weighted = _weights(_exponentials(again), gradient, logs, buffer)
                else:
                    weighted = _weights_by_logs(again, gradient, logs, buffer)
            for tile, weights in weighted:
                found[tile.rows].addmm_(weights, rows[tile.columns], alpha=1 / ctx.temperature)
                if not tile.is_diagonal:
                    found[tile.columns].addmm_(weights.T, rows[tile.rows], alpha=1 / ctx.temperature)
        return found, None


def _exponentials(computed: Iterator[tuple[Tile, Tensor]]) -> Iterator[tuple[Tile, Tensor]]:
    """exp2, with 0 where a row meets itself."""
    for tile, values in computed:
        values.exp2_()
        yield tile, values.fill_diagonal_(0) if tile.is_diagonal else values


def _log_totals(rows: Tensor, tiles: list[Tile], scale: float, has_backward: bool) -> tuple[Tensor, list[Tensor]]:
    """log2 of each row's total [M], and the exponentials of the tiles where they are few enough to be kept."""
    is_kept = has_backward and sum(math.prod(tile.shape) for tile in tiles) <= tiling(rows.device).kept
    totals = rows.new_zeros(len(rows))
    kept = []
    for tile, values in _exponentials(similarities(rows, tiles, scale, is_kept)):
        for part, dim in tile.sides:
            totals[part] += values.sum(dim=dim)
        if is_kept:
            kept.append(values)
    return _summed(totals).log2_(), kept


def _log_totals_by_maxima(rows: Tensor, tiles: list[Tile], scale: float) -> Tensor:
    """The same at low temperatures: a row's exponentials are shifted by the largest similarity that it has met."""
    maxima = rows.new_full((len(rows),), -2 * scale)  # below all: -scale is the least there is
    totals = rows.new_zeros(len(rows))
    buffer = _buffer(rows, tiles)
    for tile, values in similarities(rows, tiles, scale):
        if tile.is_diagonal:
            values.fill_diagonal_(-torch.inf)
        for part, dim in tile.sides:
            largest = torch.maximum(maxima[part], values.amax(dim=dim))
            exponentials = torch.sub(values, largest.unsqueeze(dim), out=_shaped(buffer, tile)).exp2_()
            totals[part] = totals[part] * (maxima[part] - largest).exp2_() + exponentials.sum(dim=dim)
            maxima[part] = largest
    if world()[1] > 1:
        largest = maxima.clone()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        totals *= (maxima - largest).exp2_()
        maxima = largest
    return _summed(totals).log2_().add_(maxima)


def _weights(
    exponentials: Iterable[tuple[Tile, Tensor]], gradient: Tensor, logs: Tensor, buffer: Tensor
) -> Iterator[tuple[Tile, Tensor]]:
    """What each pair of a tile counts in the gradient of its row and of its column: exp(s) (g / total + g / total)."""
    by_total = gradient * (-logs).exp2_()
    for tile, values in exponentials:
        weights = torch.add(by_total[tile.rows, None], by_total[tile.columns], out=_shaped(buffer, tile))
        yield tile, weights.mul_(values)


def _weights_by_logs(
    computed: Iterable[tuple[Tile, Tensor]], gradient: Tensor, logs: Tensor, buffer: Tensor
) -> Iterator[tuple[Tile, Tensor]]:
    """The same at low temperatures, from similarities: none is far above the log of a total of its row or column."""
    for tile, values in computed:
        if tile.is_diagonal:
            values.fill_diagonal_(-torch.inf)
        weights = torch.sub(values, logs[tile.rows, None], out=_shaped(buffer, tile)).exp2_()
        weights.mul_(gradient[tile.rows, None])
        yield tile, weights.addcmul_(values.sub_(logs[tile.columns]).exp2_(), gradient[tile.columns])


def _summed(values: Tensor) -> Tensor:
    """In place, over all processes."""
    if world()[1] > 1:
        distributed.all_reduce(values)
    return values


def _buffer(rows: Tensor, tiles: list[Tile]) -> Tensor:
    """Room for any one of the tiles."""
    return rows.new_empty(max(math.prod(tile.shape) for tile in tiles))


def _shaped(buffer: Tensor, tile: Tile) -> Tensor:
    """The buffer's beginning in the shape of a tile."""
    return buffer[: math.prod(tile.shape)].view(tile.shape)


def _parts(first: int, end: int, most: int) -> list[slice]:
    """first to end in equal parts, or nearly so, of `most` each at most."""
    count = math.ceil((end - first) / most)
    bounds = [first + part * (end - first) // max(count, 1) for part in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]
