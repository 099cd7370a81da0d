"""The tiled log-sum-exp against a double loop; what it takes in memory, and that it never waits for a device."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in_processes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stages.losses import contrastive_accuracy, nt_xent, similarity_tiles, sup_con
from stages.losses.similarity_tiles import Tiling, bits_at, log2_sum_of_others, share_of_tiles

SMALL = Tiling(rows=4, columns=6, kept=0)
CPU = torch.device("cpu")


def log_sum_exp_of_others(rows: Tensor, temperature: float) -> Tensor:
    """What is tested, of unit rows and to base e."""
    bits = bits_at(temperature)
    return log2_sum_of_others(rows * math.sqrt(bits), bits) * math.log(2)


def reference(rows: Tensor, temperature: float) -> Tensor:
    """A double loop in float64."""
    rows = rows.double()
    found = []
    for i in range(len(rows)):
        others = torch.stack([rows[i] @ rows[j] / temperature for j in range(len(rows)) if j != i])
        found.append(others.logsumexp(0))
    return torch.stack(found)


def unit_rows(size: int, dimension: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(size, dimension, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1).to(dtype)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 11, 16, 23])
@pytest.mark.parametrize("temperature", [0.005, 0.026, 0.5])
@pytest.mark.parametrize("tiles", [SMALL, SMALL._replace(kept=10**6), similarity_tiles.CPU])
def test_values_and_gradients_are_those_of_a_double_loop(
    size: int, temperature: float, tiles: Tiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity_tiles, "CPU", tiles)
    weights = torch.arange(1, size + 1, dtype=torch.float64)
    wanted_rows = unit_rows(size, 5).requires_grad_()
    wanted = reference(wanted_rows, temperature)
    (wanted @ weights).backward()
    assert wanted_rows.grad is not None
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        rows = unit_rows(size, 5, dtype).requires_grad_()
        found = log_sum_exp_of_others(rows, temperature)
        (found @ weights.to(dtype)).backward()
        assert found.dtype == dtype
        assert (found - wanted).norm() <= tolerance / temperature * math.sqrt(size)
        assert rows.grad is not None
        assert (rows.grad - wanted_rows.grad).norm() <= 5 * tolerance / temperature * wanted_rows.grad.norm()


@pytest.mark.parametrize("vectors", ["identical", "opposite"])
@pytest.mark.parametrize("temperature", [0.001, 0.02501, 0.02499, 1.0])
def test_the_ends_of_the_range(vectors: str, temperature: float) -> None:
    """Every similarity is the largest, or none but one, on both sides of where the shift comes in."""
    rows = unit_rows(1, 8, torch.float32).repeat(600, 1)
    if vectors == "opposite":
        rows[1:] = -rows[0]
    found = log_sum_exp_of_others(rows, temperature)
    to_first = 1.0 if vectors == "identical" else math.exp(-2 / temperature)
    assert found[1:].double() == pytest.approx(math.log(598 + to_first) + 1 / temperature, rel=1e-6)
    first = math.log(599) + (1 if vectors == "identical" else -1) / temperature
    assert found[0].item() == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_a_scaled_gradient_is_neither_lost_nor_infinite(scale: float) -> None:
    """float32 holds the weights even where totals are as large as they become."""
    for temperature in (0.02499, 0.026):
        rows = unit_rows(1, 8, torch.float32).repeat(600, 1).requires_grad_()
        log_sum_exp_of_others(rows, temperature).sum().mul(scale).backward()
        wanted = rows.detach().double() * 2 * scale / temperature  # each row pulls, and is pulled, with weight 1
        assert rows.grad is not None
        assert (rows.grad / scale - wanted / scale).norm() <= 1e-4 * (wanted / scale).norm()


def test_what_was_kept_serves_two_backward_passes() -> None:
    rows = unit_rows(12, 4).requires_grad_()
    total = log_sum_exp_of_others(rows, 0.3).sum()
    (first,) = torch.autograd.grad(total, rows, retain_graph=True)
    (second,) = torch.autograd.grad(total, rows)
    assert torch.equal(first, second)


@pytest.mark.parametrize("is_for_onednn", [True, False])
def test_both_ways_to_multiply_are_matrix_products(is_for_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one a processor takes depends on its instructions."""
    monkeypatch.setattr(similarity_tiles, "IS_FOR_ONEDNN", is_for_onednn)
    left, right = torch.randn(150, 24, generator=torch.Generator().manual_seed(0)).split((60, 90))
    torch.testing.assert_close(similarity_tiles.product(left, right).double(), left.double() @ right.double().T,
                               rtol=0, atol=1e-5)  # fmt: skip
    weights, rows = torch.randn(60, 90, generator=torch.Generator().manual_seed(1)), torch.randn(24, 60)
    found = similarity_tiles.product_by_columns(weights, rows)
    torch.testing.assert_close(found.double(), rows.double() @ weights.double(), rtol=0, atol=1e-4)


