"""Image classification sets as torchvision finds or downloads them."""

import contextlib
import difflib
import inspect
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from torch.utils.data import Dataset

from stages.sources.candidates import Candidate, Source, SourceError, unique_keys
from stages.sources.columns import Reading

SPLIT_WORDS = (
    ("train", ("train", "train-standard", "trainval")),
    ("train", ("unlabeled",)),
    ("val", ("val", "valid")),
    ("test", ("test",)),
)
"""Values of an argument `split`, by the split they are; the first that a set knows is taken. STL10's unlabelled images
are for training."""
FILES = ("_samples", "samples", "_image_files", "_images")
LABELS = ("targets", "labels", "_labels", "y")
CLASSES = ("classes", "categories")
"""Attributes by which sets show their files, labels and names of classes."""

UNPICKLED = frozenset({"LSUN", "LSUNClass"})
"""Sets that unpickle a file of their folder without looking whether it is theirs (CIFAR looks: by a hash)."""

Arguments = tuple[tuple[str, Any], ...]


class NoSuchSet(SourceError):
    """torchvision has no set of that name, or it is none for classification."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class TorchvisionItem:
    """An image of a set that is no file of its own, as PNG.

    Attributes:
        arguments: of the set's class.
    """

    name: str
    folder: str
    arguments: Arguments
    index: int
    size_bytes: int

    def read(self) -> bytes:
        file = io.BytesIO()
        try:
            image = _open(self.name, self.folder, self.arguments)[self.index][0]
            (image.convert("RGB") if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") else image).save(file, "PNG")
        except (ValueError, SyntaxError, RuntimeError) as error:  # what Pillow and torchvision raise, beside OSError
            raise OSError(" ".join(str(error).split())) from error
        return file.getvalue()


@dataclass(frozen=True)
class _Part:
    """One split of a set."""

    split: str | None
    word: str
    arguments: Arguments
    images: Any


def fetch_set(name: str, folder: str) -> int:
    """Download a set where it is not there yet; returns how many images it has."""
    return sum(len(part.images) for part in _parts(name, folder, download=True))


def read_set(name: str, folder: Path, reading: Reading) -> Source:
    """The images of a set; splits are those of its argument `train` or `split`, where it has one.

    Files that the set shows are taken as they are, so that JPEG stays as it is; other images become PNG, one at a
    time.

    Args:
        name: of a class in torchvision.datasets.
        folder: that the class is given as `root`.

    Raises:
        NoSuchSet: there is no such class, or it gives no images with one class each.
        SourceError: its files are not in the folder.
    """
    candidates: list[Candidate] = []
    for part in _parts(name, str(folder), download=False):
        if reading.splits == "given" and part.split is None:
            raise SourceError(f"`splits: given`, but torchvision:{name} has no splits")
        try:
            candidates += _candidates(name, folder, part, reading)
        except (OSError, SyntaxError) as error:
            raise SourceError(f"torchvision:{name} cannot be read in {folder}: {error}") from error
    keys = unique_keys(one.key for one in candidates)
    candidates = [replace(one, key=key) for one, key in zip(candidates, keys, strict=True)]
    notes = [f"torchvision {torchvision.__version__}: {name} in {folder}"]
    ordered = sorted(candidates, key=lambda one: one.key)
    return Source(Path(os.path.abspath(folder)), ordered, Counter(), (), tuple(notes))


def _candidates(name: str, folder: Path, part: _Part, reading: Reading) -> list[Candidate]:
    """All images of a split, in its order."""
    _check(name, part.images)
    labels, files = _labels(part.images), _files(part.images)
    names = _class_names(part.images) if reading.labels else None
    split = None if reading.splits == "drawn" else part.split
    digits = len(str(len(part.images) - 1))
    image = part.images[0][0]
    size_bytes = image.width * image.height * len(image.getbands())
    candidates = []
    for index, label in enumerate(labels):
        if files is not None:
            key = content = os.path.relpath(files[index], folder)
        else:
            key = f"{part.word}/{index:0{digits}d}.png" if part.word else f"{index:0{digits}d}.png"
            content = TorchvisionItem(name, str(folder), part.arguments, index, size_bytes)
        candidates.append(Candidate(key, content, split, _class(label, names) if reading.labels else ()))
    return candidates


def _parts(name: str, folder: str, download: bool) -> Iterator[_Part]:
    """The splits of a set, one after another: some hold all their images in memory."""
    kind = find_set(name)
    common: Arguments = (("download", download),) if _accepts(kind, "download") else ()
    if _accepts(kind, "train"):
        choices = [("train", "train", ("train", True)), ("test", "test", ("train", False))]
    elif _accepts(kind, "split"):
        choices = [(split, word, ("split", word)) for split, words in SPLIT_WORDS for word in words]
    else:
        yield _Part(None, "", common, _open(name, folder, common))
        return
    found: set[tuple[str, ...]] = set()
    for split, word, argument in choices:
        words = next(words for _, words in SPLIT_WORDS if word in words)
        if words in found:
            continue
        try:
            images = _open(name, folder, (argument, *common))
        except _NoSuchSplit:
            continue
        found.add(words)
        yield _Part(split, word, (argument, *common), images)
    if not found:
        raise NoSuchSet(f"torchvision:{name} has no split of the name train, val or test")


class _NoSuchSplit(Exception):
    """A set does not know this value of `split`."""


@lru_cache(maxsize=1)
def _open(name: str, folder: str, arguments: Arguments) -> Any:
    """The set, as an indexable object of (image, label)."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            return find_set(name)(root=folder, **dict(arguments))
    except SourceError:
        raise
    except Exception as error:  # of files that are not what torchvision takes them for, nearly every type there is
        reason = " ".join(str(error).split())
        if "Unknown value" in reason and "split" in reason:  # as torchvision's verify_str_arg says it
            raise _NoSuchSplit from error
        raise SourceError(
            f"torchvision:{name}: {reason or type(error).__name__} (looked in {folder}; where it cannot be downloaded, "
            "put its files there as torchvision wants them, or name another download_folder)"
        ) from error


