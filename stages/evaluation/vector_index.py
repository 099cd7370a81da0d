"""An index of unit vectors: it finds nearest neighbours without looking at all of them, and is held against a search
that does.

How hard it looks is chosen by recall, on rows of the gallery itself; what it finds of real queries is measured on them.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.evaluation.neighbours import Neighbours, nearest

try:
    import faiss as installed
except ImportError:  # an extra
    installed = None

faiss: Any = installed
"""None without the extra. Its classes take attributes by assignment, which its types do not know of."""

Kind = Literal["hnsw", "ivf"]

LINKS = 32
"""hnsw: neighbours that a vector is linked to, twice as many in the lowest layer (M: Malkov and Yashunin 2020)."""
BUILD_EFFORT = 40
"""hnsw: candidates that these are chosen from (efConstruction there)."""
LISTS_PER_ROOT = 4
"""ivf: lists by the square root of the vectors."""
VECTORS_PER_LIST = (39, 64)
"""ivf: least, which faiss wants of k-means, and as many as its centroids are made of at most."""
ROUNDS = 10
"""ivf: of k-means."""
FIRST_EFFORT = {"hnsw": 16, "ivf": 1}
LARGEST_EFFORT = 1024

SHORT_LIST = 10
"""Neighbours that the effort is chosen for, and that recall is measured of."""
WANTED_RECALL = 0.95
TRIALS = 200
"""Gallery rows that the effort is chosen on."""
MEASURED = 1000
"""Queries that recall and speed are measured on, at most."""
TURNS = 3
"""How often each is timed."""
ROUNDING = 1e-6
"""By which similarities differ that were summed in another order."""


class NoIndexLibrary(ValueError):
    """An index was asked for where its library is not installed."""

    exit_code = 2


class Speed(NamedTuple):
    """Seconds a query, medians of turns taken one after another."""

    exact: float
    index: float


@dataclass(frozen=True)
class VectorIndex:
    """faiss's index, and the vectors that it is of.

    Attributes:
        library: IndexHNSWFlat or IndexIVFFlat, by inner product.
        vectors: float32 [G, D], of length 1 (or 0), in the order of the index's rows.
        effort: where ten neighbours are asked for: candidates kept on the way (efSearch), or lists looked at (nprobe).
    """

    kind: Kind
    library: Any
    vectors: Tensor
    effort: int

    @property
    def largest_effort(self) -> int:
        return LARGEST_EFFORT if self.kind == "hnsw" else min(LARGEST_EFFORT, self.library.nlist)

    @property
    def parameters(self) -> dict[str, int]:
        """By the names that faiss has for them: what another program needs to build it from the vectors."""
        if self.kind == "hnsw":
            return {"M": LINKS, "efConstruction": self.library.hnsw.efConstruction, "efSearch": self.effort}
        return {"nlist": self.library.nlist, "nprobe": self.effort}

    def nearest(self, queries: Tensor, k: int) -> Neighbours:
        """About the k nearest by cosine similarity of queries [Q, D] of any length, best first; k is capped at G.

        More than ten are looked for harder, in proportion. A query that the index finds fewer than k rows for is
        searched for exactly.

        Raises:
            ValueError: dimensions that differ, or k below 1.
        """
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1] or k < 1:
            raise ValueError(f"no {k} nearest of {[*queries.shape]} in {[*self.vectors.shape]}")
        k = min(k, len(self.vectors))
        self._look(min(self.largest_effort, math.ceil(self.effort * max(1, k / (SHORT_LIST + 1)))))
        turned = torch.nn.functional.normalize(queries.float(), dim=1)
        similarity, rows = self.library.search(turned.numpy(), k)
        order = np.lexsort((rows, -similarity), axis=1)  # the smaller row first among equals
        found = Neighbours(
            torch.from_numpy(np.take_along_axis(similarity, order, axis=1)),
            torch.from_numpy(np.take_along_axis(rows, order, axis=1)),
        )
        lacking = (found.index < 0).any(dim=1)
        if lacking.any():
            exact = nearest(turned[lacking], self.vectors, k)
            found.similarity[lacking], found.index[lacking] = exact
        return found

    def with_effort(self, effort: int) -> "VectorIndex":
        """The same, looking harder or less hard; written to disk it keeps that."""
        self._look(effort)
        return replace(self, effort=effort)

    def _look(self, effort: int) -> None:
        if self.kind == "hnsw":
            self.library.hnsw.efSearch = effort
        else:
            self.library.nprobe = effort


def require_library() -> None:
    """Raises NoIndexLibrary where faiss is not installed."""
    if faiss is None:
        raise NoIndexLibrary("an index needs the package faiss-cpu: pip install 'simclr-pipeline[index]'")


def build_index(kind: Kind, gallery: Tensor, seed: int) -> VectorIndex:
    """Index a gallery [G, D] of any length; equal vectors give equal bytes, since one thread builds.

    Of efforts that double, the first is taken that finds 95% of the ten nearest of some gallery rows (drawn by the
    seed, each left out of its own search), or the largest.

    Raises:
        NoIndexLibrary: faiss is not installed.
    """
    require_library()
    vectors = torch.nn.functional.normalize(gallery.float(), dim=1)
    with _threads(1):  # links may depend on which of several threads comes first
        library = _graph(vectors) if kind == "hnsw" else _lists(vectors)
    index = VectorIndex(kind, library, vectors, FIRST_EFFORT[kind])
    rows = draw(len(vectors), TRIALS, seed)
    exact = _exact(index, vectors[rows], rows)
    while recall_at(_approximate(index, vectors[rows], rows), exact, SHORT_LIST) < WANTED_RECALL:
        if index.effort >= index.largest_effort:
            break
        index = index.with_effort(min(2 * index.effort, index.largest_effort))
    return index.with_effort(index.effort)


def measure_recall(index: VectorIndex, queries: Tensor, same: Tensor) -> dict[str, float]:
    """Of the nearest gallery row and of the ten nearest of queries [Q, D]: the share that the index finds.

    Args:
        same: int64 [Q], the gallery row that is the query itself, which does not count; -1: there is none.
    """
    exact, found = (search(index, queries, same) for search in (_exact, _approximate))
    return {str(k): recall_at(found, exact, k) for k in (1, SHORT_LIST)}


def measure_speed(index: VectorIndex, queries: Tensor) -> Speed:
    """Both ways for the ten nearest of all queries at once, on as many threads as torch has."""
    ways: tuple[Callable[[], Neighbours], ...] = (
        lambda: nearest(queries, index.vectors, SHORT_LIST),
        lambda: index.nearest(queries, SHORT_LIST),
    )
    taken: list[list[float]] = [[], []]
    with _threads(torch.get_num_threads()):
        for _ in range(TURNS):
            for way, seconds in zip(ways, taken, strict=True):
                before = time.perf_counter()
                way()
                seconds.append(time.perf_counter() - before)
    return Speed(*(median(seconds) / len(queries) for seconds in taken))


def recall_at(found: Neighbours, exact: Neighbours, k: int) -> float:
    """Share of the k nearest that were found, over all queries; those as near as the k-th count, whichever they are.

    (Aumueller et al. 2020, ANN-Benchmarks, section 3: recall by distance, so that equals are no misses.)

    Args:
        found, exact: at least k of each query, or all that there are.
    """
    farthest = exact.similarity[:, :k][:, -1:]
    return float((found.similarity[:, :k] >= farthest - ROUNDING).double().mean())


def draw(count: int, most: int, seed: int) -> Tensor:
    """int64, at most `most` of range(count), ascending; all of it where it is no more."""
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(count)[:most]
    return torch.from_numpy(np.sort(chosen))


def _graph(vectors: Tensor) -> Any:
    library = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    library.hnsw.efConstruction = BUILD_EFFORT
    library.add(vectors.numpy())
    return library


def _lists(vectors: Tensor) -> Any:
    count, (least, most) = len(vectors), VECTORS_PER_LIST
    lists = max(1, min(int(LISTS_PER_ROOT * math.sqrt(count)), count // least))
    library = faiss.index_factory(vectors.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    library.cp.niter, library.cp.max_points_per_centroid, library.cp.spherical = ROUNDS, most, True
    library.cp.min_points_per_centroid = min(least, count)
    library.train(vectors.numpy())
    library.add(vectors.numpy())
    return library


def _exact(index: VectorIndex, queries: Tensor, same: Tensor) -> Neighbours:
    return _without(nearest(queries, index.vectors, SHORT_LIST + 1), same)


def _approximate(index: VectorIndex, queries: Tensor, same: Tensor) -> Neighbours:
    return _without(index.nearest(queries, SHORT_LIST + 1), same)


def _without(found: Neighbours, same: Tensor) -> Neighbours:
    """One fewer of each query: not itself, or not the last."""
    kept = found.index != same[:, None]
    kept[kept.all(dim=1), -1] = False
    return Neighbours(*(part[kept].reshape(len(kept), -1) for part in found))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Of faiss, and of torch where both have found the same OpenMP runtime."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
