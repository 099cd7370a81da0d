"""Probes side by side: names, the table, the protocol. Plain data in, plain data out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.reports.formats import ALL_LABELS, NOTHING, capitalised, percent, points, share_name, share_value

BASELINES = ("pixels", "random")
"""Encoders that learned nothing."""


@dataclass(frozen=True)
class Named:
    """How features are called on the page.

    Attributes:
        label: 'pixels', 'random encoder', 'pretrained', ...; different for each.
        kind: of the encoder, as features.json says it; 'fine-tuned' where labels trained it.
        step: name of the step that is compared.
        backbone: the encoder's architecture, '' for pixels.
    """

    label: str
    kind: str
    step: str
    backbone: str

    @property
    def learned(self) -> bool:
        return self.kind not in BASELINES


@dataclass(frozen=True)
class Probe:
    """A probe with what it says of each test image.

    Attributes:
        metrics: metrics.json.
        ids: int64 [T], the test images.
        correct: bool [T], whether the linear probe named the right class.
    """

    name: Named
    digest: str
    features_digest: str
    metrics: dict[str, Any]
    ids: NDArray[np.int64]
    correct: NDArray[np.bool_]


def name_features(encoder: dict[str, Any], step: str) -> Named:
    """A name from the encoder card of features.json."""
    kind = "fine-tuned" if encoder["stage"] == "finetune" else encoder["kind"]
    backbone = "" if kind == "pixels" else str(encoder["name"])
    label = {"random": "random encoder", "timm": f"timm {backbone.removeprefix('timm:')}"}.get(kind, kind)
    return Named(label, kind, step, backbone)


def distinguish(names: Sequence[Named], makers: Sequence[str]) -> list[Named]:
    """Where several have one label, add what made them: the encoder's step (`makers`), or else the step itself."""
    counts = Counter(name.label for name in names)
    with_maker = [
        replace(name, label=f"{name.label} ({maker})") if counts[name.label] > 1 else name
        for name, maker in zip(names, makers, strict=True)
    ]
    counts = Counter(name.label for name in with_maker)
    return [
        replace(longer, label=f"{name.label} ({name.step})") if counts[longer.label] > 1 else longer
        for name, longer in zip(names, with_maker, strict=True)
    ]


def fractions(metrics: dict[str, Any]) -> list[str]:
    """Keys of the label curve, fewest labels first."""
    return sorted(metrics["label_curve"], key=share_value)


def neighbour_counts(metrics: dict[str, Any]) -> list[str]:
    """The k of the nearest-neighbour classifiers, as their keys, smallest first."""
    return sorted(metrics["knn"], key=int)


@dataclass(frozen=True)
class Cell:
    """A score in the table, with its standard deviation over subsets or its 95% interval, where it has one."""

    value: float
    spread: float | None = None
    interval: list[float] | None = None


def cell(metrics: dict[str, Any], kind: str, share: str) -> Cell | None:
    """One cell of the table; None where the probe did not measure it.

    Args:
        kind: 'linear', or the k of the neighbours.
        share: of the labels, a key of the label curve.
    """
    if kind == "linear" and share == ALL_LABELS:
        linear = metrics["linear"]
        return Cell(linear["top1"], interval=linear["top1_ci95"])
    curve = metrics["label_curve"].get(share)
    if share == ALL_LABELS:
        entry = metrics["knn"].get(kind)
    else:
        entry = curve if curve is None or kind == "linear" else curve["knn"].get(kind)
    return None if entry is None else Cell(entry["top1"], spread=entry.get("sd"))


def comparison(probes: Sequence[Probe]) -> dict[str, Any]:
    """The table: groups of columns, and a row of cells for each probe.

    Returns:
        {"groups": [{"title", "short", "columns": [{"title", "kind", "share"}]}], "rows": [{"label", "step", "kind",
        "backbone", "cells": [{"value", "spread", "interval", "best"} | None]}]}; scores from 0 to 1.
    """
    shares = sorted({key for probe in probes for key in fractions(probe.metrics)} | {ALL_LABELS}, key=share_value)
    ks = sorted({k for probe in probes for k in neighbour_counts(probe.metrics)}, key=int)
    groups = [_group("Linear probe", "linear", "linear", shares)]
    groups += [_group(f"{k} nearest neighbours", f"knn-{k}", k, shares) for k in ks]
    columns = [(column["kind"], column["share"]) for group in groups for column in group["columns"]]
    cells = [[cell(probe.metrics, *column) for column in columns] for probe in probes]
    best = [max((one.value for one in column if one), default=None) for column in zip(*cells, strict=True)]
    rows = [
        {
            **named(probe.name),
            "cells": [
                asdict(one) | {"best": len(probes) > 1 and one.value == highest} if one else None
                for one, highest in zip(row, best, strict=True)
            ],
        }
        for probe, row in zip(probes, cells, strict=True)
    ]
    return {"groups": groups, "rows": rows}


