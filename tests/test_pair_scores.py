"""Verification by a head of pairs against loops over all pairs: numbers, scores, samples, and their order in bins."""

import math
from typing import Literal

import numpy as np
import pytest
import torch
from overlaps import OVERLAPS, overlapping
from scipy.special import expit, logit
from torch import Tensor, nn

from stages.evaluation import pair_scores, probability_of, score_pairs, verification, verify
from stages.evaluation.pair_scores import CrossPairs, ScoredPairs, squash
from stages.models import build_head
from stages.models.heads import PairHead

KINDS: tuple[Literal["concatenated", "difference"], ...] = ("concatenated", "difference")


def make_head(kind: Literal["concatenated", "difference"], dimension: int = 4) -> PairHead:
    torch.manual_seed(1)
    head = build_head(kind, dimension)
    assert isinstance(head, PairHead)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_score_as_the_head_does(kind: Literal["concatenated", "difference"]) -> None:
    head = make_head(kind).double()
    left, right = torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head.score_parts(head.parts(left)[0], head.parts(right)[1]), head(left, right))


# Numbers


@pytest.mark.parametrize(("queries", "gallery"), [(0, 5), (5, 1), (12, 20), (20, 12)])
def test_every_pair_has_one_number(queries: int, gallery: int) -> None:
    random = np.random.default_rng(0)
    asked, there = random.integers(0, 4, queries), random.integers(0, 5, gallery)
    pairs = CrossPairs(asked, there)
    wanted: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for query in range(queries):
        for row in range(gallery):
            wanted[bool(asked[query] == there[row])].add((query, row))
    for kind, count, at in (
        (True, pairs.genuine, pairs.genuine_at),
        (False, pairs.impostors, pairs.impostors_at),
    ):
        query, row = at(np.arange(count))
        assert count == len(wanted[kind])
        assert {*zip(query.tolist(), row.tolist(), strict=True)} == wanted[kind]
    assert pairs.genuine + pairs.impostors == queries * gallery


# Scores


def by_loops(
    head: PairHead, queries: Tensor, gallery: Tensor, labels: list[int], others: list[int], same: list[int]
) -> list[tuple[bool, float, float]]:
    """Every pair once: whether it is genuine, and its probabilities in both orders."""
    seen: set[frozenset[tuple[str, int]]] = set()
    found = []
    for query in range(len(queries)):
        for row in range(len(gallery)):
            one = ("gallery", same[query]) if same[query] >= 0 else ("query", query)
            pair = frozenset([one, ("gallery", row)])
            if labels[query] < 0 or others[row] < 0 or len(pair) == 1 or pair in seen:
                continue
            seen.add(pair)
            a, b = queries[query][None].double(), gallery[row][None].double()
            one_way, other_way = float(expit(head(a, b).item())), float(expit(head(b, a).item()))
            found.append((labels[query] == others[row], one_way, other_way))
    return found


def bins_of(probabilities: np.ndarray, bins: int) -> np.ndarray:
    odds = logit(probabilities)
    return np.floor((odds / (1 + np.abs(odds)) + 1) * bins / 2).astype(np.int64).clip(0, bins - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [2**22, 40])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_each_pair_is_scored_once_in_both_orders(
    kind: Literal["concatenated", "difference"], at_once: int, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_scores, "BINS", 64)
    monkeypatch.setattr(pair_scores, "NUMBERS_AT_ONCE", at_once)
    queries, gallery, wanted, labels, same = overlapping(overlap)
    head = make_head(kind).double()
    found = score_pairs(
        head.parts(queries.double()), head.parts(gallery.double()), head.score_parts, wanted, labels, same, seed=0
    )
    pairs = np.array(by_loops(head, queries, gallery, wanted.tolist(), labels.tolist(), same.tolist()))
    is_genuine, bins = pairs[:, 0] == 1, bins_of(pairs[:, 1:].mean(axis=1), 64)
    assert found.genuine.tolist() == np.bincount(bins[is_genuine], minlength=64).tolist()
    assert found.impostors.tolist() == np.bincount(bins[~is_genuine], minlength=64).tolist()
    assert found.asymmetry == pytest.approx(np.abs(pairs[:, 1] - pairs[:, 2]).mean(), abs=1e-9)
    assert (found.asymmetry > 1e-3) == (kind == "concatenated")
    assert not found.sampled


