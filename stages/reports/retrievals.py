"""Retrievals side by side: their figures, which of them are told apart from the best, the protocol. Plain data out."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.evaluation.features import FeatureFile
from stages.evaluation.intervals import bootstrap_interval
from stages.evaluation.labels_seen import pseudo_labelled_test_images
from stages.reports.artifacts import Artifact, read_json
from stages.reports.formats import ALL_LABELS, percent
from stages.reports.names import Named
from stages.reports.probes import Probe, cell, neighbour_counts, protocol_card, shared_and_differing

BOOTSTRAP_SAMPLES = 2000
"""Resamplings of classes for the interval of a difference."""
RECALL_AT_1, MAP_AT_R = "recall_1", "map_at_r"
COLUMNS = {RECALL_AT_1: "Recall@1", "recall_10": "Recall@10", MAP_AT_R: "MAP@R"}
"""Of the table, by key; a key of recall ends in its k."""


@dataclass(frozen=True)
class Retrieval:
    """A retrieval with what it says of each query.

    Attributes:
        metrics: metrics.json.
        ids, labels: int64 [Q], of the queries; a label is a position in `metrics["classes"]`.
        relevant, first_rank: int64 [Q], gallery images of the query's class, and the rank of the nearest of them; 0
            without one.
        average_precision: [Q], at R.
        neighbours: int64 [Q, K], ids of the nearest gallery images, best first.
        similarities: [Q, K].
        right: bool [Q, K], which of these are of the query's class, or of several labels belong to it.
        drawn_whole: int64 [Q], what an interval draws whole: classes, or of several labels groups.
        classes: int64, those that a query has.
        asked, searched: digests of keys and classes of the queries, and of the gallery images: two retrievals are
            comparable where both are equal.
        seed: of the run.
        seen: what trainings of encoder and head saw of the queries (see `query_images_seen`).
    """

    name: Named
    digest: str
    features_digest: str
    metrics: dict[str, Any]
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    relevant: NDArray[np.int64]
    first_rank: NDArray[np.int64]
    average_precision: NDArray[np.float64]
    neighbours: NDArray[np.int64]
    similarities: NDArray[np.float64]
    right: NDArray[np.bool_]
    drawn_whole: NDArray[np.int64]
    classes: NDArray[np.int64]
    asked: str
    searched: str
    seed: int | None = None
    seen: tuple[dict[str, Any], ...] = ()

    def is_comparable_with(self, other: "Retrieval") -> bool:
        """Whether both asked the same queries of the same gallery."""
        return self.asked == other.asked and self.searched == other.searched

    @property
    def transductive(self) -> bool:
        """Whether a training of the encoder, or of the head that scores pairs, saw images of the queries, or of their
        classes; or test images, with pseudo-labels."""
        if pseudo_labelled_test_images(self.metrics["encoder"]["labels_seen"]):
            return True
        return any(one["query_images"] or one["query_classes"] for one in self.seen)

    def per_query(self, key: str) -> NDArray[np.float64]:
        """What each query that has something to find adds to the mean of a column: [q]."""
        counted = self.relevant > 0
        if key == MAP_AT_R:
            return self.average_precision[counted]
        return (self.first_rank[counted] <= int(key.removeprefix("recall_"))).astype(np.float64)

    @property
    def groups(self) -> NDArray[np.int64]:
        """What an interval draws whole, of each query that has something to find: [q]."""
        return self.drawn_whole[self.relevant > 0]

    @property
    def several_labels(self) -> bool:
        return "several_labels" in self.metrics["protocol"]

    def figure(self, key: str) -> tuple[float, list[float]]:
        """Value and 95% interval of a column: those of metrics.json, or computed as there for a k that it lacks."""
        name = key.removeprefix("recall_")
        found = self.metrics if key == MAP_AT_R else self.metrics["recall"]
        if name in found:
            return found[name], found[f"{name}_ci95"]
        values, samples = self.per_query(key), self.metrics["protocol"]["bootstrap_samples"]
        return float(values.mean()), [*bootstrap_interval(values, samples, self.seed or 0, groups=self.groups)]


def read_retrieval(artifact: Artifact, name: Named, features: FeatureFile, features_digest: str) -> Retrieval:
    """What an artifact of the stage `retrieve` holds."""
    metrics = read_json(artifact.files / "metrics.json")
    table = pq.read_table(artifact.files / "neighbours.parquet")
    ids, labels = table["id"].to_numpy(), table["label"].to_numpy().astype(np.int64)
    rows = np.searchsorted(features.ids, ids)
    protocol = metrics["protocol"]
    several = "several_labels" in protocol
    relation = json.dumps(protocol["relation"]) if several else ""
    gallery = np.flatnonzero(_in_gallery(features, protocol))
    of_queries = [label for row in rows.tolist() for label in features.label_lists[row]] if several else labels
    return Retrieval(
        name,
        artifact.digest,
        features_digest,
        metrics,
        ids,
        labels,
        table["relevant"].to_numpy(),
        table["first_rank"].to_numpy(),
        table["average_precision_at_r"].to_numpy(),
        np.stack(table["neighbours"].to_numpy()),
        np.stack(table["similarities"].to_numpy()).astype(np.float64),
        np.stack(table["right"].to_numpy()),
        features.groups[rows] if several else labels,
        np.unique(of_queries),
        _digest_of_images(features, rows, several) + relation,
        _digest_of_images(features, gallery, several),
        artifact.seed,
    )


def _in_gallery(features: FeatureFile, protocol: Mapping[str, Any]) -> NDArray[np.bool_]:
    """bool [N], rows of the file that were searched."""
    gallery = features.splits == protocol["splits"]["gallery"]
    if protocol["by"] is None:
        return gallery
    values = features.attribute(protocol["by"]["column"])
    return gallery & np.array([value in protocol["by"]["gallery"] for value in values], dtype=bool)


def _digest_of_images(features: FeatureFile, rows: NDArray[np.int64], several: bool) -> str:
    """Of keys and names of classes, in the order of rows."""
    keys, labels, names = features.keys, features.labels, features.classes
    digest = hashlib.sha256()
    for row in rows.tolist():
        own = names[labels[row]] if labels[row] >= 0 else None
        what = [names[label] for label in features.label_lists[row]] if several else own
        digest.update(json.dumps([keys[row], what]).encode())
    return digest.hexdigest()


def are_comparable(retrievals: Sequence[Retrieval]) -> bool:
    """Whether all asked the same queries of the same gallery."""
    return all(one.is_comparable_with(retrievals[0]) for one in retrievals)


def paired_difference(one: Retrieval, other: Retrieval, key: str) -> tuple[float, list[float]]:
    """Difference of two comparable retrievals in a column, and its 95% interval: whole query classes are drawn."""
    gains = one.per_query(key) - other.per_query(key)
    low, high = bootstrap_interval(gains, BOOTSTRAP_SAMPLES, groups=one.groups)
    return round(float(gains.mean()), 6), [round(low, 6), round(high, 6)]


def retrieval_table(retrievals: Sequence[Retrieval], probes: Sequence[Probe]) -> dict[str, Any]:
    """The table: a row a retrieval, and beside its figures those of the first probe of the same features.

    Returns:
        {"columns": [{"key", "title"}], "k": of the neighbours beside or None, "comparable", "rows": [{"label", "row",
        "kind", "step", "backbone", "cells": [{"value", "interval", "best", "difference", "tie"}], "linear", "knn":
        cells of a probe with "best", or None, "transductive", "seen": [{"step", "stage", "query_images",
        "query_classes"}]}]}; scores from 0 to 1. `difference` is {"value", "interval"} from the best of the column,
        `tie` whether that interval holds 0; None and False where nothing is compared.
    """
    comparable = len(retrievals) > 1 and are_comparable(retrievals)
    columns = [_column(retrievals, key, comparable) for key in COLUMNS]
    beside: dict[str, Probe] = {}
    for probe in probes:
        beside.setdefault(probe.features_digest, probe)
    found = [beside.get(one.features_digest) for one in retrievals]
    ks = [k for probe in found if probe for k in neighbour_counts(probe.metrics)[:1]]
    k = min(ks, key=int, default=None)
    linear, knn = _probe_cells(found, "linear"), _probe_cells(found, k) if k else [None] * len(found)
    rows = []
    for number, one in enumerate(retrievals):
        name = one.name
        row = {"label": name.label, "row": name.row_label, "kind": name.kind, "step": name.step}
        row |= {"backbone": name.backbone, "cells": [column[number] for column in columns]}
        row |= {"linear": linear[number], "knn": knn[number]}
        rows.append(row | {"transductive": one.transductive, "seen": [*one.seen]})
    titles = [{"key": key, "title": title} for key, title in COLUMNS.items()]
    return {"columns": titles, "k": int(k) if k else None, "comparable": comparable, "rows": rows}


def _column(retrievals: Sequence[Retrieval], key: str, comparable: bool) -> list[dict[str, Any]]:
    """The cells of one column."""
    figures = [one.figure(key) for one in retrievals]
    cells: list[dict[str, Any]] = [
        {"value": value, "interval": [*interval], "best": False, "difference": None, "tie": False}
        for value, interval in figures
    ]
    if not comparable:
        return cells
    highest = max(value for value, _ in figures)
    best = next(one for one, (value, _) in zip(retrievals, figures, strict=True) if value == highest)
    for one, found in zip(retrievals, cells, strict=True):
        if found["value"] == highest:
            found["best"] = True
            continue
        difference, (low, high) = paired_difference(one, best, key)
        found |= {"difference": {"value": difference, "interval": [low, high]}, "tie": low <= 0 <= high}
    return cells


def _probe_cells(probes: Sequence[Probe | None], kind: str) -> list[dict[str, Any] | None]:
    """Cells of one column of the probes, where all labels are used; the best of it where all had the same test."""
    there = [probe for probe in probes if probe]
    found = [cell(probe.metrics, kind, ALL_LABELS) if probe else None for probe in probes]
    values = [one.value for one in found if one and one.value is not None]
    alike = len(there) > 1 and all(probe.scored_on_those_of(there[0]) for probe in there)
    highest = max(values) if alike and values else None
    return [
        {"value": one.value, "interval": one.interval, "saw": one.saw, "others": one.others}
        | {"best": highest is not None and one.value == highest}
        if one
        else None
        for one in found
    ]


PROTOCOL_NAMES = {
    "queries": "Queries",
    "gallery": "Gallery images",
    "splits": "Splits",
    "by": "Queries and gallery by a column",
    "leave_one_out": "Leave one out",
    "identities": "Classes of queries",
    "gallery_identities": "Classes in the gallery",
    "gallery_without_label": "Gallery images without a label",
    "queries_without_match": "Queries without a match, left out",
    "identities_without_match": "Classes without a match, left out",
    "chance_recall_1": "Chance recall@1",
    "classes": "Classes of queries and of train",
    "query_classes_in_train": "Query classes that train has",
    "encoder_saw_labels": "Encoder learned from labels",
    "queries_sharing_a_group": "Queries with images of their group in the gallery",
    "bootstrap_samples": "Bootstrap samples",
    "index": "Index for searches; the figures are of exact search",
    "several_labels": "Several labels an image",
    "relation": "What belongs together",
    "intervals_draw": "Intervals draw",
}


def retrieval_protocol(retrievals: Sequence[Retrieval]) -> dict[str, Any]:
    """How the retrievals were run: what they share, and what differs; see `probes.protocol`."""
    cards = []
    for one in retrievals:
        values = dict(one.metrics["protocol"])
        values["chance_recall_1"] = percent(values["chance_recall_1"], 2)
        index = one.metrics.get("index")
        if index is not None:
            values["index"] = f"{index['kind']}, finds {percent(index['recall']['10'], 1)} of the ten nearest"
        cards.append(protocol_card(values, PROTOCOL_NAMES) | {"Transductive": one.transductive})
    return shared_and_differing(cards, [one.name.label for one in retrievals])
