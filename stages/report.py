"""The stage `report`: one HTML file that opens from disk, and report.json with every number in it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq

from pipeline.run import Ancestor, Run
from stages.evaluation.features import FeatureFile
from stages.images import open_shards
from stages.reports.artifacts import Artifact, Lineage, read_json, read_lines
from stages.reports.health import health, health_table, health_verdict, sample_positions
from stages.reports.lineage import flatten, lineage_rows
from stages.reports.names import Compared, Named, name_all, name_with_retrievals
from stages.reports.near_duplicates import ids_by_split, some_pairs
from stages.reports.neighbours import neighbour_pages, pick_queries, shown_ids
from stages.reports.page import Pictures, render
from stages.reports.probes import Probe, comparison, console_table, named, protocol
from stages.reports.pseudo_labels import pseudo_label_caveat, pseudo_label_rows
from stages.reports.retrieval_numbers import retrieval_numbers
from stages.reports.retrievals import Retrieval, read_retrieval
from stages.reports.seen_queries import query_images_seen
from stages.reports.several_labels import has_several_labels, label_console_table, label_probes, label_verdict
from stages.reports.thumbnails import contact_sheet, thumbnail
from stages.reports.training import fine_tuning, training
from stages.reports.verdict import verdict
from stages.reports.worst_queries import worst_queries
from stages.settings.report import Report

NEIGHBOURS = 8
MOST_NEIGHBOUR_SETS = 3
"""Encoders whose neighbours are shown: each adds some 70 thumbnails to the page."""
MOST_REJECTED = 10


@dataclass(frozen=True)
class FeatureSet:
    """A file of features that is looked at, with the name of what made it, and the shards that its images lie in."""

    name: Named
    artifact: Artifact
    features: FeatureFile
    shards: Artifact | None


def report(run: Run, settings: Report) -> None:
    lineage = Lineage([_artifact(ancestor) for ancestor in run.ancestors()])
    compared = [lineage.of_files(one.files) for one in run.inputs("of")]
    sets = _feature_sets(lineage, compared)
    scored = [one for one in compared if one.stage == "probe" and _has_scores(one)]
    several = label_probes(lineage, [one for one in scored if has_several_labels(one)])
    of_one_label = [one for one in scored if not has_several_labels(one)]
    searched = list({one.digest: one for one in compared if one.stage == "retrieve"}.values())
    names, retrieval_names = name_with_retrievals(
        lineage, [_compared(lineage, one) for one in of_one_label], [_compared(lineage, one) for one in searched]
    )
    probes = _probes(lineage, of_one_label, names)
    retrievals = _retrievals(lineage, sets, searched, retrieval_names)
    run.say(
        f"{len(scored)} probes, {len(retrievals)} retrievals, {len(sets)} sets of features, "
        f"{len(lineage.artifacts)} artifacts"
    )

    healthy = _health(run, sets, settings.health_samples)
    # Of features that were searched the worst queries are shown; of the others some queries.
    shown = [one for one in sets if _is_looked_at(lineage, compared, one)]
    neighbours, thumbnails = _neighbours(run, shown, settings.neighbour_queries)
    table = comparison(probes) if probes else None
    numbers: dict[str, Any] = {
        "format": 1,
        "title": settings.title or run.recipe,
        "table": console_table(table) if table else health_table(healthy),
        "verdict": verdict(probes) if probes else health_verdict(healthy),
        "comparison": table,
        "protocol": protocol(probes) if probes else None,
        "probes": [_probe_numbers(probe) for probe in probes],
        "training": _training(lineage),
        "fine_tuning": fine_tuning(lineage),
        "health": healthy,
        "neighbours": neighbours,
        "views": [_views(artifact) for artifact in lineage.of_stage("augment")],
        "data": [_data(artifact) for artifact in lineage.of_stage("shard")],
        "lineage": lineage_rows(lineage),
    }
    if several:
        numbers["several_labels"] = several
        if not probes:
            numbers["table"] = label_console_table(several)
            numbers["verdict"] = label_verdict(several, numbers["verdict"])
    if retrievals:
        files = {one.artifact.digest: one.features for one in sets}
        numbers |= retrieval_numbers(retrievals, probes, files, numbers, [one.digest for one in compared])
        numbers["retrieved"], more = _retrieved(retrievals, sets, settings.neighbour_queries)
        thumbnails |= more
    if lineage.of_stage("pseudo_label"):
        numbers["pseudo_labels"] = pseudo_label_rows(lineage)
    test_images = pseudo_label_caveat([(one.name, one.features.card["encoder"]) for one in sets])
    if test_images is not None:
        numbers["verdict"]["test_images"] = test_images
        run.warn(test_images)
    for artifact, data in zip(lineage.of_stage("shard"), numbers["data"], strict=True):
        if data["near_duplicates"]:
            for split, ids in ids_by_split(data["near_duplicates"]["shown"]).items():
                thumbnails |= _thumbnails(artifact, split, ids)
    sheets = [contact_sheet((one.files / "contact_sheet.png").read_bytes()) for one in lineage.of_stage("augment")]
    page = render(numbers, Pictures(thumbnails, sheets), lineage)
    (run.out / "report.html").write_text(page, encoding="utf-8", newline="\n")
    text = json.dumps(numbers, ensure_ascii=False, allow_nan=False)
    (run.out / "report.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    run.count(probes=len(scored), retrievals=len(retrievals), page_bytes=len(page.encode()))


def _artifact(ancestor: Ancestor) -> Artifact:
    return Artifact(
        stage=ancestor.stage,
        step=ancestor.step,
        digest=ancestor.digest,
        version=ancestor.version,
        seed=ancestor.seed,
        settings=flatten(ancestor.changed_settings),
        inputs={
            field: tuple(digests) if isinstance(digests, list | tuple) else (digests,)
            for field, digests in ancestor.inputs.items()
        },
        files=ancestor.files,
    )


def _feature_sets(lineage: Lineage, compared: Sequence[Artifact]) -> list[FeatureSet]:
    """The features behind probes and retrievals, and those compared as they are; each once, in the recipe's order."""
    found = [one if one.stage == "embed" else lineage.input(one, "features") for one in compared]
    artifacts = list({one.digest: one for one in found if one is not None}.values())
    features = [FeatureFile(one.files) for one in artifacts]
    names = name_all(
        lineage,
        [
            Compared(one.card["encoder"], artifact.step, artifact, seed=artifact.seed, digest=artifact.digest)
            for one, artifact in zip(features, artifacts, strict=True)
        ],
    )
    return [
        FeatureSet(name, artifact, one, lineage.input(artifact, "shards"))
        for name, artifact, one in zip(names, artifacts, features, strict=True)
    ]


