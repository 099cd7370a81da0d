"""Candidates into WebDataset tars: one chunk of candidates is one tar, so that bytes do not depend on processes."""

import errno
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.failpoints import reach
from stages.images.encode import Storage, Stored, encode_samples
from stages.images.index import NO_LABEL, Row, rows_table
from stages.images.reading import UnreadableImage, WindowUse
from stages.images.tar import member, padded, tar_size
from stages.images.tiles import Corner
from stages.sources.candidates import SPLITS, Candidate

CANNOT_BE_OPENED = "cannot be opened: "
NOT_THERE = CANNOT_BE_OPENED + os.strerror(errno.ENOENT)
"""Of reasons why an image is rejected, that of a file that does not exist."""

SECONDS_BETWEEN_NEWS = 0.1
"""Of progress."""

BYTES_TO_WRITE = 2**18
"""What is collected of a tar before it is written."""

BYTES_AT_ONCE = 2**16
"""Of a file, at first: memory for as many is taken whatever its size."""

PIXELS_AT_ONCE = 2**16
"""Of small images that are summed together."""
PIXELS_IN_ROW, ROWS_AT_ONCE = 32, 2**11
"""How sums over them are taken; 2 ** 16 squares are the most of which 32 bits hold the sum."""


class Rejected(NamedTuple):
    """An image that could not be used."""

    path: str
    reason: str


