"""Which process wrote something that it keeps to itself, and whether that process may be at it still."""

import os
import socket
from functools import cache
from pathlib import Path


@cache
def _host() -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in socket.gethostname())


def this_process() -> str:
    """A name for this process: its machine, number, and when it started (numbers are given anew)."""
    return f"{_host()}-{os.getpid()}-{_started(os.getpid())}"


def may_be_alive(name: str) -> bool:
    """Whether the process of that name (or of a longer one that begins so) may be there still.

    What another machine does is not known here; nor is a name that is none of ours.
    """
    host, *rest = name.split("-")
    if host != _host() or len(rest) < 2 or not rest[0].isdecimal():
        return True
    number = int(rest[0])
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return rest[1] in ("0", _started(number))


def _started(number: int) -> str:
    """In ticks since the machine started (proc(5)); 0 where the system does not say."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"
