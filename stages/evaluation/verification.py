"""Do two images show the same? Errors of a threshold on similarity, over all pairs of a query and a gallery row.

Pairs are streamed into two histograms of similarity, so that billions of them take little memory. Their bins are
2 / BINS wide, and a threshold lies on the edge of a bin: every figure is exact for similarities that are rounded to
their bin. What the rounding may do to a figure is bounded by the pairs in single bins, and comes along with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stages.evaluation.similarity import over_tiles
from stages.labels import ANY_SHARED, LabelRelation, is_labelled

BINS = 2**18
"""Of similarities from -1 to 1: 7.6e-6 wide."""
FALSE_MATCH_RATES = (1e-2, 1e-3, 1e-4)
FEWEST_FALSE_MATCHES = 30
"""Below so many expected false matches a rate is not known to within 30% with 90% confidence (the rule of 30:
Doddington et al. 2000)."""
CURVE_POINTS = 100
"""Of a curve, along each of its axes."""

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Verification:
    """Errors of accepting a pair as a match where its similarity is at least a threshold.

    FMR, the false match rate, is the share of impostor pairs (of two labels) that are accepted; FNMR, the false
    non-match rate, the share of genuine pairs (of one label) that are not.
    """

    genuine: int
    impostors: int
    auc: float
    """The chance that a genuine pair is more similar than an impostor pair, of one bin half."""
    eer: float
    """Where FMR and FNMR are equal, on the line between the two thresholds around it."""
    fnmr: dict[float, float | None]
    """By FMR: the FNMR at the lowest threshold whose FMR is not above it; None below 30 expected false matches."""
    error: float
    """The most that rounding to bins can have changed any of these figures by."""
    roc: list[tuple[float, float, float]]
    """(FMR, FNMR, threshold) for a plot, by falling FMR."""

    @property
    def figures(self) -> dict[str, Any]:
        """As metrics.json has them: rates of false matches as `1e-2`, the curve in columns."""
        false_matches, misses, thresholds = zip(*self.roc, strict=True)
        return {
            "genuine_pairs": self.genuine,
            "impostor_pairs": self.impostors,
            "eer": self.eer,
            "auc": self.auc,
            "fnmr": {f"{rate:.0e}".replace("e-0", "e-"): value for rate, value in self.fnmr.items()},
            "error": self.error,
            "roc": {"fmr": false_matches, "fnmr": misses, "threshold": thresholds},
        }


def count_pairs(
    queries: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    same: Tensor | None = None,
    relation: LabelRelation = ANY_SHARED,
) -> tuple[Counts, Counts]:
    """Histograms of the similarity of genuine and of impostor pairs: int64 [BINS] each, from -1 to 1.

    Args:
        queries, gallery: [Q, D] and [G, D], of any length.
        query_labels, gallery_labels: int64 [Q] and [G]; pairs with a label below 0 (unknown) are left out. Or bool
            [Q, C] and [G, C], several labels each; pairs with a row that has none are left out.
        same: int64 [Q], the gallery row that is the query itself, -1: there is none. Of two queries that are both in
            the gallery one pair counts, and none of a query with itself.
        relation: of several labels: pairs that belong together are genuine.
    """
    known, known_there = is_labelled(query_labels), is_labelled(gallery_labels)
    genuine, everything = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    if not known.any() or not known_there.any():
        return genuine, everything
    wanted, there = query_labels[known], gallery_labels[known_there]
    relating = relation.against(there)
    # Places among the rows that are left.
    place = np.where(known_there, known_there.cumsum(0) - 1, -1)
    own = np.full(len(queries), -1) if same is None else same.numpy()
    own = np.where(own >= 0, place[own], -1)[known.numpy()]
    is_query = np.zeros(len(there), dtype=bool)
    is_query[own[own >= 0]] = True
    columns = np.arange(len(there))

    def count(rows: slice, tile: NDArray[np.float32]) -> tuple[Counts, Counts]:
        itself = own[rows, None]
        counted = (columns > itself) | ~is_query & (columns != itself)
        # What does not count goes to a bin of its own.
        bins = np.where(counted, ((tile + 1) * (BINS // 2)).astype(np.int64).clip(0, BINS - 1), BINS)
        related = relating.of(wanted[rows]).numpy()
        found, found_genuine = (np.bincount(some, minlength=BINS + 1)[:BINS] for some in (bins.ravel(), bins[related]))
        return found, found_genuine

    for found, found_genuine in over_tiles(queries[known], gallery[known_there], count):
        everything += found
        genuine += found_genuine
    return genuine, everything - genuine


def verify(genuine: Counts, impostors: Counts, false_match_rates: Sequence[float] = FALSE_MATCH_RATES) -> Verification:
    """The errors that follow from histograms as `count_pairs` makes them.

    Raises:
        ValueError: no genuine pair, or no impostor pair.
    """
    total, total_impostors = int(genuine.sum()), int(impostors.sum())
    if not total or not total_impostors:
        raise ValueError(f"{total} genuine and {total_impostors} impostor pairs: verification needs some of both")
    shares, impostor_shares = genuine / total, impostors / total_impostors
    # At the threshold that is the lower edge of bin t, and at last above all of them: [BINS + 1].
    fnmr = np.concatenate([[0], np.cumsum(genuine)]) / total
    fmr = (total_impostors - np.concatenate([[0], np.cumsum(impostors)])) / total_impostors
    rates: dict[float, float | None] = {}
    errors = [0.5 * float(shares @ impostor_shares)]
    for rate in false_match_rates:
        rates[rate] = None
        if rate * total_impostors >= FEWEST_FALSE_MATCHES:
            threshold = int(np.argmax(fmr <= rate))
            rates[rate] = float(fnmr[threshold])
            errors.append(float(shares[max(threshold - 1, 0)]))
    crossing = int(np.argmax(fnmr >= fmr))
    before, after = fmr[crossing - 1] - fnmr[crossing - 1], fmr[crossing] - fnmr[crossing]
    eer = fmr[crossing - 1] + before / (before - after) * (fmr[crossing] - fmr[crossing - 1])
    # Both rates move one way only, so that they meet between their values at the two thresholds.
    highest, lowest = min(fmr[crossing - 1], fnmr[crossing]), max(fmr[crossing], fnmr[crossing - 1])
    errors.append(float(highest - lowest))
    auc = float(shares @ (1 - fmr[:-1] + 0.5 * impostor_shares))
    return Verification(total, total_impostors, auc, float(eer), rates, max(errors), _curve(fmr, fnmr, total_impostors))


def _curve(fmr: NDArray[np.float64], fnmr: NDArray[np.float64], impostors: int) -> list[tuple[float, float, float]]:
    """Some points of a curve: evenly spaced in the logarithm of FMR, and in FNMR."""
    along_fmr = np.searchsorted(-fmr, -np.geomspace(1 / impostors, 1, CURVE_POINTS))
    along_fnmr = np.searchsorted(fnmr, np.linspace(0, 1, CURVE_POINTS))
    chosen = np.unique(np.concatenate([[0], along_fmr, along_fnmr, [BINS]]).clip(0, BINS)).tolist()
    return [(float(fmr[at]), float(fnmr[at]), -1 + 2 * at / BINS) for at in chosen]
