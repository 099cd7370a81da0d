"""An open set from queries and a gallery whose images are all known, and its figures."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.evaluation.open_set import (
    Answers,
    answer_queries,
    auroc,
    choose_threshold,
    map_at_5_interval,
    open_set_curve,
    oscr,
    oscr_points,
)
from stages.evaluation.query_sets import QuerySets

NEW_SHARES = tuple(tenths / 10 for tenths in range(10))
"""Shares of new queries that the curve has."""


@dataclass(frozen=True)
class OpenSets:
    """Two galleries that each lack a share of the identities.

    Attributes:
        validation: what the threshold is chosen on, of identities that neither train nor the queries have.
        scored: what the figures are of.
        shared: identities of the validation split that others have too, and that were left out of it.
        identities: how many there were before.
    """

    validation: QuerySets
    scored: QuerySets
    shared: int
    identities: int


def open_sets(
    validation: QuerySets, sets: QuerySets, trained_on: NDArray[np.int64], new_share: float, seed: int
) -> OpenSets:
    """Take a share of the identities out of both galleries, by a seeded draw.

    Args:
        validation: of another split than `sets`.
        trained_on: labels of training images.

    Raises:
        TooFewIdentities: there are not two in one of them.
    """
    taken = np.unique(np.concatenate([sets.queries.labels, sets.gallery.labels, trained_on]))
    there = validation.queries.labels.unique().numpy()
    apart = validation.without(taken[taken >= 0]).with_new(new_share, seed)
    return OpenSets(apart, sets.with_new(new_share, seed), int(np.isin(there, taken).sum()), len(there))


def open_set_figures(opened: OpenSets, new_share: float, bootstrap_samples: int, seed: int) -> dict[str, Any]:
    """A threshold from identities of the validation split, and what it gives on those of the queries.

    Args:
        new_share: of the queries, by weights, that the threshold is chosen for and that the figures are of.
    """
    chosen_on, answers = (
        answer_queries(one.queries.features, one.gallery.features, one.queries.labels, one.gallery.labels, one.same)
        for one in (opened.validation, opened.scored)
    )
    threshold = choose_threshold(chosen_on, new_share)
    scores = answers.scores(threshold)
    interval = map_at_5_interval(answers, threshold, new_share, bootstrap_samples, seed)
    return {
        "map": {
            "5": answers.map_at_5(threshold, new_share),
            "5_ci95": list(interval),
            "5_known": float(scores[~answers.is_new].mean()),
            "5_new": float(scores[answers.is_new].mean()),
        },
        "threshold": threshold,
        "new_share": new_share,
        "curve": open_set_curve(chosen_on, answers, NEW_SHARES, threshold),
        "auroc": auroc(answers),
        "oscr": oscr(answers),
        "oscr_curve": oscr_points(answers),
        **_counts(answers),
        "validation": {
            "split": str(opened.validation.queries.splits[0]),
            "map": {"5": chosen_on.map_at_5(threshold, new_share)},
            **_counts(chosen_on),
        },
    }


def _counts(answers: Answers) -> dict[str, Any]:
    parts = {"known": ~answers.is_new, "new": answers.is_new}
    return {
        "queries": {name: int(part.sum()) for name, part in parts.items()},
        "identities": {name: len(np.unique(answers.label[part])) for name, part in parts.items()},
    }
