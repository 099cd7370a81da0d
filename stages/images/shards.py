"""Reading samples from shards: memory-mapped tars, an index, a hash checked on every read."""

import mmap
import os
from collections.abc import Sequence
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
from stages.images.index import (
    ATTRIBUTE,
    FORMATS,
    INDEX_FILE,
    NO_LABEL,
    SHARD_NAME,
    DamagedShard,
    NoSuchAttribute,
    read_index,
    read_summary,
)
from stages.images.tar import padded, tar_size

THREADS_FROM_PIXELS = 96 * 96
"""Smaller images are decoded sooner than threads hand over the interpreter."""

PARTS_PER_THREAD = 4
"""Of a batch, so that no thread waits long for another that got larger images."""

SCALES = (8, 4, 2)
"""What libjpeg divides the sides of an image by while it decodes (rounding up) in less time than it takes for all."""

SAMPLES_AT_ONCE = 2**20
"""Of which the different sizes are found at once."""


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
    """The samples of one split, or of several one after another, by position. Any number of threads may read at once.

    About 60 bytes a sample are held in memory; what training does not need (keys, groups, lists of labels, attributes)
    is read from the index when it is first asked for.

    Attributes:
        labels: int64 [n], -1 without one, or with several (see `label_lists`).
        channels: of every image: 3 is RGB, 1 is grey.
        sample_ids: int64 [n], positions in the index of all splits.
        classes: names; a label is a position in this list.
        canvas: (height, width) of the largest stored sizes of these splits.
        attributes: names of what else is known of images: see `attribute`.
    """

    def __init__(self, folder: Path, split: str, *more: str):
        summary = read_summary(folder)
        for one in (split, *more):
            if one not in summary["splits"]:
                raise ValueError(f"{folder} has no split {one!r}; it has {', '.join(summary['splits'])}")
        self._splits = (split, *more) if more else split
        expected = [summary["splits"][one] for one in (split, *more)]
        samples = sum(one["samples"] for one in expected)
        index = read_index(
            folder, self._splits, ["id", "shard", "offset", "size", "format", "label", "height", "width", "xxh3"]
        )
        if index.num_rows != samples:
            raise DamagedShard(f"the index in {folder} has {index.num_rows} samples of {samples}")
        self.folder, self.split = folder, " and ".join((split, *more))
        self.classes: list[str] = summary["classes"]
        self.canvas: tuple[int, int] = (
            max(one["max_height"] for one in expected),
            max(one["max_width"] for one in expected),
        )
        self.channels: int = summary.get("channels", 3)
        self.attributes: tuple[str, ...] = (*summary.get("attributes", {}),)
        self.labels = torch.from_numpy(index["label"].to_numpy().astype(np.int64))
        self.sample_ids = torch.from_numpy(index["id"].to_numpy().copy())
        self._offsets, self._bytes, self._hashes = (index[name].to_numpy() for name in ("offset", "size", "xxh3"))
        self._shapes = np.stack([index["height"].to_numpy(), index["width"].to_numpy()], axis=1)  # int32 [n, 2]
        self._formats, self._format_numbers = _names_and_numbers(index["format"])
        self._shard_names, self._shard_numbers = _names_and_numbers(index["shard"])
        self._check_index()
        # The last of equal numbers stays: where the last sample of each tar stands.
        last = np.zeros(len(self._shard_names), dtype=np.int64)
        last[self._shard_numbers] = np.arange(len(self))
        self._shards = [self._open(name, at) for name, at in zip(self._shard_names, last.tolist(), strict=True)]
        self._canvases: dict[int, tuple[int, int]] = {}
        self._attributes: dict[str, list[str | None]] = {}

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, position: int) -> Sample:
        """Raises IndexError, and DamagedShard where the bytes are not those that were written."""
        at = int(self._checked([position])[0])
        height, width = self._shapes[at].tolist()
        pixels = np.empty((1, height, width, self.channels), dtype=np.uint8)
        self._decode(pixels, np.array([at]), None)
        image = torch.from_numpy(pixels[0]).permute(2, 0, 1)
        return Sample(image, int(self.labels[at]), int(self.sample_ids[at]), self._key(at))

    def batch(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        workers: int = 1,
        least_side: int | None = None,
        out: np.ndarray | None = None,
    ) -> Batch:
        """Read and decode the samples at these positions.

        Args:
            indices: positions in the split, any order, repetitions allowed.
            workers: threads that decode; where images are small, one does all, because that is faster.
            least_side: JPEGs are decoded at a half, a quarter or an eighth, as long as their shorter side keeps that
                many pixels; `sizes` and the canvas are then those of what was decoded.
            out: uint8 [B or more, H, W, C], as large as `canvas_at` says, whose first B images the batch is written
                over; memory of its own without.

        Raises:
            IndexError: a position lies outside.
            DamagedShard: bytes are not those that were written; names shard and sample.
        """
        positions = self._checked(indices)
        height, width = self.canvas_at(least_side)
        if out is None:
            out = np.empty((len(positions), height, width, self.channels), dtype=np.uint8)
        images = out[: len(positions)]
        assert images.shape == (len(positions), height, width, self.channels), "memory of another size"
        if workers == 1 or height * width < THREADS_FROM_PIXELS:
            self._decode(images, positions, least_side)
        else:
            count = PARTS_PER_THREAD * workers
            parts = zip(np.array_split(images, count), np.array_split(positions, count), strict=True)
            with ThreadPoolExecutor(workers) as threads:
                for done in [threads.submit(self._decode, *part, least_side) for part in parts]:
                    done.result()
        return self.as_batch(images, positions, least_side)

    def as_batch(self, images: np.ndarray, positions: np.ndarray, least_side: int | None = None) -> Batch:
        """Images that are decoded already, uint8 [B, H, W, C], with what is known of them."""
        return Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            labels=self.labels[positions],
            sizes=torch.from_numpy(self._sizes(positions, least_side).astype(np.int64)),
            sample_ids=self.sample_ids[positions],
        )

    def canvas_at(self, least_side: int | None) -> tuple[int, int]:
        """(height, width) of the images of a batch: of the largest that are decoded with this `least_side`."""
        if least_side is None:
            return self.canvas
        if least_side not in self._canvases:
            of_jpegs, of_others = self._distinct_shapes
            sizes = np.concatenate((_scaled(of_jpegs, least_side), of_others))
            height, width = sizes.max(axis=0, initial=1).tolist()
            self._canvases[least_side] = (height, width)
        return self._canvases[least_side]

    def is_scaled_at(self, least_side: int | None) -> bool:
        """Whether any image is decoded smaller than it is with this `least_side`."""
        if least_side is None:
            return False
        of_jpegs, _ = self._distinct_shapes
        return bool((_scaled(of_jpegs, least_side) != of_jpegs).any())

    @cached_property
    def groups(self) -> Tensor:
        """int64 [n], equal for samples of one group (a patient, a video, the tiles of an image); a sample without one
        has a number of its own.
        """
        return self.sample_ids[_first_of_group(self._group_column)]

    @property
    def has_groups(self) -> bool:
        """Whether a sample of this split has a declared group."""
        return self._group_column.null_count < len(self)

    @cached_property
    def keys(self) -> list[str]:
        """Path of each image relative to the source, [n]."""
        return self._key_column.to_pylist()

    @cached_property
    def label_lists(self) -> list[list[int]]:
        """All labels of each sample, [n]."""
        return self._column("labels").to_pylist()

    @cached_property
    def group_names(self) -> list[str | None]:
        """The declared group of each sample, [n]; None without one."""
        return self._group_column.to_pylist()

    def attribute(self, name: str) -> list[str | None]:
        """A further column of the source (`columns.attributes`), [n]; None where an image has no value.

        Raises:
            NoSuchAttribute: lists those that there are.
        """
        if name not in self.attributes:
            raise NoSuchAttribute(self.folder, name, self.attributes)
        if name not in self._attributes:
            self._attributes[name] = self._column(f"{ATTRIBUTE}{name}").to_pylist()
        return self._attributes[name]

    def _decode(self, images: np.ndarray, positions: np.ndarray, least_side: int | None) -> None:
        """Decode the samples at `positions` [B] into `images`, uint8 [B, H, W, C], zeros around each."""
        canvas_height, canvas_width = images.shape[1:3]
        scratch = np.empty(0, dtype=np.uint8)
        sizes = self._sizes(positions, least_side)
        starts = self._offsets[positions]
        for image, shard, start, end, digest, kind, (height, width), position in zip(
            images,
            self._shard_numbers[positions].tolist(),
            starts.tolist(),
            (starts + self._bytes[positions]).tolist(),
            self._hashes[positions].tolist(),
            self._format_numbers[positions].tolist(),
            sizes.tolist(),
            positions.tolist(),
            strict=True,
        ):
            content = self._shards[shard][start:end]
            if xxhash.xxh3_64_intdigest(content) != digest:
                raise self._damaged(position, "its bytes do not match their hash")
            # Whole rows of the canvas can be decoded in place. Others come by way of memory that is used again: what
            # is fresh from the system takes longer than the copy.
            if width == canvas_width:
                buffer = image
            elif len(scratch):
                buffer = scratch
            else:
                buffer = scratch = np.empty(images[0].size, dtype=np.uint8)
            least_size = (0, 0) if least_side is None else (height, width)
            try:
                pixels = decode_stored(content, self._formats[kind], buffer, least_size)
            except (ValueError, OSError, SyntaxError) as error:
                raise self._damaged(position, f"it cannot be decoded ({error})") from error
            if pixels.shape != (height, width, self.channels):
                height, width, channels = pixels.shape
                raise self._damaged(position, f"it is {width} x {height} pixels large, of {channels} channels")
            if buffer is not image or self._formats[kind] != "jpg":
                image[:height, :width] = pixels
            if height < canvas_height:
                image[height:] = 0
            if width < canvas_width:
                image[:height, width:] = 0

    def _sizes(self, positions: np.ndarray, least_side: int | None) -> np.ndarray:
        """Height and width of the samples as they are decoded, int32 [B, 2]."""
        shapes = self._shapes[positions]
        if least_side is None:
            return shapes
        return np.where(self._is_jpeg(positions)[:, None], _scaled(shapes, least_side), shapes)

    def _is_jpeg(self, positions: np.ndarray | slice) -> np.ndarray:
        return np.array([name == "jpg" for name in self._formats])[self._format_numbers[positions]]

    @cached_property
    def _distinct_shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """The different stored heights and widths of the JPEGs and of all others, int32 [k, 2] each.

        Few in most sets. They are found once, part by part, so that it takes little memory.
        """
        found: tuple[list[pa.Array], list[pa.Array]] = ([], [])
        for start in range(0, len(self), SAMPLES_AT_ONCE):
            part = slice(start, start + SAMPLES_AT_ONCE)
            pairs, is_jpeg = self._shapes[part].view(np.int64)[:, 0], self._is_jpeg(part)
            for distinct, chosen in zip(found, (is_jpeg, ~is_jpeg), strict=True):
                distinct.append(pa.array(pairs[chosen]).unique())
        of_jpegs, of_others = (
            pa.chunked_array(distinct, pa.int64()).unique().to_numpy().copy().view(np.int32).reshape(-1, 2)
            for distinct in found
        )
        return of_jpegs, of_others

    def _checked(self, indices: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        positions = np.asarray(indices, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= len(self)):
            raise IndexError(f"positions in {self.split} must be from 0 to {len(self) - 1}")
        return positions

    @cached_property
    def _key_column(self) -> pa.ChunkedArray:
        return self._column("key")

    @cached_property
    def _group_column(self) -> pa.ChunkedArray:
        return self._column("group")

    def _column(self, name: str) -> pa.ChunkedArray:
        return read_index(self.folder, self._splits, [name])[name]

    def _key(self, position: int) -> str:
        return self._key_column[position].as_py()

    def _check_index(self) -> None:
        """Raise DamagedShard where the index says what the stage `shard` does not write."""
        named = {name for name in self._shard_names if not SHARD_NAME.fullmatch(name)}
        formats = set(self._formats) - set(FORMATS)
        sizes = self._shapes if len(self) else np.ones((1, 2), dtype=np.int32)
        fits = (sizes >= 1).all() and (sizes <= self.canvas).all()
        labels_fit = bool(((self.labels >= NO_LABEL) & (self.labels < max(1, len(self.classes)))).all())
        places_fit = (self._offsets >= 0).all() and (self._bytes >= 0).all()
        for is_wrong, what in (
            (named, f"shard: {min(named, default='')!r} is no file beside it"),
            (formats, f"format: {min(formats, default='')!r} is none of {', '.join(FORMATS)}"),
            (not fits, f"height, width: they do not lie between 1 and the {self.canvas} of shards.json"),
            (not labels_fit, f"label: one is none of the {len(self.classes)} classes of shards.json"),
            (not places_fit, "offset, size: one lies before the beginning of its shard"),
        ):
            if is_wrong:
                raise DamagedShard(f"cannot read {self.folder / INDEX_FILE}: {what}")

    def _open(self, name: str, last: int) -> memoryview:
        """Map a tar into memory, and hold its size against the index, in which its last sample stands at `last`."""
        path = self.folder / name
        expected = tar_size(int(self._offsets[last]) + padded(int(self._bytes[last])))
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == expected:
                    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise DamagedShard(f"cannot open {path}: {error}{self._lost(name, 0)}") from error
        raise DamagedShard(f"{path} has {size} bytes instead of {expected}{self._lost(name, size)}")

    def _lost(self, name: str, size: int) -> str:
        """Which samples do not lie within the first `size` bytes of a tar, in words; none where all do."""
        is_lost = (self._shard_numbers == self._shard_names.index(name)) & (self._offsets + self._bytes > size)
        if not is_lost.any():
            return ""
        first = int(np.argmax(is_lost))
        more = f" and {is_lost.sum() - 1:,} more" if is_lost.sum() > 1 else ""
        return f": sample {int(self.sample_ids[first])} ({self._key(first)}){more} cannot be read"

    def _damaged(self, position: int, what: str) -> DamagedShard:
        shard = self._shard_names[self._shard_numbers[position]]
        return DamagedShard(
            f"{self.folder / shard}: sample {int(self.sample_ids[position])} ({self._key(position)}) is damaged: {what}"
        )


def _scaled(shapes: np.ndarray, least_side: int) -> np.ndarray:
    """Heights and widths of JPEGs, stored and as they are decoded: int32 [n, 2] -> [n, 2]."""
    shorter = shapes.min(axis=1)
    divisor = np.ones_like(shorter)
    for scale in reversed(SCALES):
        divisor[-(-shorter // scale) >= least_side] = scale
    return -(-shapes // divisor[:, None])


def _names_and_numbers(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """A column of few different names: the names, and for each row which of them, int32 [n]."""
    whole = column.unify_dictionaries().combine_chunks()
    numbers = whole.indices.to_numpy()
    is_used = np.zeros(len(whole.dictionary), dtype=bool)  # names of other splits are there as well
    is_used[numbers] = True
    names = whole.dictionary.filter(pa.array(is_used)).to_pylist()
    return names, (np.cumsum(is_used, dtype=np.int32) - 1)[numbers]


def _first_of_group(groups: pa.ChunkedArray) -> np.ndarray:
    """For each of n samples the position of the first one of its group, int64 [n]; its own where it has none."""
    positions = np.arange(len(groups))
    is_declared = groups.is_valid().to_numpy()
    if is_declared.any():
        codes = groups.drop_null().combine_chunks().dictionary_encode().indices.to_numpy()
        _, first = np.unique(codes, return_index=True)
        positions[is_declared] = positions[is_declared][first[codes]]
    return positions


def open_shards(artifact_folder: Path | str, split: str, *more: str) -> Shards:
    """Open one split, or several as one, of an artifact of the stage `shard`.

    Args:
        artifact_folder: the folder that holds index.parquet and the tars.
        split, more: `train`, `val` or `test`; samples of several stand in the order of the index.

    Raises:
        ValueError: there is no such split.
        DamagedShard: index or tars are not as they were written.
    """
    return Shards(Path(artifact_folder), split, *more)
