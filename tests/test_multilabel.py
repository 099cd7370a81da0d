"""Classifiers, scores and thresholds for several labels an image, against scikit-learn and plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.mosaics import make_mosaics
from stages.evaluation import fit_one_vs_rest, nearest, principal_axes
from stages.evaluation.intervals import bootstrap_means, resamplings
from stages.evaluation.label_scores import (
    average_precision,
    count,
    difference_interval,
    label_table,
    mean_average_precision,
    score_labels,
)
from stages.evaluation.label_transfer import Nearest, choose_cosine, transfer_figures
from stages.evaluation.neighbours import label_votes
from stages.evaluation.thresholds import FEW_POSITIVES, best_threshold, choose_thresholds, global_threshold


def mosaics(count=400, decay=0.7):
    made = make_mosaics(count, decay=decay)
    return torch.from_numpy(StandardScaler().fit_transform(made.pixels[:, ::2])).float(), torch.from_numpy(made.targets)


def objective(features, target, weights, bias, penalty):
    """Definition, in float64, sample by sample."""
    logits = (features.double() @ weights.double() + bias.double()).tolist()
    losses = [math.log1p(math.exp(-z if y else z)) for z, y in zip(logits, target.tolist(), strict=True)]
    return sum(losses) / len(losses) + penalty / 2 * weights.double().pow(2).sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [400, 60])  # more and fewer rows than dimensions
def test_each_class_is_that_of_scikit_learn(dtype, rows):
    features, targets = mosaics()
    features, targets = features[:rows].to(dtype), targets[:rows]
    penalties = [1.0, 1e-5, 1e-2, 1e-3]
    found = fit_one_vs_rest(features, targets, penalties)
    assert found.converged.all()
    for label in range(10):
        target = targets[:, label]
        if not target.any():
            assert (found.probabilities(features, 0)[:, label] == 0).all()
            continue
        for index, penalty in enumerate(penalties):
            model = LogisticRegression(
                C=1 / (penalty * rows), solver="newton-cholesky", tol=1e-10, max_iter=1000, l1_ratio=0
            )
            with threadpool_limits(1):
                model.fit(features.double().numpy(), target.numpy())
            weights, bias = torch.from_numpy(model.coef_[0]), torch.from_numpy(model.intercept_)
            lowest = objective(features, target, weights, bias, penalty)
            own = objective(features, target, found.weights[index, label], found.biases[index, label], penalty)
            assert own == pytest.approx(lowest, rel=3e-5 if penalty >= 1e-3 else 2e-4)
            assert found.objectives[index, label].item() == pytest.approx(own, rel=1e-5)
            if penalty >= 1e-2:
                expected = model.predict_proba(features.double().numpy())[:, 1]
                probabilities = found.probabilities(features, index)[:, label].numpy()
                np.testing.assert_allclose(probabilities, expected, atol=3e-3)


def test_classes_do_not_wait_for_one_another_nor_change_one_another():
    features, targets = mosaics()
    together = fit_one_vs_rest(features, targets, [1e-3, 1e-1])
    alone = fit_one_vs_rest(features, targets[:, 7:8], [1e-3, 1e-1])
    torch.testing.assert_close(together.weights[:, 7], alone.weights[:, 0], atol=1e-3, rtol=1e-2)
    assert len(set(together.iterations.flatten().tolist())) > 1
    few = fit_one_vs_rest(features, targets, [1e-6], max_iterations=3)
    assert not few.converged.all()


def test_standardised_weights_are_for_the_features_as_given_in_any_rotation():
    features, targets = mosaics()
    scaled = features * torch.linspace(0.1, 20, features.shape[1]) + 3
    plain = fit_one_vs_rest(features, targets, [1e-2]).probabilities(features, 0)
    for axes in (None, principal_axes(scaled, standardise=True)):
        found = fit_one_vs_rest(scaled, targets, [1e-2], standardise=True, axes=axes)
        torch.testing.assert_close(found.probabilities(scaled, 0), plain, atol=2e-3, rtol=0)


def test_a_label_of_all_rows_or_of_none_is_certain():
    features, targets = mosaics()
    targets = targets.clone()
    targets[:, 3], targets[:, 4] = True, False
    found = fit_one_vs_rest(features, targets, [1e-2, 1.0])
    assert (found.probabilities(features, 1)[:, 3] == 1).all()
    assert (found.probabilities(features, 1)[:, 4] == 0).all()
    assert (found.weights[:, 3:5] == 0).all()
    assert found.converged.all()
    constant = fit_one_vs_rest(features, targets[:, 3:5], [1e-2])
    assert constant.probabilities(features, 0)[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalties": []}, "penalties"),
        ({"penalties": [0.0]}, "penalties"),
        ({"targets": torch.zeros(3, 2, dtype=torch.bool)}, "do not fit"),
        ({"features": torch.full((400, 2), torch.nan)}, "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    features, targets = mosaics()
    given = {"features": features, "targets": targets, "penalties": [1.0]} | change
    with pytest.raises(ValueError, match=message):
        fit_one_vs_rest(given["features"], given["targets"], given["penalties"])


@st.composite
def scored(draw):
    """Scores [N, C], some of them equal, and labels that some images have."""
    rows, classes = draw(st.integers(2, 25)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = random.integers(0, draw(st.integers(1, 30)), (rows, classes)) / 8
    targets = random.random((rows, classes)) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    targets[random.integers(0, rows, classes), np.arange(classes)] = True
    return scores, targets


def slow_average_precision(scores, targets):
    """Threshold by threshold, from the definition."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        named = [bool(truth) for score, truth in zip(scores, targets, strict=True) if score >= threshold]
        total += (sum(named) / targets.sum() - recall) * sum(named) / len(named)
        recall = sum(named) / targets.sum()
    return total


