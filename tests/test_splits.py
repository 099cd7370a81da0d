"""Splits that are drawn."""

from collections import Counter, defaultdict

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from stages.images.splits import TooFewClasses, draw_class_splits, draw_splits

class_lists = st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=200)


@given(class_lists, st.floats(0, 0.5), st.floats(0, 0.49), st.integers())
def test_fractions_hold_for_every_class(classes: list[str | None], test: float, val: float, seed: int):
    keys = [f"{number}.jpg" for number in range(len(classes))]
    splits = draw_splits(keys, classes, {"test": test, "val": val}, seed)
    sizes = Counter(classes)
    room = {name: size - 1 for name, size in sizes.items()}
    for split, fraction in (("test", test), ("val", val)):
        counts = Counter(name for name, its_split in zip(classes, splits, strict=True) if its_split == split)
        for name, size in sizes.items():
            assert counts[name] <= size * fraction + 1
            assert counts[name] > size * fraction - 1 or counts[name] == room[name]
            room[name] -= counts[name]
        assert sum(counts.values()) <= round(len(classes) * fraction)
    in_train = Counter(name for name, split in zip(classes, splits, strict=True) if split == "train")
    assert all(in_train[name] >= 1 for name in sizes)


def test_many_small_classes_give_the_whole_fraction():
    classes = [f"class {number // 4}" for number in range(800)]
    keys = [str(number) for number in range(800)]
    splits = Counter(draw_splits(keys, classes, {"test": 0.1, "val": 0.05}, seed=0))
    assert splits == {"train": 680, "test": 80, "val": 40}


def test_equal_seeds_draw_equal_splits():
    keys, classes = [f"{number}" for number in range(100)], [f"{number % 3}" for number in range(100)]
    first = draw_splits(keys, classes, {"test": 0.3}, seed=1)
    assert first == draw_splits(keys, classes, {"test": 0.3}, seed=1)
    assert first != draw_splits(keys, classes, {"test": 0.3}, seed=2)


def test_a_few_more_images_move_few_others():
    keys = [f"{number}" for number in range(1010)]
    more = draw_splits(keys, ["a"] * 1010, {"test": 0.2}, seed=1)[:1000]
    fewer = draw_splits(keys[:1000], ["a"] * 1000, {"test": 0.2}, seed=1)
    assert sum(a != b for a, b in zip(more, fewer, strict=True)) <= 10


# Groups


def test_groups_stay_together_and_sizes_hold():
    """Groups of 1 to 6 images of three classes: as near to the fractions as half of a group."""
    sizes = [1 + number % 6 for number in range(300)]
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    classes = [f"c{number % 3}" for number, size in enumerate(sizes) for _ in range(size)]
    keys = [str(number) for number in range(len(groups))]
    splits = draw_splits(keys, classes, {"test": 0.2, "val": 0.1}, 0, groups)
    splits_of = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        splits_of[group].add(split)
    assert all(len(found) == 1 for found in splits_of.values())
    for name in ("c0", "c1", "c2"):
        counts = Counter(split for split, its in zip(splits, classes, strict=True) if its == name)
        assert abs(counts["test"] - 0.2 * counts.total()) <= 3
        assert abs(counts["val"] - 0.1 * counts.total()) <= 3
    counts = Counter(splits)
    assert abs(counts["test"] - 0.2 * len(keys)) <= 3
    assert abs(counts["val"] - 0.1 * len(keys)) <= 3


def test_classes_of_few_large_groups_make_up_for_one_another():
    """Each class has three groups of 100 images: none can give a fifth, together they can."""
    groups = [f"g{number // 100}" for number in range(3000)]
    classes = [f"c{number // 300}" for number in range(3000)]
    splits = Counter(draw_splits([str(number) for number in range(3000)], classes, {"test": 0.2}, 0, groups))
    assert splits == {"train": 2400, "test": 600}


