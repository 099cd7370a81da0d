"""How well images of one class find one another: ranking of a gallery, verification of pairs, and an open set."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pipeline.errors import BadData, NotFinite, UsageError
from pipeline.run import Run
from stages.evaluation import (
    TEST_IMAGES_SEEN,
    Answers,
    FeatureFile,
    Features,
    QuerySets,
    Ranking,
    TooFewIdentities,
    Verification,
    answer_queries,
    auroc,
    bootstrap_interval,
    choose_threshold,
    count_pairs,
    label_targets,
    map_at_5_interval,
    open_set_curve,
    oscr,
    oscr_points,
    pair_sets,
    probability_of,
    pseudo_labelled_test_images,
    rank_gallery,
    read_features,
    score_pairs,
    verify,
)
from stages.evaluation.indexed_gallery import write_indexed_gallery
from stages.evaluation.vector_index import (
    WANTED_RECALL,
    Kind,
    build_index,
    measure_speed,
    require_library,
)
from stages.labels import is_labelled, relation_of
from stages.models import load_card, load_head
from stages.models.heads import PairHead
from stages.settings.retrieve import INDEX_FROM, OpenSet, Retrieve

FEW_IDENTITIES = 10
"""Queries of fewer classes than this hardly say how far a figure would move with others."""
NEW_SHARES = tuple(tenths / 10 for tenths in range(10))
"""Shares of new queries that the curve of an open set has."""

Values = list[str | None]


def check_settings(settings: Retrieve) -> None:
    """What can be said before anything runs. Raises NoIndexLibrary."""
    if settings.index != "none":
        require_library()


def retrieve(run: Run, settings: Retrieve) -> None:
    """Write metrics.json and neighbours.parquet; where an index is wanted, that with its gallery too."""
    features = read_features(run.input("features"))
    if not all(torch.isfinite(bound) for bound in features.features.aminmax()):
        raise NotFinite(f"{run.step}: the features hold infinite numbers or NaN; look at how the encoder was trained")
    file = FeatureFile(run.input("features"))
    features = _with_label_sets(run, settings, features, file)
    column = None if settings.by is None else file.attribute(settings.by.column)
    sets = _arrange(run, settings, features, column, *settings.splits)
    _check(run, settings, sets)
    head = None if settings.head is None else _head_of_pairs(run, features)
    trained_on = file.labels_of("train")
    opened = None
    if settings.open_set is not None:
        opened = _opened(run, settings, settings.open_set, features, column, sets, trained_on)
    measurements = 1 + settings.verification + (head is not None) + (settings.open_set is not None)
    with run.progress(measurements, "measurements") as progress:
        ranking = rank_gallery(
            sets.queries.features,
            sets.gallery.features,
            sets.queries.relating,
            sets.gallery.relating,
            sets.same,
            settings.neighbours,
            sets.relation,
        )
        metrics = _figures(run, settings, sets, ranking)
        progress.advance()
        if settings.verification:
            metrics["verification"] = _verification(run, sets)
            progress.advance()
        if head is not None:
            metrics["verification_by_head"] = _verification_by_head(run, sets, head)
            progress.advance()
        if settings.open_set is not None and opened is not None:
            metrics["open_set"] = _open_set(run, settings, settings.open_set, *opened)
            progress.advance()
    metrics |= {
        "protocol": _protocol(settings, features, sets, trained_on),
        "encoder": features.card["encoder"],
        "classes": features.classes,
    }
    kind = _wanted_index(run, settings, len(sets.gallery))
    if kind is not None:
        metrics["index"] = _index(run, kind, sets)
    (run.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _write_neighbours(run, sets, ranking)
    headline = {f"recall_{k}": metrics["recall"][str(k)] for k in settings.recall_at}
    run.count(queries=len(sets.queries), gallery=len(sets.gallery), map_at_r=metrics["map_at_r"], **headline)


def _with_label_sets(run: Run, settings: Retrieve, features: Features, file: FeatureFile) -> Features:
    """The same with all labels of each sample, if queries or gallery images have several."""
    several = (features.label_counts > 1) & np.isin(features.splits, settings.splits)
    if not several.any():
        return features
    if settings.open_set is not None:
        raise BadData(
            f"{run.step}.open_set: {int(several.sum()):,} images have several labels, and an identity is one label: "
            "leave open_set out"
        )
    if settings.head is not None:
        raise BadData(
            f"{run.step}.head: {int(several.sum()):,} images have several labels, and a head of pairs learns from one: "
            "leave head out"
        )
    return replace(features, label_sets=torch.from_numpy(label_targets(file)))


def _arrange(
    run: Run, settings: Retrieve, features: Features, column: Values | None, query_split: str, gallery_split: str
) -> QuerySets:
    """Labelled queries, and the gallery with what is unlabelled in it."""
    by = settings.by
    queries = _part(run, settings, features, column, query_split, () if by is None else by.queries)
    gallery = _part(run, settings, features, column, gallery_split, () if by is None else by.gallery)
    labelled = np.flatnonzero(is_labelled(queries.relating).numpy())
    if not len(labelled):
        raise BadData(
            f"{run.step}: no {query_split} image that is a query has a label; retrieval needs them (a folder for each "
            "class)"
        )
    if len(labelled) < len(queries):
        run.warn(f"{len(queries) - len(labelled):,} of {len(queries):,} queries have no label and are left out")
    unlabelled = int((~is_labelled(gallery.relating)).sum())
    if unlabelled:
        run.warn(
            f"{unlabelled:,} of {len(gallery):,} gallery images have no label: they count as wrong where they are found"
        )
    return pair_sets(queries.select(labelled), gallery, relation_of(settings.relation))


def _part(
    run: Run, settings: Retrieve, features: Features, column: Values | None, split: str, values: Sequence[str]
) -> Features:
    """The samples of a split, of those values of the column where there is one."""
    chosen = features.splits == split
    if not chosen.any():
        there = ", ".join(dict.fromkeys(features.splits.tolist()))
        raise BadData(
            f"{run.step}: the features have no {split} split, they have {there}; the stage shard draws one with "
            "splits: drawn"
        )
    if column is not None and settings.by is not None:
        text = np.array(["" if value is None else value for value in column])
        there = np.unique(text[chosen & (text != "")]).tolist()
        lacking = [value for value in values if value not in there]
        if lacking:
            raise BadData(
                f"{run.step}.by: no {split} image has {settings.by.column} {lacking[0]!r}; there are {_listed(there)}"
            )
        chosen &= np.isin(text, values)
    return features.select(np.flatnonzero(chosen))


def _check(run: Run, settings: Retrieve, sets: QuerySets) -> None:
    """Whether there is something to find, and a word about what a reader of the figures should know."""
    queries = sets.queries
    lost = sets.relevant == 0
    if lost.all():
        raise BadData(
            f"{run.step}: no query has another image of its class in the gallery: of {len(queries):,} queries none "
            "can be answered; `gallery` or `by` names another"
        )
    if queries.label_sets is None:
        if settings.relation is not None:
            run.warn("relation is for images with several labels, and these have one: it changes nothing, leave it out")
        _check_classes(run, sets, lost)
    else:
        _check_label_sets(run, sets, lost)
    smallest = int(sets.searched.min())
    beyond = [k for k in settings.recall_at if k > smallest]
    if beyond:
        run.warn(
            f"k = {', '.join(map(str, beyond))} is more than the {smallest:,} images that a query is compared with: "
            f"recall there is that at {smallest:,} (recall_at)"
        )
    if pseudo_labelled_test_images(queries.card["encoder"]["labels_seen"]):
        run.warn(TEST_IMAGES_SEEN)
    sharing = sets.sharing_a_group()
    if sharing:
        run.warn(
            f"{sharing:,} of {len(queries):,} queries have images of their own group in the gallery: the figures "
            "flatter"
        )


def _check_classes(run: Run, sets: QuerySets, lost: NDArray[np.bool_]) -> None:
    """The same of images with one label each. lost: bool [Q], queries with nothing to find."""
    queries, gallery, classes = sets.queries, sets.gallery, sets.queries.classes
    if len(gallery.labels.unique()) == 1:
        raise BadData(
            f"{run.step}: all {len(gallery):,} gallery images are {classes[int(gallery.labels[0])]!r}: whatever is "
            "found is right; retrieval needs two classes"
        )
    if lost.any():
        run.warn(
            f"the gallery has no other image of the class {_names(classes, queries.labels[lost].unique().tolist())}: "
            f"{int(lost.sum()):,} of {len(queries):,} queries are left out of the figures"
        )
    identities = len(queries.labels[~torch.from_numpy(lost)].unique())
    if identities < FEW_IDENTITIES:
        run.warn(f"the queries are of {identities} classes: too few for an interval to be relied on")


def _check_label_sets(run: Run, sets: QuerySets, lost: NDArray[np.bool_]) -> None:
    """The same of images with several labels."""
    kind = sets.relation.kind
    if (sets.relevant == sets.searched).all():
        raise BadData(
            f"{run.step}: every gallery image belongs to every query (relation: {kind}): whatever is found is right; "
            "`relation` names a stricter one"
        )
    if lost.any():
        run.warn(
            f"to {int(lost.sum()):,} of {len(sets.queries):,} queries no other gallery image belongs (relation: {kind})"
            ": they are left out of the figures"
        )
    groups = sets.drawn_whole
    if groups is not None and len(np.unique(groups[~lost])) < FEW_IDENTITIES:
        run.warn(f"the queries are of {len(np.unique(groups[~lost]))} groups: too few for an interval to be relied on")


def _figures(run: Run, settings: Retrieve, sets: QuerySets, ranking: Ranking) -> dict[str, Any]:
    """Means over the queries that have something to find, with intervals that draw whole classes (of several labels
    whole groups, or queries)."""
    counted = ranking.has_relevant
    groups = None if sets.drawn_whole is None else sets.drawn_whole[counted]

    def mean(name: str, values: NDArray) -> dict[str, Any]:
        interval = bootstrap_interval(values[counted], settings.bootstrap_samples, run.seed, groups=groups)
        return {name: float(values[counted].mean()), f"{name}_ci95": list(interval)}

    recall: dict[str, Any] = {}
    for k in settings.recall_at:
        recall |= mean(str(k), ranking.hits(k))
    longest = min(max(settings.recall_at), len(sets.gallery))
    return {
        "recall": recall,
        **mean("map_at_r", ranking.average_precision_at_r),
        **mean("r_precision", ranking.r_precision),
        "map": mean("5", ranking.average_precision_at_5),
        **mean("mrr", ranking.reciprocal_rank),
        "cmc": [float(ranking.hits(rank)[counted].mean()) for rank in range(1, longest + 1)],
    }


def _verification(run: Run, sets: QuerySets) -> dict[str, Any] | None:
    """Errors over all pairs; None where there are not pairs of both kinds."""
    genuine, impostors = count_pairs(
        sets.queries.features,
        sets.gallery.features,
        sets.queries.relating,
        sets.gallery.relating,
        sets.same,
        sets.relation,
    )
    if not genuine.any() or not impostors.any():
        run.warn("no verification: there are no pairs of images of different classes")
        return None
    return _errors(verify(genuine, impostors))


def _errors(found: Verification) -> dict[str, Any]:
    false_matches, misses, thresholds = zip(*found.roc, strict=True)
    return {
        "genuine_pairs": found.genuine,
        "impostor_pairs": found.impostors,
        "eer": found.eer,
        "auc": found.auc,
        "fnmr": {f"{rate:.0e}".replace("e-0", "e-"): value for rate, value in found.fnmr.items()},
        "error": found.error,
        "roc": {"fmr": false_matches, "fnmr": misses, "threshold": thresholds},
    }


def _head_of_pairs(run: Run, features: Features) -> PairHead:
    """The trained head of the encoder that made the features."""
    head, made_by = run.inputs("head")[0], run.inputs("features")[0].made_from.get("encoder")
    if made_by != head.digest:
        raise UsageError(
            f"{run.step}.head: {head.name} is not what made the features: take features of the stage embed with "
            f"encoder: {head.name}"
        )
    card = load_card(head.files)
    found = None if card.head is None else load_head(head.files, card)
    if not isinstance(found, PairHead):
        raise UsageError(
            f"{run.step}.head: {head.name} has no head of pairs; those of pairs_concatenated and pairs_difference "
            "without a projection have one"
        )
    assert card.embedding_size == features.features.shape[1]
    return found


@torch.no_grad()
def _verification_by_head(run: Run, sets: QuerySets, head: PairHead) -> dict[str, Any] | None:
    """The same errors, of accepting a pair by the probability that the head gives it."""
    queries, gallery = sets.queries, sets.gallery
    # The head was trained on embeddings as the encoder gives them, of their own lengths; so are features kept.
    found = score_pairs(
        head.parts(queries.features),
        head.parts(gallery.features),
        head.score_parts,
        queries.labels,
        gallery.labels,
        sets.same,
        run.seed,
    )
    if not found.genuine.any() or not found.impostors.any():
        return None
    errors = _errors(verify(found.genuine, found.impostors))
    errors["roc"]["threshold"] = [probability_of(one) for one in errors["roc"]["threshold"]]
    if found.sampled:
        run.say(
            f"the head scores a sample of the pairs: {found.genuine.sum():,} of one class and "
            f"{found.impostors.sum():,} of two"
        )
    return errors | {"head": head.kind, "asymmetry": found.asymmetry, "sampled": found.sampled}


def _opened(
    run: Run,
    settings: Retrieve,
    wanted: OpenSet,
    features: Features,
    column: Values | None,
    sets: QuerySets,
    trained_on: NDArray[np.int64],
) -> tuple[QuerySets, QuerySets]:
    """Those that the threshold is chosen on, and those that are scored: galleries that lack a share of identities.

    trained_on: labels of training images.
    """
    split = wanted.validation_split
    validation = _arrange(run, settings, features, column, split, split)
    taken = np.unique(np.concatenate([sets.queries.labels, sets.gallery.labels, trained_on]))
    there = validation.queries.labels.unique().numpy()
    shared = int(np.isin(there, taken).sum())
    if 0 < shared < len(there):
        run.warn(
            f"{shared:,} of the {len(there):,} classes of {split} are classes of train or of the queries too: the "
            "threshold is chosen on the others"
        )
    apart = validation.without(taken[taken >= 0])
    try:
        return apart.with_new(wanted.new_share, run.seed), sets.with_new(wanted.new_share, run.seed)
    except TooFewIdentities as reason:
        raise BadData(
            f"{run.step}.open_set: {reason}; {split} and {settings.splits[0]} each need two classes, one known and one "
            "new, that no other split has: the stage shard makes such splits by split_by: class"
        ) from reason


def _open_set(run: Run, settings: Retrieve, wanted: OpenSet, validation: QuerySets, sets: QuerySets) -> dict[str, Any]:
    """A threshold from identities of the validation split, and what it gives on those of the queries."""
    share = wanted.new_share
    chosen_on, answers = (
        answer_queries(one.queries.features, one.gallery.features, one.queries.labels, one.gallery.labels, one.same)
        for one in (validation, sets)
    )
    threshold = choose_threshold(chosen_on, share)
    scores = answers.scores(threshold)
    interval = map_at_5_interval(answers, threshold, share, settings.bootstrap_samples, run.seed)
    return {
        "map": {
            "5": answers.map_at_5(threshold, share),
            "5_ci95": list(interval),
            "5_known": float(scores[~answers.is_new].mean()),
            "5_new": float(scores[answers.is_new].mean()),
        },
        "threshold": threshold,
        "new_share": share,
        "curve": open_set_curve(chosen_on, answers, NEW_SHARES, threshold),
        "auroc": auroc(answers),
        "oscr": oscr(answers),
        "oscr_curve": oscr_points(answers),
        **_counts(answers),
        "validation": {
            "split": wanted.validation_split,
            "map": {"5": chosen_on.map_at_5(threshold, share)},
            **_counts(chosen_on),
        },
    }


def _counts(answers: Answers) -> dict[str, Any]:
    parts = {"known": ~answers.is_new, "new": answers.is_new}
    return {
        "queries": {name: int(part.sum()) for name, part in parts.items()},
        "identities": {name: len(np.unique(answers.label[part])) for name, part in parts.items()},
    }


def _protocol(settings: Retrieve, features: Features, sets: QuerySets, trained_on: NDArray[np.int64]) -> dict[str, Any]:
    """How the figures came about."""
    relevant = sets.relevant
    found = relevant > 0
    asked = _classes(sets.queries)
    in_train = int(np.isin(asked, trained_on).sum())
    several = {} if sets.queries.label_sets is None else _label_protocol(sets)
    return several | {
        "queries": len(sets.queries),
        "gallery": len(sets.gallery),
        "splits": dict(zip(("queries", "gallery"), settings.splits, strict=True)),
        "by": None if settings.by is None else settings.by.model_dump(mode="json"),
        "leave_one_out": bool((sets.same >= 0).any()),
        "identities": len(asked),
        "gallery_identities": len(_classes(sets.gallery)),
        "gallery_without_label": int((~is_labelled(sets.gallery.relating)).sum()),
        "queries_without_match": int((~found).sum()),
        "identities_without_match": len(np.setdiff1d(asked, _classes(sets.queries.select(np.flatnonzero(found))))),
        "chance_recall_1": float((relevant[found] / sets.searched[found]).mean()),
        "classes": "shared" if in_train else "disjoint",
        "query_classes_in_train": in_train,
        "encoder_saw_labels": bool(features.card["encoder"]["labels_seen"]),
        "queries_sharing_a_group": sets.sharing_a_group() if sets.queries.has_groups else None,
        "similarity": "cosine",
        "bootstrap_samples": settings.bootstrap_samples,
    }


def _label_protocol(sets: QuerySets) -> dict[str, Any]:
    """What else is to be said of images with several labels."""
    relation: dict[str, Any] = {"kind": sets.relation.kind}
    if sets.relation.kind == "jaccard":
        relation["threshold"] = sets.relation.threshold
    return {
        "several_labels": True,
        "relation": relation,
        "intervals_draw": "queries" if sets.drawn_whole is None else "groups of queries",
    }


def _classes(part: Features) -> NDArray[np.int64]:
    """Labels that some samples have, ascending."""
    if part.label_sets is not None:
        return np.flatnonzero(part.label_sets.any(dim=0).numpy())
    labels = part.labels.numpy()
    return np.unique(labels[labels >= 0])


def _wanted_index(run: Run, settings: Retrieve, images: int) -> Kind | None:
    """The kind of index that a gallery of so many images gets, and a word where its size gives it none."""
    if settings.index != "by_size":
        return None if settings.index == "none" else settings.index
    if images >= INDEX_FROM:
        return "hnsw"
    run.say(
        f"no index: {images:,} gallery images are fewer than {INDEX_FROM:,}; `simclr search` takes the features "
        "instead (index: hnsw makes one of any size)"
    )
    return None


def _index(run: Run, kind: Kind, sets: QuerySets) -> dict[str, Any]:
    """Write an index of the gallery, and tell what it finds of the exact search's neighbours, and how much sooner."""
    before = time.perf_counter()
    index, rows, recall, asked = build_index(kind, sets.gallery.features, sets.queries.features, sets.same, run.seed)
    build_seconds = time.perf_counter() - before
    speed = measure_speed(index, sets.queries.features[asked])
    # Seconds are no function of the inputs: they lie beside the record of the run.
    run.clock(index_build_seconds=build_seconds, index_query_seconds=speed.index, exact_query_seconds=speed.exact)
    run.say(
        f"index {kind} of {len(sets.gallery):,} images: finds {recall['10']:.1%} of the ten nearest and "
        f"{recall['1']:.1%} of the nearest of {len(asked):,} queries, {speed.exact / speed.index:.2g} times as many "
        f"queries a second as exact search; built in {build_seconds:.1f} s"
    )
    if recall["10"] < WANTED_RECALL:
        run.warn(f"the index finds less than {WANTED_RECALL:.0%} of the ten nearest; `index: none` searches exactly")
    if speed.index > speed.exact:
        run.warn("the index is no quicker than exact search here; `index: none` does without")
    return {
        "kind": kind,
        "vectors": len(sets.gallery),
        "dimension": index.vectors.shape[1],
        "parameters": index.parameters,
        "bytes": write_indexed_gallery(run.out, index, sets.gallery.select(rows.numpy())),
        "recall": recall,
        "recall_queries": len(asked),
    }


