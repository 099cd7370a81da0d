"""Processes that share the work: how rank 0 tells the others what comes next, and their process group in a step.

Between steps the ranks are joined by a small store of keys alone, which they look at now and then: a step that rank 0
runs by itself may take hours. A process group is there only inside a step that all ranks run, so that nothing in the
other steps depends on the number of processes.
"""

import json
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from pipeline.errors import AlreadyTold, Interrupted, RankLost, UsageError
from pipeline.launcher import ALONE, Place

LOOK_SECONDS = 0.1
MEETING_SECONDS = 300.0
"""For all ranks to have started."""
BLAME_SECONDS = 2.0
"""Who lost another rank waits so long for better news of the cause: a launcher, or what that rank said itself."""
PARTING_SECONDS = 5.0
"""The store stays so long for others to leave."""
LOST_WORDS = re.compile(
    r"gloo|Connection (?:closed|reset|refused)|closed by peer|Broken pipe|Timed out waiting|pair closure|NCCL"
)


def patience() -> float:
    """Seconds that a rank waits for the others inside a step before it takes one for hung."""
    return float(os.environ.get("SIMCLR_RANK_TIMEOUT", "600"))


class Ranks:
    """This process among those that share the work.

    Args:
        place: where it stands.
        store: that all ranks see; none where this process is alone.
    """

    def __init__(self, place: Place = ALONE, store: distributed.Store | None = None):
        self.place, self.rank, self.size = place, place.rank, place.ranks
        self._shared = store
        self._messages = self._marks = self._groups = 0
        self._patience = patience()

    @property
    def _store(self) -> distributed.Store:
        assert self._shared is not None, "only one of several ranks has others to speak to"
        return self._shared

    def _ask(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Ask something of the store. Where its keeper was stopped that would wait for ever: this process ends then."""
        timer = threading.Timer(self._patience, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            return operation(*arguments)
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        """No exception, since the main thread waits in a library that knows no end."""
        told = (
            f"simclr: rank {self.rank} lost another: who keeps the place where the ranks meet does not answer for "
            f"{self._patience:g} seconds ($SIMCLR_RANK_TIMEOUT)\n"
        )
        os.write(2, told.encode())
        os._exit(RankLost.exit_code)

    # Between steps

    def tell(self, message: dict[str, Any] | None) -> None:
        """Rank 0 says what comes next; None: nothing more."""
        self._messages += 1
        self._ask(self._store.set, f"message/{self._messages}", json.dumps(message))

    def listen(self) -> dict[str, Any] | None:
        """What rank 0 says next, however long it takes."""
        self._messages += 1
        self._wait(f"message/{self._messages}")
        return json.loads(self._ask(self._store.get, f"message/{self._messages}"))

    def alone(self, work: Callable[[], None]) -> None:
        """Rank 0 does some work, the others wait until it is done, however long it takes."""
        self._marks += 1
        if self.rank == 0:
            work()
        if self.size > 1:
            self._point(f"mark/{self._marks}")

    def _point(self, key: str) -> None:
        if self.rank == 0:
            self._ask(self._store.set, key, "done")
        else:
            self._wait(key)

    def meet(self) -> None:
        """Rank 0 waits until all others have come here as well, which has to be soon."""
        self._marks += 1
        if self.rank > 0:
            self._ask(self._store.set, f"mark/{self._marks}/{self.rank}", "here")
        else:
            for rank in range(1, self.size):
                self._wait(f"mark/{self._marks}/{rank}", patience())

    def _wait(self, key: str, seconds: float | None = None) -> None:
        """Look for a key now and then.

        Raises:
            AlreadyTold: another rank failed meanwhile.
            RankLost: it took longer than `seconds`.
        """
        started = time.monotonic()
        while not self._ask(self._store.check, [key]):
            code = self._failure()
            if code is not None:
                raise AlreadyTold(code)
            if seconds is not None and time.monotonic() - started > seconds:
                raise RankLost(
                    f"rank {self.rank}: another rank does not answer for {seconds:g} seconds ($SIMCLR_RANK_TIMEOUT)"
                )
            time.sleep(LOOK_SECONDS)

    # Inside a step

    def device(self, step: str, wanted: str) -> torch.device:
        """Where this rank computes: a GPU of its own, or the CPU.

        Args:
            wanted: auto, cpu or cuda.

        Raises:
            UsageError: there is no such device, or one for only some ranks.
        """
        only_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        count = 0 if wanted == "cpu" or (wanted == "auto" and only_cpu) else torch.cuda.device_count()
        if wanted == "mps" or (wanted == "cuda" and count == 0):
            raise UsageError(f"{step}.device: {self.size} processes have no {wanted} device each here; cpu will do")
        if count == 0:
            return torch.device("cpu")
        # srun may show each rank one GPU, its own; elsewhere all ranks of a machine see the same ones.
        if count < self.place.local_ranks and self.place.launcher != "srun":
            raise UsageError(
                f"{step}.device: {self.place.local_ranks} processes and {count} GPU here: start {count}, or set the "
                "device to cpu"
            )
        return torch.device("cuda", self.place.local_rank % count)

    @contextmanager
    def group(self, device: torch.device) -> Iterator[None]:
        """A process group of all ranks: gloo for tensors on the CPU, NCCL for those on GPUs."""
        self._groups += 1
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=distributed.PrefixStore(f"group/{self._groups}", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=patience()),
        )
        threads = torch.get_num_threads()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, threads // self.place.local_ranks))
        try:
            with warnings.catch_warnings():
                # Of weights of 1x1 convolutions, whose strides have two spellings; and of an option that Accelerate
                # knows by its old name only.
                warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
                yield
        except Interrupted:  # all ranks stopped together; after an error one may be gone, and the process ends anyway
            distributed.destroy_process_group()
            raise
        finally:
            torch.set_num_threads(threads)
        distributed.destroy_process_group()

    @contextmanager
    def announced(self) -> Iterator[None]:
        """The environment as Accelerate reads it, which was taken out when the process began."""
        before = dict(os.environ)
        for name in before:
            # What its own settings say of precision, compilation or sharding is not the recipe's.
            if name.startswith("ACCELERATE_"):
                del os.environ[name]
        if self.size > 1:
            os.environ |= {
                "RANK": str(self.rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_RANK": str(self.place.local_rank),
                "LOCAL_WORLD_SIZE": str(self.place.local_ranks),
                "OMP_NUM_THREADS": str(torch.get_num_threads()),  # or it chooses a number itself, with a warning
            }
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def largest(self, value: int) -> int:
        """The largest of all ranks' values. Waits for no GPU."""
        if self.size == 1:
            return value
        shared = torch.tensor(value)
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        return int(shared)

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of each rank -> all of them in order of rank, on every rank; n may differ. Without gradient."""
        if self.size == 1:
            return rows
        shared = torch.zeros(self.size, dtype=torch.int64)
        shared[self.rank] = len(rows)
        distributed.all_reduce(shared)
        counts = shared.tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        gathered = padded.new_empty(self.size, *padded.shape)
        distributed.all_gather([*gathered.unbind()], padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    # The end

    def end(self) -> None:
        """All ranks leave. Rank 0, which may hold the store, is the last."""
        if self.rank == 0:
            self.tell(None)
        self.meet()

    def failed(self, error: BaseException) -> BaseException:
        """What this rank ends with: `error` if it is the first that failed, and otherwise a quiet end."""
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        ends: BaseException = error
        self._patience = min(self._patience, PARTING_SECONDS)  # whoever is waited for may hang
        try:
            if _lost(error):
                reason = str(error).strip().splitlines()[0]
                ends = error if isinstance(error, RankLost) else RankLost(f"rank {self.rank} lost another: {reason}")
                code = RankLost.exit_code
                self._look_for_the_cause()
            told = json.loads(self._ask(self._store.compare_set, "failure", "", json.dumps([self.rank, code])))
            if not _lost(error):
                self._leave()
        except RuntimeError:  # the store is gone, and with it the rank that held it
            stopped = isinstance(error, Interrupted | KeyboardInterrupt)
            return AlreadyTold(code) if stopped and self.rank > 0 else ends
        if told[0] == self.rank:
            return ends
        # A fault of ours is of that rank alone; to this one, a rank was lost.
        return AlreadyTold(RankLost.exit_code if told[1] == 1 else told[1])

    def _leave(self) -> None:
        """Rank 0, which may hold the store, lets the others leave first, if they come to it."""
        left, until = self._ask(self._store.add, "left", 1), time.monotonic() + PARTING_SECONDS
        while self.rank == 0 and left < self.size and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
            left = self._ask(self._store.add, "left", 0)

    def _look_for_the_cause(self) -> None:
        until = time.monotonic() + BLAME_SECONDS
        while self._failure() is None and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)

    def _failure(self) -> int | None:
        """The exit code of the first rank that failed."""
        if not self._ask(self._store.check, ["failure"]):
            return None
        return json.loads(self._ask(self._store.get, "failure"))[1]


def _lost(error: BaseException) -> bool:
    """Whether an error comes from the loss of another rank."""
    if isinstance(error, RankLost | distributed.DistError):
        return True
    return type(error) is RuntimeError and LOST_WORDS.search(str(error)) is not None


@contextmanager
def joined(place: Place) -> Iterator[Ranks]:
    """Take one's place among the ranks. Of errors on several of them, the first alone is raised as it is."""
    try:
        store = distributed.TCPStore(
            place.address,
            place.port,
            is_master=place.rank == 0 and not place.keeps_store,
            timeout=timedelta(seconds=MEETING_SECONDS),
            wait_for_workers=False,
        )
    except distributed.DistError as error:
        reason = str(error).splitlines()[0]
        where = f"{place.address}:{place.port}"
        raise RankLost(f"rank {place.rank} cannot meet the others at {where}: {reason}") from error
    ranks = Ranks(place, distributed.PrefixStore(f"simclr/{place.attempt}", store))
    try:
        yield ranks
        ranks.end()
    except BaseException as error:
        ends = ranks.failed(error)
        if ends is error:
            raise
        raise ends from error
