"""Where images come from: every source is one function that lists its candidates as a `Source`."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from stages.images.candidates import Candidate, Source

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Names of top folders, in lower case, that stand for a split."""


class SourceError(ValueError):
    """The source is not there, is empty, or cannot be understood."""

    exit_code = 6


def read_folder(
    root: Path, suffixes: frozenset[str], labels: Literal["folder", "none"], splits: Literal["given", "drawn"] | None
) -> Source:
    """Images in a folder, at any depth; hidden files and folders are skipped, symbolic links followed.

    Args:
        root: holds images, folders of classes, or train/, val/ and test/ with these inside.
        suffixes: lower-case endings (`.jpg`) of files that are images; others are counted as ignored.
        labels: `folder`: the class is the name of the parent folder (none for images at the top); `none`: no classes.
        splits: `given`: by the top folders named in SPLIT_FOLDERS, all else is left out; `drawn`: such names mean
            nothing; None: given where every image lies in such a folder, drawn where none does.

    Raises:
        SourceError: no such folder, no image in it, or split folders beside others.
    """
    if not root.is_dir():
        raise SourceError(f"there is no folder {root}: give an existing one as `source: folder:PATH`")
    root = root.resolve()
    files: list[str] = []
    ignored = 0
    for path, is_regular in _walk(root):
        if is_regular and os.path.splitext(path)[1].lower() in suffixes:
            files.append(path)
        else:
            ignored += 1
    if not files:
        kinds = " ".join(sorted(suffixes))
        raise SourceError(f"no image in {root} ({ignored} other files): an image ends with one of {kinds}")
    if _splits_are_given(root, files, splits):
        inside = [path for path in files if _split_of(path) is not None]
        ignored += len(files) - len(inside)
        candidates = [_candidate(path, _split_of(path), labels) for path in inside]
    else:
        candidates = [_candidate(path, None, labels) for path in files]
    return Source(root, sorted(candidates, key=lambda candidate: candidate.key), ignored)


def read_digits() -> Source:
    """The 1,797 handwritten digits that scikit-learn ships: 8x8 pixels, grey, 10 classes.

    Their values 0 to 16 become 0 to 255 without loss (17 distinct values), as PNG.
    """
    images, digits = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    candidates = []
    for number, (image, digit) in enumerate(zip(pixels, digits, strict=True)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        candidates.append(Candidate(f"{digit}/{number:04d}.png", file.getvalue(), None, str(digit)))
    return Source(None, sorted(candidates, key=lambda candidate: candidate.key), 0)


def _walk(root: Path) -> Iterator[tuple[str, bool]]:
    """Relative posix path of every file that is not hidden, and whether it can be opened as a file.

    A link to nowhere counts as a file, so that it is rejected by name instead of lost.
    """
    # A folder, as path relative to the root, with the real paths of it and of all above: a link to one of those loops.
    pending: list[tuple[str, tuple[str, ...]]] = [("", (str(root),))]
    while pending:
        folder, real_paths = pending.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            raise SourceError(f"cannot list {root / folder}: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real_paths[-1], entry.name)
                if real not in real_paths:
                    pending.append((path, (*real_paths, real)))
            else:
                yield path, entry.is_file() or entry.is_symlink()


def _split_of(path: str) -> str | None:
    """The split that the top folder of a path names."""
    top, separator, _ = path.partition("/")
    return SPLIT_FOLDERS.get(top.lower()) if separator else None


def _splits_are_given(root: Path, files: list[str], splits: Literal["given", "drawn"] | None) -> bool:
    if splits == "drawn":
        return False
    named = {path.partition("/")[0] for path in files if _split_of(path) is not None}
    others = {path.partition("/")[0] for path in files if _split_of(path) is None}
    if splits == "given" and not named:
        raise SourceError(f"`splits: given`, but {root} has no image in train/, val/ or test/")
    if splits is None and named and others:
        examples = ", ".join(sorted(others)[:3])
        raise SourceError(
            f"{root} has {', '.join(sorted(named))} beside others ({examples}, ...): say `splits: given` to take only "
            "these splits, or `splits: drawn` where they are classes like the others"
        )
    return bool(named)


def _candidate(path: str, split: str | None, labels: Literal["folder", "none"]) -> Candidate:
    # A name that is no valid UTF-8 keeps its bytes in `image`; JSON and Parquet get them escaped.
    key = path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")
    parents = key.split("/")[:-1] if split is None else key.split("/")[1:-1]
    class_name = parents[-1] if parents and labels == "folder" else None
    return Candidate(key, path, split, class_name)
