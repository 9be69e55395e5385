"""What task vectors do to one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.kinds import Isotropic
from fipgeo.atlas.losses import Loss
from fipgeo.atlas.selection import root
from fipgeo.data import as_batches
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.task_vectors import TaskVector


def cosines(vectors: Sequence[TaskVector]) -> Tensor:
    """Cosines of all pairs of task vectors, `[n, n]`: what is far from 0 off the diagonal interferes when added."""
    n = len(vectors)
    out = torch.eye(n, dtype=torch.float64)
    for i in range(n):
        for j in range(i):
            out[i, j] = out[j, i] = vectors[i].cosine(vectors[j])
    return out


def interference(
    base: nn.Module,
    vectors: Sequence[TaskVector],
    data: Any,
    *,
    loss: str | Loss = "cross_entropy",
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
) -> Tensor:
    """Cosines of all pairs in the metric of the outputs on some data, `[n, n]`: tau_i^T g tau_j over their lengths.

    Vectors that are orthogonal as weights may pull the outputs the same way, and parallel ones may touch weights that
    the data do not feel. A vector that the data do not feel at all has cosine 0 with others.

    Args:
        base: The network, at which the metric is taken.
        vectors: Task vectors over its parameters.
        data: Inputs, with labels or without.
        loss: Whose metric counts.
        forward_fn: (network, batch) -> raw outputs.
        output_fn: Raw outputs -> the tensor that the loss gets.

    Examples:
        >>> base = nn.Linear(2, 3, bias=False)
        >>> one, other = (TaskVector({"weight": torch.eye(3)[:, [i, i]]}) for i in (0, 1))
        >>> interference(base, [one, one, other], torch.ones(4, 2), loss="square")
        tensor([[1., 1., 0.],
                [1., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64)
    """
    rows = root(Composition(base, vectors, Isotropic()), data, loss, forward_fn, output_fn).double()
    lengths = torch.linalg.vector_norm(rows, dim=0)
    unit = rows / lengths.where(lengths > 0, 1.0)
    return (unit.T @ unit).fill_diagonal_(1.0)


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
