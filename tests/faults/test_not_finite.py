"""NaN and infinity in losses, gradients and images of real trainings, at random ranks and steps."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file

from faults.broken_numbers import KINDS, Break, is_finite
from faults.places import DIGITS, Place
from faults.ranks_of_trials import start_ranks
from faults.tally import Tally
from faults.zygote import Trial, Zygote
from pipeline.finite import CAUSES, KEPT, MOST_IN_A_ROW

SEED = 20_260
STEPS, EVERY = 12, 4
RECIPE = f"""
name: numbers
steps:{DIGITS}
  pretrained: &training
    stage: pretrain
    shards: shards
    views: views
    architecture: {{backbone: resnet10, width: 4}}
    projector: {{layers: 2, hidden: 8, dimension: 8}}
    optimiser: {{name: lars, learning_rate: 1.0}}
    gradient_clip: 1.0
    epochs: 1
    max_steps: {STEPS}
    batch_size: 32
    record_every_steps: 3
    checkpoint_every_steps: {EVERY}
  tuned:
    stage: finetune
    shards: shards
    views: views
    encoder: random
    architecture: {{backbone: resnet10, width: 4}}
    loss: {{name: contrastive, memory: 64}}
    optimiser: {{name: adamw, learning_rate: 0.001}}
    precision: bf16
    epochs: 1
    max_steps: {STEPS}
    batch_size: 32
    images_per_class: 4
    record_every_steps: 3
    checkpoint_every_steps: {EVERY}
"""
SEEN_IN = {"images": "images", "loss": "loss", "gradient": "gradient", "weight": "gradient"}


@dataclass(frozen=True)
class Training:
    """A training of the recipe in a store of its own."""

    place: Place
    store: str
    step: str
    ranks: int

    def run(self, broken: Break | None) -> tuple[list[int], str]:
        """Exit codes of the ranks, and what they said: rank 0 as it goes, and one of all how it ended."""
        before = {"log": str(self.log), "broken": asdict(broken) if broken else None}
        trials: list[Trial] = start_ranks(
            self.place.zygote, self.place.command(self.store, self.step), self.place.folder, self.ranks,
            prelude=("faults.broken_numbers:break_numbers", before),
        )  # fmt: skip
        return [trial.wait() for trial in trials], "".join(trial.said for trial in trials)

    @property
    def folder(self) -> Path:
        """The store."""
        return self.place.folder / self.store

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def seen(self) -> list[dict[str, Any]]:
        """What all ranks saw, each in order."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def only(self, seen: str, rank: int) -> list[dict[str, Any]]:
        return [one for one in self.seen if one["seen"] == seen and one["rank"] == rank]

    @property
    def files(self) -> dict[str, bytes]:
        """The files that were published, by name."""
        return self.place.files(self.store, {"pretrained": "pretrain", "tuned": "finetune"}[self.step])

    @property
    def published(self) -> list[Path]:
        return [*self.folder.glob("builds/*/*/*/files/*.safetensors")]

    @property
    def kept(self) -> Path:
        (place,) = self.folder.glob("work/*/*/not-finite")
        return place


class Start(Place):
    """Where trainings begin."""

    def __init__(self, zygote: Zygote, folder: Path, digits: Path):
        super().__init__(zygote, folder, RECIPE, digits)
        self._count = 0
        self._unbroken: dict[tuple[str, int], dict[str, bytes]] = {}

    def training(self, step: str, ranks: int) -> Training:
        self._count += 1
        return Training(self, self.new(str(self._count)), step, ranks)

    def unbroken(self, step: str, ranks: int) -> dict[str, bytes]:
        """The files of a training in which nothing breaks."""
        if (step, ranks) not in self._unbroken:
            training = self.training(step, ranks)
            assert training.run(None)[0] == [0] * ranks
            self._unbroken[step, ranks] = training.files
        return self._unbroken[step, ranks]


