"""What task vectors do to one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.data import as_batches
from fipgeo.model import ForwardFn, OutputMap
from fipgeo.task_vectors import TaskVector


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
