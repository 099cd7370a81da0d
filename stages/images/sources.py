"""Where images come from: every source is one function that lists its candidates as a `Source`."""

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
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

NO_ENDING = "without an ending"
OTHER_ENDING = "of other endings"
NO_FILE = "links to nothing, pipes and the like"
OUTSIDE = "images outside the splits"
"""Kinds of files that are left out, beside those that have an ending of their own."""
NAMED_KINDS = 8


class SourceError(ValueError):
    """The source is not there, is empty, or cannot be understood."""

    exit_code = 6


def read_folder(
    root: Path, suffixes: frozenset[str], labels: Literal["folder", "none"], splits: Literal["given", "drawn"] | None
) -> Source:
    """Images in a folder, at any depth; hidden files and folders are skipped, symbolic links followed.

    Args:
        root: holds images, folders of classes, or train/, val/ and test/ with these inside.
        suffixes: lower-case endings (`.jpg`) of files that are images; others are counted as left out.
        labels: `folder`: the class is the name of the parent folder (none for images at the top); `none`: no classes.
        splits: `given`: by the top folders named in SPLIT_FOLDERS, all else is left out; `drawn`: such names mean
            nothing; None: given where every image lies in such a folder, drawn where none does.

    Raises:
        SourceError: no such folder, no image in it, or split folders beside others.
    """
    if not root.is_dir():
        raise SourceError(f"there is no folder {root}: give an existing one as `source: folder:PATH`")
    given_root, root = root, root.resolve()
    files, left_out, remarks = _list_files(root, suffixes)
    if not files:
        kinds = " ".join(sorted(suffixes))
        raise SourceError(f"no image in {root} ({describe_left_out(left_out)}): an image ends with one of {kinds}")
    if _splits_are_given(root, files, splits):
        inside = [path for path in files if _split_of(path) is not None]
        left_out[OUTSIDE] += len(files) - len(inside)
        candidates = [_candidate(path, _split_of(path), labels) for path in inside]
    else:
        candidates = [_candidate(path, None, labels) for path in files]
        if splits is None:
            remarks += _splits_below_the_top(given_root, candidates)
    return Source(root, sorted(candidates, key=lambda candidate: candidate.key), +left_out, tuple(remarks))


def describe_left_out(left_out: Counter[str]) -> str:
    """In words, most frequent first: `1,200 other files left out (.heic 1,198, .txt 2)`."""
    ranked = sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0]))
    named = [f"{kind} {count:,}" for kind, count in ranked[:NAMED_KINDS]]
    rest = sum(count for _, count in ranked[NAMED_KINDS:])
    named += [f"others {rest:,}"] if rest else []
    kinds = f" ({', '.join(named)})" if named else ""
    return f"{left_out.total():,} other files left out{kinds}"


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
    return Source(None, sorted(candidates, key=lambda candidate: candidate.key), Counter())


def _list_files(root: Path, suffixes: frozenset[str]) -> tuple[list[str], Counter[str], list[str]]:
    """Paths of the images, how many other files there are by kind, and a remark where names of images are no files."""
    files: list[str] = []
    left_out: Counter[str] = Counter()
    lost: list[str] = []
    for path, is_regular in _walk(root):
        is_image = os.path.splitext(path)[1].lower() in suffixes
        if is_regular and is_image:
            files.append(path)
            continue
        left_out[_kind(path) if is_regular else NO_FILE] += 1
        if is_image:
            lost.append(_readable(path))
    if not lost:
        return files, left_out, []
    remark = f"{len(lost):,} names of images lead to no file (broken links, pipes) and were passed over, the first: "
    return files, left_out, [remark + min(lost)]


def _walk(root: Path) -> Iterator[tuple[str, bool]]:
    """Relative posix path of everything that is not hidden and no folder, and whether it is a regular file.

    Regular files are those whose content the artifact's key holds; a link to nowhere, or what is no file, has none.
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
            if _is(entry.is_dir):
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real_paths[-1], entry.name)
                if real not in real_paths:
                    pending.append((path, (*real_paths, real)))
            else:
                yield path, _is(entry.is_file)


def _is(kind: Callable[[], bool]) -> bool:
    """What a method of os.DirEntry answers; no where links lead in a circle, or to where nobody may look."""
    try:
        return kind()
    except OSError:
        return False


def _kind(path: str) -> str:
    """A file's ending, in lower case, if it looks like one."""
    ending = os.path.splitext(path)[1].lower()
    if not ending:
        return NO_ENDING
    return ending if re.fullmatch(r"\.\w{1,10}", ending) else OTHER_ENDING


def _splits_below_the_top(root: Path, candidates: list[Candidate]) -> list[str]:
    """A remark where folders deeper than the top are named like splits; the top has none."""
    found: set[tuple[str, str]] = set()
    for folder in {candidate.key.rpartition("/")[0] for candidate in candidates}:
        parts = folder.split("/")
        places = [place for place in range(1, len(parts)) if parts[place].lower() in SPLIT_FOLDERS]
        found |= {("/".join(parts[:place]), parts[place]) for place in places}
    if not found:
        return []
    above, name = min(found)
    if len({parent for parent, _ in found}) == 1:
        advice = f"point the source at {root / above} to use it"
    else:
        advice = "to use such splits, put them at the top of the source, the classes inside"
    return [f"{above}/{name} is named like a split and was taken for part of a class path: {advice}"]


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
    key = _readable(path)
    parents = key.split("/")[:-1] if split is None else key.split("/")[1:-1]
    class_name = parents[-1] if parents and labels == "folder" else None
    return Candidate(key, path, split, class_name)


def _readable(path: str) -> str:
    """A name that is no valid UTF-8 keeps its bytes in `Candidate.image`; JSON and Parquet get them escaped."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")
