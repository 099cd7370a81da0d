"""Recipes: what is read, and that every fault is told at once."""

from pathlib import Path

import pytest
import toy_stages

from pipeline.errors import UsageError
from pipeline.recipe import Recipe, load_recipe
from pipeline.settings import changed_subset, hashed_subset
from stages.losses.registry import LOSSES
from stages.settings import STAGES

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

TOY = """
name: toy
seed: 3
steps:
  table: {stage: table, of: [train]}
  train: {stage: train, numbers: numbers, learning_rate: 3e-2}
  numbers: {stage: numbers, source: "folder:x", group: {shift: 1}}
"""


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, toy_stages.STAGES, overrides)


def faults(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as error:
        read(folder, text, *overrides)
    assert error.value.exit_code == 2
    return [line.strip() for line in str(error.value).splitlines()[1:]]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path, STAGES)
    assert recipe.name == path.stem
    assert [step.stage.name for step in recipe.sinks()] == ["report"]
    head = path.read_text().split("name:")[0]
    assert "simclr run" in head, "its header says the command"


def test_steps_run_after_what_they_read(tmp_path: Path) -> None:
    recipe = read(tmp_path, TOY)
    assert (recipe.name, recipe.seed, list(recipe.steps)) == ("toy", 3, ["numbers", "train", "table"])
    assert [step.name for step in recipe.sinks()] == ["table"]
    assert [step.name for step in recipe.needed(["train"])] == ["numbers", "train"]


def test_numbers_are_read_as_yaml_1_2_says(tmp_path: Path) -> None:
    settings = read(tmp_path, TOY, "numbers.scale=1e3", "numbers.group.shift=-.5E-1").steps
    assert settings["train"].settings.model_dump()["learning_rate"] == 0.03
    assert settings["numbers"].settings.model_dump()["scale"] == 1000.0
    assert settings["numbers"].settings.model_dump()["group"] == {"shift": -0.05}


