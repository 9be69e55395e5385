"""Which vectors a composition should hold where memory is short: at most so many for each tensor.

Axis letters: n vectors, S tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.expansion import Expander
from fipgeo.atlas.goals import Goal, Term
from fipgeo.atlas.losses import Loss, as_loss
from fipgeo.atlas.proximal import Expanded
from fipgeo.atlas.solve import Objective
from fipgeo.data import Generator, as_batches, as_generator
from fipgeo.lazy import entries_of, gathered
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.task_vectors import TaskVector

RULES = ("leverage", "gradient", "whole gradient", "random")


def choose_vectors(
    base: nn.Module,
    vectors: Sequence[TaskVector],
    data: Any,
    budget: int,
    *,
    by: str | Tensor = "leverage",
    loss: str | Loss = "cross_entropy",
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
    generator: Generator = None,
) -> list[TaskVector]:
    """At most `budget` vectors for each tensor, those that a rule says are worth most.

    By leverage, coefficients, one for each vector and tensor, are taken in the order of a pivoted Cholesky
    factorisation of the metric B^T g B at the base: each time the one that moves the outputs most in a direction which
    those before it do not. A large vector that repeats another is left out, unlike under a choice by gradients; labels
    do not count.

    Args:
        base: The network.
        vectors: Task vectors over its parameters.
        data: Inputs, with labels or without.
        budget: Vectors a tensor.
        by: "leverage"; "gradient", the steepest coefficients |dL/dc| of each tensor at the base; "whole gradient",
            vectors as a whole by the sum of these over their tensors; "random", for each tensor anew; or scores `[n]`
            of vectors, such as those of `feature_similarity`, or `[n, S]` of vectors and tensors in the order of the
            labels of a `Composition`, of which the largest are taken.
        loss: Whose metric or gradient counts.
        forward_fn: (network, batch) -> raw outputs.
        output_fn: Raw outputs -> the tensor that the loss gets.
        generator: Draws what is random.

    Returns:
        The vectors, each with the tensors for which it was chosen; a `Composition` of them holds no others.

    Raises:
        ValueError: The budget is not positive, the rule is not known, or the scores are not of these shapes.

    Source: rules by gradients and by features are those of Zhang et al., NeurIPS 2024, Table 14; leverage is ours.

    Examples:
        >>> base, x = nn.Linear(3, 2), torch.ones(4, 3)
        >>> vectors = [TaskVector.between(base, nn.Linear(3, 2)) for _ in range(5)]
        >>> [len(chosen.tensors) for chosen in choose_vectors(base, vectors, x, 1, by=torch.arange(5))]
        [0, 0, 0, 0, 2]
    """
    if budget < 1:
        raise ValueError(f"budget: got {budget} vectors for a tensor, expected at least 1")
    model = Composition(base, vectors)
    n, columns = model.coefficients.shape
    if isinstance(by, Tensor):
        if by.shape not in ((n,), (n, columns)):
            raise ValueError(f"by: got scores {list(by.shape)}, expected [{n}] or [{n}, {columns}]")
        scores = by if by.dim() == 2 else by[:, None].expand(n, columns)
    elif by not in RULES:
        raise ValueError(f"by: got {by!r}, expected scores or one of {', '.join(RULES)}")
    elif by == "leverage":
        return _kept(model, vectors, pivots(root(model, data, loss, forward_fn, output_fn), budget, columns))
    elif by == "random":
        scores = torch.rand(n, columns, generator=as_generator(generator))
    else:
        term = Term.of(model, Goal(data, loss, forward_fn=forward_fn, output_fn=output_fn))
        _, slope = Objective(model, [term], [term.batches], 0.0).slope(model.coefficients.detach())
        scores = slope.view(n, columns).abs()
        scores = scores.sum(1, keepdim=True).expand(n, columns) if by == "whole gradient" else scores
    best = scores.topk(min(budget, n), 0).indices
    return _kept(model, vectors, torch.zeros_like(scores, dtype=torch.bool).scatter_(0, best, True))


def feature_similarity(
    base: nn.Module, data: Any, sources: Sequence[Any], *, feature_fn: ForwardFn | None = None
) -> Tensor:
    """Cosines of the mean features of some data and of those that each vector was made from, `[n]`.

    Args:
        base: The network.
        data: Inputs of the target.
        sources: Inputs of the task of each vector.
        feature_fn: (network, batch) -> features; None for its outputs.

    Raises:
        ValueError: There are no sources.

    Examples:
        >>> base, x = nn.Linear(2, 2, bias=False), torch.ones(3, 2)
        >>> _ = nn.init.eye_(base.weight)
        >>> feature_similarity(base, x, [x, torch.eye(2)[:1]]).round(decimals=2)
        tensor([1.0000, 0.7100], dtype=torch.float64)

    Source: Zhang et al., NeurIPS 2024, Table 14.
    """
    if not len(sources):
        raise ValueError("sources: got none, expected the inputs of the task of each vector")
    seen = OutputMap(base, forward_fn=feature_fn)
    point = seen.point()

    @torch.no_grad()
    def mean(inputs: Any) -> Tensor:
        found = [seen(point, batch)[0].flatten(1).double() for batch in as_batches(inputs)]
        return torch.cat(found).mean(0)

    target = mean(data)
    return torch.stack([torch.cosine_similarity(target, mean(source), dim=0) for source in sources])


def root(
    model: Composition, data: Any, loss: str | Loss, forward_fn: ForwardFn | None, output_fn: OutputFn | None
) -> Tensor:
    """R `[rows, n S]` with R^T R a multiple of B^T g B at the composition's coefficients."""
    expander, chosen = Expander(model, forward_fn, output_fn), as_loss(loss)
    c, rows = model.coefficients.detach(), []
    for batch in as_batches(data, argument="data"):
        f, a = expander(c, batch)
        rows.append(Expanded(chosen, 1.0, f.to(a.dtype), a, None).root(torch.zeros_like(c).flatten()))
    return torch.cat(rows)


def _kept(model: Composition, vectors: Sequence[TaskVector], chosen: Tensor) -> list[TaskVector]:
    """The vectors with the tensors `[n, S]` for which they were chosen."""
    out = []
    for vector, row in zip(vectors, chosen.tolist(), strict=True):
        names = {label for label, taken in zip(model.labels, row, strict=True) if taken}
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
