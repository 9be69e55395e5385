r"""Learning coefficients by solving for them: the network is linearised, the loss is not.

    minimise over d   sum_t w_t mean_n loss(f_n + A_n d, y_n) + ridge/2 |c + d|^2 + damping/2 |D d|^2

A is the derivative of the outputs by the r coefficients, so the curvature is that of the metric pulled back to them,
B^T g B, in the geometry that belongs to the loss; D says how strongly the outputs feel each coefficient. The problem
has r unknowns and needs no pass through the network; the damping is searched along by forward passes alone, as in
Levenberg's method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.expansion import Expander
from fipgeo.atlas.losses import Loss, as_loss
from fipgeo.data import Batches, Generator, TensorBatches, as_batches, as_generator
from fipgeo.linalg import Dense, Outcome
from fipgeo.metrics import Metric
from fipgeo.model import ForwardFn, OutputFn


@dataclass(frozen=True, eq=False)
class Goal:
    """One term of what coefficients are learned for: the mean of a loss over data, times a weight.

    Attributes:
        data: `(x, y)` tensors, a list of batches, or a re-iterable loader; y is left out for losses without labels.
        loss: "cross_entropy", "square", "entropy" or a `Loss`.
        weight: Of the term; negative to undo what a network can do.
        forward_fn: (network, batch) -> raw outputs; by default the network gets x.
        output_fn: Raw outputs -> the tensor that the loss gets.
    """

    data: Any
    loss: str | Loss = "cross_entropy"
    weight: float = 1.0
    forward_fn: ForwardFn | None = None
    output_fn: OutputFn | None = None


@dataclass(frozen=True)
class Fit:
    """How learning went.

    Attributes:
        losses: The objective at the start and after every step, each over the examples of its step.
        passes: Forward-backward passes up to each of them, in examples: forward passes, backward passes by activations
            and what each vector takes in the layers count a third each.
        damping: After the last step.
        outcome: CONVERGED where steps became small or the target was reached, STAGNATED where none lowered the loss.
    """

    losses: tuple[float, ...]
    passes: tuple[float, ...]
    damping: float
    outcome: Outcome

    @property
    def ok(self) -> bool:
        """Whether the outcome is CONVERGED."""
        return self.outcome.ok

    @property
    def steps(self) -> int:
        """Steps that were taken."""
        return len(self.losses) - 1


def fit_(
    model: Composition,
    goals: Any,
    *,
    loss: str | Loss = "cross_entropy",
    steps: int = 10,
    sample: int | None = None,
    damping: float = 1e-2,
    ridge: float = 0.0,
    rtol: float = 1e-3,
    target: float = -math.inf,
    generator: Generator = None,
) -> Fit:
    """Learn the coefficients of a composition, in place, by steps in the metric of the outputs.

    Args:
        model: Its coefficients are the start and the result; nothing else is changed. A linear composition is solved
            in one step, in closed form for the square loss.
        goals: A `Goal`, several of them, or the data of one.
        loss: Of the one goal whose data were given.
        steps: Most steps; each linearises the network once.
        sample: Examples of each goal in a step, drawn anew for every step; None for all of them. The derivative takes
            examples x outputs x coefficients numbers.
        damping: At first, as a multiple of the metric's mean eigenvalue; found again in every step. A linear
            composition has none beyond rounding.
        ridge: Weight of |c|^2 / 2 beside the losses.
        rtol: A step that lowers the objective by a smaller share of its first value is the last.
        target: An objective at which to stop.
        generator: Draws the samples.

    Returns:
        What was reached, and what it took.

    Raises:
        ValueError: There is no goal, a setting is out of range, or the network returns several tensors.

    Source: the damping is Levenberg's (1944) and Marquardt's (1963); solving the loss itself around a linearised
    network is the prox-linear method (Drusvyatskiy & Lewis, Error Bounds, Quadratic Growth, and Linear Convergence of
    Proximal Methods, 2018); with one quadratic step it would be the natural gradient of Amari (1998).

    Examples:
        >>> from fipgeo import TaskVector
        >>> net, tuned, x = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2), torch.randn(20, 3)
        >>> model = Composition(net, [TaskVector.between(net, tuned)])
        >>> fit = fit_(model, (x, tuned(x).detach()), loss="square", rtol=1e-6)
        >>> fit.ok, model.coefficients.round(decimals=2).tolist()
        (True, [[1.0, 1.0]])
    """
    if steps < 0 or not damping > 0 or ridge < 0 or (sample is not None and sample < 1):
        raise ValueError(
            f"steps, damping, ridge, sample: got {steps}, {damping}, {ridge}, {sample}; expected at least 0, above 0,"
            " at least 0, and None or at least 1"
        )
    terms = [_Term.of(model, goal) for goal in _listed(goals, loss)]
    draws = as_generator(generator)
    c, start = model.coefficients.detach().clone(), 0.0
    losses, passes, outcome, mu = [], [], Outcome.MAX_ITERATIONS, None
    for step in range(steps + 1):
        parts = [term.drawn(sample, draws) for term in terms]
        if step == 0 or sample is not None:
            start = _objective(terms, parts, ridge, c)
        if step == 0:
            losses, passes = [start], [_spent(terms)]
            outcome = Outcome.CONVERGED if start <= target else outcome
        if step == steps or start <= target:
            break
        problem = _Problem.at(terms, parts, c, ridge)
        mu = (EXACT if model.linear else damping) * problem.scale() if mu is None else mu
        found = _searched(problem, partial(_objective, terms, parts, ridge), start, mu, rtol * abs(losses[0]))
        if found.c is None:
            outcome = found.outcome
            break
        small, c, start, mu = start - found.value <= rtol * abs(losses[0]), found.c, found.value, found.damping
        losses.append(start)
        passes.append(_spent(terms))
        if small or start <= target:
            outcome = Outcome.CONVERGED
            break
    with torch.no_grad():
        model.coefficients.copy_(c)
    return Fit(tuple(losses), tuple(passes), float(mu or 0.0), outcome)


EXACT = 1e-10
"""Damping of a linear composition, whose expansion is exact: the first step is the solution."""
FACTOR = 8.0
"""Between one damping and the next."""
LITTLE = 0.03
"""The share of a step's gain below which it is not worth while to look on."""
NEWTON = 20
"""Most of Newton's steps for one damping."""


