"""What a reader of a retrieval's figures should know of its queries and gallery, and where there are no figures."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from stages.evaluation.labels_seen import TEST_IMAGES_SEEN, pseudo_labelled_test_images
from stages.evaluation.query_sets import QuerySets

FEW_IDENTITIES = 10
"""Queries of fewer classes than this hardly say how far a figure would move with others."""


class NothingToFind(ValueError):
    """No query can be answered, or every answer is right."""

    exit_code = 6


def look_at_sets(sets: QuerySets, recall_at: Sequence[int]) -> list[str]:
    """A sentence for each thing to know.

    Args:
        recall_at: k of Recall@k.

    Raises:
        NothingToFind: in one sentence.
    """
    queries = sets.queries
    lost = sets.relevant == 0
    if lost.all():
        raise NothingToFind(
            f"no query has another image of its class in the gallery: of {len(queries):,} queries none can be "
            "answered; `gallery` or `by` names another"
        )
    notes = _of_classes(sets, lost) if queries.label_sets is None else _of_label_sets(sets, lost)
    smallest = int(sets.searched.min())
    beyond = [k for k in recall_at if k > smallest]
    if beyond:
        notes.append(
            f"k = {', '.join(map(str, beyond))} is more than the {smallest:,} images that a query is compared with: "
            f"recall there is that at {smallest:,} (recall_at)"
        )
    if pseudo_labelled_test_images(queries.card["encoder"]["labels_seen"]):
        notes.append(TEST_IMAGES_SEEN)
    sharing = sets.sharing_a_group()
    if sharing:
        notes.append(
            f"{sharing:,} of {len(queries):,} queries have images of their own group in the gallery: the figures "
            "flatter"
        )
    return notes


def _of_classes(sets: QuerySets, lost: NDArray[np.bool_]) -> list[str]:
    """The same of images with one label each. lost: bool [Q], queries with nothing to find."""
    queries, gallery, classes, notes = sets.queries, sets.gallery, sets.queries.classes, list[str]()
    if len(gallery.labels.unique()) == 1:
        raise NothingToFind(
            f"all {len(gallery):,} gallery images are {classes[int(gallery.labels[0])]!r}: whatever is found is "
            "right; retrieval needs two classes"
        )
    if lost.any():
        names = [repr(classes[label]) for label in queries.labels[lost].unique().tolist()]
        notes.append(
            f"the gallery has no other image of the class {first_five(names)}: {int(lost.sum()):,} of "
            f"{len(queries):,} queries are left out of the figures"
        )
    identities = len(queries.labels[~torch.from_numpy(lost)].unique())
    if identities < FEW_IDENTITIES:
        notes.append(f"the queries are of {identities} classes: too few for an interval to be relied on")
    return notes


def _of_label_sets(sets: QuerySets, lost: NDArray[np.bool_]) -> list[str]:
    """The same of images with several labels."""
    kind, notes = sets.relation.kind, list[str]()
    if (sets.relevant == sets.searched).all():
        raise NothingToFind(
            f"every gallery image belongs to every query (relation: {kind}): whatever is found is right; `relation` "
            "names a stricter one"
        )
    if lost.any():
        notes.append(
            f"to {int(lost.sum()):,} of {len(sets.queries):,} queries no other gallery image belongs (relation: {kind})"
            ": they are left out of the figures"
        )
    groups = sets.drawn_whole
    if groups is not None and len(np.unique(groups[~lost])) < FEW_IDENTITIES:
        notes.append(
            f"the queries are of {len(np.unique(groups[~lost]))} groups: too few for an interval to be relied on"
        )
    return notes


def first_five(names: Sequence[str]) -> str:
    """In words."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
