r"""Forgetting: coefficients that make a network bad at a target and leave what it can do on a control.

    minimise over c   v CE_control(c) - CE_target(c) + ridge/2 |c|^2    as far as the floor of the control allows

for several weights v, each from the same start; the end that leaves least of the target is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.expansion import Expander
from fipgeo.atlas.goals import Goal, Term, labels_of
from fipgeo.atlas.solve import Fit, Objective, descend, farthest, fit_
from fipgeo.data import Batches, Generator, as_batches, as_generator
from fipgeo.linalg import Outcome
from fipgeo.paths import changed_upper_bound


def forget_(
    model: Composition,
    target: Any,
    control: Any,
    *,
    floor: float = 0.95,
    held_out: Any = 0.25,
    confidence: float | None = None,
    weights: Sequence[float] = (16.0, 4.0),
    ridge: float = 0.0,
    steps: int = 15,
    generator: Generator = None,
) -> Fit:
    """Make a network bad at a target while it stays good at a control, in place.

    The loss is a weight times the cross-entropy on the control, minus that on the target. After every step the accuracy
    on control data that are set apart is looked at; the first step that takes it below the floor goes only as far as it
    does not, and is the last. How much weight the control needs hangs on the network, so each of some weights is tried
    from the same start, and that end is taken at which least of the target data are right. Which of several ends looks
    best depends on which of them the data set apart flatter: so much as the best of as many equal ones would be
    flattered (`flattery`, in standard errors of the change) has to be left above the floor, or the confidence is split.

    Args:
        model: A composition of vectors that know the target. Coefficients that begin below the floor are first
            brought back towards 0.
        target: Data to be forgotten, `(x, y)` or a `Goal` (of whose weight the size counts).
        control: Data to be kept, or a `Goal`.
        floor: Share that must be left of the control accuracy of the network at c = 0.
        held_out: Labelled control data that judge the floor, or the share of `control` to set apart for it.
        confidence: That the floor holds where the held-out data come from: an exact upper bound on the share of right
            predictions that are lost must leave it, and what is newly right does not count. None asks only for the
            share of the accuracy on these data. A few looks on a way make it a little less.
        weights: Of the control's loss, each above 0; the start of all is one metric of each of the two.
        ridge: Weight of |c|^2 / 2. The loss has no minimum without it, which a linear composition needs; for others
            the floor and the number of steps are bound enough.
        steps: Most steps for each weight, as in `fit_`.
        generator: Draws what is set apart and the directions of the metric.

    Returns:
        How it went with the weight that was taken; passes are counted from the very start, those of other weights
        included. The outcome is CONVERGED where the floor was met or steps became small, STAGNATED where nothing is
        better than the start.

    Raises:
        ValueError: `floor`, `held_out`, `confidence` or a weight is out of range, a linear composition has no ridge, or
            the held-out data are too few for the confidence even if nothing is lost.

    Source: Zhang et al., NeurIPS 2024, Eq. 9, with the published floor and one weight of 1; that the floor is judged on
    data apart, and several weights, are ours.
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor: got {floor}, expected a share of the control accuracy in (0, 1]")
    if not weights or not min(weights) > 0:
        raise ValueError(f"weights: got {weights!r}, expected one or more numbers above 0, such as (16, 4)")
    if model.linear and not ridge > 0:
        raise ValueError(f"ridge: got {ridge} for a linear composition, whose loss has no minimum; pass ridge=0.01")
    draws = as_generator(generator)
    away, kept = (data if isinstance(data, Goal) else Goal(data) for data in (target, control))
    kept, judge = _apart(kept, held_out, draws)
    goals = replace(away, weight=-abs(away.weight)), kept
    held = Floor.of(model, judge, floor, confidence, len(weights))
    before = model.coefficients.detach().clone()
    start = before if held(before) else farthest(torch.zeros_like(before), before, held)
    seen, end = Term.of(model, goals[0]), before

    def left(c: Tensor) -> int:
        return int(_right(seen.expander, c, seen.batches, "target").sum())

    try:
        least, chosen, out = left(start), start, None
        for fit, c in _tried(model, goals, start, weights, held, ridge, steps, draws):
            right = left(c)
            if right < least:
                least, chosen, out = right, c, fit
            elif out is None:
                out = replace(fit, outcome=Outcome.STAGNATED)
        end = chosen
    finally:
        with torch.no_grad():
            model.coefficients.copy_(end)
    assert out is not None
    return out


