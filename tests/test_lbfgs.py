"""L-BFGS in compact form against the two-loop recursion, and descents on quadratics against their solutions."""

import pytest
import torch
from torch import Tensor

from stages.evaluation.lbfgs import PAIRS, Evaluation, History, minimise


def two_loops(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """Nocedal & Wright 2006, algorithm 7.4: pairs (step, change), the newest last; minus the quasi-Newton direction."""
    vector = gradient.clone()
    shares = []
    for step, change in reversed(pairs):
        shares.append((step @ vector) / (step @ change))
        vector -= shares[-1] * change
    if pairs:
        step, change = pairs[-1]
        vector *= (step @ change) / (change @ change)
    for (step, change), share in zip(pairs, reversed(shares), strict=True):
        vector += (share - (change @ vector) / (step @ change)) * step
    return -vector


def curved(problems: int, size: int, seed: int = 0) -> Tensor:
    """Positive definite [S, K, K]."""
    random = torch.Generator().manual_seed(seed)
    roots = torch.randn(problems, size, size, generator=random, dtype=torch.float64)
    return roots @ roots.mT / size + 0.1 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("count", [0, 1, 3, PAIRS, 2 * PAIRS + 3])
def test_direction_is_that_of_the_two_loop_recursion(count: int) -> None:
    random = torch.Generator().manual_seed(1)
    hessians = curved(3, 25)
    history = History(3, torch.zeros(3, 25, dtype=torch.float64))
    kept: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
    for number in range(count):
        step = torch.randn(3, 25, generator=random, dtype=torch.float64)
        change = (hessians @ step[:, :, None])[:, :, 0]
        chosen = torch.tensor([True, number % 2 == 0, number != 1])
        history.push(chosen, step, change)
        for problem in range(3):
            if chosen[problem]:
                kept[problem] = [*kept[problem], (step[problem], change[problem])][-PAIRS:]
    gradient = torch.randn(3, 25, generator=random, dtype=torch.float64)
    expected = torch.stack([two_loops(pairs, one) for pairs, one in zip(kept, gradient, strict=True)])
    torch.testing.assert_close(history.direction(gradient), expected, rtol=1e-9, atol=1e-9)


def test_pairs_follow_a_known_change_of_the_hessian_and_of_the_metric() -> None:
    random = torch.Generator().manual_seed(2)
    hessians = curved(2, 12)
    diagonal, metric = torch.rand(2, 2, 12, generator=random, dtype=torch.float64) + 0.5
    history = History(2, torch.zeros(2, 12, dtype=torch.float64))
    steps = torch.randn(5, 2, 12, generator=random, dtype=torch.float64)
    for step in steps:
        history.push(torch.ones(2, dtype=torch.bool), step, (hessians @ step[:, :, None])[:, :, 0])
    history.add_to_hessian(diagonal)
    history.rescale(metric)
    gradient = torch.randn(2, 12, generator=random, dtype=torch.float64)
    for problem in range(2):
        grown = hessians[problem] + torch.diag(diagonal[problem])
        pairs = [(metric[problem] * step[problem], grown @ step[problem] / metric[problem]) for step in steps]
        expected = two_loops(pairs, gradient[problem])
        torch.testing.assert_close(history.direction(gradient)[problem], expected, rtol=1e-9, atol=1e-9)


def test_a_pair_without_curvature_is_not_taken_and_a_forgotten_one_is_gone() -> None:
    history = History(2, torch.zeros(2, 4, dtype=torch.float64))
    ones = torch.ones(2, 4, dtype=torch.float64)
    history.push(torch.tensor([True, True]), ones, torch.stack([-ones[0], 2 * ones[1]]))
    assert history.is_held.sum(1).tolist() == [0, 1]
    torch.testing.assert_close(history.direction(ones), torch.stack([-ones[0], -ones[1] / 2]))
    history.forget(torch.tensor([False, True]))
    torch.testing.assert_close(history.direction(ones), -ones)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minima_of_quadratics_with_values_of_their_own(dtype: torch.dtype) -> None:
    """1 + (x - c)^T H (x - c) / 2, six problems that end after different numbers of evaluations."""
    hessians, random = curved(6, 20).to(dtype), torch.Generator().manual_seed(3)
    hessians[0] = torch.eye(20, dtype=dtype)
    centres = torch.randn(6, 20, generator=random, dtype=dtype)
    asked: list[int] = []

    def evaluate(points: Tensor, problems: Tensor) -> Evaluation:
        asked.extend(problems.tolist())
        apart = points - centres[problems]
        gradient = (hessians[problems] @ apart[:, :, None])[:, :, 0]
        curvature = hessians[problems].diagonal(dim1=1, dim2=2)
        return Evaluation(1 + torch.linalg.vecdot(apart, gradient).double() / 2, gradient, curvature)

    start = torch.zeros(6, 20, dtype=dtype)
    baseline = torch.full((6,), 1e3, dtype=torch.float64)
    found = minimise(evaluate, start, baseline, 1e-6, 200)
    assert found.converged.all()
    assert (found.value - 1).abs().max() < 1e-5
    assert [asked.count(problem) for problem in range(6)] == found.iterations.tolist()
    assert found.iterations[0] < found.iterations[1:].min()
    again = minimise(evaluate, found.point, baseline, 1e-3, 200, found.history)
    assert again.iterations.tolist() == [1] * 6
    cut = minimise(evaluate, start, baseline, 1e-12, 2)
    assert cut.iterations.tolist() == [2] * 6
    assert not cut.converged.any()


def test_where_little_is_to_be_gained_over_the_baseline_little_may_be_missed() -> None:
    centre = torch.full((1, 3), 1e-3, dtype=torch.float64)

    def evaluate(points: Tensor, _problems: Tensor) -> Evaluation:
        apart = points - centre
        return Evaluation(1 + apart.square().sum(1) / 2, apart, torch.ones_like(apart))

    start = torch.zeros(1, 3, dtype=torch.float64)
    loose, strict = (
        minimise(evaluate, start, torch.tensor([value], dtype=torch.float64), 1e-3, 50)
        for value in (1e3, float(evaluate(start, torch.tensor([0])).value))
    )
    assert torch.equal(loose.point, start)
    torch.testing.assert_close(strict.point, centre)
