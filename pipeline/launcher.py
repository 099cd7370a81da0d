"""Several processes: what a launcher says of this one's place among them, and a launcher of our own. Torch-free."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import RankLost, UsageError

WATCH_SECONDS = 0.1
SETTLE_SECONDS = 1.0
"""After the first failure: the others may end by themselves, and one that died of a signal is the better cause."""
PARTING_SECONDS = 30.0
"""After Ctrl-C, from the end of the first rank to the end of the last."""
LIFELINE = "SIMCLR_LAUNCHER"
"""Number of a descriptor that reads its end once the launcher is gone."""
LAUNCHER_VARIABLES = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that share the work."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    """Among those on this machine."""
    local_ranks: int = 1
    address: str = ""
    port: int = 0
    """Where the ranks meet."""
    launcher: str = ""
    """In words."""
    keeps_store: bool = False
    """Whether the launcher holds the store that the ranks meet at; otherwise rank 0 does."""
    attempt: int = 0
    """How often the launcher started all ranks again."""


ALONE = Place()


def read_place(asked: int | None) -> Place:
    """This process's place, from the environment; `asked` is what the command line says of it.

    What a launcher left in the environment is taken out: libraries that look there (Accelerate) would form groups of
    their own, in steps that one rank runs alone as well.

    Raises:
        UsageError: another number of processes was asked for than was started.
    """
    environment = dict(os.environ)
    place = _of_torch(environment) or _of_slurm(environment) or ALONE
    if LIFELINE in environment:
        _end_with_the_launcher(int(environment[LIFELINE]))
    for name in environment:
        if name == LIFELINE or LAUNCHER_VARIABLES.fullmatch(name):
            del os.environ[name]
    if place.ranks > 1:
        # The store that the ranks meet at warns of every loss with a trace of C++; we say it in one line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if place.launcher and asked not in (None, place.ranks):
        raise UsageError(
            f"--processes {asked}: {place.launcher} started {place.ranks}; leave --processes out, or start as many"
        )
    # `accelerate launch` names a port when it is asked for several processes, and on the CPU starts only one.
    silent = not place.launcher and "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    if silent and asked is None:
        raise UsageError(
            "accelerate launch was asked for several processes and started one, as it does on the CPU: say how many "
            "by --processes N, or start them by torchrun --nproc-per-node N"
        )
    return place


def _of_torch(environment: Mapping[str, str]) -> Place | None:
    """As torchrun, `accelerate launch` on GPUs and our own launcher say it."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if ranks > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise UsageError(f"WORLD_SIZE is {ranks}, and MASTER_ADDR or MASTER_PORT is not set: where do the ranks meet?")
    return Place(
        rank,
        ranks,
        local_rank=int(environment.get("LOCAL_RANK", rank)),
        local_ranks=int(environment.get("LOCAL_WORLD_SIZE", ranks)),
        address=environment.get("MASTER_ADDR", ""),
        port=int(environment.get("MASTER_PORT", 0)),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "the launcher",
        keeps_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )


def _of_slurm(environment: Mapping[str, str]) -> Place | None:
    """As `srun` says it. The shell of a batch job has a SLURM_PROCID too, and is no rank: it has no step."""
    ranks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if ranks == 1 or "SLURM_PROCID" not in environment:
        return None
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    # The first of `node[07-12,20],other`.
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", environment.get("SLURM_STEP_NODELIST", "localhost"))
    assert first is not None
    return Place(
        int(environment["SLURM_PROCID"]),
        ranks,
        local_rank=int(environment.get("SLURM_LOCALID", 0)),
        local_ranks=-(-ranks // nodes),
        address=environment.get("MASTER_ADDR") or first[1] + (first[2] or ""),
        port=int(environment.get("MASTER_PORT") or 20000 + int(environment.get("SLURM_JOB_ID", 0)) % 10000),
        launcher="srun",
    )


def _end_with_the_launcher(descriptor: int) -> None:
    """End this process at once when the launcher does, even by SIGKILL: nobody would end it otherwise."""

    def wait() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def launch(command: Sequence[str], processes: int) -> int:
    """Run a command as ranks 0 to `processes` - 1 on this machine, until all have ended.

    Ctrl-C and SIGTERM are passed on to every rank. When a rank fails, the others are ended.

    Returns:
        An exit code: that of a rank that failed and said what was wrong; 9 where one died.
    """
    environment = os.environ | {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    reading, writing = os.pipe()
    children: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: signals.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for rank in range(processes):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), LIFELINE: str(reading)}
            children.append(
                subprocess.Popen(
                    command,
                    env=environment | of_rank,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[reading],
                    process_group=0,  # Ctrl-C at the terminal comes here alone, and is passed on once
                )
            )
        return _outcome(_watch(children, signals), signals)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


def _watch(children: Sequence[subprocess.Popen[bytes]], signals: Sequence[int]) -> dict[int, int]:
    """Wait until all have ended, or one failed and the others had their time; exit codes of those that ended."""
    passed_on = 0
    failed_at: float | None = None
    while True:
        for number in signals[passed_on:]:
            passed_on += 1
            for child in children:
                child.send_signal(number)
        ended = {rank: code for rank, child in enumerate(children) if (code := child.poll()) is not None}
        if len(ended) == len(children):
            return ended
        if failed_at is None and any(ended.values()):
            failed_at = time.monotonic()
        patience = PARTING_SECONDS if signals else SETTLE_SECONDS
        if failed_at is not None and time.monotonic() - failed_at > patience:
            return ended
        time.sleep(WATCH_SECONDS)


def _outcome(ended: Mapping[int, int], signals: Sequence[int]) -> int:
    """The exit code of all, from those of the ranks; a death is told, an error was told by the rank itself."""
    failed = {rank: code for rank, code in ended.items() if code}
    if not failed:
        return 0
    if signals and any(code in (-signals[0], 128 + signals[0]) for code in failed.values()):
        return 128 + signals[0]
    for rank, code in failed.items():
        if code < 0:
            hint = " (the system does so when memory is exhausted)" if code == -signal.SIGKILL else ""
            _tell(f"rank {rank} was ended by {signal.Signals(-code).name}{hint}")
            return RankLost.exit_code
    clear = [code for code in failed.values() if code not in (1, RankLost.exit_code)]
    if clear:
        return clear[0]
    for rank, code in failed.items():
        if code == 1:
            _tell(f"rank {rank} failed, its traceback stands above")
            break
    return RankLost.exit_code


def _tell(what: str) -> None:
    print(f"simclr: {what}; all ranks were ended, the same command resumes", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
