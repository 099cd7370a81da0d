"""Recipes' YAML, with either parser: what it reads as, and what is refused before it costs anything."""

import importlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from pipeline import yaml_text
from pipeline.yaml_text import DEEPEST, MOST_VALUES

Read = Callable[[str], Any]


@pytest.fixture(params=["libyaml", "python"])
def read_yaml(request: pytest.FixtureRequest) -> Iterator[Read]:
    with pytest.MonkeyPatch.context() as patch:
        assert yaml.__with_libyaml__, "PyYAML's wheels have it"
        patch.setattr(yaml, "__with_libyaml__", request.param == "libyaml")
        yield importlib.reload(yaml_text).read_yaml
    importlib.reload(yaml_text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("-1E5", -1e5),
        ("1e3x", "1e3x"),
        ("{a: &x [1, 2], b: *x}", {"a": [1, 2], "b": [1, 2]}),
        ("{a: &x {p: 1, q: 2}, b: {<<: *x, q: 3}}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("[" * DEEPEST + "]" * DEEPEST, None),
        ("", None),
    ],
)
def test_what_it_reads(read_yaml: Read, text: str, value: Any) -> None:
    read = read_yaml(text)
    assert read == value if value is not None else not read or isinstance(read, list)


def bomb(letters: str) -> str:
    lines = [f"{letters[0]}: &{letters[0]} [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{one}: &{one} [{', '.join([f'*{before}'] * 10)}]" for before, one in itertools.pairwise(letters)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nests more than"),
        ("- " * 100_000 + "1", "nests more than"),
        ("{a: " * 100_000 + "}" * 100_000, "nests more than"),
        (bomb("abcdefghijklmnopqrstuvwxyz"), "holds over"),
        ("[" + "1, " * (MOST_VALUES + 1) + "]", "holds over"),
        ("&a [*a]", "stands within what it means"),
        ("a: &a {b: {c: *a}}", "stands within what it means"),
        ("{a: 1, a: 2}", "key stands twice: a"),
        ("{[1, 2]: 3}", "no key"),
        ("{? {a: 1} : 3}", "no key"),
        ("*nowhere", "undefined alias"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a: [1", "expected"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_is_refused_at_once(read_yaml: Read, text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(yaml.YAMLError, match=message):
        read_yaml(text)
    assert time.process_time() - started < 20  # whatever they stand for, it is seen before it is built


def test_the_place_is_said_in_words(read_yaml: Read) -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        read_yaml("a: 1\nb:\n  c: 1\n  c: 2\n")
    assert yaml_text.in_one_line(caught.value) == "key stands twice: c in line 3, column 3"


def test_many_keys_are_not_compared_each_with_each() -> None:
    started = time.process_time()
    assert len(yaml_text.read_yaml("\n".join(f"key{number}: 1" for number in range(MOST_VALUES // 2 - 1)))) > 49_000
    assert time.process_time() - started < 20  # minutes, if they were
