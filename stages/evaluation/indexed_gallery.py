"""A gallery with an index on disk: the index, the vectors that it can be built of again, and whose they are."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from stages.evaluation.features import Features
from stages.evaluation.query_sets import QuerySets
from stages.evaluation.vector_index import (
    Kind,
    Speed,
    VectorIndex,
    build_index,
    faiss,
    measure_speed,
    require_library,
)

INDEX_FILE, VECTORS_FILE, GALLERY_FILE = "index.faiss", "vectors.safetensors", "gallery.parquet"
VECTORS = "vectors"


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
        UnreadableIndex: the installed version cannot read it.
    """
    require_library()
    path, kind = folder / INDEX_FILE, card["kind"]
    try:
        library = faiss.read_index(str(path))
    except RuntimeError as error:
        raise UnreadableIndex(
            f"{path}: faiss {faiss.__version__} cannot read it: install the version that wrote it, or make it again by "
            "`simclr run RECIPE STEP --force`"
        ) from error
    vectors = load_file(folder / VECTORS_FILE)[VECTORS]  # mapped: pages that nobody looks at are not read
    table = pq.read_table(folder / GALLERY_FILE)
    return IndexedGallery(
        VectorIndex(kind, library, vectors, _effort(kind, card)),
        table["id"].to_numpy(),
        table["key"].to_pylist(),
        table["split"].to_pylist(),
        table["label"].to_pylist(),
    )


def _effort(kind: Kind, card: Mapping[str, Any]) -> int:
    return card["parameters"]["efSearch" if kind == "hnsw" else "nprobe"]