def _write_neighbours(run: Run, sets: QuerySets, ranking: Ranking) -> None:
    """A row a query: its nearest gallery images, and its own figures for comparisons in pairs."""
    index = ranking.neighbours.index.numpy()
    columns = {
        "id": pa.array(sets.queries.ids, pa.int64()),
        "label": pa.array(sets.queries.labels.numpy(), pa.int32()),
        "neighbours": pa.array([*sets.gallery.ids[index]], pa.list_(pa.int64())),
        "similarities": pa.array([*ranking.neighbours.similarity.numpy()], pa.list_(pa.float32())),
        "right": pa.array([*ranking.right], pa.list_(pa.bool_())),
        "relevant": pa.array(ranking.relevant, pa.int64()),
        "first_rank": pa.array(ranking.first, pa.int64()),
        "r_precision": pa.array(ranking.r_precision),
        "average_precision_at_r": pa.array(ranking.average_precision_at_r),
        "average_precision_at_5": pa.array(ranking.average_precision_at_5),
    }
    if sets.queries.label_sets is not None:
        rows = [np.flatnonzero(row) for row in sets.queries.label_sets.numpy()]
        columns["labels"] = pa.array(rows, pa.list_(pa.int32()))
    pq.write_table(pa.table(columns), run.out / "neighbours.parquet", compression="none")


def _listed(names: Sequence[str]) -> str:
    """The first five."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _names(classes: Sequence[str], labels: Sequence[int]) -> str:
    return _listed([repr(classes[label]) for label in labels])
