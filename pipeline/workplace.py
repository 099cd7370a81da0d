"""The one mutable folder of a step: its lease, the log of attempts, its checkpoints, and a private place an attempt.

    work/<stage>/<key>/
      lease                 who is at the step; saves wasted work, nothing more
      attempts.jsonl        what each attempt began with, reached and came to
      timing.jsonl          rates and clocks
      checkpoints/          of a training loop
      quarantine/           those that were damaged
      not-finite/           batches whose loss or gradient was not finite; they stay when the step is finished
      out.tmp-<token>/      what one attempt writes: files/ (what becomes the artifact), metrics.jsonl

What two attempts would spoil for one another is private to each. Where a lease does not hold (some network file systems
grant a lock to everybody, and a suspended machine wakes up after its lease ran out) both go on with whole files: what
they share is only ever appended to by the line, or appears by a rename.
"""

import errno
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout

from pipeline.errors import Held
from pipeline.failpoints import reach
from pipeline.manifest import FILES, canonical_json, delete
from pipeline.processes import may_be_alive, this_process
from pipeline.resources import suppress_full_disk

LEASE_SECONDS = 30.0
UNWRITTEN_SECONDS = 3.0
"""A lease that says nothing for so long is of a process that was killed as it took it."""
UNWRITTEN_LOOK_SECONDS = 0.05
LOOK_SECONDS = 1.0
"""Between two looks at the lease within a training loop."""
PRIVATE = "out.tmp-"
LOG = "attempts.jsonl"


