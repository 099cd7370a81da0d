"""Sums over all pairs of rows of a global batch, tile by tile: what contrastive losses are made of.

The matrix of similarities [M, M] of M rows never exists, unless it is one tile. It is symmetric, so that a tile above
the diagonal serves its rows and its columns, and the one below is not computed. The backward pass computes the tiles
again, but for few pairs (`Tiling.kept`), whose exponentials are kept: the weight of a pair in the gradient,
exp(s_ij) (g_i / total_i + g_j / total_j), is symmetric as well. Memory is linear in M.

Exponentials and logarithms are to base 2, which is faster (torch's exp is MKL's on CPUs, and takes four times as long
as its exp2): rows have such a length that their products are similarities in bits, see `bits_at`.

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

DIRECT_BITS = 40 / math.log(2)
"""While all similarities lie within e^-40 to e^40 (2 / temperature below 80) their exponentials, 4e-18 to 2e17, and
sums of millions of them neither vanish in float32 nor overflow, and no shift is needed."""

LEAST_LENGTH = 1e-12  # a shorter row is divided by this


class Tiling(NamedTuple):
    """How the matrix is cut.

    Attributes:
        rows, columns: of a tile at most.
        kept: exponentials of so many pairs at most are kept for the backward pass, where that saves computing them.
    """

    rows: int
    columns: int
    kept: int


CPU = Tiling(rows=1024, columns=1024, kept=2**20)
"""Measured: tiles of 4 MiB in float32, of which a cache shared by two cores holds several."""
GPU = Tiling(rows=4096, columns=4096, kept=2**24)
"""Not measured."""
IS_FOR_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Of products of float32 on a CPU: see _is_for_onednn."""


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


def bits_at(temperature: float) -> float:
    """1 / (temperature ln 2): 2 to the power of that, times a cosine, is exp(cosine / temperature).

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    return 1 / (temperature * math.log(2))


def views_in_bits(view_a: Tensor, view_b: Tensor, bits: float) -> Tensor:
    """Both views of all processes, the same on every one: rows whose products are `bits` times their cosines.

    Args:
        view_a, view_b: [N, D] of this process, N the same on all.

    Returns:
        [2, processes x N, D], float32 (float64 if given).

    Raises:
        ValueError: other shapes, or no rows.
    """
    if view_a.ndim != 2 or view_a.shape != view_b.shape or len(view_a) == 0:
        raise ValueError(f"two views are [N, D] each with N above 0, not {[*view_a.shape]} and {[*view_b.shape]}")
    views = torch.stack([view_a, view_b])
    views = views.to(torch.promote_types(views.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(views, dim=2, keepdim=True).clamp_min(LEAST_LENGTH)
    rows = gather_rows(views * (math.sqrt(bits) / lengths))  # [processes x 2, N, D]
    return rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(1, 2)


def log2_sum_of_others(rows: Tensor, bits: float) -> Tensor:
    """log2 of the sum over j != i of 2 to the power of rows_i . rows_j, for every row.

    Within a process group each computes its share of the tiles, and all get the same result. Backward leaves, on each
    process, its share of the gradient of the sum of what all processes made of the result: `gather_rows` sums it up.

    Args:
        rows: [M, D], float32 or float64, the same on every process; M at least 2, and a multiple of twice the number
            of processes.
        bits: the square of the rows' length.

    Returns:
        [M]
    """
    return _Log2SumOfOthers.apply(rows, bits)


def tiling(device: torch.device) -> Tiling:
    return CPU if device.type == "cpu" else GPU


def share_of_tiles(size: int, device: torch.device) -> list[Tile]:
    """This process's tiles of the matrix [size, size]; those of all have every pair once (on the diagonal both ways).

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
        others = (blocks - 1) // 2 + (blocks % 2 == 0 and block < blocks // 2)
        end = block + 1 + others
        for first, last in ((block + 1, min(end, blocks)), (0, max(end - blocks, 0))):  # the ring's end may be passed
            found += [Tile(rows, columns) for columns in _parts(starts[first], starts[last], largest.columns)]
    return found


def similarities(rows: Tensor, tiles: list[Tile]) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with the products of its rows and columns, to be written over."""
    for tile in tiles:
        yield tile, product(rows[tile.rows], rows[tile.columns])


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T of [n, k] and [m, k] -> [n, m]"""
    if not _is_for_onednn(left):
        return left @ right.T
    pixels = left.reshape(1, len(left), 1, -1).permute(0, 3, 1, 2)  # [1, k, n, 1], channels last
    return F.conv2d(pixels, right[:, :, None, None]).permute(0, 2, 3, 1).reshape(len(left), len(right))


def product_by_columns(left: Tensor, right: Tensor) -> Tensor:
    """right @ left of [k, n] and [m, k] -> [m, n]: the sum runs over the rows of `left`, which is read as it lies."""
    if not _is_for_onednn(left):
        return right @ left
    return F.conv2d(left[None, :, None], right[:, :, None, None]).reshape(len(right), -1)


def _is_for_onednn(values: Tensor) -> bool:
    """Whether a product is taken as a 1x1 convolution, which goes to oneDNN: on CPUs `mm` goes to MKL, which leaves out
    AVX-512 on AMD's processors (1.2 ns an element of a tile against 0.6 at k = 128). With AVX2 alone `mm` is faster.
    """
    return IS_FOR_ONEDNN and values.device.type == "cpu" and values.dtype == torch.float32


