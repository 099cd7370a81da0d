"""L-BFGS for many smooth convex problems at once, preconditioned by an estimate of the Hessian's diagonal.

The direction is computed in compact form (Byrd, Nocedal & Schnabel 1994, theorem 2.2), from the products of all pairs
with one another: two passes over the pairs instead of four passes for each pair in turn. Line search for the weak Wolfe
conditions by bracketing: Lewis & Overton 2013, algorithm 2.6; near the minimum, where differences of values drown in
rounding, the approximate conditions of Hager & Zhang 2005. Every round evaluates each problem that is not done once, at
the trial point that its own line search has reached; A stands for these problems, K for their variables.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PAIRS = 10
"""Of a step and the change of the gradient along it, the last ones, that stand for the Hessian."""
DECREASE = 1e-4
"""First Wolfe condition: share of the slope that a step must realise."""
SLOPE = 0.9
"""Second Wolfe condition: the slope that may remain."""
SMALLEST_STEP = 1e-7
"""Of a direction: where a line search gives up."""
DRIFT = 2.0
"""How far the Hessian's diagonal may move from the one that preconditions, as a factor."""


class Evaluation(NamedTuple):
    """What the problems say of a point: value [A] in float64, gradient [A, K], Hessian's diagonal, roughly [A, K]."""

    value: Tensor
    gradient: Tensor
    curvature: Tensor


class History:
    """The last pairs (step, change of the gradient) of each problem: what L-BFGS knows of the Hessian.

    The variables are multiplied by `metric`, the root of the Hessian's diagonal, so that the Hessian is nearly 1.
    """

    def __init__(self, problems: int, like: Tensor):
        self.metric = like.new_ones(problems, like.shape[1])
        self.pairs = like.new_zeros(problems, 2 * PAIRS, like.shape[1])  # steps, then changes; each pair in its slot
        self.products = like.new_zeros(problems, 2 * PAIRS, PAIRS, dtype=torch.float64)  # of all rows with changes
        self.age = torch.arange(PAIRS, device=like.device).repeat(problems, 1)  # of what a slot holds, 0: the newest
        self.is_held = torch.zeros(problems, PAIRS, dtype=torch.bool, device=like.device)

    def select(self, problems: Tensor) -> "History":
        """A copy for these problems, int64 [A]."""
        chosen = copy(self)
        for name, value in vars(self).items():
            setattr(chosen, name, value[problems])
        return chosen

    def insert(self, problems: Tensor, other: "History") -> None:
        """Overwrite what is held of these problems."""
        for name, value in vars(self).items():
            value[problems] = getattr(other, name)

    def push(self, problems: Tensor, step: Tensor, change: Tensor) -> None:
        """Put a pair in the place of the oldest, for the problems of the mask [A] where the curvature is positive."""
        which = torch.where(problems & (torch.linalg.vecdot(step, change) > 0))[0]
        if len(which) == 0:
            return
        slot = self.age[which].argmax(1)
        self.pairs[which, slot], self.pairs[which, PAIRS + slot] = step[which], change[which]
        rows = torch.bmm(self.pairs, change[:, :, None])[which, :, 0].double()  # [a, 2 PAIRS]
        columns = torch.bmm(self.pairs[:, PAIRS:], step[:, :, None])[which, :, 0].double()
        self.products[which, :, slot] = rows
        self.products[which, slot] = columns
        self.products[which, PAIRS + slot] = rows[:, PAIRS:]
        self.age[which] += 1
        self.age[which, slot] = 0
        self.is_held[which, slot] = True

    def forget(self, problems: Tensor) -> None:
        """Drop all pairs of the problems where the mask [A] is true."""
        self.pairs[problems], self.products[problems], self.is_held[problems] = 0, 0, False

    def add_to_hessian(self, diagonal: Tensor) -> None:
        """The problems' Hessians grow (or shrink) by a known diagonal [A, K]: correct the pairs, which stay exact."""
        self.pairs[:, PAIRS:] += (diagonal / self.metric.square())[:, None] * self.pairs[:, :PAIRS]
        product = torch.linalg.vecdot(self.pairs[:, :PAIRS], self.pairs[:, PAIRS:])
        self.is_held &= product > 0
        self.pairs *= self.is_held.repeat(1, 2)[:, :, None]

    def rescale(self, metric: Tensor) -> None:
        """Change over to another metric [A, K]."""
        factor = (metric / self.metric)[:, None]
        self.pairs[:, :PAIRS] *= factor
        self.pairs[:, PAIRS:] /= factor
        self.products = torch.bmm(self.pairs, self.pairs[:, PAIRS:].transpose(1, 2)).double()
        self.metric = metric

    def direction(self, gradient: Tensor) -> Tensor:
        """-H g, H the approximate inverse Hessian that starts from a multiple of 1, by the newest pair."""
        order = self.age.argsort(1, descending=True)  # oldest first
        held = self.is_held.gather(1, order)
        across = torch.cat([order, PAIRS + order], 1)
        products = self.products.gather(1, across[:, :, None].expand(-1, -1, PAIRS))
        products = products.gather(2, order[:, None].expand(-1, 2 * PAIRS, -1))
        steps_changes, changes_changes = products[:, :PAIRS], products[:, PAIRS:]
        own = steps_changes.diagonal(dim1=1, dim2=2)
        newest = own[:, -1] / changes_changes[:, -1, -1]
        scale = torch.where(held[:, -1], newest, 1.0)[:, None]
        triangle = steps_changes.triu() + torch.diag_embed((~held).double())
        along = torch.bmm(self.pairs, gradient[:, :, None])[:, :, 0].double().gather(1, across)
        by_steps, by_changes = along[:, :PAIRS], along[:, PAIRS:]
        first = torch.linalg.solve_triangular(triangle, by_steps[:, :, None], upper=True)[:, :, 0]
        inner = own * first + scale * (torch.bmm(changes_changes, first[:, :, None])[:, :, 0] - by_changes)
        second = torch.linalg.solve_triangular(triangle.mT, inner[:, :, None], upper=False)[:, :, 0]
        shares = torch.zeros_like(along).scatter_(1, across, torch.cat([-second, scale * first], 1))
        scale = scale.to(gradient.dtype)
        return torch.baddbmm((gradient * -scale)[:, None], shares.to(gradient.dtype)[:, None], self.pairs)[:, 0]