def test_without_a_known_label_there_is_no_pair() -> None:
    parts = (torch.ones(2, 3), torch.ones(2, 3))
    labels, same = torch.tensor([-1, -1]), torch.tensor([-1, -1])
    found = score_pairs(parts, parts, lambda one, other: one[:, 0], labels, torch.zeros(2).long(), same, 0)
    assert found.genuine.sum() == found.impostors.sum() == found.asymmetry == 0


# Samples


def sample(most: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[ScoredPairs, list[tuple[int, int]]]:
    """Scores of all images among themselves that say which pair it was, and those that were asked for."""
    monkeypatch.setattr(pair_scores, "MOST_PAIRS", most)
    images = 60
    labels = torch.arange(images) % 6
    scored: list[tuple[int, int]] = []

    def score(first: Tensor, second: Tensor) -> Tensor:
        scored.extend(zip(first[:, 0].int().tolist(), second[:, 0].int().tolist(), strict=True))
        return (first[:, 0] - second[:, 0]) / 10

    parts = (torch.arange(images).float()[:, None], torch.arange(images).float()[:, None])
    found = score_pairs(parts, parts, score, labels, labels, torch.arange(images), seed)
    return found, scored


def test_above_a_number_of_pairs_a_sample_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 images of 6 classes: 600 of 3,600 are genuine, those of an image with itself and the other way round too."""
    whole, asked = sample(3600, 0, monkeypatch)
    assert (whole.genuine.sum(), whole.impostors.sum(), whole.sampled) == (6 * 45, 1770 - 270, False)
    for most in (3599, 2000, 400):
        found, scored = sample(most, 0, monkeypatch)
        assert found.sampled
        assert len(scored) == len(set(scored)) == 2 * (found.genuine.sum() + found.impostors.sum())
        assert {*scored} <= {*asked}
        drawn = min(600, most // 2)
        # About half of what is drawn is the other way round, or an image with itself.
        for counts, count in ((found.genuine.sum(), drawn), (found.impostors.sum(), min(3000, most - drawn))):
            assert abs(counts / count - 0.5) < 0.05 + 4.5 * math.sqrt(0.25 / count)
    first, second, other = (sample(400, seed, monkeypatch)[1] for seed in (0, 0, 1))
    assert first == second != other


# What verification makes of them


def test_what_was_squashed_keeps_the_order_of_sure_scores() -> None:
    one, other = torch.tensor([[-30.0, -2, 0, 1, 25, 40], [-30.0, 3, 0, 1, 24, 40]]).double()
    squashed = squash(one, other)
    mean = (one.sigmoid() + other.sigmoid()) / 2
    moderate = mean[1:4]
    expected = torch.logit(moderate)
    torch.testing.assert_close(squashed[1:4], expected / (1 + expected.abs()))
    assert (squashed[[0, 3, 4, 5]].diff() > 0).all()
    bins = ((squashed + 1) * (verification.BINS // 2)).long()
    assert bins[4] != bins[5], "both are 1 to single precision"
    for value, wanted in zip(squashed.tolist(), mean.tolist(), strict=True):
        assert probability_of(value) == pytest.approx(wanted)
    assert (probability_of(-1.0), probability_of(1.0)) == (0.0, 1.0)
    assert squash(torch.tensor([-200.0, 200.0]), torch.tensor([-200.0, 200.0])).abs().max() < 1


def test_errors_are_those_of_the_probabilities() -> None:
    random = np.random.default_rng(0)
    truth = random.random(4000) < 0.2
    scores = torch.from_numpy(random.normal(np.where(truth, 12.0, 9.0), 2.0))
    bins = ((squash(scores, scores).numpy() + 1) * (verification.BINS // 2)).astype(np.int64)
    genuine, impostors = (np.bincount(bins[kind], minlength=verification.BINS) for kind in (truth, ~truth))
    found = verify(genuine, impostors)
    for false_matches, misses, threshold in found.roc[1:-1]:
        at = probability_of(threshold)
        probabilities = expit(scores.numpy())
        assert false_matches == pytest.approx((probabilities[~truth] >= at).mean(), abs=2 / 3000)
        assert misses == pytest.approx((probabilities[truth] < at).mean(), abs=2 / 700)
