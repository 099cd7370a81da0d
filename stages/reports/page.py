"""From numbers and pictures to one HTML file: templates with autoescape, everything inlined."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from stages.reports import formats
from stages.reports.artifacts import Lineage
from stages.reports.confusions import (
    MOST_NAMED_CLASSES,
    MOST_PICTURED_CLASSES,
    confused_pairs,
    confusion_cells,
    confusion_table,
    row_shares,
)
from stages.reports.figures import (
    colours,
    label_figures,
    penalty_figure,
    retrieval_figures,
    spectrum_figure,
    training_figures,
)
from stages.reports.lineage import DIGITS, MOST_NODES, NODE_HEIGHT, NODE_WIDTH, drawing
from stages.reports.plots import SERIES, marker_number
from stages.reports.thumbnails import matrix_picture

TEMPLATES = Path(__file__).parent / "templates"
MARKS = "●■▲◆▼✚✖★"
"""The markers of the plots, in their order, for legends."""
MOST_MATRICES = 12
"""Probes whose confusions are on the page."""
MOST_LIVE_CELLS = 60_000
"""Cells of confusion matrices that the page holds to be pointed at; beyond, a matrix is a picture only."""


@dataclass(frozen=True)
class Pictures:
    """Images as {"uri", "width", "height", ...}.

    Attributes:
        thumbnails: by (digest of the shards, image id).
        sheets: contact sheets, one for each entry of `views`.
    """

    thumbnails: Mapping[tuple[str, int], dict[str, object]]
    sheets: Sequence[dict[str, object]]


def render(numbers: dict[str, Any], pictures: Pictures, lineage: Lineage) -> str:
    """The page as text.

    Args:
        numbers: what report.json holds.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": formats.percent,
        "points": formats.points,
        "count": formats.count,
        "significant": formats.significant,
        "plural": formats.plural,
        "signed": formats.signed,
        "value": formats.value,
        "colour": _colour,
        "marker": _marker,
    }
    retrievals = numbers.get("retrievals", [])
    palette = _palette([*numbers["probes"], *retrievals, *numbers["health"]])
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    matrices = [_probe_matrix(probe) for probe in _fullest(numbers["probes"])[:MOST_MATRICES]]
    of_classes = [one for one in retrievals if one["nearest_classes"]]
    nearest = [_nearest_matrix(one) for one in _fullest(of_classes)[:MOST_MATRICES]]
    shown = numbers | {"confusions": matrices, "training": numbers["training"] or numbers["fine_tuning"]["rows"]}
    sections = [(name, title) for name, title in SECTIONS if shown.get(name)]
    return environment.get_template("report.html.j2").render(
        report=numbers,
        sections=[{"name": name, "title": title} for name, title in sections],
        palette=palette,
        figures=_figures(numbers, palette),
        matrices=matrices,
        nearest=nearest,
        live=_live_cells(matrices),
        thumbnails=pictures.thumbnails,
        sheets=pictures.sheets,
        drawing=drawing(lineage, numbers["title"]),
        node={"width": NODE_WIDTH, "height": NODE_HEIGHT},
        digits=DIGITS,
        folded_from=MOST_NODES,
        most_matrices=MOST_MATRICES,
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def _colour(number: int) -> str:
    return f"var(--series-{number % len(SERIES)})"


def _marker(number: int) -> str:
    return MARKS[marker_number(number)]


SECTIONS = (
    ("comparison", "Comparison"),
    ("retrieval", "Retrieval"),
    ("several_labels", "Several labels"),
    ("training", "Training"),
    ("pseudo_labels", "Pseudo-labels"),
    ("health", "Health"),
    ("confusions", "Confusions"),
    ("neighbours", "Neighbours"),
    ("retrieved", "Worst queries"),
    ("views", "Views"),
    ("protocol", "Protocol"),
    ("retrieval_protocol", "Protocol of retrieval"),
    ("data", "Data"),
    ("lineage", "Lineage"),
)
"""Name (of the template, of the anchor) and title, in the order of the page; a section without numbers is left out."""


def _palette(items: Sequence[dict[str, Any]]) -> dict[str, int]:
    """A number for each label, and for the row that it belongs to the same."""
    chosen = colours([(one["row"], one["kind"]) for one in items])
    return chosen | {one["label"]: chosen[one["row"]] for one in items}


def _fullest(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each row of the table the one whose encoder saw the most labels, in the order of rows."""
    found: dict[str, dict[str, Any]] = {}
    for one in items:
        row = found.setdefault(one["row"], one)
        if one["fraction"] > row["fraction"]:
            found[one["row"]] = one
    return list(found.values())


def _figures(numbers: dict[str, Any], palette: dict[str, int]) -> dict[str, Any]:
    table = numbers["comparison"]
    return {
        "comparison": label_figures(table, palette) if table else [],
        "retrieval": retrieval_figures(_fullest(numbers.get("retrievals", [])), palette),
        "training": training_figures(numbers["training"]),
        "health": [spectrum_figure(_fullest(numbers["health"]), palette)],
        "protocol": penalty_figure(_fullest(numbers["probes"]), palette),
    }


def _probe_matrix(probe: dict[str, Any]) -> dict[str, Any]:
    linear, classes = probe["metrics"]["linear"], probe["metrics"]["classes"]
    cells = confusion_cells(linear)
    scores = {"mean_per_class": linear["mean_per_class"], "top5": linear.get("top5")}
    return _matrix(probe, cells, classes) | {"pairs": confused_pairs(cells, classes)} | scores


def _nearest_matrix(retrieval: dict[str, Any]) -> dict[str, Any]:
    found = retrieval["nearest_classes"]
    cells = np.asarray(found["cells"], dtype=np.int64).reshape(-1, 3)
    own = {"pairs": found["pairs"], "without_label": found["without_label"]}
    return _matrix(retrieval, cells, found["classes"]) | own


def _matrix(named: dict[str, Any], cells: NDArray[np.int64], classes: list[str]) -> dict[str, Any]:
    """A confusion matrix as a table with names, as a picture where there are many classes, or neither."""
    is_table = len(classes) <= MOST_NAMED_CLASSES
    pictured = not is_table and len(classes) <= MOST_PICTURED_CLASSES
    return {
        "label": named["label"],
        "row": named["row"],
        "classes": classes,
        "cells": cells,
        "table": confusion_table(cells, classes) if is_table else None,
        "picture": matrix_picture(row_shares(cells, len(classes))) if pictured else None,
    }


def _live_cells(matrices: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """For the script: the cells that are not 0 of each matrix that is a picture, as [true, predicted, count]."""
    left = MOST_LIVE_CELLS
    live: list[dict[str, Any] | None] = []
    for matrix in matrices:
        if matrix["picture"] is None or len(matrix["cells"]) > left:
            live.append(None)
            continue
        left -= len(matrix["cells"])
        live.append({"classes": matrix["classes"], "cells": matrix["cells"].tolist()})
    return live
