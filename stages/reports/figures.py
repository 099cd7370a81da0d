"""Which figures the page has: from the numbers of report.json to plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.reports.formats import count, percent
from stages.reports.plots import Plot, Series, draw
from stages.reports.training import CURVES, SHARES

KIND_COLOURS = {"pretrained": 0, "random": 1, "pixels": 2, "fine-tuned": 3, "timm": 4}
MORE_COLOURS = (5, 6, 7, 3, 4, 0, 1, 2)
MOST_LINES = 12
"""Of one plot; more are not told apart."""
SAME_SHARE = 1e-9


@dataclass(frozen=True)
class Figure:
    """A drawn plot with its caption; `legend` names its series in order, where it has several."""

    title: str
    note: str
    svg: str
    legend: tuple[tuple[int, str], ...] = ()


def colours(names: Sequence[tuple[str, str]]) -> dict[str, int]:
    """A colour for each label: that of its kind for the first of a kind, another for the next.

    Args:
        names: (label, kind) in the order of the page.

    Returns:
        numbers from 0; 8 has the colour of 0 and another marker, and so on.
    """
    chosen: dict[str, int] = {}
    reserved = {KIND_COLOURS.get(kind) for _, kind in names}
    free = iter([*(colour for colour in MORE_COLOURS if colour not in reserved), *range(8, 8 + len(names))])
    for label, kind in names:
        own = KIND_COLOURS.get(kind)
        if label in chosen:
            continue
        if own is not None and own not in chosen.values():
            chosen[label] = own
        else:
            chosen[label] = next(free)
    return chosen


def label_figures(table: dict[str, Any], palette: dict[str, int]) -> list[Figure]:
    """Accuracy against labels: of the linear probe, and of the first of the neighbours.

    Args:
        table: the comparison. What an encoder reaches that saw other labels than the column's is no point of its line.
    """
    figures = []
    offset = 0
    rows = table["rows"][:MOST_LINES]
    for group in table["groups"][:2]:
        kind, shares = group["columns"][0]["kind"], [column["title"] for column in group["columns"]]
        cells = [row["cells"][offset : offset + len(shares)] for row in rows]
        ticks = {
            float(one["labels"]): f"{share}\n{count(one['labels'])}"
            for found in cells
            for share, one in zip(shares, found, strict=True)
            if one
        }
        series = [_label_series(found, palette[row["label"]]) for row, found in zip(rows, cells, strict=True)]
        title = f"{group['title']} by labels"
        svg = draw(
            Plot(
                name=f"labels-{kind}",
                description=f"Top-1 accuracy against the number of labels: {title}",
                series=[one for one in series if len(one.x)],
                x_label="labels",
                x_logarithmic=True,
                percent=True,
                x_ticks=sorted(ticks.items()),
            )
        )
        note = "Mean over subsets; the bars are one standard deviation."
        figures.append(Figure(title, note, svg, _legend(rows, palette)))
        offset += len(shares)
    return figures


def penalty_figure(probes: Sequence[dict[str, Any]], palette: dict[str, int]) -> list[Figure]:
    """Accuracy on held-out training images along the path of penalties; the chosen one has the large marker."""
    series = []
    probes = [probe for probe in probes if probe["metrics"]["linear"]["path"]]  # without one the penalty is fixed
    for probe in probes[:MOST_LINES]:
        path = probe["metrics"]["linear"]["path"]
        chosen = [i for i, point in enumerate(path) if point["penalty"] == probe["metrics"]["linear"]["penalty"]]
        x, y = [point["penalty"] for point in path], [point["accuracy"] for point in path]
        series.append(Series(x, y, palette[probe["label"]], highlighted=chosen))
    if not series:
        return []
    description = "Accuracy on held-out training images against the penalty of the logistic regression"
    svg = draw(Plot("penalty", description, series, "penalty", x_logarithmic=True, percent=True))
    note = "On training images held out; the large marker is the penalty chosen."
    return [Figure("Penalty path", note, svg, _legend(probes[:MOST_LINES], palette))]


def training_figures(runs: Sequence[dict[str, Any]]) -> list[Figure]:
    """A figure for each quantity that at least one pretraining recorded, all runs in it."""
    figures = []
    names = [(number, run["label"]) for number, run in enumerate(runs)]
    for key, title in CURVES.items():
        drawn = [(number, run["curves"][key]) for number, run in enumerate(runs) if key in run["curves"]]
        if not drawn:
            continue
        series = [Series(points["epoch"], points["value"], number) for number, points in drawn]
        plot = Plot(
            name=f"training-{key.replace('_', '-')}",
            description=f"{title} against the epoch",
            series=series,
            x_label="epoch",
            percent=key in SHARES,
        )
        legend = tuple(names) if len(runs) > 1 else ()
        figures.append(Figure(title, TRAINING_NOTES.get(key, ""), draw(plot), legend))
    return figures


TRAINING_NOTES = {
    "contrastive_accuracy": "How often a view's nearest in the batch is its partner.",
    "probe_accuracy": "On the views it trains on, behind a stopped gradient: a trend, not a score.",
    "alignment": "Mean squared distance of two views of an image; lower is closer.",
    "uniformity": "Lower is more evenly spread over the sphere.",
    "rankme_share": "Never compared across dimensions.",
}


def retrieval_figures(retrievals: Sequence[dict[str, Any]], palette: dict[str, int]) -> list[Figure]:
    """CMC, verification, and the two curves of an open set, each with all retrievals that have it."""
    shown = retrievals[:MOST_LINES]
    figures = [_cmc_figure(shown, palette)]
    verified = [one for one in shown if one["metrics"].get("verification")]
    if verified:
        figures.append(_error_figure(verified, palette))
    opened = [one for one in shown if one["metrics"].get("open_set")]
    if opened:
        figures += [_new_share_figure(opened, palette), _oscr_figure(opened, palette)]
    return figures


def _cmc_figure(retrievals: Sequence[dict[str, Any]], palette: dict[str, int]) -> Figure:
    series = [
        Series(range(1, len(one["metrics"]["cmc"]) + 1), one["metrics"]["cmc"], palette[one["label"]])
        for one in retrievals
    ]
    description = "Share of queries that have an image of their class among the nearest, by how many are looked at"
    svg = draw(Plot("cmc", description, series, "rank", x_logarithmic=True, percent=True))
    note = "Share of queries with an image of their class up to a rank: recall at each k."
    return Figure("Cumulative match (CMC)", note, svg, _legend(retrievals, palette))


def _error_figure(retrievals: Sequence[dict[str, Any]], palette: dict[str, int]) -> Figure:
    series = []
    for one in retrievals:
        for found in (one["metrics"]["verification"], one["metrics"].get("verification_by_head")):
            if not found:
                continue
            roc, dashed = found["roc"], "head" in found
            points = [(x, y) for x, y in zip(roc["fmr"], roc["fnmr"], strict=True) if x > 0]  # the axis is logarithmic
            series.append(Series([x for x, _ in points], [y for _, y in points], palette[one["label"]], dashed=dashed))
    description = "False non-match rate against false match rate, over all pairs of a query and a gallery image"
    svg = draw(Plot("verification", description, series, "false match rate (FMR)", x_logarithmic=True, percent=True))
    note = "False non-match rate (FNMR) against FMR: further down and left is better."
    note += " Dashed: by a head of pairs." if any(one.dashed for one in series) else ""
    return Figure("Verification (ROC)", note, svg, _legend(retrievals, palette))


def _new_share_figure(retrievals: Sequence[dict[str, Any]], palette: dict[str, int]) -> Figure:
    series = []
    for one in retrievals:
        found = one["metrics"]["open_set"]
        shares = [point["new_share"] for point in found["curve"]]
        chosen = [number for number, share in enumerate(shares) if abs(share - found["new_share"]) < SAME_SHARE]
        values = [point["map_5"] for point in found["curve"]]
        series.append(Series(shares, values, palette[one["label"]], highlighted=chosen))
    description = "MAP@5 of an open set against the share of queries whose class the gallery does not hold"
    svg = draw(Plot("new-share", description, series, "share of new queries", percent=True))
    shares = {one["metrics"]["open_set"]["new_share"] for one in retrievals}
    chosen_for = " or ".join(percent(share, 0) for share in sorted(shares))
    note = f"One threshold each, chosen for {chosen_for} of new queries."
    return Figure("Open set: MAP@5", note, svg, _legend(retrievals, palette))


def _oscr_figure(retrievals: Sequence[dict[str, Any]], palette: dict[str, int]) -> Figure:
    curves = [(one, one["metrics"]["open_set"]["oscr_curve"]) for one in retrievals]
    series = [Series([x for x, _ in curve], [y for _, y in curve], palette[one["label"]]) for one, curve in curves]
    description = "Correct classification rate of known queries against the share of new ones that are accepted"
    svg = draw(Plot("oscr", description, series, "new queries accepted", percent=True))
    note = "Known queries named right, against new queries that are taken for known ones."
    return Figure("Open set: OSCR", note, svg, _legend(retrievals, palette))


def spectrum_figure(sets: Sequence[dict[str, Any]], palette: dict[str, int]) -> Figure:
    """Singular values as shares of the largest, both axes logarithmic."""
    sets = sets[:MOST_LINES]
    series = [
        Series(one["spectrum"]["rank"], one["spectrum"]["value"], palette[one["label"]])
        for one in sets
        if one["spectrum"]["rank"]
    ]
    description = "Singular values of the features as shares of the largest, by rank"
    svg = draw(Plot("spectrum", description, series, "rank", x_logarithmic=True, y_logarithmic=True))
    note = "Shares of the largest. A cliff is collapse; a gentle slope uses many dimensions."
    return Figure("Singular values", note, svg, _legend(sets, palette))


def _label_series(cells: Sequence[dict[str, Any] | None], colour: int) -> Series:
    found = [one for one in cells if one and one["value"] is not None and one["saw"] is None]
    return Series(
        [one["labels"] for one in found],
        [one["value"] for one in found],
        colour,
        spread=[one["spread"] for one in found],
        points=True,
    )


def _legend(items: Sequence[dict[str, Any]], palette: dict[str, int]) -> tuple[tuple[int, str], ...]:
    return tuple((palette[item["label"]], item["label"]) for item in items) if len(items) > 1 else ()
