"""Which process wrote something that it keeps to itself, and whether that process may be at it still."""

import os
import re
import socket
from functools import cache
from pathlib import Path

NAME = re.compile(r"(?P<process>(?P<machine>\w+)-(?P<number>[0-9]{1,9})-(?P<started>[0-9]+))(?:[-.].*)?", re.DOTALL)
"""The name of a process, or a longer one that begins so."""


@cache
def _machine() -> str:
    """Where a number means one process: host, boot and PID namespace. Containers may share the first two."""
    host = "".join(letter if letter.isalnum() else "_" for letter in socket.gethostname())
    return f"{host}_{_boot()}_{_namespace()}"


def _boot() -> str:
    """Distinct by machine, and each time that it starts; 0 where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "0"


def _namespace() -> str:
    """Of the numbers of processes (pid_namespaces(7)); 0 where there are none."""
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return "0"


def this_process() -> str:
    """A name for this process: its machine, number, and when it started (numbers are given anew)."""
    return f"{_machine()}-{os.getpid()}-{_started(os.getpid())}"


def process_of(name: str) -> str | None:
    """The process whose name that is, or begins that; None for a name that is none of ours."""
    found = NAME.fullmatch(name)
    return found["process"] if found else None


def process_in_words(name: str) -> str:
    """`HOST process NUMBER`, of the name of a process."""
    machine, number, _ = name.split("-", 2)
    return f"{machine.rsplit('_', 2)[0]} process {number}"


def is_of_this_machine(name: str) -> bool:
    """Whether a name is that of a process of this machine, or a longer one that begins so."""
    found = NAME.fullmatch(name)
    return found is not None and found["machine"] == _machine()


def may_be_alive(name: str) -> bool:
    """Whether the process of that name (or of a longer one that begins so) may be there still.

    What another machine does, or a container with processes of its own, is not known here; nor is a name that is none
    of ours.
    """
    found = NAME.fullmatch(name)
    if found is None or found["machine"] != _machine():
        return True
    number = int(found["number"])
    if _state(number) in ("Z", "X"):  # it has ended, and whoever started it has not asked how
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return found["started"] in ("0", _started(number))


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
