"""What the forked process of a trial does before its command: notes what a test wants to know, or the trial's work."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from faults.savers import load_with_accelerate, save_ours, save_with_accelerate
from pipeline import failpoints, workplace
from pipeline.store import Store
from pipeline.training import Training
from pipeline.workplace import Workplace

__all__ = ["load_with_accelerate", "log_points", "log_samples", "save_ours", "save_with_accelerate", "wrap"]


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a function by `around(the function, its arguments ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: around(original, *arguments, **named))


def log_points(path: str) -> None:
    """A line in a file for each failpoint that is reached."""
    descriptor = _open(path)

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is failpoints.reach.__code__:
            os.write(descriptor, frame.f_locals["name"].encode() + b"\n")

    sys.setprofile(look)


def log_samples(path: str) -> None:
    """A line in a file for each step of training that is taken: [process, step, ids of the samples]."""
    descriptor = _open(path)

    def watched(original: Any, self: Training, loss: Tensor, gradient_norm: Tensor, **captured: Tensor) -> bool:
        accepted = original(self, loss, gradient_norm, **captured)
        if accepted:
            line = json.dumps([os.getpid(), self.done, captured["sample_ids"].tolist()])
            os.write(descriptor, line.encode() + b"\n")
        return accepted

    wrap(Training, "accepts", watched)


def with_free_bytes(size_bytes: int) -> None:
    """The system says that so much of every disk is free."""
    wrap(shutil, "disk_usage", lambda original, path: original(path)._replace(free=size_bytes))


# Several processes at one step


def without_leases() -> None:
    """As on a file system that grants every lock."""

    @contextmanager
    def held(self: Workplace) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        yield

    Workplace.held = held


def with_own_bytes() -> None:
    """Leases hold nobody back, and what a step writes differs from one process to the next."""
    without_leases()

    def published(original: Any, self: Store, folder: Path, stage: str) -> tuple[str, int]:
        (folder / "files" / "process.txt").write_text(str(os.getpid()))
        return original(self, folder, stage)

    wrap(Store, "publish", published)


def overtaken(lease_seconds: float, path: str) -> None:
    """A lease that runs out soon; and a line in a file for each step of training, as of `log_samples`."""
    workplace.LEASE_SECONDS = lease_seconds
    log_samples(path)


def on_another_machine(lease_seconds: float) -> None:
    """A process that cannot see whether one of this machine is alive."""
    workplace.LEASE_SECONDS = lease_seconds
    socket.gethostname = lambda: "elsewhere"


def _open(path: str) -> int:
    return os.open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