@dataclass(frozen=True)
class Minimum:
    """Where the descents ended: point [S, K], value [S], evaluations [S], and whether the criterion was met [S]."""

    point: Tensor
    value: Tensor
    iterations: Tensor
    converged: Tensor
    history: History


def minimise(
    evaluate: Callable[[Tensor, Tensor], Evaluation],
    start: Tensor,
    baseline: Tensor,
    tolerance: float,
    max_iterations: int,
    history: History | None = None,
) -> Minimum:
    """Minimise S convex problems of K variables each, all at once, from `start` [S, K].

    A problem is converged when its value is estimated to be within `tolerance` of its minimum, relative to the minimum
    or to how far that lies below the baseline, whichever is less, by half the Newton decrement, and the last step
    gained no more than that either.

    Args:
        evaluate: value, gradient and rough Hessian diagonal, of points [A, K] of the problems int64 [A].
        baseline: [S], float64: a value that is reached without effort. Where the minimum is hardly below it, that
            little is what is asked for.
        max_iterations: evaluations after which the problems that are left count as not converged.
        history: what is known of their Hessians, S of them; it is used up.
    """
    left = torch.arange(len(start), device=start.device)
    descent = _Descent(start, evaluate(start, left), history or History(len(start), start), baseline, tolerance)
    found = Minimum(
        torch.empty_like(start),
        torch.empty_like(descent.value),
        torch.empty_like(left),
        torch.empty_like(descent.converged),
        History(len(start), start) if len(start) > 1 else descent.history,  # of one alone as it is: it may be large
    )
    for number in range(1, max_iterations + 1):
        over = descent.done if number < max_iterations else torch.ones_like(descent.done)
        if over.any():
            over = torch.where(over)[0]
            places = left[over]
            found.point[places], found.value[places] = descent.point[over], descent.value[over]
            found.iterations[places], found.converged[places] = number, descent.converged[over]
            if len(start) > 1:
                found.history.insert(places, descent.history.select(over))
            if len(over) == len(left):
                break
            staying = torch.where(~descent.done)[0]
            left = left[staying]
            descent.select(staying)
        descent.advance(evaluate(descent.trial(), left))
    return found


