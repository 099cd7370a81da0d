"""Packing by several processes: they write parts of a tar, which are joined, since a tar is its members, one by one.

What is written is the same, byte for byte, however many there are.
"""

import ctypes
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from stages.images.index import rows_table
from stages.images.packing import Chunk, Packed, PixelSums, pack_chunk
from stages.images.reading import WindowUse
from stages.images.tar import padded, tar_size
from stages.sources.candidates import Candidate

PROCESSES_FROM = 20_000
PROCESSES_FROM_BYTES = 50_000_000
"""Fewer images, of fewer bytes together, are packed before another process has started."""

PARTS_PER_PROCESS = 32
"""What a set is cut into, so that all processes have work until the end; no part is more than a tar."""

WORKS_AHEAD = 4
"""Parts for each process, in work or waiting: what is sent does not grow with the number of images."""


def pack(chunks: Sequence[Chunk], workers: int, advance: Callable[[int], None]) -> Iterator[Packed]:
    """Write the tars of all chunks; yields what became of each, in order.

    Args:
        workers: processes, this one among them; a small set is packed in this one alone.
        advance: called with the number of images done since the last call.
    """
    if workers > 1 and _is_large(chunks):
        return _pack_in_processes(chunks, workers, advance)
    return (pack_chunk(chunk, advance) for chunk in chunks)


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
    tables = [rows_table([], chunk.attributes)]
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


class _Shared(NamedTuple):
    """What this process and the others tell one another. Nobody waits for the lock here: one that is killed keeps it.

    Attributes:
        progress: images that the others have done.
        stopped: 1 once they are to leave off.
    """

    progress: "Synchronized[int]"
    stopped: "ctypes.c_byte"


_shared: _Shared | None = None  # in a worker process


def _pack_in_processes(chunks: Sequence[Chunk], workers: int, advance: Callable[[int], None]) -> Iterator[Packed]:
    """The others take parts of tars from the front, this process from the back of the first tar that is not done.

    It works while they start, and a set of small images is often packed by then.
    """
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Value("q", 0), context.RawValue("b", 0))
    shown = 0

    def show(own: int) -> None:
        nonlocal shown
        done = shared.progress.get_obj().value
        advance(own + done - shown)
        shown = done

    length = math.ceil(sum(len(chunk.candidates) for chunk in chunks) / (PARTS_PER_PROCESS * workers))
    executor = ProcessPoolExecutor(workers - 1, context, initializer=_start_worker, initargs=(shared,))
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
        shared.stopped.value = 1
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
    fields = [(one.key, one.image, one.split, one.labels, one.group, one.attributes) for one in part.candidates]
    return replace(part, candidates=[]), fields


def _start_worker(shared: _Shared) -> None:
    global _shared
    _shared = shared
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
    assert _shared is not None
    if _shared.stopped.value:
        raise InterruptedError("packing was stopped")
    with _shared.progress.get_lock():
        _shared.progress.value += count