@pytest.fixture(scope="module")
def start(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Start:
    return Start(zygote, tmp_path_factory.mktemp("numbers"), digits)


def trials(is_whole: bool) -> Iterator[tuple[str, int, Break]]:
    """(step, ranks, what breaks): of each kind in each stage with one and two ranks, at random steps and ranks."""
    draws = random.Random(SEED)
    cases = [(step, ranks, kind) for step in ("pretrained", "tuned") for ranks in (1, 2) for kind in KINDS]
    if not is_whole:
        cases = [("pretrained", 2, "weight"), ("tuned", 1, "loss"), ("tuned", 2, "images")]
    for step, ranks, kind in cases * (2 if is_whole else 1):
        runs = draws.sample(range(0, STEPS, 4), k=2)  # with a step between them that can be taken
        steps = [first + one for first in runs for one in range(draws.randint(1, MOST_IN_A_ROW))]
        value = draws.choice(["nan", "inf", "-inf"])
        yield step, ranks, Break(kind, value, draws.randrange(ranks), sorted(steps))


@pytest.fixture(scope="module")
def broken(start: Start, is_whole: bool) -> list[tuple[Training, Break, list[int], str]]:
    """Trainings, what broke in each, its exit codes and what it said."""
    found = []
    for step, ranks, one in trials(is_whole):
        training = start.training(step, ranks)
        found.append((training, one, *training.run(one)))
    return found


def test_steps_that_are_not_finite_are_passed_over_on_all_ranks(
    broken: list[tuple[Training, Break, list[int], str]], tally: Tally
) -> None:
    steps = 0
    for training, one, codes, said in broken:
        where = f"seed {SEED}, {training.step} by {training.ranks}, {one}:\n{said}"
        assert codes == [0] * training.ranks, where
        assert "Traceback" not in said, where
        digests = []
        for rank in range(training.ranks):
            seen = training.only("step", rank)
            assert [line["step"] for line in seen] == [*range(STEPS)], where
            assert [line["step"] for line in seen if not line["taken"]] == one.steps, where
            assert all(line["before"] == line["after"] for line in seen), f"weights, optimiser, buffers; {where}"
            moved = [before["before"] != after["before"] for before, after in pairwise(seen)]
            assert moved == [line["taken"] for line in seen[:-1]], where
            digests.append([line["before"] for line in seen])
        assert all(other == digests[0] for other in digests), f"all ranks have the same; {where}"
        steps += len(one.steps)
    tally.add("not-finite", tried=steps, held=steps, note="steps passed over, equal to the bit on all ranks")


def test_the_batch_is_kept_and_the_rank_and_cause_are_named(
    broken: list[tuple[Training, Break, list[int], str]],
) -> None:
    for training, one, _, said in broken:
        where = f"seed {SEED}, {training.step} by {training.ranks}, {one}:\n{said}"
        for rank in range(training.ranks):
            batches = {line["step"]: line for line in training.only("batch", rank)}
            kept = sorted(training.kept.glob(f"*-rank-{rank}.safetensors"))
            assert [path.name for path in kept] == [
                f"step-{step + 1:09d}-rank-{rank}.safetensors" for step in one.steps[-KEPT:]
            ], where
            for path, step in zip(kept, one.steps[-KEPT:], strict=True):
                tensors, facts = load_file(path), json.loads(path.with_suffix(".json").read_text())
                assert (facts["step"], facts["rank"], facts["holds"]) == (step + 1, rank, ["sample_ids", "images"]), (
                    where
                )
                assert tensors["sample_ids"].tolist() == batches[step]["ids"], where
                is_here = one.kind == "images" and rank == one.rank
                assert bool(torch.isfinite(tensors["images"]).all()) != is_here, where
        lines = re.findall(r"step ([\d,]+): loss or gradient is not finite(.*?), first in (.*?); the step", said)
        assert [int(step) - 1 for step, _, _ in lines] == one.steps, where
        for step, ranks, cause in lines:
            assert cause == CAUSES[SEEN_IN[one.kind]], where
            # The mean over the ranks hides whose gradient it was; from the second in a row on it is looked at before.
            is_known = SEEN_IN[one.kind] != "gradient" or int(step) - 2 in one.steps
            told = f" on rank {one.rank}" if is_known else " on all ranks"
            assert ranks == (told if training.ranks > 1 else ""), where


def test_nothing_that_is_not_finite_is_ever_written(
    broken: list[tuple[Training, Break, list[int], str]], tally: Tally
) -> None:
    written = 0
    for training, one, _, said in broken:
        where = f"seed {SEED}, {training.step} by {training.ranks}, {one}:\n{said}"
        checkpoints = training.only("checkpoint", 0)
        assert len(checkpoints) == (STEPS - 1) // EVERY, where
        assert all(line["finite"] for line in checkpoints), where
        assert training.published, where
        assert all(is_finite(path) for path in training.published), where
        written += len(checkpoints) + len(training.published)
    tally.add("not-finite", tried=written, held=written, note="checkpoints and published weights that are finite")


def test_accelerate_goes_on_with_what_is_not_finite(
    zygote: Zygote, is_whole: bool, tmp_path: Path, tally: Tally
) -> None:
    """Counted, not promised: the same steps, in the loop of its documentation."""
    tried, held = 0, 0
    for number, (_, _, one) in enumerate(trials(is_whole)):
        place = tmp_path / str(number)
        place.mkdir()
        arguments = {"folder": str(place), "broken": asdict(one), "steps": STEPS, "every": EVERY}
        code, said = zygote.run([], place, prelude=("faults.broken_numbers:train_by_accelerate", arguments))
        assert "Traceback" not in said
        tried, held = tried + 1, held + (code == 0)
    assert tried > 0
    note = f"{accelerate.__version__}: trainings whose weights and states were finite in the end"
    tally.add("not-finite", subject="accelerate", tried=tried, held=held, note=note)


def test_too_many_in_a_row_go_back_twice_and_then_stop(start: Start, is_whole: bool, tally: Tally) -> None:
    """And given again without the fault it ends with the bytes of a training that never had it."""
    cases = [("tuned", 1), ("pretrained", 1), ("tuned", 2), ("pretrained", 2)][: None if is_whole else 1]
    for step, ranks in cases:
        training = start.training(step, ranks)
        codes, said = training.run(Break("gradient", "nan", ranks - 1, [*range(EVERY + 1, STEPS)]))
        assert codes == [8] * ranks, said
        last = EVERY + 1 + MOST_IN_A_ROW
        rank = f" on rank {ranks - 1}" if ranks > 1 else ""
        wanted = (
            f"simclr: step {last + 1}: loss or gradient is not finite{rank}, first in {CAUSES['gradient']}; "
            f"{MOST_IN_A_ROW + 1} in a row, and it went back to the last checkpoint 2 times"
        )
        assert [line for line in said.splitlines() if line.startswith("simclr: ")] == [wanted]
        visited = [line["step"] for line in training.only("step", 0)]
        assert visited == [*range(EVERY), *[*range(EVERY, last + 1)] * 2, *range(EVERY, last)], said
        assert said.count("so training goes back to the last checkpoint") == 2
        codes, said = training.run(None)
        assert codes == [0] * ranks, said
        assert training.files == start.unbroken(step, ranks)
    tally.add("not-finite", tried=len(cases), held=len(cases), note="too many in a row: back twice, then a stop")


def test_a_fault_that_passes_leaves_no_trace(start: Start, is_whole: bool, tally: Tally) -> None:
    """Four steps are passed over, the training goes back, and it is not there any more."""
    cases = [("tuned", 1), ("pretrained", 1), ("tuned", 2), ("pretrained", 2)][: None if is_whole else 1]
    for step, ranks in cases:
        training = start.training(step, ranks)
        codes, said = training.run(Break("loss", "nan", 0, [*range(6, 10)], visits=1))
        assert codes == [0] * ranks, said
        assert said.count("so training goes back to the last checkpoint") == 1
        assert training.files == start.unbroken(step, ranks)
    tally.add("not-finite", tried=len(cases), held=len(cases), note="a fault that passes: back once, then equal bytes")


def test_without_a_checkpoint_it_stops_at_once(start: Start) -> None:
    training = start.training("pretrained", 1)
    codes, said = training.run(Break("images", "inf", 0, [*range(STEPS)]))
    assert codes == [8], said
    assert said.splitlines()[-1].endswith("4 in a row, and no checkpoint was written yet")
    assert not [*training.folder.glob("work/*/*/checkpoints/step-*")]
