"""SupCon against its definition written as loops, and several processes against one."""

from pathlib import Path

import pytest
import torch
from processes import run_in_processes
from torch import Tensor

from stages.losses import nt_xent, similarity_tiles, sup_con
from stages.losses.similarity_tiles import Tiling

LABELS = [3, 0, 3, -1, 7, 0, 3, -1, 2**40]
"""Classes of one, two and three images, and two images without a label."""
PAIRS = len(LABELS)
SMALL = Tiling(rows=4, columns=5, kept=0)


def reference(view_a: Tensor, view_b: Tensor, labels: list[int], temperature: float) -> Tensor:
    """Khosla et al. 2020, equation 2, in float64; the mean over the rows."""
    rows = torch.cat([view_a, view_b]).double()
    count, pairs = len(rows), len(labels)
    similarity = [[one @ other / (one.norm() * other.norm()) / temperature for other in rows] for one in rows]

    def is_positive(i: int, j: int) -> bool:
        same_class = labels[i % pairs] == labels[j % pairs] and labels[i % pairs] >= 0
        return i != j and (i % pairs == j % pairs or same_class)

    losses = []
    for i in range(count):
        total = torch.stack([similarity[i][j] for j in range(count) if j != i]).logsumexp(0)
        logs = [similarity[i][j] - total for j in range(count) if is_positive(i, j)]
        losses.append(-sum(logs) / len(logs))
    return torch.as_tensor(sum(losses)) / count


def make_views(kind: str = "random", pairs: int = PAIRS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    view_a, view_b = torch.randn(2, pairs, 5, dtype=torch.float64, generator=generator)
    if kind == "identical":
        return view_a[:1].repeat(pairs, 1), view_a[:1].repeat(pairs, 1)
    return view_a, -view_a if kind == "opposite" else view_b


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        monkeypatch.setattr(similarity_tiles, "CPU", SMALL)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", ["random", "identical", "opposite"])
@pytest.mark.parametrize("temperature", [0.005, 0.1, 1.0])
def test_loss_and_gradients_are_those_of_the_definition(kind: str, temperature: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        views = [view.to(dtype).requires_grad_() for view in make_views(kind)]
        wanted_views = [view.detach().double().requires_grad_() for view in views]
        loss = sup_con(views[0], views[1], torch.tensor(LABELS), temperature)
        wanted = reference(wanted_views[0], wanted_views[1], LABELS, temperature)
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
@pytest.mark.parametrize("temperature", [0.02, 0.4])
def test_gradient_is_that_of_finite_differences(temperature: float) -> None:
    views = [view.requires_grad_() for view in make_views(pairs=5)]
    labels = torch.tensor([1, 1, -1, 4, 1])
    assert torch.autograd.gradcheck(lambda a, b: 2.5 * sup_con(a, b, labels, temperature), views)


@pytest.mark.parametrize("labels", [torch.randperm(PAIRS), torch.full((PAIRS,), -1)])
def test_where_no_two_images_are_of_one_class_it_is_nt_xent(labels: Tensor) -> None:
    for temperature in (0.01, 0.3):
        views = [view.float().requires_grad_() for view in make_views()]
        other_views = [view.detach().clone().requires_grad_() for view in views]
        loss = sup_con(views[0], views[1], labels, temperature)
        other = nt_xent(other_views[0], other_views[1], temperature)
        assert torch.equal(loss, other)
        loss.backward()
        other.backward()
        for view, other_view in zip(views, other_views, strict=True):
            assert view.grad is not None
            assert other_view.grad is not None
            assert (view.grad - other_view.grad).norm() <= 1e-6 * other_view.grad.norm()


@pytest.mark.parametrize("pairs", [1, 2])
def test_few_images(pairs: int) -> None:
    views = make_views(pairs=pairs)
    labels = [5] * pairs
    wanted = reference(*views, labels, 0.2)
    assert sup_con(*views, torch.tensor(labels), 0.2).item() == pytest.approx(wanted.item(), abs=1e-12)


def test_half_precision_is_computed_in_single() -> None:
    halves = [view.bfloat16() for view in make_views()]
    labels = torch.tensor(LABELS)
    wanted = sup_con(halves[0].float(), halves[1].float(), labels, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sup_con(halves[0], halves[1], labels, 0.05), wanted)


def test_wrong_arguments_are_refused() -> None:
    views = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"labels are \[N\] or \[N, classes\], not \[4\]"):
        sup_con(views, views, torch.arange(4), 0.5)
    with pytest.raises(ValueError, match=r"not \[3, 2\] and \[3, 3\]"):
        sup_con(views, torch.ones(3, 3), torch.arange(3), 0.5)
    with pytest.raises(ValueError, match="above 0"):
        sup_con(views, views, torch.arange(3), 0.0)


CASES = [(dtype, temperature) for dtype in (torch.float64, torch.float32) for temperature in (0.02, 0.1)]
PAIRS_OF_ALL = 30


def step(mine: slice, dtype: torch.dtype, temperature: float) -> dict[str, Tensor]:
    labels = torch.arange(PAIRS_OF_ALL) % 7 - 1
    views = [view[mine].to(dtype).requires_grad_() for view in make_views(pairs=PAIRS_OF_ALL)]
    loss = sup_con(views[0], views[1], labels[mine], temperature)
    loss.backward()
    assert views[0].grad is not None
    assert views[1].grad is not None
    return {"loss": loss.detach(), "a": views[0].grad, "b": views[1].grad}


def steps_of_rank(rank: int) -> dict[str, Tensor]:
    similarity_tiles.CPU = Tiling(rows=5, columns=7, kept=0)
    mine = slice(rank * PAIRS_OF_ALL // 2, (rank + 1) * PAIRS_OF_ALL // 2)
    return {f"{number}/{name}": value for number, case in enumerate(CASES) for name, value in step(mine, *case).items()}


@pytest.mark.xdist_group("processes")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    first, second = run_in_processes(steps_of_rank, tmp_path)
    for number, (dtype, temperature) in enumerate(CASES):
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        wanted = step(slice(None), dtype, temperature)
        loss = first[f"{number}/loss"]
        assert torch.equal(loss, second[f"{number}/loss"])
        assert (loss - wanted["loss"]).abs() <= tolerance * wanted["loss"]
        for name in "ab":
            gradient = torch.cat([first[f"{number}/{name}"], second[f"{number}/{name}"]]) / 2
            assert (gradient - wanted[name]).norm() <= tolerance * wanted[name].norm(), (name, dtype, temperature)