@settings(max_examples=60, deadline=None)
@given(scored())
def test_average_precision_is_that_of_scikit_learn(case):
    scores, targets = case
    found = average_precision(scores, targets)
    for label in range(targets.shape[1]):
        assert found[label] == pytest.approx(slow_average_precision(scores[:, label], targets[:, label]))
        assert found[label] == pytest.approx(average_precision_score(targets[:, label], scores[:, label]))
    assert mean_average_precision(scores, targets) == pytest.approx(found.mean())


@settings(max_examples=60, deadline=None)
@given(scored(), st.floats(0, 1))
def test_f1_is_that_of_scikit_learn(case, share):
    scores, targets = case
    predicted = scores >= np.quantile(scores, share)
    counts = count(predicted, targets)
    expected = [f1_score(targets[:, one], predicted[:, one], zero_division=0) for one in range(targets.shape[1])]
    assert counts.f1 == pytest.approx(np.array(expected))
    assert counts.macro_f1 == pytest.approx(np.mean(expected))
    assert counts.micro_f1 == pytest.approx(f1_score(targets.ravel(), predicted.ravel(), zero_division=0))


def test_labels_that_no_test_image_has_are_left_out_of_means():
    scores = np.array([[0.9, 0.2, 0.8], [0.1, 0.7, 0.3]])
    targets = np.array([[True, False, False], [False, True, False]])
    predicted = scores >= 0.5
    assert np.isnan(average_precision(scores, targets)).tolist() == [False, False, True]
    assert mean_average_precision(scores, targets) == 1
    assert count(predicted, targets).macro_f1 == 1
    assert count(predicted, targets).micro_f1 == pytest.approx(2 * 2 / (3 + 2)), "what is named in vain counts there"
    table = label_table(["a", "b", "c"], scores, predicted, targets, np.array([5, 2, 0]), np.array([0.5, 0.4, np.inf]))
    assert [row["name"] for row in table] == ["c", "b", "a"], "rare labels first"
    assert table[0] == {
        "name": "c",
        "train": 0,
        "test": 0,
        "predicted": 1,
        "precision": 0.0,
        "recall": None,
        "f1": None,
        "average_precision": None,
        "threshold": None,
    }


def test_the_table_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    targets, predicted = random.random((60, 4)) < 0.3, random.random((60, 4)) < 0.4
    table = label_table([*"abcd"], random.random((60, 4)), predicted, targets, np.arange(4), np.full(4, 0.5))
    expected = np.array(precision_recall_fscore_support(targets, predicted, zero_division=0))
    found = [[row["precision"], row["recall"], row["f1"], row["test"]] for row in table]
    np.testing.assert_allclose(found, expected.T)


