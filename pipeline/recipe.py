"""Recipes: one YAML file, a list of named steps, read and checked before anything runs."""

import difflib
import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import UsageError
from pipeline.settings import (
    ONE,
    SEVERAL,
    Settings,
    StageSettings,
    artifact_stages,
    artifact_words,
    is_artifact_field,
    kinds_of,
    names_artifact,
)
from pipeline.stage import Stage
from pipeline.store import DIGEST, REFERENCE
from pipeline.templates import PLACEHOLDER, expand
from pipeline.yaml_text import in_one_line, read_yaml

NAME = re.compile(r"^[A-Za-z0-9][\w-]*$")


@dataclass(frozen=True)
class Step:
    """A stage with settings and inputs, under a name of its own."""

    name: str
    stage: Stage
    settings: StageSettings

    def references(self) -> dict[str, list[str]]:
        """By setting: the steps or REFs that it names."""
        found = {}
        for name, field in type(self.settings).model_fields.items():
            value = getattr(self.settings, name)
            if is_artifact_field(field) and names_artifact(field, value):
                found[name] = list(value) if isinstance(value, tuple) else [value]
        return found


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Its steps stand in an order in which they can run."""

    name: str
    seed: int
    steps: dict[str, Step]

    def needed(self, selected: Sequence[str]) -> list[Step]:
        """The selected steps (all, if none; `*` stands for any letters) and the steps they need, in running order.

        Raises:
            UsageError: a selected step is not in the recipe.
        """
        if not selected:
            return list(self.steps.values())
        wanted: set[str] = set()
        pending = self.matching(selected)
        while pending:
            name = pending.pop()
            if name in self.steps and name not in wanted:
                wanted.add(name)
                pending += [one for names in self.steps[name].references().values() for one in names]
        return [step for step in self.steps.values() if step.name in wanted]

    def matching(self, selected: Sequence[str]) -> list[str]:
        """The names of the selected steps. Raises UsageError where one is not in the recipe."""
        found = {name: fnmatch.filter(self.steps, name) for name in selected}
        unknown = [name for name, steps in found.items() if not steps]
        if unknown:
            raise UsageError(f"{unknown[0]}: no such step{_pattern(unknown[0])}; {self.name} has {listed(self.steps)}")
        return [name for steps in found.values() for name in steps]

    def sinks(self) -> list[Step]:
        """The steps that no other step reads: what the recipe is for."""
        read = {name for step in self.steps.values() for names in step.references().values() for name in names}
        return [step for step in self.steps.values() if step.name not in read]


def load_recipe(
    path: Path, stages: Mapping[str, Stage], overrides: Sequence[str] = (), seed: int | None = None
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        stages: every stage by name.
        overrides: `step.field=value`, values as in YAML; `*` in the name of the step stands for any letters.
        seed: instead of the recipe's own.

    Raises:
        UsageError: with every fault found, one a line: step, dotted key, what is allowed, the nearest name.
    """
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such recipe") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not a YAML file: {in_one_line(error)}") from error
    if not isinstance(data, dict) or not isinstance(data.get("steps"), dict) or not data["steps"]:
        raise UsageError(f"{path}: a recipe has name, seed and steps, and at least one step")
    problems = [
        f"{key}: a recipe has name, seed and steps only{_nearest(str(key), ('name', 'seed', 'steps'))}"
        for key in data
        if key not in ("name", "seed", "steps")
    ]
    name, own_seed = data.get("name", path.stem), data.get("seed", 0)
    if not isinstance(name, str) or not NAME.match(name):
        problems.append(f"name: letters, digits, - and _ only, not {name!r}")
    if isinstance(own_seed, bool) or not isinstance(own_seed, int) or not 0 <= own_seed < 2**63:
        problems.append(f"seed: a whole number from 0, not {own_seed!r}")
    written, found = expand(data["steps"])
    problems += found
    for override in overrides:
        problems += _apply(written, override)
    steps: dict[str, Step] = {}
    for step_name, values in written.items():
        step, found = _read_step(step_name, values, stages)
        problems += found
        if step is not None:
            steps[step.name] = step
    problems += _check_references(written, stages)
    ordered = {} if problems else _ordered(steps, problems)
    if problems:
        raise UsageError(f"{path}: {len(problems)} fault(s)\n" + "\n".join(f"  {problem}" for problem in problems))
    return Recipe(name, own_seed if seed is None else seed, ordered)


