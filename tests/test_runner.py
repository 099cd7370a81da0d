"""What runs, what does not, and why: on stages that take no time."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_stages
from filelock import SoftFileLease

from pipeline import runner
from pipeline.errors import DamagedArtifact, Held, Interrupted, NotFinite, UsageError
from pipeline.recipe import Recipe, load_recipe
from pipeline.run import Run
from pipeline.runner import Finished, Planned, Planner
from pipeline.store import Store

RECIPE = """
name: toy
steps:
  numbers: {{stage: numbers, source: "folder:{source}"}}
  train: {{stage: train, numbers: numbers}}
  other: {{stage: train, numbers: numbers, steps: 7}}
  table: {{stage: table, of: [train, other]}}
"""


class World:
    """A recipe, its source, and a store."""

    def __init__(self, folder: Path):
        self.source = folder / "source"
        self.source.mkdir()
        (self.source / "a.txt").write_text("0.1 0.2 0.3")
        self.path = folder / "toy.yaml"
        self.path.write_text(RECIPE.format(source=self.source))
        self.store = Store(folder / "store")
        self.stages = dict(toy_stages.STAGES)
        self.told: list[str] = []

    def planner(self, recipe: Recipe, **options: Any) -> Planner:
        return Planner(self.store, recipe, self.told.append, **options)

    def plan(self, *overrides: str, look: bool = True) -> dict[str, Planned]:
        recipe = load_recipe(self.path, self.stages, overrides)
        return {one.step.name: one for one in runner.plan(self.planner(recipe, look=look))}

    def states(self, *overrides: str) -> dict[str, str]:
        return {name: one.state for name, one in self.plan(*overrides).items()}

    def run(self, *overrides: str, steps: tuple[str, ...] = (), seed: int | None = None, force: bool = False):
        recipe = load_recipe(self.path, self.stages, overrides, seed)
        announced: list[Planned] = []
        forced = runner.forced_steps(recipe, steps) if force else frozenset()
        finished = runner.run(self.planner(recipe, forced=forced), steps, announced.append)
        self.announced = {one.step.name: one for one in announced}
        self.finished: dict[str, Finished] = {one.planned.step.name: one for one in finished}
        return {name for name, one in self.finished.items() if one.ran}

    def files(self, step: str) -> dict[str, bytes]:
        record = self.finished[step].record
        folder = self.store.files(record.stage, record.digest)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_second_run_does_nothing(world: World) -> None:
    assert world.run() == {"numbers", "train", "other", "table"}
    assert world.run() == set()
    assert set(world.states().values()) == {"up to date"}


def test_what_cannot_change_the_result_reruns_nothing(world: World) -> None:
    world.run()
    overrides = ["numbers.workers=7", "train.log_every_seconds=1", "train.checkpoint_every_steps=2"]
    assert world.run(*overrides) == set()


def test_a_setting_reruns_its_step_and_what_depends_on_its_bytes(world: World) -> None:
    world.run()
    plan = world.plan("train.steps=30")
    assert {name: one.state for name, one in plan.items()} == {
        "numbers": "up to date",
        "train": "run",
        "other": "up to date",
        "table": "waits",
    }
    assert plan["train"].why == "steps 20 -> 30"
    assert world.run("train.steps=30") == {"train", "table"}
    assert world.announced["table"].why == "input of v1 -> v2"


def test_equal_bytes_keep_what_stands_downstream(world: World) -> None:
    world.run()
    # 0.1 x 2 + 0.0 and so on give other bytes; then a setting that cancels out gives the old ones.
    (world.source / "a.txt").write_text("0.2 0.4 0.6")
    assert world.run("numbers.scale=0.5") == {"numbers"}
    assert "scale 1.0 -> 0.5" in world.announced["numbers"].why
    assert "input source has other files or other content" in world.announced["numbers"].why
    assert world.finished["numbers"].version.label == "v1", "equal bytes make no new version"


def test_versions_and_latest(world: World) -> None:
    world.run()
    world.run("numbers.group.shift=1.0")
    assert world.announced["numbers"].why == "group.shift 0.0 -> 1.0"
    assert world.announced["train"].why == "input numbers v1 -> v2"
    assert [version.label for version in world.store.versions("toy", "numbers")] == ["v1", "v2"]
    world.run()
    latest = world.store.latest("toy", "numbers")
    assert latest is not None
    assert latest.label == "v1", "latest is what the last run made or reused"


def test_the_seed_counts_where_it_matters(world: World) -> None:
    world.run()
    assert world.run(seed=1) == {"train", "other", "table"}
    assert world.announced["train"].why == "seed 0 -> 1"
    assert world.finished["numbers"].record.seed is None


def test_a_raised_stage_version_reruns(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    monkeypatch.setattr(toy_stages.Train, "stage_version", 2)
    assert world.run() == {"train", "other", "table"}, "a table shows its lineage, so it follows what made its inputs"
    assert world.finished["train"].version.label == "v1", "equal bytes make no new version"
    assert world.announced["train"].why == "stage version 1 -> 2"


def test_foreign_files_count_by_content(world: World) -> None:
    world.run()
    text = (world.source / "a.txt").read_text()
    (world.source / "a.txt").write_text(text)  # another time, the same content
    (world.source / "note.md").write_text("not a kind that counts")
    assert world.run() == set()
    (world.source / "b.txt").write_text("0.4")
    assert world.plan(look=False)["numbers"].state == "up to date", "status trusts the last look"
    assert world.run() == {"numbers", "train", "other", "table"}


def test_selected_steps_bring_what_they_need(world: World) -> None:
    assert world.run(steps=("other",)) == {"numbers", "other"}
    with pytest.raises(UsageError, match="no such step"):
        world.run(steps=("nothing",))


def test_force_reruns_only_what_was_selected(world: World) -> None:
    world.run()
    assert world.run(steps=("train",), force=True) == {"train"}


def test_an_input_may_be_an_artifact_of_the_store(world: World) -> None:
    world.run()
    world.run("numbers.scale=3.0")
    assert world.run("train.numbers=toy/numbers@v1", "numbers.scale=3.0") == {"table"}
    assert world.finished["train"].version.label == "v1"


def test_a_damaged_record_is_named(world: World) -> None:
    world.run()
    record = world.finished["train"].record
    path = world.store.path / "runs" / "train" / record.key / f"{record.digest}.json"
    path.write_text(path.read_text().replace('"steps":20', '"steps":21'))
    with pytest.raises(DamagedArtifact, match="hash does not match"):
        world.plan()


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11, 19])
def test_an_interrupted_run_resumes_to_the_same_bytes(world: World, tmp_path: Path, stop_at: int) -> None:
    world.run()
    expected = world.files("train")
    world.store = Store(tmp_path / "second")
    with pytest.raises(Interrupted):
        world.run(f"train.stop_at={stop_at}")
    planned = world.plan()["train"]
    assert (planned.state, planned.why) == ("resume", "from its last checkpoint")
    world.run()
    assert world.files("train") == expected
    attempts = world.finished["train"].record.attempts
    if sys.platform == "linux":  # elsewhere it is not measured
        assert all(one["peak_memory_bytes"]["host"] > 2**20 for one in attempts)
    assert [(attempt["ended"], attempt["first_step"]) for attempt in attempts] == [
        ("interrupted", 0),
        ("finished", stop_at),
    ]


def test_fresh_discards_checkpoints(world: World) -> None:
    with pytest.raises(Interrupted):
        world.run("train.stop_at=9")
    recipe = load_recipe(world.path, world.stages)
    planner = world.planner(recipe, fresh=True)
    assert {one.step.name: one.state for one in runner.plan(planner)}["train"] == "run"
    finished = runner.run(planner, (), lambda _: None)
    attempts = next(one for one in finished if one.planned.step.name == "train").record.attempts
    assert [attempt["first_step"] for attempt in attempts] == [0, 0]


def test_a_step_that_another_process_is_at_is_left_alone(world: World) -> None:
    world.run(steps=("numbers",))
    key = world.plan()["train"].key
    assert key is not None
    work = world.store.work("train", key)
    work.mkdir(parents=True)
    with SoftFileLease(work / "lease", lease_duration=30.0), pytest.raises(Held, match="another process"):
        world.run()


def test_records_say_what_made_an_artifact(world: World) -> None:
    world.run()
    record = world.finished["train"].record
    assert record.inputs == {"numbers": world.finished["numbers"].record.digest}
    assert record.settings["steps"] == 20
    assert "checkpoint_every_steps" in record.settings
    assert "checkpoint_every_steps" not in record.hashed_settings
    assert record.environment["libraries"]["torch"]
    lineage = [one.step for one in world.store.ancestors(world.finished["table"].record)]
    assert lineage == ["numbers", "train", "other", "table"]
    timing = world.store.timing(record.stage, record.key, record.digest)
    assert all(json.loads(line)["images_per_second"] > 0 for line in timing.read_text().splitlines())
    assert not list(world.store.work("train", record.key).glob("checkpoints/*")), (
        "a finished step drops its checkpoints"
    )


def test_the_times_of_a_result_that_came_second_are_not_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run(steps=("train",))
    first = world.finished["train"].record
    pointer = world.store.pointer("train", first.key)
    content = pointer.read_bytes()
    pointer.unlink()
    train = toy_stages.train

    def train_while_another_does(run: Run, settings: toy_stages.Train) -> None:
        train(run, settings)
        (run.out / "more.txt").write_text("other bytes")
        pointer.write_bytes(content)

    monkeypatch.setattr(toy_stages, "train", train_while_another_does)
    assert world.run(steps=("train",)) == {"train"}
    assert world.finished["train"].record == first
    left = {f"{first.digest}.json", f"{first.digest}.timing.jsonl", "current.json"}
    assert {path.name for path in pointer.parent.iterdir()} == left


def test_a_damaged_artifact_is_made_again_by_force(world: World) -> None:
    world.run()
    record = world.finished["train"].record
    (world.store.files("train", record.digest) / "model.json").write_text("[0.0, 0.0]")
    assert world.store.verify("train", record.digest)
    assert world.run(steps=("train",), force=True) == {"train"}
    assert not world.store.verify("train", record.digest)
    assert len(list((world.store.path / "trash").iterdir())) == 1, "the damaged one is kept for a look"


def test_an_artifact_of_another_stage_is_refused(world: World) -> None:
    world.run()
    with pytest.raises(
        UsageError, match=r"train\.numbers: toy/table@v1 is made by table, wanted is one made by numbers"
    ):
        world.plan("train.numbers=toy/table@v1")


def test_a_step_that_fails_leaves_nothing_but_its_log(world: World) -> None:
    with pytest.raises(NotFinite):
        world.run("train.learning_rate=1e30")
    left = [path for path in (world.store.path / "work" / "train").glob("*/*") if path.name.startswith("out")]
    assert left == []


def test_reading_many_files_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.provenance.FILES_WORTH_A_WORD", 0)
    world.plan()
    assert [line.endswith("reads 1 files that are new or changed since the last look") for line in world.told] == [True]
    world.plan()
    assert len(world.told) == 1
