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


def is_of_this_machine(name: str) -> bool:
    """Whether a name is that of a process of this machine, or a longer one that begins so."""
    host, *rest = name.split("-")
    return host == _host() and len(rest) > 1 and rest[0].isdecimal()


def may_be_alive(name: str) -> bool:
    """Whether the process of that name (or of a longer one that begins so) may be there still.

    What another machine does is not known here; nor is a name that is none of ours.
    """
    if not is_of_this_machine(name):
        return True
    rest = name.split("-")[1:]
    number = int(rest[0])
    if _state(number) in ("Z", "X"):  # it has ended, and whoever started it has not asked how
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return rest[1] in ("0", _started(number))


def _state(number: int) -> str:
    """A letter (proc(5)); empty where the system does not say."""
    return _facts(number)[:1]


def _started(number: int) -> str:
    """In ticks since the machine started (proc(5)); 0 where the system does not say."""
    words = _facts(number).split()
    return words[19] if len(words) > 19 else "0"


def _facts(number: int) -> str:
    """What proc(5) says of a process, from its state on."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].strip()
    except OSError:
        return ""
