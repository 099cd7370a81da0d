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
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from stages.images.encode import Storage, Stored, encode_samples
from stages.images.index import NO_LABEL, Row, rows_table
from stages.images.reading import UnreadableImage, WindowUse
from stages.images.tar import member, padded, tar_size
from stages.images.tiles import Corner
from stages.sources.candidates import SPLITS, Candidate

PROCESSES_FROM = 20_000
PROCESSES_FROM_BYTES = 50_000_000
"""Fewer images, of fewer bytes together, are packed before another process has started."""

CANNOT_BE_OPENED = "cannot be opened: "
NOT_THERE = CANNOT_BE_OPENED + os.strerror(errno.ENOENT)
"""Of reasons why an image is rejected, that of a file that does not exist."""

PARTS_PER_PROCESS = 32
"""What a set is cut into, so that all processes have work until the end; no part is more than a tar."""

WORKS_AHEAD = 4
"""Parts for each process, in work or waiting: what is sent does not grow with the number of images."""

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
        workers: processes, this one among them; a small set is packed in this one alone.
        advance: called with the number of images done since the last call.
    """
    if workers > 1 and _is_large(chunks):
        return _pack_in_processes(chunks, workers, advance)
    return (pack_chunk(chunk, advance) for chunk in chunks)


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
    return Packed(chunk, rows_table(rows), rejected, sums.total(), copied, images, window_use)


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

    A tile has its corner in the key and its image as group.
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
    return members, Row(chunk.split, *place_in_tar, label, labels, group, height, width, digest)


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
    """The work of a tar as that of parts of up to `length` images, in files beside it where they are several."""
    if len(chunk.candidates) <= length:
        return [chunk]
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
    if [part.chunk for part in parts] == [chunk]:
        return parts[0]
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
        whole.truncate(tar_size(end))
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
    """The others take parts of tars from the front, this process from the back of the first tar that is not done.

    It works while they start, and a set of small images is often packed by then.
    """
    context = multiprocessing.get_context("spawn")
    progress = context.Value("q", 0)
    shown = 0

    def show(own: int) -> None:
        nonlocal shown
        done = progress.value
        advance(own + done - shown)
        shown = done

    length = math.ceil(sum(len(chunk.candidates) for chunk in chunks) / (PARTS_PER_PROCESS * workers))
    executor = ProcessPoolExecutor(workers - 1, context, initializer=_start_worker, initargs=(progress,))
    pending: deque[tuple[Chunk, list[_Work]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, [_Work.submit(executor, part) for part in cut(chunk, length)]))
            while sum(not work.is_done for _, works in pending for work in works) >= WORKS_AHEAD * workers:
                _work_on(pending, show)
                yield from _join_first(pending)
        while pending:
            _work_on(pending, show)
            yield from _join_first(pending)
        show(0)
    finally:
        with progress.get_lock():
            progress.value = STOPPED
        executor.shutdown(cancel_futures=True)


@dataclass
class _Work:
    """A part of a tar, which another process does unless this one takes it back."""

    part: Chunk
    future: "Future[Packed]"
    result: Packed | None = None

    @classmethod
    def submit(cls, executor: ProcessPoolExecutor, part: Chunk) -> "_Work":
        return cls(part, executor.submit(_pack_in_worker, *_to_send(part)))

    @property
    def is_done(self) -> bool:
        return self.result is not None or (self.future.done() and not self.future.cancelled())

    def take_back(self) -> bool:
        """Whether no process has begun with it; from then on none will."""
        return self.result is None and self.future.cancel()

    def packed(self) -> Packed:
        return self.result or replace(self.future.result(), chunk=self.part)


def _work_on(pending: Iterable[tuple[Chunk, list[_Work]]], show: Callable[[int], None]) -> None:
    """Do a part that no process has begun with, or wait a little where there is none."""
    own = next((work for _, works in pending for work in reversed(works) if work.take_back()), None)
    if own is not None:
        own.result = pack_chunk(own.part, show)
    else:
        first = next((work.future for _, works in pending for work in works if not work.is_done), None)
        wait([first] if first is not None else [], timeout=0.2)
    show(0)


def _join_first(pending: deque[tuple[Chunk, list[_Work]]]) -> Iterator[Packed]:
    """The tars that are done, up to the first that is not."""
    while pending and all(work.is_done for work in pending[0][1]):
        chunk, works = pending.popleft()
        yield join(chunk, [work.packed() for work in works])


def _to_send(part: Chunk) -> tuple[Chunk, list[tuple[Any, ...]]]:
    """A part and the fields of its candidates: frozen dataclasses take as long to pickle as an image to decode."""
    fields = [(one.key, one.image, one.split, one.labels, one.group) for one in part.candidates]
    return replace(part, candidates=[]), fields


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


def _pack_in_worker(part: Chunk, candidates: list[tuple[Any, ...]]) -> Packed:
    packed = pack_chunk(replace(part, candidates=[Candidate(*fields) for fields in candidates]), _advance_in_worker)
    return replace(packed, chunk=part)


def _advance_in_worker(count: int) -> None:
    assert _progress is not None
    with _progress.get_lock():
        if _progress.value == STOPPED:
            raise InterruptedError("packing was stopped")
        _progress.value += count
