"""The root as rows in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey
from fipgeo.jacobian.rows import RowMaker
from fipgeo.linalg import Dense


def materialised_root(function: EmbeddedOutputs, theta: Tensor, survey: Survey, chosen: Tensor | None = None) -> Dense:
    """R as a dense operator `[N * M, D]`; the caller has checked that it fits.

    Args:
        function: z.
        theta: The point, `[D]`.
        survey: Rows and examples of every batch.
        chosen: Boolean `[D]`: columns to keep, in their order; the others are dropped block by block.
    """
    start, width = 0, len(theta) if chosen is None else int(chosen.sum())
    with function.map.frozen():
        maker = RowMaker(function, function.map.named(theta))
        out = torch.empty(survey.num_rows, width, dtype=theta.dtype, device=theta.device)
        for batch, examples, height in zip(function.batches, survey.examples, survey.rows, strict=True):
            for rows in maker.blocks(batch, examples, height):
                out[start : start + len(rows)] = rows if chosen is None else rows[:, chosen]
                start += len(rows)
    return Dense(out)
