"""Measures of health against slow references and against values known beforehand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.evaluation.representation import (
    DimensionCounts,
    alignment,
    count_dimensions,
    rankme,
    singular_spectrum,
    uniformity,
)


def make_features(rows: int = 30, dimension: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed))


def unit(row: Tensor) -> list[float]:
    length = math.sqrt(sum(float(value) ** 2 for value in row))
    return [float(value) / length for value in row]


def squared_distance(one: Tensor, other: Tensor) -> float:
    return sum((a - b) ** 2 for a, b in zip(unit(one), unit(other), strict=True))


def test_rankme_is_that_of_the_definition() -> None:
    features = make_features() * torch.tensor([1.0, 2.0, 0.5, 0.1, 0.01, 3.0])
    eigenvalues = np.linalg.eigvalsh(features.double().T.numpy() @ features.double().numpy())
    values = [math.sqrt(value) for value in eigenvalues]
    shares = [value / sum(values) + 1e-7 for value in values]
    assert rankme(features) == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)), rel=1e-9)


def test_rankme_at_its_ends() -> None:
    assert rankme(torch.eye(8).repeat(10, 1)) == pytest.approx(8, rel=1e-4)
    line = torch.linspace(-1, 1, 50)[:, None] * torch.ones(1, 8)
    assert rankme(line) == pytest.approx(1, rel=1e-4)
    assert rankme(torch.zeros(20, 4)) == 1.0
    two_of_eight = torch.cat([torch.eye(2).repeat(10, 1), torch.zeros(20, 6)], dim=1)
    assert rankme(two_of_eight) == pytest.approx(2, rel=1e-4)


def test_rankme_does_not_change_with_scale_or_rotation() -> None:
    features = make_features()
    rotation = torch.linalg.qr(make_features(6, 6, seed=1)).Q
    assert rankme(1000 * features @ rotation) == pytest.approx(rankme(features), rel=1e-5)


def test_spectrum_of_a_known_matrix() -> None:
    spectrum = singular_spectrum(torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]]))
    assert spectrum.dtype == torch.float64
    assert spectrum.tolist() == pytest.approx([4.0, 3.0])


def test_alignment_is_that_of_a_loop() -> None:
    view_a, view_b = make_features(seed=1), make_features(seed=2)
    wanted = sum(squared_distance(one, other) for one, other in zip(view_a, view_b, strict=True)) / len(view_a)
    assert alignment(view_a, view_b) == pytest.approx(wanted, rel=1e-5)
    assert alignment(view_a, 3 * view_a) == pytest.approx(0, abs=1e-6)
    assert alignment(view_a, -view_a) == pytest.approx(4, rel=1e-6)


def test_uniformity_is_that_of_a_loop() -> None:
    features = make_features()
    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    mean = sum(math.exp(-2 * squared_distance(features[i], features[j])) for i, j in pairs) / len(pairs)
    assert uniformity(features, largest_rows=20) == pytest.approx(math.log(mean), rel=1e-5)
    assert uniformity(features, largest_rows=20) != pytest.approx(uniformity(features), rel=1e-5)


def test_uniformity_at_its_ends() -> None:
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-5)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)
    assert uniformity(make_features(1000, 128)) == pytest.approx(-4 + math.log(math.exp(8 / 128)), abs=0.01)


def test_no_gradient_is_kept() -> None:
    features = make_features().requires_grad_()
    assert isinstance(alignment(features, features), float)
    assert not singular_spectrum(features).requires_grad


def test_dimensions_that_say_nothing() -> None:
    features = make_features(dimension=8)
    features[:, 1] = 0
    features[:, 2] = -0.0
    features[:, 4] = -3.7
    features[:, 5] = 1e-12 * features[:, 0]  # small, but not constant
    features[:, 6] = 5.0 + 1e-7 * features[:, 0]  # moves by rounding only
    assert count_dimensions(features) == DimensionCounts(total=8, constant=4, dead=2)
    assert count_dimensions(make_features()) == DimensionCounts(total=6, constant=0, dead=0)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not \[0, 4\]"):
        rankme(torch.ones(0, 4))
    with pytest.raises(ValueError, match=r"not \[3\]"):
        count_dimensions(torch.ones(3))
    with pytest.raises(ValueError, match="one shape"):
        alignment(torch.ones(3, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="two rows"):
        uniformity(torch.ones(1, 2))
