r"""Learning coefficients by a quadratic model of the objective that begins as the metric of the outputs.

    objective(c) = sum_t w_t mean_n loss(f(x_n; c), y_n) + ridge/2 |c|^2 + l1 |c|_1    for lower <= c <= upper

At first the model's curvature is that of the metric pulled back to the coefficients, B^T g B, in the geometry that
belongs to the loss: an estimate from a few random directions of the outputs of some examples. Every step within a
region of trust costs one gradient, from which the curvature learns. The outputs of a linear composition need one
expansion, and the problem is then solved without passes through the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.goals import Term, labels_of, listed
from fipgeo.atlas.losses import Loss
from fipgeo.atlas.penalty import Penalty
from fipgeo.atlas.proximal import EXACT, Problem, searched
from fipgeo.atlas.region import Curvature
from fipgeo.data import Batches, Generator, TensorBatches, as_generator
from fipgeo.linalg import Outcome
from fipgeo.trees import tensor_leaves

DIRECTIONS = 2
"""Random directions of an example's outputs in the first metric."""
METRIC = 64
"""Examples of a goal in it, at most."""
IDLE = 5
"""Steps in a row that gain little before learning ends."""


@dataclass(frozen=True)
class Fit:
    """How learning went.

    Attributes:
        losses: The objective at the start and after every step that lowered it, over the examples that were used.
        passes: Forward-backward passes up to each of them, in examples: forward passes, backward passes by activations,
            backward passes by weights and what each vector takes in the layers count a third each.
        radius: Of the region of trust after the last step; infinite for a linear composition.
        outcome: CONVERGED where steps became small or the target was reached, STAGNATED where none lowered the loss.
    """

    losses: tuple[float, ...]
    passes: tuple[float, ...]
    radius: float
    outcome: Outcome

    @property
    def ok(self) -> bool:
        """Whether the outcome is CONVERGED."""
        return self.outcome.ok

    @property
    def steps(self) -> int:
        """Steps that lowered the objective."""
        return len(self.losses) - 1