class _Descent:
    """The problems that are not done: where they are, where they go, and each line search in a bracket of its own."""

    def __init__(self, start: Tensor, now: Evaluation, history: History, baseline: Tensor, tolerance: float):
        self.point, self.value, self.history = start, now.value, history
        self.baseline, self.tolerance = baseline, tolerance
        history.rescale(now.curvature.sqrt())
        # Gradient and direction are of the variables multiplied by the metric.
        self.gradient = now.gradient / history.metric
        self.direction = history.direction(self.gradient)
        self.length = start.new_ones(len(start))
        self.low, self.high = torch.zeros_like(self.length), torch.full_like(self.length, torch.inf)
        # The starting point is judged on its gradient alone, hence more strictly.
        self.converged = self._gap() <= 0.1 * self._allowed()
        self.done = self.converged
        self.restarted = torch.zeros_like(self.done)

    def select(self, problems: Tensor) -> None:
        """Keep these problems only."""
        self.history = self.history.select(problems)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[problems])

    def trial(self) -> Tensor:
        return self.point + self.length[:, None] * self.direction / self.history.metric

    def advance(self, then: Evaluation) -> None:
        """Judge the trial point, go there if it is good enough, and choose the next one."""
        gradient = then.gradient / self.history.metric
        slope, slope_then = (torch.linalg.vecdot(one, self.direction) for one in (self.gradient, gradient))
        noise = 2 * self._rounding()
        decreased = (then.value <= self.value + DECREASE * (self.length * slope).double()) | (
            (then.value <= self.value + noise) & (slope_then <= (2 * DECREASE - 1) * slope)
        )
        accepted = decreased & (slope_then >= SLOPE * slope)
        gain = self.value - then.value
        taken = accepted[:, None]
        step = self.length[:, None] * self.direction
        self.history.push(accepted, step, gradient - self.gradient)
        self.point = torch.where(taken, self.point + step / self.history.metric, self.point)
        self.value = torch.where(accepted, then.value, self.value)
        self.gradient = torch.where(taken, gradient, self.gradient)
        self._narrow(decreased, accepted)
        stuck = (self.length < SMALLEST_STEP) & ~accepted
        if stuck.any():
            self.history.forget(stuck & ~self.restarted)
        self.done = stuck & self.restarted
        renewed = accepted | (stuck & ~self.restarted)
        self.restarted = (self.restarted | stuck) & ~accepted
        self._follow(torch.where(taken, then.curvature.sqrt(), self.history.metric))
        self.length = torch.where(renewed, 1, self.length)
        self.low, self.high = torch.where(renewed, 0, self.low), torch.where(renewed, torch.inf, self.high)
        self.direction = torch.where(renewed[:, None], self.history.direction(self.gradient), self.direction)
        allowed = self._allowed()
        self.converged = accepted & (gain <= torch.maximum(allowed, noise)) & (self._gap() <= allowed)
        self.done = self.done | self.converged

    def _narrow(self, decreased: Tensor, accepted: Tensor) -> None:
        """Brackets after a trial: too far without decrease, too short where the slope is still steep."""
        self.high = torch.where(decreased, self.high, self.length)
        self.low = torch.where(decreased & ~accepted, self.length, self.low)
        middle = torch.where(self.high.isinf(), 2 * self.length, (self.low + self.high) / 2)
        self.length = torch.where(accepted, self.length, middle)

    def _follow(self, metric: Tensor) -> None:
        """Change over to the Hessian's diagonal as it is now, where it is another."""
        factor = metric / self.history.metric
        smallest, largest = factor.aminmax()
        if largest > DRIFT**0.5 or smallest < DRIFT**-0.5:
            self.history.rescale(metric)
            self.gradient, self.direction = self.gradient / factor, self.direction * factor

    def _rounding(self) -> Tensor:
        return torch.finfo(self.point.dtype).eps * self.value.abs()

    def _allowed(self) -> Tensor:
        """How far above their minima the problems may end [A]."""
        below = torch.maximum(self.baseline - self.value, self._rounding())
        return self.tolerance * torch.minimum(self.value, below)

    def _gap(self) -> Tensor:
        """How far above their minima the problems are [A]: half the Newton decrement, by the better of two metrics."""
        by_history = -torch.linalg.vecdot(self.gradient, self.direction)
        by_diagonal = torch.linalg.vecdot(self.gradient, self.gradient)
        return torch.maximum(by_history, by_diagonal).double() / 2
