"""Errors of verification against loops over all pairs and scikit-learn's ROC curve."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from overlaps import OVERLAPS, overlapping
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from stages.evaluation import count_pairs, similarity, verification, verify

Pairs = tuple[NDArray[np.bool_], NDArray[np.float64]]


@pytest.fixture(params=[2**20, 70, 1], ids=["one tile", "many tiles", "a query each"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "TILE_PAIRS", request.param)


def by_loops(
    queries: Tensor, gallery: Tensor, query_labels: list[int], gallery_labels: list[int], same: list[int]
) -> Pairs:
    """Every pair once: whether it is genuine, and its similarity."""
    seen: set[frozenset[tuple[str, int]]] = set()
    genuine, similarities = [], []
    for query in range(len(queries)):
        for row in range(len(gallery)):
            # An image that is in both sets is known by its row in the gallery.
            one = ("gallery", same[query]) if same[query] >= 0 else ("query", query)
            pair = frozenset([one, ("gallery", row)])
            if query_labels[query] < 0 or gallery_labels[row] < 0 or len(pair) == 1 or pair in seen:
                continue
            seen.add(pair)
            genuine.append(query_labels[query] == gallery_labels[row])
            similarities.append(torch.cosine_similarity(queries[query].double(), gallery[row].double(), dim=0).item())
    return np.array(genuine), np.array(similarities)


def rounded(similarities: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    return np.floor((similarities + 1) * bins / 2).astype(np.int64).clip(0, bins - 1)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_each_pair_counts_once(overlap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "BINS", 64)
    queries, gallery, wanted, labels, same = overlapping(overlap)
    genuine, impostors = count_pairs(queries, gallery, wanted, labels, same)
    is_genuine, similarities = by_loops(queries, gallery, wanted.tolist(), labels.tolist(), same.tolist())
    bins = rounded(similarities, 64)
    assert genuine.tolist() == np.bincount(bins[is_genuine], minlength=64).tolist()
    assert impostors.tolist() == np.bincount(bins[~is_genuine], minlength=64).tolist()


def test_without_a_known_label_there_is_no_pair() -> None:
    genuine, impostors = count_pairs(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([-1, -1]), torch.zeros(4).long())
    assert genuine.sum() == impostors.sum() == 0


@pytest.mark.parametrize("bins", [32, 2**18])
def test_figures_are_those_of_scikit_learn_on_rounded_similarities(bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "BINS", bins)
    random = np.random.default_rng(0)
    truth = random.random(20_000) < 0.1
    similarities = np.tanh(random.normal(np.where(truth, 0.8, 0.0), 0.4))
    codes = rounded(similarities, bins)
    found = verify(np.bincount(codes[truth], minlength=bins), np.bincount(codes[~truth], minlength=bins))
    assert (found.genuine, found.impostors) == (truth.sum(), (~truth).sum())
    assert found.auc == pytest.approx(roc_auc_score(truth, codes), abs=1e-12)
    fmr, tpr, _ = roc_curve(truth, codes, drop_intermediate=False)
    fnmr = 1 - tpr
    for rate in (1e-2, 1e-3, 1e-4):
        if rate * found.impostors < 30:
            assert found.fnmr[rate] is None
        else:
            assert found.fnmr[rate] == pytest.approx(fnmr[fmr <= rate].min(), abs=1e-12)
    at = np.argmax(fmr >= fnmr)
    gap, after = fnmr[at - 1] - fmr[at - 1], fmr[at] - fnmr[at]
    assert found.eer == pytest.approx(fmr[at - 1] + gap / (gap + after) * (fmr[at] - fmr[at - 1]), abs=1e-12)
    curve = {(round(x, 9), round(y, 9)) for x, y in zip(fmr, fnmr, strict=True)}
    assert {(round(x, 9), round(y, 9)) for x, y, _ in found.roc} <= curve
    for false_matches, misses, threshold in found.roc:
        edge = round((threshold + 1) * bins / 2)
        assert false_matches == pytest.approx((codes[~truth] >= edge).mean())
        assert misses == pytest.approx((codes[truth] < edge).mean())


@pytest.mark.parametrize("bins", [8, 64, 1024, 2**18])
def test_what_rounding_does_stays_within_the_stated_error(bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "BINS", bins)
    random = np.random.default_rng(1)
    truth = random.random(20_000) < 0.3
    similarities = np.tanh(random.normal(np.where(truth, 0.9, 0.0), 0.4))
    codes = rounded(similarities, bins)
    found = verify(np.bincount(codes[truth], minlength=bins), np.bincount(codes[~truth], minlength=bins))
    fmr, tpr, _ = roc_curve(truth, similarities, drop_intermediate=False)
    fnmr = 1 - tpr
    at = np.argmax(fmr >= fnmr)
    exact = {
        "auc": roc_auc_score(truth, similarities),
        "eer": (fmr[at] + fnmr[at]) / 2,
        "fnmr": fnmr[fmr <= 1e-2].min(),
    }
    assert abs(found.auc - exact["auc"]) <= found.error
    assert abs(found.eer - exact["eer"]) <= found.error + 1e-4  # one impostor pair more or less
    assert found.fnmr[1e-2] is not None
    assert abs(found.fnmr[1e-2] - exact["fnmr"]) <= found.error + 1e-9
    if bins == 2**18:
        assert found.error < 1e-3


def test_a_rate_is_shown_from_thirty_expected_false_matches_on() -> None:
    genuine, impostors = (np.zeros(verification.BINS, dtype=np.int64) for _ in range(2))
    genuine[-5], impostors[:3000] = 10, 1
    assert verify(genuine, impostors).fnmr == {1e-2: 0.0, 1e-3: None, 1e-4: None}
    impostors[0] = 0
    assert verify(genuine, impostors).fnmr == {1e-2: None, 1e-3: None, 1e-4: None}


def test_perfect_and_hopeless() -> None:
    genuine, impostors = (np.zeros(verification.BINS, dtype=np.int64) for _ in range(2))
    genuine[-1], impostors[0] = 10, 5000
    perfect = verify(genuine, impostors)
    assert (perfect.auc, perfect.eer, perfect.fnmr[1e-2], perfect.error) == (1.0, 0.0, 0.0, 0.0)
    assert perfect.roc[0][:2] == (1.0, 0.0)
    assert perfect.roc[-1][:2] == (0.0, 1.0)
    hopeless = verify(genuine, genuine * 500)
    assert (hopeless.auc, hopeless.eer, hopeless.fnmr[1e-2]) == (0.5, 0.5, 1.0)
    assert hopeless.error == 1.0, "one bin holds all pairs: nothing is known of their order"


def test_refuses_pairs_of_one_kind() -> None:
    counts = np.ones(verification.BINS, dtype=np.int64)
    with pytest.raises(ValueError, match="some of both"):
        verify(counts, np.zeros_like(counts))
    with pytest.raises(ValueError, match="some of both"):
        verify(np.zeros_like(counts), counts)
