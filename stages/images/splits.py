"""Splits drawn by seeded, stratified fractions."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import xxhash


def draw_splits(
    keys: Sequence[str], classes: Sequence[str | None], fractions: Mapping[str, float], seed: int
) -> list[str]:
    """A split for each key: `train`, or one of `fractions`.

    Every class gives each split its share, rounded so that the whole split has its share as well (largest remainder),
    and keeps at least one image in train. Images are ranked by a hash of seed and key, so that adding some moves few
    of the others.

    Args:
        keys: unique names, [n].
        classes: class of each, [n]; images without one (None) are a class of their own.
        fractions: share of all images, by split; together below 1.
        seed: decides who goes where.
    """
    splits = ["train"] * len(keys)
    strata: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(classes):
        strata["" if name is None else name].append(position)
    for members in strata.values():
        members.sort(key=lambda position: _rank(keys[position], seed))
    sizes = {name: len(members) for name, members in strata.items()}
    for split, fraction in fractions.items():
        room = {name: len(members) - 1 for name, members in strata.items()}
        for name, count in _allot(sizes, room, fraction, split, seed).items():
            for position in strata[name][:count]:
                splits[position] = split
            del strata[name][:count]
    return splits


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
