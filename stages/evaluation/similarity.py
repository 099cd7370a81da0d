"""Cosine similarities of queries to a gallery in bounded memory, and keys that put gallery rows in order by them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE_PAIRS = 2**21
"""Pairs of a query and a gallery row that a thread has in memory at once, but at least one query with all of its
pairs."""
MOST_THREADS = 8

T = TypeVar("T")
NEVER = np.iinfo(np.int64).max - 1
"""The key of a row that does not count: behind all others, and even."""


def over_tiles(queries: Tensor, gallery: Tensor, work: Callable[[slice, NDArray[np.float32]], T]) -> Iterator[T]:
    """What some work gives for consecutive queries and their cosine similarities to all of the gallery, in order.

    As many threads as torch has work at a time, at most MOST_THREADS, each on queries of its own: numpy's sorting and
    counting, which take most of the time, have one each. While they do, torch has one thread in each of them.

    Args:
        queries: [Q, D] floats, of any length; a row of zeros has similarity 0 with everything.
        gallery: [G, D].
        work: is given the rows of the queries, and float32 [B, G] of which it may do as it likes.

    Raises:
        ValueError: dimensions that differ, or an empty gallery.
    """
    if queries.ndim != 2 or queries.shape[1:] != gallery.shape[1:] or not len(gallery):
        raise ValueError(f"no similarities of {[*queries.shape]} to {[*gallery.shape]}")
    # Normalised once: [G, D] again. Queries are normalised tile by tile.
    turned = torch.nn.functional.normalize(gallery.float(), dim=1).T
    size = max(1, TILE_PAIRS // len(gallery))

    def of_tile(begin: int) -> T:
        rows = slice(begin, min(begin + size, len(queries)))
        return work(rows, (torch.nn.functional.normalize(queries[rows].float(), dim=1) @ turned).numpy())

    threads = torch.get_num_threads()
    try:
        # Else each thread of the pool would have a team of OpenMP threads of its own: that number is one of the thread
        # that sets it, and torch gives the last one that was set, by whichever thread, to threads that are new.
        with ThreadPoolExecutor(min(threads, MOST_THREADS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(of_tile, range(0, len(queries), size))
    finally:
        torch.set_num_threads(threads)


def order_keys(similarity: NDArray[np.float32], payload: NDArray[np.int64]) -> NDArray[np.int64]:
    """Keys whose ascending order is that of falling similarity, and of equals that of rising payload.

    Sorting or selecting such keys is several times as fast as sorting similarities along with their places, and
    leaves nothing open among equals.

    Args:
        similarity: [B, G], finite.
        payload: [B, G] or [G], 0 or more and below 2^32; the lower half of the key.

    Returns:
        int64 [B, G], below NEVER.
    """
    bits = (similarity + np.float32(0)).view(np.int32)  # -0 becomes 0
    # Floats compare as their bits do, once those of negative ones are turned around (Herf 2001, Radix Tricks).
    rising = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = (~rising).astype(np.int64)
    keys <<= 32
    keys |= payload
    return keys


def payload_of(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The payloads that keys were made with."""
    return keys & 0xFFFFFFFF


def similarity_of(keys: NDArray[np.int64]) -> NDArray[np.float32]:
    """The similarities that keys were made with; minus infinity for NEVER."""
    rising = (~(keys >> 32)).astype(np.int32)
    similarity = (rising ^ ((rising >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    return np.where(keys == NEVER, np.float32(-np.inf), similarity)
