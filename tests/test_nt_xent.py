"""The loss against algorithm 1 of the paper written as a double loop, and two processes against one."""

import math
from pathlib import Path

import pytest
import torch
from processes import run_in_processes
from torch import Tensor, nn

from stages.losses import contrastive_accuracy, nt_xent, similarity_tiles
from stages.losses.similarity_tiles import Tiling

PAIRS = 6
DIMENSION = 5
SMALL = Tiling(rows=4, columns=5, kept=0)
"""So small that a few rows have many tiles, none of which they fill."""


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        monkeypatch.setattr(similarity_tiles, "CPU", SMALL)


def reference(view_a: Tensor, view_b: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, algorithm 1, in float64; rows 2k - 1 and 2k are the views of image k."""
    rows = [row for pair in zip(view_a.double(), view_b.double(), strict=True) for row in pair]
    similarity = [[one @ other / (one.norm() * other.norm()) for other in rows] for one in rows]

    def loss(i: int, j: int) -> Tensor:
        others = torch.stack([similarity[i][k] / temperature for k in range(len(rows)) if k != i])
        return -similarity[i][j] / temperature + others.logsumexp(0)

    total = sum(loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(len(view_a)))
    return torch.as_tensor(total) / len(rows)


def make_views(kind: str, pairs: int = PAIRS, dimension: int = DIMENSION) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    view_a = torch.randn(pairs, dimension, dtype=torch.float64, generator=generator)
    if kind == "random":
        return view_a, torch.randn(pairs, dimension, dtype=torch.float64, generator=generator)
    if kind == "identical":
        return view_a[:1].repeat(pairs, 1), view_a[:1].repeat(pairs, 1)
    assert kind == "opposite"
    return view_a, -view_a


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", ["random", "identical", "opposite"])
@pytest.mark.parametrize("temperature", [0.005, 0.05, 0.2, 0.5, 1.0])
def test_loss_and_gradients_are_those_of_algorithm_1(kind: str, temperature: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        views = [view.to(dtype).requires_grad_() for view in make_views(kind)]
        wanted_views = [view.detach().double().requires_grad_() for view in views]
        loss = nt_xent(views[0], views[1], temperature)
        wanted = reference(wanted_views[0], wanted_views[1], temperature)
        loss.backward()
        wanted.backward()
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(wanted.item(), rel=tolerance, abs=tolerance)
        for view, wanted_view in zip(views, wanted_views, strict=True):
            assert view.grad is not None
            assert wanted_view.grad is not None
            scale = max(1.0, wanted_view.grad.norm().item())
            assert (view.grad - wanted_view.grad).norm().item() <= tolerance * scale / temperature


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("pairs", "dimension"), [(1, 4), (2, 1), (3, 7), (17, 3), (32, 64)])
def test_any_size(pairs: int, dimension: int) -> None:
    view_a, view_b = make_views("random", pairs, dimension)
    loss = nt_xent(view_a, view_b, 0.3)
    assert loss.item() == pytest.approx(reference(view_a, view_b, 0.3).item(), rel=1e-10, abs=1e-10)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("temperature", [0.02, 0.4])
def test_gradient_is_that_of_finite_differences(temperature: float) -> None:
    views = [view.requires_grad_() for view in make_views("random", 4, 3)]
    assert torch.autograd.gradcheck(lambda a, b: 2.5 * nt_xent(a, b, temperature), views)


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_several_whole_tiles_are_the_matrix(temperature: float) -> None:
    """At the size of tile that is used, against cross-entropy on the whole matrix in float64."""
    pairs = 900
    views = [view.float().requires_grad_() for view in make_views("random", pairs, 64)]
    loss = nt_xent(views[0], views[1], temperature)
    loss.backward()
    wanted_views = [view.detach().double().requires_grad_() for view in views]
    rows = torch.nn.functional.normalize(torch.cat(wanted_views), dim=1)
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    wanted = torch.nn.functional.cross_entropy(logits, torch.arange(2 * pairs).roll(pairs))
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for view, wanted_view in zip(views, wanted_views, strict=True):
        assert view.grad is not None
        assert wanted_view.grad is not None
        assert (view.grad - wanted_view.grad).norm() <= 1e-5 * wanted_view.grad.norm()


def test_one_view_without_gradient() -> None:
    first, second = make_views("random")
    both = [first.clone().requires_grad_(), second.clone().requires_grad_()]
    nt_xent(both[0], both[1], 0.2).backward()
    alone = second.clone().requires_grad_()
    nt_xent(first, alone, 0.2).backward()
    assert both[1].grad is not None
    assert alone.grad is not None
    assert torch.equal(alone.grad, both[1].grad)
    assert not nt_xent(first, second, 0.2).requires_grad


def test_values_that_are_known() -> None:
    view_a, view_b = make_views("identical")
    assert nt_xent(view_a, view_b, 0.1).item() == pytest.approx(math.log(2 * PAIRS - 1))
    corners = torch.eye(4)
    assert nt_xent(corners, corners, 0.5).item() == pytest.approx(math.log(math.e**2 + 6) - 2, rel=1e-6)


def test_length_of_the_vectors_does_not_matter() -> None:
    view_a, view_b = make_views("random")
    assert nt_xent(view_a * 1e3, view_b * 1e-3, 0.2).item() == pytest.approx(nt_xent(view_a, view_b, 0.2).item())


def test_half_precision_is_computed_in_single() -> None:
    halves = [view.bfloat16() for view in make_views("random")]
    wanted = nt_xent(halves[0].float(), halves[1].float(), 0.05)
    singles = [half.float().requires_grad_() for half in halves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nt_xent(halves[0], halves[1], 0.05), wanted)
        under_autocast = nt_xent(singles[0], singles[1], 0.05)
        under_autocast.backward()
    plain = [half.float().requires_grad_() for half in halves]
    nt_xent(plain[0], plain[1], 0.05).backward()
    assert torch.equal(under_autocast, wanted)
    assert singles[0].grad is not None
    assert plain[0].grad is not None
    assert torch.equal(singles[0].grad, plain[0].grad)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not \[3, 2\] and \[4, 2\]"):
        nt_xent(torch.ones(3, 2), torch.ones(4, 2), 0.5)
    with pytest.raises(ValueError, match="above 0"):
        nt_xent(torch.ones(3, 2), torch.ones(3, 2), 0.0)


@pytest.mark.usefixtures("tiles")
def test_accuracy_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    view_a = torch.randn(20, 4, generator=generator)
    view_b = view_a + 0.5 * torch.randn(20, 4, generator=generator)
    rows = torch.nn.functional.normalize(torch.cat([view_a, view_b]), dim=1)
    correct = 0
    for i in range(40):
        others = [k for k in range(40) if k != i]
        correct += max(others, key=lambda k: float(rows[i] @ rows[k])) == (i + 20) % 40
    assert 0 < correct < 40
    assert contrastive_accuracy(view_a, view_b).item() == pytest.approx(correct / 40)


def test_accuracy_without_gradient_and_at_its_ends() -> None:
    corners = torch.eye(4, requires_grad=True)
    accuracy = contrastive_accuracy(corners, corners)
    assert accuracy.item() == 1.0
    assert not accuracy.requires_grad
    one = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    assert contrastive_accuracy(one, one).item() == 0.0


def step(view_a: Tensor, view_b: Tensor, model: nn.Module, temperature: float, scale: float) -> dict[str, Tensor]:
    """Loss, and gradients by inputs and parameters times `scale`, of views sent through a model."""
    view_a, view_b = view_a.clone().requires_grad_(), view_b.clone().requires_grad_()
    projected_a, projected_b = model(torch.cat([view_a, view_b])).chunk(2)
    loss = nt_xent(projected_a, projected_b, temperature)
    loss.backward()
    assert view_a.grad is not None
    assert view_b.grad is not None
    gradients = {
        name.removeprefix("module."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    found = {"a": view_a.grad * scale, "b": view_b.grad * scale, **gradients}
    return {**found, "loss": loss.detach(), "accuracy": contrastive_accuracy(projected_a, projected_b)}


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(DIMENSION, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


CASES = [
    (dtype, temperature, tiles)
    for dtype in (torch.float64, torch.float32)
    for temperature in (0.02, 0.1)
    for tiles in (similarity_tiles.CPU, Tiling(rows=5, columns=7, kept=0))
]
PAIRS_OF_ALL = 30


def step_of_rank(rank: int, processes: int) -> dict[str, Tensor]:
    mine = slice(rank * PAIRS_OF_ALL // processes, (rank + 1) * PAIRS_OF_ALL // processes)
    views = make_views("random", PAIRS_OF_ALL)
    found = {}
    for number, (dtype, temperature, tiles) in enumerate(CASES):
        similarity_tiles.CPU = tiles
        model = nn.parallel.DistributedDataParallel(make_model(dtype))
        view_a, view_b = (view[mine].to(dtype) for view in views)
        part = step(view_a, view_b, model, temperature, scale=1 / processes)
        found |= {f"{number}/{name}": value for name, value in part.items()}
    # Each process scales its loss as it likes: the gradient is that of the sum of all.
    alone = views[0][mine].clone().requires_grad_()
    (nt_xent(alone, views[1][mine], 0.1) * (rank + 1)).backward()
    assert alone.grad is not None
    return found | {"scaled": alone.grad}


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_equal_one(processes: int, tmp_path: Path) -> None:
    ranks = run_in_processes(step_of_rank, tmp_path, processes, processes=processes)
    views = make_views("random", PAIRS_OF_ALL)
    for number, (dtype, temperature, _) in enumerate(CASES):
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        wanted = step(views[0].to(dtype), views[1].to(dtype), make_model(dtype), temperature, scale=1.0)
        for name, value in wanted.items():
            parts = [rank[f"{number}/{name}"] for rank in ranks]
            found = torch.cat(parts) if name in ("a", "b") else parts[0]
            if name not in ("a", "b"):
                assert all(torch.equal(part, found) for part in parts), "the same on all"
            assert (found - value).norm() <= tolerance * value.norm(), (name, dtype, temperature)
    whole = views[0].clone().requires_grad_()
    nt_xent(whole, views[1], 0.1).backward()
    assert whole.grad is not None
    wanted_scaled = whole.grad * sum(range(1, processes + 1))
    assert (torch.cat([rank["scaled"] for rank in ranks]) - wanted_scaled).norm() <= 1e-10 * wanted_scaled.norm()
