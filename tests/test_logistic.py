"""Logistic regression over a path of penalties, against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from stages.evaluation import fit_logistic_path, fit_logistic_paths, principal_axes
from stages.evaluation.logistic import mean_and_deviation

DECADES = [10.0**exponent for exponent in range(2, -9, -1)]


def objective(features, labels, weights, biases, penalty):
    """Definition, in float64."""
    logits = features.double() @ weights.double().T + biases.double()
    penalised = penalty / 2 * weights.double().pow(2).sum()
    return (torch.nn.functional.cross_entropy(logits, labels) + penalised).item()


def reference(features, labels, penalty):
    """scikit-learn's solution: a second-order solver to its last digits."""
    model = LogisticRegression(
        C=1 / (penalty * len(labels)), solver="newton-cholesky", tol=1e-10, max_iter=1000, l1_ratio=0
    )
    with threadpool_limits(1):  # threads of its Cholesky decompositions stand in one another's way
        return model.fit(features.double().numpy(), labels.numpy())


def blobs(rows, dimensions, classes, distance, seed=0, dtype=torch.float32):
    """Gaussian classes; a large distance makes them separable."""
    random = torch.Generator().manual_seed(seed)
    centres = distance * torch.randn(classes, dimensions, generator=random, dtype=dtype)
    labels = torch.arange(rows) % classes
    return centres[labels] + torch.randn(rows, dimensions, generator=random, dtype=dtype), labels


