"""Files that hold many images: one, all of a folder, or those that match a pattern."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from stages.sources.candidates import SPLIT_NAMES, SourceError

SPLIT_PREFIX = re.compile(rf"({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


def find_files(location: Path, suffix: str, kind: str) -> tuple[Path, list[str]]:
    """The files at a location, and the folder that their paths are relative to.

    Args:
        location: a file, a folder (every file with the ending in it, at any depth, but hidden ones), or a pattern.
        suffix: of files in a folder (`.tar`).
        kind: of the source, for errors.

    Returns:
        An absolute folder, and sorted relative paths.

    Raises:
        SourceError: nothing is there.
    """
    if location.is_dir():
        root, found = location, _files_below(location, suffix)
        if not found:
            raise SourceError(f"{kind}:{location}: no {suffix} file in this folder")
    elif location.is_file():
        root, found = location.parent, [location.name]
    else:
        root = next((one for one in location.parents if not glob.has_magic(str(one))), Path())
        matches = [one for one in glob.glob(str(location), recursive=True) if os.path.isfile(one)]
        found = [os.path.relpath(one, root) for one in matches]
        if not found:
            what = "no file matches" if glob.has_magic(str(location)) else "there is no such file or folder"
            raise SourceError(f"{kind}:{location}: {what}")
    return Path(os.path.abspath(root)), sorted(Path(one).as_posix() for one in found)


def splits_of_files(
    paths: Sequence[str], splits: Literal["given", "drawn"] | None, kind: str
) -> list[str] | list[None]:
    """The split of each file, by a folder named like one or by how its name begins; None for all where none has any.

    Raises:
        SourceError: some files have a split and others none, or they are to be `given` and none is.
    """
    found = [None if splits == "drawn" else _split_of(path) for path in paths]
    given = [split for split in found if split is not None]
    if len(given) == len(found):
        return given
    if given:
        without = next(path for path, split in zip(paths, found, strict=True) if split is None)
        raise SourceError(
            f"{kind}: some files are of a split by their name, but not {without}: name all of them train, val or "
            "test..., or say `splits: drawn`"
        )
    if splits == "given":
        raise SourceError(f"{kind}: `splits: given`, but there is no split column and no file is named like a split")
    return [None] * len(found)


def _split_of(path: str) -> str | None:
    *folders, name = path.split("/")
    for folder in folders:
        if folder.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[folder.lower()]
    match = SPLIT_PREFIX.match(name)
    return SPLIT_NAMES[match[1].lower()] if match else None


def _files_below(root: Path, suffix: str) -> list[str]:
    """Relative paths; hidden files and folders are skipped, links followed, but not into a folder above."""
    found = []
    pending = [(str(root), frozenset({os.path.realpath(root)}))]
    while pending:
        folder, above = pending.pop()
        for entry in os.scandir(folder):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                place = os.path.realpath(entry.path)
                if place not in above:
                    pending.append((entry.path, above | {place}))
            elif entry.is_file() and entry.name.lower().endswith(suffix):
                found.append(os.path.relpath(entry.path, root))
    return found
