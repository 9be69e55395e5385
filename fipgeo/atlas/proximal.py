r"""Coefficients of a linear composition: the outputs to first order, the loss as it is.

    minimise over d   sum_t w_t mean_n loss(f_n + A_n d, y_n) + ridge/2 |c + d|^2 + damping/2 |D d|^2

A is the derivative of the outputs by the r coefficients; D says how strongly the outputs feel each of them. The problem
has r unknowns and needs no pass through the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from fipgeo.atlas.goals import Term, labels_of
from fipgeo.atlas.losses import Loss
from fipgeo.data import Batches
from fipgeo.linalg import Dense, Outcome
from fipgeo.metrics import Metric

EXACT = 1e-10
"""Damping of a linear composition, whose expansion is exact: the first step is the solution."""
FACTOR = 8.0
"""Between one damping and the next."""
LITTLE = 0.03
"""The share of a step's gain below which it is not worth while to look on."""
NEWTON = 20
"""Most of Newton's steps for one damping."""


class Found(NamedTuple):
    """Coefficients after a step and the objective there; None, with a verdict, where no step helps."""

    c: Tensor | None
    value: float
    damping: float
    outcome: Outcome


def searched(problem: Problem, objective: Callable[[Tensor], float], start: float, mu: float, least: float) -> Found:
    """The best step: less damping as long as that helps, more until it does; none where the problem expects little."""
    d = problem.solved(mu, None)
    if problem.gain(d) <= least:
        return Found(None, start, mu, Outcome.CONVERGED)
    value = objective(problem.c + d)
    down, best, kept = value < start, None, mu
    if down:
        best = problem.c + d
    for _ in range(8):
        mu = mu / FACTOR if down else mu * FACTOR
        d = problem.solved(mu, d)
        now = objective(problem.c + d)
        helps = now < (value - LITTLE * (start - value) if down else start)
        if helps:
            best, value, kept = problem.c + d, now, mu
        if helps is not down:
            break
    return Found(best, value, kept, Outcome.STAGNATED if math.isfinite(value) else Outcome.NOT_FINITE)


@dataclass(frozen=True, eq=False)
class Expanded:
    """Outputs `[n, ..., C]`, their derivative `[n, O, r]` and labels of one batch; `share` is weight / N."""

    loss: Loss
    share: float
    f: Tensor
    a: Tensor
    labels: Tensor | None

    def at(self, d: Tensor) -> Tensor:
        """Outputs of the linearised network."""
        return self.f + (self.a @ d).view_as(self.f)

    def value(self, d: Tensor) -> float:
        """What the batch adds to the objective."""
        return self.share * float(self.loss.value(self.at(d), self.labels).double().sum())

    def gradient(self, d: Tensor) -> Tensor:
        """Its derivative by d."""
        out = self.at(d).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.loss.value(out, self.labels).sum(), out)
        return self.share * (slope.reshape(-1) @ self.a.flatten(0, 1))

    def root(self, d: Tensor) -> Tensor:
        """Rows `[n M, r]` whose squares are the curvature."""
        columns = self.a.movedim(2, 0).reshape(-1, *self.f.shape)
        point = self.at(d)
        moved = vmap(lambda column: jvp(self.loss.geometry.embed, (point,), (column,))[1])(columns)
        return abs(self.share) ** 0.5 * moved.flatten(1).T


@dataclass(frozen=True, eq=False)
class Problem:
    """The problem of the module's first lines around c `[n, S]`; steps d are flat inside and shaped as c outside."""

    c: Tensor
    ridge: float
    parts: list[Expanded]
    weights: Tensor  # D, flat

    @classmethod
    def at(cls, terms: list[Term], parts: list[Batches], c: Tensor, ridge: float) -> Problem:
        """The problem around c for some examples of each goal."""
        out = []
        for term, part in zip(terms, parts, strict=True):
            found = [(*term.expander(c, batch), labels_of(batch)) for batch in part]
            share = term.weight / sum(len(f) for f, _, _ in found)
            out += [Expanded(term.loss, share, f.to(a.dtype), a, y) for f, a, y in found]
        felt = torch.stack([part.a.flatten(0, 1).norm(dim=0) for part in out]).norm(dim=0)
        felt = felt + 1e-3 * felt.max() if bool(felt.any()) else torch.ones_like(felt)
        return cls(c, ridge, out, felt / felt.log().mean().exp())

    def scale(self) -> float:
        """The mean eigenvalue of the metric of D d at c; 1 if it is zero."""
        zero = self.c.new_zeros(self.c.numel())
        return sum(float((p.root(zero) / self.weights).double().square().sum()) for p in self.parts) / len(zero) or 1.0

    def gain(self, d: Tensor) -> float:
        """How much the objective falls by a step, as the linearised network has it."""
        return self.value(torch.zeros_like(d.flatten()), 0.0) - self.value(d.flatten(), 0.0)

    def value(self, d: Tensor, mu: float) -> float:
        """What is minimised, at a damping."""
        squares = self.ridge * (self.c.flatten() + d).square() + mu * (self.weights * d).square()
        return sum(part.value(d) for part in self.parts) + float(squares.double().sum()) / 2

    def solved(self, mu: float, start: Tensor | None) -> Tensor:
        """The best d at a damping, by Newton's method in the metric with halved steps where one is too long."""
        zero = self.c.new_zeros(self.c.numel())
        d = zero if start is None else start.flatten()
        first, now = self.value(zero, mu), self.value(d, mu)
        if now > first:
            d, now = zero, first
        for _ in range(NEWTON):
            slope = sum((part.gradient(d) for part in self.parts), self.ridge * (self.c.flatten() + d))
            slope = slope + mu * self.weights.square() * d
            rows = [part.root(d) / self.weights for part in self.parts]
            rows += [(self.ridge**0.5 / self.weights).diag()] if self.ridge else []
            root = torch.cat(rows)
            way = "dual" if root.shape[0] < root.shape[1] else "dense"
            solution = Metric(Dense(root), 1).solve(-(slope / self.weights).double(), mu, method=way)
            move, size, before = solution.value.to(d) / self.weights, 1.0, now
            tried = self.value(d + move, mu)
            while not tried < now and size > 1e-4:
                size /= 2
                tried = self.value(d + size * move, mu)
            if not tried < now:
                break
            d, now = d + size * move, tried
            if before - now <= 1e-3 * (first - now):
                break
        return d.view_as(self.c)