@pytest.mark.parametrize("grouped", [False, True])
def test_intervals_are_those_of_samples_or_groups_drawn_one_by_one(grouped):
    random = np.random.default_rng(1)
    scores, targets = random.integers(0, 12, (40, 3)) / 12, random.random((40, 3)) < [0.5, 0.2, 0.1]
    groups = np.arange(40) // 4 if grouped else None
    predicted = scores > 0.6
    found = score_labels(scores, predicted, targets, 150, 3, groups)
    members = [[row] for row in range(40)] if groups is None else np.arange(40).reshape(10, 4).tolist()
    draws = np.random.Generator(np.random.PCG64(3)).integers(0, len(members), (150, len(members)))
    maps, macros, micros = [], [], []
    for draw in draws:
        rows = [row for unit in draw for row in members[unit]]
        there = targets[rows].any(0)
        one, two = targets[rows][:, there], predicted[rows][:, there]
        maps.append(
            np.mean([average_precision_score(one[:, k], scores[rows][:, there][:, k]) for k in range(there.sum())])
        )
        macros.append(f1_score(one, two, average="macro", zero_division=0))
        micros.append(f1_score(targets[rows], predicted[rows], average="micro", zero_division=0))
    for name, values in (("map", maps), ("macro_f1", macros), ("micro_f1", micros)):
        assert found[f"{name}_ci95"] == pytest.approx(np.quantile(values, [0.025, 0.975]).tolist())
    other = scores > 0.4
    gains = [
        count(other[rows], targets[rows]).macro_f1 - count(predicted[rows], targets[rows]).macro_f1
        for draw in draws
        for rows in [[row for unit in draw for row in members[unit]]]
    ]
    interval = difference_interval(predicted, other, targets, 150, 3, groups)
    assert interval == pytest.approx(np.quantile(gains, [0.025, 0.975]))


def test_resamplings_draw_what_bootstrap_means_draws():
    values, groups = np.random.default_rng(0).random(30), np.arange(30) // 3
    for one in (None, groups):
        times = np.concatenate([*resamplings(30, 50, 7, one)])
        np.testing.assert_allclose(times @ values / times.sum(1), bootstrap_means(values, 50, 7, one))


def macro_f1(targets, predicted):
    """By label with scikit-learn, which takes a single column for two classes otherwise."""
    pairs = zip(targets.T, np.asarray(predicted).T, strict=True)
    return np.mean([f1_score(truth, named, zero_division=0) for truth, named in pairs])


def candidates(scores):
    """Thresholds that part scores in every way, from the highest down."""
    ranked = sorted(set(scores.ravel().tolist()), reverse=True)
    return [*ranked, min(0.0, *ranked)]


@settings(max_examples=60, deadline=None)
@given(scored())
def test_best_threshold_has_the_highest_f1(case):
    scores, targets = case[0][:, 0], case[1][:, 0]
    f1 = {one: f1_score(targets, scores >= one, zero_division=0) for one in candidates(scores)}
    found = best_threshold(scores, targets)
    assert f1_score(targets, scores >= found, zero_division=0) == pytest.approx(max(f1.values()))
    first = next(one for one, value in f1.items() if value > max(f1.values()) - 1e-12)
    assert (scores >= found).tolist() == (scores >= first).tolist(), "the fewest of equals"


@settings(max_examples=60, deadline=None)
@given(scored())
def test_global_threshold_has_the_highest_macro_f1(case):
    scores, targets = case
    macro = {one: macro_f1(targets, scores >= one) for one in candidates(scores)}
    found = global_threshold(scores, targets)
    first = next(one for one, value in macro.items() if value > max(macro.values()) - 1e-9)
    assert (scores >= found).tolist() == (scores >= first).tolist()


def test_a_threshold_lies_halfway_between_two_scores():
    scores, targets = np.array([0.9, 0.8, 0.4, 0.1]), np.array([True, True, False, False])
    assert best_threshold(scores, targets) == pytest.approx(0.6)
    assert best_threshold(scores, ~targets) == 0, "all are named"
    close = np.array([np.nextafter(0.5, 1), 0.5])
    assert (close >= best_threshold(close, np.array([True, False]))).tolist() == [True, False]


def test_thresholds_of_rare_labels_are_drawn_to_the_global_one():
    random = np.random.default_rng(0)
    targets = np.arange(400)[:, None] < [200, 50, 10, 0]
    scores = np.clip(0.35 * targets + random.random((400, 4)) * [0.6, 0.5, 0.3, 0.2], 0, 1)
    judged = np.array([True, True, True, False])
    found = choose_thresholds("per_class", scores, targets, judged)
    assert found.overall == global_threshold(scores[:, :3], targets[:, :3])
    own = [best_threshold(scores[:, label], targets[:, label]) for label in range(3)]
    assert found.values[:2].tolist() == own[:2], f"{FEW_POSITIVES} images are enough"
    assert found.values[2] == pytest.approx(0.2 * own[2] + 0.8 * found.overall)
    assert found.values[3] == np.inf
    assert not found.apply(scores)[:, 3].any()
    assert found.apply(scores)[:, 0].tolist() == (scores[:, 0] >= own[0]).tolist()