def test_a_group_counts_for_its_most_frequent_class():
    """Ten groups are nearly all a, ten nearly all b: each gives a fifth of its groups."""
    groups = [f"g{number // 10}" for number in range(200)]
    classes = ["ab"[(number // 100) ^ (number % 10 == 0)] for number in range(200)]
    splits = draw_splits([str(number) for number in range(200)], classes, {"test": 0.2}, 3, groups)
    chosen = {group for group, split in zip(groups, splits, strict=True) if split == "test"}
    assert len(chosen) == 4
    assert len({group for group in chosen if int(group[1:]) < 10}) == 2


def test_images_without_a_group_are_groups_of_their_own():
    groups = [None if number < 90 else "g" for number in range(100)]
    splits = draw_splits([str(number) for number in range(100)], ["a"] * 100, {"test": 0.2}, 0, groups)
    assert Counter(splits) == {"train": 80, "test": 20}
    assert len(set(splits[90:])) == 1


def test_one_group_stays_in_train():
    assert draw_splits(["1", "2"], ["a", "a"], {"test": 0.5}, 0, ["g", "g"]) == ["train", "train"]


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), min_size=1, max_size=60),
    st.floats(0, 0.5),
    st.floats(0, 0.49),
    st.integers(),
)
def test_no_group_is_ever_torn(images: list[tuple[int, str]], test: float, val: float, seed: int):
    groups = [None if group == 0 else str(group) for group, _ in images]
    keys = [str(number) for number in range(len(images))]
    splits = draw_splits(keys, [name for _, name in images], {"test": test, "val": val}, seed, groups)
    pairs = {(group, split) for group, split in zip(groups, splits, strict=True) if group is not None}
    assert len(pairs) == len({group for group, _ in pairs})
    assert "train" in splits


def test_singletons_are_drawn_as_without_groups():
    keys, classes = [f"{number}" for number in range(200)], [f"{number % 7}" for number in range(200)]
    fractions = {"test": 0.23, "val": 0.11}
    drawn = Counter(zip(classes, draw_splits(keys, classes, fractions, 1, keys), strict=True))
    assert drawn == Counter(zip(classes, draw_splits(keys, classes, fractions, 1), strict=True))


# Whole classes


def naive_class_splits(names: list[str], test: float, val: float, seed: int) -> dict[str, str]:
    """Rank all by the hash of seed and name, and deal from the front."""
    waiting = sorted(names, key=lambda name: xxhash.xxh3_64_intdigest(name.encode(), seed=seed))
    found = {}
    if test > 0:
        count = max(1, round(test * len(names)))
        while len(waiting) - count < (2 if val > 0 else 1):
            count -= 1
        for _ in range(count):
            found[waiting.pop(0)] = "test"
    if val > 0:
        count = max(1, round(val * len(names)))
        while len(waiting) - count < 1:
            count -= 1
        for _ in range(count):
            found[waiting.pop(0)] = "val"
    return found | dict.fromkeys(waiting, "train")


@given(st.integers(0, 60), st.floats(0, 0.5), st.floats(0, 0.49), st.integers(0, 2**64 - 1))
def test_classes_are_dealt_as_defined(count: int, test: float, val: float, seed: int):
    names = [f"class {number}" for number in range(count)]
    wanted = {"train"} | {split for split, share in (("test", test), ("val", val)) if share > 0}
    if count < len(wanted):
        with pytest.raises(TooFewClasses, match=f"of {count} classes: each split has one at least"):
            draw_class_splits(names, {"test": test, "val": val}, seed)
        return
    splits = draw_class_splits(names, {"test": test, "val": val}, seed)
    assert splits == naive_class_splits(names, test, val, seed)
    assert splits == draw_class_splits(names[::-1], {"test": test, "val": val}, seed)
    assert set(splits.values()) == wanted


def test_the_seed_draws_the_classes():
    names = [f"class {number}" for number in range(20)]
    drawn = draw_class_splits(names, {"test": 0.2, "val": 0.1}, 7)
    assert Counter(drawn.values()) == {"train": 14, "test": 4, "val": 2}
    assert drawn != draw_class_splits(names, {"test": 0.2, "val": 0.1}, 8)


def test_more_classes_leave_the_others_in_their_order():
    names = [f"class {number}" for number in range(110)]
    fewer = draw_class_splits(names[:100], {"test": 0.2, "val": 0.2}, 1)
    more = draw_class_splits(names, {"test": 0.2, "val": 0.2}, 1)
    places = ("test", "val", "train")
    order = sorted(names[:100], key=lambda name: (places.index(fewer[name]), places.index(more[name])))
    assert [places.index(more[name]) for name in order] == sorted(places.index(more[name]) for name in order)
    assert sum(fewer[name] != more[name] for name in names[:100]) <= 8


def test_small_shares_of_few_classes_are_one_class():
    drawn = Counter(draw_class_splits(["a", "b", "c"], {"test": 0.01, "val": 0.6}, 0).values())
    assert drawn == {"train": 1, "test": 1, "val": 1}
    assert Counter(draw_class_splits(["a", "b", "c"], {"test": 0.49, "val": 0.49}, 0).values()) == drawn
    assert Counter(draw_class_splits(list("abcdefgh"), {"test": 0.9}, 0).values()) == {"train": 1, "test": 7}
