"""How well images of one class find one another: ranking of a gallery, verification of pairs, and an open set."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import BadData, NotFinite, UsageError
from pipeline.run import Run
from stages.evaluation import (
    FeatureFile,
    Features,
    QuerySets,
    TooFewIdentities,
    count_pairs,
    label_targets,
    pair_sets,
    probability_of,
    rank_gallery,
    read_features,
    score_pairs,
    verify,
)
from stages.evaluation.indexed_gallery import make_index
from stages.evaluation.open_set_figures import OpenSets, open_set_figures, open_sets
from stages.evaluation.retrieval_figures import ranking_figures, retrieval_protocol, write_neighbours
from stages.evaluation.retrieval_notes import NothingToFind, first_five, look_at_sets
from stages.evaluation.vector_index import WANTED_RECALL, Kind, require_library
from stages.labels import is_labelled, relation_of
from stages.models import load_card, load_head
from stages.models.heads import PairHead
from stages.settings.retrieve import INDEX_FROM, OpenSet, Retrieve

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
        split = settings.open_set.validation_split
        validation = _arrange(run, settings, features, column, split, split)
        opened = _open(run, settings, settings.open_set, validation, sets, trained_on)
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
        metrics = ranking_figures(sets, ranking, settings.recall_at, settings.bootstrap_samples, run.seed)
        progress.advance()
        if settings.verification:
            metrics["verification"] = _verification(run, sets)
            progress.advance()
        if head is not None:
            metrics["verification_by_head"] = _verification_by_head(run, sets, head)
            progress.advance()
        if settings.open_set is not None and opened is not None:
            share = settings.open_set.new_share
            metrics["open_set"] = open_set_figures(opened, share, settings.bootstrap_samples, run.seed)
            progress.advance()
    by = None if settings.by is None else settings.by.model_dump(mode="json")
    metrics |= {
        "protocol": retrieval_protocol(sets, trained_on, settings.splits, by, settings.bootstrap_samples),
        "encoder": features.card["encoder"],
        "classes": features.classes,
    }
    kind = _wanted_index(run, settings, len(sets.gallery))
    if kind is not None:
        metrics["index"] = _index(run, kind, sets)
    (run.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    write_neighbours(run.out / "neighbours.parquet", sets, ranking)
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
                f"{run.step}.by: no {split} image has {settings.by.column} {lacking[0]!r}; there are "
                f"{first_five(there)}"
            )
        chosen &= np.isin(text, values)
    return features.select(np.flatnonzero(chosen))


def _check(run: Run, settings: Retrieve, sets: QuerySets) -> None:
    """Whether there is something to find, and a word about what a reader of the figures should know."""
    try:
        notes = look_at_sets(sets, settings.recall_at)
    except NothingToFind as reason:
        raise BadData(f"{run.step}: {reason}") from reason
    if settings.relation is not None and sets.queries.label_sets is None:
        run.warn("relation is for images with several labels, and these have one: it changes nothing, leave it out")
    for note in notes:
        run.warn(note)


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
    return verify(genuine, impostors).figures


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
    errors = verify(found.genuine, found.impostors).figures
    errors["roc"]["threshold"] = [probability_of(one) for one in errors["roc"]["threshold"]]
    if found.sampled:
        run.say(
            f"the head scores a sample of the pairs: {found.genuine.sum():,} of one class and "
            f"{found.impostors.sum():,} of two"
        )
    return errors | {"head": head.kind, "asymmetry": found.asymmetry, "sampled": found.sampled}


def _open(
    run: Run,
    settings: Retrieve,
    wanted: OpenSet,
    validation: QuerySets,
    sets: QuerySets,
    trained_on: NDArray[np.int64],
) -> OpenSets:
    """Galleries that lack a share of identities; those of train (labels) have no say in the threshold."""
    try:
        opened = open_sets(validation, sets, trained_on, wanted.new_share, run.seed)
    except TooFewIdentities as reason:
        raise BadData(
            f"{run.step}.open_set: {reason}; {wanted.validation_split} and {settings.splits[0]} each need two classes, "
            "one known and one new, that no other split has: the stage shard makes such splits by split_by: class"
        ) from reason
    if opened.shared:
        run.warn(
            f"{opened.shared:,} of the {opened.identities:,} classes of {wanted.validation_split} are classes of train "
            "or of the queries too: the threshold is chosen on the others"
        )
    return opened


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
    """Write an index of the gallery, and say what it finds and how soon."""
    card, build_seconds, speed = make_index(run.out, kind, sets, run.seed)
    recall = card["recall"]
    # Seconds are no function of the inputs: they lie beside the record of the run.
    run.clock(index_build_seconds=build_seconds, index_query_seconds=speed.index, exact_query_seconds=speed.exact)
    run.say(
        f"index {kind} of {len(sets.gallery):,} images: finds {recall['10']:.1%} of the ten nearest and "
        f"{recall['1']:.1%} of the nearest of {card['recall_queries']:,} queries, {speed.exact / speed.index:.2g} "
        f"times as many queries a second as exact search; built in {build_seconds:.1f} s"
    )
    if recall["10"] < WANTED_RECALL:
        run.warn(f"the index finds less than {WANTED_RECALL:.0%} of the ten nearest; `index: none` searches exactly")
    if speed.index > speed.exact:
        run.warn("the index is no quicker than exact search here; `index: none` does without")
    return card