def console_table(table: dict[str, Any]) -> dict[str, list[Any]]:
    """The table as rows of short strings, to print in a terminal: {"columns": [...], "rows": [[...], ...]}.

    Of the neighbours only the first k; all labels come first, then few.
    """
    linear, *neighbours = table["groups"]
    groups = [("linear", 0, linear)]
    if neighbours:
        groups.append((neighbours[0]["short"], len(linear["columns"]), neighbours[0]))
    columns, picks = ["encoder"], []
    for title, offset, group in groups:
        last = len(group["columns"]) - 1
        for position in (last, *range(last)):
            share = group["columns"][position]["title"]
            columns.append(f"{title} {share}" + (" [95%]" if title == "linear" and position == last else ""))
            picks.append(offset + position)
    rows = [[row["label"], *(_cell_text(row["cells"][pick]) for pick in picks)] for row in table["rows"]]
    return {"columns": columns, "rows": rows}


def protocol(probes: Sequence[Probe]) -> dict[str, Any]:
    """How the probes were run: what they share, and what differs.

    Returns:
        {"shared": [{"name", "value"}], "labels": [...], "differing": [{"name", "values": one a probe}]}
    """
    cards = [_protocol_card(probe.metrics) for probe in probes]
    names = list(dict.fromkeys(name for card in cards for name in card))
    shared, differing = [], []
    for name in names:
        values = [card.get(name) for card in cards]
        if all(value == values[0] for value in values):
            shared.append({"name": name, "value": values[0]})
        else:
            differing.append({"name": name, "values": values})
    return {"shared": shared, "labels": [probe.name.label for probe in probes], "differing": differing}


PROTOCOL_NAMES = {
    "train": "Training images",
    "test": "Test images",
    "held_out": "Held out to choose the penalty",
    "standardised": "Features standardised by",
    "neighbour_temperature": "Temperature of neighbours",
    "bootstrap_samples": "Bootstrap samples",
    "max_iterations": "Most L-BFGS iterations",
    "converged": "L-BFGS converged",
}


def _protocol_card(metrics: dict[str, Any]) -> dict[str, Any]:
    """Names a reader understands; what this list does not know keeps its own name."""
    card: dict[str, Any] = {
        "Penalty chosen (on the mean loss)": metrics["linear"]["penalty"],
        "Penalty at the edge of its path": metrics["linear"]["penalty_at_edge"],
        "Neighbours asked for": [int(k) for k in neighbour_counts(metrics)],
        "Neighbours used": [metrics["knn"][k]["k_used"] for k in neighbour_counts(metrics)],
    }
    for key in fractions(metrics):
        entry = metrics["label_curve"][key]
        text = f"{entry['subsets']} of {entry['labels']:,} labels"
        card[f"Subsets at {share_name(key)}"] = text + (", penalty fixed" if entry["fixed_penalty"] else "")
    return card | {
        PROTOCOL_NAMES.get(key, capitalised(key.replace("_", " "))): value for key, value in metrics["protocol"].items()
    }


def _group(title: str, short: str, kind: str, shares: Sequence[str]) -> dict[str, Any]:
    columns = [{"title": share_name(share), "kind": kind, "share": share} for share in shares]
    return {"title": title, "short": short, "columns": columns}


def _cell_text(one: dict[str, Any] | None) -> str:
    if one is None:
        return NOTHING
    if one["interval"]:
        low, high = one["interval"]
        return f"{percent(one['value'])} [{points(low)}, {points(high)}]"
    return percent(one["value"]) + (f" ±{points(one['spread'])}" if one["spread"] is not None else "")


def named(name: Named) -> dict[str, str]:
    """A name as plain data."""
    return {"label": name.label, "kind": name.kind, "step": name.step, "backbone": name.backbone}
