"""Exact nearest neighbours against the whole matrix, and their votes against a loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.evaluation import classify, nearest, neighbours
from stages.evaluation.neighbours import Neighbours


def by_sorting(queries, gallery, k):
    """The definition: all similarities in float64, sorted by similarity, then by index."""
    similarity = (
        torch.nn.functional.normalize(queries.double(), dim=1)
        @ torch.nn.functional.normalize(gallery.double(), dim=1).T
    )
    ordered = similarity.sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


@pytest.fixture(params=[(512, 32768), (3, 7)], ids=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(neighbours, "TILE_QUERIES", request.param[0])
    monkeypatch.setattr(neighbours, "TILE_GALLERY", request.param[1])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("k", [1, 5, 20, 100])
def test_equal_to_sorting_everything(k):
    random = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(13, 6, generator=random), torch.randn(45, 6, generator=random)
    found = nearest(queries, gallery, k)
    similarity, index = by_sorting(queries, gallery, k)
    assert found.index.shape == (13, min(k, 45))
    torch.testing.assert_close(found.similarity.double(), similarity, rtol=0, atol=1e-6)
    assert torch.equal(found.index, index)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("k", [1, 4, 10])
def test_of_equals_the_smaller_index_comes_first(k):
    """Axis vectors: similarities are exactly 0 or 1, nearly all tied, within and across tiles."""
    gallery = torch.eye(3).repeat(9, 1)
    found = nearest(torch.eye(3)[:2], gallery, k)
    assert torch.equal(found.index, by_sorting(torch.eye(3)[:2], gallery, k)[1])


@pytest.mark.usefixtures("tiles")
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 35), st.integers(0, 10**6))
def test_any_shape_with_many_ties(queries, gallery, k, seed):
    """Points of a small lattice, scaled to 3-4-5 directions, so that equal directions are equal to the last bit."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    rows, columns = (directions[torch.randint(5, (count,), generator=random)] for count in (queries, gallery))
    found = nearest(rows, columns, k)
    similarity, index = by_sorting(rows, columns, k)
    assert torch.equal(found.index, index)
    assert torch.equal(found.similarity.double(), similarity)


@pytest.mark.usefixtures("tiles")
def test_what_is_equal_when_rounded_is_in_order_of_its_index():
    """Later rows are nearer, by less than the last decimal that counts."""
    gallery = torch.stack([torch.tensor([1.0, 1e-4 * (1 - row / 20)]).double() for row in range(20)])
    query = torch.tensor([[1.0, 0.0]]).double()
    assert nearest(query, gallery, 3).index.tolist() == [[19, 18, 17]]
    found = nearest(query, gallery, 3, decimals=6)
    assert found.index.tolist() == [[0, 1, 2]]
    assert found.similarity.tolist() == [[1.0, 1.0, 1.0]]


def test_length_does_not_matter_and_zero_is_similar_to_nothing():
    queries, gallery = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[6.0, 8.0], [-300.0, -400.0], [0.0, 0.0]])
    found = nearest(queries, gallery, 3)
    torch.testing.assert_close(found.similarity, torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]))
    assert found.index.tolist() == [[0, 2, 1], [0, 1, 2]]


def test_no_queries():
    assert nearest(torch.zeros(0, 4), torch.ones(3, 4), 2).index.shape == (0, 2)


@pytest.mark.parametrize(
    ("queries", "gallery", "k"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), 1),
        (torch.zeros(2, 3), torch.zeros(0, 3), 1),
        (torch.zeros(2, 3),) * 2 + (0,),
    ],
)
def test_refuses_what_has_no_neighbours(queries, gallery, k):
    with pytest.raises(ValueError, match="nearest"):
        nearest(queries, gallery, k)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_votes_equal_a_loop(temperature):
    random = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(60, 4, generator=random), torch.randn(25, 4, generator=random)
    labels = torch.randint(5, (60,), generator=random)
    found = nearest(queries, gallery, 20)
    for k in (1, 7, 20):
        expected = []
        for row in range(25):
            votes = [0.0] * 5
            for place in range(k):
                votes[int(labels[found.index[row, place]])] += math.exp(found.similarity[row, place] / temperature)
            expected.append(votes.index(max(votes)))
        assert classify(found, labels, k, 5, temperature).tolist() == expected


def test_small_temperatures_do_not_overflow():
    found = Neighbours(torch.tensor([[1.0, 0.9, 0.9]]), torch.tensor([[0, 1, 2]]))
    assert classify(found, torch.tensor([1, 0, 0]), 3, 2, temperature=1e-4).tolist() == [1]
    assert classify(found, torch.tensor([1, 0, 0]), 3, 2, temperature=1.0).tolist() == [0]


def test_equal_votes_give_the_smaller_class():
    found = Neighbours(torch.tensor([[0.5, 0.5]]), torch.tensor([[0, 1]]))
    assert classify(found, torch.tensor([3, 2]), 2, 4).tolist() == [2]
