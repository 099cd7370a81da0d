"""What a source gives: candidates, images that may become samples."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "val", "test")
"""In this order everywhere."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that may become a sample.

    Attributes:
        key: path relative to the source, posix, unique within it.
        image: the file, relative to `Source.root`, or the bytes of an image file.
        split: one of SPLITS where the source gives it, else None: to be drawn.
        class_name: None where the image has no label.
    """

    key: str
    image: str | bytes
    split: str | None
    class_name: str | None


@dataclass(frozen=True)
class Source:
    """All candidates of a source.

    Attributes:
        root: absolute folder that files are relative to; None where candidates hold bytes.
        candidates: sorted by key; either all have a split or none has.
        left_out: how many files beside the candidates were left out, by their ending (`.txt`) or another short word
            for their kind.
        remarks: what about the source deserves a warning, a line each.
    """

    root: Path | None
    candidates: list[Candidate]
    left_out: Counter[str]
    remarks: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        """Names of all classes, sorted; a label is a position in this list."""
        return sorted({one.class_name for one in self.candidates if one.class_name is not None})
