"""YAML as recipes are written in: safe, `3e-4` a number as in YAML 1.2, no key twice, no deeper than recipes are.

Depth and size are looked at before anything is built: libyaml overflows the stack on what nests a hundred thousand
deep, and a few lines of aliases stand for more values than fit into memory.
"""

import re
from collections import Counter
from collections.abc import Hashable
from typing import Any

import yaml

DEEPEST = 50
MOST_VALUES = 100_000
"""With aliases counted as often as they stand there."""

PLACE = re.compile(r'in "<unicode string>", (line \d+, column \d+)(?:: .*? \^)?')
"""As the parsers write it; that of Python draws the line below it."""

_SafeLoader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
"""The first is several times as fast, and in all wheels of PyYAML."""


def read_yaml(text: str) -> Any:
    """The value that a text stands for.

    Raises:
        yaml.YAMLError: it is no YAML, has a key twice, names a Python object, or is too deep or too large.
    """
    _check_extent(text)
    return yaml.load(text, Loader=_Loader)  # a safe loader: see below


def in_one_line(error: Exception) -> str:
    """What is wrong with a text, and where, without the name that the parser calls it by and without a drawing."""
    return PLACE.sub(r"in \1", " ".join(str(error).split()))


def _check_extent(text: str) -> None:
    values, sizes = 0, dict[str, int]()
    groups: list[tuple[str | None, int]] = []  # those that are open: anchor, and how many values stood before
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in groups):
                raise yaml.YAMLError(f"*{event.anchor} stands within what it means (line {event.start_mark.line + 1})")
            values += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            groups.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = groups.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
        if len(groups) > DEEPEST or values > MOST_VALUES:
            much = f"nests more than {DEEPEST} deep" if len(groups) > DEEPEST else f"holds over {MOST_VALUES:,} values"
            raise yaml.YAMLError(f"it {much} (line {event.start_mark.line + 1})")


class _Loader(_SafeLoader):
    """PyYAML's safe loader with other numbers, and without doubled keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if not all(isinstance(key, Hashable) for key in keys):
            raise yaml.constructor.ConstructorError(None, None, "a list or a group is no key", node.start_mark)
        doubled = [str(key) for key, times in Counter(keys).items() if times > 1]
        if doubled:
            raise yaml.constructor.ConstructorError(
                None, None, f"key stands twice: {', '.join(doubled)}", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
