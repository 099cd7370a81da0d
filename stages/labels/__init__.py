"""Which samples belong together by their labels: one relation for sampler, miner, loss and retrieval."""

from stages.labels.relation import LabelRelation, RelationKind, is_labelled

__all__ = ["LabelRelation", "RelationKind", "is_labelled"]
