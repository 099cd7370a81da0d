"""Probes side by side: names, the table, the protocol. Plain data in, plain data out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.evaluation.labels_seen import pseudo_labelled_test_images
from stages.reports.formats import (
    ALL_LABELS,
    NOTHING,
    capitalised,
    percent,
    plural,
    points,
    share_name,
    share_value,
)
from stages.reports.names import Named

MUCH_MORE = 2
"""Times the share that a column is named for: from there on its name is the share that it comes to."""


@dataclass(frozen=True)
class Probe:
    """A probe with what it says of each test image.

    Attributes:
        metrics: metrics.json.
        keys: str [T], the test images.
        correct: bool [T], whether the linear probe named the right class.
        groups: int64 [T], equal for test images of one group; None where no group was declared.
        seed: of the run.
    """

    name: Named
    digest: str
    features_digest: str
    metrics: dict[str, Any]
    keys: NDArray[np.str_]
    correct: NDArray[np.bool_]
    groups: NDArray[np.int64] | None = None
    seed: int | None = None

    @property
    def labels_seen(self) -> list[dict[str, Any]]:
        return self.metrics.get("encoder", {}).get("labels_seen", [])

    @property
    def saw_test_images(self) -> bool:
        """Whether a training behind it learned test images with pseudo-labels."""
        return pseudo_labelled_test_images(self.labels_seen) > 0

    def scored_on_those_of(self, other: "Probe") -> bool:
        """Whether both were scored on the same test images."""
        return np.array_equal(self.keys, other.keys)


@dataclass(frozen=True)
class Row:
    """A row of the table: a probe, or probes of one fine-tuning on several shares of the labels."""

    members: tuple[Probe, ...]

    @property
    def name(self) -> Named:
        return self.members[0].name

    @property
    def label(self) -> str:
        return self.name.row_label

    @property
    def fullest(self) -> Probe:
        """The one whose encoder saw the most labels: it stands for the row where all labels are used."""
        return max(self.members, key=lambda probe: probe.name.fraction)

    def cell(self, kind: str, share: str) -> "Cell | None":
        """One cell: of the encoder that saw exactly these labels; or else of the one that saw the largest part of them.

        Where every encoder saw others, the cell has no value and says what the nearest saw; None where nothing was
        measured.
        """
        found = [one for probe in self.members if (one := cell(probe.metrics, kind, share)) is not None]
        exact = [one for one in found if one.saw is None]
        if exact:
            return exact[0]
        measured = [one for one in found if one.value is not None]
        if measured:
            return max(measured, key=lambda one: one.saw or 0)
        return min(found, key=lambda one: one.saw or 0, default=None)


def rows_of(probes: Sequence[Probe]) -> list[Row]:
    """The rows of the table, in the order of their first probes."""
    found: dict[str, list[Probe]] = {}
    for probe in probes:
        found.setdefault(probe.name.row_label, []).append(probe)
    return [Row(tuple(members)) for members in found.values()]


def fractions(metrics: dict[str, Any]) -> list[str]:
    """Keys of the label curve, fewest labels first."""
    return sorted(metrics["label_curve"], key=share_value)


def neighbour_counts(metrics: dict[str, Any]) -> list[str]:
    """The k of the nearest-neighbour classifiers, as their keys, smallest first."""
    return sorted(metrics["knn"], key=int)


def share_title(metrics: Sequence[dict[str, Any]], share: str) -> str:
    """'1%', or what it comes to where one label of each class is clearly more: '4.8%'."""
    measured = [one["label_curve"] for one in metrics if share in one["label_curve"]]
    real = max((100 * one[share]["labels"] / one[ALL_LABELS]["labels"] for one in measured), default=0.0)
    return f"{real:.2g}%" if real > MUCH_MORE * share_value(share) else share_name(share)


@dataclass(frozen=True)
class Cell:
    """A score in the table.

    Attributes:
        value: from 0 to 1; None where the encoder saw labels that the column does not allow.
        labels: how many the classifier saw.
        spread: standard deviation over subsets of the labels, where there are several.
        interval: of 95%, where there is one.
        saw: share of the labels that trained the encoder, where these are not exactly the column's.
        subset: index of the one subset that was measured, where the encoder saw labels.
        others: whether these are labels of other images than those at hand.
    """

    value: float | None
    labels: int
    spread: float | None = None
    interval: list[float] | None = None
    saw: float | None = None
    subset: int | None = None
    others: bool = False


def cell(metrics: dict[str, Any], kind: str, share: str) -> Cell | None:
    """One cell of a probe; None where it did not measure it.

    Args:
        kind: 'linear', or the k of the neighbours.
        share: of the labels, a key of the label curve.
    """
    curve = metrics["label_curve"].get(share)
    if curve is None:
        return None
    entry = curve if kind == "linear" else curve["knn"].get(kind)
    if entry is None:
        return None
    return Cell(
        entry["top1"],
        curve["labels"],
        spread=entry.get("sd"),
        interval=metrics["linear"]["top1_ci95"] if kind == "linear" and share == ALL_LABELS else None,
        saw=None if curve["encoder_saw_exactly"] else curve["encoder_saw"],
        subset=curve["subset_indices"][0] if curve["encoder_saw"] and curve["subset_indices"] else None,
        others=metrics["protocol"].get("encoder_saw_other_labels", False),
    )


def comparison(probes: Sequence[Probe]) -> dict[str, Any]:
    """The table: groups of columns, and rows of cells.

    Returns:
        {"groups": [{"title", "short", "columns": [{"title", "kind", "share"}]}], "rows": [{"label", "step", "kind",
        "backbone", "steps", "cells": [{"value", "labels", "spread", "interval", "saw", "subset", "others", "best"}
        | None], and "transductive": True where test images were learned with pseudo-labels}]};
        scores from 0 to 1.
    """
    shares = sorted({key for probe in probes for key in fractions(probe.metrics)} | {ALL_LABELS}, key=share_value)
    ks = sorted({k for probe in probes for k in neighbour_counts(probe.metrics)}, key=int)
    titles = {share: share_title([probe.metrics for probe in probes], share) for share in shares}
    groups = [_group("Linear probe", "linear", "linear", titles)]
    groups += [_group(plural(int(k), "nearest neighbour"), f"knn-{k}", k, titles) for k in ks]
    columns = [(column["kind"], column["share"]) for group in groups for column in group["columns"]]
    rows = rows_of(probes)
    cells = [[row.cell(*column) for column in columns] for row in rows]
    alike = all(probe.scored_on_those_of(probes[0]) for probe in probes)
    best = [_best(column) if alike else None for column in zip(*cells, strict=True)]
    table = [
        {
            "label": row.label,
            "kind": row.name.kind,
            "step": row.name.step,
            "backbone": row.name.backbone,
            "steps": [probe.name.step for probe in row.members],
            "cells": [
                asdict(one) | {"best": len(rows) > 1 and one.value is not None and one.value == highest}
                if one
                else None
                for one, highest in zip(found, best, strict=True)
            ],
        }
        | ({"transductive": True} if any(probe.saw_test_images for probe in row.members) else {})
        for row, found in zip(rows, cells, strict=True)
    ]
    return {"groups": groups, "rows": table}


def _best(column: Sequence[Cell | None]) -> float | None:
    """The highest score of a column, if all are comparable: not where some are a mean and some of one subset."""
    found = [one for one in column if one is not None and one.value is not None]
    if any(one.spread is not None for one in found) and any(one.subset is not None for one in found):
        return None
    return max((one.value for one in found if one.value is not None), default=None)


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
    if any("transductive" in row for row in table["rows"]):
        columns.append(TEST_IMAGES[:1].lower() + TEST_IMAGES[1:])
        for text, row in zip(rows, table["rows"], strict=True):
            text.append("yes, transductive" if "transductive" in row else "no")
    return {"columns": columns, "rows": rows}


def protocol(probes: Sequence[Probe]) -> dict[str, Any]:
    """How the probes were run: what they share, and what differs.

    Returns:
        {"shared": [{"name", "value"}], "labels": [...], "differing": [{"name", "values": one a probe}]}
    """
    cards = [_protocol_card(probe.metrics) for probe in probes]
    if any("pseudo" in one for probe in probes for one in probe.labels_seen):
        cards = [card | {TEST_IMAGES: _yes(probe)} for card, probe in zip(cards, probes, strict=True)]
    return shared_and_differing(cards, [one.name.label for one in probes])


def shared_and_differing(cards: Sequence[dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """What protocols share, and what differs between them; see `protocol`."""
    names = list(dict.fromkeys(name for card in cards for name in card))
    shared, differing = [], []
    for name in names:
        values = [card.get(name) for card in cards]
        if all(value == values[0] for value in values):
            shared.append({"name": name, "value": values[0]})
        else:
            differing.append({"name": name, "values": values})
    return {"shared": shared, "labels": [*labels], "differing": differing}


TEST_IMAGES = "Trained on test images with pseudo-labels"


def _yes(probe: Probe) -> str:
    return "yes, transductive" if probe.saw_test_images else "no"


PROTOCOL_NAMES = {
    "train": "Training images",
    "test": "Test images",
    "groups": "Groups",
    "encoder_saw_other_labels": "Encoder learned from labels of other images",
    "largest_class": "Training images of the largest class",
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
        if key != ALL_LABELS:
            card[f"Subsets at {share_name(key)}"] = _subsets_text(entry)
    values = metrics["protocol"] | {"groups": _groups_text(metrics["protocol"].get("groups"))}
    return card | protocol_card(values, PROTOCOL_NAMES)


def protocol_card(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Values by the names that a reader understands; a key that is not in the list becomes words."""
    return {names.get(key, capitalised(key.replace("_", " "))): item for key, item in values.items()}


