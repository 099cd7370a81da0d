"""A training that goes on with another number of processes and threads, each time after a signal."""

import json
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from faults.places import DIGITS, Place
from faults.preludes import wrap
from faults.ranks_of_trials import start_ranks
from faults.tally import Tally
from faults.zygote import Zygote
from pipeline.training import Training
from stages import finetune, pretrain
from stages.images.loader import BatchLoader
from stages.views import Views

STEPS, BATCH = 10, 64
RECIPE = f"""
name: sizes
steps:{DIGITS}
  pretrained:
    stage: pretrain
    shards: shards
    views: views
    architecture: {{backbone: resnet10, width: 8}}
    projector: {{layers: 2, hidden: 16, dimension: 8}}
    optimiser: {{name: lars, learning_rate: 0.5}}
    gradient_clip: 1.0
    epochs: 1
    max_steps: {STEPS}
    batch_size: {BATCH}
    channels_last: false
    online_probe: false
  tuned:
    stage: finetune
    shards: shards
    views: views
    encoder: random
    architecture: {{backbone: resnet10, width: 8}}
    loss: {{name: arcface}}
    optimiser: {{name: sgd, learning_rate: 0.01}}
    epochs: 1
    max_steps: {STEPS}
    batch_size: {BATCH}
    channels_last: false
"""


@dataclass(frozen=True)
class Attempt:
    """One command: by how many ranks and threads, and in which step (counted from 0) which rank gets a signal."""

    ranks: int
    workers: int
    stop_at: int | None = None
    stopped: int = 0
    number: signal.Signals = signal.SIGTERM

    @property
    def code(self) -> int:
        return 0 if self.stop_at is None else 128 + self.number


ATTEMPTS = [
    Attempt(1, 1, 1),
    Attempt(2, 2, 4, 1, signal.SIGINT),
    Attempt(4, 4, 7, 2),
    Attempt(1, 2),
]
LARGEST = {"float32": 1e-5, "float64": 1e-10}
"""Relative difference of the first loss after a resume."""


def watch(log: str, dtype: str, stop_at: int | None, stopped: int, number: int) -> None:
    """Called in the child: the training computes in `dtype`, writes down what it does, and sends itself a signal."""
    rank, path = int(os.environ.get("RANK", "0")), Path(log)

    def write(**values: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"rank": rank} | values) + "\n")

    def load(original: Any, self: BatchLoader, step: int) -> Any:
        batch = original(self, step)
        write(step=step, ids=batch.sample_ids.tolist())
        return batch

    def accepts(original: Any, self: Training, loss: Tensor, norm: Tensor, **captured: Tensor) -> bool:
        assert str(loss.dtype) == f"torch.{dtype}"
        write(step=self.done, loss=float(loss.detach()))
        if self.done == stop_at and rank == stopped:
            os.kill(os.getpid(), number)
        return original(self, loss, norm, **captured)

    wrap(BatchLoader, "load", load)
    wrap(Training, "accepts", accepts)
    if dtype == "float64":
        wrap(Views, "__call__", in_float64)
        wrap(pretrain, "build_projector", in_float64)
        wrap(pretrain, "evaluation_view", in_float64)
        for stage in (pretrain, finetune):
            wrap(stage, "build_encoder", in_float64)
        wrap(finetune.Objective, "__init__", lambda original, self, *given: (original(self, *given), self.double())[0])


def in_float64(original: Any, *arguments: Any, **named: Any) -> Any:
    """Made in float32, and computed with in float64."""
    return original(*arguments, **named).double()