def test_a_temperature_is_above_0() -> None:
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            bits_at(temperature)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 12, 13, 40])
def test_tiles_of_all_processes_have_each_pair_once_in_even_shares(
    processes: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = size if processes == 1 else 2 * processes * size
    monkeypatch.setattr(similarity_tiles, "CPU", SMALL)
    met = torch.zeros(rows, rows, dtype=torch.int64)
    work, heights = [], set()
    for rank in range(processes):
        monkeypatch.setattr(similarity_tiles, "world", lambda rank=rank: (rank, processes))
        tiles = share_of_tiles(rows, CPU)
        assert all(0 < tile.shape[0] <= SMALL.rows and 0 < tile.shape[1] <= SMALL.columns for tile in tiles)
        for tile in tiles:
            met[tile.rows, tile.columns] += 1
            if tile.is_diagonal:
                heights.add(tile.shape[0])
            else:
                met[tile.columns, tile.rows] += 1
        work.append(sum(math.prod(tile.shape) for tile in tiles))
    assert (met == 1).all()
    assert max(heights) - min(heights) <= 1
    if len(heights) == 1 or processes == 1:
        assert max(work) == min(work)
    else:
        assert max(work) - min(work) <= rows * rows / processes / min(heights), "a row of each block"


class Recorded(TorchDispatchMode):
    """Names of all operations, and the most elements of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.name().split("::")[1].split(".")[0])
        if isinstance(result, Tensor):
            self.most = max(self.most, result.numel())
        return result


WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
"""Operations that the host waits for: they give it a number, or have a result whose size depends on values."""


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "nt_xent": lambda a, b: nt_xent(a, b, 0.5),
        "nt_xent, cold": lambda a, b: nt_xent(a, b, 0.01),
        "sup_con": lambda a, b: sup_con(a, b, torch.arange(len(a)) % 7 - 1, 0.5),
    }


@pytest.mark.parametrize("name", losses())
def test_nothing_waits_for_the_device_and_no_matrix_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity_tiles, "CPU", Tiling(rows=32, columns=64, kept=0))
    pairs, dimension = 512, 8
    views = [torch.randn(pairs, dimension, requires_grad=True) for _ in range(2)]
    with Recorded() as forward:
        loss = losses()[name](views[0], views[1])
    with Recorded() as backward:
        loss.backward()
    with Recorded() as accuracy:
        contrastive_accuracy(views[0].detach(), views[1].detach())
    assert "exp2_" in forward.names & backward.names
    for recorded in (forward, backward, accuracy):
        assert not recorded.names & WAITING
        assert recorded.most == 2 * pairs * dimension, "the rows themselves are the largest, not [2N, 2N]"


def test_what_is_forbidden_would_be_seen() -> None:
    with Recorded() as recorded:
        values = torch.tensor([0.0, 1.0])
        assert values[values > 0].item() == 1
    assert {"nonzero", "_local_scalar_dense"} & recorded.names


def peak_of(rank: int, pairs: int, dimension: int) -> dict[str, Tensor]:
    """What a pass forward and back adds to the peak of a process, and both losses one after the other."""

    def run(pairs: int) -> None:
        views = [torch.randn(pairs, dimension, requires_grad=True) for _ in range(2)]
        nt_xent(views[0], views[1], 0.5).backward()
        nt_xent(views[0], views[1], 0.01).backward()
        sup_con(views[0], views[1], torch.arange(pairs) % 100, 0.5).backward()
        contrastive_accuracy(views[0].detach(), views[1].detach())

    run(16)
    before = peak_bytes()
    run(pairs)
    return {"bytes": torch.tensor(peak_bytes() - before)}


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.xdist_group("processes")
def test_memory_is_far_below_the_matrix(tmp_path: Path) -> None:
    pairs, dimension = 8192, 16
    (found,) = run_in_processes(peak_of, tmp_path, pairs, dimension, processes=1)
    matrix = (2 * pairs) ** 2 * 4
    assert 2 * pairs * dimension * 4 <= found["bytes"].item() < matrix / 8
