"""Classes that a classifier gave to images without a label: which are taken, as files, and among the images of a
training."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.images.index import read_index, read_summary
from stages.images.shards import Shards, open_shards
from stages.images.targets import Targets

PSEUDO_LABELS_FILE, METRICS_FILE = "pseudo_labels.parquet", "metrics.json"


class UnusablePseudoLabels(ValueError):
    """They are not of these images, or of images whose own labels are learned."""

    exit_code = 2


@dataclass(frozen=True)
class PseudoLabels:
    """Images with the class that each was given.

    Attributes:
        ids: int64 [n], ascending.
        splits: str [n]; `test` only where the recipe asked for it.
        labels: int64 [n], positions in the list of classes.
        images: `images_digest` of all images that the classifier's features were of.
        labels_seen: the labels behind them, as entries of model.json: those of the classifier's encoder, and last the
            classifier's own.
    """

    ids: np.ndarray
    splits: np.ndarray
    labels: np.ndarray
    images: str
    labels_seen: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def test_images(self) -> int:
        return int((self.splits == "test").sum())


def images_digest(ids: Iterable[int], keys: Iterable[str], splits: Iterable[str], classes: Sequence[str]) -> str:
    """Of images in the order of ids, and the names of their classes, whatever class each is of: sha256."""
    lines = [*classes, *(f"{number}\t{split}\t{key}" for number, key, split in zip(ids, keys, splits, strict=True))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def take_confident(
    labels: np.ndarray, confidences: np.ndarray, threshold: float | None, per_class: int | None
) -> np.ndarray:
    """Positions of the answers that become pseudo-labels, int64 [n], ascending: of equal confidence the first.

    Args:
        labels, confidences: [N], answers of a classifier.
        threshold: confidence from which on an answer is taken; None: none is.
        per_class: answers of a class at most, the most confident ones; None: all.
    """
    if threshold is None:
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(-confidences, kind="stable")
    order = order[confidences[order] >= threshold]
    if per_class is not None:
        rank = np.zeros(len(order), dtype=np.int64)
        for label in np.unique(labels[order]):
            same = labels[order] == label
            rank[same] = np.arange(same.sum())
        order = order[rank < per_class]
    return np.sort(order)


def write_pseudo_labels(
    folder: Path,
    ids: np.ndarray,
    keys: Sequence[str],
    splits: Sequence[str],
    labels: np.ndarray,
    confidences: np.ndarray,
    classes: Sequence[str],
) -> None:
    """pseudo_labels.parquet, a row an image: id, key, split, label (position among classes), class, confidence.

    Args:
        ids, labels: int64 [n], ids ascending.
        confidences: [n].
    """
    columns = {
        "id": pa.array(ids, pa.int64()),
        "key": pa.array(keys, pa.string()),
        "split": pa.array(splits, pa.string()),
        "label": pa.array(labels, pa.int32()),
        "class": pa.array([classes[label] for label in labels.tolist()], pa.string()),
        "confidence": pa.array(confidences.astype(np.float32)),
    }
    pq.write_table(pa.table(columns), folder / PSEUDO_LABELS_FILE, compression="none")


def read_pseudo_labels(folder: Path) -> PseudoLabels:
    """Of an artifact of the stage `pseudo_label`."""
    metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    table = pq.read_table(folder / PSEUDO_LABELS_FILE, columns=["id", "split", "label"])
    return PseudoLabels(
        table["id"].to_numpy(),
        np.asarray(table["split"].to_pylist(), dtype=np.str_),
        table["label"].to_numpy().astype(np.int64),
        metrics["images"],
        tuple(metrics["labels_seen"]),
    )


@dataclass(frozen=True)
class Learned:
    """What is learned, labels and pseudo-labels together.

    Attributes:
        shards: train, and test where there are pseudo-labels of test images.
        targets: of its images; -1 for whatever is not learned.
        positions: int64 [n], of the images that are learned, ascending.
        pseudo: bool [n], which of them have a pseudo-label.
    """

    shards: Shards
    targets: Targets
    positions: np.ndarray
    pseudo: np.ndarray


def add_pseudo_labels(train: Shards, targets: Targets, chosen: np.ndarray, given: PseudoLabels) -> Learned:
    """Images with pseudo-labels join those with labels; no label but those of `chosen` goes along.

    Args:
        targets: of the images of `train`.
        chosen: int64 [n], positions of the images whose labels are learned, ascending.

    Raises:
        UnusablePseudoLabels: they were made from other shards, or are of images among those chosen.
    """
    splits = [*read_summary(train.folder)["splits"]]
    index = read_index(train.folder, splits, ["id", "key", "split"]).sort_by("id")
    numbers, keys, parts = (index[name].to_pylist() for name in ("id", "key", "split"))
    if given.images != images_digest(numbers, keys, parts, train.classes):
        raise UnusablePseudoLabels(
            "pseudo_labels: they were made from features of other shards than these: take a step whose features are "
            "of the same shards"
        )
    ids = train.sample_ids.numpy()[chosen]
    both = int(np.isin(given.ids, ids).sum())
    if both:
        raise UnusablePseudoLabels(
            f"pseudo_labels: {both:,} of the {len(given):,} images have labels that are learned here: give the step "
            "that made them and this one the same label_fraction, label_subset and seed"
        )
    shards = open_shards(train.folder, "train", "test") if given.test_images else train
    there = shards.sample_ids.numpy()  # ascending
    labels = np.full(len(there), -1, dtype=np.int64)
    labels[np.searchsorted(there, ids)] = targets.labels[chosen]
    labels[np.searchsorted(there, given.ids)] = given.labels
    positions = np.flatnonzero(labels >= 0)
    return Learned(shards, Targets(labels, targets.classes), positions, np.isin(there[positions], given.ids))
