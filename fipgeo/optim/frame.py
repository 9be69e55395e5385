r"""The metric that some steps share: made at one point, on one draw of rows, in units of the learning rates.

Weights may have rates of their own, eta = eta_max S with S diagonal. In coordinates theta = S^{1/2} phi a step of one
common rate is damped as usual, and brought back it is

    eta_max S^{1/2} mu (S^{1/2} g S^{1/2} + mu)^{-1} S^{1/2} d = eta Q d,       Q = S^{-1/2} P S^{1/2}

so that for mu -> 0 the protected function does not feel it whatever the rates are, and for mu -> infinity it is eta d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fipgeo.linalg import Diagonal, LinearOperator
from fipgeo.optim.coordinates import Coordinates
from fipgeo.paths import Compensation, Position, Protected, Tangent
from fipgeo.space import WeightSpace


@dataclass(frozen=True, eq=False)
class Scaled(Protected):
    """A protected function in coordinates phi with theta = c phi.

    Attributes:
        inner: The function of theta; positions are given in theta.
        scale: c `[D]`.
    """

    inner: Protected
    scale: Tensor

    @property
    def space(self) -> WeightSpace:
        """The space of theta."""
        return self.inner.space

    @property
    def num_examples(self) -> int:
        """N."""
        return self.inner.num_examples

    @property
    def num_rows(self) -> int:
        """K."""
        return self.inner.num_rows

    @property
    def cost(self) -> float:
        """Model evaluations of a residual."""
        return self.inner.cost

    def residual(self, position: Position) -> Tensor:
        """The residual `[K]`, which is the same in all coordinates."""
        return self.inner.residual(position)

    def tangent(self, position: Position, max_bytes: int = 2**30) -> Tangent:
        """R diag(c)."""
        return ScaledTangent(self.inner.tangent(position, max_bytes), self.scale)

    def subset(self, max_rows: int, generator: torch.Generator) -> Protected:
        """The same with fewer rows."""
        return Scaled(self.inner.subset(max_rows, generator), self.scale)


class ScaledTangent(Tangent):
    """R diag(c).

    Args:
        inner: R.
        scale: c `[D]`.
    """

    def __init__(self, inner: Tangent, scale: Tensor) -> None:
        self.inner, self.scale, self.rank_bound = inner, scale, inner.rank_bound

    @property
    def root(self) -> LinearOperator:
        """R diag(c) as an operator."""
        return self.inner.root @ Diagonal(self.scale)

    def columns(self, free: Tensor) -> Tensor:
        """The chosen columns, scaled."""
        return self.inner.columns(free) * self.scale[free]

    def prepare(self) -> LinearOperator:
        """The same, made ready for many products."""
        return self.inner.prepare() @ Diagonal(self.scale)

    def cost(self, *, columns: bool) -> float:
        """Model evaluations, as without the scale."""
        return self.inner.cost(columns=columns)


class Frame:
    """The metric at one point, on one draw of rows.

    Made again from the same arguments and the same state of the generator, it is the same to the last bit.

    Args:
        keep: What is protected.
        coordinates: Its weights.
        position: The point.
        rates: Learning rate of every tensor that may move, relative to the largest.
        damping: mu as a multiple of the mean non-zero eigenvalue of the metric.
        max_rows: Rows at most.
        generator: What draws them.
    """

    def __init__(
        self,
        keep: Protected,
        coordinates: Coordinates,
        position: Position,
        rates: Mapping[str, float],
        *,
        damping: float,
        max_rows: int,
        generator: torch.Generator,
    ) -> None:
        self.position, self.rates, self.draw = position, dict(rates), generator.get_state()
        self.part = keep.subset(max_rows, generator)
        scale = coordinates.each(self.rates)
        free = scale > 0
        self.scale: Tensor | None = None
        seen = self.part
        if any(rate != 1 for rate in self.rates.values()):
            self.scale = scale.sqrt()
            seen = Scaled(self.part, self.scale)
            self.inverse = torch.where(free, 1 / torch.where(free, self.scale, 1), 0)
        self.moves = None if damping == math.inf else Compensation(seen, position, free, damping=damping)

    def passed(self, d: Tensor) -> Tensor:
        """Q d for a wish d `[D]`, which is zero where nothing may move."""
        moves = self.moves
        if moves is None or moves.mu == math.inf:
            return d
        for _ in range(2 if moves.mu == 0 else 1):  # a projection needs two passes to be one to rounding
            if self.scale is None:
                d = d + moves(moves.masked(d))
            else:
                d = d + self.inverse * moves(moves.masked(self.scale * d))
        return d

    def correction(self, residual: Tensor) -> Tensor:
        """The Gauss-Newton move `[D]` that takes a residual of `part` back, as far as this metric tells."""
        if self.moves is None:
            return torch.zeros_like(self.position.theta)
        move = self.moves(residual)
        return move if self.scale is None else self.scale * move