class _Log2SumOfOthers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bits: float) -> Tensor:
        ctx.tiles = share_of_tiles(len(rows), rows.device)
        ctx.is_direct = bits < DIRECT_BITS
        elements = sum(math.prod(tile.shape) for tile in ctx.tiles)
        ctx.is_kept = ctx.is_direct and ctx.needs_input_grad[0] and elements <= tiling(rows.device).kept
        kept: list[Tensor] = []
        with torch.autocast(rows.device.type, enabled=False):
            computed = similarities(rows, ctx.tiles)
            if ctx.is_direct:
                logs = _log_totals(_exponentials(computed), rows, kept if ctx.is_kept else None)
            else:
                logs = _log_totals_by_maxima(computed, rows, least=-2 * bits)
        ctx.save_for_backward(rows, logs, *kept)
        return logs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, logs, *kept = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            gradient = _summed(gradient.clone(memory_format=torch.contiguous_format))
            if ctx.is_kept:
                weighted = _weights(zip(ctx.tiles, kept, strict=True), gradient, logs)
            elif ctx.is_direct:
                weighted = _weights(_exponentials(similarities(rows, ctx.tiles)), gradient, logs)
            else:
                weighted = _weights_by_logs(similarities(rows, ctx.tiles), gradient, logs)
            flipped = rows.T.contiguous()
            found, found_flipped = torch.zeros_like(rows), torch.zeros_like(flipped)
            for tile, weights in weighted:
                found[tile.rows] += product(weights, flipped[:, tile.columns])
                if not tile.is_diagonal:
                    found_flipped[:, tile.columns] += product_by_columns(weights, flipped[:, tile.rows])
        return found.add_(found_flipped.T), None


def _exponentials(computed: Iterator[tuple[Tile, Tensor]]) -> Iterator[tuple[Tile, Tensor]]:
    """exp2, with 0 where a row meets itself."""
    for tile, values in computed:
        values.exp2_()
        yield tile, values.fill_diagonal_(0) if tile.is_diagonal else values


def _log_totals(exponentials: Iterator[tuple[Tile, Tensor]], rows: Tensor, kept: list[Tensor] | None) -> Tensor:
    """log2 of each row's total [M]; the exponentials of the tiles are put into `kept`."""
    totals = rows.new_zeros(len(rows))
    for tile, values in exponentials:
        for part, dim in tile.sides:
            totals[part] += values.sum(dim=dim)
        if kept is not None:
            kept.append(values)
    return _summed(totals).log2_()


def _log_totals_by_maxima(computed: Iterator[tuple[Tile, Tensor]], rows: Tensor, least: float) -> Tensor:
    """The same at low temperatures: a row's exponentials are shifted by the largest similarity that it has met.

    Args:
        least: below all similarities.
    """
    totals, maxima = rows.new_zeros(len(rows)), rows.new_full((len(rows),), least)
    for tile, values in computed:
        if tile.is_diagonal:
            values.fill_diagonal_(-torch.inf)
        for part, dim in tile.sides:
            largest = torch.maximum(maxima[part], values.amax(dim=dim))
            exponentials = (values - largest.unsqueeze(dim)).exp2_()
            totals[part] = totals[part] * (maxima[part] - largest).exp2_() + exponentials.sum(dim=dim)
            maxima[part] = largest
    if world()[1] > 1:
        largest = maxima.clone()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        totals *= (maxima - largest).exp2_()
        maxima = largest
    return _summed(totals).log2_().add_(maxima)


def _weights(
    exponentials: Iterable[tuple[Tile, Tensor]], gradient: Tensor, logs: Tensor
) -> Iterator[tuple[Tile, Tensor]]:
    """What a pair counts in the gradients of its row and of its column: 2^s_ij (g_i / total_i + g_j / total_j)."""
    by_total = gradient * (-logs).exp2_()
    buffer = gradient.new_empty(0)
    for tile, values in exponentials:
        if values.numel() > buffer.numel():
            buffer = torch.empty_like(values).flatten()
        weights = buffer[: values.numel()].view_as(values)
        torch.add(by_total[tile.rows, None], by_total[tile.columns], out=weights)
        yield tile, weights.mul_(values)


def _weights_by_logs(
    computed: Iterable[tuple[Tile, Tensor]], gradient: Tensor, logs: Tensor
) -> Iterator[tuple[Tile, Tensor]]:
    """The same at low temperatures, from similarities: none is far above the log of a total of its row or column."""
    for tile, values in computed:
        if tile.is_diagonal:
            values.fill_diagonal_(-torch.inf)
        weights = (values - logs[tile.rows, None]).exp2_().mul_(gradient[tile.rows, None])
        yield tile, weights.addcmul_(values.sub_(logs[tile.columns]).exp2_(), gradient[tile.columns])


def _summed(values: Tensor) -> Tensor:
    """In place, over all processes."""
    if world()[1] > 1:
        distributed.all_reduce(values)
    return values


def _parts(first: int, end: int, most: int) -> list[slice]:
    """first to end in equal parts, or nearly so, of `most` each at most."""
    count = math.ceil((end - first) / most)
    bounds = [first + part * (end - first) // max(count, 1) for part in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]
