"""The index of vectors against loops and against exact search; its bytes, its effort, and what it does at the edges."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from stages.evaluation import Features, nearest, vector_index
from stages.evaluation.indexed_gallery import UnreadableIndex, read_indexed_gallery, write_indexed_gallery
from stages.evaluation.neighbours import Neighbours
from stages.evaluation.vector_index import (
    WANTED_RECALL,
    Kind,
    NoIndexLibrary,
    VectorIndex,
    build_index,
    measure_recall,
    measure_speed,
    recall_at,
)

KINDS: tuple[Kind, ...] = ("hnsw", "ivf")
DIGITS = torch.from_numpy(np.asarray(load_digits(return_X_y=True)[0])).float()


def random_rows(count: int, dimension: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32))


def features_of(rows: Tensor) -> Features:
    count = len(rows)
    labels = torch.arange(count) % 3 - 1
    keys, splits = np.array([f"{row}.png" for row in range(count)]), np.array(["test"] * count)
    numbers = np.arange(count)
    return Features(rows, labels, numbers, numbers, False, 7 * numbers, keys, splits, ["a", "b"], {})


def build(kind: Kind, gallery: Tensor, queries: Tensor | None = None, seed: int = 0) -> VectorIndex:
    """For queries that are not in the gallery."""
    asked = random_rows(20, gallery.shape[1], seed=9) if queries is None else queries
    return build_index(kind, gallery, asked, torch.full((len(asked),), -1), seed).index


def recall_by_loops(index: VectorIndex, queries: Tensor, k: int) -> float:
    """Of the k with the largest cosines in float64: how many the index returns."""
    gallery, hits = index.vectors.double().numpy(), 0
    for query, rows in zip(queries.double().numpy(), index.nearest(queries, 10).index.tolist(), strict=True):
        cosines = gallery @ query / np.linalg.norm(query)
        hits += len({*np.argsort(-cosines)[:k].tolist()} & {*rows[:k]})
    return hits / k / len(queries)


@pytest.mark.parametrize("kind", KINDS)
def test_recall_on_twenty_thousand_random_vectors(kind: Kind) -> None:
    """The hardest there are: nothing about a vector says where its neighbours are."""
    gallery, queries = random_rows(20_000, 64), random_rows(200, 64, seed=1)
    built = build_index(kind, gallery, queries, torch.full((200,), -1), 0)
    index = built.index
    assert built.asked.tolist() == [*range(200)]
    assert built.rows.sort().values.tolist() == [*range(20_000)]
    assert torch.equal(index.vectors, torch.nn.functional.normalize(gallery, dim=1)[built.rows])
    for k in (1, 10):
        assert built.recall[str(k)] == pytest.approx(recall_by_loops(index, queries, k), abs=1e-9)
    assert built.recall["10"] > WANTED_RECALL - 0.02, "chosen on others of the same kind"
    less = measure_recall(index.with_effort(index.effort // 2), queries)["10"]
    assert less < min(WANTED_RECALL + 0.02, built.recall["10"]), "no harder than is needed"


@pytest.mark.parametrize("kind", KINDS)
def test_recall_is_that_of_queries_from_elsewhere(kind: Kind) -> None:
    """Where queries are of the gallery, they are kept out of the index until recall is measured."""
    gallery = random_rows(5000, 64)
    within = build_index(kind, gallery, gallery, torch.arange(5000), 0)
    assert len(within.asked) == 1000
    assert within.rows[-1000:].tolist() == within.asked.tolist()
    outside = measure_recall(within.index, random_rows(1000, 64, seed=1))
    assert within.recall["10"] == pytest.approx(outside["10"], abs=0.02)
    first = faiss_rows(within.index, 4000)
    assert within.recall == measure_recall(first, gallery[within.asked])


def faiss_rows(index: VectorIndex, count: int) -> VectorIndex:
    """An index built in the same two steps (all but 1,200 rows, then 200) by hand."""
    vectors = index.vectors.numpy()
    library = build_by_faiss(index.kind, vectors[: count - 200], index.parameters)
    library.add(vectors[count - 200 : count])
    return replace(index, library=library, vectors=index.vectors[:count])


@pytest.mark.parametrize("kind", KINDS)
def test_digits_are_found(kind: Kind) -> None:
    rows = torch.arange(0, len(DIGITS), 9)
    built = build_index(kind, DIGITS, DIGITS[rows], rows, 3)
    assert built.recall["1"] > 0.95
    assert built.recall["10"] > 0.93
    found, exact = built.index.nearest(DIGITS[rows], 10), nearest(DIGITS[rows], DIGITS, 10)
    both = built.rows[found.index] == exact.index
    assert both.double().mean() > 0.9
    torch.testing.assert_close(found.similarity[both], exact.similarity[both], atol=1e-6, rtol=0)
    assert (built.rows[found.index[:, 0]] == rows).double().mean() > 0.98, "each finds itself"


def test_equals_are_no_misses() -> None:
    """By hand: the second and third of the gallery are the same vector, and any of them is the second nearest."""
    exact = Neighbours(torch.tensor([[0.9, 0.5], [0.9, 0.5]]), torch.tensor([[0, 1], [0, 1]]))
    found = Neighbours(torch.tensor([[0.9, 0.5], [0.9, 0.4]]), torch.tensor([[0, 2], [0, 3]]))
    assert recall_at(found, exact, 1) == 1
    assert recall_at(found, exact, 2) == 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_equal_vectors_make_equal_bytes(kind: Kind, tmp_path: Path) -> None:
    gallery, written = random_rows(3000, 16), []
    for number, threads in enumerate((1, 2, 2)):
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads)
        try:
            index = build(kind, gallery, seed=5)
            assert faiss.omp_get_max_threads() == threads, "left as it was"
        finally:
            faiss.omp_set_num_threads(before)
        if number == 2:
            index.nearest(gallery[:5], 200)  # looks harder, which is not kept
        folder = tmp_path / str(number)
        folder.mkdir()
        size = write_indexed_gallery(folder, index, features_of(gallery))
        assert size == (folder / "index.faiss").stat().st_size
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1] == written[2]
    assert sorted(written[0]) == ["gallery.parquet", "index.faiss", "vectors.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(kind: Kind, tmp_path: Path) -> None:
    gallery, queries = random_rows(2000, 16), random_rows(50, 16, seed=1)
    index, features = build(kind, gallery), features_of(gallery)
    write_indexed_gallery(tmp_path, index, features)
    found = read_indexed_gallery(tmp_path, {"kind": kind, "parameters": index.parameters})
    for mine, other in zip(found.index.nearest(queries, 7), index.nearest(queries, 7), strict=True):
        assert torch.equal(mine, other)
    assert found.ids.tolist() == features.ids.tolist()
    assert found.keys == features.keys.tolist()
    assert found.splits == ["test"] * 2000
    assert found.labels[:4] == [None, "a", "b", None]


def build_by_faiss(kind: Kind, vectors: NDArray[np.float32], wanted: dict[str, int]) -> Any:
    name = f"HNSW{wanted['M']},Flat" if kind == "hnsw" else f"IVF{wanted['nlist']},Flat"
    index: Any = faiss.index_factory(vectors.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    for parameter in ("efConstruction", "efSearch", "nprobe"):
        if parameter in wanted:
            setattr(index.hnsw if kind == "hnsw" else index, parameter, wanted[parameter])
    index.train(vectors)
    index.add(vectors)
    return index


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_built_again_from_the_vectors_by_faiss_alone(kind: Kind, tmp_path: Path) -> None:
    queries = random_rows(50, 16, seed=1)
    index = build(kind, random_rows(2000, 16))
    write_indexed_gallery(tmp_path, index, features_of(index.vectors))
    vectors, wanted = load_file(tmp_path / "vectors.safetensors")["vectors"], index.parameters
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    again = build_by_faiss(kind, vectors, wanted)
    rows: NDArray[np.int64] = again.search(torch.nn.functional.normalize(queries, dim=1).numpy(), 10)[1]
    overlap = np.mean(
        [len({*one} & {*other}) for one, other in zip(rows, index.nearest(queries, 10).index.tolist(), strict=True)]
    )
    assert overlap > 9


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_asks_for_many_gets_as_many(kind: Kind) -> None:
    """A list is shorter than that, and so is what can be reached among equals: those queries are searched exactly."""
    rows = random_rows(900, 8)
    gallery = torch.cat([rows, rows[:1].repeat(600, 1), torch.zeros(2, 8)])
    index = build(kind, gallery).with_effort(1)
    for k in (400, 1502, 5000):
        found, exact = index.nearest(rows[:20], k), nearest(rows[:20], index.vectors, k)
        assert found.index.shape == (20, min(k, 1502))
        assert found.index.min() >= 0
        assert all(len(set(one)) == len(one) for one in found.index.tolist())
        assert (found.similarity <= exact.similarity + 1e-6).all()
        assert (found.similarity.diff(dim=1) <= 0).all()
    torch.testing.assert_close(found.similarity, exact.similarity, atol=1e-6, rtol=0)


def test_the_smaller_row_is_first_among_equals() -> None:
    index = build("hnsw", random_rows(200, 8).repeat(2, 1))
    found = index.nearest(index.vectors[:100], 2)
    assert found.index.tolist() == nearest(index.vectors[:100], index.vectors, 2, decimals=6).index.tolist()
    assert (found.index[:, 0] < found.index[:, 1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 11, 60])
def test_small_galleries_are_searched_whole(kind: Kind, count: int, capfd: pytest.CaptureFixture[str]) -> None:
    gallery = random_rows(count, 4)
    built = build_index(kind, gallery, gallery, torch.arange(count), 0)
    assert built.rows.sort().values.tolist() == [*range(count)]
    assert len(built.asked) == max(1, count // 5)
    assert built.recall == {"1": 1, "10": 1}
    assert measure_recall(built.index, gallery) == {"1": 1, "10": 1}
    assert capfd.readouterr() == ("", ""), "faiss warns of too few vectors for its lists"


def test_seconds_are_those_of_a_query() -> None:
    index = build("ivf", DIGITS)
    speed = measure_speed(index, DIGITS[:100])
    assert 0 < speed.index < 0.01
    assert 0 < speed.exact < 0.01


def test_what_does_not_fit_is_refused() -> None:
    index = build("ivf", DIGITS)
    with pytest.raises(ValueError, match=r"no 3 nearest of \[2, 5\] in \[1797, 64\]"):
        index.nearest(torch.zeros(2, 5), 3)
    with pytest.raises(ValueError, match="no 0 nearest"):
        index.nearest(DIGITS[:2], 0)


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vector_index, "faiss", None)
    with pytest.raises(NoIndexLibrary, match=r"faiss-cpu: pip install 'simclr-pipeline\[index\]'$") as told:
        build("hnsw", DIGITS)
    assert told.value.exit_code == 2
    with pytest.raises(NoIndexLibrary):
        read_indexed_gallery(tmp_path, {"kind": "hnsw", "parameters": {"efSearch": 16}})


def test_an_index_that_faiss_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "index.faiss").write_bytes(b"from the future" * 20)
    with pytest.raises(UnreadableIndex, match=r"index.faiss: faiss [\d.]+ cannot read it: .*--force") as told:
        read_indexed_gallery(tmp_path, {"kind": "hnsw", "parameters": {"efSearch": 16}})
    assert told.value.exit_code == 4
    assert len(str(told.value).splitlines()) == 1
