"""SIGKILL at every failpoint and at random times, in every stage: the same command again ends with the same bytes."""

import random
import shutil
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from faults.small import INTERVAL, STAGE_OF, STEPS, TRAINED, Small, contents, read_samples, record, run_of
from faults.tally import Tally
from faults.zygote import WAIT, Zygote
from stages.settings import STAGES

pytestmark = pytest.mark.xdist_group("kills")

SEED = 1
RANDOM_TIMES = 50
"""In each stage."""
STEPS_OF_PART, POINTS_OF_PART = ("shards", *TRAINED), 2
"""In a part: those that are killed at a random time, once, and at so many failpoints, the others at one."""
ORDINALS = 4
"""Of a point that is reached many times in a step: the first, the last, and some between."""
BEFORE_ATTEMPT, AFTER_STAGE = "attempt.begun", "attempt.made"


def test_the_recipe_has_every_stage() -> None:
    assert sorted(STAGE_OF.values()) == sorted(STAGES)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_every_failpoint(step: str, zygote: Zygote, small: Small, is_whole: bool, tally: Tally) -> None:
    trials = [
        (name, ordinal)
        for name in dict.fromkeys(small.points[step])
        for ordinal in _ordinals(small.points[step].count(name))
    ]
    if not is_whole:
        trials = random.Random(f"{SEED} {step}").sample(trials, POINTS_OF_PART if step in STEPS_OF_PART else 1)
    faults = []
    for name, ordinal in trials:
        place = f"{name}:{ordinal}"
        found = _kill_and_run_again(zygote, small, step, failpoint=place)
        if _is_within_attempt(small.points[step], name, ordinal) and found.attempts != ["killed", "finished"]:
            found.faults.append(f"the attempts ended {found.attempts}")
        faults += [f"{place}: {fault}" for fault in found.faults[:1]]
    tally.add("kill", tried=len(trials), held=len(trials) - len(faults), note="at every failpoint")
    assert not faults, "\n".join(faults)


def test_killed_at_random_times(zygote: Zygote, small: Small, is_whole: bool, tally: Tally) -> None:
    for step in STEPS if is_whole else STEPS_OF_PART:
        _kill_at_random_times(step, RANDOM_TIMES if is_whole else 1, zygote, small, tally)


def _kill_at_random_times(step: str, wanted: int, zygote: Zygote, small: Small, tally: Tally) -> None:
    shares = random.Random(f"{SEED} {step}")
    faults, tried, seconds = [], 0, small.seconds[step]
    for _ in range(20 * wanted):
        if tried == wanted:
            break
        after = shares.random() * seconds
        found = _kill_and_run_again(zygote, small, step, after=after)
        if found.was_killed:
            tried += 1
        else:  # the machine is faster than it was
            seconds = found.seconds
        faults += [f"{step} after {after:.3f} s (seed {SEED}): {fault}" for fault in found.faults[:1]]
    tally.add("kill", tried=tried, held=tried - len(faults), note="at a random time")
    assert not faults, "\n".join(faults)
    assert tried == wanted


class Outcome:
    """Of a trial.

    Attributes:
        was_killed: or the command had ended before.
        seconds: until it was killed or had ended.
        attempts: how each of them ended.
        faults: what is not as was promised, in words.
    """

    def __init__(self) -> None:
        self.was_killed = False
        self.seconds = 0.0
        self.attempts: list[str] = []
        self.faults: list[str] = []


def _kill_and_run_again(
    zygote: Zygote, small: Small, step: str, *, failpoint: str = "", after: float | None = None
) -> Outcome:
    """Kill the command of a step at a failpoint, or after some time, and give it again, once."""
    found = Outcome()
    store, log = small.store_before(step, "killed"), small.folder / "samples"
    prelude = ("log_samples", str(log)) if step in TRAINED else ()
    started = time.monotonic()
    trial = zygote.start(run_of(step, store), small.folder, failpoint=failpoint, prelude=prelude)
    if after is not None:
        while trial.is_running() and time.monotonic() < started + after:
            time.sleep(WAIT)
        trial.send(signal.SIGKILL)
    code = trial.wait()
    found.seconds = time.monotonic() - started
    found.was_killed = code == -signal.SIGKILL
    if code != -signal.SIGKILL and (failpoint or code != 0):
        found.faults.append(f"ended with {code} instead of by the kill: {trial.said}")
    trial.output.unlink()
    again = zygote.start(run_of(step, store), small.folder, prelude=prelude)
    code = again.wait()
    if code != 0:
        found.faults.append(f"given again it ended with {code}: {again.said}")
    else:
        found.faults += _differences(small.after[step], contents(store))
        made_by = record(store, STAGE_OF[step])
        found.attempts = [one["ended"] for one in made_by["attempts"]]
        found.faults += _faults_of_attempts(made_by["attempts"], trial.pid, again.pid, log)
    again.output.unlink()
    log.unlink(missing_ok=True)
    shutil.rmtree(store)
    return found


def _faults_of_attempts(attempts: list[dict[str, Any]], first: int, second: int, log: Path) -> list[str]:
    """What the record's attempts and the steps of training that were taken say against it."""
    faults = []
    if len(attempts) > 2 or attempts[-1]["ended"] != "finished":
        faults.append(f"the record has attempts {attempts}")
    taken: dict[int, list[int]] = defaultdict(list)
    for one in read_samples(log):
        taken[one.process].append(one.step)
    if first in taken and second in taken:
        done, resumed = taken[first][-1] + 1, taken[second][0]
        if not 0 <= done - resumed <= INTERVAL:
            faults.append(f"{done} steps were done, and it went on after {resumed}")
        saved = attempts[0]["last_checkpoint"] or 0
        if not saved <= attempts[-1]["first_step"] == resumed:
            faults.append(f"it went on after step {resumed}, and there was a checkpoint of step {saved}")
    return faults


def _differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    paths = sorted({*expected.items()} ^ {*found.items()})
    return [f"other content than without a fault: {', '.join(path for path, _ in paths[:5])}"] if paths else []


def _ordinals(count: int) -> list[int]:
    """Some of 1 to `count`, the first and the last among them."""
    return sorted({1 + round(part * (count - 1) / (ORDINALS - 1)) for part in range(ORDINALS)})


def _is_within_attempt(points: list[str], name: str, ordinal: int) -> bool:
    """Whether an attempt had begun by then, and had not ended."""
    place = [index for index, one in enumerate(points) if one == name][ordinal - 1]
    return points.index(BEFORE_ATTEMPT) < place < points.index(AFTER_STAGE)
