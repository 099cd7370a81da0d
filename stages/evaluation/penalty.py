"""A logistic regression whose penalty is chosen on rows held out of its training rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.evaluation.features import Features
from stages.evaluation.logistic import LogisticPath, fit_logistic_paths, principal_axes

SCORED, COMPARED = 1e-6, 1e-5
"""Tolerance of the objective, relative: of fits with all labels or on test, and of the many that compare penalties by
folds of a subset."""


def fixed_penalty(classes: int) -> float:
    """The penalty where no training image can tell penalties apart: with fewer than two labels a class, or where the
    encoder learned from all of them.

    It is scikit-learn's C = 1 with one label a class (and with ten labels, where classes are fewer): 1 / classes. The
    penalty is on the mean loss, of which a class of many has a small part: one number for all would leave nothing of
    the weights of thousands. It was not tuned.
    """
    return 1 / max(classes, 10)


def spaced_penalties(smallest: float, largest: float, count: int) -> list[float]:
    """Penalties evenly spaced in their logarithm; six digits, so that files say 1e-05, not 9.999999999999999e-06."""
    return [float(f"{one:.6g}") for one in np.geomspace(smallest, largest, count)]


@dataclass(frozen=True)
class Choice:
    """A penalty, and how it was come to."""

    penalty: float
    path: list[dict[str, float]]
    """Accuracy on held-out training images for each penalty that was tried; empty: it is the fixed one."""
    held_out: int
    at_edge: bool

    @property
    def fixed(self) -> bool:
        return not self.path


class Solver:
    """Logistic regressions on features that are standardised by the rows of each fit; counts what did not converge.

    Args:
        smallest, largest, count: the penalties that are tried, evenly spaced in their logarithm.
        classes: C, of all fits.
    """

    def __init__(self, smallest: float, largest: float, count: int, classes: int, max_iterations: int):
        self.penalties = spaced_penalties(smallest, largest, count)
        self.classes, self.max_iterations = classes, max_iterations
        self.fits = self.not_converged = 0

    def fit(self, part: Features, masks: Sequence[np.ndarray]) -> tuple[Choice, LogisticPath]:
        """Choose a penalty by rows held out of `part`, and fit it to all of them.

        Args:
            masks: bool [N], true for held-out rows: one part, or several folds; with none at all, and with fewer than
                two rows a class, the penalty is the fixed one.
        """
        held = [torch.from_numpy(mask) for mask in masks if mask.any()]
        axes = None
        if all(int((~mask).sum()) >= part.features.shape[1] for mask in held):
            # Found once for all these fits. Where rows are fewer, each fit has a smaller space of its own.
            axes = principal_axes(part.features, standardise=True)
        if not held or len(part) < 2 * len(part.labels.unique()):
            choice = Choice(fixed_penalty(self.classes), [], 0, False)
        else:
            choice = self._choose(part, held, axes)
        return choice, self._paths([(part.features, part.labels)], [choice.penalty], axes, SCORED)[0]

    def out_of_fold(self, part: Features, masks: Sequence[np.ndarray], penalty: float) -> Tensor:
        """Logits [N, C] of each row by a fit to the rows outside of its fold.

        Args:
            masks: bool [N] each, folds that hold every row once.
        """
        held = [torch.from_numpy(mask) for mask in masks]
        logits = part.features.new_empty(len(part), self.classes)
        fitted = [(part.features[~mask], part.labels[~mask]) for mask in held]
        for mask, path in zip(held, self._paths(fitted, [penalty], None, SCORED), strict=True):
            logits[mask] = path.logits(part.features[mask], 0)
        return logits

    def _choose(self, part: Features, held: Sequence[Tensor], axes: Tensor | None) -> Choice:
        """The penalty that is most often right on held-out rows, the largest of equals."""
        fitted = [(part.features[~mask], part.labels[~mask]) for mask in held]
        paths = self._paths(fitted, self.penalties, axes, SCORED if len(held) == 1 else COMPARED)
        right = torch.zeros(len(self.penalties), dtype=torch.int64)
        for mask, path in zip(held, paths, strict=True):
            right += (path.predict(part.features[mask]) == part.labels[mask]).sum(1)
        scored = sum(int(mask.sum()) for mask in held)
        best = max(range(len(right)), key=lambda index: (int(right[index]), self.penalties[index]))
        path = [
            {"penalty": penalty, "accuracy": count / scored}
            for penalty, count in zip(self.penalties, right.tolist(), strict=True)
        ]
        return Choice(self.penalties[best], path, scored, best in (0, len(right) - 1))

    def _paths(
        self, sets: Sequence[tuple[Tensor, Tensor]], penalties: Sequence[float], axes: Tensor | None, tolerance: float
    ) -> list[LogisticPath]:
        paths = fit_logistic_paths(
            [features for features, _ in sets],
            [labels for _, labels in sets],
            penalties,
            classes=self.classes,
            standardise=True,
            axes=axes,
            max_iterations=self.max_iterations,
            tolerance=tolerance,
        )
        self.fits += sum(len(path.converged) for path in paths)
        self.not_converged += sum(int((~path.converged).sum()) for path in paths)
        return paths
