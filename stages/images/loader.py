"""Batches of a schedule, read ahead in the background."""

from concurrent.futures import Future, ThreadPoolExecutor

from stages.images.schedule import Schedule
from stages.images.shards import Batch, Shards


class BatchLoader:
    """This process's share of the batch of each step, read ahead by one step in a background thread.

    Of the global batch, process `rank` of `ranks` reads the `rank`-th of equal consecutive parts.

    Args:
        shards: one split.
        schedule: of the global batches; `ranks` divides their size.
        workers: threads that decode.
    """

    def __init__(self, shards: Shards, schedule: Schedule, workers: int = 1, rank: int = 0, ranks: int = 1):
        self._shards, self._schedule, self._workers = shards, schedule, workers
        self._rank, self._ranks = rank, ranks
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[Batch]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self._schedule.steps_per_epoch

    def load(self, step: int) -> Batch:
        """The batch of a global step, counted from 0 over all epochs."""
        ahead = self._ahead[1] if self._ahead is not None and self._ahead[0] == step else None
        batch = ahead.result() if ahead is not None else self._read(step)
        self._ahead = (step + 1, self._reader.submit(self._read, step + 1))
        return batch

    def close(self) -> None:
        """End the background reader."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, step: int) -> Batch:
        positions = self._schedule.positions(step)
        assert len(positions) % self._ranks == 0, "the settings were checked before"
        share = len(positions) // self._ranks
        return self._shards.batch(positions[self._rank * share : (self._rank + 1) * share], self._workers)
