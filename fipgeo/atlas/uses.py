"""What compositions are used for, and what task vectors do to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.expansion import Expander
from fipgeo.atlas.goals import Goal, Term, labels_of
from fipgeo.atlas.losses import Loss, as_loss
from fipgeo.atlas.proximal import Expanded
from fipgeo.atlas.solve import Fit, Objective, descend, farthest, fit_
from fipgeo.data import Batches, Generator, as_batches, as_generator
from fipgeo.lazy import entries_of, gathered
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.paths import changed_upper_bound
from fipgeo.task_vectors import TaskVector


def forget_(
    model: Composition,
    target: Any,
    control: Any,
    *,
    floor: float = 0.95,
    held_out: Any = 0.25,
    confidence: float | None = None,
    ridge: float = 1e-2,
    steps: int = 30,
    generator: Generator = None,
) -> Fit:
    """Make a network bad at a target while it stays good at a control, in place.

    The loss is cross-entropy on the control minus that on the target. After every step the accuracy on control data
    that are set apart is looked at; the first step that takes it below the floor goes only as far as it does not, and
    is the last. Those data decide nothing else, so what they say of the floor is not what was fitted to them.

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
        ridge: Weight of |c|^2 / 2; the loss alone has no minimum.
        steps: Most steps, as in `fit_`.
        generator: Draws what is set apart and the directions of the metric.

    Returns:
        How it went; the outcome is CONVERGED where the floor was met or steps became small.

    Raises:
        ValueError: `floor`, `held_out` or `confidence` is out of range, or the held-out data are too few for the
            confidence even if nothing is lost.

    Source: Zhang et al., NeurIPS 2024, Eq. 9, with the published floor; that it is judged on data apart is ours.
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor: got {floor}, expected a share of the control accuracy in (0, 1]")
    away, kept = (data if isinstance(data, Goal) else Goal(data) for data in (target, control))
    draws = as_generator(generator)
    kept, judge = _apart(kept, held_out, draws)
    goals = [replace(away, weight=-abs(away.weight)), kept]
    held = Floor.of(model, judge, floor, confidence)
    start = model.coefficients.detach().clone()
    if not held(start):
        with torch.no_grad():
            model.coefficients.copy_(farthest(torch.zeros_like(start), start, held))
    if model.linear:
        before = model.coefficients.detach().clone()
        fit = fit_(model, goals, ridge=ridge, steps=steps)
        after = model.coefficients.detach().clone()
        if not held(after):
            with torch.no_grad():
                model.coefficients.copy_(farthest(before, after, held))
        return fit
    terms = [Term.of(model, goal) for goal in goals]
    objective = Objective(model, terms, [term.batches for term in terms], ridge)
    return descend(objective, draws, steps=steps, allowed=held)


@dataclass(frozen=True, eq=False)
class Floor:
    """Whether coefficients leave enough of an accuracy.

    Attributes:
        expander: Of the composition.
        judge: The data.
        least: Share of the accuracy at c = 0 that must be left.
        confidence: Of that, or None.
        right: Whether each example is right at c = 0.
    """

    expander: Expander
    judge: Batches
    least: float
    confidence: float | None
    right: Tensor

    @classmethod
    def of(cls, model: Composition, judge: Goal, least: float, confidence: float | None) -> Floor:
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

    def __call__(self, c: Tensor) -> bool:
        """Whether they do."""
        return self.kept(_right(self.expander, c, self.judge))

    def kept(self, right: Tensor) -> bool:
        """Whether predictions do, of which so many are right."""
        if self.confidence is None:
            return int(right.sum()) >= self.least * int(self.right.sum())
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


def _right(expander: Expander, c: Tensor, batches: Batches) -> Tensor:
    """Whether the best score of each example is its label's."""
    found = []
    for batch in batches:
        labels = labels_of(batch)
        if labels is None:
            raise ValueError("control: its accuracy needs labels; pass batches (x, y) with a tensor y")
        found.append((expander.outputs(c, batch).argmax(-1) == labels).flatten())
    return torch.cat(found)


