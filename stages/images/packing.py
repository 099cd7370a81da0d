"""Candidates into WebDataset tars: one chunk of candidates is one tar, so that bytes do not depend on processes.

Several processes write parts of a tar, which are joined: a tar is its members, one after another.
"""

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from webdataset.writer import TarWriter

from stages.images.encode import Storage, Stored, encode_samples
from stages.images.index import NO_LABEL, Row, padded, rows_table, tar_size
from stages.images.reading import UnreadableImage, WindowUse
from stages.images.tiles import Corner
from stages.sources.candidates import SPLITS, Candidate

PROCESSES_FROM = 2_000
PROCESSES_FROM_BYTES = 100_000_000
"""Fewer images, of fewer bytes together, are packed before another process has started."""

CANNOT_BE_OPENED = "cannot be opened: "
NOT_THERE = CANNOT_BE_OPENED + os.strerror(errno.ENOENT)
"""Of reasons why an image is rejected, that of a file that does not exist."""

IMAGES_IN_PART = 100
"""What a process does at a time, at most."""


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
    """

    path: Path
    split: str
    first_number: int
    candidates: list[Candidate]
    labels: list[tuple[int, ...]]
    root: Path | None
    storage: Storage


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
        """Of one image, uint8 [H, W, C]."""
        flat = pixels.reshape(-1, pixels.shape[2])
        values, squares = np.zeros((2, pixels.shape[2]), dtype=np.int64)
        for start in range(0, len(flat), 2**20):  # in parts: int64 takes eight times the memory
            channels = flat[start : start + 2**20].T.astype(np.int64, order="C")
            values += channels.sum(axis=1)
            squares += np.einsum("cp,cp->c", channels, channels)
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
) -> list[Chunk]:
    """Cut the candidates, split by split, into the work of single tars in `folder`.

    Args:
        candidates: sorted by key.
        splits: of each candidate.
        classes: sorted names; a label is a position in them.
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
            chunks.append(Chunk(path, split, number, part, labels, root, storage))
            number += len(part)
    return chunks


def pack(chunks: Sequence[Chunk], workers: int, advance: Callable[[int], None]) -> Iterator[Packed]:
    """Write the tars of all chunks; yields what became of each, in order.

    Args:
        workers: processes; a small set is packed in this one.
        advance: called with the number of images done since the last call.
    """
    if workers > 1 and _is_large(chunks):
        return _pack_in_processes(chunks, workers, advance)
    return (pack_chunk(chunk, advance) for chunk in chunks)


