"""Where training was when it was killed leaves no trace: the samples of each step and all bytes are equal."""

import random
import shutil
import signal
import time
from itertools import chain
from pathlib import Path

import pytest

from faults.small import (
    INTERVAL,
    STAGE_OF,
    STEPS_OF_TRAINING,
    TRAINED,
    Small,
    Taken,
    contents,
    read_samples,
    record,
    run_of,
)
from faults.tally import Tally
from faults.zygote import WAIT, Trial, Zygote

pytestmark = pytest.mark.xdist_group("kills")

SEED = 3
KILLS, KILLS_OF_PART, STEPS_OF_EPOCH = 10, 3, 30
EDGES = {
    "the first step": 1,
    "within warm-up": 3,
    "before an epoch's edge": STEPS_OF_TRAINING // 2 - 1,
    "at an epoch's edge": STEPS_OF_TRAINING // 2,
    "behind an epoch's edge": STEPS_OF_TRAINING // 2 + 1,
    "before the last step": STEPS_OF_TRAINING - 1,
    "the last step": STEPS_OF_TRAINING,
}
"""Steps that are done when the training is killed."""
EDGES_OF_PART = {("the first step", "tuned"), ("at an epoch's edge", "simclr"), ("the last step", "tuned")}


def test_ten_kills_within_an_epoch_repeat_no_sample_and_leave_out_none(
    zygote: Zygote, small: Small, is_whole: bool, tally: Tally
) -> None:
    """Each sample once, in the order of a run without a kill."""
    settings = ["--set", "simclr.epochs=1", "--set", "simclr.batch_size=2"]
    whole = small.store_before("simclr", "epoch-whole")
    code, said = zygote.run(
        [*run_of("simclr", whole), *settings], small.folder, prelude=("log_samples", str(whole / "samples"))
    )
    assert code == 0, said
    expected = [one.samples for one in read_samples(whole / "samples")]
    assert len(expected) == STEPS_OF_EPOCH
    assert sorted(chain.from_iterable(expected)) == [*range(2 * STEPS_OF_EPOCH)], "an epoch has each sample once"

    rounds, kills, faults = (3, KILLS, []) if is_whole else (1, KILLS_OF_PART, [])
    for number in range(rounds):
        numbers = random.Random(f"{SEED} {number}")
        store = small.store_before("simclr", "epoch-killed")
        log = store / "samples"
        processes = []
        for _ in range(kills):
            trial = zygote.start([*run_of("simclr", store), *settings], small.folder, prelude=("log_samples", str(log)))
            # Far enough that ten of them fit into the epoch, and to some moment within the step that follows.
            _wait_for_steps(trial, log, numbers.randint(1, INTERVAL + 1))
            time.sleep(numbers.uniform(0, 0.01))
            trial.send(signal.SIGKILL)
            assert trial.wait() == -signal.SIGKILL, trial.said
            processes.append(trial.pid)
        trial = zygote.start([*run_of("simclr", store), *settings], small.folder, prelude=("log_samples", str(log)))
        assert trial.wait() == 0, trial.said
        found = _faults_of_samples(expected, read_samples(log), [*processes, trial.pid])
        if contents(store) != contents(whole):
            found.append("the artifacts differ")
        attempts = record(store, "pretrain")["attempts"]
        if [one["ended"] for one in attempts] != ["killed"] * kills + ["finished"]:
            found.append(f"the record has attempts {attempts}")
        faults += [f"seed {SEED}, round {number}: {fault}" for fault in found]
        shutil.rmtree(store)
    tally.add("kill-epoch", tried=rounds, held=rounds - len(faults), note=f"epochs with {kills} kills")
    assert not faults, "\n".join(faults)


def test_resumed_at_an_edge(zygote: Zygote, small: Small, is_whole: bool, tally: Tally) -> None:
    """Killed right behind the checkpoint of a step, or at the end; it goes on there, and all bytes are equal."""
    faults = []
    for edge, step in [(edge, step) for edge in EDGES for step in TRAINED]:
        if is_whole or (edge, step) in EDGES_OF_PART:
            found = _faults_at_edge(EDGES[edge], step, zygote, small)
            tally.add("resume-edges", tried=1, held=int(not found), note=edge)
            faults += [f"{step}, {edge}: {fault}" for fault in found]
    assert not faults, "\n".join(faults)


def _faults_at_edge(stop_after: int, step: str, zygote: Zygote, small: Small) -> list[str]:
    store = small.store_before(step, "edge")
    command = [*run_of(step, store), "--set", f"{step}.checkpoint_every_steps=1"]
    # The last step has no checkpoint of its own: nothing is left to do but to publish.
    at_end = stop_after == STEPS_OF_TRAINING
    place = "attempt.made:1" if at_end else f"checkpoint.committed:{stop_after}"
    code, said = zygote.run(command, small.folder, failpoint=place)
    assert code == -signal.SIGKILL, said
    code, said = zygote.run(command, small.folder)
    assert code == 0, said
    faults = []
    first = record(store, STAGE_OF[step])["attempts"][-1]["first_step"]
    if first != stop_after - at_end:
        faults.append(f"it went on after step {first}")
    if contents(store) != small.after[step]:
        faults.append("the artifacts differ")
    shutil.rmtree(store)
    return faults


def _wait_for_steps(trial: Trial, log: Path, steps: int) -> None:
    """Until a process has taken so many steps."""
    while trial.is_running():
        if sum(one.process == trial.pid for one in read_samples(log)) >= steps:
            return
        time.sleep(WAIT)
    raise AssertionError(f"it ended with {trial.code} before it was killed: {trial.said}")


def _faults_of_samples(expected: list[list[int]], taken: list[Taken], processes: list[int]) -> list[str]:
    """What is wrong with the samples of the steps that count: those that no later process took again."""
    kept: list[Taken] = []
    for process in processes:
        own = [one for one in taken if one.process == process]
        if not own:
            return [f"process {process} took no step"]
        redone = len(kept) - own[0].step
        if not 0 <= redone <= INTERVAL:
            return [f"{len(kept)} steps were done, and the next process began at step {own[0].step}"]
        kept = kept[: own[0].step] + own
    steps = [one.step for one in kept]
    if steps != [*range(len(expected))]:
        return [f"the steps are {steps}"]
    return [f"step {one.step} has other samples" for one in kept if one.samples != expected[one.step]]
