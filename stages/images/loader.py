"""Batches of a schedule, read ahead in the background into memory that is used again; small sets stay decoded."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from stages.images.schedule import Schedule
from stages.images.shards import Batch, Shards

RING = 3
"""Batches in memory: the one that is being read, the one that was handed out last, and the one before that."""

SHARE_OF_MEMORY = 0.25
"""Of what is free: a set that takes no more than that decoded is kept."""


class BatchLoader:
    """This process's share of the batch of each step, read ahead by one step in a background thread.

    Of the global batch, process `rank` of `ranks` reads the `rank`-th of equal consecutive parts.

    The images of a batch lie in a ring of RING parts of memory: they hold until `load` is called for the second time
    after the call that gave them, and who wants them for longer copies them. Copies to a GPU that do not block may be
    under way still: the ring is pinned then, and nothing is written over before those are done that were given to the
    current stream of the current device, between the call that gave a batch and the next, in the thread that calls.

    A set whose decoded images take at most a quarter of the memory that is free stays in it: each image is read and
    decoded once, and its batches are the same to the bit. `description` says what was chosen.
    """

    def __init__(
        self,
        shards: Shards,
        schedule: Schedule,
        workers: int = 1,
        rank: int = 0,
        ranks: int = 1,
        *,
        least_side: int | None = None,
        free_bytes: int | None = None,
    ):
        """Args:
        shards: one split.
        schedule: of the global batches; `ranks` divides their size.
        workers: threads that decode.
        least_side: see `Shards.batch` and `least_side_for`; None decodes whole.
        free_bytes: of memory; None asks the system.
        """
        self._shards, self._schedule, self._workers = shards, schedule, workers
        self._rank, self._ranks, self._least_side = rank, ranks, least_side
        self._image_shape = (*shards.canvas_at(least_side), shards.channels)
        self._ring: list[np.ndarray] = []
        self._copied: list[torch.cuda.Event | None] = [None] * RING
        self._turn = 0  # the part of the ring that the next batch is read into
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[Batch]] | None = None
        free_bytes = _free_bytes() if free_bytes is None else free_bytes
        self._set_bytes = len(shards) * math.prod(self._image_shape)
        self._most_bytes = int(SHARE_OF_MEMORY * free_bytes / ranks)  # as if all ranks shared one machine
        self._is_kept = self._set_bytes <= self._most_bytes
        # Memory that the system gives only once it is written to.
        self._kept = np.empty((len(shards) if self._is_kept else 0, *self._image_shape), dtype=np.uint8)
        self._is_there = np.zeros(len(self._kept), dtype=bool)

    @property
    def steps_per_epoch(self) -> int:
        return self._schedule.steps_per_epoch

    @property
    def description(self) -> str:
        """For the log: whether images stay decoded in memory, and at which scale they are decoded."""
        height, width, _ = self._image_shape
        what = f"{len(self._shards):,} images on a canvas of {width} x {height} take {_in_words(self._set_bytes)}"
        most = f"a quarter of the memory that is free, {_in_words(self._most_bytes)}"
        kept = f"stay decoded: at most {most}" if self._is_kept else f"are decoded each time: more than {most}"
        scale = f"; JPEGs are decoded at 1/2, 1/4 or 1/8, to a short side of {self._least_side} at least"
        return f"{what} and {kept}{scale if self._shards.is_scaled_at(self._least_side) else ''}"

    def load(self, step: int) -> Batch:
        """The batch of a global step, counted from 0 over all epochs."""
        self._mark_copies()
        if self._ahead is None or self._ahead[0] != step:
            self._read_ahead(step)  # behind what may still be read for another step, and over it
        assert self._ahead is not None
        batch = self._ahead[1].result()
        self._turn = (self._turn + 1) % RING
        self._read_ahead(step + 1)
        return batch

    def close(self) -> None:
        """End the background reader."""
        self._reader.shutdown(cancel_futures=True)

    def _read_ahead(self, step: int) -> None:
        self._ahead = step, self._reader.submit(self._read, step, self._turn)

    def _read(self, step: int, turn: int) -> Batch:
        positions = self._schedule.positions(step)
        assert len(positions) % self._ranks == 0, "the settings were checked before"
        share = len(positions) // self._ranks
        positions = positions[self._rank * share : (self._rank + 1) * share]
        images = self._memory(turn, share)
        return self._from_kept(positions, images) if self._is_kept else self._decode(positions, images)

    def _decode(self, positions: np.ndarray, images: np.ndarray) -> Batch:
        return self._shards.batch(positions, self._workers, self._least_side, images)

    def _from_kept(self, positions: np.ndarray, images: np.ndarray) -> Batch:
        """Decode what is not there yet and keep it, then copy all."""
        missing = positions[~self._is_there[positions]]
        if len(missing):
            missing = np.unique(missing)  # a batch may have an image several times
            self._decode(missing, images)
            self._kept[missing] = images[: len(missing)]
            self._is_there[missing] = True
        np.take(self._kept, positions, axis=0, out=images, mode="clip")  # `raise` copies once more
        return self._shards.as_batch(images, positions, self._least_side)

    def _memory(self, turn: int, length: int) -> np.ndarray:
        """A part of the ring, uint8 [length, H, W, C], that no copy is under way from."""
        if not self._ring or len(self._ring[0]) < length:
            shape = (length, *self._image_shape)
            is_pinned = torch.cuda.is_available()
            self._ring = [torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned).numpy() for _ in range(RING)]
        copied = self._copied[turn]
        if copied is not None:
            copied.synchronize()
        return self._ring[turn][:length]

    def _mark_copies(self) -> None:
        """Remember when what the GPU was given until now is done: copies of the batch handed out last among it."""
        if torch.cuda.is_available():
            event = torch.cuda.Event()
            event.record()
            self._copied[(self._turn - 1) % RING] = event


def least_side_for(image_size: int, crop_area: tuple[float, float], crop_ratio: tuple[float, float]) -> int:
    """The shorter side of an image of which no crop is smaller than the view: `least_side` of a loader.

    Args:
        image_size: of a view, in pixels.
        crop_area: share of the image's area that a crop covers, [smallest, largest].
        crop_ratio: width / height of a crop, [smallest, largest].

    Returns:
        pixels. The shorter side of a crop of area a and ratio r <= 1 of an image of sides s <= t is sqrt(a r s t), at
        least s sqrt(a r), rounded; of the central crop that is taken where none fits, at least s r.
    """
    ratio = min(crop_ratio[0], 1 / crop_ratio[1], 1)
    return math.ceil((image_size + 0.5) / min(math.sqrt(crop_area[0] * ratio), ratio))


def _free_bytes() -> int:
    """Of memory, for this process: what the system has (Linux), and what its control group may take (cgroup v2).

    0 where the system does not say.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
    try:
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, min(free, most - used + int(statistics["inactive_file"])))  # files are given up when need be
    except (OSError, ValueError, KeyError):  # no group, or `max`: no limit
        return free


def _in_words(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
