"""Logistic regressions over a path of penalties: which are solved together, and from where each sets out.

First a few, well apart, from the largest penalty down; then those halfway between what is solved, again and again. The
solution moves smoothly with the logarithm of the penalty, so that a polynomial through the nearest solved ones is a
start from which two or three evaluations are enough. Many problems side by side make one wide matrix product of their
weights with the rows, which costs a third of as many narrow ones (10 classes, 512 dimensions, two cores).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from stages.evaluation.lbfgs import Evaluation, History, minimise

SPACING_ALONE, SPACING_TOGETHER = math.log(10), math.log(100)
"""Between the penalties that are solved first, in the logarithm, at least: one after the other, or side by side."""
REACH = 3
"""Solved penalties, on either side, that a start is interpolated from."""
ROWS_OF_WEIGHTS = 512
"""Classes, summed over problems, from which a wider product is no faster by the class."""
ELEMENTS_WORTH_A_CALL = 2**21
"""Variables, or logits: the calls on fewer take longer than their arithmetic."""


class Objective(Protocol):
    """S convex problems of K variables, each of which has a minimum for every penalty."""

    classes: int
    """C, classes in each problem; K is C * (R + 1), weights and biases."""
    prior_losses: Tensor
    """[S], float64: without weights."""

    @property
    def rows_of_weights(self) -> int:
        """Of one product that evaluates all problems that share rows, at one penalty."""
        ...

    @property
    def elements(self) -> int:
        """Variables, or logits if more, of all problems at one penalty."""
        ...

    def start(self) -> Tensor:
        """The solution of an infinite penalty, [S, K]."""
        ...

    def penalised(self) -> Tensor:
        """1 for a weight, 0 for a bias: [K]."""
        ...

    def evaluate(self, variables: Tensor, sets: Tensor, penalties: Tensor) -> Evaluation:
        """At variables [A, K] of the problems `sets`, int64 [A], increasing, with penalties [A]."""
        ...


@dataclass(frozen=True)
class Solutions:
    """For S problems and P penalties in descending order."""

    variables: Tensor
    """[P, S, C, R + 1], weights and biases."""
    objectives: Tensor
    """[P, S], float64."""
    iterations: Tensor
    """int64 [P, S], evaluations of the objective."""
    converged: Tensor
    """bool [P, S]."""


def solve_path(problem: Objective, penalties: Sequence[float], max_iterations: int, tolerance: float) -> Solutions:
    """Solve for each of the penalties, which descend strictly."""
    start = problem.start()  # [S, K]
    sets, size = start.shape
    exact = torch.tensor(penalties, dtype=torch.float64, device=start.device)
    logs = exact.log()
    points = start.new_zeros(len(penalties), sets, size)
    values = exact.new_zeros(len(penalties), sets)
    iterations, converged = torch.zeros_like(values, dtype=torch.int64), torch.zeros_like(values, dtype=torch.bool)
    solved: list[int] = []
    before: Tensor | None = None
    history: History | None = None
    at_once = _at_once(problem)
    batches = [
        torch.tensor(wave[begin : begin + at_once], device=start.device)
        for wave in _waves(logs.tolist(), SPACING_ALONE if at_once == 1 else SPACING_TOGETHER)
        for begin in range(0, len(wave), at_once)
    ]
    for batch in batches:
        # Problems [A] of a batch: all penalties of the first set, then those of the next.
        their_sets = torch.arange(sets, device=start.device).repeat_interleave(len(batch))
        their_penalties = exact[batch].repeat(sets)
        starts = start.expand(len(batch), -1, -1)
        if solved:
            shares = _shares(logs[solved], logs[batch]).to(start.dtype)
            starts = (shares @ points[solved].flatten(1)).view(len(batch), sets, size)
        if before is not None and history is not None:
            nearest = (logs[before, None] - logs[batch]).abs().argmin(0)
            change = (exact[batch] - exact[before[nearest]]).repeat(sets)
            first_of_set = torch.arange(sets, device=start.device)[:, None] * len(before)
            history = history.select((first_of_set + nearest).flatten())
            history.add_to_hessian(change.to(start.dtype)[:, None] * problem.penalised())
        minimum = minimise(
            partial(_evaluate, problem, their_sets, their_penalties),
            starts.transpose(0, 1).flatten(0, 1),
            problem.prior_losses.repeat_interleave(len(batch)),
            tolerance,
            max_iterations,
            history,
        )
        points[batch] = minimum.point.view(sets, len(batch), size).transpose(0, 1)
        values[batch] = minimum.value.view(sets, -1).T
        iterations[batch], converged[batch] = minimum.iterations.view(sets, -1).T, minimum.converged.view(sets, -1).T
        solved = sorted([*solved, *batch.tolist()])
        before, history = batch, minimum.history
    return Solutions(points.view(len(penalties), sets, problem.classes, -1), values, iterations, converged)


def _evaluate(problem: Objective, sets: Tensor, penalties: Tensor, variables: Tensor, places: Tensor) -> Evaluation:
    """At variables [a, K] for those at `places` [a] among problems of these sets and penalties, [A] each."""
    return problem.evaluate(variables, sets[places], penalties[places])


def _at_once(problem: Objective) -> int:
    """Penalties that are solved side by side."""
    return max(1, ELEMENTS_WORTH_A_CALL // problem.elements, ROWS_OF_WEIGHTS // problem.rows_of_weights)


def _waves(logs: Sequence[float], spacing: float) -> list[list[int]]:
    """Positions on a descending path: some, well apart, then those halfway between what there is.

    Every other wave runs backwards, so that where one ends the next begins.
    """
    first = [0]
    for place, log in enumerate(logs):
        if logs[first[-1]] - log >= spacing * (1 - 1e-6):
            first.append(place)
    if first[-1] != len(logs) - 1:
        first.append(len(logs) - 1)
    waves = [first]
    done = first
    while len(done) < len(logs):
        wave = [(left + right) // 2 for left, right in pairwise(done) if right - left > 1]
        waves.append(wave if len(waves) % 2 == 0 else wave[::-1])
        done = sorted([*done, *wave])
    return waves


def _shares(known: Tensor, wanted: Tensor) -> Tensor:
    """How the solutions known, at logarithms [k] that descend, make up starts for those wanted: [w, k].

    Between them by Lagrange's polynomial; beyond them by the line through the last two, not followed far.
    """
    shares = known.new_zeros(len(wanted), len(known))
    for row, place in enumerate(wanted.tolist()):
        above = int((known > place).sum())
        if 0 < above < len(known):
            for at in (near := range(max(above - REACH, 0), min(above + REACH, len(known)))):
                others = known[[other for other in near if other != at]]
                shares[row, at] = ((place - others) / (known[at] - others)).prod()
        else:
            end, inner = (0, 1) if above == 0 else (-1, -2)
            ahead = 0.0
            if len(known) > 1:
                ahead = min(2.0, float((place - known[end]) / (known[end] - known[inner])))
                shares[row, inner] = -ahead
            shares[row, end] = 1 + ahead
    return shares
