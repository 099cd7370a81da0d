"""L-BFGS for several smooth convex problems at once, preconditioned by an estimate of the Hessian's diagonal.

Two-loop recursion: Nocedal & Wright 2006, algorithm 7.4. Line search for the weak Wolfe conditions by bracketing:
Lewis & Overton 2013, algorithm 2.6; near the minimum, where differences of values drown in rounding, the approximate
conditions of Hager & Zhang 2005. Every round evaluates each problem once, at the trial point that its own line search
has reached; S stands for the problems, K for their variables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DECREASE = 1e-4
"""First Wolfe condition: share of the slope that a step must realise."""
SLOPE = 0.9
"""Second Wolfe condition: the slope that may remain."""
SMALLEST_STEP = 1e-7
"""Of a direction: where a line search gives up."""


class Evaluation(NamedTuple):
    """What the problems say of a point: value [S] in float64, gradient [S, K], Hessian's diagonal, roughly [S, K]."""

    value: Tensor
    gradient: Tensor
    curvature: Tensor


@dataclass(frozen=True)
class Minimum:
    """Where the descent ended: point [S, K], value [S], iterations [S], and whether the criterion was met [S]."""

    point: Tensor
    value: Tensor
    iterations: Tensor
    converged: Tensor


class History:
    """The last pairs (step, change of the gradient) of each problem, newest first: what L-BFGS knows of the Hessian."""

    def __init__(self, pairs: int, start: Tensor):
        self.steps = start.new_zeros(pairs, *start.shape)  # [pairs, S, K]
        self.changes = torch.zeros_like(self.steps)
        self.weights = start.new_zeros(pairs, len(start))  # 1 / (step . change), 0: no such pair

    def push(self, problems: Tensor, step: Tensor, change: Tensor) -> None:
        """Append a pair for each problem where the mask `problems` [S] is true, dropping its oldest."""
        product = torch.linalg.vecdot(step, change)
        weight = torch.where(product > 0, 1 / product, 0)
        mask = problems[None, :, None]
        self.steps = torch.where(mask, torch.cat([step[None], self.steps[:-1]]), self.steps)
        self.changes = torch.where(mask, torch.cat([change[None], self.changes[:-1]]), self.changes)
        self.weights = torch.where(mask[..., 0], torch.cat([weight[None], self.weights[:-1]]), self.weights)

    def forget(self, problems: Tensor) -> None:
        """Drop all pairs of the problems where the mask [S] is true."""
        self.weights = torch.where(problems[None], 0, self.weights)

    def add_to_hessian(self, diagonal: Tensor) -> None:
        """The problems' Hessians grow (or shrink) by a known diagonal [K]: correct the pairs, which stay exact."""
        self.changes = self.changes + diagonal * self.steps
        product = torch.linalg.vecdot(self.steps, self.changes)
        self.weights = torch.where((product > 0) & (self.weights > 0), 1 / product, 0)

    def direction(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        """-H g, H the approximate inverse Hessian that starts from 1 / curvature, scaled by the newest pair."""
        vector = gradient.clone()
        shares = []
        for step, change, weight in zip(self.steps, self.changes, self.weights, strict=True):
            share = weight * torch.linalg.vecdot(step, vector)
            vector -= share[:, None] * change
            shares.append(share)
        newest = torch.linalg.vecdot(self.changes[0], self.changes[0] / curvature) * self.weights[0]
        vector /= curvature * torch.where(newest > 0, newest, 1)[:, None]
        for index in reversed(range(len(shares))):
            share = shares[index] - self.weights[index] * torch.linalg.vecdot(self.changes[index], vector)
            vector += share[:, None] * self.steps[index]
        return -vector


class _LineSearch:
    """Step lengths [S] along a direction, each in a bracket of its own."""

    def __init__(self, problems: int, like: Tensor):
        self.length = like.new_ones(problems)
        self.low = like.new_zeros(problems)
        self.high = like.new_full((problems,), torch.inf)

    def restart(self, problems: Tensor) -> None:
        self.length = torch.where(problems, 1, self.length)
        self.low = torch.where(problems, 0, self.low)
        self.high = torch.where(problems, torch.inf, self.high)

    def update(self, decreased: Tensor, accepted: Tensor) -> None:
        """Narrow the brackets after a trial: too far without decrease, too short where the slope is still steep."""
        self.high = torch.where(decreased, self.high, self.length)
        self.low = torch.where(decreased & ~accepted, self.length, self.low)
        middle = torch.where(self.high.isinf(), 2 * self.length, (self.low + self.high) / 2)
        self.length = torch.where(accepted, self.length, middle)


def minimise(
    evaluate: Callable[[Tensor], Evaluation], start: Tensor, history: History, tolerance: float, max_iterations: int
) -> Minimum:
    """Minimise S convex problems of K variables each, all at once, from `start` [S, K].

    A problem is converged when its value is estimated to be within `tolerance` (relative) of its minimum, by half the
    Newton decrement, and the last step gained no more than that either. `history` is used and updated, so that a
    descent on slightly changed problems can go on from what it holds.

    Args:
        evaluate: value, gradient and rough Hessian diagonal of all problems at points [S, K].
        max_iterations: evaluations after which the problems that are left count as not converged.
    """
    point, now = start, evaluate(start)
    search = _LineSearch(len(start), start)
    direction = history.direction(now.gradient, now.curvature)
    # The starting point is judged on its gradient alone, hence more strictly.
    converged = _gap(now, direction) <= 0.1 * tolerance * now.value
    done, restarted = converged.clone(), torch.zeros_like(converged)
    iterations = torch.ones_like(converged, dtype=torch.int64)
    for _ in range(max_iterations - 1):
        if done.all():
            break
        trial = torch.where(done[:, None], point, point + search.length[:, None] * direction)
        then = evaluate(trial)
        iterations += ~done
        slope, slope_then = (torch.linalg.vecdot(at.gradient, direction) for at in (now, then))
        noise = 2 * torch.finfo(start.dtype).eps * now.value.abs()
        decreased = (then.value <= now.value + DECREASE * (search.length * slope).double()) | (
            (then.value <= now.value + noise) & (slope_then <= (2 * DECREASE - 1) * slope)
        )
        accepted = decreased & (slope_then >= SLOPE * slope) & ~done
        search.update(decreased, accepted)
        gain = now.value - then.value
        history.push(accepted, trial - point, then.gradient - now.gradient)
        point = torch.where(accepted[:, None], trial, point)
        now = Evaluation(*(_choose(accepted, new, old) for new, old in zip(then, now, strict=True)))
        stuck = (search.length < SMALLEST_STEP) & ~accepted
        history.forget(stuck & ~restarted)
        done = done | (stuck & restarted)
        renewed = accepted | (stuck & ~restarted)
        restarted = (restarted | stuck) & ~accepted
        search.restart(renewed)
        direction = torch.where(renewed[:, None], history.direction(now.gradient, now.curvature), direction)
        limit = tolerance * now.value
        converged = converged | (accepted & (gain <= limit) & (_gap(now, direction) <= limit))
        done = done | converged
    return Minimum(point, now.value, iterations, converged)


def _choose(problems: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(problems if new.ndim == 1 else problems[:, None], new, old)


def _gap(now: Evaluation, direction: Tensor) -> Tensor:
    """How far above their minima the problems are [S]: half the Newton decrement, by the better of two metrics."""
    by_history = -torch.linalg.vecdot(now.gradient, direction)
    by_diagonal = torch.linalg.vecdot(now.gradient, now.gradient / now.curvature)
    return torch.maximum(by_history, by_diagonal).double() / 2
