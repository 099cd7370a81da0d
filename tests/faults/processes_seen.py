"""What a command has started, and what is left of it."""

import time
from collections.abc import Callable
from pathlib import Path

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


def is_alive(pid: int) -> bool:
    """Whether a process runs or is stopped: neither gone nor waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


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
