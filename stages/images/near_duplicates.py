"""Images that are one picture: copies that were compressed, cropped, scaled, mirrored or lit anew.

Three steps: a descriptor finds candidates (similar_pairs), these are aligned (alignment), and what is closer than a
distance is written down. Copies, byte for byte, are found by their hashes. No trained encoder takes part, so that the
list owes nothing to the models that are measured on these splits.
"""

import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from stages.images import similar_pairs
from stages.images.alignment import aligned_distances
from stages.images.fingerprints import SIDE, descriptors, thumbnails
from stages.images.index import INDEX_FILE
from stages.images.shards import open_shards

NEAR_DUPLICATES_FILE = "near_duplicates.parquet"
MOST_LISTED = 100_000
SMALLEST_SIDE = 16
"""Pixels: smaller images hold too little for likeness to mean a common origin, and are searched for copies only."""

BATCH_BYTES = 2**26
BATCH_IMAGES = 1024
BATCH_PAIRS = 4096

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("split", pa.string()),
        ("key", pa.string()),
        ("other_id", pa.int64()),
        ("other_split", pa.string()),
        ("other_key", pa.string()),
        ("distance", pa.float64()),
        ("mirrored", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of images, by distance and then by ids.

    Attributes:
        ids: int64 [P, 2], the lower one first.
        distances: float64 [P], 0 for copies.
        is_mirrored: bool [P], one of the pair is the mirror image.
        searched: how many images were compared by more than their hash.
        is_exact: all pairs were looked at; there were not too many images.
    """

    ids: np.ndarray
    distances: np.ndarray
    is_mirrored: np.ndarray
    searched: int
    is_exact: bool


class _Split(NamedTuple):
    """Images of a split that are searched. ids: int64 [n]; descriptors: [n, D]; groups: int64 [n] or None."""

    ids: Tensor
    descriptors: Tensor
    groups: Tensor | None


def find_near_duplicates(
    folder: Path, most: float, scratch: Path, workers: int, advance: Callable[[int], None]
) -> NearDuplicates:
    """Find the pairs in finished shards, within and across splits.

    Within a split, images of one group (tiles of one parent among them) are no pair. An image looks
    for PARTNERS others in each split, at most, and for as many of equal bytes.

    Args:
        folder: has the tars, index.parquet and shards.json.
        most: the largest distance of a pair.
        scratch: folder for a nameless file of 3 KiB an image, and with it memory stays at 1 KiB an image.
        workers: threads that decode.
        advance: called with the steps done since the last call, of `near_duplicate_work`.
    """
    index = pq.read_table(folder / INDEX_FILE, columns=["split", "xxh3", "size", "group"])
    names = index["split"].unique().to_pylist()  # in the order of the index
    with tempfile.TemporaryFile(dir=scratch) as file:
        small, splits = _read(folder, names, index.num_rows, file, workers, advance)
        searched = sum(len(one.ids) for one in splits)
        is_exact = searched <= similar_pairs.EXACT_UP_TO
        found: dict[tuple[int, int], tuple[float, bool]] = {}
        for first, second in combinations_with_replacement(splits, 2):
            pairs = _candidates(first, second, is_exact, advance)
            for pair, distance, is_mirrored in _close(small, pairs, most, len(second.ids), advance):
                found[pair] = min(found.get(pair, (distance, is_mirrored)), (distance, is_mirrored))
        del small
    found |= dict.fromkeys(_copies(index), (0.0, False))
    ranked = sorted((distance, pair, is_mirrored) for pair, (distance, is_mirrored) in found.items())
    return NearDuplicates(
        ids=np.array([pair for _, pair, _ in ranked], dtype=np.int64).reshape(-1, 2),
        distances=np.array([distance for distance, _, _ in ranked], dtype=np.float64),
        is_mirrored=np.array([is_mirrored for _, _, is_mirrored in ranked], dtype=bool),
        searched=searched,
        is_exact=is_exact,
    )


def near_duplicate_work(folder: Path) -> int:
    """Steps of `find_near_duplicates`, at most: to read, to look for candidates and to align those, an image each."""
    counts = [count["counts"] for count in _splits(folder).value_counts().to_pylist()]
    return sum(count * (1 + 2 * place) for place, count in enumerate(counts, 1))


def write_near_duplicates(folder: Path, found: NearDuplicates) -> int:
    """Write the closest MOST_LISTED pairs; returns how many."""
    index = pq.read_table(folder / INDEX_FILE, columns=["split", "key"])
    ids = found.ids[:MOST_LISTED]
    columns: list[pa.Array | pa.ChunkedArray] = []
    for side in (0, 1):
        rows = index.take(ids[:, side])
        columns += [pa.array(ids[:, side]), rows["split"], rows["key"]]
    columns += [pa.array(found.distances[:MOST_LISTED]), pa.array(found.is_mirrored[:MOST_LISTED])]
    pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), folder / NEAR_DUPLICATES_FILE, compression="zstd")
    return len(ids)


def describe_near_duplicates(folder: Path, found: NearDuplicates, most: float) -> dict[str, Any]:
    """For shards.json: how many pairs there are within each split, and across each two with how many images of both."""
    column = _splits(folder).dictionary_encode()
    names = column.dictionary.to_pylist()  # in the order of the index
    split_of = column.indices.to_numpy()
    ends = split_of[found.ids]  # [P, 2]
    return {
        "distance": most,
        "images": len(split_of),
        "searched": found.searched,
        "search": "exact" if found.is_exact else "cells",
        "pairs": len(found.ids),
        "listed": min(len(found.ids), MOST_LISTED),
        "within": {name: int((ends == number).all(axis=1).sum()) for number, name in enumerate(names)},
        "across": [
            {
                "splits": [names[first], names[second]],
                "pairs": len(ids),
                "images": [len(np.unique(ids[:, 0])), len(np.unique(ids[:, 1]))],
            }
            for first, second in combinations(range(len(names)), 2)
            # Ids increase with the split.
            for ids in [found.ids[(ends == (first, second)).all(axis=1)]]
        ],
    }


def _splits(folder: Path) -> pa.Array:
    """The split of each image, in the order of ids."""
    return pq.read_table(folder / INDEX_FILE, columns=["split"])["split"].combine_chunks()


def _read(
    folder: Path, names: Sequence[str], images: int, file: Any, workers: int, advance: Callable[[int], None]
) -> tuple[np.memmap, list[_Split]]:
    """Thumbnails of all images, uint8 [N, K, 32, 32] in the file, by id; and what is searched of each split."""
    small = None
    splits = []
    for name in names:
        shards = open_shards(folder, name)
        if small is None:
            shape = (images, 3 if shards.channels == 3 else 1, SIDE, SIDE)
            small = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
        height, width = shards.canvas
        length = max(1, min(BATCH_IMAGES, BATCH_BYTES // (height * width * shards.channels)))
        ids, vectors = [], []
        for start in range(0, len(shards), length):
            batch = shards.batch(range(start, min(start + length, len(shards))), workers)
            made = thumbnails(batch.images, batch.sizes)
            small[batch.sample_ids.numpy()] = made.numpy()
            of_images = descriptors(made)
            # Flat images resemble nothing.
            chosen = (batch.sizes.min(dim=1).values >= SMALLEST_SIDE) & (of_images.norm(dim=1) > 0.5)
            ids.append(batch.sample_ids[chosen])
            vectors.append(of_images[chosen])
            advance(len(made))
        found = torch.cat(ids)
        groups = shards.groups[torch.isin(shards.sample_ids, found)] if shards.has_groups else None
        splits.append(_Split(found, torch.cat(vectors), groups))
    assert small is not None
    return small, splits


def _candidates(first: _Split, second: _Split, is_exact: bool, advance: Callable[[int], None]) -> similar_pairs.Pairs:
    """Pairs by id that the descriptors find within a split, or across two: images of the second look for partners."""
    gallery = None if first is second else first.descriptors
    groups = first.groups if first is second else None
    pairs = similar_pairs.similar_pairs(second.descriptors, gallery, groups, advance, is_exact=is_exact)
    return similar_pairs.Pairs(second.ids[pairs.query], first.ids[pairs.gallery], pairs.is_mirrored)


def _close(
    small: np.memmap, pairs: similar_pairs.Pairs, most: float, steps: int, advance: Callable[[int], None]
) -> Iterator[tuple[tuple[int, int], float, bool]]:
    """Those of the pairs that are close after alignment, as (lower id, higher id), distance, is mirrored.

    Args:
        steps: that `advance` is told of until all pairs are done.
    """
    done, told = 0, 0
    for query, gallery, is_mirrored in zip(*(one.split(BATCH_PAIRS) for one in pairs), strict=True):
        first, second = (torch.from_numpy(small[ids.numpy()]) for ids in (query, gallery))
        distances = aligned_distances(first, second, is_mirrored, most)
        for place in (distances <= most).nonzero()[:, 0].tolist():
            one, other = sorted((int(query[place]), int(gallery[place])))
            yield (one, other), float(distances[place]), bool(is_mirrored[place])
        done += len(query)
        reached = steps * done // max(1, len(pairs.query))
        advance(reached - told)
        told = reached


def _copies(index: pa.Table) -> Iterator[tuple[int, int]]:
    """Pairs of ids, the lower one first, whose stored bytes are equal.

    Of many copies within a split, each is paired with those that follow; across splits, each of the later split with
    the first ones of the earlier: at most PARTNERS.
    """
    keys = np.rec.fromarrays([index["xxh3"].to_numpy(), index["size"].to_numpy()])
    order = np.argsort(keys, kind="stable")
    starts = np.append(np.flatnonzero(np.append(True, keys[order][1:] != keys[order][:-1])), len(order))
    names = index["split"].unique().to_pylist()
    for start, length in zip(starts, np.diff(starts), strict=False):
        if length == 1:
            continue
        rows = index.select(["split", "group"]).take(order[start : start + length]).to_pylist()
        of_split: dict[str, list[tuple[tuple[str, int], int]]] = {name: [] for name in names}
        for identity, row in zip(order[start : start + length].tolist(), rows, strict=True):
            # An image without a group is a group of its own.
            group = ("", identity) if row["group"] is None else (row["group"], -1)
            of_split[row["split"]].append((group, identity))
        for first, second in combinations(names, 2):
            for _, other in of_split[second]:
                yield from ((one, other) for _, one in of_split[first][: similar_pairs.PARTNERS])
        for members in of_split.values():
            members.sort()
            groups = [group for group, _ in members]
            for group, one in members:
                end = bisect_right(groups, group)
                for _, other in members[end : end + similar_pairs.PARTNERS]:
                    yield min(one, other), max(one, other)
