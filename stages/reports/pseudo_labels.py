"""Pseudo-labels in the report: what was given, and which encoders learned test images with them."""

from collections.abc import Sequence
from typing import Any

from stages.evaluation.labels_seen import pseudo_labelled_test_images
from stages.reports.artifacts import Lineage, read_json
from stages.reports.names import Named

KEYS = (
    "threshold", "threshold_chosen", "precision_asked", "candidates", "counts", "hidden_labels", "include_test",
    "label_fraction",
)  # fmt: skip


def pseudo_label_rows(lineage: Lineage) -> list[dict[str, Any]]:
    """A row for each step that gave pseudo-labels.

    Returns:
        [{"step", "digest", "seed", "threshold", "threshold_chosen", "precision_asked", "candidates", "counts",
        "hidden_labels", "include_test", "label_fraction", "out_of_fold": {"images", "precision", "coverage"}}]
    """
    rows = []
    for artifact in lineage.of_stage("pseudo_label"):
        metrics = read_json(artifact.files / "metrics.json")
        known = {key: metrics["out_of_fold"][key] for key in ("images", "precision", "coverage")}
        card = {"step": artifact.step, "digest": artifact.digest, "seed": artifact.seed, "out_of_fold": known}
        rows.append(card | {key: metrics[key] for key in KEYS})
    return rows


def pseudo_label_caveat(encoders: Sequence[tuple[Named, dict[str, Any]]]) -> str | None:
    """A sentence where an encoder learned test images with pseudo-labels, itself or by what it descends from.

    Args:
        encoders: name, and the encoder of features.json, of all that is compared.
    """
    found = [name.label for name, card in encoders if pseudo_labelled_test_images(card["labels_seen"])]
    if not found:
        return None
    return (
        f"Trained on test images with pseudo-labels: yes, transductive: {'; '.join(found)}. What is scored on test is "
        "not of images that the training never saw."
    )
