"""What a source gives: candidates, images that may become samples."""

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
        ignored_files: files beside the images that were left out.
    """

    root: Path | None
    candidates: list[Candidate]
    ignored_files: int

    @property
    def classes(self) -> list[str]:
        """Names of all classes, sorted; a label is a position in this list."""
        return sorted({one.class_name for one in self.candidates if one.class_name is not None})
