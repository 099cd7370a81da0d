"""Which figures the page has: from the numbers of report.json to plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.reports.formats import count, share_name, share_value
from stages.reports.plots import Plot, Series, draw
from stages.reports.training import CURVES, SHARES

KIND_COLOURS = {"pretrained": 0, "random": 1, "pixels": 2, "fine-tuned": 3, "timm": 4}
MORE_COLOURS = (5, 6, 7, 3, 4, 0, 1, 2)


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
    """
    chosen: dict[str, int] = {}
    free = [colour for colour in MORE_COLOURS if colour not in {KIND_COLOURS.get(kind) for _, kind in names}]
    for label, kind in names:
        own = KIND_COLOURS.get(kind)
        if label in chosen:
            continue
        if own is not None and own not in chosen.values():
            chosen[label] = own
        else:
            chosen[label] = free[0] if len(free) == 1 else free.pop(0)
    return chosen


def label_figures(probes: Sequence[dict[str, Any]], palette: dict[str, int]) -> list[Figure]:
    """Accuracy against labels: of the linear probe, and of the first of the neighbours."""
    figures = []
    ks = sorted({k for probe in probes for k in probe["metrics"]["knn"]}, key=int)
    kinds = [("linear", "Linear probe by labels")] + [(k, f"{k} nearest neighbours by labels") for k in ks[:1]]
    for kind, title in kinds:
        series = [_label_series(probe, kind, palette[probe["label"]]) for probe in probes]
        ticks = {}
        for probe in probes:
            for key, entry in probe["metrics"]["label_curve"].items():
                ticks[float(entry["labels"])] = f"{share_name(key)}\n{count(entry['labels'])}"
        svg = draw(
            Plot(
                name=f"labels-{kind}",
                description=f"Top-1 accuracy against the number of labels: {title}",
                series=series,
                x_label="labels",
                x_logarithmic=True,
                percent=True,
                x_ticks=sorted(ticks.items()),
            )
        )
        figures.append(
            Figure(title, "Mean over subsets; the bars are one standard deviation.", svg, _legend(probes, palette))
        )
    return figures


def penalty_figure(probes: Sequence[dict[str, Any]], palette: dict[str, int]) -> list[Figure]:
    """Accuracy on held-out training images along the path of penalties; the chosen one has the large marker."""
    series = []
    for probe in probes:
        path = probe["metrics"]["linear"]["path"]
        if not path:  # too few labels to choose by: the penalty is a fixed one
            continue
        chosen = [i for i, point in enumerate(path) if point["penalty"] == probe["metrics"]["linear"]["penalty"]]
        x, y = [point["penalty"] for point in path], [point["accuracy"] for point in path]
        series.append(Series(x, y, palette[probe["label"]], highlighted=chosen))
    if not series:
        return []
    description = "Accuracy on held-out training images against the penalty of the logistic regression"
    svg = draw(Plot("penalty", description, series, "penalty", x_logarithmic=True, percent=True))
    note = "On training images held out; the large marker is the penalty chosen."
    return [Figure("Penalty path", note, svg, _legend(probes, palette))]


def training_figures(runs: Sequence[dict[str, Any]]) -> list[Figure]:
    """A figure for each quantity that at least one pretraining recorded, all runs in it."""
    figures = []
    names = [(number, run["label"]) for number, run in enumerate(runs)]
    for key, title in CURVES.items():
        drawn = [(number, run["curves"][key]) for number, run in enumerate(runs) if key in run["curves"]]
        if not drawn:
            continue
        series = [Series(points["epoch"], points["value"], number % 8) for number, points in drawn]
        plot = Plot(
            name=f"training-{key.replace('_', '-')}",
            description=f"{title} against the epoch",
            series=series,
            x_label="epoch",
            percent=key in SHARES,
        )
        legend = tuple((number % 8, name) for number, name in names) if len(runs) > 1 else ()
        figures.append(Figure(title, TRAINING_NOTES.get(key, ""), draw(plot), legend))
    return figures


TRAINING_NOTES = {
    "contrastive_accuracy": "How often a view's nearest in the batch is its partner.",
    "probe_accuracy": "On the views it trains on, behind a stopped gradient: a trend, not a score.",
    "alignment": "Mean squared distance of two views of an image; lower is closer.",
    "uniformity": "Lower is more evenly spread over the sphere.",
    "rankme_share": "Never compared across dimensions.",
}


def spectrum_figure(sets: Sequence[dict[str, Any]], palette: dict[str, int]) -> Figure:
    """Singular values as shares of the largest, both axes logarithmic."""
    series = [
        Series(one["spectrum"]["rank"], one["spectrum"]["value"], palette[one["label"]])
        for one in sets
        if one["spectrum"]["rank"]
    ]
    description = "Singular values of the features as shares of the largest, by rank"
    svg = draw(Plot("spectrum", description, series, "rank", x_logarithmic=True, y_logarithmic=True))
    note = "Shares of the largest. A cliff is collapse; a gentle slope uses many dimensions."
    return Figure("Singular values", note, svg, _legend(sets, palette))


def _label_series(probe: dict[str, Any], kind: str, colour: int) -> Series:
    curve = probe["metrics"]["label_curve"]
    x, y, spread = [], [], []
    for key in sorted(curve, key=share_value):
        entry = curve[key] if kind == "linear" else curve[key]["knn"].get(kind)
        if entry is not None:
            x.append(curve[key]["labels"])
            y.append(entry["top1"])
            spread.append(entry.get("sd"))
    return Series(x, y, colour, spread=spread, points=True)


def _legend(items: Sequence[dict[str, Any]], palette: dict[str, int]) -> tuple[tuple[int, str], ...]:
    return tuple((palette[item["label"]], item["label"]) for item in items) if len(items) > 1 else ()
