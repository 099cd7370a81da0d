"""Sums over classes part by part, against plain logsumexp in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.losses.prototype_softmax import CLASSES_AT_ONCE, LARGEST_DIRECT_SCALE, Sums, sums_over_classes

SCALES = [1.0, 30.0, 39.9, 40.1, 64.0, 200.0]


@pytest.fixture(autouse=True)
def _few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.losses.prototype_softmax.CLASSES_AT_ONCE", 8)


def make(rows: int, classes: int, dimension: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, prototypes of other lengths, labels; float64."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = 3 * torch.randn(rows, dimension, dtype=torch.float64, generator=generator)
    weight = 0.2 * torch.randn(classes, dimension, dtype=torch.float64, generator=generator)
    return embeddings, weight, torch.randint(classes, (rows,), generator=generator)


def plain(embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Sums:
    """A row after the other, a class after the other."""
    others, own, nearest = [], [], []
    for row, label in zip(embeddings, labels.tolist(), strict=True):
        cosines = [row @ w / (row.norm() * w.norm()) for w in weight]
        rest = [cosine for k, cosine in enumerate(cosines) if k != label]
        others.append(torch.stack([scale * cosine for cosine in rest]).logsumexp(dim=0))
        own.append(cosines[label])
        nearest.append(torch.stack(rest).max())
    return Sums(torch.stack(others), torch.stack(own), torch.stack(nearest))


def with_gradients(
    function: object, embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float
) -> tuple[Sums, tuple[Tensor, ...]]:
    assert callable(function)
    inputs = embeddings.clone().requires_grad_(), weight.clone().requires_grad_()
    found = function(*inputs, labels, scale)
    factors = torch.linspace(-1, 2, len(labels), dtype=embeddings.dtype)
    total = (factors * found.others).sum() + (factors.flip(0) * found.own).sum() * scale
    return found, torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("classes", [2, 7, 8, 9, 16, 37])
@pytest.mark.parametrize("scale", SCALES)
def test_they_are_those_of_plain_logsumexp(classes: int, scale: float) -> None:
    case = make(11, classes, 5)
    found, gradients = with_gradients(sums_over_classes, *case, scale)
    wanted, wanted_gradients = with_gradients(plain, *case, scale)
    for one, other in zip((*found, *gradients), (*wanted, *wanted_gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    assert not found.nearest.requires_grad


def test_the_size_of_the_parts_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(20, 300, 6)
    for scale in (16.0, 64.0):
        wanted, wanted_gradients = with_gradients(sums_over_classes, *case, scale)
        for size in (1, 299, 300, CLASSES_AT_ONCE):
            monkeypatch.setattr("stages.losses.prototype_softmax.CLASSES_AT_ONCE", size)
            found, gradients = with_gradients(sums_over_classes, *case, scale)
            for one, other in zip((*found, *gradients), (*wanted, *wanted_gradients), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_in_single_precision_nothing_overflows_or_vanishes(scale: float) -> None:
    """The worst there can be: all others opposite, all at the row, or one of them at it."""
    dimension, classes = 4, 50
    row = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    noise = make(8, classes, dimension)[1]
    for directions in (-row + 0.01 * noise, row + 0.01 * noise, -row * torch.linspace(-1, 1, classes)[:, None] + noise):
        case = (row + 0.1 * make(8, 1, dimension)[0], directions, torch.arange(8) * 6)
        wanted, wanted_gradients = with_gradients(sums_over_classes, *case, scale)
        halves = (case[0].float(), case[1].float(), case[2])
        found, gradients = with_gradients(sums_over_classes, *halves, scale)
        for one, other in zip((*found, *gradients), (*wanted, *wanted_gradients), strict=True):
            assert one.dtype == torch.float32
            assert one.isfinite().all()
            # A cosine is known to 1e-7 or so, and a logit to `scale` times that.
            bound = 4e-6 * max(1.0, scale) * max(1.0, other.abs().max().item())
            assert (one.double() - other).abs().max() < bound
        assert (gradients[1].norm() > 0) == (wanted_gradients[1].norm() > 0)


@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0])
def test_derivatives_are_those_of_the_values(scale: float) -> None:
    embeddings, weight, labels = make(5, 19, 3)

    def differentiable(embeddings: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        found = sums_over_classes(embeddings, weight, labels, scale)
        return found.others, found.own

    assert torch.autograd.gradcheck(differentiable, (embeddings.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("scale", [16.0, 64.0])
def test_a_single_class_has_no_others(scale: float) -> None:
    embeddings, weight, labels = make(6, 1, 3)
    embeddings, weight = embeddings.requires_grad_(), weight.requires_grad_()
    found = sums_over_classes(embeddings, weight, labels, scale)
    assert (found.others == -math.inf).all()
    assert (found.nearest == -math.inf).all()
    torch.testing.assert_close(found.own, F.cosine_similarity(embeddings, weight))
    loss = F.softplus(found.others - scale * found.own).sum()
    loss.backward()
    assert loss == 0
    for one in (embeddings, weight):
        assert one.grad is not None
        assert not one.grad.any()


@pytest.mark.parametrize("scale", SCALES)
def test_equal_prototypes_share(scale: float) -> None:
    """As many as there may be, all at one place: the sum is their number times one of them."""
    embeddings, weight, labels = make(6, 21, 4)
    weight = weight[:1].repeat(21, 1)
    found, gradients = with_gradients(sums_over_classes, embeddings, weight, labels, scale)
    cosines = F.cosine_similarity(embeddings, weight[0])
    torch.testing.assert_close(found.others, scale * cosines + math.log(20))
    torch.testing.assert_close(found.own, cosines)
    torch.testing.assert_close(found.nearest, cosines)
    wanted, wanted_gradients = with_gradients(plain, embeddings, weight, labels, scale)
    for one, other in zip((*found, *gradients), (*wanted, *wanted_gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_lengths_do_not_matter_and_of_zeros_nothing_is_infinite() -> None:
    embeddings, weight, labels = make(6, 21, 4)
    lengths = torch.logspace(-6, 6, 21, dtype=torch.float64)[:, None]
    for one, other in zip(
        sums_over_classes(1e4 * embeddings, lengths * weight, labels, 20.0),
        sums_over_classes(embeddings, weight, labels, 20.0),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    embeddings[0], weight[labels[1]] = 0, 0
    found, gradients = with_gradients(sums_over_classes, embeddings, weight, labels, 20.0)
    assert all(one.isfinite().all() for one in (*found, *gradients))
    assert found.own[0] == 0
    torch.testing.assert_close(found.others[0], torch.tensor(math.log(20), dtype=torch.float64))


def test_exponentials_of_direct_sums_do_not_vanish() -> None:
    smallest = torch.tensor(-2 * LARGEST_DIRECT_SCALE).exp()
    assert smallest > torch.finfo(torch.float32).tiny
