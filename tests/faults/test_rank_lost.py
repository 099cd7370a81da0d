"""One of several ranks is killed, or stopped as if it hung: all end, nobody is left, and the same command goes on."""

import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from faults.places import DIGITS, Place
from faults.preludes import wrap
from faults.processes_seen import descendants, is_alive, state_of, wait_until
from faults.ranks_of_trials import fork_the_ranks, start_ranks
from faults.tally import Tally
from faults.zygote import Trial, Zygote
from pipeline import checkpoint, failpoints
from stages.images.loader import BatchLoader

SEED = 20_262
STEPS, EVERY = 10, 3
TIMEOUT = 3.0
"""$SIMCLR_RANK_TIMEOUT of the trials in which a rank hangs."""
RECIPE = f"""
name: lost
steps:{DIGITS}
  simclr:
    stage: pretrain
    shards: shards
    views: views
    architecture: {{backbone: resnet10, width: 4}}
    projector: {{layers: 2, hidden: 8, dimension: 8}}
    epochs: 1
    max_steps: {STEPS}
    batch_size: 48
    checkpoint_every_steps: {EVERY}
"""


@dataclass(frozen=True)
class Loss:
    """How a rank is lost.

    Attributes:
        ranks: of the command.
        victim: which of them.
        number: SIGKILL, or SIGSTOP.
        step: counted from 0, in which it happens.
        delay: seconds after the step's beginning.
        saving: it happens in the middle of the checkpoint before that step instead.
        launcher: ours, or another that announces the ranks and looks after none of them.
    """

    ranks: int
    victim: int
    number: int
    step: int
    delay: float = 0.0
    saving: bool = False
    launcher: str = "ours"


def lose_a_rank(loss: dict[str, Any]) -> None:
    """Called in the child: our launcher forks its ranks, one of which goes the way of `loss`."""
    one = Loss(**loss)
    if one.launcher == "ours":
        fork_the_ranks()

    def go() -> None:
        os.kill(os.getpid(), one.number)

    def load(original: Any, self: BatchLoader, step: int) -> Any:
        batch = original(self, step)
        if step == one.step and self._rank == one.victim and not one.saving:
            timer = threading.Timer(one.delay, go)
            timer.daemon = True
            timer.start()
        return batch

    def save(original: Any, folder: Path, step: int, *more: Any) -> Any:
        if step == one.step and one.saving:
            failpoints.arm(f"checkpoint.tensors:1{':stop' if one.number == signal.SIGSTOP else ''}")
        return original(folder, step, *more)

    wrap(BatchLoader, "load", load)
    wrap(checkpoint, "save", save)


class Ranks(Place):
    """Where ranks are lost."""

    def __init__(self, zygote: Zygote, folder: Path, digits: Path):
        super().__init__(zygote, folder, RECIPE, digits)
        self._whole: dict[int, dict[str, bytes]] = {}

    def start(self, store: str, loss: Loss) -> list[Trial]:
        """The commands: one, which launches the ranks itself, or one a rank."""
        command = self.command(store)
        timeout = TIMEOUT if loss.number == signal.SIGSTOP else 60.0
        before = ("faults.test_rank_lost:lose_a_rank", {"loss": vars(loss)})
        if loss.launcher != "ours":
            return start_ranks(self.zygote, command, self.folder, loss.ranks, timeout=timeout, prelude=before)
        command += ["--processes", str(loss.ranks)]
        environment = {"SIMCLR_RANK_TIMEOUT": str(timeout)}
        return [self.zygote.start(command, self.folder, environment=environment, prelude=before)]

    def whole(self, ranks: int) -> dict[str, bytes]:
        """The files of a training of which no rank is lost."""
        if ranks not in self._whole:
            store = self.new(f"whole-{ranks}")
            for trial in self.start(store, Loss(ranks, 0, signal.SIGKILL, STEPS + 1)):
                assert trial.wait() == 0, trial.said
            self._whole[ranks] = self.files(store)
        return self._whole[ranks]


@pytest.fixture(scope="module")
def place(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Ranks:
    return Ranks(zygote, tmp_path_factory.mktemp("lost"), digits)


def losses(is_whole: bool) -> list[Loss]:
    draws = random.Random(SEED)
    found = []
    for launcher in ("ours", "another"):
        for number in (signal.SIGKILL, signal.SIGSTOP):
            for ranks in (2, 3) if launcher == "ours" else (2,):
                for victim in range(ranks):
                    step, delay = draws.randrange(1, STEPS - 1), draws.uniform(0, 0.1)
                    found.append(Loss(ranks, victim, number, step, delay, launcher=launcher))
                found.append(Loss(ranks, 0, number, 2 * EVERY, saving=True, launcher=launcher))
    return found if is_whole else [found[1], found[9]]  # rank 1 killed; rank 0 stopped while it saves


def end_of(loss: Loss, trials: list[Trial], processes: list[int]) -> tuple[int, str, float]:
    """Exit code of all, what they said, and how long it took from the loss of the rank on."""
    victim = processes[loss.victim]
    wait_until(lambda: state_of(victim) in ("", "T", "Z", "X"), 60, str(trials[0].output))
    started = time.monotonic()
    others = trials if loss.launcher == "ours" else [one for one in trials if one.pid != victim]
    codes = {one.wait(60) for one in others}
    seconds = time.monotonic() - started
    said = "".join(one.said for one in trials)
    assert len(codes) == 1, f"{codes}\n{said}"
    return codes.pop(), said, seconds


def test_a_rank_is_lost(place: Ranks, is_whole: bool, tally: Tally) -> None:
    longest: dict[str, list[float]] = {}
    for count, loss in enumerate(losses(is_whole)):
        store = place.new(f"lost-{count}")
        trials = place.start(store, loss)
        processes = [one.pid for one in trials]
        if loss.launcher == "ours":
            launcher = trials[0].pid
            wait_until(lambda: len(descendants(launcher)) == loss.ranks, 30, str(trials[0].output))  # noqa: B023
            processes = sorted(descendants(launcher))
        code, said, seconds = end_of(loss, trials, processes)
        where = f"seed {SEED}, {loss}:\n{said}"
        is_killed = loss.number == signal.SIGKILL
        if loss.launcher != "ours" and not is_killed:  # who hangs is ended by whoever started it
            os.kill(processes[loss.victim], signal.SIGKILL)
        assert code == 9, where
        assert seconds < (30 if is_killed else TIMEOUT + 15), where
        assert "Traceback" not in said, where
        told = [line for line in said.splitlines() if line.startswith("simclr: ")]
        assert told, where
        wait_until(lambda: not any(is_alive(one) for one in processes), 10, f"a rank is left; {where}")  # noqa: B023
        if loss.saving:
            assert [*(place.folder / store).glob("work/*/*/checkpoints/.private-*")], f"no save was cut; {where}"
        again = place.start(store, Loss(loss.ranks, 0, signal.SIGKILL, STEPS + 1, launcher=loss.launcher))
        for trial in again:
            assert trial.wait(120) == 0, trial.said
        if loss.step > EVERY:
            assert "resumes after step" in again[0].said, where
        assert place.files(store) == place.whole(loss.ranks), where
        longest.setdefault("killed" if is_killed else "stopped", []).append(seconds)
    for kind, seconds in longest.items():
        limit = "30 s" if kind == "killed" else f"the timeout of {TIMEOUT:g} s and 15 s"
        note = f"{kind}: exit 9 within {limit}, longest {max(seconds):.1f} s; no orphan; resumed equal"
        tally.add("rank-lost", tried=len(seconds), held=len(seconds), note=note)
