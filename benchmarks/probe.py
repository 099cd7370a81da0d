"""The linear probe and the nearest neighbours of it against scikit-learn and the bare arithmetic.

    python -m benchmarks.probe [--quick] [--third] [--data DIR] [--device cpu]

- Path: a multinomial logistic regression for each of 45 penalties from 1e-6 to 1e5 (lambda on the mean loss), as in
  Kornblith et al. 2019, on 50,000 x 512 standardised features of 10 classes, against scikit-learn's LogisticRegression
  (lbfgs) in a loop over the same penalties. Each contender runs at the loosest tolerance with which all its objectives
  lie within 1e-4 (relative) of the minimum, computed here, in float64, from the weights; of ours it is asked as
  well that its accuracy on 10,000 test rows is within 0.1 point of that of the exact solutions (ours in float64, to
  1e-9). scikit-learn is tried in float32 and float64, warm-started down the path and cold; what is fastest counts.
  Its settings are chosen on every third of the penalties; --third compares on these only, since it takes minutes for
  all of them.
- Neighbours: the 200 nearest by cosine of 10,000 queries in 50,000 x 512, against the matrix product and top-k alone
  (`limit`), the same with rows to be normalised in plain torch, and scikit-learn's brute force.
- Growth: one penalty on 20,000 x 128, with more and more classes; at 100,000 classes a few evaluations on 100,000 rows.

Features are made: clusters in 96 dimensions of decaying variance, seen through a random layer with ReLU. With --data,
CIFAR-10 as folders (train/<class>/*.jpg, test/...), the path is compared on random features of the images as well: 8x8
means through a random layer with ReLU.
"""

import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from benchmarks.harness import Comparison, Row, alternate, arguments, exponent, fastest, peak_bytes, report
from benchmarks.image_files import cifar10
from stages.evaluation import fit_logistic_path, nearest

CLUSTERS_OF_A_CLASS, LATENT = 8, 96
OBJECTIVE, ACCURACY = 1e-4, 1e-3
"""How far objectives (relative) and accuracies may lie from the best."""
TOLERANCES = {
    "ours": (1e-4, 3e-5, 1e-5, 3e-6, 1e-6),
    "scikit-learn": (1e-3, 3e-4, 1.5e-4, 1e-4, 7e-5, 5e-5, 3e-5, 1e-5),
}
GROWTH_PENALTY = 1e-3
EVALUATIONS_OF_MOST = 3


class Problem(NamedTuple):
    """Rows to learn from [N, D] and to test on, with labels."""

    features: Tensor
    labels: Tensor
    test_features: Tensor
    test_labels: Tensor


class Weights(NamedTuple):
    """What a contender found for each penalty: [P, C, D] and [P, C]."""

    weights: Tensor
    biases: Tensor


Fit = Callable[[Tensor, Tensor, Sequence[float]], Weights]


def ours(tolerance: float, features: Tensor, labels: Tensor, penalties: Sequence[float]) -> Weights:
    path = fit_logistic_path(features, labels, penalties, tolerance=tolerance)
    return Weights(path.weights, path.biases)


def scikit_learn(
    dtype: str, warm_start: bool, tolerance: float, features: Tensor, labels: Tensor, penalties: Sequence[float]
) -> Weights:
    rows, labels = features.cpu().numpy().astype(dtype, copy=False), labels.cpu()
    model: Any = LogisticRegression(tol=tolerance, max_iter=10_000, warm_start=warm_start)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of line searches at the end of what float32 can tell
        for penalty in sorted(penalties, reverse=True):
            model.C = 1 / (penalty * len(features))
            model.fit(rows, labels.numpy())
            found[penalty] = torch.from_numpy(model.coef_.copy()), torch.from_numpy(model.intercept_.copy())
    return Weights(*(torch.stack([found[penalty][part] for penalty in penalties]) for part in (0, 1)))


