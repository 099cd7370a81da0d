"""Steps that are written once and stand for several: `each` gives the values of placeholders.

    tuned_{start}_{labels}:
      each: {start: [random, simclr], labels: {1pct: 0.01, all: 1.0}}
      stage: finetune
      encoder: "{start}"
      label_fraction: "{labels}"

stands for tuned_random_1pct, tuned_random_all, tuned_simclr_1pct and tuned_simclr_all. A placeholder's values are a
list, or a mapping from the word that names have to the value that settings get; where that value is a group,
`{labels.fraction}` is a part of it. A placeholder that the step's name lacks multiplies the items of lists which
hold it. In such a step every word in braces is a placeholder.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

EACH = "each"
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)((?:\.\w+)*)\}")

Choice = dict[str, tuple[str, Any]]
"""By placeholder: the word for it in a text, and its value."""


class TemplateFault(Exception):
    """What is wrong with a step that stands for several, with the dotted key."""


def expand(steps: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """All steps, those that stand for several written out, in the order of the recipe.

    Returns:
        The steps, and what is wrong, a line each; a step with a fault is left out.
    """
    expanded: dict[str, Any] = {}
    problems = []
    for name, values in steps.items():
        is_template = isinstance(values, dict) and EACH in values
        try:
            written_out = dict(_written_out(str(name), values)) if is_template else {str(name): values}
        except TemplateFault as fault:
            problems.append(str(fault))
            continue
        problems += [f"{one}: stands twice: an each stands for it too" for one in written_out if one in expanded]
        expanded |= written_out
    return expanded, problems


def _written_out(name: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    each = _read_each(name, values[EACH])
    body = {key: value for key, value in values.items() if key != EACH}
    _refuse_unknown(name, [name, body], each)
    in_name = [one for one in each if one in _placeholders(name)]
    unused = [one for one in each if one not in _placeholders(name) | _placeholders(body)]
    if unused:
        raise TemplateFault(f"{name}.each.{unused[0]}: nothing in the step says {{{unused[0]}}}")
    for choice in _choices(each, in_name):
        filled = {key: _filled(value, choice, each, f"{name}.{key}") for key, value in body.items()}
        yield str(_substituted(name, choice, as_text=True)), filled


def _read_each(name: str, given: Any) -> dict[str, Choice]:
    """By placeholder: its values by the word for each."""
    if not isinstance(given, dict) or not given:
        raise TemplateFault(f"{name}.each: takes placeholders with their values, such as {{loss: [triplet, arcface]}}")
    each: dict[str, Choice] = {}
    for placeholder, values in given.items():
        place = f"{name}.each.{placeholder}"
        if not isinstance(placeholder, str) or not PLACEHOLDER.fullmatch(f"{{{placeholder}}}"):
            raise TemplateFault(f"{place}: a placeholder is a word of letters, digits and _")
        if isinstance(values, list) and values and not any(isinstance(value, dict | list) for value in values):
            each[placeholder] = {str(value): (str(value), value) for value in values}
        elif isinstance(values, dict) and values:
            each[placeholder] = {str(word): (str(word), value) for word, value in values.items()}
        else:
            raise TemplateFault(f"{place}: takes a list of words or numbers, or a mapping from words to values")
        if len(each[placeholder]) < len(values):
            raise TemplateFault(f"{place}: a value stands twice")
    return each


def _choices(each: Mapping[str, Choice], placeholders: list[str]) -> Iterator[Choice]:
    """Every combination of values of these placeholders, the last one changing fastest."""
    for values in itertools.product(*(each[one].values() for one in placeholders)):
        yield dict(zip(placeholders, values, strict=True))


def _filled(value: Any, choice: Choice, each: Mapping[str, Choice], place: str) -> Any:
    """A copy of a value with its placeholders filled in; items of lists are multiplied."""
    if isinstance(value, dict):
        return {key: _filled(inner, choice, each, f"{place}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        items = []
        for item in value:
            free = [one for one in each if one in _placeholders(item) and one not in choice]
            items += [_filled(item, choice | more, each, place) for more in _choices(each, free)]
        return items
    if isinstance(value, str):
        free = [one for one in _placeholders(value) if one in each and one not in choice]
        if free:
            raise TemplateFault(f"{place}: {{{free[0]}}} has to stand in the step's name, or in an item of a list")
        return _substituted(value, choice, place=place)
    return value


def _substituted(text: str, choice: Choice, *, as_text: bool = False, place: str = "") -> Any:
    """A text with its placeholders replaced: by words, or by the value itself where it is nothing but one."""
    whole = PLACEHOLDER.fullmatch(text)
    if whole and not as_text:
        return _part(choice[whole[1]][1], whole[2], place)

    def word(match: re.Match[str]) -> str:
        named, value = choice[match[1]]
        return str(_part(value, match[2], place)) if match[2] else named

    return PLACEHOLDER.sub(word, text)


def _part(value: Any, path: str, place: str) -> Any:
    for key in path.split(".")[1:]:
        if not isinstance(value, dict) or key not in value:
            raise TemplateFault(f"{place}: the placeholder's value has no {key}: {value!r}")
        value = value[key]
    return value


def _placeholders(value: Any) -> set[str]:
    """The names of the placeholders anywhere inside a value."""
    if isinstance(value, dict):
        return {name for inner in value.values() for name in _placeholders(inner)}
    if isinstance(value, list):
        return {name for inner in value for name in _placeholders(inner)}
    return {match[1] for match in PLACEHOLDER.finditer(value)} if isinstance(value, str) else set()


def _refuse_unknown(name: str, texts: list[Any], each: Mapping[str, Choice]) -> None:
    unknown = sorted(_placeholders(texts) - each.keys())
    if unknown:
        raise TemplateFault(f"{name}: {{{unknown[0]}}} is not in its each, which has {', '.join(each)}")