def _tried(
    model: Composition,
    goals: tuple[Goal, Goal],
    start: Tensor,
    weights: Sequence[float],
    held: Floor,
    ridge: float,
    steps: int,
    draws: torch.Generator,
) -> Iterator[tuple[Fit, Tensor]]:
    """How it went with each weight of the second goal, and where it ended."""
    terms = [Term.of(model, goal) for goal in goals]
    parts = [term.batches for term in terms]
    away, kept = terms
    near = []
    if not model.linear:
        near = [
            Objective(model, [t], [p], r).near(start, draws) for t, p, r in zip(terms, parts, (ridge, 0.0), strict=True)
        ]
    for weight in weights:
        with torch.no_grad():
            model.coefficients.copy_(start)
        if near:
            objective = Objective(model, [away, replace(kept, weight=weight * kept.weight)], parts, ridge)
            fit = descend(objective, near[0] + weight * near[1], steps=steps, allowed=held)
        else:
            fit = fit_(model, [goals[0], replace(goals[1], weight=weight * goals[1].weight)], ridge=ridge, steps=steps)
        c = model.coefficients.detach().clone()
        yield fit, c if held(c) else farthest(start, c, held)


@dataclass(frozen=True, eq=False)
class Floor:
    """Whether coefficients leave enough of an accuracy.

    Attributes:
        expander: Of the composition.
        judge: The data.
        least: Share of the accuracy at c = 0 that must be left.
        confidence: Of that, or None.
        right: Whether each example is right at c = 0.
        choices: Among how many ends one will be chosen.
    """

    expander: Expander
    judge: Batches
    least: float
    confidence: float | None
    right: Tensor
    choices: int = 1

    @classmethod
    def of(cls, model: Composition, judge: Goal, least: float, confidence: float | None, choices: int = 1) -> Floor:
        """That of the network at c = 0.

        Raises:
            ValueError: The data are too few for the confidence, which may be out of range.
        """
        expander, batches = Expander(model, judge.forward_fn, judge.output_fn), as_batches(judge.data, None, "held_out")
        right = _right(expander, torch.zeros_like(model.coefficients.detach()), batches)
        out = cls(expander, batches, least, confidence, right, choices)
        if not out.kept(right):
            raise ValueError(
                f"confidence: got {confidence}, but of {int(right.sum())} right predictions on held-out data, even if"
                f" none is lost, that does not tell whether {least} are kept; pass more held_out data"
            )
        return out

    def __call__(self, c: Tensor) -> bool:
        """Whether they do."""
        return self.kept(_right(self.expander, c, self.judge))

    def kept(self, right: Tensor) -> bool:
        """Whether predictions do, of which these are right."""
        if self.confidence is None:
            change = right.double() - self.right.double()
            error = float(change.std(correction=0)) * len(change) ** 0.5
            return float(right.sum()) - flattery(self.choices) * error >= self.least * int(self.right.sum())
        if not bool(self.right.any()):
            return False
        confidence = 1 - (1 - self.confidence) / self.choices
        lost = changed_upper_bound(int((self.right & ~right).sum()), int(self.right.sum()), confidence)
        return 1 - lost >= self.least


@cache
def flattery(choices: int) -> float:
    """The mean of the largest of so many independent standard normal numbers.

    By so many standard errors the best of as many equal candidates looks better than it is.

    Examples:
        >>> [round(flattery(n), 3) for n in (1, 2, 3)]
        [0.0, 0.564, 0.846]
    """
    from scipy.integrate import quad
    from scipy.stats import norm

    return quad(lambda x: choices * x * norm.pdf(x) * norm.cdf(x) ** (choices - 1), -10.0, 10.0)[0]


def _apart(control: Goal, held_out: Any, draws: torch.Generator) -> tuple[Goal, Goal]:
    """What is learned from, and what judges."""
    if not isinstance(held_out, int | float):
        return control, replace(control, data=held_out)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: got {held_out}, expected labelled data, or a share of the control in (0, 1)")
    learned, judge = as_batches(control.data, argument="control").split(held_out, draws)
    return replace(control, data=learned), replace(control, data=judge)


def _right(expander: Expander, c: Tensor, batches: Batches, argument: str = "control") -> Tensor:
    """Whether the best score of each example is its label's."""
    found = []
    for batch in batches:
        labels = labels_of(batch)
        if labels is None:
            raise ValueError(f"{argument}: its accuracy needs labels; pass batches (x, y) with a tensor y")
        found.append((expander.outputs(c, batch).argmax(-1) == labels).flatten())
    return torch.cat(found)
