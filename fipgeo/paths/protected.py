"""A function that is to be kept, as weight space sees it: a residual and its derivative.

    L(theta) = |r(theta)|^2 / N        r: R^D -> R^K, zero where the function was taken
    R = dr / dtheta                    g = R^T R / N, the metric that a step is measured in

Inputs whose outputs are compared are one kind (`Kept`), a sketch of a metric that needs no inputs is another
(`fipgeo.memory.Sketch`), and several of them together are one again (`Several`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fipgeo.linalg import LinearOperator
from fipgeo.linalg.nodes import Stack
from fipgeo.model import NotFiniteError
from fipgeo.space import WeightSpace


@dataclass(frozen=True, eq=False)
class Position:
    """Where a path stands: the flat weights `[D]` and the normalisation statistics that it has moved."""

    theta: Tensor
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


class Solver(NamedTuple):
    """A way to solve with a metric that is known in closed form.

    Attributes:
        solve: (x `[D]`, mu) -> (R_F^T R_F + mu)^{-1} x on the free weights F, zero elsewhere; for mu = 0 the
            pseudo-inverse.
        trace: tr R_F^T R_F.
    """

    solve: Callable[[Tensor, float], Tensor]
    trace: float


class Tangent(ABC):
    """The derivative R `[K, D]` of a protected function at a position, in the two forms that steps solve with.

    Attributes:
        rank_bound: The rank of R is at most this.
    """

    rank_bound: int

    @property
    @abstractmethod
    def root(self) -> LinearOperator:
        """R as an operator."""

    @abstractmethod
    def columns(self, free: Tensor) -> Tensor:
        """R_F `[K, |F|]`, the columns at the true entries of a mask `[D]`."""

    @abstractmethod
    def prepare(self) -> LinearOperator:
        """R, made ready for many products."""

    def gram(self) -> Tensor | None:
        """R R^T `[K, K]` in float64 where it can be had without R as rows; None where it cannot."""
        return None

    def solver(self, free: Tensor) -> Solver | None:
        """Solves in closed form for a mask `[D]` of free weights where there is one; None where there is not."""
        del free

    @abstractmethod
    def cost(self, *, columns: bool) -> float:
        """Model evaluations that the columns take, or else an estimate of the trace from products."""


class Protected(ABC):
    """A function of the weights that is to stay: r(theta) `[K]`, small where the function is what it was.

    Subclasses give the residual, its derivative and a way to make do with fewer rows. K is `num_rows`, N `num_examples`
    (what sums of squares are divided by), D the dimension of `space`.

    Attributes:
        affine: Whether r is affine in theta. Then a step in its metric has no second order to be taken back, and what
            damping let pass was meant to.
    """

    affine: bool = False

    @property
    @abstractmethod
    def space(self) -> WeightSpace:
        """The weights that it is a function of."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """N, what |r|^2 and R^T R are divided by."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """K, the length of the residual."""

    @property
    @abstractmethod
    def cost(self) -> float:
        """Model evaluations that one residual takes."""

    @abstractmethod
    def residual(self, position: Position) -> Tensor:
        """The residual `[K]` at a position, in the order of the rows of R.

        Raises:
            NotFiniteError: It is not finite.
        """

    @abstractmethod
    def tangent(self, position: Position, max_bytes: int = 2**30) -> Tangent:
        """R at a position.

        Args:
            position: Where.
            max_bytes: Most memory for what products keep.
        """

    @abstractmethod
    def subset(self, max_rows: int, generator: torch.Generator) -> Protected:
        """About the same function in at most `max_rows` rows, or as few as it can; itself where it has no more."""

    def loss(self, position: Position) -> float:
        """|r|^2 / N, summed in float64; infinite where the residual is not finite."""
        try:
            return float(self.residual(position).double().square().sum()) / self.num_examples
        except NotFiniteError:
            return float("inf")


class Several(Protected):
    """Several protected functions as one: L = sum_k w_k L_k, by the rows sqrt(w_k / N_k) R_k with N = 1.

    Args:
        parts: The functions, of the same weights.
        weights: w_k, one positive number a part; None for ones.

    Raises:
        ValueError: There is no part, weights and parts do not match, a weight is not positive, or the parts are
            functions of other weights.
    """

    def __init__(self, parts: Sequence[Protected], weights: Sequence[float] | None = None) -> None:
        self.parts = tuple(parts)
        self.weights = (1.0,) * len(self.parts) if weights is None else tuple(map(float, weights))
        if not self.parts:
            raise ValueError("parts: got none, expected at least one protected function")
        if len(self.weights) != len(self.parts) or not all(0 < w < float("inf") for w in self.weights):
            raise ValueError(
                f"weights: got {list(self.weights)}, expected {len(self.parts)} positive numbers, one a part"
            )
        shapes = dict(self.parts[0].space.shapes)
        for index, part in enumerate(self.parts):
            if list(part.space.shapes.items()) != list(shapes.items()):
                raise ValueError(
                    f"parts: number {index} is a function of other weights than the first (D = {part.space.dim} and"
                    f" {self.space.dim}); choose the same parameters for all, by params="
                )
        self.affine = all(part.affine for part in self.parts)

    @property
    def space(self) -> WeightSpace:
        """The weights of the first part, which are those of all."""
        return self.parts[0].space

    @property
    def num_examples(self) -> int:
        """One: what every part is divided by is in its rows."""
        return 1

    @property
    def num_rows(self) -> int:
        """Rows of all parts together."""
        return sum(part.num_rows for part in self.parts)

    @property
    def cost(self) -> float:
        """Model evaluations of all parts together."""
        return sum(part.cost for part in self.parts)

    @property
    def scales(self) -> tuple[float, ...]:
        """sqrt(w_k / N_k), what the rows of every part are multiplied by."""
        return tuple((w / part.num_examples) ** 0.5 for w, part in zip(self.weights, self.parts, strict=True))

    def residual(self, position: Position) -> Tensor:
        """The scaled residuals of all parts, one after the other."""
        scaled = zip(self.scales, self.parts, strict=True)
        return torch.cat([s * part.residual(position).to(position.theta.dtype) for s, part in scaled])

    def tangent(self, position: Position, max_bytes: int = 2**30) -> Tangent:
        """The scaled derivatives of all parts, one above the other; each part may hold an equal share of the memory."""
        share = max_bytes // len(self.parts)
        return StackedTangent([part.tangent(position, share) for part in self.parts], self.scales)

    def subset(self, max_rows: int, generator: torch.Generator) -> Protected:
        """Every part in its share of the rows: what a part does not need of an equal share is left to the others."""
        if self.num_rows <= max_rows:
            return self
        shares = equal_shares([part.num_rows for part in self.parts], max_rows)
        smaller = [part.subset(max(share, 1), generator) for part, share in zip(self.parts, shares, strict=True)]
        return Several(smaller, self.weights)


class StackedTangent(Tangent):
    """Scaled derivatives one above the other.

    Args:
        parts: The derivatives.
        scales: What each is multiplied by.
    """

    def __init__(self, parts: Sequence[Tangent], scales: Sequence[float]) -> None:
        self.parts, self.scales = tuple(parts), tuple(scales)
        self.rank_bound = min(parts[0].root.shape[1], sum(part.rank_bound for part in parts))

    @property
    def root(self) -> LinearOperator:
        """R of all parts."""
        return Stack([s * part.root for s, part in self._scaled()])

    def columns(self, free: Tensor) -> Tensor:
        """R_F of all parts."""
        return torch.cat([s * part.columns(free) for s, part in self._scaled()])

    def prepare(self) -> LinearOperator:
        """R with every part made ready."""
        return Stack([s * part.prepare() for s, part in self._scaled()])

    def cost(self, *, columns: bool) -> float:
        """Model evaluations of all parts."""
        return sum(part.cost(columns=columns) for part in self.parts)

    def _scaled(self) -> list[tuple[float, Tangent]]:
        return list(zip(self.scales, self.parts, strict=True))


def equal_shares(wanted: Sequence[int], total: int) -> list[int]:
    """What everybody gets of a total that is handed out equally, nobody more than wanted.

    Examples:
        >>> equal_shares([10, 100, 100], 100)
        [10, 45, 45]
    """
    shares, left, waiting = [0] * len(wanted), total, len(wanted)
    for index in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        shares[index] = min(wanted[index], left // waiting)
        left, waiting = left - shares[index], waiting - 1
    return shares
