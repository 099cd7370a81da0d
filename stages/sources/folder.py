"""Folders of images: the class is the folder that an image lies in, top folders may be splits."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.sources.candidates import SPLIT_NAMES, Candidate, Source, SourceError, describe_left_out

Labels = Literal["folder", "none"]
Splits = Literal["given", "drawn"] | None

NO_ENDING = "without an ending"
OTHER_ENDING = "of other endings"
NO_FILE = "links to nothing, pipes and the like"
OUTSIDE = "images outside the splits"
"""Kinds of files that are left out, beside those that have an ending of their own."""


def read_folder(root: Path, suffixes: frozenset[str], labels: Labels, splits: Splits) -> Source:
    """Images in a folder, at any depth; hidden files and folders are skipped, symbolic links followed.

    Args:
        root: holds images, folders of classes, or train/, val/ and test/ with these inside.
        suffixes: lower-case endings (`.jpg`) of files that are images; others are counted as left out.
        labels: `folder`: the class is the name of the parent folder (none for images at the top); `none`: no classes.
        splits: `given`: by the top folders named in SPLIT_NAMES, all else is left out; `drawn`: such names mean
            nothing; None: given where every image lies in such a folder, drawn where none does.

    Raises:
        SourceError: no such folder, no image in it, or split folders beside others.
    """
    folder = _Folder.of(root, suffixes)
    candidates, remarks = folder.candidates(folder.has_splits(splits), labels, splits)
    return _source(folder.root, candidates, folder.left_out, remarks)


def read_folders(
    roots: Sequence[Path], names: Sequence[str], suffixes: frozenset[str], labels: Labels, splits: Splits
) -> Source:
    """Images of several folders, each as `read_folder` takes it: what lies at the top of one has no class.

    Args:
        names: of each folder, unique; keys begin with it.

    Raises:
        SourceError: as `read_folder`, or some folders have splits and others have none.
    """
    folders = [_Folder.of(root, suffixes) for root in roots]
    given = [folder.has_splits(splits) for folder in folders]
    if len(set(given)) > 1:
        with_splits = ", ".join(str(root) for root, is_given in zip(roots, given, strict=True) if is_given)
        raise SourceError(
            f"{with_splits} has split folders and the other folders of the source have none: say `splits: drawn`, or "
            "give all of them train/, val/ and test/"
        )
    candidates: list[Candidate] = []
    remarks: list[str] = []
    for folder, name in zip(folders, names, strict=True):
        found, its_remarks = folder.candidates(given[0], labels, splits)
        remarks += its_remarks
        candidates += [
            Candidate(f"{name}/{one.key}", os.path.join(folder.root, str(one.image)), one.split, one.labels)
            for one in found
        ]
    if not given[0]:
        remarks += _remarks_on_names(roots, candidates, labels, splits)
    left_out = sum((folder.left_out for folder in folders), Counter())
    return _source(None, candidates, left_out, remarks)


def split_named(path: str) -> str | None:
    """The split that the top folder of a path names."""
    top, separator, _ = path.partition("/")
    return SPLIT_NAMES.get(top.lower()) if separator else None


def _source(root: Path | None, candidates: list[Candidate], left_out: Counter[str], remarks: list[str]) -> Source:
    return Source(root, sorted(candidates, key=lambda one: one.key), +left_out, tuple(remarks))


@dataclass(frozen=True)
class _Folder:
    """What lies in one folder.

    Attributes:
        named: the folder as the user named it.
        root: the same, resolved.
        files: relative paths of the images.
    """

    named: Path
    root: Path
    files: list[str]
    left_out: Counter[str]
    remarks: list[str]

    @classmethod
    def of(cls, root: Path, suffixes: frozenset[str]) -> "_Folder":
        if not root.is_dir():
            raise SourceError(f"there is no folder {root}: give an existing one as `source: folder:PATH`")
        resolved = root.resolve()
        files, left_out, remarks = _list_files(resolved, suffixes)
        if not files:
            kinds = " ".join(sorted(suffixes))
            raise SourceError(
                f"no image in {resolved} ({describe_left_out(left_out)}): an image ends with one of {kinds}"
            )
        return cls(root, resolved, files, left_out, remarks)

    def has_splits(self, splits: Splits) -> bool:
        """Whether the top folders are splits."""
        if splits == "drawn":
            return False
        named = {path.partition("/")[0] for path in self.files if split_named(path) is not None}
        others = {path.partition("/")[0] for path in self.files if split_named(path) is None}
        if splits == "given" and not named:
            raise SourceError(f"`splits: given`, but {self.root} has no image in train/, val/ or test/")
        if splits is None and named and others:
            examples = ", ".join(sorted(others)[:3])
            raise SourceError(
                f"{self.root} has {', '.join(sorted(named))} beside others ({examples}, ...): say `splits: given` to "
                "take only these splits, or `splits: drawn` where they are classes like the others"
            )
        return bool(named)

    def candidates(self, given: bool, labels: Labels, splits: Splits) -> tuple[list[Candidate], list[str]]:
        """The images, and remarks; with `given` splits, those outside are counted as left out."""
        if given:
            inside = [path for path in self.files if split_named(path) is not None]
            self.left_out[OUTSIDE] += len(self.files) - len(inside)
            return [_candidate(path, split_named(path), labels) for path in inside], self.remarks
        candidates = [_candidate(path, None, labels) for path in self.files]
        below = _splits_below_the_top(self.named, candidates) if splits is None else []
        return candidates, self.remarks + below


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
            lost.append(readable(path))
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
        places = [place for place in range(1, len(parts)) if parts[place].lower() in SPLIT_NAMES]
        found |= {("/".join(parts[:place]), parts[place]) for place in places}
    if not found:
        return []
    above, name = min(found)
    if len({parent for parent, _ in found}) == 1:
        advice = f"point the source at {root / above} to use it"
    else:
        advice = "to use such splits, put them at the top of the source, the classes inside"
    return [f"{above}/{name} is named like a split and was taken for part of a class path: {advice}"]


def _remarks_on_names(
    roots: Sequence[Path], candidates: Sequence[Candidate], labels: Labels, splits: Splits
) -> list[str]:
    """Remarks where the folders' own names, which mean nothing, look like splits, or may be the classes."""
    if len(roots) == 1:
        return []
    paths = [Path(os.path.abspath(root)) for root in roots]
    parents = {path.parent for path in paths}
    above = f"point the source at {paths[0].parent}" if len(parents) == 1 else "put the folders into one and name that"
    like_splits = [str(path) for path in paths if path.name.lower() in SPLIT_NAMES]
    remarks = []
    if like_splits and splits is None:
        named = ", ".join(like_splits[:3]) + (f" and {len(like_splits) - 3:,} more" if len(like_splits) > 3 else "")
        are = "is named like a split" if len(like_splits) == 1 else "are named like splits"
        remarks.append(
            f"{named} {are}, but the folders of a list are mixed and splits drawn anew: {above} to use these names, or "
            "say `splits: drawn`"
        )
    if labels == "folder" and not any(one.labels for one in candidates):
        # In folders that are splits, images without a folder of a class stay so.
        advice = "put them into folders of their classes" if like_splits else f"{above}, and each folder is a class"
        remarks.append(
            f"no image has a label, because all lie directly in the folders that the source names: {advice} (or say "
            "`labels: none`)"
        )
    return remarks


def _candidate(path: str, split: str | None, labels: Labels) -> Candidate:
    key = readable(path)
    parents = key.split("/")[:-1] if split is None else key.split("/")[1:-1]
    return Candidate(key, path, split, (parents[-1],) if parents and labels == "folder" else ())


def readable(path: str) -> str:
    """A name that is no valid UTF-8 keeps its bytes in `Candidate.image`; JSON and Parquet get them escaped."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")
