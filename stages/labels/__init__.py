"""Which samples belong together by their labels: one relation for sampler, miner, loss and retrieval."""

from stages.labels.relation import (
    ANY_SHARED,
    Against,
    LabelRelation,
    RelationAsked,
    RelationKind,
    is_labelled,
    relation_of,
)

__all__ = ["ANY_SHARED", "Against", "LabelRelation", "RelationAsked", "RelationKind", "is_labelled", "relation_of"]
