r"""Forgetting: coefficients that make a network bad at a target and leave what it can do on a control.

minimise over c   weight CE_control(c) - CE_target(c) + ridge/2 |c|^2    as far as the floor of the control allows
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    weight: float = 8.0,
    ridge: float = 0.0,
    steps: int = 30,
    generator: Generator = None,
) -> Fit:
    """Make a network bad at a target while it stays good at a control, in place.

    The loss is a weight times the cross-entropy on the control, minus that on the target. After every step the accuracy
    on control data that are set apart is looked at; the first step that takes it below the floor goes only as far as it
    does not, and is the last. The result is the first look at which least of the target is right: the loss falls on
    when there is nothing more to forget, and then costs the control for nothing.

    The data set apart decide nothing but the floor, so what they say of it is not what was fitted to them. Where they
    are a share of the control, they judge only what the steps lose: what the start has is judged by all of the control,
    none of which it was fitted to here, and the two are added.

    Args:
        model: A composition of vectors that know the target. Coefficients that begin below the floor are first
            brought back towards 0.
        target: Data to be forgotten, `(x, y)` or a `Goal` (of whose weight the size counts).
        control: Data to be kept, or a `Goal`.
        floor: Share that must be left of the control accuracy of the network at c = 0.
        held_out: Labelled control data that judge the floor, or the share of `control` to set apart for it.
        confidence: That the floor holds where the held-out data come from: an exact upper bound on the share of right
            predictions that are lost must leave it, and what is newly right does not count. None asks only for the
            share of the accuracy on these data. It is that of one look; a few looks make it a little less.
        weight: Of the control's loss beside that of the target. The published one is 1, with which a first step may
            meet the floor and be the last.
        ridge: Weight of |c|^2 / 2. A linear composition is solved for the minimum, and without a ridge there is none;
            others end at the floor or after so many steps.
        steps: Most steps, as in `fit_`.
        generator: Draws what is set apart and the directions of the metric.

    Returns:
        How the steps went, those after the best look too; the outcome is CONVERGED where the floor was met or steps
        became small, STAGNATED where no look finds less of the target right than the start, which is then the result.

    Raises:
        ValueError: `floor`, `held_out`, `confidence` or `weight` is out of range, a linear composition has no ridge, or
            the held-out data are too few for the confidence even if nothing is lost.

    Source: Zhang et al., NeurIPS 2024, Eq. 9, with the published floor; that it is judged on data apart, and
    the weight, are ours.
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor: got {floor}, expected a share of the control accuracy in (0, 1]")
    if not weight > 0:
        raise ValueError(f"weight: got {weight}, expected a number above 0")
    if model.linear and not ridge > 0:
        raise ValueError(f"ridge: got {ridge} for a linear composition, whose loss has no minimum; pass ridge=0.01")
    draws = as_generator(generator)
    away, kept = (data if isinstance(data, Goal) else Goal(data) for data in (target, control))
    learned, judge = _apart(kept, held_out, draws)
    goals = [replace(away, weight=-abs(away.weight)), replace(learned, weight=weight * kept.weight)]
    terms = [Term.of(model, goal) for goal in goals]
    before, held = model.coefficients.detach().clone(), Floor.of(model, judge, floor, confidence)
    first = Floor.of(model, kept, floor) if learned.data is not kept.data and confidence is None else held
    start = before if first(before) else farthest(torch.zeros_like(before), before, first)
    held = held if first is held else held.beside(first, start)
    looks = Looks(held, terms[0], start)
    end = before
    try:
        with torch.no_grad():
            model.coefficients.copy_(start)
        if model.linear:
            fit = fit_(model, goals, ridge=ridge, steps=steps)
            solution = model.coefficients.detach().clone()
            if not looks(solution):
                farthest(start, solution, looks)
        else:
            objective = Objective(model, terms, [term.batches for term in terms], ridge)
            fit = descend(objective, draws, steps=steps, allowed=looks)
        end = looks.best
    finally:
        with torch.no_grad():
            model.coefficients.copy_(end)
    return fit if looks.best is not start else replace(fit, outcome=Outcome.STAGNATED)


class Looks:
    """Whether coefficients are above a floor; of those that are, the first with which least of the target is right.

    Args:
        floor: Of the control.
        target: What is to be forgotten.
        start: Coefficients above the floor.

    Attributes:
        best: The coefficients.
        left: How many of the target's examples are right with them.
    """

    def __init__(self, floor: Floor, target: Term, start: Tensor) -> None:
        self.floor, self.target, self.best = floor, target, start
        self.left = self._left(start)

    def __call__(self, c: Tensor) -> bool:
        """Whether they are."""
        if not self.floor(c):
            return False
        left = self._left(c)
        if left < self.left:
            self.best, self.left = c, left
        return True

    def _left(self, c: Tensor) -> int:
        return int(_right(self.target.expander, c, self.target.batches, "target").sum())


@dataclass(frozen=True, eq=False)
class Floor:
    """Whether coefficients leave enough of an accuracy.

    Attributes:
        expander: Of the composition.
        judge: The data.
        least: Share of the accuracy at c = 0 that must be left.
        confidence: Of that, or None.
        right: Whether each example is right at c = 0.
        slack: Examples that may be lost beyond the floor.
    """

    expander: Expander
    judge: Batches
    least: float
    confidence: float | None
    right: Tensor
    slack: float = 0.0

    @classmethod
    def of(cls, model: Composition, judge: Goal, least: float, confidence: float | None = None) -> Floor:
        """That of the network at c = 0.

        Raises:
            ValueError: The data are too few for the confidence, which may be out of range.
        """
        expander, batches = Expander(model, judge.forward_fn, judge.output_fn), as_batches(judge.data, None, "held_out")
        right = _right(expander, torch.zeros_like(model.coefficients.detach()), batches)
        out = cls(expander, batches, least, confidence, right)
        if not out.kept(right):
            raise ValueError(
                f"confidence: got {confidence}, but of {int(right.sum())} right predictions on held-out data, even if"
                f" none is lost, that does not tell whether {least} are kept; pass more held_out data"
            )
        return out

    def beside(self, whole: Floor, c: Tensor) -> Floor:
        """The same for what is lost after some coefficients, up to which more examples tell what is.

        The accuracy at c' is taken to be that of the whole at c and, on these examples, that at c' less that at c.
        """
        here, there = (_right(part.expander, c, part.judge).double() for part in (self, whole))
        spare = [
            found.mean() - part.least * part.right.double().mean() for found, part in ((here, self), (there, whole))
        ]
        return replace(self, slack=float(spare[1] - spare[0]) * len(here))

    def __call__(self, c: Tensor) -> bool:
        """Whether they do."""
        return self.kept(_right(self.expander, c, self.judge))

    def kept(self, right: Tensor) -> bool:
        """Whether predictions do, of which these are right."""
        if self.confidence is None:
            return int(right.sum()) + self.slack >= self.least * int(self.right.sum())
        if not bool(self.right.any()):
            return False
        lost = changed_upper_bound(int((self.right & ~right).sum()), int(self.right.sum()), self.confidence)
        return 1 - lost >= self.least


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
