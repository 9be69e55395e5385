"""What compositions are used for, and what task vectors do to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.expansion import Expander
from fipgeo.atlas.goals import Goal, Term, labels_of
from fipgeo.atlas.losses import Loss, as_loss
from fipgeo.atlas.proximal import Expanded
from fipgeo.atlas.solve import Fit, Objective, descend, fit_, halved
from fipgeo.data import Generator, as_batches, as_generator
from fipgeo.lazy import entries_of, gathered
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.task_vectors import TaskVector


def forget_(
    model: Composition,
    target: Any,
    control: Any,
    *,
    floor: float = 0.95,
    ridge: float = 1e-2,
    steps: int = 30,
    generator: Generator = None,
) -> Fit:
    """Make a network bad at a target while it stays good at a control, in place.

    The loss is cross-entropy on the control minus that on the target. The accuracy on the control is looked at after
    every step; the first step that takes it below the floor is halved until it does not, and is the last.

    Args:
        model: A composition of vectors that know the target.
        target: Data to be forgotten, `(x, y)` or a `Goal` (of whose weight the size counts).
        control: Data to be kept, or a `Goal`.
        floor: Share of the control accuracy at the start that must be left.
        ridge: Weight of |c|^2 / 2; the loss alone has no minimum.
        steps: Most steps, as in `fit_`.
        generator: Draws the directions of the metric.

    Returns:
        How it went; the outcome is CONVERGED where the floor was met or steps became small.

    Raises:
        ValueError: `floor` is not in (0, 1].

    Source: Zhang et al., NeurIPS 2024, Eq. 9, with the published floor.
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor: got {floor}, expected a share of the control accuracy in (0, 1]")
    away, kept = (data if isinstance(data, Goal) else Goal(data) for data in (target, control))
    goals = [replace(away, weight=-abs(away.weight)), kept]
    expander = Expander(model, kept.forward_fn, kept.output_fn)
    least = floor * _accuracy(expander, model.coefficients.detach(), kept)

    def held(c: Tensor) -> bool:
        return _accuracy(expander, c, kept) >= least

    if model.linear:
        before = model.coefficients.detach().clone()
        fit = fit_(model, goals, ridge=ridge, steps=steps)
        after = model.coefficients.detach().clone()
        if not held(after):
            with torch.no_grad():
                model.coefficients.copy_(halved(before, after, held))
        return fit
    terms = [Term.of(model, goal) for goal in goals]
    objective = Objective(model, terms, [term.batches for term in terms], ridge)
    return descend(objective, as_generator(generator), steps=steps, allowed=held)


def _accuracy(expander: Expander, c: Tensor, goal: Goal) -> float:
    found = []
    for batch in as_batches(goal.data):
        labels = labels_of(batch)
        if labels is None:
            raise ValueError("control: its accuracy needs labels; pass batches (x, y) with a tensor y")
        found.append(expander.outputs(c, batch).argmax(-1) == labels)
    return float(torch.cat(found).double().mean())


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
