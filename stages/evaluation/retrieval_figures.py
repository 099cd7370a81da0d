"""What is written of a retrieval: means over its queries, how they came about, and a row for each query."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.evaluation.features import Features
from stages.evaluation.intervals import bootstrap_interval
from stages.evaluation.query_sets import QuerySets
from stages.evaluation.retrieval import Ranking
from stages.labels import is_labelled


def ranking_figures(
    sets: QuerySets, ranking: Ranking, recall_at: Sequence[int], bootstrap_samples: int, seed: int
) -> dict[str, Any]:
    """Means over the queries that have something to find, with intervals that draw whole classes (of several labels
    whole groups, or queries)."""
    counted = ranking.has_relevant
    groups = None if sets.drawn_whole is None else sets.drawn_whole[counted]

    def mean(name: str, values: NDArray) -> dict[str, Any]:
        interval = bootstrap_interval(values[counted], bootstrap_samples, seed, groups=groups)
        return {name: float(values[counted].mean()), f"{name}_ci95": list(interval)}

    recall: dict[str, Any] = {}
    for k in recall_at:
        recall |= mean(str(k), ranking.hits(k))
    longest = min(max(recall_at), len(sets.gallery))
    return {
        "recall": recall,
        **mean("map_at_r", ranking.average_precision_at_r),
        **mean("r_precision", ranking.r_precision),
        "map": mean("5", ranking.average_precision_at_5),
        **mean("mrr", ranking.reciprocal_rank),
        "cmc": [float(ranking.hits(rank)[counted].mean()) for rank in range(1, longest + 1)],
    }


def retrieval_protocol(
    sets: QuerySets,
    trained_on: NDArray[np.int64],
    splits: tuple[str, str],
    by: Mapping[str, Any] | None,
    bootstrap_samples: int,
) -> dict[str, Any]:
    """How the figures came about.

    Args:
        trained_on: labels of training images.
        splits: those of queries and gallery.
        by: the column, with its values, that parts the two; None: it is the splits.
    """
    relevant = sets.relevant
    found = relevant > 0
    asked = _classes(sets.queries)
    in_train = int(np.isin(asked, trained_on).sum())
    several = {} if sets.queries.label_sets is None else _label_protocol(sets)
    return several | {
        "queries": len(sets.queries),
        "gallery": len(sets.gallery),
        "splits": dict(zip(("queries", "gallery"), splits, strict=True)),
        "by": by,
        "leave_one_out": bool((sets.same >= 0).any()),
        "identities": len(asked),
        "gallery_identities": len(_classes(sets.gallery)),
        "gallery_without_label": int((~is_labelled(sets.gallery.relating)).sum()),
        "queries_without_match": int((~found).sum()),
        "identities_without_match": len(np.setdiff1d(asked, _classes(sets.queries.select(np.flatnonzero(found))))),
        "chance_recall_1": float((relevant[found] / sets.searched[found]).mean()),
        "classes": "shared" if in_train else "disjoint",
        "query_classes_in_train": in_train,
        "encoder_saw_labels": bool(sets.queries.card["encoder"]["labels_seen"]),
        "queries_sharing_a_group": sets.sharing_a_group() if sets.queries.has_groups else None,
        "similarity": "cosine",
        "bootstrap_samples": bootstrap_samples,
    }


def _label_protocol(sets: QuerySets) -> dict[str, Any]:
    """What else is to be said of images with several labels."""
    relation: dict[str, Any] = {"kind": sets.relation.kind}
    if sets.relation.kind == "jaccard":
        relation["threshold"] = sets.relation.threshold
    return {
        "several_labels": True,
        "relation": relation,
        "intervals_draw": "queries" if sets.drawn_whole is None else "groups of queries",
    }


def _classes(part: Features) -> NDArray[np.int64]:
    """Labels that some samples have, ascending."""
    if part.label_sets is not None:
        return np.flatnonzero(part.label_sets.any(dim=0).numpy())
    labels = part.labels.numpy()
    return np.unique(labels[labels >= 0])


def write_neighbours(path: Path, sets: QuerySets, ranking: Ranking) -> None:
    """A row a query: its nearest gallery images, and its own figures for comparisons in pairs."""
    index = ranking.neighbours.index.numpy()
    columns = {
        "id": pa.array(sets.queries.ids, pa.int64()),
        "label": pa.array(sets.queries.labels.numpy(), pa.int32()),
        "neighbours": pa.array([*sets.gallery.ids[index]], pa.list_(pa.int64())),
        "similarities": pa.array([*ranking.neighbours.similarity.numpy()], pa.list_(pa.float32())),
        "right": pa.array([*ranking.right], pa.list_(pa.bool_())),
        "relevant": pa.array(ranking.relevant, pa.int64()),
        "first_rank": pa.array(ranking.first, pa.int64()),
        "r_precision": pa.array(ranking.r_precision),
        "average_precision_at_r": pa.array(ranking.average_precision_at_r),
        "average_precision_at_5": pa.array(ranking.average_precision_at_5),
    }
    if sets.queries.label_sets is not None:
        rows = [np.flatnonzero(row) for row in sets.queries.label_sets.numpy()]
        columns["labels"] = pa.array(rows, pa.list_(pa.int32()))
    pq.write_table(pa.table(columns), path, compression="none")
