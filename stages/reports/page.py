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

from stages.reports import formats
from stages.reports.artifacts import Lineage
from stages.reports.confusions import MOST_NAMED_CLASSES, confused_pairs, confusion_table, row_shares
from stages.reports.figures import colours, label_figures, penalty_figure, spectrum_figure, training_figures
from stages.reports.lineage import DIGITS, NODE_HEIGHT, NODE_WIDTH, drawing
from stages.reports.thumbnails import matrix_picture

TEMPLATES = Path(__file__).parent / "templates"
MARKS = "●■▲◆▼✚✖★"
"""The markers of the plots, in their order, for legends."""
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
        "value": formats.value,
    }
    palette = colours([(one["label"], one["kind"]) for one in (*numbers["probes"], *numbers["health"])])
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    matrices = [_matrix(probe) for probe in numbers["probes"]]
    sections = [(name, title) for name, title in SECTIONS if numbers["probes" if name == "confusions" else name]]
    return environment.get_template("report.html.j2").render(
        report=numbers,
        sections=[{"name": name, "title": title} for name, title in sections],
        palette=palette,
        marks=MARKS,
        figures=_figures(numbers, palette),
        matrices=matrices,
        live=_live_cells(matrices),
        thumbnails=pictures.thumbnails,
        sheets=pictures.sheets,
        drawing=drawing(lineage, numbers["title"]),
        node={"width": NODE_WIDTH, "height": NODE_HEIGHT},
        digits=DIGITS,
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


SECTIONS = (
    ("comparison", "Comparison"),
    ("training", "Training"),
    ("health", "Health"),
    ("confusions", "Confusions"),
    ("neighbours", "Neighbours"),
    ("views", "Views"),
    ("protocol", "Protocol"),
    ("data", "Data"),
    ("lineage", "Lineage"),
)
"""Name (of the template, of the anchor) and title, in the order of the page; a section without numbers is left out."""


def _figures(numbers: dict[str, Any], palette: dict[str, int]) -> dict[str, Any]:
    probes = numbers["probes"]
    return {
        "comparison": label_figures(probes, palette) if probes else [],
        "training": training_figures(numbers["training"]),
        "health": [spectrum_figure(numbers["health"], palette)],
        "protocol": penalty_figure(probes, palette),
    }


def _matrix(probe: dict[str, Any]) -> dict[str, Any]:
    """A confusion matrix as a table with names, or as a picture where there are many classes."""
    counts = np.asarray(probe["metrics"]["linear"]["confusion"], dtype=np.int64)
    classes = probe["metrics"]["classes"]
    named = len(classes) <= MOST_NAMED_CLASSES
    return {
        "label": probe["label"],
        "classes": classes,
        "counts": counts,
        "table": confusion_table(counts, classes) if named else None,
        "picture": None if named else matrix_picture(row_shares(counts)),
        "pairs": confused_pairs(counts, classes),
        "mean_per_class": probe["metrics"]["linear"]["mean_per_class"],
        "top5": probe["metrics"]["linear"].get("top5"),
    }


def _live_cells(matrices: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """For the script: the cells that are not 0 of each matrix that is a picture, as [true, predicted, count]."""
    left = MOST_LIVE_CELLS
    live: list[dict[str, Any] | None] = []
    for matrix in matrices:
        rows, columns = np.nonzero(matrix["counts"])
        if matrix["picture"] is None or len(rows) > left:
            live.append(None)
            continue
        left -= len(rows)
        cells = np.stack([rows, columns, matrix["counts"][rows, columns]], axis=1).tolist()
        live.append({"classes": matrix["classes"], "cells": cells})
    return live