def _has_scores(probe: Artifact) -> bool:
    """Whether a probe found labels; if not (`without_labels: pass`), its features are shown as they are."""
    return "without_labels" not in read_json(probe.files / "metrics.json")


def _compared(lineage: Lineage, artifact: Artifact) -> Compared:
    """A probe or a retrieval, to be named. Settings of a retrieval tell no encoders apart."""
    encoder = read_json(artifact.files / "metrics.json")["encoder"]
    settings = artifact.settings if artifact.stage == "probe" else {}
    features = lineage.input(artifact, "features")
    return Compared(encoder, artifact.step, features, settings, artifact.seed, artifact.digest)


def _probes(lineage: Lineage, artifacts: Sequence[Artifact], names: Sequence[Named]) -> list[Probe]:
    probes = []
    for name, artifact in zip(names, artifacts, strict=True):
        source = lineage.input(artifact, "features")
        metrics = read_json(artifact.files / "metrics.json")
        table = pq.read_table(artifact.files / "predictions.parquet", columns=["key", "group", "label", "predicted"])
        probes.append(
            Probe(
                name,
                artifact.digest,
                source.digest if source else "",
                metrics,
                np.asarray(table["key"].to_pylist(), dtype=str),
                table["label"].to_numpy() == table["predicted"].to_numpy(),
                table["group"].to_numpy() if metrics["protocol"]["groups"] else None,
                artifact.seed,
            )
        )
    return probes


def _probe_numbers(probe: Probe) -> dict[str, Any]:
    name = probe.name
    return {
        **named(name),
        "digest": probe.digest,
        "features": probe.features_digest,
        "metrics": probe.metrics,
    }


def _retrievals(
    lineage: Lineage, sets: Sequence[FeatureSet], artifacts: Sequence[Artifact], names: Sequence[Named]
) -> list[Retrieval]:
    by_digest = {one.artifact.digest: one for one in sets}
    found = []
    for artifact, name in zip(artifacts, names, strict=True):
        searched = by_digest[artifact.inputs["features"][0]]
        one = read_retrieval(artifact, name, searched.features, searched.artifact.digest)
        head = lineage.input(artifact, "head")
        seen = query_images_seen(lineage, searched.artifact, one.ids, one.classes, head)
        found.append(replace(one, seen=tuple(seen)))
    return found


def _is_looked_at(lineage: Lineage, compared: Sequence[Artifact], one: FeatureSet) -> bool:
    """Whether a set of features is compared as it is, or by a probe."""
    readers = [other for other in compared if other.stage == "probe" and lineage.input(other, "features")]
    probed = [other.inputs["features"][0] for other in readers]
    return one.artifact.digest in [*probed, *(other.digest for other in compared)]


def _retrieved(
    retrievals: Sequence[Retrieval], sets: Sequence[FeatureSet], queries: int
) -> tuple[list[dict[str, Any]], dict[tuple[str, int], dict[str, object]]]:
    """The worst queries of the first retrievals, chosen as in `_neighbours`, and thumbnails."""
    by_digest = {one.artifact.digest: one for one in sets}
    pages: list[dict[str, Any]] = []
    thumbnails: dict[tuple[str, int], dict[str, object]] = {}
    for one in _most_telling(retrievals):
        found = by_digest[one.features_digest]
        if found.shards is None:
            continue
        page = worst_queries(one, found.features, queries, NEIGHBOURS)
        pages.append(named(one.name) | {"shards": found.shards.digest} | page)
        for split in dict.fromkeys(page["splits"].values()):
            thumbnails |= _thumbnails(found.shards, split, shown_ids([page]))
    return pages, thumbnails


