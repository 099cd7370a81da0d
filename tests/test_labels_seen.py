"""Where a probe of an encoder that saw labels is fair: everything that was seen lies inside the probe's own subset."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluation import Fair, ProbeLabels, label_subset, labels_digest, subset_size
from stages.evaluation.labels_seen import share_seen

LABELS = np.repeat([0, 1, 2], [500, 300, 200])
IDS = np.arange(1000)


CLASSES = ["cat", "dog", "owl"]
KEYS = np.array([f"{CLASSES[label]}/{number}.png" for number, label in enumerate(LABELS)])


def size(fraction: float) -> int:
    return subset_size(LABELS, fraction)


def card(fraction: float, subset: int = 0, seed: int = 0, prefix: str = "") -> dict[str, Any]:
    """As the stage finetune writes it; with a prefix, of other data."""
    rows = label_subset(LABELS, IDS, fraction, seed, subset)
    digest = labels_digest((prefix + KEYS[row] for row in rows), (CLASSES[LABELS[row]] for row in rows))
    seen = {"loss": "arcface", "fraction": fraction, "subset": subset, "seed": seed, "samples": len(rows)}
    return seen | {"digest": digest}


def at_hand(seen: list[dict[str, Any]]) -> ProbeLabels:
    return ProbeLabels(LABELS, IDS, KEYS, CLASSES, 0, seen)


def plan(seen: list[dict[str, Any]], fraction: float) -> tuple[tuple[int, ...], float, bool]:
    fair = at_hand(seen).fair(fraction, 5)
    return fair.indices, fair.saw, fair.exact


def test_without_labels_every_subset_is_fair() -> None:
    assert plan([], 0.1) == ((0, 1, 2, 3, 4), 0.0, True)
    assert at_hand([]).fair(1, 1) == Fair((0,), 0.0, True)
    assert not at_hand([]).known.any()


@pytest.mark.parametrize("subset", [0, 3, 9])
def test_at_its_own_share_an_encoder_is_measured_on_the_subset_that_it_saw(subset: int) -> None:
    seen = [card(0.1, subset)]
    assert plan(seen, 0.01) == ((), 0.1, False)
    assert plan(seen, 0.1) == ((subset,), 0.1, True)
    assert plan(seen, 0.5) == ((subset,), 0.1, False)
    assert plan(seen, 1) == ((0,), 0.1, False)


@pytest.mark.parametrize("other", [card(0.1, seed=1), card(0.1, prefix="other/")])
def test_labels_of_another_seed_or_of_other_data_are_fair_beside_all_labels_only(other: dict[str, Any]) -> None:
    assert [plan([other], share)[0] for share in (0.01, 0.1, 0.5, 1)] == [(), (), (), (0,)]
    assert not plan([other], 1)[2]
    # Those of another seed are images of this train part all the same: they choose no penalty.
    known, others = at_hand([other]).known, at_hand([other]).saw_others
    assert (bool(known.any()), others) == ((True, False) if other["seed"] == 1 else (False, True))


def test_a_class_of_another_name_is_another_label() -> None:
    assert labels_digest(["1.png", "2.png"], ["cat", "dog"]) == labels_digest(["2.png", "1.png"], ["dog", "cat"])
    assert labels_digest(["1.png", "2.png"], ["cat", "dog"]) != labels_digest(["1.png", "2.png"], ["dog", "cat"])


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_the_labels_that_were_seen_are_known(fraction: float) -> None:
    known = at_hand([card(fraction, 2)]).known
    assert np.flatnonzero(known).tolist() == label_subset(LABELS, IDS, fraction, 0, 2).tolist()


def test_all_labels_are_exact_beside_all_labels() -> None:
    assert plan([card(1.0, seed=5)], 1) == ((0,), 1.0, True)
    assert plan([card(1.0)], 0.5) == ((), 1.0, False)
    assert not plan([card(1.0, prefix="other/")], 1)[2], "all labels of other data"


def test_several_trainings_on_nested_subsets_count_as_the_largest() -> None:
    assert plan([card(0.01, 2), card(0.1, 2)], 0.1) == ((2,), 0.1, True)
    assert plan([card(0.01, 1), card(0.1, 2)], 0.5) == ((), 0.11, False)
    assert share_seen([card(0.6, 1), card(0.6, 2)]) == 1.0


def test_shares_below_one_label_a_class_are_one_subset() -> None:
    assert size(0.001) == size(0.002) == 3
    assert plan([card(0.002, 1)], 0.001) == ((1,), 0.002, True)


@given(
    st.lists(st.tuples(st.sampled_from([0.01, 0.05, 0.1, 0.5, 1.0]), st.integers(0, 2), st.integers(0, 1)), max_size=3),
    st.sampled_from([0.01, 0.05, 0.1, 0.5, 1.0]),
)
def test_what_was_seen_lies_inside_every_fair_subset(entries: list[tuple[float, int, int]], fraction: float) -> None:
    """Against the subsets themselves."""
    seen = [card(*one) for one in entries]
    labels = [set(label_subset(LABELS, IDS, share, seed, subset)) for share, subset, seed in entries]
    fair = at_hand(seen).fair(fraction, 4)
    for index in fair.indices:
        own = set(label_subset(LABELS, IDS, fraction, 0, index))
        assert set().union(*labels) <= own
        assert fair.exact == (not seen or set().union(*labels) == own)