def choose_vectors(
    base: nn.Module,
    vectors: Sequence[TaskVector],
    data: Any,
    budget: int,
    *,
    loss: str | Loss = "cross_entropy",
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
) -> list[TaskVector]:
    """At most `budget` vectors for each tensor, those that add most to what the outputs can do.

    Coefficients, one for each vector and tensor, are taken in the order of a pivoted Cholesky factorisation of the
    metric B^T g B at the base: each time the one that moves the outputs most in a direction which those before it do
    not. A large vector that repeats another is left out, unlike under a choice by gradients.

    Args:
        base: The network.
        vectors: Task vectors over its parameters.
        data: Inputs, with labels or without.
        budget: Vectors a tensor.
        loss: Whose metric counts.
        forward_fn: (network, batch) -> raw outputs.
        output_fn: Raw outputs -> the tensor that the loss gets.

    Returns:
        The vectors, each with the tensors for which it was chosen; a `Composition` of them holds no others.

    Raises:
        ValueError: The budget is not positive.
    """
    if budget < 1:
        raise ValueError(f"budget: got {budget} vectors for a tensor, expected at least 1")
    model = Composition(base, vectors)
    expander, chosen = Expander(model, forward_fn, output_fn), as_loss(loss)
    c = model.coefficients.detach()
    rows = []
    for batch in as_batches(data, argument="data"):
        f, a = expander(c, batch)
        rows.append(Expanded(chosen, 1.0, f.to(a.dtype), a, None).root(torch.zeros_like(c).flatten()))
    picks = pivots(torch.cat(rows), budget, len(model.labels))
    out = []
    for number, vector in enumerate(vectors):
        names = {label for place, label in enumerate(model.labels) if picks[number, place]}
        kept = {name: entry for name, entry in entries_of(vector.parameters).items() if name in names}
        out.append(TaskVector(gathered(kept)))
    return out


def pivots(root: Tensor, budget: int, columns: int) -> Tensor:
    """Which columns of a root `[rows, n S]` a pivoted Cholesky factorisation of its Gram matrix takes.

    Args:
        root: R; the columns belong to n vectors, S to each.
        budget: Most that are taken of the n which share one of the S places.
        columns: S.

    Returns:
        Whether each is taken, `[n, S]`; none that those before it span.
    """
    gram = root.double().T @ root.double()
    left = gram.diagonal().clone()
    taken = torch.zeros(len(left), dtype=torch.bool, device=root.device)
    factor = gram.new_zeros(len(left), 0)
    tiny = 1e-12 * float(left.max())
    for _ in range(min(len(left), budget * columns)):
        full = taken.view(-1, columns).sum(0) >= budget
        open_ = left.where(~taken & ~full.repeat(len(left) // columns), -1.0)
        best = int(open_.argmax())
        if not open_[best] > tiny:
            break
        column = (gram[best] - factor @ factor[best]) / left[best].sqrt()
        factor = torch.cat([factor, column[:, None]], 1)
        left = left - column.square()
        taken[best] = True
    return taken.view(-1, columns)


def cosines(vectors: Sequence[TaskVector]) -> Tensor:
    """Cosines of all pairs of task vectors, `[n, n]`: what is far from 0 off the diagonal interferes when added."""
    n = len(vectors)
    out = torch.eye(n, dtype=torch.float64)
    for i in range(n):
        for j in range(i):
            out[i, j] = out[j, i] = vectors[i].cosine(vectors[j])
    return out


@torch.no_grad()
def disentanglement_error(
    base: nn.Module,
    vectors: Sequence[TaskVector],
    inputs: Sequence[Any],
    scales: Sequence[float] | None = None,
    *,
    forward_fns: Sequence[ForwardFn | None] | None = None,
) -> Tensor:
    """Share of each task's inputs whose prediction by its own vector changes once all vectors are added, `[n]`.

    Args:
        base: The network.
        vectors: One for each task.
        inputs: Inputs of each task.
        scales: Coefficients of the vectors; None for 1.
        forward_fns: (network, batch) -> scores, for tasks with heads of their own.

    Raises:
        ValueError: The lists differ in length.

    Source: Ortiz-Jimenez et al., Task Arithmetic in the Tangent Space, NeurIPS 2023, Eq. 5, for the 0-1 distance.
    """
    scales = [1.0] * len(vectors) if scales is None else list(scales)
    forward_fns = [None] * len(vectors) if forward_fns is None else list(forward_fns)
    if not len(vectors) == len(inputs) == len(scales) == len(forward_fns):
        raise ValueError(
            f"vectors, inputs, scales, forward_fns: got {len(vectors)}, {len(inputs)}, {len(scales)} and"
            f" {len(forward_fns)}, expected one of each for every task"
        )
    every = base
    for vector, scale in zip(vectors, scales, strict=True):
        every = vector.apply_to(every, scale)
    out = []
    for vector, scale, data, forward in zip(vectors, scales, inputs, forward_fns, strict=True):
        maps = [OutputMap(net, forward_fn=forward) for net in (vector.apply_to(base, scale), every)]
        points = [m.point() for m in maps]
        pairs = [[m(p, batch)[0].argmax(-1) for m, p in zip(maps, points, strict=True)] for batch in as_batches(data)]
        out.append(torch.cat([(one != all_).double().flatten() for one, all_ in pairs]).mean())
    return torch.stack(out)
