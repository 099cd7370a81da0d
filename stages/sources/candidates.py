"""What a source gives: candidates, images that may become samples."""

import errno
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SPLITS = ("train", "val", "test")
"""In this order everywhere."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Words, in lower case, that stand for a split: names of folders, beginnings of file names, values of a column."""

NAMED_KINDS = 8


class SourceError(ValueError):
    """The source is not there, is empty, or cannot be understood."""

    exit_code = 6


class Readable(Protocol):
    """An image inside a larger file; can be pickled."""

    @property
    def size_bytes(self) -> int:
        """Roughly; 0 where it is not known."""
        ...

    def read(self) -> bytes:
        """The bytes of an image file.

        Raises:
            OSError: there is nothing to read, with a reason.
        """
        ...


@dataclass(frozen=True, slots=True)
class Absent:
    """In the place of an image that the source announces and does not have: it is rejected, with the reason."""

    reason: str
    size_bytes: int = 0

    def read(self) -> bytes:
        raise FileNotFoundError(errno.ENOENT, self.reason)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that may become a sample.

    Attributes:
        key: path relative to the source, posix, unique within it.
        image: the file, relative to `Source.root`, or the bytes of an image file, or what can read them.
        split: one of SPLITS where the source gives it, else None: to be drawn.
        labels: names of its classes; none where the image has no label.
        group: what it shares with others of its patient or video; None where none is declared.
        attributes: a value for each name in `Source.attributes`; None where there is none.
    """

    key: str
    image: str | bytes | Readable
    split: str | None = None
    labels: tuple[str, ...] = ()
    group: str | None = None
    attributes: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Source:
    """All candidates of a source.

    Attributes:
        root: absolute folder that files are relative to; None where paths are absolute or candidates hold bytes.
        candidates: sorted by key; either all have a split or none has.
        left_out: how many files beside the candidates were left out, by their ending (`.txt`) or another short word
            for their kind.
        remarks: what about the source deserves a warning, a line each.
        notes: what was chosen where the settings left a choice, a line each.
        attributes: names of what else is known of every image.
    """

    root: Path | None
    candidates: list[Candidate]
    left_out: Counter[str]
    remarks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        """Names of all classes, sorted; a label is a position in this list."""
        return sorted({name for one in self.candidates for name in one.labels})

    @property
    def has_groups(self) -> bool:
        """Whether any candidate has a declared group."""
        return any(one.group is not None for one in self.candidates)


def describe_left_out(left_out: Counter[str]) -> str:
    """In words, most frequent first: `1,200 other files left out (.heic 1,198, .txt 2)`."""
    ranked = sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0]))
    named = [f"{kind} {count:,}" for kind, count in ranked[:NAMED_KINDS]]
    rest = sum(count for _, count in ranked[NAMED_KINDS:])
    named += [f"others {rest:,}"] if rest else []
    kinds = f" ({', '.join(named)})" if named else ""
    return f"{left_out.total():,} other files left out{kinds}"


def unique_keys(names: Iterable[str]) -> list[str]:
    """The names, the second of equal ones with `#2` behind it, and so on.

    What a source lists twice stays twice: dropping a row would be silent, and failing would refuse sets in which two
    people labelled one image. But a key names one sample.
    """
    names = list(names)
    taken = set(names)
    if len(taken) == len(names):
        return names
    times: Counter[str] = Counter()
    keys = []
    for name in names:
        times[name] += 1
        key = name
        while times[name] > 1 and (key := f"{name}#{times[name]}") in taken:
            times[name] += 1
        taken.add(key)
        keys.append(key)
    return keys
