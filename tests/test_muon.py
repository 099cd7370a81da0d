"""Muon against its definition by singular values, and against torch's on matrices."""

import math

import pytest
import torch
from torch import Tensor, nn

from stages.models import build_encoder, build_optimiser
from stages.models.muon import ITERATIONS, QUINTIC, Muon, orthogonal

RATES = [0.1, 0.3, 0.2, 0.05]
SHAPES = [(4, 3, 2, 2), (5, 4), (3, 7), (6,)]


def by_singular_values(matrix: Tensor) -> Tensor:
    """The iteration is a polynomial of the singular values, which no product of matrices has to be computed for."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    for _ in range(ITERATIONS):
        values = QUINTIC[0] * values + QUINTIC[1] * values**3 + QUINTIC[2] * values**5
    return left @ values.diag() @ right * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (9, 5), (1, 6), (6, 1)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    [found] = orthogonal([matrix])
    assert torch.allclose(found, by_singular_values(matrix), atol=1e-10)
    values = torch.linalg.svdvals(found) / math.sqrt(max(1, shape[0] / shape[1]))
    assert (values > 0.3).all()
    assert (values < 1.25).all()


@pytest.mark.parametrize("smallest_exponent", [0, -2, -4, -7])
@pytest.mark.parametrize("shape", [(16, 27), (64, 576), (128, 64)])
def test_single_precision_is_enough_where_singular_values_are_far_apart(
    shape: tuple[int, int], smallest_exponent: int
) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    matrix = left @ torch.logspace(0, smallest_exponent, min(shape), dtype=torch.float64).diag() @ right
    expected = by_singular_values(matrix)
    assert (orthogonal([matrix.float()])[0] - expected).norm() < 1e-3 * expected.norm()


def test_matrices_of_one_side_are_worked_on_together_and_each_is_as_alone() -> None:
    shapes = [(4, 9), (3, 8), (7, 4), (4, 4), (4, 30), (8, 3)]
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for matrix, found in zip(matrices, orthogonal(matrices), strict=True):
        assert found.shape == matrix.shape
        assert torch.allclose(found, by_singular_values(matrix), atol=1e-10)


def test_a_matrix_of_zeros_does_not_move() -> None:
    assert orthogonal([torch.zeros(3, 5)])[0].eq(0).all()


def gradients_at(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_its_definition_written_as_a_loop(decay: float) -> None:
    parameters = [nn.Parameter(value) for value in gradients_at(-1)]
    groups = [
        {"params": parameters[:3], "weight_decay": decay},
        {"params": parameters[3:], "weight_decay": 0.0, "orthogonal": False},
    ]
    optimiser = Muon(groups, lr=1.0, momentum=0.9, weight_decay=decay)
    expected = [parameter.detach().clone() for parameter in parameters]
    velocities = [torch.zeros_like(value) for value in expected]
    for step, rate in enumerate(RATES):
        for group in optimiser.param_groups:
            group["lr"] = rate
        for index, gradient in enumerate(gradients_at(step)):
            parameters[index].grad = gradient.clone()
            velocities[index] = 0.9 * velocities[index] + gradient
            move = gradient + 0.9 * velocities[index]
            if index < 3:
                move = by_singular_values(move.reshape(len(move), -1)).view_as(move)
                expected[index] = expected[index] * (1 - rate * decay)
            expected[index] = expected[index] - rate * move
        optimiser.step()
    for parameter, value in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.detach(), value, atol=1e-9)


def test_it_moves_matrices_as_torch_does_but_for_its_bfloat16() -> None:
    ours, theirs = (nn.Parameter(torch.eye(6, 4)) for _ in range(2))
    muon = Muon([{"params": [ours]}], lr=0.1, momentum=0.95, weight_decay=0.0)
    of_torch = torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.0, nesterov=True)
    for step in range(4):
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        of_torch.step()
    assert torch.allclose(ours, theirs, atol=0.02)
    assert not torch.allclose(ours, torch.eye(6, 4), atol=0.1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_encoder_learns_with_it_whatever_its_memory_format(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet10", 8, 64, False, 16).to(memory_format=memory_format)  # 4: see choose_memory_format
    optimiser = build_optimiser("muon", [([encoder], 1.0)], 0.05, 0.9, 1e-4)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(5):
        loss = (encoder(images) - 1).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
    assert [group["orthogonal"] for group in optimiser.param_groups] == [True, False]