def digits(standardise=True):
    features, labels = load_digits(return_X_y=True)
    if standardise:
        features = StandardScaler().fit_transform(features)
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda dtype: blobs(240, 8, 3, 0.5, dtype=dtype), id="overlapping"),
        pytest.param(lambda dtype: blobs(120, 5, 4, 5.0, dtype=dtype), id="separable"),
        pytest.param(lambda dtype: blobs(40, 90, 4, 0.3, dtype=dtype), id="more dimensions than rows"),
        pytest.param(lambda dtype: (digits()[0][:300].to(dtype), digits()[1][:300]), id="digits"),
    ],
)
def test_same_objective_and_accuracy_as_scikit_learn_over_ten_decades(make, dtype):
    features, labels = make(dtype)
    path = fit_logistic_path(features, labels, DECADES)
    assert path.converged.all()
    predictions = path.predict(features)
    for index, penalty in enumerate(DECADES):
        model = reference(features, labels, penalty)
        best = objective(features, labels, torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_), penalty)
        ours = objective(features, labels, path.weights[index], path.biases[index], penalty)
        assert ours == pytest.approx(best, rel=1e-4), penalty
        assert path.objectives[index].item() == pytest.approx(ours, rel=1e-4)
        accuracy = (predictions[index] == labels).double().mean().item()
        assert accuracy == pytest.approx(model.score(features.double().numpy(), labels.numpy()), abs=1 / len(labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_penalties_that_leave_next_to_nothing_still_rank_the_classes(dtype):
    """The weights are down to a millionth; with equal numbers of each class they alone decide."""
    features, labels = blobs(600, 20, 5, 0.2, dtype=dtype)
    penalties = [1e5, 1e4, 1e3, 1e2, 1e1]
    path = fit_logistic_path(features, labels, penalties)
    assert path.converged.all()
    for index, penalty in enumerate(penalties):
        model = reference(features, labels, penalty)
        predicted = torch.from_numpy(model.predict(features.double().numpy()))
        assert (path.predict(features)[index] == predicted).double().mean() > 0.99
        torch.testing.assert_close(
            path.weights[index].double(), torch.from_numpy(model.coef_), rtol=1e-2, atol=1e-2 * model.coef_.std()
        )


def test_a_long_path_equals_its_parts_alone_and_may_repeat_penalties():
    """Solved between others, and by itself from nothing."""
    features, labels = digits()
    features, labels = features[:400], labels[:400]
    penalties = np.logspace(-6, 3, 28).tolist()
    path = fit_logistic_path(features, labels, [*penalties, penalties[5], penalties[5]])
    assert path.converged.all()
    for index in (0, 5, 13, 20, 27):
        alone = fit_logistic_path(features, labels, [penalties[index]])
        torch.testing.assert_close(path.objectives[index], alone.objectives[0], rtol=3e-5, atol=0)
    assert torch.equal(path.weights[-1], path.weights[5])
    assert torch.equal(path.weights[-2], path.weights[5])


@pytest.mark.parametrize("penalty", [1.0, 0.1, 0.01])
def test_same_weights_as_scikit_learn_where_they_are_well_determined(penalty):
    features, labels = blobs(400, 6, 3, 0.5, dtype=torch.float64)
    path = fit_logistic_path(features, labels, [penalty], tolerance=1e-14)
    model = reference(features, labels, penalty)
    torch.testing.assert_close(path.weights[0], torch.from_numpy(model.coef_), rtol=1e-5, atol=1e-6)
    intercept = torch.from_numpy(model.intercept_)
    torch.testing.assert_close(path.biases[0], intercept - intercept.mean(), rtol=1e-5, atol=1e-6)


def test_gradient_vanishes_at_the_solution():
    """The condition of the minimum itself, by automatic differentiation, in the features as given."""
    features, labels = blobs(50, 70, 5, 0.4, dtype=torch.float64)
    path = fit_logistic_path(features, labels, [0.03], tolerance=1e-15)
    weights, biases = path.weights[0].clone().requires_grad_(), path.biases[0].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(features @ weights.T + biases, labels) + 0.03 / 2 * weights.pow(2).sum()
    loss.backward()
    assert weights.grad is not None
    assert biases.grad is not None
    assert weights.grad.abs().max() < 1e-7
    assert biases.grad.abs().max() < 1e-7


def test_two_classes_are_the_binary_model_at_half_the_penalty():
    """Two opposite weight vectors of half the length each: their squares sum to half that of the one."""
    features, labels = blobs(200, 4, 2, 0.4, dtype=torch.float64)
    path = fit_logistic_path(features, labels, [0.02], tolerance=1e-14)
    model = reference(features, labels, 0.01)
    difference = path.weights[0, 1] - path.weights[0, 0]
    torch.testing.assert_close(difference, torch.from_numpy(model.coef_[0]), rtol=1e-5, atol=1e-6)


def test_order_of_penalties_and_company_do_not_matter():
    features, labels = digits()
    features, labels = features[:300], labels[:300]
    alone = [fit_logistic_path(features, labels, [penalty]) for penalty in (1e-3, 1.0, 1e-6)]
    together = fit_logistic_path(features, labels, [1e-3, 1.0, 1e-6])
    assert together.penalties.tolist() == [1e-3, 1.0, 1e-6]
    for index, path in enumerate(alone):
        assert together.objectives[index].item() == pytest.approx(path.objectives[0].item(), rel=1e-4)


def test_sets_solved_side_by_side_equal_each_alone():
    """Sets of different size, dimension after reduction, and classes (the last one lacks the first class)."""
    features, labels = digits()
    rows = [torch.arange(0, 60), torch.arange(100, 237), torch.arange(300, 700), torch.nonzero(labels[:90])[:, 0]]
    penalties = [1e-6, 1e-2, 1.0]
    together = fit_logistic_paths(
        [features[part] for part in rows], [labels[part] for part in rows], penalties, classes=10, standardise=True
    )
    for part, path in zip(rows, together, strict=True):
        alone = fit_logistic_path(features[part], labels[part], penalties, classes=10, standardise=True)
        torch.testing.assert_close(path.objectives, alone.objectives, rtol=3e-5, atol=0)
        assert (path.predict(features[part]) == alone.predict(features[part])).double().mean() > 0.99


def test_standardising_equals_doing_so_before():
    features, labels = digits(standardise=False)
    features = features * torch.linspace(0.01, 30, 64) + 7
    penalties = [1e-4, 1e-1]
    inside = fit_logistic_path(features, labels, penalties, standardise=True)
    outside_features = torch.from_numpy(StandardScaler().fit_transform(features.double().numpy())).float()
    outside = fit_logistic_path(outside_features, labels, penalties)
    torch.testing.assert_close(inside.objectives, outside.objectives, rtol=2e-5, atol=0)
    agreement = (inside.predict(features) == outside.predict(outside_features)).double().mean()
    assert agreement > 0.999


def test_constant_dimensions_weigh_nothing_when_standardised():
    features, labels = digits(standardise=False)
    features = torch.cat([features, torch.full((len(features), 2), 0.1)], 1)
    path = fit_logistic_path(features, labels, [1e-3], standardise=True)
    assert path.weights[0, :, -2:].abs().max() == 0
    assert torch.isfinite(path.weights).all()


def test_any_axes_give_the_same_solution():
    features, labels = digits()
    axes = principal_axes(features[:900])
    assert axes is not None
    torch.testing.assert_close(axes.T @ axes, torch.eye(64), rtol=0, atol=1e-5)
    penalties = [1e-5, 1e-2]
    [given] = fit_logistic_paths([features], [labels], penalties, axes=axes)
    own = fit_logistic_path(features, labels, penalties)
    torch.testing.assert_close(given.objectives, own.objectives, rtol=3e-5, atol=0)


def test_preconditioning_keeps_iterations_few_whatever_the_scales():
    """Ill-conditioned on purpose: standard deviations over six decades, strongly correlated."""
    features, labels = blobs(3000, 30, 5, 0.7)
    mixing = torch.randn(30, 30, generator=torch.Generator().manual_seed(1))
    features = (features * torch.logspace(-3, 3, 30)) @ mixing
    path = fit_logistic_path(features, labels, DECADES)
    assert path.converged.all()
    assert path.iterations.sum() < 400


def test_class_without_rows_is_never_predicted():
    features, labels = blobs(90, 4, 3, 1.0)
    labels = torch.tensor([0, 2, 3])[labels]
    path = fit_logistic_path(features, labels, [1e-6, 1e-1], classes=5)
    assert path.biases[:, [1, 4]].tolist() == [[-np.inf, -np.inf]] * 2
    assert path.weights[:, [1, 4]].abs().max() == 0
    assert set(path.predict(features).unique().tolist()) <= {0, 2, 3}
    present = fit_logistic_path(features, torch.tensor([0, 0, 1, 2])[labels], [1e-6, 1e-1])
    torch.testing.assert_close(path.objectives, present.objectives, rtol=1e-6, atol=0)


def test_one_class_only_has_loss_zero():
    path = fit_logistic_path(torch.randn(10, 3), torch.zeros(10, dtype=torch.int64), [1e-3])
    assert path.objectives.tolist() == [0]


def test_too_few_iterations_are_reported():
    features, labels = digits()
    path = fit_logistic_path(features, labels, [1e-8], max_iterations=3)
    assert path.converged.tolist() == [False]
    assert path.iterations.tolist() == [3]


def test_collapsed_features_give_the_prior():
    labels = torch.tensor([0, 0, 0, 1])
    path = fit_logistic_path(torch.ones(4, 6), labels, [1e-8, 1.0], standardise=True)
    assert path.predict(torch.ones(2, 6)).tolist() == [[0, 0], [0, 0]]
    torch.testing.assert_close(torch.softmax(path.logits(torch.ones(1, 6), 0), 1), torch.tensor([[0.75, 0.25]]))


def test_same_bytes_each_time():
    features, labels = digits()
    first, second = (fit_logistic_path(features, labels, [1e-4, 1e-2]) for _ in range(2))
    assert torch.equal(first.weights, second.weights)


def test_mean_and_deviation_in_float64():
    features = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) * 1e-2 + torch.tensor([1e3, 0.0, 5.0])
    features[:, 2] = 0.1
    mean, deviation = mean_and_deviation(features)
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(deviation[:2], features[:, :2].double().std(0, unbiased=False))
    assert deviation[2] == 0


def test_all_is_computed_where_the_features_are():
    """With torch's device without memory as the default one: whatever were made there could not meet the features."""
    features, labels = blobs(240, 8, 3, 0.5)
    expected = fit_logistic_path(features, labels, DECADES, standardise=True)
    with torch.device("meta"):
        found = fit_logistic_path(features, labels, DECADES, standardise=True)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.predict(features), expected.predict(features))


@pytest.mark.parametrize(
    ("features", "labels", "penalties"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), [1.0]),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), [1.0]),
        (torch.zeros(2, 2), torch.tensor([0, -1]), [1.0]),
        (torch.zeros(2, 2), torch.tensor([0, 3]), [1.0]),
        (torch.full((2, 2), torch.nan), torch.tensor([0, 1]), [1.0]),
        (torch.zeros(2, 2), torch.tensor([0, 1]), [0.0]),
        (torch.zeros(2, 2), torch.tensor([0, 1]), [torch.inf, 1.0]),
        (torch.zeros(2, 2), torch.tensor([0, 1]), [torch.nan]),
        (torch.zeros(2, 2), torch.tensor([0, 1]), []),
    ],
)
def test_refuses_what_does_not_fit(features, labels, penalties):
    with pytest.raises(ValueError, match=r"features|labels|penalties"):
        fit_logistic_path(features, labels, penalties, classes=2)