def logged(path: Path, ranks: int) -> dict[int, tuple[list[int], float]]:
    """By step: the ids of its global batch, in order of rank, and its loss, which is the same on all ranks."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {}
    for step in {line["step"] for line in lines}:
        ids = {line["rank"]: line["ids"] for line in lines if line["step"] == step and "ids" in line}
        losses = {line["loss"] for line in lines if line["step"] == step and "loss" in line}
        assert sorted(ids) == [*range(ranks)]
        assert len(losses) == 1, f"step {step}: {losses}"
        found[step] = [one for rank in range(ranks) for one in ids[rank]], losses.pop()
    return found


class Sizes(Place):
    """Where trainings go on with others."""

    def run(self, store: str, step: str, dtype: str, one: Attempt, *more: str) -> tuple[Path, list[int], str]:
        """The log, exit codes, and what was said."""
        log = self.folder / f"{store}-{len([*self.folder.glob(f'{store}-*.log')])}.log"
        before = {"log": str(log), "dtype": dtype, "stop_at": one.stop_at, "stopped": one.stopped, "number": one.number}
        command = self.command(store, step, "--set", f"{step}.workers={one.workers}", *more)
        trials = start_ranks(
            self.zygote, command, self.folder, one.ranks, prelude=("faults.test_world_size:watch", before)
        )
        return log, [trial.wait() for trial in trials], "".join(trial.said for trial in trials)


@pytest.fixture(scope="module")
def place(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Sizes:
    return Sizes(zygote, tmp_path_factory.mktemp("sizes"), RECIPE, digits)


def test_other_numbers_of_processes_go_on_with_the_same_batches(place: Sizes, is_whole: bool, tally: Tally) -> None:
    cases = [(step, dtype) for step in ("pretrained", "tuned") for dtype in LARGEST]
    for step, dtype in cases if is_whole else [("pretrained", "float64")]:
        store = f"{step}-{dtype}"
        log, codes, said = place.run(place.new(f"{store}-whole"), step, dtype, Attempt(1, 1))
        assert codes == [0], said
        wanted, done, worst = logged(log, 1), 0, 0.0
        assert sorted(wanted) == [*range(STEPS)]
        place.new(store)
        for one in ATTEMPTS:
            log, codes, said = place.run(store, step, dtype, one)
            assert codes == [one.code] * one.ranks, said
            assert "Traceback" not in said
            assert (f"resumes after step {done} of {STEPS}" in said) == (done > 0)
            found = logged(log, one.ranks)
            last = STEPS if one.stop_at is None else one.stop_at + 1
            assert sorted(found) == [*range(done, last)], "no step is done twice, none is left out"
            for number, (ids, _) in found.items():
                assert len(ids) == BATCH
                assert ids == wanted[number][0], f"step {number}"
            difference = abs(found[done][1] - wanted[done][1]) / abs(wanted[done][1])
            assert difference <= LARGEST[dtype], f"{store}, first loss after step {done}: {difference:.1e}"
            worst = max(worst, difference)
            done = last
        assert math.isfinite(worst)
        note = f"{dtype}: same ids; first loss after a resume within {LARGEST[dtype]:g} (largest {worst:.0e})"
        tally.add("world-size", tried=len(ATTEMPTS) - 1, held=len(ATTEMPTS) - 1, note=note)


def test_another_global_batch_is_another_recipe(place: Sizes, tally: Tally) -> None:
    """What began goes on only with its own batch; another begins anew, and it is said what changed."""
    store = place.new("other")
    assert place.run(store, "tuned", "float32", Attempt(1, 1, 3))[1] == [143]

    def status(batch: int) -> str:
        command = ["status", "sizes.yaml", "tuned", "--why", "--store", store, "--set", f"tuned.batch_size={batch}"]
        code, said = place.zygote.run(command, place.folder)
        assert code == 3
        return said

    assert "from its last checkpoint" in status(BATCH)
    assert "from its last checkpoint" not in status(BATCH // 2)
    log, codes, said = place.run(store, "tuned", "float32", Attempt(2, 1), "--set", f"tuned.batch_size={BATCH // 2}")
    assert codes == [0, 0], said
    assert "resumes" not in said
    found = logged(log, 2)
    assert sorted(found) == [*range(STEPS)]
    assert {len(ids) for ids, _ in found.values()} == {BATCH // 2}
    assert f"batch_size {BATCH // 2} -> {2 * BATCH}" in status(2 * BATCH)
    log, codes, said = place.run(store, "tuned", "float32", Attempt(1, 1))
    assert codes == [0], said
    assert f"resumes after step 4 of {STEPS}" in said
    assert sorted(logged(log, 1)) == [*range(4, STEPS)]
    tally.add("world-size", tried=1, held=1, note="another global batch is another recipe, and is said to be")
