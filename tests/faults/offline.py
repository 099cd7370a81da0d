"""Runs a command as `simclr` does, with every look for another machine written down and refused.

    ATTEMPTS=FILE python -m faults.offline run RECIPE

The processes that it starts import this module as well, as the one that they were started from.
"""

import os
import sys
from typing import Any

ATTEMPTS = "ATTEMPTS"
LOOKS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"}
LOCAL = ("127.", "::1", "localhost")


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: whatever reaches for another machine is kept in the file $ATTEMPTS, and fails."""
    if event not in LOOKS:
        return
    address = arguments[0] if event.startswith("socket.get") else arguments[1]
    host = address[0] if isinstance(address, tuple) else address
    if host is None or (event.startswith("socket.send") and not isinstance(address, tuple)):
        return
    text = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
    is_unix = not isinstance(address, tuple) and not event.startswith("socket.get")
    if is_unix or text.startswith(LOCAL):
        return
    with open(os.environ[ATTEMPTS], "a") as file:
        file.write(f"{event} {text}\n")
    raise ConnectionRefusedError(f"{event} {text}: there is no network here")


sys.addaudithook(watch)

if __name__ == "__main__":
    from pipeline import cli

    cli.main()
