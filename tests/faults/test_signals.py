"""SIGTERM and SIGINT: the command ends with 143 or 130, training after its step and a checkpoint, and resumes equal."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.processes_seen import wait_until_stopped
from faults.small import STAGE_OF, STEPS_OF_TRAINING, TRAINED, Small, contents, read_samples, record, run_of
from faults.tally import Tally
from faults.zygote import WAIT, Trial, Zygote

pytestmark = pytest.mark.xdist_group("kills")

SEED = 4
EXIT = {signal.SIGTERM: 143, signal.SIGINT: 130}
WORDS = "the same command resumes"
SITUATIONS = ("training", "training, twice", "a save", "a save, twice", "evaluation", "evaluation, twice", "sharding")
TRIALS = 3
"""With each signal in each situation; in a part there is one in each situation, the signals in turn."""
EVALUATIONS = ("features", "probe", "found", "given", "report")
POINTS_OF_SAVE = (
    "checkpoint.folder", "checkpoint.tensors", "checkpoint.written", "seal.hash", "seal.manifest", "commit.sync",
    "commit.rename", "commit.renamed", "commit.done", "checkpoint.committed",
)  # fmt: skip
SAVES = 3
"""Of a training."""
BEGUN = " run ("
"""What the command says before a step that is not up to date."""
LOG = "samples"
"""In the store: what the prelude `log_samples` writes."""
REST_OF_STEP = 1
"""Steps that may end after the signal: the one that it came in."""
UNTIL_THE_SECOND = 0.02
"""Seconds between two signals, at most."""


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_signal_ends_it_and_it_resumes(
    situation: str, zygote: Zygote, small: Small, is_whole: bool, tally: Tally
) -> None:
    in_turn = [*EXIT][SITUATIONS.index(situation) % len(EXIT)]
    numbers = [*EXIT] * TRIALS if is_whole else [in_turn]
    draws = random.Random(f"{SEED} {situation}")
    faults = []
    for number in numbers:
        found = _signal_and_run_again(situation, number, zygote, small, draws)
        faults += [f"{situation}, {number.name}, seed {SEED}: {fault}" for fault in found[:1]]
    tally.add("signals", tried=len(numbers), held=len(numbers) - len(faults), note=situation)
    assert not faults, "\n".join(faults)


def _signal_and_run_again(
    situation: str, number: signal.Signals, zygote: Zygote, small: Small, draws: random.Random
) -> list[str]:
    """Send the signal, give the command again; what is not as was promised, in words."""
    place, _, is_twice = situation.partition(", ")
    step = {"sharding": "shards", "evaluation": draws.choice(EVALUATIONS)}.get(place) or draws.choice(TRAINED)
    seconds = small.seconds[step]
    while True:
        store = small.store_before(step, "signals")
        begun = time.monotonic()
        sent = _start_and_send(place, number, zygote, small, step, store, seconds, draws)
        if sent is not None and is_twice:
            time.sleep(draws.uniform(0, UNTIL_THE_SECOND))
            sent.trial.send(number)
        if sent is not None and not (sent.trial.wait() in (0, -number) and contents(store) == small.after[step]):
            break
        seconds = min(seconds, time.monotonic() - begun)  # there was nothing to interrupt yet, or any more
    faults = _faults_of_end(sent.trial, number, is_twice=bool(is_twice))
    if step in TRAINED and not is_twice and not faults:
        done = len(read_samples(store / LOG))
        saved = max([int(one.name.removeprefix("step-")) for one in store.glob("work/*/*/checkpoints/*")], default=0)
        if done - sent.done > REST_OF_STEP or saved != done:
            faults.append(f"after step {sent.done} it took {done - sent.done} more; the last checkpoint is of {saved}")
    again, said = zygote.run(run_of(step, store), small.folder)
    if again != 0:
        faults.append(f"given again it ended with {again}: {said}")
    elif contents(store) != small.after[step]:
        faults.append("the artifacts differ")
    elif step in TRAINED and not is_twice:
        ended = [one["ended"] for one in record(store, STAGE_OF[step])["attempts"]]
        faults += [f"the attempts ended {ended}"] if ended != ["interrupted", "finished"] else []
    shutil.rmtree(store)
    return [f"{step}, {sent.place}: {fault}" for fault in faults]


@dataclass(frozen=True)
class Sent:
    """A command that a signal was sent to.

    Attributes:
        place: where it was, in words.
        done: steps of training that it had taken.
    """

    trial: Trial
    place: str
    done: int


def _start_and_send(
    place: str,
    number: signal.Signals,
    zygote: Zygote,
    small: Small,
    step: str,
    store: Path,
    seconds: float,
    draws: random.Random,
) -> Sent | None:
    """Start the command and send the signal; None where it had not come to the step, or had ended.

    Training is stopped first, so that what it had done by then is known.
    """
    log = store / LOG
    failpoint = f"{draws.choice(POINTS_OF_SAVE)}:{draws.randint(1, SAVES)}:stop" if place == "a save" else ""
    prelude = ("log_samples", str(log)) if step in TRAINED else ()
    trial = zygote.start(run_of(step, store), small.folder, failpoint=failpoint, prelude=prelude)
    if step not in TRAINED:
        after = draws.random() * seconds
        time.sleep(after)
        if not trial.is_running() or BEGUN not in trial.said:
            trial.wait()
            return None
        trial.send(number)
        return Sent(trial, f"after {after:.3f} s", 0)
    steps = draws.randint(1, STEPS_OF_TRAINING - 2)
    if place == "training":
        _wait_for(trial, lambda: len(read_samples(log)) >= steps)
        trial.send(signal.SIGSTOP)
    wait_until_stopped(trial)
    done = len(read_samples(log))
    trial.send(number)
    os.kill(trial.pid, signal.SIGCONT)
    return Sent(trial, failpoint or f"after step {steps}", done)


def _faults_of_end(trial: Trial, number: signal.Signals, *, is_twice: bool) -> list[str]:
    code = trial.wait()
    # A second signal may come when the first has ended all but the process: then that dies of it, and a shell shows
    # the same code.
    if is_twice and code == -number:
        return []
    if code != EXIT[number]:
        return [f"it ended with {code}: {trial.said}"]
    return [] if WORDS in trial.said else [f"it said {trial.said!r}"]


def _wait_for(trial: Trial, is_so: Callable[[], bool]) -> None:
    while trial.is_running() and not is_so():
        time.sleep(WAIT)