@dataclass(frozen=True)
class Chunk:
    """The work of one tar.

    Attributes:
        path: the tar to write.
        first_number: number of the first candidate; numbers are the keys in the tar.
        labels: of each candidate: increasing positions in the list of classes, none without a label.
        root: folder that the candidates' files are relative to.
        attributes: names of those that candidates have.
    """

    path: Path
    split: str
    first_number: int
    candidates: list[Candidate]
    labels: list[tuple[int, ...]]
    root: Path | None
    storage: Storage
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PixelSums:
    """Exact sums of values and of their squares over pixels, by channel: equal however images are grouped.

    Without channels, which is nothing, it can be added to any other.
    """

    pixels: int = 0
    values: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()

    @classmethod
    def of_none(cls, channels: int) -> "PixelSums":
        """Of no pixels yet."""
        return cls(0, (0,) * channels, (0,) * channels)

    @classmethod
    def of(cls, pixels: np.ndarray) -> "PixelSums":
        """Of pixels, uint8 [..., C]."""
        flat = pixels.reshape(-1, pixels.shape[-1])
        channels = flat.shape[1]
        values, squares = np.zeros((2, channels), dtype=np.int64)
        # Pixels side by side, so that sums run over long rows; and in parts, which stay in the cache.
        whole = len(flat) - len(flat) % PIXELS_IN_ROW
        rows = flat[:whole].reshape(-1, PIXELS_IN_ROW * channels)
        for part in (*np.array_split(rows, -(-len(rows) // ROWS_AT_ONCE) or 1), flat[whole:]):
            numbers = part.astype(np.uint16)
            values += numbers.sum(axis=0, dtype=np.uint32).reshape(-1, channels).sum(axis=0, dtype=np.int64)
            numbers *= numbers  # 255 ** 2 is a number of 16 bits
            squares += numbers.sum(axis=0, dtype=np.uint32).reshape(-1, channels).sum(axis=0, dtype=np.int64)
        return cls(len(flat), tuple(values.tolist()), tuple(squares.tolist()))

    def __add__(self, other: "PixelSums") -> "PixelSums":
        if not (self.values and other.values):
            return self if self.values else other
        return PixelSums(
            self.pixels + other.pixels,
            tuple(a + b for a, b in zip(self.values, other.values, strict=True)),
            tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
        )

    def mean(self) -> list[float]:
        """Mean by channel, on the scale from 0 to 1."""
        return [value / (255 * max(self.pixels, 1)) for value in self.values]

    def std(self) -> list[float]:
        """Standard deviation by channel (of the population), on the scale from 0 to 1."""
        return [
            math.sqrt(square * self.pixels - value**2) / (255 * max(self.pixels, 1))
            for value, square in zip(self.values, self.squares, strict=True)
        ]


@dataclass(frozen=True)
class Packed:
    """What became of a chunk.

    Attributes:
        rows: of the index, a sample each.
        rejected: images that could not be used.
        sums: over the training samples' pixels.
        copied: samples that are their image's own bytes.
        images: candidates that gave samples; with tiles fewer than samples.
        window_use: of the images that a window was for.
    """

    chunk: Chunk
    rows: pa.Table
    rejected: list[Rejected]
    sums: PixelSums
    copied: int
    images: int
    window_use: WindowUse


def make_chunks(
    candidates: Sequence[Candidate],
    splits: Sequence[str],
    classes: Sequence[str],
    *,
    root: Path | None,
    storage: Storage,
    images_per_shard: int,
    folder: Path,
    attributes: tuple[str, ...] = (),
) -> list[Chunk]:
    """Cut the candidates, split by split, into the work of single tars in `folder`.

    Args:
        candidates: sorted by key.
        splits: of each candidate.
        classes: sorted names; a label is a position in them.
        attributes: names of those that candidates have.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    chunks = []
    number = 0
    for split in SPLITS:
        members = [one for one, its_split in zip(candidates, splits, strict=True) if its_split == split]
        for shard, start in enumerate(range(0, len(members), images_per_shard)):
            part = members[start : start + images_per_shard]
            labels = [tuple(sorted({label_of[name] for name in one.labels})) for one in part]
            path = folder / f"{split}-{shard:06d}.tar"
            chunks.append(Chunk(path, split, number, part, labels, root, storage, attributes))
            number += len(part)
    return chunks


def pack_chunk(chunk: Chunk, advance: Callable[[int], None]) -> Packed:
    """Write one tar, or none where no image can be read."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    sums = _RunningSums(chunk.storage.channels)
    window_use = WindowUse()
    images = copied = end = told = 0
    told_at = time.monotonic()
    with chunk.path.open("wb", buffering=BYTES_TO_WRITE) as file:
        for place, candidate in enumerate(chunk.candidates):
            reach("shard.sample")
            try:
                for corner, stored in encode_samples(_read(candidate, chunk.root), chunk.storage):
                    members, row = _sample(chunk, place, corner, stored, end)
                    file.write(members)
                    end += len(members)
                    rows.append(row)
                    if chunk.split == "train":
                        sums.add(stored.pixels)
                    copied += stored.is_copied
                    if stored.window_use is not None:
                        window_use += stored.window_use
                images += 1
            except UnreadableImage as error:
                rejected.append(Rejected(candidate.key, str(error)))
            if (now := time.monotonic()) - told_at > SECONDS_BETWEEN_NEWS:
                advance(place + 1 - told)
                told, told_at = place + 1, now
        file.truncate(tar_size(end))
    advance(len(chunk.candidates) - told)
    if not rows:
        chunk.path.unlink()
    table = rows_table(rows, chunk.attributes)
    return Packed(chunk, table, rejected, sums.total(), copied, images, window_use)


class _RunningSums:
    """Sums over many images. Small ones are put together first: one by one, that takes longer than decoding them."""

    def __init__(self, channels: int):
        self._sums = PixelSums.of_none(channels)
        self._buffer = np.empty((PIXELS_AT_ONCE, channels), dtype=np.uint8)
        self._filled = 0

    def add(self, pixels: np.ndarray) -> None:
        """uint8 [H, W, C]"""
        flat = pixels.reshape(-1, pixels.shape[2])
        if self._filled + len(flat) > PIXELS_AT_ONCE:
            self._empty()
        if len(flat) > PIXELS_AT_ONCE:
            self._sums += PixelSums.of(flat)
            return
        self._buffer[self._filled : self._filled + len(flat)] = flat
        self._filled += len(flat)

    def total(self) -> PixelSums:
        """Of all images until now."""
        self._empty()
        return self._sums

    def _empty(self) -> None:
        self._sums += PixelSums.of(self._buffer[: self._filled])
        self._filled = 0


def _sample(chunk: Chunk, place: int, corner: Corner | None, stored: Stored, start: int) -> tuple[bytes, Row]:
    """A sample of the candidate at `place`: its part of the tar, which starts at `start`, and its row.

    A tile has its corner in the key, its image as group, and its image's attributes.
    """
    candidate, labels = chunk.candidates[place], chunk.labels[place]
    name, key, group = f"{chunk.first_number + place:09d}", candidate.key, candidate.group
    if corner is not None:
        name, key = f"{name}-{corner[0]}-{corner[1]}", f"{key}#{corner[0]},{corner[1]}"
        group = candidate.key if group is None else group
    label = labels[0] if len(labels) == 1 else NO_LABEL
    members = member(f"{name}.{stored.format}", stored.content)
    # As TarWriter sorts them: `cls` and `classes.json` come before the names of images.
    if label != NO_LABEL:
        members = member(f"{name}.cls", str(label).encode()) + members
    elif labels:
        members = member(f"{name}.classes.json", json.dumps(labels).encode()) + members
    size = len(stored.content)
    offset = start + len(members) - padded(size)
    height, width = stored.pixels.shape[:2]
    digest = xxhash.xxh3_64_intdigest(stored.content)
    place_in_tar = (chunk.path.name, key, offset, size, stored.format)
    return members, Row(chunk.split, *place_in_tar, label, labels, group, height, width, digest, candidate.attributes)


def _read(candidate: Candidate, root: Path | None) -> bytes:
    if isinstance(candidate.image, bytes):
        return candidate.image
    try:
        if not isinstance(candidate.image, str):
            return candidate.image.read()
        return _read_file(os.path.join(root or "", candidate.image))
    except OSError as error:
        raise UnreadableImage(f"{CANNOT_BE_OPENED}{error.strerror or error}") from error


def _read_file(path: str) -> bytes:
    """For small files in two thirds of the time that file objects take."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts = []
        while part := os.read(descriptor, BYTES_AT_ONCE if not parts else 16 * BYTES_AT_ONCE):
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)
