"""Splits of whole classes: train, val and test share none, as where unseen identities are to be found again."""

from collections.abc import Mapping
from dataclasses import replace

from stages.images.splits import draw_class_splits
from stages.sources.candidates import Source, SourceError

OF_NO_SPLIT = "images of classes that are in no split"
"""Among what is left out."""

CLASSES_NAMED = 20
"""In an error."""


class NoClassSplits(SourceError):
    """Settings do not fit the classes of a source."""

    exit_code = 2


def draw_classes(source: Source, fractions: Mapping[str, float], seed: int) -> Source:
    """Draw a split for every class, and with it for its images; those without a label go to train.

    Args:
        fractions: share of all classes, by split (see `draw_class_splits`).

    Raises:
        NoClassSplits: the source gives splits, has no label, or an image with several.
        TooFewClasses: there are fewer classes than splits.
    """
    if any(one.split is not None for one in source.candidates):
        raise NoClassSplits(
            "the source gives splits, and split_by: class draws others: say `splits: drawn` to draw them among all its "
            "images, or name the classes of each in split_classes"
        )
    _check_labels(source)
    return _divide(source, draw_class_splits(source.classes, fractions, seed))


def take_classes(source: Source, split_classes: Mapping[str, tuple[str, ...]]) -> Source:
    """Give every image the split that names its class, whatever split the source gives it.

    Images without a label go to train, those of a class that no split names are left out, and counted.

    Args:
        split_classes: names of classes, by split, each once.

    Raises:
        NoClassSplits: a name that is no class of the source, no label, or an image with several.
    """
    _check_labels(source)
    classes = source.classes
    known = set(classes)
    for split, names in split_classes.items():
        unknown = [name for name in names if name not in known]
        if unknown:
            listed = ", ".join(classes[:CLASSES_NAMED])
            more = len(classes) - CLASSES_NAMED
            rest = f" and {more:,} more" if more > 0 else ""
            raise NoClassSplits(f"split_classes.{split}: the source has no class {unknown[0]!r}; it has {listed}{rest}")
    return _divide(source, {name: split for split, names in split_classes.items() for name in names})


def _check_labels(source: Source) -> None:
    """Raise where there is no label, or an image has several."""
    if not source.classes:
        raise NoClassSplits("split_by: class, but no image of the source has a label")
    several = next((one for one in source.candidates if len(one.labels) > 1), None)
    if several is not None:
        raise NoClassSplits(
            f"split_by: class needs one label an image, and {several.key} has several: {', '.join(several.labels)}"
        )


def _divide(source: Source, split_of: Mapping[str, str]) -> Source:
    """The source with every image in the split of its class."""
    divided = [
        replace(one, split=split_of[one.labels[0]] if one.labels else "train")
        for one in source.candidates
        if not one.labels or one.labels[0] in split_of
    ]
    left_out = source.left_out.copy()
    if len(divided) < len(source.candidates):
        left_out[OF_NO_SPLIT] += len(source.candidates) - len(divided)
    return replace(source, candidates=divided, left_out=left_out)