class _Found(NamedTuple):
    """Coefficients after a step and the objective there; None, with a verdict, where no step helps."""

    c: Tensor | None
    value: float
    damping: float
    outcome: Outcome


def _searched(problem: _Problem, objective: Callable[[Tensor], float], start: float, mu: float, least: float) -> _Found:
    """The best step: less damping as long as that helps, more until it does; none where the problem expects little."""
    d = problem.solved(mu, None)
    if problem.gain(d) <= least:
        return _Found(None, start, mu, Outcome.CONVERGED)
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
    return _Found(best, value, kept, Outcome.STAGNATED if math.isfinite(value) else Outcome.NOT_FINITE)


@dataclass(frozen=True, eq=False)
class _Term:
    """A goal with what evaluates it."""

    batches: Batches
    loss: Loss
    weight: float
    expander: Expander

    @classmethod
    def of(cls, model: Composition, goal: Goal) -> _Term:
        expander = Expander(model, goal.forward_fn, goal.output_fn)
        return cls(as_batches(goal.data, argument="data").hold(), as_loss(goal.loss), goal.weight, expander)

    def drawn(self, sample: int | None, draws: torch.Generator) -> list[Any]:
        if sample is None:
            return list(self.batches)
        chosen = self.batches.sample(sample, draws)
        return list(TensorBatches(chosen)) if isinstance(self.batches, TensorBatches) else [chosen]

    def mean(self, part: list[Any], c: Tensor) -> float:
        losses = [self.loss.value(self.expander.outputs(c, batch), labels_of(batch)) for batch in part]
        return self.weight * float(torch.cat(losses).double().mean())


def labels_of(batch: Any) -> Tensor | None:
    """The y of a batch `(x, y)`; None for other batches."""
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


def _listed(goals: Any, loss: str | Loss) -> list[Goal]:
    if isinstance(goals, Goal):
        return [goals]
    if isinstance(goals, list | tuple) and any(isinstance(goal, Goal) for goal in goals):
        if not all(isinstance(goal, Goal) for goal in goals):
            raise ValueError("goals: got goals and other things in one list; make each a Goal(data, ...)")
        return list(goals)
    return [Goal(goals, loss)]


def _objective(terms: list[_Term], parts: list[list[Any]], ridge: float, c: Tensor) -> float:
    total = sum(term.mean(part, c) for term, part in zip(terms, parts, strict=True))
    return total + ridge / 2 * float(c.double().square().sum())


def _spent(terms: list[_Term]) -> float:
    return sum(term.expander.passes for term in terms)


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
class _Problem:
    """The problem of the module's first lines around c `[n, S]`; steps d are flat inside and shaped as c outside."""

    c: Tensor
    ridge: float
    parts: list[Expanded]
    weights: Tensor  # D, flat

    @classmethod
    def at(cls, terms: list[_Term], parts: list[list[Any]], c: Tensor, ridge: float) -> _Problem:
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