def pack_chunk(chunk: Chunk, advance: Callable[[int], None]) -> Packed:
    """Write one tar, or none where no image can be read."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    sums = PixelSums.of_none(chunk.storage.channels)
    window_use = WindowUse()
    images = copied = 0
    # A fixed time (TarWriter's owners are fixed): equal samples give equal bytes.
    with (
        chunk.path.open("wb") as file,
        TarWriter(file, encoder=False, compress=False, mtime=0) as writer,
    ):
        for place, candidate in enumerate(chunk.candidates):
            try:
                for corner, stored in encode_samples(_read(candidate, chunk.root), chunk.storage):
                    rows.append(_write(writer, chunk, place, corner, stored))
                    if chunk.split == "train":
                        sums += PixelSums.of(stored.pixels)
                    copied += stored.is_copied
                    window_use += stored.window_use or WindowUse()
                images += 1
            except UnreadableImage as error:
                rejected.append(Rejected(candidate.key, str(error)))
            advance(1)
    if not rows:
        chunk.path.unlink()
    return Packed(chunk, rows_table(rows), rejected, sums, copied, images, window_use)


def _write(writer: TarWriter, chunk: Chunk, place: int, corner: Corner | None, stored: Stored) -> Row:
    """Write a sample of the candidate at `place`; its row. A tile has its corner in the key and its image as group."""
    candidate, labels = chunk.candidates[place], chunk.labels[place]
    name, key, group = f"{chunk.first_number + place:09d}", candidate.key, candidate.group
    if corner is not None:
        name, key = f"{name}-{corner[0]}-{corner[1]}", f"{key}#{corner[0]},{corner[1]}"
        group = candidate.key if group is None else group
    sample = {"__key__": name, stored.format: stored.content}
    label = labels[0] if len(labels) == 1 else NO_LABEL
    if label != NO_LABEL:
        sample["cls"] = str(label).encode()
    elif labels:
        sample["classes.json"] = json.dumps(labels).encode()
    writer.write(sample)
    size = len(stored.content)
    # `cls` and `classes.json` come before the names of images, so the image is the last that was written.
    offset = writer.tarstream.offset - padded(size)
    height, width = stored.pixels.shape[:2]
    digest = xxhash.xxh3_64_intdigest(stored.content)
    place_in_tar = (chunk.path.name, key, offset, size, stored.format)
    return Row(chunk.split, *place_in_tar, label, labels, group, height, width, digest)


def _read(candidate: Candidate, root: Path | None) -> bytes:
    if isinstance(candidate.image, bytes):
        return candidate.image
    try:
        if not isinstance(candidate.image, str):
            return candidate.image.read()
        with open(os.path.join(root or "", candidate.image), "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(f"{CANNOT_BE_OPENED}{error.strerror or error}") from error


# Several processes


def _is_large(chunks: Sequence[Chunk]) -> bool:
    """Whether packing takes long enough for processes to be started."""
    if sum(len(chunk.candidates) for chunk in chunks) >= PROCESSES_FROM:
        return True
    sizes = [_size(candidate, chunk.root) for chunk in chunks for candidate in chunk.candidates]
    return len(sizes) > 1 and sum(sizes) >= PROCESSES_FROM_BYTES


def _size(candidate: Candidate, root: Path | None) -> int:
    if isinstance(candidate.image, bytes):
        return len(candidate.image)
    if not isinstance(candidate.image, str):
        return candidate.image.size_bytes
    try:
        return os.stat(os.path.join(root or "", candidate.image)).st_size
    except OSError:
        return 0


def cut(chunk: Chunk, length: int) -> list[Chunk]:
    """The work of a tar as that of parts of `length` images, in files beside it."""
    return [
        replace(
            chunk,
            path=chunk.path.with_name(f"{chunk.path.name}.{start}"),
            first_number=chunk.first_number + start,
            candidates=chunk.candidates[start : start + length],
            labels=chunk.labels[start : start + length],
        )
        for start in range(0, len(chunk.candidates), length)
    ]


def join(chunk: Chunk, parts: Sequence[Packed]) -> Packed:
    """One tar of its parts, which are deleted: byte for byte what `pack_chunk` writes."""
    tables = [rows_table([])]
    end = 0
    with chunk.path.open("wb") as whole:
        for part in parts:
            rows = part.rows
            if not rows.num_rows:
                continue
            with part.chunk.path.open("rb") as file:
                shutil.copyfileobj(file, whole, 2**20)
            part.chunk.path.unlink()
            columns = {
                "shard": pa.array([chunk.path.name] * len(rows)),
                "offset": pa.array(rows["offset"].to_numpy() + end),
            }
            tables.append(pa.table({name: columns.get(name, rows[name]) for name in rows.column_names}))
            end += rows["offset"][-1].as_py() + padded(rows["size"][-1].as_py())
            whole.seek(end)  # over the empty blocks that end the part
        whole.truncate(tar_size(end, 0))
    if not end:
        chunk.path.unlink()
    return Packed(
        chunk,
        pa.concat_tables(tables).combine_chunks(),
        [image for part in parts for image in part.rejected],
        sum((part.sums for part in parts), PixelSums()),
        sum(part.copied for part in parts),
        sum(part.images for part in parts),
        sum((part.window_use for part in parts), WindowUse()),
    )


STOPPED = -1
_progress: "Synchronized[int] | None" = None  # in a worker process: images done, or STOPPED


def _pack_in_processes(chunks: Sequence[Chunk], workers: int, advance: Callable[[int], None]) -> Iterator[Packed]:
    context = multiprocessing.get_context("spawn")
    progress = context.Value("q", 0)
    shown = 0
    # Where images are few and large, in parts so short that all processes have work until the end.
    length = min(IMAGES_IN_PART, math.ceil(sum(len(chunk.candidates) for chunk in chunks) / (4 * workers)))
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(progress,))
    try:
        pending = deque(
            (chunk, [executor.submit(_pack_in_worker, part) for part in cut(chunk, length)]) for chunk in chunks
        )
        while pending:
            chunk, parts = pending.popleft()
            while wait(parts, timeout=0.2).not_done:
                done = progress.value
                advance(done - shown)
                shown = done
            yield join(chunk, [part.result() for part in parts])
        advance(progress.value - shown)
    finally:
        with progress.get_lock():
            progress.value = STOPPED
        executor.shutdown(cancel_futures=True)


def _start_worker(progress: "Synchronized[int]") -> None:
    global _progress
    _progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well, and says when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is killed: waiting for work, it would stay for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _pack_in_worker(chunk: Chunk) -> Packed:
    return pack_chunk(chunk, _advance_in_worker)


def _advance_in_worker(count: int) -> None:
    assert _progress is not None
    with _progress.get_lock():
        if _progress.value == STOPPED:
            raise InterruptedError("packing was stopped")
        _progress.value += count
