"""NT-Xent and SupCon, forward and backward, D = 128, temperature 0.5: seconds, and MiB added at the peak.

    python -m benchmarks.nt_xent [--quick] [--device cuda]

Compared with lightly's NTXentLoss; with cross-entropy on the whole masked matrix of similarities, as most
implementations have it (`naive`, the faster of two ways to mask); with pytorch-metric-learning's NTXentLoss, at 256
pairs only since it takes O(N^3) memory, and with its SupConLoss. `products` are the matrix products of ours alone, on
the same tiles (one a tile forward, again backward, and two for the gradient); `products by mm` are the same by
torch.mm, which is slower on some processors. Memory is what one pass forward and back adds at its peak, in a process of
its own that has the views already. Times are of a process as Python starts it, and once more (`_kept`) of one that
keeps freed memory, as `simclr` does: from that the peers gain most, whose matrices are new ones at each step. That all
compute the same is measured first (a note). Growth ends at 65,536 pairs, whose matrix would take 64 GiB. Views are
random ones, which changes no speed: --data is not used.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from pytorch_metric_learning import losses
from torch import Tensor

from benchmarks.harness import (
    Comparison,
    Row,
    Work,
    alternate,
    arguments,
    exponent,
    fastest,
    peak_bytes,
    report,
    seconds_of,
)
from pipeline.host import keep_freed_memory
from stages.losses import nt_xent, sup_con
from stages.losses.similarity_tiles import Tile, product, product_by_columns, share_of_tiles, similarities

Loss = Callable[[Tensor, Tensor], Tensor]
"""One adapter signature: two views [N, D] -> a scalar."""

DIMENSION, TEMPERATURE, CLASSES = 128, 0.5, 100
KEPT = ", freed memory kept"
MIB = 2**20


def ours(view_a: Tensor, view_b: Tensor) -> Tensor:
    return nt_xent(view_a, view_b, TEMPERATURE)


def lightly(view_a: Tensor, view_b: Tensor) -> Tensor:
    return NTXentLoss(TEMPERATURE)(view_a, view_b)


def naive_filled(view_a: Tensor, view_b: Tensor) -> Tensor:
    rows = F.normalize(torch.cat([view_a, view_b]), dim=1)
    logits = (rows @ rows.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, _partners(view_a))


def naive_masked(view_a: Tensor, view_b: Tensor) -> Tensor:
    rows = F.normalize(torch.cat([view_a, view_b]), dim=1)
    logits = (rows / TEMPERATURE) @ rows.T
    mask = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return F.cross_entropy(logits.masked_fill(mask, -torch.inf), _partners(view_a))


def metric_learning(view_a: Tensor, view_b: Tensor) -> Tensor:
    labels = torch.arange(len(view_a), device=view_a.device).repeat(2)
    return losses.NTXentLoss(TEMPERATURE)(torch.cat([view_a, view_b]), labels)


def ours_supervised(view_a: Tensor, view_b: Tensor) -> Tensor:
    return sup_con(view_a, view_b, _classes(view_a), TEMPERATURE)


def metric_learning_supervised(view_a: Tensor, view_b: Tensor) -> Tensor:
    return losses.SupConLoss(TEMPERATURE)(torch.cat([view_a, view_b]), _classes(view_a).repeat(2))


def _partners(view: Tensor) -> Tensor:
    return torch.arange(2 * len(view), device=view.device).roll(len(view))


def _classes(view: Tensor) -> Tensor:
    return torch.arange(len(view), device=view.device) % CLASSES


NAIVE: Mapping[str, Loss] = {"fill_diagonal_": naive_filled, "masked_fill": naive_masked}


def make_views(pairs: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, pairs, DIMENSION, generator=generator).to(device, dtype)
    return [view.clone().requires_grad_() for view in views]


def both_ways(loss: Loss, views: list[Tensor]) -> Tensor:
    """Forward and backward; the loss."""
    for view in views:
        view.grad = None
    value = loss(views[0], views[1])
    value.backward()
    return value.detach()


def work_of(loss: Loss, pairs: int, device: str) -> Work:
    views = make_views(pairs, device)
    return lambda: both_ways(loss, views)


def products(pairs: int, device: str) -> Work:
    """The matrix products that no implementation by tiles does without."""
    rows, flipped, tiles = _rows_and_tiles(pairs, device)
    weights = {tile.shape: values for tile, values in similarities(rows, tiles)}

    @torch.no_grad()
    def work() -> None:
        for tile in (*tiles, *tiles):
            product(rows[tile.rows], rows[tile.columns])
        for tile in tiles:
            product(weights[tile.shape], flipped[:, tile.columns])
            if not tile.is_diagonal:
                product_by_columns(weights[tile.shape], flipped[:, tile.rows])

    return work


def products_by_mm(pairs: int, device: str) -> Work:
    """The same, written into tensors that are there already."""
    rows, _, tiles = _rows_and_tiles(pairs, device)
    weights = {tile.shape: values for tile, values in similarities(rows, tiles)}
    found = torch.zeros_like(rows)

    @torch.no_grad()
    def work() -> None:
        for tile in (*tiles, *tiles):
            torch.mm(rows[tile.rows], rows[tile.columns].T, out=weights[tile.shape])
        for tile in tiles:
            found[tile.rows].addmm_(weights[tile.shape], rows[tile.columns])
            if not tile.is_diagonal:
                found[tile.columns].addmm_(weights[tile.shape].T, rows[tile.rows])

    return work


def _rows_and_tiles(pairs: int, device: str) -> tuple[Tensor, Tensor, list[Tile]]:
    rows = F.normalize(torch.cat(make_views(pairs, device)).detach(), dim=1)
    return rows, rows.T.contiguous(), share_of_tiles(len(rows), rows.device)


def one_pass(loss: Loss, views: list[Tensor], warm_up: bool) -> None:
    """What `peak_bytes` measures in a process of its own."""
    both_ways(loss, make_views(8, "cpu") if warm_up else views)


def added_mib(loss: Loss, pairs: int, device: str) -> float:
    if device == "cpu":
        return peak_bytes(one_pass, loss, [view.detach().requires_grad_() for view in make_views(pairs, device)]) / MIB
    views = make_views(pairs, device)
    both_ways(loss, views)
    for view in views:
        view.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both_ways(loss, views)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def error(loss: Loss, wanted: Loss, pairs: int, device: str, dtype: torch.dtype) -> float:
    """Relative, of value or gradients, the larger: of `loss` in `dtype` against `wanted` in float64."""
    found = []
    for one, precision in ((loss, dtype), (wanted, torch.float64)):
        views = make_views(pairs, device, precision)
        value = both_ways(one, views)
        found.append([value, torch.stack([view.grad for view in views if view.grad is not None])])
    return max(float((mine - other).norm() / other.norm()) for mine, other in zip(*found, strict=True))


def note_errors(comparison: Comparison, device: str) -> None:
    """A speed-up changes no result: relative errors in value and gradients."""
    pairs = 700
    for name, wanted in (("lightly", lightly), ("naive", naive_filled), ("naive, masked", naive_masked)):
        apart = error(ours, wanted, pairs, device, torch.float64)
        comparison.notes.append(f"loss and gradients, {pairs} pairs, float64: {apart:.1e} from {name}")
    apart = error(ours_supervised, metric_learning_supervised, pairs, device, torch.float64)
    comparison.notes.append(f"SupCon and its gradients, float64: {apart:.1e} from pytorch-metric-learning")
    for name, loss in (("ours", ours), ("lightly", lightly), ("naive", naive_filled)):
        apart = error(loss, naive_filled, pairs, device, torch.float32)
        comparison.notes.append(f"float32 against float64: {name} {apart:.1e}")


def compare(comparison: Comparison, pairs: int, runs: int, device: str, is_kept: bool = False) -> dict[str, float]:
    """A row of seconds beside lightly and the faster naive way; the values.

    Args:
        is_kept: whether the process keeps freed memory.
    """
    setting, naive = fastest({name: work_of(loss, pairs, device) for name, loss in NAIVE.items()}, device)
    contenders = {
        "ours": work_of(ours, pairs, device),
        "lightly": work_of(lightly, pairs, device),
        "naive": naive,
        "products": products(pairs, device),
        "products by mm": products_by_mm(pairs, device),
    }
    values = alternate(contenders, runs, device=device)
    comparison.rows.append(Row(f"{pairs:,} pairs{KEPT if is_kept else ''}", values, {"naive": setting}))
    for peer in ("lightly", "naive"):
        comparison.ratio[f"{peer}_{pairs}{'_kept' if is_kept else ''}"] = values[peer] / values["ours"]
    return values


def compare_metric_learning(comparison: Comparison, pairs: int, runs: int, device: str) -> None:
    name = "pytorch-metric-learning"
    values = alternate(
        {"ours": work_of(ours, 256, device), name: work_of(metric_learning, 256, device)}, min(runs, 3), device=device
    )
    comparison.rows.append(Row("256 pairs, again", values))
    comparison.ratio["metric_learning_256"] = values[name] / values["ours"]
    values = alternate(
        {"ours": work_of(ours_supervised, pairs, device), name: work_of(metric_learning_supervised, pairs, device)},
        runs,
        device=device,
    )
    comparison.rows.append(Row(f"SupCon, {pairs:,} pairs, {CLASSES} classes", values))
    comparison.ratio["supcon"] = values[name] / values["ours"]


def measure_growth(comparison: Comparison, sizes: list[int], runs: int, device: str) -> None:
    """The largest runs once, without a warm-up: it takes as long as all others together."""
    *smaller, largest = sizes
    seconds = [alternate({"ours": work_of(ours, pairs, device)}, runs, device=device)["ours"] for pairs in smaller]
    seconds.append(seconds_of(work_of(ours, largest, device), device))
    memory = [added_mib(ours, pairs, device) for pairs in sizes]
    for pairs, taken, added in zip(sizes, seconds, memory, strict=True):
        comparison.rows.append(Row(f"growth, {pairs:,} pairs", {"ours": taken}))
        comparison.rows.append(Row(f"growth, {pairs:,} pairs", {"ours": added}, unit="MiB"))
    comparison.notes.append(
        f"growth with the pairs, {sizes[0]:,} to {sizes[-1]:,}: seconds by the power {exponent(sizes, seconds):.2f}, "
        f"memory {exponent(sizes, memory):.2f}"
    )


def main() -> None:
    given = arguments(__doc__)
    device, runs = given.device, 3 if given.quick else 5
    *smaller, largest = [256, 1024, 2048] if given.quick else [256, 4096, 8192]
    comparison = Comparison("nt_xent", "s", f"{largest:,} pairs", runs=min(runs, 3), device=device)
    note_errors(comparison, device)
    for pairs in smaller:
        compare(comparison, pairs, 50 if pairs == 256 else runs, device)
    values = compare(comparison, largest, comparison.runs, device)
    comparison.limit = values["products"]
    comparison.ratio |= {peer: values[peer] / values["ours"] for peer in ("lightly", "naive")}
    comparison.ratio["limit"] = values["products"] / values["ours"]
    comparison.ratio["limit_mm"] = values["products by mm"] / values["ours"]
    keep_freed_memory()  # from here on: it cannot be undone
    for pairs in (smaller[0], largest):
        compare(comparison, pairs, 50 if pairs == 256 else comparison.runs, device, is_kept=True)
    compare_metric_learning(comparison, 1024 if given.quick else 2048, runs, device)
    contenders = {"ours": ours, "lightly": lightly, "naive": naive_filled}
    for pairs in (smaller[-1], largest):
        memory = {name: added_mib(loss, pairs, device) for name, loss in contenders.items()}
        comparison.rows.append(Row(f"{pairs:,} pairs", memory, unit="MiB"))
        for peer in ("lightly", "naive"):
            comparison.ratio[f"memory_{peer}"] = memory[peer] / memory["ours"]  # of the larger: it comes last
    measure_growth(comparison, [256, 1024, 4096] if given.quick else [256, 1024, 4096, 16384, 65536], runs, device)
    report(comparison)


if __name__ == "__main__":
    main()