class Workplace:
    """One attempt's view of the folder.

    Attributes:
        folder: work/<stage>/<key>.
        token: of this attempt; distinct wherever the folder is seen from.
        private: what this attempt alone writes to.
    """

    def __init__(self, folder: Path, checkpoints: Path | None = None):
        """Args:
        checkpoints: where they lie, if not in the folder: of another rank than 0, which has a folder of its own.
        """
        self.folder = folder
        self.token = f"{this_process()}-{secrets.token_hex(4)}"
        self.private = folder / f"{PRIVATE}{self.token}"
        self.checkpoints = checkpoints or folder / "checkpoints"
        self.quarantine = self.checkpoints.with_name("quarantine")
        self.not_finite = self.checkpoints.with_name("not-finite")
        self._lease: SoftFileLease | None = None
        self._looked = 0.0
        self._events: list[dict[str, Any]] = []

    @property
    def timing(self) -> Path:
        """Rates and clocks, a line each."""
        return self.folder / "timing.jsonl"

    @property
    def out(self) -> Path:
        """What becomes the artifact: a folder with files/."""
        return self.private / "out"

    # Who is at the step

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lease.

        Raises:
            Held: another process does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "lease"
        _remove_unwritten(path)
        holder = self._holder()
        # A dead holder on this machine is recognised at once; one elsewhere, only by its silence.
        if holder is None or f"host={socket.gethostname()}\n" in holder:
            patience = 0.0
        else:
            patience = LEASE_SECONDS + 5 if "host=" in holder else UNWRITTEN_SECONDS
        self._lease = SoftFileLease(path, lease_duration=LEASE_SECONDS, timeout=patience)
        try:
            self._lease.acquire()
        except Timeout as error:
            raise Held(f"another process is at this step ({_in_words(holder or '')}); lease {path}") from error
        try:
            yield
        finally:
            self._lease.release()
            with suppress(OSError):  # it is not empty: the step goes on another time
                self.folder.rmdir()

    def require_held(self, *, now: bool = True) -> None:
        """Stop where another has taken over: this process was silent for so long that it was taken for dead.

        Args:
            now: look, even if that was done a moment ago.

        Raises:
            Held: names the other.
        """
        moment = time.monotonic()
        if self._lease is None or (not now and moment - self._looked < LOOK_SECONDS):
            return
        self._looked = moment
        holder = self._holder() or ""
        if f"token={self._lease.token}\n" not in holder:
            raise Held(
                f"another process has taken over this step ({_in_words(holder)}), since nothing was heard of this one "
                f"for {LEASE_SECONDS:g} seconds; what it does goes on from the last checkpoint"
            )

    def _holder(self) -> str | None:
        """What the lease says; None where there is none."""
        try:
            return (self.folder / "lease").read_text(errors="replace")
        except OSError:
            return None

    # What is written

    def begin(self, *, fresh: bool) -> None:
        """Make the private folder. What dead attempts left is deleted, and checkpoints if `fresh`."""
        if fresh:
            self.log("fresh")
            for path in (self.checkpoints, self.quarantine):
                delete(path)
        for left in self.folder.glob(f"{PRIVATE}*"):
            if not may_be_alive(left.name.removeprefix(PRIVATE)):
                shutil.rmtree(left, ignore_errors=True)
        (self.out / FILES).mkdir(parents=True)
        reach("attempt.begun")

    def log(self, event: str, **values: Any) -> None:
        """A line in attempts.jsonl; it is known here all the same where the disk is full, or another was at the step as
        well and has cleared it away.
        """
        line = {"event": event, "attempt": self.token, "at": time.time()} | values
        self._events.append(line)
        with suppress_full_disk(), suppress(FileNotFoundError):
            append_line(self.folder / LOG, line)

    def clock(self, values: Mapping[str, Any]) -> None:
        """A line in timing.jsonl, if there is space."""
        with suppress_full_disk(), suppress(FileNotFoundError):
            append_line(self.timing, dict(values) | {"at": time.time()})

    def attempts(self) -> list[dict[str, Any]]:
        """One entry an attempt from the log; one that was killed lasted at least until it was last heard of."""
        attempts: dict[str, dict[str, Any]] = {}
        for logged in [*self._events_of_others(), *self._events]:
            event = dict(logged)
            kind, token = event.pop("event"), event.pop("attempt")
            if kind == "start":
                blank = {"first_step": None, "last_checkpoint": None, "ended": "killed", "seconds": 0.0}
                attempts[token] = event | blank
                continue
            attempt = attempts.get(token)
            if attempt is None:  # its first line is gone with a finished step's folder
                continue
            attempt["seconds"] = event["at"] - attempt["at"]
            if kind == "training":
                attempt["first_step"] = event["first_step"]
            elif kind == "checkpoint":
                attempt["last_checkpoint"] = event["step"]
            else:
                attempt |= {"ended": event["ended"], "peak_memory_bytes": event.get("peak_memory_bytes")}
        return [*attempts.values()]

    def last_checkpoint(self) -> int:
        """The step of the newest checkpoint that there should be by the log, 0 if there should be none."""
        step = 0
        for event in [*self._events_of_others(), *self._events]:
            kind = event["event"]
            if kind == "fresh":
                step = 0
            elif kind == "training":  # perhaps with an older one, after damage that was told
                step = event["first_step"]
            elif kind == "checkpoint":
                step = event["step"]
        return step

    def _events_of_others(self) -> Iterator[dict[str, Any]]:
        try:
            lines = (self.folder / LOG).read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:  # the machine stopped within it
                continue
            if event.get("attempt") not in (self.token, None):
                yield event

    def leave(self) -> None:
        """Delete what this attempt wrote and did not publish."""
        shutil.rmtree(self.private, ignore_errors=True)

    def clear(self) -> None:
        """Empty a finished step's folder, but for the lease, which is still held, and what others are at."""
        reach("work.clear")
        # The log first: without the checkpoints that it tells of, they would be missed.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name != LOG):
            is_private = path.name.startswith(PRIVATE)
            if path == self.not_finite or path.name.startswith("lease"):
                continue
            if is_private and path != self.private and may_be_alive(path.name.removeprefix(PRIVATE)):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        reach("work.cleared")


def _remove_unwritten(path: Path) -> None:
    """Delete a lease whose holder was killed between making the file and writing to it: filelock never does."""
    end, seen = time.monotonic() + UNWRITTEN_SECONDS, None
    while time.monotonic() < end:
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        if status.st_size or seen not in (None, status.st_ino):
            return
        seen = status.st_ino
        time.sleep(UNWRITTEN_LOOK_SECONDS)
    path.unlink(missing_ok=True)


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one line of JSON, all of it or nothing: a disk that fills up leaves no half line behind."""
    line = canonical_json(entry) + b"\n"
    with path.open("ab", buffering=0) as file:
        whole = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(whole)
            raise


def _in_words(holder: str) -> str:
    return ", ".join(line for line in holder.splitlines() if line.startswith(("pid=", "host="))) or "it has just begun"
