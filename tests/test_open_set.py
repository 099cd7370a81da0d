"""Answers with `new` among them, their threshold, and known against new: plain loops, and scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from stages.evaluation import (
    Answers,
    answer_queries,
    auroc,
    choose_threshold,
    map_at_5_interval,
    open_set_curve,
    oscr,
    oscr_points,
    similarity,
)

DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.6, 0.8]])
NEW = -2


@pytest.fixture(params=[2**20, 70, 1], ids=["one tile", "many tiles", "a query each"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "TILE_PAIRS", request.param)


def identities_by_loops(similarities: list[float], labels: list[int], itself: int) -> list[tuple[int, float]]:
    """Identities of a gallery with their best similarity, nearest first, of equals that of the smaller row."""
    rows = [row for row in range(len(labels)) if row != itself and labels[row] >= 0]
    rows.sort(key=lambda row: (-similarities[row], row))
    found: dict[int, float] = {}
    for row in rows:
        found.setdefault(labels[row], similarities[row])
    return list(found.items())


def score_by_loops(identities: list[tuple[int, float]], right: int, threshold: float) -> float:
    """1 / place of the right answer in the list of five with `new` at its place."""
    listed = [label for label, best in identities if best >= threshold]
    listed += [NEW] + [label for label, best in identities if best < threshold]
    return 1 / (listed[:5].index(right) + 1) if right in listed[:5] else 0.0


def world(seed: int, lattice: bool = False) -> tuple[Answers, list[list[tuple[int, float]]], list[int]]:
    """Answers to queries, of which some are rows of the gallery; the identities and right answers by loops."""
    random = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        axes, anywhere = torch.randint(5, (count,), generator=random), torch.randn(count, 3, generator=random)
        return DIRECTIONS[axes] if lattice else anywhere

    gallery, labels = draw(24), torch.randint(-1, 8, (24,), generator=random)
    same = torch.cat([torch.nonzero(labels >= 0)[:9, 0], torch.full((11,), -1)])
    queries, wanted = gallery[same].clone(), labels[same].clone()
    queries[9:], wanted[9:] = draw(11), torch.randint(0, 12, (11,), generator=random)
    wanted[-2], wanted[-1] = 50, int(labels.max())  # one at least of either kind
    found = answer_queries(queries, gallery, wanted, labels, same)
    numbers = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(gallery).T
    identities = [
        identities_by_loops(numbers[row].tolist(), labels.tolist(), int(same[row])) for row in range(len(queries))
    ]
    right = [label if label in dict(one) else NEW for one, label in zip(identities, wanted.tolist(), strict=True)]
    return found, identities, right


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("lattice", [False, True], ids=["any", "many equal"])
@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_identities(seed: int, lattice: bool) -> None:
    found, identities, right = world(seed, lattice)
    for row, expected in enumerate(identities):
        listed = expected[:5]
        assert found.identity[row].tolist() == [label for label, _ in listed] + [-1] * (5 - len(listed))
        best = [value for _, value in listed]
        np.testing.assert_allclose(found.similarity[row][: len(best)], best, atol=1e-6)
        assert (found.similarity[row][len(best) :] == -np.inf).all()
    assert found.is_new.tolist() == [one == NEW for one in right]


@pytest.mark.parametrize("threshold", [-1.1, -0.4, 0.0, 0.6, 0.8, 0.97, 1.1])
@pytest.mark.parametrize("lattice", [False, True], ids=["any", "many equal"])
def test_scores_with_new_in_its_place(threshold: float, lattice: bool) -> None:
    found, identities, right = world(3, lattice)
    # Those of the tiles, so that what is equal to a threshold is so here too.
    exact = [[(label, round(best, 5)) for label, best in one] for one in identities]
    rounded = Answers(found.similarity.round(5), found.identity, found.label, found.is_new)
    expected = [score_by_loops(one, wanted, threshold) for one, wanted in zip(exact, right, strict=True)]
    np.testing.assert_allclose(rounded.scores(threshold), expected)
    for share in (0.0, 0.25, 0.9):
        new = [score for score, wanted in zip(expected, right, strict=True) if wanted == NEW]
        known = [score for score, wanted in zip(expected, right, strict=True) if wanted != NEW]
        mean = share * sum(new) / len(new) + (1 - share) * sum(known) / len(known)
        assert rounded.map_at_5(threshold, share) == pytest.approx(mean)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9]))
def test_no_threshold_is_better_than_the_chosen_one(seed: int, lattice: bool, share: float) -> None:
    found = world(seed, lattice)[0]
    values = np.unique(found.similarity[np.isfinite(found.similarity)])
    candidates = [-2.0, *values.tolist(), *((values[1:] + values[:-1]) / 2).tolist(), 2.0]
    best = max(found.map_at_5(one, share) for one in candidates)
    assert found.map_at_5(choose_threshold(found, share), share) == pytest.approx(best, abs=1e-12)


def test_a_threshold_is_chosen_in_the_middle_and_at_the_ends_for_good() -> None:
    """Two identities: known queries at 0.9 and 0.8, new ones at 0.4 and 0.2."""
    similarities = np.full((4, 5), -np.inf)
    similarities[:, 0], similarities[:, 1] = [0.9, 0.8, 0.4, 0.2], [0.1, 0.1, 0.1, 0.1]
    identity = np.full((4, 5), -1)
    identity[:, 0], identity[:, 1] = 0, 1
    apart = Answers(similarities, identity, np.array([0, 0, 7, 8]), np.array([False, False, True, True]))
    assert choose_threshold(apart, 0.5) == pytest.approx(0.6)
    assert apart.map_at_5(0.6, 0.5) == 1.0
    assert choose_threshold(apart, 0.0) == -1.0, "`new` is never right"
    mixed = Answers(1 - similarities, apart.identity, apart.label, apart.is_new)
    assert choose_threshold(mixed, 0.99) > 1.0, "nearly all are new"


def test_the_curve_moves_weights_and_thresholds() -> None:
    chosen_on, found = world(1)[0], world(2)[0]
    threshold = choose_threshold(chosen_on, 0.2)
    curve = open_set_curve(chosen_on, found, (0.0, 0.2, 0.9), threshold)
    assert [point["new_share"] for point in curve] == [0.0, 0.2, 0.9]
    for point in curve:
        share, own = point["new_share"], choose_threshold(chosen_on, point["new_share"])
        assert point["threshold_share_known"] == own
        assert point["map_5"] == found.map_at_5(threshold, share)
        assert point["map_5_share_known"] == found.map_at_5(own, share)
    assert curve[1]["map_5"] == curve[1]["map_5_share_known"]
    known, new = found.scores(threshold)[~found.is_new].mean(), found.scores(threshold)[found.is_new].mean()
    assert curve[2]["map_5"] == pytest.approx(0.1 * known + 0.9 * new), "a straight line, without noise"


@pytest.mark.parametrize("lattice", [False, True], ids=["any", "many equal"])
@pytest.mark.parametrize("seed", range(4))
def test_known_against_new(seed: int, lattice: bool) -> None:
    found, identities, right = world(seed, lattice)
    best = found.similarity[:, 0]
    assert auroc(found) == pytest.approx(roc_auc_score(~found.is_new, best))
    known, new = [row for row in range(20) if right[row] != NEW], [row for row in range(20) if right[row] == NEW]
    false_positives, correct = [0.0], [0.0]
    for threshold in sorted(set(best.tolist()), reverse=True):
        false_positives.append(sum(best[row] >= threshold for row in new) / len(new))
        correct.append(
            sum(best[row] >= threshold and identities[row][0][0] == right[row] for row in known) / len(known)
        )
    area = sum(
        (false_positives[at + 1] - false_positives[at]) * (correct[at + 1] + correct[at]) / 2
        for at in range(len(correct) - 1)
    )
    assert oscr(found) == pytest.approx(area)
    np.testing.assert_allclose(oscr_points(found), list(zip(false_positives, correct, strict=True)))
    assert len(oscr_points(found, count=3)) <= 4
    assert oscr_points(found, count=3)[-1] == pytest.approx((1.0, correct[-1]))


def test_the_interval_draws_known_and_new_identities_apart() -> None:
    found = world(5)[0]
    scores = found.scores(0.5)
    low, high = map_at_5_interval(found, 0.5, 0.3, 200, seed=4)
    means = np.zeros(200)
    for stream, (part, share) in enumerate([(~found.is_new, 0.7), (found.is_new, 0.3)]):
        random = np.random.Generator(np.random.PCG64(8 + stream))
        identities = list(dict.fromkeys(found.label[part].tolist()))
        for sample in range(200):
            drawn = [identities[place] for place in random.integers(0, len(identities), len(identities))]
            values = [value for one in drawn for value in scores[part & (found.label == one)]]
            means[sample] += share * sum(values) / len(values)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert low <= found.map_at_5(0.5, 0.3) <= high


def test_refuses_queries_of_one_kind() -> None:
    found = world(0)[0]
    known = ~found.is_new
    closed = Answers(found.similarity[known], found.identity[known], found.label[known], found.is_new[known])
    with pytest.raises(ValueError, match="an open set has known ones"):
        closed.map_at_5(0.5, 0.2)
