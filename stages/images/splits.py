"""Splits drawn by seeded fractions: of images, stratified and in whole groups, or of whole classes."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import xxhash


class TooFewClasses(ValueError):
    """There are fewer classes than splits that share none."""

    exit_code = 6


@dataclass(frozen=True)
class _Unit:
    """What is drawn as a whole: an image, or the images of a group."""

    name: str
    members: list[int]


def draw_splits(
    keys: Sequence[str],
    classes: Sequence[str | None],
    fractions: Mapping[str, float],
    seed: int,
    groups: Sequence[str | None] | None = None,
) -> list[str]:
    """A split for each key: `train`, or one of `fractions`.

    Every class gives each split its share, rounded so that the whole split has its share as well (largest remainder),
    and keeps at least one image in train. Images are ranked by a hash of seed and key, so that adding some moves few
    of the others.

    A group goes as a whole, with the class that most of its images have. Where groups do not fit a class's share, they
    come as near as they can, and the next class makes up for the difference.

    Args:
        keys: unique names, [n].
        classes: class of each, [n]; images without one (None) are a class of their own.
        fractions: share of all images, by split; together below 1.
        seed: decides who goes where.
        groups: group of each, [n]; an image without one (None) is a group of its own.
    """
    splits = ["train"] * len(keys)
    strata: dict[str, list[_Unit]] = defaultdict(list)
    for unit in _units(keys, groups):
        strata[_most_frequent(classes[position] for position in unit.members)].append(unit)
    for members in strata.values():
        members.sort(key=lambda unit: _rank(unit.name, seed))
    sizes = {name: _size(units) for name, units in strata.items()}
    for split, fraction in fractions.items():
        # One unit, the last, stays in train.
        room = {name: _size(units[:-1]) for name, units in strata.items()}
        lacking = 0
        wanted = _allot(sizes, room, fraction, split, seed)
        for name in sorted(wanted, key=lambda name: _rank(f"{split}/{name}", seed)):
            taken = _fill(strata[name][:-1], wanted[name] + lacking)
            lacking += wanted[name] - _size(taken)
            for unit in taken:
                for position in unit.members:
                    splits[position] = split
            chosen = {unit.name for unit in taken}
            strata[name] = [unit for unit in strata[name] if unit.name not in chosen]
    return splits


def draw_class_splits(classes: Sequence[str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """A split for each class: `train`, or one of `fractions`.

    Classes are ordered by a hash of seed and name, so that adding some leaves the others in their order and moves few.
    The first of them go to the first split, the next to the second, the rest to train. A split has its share of the
    classes, rounded, however many images these have; but at least one class, and so has train.

    Args:
        classes: unique names.
        fractions: share of all classes, by split; together below 1. A split with the share 0 has none.
        seed: decides who goes where.

    Raises:
        TooFewClasses: there is not one for each split.
    """
    ordered = sorted(classes, key=lambda name: (_rank(name, seed), name))
    shares = {split: fraction for split, fraction in fractions.items() if fraction > 0}
    if len(classes) <= len(shares):
        raise TooFewClasses(
            f"split_by: class cannot make {', '.join(['train', *shares])} of {len(classes)} classes: each split has "
            "one at least"
        )
    splits = dict.fromkeys(ordered, "train")
    first = 0
    for place, (split, fraction) in enumerate(shares.items()):
        room = len(ordered) - first - (len(shares) - place)  # one stays for each split that follows, and for train
        taken = ordered[first : first + min(max(1, round(fraction * len(ordered))), room)]
        splits |= dict.fromkeys(taken, split)
        first += len(taken)
    return splits


def _units(keys: Sequence[str], groups: Sequence[str | None] | None) -> list[_Unit]:
    if groups is None:
        return [_Unit(key, [position]) for position, key in enumerate(keys)]
    members: dict[str, list[int]] = defaultdict(list)
    for position, (key, group) in enumerate(zip(keys, groups, strict=True)):
        members[f"image {key}" if group is None else f"group {group}"].append(position)
    return [_Unit(name, positions) for name, positions in members.items()]


def _fill(units: Sequence[_Unit], wanted: int) -> list[_Unit]:
    """Units, in their order, whose images come nearest to so many: each that brings them nearer is taken."""
    taken = []
    lacking = wanted
    for unit in units:
        if lacking <= 0:
            break
        if abs(lacking - len(unit.members)) < lacking:
            taken.append(unit)
            lacking -= len(unit.members)
    return taken


def _size(units: Sequence[_Unit]) -> int:
    """Images in all of them."""
    return sum(len(unit.members) for unit in units)


def _most_frequent(classes: Iterable[str | None]) -> str:
    """The class that most have, the first by name of equals; "" for none."""
    counts = Counter("" if name is None else name for name in classes)
    return min(counts, key=lambda name: (-counts[name], name))


def _allot(sizes: Mapping[str, int], room: Mapping[str, int], fraction: float, split: str, seed: int) -> dict[str, int]:
    """How many each class gives to a split: the whole part of its share, then one more by largest remainder."""
    counts = {name: min(math.floor(size * fraction), room[name]) for name, size in sizes.items()}
    missing = round(sum(sizes.values()) * fraction) - sum(counts.values())
    by_remainder = sorted(
        (name for name in sizes if counts[name] < room[name]),
        key=lambda name: (counts[name] - sizes[name] * fraction, _rank(f"{split}/{name}", seed)),
    )
    for name in by_remainder[: max(0, missing)]:
        counts[name] += 1
    return counts


def _rank(text: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(), seed=seed % 2**64)