def _health(run: Run, sets: Sequence[FeatureSet], most: int) -> list[dict[str, Any]]:
    """Health of each set of features, on training images."""
    found = []
    with run.progress(len(sets), "sets of features") as progress:
        for one in sets:
            train = one.features.positions("train")
            available = train if len(train) else np.arange(len(one.features.ids))
            rows = one.features.rows(sample_positions(available, most))
            found.append(named(one.name) | {"images": len(one.features.ids)} | health(rows, learned=one.name.learned))
            progress.advance(1)
    for one in found:
        if one["alarm"]:
            run.warn(f"{one['label']}: {one['alarm']}")
    return found


def _neighbours(
    run: Run, sets: Sequence[FeatureSet], queries: int
) -> tuple[list[dict[str, Any]], dict[tuple[str, int], dict[str, object]]]:
    """Queries and their nearest images for the first sets, those that learned something before the others.

    Queries come from test and neighbours from train; both from train where there is no test or no label to hold
    them against.

    Returns:
        pages, and thumbnails by (digest of the shards, image id).
    """
    pages: list[dict[str, Any]] = []
    thumbnails: dict[tuple[str, int], dict[str, object]] = {}
    wanted = _most_telling([one for one in sets if one.shards])
    with run.progress(len(wanted), "sets of neighbours") as progress:
        for one in wanted:
            features, shards = one.features, one.shards
            assert shards is not None
            unseen = features.positions("test")
            split = "test" if len(unseen) and (features.labels[unseen] >= 0).any() else "train"
            available = features.positions(split)
            chosen = available[pick_queries(features.labels[available], queries)]
            page = neighbour_pages(features, chosen, "train", NEIGHBOURS)
            pages.append(named(one.name) | {"shards": shards.digest, "split": split} | page)
            for split_shown in dict.fromkeys(("train", split)):
                thumbnails |= _thumbnails(shards, split_shown, shown_ids([page]))
            progress.advance(1)
    return pages, thumbnails


T = TypeVar("T", FeatureSet, Retrieval)


def _most_telling(items: Sequence[T]) -> list[T]:
    """Of each row of fine-tunings the one that saw the most labels; those that learned something come first."""
    rows: dict[str, T] = {}
    for one in sorted(items, key=lambda one: -one.name.fraction):
        rows.setdefault(one.name.row_label, one)
    shown = [one for one in items if rows[one.name.row_label] is one]
    return sorted(shown, key=lambda one: not one.name.learned)[:MOST_NEIGHBOUR_SETS]


def _thumbnails(shards: Artifact, split: str, ids: Sequence[int]) -> dict[tuple[str, int], dict[str, object]]:
    """Thumbnails of those of the images that belong to a split."""
    opened = open_shards(shards.files, split)
    known = np.asarray(opened.sample_ids)
    positions = np.flatnonzero(np.isin(known, np.asarray(ids, dtype=np.int64)))
    if not len(positions):
        return {}
    batch = opened.batch(positions)
    found = {}
    for image, size, identity in zip(
        batch.images.numpy(), batch.sizes.tolist(), batch.sample_ids.tolist(), strict=True
    ):
        found[shards.digest, int(identity)] = thumbnail(image[:, : size[0], : size[1]])
    return found


def _training(lineage: Lineage) -> list[dict[str, Any]]:
    """Each pretraining, named by its step, and by its digest where two have one name."""
    artifacts = lineage.of_stage("pretrain")
    steps = [artifact.step for artifact in artifacts]
    runs = []
    for artifact in artifacts:
        label = artifact.step if steps.count(artifact.step) == 1 else f"{artifact.step} {artifact.digest[:8]}"
        numbers = training(read_lines(artifact.files / "metrics.jsonl"), read_json(artifact.files / "model.json"))
        runs.append({"label": label, "step": artifact.step, "digest": artifact.digest, "seed": artifact.seed} | numbers)
    return runs


def _views(artifact: Artifact) -> dict[str, Any]:
    return {
        "step": artifact.step,
        "digest": artifact.digest,
        "policy": read_json(artifact.files / "policy.json"),
    }


def _data(artifact: Artifact) -> dict[str, Any]:
    """What went into shards and what did not, with the first reasons, and some of the near-duplicates."""
    card = {"near_duplicates": None} | read_json(artifact.files / "shards.json")
    if card["near_duplicates"]:
        card["near_duplicates"]["shown"] = some_pairs(artifact.files / "near_duplicates.parquet")
    rejected = read_lines(artifact.files / "rejected.jsonl")
    return {"step": artifact.step, "digest": artifact.digest} | card | {"rejected_first": rejected[:MOST_REJECTED]}