def test_an_override_of_a_shared_group_changes_one_step(tmp_path: Path) -> None:
    text = TOY.replace("group: {shift: 1}", "group: &group {shift: 1}") + (
        '  again: {stage: numbers, source: "folder:x", group: *group}\n  train2: {stage: train, numbers: again}\n'
    )
    steps = read(tmp_path, text, "again.group.shift=2.0").steps
    assert steps["numbers"].settings.model_dump()["group"] == {"shift": 1.0}
    assert steps["again"].settings.model_dump()["group"] == {"shift": 2.0}


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        TOY,
        "train.step=3",
        "train.learning_rate=fast",
        "train.numbers=nubers",
        "numbers.scale=0",
        "numbers.group.shfit=1",
        "table.of=[train, numbers, tabel]",
        "tabel.of=1",
    )
    assert found == [
        "--set tabel.of=1: no such step: tabel (did you mean table?)",
        "train.learning_rate: input should be a valid number, not 'fast'",
        "train.step: no such setting (did you mean steps?); allowed: numbers, steps, learning_rate, "
        "record_every_steps, log_every_seconds, checkpoint_every_steps, stop_at",
        "numbers.scale: input should be greater than 0, not 0",
        "numbers.group.shfit: no such setting (did you mean shift?); allowed: shift",
        "table.of: no such step: tabel (did you mean table?); steps: table, train, numbers",
        "train.numbers: no such step: nubers (did you mean numbers?); steps: table, train, numbers",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("stage: train,", "stage: trian,", "train.stage: no stage 'trian' (did you mean train?)"),
        ("stage: train, ", "", "train.stage: is missing"),
        ("numbers: numbers, ", "", "train.numbers: is missing (what to fit)"),
        ("numbers: numbers, ", "numbers: table, ", "train.numbers: table is made by table, wanted is one made by"),
        ("seed: 3", "seed: -3", "seed: a whole number from 0, not -3"),
        ("seed: 3", "seed: true", "seed: a whole number from 0, not True"),
        ("seed: 3", "sead: 3", "sead: a recipe has name, seed and steps only (did you mean seed?)"),
        ("name: toy", "name: a/b", "name: letters, digits"),
        ("learning_rate: 3e-2", "learning_rate: true", "train.learning_rate: input should be a valid number"),
        ("learning_rate: 3e-2", "steps: 2.5", "train.steps: input should be a valid integer"),
        ("learning_rate: 3e-2", 'steps: "2"', "train.steps: input should be a valid integer"),
        ("learning_rate: 3e-2", "learning_rate: .inf", "train.learning_rate: input should be a finite number"),
        ("learning_rate: 3e-2", "learning_rate: 2026-01-01", "train: a value that is no text, number, list or group"),
    ],
)
def test_each_fault_has_one_clear_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in TOY
    assert any(line.startswith(expected) for line in faults(tmp_path, TOY.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "not a YAML file"),
        ("- 1", "a recipe has name, seed and steps"),
        ("steps: {}", "at least one step"),
        ("steps: {a: {stage: train}, a: {stage: train}}", "key stands twice: a"),
        ("steps: !!python/object/apply:os.system ['true']", "not a YAML file"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        read(tmp_path, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml", toy_stages.STAGES)


def test_a_loop_is_named(tmp_path: Path) -> None:
    text = "steps: {a: {stage: table, of: [b]}, b: {stage: table, of: [a]}}"
    path = tmp_path / "loop.yaml"
    path.write_text(text)
    # No shipped stage reads its own kind; one that does is made here.
    field = toy_stages.Table.model_fields["of"]
    assert isinstance(field.json_schema_extra, dict)
    stages = field.json_schema_extra["artifact_of"]
    assert isinstance(stages, list)
    stages.append("table")
    try:
        with pytest.raises(UsageError, match="in a loop: a, b"):
            load_recipe(path, toy_stages.STAGES)
    finally:
        stages.remove("table")


def test_overrides_have_one_form(tmp_path: Path) -> None:
    for override in ("train", "train=3", "train.steps"):
        assert faults(tmp_path, TOY, override) == [f"--set {override}: write step.field=value"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("features_random.encoder=rnadom", "no such step: rnadom (did you mean random?); steps: "),
        ("features_random.encoder=rnadom", ", or random, pixels, timm:NAME"),
        (
            "simclr.optimiser.name=sdg",
            "simclr.optimiser.name: is one of lars, sgd, adamw, muon, not 'sdg' (did you mean sgd?)",
        ),
        ("simclr.trackers=[tensrboard]", "not 'tensrboard' (did you mean tensorboard?)"),
        ("simclr.architecture.backbone=resnet81", "there are ResNets of 10, 18, 34, 50, 101, 152 layers"),
        ("simclr.architecture.backbone=convnext_tiny", "width: convnext_tiny has only the published width"),
        ("shards.source=fodler:x", "folder:PATH"),
        ("probe.neighbours=[]", "probe.neighbours: "),
        ("probe.neighbours=[0]", "probe.neighbours.0: input should be greater than or equal to 1"),
        ("report.of=[]", "report.of: "),
        (
            "shards.tile={siez: 16}",
            "shards.tile.siez: no such setting (did you mean size?); allowed: size, stride",
        ),
        ("shards.tile={stride: 16}", "shards.tile.size: is missing (height and width of a tile, in pixels)"),
        (
            "simclr.smaller_views=[{share: 0.5, image_sise: 16}]",
            "simclr.smaller_views.0.image_sise: no such setting (did you mean image_size?); allowed: share, image_size",
        ),
        ("shards.tile={stride: 8}", "shards.tile.size: is missing (height and width of a tile"),
        (
            "shards.tile={size: 8, strid: 8}",
            "tile.strid: no such setting (did you mean stride?); allowed: size",
        ),
        ("shards.split_classes={trian: [a]}", "shards.split_classes.train: is missing (classes of train"),
        ("simclr.smaller_views=[{share: 0.5}]", "simclr.smaller_views.0.image_size: is missing (height and width of"),
    ],
)
def test_values_of_shipped_settings(override: str, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe(CONFIGS / "digits.yaml", STAGES, [override])
    assert expected in str(error.value)


def test_groups_in_a_list_are_plain_data_in_a_key() -> None:
    parts = "simclr.smaller_views=[{share: 0.5, image_size: 16}]"
    settings = load_recipe(CONFIGS / "digits.yaml", STAGES, [parts]).steps["simclr"].settings
    assert hashed_subset(settings)["smaller_views"] == [{"share": 0.5, "image_size": 16}]
    assert changed_subset(settings)["smaller_views"] == [{"share": 0.5, "image_size": 16}]


FINETUNE = """
steps:
  shards: {stage: shard, source: "sklearn:digits"}
  tuned: {stage: finetune, shards: shards, encoder: random, loss: {name: arcface}}
"""


NAMES = ", ".join(LOSSES)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "tuned.loss.name=arcfac",
            f"tuned.loss.name: is one of {NAMES}, not 'arcfac' (did you mean arcface?)",
        ),
        ("tuned.loss={margin: 1}", f"tuned.loss.name: is missing (one of {NAMES})"),
        (
            "tuned.loss=triplets",
            f"tuned.loss: is a group, {{name: cross_entropy}}, not 'triplets' (did you mean triplet?); names: {NAMES}",
        ),
        (
            "tuned.loss.margn=1",
            "tuned.loss.margn: no such setting (did you mean margin?); allowed: weight, scale, name, margin, "
            "margin_ramp, centres",
        ),
        (
            "tuned.loss=[{name: triplet}, {name: bc}]",
            f"tuned.loss.1.name: is one of {NAMES}, not 'bc' (did you mean bce?)",
        ),
        ("tuned.loss=[{name: triplet, margin: 0}]", "tuned.loss.0.margin: is a number above 0, or soft, not 0"),
        (
            "tuned.loss=[{name: bce, gamma: 1}]",
            "tuned.loss.0.gamma: no such setting; allowed: weight, class_weights, name",
        ),
        ("tuned.loss.scale=big", "tuned.loss.scale: input should be a valid number, not 'big'"),
        (
            "tuned.loss={name: triplet, margin: sof}",
            "tuned.loss.margin: is a number above 0, or soft, not 'sof'",
        ),
        ("tuned.loss={name: cross_entropy, label_smoothing: 1}", "tuned.loss.label_smoothing: input should be less"),
        ("tuned.label_fraction=0", "tuned.label_fraction: input should be greater than 0"),
        ("tuned.projector_layers=1", "tuned: projector_layers: only a pretrained encoder has a projector"),
    ],
)
def test_groups_that_come_in_several_kinds(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text(FINETUNE)
    loss = load_recipe(path, STAGES, ["tuned.loss.margin=0.5"]).steps["tuned"].settings
    assert loss.model_dump()["loss"] == {
        "name": "arcface", "scale": None, "margin": 0.5, "margin_ramp": 0.5, "centres": 1, "weight": 1.0,
    }  # fmt: skip
    with pytest.raises(UsageError) as error:
        load_recipe(path, STAGES, [override])
    (fault,) = str(error.value).splitlines()[1:]
    assert fault.strip().startswith(expected)
