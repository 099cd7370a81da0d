"""Which known identity is this, or none of them? Answers to queries of which some are of identities that are new.

As in the Humpback Whale competition (Kaggle 2018): the answer is a list of five, nearest identities first, each placed
by its best image; `new` is one of them, and stands before the identities whose similarity is below a threshold. A query
has one right answer, its identity or `new`, and scores 1 / place, or 0 where that is not among the five.

Known and new queries are weighed, so that figures are for a stated share of new ones and not for the one at hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.evaluation.intervals import bootstrap_means, interval_of
from stages.evaluation.retrieval import count_relevant
from stages.evaluation.similarity import NEVER, order_keys, over_tiles, payload_of, similarity_of

PLACES = 5

ROUNDING = 1e-12
"""Sums of gains that differ by less are equal."""


@dataclass(frozen=True)
class Answers:
    """The five nearest identities of each query, before `new` is put among them."""

    similarity: NDArray[np.float64]
    """[Q, 5], of the best image of each, best first; minus infinity where there are fewer identities."""
    identity: NDArray[np.int64]
    """[Q, 5], labels; -1 where there are fewer."""
    label: NDArray[np.int64]
    """[Q], of the query."""
    is_new: NDArray[np.bool_]
    """[Q], whether the gallery holds nothing of that label but the query itself."""

    @property
    def place(self) -> NDArray[np.int64]:
        """[Q], the place of the query's own identity, from 1; 0: it is not among the five."""
        right = self.identity == self.label[:, None]
        return np.where(right.any(axis=1), right.argmax(axis=1) + 1, 0)

    def weights(self, new_share: float) -> NDArray[np.float64]:
        """[Q], their sum 1, that of new queries `new_share`.

        Raises:
            ValueError: queries of one kind only.
        """
        new = int(self.is_new.sum())
        if not 0 < new < len(self.is_new):
            raise ValueError(f"{new} of {len(self.is_new)} queries are new: an open set has known ones and new ones")
        return np.where(self.is_new, new_share / new, (1 - new_share) / (len(self.is_new) - new))

    def scores(self, threshold: float) -> NDArray[np.float64]:
        """[Q], 1 / place of the right answer, 0 if it is not among the first five (average precision at 5)."""
        accepted = self.similarity >= threshold
        before_new = accepted.sum(axis=1)
        place = self.place
        pushed_back = place + (place > before_new)
        right_place = np.where(self.is_new, before_new + 1, np.where(place > 0, pushed_back, PLACES + 1))
        return np.where(right_place <= PLACES, 1 / right_place, 0.0)

    def map_at_5(self, threshold: float, new_share: float) -> float:
        """The weighed mean of the scores: MAP@5 where a share of the queries is new."""
        return float(self.weights(new_share) @ self.scores(threshold))


def answer_queries(
    queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor, same: Tensor | None = None
) -> Answers:
    """The five nearest identities of each query by cosine similarity; of equals that of the smaller row comes first.

    Args:
        queries: [Q, D], of any length.
        gallery: [G, D].
        query_labels: int64 [Q], 0 or more.
        gallery_labels: int64 [G]; a row with a label below 0 is of no identity and left out.
        same: int64 [Q], the gallery row that is the query itself, which does not count; -1: there is none.
    """
    # Rows of one identity lie side by side, and each key holds the row as it was.
    labelled = torch.nonzero(gallery_labels >= 0)[:, 0]
    order = labelled[gallery_labels[labelled].argsort(stable=True)]
    there, rows_before = gallery_labels[order].numpy(), order.numpy()
    starts = np.flatnonzero(np.diff(there, prepend=-1))
    itself = np.full(len(queries), -1) if same is None else same.numpy()
    place = np.full(len(gallery_labels) + 1, -1)  # the last one is that of -1
    place[rows_before] = np.arange(len(order))
    own = place[itself]
    similarity = np.full((len(queries), PLACES), -np.inf)
    identity = np.full((len(queries), PLACES), -1)
    labels = gallery_labels.numpy()

    def answer(rows: slice, tile: NDArray[np.float32]) -> None:
        keys = order_keys(tile, rows_before)
        excluded = np.flatnonzero(own[rows] >= 0)
        keys[excluded, own[rows][excluded]] = NEVER
        best = np.sort(np.minimum.reduceat(keys, starts, axis=1), axis=1)[:, :PLACES]
        there_is = best != NEVER
        similarity[rows, : best.shape[1]] = similarity_of(best)
        identity[rows, : best.shape[1]][there_is] = labels[payload_of(best[there_is])]

    for _ in over_tiles(queries, gallery[order], answer):
        pass
    wanted = query_labels.numpy()
    return Answers(similarity, identity, wanted, count_relevant(wanted, labels, itself) == 0)