def _groups_text(groups: dict[str, int] | None) -> str | None:
    """'30 of train, 12 of test': how many groups there are, and how many images lie on both sides."""
    if groups is None:
        return None
    text = f"{groups['train']:,} of train, {groups['test']:,} of test"
    shared = groups["test_images_shared"]
    return text + (f"; {plural(shared, 'test image')} of groups of train" if shared else "")


def _subsets_text(entry: dict[str, Any]) -> str:
    """'10 of 14 labels, penalty fixed': how one point of a label curve was measured."""
    if not entry["subsets"]:
        return f"none: the encoder saw {100 * entry['encoder_saw']:.4g}%"
    which = f"number {entry['subset_indices'][0]} alone," if entry["encoder_saw"] else str(entry["subsets"])
    return f"{which} of {entry['labels']:,} labels" + (", penalty fixed" if entry["fixed_penalty"] else "")


def _group(title: str, short: str, kind: str, titles: Mapping[str, str]) -> dict[str, Any]:
    columns = [{"title": name, "kind": kind, "share": share} for share, name in titles.items()]
    return {"title": title, "short": short, "columns": columns}


def _cell_text(one: dict[str, Any] | None) -> str:
    if one is None:
        return NOTHING
    text = percent(one["value"])
    if one["interval"]:
        low, high = one["interval"]
        text += f" [{points(low)}, {points(high)}]"
    elif one["spread"] is not None:
        text += f" ±{points(one['spread'])}"
    if one["saw"] is None:
        return text
    return text + (" saw other labels" if one["others"] else f" saw {100 * one['saw']:.4g}%")


def named(name: Named) -> dict[str, Any]:
    """A name as plain data."""
    return {
        "label": name.label,
        "row": name.row_label,
        "kind": name.kind,
        "step": name.step,
        "backbone": name.backbone,
        "fraction": name.fraction,
    }