def fit_(
    model: Composition,
    goals: Any,
    *,
    loss: str | Loss = "cross_entropy",
    steps: int = 100,
    sample: int | None = None,
    reach: float = 0.2,
    ridge: float = 0.0,
    l1: float = 0.0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
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
        steps: Most steps, those that are taken back included; each takes one gradient over the examples.
        sample: Examples of each goal, drawn once; None for all of them.
        reach: Radius of the region of trust at first; it is doubled and cut as steps turn out. Lengths are those of
            |D d|, where D d is what each coefficient alone does to the outputs, root mean square over the examples, in
            the geometry of the loss. A linear composition needs none.
        ridge: Weight of |c|^2 / 2 beside the losses.
        l1: Weight of |c|_1 beside them, with which some coefficients are exactly 0; not for a linear composition.
        bounds: Between which every coefficient stays, such as (0, inf) for those of one sign; a start outside is first
            brought to them. Not for a linear composition.
        rtol: A step that lowers the objective by a smaller share of its first value is little; after five of them in a
            row, or where the model expects no more, learning ends.
        target: An objective at which to stop.
        generator: Draws the samples and the directions.

    Returns:
        What was reached, and what it took.

    Raises:
        ValueError: There is no goal, a setting is out of range or not for a linear composition, or the network returns
            several tensors.

    Source: the metric at the start is that of Amari's natural gradient (1998); the curvature learns by symmetric
    rank-one updates in a region of trust (Conn, Gould & Toint 1991), scaled as by Marquardt (1963), so that vectors
    may be of any size. For linear compositions it is the prox-linear method (Drusvyatskiy & Lewis, Error Bounds,
    Quadratic Growth, and Linear Convergence of Proximal Methods, 2018).

    Examples:
        >>> from fipgeo import TaskVector
        >>> net, tuned, x = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2), torch.randn(20, 3)
        >>> model = Composition(net, [TaskVector.between(net, tuned)])
        >>> fit = fit_(model, (x, tuned(x).detach()), loss="square", rtol=1e-6)
        >>> fit.ok, model.coefficients.round(decimals=2).tolist()
        (True, [[1.0, 1.0]])
    """
    if steps < 0 or not reach > 0 or ridge < 0 or (sample is not None and sample < 1):
        raise ValueError(
            f"steps, reach, ridge, sample: got {steps}, {reach}, {ridge}, {sample}; expected at least 0, above 0, at"
            " least 0, and None or at least 1"
        )
    penalty = Penalty(l1, *bounds)
    if model.linear and not penalty.free:
        raise ValueError(f"l1, bounds: got {l1} and {bounds} for a linear composition; build it with linear=False")
    draws = as_generator(generator)
    terms = [Term.of(model, goal) for goal in listed(goals, loss)]
    parts = [term.drawn(sample, draws) for term in terms]
    objective = Objective(model, terms, parts, ridge)
    if model.linear:
        return _solved(objective, steps, rtol, target)
    return descend(objective, draws, steps=steps, reach=reach, rtol=rtol, target=target, penalty=penalty)


def descend(
    objective: Objective,
    draws: torch.Generator,
    *,
    steps: int,
    reach: float = 0.2,
    rtol: float = 1e-3,
    target: float = -math.inf,
    allowed: Callable[[Tensor], bool] | None = None,
    penalty: Penalty | None = None,
) -> Fit:
    """The steps of `fit_`; the first that leads to coefficients that are not allowed is cut, and is the last."""
    model, penalty = objective.model, penalty or Penalty()
    c = model.coefficients.detach().clamp(penalty.lower, penalty.upper)
    descent = Descent(objective, c, reach, draws, penalty) if steps else None
    value = objective.value(c) + penalty(c) if descent is None else descent.value
    losses, passes, little = [value], [objective.passes], 0
    least, outcome = rtol * abs(value), Outcome.MAX_ITERATIONS
    for _ in range(steps):
        if descent is None or value <= target:
            break
        gain = descent.step(least)
        if gain is None:
            outcome = Outcome.CONVERGED
            break
        if gain > 0:
            if allowed is not None and not allowed(descent.c):
                c, outcome = farthest(c, descent.c, allowed), Outcome.CONVERGED
                losses.append(objective.value(c) + penalty(c))
                passes.append(objective.passes)
                break
            c, value = descent.c, descent.value
            losses.append(value)
            passes.append(objective.passes)
        little = 0 if gain > least else little + 1
        if little == IDLE:
            outcome = Outcome.CONVERGED if len(losses) > 1 else descent.verdict
            break
    with torch.no_grad():
        model.coefficients.copy_(c)
    radius = reach if descent is None else descent.radius
    return Fit(
        tuple(losses),
        (*passes[:-1], objective.passes),
        radius,
        Outcome.CONVERGED if value <= target else outcome,
    )


def farthest(start: Tensor, end: Tensor, allowed: Callable[[Tensor], bool]) -> Tensor:
    """A point of a way to coefficients that are not allowed, by bisection: allowed, while one 1/64 farther is not.

    The way may end far beyond what is allowed, so that the 1/64 are of the way up to there. The start, which is taken
    to be allowed, where nothing of the way is but for a millionth.
    """
    low, high = 0.0, 1.0
    while high - low > max(high / 64, 1e-6):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(start + middle * (end - start)) else (low, middle)
    return start + low * (end - start)


@dataclass(frozen=True, eq=False)
class Objective:
    """What is minimised, for a composition and examples of each goal."""

    model: Composition
    terms: list[Term]
    parts: list[Batches]
    ridge: float

    @property
    def passes(self) -> float:
        """Spent so far, as `Fit` counts them."""
        return sum(term.expander.passes for term in self.terms)

    def value(self, c: Tensor) -> float:
        """By forward passes."""
        total = sum(term.mean(part, c) for term, part in zip(self.terms, self.parts, strict=True))
        return total + self.ridge / 2 * float(c.double().square().sum())

    def slope(self, c: Tensor) -> tuple[float, Tensor]:
        """The value and its gradient `[r]`, float64; weights are composed once, and their gradient projected once."""
        return self._pulled(c, [(term, part, _count(part)) for term, part in zip(self.terms, self.parts, strict=True)])

    def _pulled(self, c: Tensor, jobs: list[tuple[Term, Batches, int]]) -> tuple[float, Tensor]:
        """The same by some examples of each goal, of so many whose mean is taken, and the ridge."""
        leaf = c.clone().requires_grad_()
        with torch.enable_grad():
            composed = self.model.weights(leaf)
        leaves = {name: t.detach().requires_grad_() for name, t in composed.items()}
        total = self.ridge / 2 * float(c.double().square().sum())
        for term, part, count in jobs:
            for batch in part:
                value = partial(_summed, term.loss, labels_of(batch), term.weight / count)
                total += term.expander.pull(leaves, batch, value)
        pairs = [(composed[name], t.grad) for name, t in leaves.items() if t.grad is not None]
        slope = self.ridge * c.flatten().double()
        if pairs:
            (found,) = torch.autograd.grad([t for t, _ in pairs], leaf, [g for _, g in pairs])
            slope = slope + found.flatten().double()
        return total, slope

    def metric(self, c: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, float, Tensor]:
        """Rows `[q, r]`, the signs of their squares, value and slope; no example is gone through twice."""
        rows, signs, rest = [], [], []
        value, slope = 0.0, torch.zeros_like(c.flatten(), dtype=torch.float64)
        for term, part in zip(self.terms, self.parts, strict=True):
            count, few = _count(part), part
            if count > METRIC and (isinstance(part, TensorBatches) or sum(1 for _ in part) > 1):
                other, few = part.split(METRIC / count, draws)
                rest.append((term, other, count))
            weight, share = term.weight / _count(few), term.weight / count
            for batch in few:
                f, a = term.expander.along(c, batch, partial(_directions, term.loss, draws))
                value += share * float(term.loss.value(f, labels_of(batch)).double().sum())
                slope = slope + share * a[:, 0].double().sum(0)
                rows.append(abs(weight) ** 0.5 * a[:, 1:].double().flatten(0, 1))
                signs.append(torch.full_like(rows[-1][:, 0], math.copysign(1.0, weight)))
        others, along = self._pulled(c, rest)
        return torch.cat(rows), torch.cat(signs), value + others, slope + along


class Descent:
    """Steps of `fit_`, one by one.

    Args:
        objective: What is minimised.
        c: Where to begin, `[n, S]`.
        reach: As in `fit_`.
        draws: For the metric's directions and examples.
        penalty: What is not smooth in the objective.

    Attributes:
        c: The best coefficients so far.
        value: The objective there.
        slope: The gradient of what is smooth in it, `[r]` in float64.
        radius: Of the region of trust.
        curvature: The model's.
        verdict: What to say if no step ever helps.
    """

    def __init__(
        self, objective: Objective, c: Tensor, reach: float, draws: torch.Generator, penalty: Penalty | None = None
    ) -> None:
        self.objective, self.c, self.radius, self.verdict = objective, c, reach, Outcome.STAGNATED
        self.penalty = penalty or Penalty()
        rows, signs, value, self.slope = objective.metric(c, draws)
        self.value = value + self.penalty(c)
        self.curvature = Curvature.of(rows, signs, objective.ridge)

    def step(self, least: float) -> float | None:
        """Try a step; how much it lowers the objective, 0 if it is taken back, None if the model expects too little."""
        here = self.c.flatten().double()
        d = self.penalty.step(self.curvature, self.slope, here, self.radius)
        expected, length = -self.penalty.change(self.curvature, self.slope, here, d), self.curvature.length(d)
        if expected <= least and length < 0.9 * self.radius:
            return None
        c = self.penalty.moved(here, d).view_as(self.c).to(self.c)
        value, slope = self.objective.slope(c)
        value += self.penalty(c)
        if not (math.isfinite(value) and bool(slope.isfinite().all())):
            self.radius, self.verdict = length / 4, Outcome.NOT_FINITE
            return 0.0
        gain = self.value - value
        self.curvature = self.curvature.learnt(d, slope - self.slope)
        if gain > 0.75 * expected and length > 0.8 * self.radius:
            self.radius *= 2
        elif gain < 0.1 * expected:
            self.radius = length / (2 if gain > 0 else 4)
        if not gain > 0:
            return 0.0
        self.c, self.value, self.slope = c, value, slope
        return gain


def _summed(loss: Loss, labels: Tensor | None, share: float, f: Tensor) -> Tensor:
    return share * loss.value(f, labels).sum()


def _directions(loss: Loss, draws: torch.Generator, f: Tensor, batch: Any) -> Tensor:
    """The loss's own direction, and random ones whose mean square is its geometry's metric, `[1 + m, n, ..., C]`."""
    leaf = f.detach().clone().requires_grad_()
    with torch.enable_grad():
        (own,) = torch.autograd.grad(loss.value(leaf, labels_of(batch)).sum(), leaf)
        z = loss.geometry.embed(leaf)
        found = [own]
        for turn in range(DIRECTIONS):
            signs = torch.randint(0, 2, z.shape, generator=draws).to(z) * 2 - 1
            pulled = torch.autograd.grad(z, leaf, signs / DIRECTIONS**0.5, retain_graph=turn < DIRECTIONS - 1)
            found.append(pulled[0])
    return torch.stack(found)


def _count(part: Batches) -> int:
    return sum(len(tensor_leaves(batch)[0]) for batch in part)


def _solved(objective: Objective, steps: int, rtol: float, target: float) -> Fit:
    """Steps of a linear composition; the first is the solution but for rounding."""
    c = objective.model.coefficients.detach().clone()
    value = objective.value(c)
    least, mu, outcome = rtol * abs(value), None, Outcome.MAX_ITERATIONS
    losses, passes = [value], [objective.passes]
    for _ in range(steps):
        if value <= target:
            break
        problem = Problem.at(objective.terms, objective.parts, c, objective.ridge)
        mu = EXACT * problem.scale() if mu is None else mu
        found = searched(problem, objective.value, value, mu, least)
        if found.c is None:
            outcome = found.outcome
            break
        small, c, value, mu = value - found.value <= least, found.c, found.value, found.damping
        losses.append(value)
        passes.append(objective.passes)
        if small:
            outcome = Outcome.CONVERGED
            break
    with torch.no_grad():
        objective.model.coefficients.copy_(c)
    return Fit(tuple(losses), tuple(passes), math.inf, Outcome.CONVERGED if value <= target else outcome)
