"""Searching a gallery by an index against searching all of it, both on one thread: a thousand queries for ten nearest.

    python -m benchmarks.index [--quick] [--data DIR]

DIR holds small images as CIFAR-10's (train/CLASS/NAME, test/CLASS/NAME): vectors are crops of them in 128 principal
axes, so that neighbours are alike as images are; queries are of test, the gallery of train. Without, vectors are made:
a class's mean, a point of a subspace of 24 dimensions, and noise. `ours` is hnsw; each index looks as hard as finds 95%
of the ten nearest of others (as the stage `retrieve` has it); what it finds of the queries is a note.
"""

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.harness import Comparison, Row, Work, alternate, arguments, report
from stages.evaluation.neighbours import nearest
from stages.evaluation.vector_index import Kind, build_index

DIMENSION, QUERIES, NEIGHBOURS = 128, 1000, 10
SIZES, QUICK_SIZES = (10_000, 50_000, 200_000), (2_000, 10_000)
CLASSES, SUBSPACE, NOISE = 500, 24, 0.1
SIDE = 20
"""Of a crop, in pixels."""
FITTED = 20_000
"""Crops that the axes are of."""
MADE_AT_ONCE = 20_000
KINDS: dict[str, Kind] = {"ours": "hnsw", "ivf": "ivf"}


def made_vectors(count: int) -> NDArray[np.float32]:
    """[count, DIMENSION]"""
    random = np.random.default_rng(0)
    means = 0.7 * random.normal(size=(CLASSES, DIMENSION))
    axes = random.normal(size=(SUBSPACE, DIMENSION)) / np.sqrt(SUBSPACE)
    found = np.empty((count, DIMENSION), dtype=np.float32)
    for begin in range(0, count, MADE_AT_ONCE):
        size = len(found[begin : begin + MADE_AT_ONCE])
        points = means[random.integers(CLASSES, size=size)] + random.normal(size=(size, SUBSPACE)) @ axes
        found[begin : begin + size] = points + NOISE * random.normal(size=(size, DIMENSION))
    return found


def crops(folder: Path, count: int, seed: int) -> NDArray[np.uint8]:
    """[count, SIDE * SIDE * 3], as often of each image as it takes, elsewhere each time."""
    random = np.random.default_rng(seed)
    paths = sorted(folder.rglob("*.*"))
    paths = [paths[number] for number in random.permutation(len(paths))]
    found = np.empty((count, SIDE * SIDE * 3), dtype=np.uint8)
    times = -(-count // len(paths))
    for number, path in enumerate(paths):
        rows = found[number * times : (number + 1) * times]
        if not len(rows):
            break
        pixels = np.asarray(Image.open(path).convert("RGB"))
        for row in rows:
            top, left = (int(random.integers(side - SIDE + 1)) for side in pixels.shape[:2])
            row[:] = pixels[top : top + SIDE, left : left + SIDE].ravel()
    return found


def image_vectors(folder: Path, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gallery [count, DIMENSION] and queries [QUERIES, DIMENSION]: crops about their mean, in its principal axes."""
    if not all((folder / split).is_dir() for split in ("train", "test")):
        sys.exit(f"{folder}: has not both train and test, folders of images")
    gallery, queries = crops(folder / "train", count, 0), crops(folder / "test", QUERIES, 1)
    fitted = gallery[:: max(1, count // FITTED)].astype(np.float32)
    mean = fitted.mean(axis=0)
    _, vectors = np.linalg.eigh((fitted - mean).T @ (fitted - mean))
    axes = np.ascontiguousarray(vectors[:, ::-1][:, :DIMENSION])
    projected = np.empty((count, DIMENSION), dtype=np.float32)
    for begin in range(0, count, MADE_AT_ONCE):
        projected[begin : begin + MADE_AT_ONCE] = (gallery[begin : begin + MADE_AT_ONCE] - mean) @ axes
    return projected, ((queries - mean) @ axes).astype(np.float32)


def compare(comparison: Comparison, gallery: Tensor, queries: Tensor, runs: int) -> None:
    """A row of one size, ratios of both indexes to exact search, and notes."""
    unit = torch.nn.functional.normalize(gallery, dim=1)
    indexes, size = {}, len(gallery)
    for name, kind in KINDS.items():
        before = time.perf_counter()
        index, _, recall, _ = build_index(kind, gallery, queries, torch.full((len(queries),), -1), 0)
        seconds, indexes[name] = time.perf_counter() - before, index
        comparison.notes.append(
            f"{kind} of {size:,}: built in {seconds:.3g} s, {index.parameters}, recall@1 {recall['1']:.3f}, "
            f"recall@10 {recall['10']:.3f}"
        )
        print(comparison.notes[-1], file=sys.stderr)
    contenders: dict[str, Work] = {"exact": partial(nearest, queries, unit, NEIGHBOURS)}
    contenders |= {name: partial(index.nearest, queries, NEIGHBOURS) for name, index in indexes.items()}
    values = alternate(contenders, runs)
    comparison.rows.append(Row(f"{size:,} x {DIMENSION}", values))
    for name, kind in KINDS.items():
        comparison.ratio[f"{kind}_{size}"] = values["exact"] / values[name]


def main() -> None:
    given = arguments(__doc__, on_host=True)
    torch.set_num_threads(1)  # faiss counts as many where it shares torch's runtime; OMP_NUM_THREADS=1 is certain
    sizes, runs = (QUICK_SIZES, 3) if given.quick else (SIZES, 7)
    if given.data is None:
        made = made_vectors(max(sizes) + QUERIES)
        gallery, queries = made[QUERIES:], made[:QUERIES]
    else:
        gallery, queries = image_vectors(given.data, max(sizes))
    comparison = Comparison("index", "s", f"{max(sizes):,} x {DIMENSION}", runs=runs)
    comparison.notes.append("vectors are " + ("made" if given.data is None else f"crops of {given.data}"))
    for size in sizes:
        compare(comparison, torch.from_numpy(gallery[:size].copy()), torch.from_numpy(queries.copy()), runs)
    report(comparison)


if __name__ == "__main__":
    main()
