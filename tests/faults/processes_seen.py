"""What a command has started, and what is left of it."""

import time
from collections.abc import Callable
from pathlib import Path

from faults.zygote import WAIT, Trial

SHARED_MEMORY = Path("/dev/shm")


def descendants(pid: int) -> list[int]:
    """All processes that a process has started, and those that these have, while they live."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = [int(child) for child in children.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
        for child in below:
            found += [child, *descendants(child)]
    return found


def command_of(pid: int) -> str:
    """Its command line; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def state_of(pid: int) -> str:
    """The system's letter for what a process does: R runs, S sleeps, T is stopped, Z waits to be collected; "" once it
    is gone.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: int) -> bool:
    """Whether a process runs or is stopped: neither gone nor waiting to be collected."""
    return state_of(pid) not in ("", "Z", "X")


def wait_until_stopped(trial: Trial) -> None:
    """Until a failpoint or a signal has stopped it.

    Raises:
        AssertionError: it ended instead.
    """
    while trial.is_running():
        if state_of(trial.pid) == "T":
            return
        time.sleep(WAIT)
    raise AssertionError(f"it ended with {trial.code} before it was stopped: {trial.said}")


def shared_memory_of(user: int) -> set[str]:
    """Names of what multiprocessing keeps there."""
    names = set()
    for path in SHARED_MEMORY.iterdir():
        try:
            is_ours = path.stat().st_uid == user
        except FileNotFoundError:
            continue
        if is_ours and path.name.startswith(("sem.mp-", "psm_", "pym-", "torch_")):
            names.add(path.name)
    return names


def wait_until(what: Callable[[], bool], seconds: float, told: str = "") -> float:
    """Seconds until something is so.

    Raises:
        TimeoutError: it is not within `seconds`.
    """
    started = time.monotonic()
    while not what():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"not within {seconds} s: {told}")
        time.sleep(0.01)
    return time.monotonic() - started