def judge(problem: Problem, found: Weights, penalties: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Objectives and accuracies on test, [P] each, in float64."""
    weights, biases = (part.to(problem.features.device, torch.float64) for part in found)
    losses, right = weights.new_zeros(len(penalties)), weights.new_zeros(len(penalties))
    for rows, labels in zip(problem.features.split(5000), problem.labels.split(5000), strict=True):
        logits = torch.einsum("nd,pcd->pnc", rows.double(), weights) + biases[:, None]
        own = logits.gather(2, labels[None, :, None].expand(len(penalties), -1, 1))[..., 0]
        losses += (logits.logsumexp(2) - own).sum(1) / len(problem.labels)
    for rows, labels in zip(problem.test_features.split(5000), problem.test_labels.split(5000), strict=True):
        logits = torch.einsum("nd,pcd->pnc", rows.double(), weights) + biases[:, None]
        right += (logits.argmax(2) == labels).sum(1) / len(problem.test_labels)
    return losses + weights.new_tensor(penalties) / 2 * weights.square().sum((1, 2)), right


def made_features(rows: int, test: int, dimensions: int, classes: int = 10) -> Problem:
    """Clusters of decaying variance through a random layer with ReLU."""
    random = torch.Generator().manual_seed(0)
    scale = torch.arange(1, LATENT + 1).float().rsqrt()
    clusters = torch.randn(classes * CLUSTERS_OF_A_CLASS, LATENT, generator=random) * 0.55
    layer = torch.randn(LATENT, dimensions, generator=random)
    shift = torch.randn(dimensions, generator=random)
    cluster = torch.randint(len(clusters), (rows + test,), generator=random)
    latent = (clusters[cluster] + torch.randn(rows + test, LATENT, generator=random)) * scale
    features = latent @ layer + 0.3 * torch.randn(rows + test, dimensions, generator=random) + shift
    return standardised(features.relu_(), cluster % classes, rows)


def image_features(folder: Path, rows: int, test: int, dimensions: int) -> Problem:
    """8x8 means of CIFAR-10's images through a random layer with ReLU."""
    random = torch.Generator().manual_seed(0)
    classes = sorted(path.name for path in (folder / "train").iterdir())
    means, labels = [], []
    for split, count in (("train", rows), ("test", test)):
        for label, name in enumerate(classes):
            for path in sorted((folder / split / name).iterdir())[: count // len(classes)]:
                pixels = torch.from_numpy(simplejpeg.decode_jpeg(path.read_bytes()))  # [32, 32, 3]
                means.append(pixels.view(8, 4, 8, 4, 3).float().mean((1, 3)).flatten())
                labels.append(label)
    parts = torch.stack(means)
    parts = (parts - parts.mean(0)) / parts.std(0)
    layer = torch.randn(parts.shape[1], dimensions, generator=random) / parts.shape[1] ** 0.5
    return standardised((parts @ layer).relu_(), torch.tensor(labels), rows // len(classes) * len(classes))


def standardised(features: Tensor, labels: Tensor, rows: int) -> Problem:
    mean, deviation = features[:rows].mean(0), features[:rows].std(0)
    features = (features - mean) / deviation
    return Problem(features[:rows], labels[:rows], features[rows:], labels[rows:])


def on(device: str, problem: Problem) -> Problem:
    """The same on a device."""
    return Problem(*(part.to(device) for part in problem))


class Timed(NamedTuple):
    """One setting of a contender, and how long it took."""

    name: str
    fit: Fit
    seconds: float


def compare_paths(
    comparison: Comparison, name: str, problem: Problem, penalties: list[float], is_third: bool, runs: int
) -> float:
    """A row for the path; how many times faster ours is."""
    some = penalties[::3] if len(penalties) > 15 else penalties
    peers = {
        f"{dtype}, {'warm' if warm else 'cold'}": partial(scikit_learn, dtype, warm)
        for warm in (True, False)
        for dtype in ("float32", "float64")
    }
    chosen = {
        "ours": choose({"ours": ours}, TOLERANCES["ours"], problem, penalties, ACCURACY),
        "scikit-learn": choose(peers, TOLERANCES["scikit-learn"], problem, some, 1.0),
    }
    fits = {peer: best.fit for peer, best in chosen.items()}
    size = f"{len(problem.features):,} x {problem.features.shape[1]}, {name}"
    shared = some if is_third else penalties
    taken = alternate(
        {peer: partial(fit, problem.features, problem.labels, shared) for peer, fit in fits.items()},
        runs,
        warm_up=0,
        device=comparison.device,
    )
    settings = {peer: best.name for peer, best in chosen.items()}
    case = f"{len(shared)} penalties, {size}"
    comparison.rows.append(Row(case, taken, settings))
    comparison.headline = comparison.headline or case
    if len(shared) < len(penalties):
        whole = {"ours": partial(fits["ours"], problem.features, problem.labels, penalties)}
        taken_by_all = alternate(whole, runs, warm_up=0, device=comparison.device)
        comparison.rows.append(Row(f"{len(penalties)} penalties, {size}", taken_by_all))
    return taken["scikit-learn"] / taken["ours"]


def choose(
    kinds: Mapping[str, Callable[..., Weights]],
    tolerances: Sequence[float],
    problem: Problem,
    penalties: list[float],
    accuracy: float,
) -> Timed:
    """The fastest kind, each at the loosest tolerance that is exact enough."""
    best, accuracies = judge(problem, ours(1e-9, problem.features.double(), problem.labels, penalties), penalties)
    chosen: Timed | None = None
    for name, kind in kinds.items():
        last = float("inf")
        for tolerance in tolerances:
            fit: Fit = partial(kind, tolerance)
            started = time.perf_counter()
            found = fit(problem.features, problem.labels, penalties)
            found.weights.sum().item()  # it is there
            seconds = time.perf_counter() - started
            values, right = judge(problem, found, penalties)
            above, apart = float((values / best - 1).max()), float((right - accuracies).abs().max())
            timed = Timed(f"{name}, tolerance {tolerance:g}", fit, seconds)
            print(f"{timed.name}: {seconds:.2f} s, objective +{above:.1e}, accuracy {apart:.2%} off", file=sys.stderr)
            if chosen and seconds > chosen.seconds:
                break  # slower already
            if above <= OBJECTIVE and apart <= accuracy + 1e-9:
                chosen = timed
                break
            if above > 0.99 * last > OBJECTIVE:
                break  # it gets no better
            last = above
    assert chosen is not None, "none was exact enough"
    return chosen


def bare_product(tile: int, queries: Tensor, gallery: Tensor, k: int) -> None:
    """The matrix product and top-k, of rows that are normalised already."""
    for part in queries.split(tile):
        (part @ gallery.T).topk(k, dim=1)


def plain_torch(tile: int, queries: Tensor, gallery: Tensor, k: int) -> None:
    normalise = torch.nn.functional.normalize
    bare_product(tile, normalise(queries, dim=1), normalise(gallery, dim=1), k)


def brute_force(queries: Tensor, gallery: Tensor, k: int) -> None:
    model: Any = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine")
    model.fit(gallery.numpy()).kneighbors(queries.numpy())


def compare_neighbours(comparison: Comparison, problem: Problem, k: int, runs: int, device: str) -> None:
    gallery, queries = problem.features, problem.test_features
    unit_queries, unit_gallery = (torch.nn.functional.normalize(rows, dim=1) for rows in (queries, gallery))
    tiles = (128, 512, 2048)
    tile, bare = fastest(
        {f"{tile}": partial(bare_product, tile, unit_queries, unit_gallery, k) for tile in tiles}, device
    )
    plain_tile, plain = fastest({f"{tile}": partial(plain_torch, tile, queries, gallery, k) for tile in tiles}, device)
    contenders = {"ours": partial(nearest, queries, gallery, k), "limit": bare, "torch": plain}
    if device == "cpu":
        contenders["scikit-learn"] = partial(brute_force, queries, gallery, k)
    taken = alternate(contenders, runs, device=device)
    case = f"{k} nearest of {len(queries):,} in {len(gallery):,} x {gallery.shape[1]}"
    settings = {"limit": f"{tile} queries at once", "torch": f"{plain_tile} queries at once"}
    comparison.rows.append(Row(case, taken, settings))
    comparison.ratio |= {"knn_limit": taken["limit"] / taken["ours"], "knn_torch": taken["torch"] / taken["ours"]}
    if "scikit-learn" in taken:
        comparison.ratio["knn_sklearn"] = taken["scikit-learn"] / taken["ours"]


def rows_of_many_classes(classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Features [count, 128] about a centre for each class, and labels."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, 128, generator=random)
    scale = torch.arange(1, 129).float().rsqrt()
    return (centres[labels] + torch.randn(count, 128, generator=random)) * scale, labels


def fit_few(features: Tensor, labels: Tensor, *, warm_up: bool) -> None:
    """Some evaluations, for the memory that they take."""
    rows = slice(0, 2000 if warm_up else None)
    fit_logistic_path(features[rows], labels[rows] % 10 if warm_up else labels, [GROWTH_PENALTY], max_iterations=2)


def growth(comparison: Comparison, rows: int, counts: Sequence[int], most: int | None) -> None:
    """A row for each number of classes: seconds of one penalty, and of an evaluation of its objective.

    Args:
        most: a last number of classes, with a row for each of them and EVALUATIONS_OF_MOST evaluations only.
    """
    sizes = [(classes, rows, 500) for classes in counts] + ([(most, most, EVALUATIONS_OF_MOST)] if most else [])
    seconds, by_row, memory = [], [], []
    for classes, count, most_evaluations in sizes:
        features, labels = (part.to(comparison.device) for part in rows_of_many_classes(classes, count))
        started = time.perf_counter()
        path = fit_logistic_path(features, labels, [GROWTH_PENALTY], max_iterations=most_evaluations)
        seconds.append(time.perf_counter() - started)
        evaluation = seconds[-1] / float(path.iterations)
        by_row.append(evaluation / count)
        solved = {"ours": seconds[-1]} if bool(path.converged) else {}
        case = f"{classes:,} classes, {count:,} x 128, penalty {GROWTH_PENALTY:g}"
        comparison.rows.append(Row(case, solved | {"an evaluation": evaluation}))
        if comparison.device == "cpu":
            memory.append(peak_bytes(fit_few, features, labels))
            comparison.rows.append(Row(f"{case}, memory at its peak", {"ours": memory[-1] / 2**20}, unit="MiB"))
    growing = {"seconds of one penalty": seconds[: len(counts)], "seconds of an evaluation, by row,": by_row}
    growing |= {"bytes": memory} if memory else {}
    for what, taken in growing.items():
        numbers = [classes for classes, _, _ in sizes][: len(taken)]
        comparison.notes.append(
            f"{what} grow with classes to the power of {exponent(numbers, taken):.2f}, "
            f"from {numbers[-2]:,} to {numbers[-1]:,} of {exponent(numbers[-2:], taken[-2:]):.2f}"
        )


def main() -> None:
    options = arguments(__doc__, third="compare on every third of the penalties only")
    rows, test, dimensions, count = (10_000, 10_000, 128, 12) if options.quick else (50_000, 10_000, 512, 45)
    penalties = [float(penalty) for penalty in np.logspace(-6, 5, count)]
    runs = 3 if options.quick else 1
    made = on(options.device, made_features(rows, test, dimensions))
    comparison = Comparison("probe", "s", "", runs=runs, device=options.device)
    comparison.ratio["sklearn"] = compare_paths(comparison, "made", made, penalties, options.third, runs)
    folder = cifar10(options.data)
    if folder:
        images = on(options.device, image_features(folder, rows, test, dimensions))
        comparison.ratio["sklearn_images"] = compare_paths(comparison, "images", images, penalties, options.third, runs)
    compare_neighbours(comparison, made, 200, 3, options.device)
    if options.quick:
        growth(comparison, 2_000, (10, 100, 1_000), None)
    else:
        growth(comparison, 20_000, (10, 100, 1_000, 10_000), 100_000)
    report(comparison)


if __name__ == "__main__":
    main()