def find_set(name: str) -> Any:
    """The class of a set.

    Raises:
        NoSuchSet: torchvision has none of that name, it takes more than a folder, or it could run code of a file in it.
    """
    if name in UNPICKLED:
        raise NoSuchSet(
            f"torchvision:{name} unpickles a file of its folder, which runs whatever is in it: it does not serve as a "
            "source; take its images as `folder:`"
        )
    sets = {
        one: found
        for one in torchvision.datasets.__all__
        if inspect.isclass(found := getattr(torchvision.datasets, one)) and issubclass(found, Dataset)
    }
    if name not in sets:
        by_lower = {one.lower(): one for one in sets}
        nearest = [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3)]
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        raise NoSuchSet(f"torchvision:{name}: torchvision {torchvision.__version__} has no such set{hint}")
    required = [
        one.name
        for one in inspect.signature(sets[name]).parameters.values()
        if one.default is one.empty and one.kind is not one.VAR_KEYWORD and one.name != "root"
    ]
    if required or not _accepts(sets[name], "root"):
        lacking = f"needs {', '.join(required)} beside a folder" if required else "reads no folder"
        raise NoSuchSet(f"torchvision:{name} {lacking}: it does not serve as a source")
    return sets[name]


def _accepts(kind: type, argument: str) -> bool:
    """Whether a class takes an argument, itself or by handing `**kwargs` on to the class that it derives from."""
    for one in kind.__mro__:
        parameters = inspect.signature(one.__init__).parameters
        if argument in parameters:
            return True
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return False


def _check(name: str, images: Any) -> None:
    """Refuse what gives no pairs of image and class."""
    if not len(images):
        raise SourceError(f"torchvision:{name} has no images")
    first = images[0]
    pair = isinstance(first, tuple) and len(first) == 2
    if not (
        pair and isinstance(first[0], Image.Image) and (first[1] is None or isinstance(first[1], int | np.integer))
    ):
        given = ", ".join(type(one).__name__ for one in first) if isinstance(first, tuple) else type(first).__name__
        raise NoSuchSet(
            f"torchvision:{name} gives ({given}), not an image and one class: it does not serve as a source"
        )


def _labels(images: Any) -> list[int | None]:
    """The class of each image: as the set lists them, or by reading every image."""
    for found in (_listed(images, LABELS), [pair[1] for pair in _pairs(images)]):
        if len(found) == len(images) and all(found[place] == images[place][1] for place in _some(images)):
            return [None if label is None else int(label) for label in found]
    return [images[place][1] for place in range(len(images))]


def _files(images: Any) -> list[str] | None:
    """The file of each image, where the set lists them and the files are what it shows."""
    for found in ([pair[0] for pair in _pairs(images)], _listed(images, FILES)):
        if len(found) != len(images) or not all(isinstance(one, str | os.PathLike) for one in found):
            continue
        if all(_is_file_of(found[place], images[place][0]) for place in _some(images)):
            return [os.fspath(one) for one in found]
    return None


def _is_file_of(path: str | os.PathLike[str], image: Image.Image) -> bool:
    try:
        with Image.open(path) as file:
            return np.array_equal(np.asarray(file.convert("RGB")), np.asarray(image.convert("RGB")))
    except OSError:
        return False


def _pairs(images: Any) -> list[tuple[Any, Any]]:
    """A list of (file, class) that the set has."""
    for name in FILES:
        found = getattr(images, name, None)
        if isinstance(found, list) and found and all(isinstance(one, tuple) and len(one) == 2 for one in found):
            return found
    return []


def _listed(images: Any, names: Sequence[str]) -> list[Any]:
    """The first attribute of these that is there, as a list."""
    for name in names:
        found = getattr(images, name, None)
        if found is not None:
            return found.tolist() if hasattr(found, "tolist") else list(found)
    return []


def _some(images: Any) -> list[int]:
    """Positions at which what a set lists is held against what it gives."""
    return sorted({0, len(images) // 2, len(images) - 1})


def _class_names(images: Any) -> list[str] | None:
    """The name behind each class, unique; of one with several names all of them (ImageNet)."""
    found = next((getattr(images, name) for name in CLASSES if getattr(images, name, None) is not None), None)
    if found is None:
        return None
    names = [", ".join(one) if isinstance(one, list | tuple) else str(one) for one in found]
    times = Counter(names)
    return [f"{name} ({number})" if times[name] > 1 else name for number, name in enumerate(names)]


def _class(label: int | None, names: Sequence[str] | None) -> tuple[str, ...]:
    """The class's name, or its number where the set knows no names; a negative one stands for none (STL10)."""
    if label is None or label < 0:
        return ()
    return (names[label] if names and label < len(names) else str(label),)
