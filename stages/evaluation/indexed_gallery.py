"""A gallery with an index on disk: the index, the vectors that it can be built of again, and whose they are."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from stages.evaluation.features import Features
from stages.evaluation.query_sets import QuerySets
from stages.evaluation.vector_index import (
    LARGEST_EFFORT,
    Kind,
    Speed,
    VectorIndex,
    build_index,
    faiss,
    measure_speed,
    require_library,
)
from stages.models.tensor_file import DamagedTensors, read_tensors

INDEX_FILE, VECTORS_FILE, GALLERY_FILE = "index.faiss", "vectors.safetensors", "gallery.parquet"
VECTORS = "vectors"
MARKS: dict[Kind, bytes] = {"hnsw": b"IHNf", "ivf": b"IwFl"}
"""What faiss begins a file with (fourcc in faiss/impl/index_write.cpp), by kind."""


class UnreadableIndex(ValueError):
    """The installed faiss does not know what another version wrote."""

    exit_code = 4


@dataclass(frozen=True)
class IndexedGallery:
    """What `write_indexed_gallery` wrote; everything is in the order of the index's rows.

    Attributes:
        ids: int64 [G].
        keys: path of each image in its source.
        splits: train, val or test.
        labels: name of each image's class, of several `a|b`, or None.
    """

    index: VectorIndex
    ids: NDArray[np.int64]
    keys: list[str]
    splits: list[str]
    labels: list[str | None]


class IndexMade(NamedTuple):
    """An index that was written.

    Attributes:
        card: `index` of metrics.json.
        build_seconds: no function of the inputs, nor is the speed.
    """

    card: dict[str, Any]
    build_seconds: float
    speed: Speed


def make_index(folder: Path, kind: Kind, sets: QuerySets, seed: int) -> IndexMade:
    """Write an index of the gallery, and tell what it finds of the exact search's neighbours, and how much sooner."""
    before = time.perf_counter()
    index, rows, recall, asked = build_index(kind, sets.gallery.features, sets.queries.features, sets.same, seed)
    build_seconds = time.perf_counter() - before
    speed = measure_speed(index, sets.queries.features[asked])
    card = {
        "kind": kind,
        "vectors": len(sets.gallery),
        "dimension": index.vectors.shape[1],
        "parameters": index.parameters,
        "bytes": write_indexed_gallery(folder, index, sets.gallery.select(rows.numpy())),
        "recall": recall,
        "recall_queries": len(asked),
    }
    return IndexMade(card, build_seconds, speed)


def write_indexed_gallery(folder: Path, index: VectorIndex, gallery: Features) -> int:
    """Write three files; equal input gives equal bytes.

    Args:
        gallery: what the index is of.

    Returns:
        Bytes of the index.
    """
    path = folder / INDEX_FILE
    faiss.write_index(index.with_effort(index.effort).library, str(path))
    save_file({VECTORS: index.vectors.contiguous()}, folder / VECTORS_FILE)
    columns = {
        "id": pa.array(gallery.ids, pa.int64()),
        "key": pa.array(gallery.keys.tolist(), pa.string()),
        "split": pa.array(gallery.splits.tolist(), pa.string()),
        "label": pa.array(gallery.names, pa.string()),
    }
    pq.write_table(pa.table(columns), folder / GALLERY_FILE, compression="none")
    return path.stat().st_size


def read_indexed_gallery(folder: Path, card: Mapping[str, Any]) -> IndexedGallery:
    """Read them. faiss trusts what it reads: only for files of the store, after their digests were checked.

    Args:
        folder: the artifact's files.
        card: `index` of its metrics.json.

    Raises:
        NoIndexLibrary: faiss is not installed.
        UnreadableIndex: the installed version cannot read it, or the files do not belong together.
    """
    require_library()
    kind, effort = _kind_and_effort(folder, card)
    library = _read_library(folder / INDEX_FILE, kind)
    vectors = _read_vectors(folder / VECTORS_FILE)
    _check_library(folder / INDEX_FILE, library, vectors)
    ids, keys, splits, labels = _read_rows(folder / GALLERY_FILE, len(vectors))
    return IndexedGallery(VectorIndex(kind, library, vectors, effort), ids, keys, splits, labels)


def _kind_and_effort(folder: Path, card: Mapping[str, Any]) -> tuple[Kind, int]:
    """What metrics.json says of an index."""
    place = f"{folder / 'metrics.json'}: index"
    kind = card.get("kind") if isinstance(card, Mapping) else None
    if kind != "hnsw" and kind != "ivf":
        raise UnreadableIndex(f"{place}.kind: {kind!r} is neither hnsw nor ivf")
    name, parameters = "efSearch" if kind == "hnsw" else "nprobe", card.get("parameters")
    effort = parameters.get(name) if isinstance(parameters, Mapping) else None
    if type(effort) is not int or not 0 < effort <= LARGEST_EFFORT:
        raise UnreadableIndex(f"{place}.parameters.{name}: {effort!r} is no number from 1 to {LARGEST_EFFORT:,}")
    return kind, effort


def _read_vectors(path: Path) -> Tensor:
    try:
        vectors = read_tensors(path)[VECTORS]  # mapped: pages that nobody looks at are not read
    except DamagedTensors as error:
        raise UnreadableIndex(f"cannot read {path}: {error}") from error
    except KeyError as error:
        raise UnreadableIndex(f"{path}: {VECTORS} is missing") from error
    if vectors.ndim != 2 or vectors.dtype != torch.float32:
        raise UnreadableIndex(f"{path}: {VECTORS} is {vectors.dtype} {[*vectors.shape]}, and no float32 [G, D]")
    return vectors


def _read_library(path: Path, kind: Kind) -> Any:
    """faiss's index. Of what it can read, only the kinds that `make_index` writes are given to it."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(MARKS[kind])) == MARKS[kind]
        library = faiss.read_index(str(path)) if begins else None
    except (OSError, RuntimeError, MemoryError) as error:
        raise _unreadable(path, "install the version that wrote it") from error
    if library is None:
        raise _unreadable(path, f"it does not begin with {MARKS[kind].decode()}, as one of the kind {kind} does")
    return library


def _unreadable(path: Path, what: str) -> UnreadableIndex:
    return UnreadableIndex(
        f"{path}: faiss {faiss.__version__} cannot read it: {what}, or make it again by "
        "`simclr run RECIPE STEP --force`"
    )


def _check_library(path: Path, library: Any, vectors: Tensor) -> None:
    """Raise UnreadableIndex where it is of other vectors."""
    if (library.ntotal, library.d) != tuple(vectors.shape) or library.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UnreadableIndex(
            f"{path} is of {library.ntotal:,} vectors of {library.d} numbers, and {VECTORS_FILE} has "
            f"{len(vectors):,} of {vectors.shape[1]}"
        )


def _read_rows(path: Path, rows: int) -> tuple[NDArray[np.int64], list[str], list[str], list[str | None]]:
    """id, key, split and label of every row."""
    try:
        table = pq.read_table(path)
        ids = table["id"].to_numpy()
        columns = [table[name].to_pylist() for name in ("key", "split", "label")]
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UnreadableIndex(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if table.num_rows != rows or ids.dtype != np.int64:
        raise UnreadableIndex(f"{path}: id: {table.num_rows:,} rows of {ids.dtype}, and {VECTORS_FILE} has {rows:,}")
    return ids, *columns
