"""An index of unit vectors: it finds nearest neighbours without looking at all of them, and is held against a search
that does.

How hard it looks is chosen by recall, and what it finds is measured, on vectors that it does not hold at that time:
what is near one that it holds is found too easily, since the two were linked.
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
"""Gallery rows that the effort is chosen on, at most."""
MEASURED = 1000
"""Queries that recall and speed are measured on, at most."""
KEPT_OUT = 0.2
"""Of a small gallery, the largest share for each of these two."""
TURNS = 3
"""How often each is timed."""
ROUNDING = 1e-6
"""By which similarities differ that were summed in another order."""


class NoIndexLibrary(ValueError):
    """An index was asked for where its library is not installed."""

    exit_code = 2


class Built(NamedTuple):
    """An index, and what it finds.

    Attributes:
        rows: int64 [G], rows of the gallery in the order of those of the index.
        recall: see `measure_recall`.
        asked: int64 [q], the queries that recall was measured on.
    """

    index: "VectorIndex"
    rows: Tensor
    recall: dict[str, float]
    asked: Tensor


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
        self._look(min(self.largest_effort, math.ceil(self.effort * max(1, k / SHORT_LIST))))
        turned = torch.nn.functional.normalize(queries.float(), dim=1)
        similarity, rows = self.library.search(turned.numpy(), k)
        order = np.lexsort((rows, -similarity), axis=1)  # the smaller row first among equals
        found = Neighbours(
            torch.from_numpy(np.take_along_axis(similarity, order, axis=1)),
            torch.from_numpy(np.take_along_axis(rows, order, axis=1)),
        )
        lacking = (found.index < 0).any(dim=1)
        if lacking.any():
            found.similarity[lacking], found.index[lacking] = self.exactly(turned[lacking], k)
        return found

    def exactly(self, queries: Tensor, k: int) -> Neighbours:
        """What `nearest` is to find."""
        return nearest(queries, self.vectors, k)

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


def build_index(kind: Kind, gallery: Tensor, queries: Tensor, same: Tensor, seed: int) -> Built:
    """Index a gallery [G, D] of any length; equal input gives an equal index, since one thread builds.

    Some rows are added last: those that the effort is chosen on (of efforts that double the first that finds 95% of
    their ten nearest, or the largest), and then those that are queries which recall is measured on.

    Args:
        queries: [Q, D], of any length; some of them, by the seed, are asked.
        same: int64 [Q], the gallery row that is the query itself; -1: there is none.

    Raises:
        NoIndexLibrary: faiss is not installed.
    """
    require_library()
    kept_out = int(KEPT_OUT * len(gallery))
    most = max(1, kept_out) if (same >= 0).any() else MEASURED
    asked = _draw(torch.arange(len(queries)), min(MEASURED, most), seed)
    own = same[asked][same[asked] >= 0].unique()
    rest = _without(torch.arange(len(gallery)), own)
    trials = _draw(rest, min(TRIALS, kept_out), seed)
    rows = torch.cat([_without(rest, trials), trials, own])
    vectors = torch.nn.functional.normalize(gallery.float(), dim=1)[rows]
    first, second = len(rest) - len(trials), len(rest)
    with _threads(1):  # links may depend on which of several threads comes first
        library = _graph(vectors[:first]) if kind == "hnsw" else _lists(vectors[:first])
    index = _choose_effort(VectorIndex(kind, library, vectors[:first], FIRST_EFFORT[kind]), vectors[first:second])
    index = _with_more(index, vectors[:second])
    recall = measure_recall(index, queries[asked])
    return Built(_with_more(index, vectors), rows, recall, asked)


def measure_recall(index: VectorIndex, queries: Tensor) -> dict[str, float]:
    """By "1" and "10": of as many nearest rows of queries [Q, D], the share that the index finds."""
    exact, found = (one(queries, SHORT_LIST) for one in (index.exactly, index.nearest))
    return {str(k): recall_at(found, exact, k) for k in (1, SHORT_LIST)}


def measure_speed(index: VectorIndex, queries: Tensor) -> Speed:
    """Both ways for the ten nearest of all queries at once, on as many threads as torch has."""
    ways: tuple[Callable[[], Neighbours], ...] = (
        lambda: index.exactly(queries, SHORT_LIST),
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


def _choose_effort(index: VectorIndex, trials: Tensor) -> VectorIndex:
    """With the effort that finds enough of them; without trials the least."""
    while measure_recall(index, trials)[str(SHORT_LIST)] < WANTED_RECALL and index.effort < index.largest_effort:
        index = index.with_effort(min(2 * index.effort, index.largest_effort))
    return index


def _with_more(index: VectorIndex, vectors: Tensor) -> VectorIndex:
    """The index of these vectors, of which it is of the first."""
    with _threads(1):
        index.library.add(vectors[len(index.vectors) :].numpy())
    return replace(index, vectors=vectors)


def _draw(rows: Tensor, most: int, seed: int) -> Tensor:
    """At most that many of rows, in their order; all of them where they are no more."""
    places = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))[:most]
    return rows[np.sort(places)]


def _without(rows: Tensor, others: Tensor) -> Tensor:
    return rows[~torch.isin(rows, others)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Of faiss, and of torch where both have found the same OpenMP runtime."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