def _apply(steps: dict[str, Any], override: str) -> list[str]:
    """Write one `step.field=value` into the steps; returns what is wrong with it."""
    path, equals, text = override.partition("=")
    pattern, *keys = path.split(".")
    if not equals or not keys:
        return [f"--set {override}: write step.field=value"]
    matching = [name for name in fnmatch.filter(steps, pattern) if isinstance(steps[name], dict)]
    if not matching:
        return [f"--set {override}: no such step: {pattern}{_pattern(pattern) or _nearest(pattern, steps)}"]
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        return [f"--set {override}: {in_one_line(error)}"]
    for step in matching:
        # Groups that come from one YAML anchor are one object: copy on the way down, so that only this step changes.
        steps[step] = group = dict(steps[step])
        for key in keys[:-1]:
            below = group.get(key)
            group[key] = dict(below) if isinstance(below, dict) else {}
            group = group[key]
        group[keys[-1]] = value
    return []


def _read_step(name: str, values: Any, stages: Mapping[str, Stage]) -> tuple[Step | None, list[str]]:
    if not NAME.match(name):
        return None, [f"{name}: the name of a step has letters, digits, - and _ only"]
    if not isinstance(values, dict) or not isinstance(values.get("stage"), str):
        return None, [f"{name}.stage: is missing; stages: {', '.join(stages)}"]
    if values["stage"] not in stages:
        nearest = _nearest(values["stage"], stages)
        return None, [f"{name}.stage: no stage {values['stage']!r}{nearest}; stages: {', '.join(stages)}"]
    stage = stages[values["stage"]]
    try:
        text = json.dumps({key: value for key, value in values.items() if key != "stage"})
        # By way of JSON, because strict validation takes a JSON list for a tuple, and nothing else for anything else.
        return Step(name, stage, stage.settings.model_validate_json(text, strict=True)), []
    except TypeError as error:
        return None, [f"{name}: a value that is no text, number, list or group: {error}"]
    except ValidationError as error:
        return None, [_problem(name, stage, details) for details in error.errors(include_url=False)]


def _problem(step: str, stage: Stage, details: ErrorDetails) -> str:
    """One line from one validation error."""
    keys, group, kinds = _locate(stage.settings, details["loc"])
    place = ".".join([step, *keys])
    if details["type"] == "extra_forbidden":
        allowed = list(group.model_fields)
        return f"{place}: no such setting{_nearest(keys[-1], allowed)}; allowed: {', '.join(allowed)}"
    if details["type"] == "missing":
        return f"{place}: is missing ({group.model_fields[keys[-1]].description})"
    if kinds:  # the group itself is wrong, not a key in it
        return _kind_problem(place, details["input"], kinds)
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "literal_error":
        expected = re.findall("'([^']*)'", details["ctx"]["expected"])
        nearest = _nearest(str(details["input"]), expected)
        return f"{place}: is one of {', '.join(expected)}, not {details['input']!r}{nearest}"
    return f"{place}: {message[0].lower()}{message[1:]}, not {details['input']!r}" if keys else f"{place}: {message}"


