"""The relation of label sets against Python's sets."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.labels import ANY_SHARED, LabelRelation, RelationKind, is_labelled, relation_of
from stages.settings.relation import Relation

CLASSES = 6
SETS = st.lists(st.frozensets(st.integers(0, CLASSES - 1), max_size=CLASSES), min_size=1, max_size=9)
THRESHOLDS = (0.1, 0.25, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.75, 1.0)


def as_rows(sets: list[frozenset[int]]) -> Tensor:
    return torch.tensor([[label in one for label in range(CLASSES)] for one in sets])


def belong(kind: RelationKind, threshold: float, one: frozenset[int], other: frozenset[int]) -> bool:
    if not one or not other:
        return False
    if kind == "any":
        return bool(one & other)
    if kind == "all":
        return one == other
    return Fraction(len(one & other), len(one | other)) >= Fraction(threshold).limit_denominator(100)


@pytest.mark.parametrize("kind", ["any", "all", "jaccard"])
@settings(max_examples=60, deadline=None)
@given(SETS, SETS, st.sampled_from(THRESHOLDS))
def test_it_is_that_of_sets(
    kind: RelationKind, rows: list[frozenset[int]], columns: list[frozenset[int]], threshold: float
) -> None:
    found = LabelRelation(kind, threshold).between(as_rows(rows), as_rows(columns))
    assert found.dtype == torch.bool
    assert found.tolist() == [[belong(kind, threshold, one, other) for other in columns] for one in rows]


@pytest.mark.parametrize("kind", ["any", "all", "jaccard"])
def test_rows_may_be_asked_in_parts(kind: RelationKind) -> None:
    random = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(count, CLASSES, generator=random) < 0.3 for count in (11, 7))
    relation = LabelRelation(kind, 0.4)
    related = relation.against(columns)
    for begin in range(0, 11, 3):
        part = rows[begin : begin + 3]
        assert related.of(part).tolist() == relation.between(part, columns).tolist()


@pytest.mark.parametrize("relation", [LabelRelation(), LabelRelation("all"), LabelRelation("jaccard", 0.3)])
def test_of_one_label_each_it_is_equality(relation: LabelRelation) -> None:
    labels, others = torch.tensor([0, 3, -1, 2, 3, -1]), torch.tensor([3, 2, -1, 5])
    wanted = [[a == b and a >= 0 for b in others.tolist()] for a in labels.tolist()]
    assert relation.between(labels, others).tolist() == wanted
    sets, other_sets = (as_rows([frozenset({x} - {-1}) for x in one.tolist()]) for one in (labels, others))
    assert relation.between(sets, other_sets).tolist() == wanted
    assert is_labelled(labels).tolist() == is_labelled(sets).tolist() == [True, True, False, True, True, False]


def test_a_threshold_that_is_met_exactly_is_met() -> None:
    for either in range(1, 60):
        for shared in range(1, either + 1):
            one, other = torch.zeros(1, 60, dtype=torch.bool), torch.zeros(1, 60, dtype=torch.bool)
            one[0, :either], other[0, :shared] = True, True
            assert LabelRelation("jaccard", shared / either).between(one, other).item()
            assert not LabelRelation("jaccard", shared / either + 1e-5).between(one, other).item()


def test_settings_ask_for_a_relation() -> None:
    assert relation_of(None) is ANY_SHARED
    assert relation_of(Relation(kind="all")) == LabelRelation("all")
    assert relation_of(Relation(kind="jaccard", threshold=0.25)) == LabelRelation("jaccard", 0.25)
