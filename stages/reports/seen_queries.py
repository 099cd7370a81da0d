"""What the trainings behind a retrieval saw of its queries: their images, or images of their classes."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.images.index import read_index, read_summary
from stages.images.pseudo_labels import read_pseudo_labels
from stages.reports.artifacts import Artifact, Lineage

COLUMNS = ("id", "key", "labels", "xxh3")


def query_images_seen(
    lineage: Lineage,
    features: Artifact,
    ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    head: Artifact | None = None,
) -> list[dict[str, Any]]:
    """For each training of the encoder, the last first, what the train split of its shards holds of the queries; and
    the test images that it learned with pseudo-labels. Where it learned pseudo-labels, for each training of the encoder
    that they were made with as well.

    On the shards of the features the split says it. In other shards an image is known by its bytes, whatever its key;
    in shards of the same source by its key too, since they may have stored it in another size. A class is known by its
    name, and by its images.

    Args:
        features: the artifact that was searched.
        ids: int64 [Q], of the queries.
        labels: int64, those that they have.
        head: the training whose head of pairs scores them too; it counts even if the encoder was frozen.

    Returns:
        [{"step", "stage", "query_images", "query_classes"}], counts; empty for an encoder that learned nothing here.
    """
    shards = lineage.input(features, "shards")
    if shards is None:
        return []
    found = []
    for training in _trainings(lineage, features, head):
        other = lineage.input(training, "shards")
        if other is not None:
            pseudo = lineage.input(training, "pseudo_labels")
            images, classes = _count(shards, other, ids, labels, pseudo)
            step = {"step": training.step, "stage": training.stage}
            found.append(step | {"query_images": images, "query_classes": classes})
    return found


def _trainings(lineage: Lineage, features: Artifact, head: Artifact | None) -> Iterator[Artifact]:
    """Every step that trained the encoder's weights, or the head that is scored; one of another head alone did not,
    unless it added a batch norm.

    Pseudo-labels hand on what the encoder of their classifier learned: its trainings count too, each once, after those
    of the encoder itself.
    """
    pending = deque([lineage.input(features, "encoder")])
    found: set[str] = set()
    while pending:
        encoder = pending.popleft()
        if encoder is None or encoder.digest in found:
            continue
        found.add(encoder.digest)
        pending.appendleft(lineage.input(encoder, "encoder"))
        trains_encoder = encoder.settings.get("freeze") != "encoder" or encoder.settings.get("neck") == "bn"
        if not trains_encoder and (head is None or encoder.digest != head.digest):
            continue
        yield encoder
        given = lineage.input(encoder, "pseudo_labels")
        classified = None if given is None else lineage.input(given, "features")
        if given is not None and classified is not None and len(read_pseudo_labels(given.files)):
            pending.append(lineage.input(classified, "encoder"))


def _learned(shards: Artifact, pseudo: Artifact | None, columns: list[str]) -> pa.Table:
    """Rows of the index that a training learned from: train, and test images with a pseudo-label."""
    train = read_index(shards.files, "train", columns)
    if pseudo is None:
        return train
    given = read_pseudo_labels(pseudo.files)
    test = read_index(shards.files, "test", columns) if given.test_images else train.slice(0, 0)
    return pa.concat_tables([train, test.filter(pa.array(np.isin(test["id"].to_numpy(), given.ids)))])


def _count(
    shards: Artifact, other: Artifact, ids: NDArray[np.int64], labels: NDArray[np.int64], pseudo: Artifact | None
) -> tuple[int, int]:
    """Queries that a training on `other` learned, and classes of queries."""
    asked = np.unique(labels)
    if other.digest == shards.digest:
        train = _learned(other, pseudo, ["id", "labels"])
        return int(np.isin(ids, train["id"].to_numpy()).sum()), int(np.isin(asked, _labels(train)).sum())
    train = _learned(other, pseudo, [*COLUMNS])
    summary = read_summary(shards.files)
    tables = [read_index(shards.files, split, [*COLUMNS]) for split in summary["splits"]]
    known = pa.concat_tables([table.select([*COLUMNS]) for table in tables])
    is_there = np.isin(known["xxh3"].to_numpy(), train["xxh3"].to_numpy())
    if _source(shards) == _source(other):
        keys = frozenset(train["key"].to_pylist())
        is_there |= np.array([key in keys for key in known["key"].to_pylist()], dtype=bool)
    matched = known.filter(pa.array(is_there))
    names = read_summary(other.files)["classes"]
    names_in_train = {names[label] for label in np.unique(_labels(train)).tolist()}
    by_name = np.array([summary["classes"][label] in names_in_train for label in asked.tolist()], dtype=bool)
    classes = by_name | np.isin(asked, _labels(matched))
    return int(np.isin(ids, matched["id"].to_numpy()).sum()), int(classes.sum())


def _labels(index: pa.Table) -> NDArray[np.int64]:
    """All labels of all rows, one after another."""
    return index["labels"].combine_chunks().flatten().to_numpy().astype(np.int64)


def _source(shards: Artifact) -> object:
    """What its images came from: the digest of the files, or the name of a set."""
    return shards.inputs.get("source") or shards.settings.get("source")
