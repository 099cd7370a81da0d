"""Global batches of a training run, in keyed order, read ahead in the background."""

from concurrent.futures import Future, ThreadPoolExecutor

from stages.images.order import order
from stages.images.shards import Batch, Shards


class BatchLoader:
    """The batch of any global step: which samples it holds is a pure function of (seed, step, length, batch size).

    An epoch is floor(length / batch_size) batches of a keyed permutation; what is left over is another part of the
    images in every epoch. The batch after the one that was asked for is read in the background.

    Args:
        shards: one split.
        seed: of the run.
        batch_size: images in a global batch, at most `len(shards)`.
        workers: threads that decode.
    """

    def __init__(self, shards: Shards, seed: int, batch_size: int, workers: int = 1):
        if not 1 <= batch_size <= len(shards):
            raise ValueError(f"batch_size must be 1 to {len(shards)}, the number of images, not {batch_size}")
        self._shards, self._seed, self._batch_size, self._workers = shards, seed, batch_size, workers
        self.steps_per_epoch = len(shards) // batch_size
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[Batch]] | None = None

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
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self._batch_size
        positions = order(self._seed, epoch, len(self._shards))[first : first + self._batch_size]
        return self._shards.batch(positions, self._workers)
