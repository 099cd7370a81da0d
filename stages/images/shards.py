"""Reading samples from shards: memory-mapped tars, an index, a hash checked on every read."""

import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from stages.images.decode import decode_stored
from stages.images.index import DamagedShard, read_index, read_summary
from stages.images.tar import padded, tar_size

THREADS_FROM_PIXELS = 96 * 96
"""Smaller images are decoded sooner than threads hand over the interpreter."""


class Sample(NamedTuple):
    """One image. image: uint8 [C, H, W]; label: -1 without one; sample_id: position in the index of all splits."""

    image: Tensor
    label: int
    sample_id: int
    key: str


class Batch(NamedTuple):
    """Images on a common canvas.

    Attributes:
        images: uint8 [B, C, H, W], channels last in memory; each image in the upper left corner, zeros around it.
        labels: int64 [B], -1 without one, or with several.
        sizes: int64 [B, 2], height and width of each image.
        sample_ids: int64 [B].
    """

    images: Tensor
    labels: Tensor
    sizes: Tensor
    sample_ids: Tensor


class Shards:
    """The samples of one split, by position. Any number of threads may read at once.

    Attributes:
        labels: int64 [n], -1 without one, or with several (see `label_lists`).
        groups: int64 [n], equal for samples of one group (a patient, a video, the tiles of an image); a sample without
            one has a number of its own.
        has_groups: whether a sample of this split has a declared group.
        channels: of every image: 3 is RGB, 1 is grey.
        sample_ids: int64 [n], positions in the index of all splits.
        classes: names; a label is a position in this list.
        canvas: (height, width) of the split's largest stored sizes.
    """

    def __init__(self, folder: Path, split: str):
        summary = read_summary(folder)
        if split not in summary["splits"]:
            raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(summary['splits'])}")
        expected = summary["splits"][split]
        self._index = read_index(folder, split)
        if self._index.num_rows != expected["samples"]:
            raise DamagedShard(f"the index in {folder} has {self._index.num_rows} samples of {expected['samples']}")
        self.folder, self.split = folder, split
        self.classes: list[str] = summary["classes"]
        self.canvas: tuple[int, int] = (expected["max_height"], expected["max_width"])
        self.channels: int = summary.get("channels", 3)
        self.labels = torch.from_numpy(self._column("label").astype(np.int64))
        self.sample_ids = torch.from_numpy(self._column("id").copy())
        self.groups = self.sample_ids[_first_of_group(self._index["group"])]
        self.has_groups = self._index["group"].null_count < len(self._index)
        self._offsets, self._sizes, self._hashes = self._column("offset"), self._column("size"), self._column("xxh3")
        self._formats = self._column("format").astype("U3")
        self._shapes = np.stack([self._column("height"), self._column("width")], axis=1).astype(np.int64)
        tars = self._index["shard"].combine_chunks().dictionary_encode()
        self._shard_names: list[str] = tars.dictionary.to_pylist()
        self._shard_numbers = tars.indices.to_numpy()
        self._shards = [self._open(number) for number in range(len(self._shard_names))]

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, position: int) -> Sample:
        """Raises IndexError, and DamagedShard where the bytes are not those that were written."""
        at = int(self._checked([position])[0])
        height, width = self._shapes[at]
        pixels = np.zeros((1, height, width, self.channels), dtype=np.uint8)
        self._decode(pixels, np.array([at]))
        image = torch.from_numpy(pixels[0]).permute(2, 0, 1)
        return Sample(image, int(self.labels[at]), int(self.sample_ids[at]), self._key(at))

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor, workers: int = 1) -> Batch:
        """Read and decode the samples at these positions.

        Args:
            indices: positions in the split, any order, repetitions allowed.
            workers: threads that decode; where images are small, one does all, because that is faster.

        Raises:
            IndexError: a position lies outside.
            DamagedShard: bytes are not those that were written; names shard and sample.
        """
        positions = self._checked(indices)
        height, width = self.canvas
        images = np.zeros((len(positions), height, width, self.channels), dtype=np.uint8)
        if workers == 1 or height * width < THREADS_FROM_PIXELS:
            self._decode(images, positions)
        else:
            parts = zip(np.array_split(images, workers), np.array_split(positions, workers), strict=True)
            with ThreadPoolExecutor(workers) as threads:
                for done in [threads.submit(self._decode, *part) for part in parts]:
                    done.result()
        return Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            labels=self.labels[positions],
            sizes=torch.from_numpy(self._shapes[positions]),
            sample_ids=self.sample_ids[positions],
        )

    @cached_property
    def keys(self) -> list[str]:
        """Path of each image relative to the source, [n]."""
        return self._index["key"].to_pylist()

    @cached_property
    def label_lists(self) -> list[list[int]]:
        """All labels of each sample, [n]."""
        return self._index["labels"].to_pylist()

    @cached_property
    def group_names(self) -> list[str | None]:
        """The declared group of each sample, [n]; None without one."""
        return self._index["group"].to_pylist()

    def _decode(self, images: np.ndarray, positions: np.ndarray) -> None:
        """Decode the samples at `positions` [B] into `images`, zeros of uint8 [B, H, W, C]."""
        canvas = images.shape[1:3]
        places: Iterable[tuple[int, int, int, int, int, str, list[int]]] = zip(
            positions.tolist(),
            self._shard_numbers[positions].tolist(),
            self._offsets[positions].tolist(),
            self._sizes[positions].tolist(),
            self._hashes[positions].tolist(),
            self._formats[positions].tolist(),
            self._shapes[positions].tolist(),
            strict=True,
        )
        for image, (position, shard, offset, size, digest, kind, (height, width)) in zip(images, places, strict=True):
            content = self._shards[shard][offset : offset + size]
            if xxhash.xxh3_64_intdigest(content) != digest:
                raise self._damaged(position, "its bytes do not match their hash")
            fills = kind == "jpg" and (height, width) == canvas
            try:
                pixels = decode_stored(content, kind, buffer=image if fills else None)
            except (ValueError, OSError, SyntaxError) as error:
                raise self._damaged(position, f"it cannot be decoded ({error})") from error
            if pixels.shape != (height, width, self.channels):
                height, width, channels = pixels.shape
                raise self._damaged(position, f"it is {width} x {height} pixels large, of {channels} channels")
            if not fills:
                image[:height, :width] = pixels

    def _checked(self, indices: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        positions = np.asarray(indices, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= len(self)):
            raise IndexError(f"positions in {self.split} must be from 0 to {len(self) - 1}")
        return positions

    def _column(self, name: str) -> np.ndarray:
        return self._index[name].to_numpy()

    def _key(self, position: int) -> str:
        return self._index["key"][position].as_py()

    def _open(self, number: int) -> memoryview:
        """Map a tar into memory, and hold its size against the index."""
        path = self.folder / self._shard_names[number]
        last = np.flatnonzero(self._shard_numbers == number)[-1]
        expected = tar_size(int(self._offsets[last]) + padded(int(self._sizes[last])))
        try:
            with path.open("rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise DamagedShard(f"cannot open {path}: {error}") from error
        if len(view) != expected:
            raise DamagedShard(f"{path} has {len(view)} bytes instead of {expected}")
        return view

    def _damaged(self, position: int, what: str) -> DamagedShard:
        shard = self._shard_names[self._shard_numbers[position]]
        return DamagedShard(
            f"{self.folder / shard}: sample {int(self.sample_ids[position])} ({self._key(position)}) is damaged: {what}"
        )


def _first_of_group(groups: pa.ChunkedArray) -> np.ndarray:
    """For each of n samples the position of the first one of its group, int64 [n]; its own where it has none."""
    positions = np.arange(len(groups))
    is_declared = groups.is_valid().to_numpy()
    if is_declared.any():
        codes = groups.drop_null().combine_chunks().dictionary_encode().indices.to_numpy()
        _, first = np.unique(codes, return_index=True)
        positions[is_declared] = positions[is_declared][first[codes]]
    return positions


def open_shards(artifact_folder: Path | str, split: str) -> Shards:
    """Open one split of an artifact of the stage `shard`.

    Args:
        artifact_folder: the folder that holds index.parquet and the tars.
        split: `train`, `val` or `test`.

    Raises:
        ValueError: there is no such split.
        DamagedShard: index or tars are not as they were written.
    """
    return Shards(Path(artifact_folder), split)
