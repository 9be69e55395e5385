"""The strongest r directions of rows that come by and by.

    B = (F; new rows),  B = U S V^T      F <- S_r V_r^T = U_r^T B,   E_t = the rest of B^T B,  |E_t| = s_{r+1}^2

What is left out is a sum of positive semi-definite parts, so F^T F <= G = sum of all rows' squares, and

    |G - F^T F| <= sum_t s_{r+1}^2(t),    |G - F^T F| <= tr G - tr F^T F

hold without a look back. Frequent directions (Liberty 2013; Ghashami et al. 2016) would also subtract s_{r+1}^2 from
the squares that stay, for a bound that is known beforehand. On Jacobians, whose spectra decay slowly behind few strong
directions, the sketch would be the worse for it: a larger true error and much less of the trace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fipgeo.jacobian import inner_products


def compressed(rows: Tensor, offset: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Rows turned and cut to the strongest `rank` directions.

    Args:
        rows: B `[m, D]`.
        offset: c `[m]`, turned and cut like the rows.
        rank: r.

    Returns:
        F `[min(r, m), D]` with orthogonal rows, strongest first, its offset, and s_{r+1}^2, the norm of what is left
        out of B^T B.
    """
    values, vectors = torch.linalg.eigh(inner_products(rows, rows, single=True))
    values, vectors = values.flip(0), vectors.flip(1)[:, :rank].T
    left = max(float(values[rank]), 0.0) if len(values) > rank else 0.0
    return vectors.to(rows.dtype) @ rows, vectors @ offset.double(), left


class Stream:
    """Takes rows `[some, D]` one block after the other and keeps F `[r, D]`.

    Args:
        rank: r.
        dim: D.
        block: Rows that are collected before they are merged into F; None for r.
        dtype: Of F and of the algebra.
        device: Where F lies.

    Attributes:
        trace: tr G, the sum of the squares of all rows so far.
        bound: What |G - F^T F| is at most.
    """

    def __init__(
        self, rank: int, dim: int, block: int | None = None, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rank, self.trace, self.bound, self._filled = rank, 0.0, 0.0, 0
        self._rows = torch.empty(rank + (rank if block is None else block), dim, dtype=dtype, device=device)

    def add(self, rows: Tensor) -> None:
        """Take some rows."""
        self.trace += float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
        for start in range(0, len(rows), len(self._rows)):
            part = rows[start : start + len(self._rows)]
            while len(part):
                if self._filled == len(self._rows):
                    self._shrink()
                taken = part[: len(self._rows) - self._filled]
                self._rows[self._filled : self._filled + len(taken)] = taken
                self._filled, part = self._filled + len(taken), part[len(taken) :]

    def finish(self) -> Tensor:
        """F `[min(r, rows), D]`, its rows orthogonal and in falling order."""
        self._shrink()
        found = self._rows[: self._filled].clone()
        self.bound = min(self.bound, max(self.trace - float(found.double().square().sum()), 0.0))
        return found

    def _shrink(self) -> None:
        here = self._rows[: self._filled]
        found, _, left = compressed(here, here.new_zeros(len(here)), self.rank)
        self._rows[: len(found)], self._filled = found, len(found)
        self.bound += left
