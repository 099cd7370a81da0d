"""A process that has everything imported and forks a child for each command: a trial costs tenths of a second.

Each child is the real command in a process (and a process group) of its own, which a test may kill, stop or arm a
failpoint in. The parent of all has one thread, so that it can be forked: torch runs with one, and the tests' own
process talks to it by pipes.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

WAIT = 0.002
"""Seconds between two looks for children that have ended."""


@dataclass
class Trial:
    """A command that runs.

    Attributes:
        pid: of its process, which leads a process group of its own.
        output: what it writes to stdout and stderr, together.
        processor_seconds: that it took until its end, with those of processes that it waited for.
    """

    pid: int
    output: Path
    _zygote: "Zygote"
    code: int | None = None
    processor_seconds: float | None = None

    def wait(self, seconds: float = 120.0) -> int:
        """Its exit code, or minus the number of the signal that it died of.

        Raises:
            TimeoutError: it is at work still; it is killed.
        """
        end = time.monotonic() + seconds
        while self.code is None:
            self._zygote.listen(WAIT)
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"{seconds} s were not enough:\n{self.said}")
        return self.code

    def is_running(self) -> bool:
        """Whether nothing has been heard of its end."""
        self._zygote.listen(0)
        return self.code is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it is at work still."""
        if self.is_running():
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """Its output so far."""
        return self.output.read_text(errors="replace")


class Zygote:
    """The parent, seen from the tests."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-m", "faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._trials: dict[int, Trial] = {}
        self._started: list[int] = []
        self._left = b""

    def close(self) -> None:
        """End it, and all that it forked."""
        for trial in self._trials.values():
            if trial.code is None:
                trial.send(signal.SIGKILL)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        failpoint: str = "",
        environment: Mapping[str, str] | None = None,
        output: Path | None = None,
        prelude: Sequence[Any] = (),
    ) -> Trial:
        """Run `simclr ARGUMENTS`.

        Args:
            folder: the working directory, in which the file with the output lies as well, if `output` is None.
            failpoint: as $SIMCLR_FAILPOINT, for this process and not for those that it starts.
            prelude: a function (of faults/preludes.py by its name, of another module as `module:function`) and its
                arguments (by place, or one mapping by name): it is called first, and may end the process.
        """
        assert self._process.stdin is not None
        output = output or folder / f"output-{time.monotonic_ns()}.txt"
        output.touch()  # it may be killed before it gets to that
        order = {
            "arguments": [*arguments],
            "folder": str(folder),
            "failpoint": failpoint,
            "environment": dict(environment or {}),
            "output": str(output),
            "prelude": [*prelude],
        }
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        while not self._started:
            self.listen(1.0)
        trial = Trial(self._started.pop(0), output, self)
        self._trials[trial.pid] = trial
        return trial

    def run(self, arguments: Sequence[str], folder: Path, *, seconds: float = 120.0, **options: Any) -> tuple[int, str]:
        """Run to the end: (exit code, what it said). `options` as of `start`."""
        trial = self.start(arguments, folder, **options)
        code = trial.wait(seconds)
        return code, trial.said

    def listen(self, seconds: float) -> None:
        """Take in what the parent tells, waiting at most so long for it."""
        assert self._process.stdout is not None
        if self._process.poll() is not None:
            raise RuntimeError("the parent of the trials died")
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            return
        *lines, self._left = (self._left + os.read(self._process.stdout.fileno(), 1 << 16)).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if told["event"] == "started":
                self._started.append(told["pid"])
            else:
                self._trials[told["pid"]].processor_seconds = told["processor_seconds"]
                self._trials[told["pid"]].code = told["code"]


def _serve(orders: RawIOBase) -> None:
    """Fork a child for each order, and tell of its end, until there are no more."""
    while True:
        _tell_of_ended()
        ready, _, _ = select.select([orders], [], [], WAIT)
        if not ready:
            continue
        line = orders.readline()
        if not line:
            return
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(order)
        _tell({"event": "started", "pid": child})


def _tell_of_ended() -> None:
    while True:
        try:
            pid, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        ended = {"pid": pid, "code": os.waitstatus_to_exitcode(status)}
        _tell({"event": "ended", "processor_seconds": used.ru_utime + used.ru_stime} | ended)


def _tell(event: dict[str, Any]) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


def _become(order: dict[str, Any]) -> None:
    """In the child: the command."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(order["folder"])
        descriptor = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(order["environment"])
        sys.argv = ["simclr", *order["arguments"]]
        failpoints.arm(order["failpoint"])
        if order["prelude"]:
            _call(*order["prelude"])
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(name: str, *given: Any) -> None:
    module, _, function = name.rpartition(":")
    called = getattr(importlib.import_module(module or "faults.preludes"), function)
    if len(given) == 1 and isinstance(given[0], dict):
        called(**given[0])
    else:
        called(*given)


if __name__ == "__main__":
    # Only here, since tests import this module as well.
    import threading
    import traceback

    import pyarrow.dataset  # which pyarrow imports when it first reads a table
    import torch

    from pipeline import cli, failpoints, worker
    from stages.settings import STAGES

    torch.set_num_threads(1)
    for stage in STAGES.values():
        importlib.import_module(stage.module)
        stage.settings.model_rebuild()  # otherwise that is left to the first recipe
    assert threading.active_count() == 1, threading.enumerate()
    assert worker, pyarrow.dataset
    with open(0, "rb", buffering=0, closefd=False) as orders:  # unbuffered, so that `select` sees all that is there
        _serve(orders)
    os._exit(0)  # to take all that was imported apart would take seconds
