"""Curves of pretraining and the outcome of fine-tunings, from metrics.jsonl."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.reports.artifacts import Artifact, Lineage, read_json, read_lines
from stages.reports.formats import capitalised
from stages.reports.names import describe_tuning

MOST_POINTS = 300
"""Points of one curve: more than a plot of 400 pixels shows."""

CURVES = {
    "loss": "Loss (NT-Xent)",
    "contrastive_accuracy": "Contrastive accuracy",
    "probe_accuracy": "Linear probe beside training",
    "rankme_share": "Effective rank of the projector, share of its dimension",
    "alignment": "Alignment",
    "uniformity": "Uniformity",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
}
"""What is drawn, in this order, by its key in metrics.jsonl."""

SHARES = frozenset({"contrastive_accuracy", "probe_accuracy", "rankme_share"})
"""Curves that are fractions: drawn as percent."""


def curve(lines: Sequence[dict[str, Any]], key: str) -> dict[str, list[float]]:
    """One quantity against the epoch, thinned to means of neighbouring points; the last point stays as it is.

    Returns:
        {"epoch": [...], "value": [...]}, both empty where no line has the quantity.
    """
    found = [(line["epoch"], line[key]) for line in lines if line.get(key) is not None and math.isfinite(line[key])]
    if len(found) > MOST_POINTS:
        *body, last = found
        parts = np.array_split(np.asarray(body, dtype=np.float64), MOST_POINTS - 1)
        found = [tuple(part.mean(axis=0)) for part in parts] + [last]
    return {
        "epoch": [round(float(epoch), 4) for epoch, _ in found],
        "value": [float(f"{value:.6g}") for _, value in found],
    }


def training(lines: Sequence[dict[str, Any]], card: dict[str, Any]) -> dict[str, Any]:
    """Everything the page says of one pretraining.

    Args:
        lines: of metrics.jsonl.
        card: model.json.
    """
    curves = {key: curve(lines, key) for key in CURVES}
    curves = {key: points for key, points in curves.items() if points["value"]}
    health = next((line for line in reversed(lines) if "rankme" in line), None)
    return {
        "backbone": card["architecture"]["backbone"],
        "width": card["architecture"]["width"],
        "parameters": card["parameters"],
        "embedding_size": card["embedding_size"],
        "projector": card["projector"],
        "image_size": card["image_size"],
        "weights": card["weights"],
        "steps": max((line["step"] for line in lines), default=0),
        "last": {key: points["value"][-1] for key, points in curves.items()},
        "curves": curves,
        "projector_rank": None
        if health is None
        else {
            "rankme": health["rankme"],
            "share": health["rankme_share"],
            "samples": health["rankme_samples"],
            "dimension": card["projector"]["dimension"],
        },
    }


FIGURES = {
    "loss": "Loss",
    "accuracy": "Accuracy in the batch",
    "active_triplets": "Active triplets",
    "positive_distance": "Distance to positives",
    "negative_distance": "Distance to negatives",
    "gradient_norm": "Gradient norm",
}
"""What the table of fine-tunings shows of their ends, by key of metrics.jsonl; keys that are not here come after."""
FIGURE_SHARES = frozenset({"accuracy", "active_triplets"})
NOT_SHOWN = frozenset({"step", "epoch", "learning_rate"})


def fine_tuning(lineage: Lineage) -> dict[str, Any]:
    """A row for each fine-tuning: many curves would be none.

    Returns:
        {"columns": [{"key", "title", "share"}], "rows": [{"step", "digest", "seed", "name", "labels", "fraction",
        "subset", "trained", "steps", "last": {key: value}}]}; "given_pairs": true where it learned from pairs of a
        file, of so many images; "pseudo": {"train", "test"} where there are any
    """
    rows = [_fine_tuned(lineage, artifact) for artifact in lineage.of_stage("finetune")]
    found = dict.fromkeys(key for row in rows for key in row["last"])
    keys = [key for key in FIGURES if key in found] + [key for key in found if key not in FIGURES]
    columns = [
        {"key": key, "title": FIGURES.get(key, capitalised(key.replace("_", " "))), "share": key in FIGURE_SHARES}
        for key in keys
    ]
    return {"columns": columns, "rows": rows}


def _fine_tuned(lineage: Lineage, artifact: Artifact) -> dict[str, Any]:
    lines = read_lines(artifact.files / "metrics.jsonl")
    card = read_json(artifact.files / "model.json")
    seen = (card["head"] or {}).get("learned_from") or card["labels_seen"][-1]
    # Each figure where it was recorded last: a mean over the steps since the line before.
    last = {key: value for line in lines for key, value in line.items() if key not in NOT_SHOWN}
    freeze = artifact.settings.get("freeze", "none")
    return (
        {
            "step": artifact.step,
            "digest": artifact.digest,
            "seed": artifact.seed,
            "name": describe_tuning(lineage, artifact, seen["loss"]),
            "labels": seen["samples"],
            "fraction": seen["fraction"],
            "subset": seen["subset"],
            "trained": {"none": "all weights", "encoder": "the head alone"}.get(freeze, f"what follows {freeze}"),
            "steps": max((line["step"] for line in lines), default=0),
            "last": {key: float(f"{value:.6g}") for key, value in last.items()},
        }
        | ({"given_pairs": True} if "pairs" in artifact.inputs else {})
        | ({"pseudo": {key: seen["pseudo"][key] for key in ("train", "test")}} if "pseudo" in seen else {})
    )