def test_a_label_that_cannot_be_judged_has_the_threshold_of_all():
    random = np.random.default_rng(0)
    targets = random.random((300, 3)) < 0.4
    scores = random.random((300, 3)) * 0.5 + 0.5 * targets
    scores[:, 2] = np.where(targets[:, 2], 0, 0.2)  # as of models that never saw it
    judged = np.array([True, True, False])
    for kind in ("per_class", "global", "prevalence"):
        found = choose_thresholds(kind, scores, targets, judged)
        assert found.values[2] == found.overall == global_threshold(scores[:, :2], targets[:, :2])


def test_thresholds_of_prevalence_name_as_many_as_there_are():
    random = np.random.default_rng(0)
    targets, scores = random.random((500, 3)) < [0.5, 0.1, 0.01], random.random((500, 3))
    found = choose_thresholds("prevalence", scores, targets, np.ones(3, dtype=bool))
    assert found.apply(scores).sum(0).tolist() == targets.sum(0).tolist()
    assert choose_thresholds("global", scores, targets, np.ones(3, dtype=bool)).values.tolist() == [found.overall] * 3


def test_votes_are_shares_of_weights():
    random = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(30, 5, generator=random), torch.randn(7, 5, generator=random)
    targets = torch.rand(30, 4, generator=random) < 0.4
    found = nearest(queries, gallery, 6)
    for k, temperature in ((1, 0.1), (6, 0.1), (6, 0.001), (50, 0.5)):
        votes = label_votes(found, targets, k, temperature)
        for query in range(7):
            cosines = torch.nn.functional.cosine_similarity(queries[query : query + 1].double(), gallery.double())
            chosen = sorted(range(30), key=lambda row: -cosines[row])[: min(k, 6)]
            weights = [math.exp((cosines[row] - cosines[chosen[0]]) / temperature) for row in chosen]
            for label in range(4):
                expected = sum(w for w, row in zip(weights, chosen, strict=True) if targets[row, label]) / sum(weights)
                assert votes[query, label].item() == pytest.approx(expected, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(scored(), st.integers(0, 10**6))
def test_cosine_threshold_has_the_highest_macro_f1(case, seed):
    random = np.random.default_rng(seed)
    targets = case[1]
    predicted, labels = random.random(targets.shape) < 0.5, random.random(targets.shape) < 0.5
    near = Nearest(random.integers(-4, 5, len(targets)).astype(np.float32) / 4, labels)
    found = choose_cosine(near, predicted, targets)
    scores = {math.inf: count(predicted, targets).macro_f1}
    for one in sorted(set(near.similarity.tolist()), reverse=True):
        rows = [labels[row] if near.similarity[row] >= one else predicted[row] for row in range(len(targets))]
        scores[one] = macro_f1(targets, rows)
    first = next(one for one, value in scores.items() if value > max(scores.values()) - 1e-9)
    assert (near.similarity >= found).tolist() == (near.similarity >= first).tolist()
    assert (found == math.inf) == (first == math.inf)


def test_changes_by_transfer_are_counted():
    targets = np.array([[1, 0], [1, 0], [0, 1], [1, 1], [0, 1]], dtype=bool)
    predicted = np.array([[1, 0], [0, 1], [0, 1], [1, 0], [1, 1]], dtype=bool)
    labels = np.array([[0, 1], [1, 0], [0, 1], [0, 1], [0, 1]], dtype=bool)
    near = Nearest(np.array([0.9, 0.9, 0.9, 0.9, 0.1], dtype=np.float32), labels)
    found = transfer_figures(near, predicted, targets, 0.5, 100, 0)
    assert (found["above_threshold"], found["changed"]) == (4, 3)
    assert (found["right_to_wrong"], found["wrong_to_right"]) == (1, 1)
    assert (found["before"]["right"], found["after"]["right"]) == (0.4, 0.4)
    after = np.vstack([labels[:4], predicted[4:]])
    assert found["after"]["macro_f1"] == pytest.approx(f1_score(targets, after, average="macro"))
    assert found["before"]["micro_f1"] == pytest.approx(f1_score(targets, predicted, average="micro"))
    never = transfer_figures(near, predicted, targets, math.inf, 100, 0)
    assert (never["threshold"], never["changed"], never["macro_f1_gain_ci95"]) == (None, 0, [0, 0])
    assert never["before"] == never["after"]
