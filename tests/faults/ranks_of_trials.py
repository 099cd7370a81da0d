"""Trials of several ranks: forked one by one as another launcher announces them, or by our own launcher."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faults.zygote import Trial, Zygote
from pipeline import cli, launcher


def start_ranks(
    zygote: Zygote, arguments: Sequence[str], folder: Path, ranks: int, *, timeout: float = 60.0, **options: Any
) -> list[Trial]:
    """Start a command as so many ranks, as torchrun or srun announce them. `options` as of `Zygote.start`."""
    if ranks == 1:
        return [zygote.start(arguments, folder, **options)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "SIMCLR_RANK_TIMEOUT": str(timeout),
    }  # fmt: skip
    return [
        zygote.start(arguments, folder, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(ranks)
    ]


def fork_the_ranks() -> None:
    """Called in the child: our launcher forks its ranks from this process, rather than starting each from nothing."""
    launcher.subprocess = _Forking  # type: ignore[assignment]


class _Forking:
    """In place of the module `subprocess`, in the launcher."""

    DEVNULL = subprocess.DEVNULL

    class Popen:
        """What the launcher uses of subprocess.Popen, of a process that was forked and has run the command."""

        def __init__(self, command: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int], **_: Any):
            self.returncode: int | None = None
            self.pid = os.fork()
            if self.pid == 0:
                _become_rank(command, env, pass_fds)

        def poll(self) -> int | None:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

        def wait(self) -> None:
            if self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

        def send_signal(self, number: int) -> None:
            if self.poll() is None:
                os.kill(self.pid, number)

        def kill(self) -> None:
            self.send_signal(signal.SIGKILL)


def _become_rank(command: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int]) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2 and descriptor not in pass_fds:
                try:
                    os.close(descriptor)
                except OSError:  # of the list itself
                    continue
        os.environ.clear()
        os.environ.update(env)
        sys.argv = ["simclr", *command[command.index("pipeline") + 1 :]]
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
