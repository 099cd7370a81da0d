"""What report.json holds of retrievals, and the table for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.evaluation.features import FeatureFile
from stages.reports.formats import NOTHING, percent, points
from stages.reports.probes import Probe, named
from stages.reports.retrievals import Retrieval, retrieval_protocol, retrieval_table
from stages.reports.verdict import retrieval_verdict
from stages.reports.worst_queries import nearest_classes


def retrieval_numbers(
    retrievals: Sequence[Retrieval],
    probes: Sequence[Probe],
    features: Mapping[str, FeatureFile],
    numbers: dict[str, Any],
    order: Sequence[str],
) -> dict[str, Any]:
    """What the report of probes does not hold, and the table and the verdict with retrievals in them.

    Args:
        features: the files that were searched, by digest.
        numbers: of the report so far.
        order: digests of what is compared, in the recipe's order.
    """
    table = retrieval_table(retrievals, probes)
    places: dict[str, int] = {}
    named_rows = [(one.digest, one.name.label) for one in retrievals]
    for digest, label in [*named_rows, *((one.digest, one.name.row_label) for one in probes)]:
        places[label] = min(places.get(label, len(order)), order.index(digest))
    said = retrieval_verdict(retrievals)
    return {
        "table": join_console(table, numbers["table"] if probes else None, places),
        "verdict": numbers["verdict"] | {"retrieval": said} if probes else said,
        "retrieval": table | {"verification": verification_table(retrievals), "open_set": open_set_table(retrievals)},
        "retrievals": [
            named(one.name)
            | {"digest": one.digest, "features": one.features_digest, "metrics": one.metrics}
            | {"nearest_classes": None if one.several_labels else nearest_classes(one, features[one.features_digest])}
            for one in retrievals
        ],
        "retrieval_protocol": retrieval_protocol(retrievals),
    }


def verification_table(retrievals: Sequence[Retrieval]) -> dict[str, Any] | None:
    """Errors over all pairs; None where no retrieval measured them.

    Returns:
        {"rates": false match rates as text, "rows": [{"label", "eer", "auc", "fnmr": one for each rate or None,
        "genuine_pairs", "impostor_pairs", and where a head of pairs scored them "head", "asymmetry", "sampled"}]}
    """
    there = [
        (one, found)
        for one in retrievals
        for found in (one.metrics.get("verification"), one.metrics.get("verification_by_head"))
        if found
    ]
    rates = sorted({rate for _, found in there for rate in found["fnmr"]}, key=float, reverse=True)
    keys = ("eer", "auc", "genuine_pairs", "impostor_pairs", "head", "asymmetry", "sampled")
    rows = [
        {"label": one.name.label, "fnmr": [found["fnmr"].get(rate) for rate in rates]}
        | {key: found[key] for key in keys if key in found}
        for one, found in there
    ]
    return {"rates": rates, "rows": rows} if rows else None


def open_set_table(retrievals: Sequence[Retrieval]) -> list[dict[str, Any]]:
    """A row for each retrieval with an open set.

    Returns:
        [{"label", "map_5", "interval", "known", "new", "new_share", "threshold", "split", "auroc", "oscr", "queries",
        "identities": {"known", "new"}}]
    """
    rows = []
    for one in retrievals:
        found = one.metrics.get("open_set")
        if found is None:
            continue
        row = {"label": one.name.label, "map_5": found["map"]["5"], "interval": found["map"]["5_ci95"]}
        row |= {"known": found["map"]["5_known"], "new": found["map"]["5_new"], "split": found["validation"]["split"]}
        keys = ("new_share", "threshold", "auroc", "oscr", "queries", "identities")
        rows.append(row | {key: found[key] for key in keys})
    return rows


def _console_columns(table: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Titles of the columns that a terminal shows of retrievals, and their cells by label; all short strings."""
    titles = [f"{column['title'].lower()} [95%]" for column in table["columns"]]
    titles = [*(title.replace("map@r", "MAP@R") for title in titles), "transductive"]
    rows = {}
    for row in table["rows"]:
        texts = []
        for one in row["cells"]:
            low, high = one["interval"]
            mark = " best" if one["best"] else " tied" if one["tie"] else ""
            texts.append(f"{percent(one['value'])} [{points(low)}, {points(high)}]{mark}")
        rows[row["label"]] = [*texts, "yes" if row["transductive"] else "no"]
    return titles, rows


def join_console(
    retrieved: Mapping[str, Any], compared: dict[str, list[Any]] | None, places: Mapping[str, int]
) -> dict[str, list[Any]]:
    """The table for a terminal: of retrievals, and of probes beside them where there are any.

    Args:
        retrieved: of `retrieval_table`.
        compared: of `console_table`, or None.
        places: where a row stands, by label.
    """
    titles, rows = _console_columns(retrieved)
    columns = ["encoder", *titles]
    if compared is None:
        return {"columns": columns, "rows": [[label, *texts] for label, texts in rows.items()]}
    probed = {row[0]: row[1:] for row in compared["rows"]}
    others = compared["columns"][1:]
    labels = sorted({**rows, **probed}, key=lambda label: places[label])
    nothing, nothing_probed = [NOTHING] * len(titles), [NOTHING] * len(others)
    joined = [[label, *rows.get(label, nothing), *probed.get(label, nothing_probed)] for label in labels]
    return {"columns": [*columns, *others], "rows": joined}
