"""Steps that stand for several."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import toy_stages

from pipeline.errors import UsageError
from pipeline.recipe import load_recipe
from pipeline.templates import expand


def written_out(steps: dict[str, Any]) -> dict[str, Any]:
    expanded, problems = expand(steps)
    assert not problems
    return expanded


def fault(step: dict[str, Any], name: str = "a_{x}") -> str:
    expanded, problems = expand({name: step})
    assert not expanded
    (problem,) = problems
    return problem


def test_every_combination_in_order() -> None:
    each = {"start": ["random", "simclr"], "labels": {"1pct": 0.01, "all": 1.0}}
    steps = written_out({"t_{start}_{labels}": {"each": each, "encoder": "{start}", "fraction": "{labels}"}})
    assert list(steps.items()) == [
        (f"t_{start}_{word}", {"encoder": start, "fraction": fraction})
        for start, (word, fraction) in product(["random", "simclr"], [("1pct", 0.01), ("all", 1.0)])
    ]


def test_values_keep_their_type_and_texts_get_the_word() -> None:
    each = {"x": {"one": 1, "none": None, "group": {"name": "arcface", "scale": [16, 30]}}}
    steps = written_out({"a_{x}": {"each": each, "value": "{x}", "inside": {"text": "b-{x}", "list": ["{x}"]}}})
    assert steps["a_one"] == {"value": 1, "inside": {"text": "b-one", "list": [1]}}
    assert steps["a_none"]["value"] is None
    assert steps["a_group"]["value"] == {"name": "arcface", "scale": [16, 30]}
    assert steps["a_group"]["inside"]["text"] == "b-group"


def test_parts_of_a_group() -> None:
    each = {"labels": {"few": {"fraction": 0.01, "epochs": 60}, "all": {"fraction": 1.0, "epochs": 3}}}
    steps = written_out({"a_{labels}": {"each": each, "f": "{labels.fraction}", "text": "{labels.epochs} epochs"}})
    assert steps["a_few"] == {"f": 0.01, "text": "60 epochs"}
    assert steps["a_all"] == {"f": 1.0, "text": "3 epochs"}


def test_what_the_name_lacks_multiplies_items_of_lists() -> None:
    each = {"x": ["a", "b"], "y": [1, 2]}
    steps = written_out({"report": {"each": each, "of": ["first", "probe_{x}_{y}"]}})
    assert steps == {"report": {"of": ["first", "probe_a_1", "probe_a_2", "probe_b_1", "probe_b_2"]}}
    steps = written_out({"report_{x}": {"each": each, "of": ["probe_{x}_{y}"]}})
    assert steps == {f"report_{x}": {"of": [f"probe_{x}_1", f"probe_{x}_2"]} for x in "ab"}


def test_other_steps_stay_as_they_are() -> None:
    steps = {"shards": {"stage": "shard", "group_pattern": r"(\w{4})_{x}"}, "odd": 3}
    assert written_out(steps) == steps


@pytest.mark.parametrize(
    ("each", "body", "words"),
    [
        ({}, {}, "a_{x}.each: takes placeholders"),
        ({"x": []}, {}, "a_{x}.each.x: takes a list"),
        ({"x": 3}, {}, "a_{x}.each.x: takes a list"),
        ({"x": [{"name": "a"}]}, {}, "a_{x}.each.x: takes a list"),
        ({"x": [1, "1"]}, {}, "a_{x}.each.x: a value stands twice"),
        ({"x y": [1]}, {}, "a placeholder is a word"),
        ({"x": [1], "z": [1]}, {}, "a_{x}.each.z: nothing in the step says {z}"),
        ({"x": [1]}, {"to": "{w}"}, "a_{x}: {w} is not in its each, which has x"),
        ({"x": [1], "z": [1]}, {"to": "{z}"}, "a_{x}.to: {z} has to stand in the step's name"),
        ({"x": {"a": {"b": 1}}}, {"to": "{x.c}"}, "a_{x}.to: the placeholder's value has no c"),
    ],
)
def test_faults_are_named(each: Any, body: dict[str, Any], words: str) -> None:
    assert words in fault({"each": each} | body)


def test_a_name_that_stands_twice() -> None:
    plain, template = {"a_1": {"stage": "x"}}, {"a_{x}": {"each": {"x": [1, 2]}, "stage": "x"}}
    for steps in (plain | template, template | plain):
        assert expand(steps)[1] == ["a_1: stands twice: an each stands for it too"]


RECIPE = """
name: toy
steps:
  numbers: {stage: numbers, source: "folder:x"}
  train_{rate}:
    each: &rates {rate: {slow: 1e-2, fast: 0.5}}
    stage: train
    numbers: numbers
    learning_rate: "{rate}"
  table: {each: *rates, stage: table, of: [numbers, "train_{rate}"]}
"""


def test_a_recipe_with_templates(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(path, toy_stages.STAGES, ["train_*.steps=7", "train_fast.steps=9"])
    assert list(recipe.steps) == ["numbers", "train_slow", "train_fast", "table"]
    settings = {name: step.settings.model_dump() for name, step in recipe.steps.items()}
    assert [settings[name]["learning_rate"] for name in ("train_slow", "train_fast")] == [0.01, 0.5]
    assert [settings[name]["steps"] for name in ("train_slow", "train_fast")] == [7, 9]
    assert settings["table"]["of"] == ("numbers", "train_slow", "train_fast")
    assert [step.name for step in recipe.needed(["train_*"])] == ["numbers", "train_slow", "train_fast"]


def test_faults_of_templates_stand_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace('"{rate}"', '"{rates}"').replace("table, of", "tables, of"))
    with pytest.raises(UsageError) as error:
        load_recipe(path, toy_stages.STAGES)
    assert "{rates} is not in its each" in str(error.value)
    assert "table.stage: no stage 'tables'" in str(error.value)
