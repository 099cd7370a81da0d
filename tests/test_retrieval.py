"""Ranks, precision and average precision against plain loops, and against scikit-learn where it has them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor

from stages.evaluation import nearest, rank_gallery, similarity
from stages.evaluation.similarity import NEVER, order_keys, payload_of, similarity_of

DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]])


@pytest.fixture(params=[2**20, 100, 1], ids=["one tile", "many tiles", "a query each"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "TILE_PAIRS", request.param)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = sum(x * x for x in one) ** 0.5 * sum(x * x for x in other) ** 0.5
    return sum(x * y for x, y in zip(one, other, strict=True)) / lengths if lengths else 0.0


def by_loops(
    queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor, same: Tensor
) -> list[dict[str, float | list[int]]]:
    """Every figure of every query, from its definition."""
    found = []
    for query, label, itself in zip(queries.tolist(), query_labels.tolist(), same.tolist(), strict=True):
        rows = [row for row in range(len(gallery)) if row != itself]
        rows.sort(key=lambda row: (-cosine(query, gallery[row].tolist()), row))
        relevant = [label >= 0 and int(gallery_labels[row]) == label for row in rows]
        total = sum(relevant)
        first = relevant.index(True) + 1 if total else 0

        def precision(rank: int, relevant: list[bool] = relevant) -> float:
            return sum(relevant[:rank]) / rank

        at_r = [precision(rank) for rank in range(1, total + 1) if relevant[rank - 1]]
        at_5 = [precision(rank) for rank in range(1, min(5, len(rows)) + 1) if relevant[rank - 1]]
        found.append(
            {
                "relevant": total,
                "first": first,
                "r_precision": precision(total) if total else 0.0,
                "average_precision_at_r": sum(at_r) / total if total else 0.0,
                "average_precision_at_5": sum(at_5) / min(total, 5) if total else 0.0,
                "reciprocal_rank": 1 / first if first else 0.0,
                "neighbours": rows,
            }
        )
    return found


def check(queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor, same: Tensor) -> None:
    ranking = rank_gallery(queries, gallery, query_labels, gallery_labels, same, neighbours=7)
    expected = by_loops(queries, gallery, query_labels, gallery_labels, same)
    for name in ("relevant", "first", "r_precision", "average_precision_at_r", "average_precision_at_5"):
        np.testing.assert_allclose(getattr(ranking, name), [one[name] for one in expected], atol=1e-12, err_msg=name)
    np.testing.assert_allclose(ranking.reciprocal_rank, [one["reciprocal_rank"] for one in expected])
    for k in (1, 5, 10, 1000):
        hits = [0 < one["first"] <= k for one in expected]  # type: ignore[operator]
        assert ranking.hits(k).tolist() == hits
    kept = min(7, len(gallery) - bool((same >= 0).any()))
    assert ranking.neighbours.index.tolist() == [one["neighbours"][:kept] for one in expected]  # type: ignore[index]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("classes", [1, 2, 5, 30])
def test_queries_against_a_gallery(classes: int) -> None:
    """With 30 classes some queries have nothing to find, and some rows of both sides are of unknown class."""
    random = torch.Generator().manual_seed(classes)
    queries, gallery = torch.randn(23, 4, generator=random), torch.randn(41, 4, generator=random)
    query_labels = torch.randint(-1, classes, (23,), generator=random)
    gallery_labels = torch.randint(-1, classes, (41,), generator=random)
    check(queries, gallery, query_labels, gallery_labels, torch.full((23,), -1))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("classes", [1, 3, 12])
def test_a_set_against_itself_leaves_the_query_out(classes: int) -> None:
    random = torch.Generator().manual_seed(classes)
    rows = torch.randn(30, 5, generator=random)
    labels = torch.randint(classes, (30,), generator=random)
    check(rows, rows, labels, labels, torch.arange(30))


@pytest.mark.usefixtures("tiles")
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 25), st.integers(1, 4), st.integers(0, 10**6))
def test_among_equals_the_smaller_row_comes_first(queries: int, gallery: int, classes: int, seed: int) -> None:
    """Axes and zeros: similarities are exactly -1, 0 or 1, nearly all tied; some queries are rows of the gallery."""
    random = torch.Generator().manual_seed(seed)
    rows = DIRECTIONS[torch.randint(5, (gallery,), generator=random)]
    labels = torch.randint(-1, classes, (gallery,), generator=random)
    same = torch.randint(-1, gallery, (queries,), generator=random)
    other = DIRECTIONS[torch.randint(5, (queries,), generator=random)]
    others = torch.randint(-1, classes, (queries,), generator=random)
    queried, wanted = torch.where(same[:, None] >= 0, rows[same], other), torch.where(same >= 0, labels[same], others)
    check(queried, rows, wanted, labels, same)


def test_neighbours_are_those_of_nearest() -> None:
    random = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(20, 8, generator=random), torch.randn(300, 8, generator=random)
    labels = torch.randint(3, (300,), generator=random)
    found = rank_gallery(queries, gallery, labels[:20], labels, neighbours=12).neighbours
    expected = nearest(queries, gallery, 12)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.similarity, expected.similarity)


def test_precision_at_r_is_that_of_scikit_learn_on_the_first_r() -> None:
    """MAP@R leaves out of the average precision what lies behind rank R."""
    random = torch.Generator().manual_seed(3)
    queries, gallery = torch.randn(9, 3, generator=random), torch.randn(25, 3, generator=random)
    labels = torch.randint(2, (25,), generator=random)
    ranking = rank_gallery(queries, gallery, torch.ones(9, dtype=torch.int64), labels)
    scores = (torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(gallery).T).numpy()
    for row in range(9):
        order = np.argsort(-scores[row])[: int((labels == 1).sum())]
        truth = labels.numpy()[order] == 1
        assert ranking.r_precision[row] == pytest.approx(truth.mean())
        within = average_precision_score(truth, scores[row][order]) * truth.sum() / len(truth)
        assert ranking.average_precision_at_r[row] == pytest.approx(within)


def test_no_queries_and_no_relevant_rows() -> None:
    empty = rank_gallery(torch.zeros(0, 2), torch.ones(3, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(3).long())
    assert len(empty.relevant) == len(empty.neighbours.index) == 0
    alone = rank_gallery(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([4]), torch.tensor([0, 1, -1]))
    assert not alone.has_relevant.any()
    assert not alone.hits(3).any()
    assert alone.reciprocal_rank.tolist() == [0.0]
    assert alone.neighbours.index.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("queries", "gallery"), [((2, 3), (2, 4)), ((2, 3), (0, 3))])
def test_refuses_what_has_no_similarity(queries: tuple[int, int], gallery: tuple[int, int]) -> None:
    labels = torch.zeros(queries[0]).long(), torch.zeros(gallery[0]).long()
    with pytest.raises(ValueError, match="no similarities"):
        rank_gallery(torch.zeros(queries), torch.zeros(gallery), *labels)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.usefixtures("three_threads")
def test_torch_has_one_thread_in_each_that_works_and_its_own_number_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "TILE_PAIRS", 1)
    rows, meet = torch.randn(12, 4), Barrier(3)

    def work(rows: slice, tile: np.ndarray) -> tuple[int, int]:
        meet.wait(timeout=60)  # passed by three that work at once
        return get_ident(), torch.get_num_threads()

    workers, inside = zip(*similarity.over_tiles(rows, rows, work), strict=True)
    assert (len(set(workers)), set(inside)) == (3, {1})
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (3, 3)

    def fail(rows: slice, tile: np.ndarray) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        next(similarity.over_tiles(rows, rows, fail))
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (3, 3)


def test_keys_order_as_similarity_falls_and_payload_rises() -> None:
    values = [1.0, 0.5, 0.5, 1e-38, 0.0, -0.0, -1e-38, -0.5, -1.0, float(np.nextafter(np.float32(1), np.float32(0)))]
    numbers = np.array([values], dtype=np.float32)
    keys = order_keys(numbers, np.arange(10)[::-1].copy())
    expected = sorted(range(10), key=lambda place: (-numbers[0, place], 9 - place))
    assert np.argsort(keys[0]).tolist() == expected
    assert payload_of(keys)[0].tolist() == [*range(9, -1, -1)]
    assert similarity_of(keys).tolist() == numbers.tolist()
    assert keys.max() < NEVER
    assert similarity_of(np.array([NEVER])) == -np.inf
