"""What a weight is worth to the function that a path keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from fipgeo.paths.kept import Kept, Position


def metric_diagonal(
    kept: Kept, position: Position, samples: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """An unbiased estimate of diag g `[D]`: mean of (R_b^T u)^2 / n over minibatches b and random signs u.

    E (R_b^T u)_j^2 = sum over the minibatch's rows of R_rj^2, since the signs are independent (Bekas, Kokiopoulou &
    Saad, An Estimator for the Diagonal of a Matrix, 2007, applied to R^T R).
    """
    function = kept.at(position)
    weights = function.map.named(position.theta)
    total, seen = torch.zeros_like(position.theta), 0
    with function.map.frozen():
        for _ in range(samples):
            batch, z0, live = kept.draw(batch_size, generator)
            z, pull = torch.func.vjp(function.on(batch), weights)[:2]
            count = z.numel() if live is None else int(live.sum())
            signs = torch.randint(2, (count,), generator=generator).to(z) * 2 - 1
            if live is not None:  # none is drawn for masked entries, so that more padding leaves the others as they are
                signs = torch.zeros_like(z).masked_scatter(live.reshape(-1), signs)
            total += function.map.space.ravel(pull(signs)[0]).square()
            seen += len(z0)
    return total / seen