def choose_threshold(answers: Answers, new_share: float) -> float:
    """The threshold of the highest MAP@5 on these answers, the lowest of equals; exact.

    MAP@5 changes only where a similarity is passed: right answers of known queries fall back one place, those of new
    ones move up. A threshold between two of them is in their middle; below all of them it is -1, where `new` always
    comes last, and above all of them more than 1, where it always comes first.
    """
    weights = answers.weights(new_share)
    worth = np.append(1 / np.arange(1, PLACES + 1), 0)  # of a place from 1, the last: behind the five
    place = answers.place
    falls = np.flatnonzero(place > 0)
    passed = [answers.similarity[falls, place[falls] - 1]]
    gains = [-weights[falls] * (worth[place[falls] - 1] - worth[place[falls]])]
    new = np.flatnonzero(answers.is_new)
    for at in range(PLACES):
        passed.append(answers.similarity[new, at])
        gains.append(weights[new] * (worth[at] - worth[at + 1]))
    similarities, changes = np.concatenate(passed), np.concatenate(gains)
    values, which = np.unique(similarities[np.isfinite(similarities)], return_inverse=True)
    sums = np.bincount(which, weights=changes[np.isfinite(similarities)], minlength=len(values))
    # Before the first value, between two, and behind the last.
    heights = np.concatenate([[0.0], np.cumsum(sums)])
    never, always = min(-1.0, values[0]), np.nextafter(max(1.0, values[-1]), np.inf)
    thresholds = np.concatenate([[never], (values[:-1] + values[1:]) / 2, [always]])
    return float(thresholds[int(np.argmax(heights >= heights.max() - ROUNDING))])


def map_at_5_interval(
    answers: Answers, threshold: float, new_share: float, samples: int, seed: int
) -> tuple[float, float]:
    """95% interval of MAP@5: whole identities are drawn, of the known and of the new ones as many as there are."""
    scores, means = answers.scores(threshold), np.zeros(samples)
    for stream, (part, share) in enumerate([(~answers.is_new, 1 - new_share), (answers.is_new, new_share)]):
        means += share * bootstrap_means(scores[part], samples, 2 * seed + stream, answers.label[part])
    return interval_of(means)


def open_set_curve(
    chosen_on: Answers, answers: Answers, shares: Sequence[float], threshold: float
) -> list[dict[str, float]]:
    """MAP@5 by share of new queries: with one threshold for all, and with one chosen for each share.

    Args:
        chosen_on: answers to queries of identities apart, on which thresholds are chosen.
        threshold: that for all shares.
    """
    curve = []
    for share in shares:
        own = choose_threshold(chosen_on, share)
        curve.append(
            {
                "new_share": share,
                "map_5": answers.map_at_5(threshold, share),
                "map_5_share_known": answers.map_at_5(own, share),
                "threshold_share_known": own,
            }
        )
    return curve


def auroc(answers: Answers) -> float:
    """Known against new by best similarity: the chance that a known query has the higher one, of equals half."""
    return _won(answers, np.ones(len(answers.label)))


def oscr(answers: Answers) -> float:
    """Area under the correct classification rate over the false positive rate (Dhamija et al. 2018, section 3).

    At a threshold the one is the share of known queries whose nearest identity is right and at least as similar, the
    other that of new queries with anything as similar. The area (by trapezoids) is that of AUROC where only known
    queries that are right can win.
    """
    return _won(answers, answers.place == 1)


def oscr_points(answers: Answers, count: int = 100) -> list[tuple[float, float]]:
    """(false positive rate, correct classification rate) at thresholds, by rising rates: at most `count` + 2 points."""
    best = answers.similarity[:, 0]
    known, new = best[~answers.is_new & (answers.place == 1)], best[answers.is_new]
    thresholds = np.unique(best)[::-1]
    chosen = thresholds[np.unique(np.linspace(0, len(thresholds) - 1, count).astype(np.int64))]
    total = int((~answers.is_new).sum())
    points = [(float((new >= at).mean()), int((known >= at).sum()) / total) for at in chosen]
    return [(0.0, 0.0), *points]


def _won(answers: Answers, counts: NDArray) -> float:
    """Mean over pairs of a known and a new query: `counts` of the known one if it is more similar, half if equally."""
    best = answers.similarity[:, 0]
    new, known = np.sort(best[answers.is_new]), best[~answers.is_new]
    below, upto = np.searchsorted(new, known, "left"), np.searchsorted(new, known, "right")
    return float((counts[~answers.is_new] * (below + upto) / (2 * len(new))).mean())
