"""Which vectors a composition should hold, and what task vectors do to one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.expansion import Expander
from fipgeo.atlas.losses import Loss, as_loss
from fipgeo.atlas.proximal import Expanded
from fipgeo.data import as_batches
from fipgeo.lazy import entries_of, gathered
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.task_vectors import TaskVector


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