def _locate(
    group: type[Settings], location: Sequence[str | int]
) -> tuple[list[str], type[Settings], dict[str, type[Settings]]]:
    """Keys as they stand in the recipe, the group that holds the last of them, and what kinds it may itself be of.

    Between a group that comes in several kinds and its keys pydantic puts the kind, which is no key.
    """
    keys: list[str] = []
    inner, kinds = group, {}
    for part in map(str, location):
        if part in (ONE, SEVERAL):
            continue
        if part in kinds:
            inner, kinds = kinds[part], {}
            continue
        keys.append(part)
        if part.isdecimal():  # a place in a list, whose groups are of the kind that `inner` is, or of one of `kinds`
            continue
        group = inner
        field = group.model_fields.get(part)
        kinds = {} if field is None else kinds_of(field)
        if field is not None and not kinds:  # itself a group, of a list, or one that may be left out
            annotations = (field.annotation, *get_args(field.annotation))
            groups = (one for one in annotations if isinstance(one, type) and issubclass(one, Settings))
            inner = next(groups, inner)
    return keys, group, kinds


def _pattern(name: str) -> str:
    """A word on a name that has placeholders: the command line knows the steps that it stands for."""
    pattern = PLACEHOLDER.sub("*", name)
    return "" if pattern == name else f" (write {pattern} for all that it stands for)"


def _kind_problem(place: str, value: Any, kinds: Mapping[str, Any]) -> str:
    names = ", ".join(kinds)
    if not isinstance(value, dict):
        if value in kinds:
            return f"{place}: write {{name: {value}}}, with its settings beside the name"
        nearest = _nearest(str(value), kinds)
        return f"{place}: is a group, {{name: {next(iter(kinds))}}}, not {value!r}{nearest}; names: {names}"
    if "name" not in value:
        return f"{place}.name: is missing (one of {names})"
    return f"{place}.name: is one of {names}, not {value['name']!r}{_nearest(str(value['name']), kinds)}"


def _check_references(steps: Mapping[Any, Any], stages: Mapping[str, Stage]) -> list[str]:
    """Every input names a step that makes what is wanted, or looks like a REF into the store.

    Reads the recipe as written, so that faults show beside those of steps whose settings are wrong.
    """
    made_by = {str(name): values.get("stage") for name, values in steps.items() if isinstance(values, dict)}
    problems = []
    for name, values in steps.items():
        if not isinstance(values, dict) or values.get("stage") not in stages:
            continue
        for key, field in stages[values["stage"]].settings.model_fields.items():
            if is_artifact_field(field):
                value = values.get(key)
                for one in value if isinstance(value, list) else [value]:
                    if isinstance(one, str) and names_artifact(field, one):
                        words = artifact_words(field)
                        wanted = artifact_stages(field)
                        problems += _check_reference(f"{name}.{key}", wanted, words, one, made_by, stages)
    return problems


def _check_reference(
    place: str,
    wanted: list[str],
    words: list[str],
    reference: str,
    made_by: Mapping[str, Any],
    known_stages: Mapping[str, Stage],
) -> list[str]:
    if reference in made_by:
        if made_by[reference] in wanted or made_by[reference] not in known_stages:
            return []  # of a stage that does not exist, that is said already
        fitting = [name for name, stage in made_by.items() if stage in wanted]
        return [
            f"{place}: {reference} is made by {made_by[reference]}, "
            f"wanted is one made by {' or '.join(wanted)}: {listed(fitting)}"
        ]
    if DIGEST.match(reference) or (("@" in reference or "/" in reference) and REFERENCE.match(reference)):
        return []
    nearest = _nearest(reference, [*made_by, *words])
    others = f", or {', '.join(words)}" if words else ""
    return [f"{place}: no such step: {reference}{nearest}; steps: {listed(made_by)}{others}"]


def _ordered(steps: Mapping[str, Step], problems: list[str]) -> dict[str, Step]:
    """Steps after what they read, otherwise as written; a loop is added to `problems`."""
    ordered: dict[str, Step] = {}
    pending = {
        name: {one for names in step.references().values() for one in names if one in steps}
        for name, step in steps.items()
    }
    while pending:
        first = next((name for name, reads in pending.items() if reads <= ordered.keys()), None)
        if first is None:
            problems.append(f"steps that wait for one another in a loop: {listed(pending)}")
            return {}
        ordered[first] = steps[first]
        del pending[first]
    return ordered


def _nearest(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names in words, those beyond `most` as a number."""
    names = [*names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"
