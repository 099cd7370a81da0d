"""Probes of images with several labels each, as plain data: a table of means and a table of labels."""

from collections.abc import Sequence
from typing import Any

from stages.reports.artifacts import Artifact, Lineage, read_json
from stages.reports.formats import capitalised, percent, points
from stages.reports.names import Compared, name_all
from stages.reports.probes import named


def has_several_labels(probe: Artifact) -> bool:
    return read_json(probe.files / "metrics.json").get("several_labels", False)


def label_probes(lineage: Lineage, artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """For each probe its name, the digest and the metrics."""
    metrics = [read_json(artifact.files / "metrics.json") for artifact in artifacts]
    compared = [
        Compared(
            one["encoder"],
            artifact.step,
            lineage.input(artifact, "features"),
            artifact.settings,
            artifact.seed,
            artifact.digest,
        )
        for one, artifact in zip(metrics, artifacts, strict=True)
    ]
    return [
        named(name) | {"digest": artifact.digest, "metrics": one}
        for name, artifact, one in zip(name_all(lineage, compared), artifacts, metrics, strict=True)
    ]


def label_console_table(probes: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """To print in a terminal: {"columns": [...], "rows": [[...], ...]}."""
    k = min((k for probe in probes for k in probe["metrics"]["knn"]), key=int)
    rows = []
    for probe in probes:
        linear, knn = probe["metrics"]["linear"], probe["metrics"]["knn"].get(k)
        rows.append(
            [
                probe["label"],
                *(f"{percent(linear[name])} [{_interval(linear[f'{name}_ci95'])}]" for name in ("map", "macro_f1")),
                percent(knn["map"] if knn else None),
            ]
        )
    return {"columns": ["encoder", "linear mAP [95%]", "linear macro F1 [95%]", f"{k}-NN mAP"], "rows": rows}


def label_verdict(probes: Sequence[dict[str, Any]], health: dict[str, Any]) -> dict[str, Any]:
    """That of `health_verdict`, with the scores of the first encoder that learned something."""
    subject = next((one for one in probes if one["kind"] not in ("pixels", "random")), probes[0])
    linear = subject["metrics"]["linear"]
    sentence = (
        f"{capitalised(subject['label'])} reaches a mean average precision of {percent(linear['map'])} with a linear "
        f"probe of each label (95% interval {_interval(linear['map_ci95'], ' to ')}), and a macro F1 of "
        f"{percent(linear['macro_f1'])}."
    )
    caveat = "Rare labels are measured on few images: their support stands beside their scores."
    return health | {"sentence": sentence, "caveat": caveat, "subject": subject["label"]}


def _interval(bounds: Sequence[float], between: str = ", ") -> str:
    return between.join(map(points, bounds))
