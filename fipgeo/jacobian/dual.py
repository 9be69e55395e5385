"""The dual side of the metric: K = R R^T, its factorisation, and solves through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fipgeo.jacobian.gram import inner_products
from fipgeo.jacobian.root import JacobianRoot
from fipgeo.linalg import Dense, DualFactor, LinearOperator, Solution

ROUNDING = 10 * torch.finfo(torch.float32).eps
"""From this damping on, in units of the trace, seven digits of K leave refinement a contraction."""


class Dual:
    """K = R R^T `[N * M, N * M]`, of seven digits for as long as these are enough.

    Seven digits and a factorisation of that precision take less time. Solutions are refined and judged by true
    products, which show where so few digits are not enough; then K in float64 takes their place for good.

    Args:
        root: R, with N * M up to some thousands.
        scale: The factor of R^T R, 1 / N for the metric.

    Examples:
        >>> dual = Dual(Dense(torch.tensor([[3.0, 0.0]])), scale=1.0)
        >>> dual.solve(torch.tensor([10.0, 1.0]), damping=1.0).value
        tensor([1., 1.])
        >>> dual.gram
        tensor([[9.]], dtype=torch.float64)
    """

    def __init__(self, root: LinearOperator, scale: float) -> None:
        self.root, self.scale = root, scale
        self._gram: Tensor | None = None
        self._factor: DualFactor | None = None
        self._near: DualFactor | None = None

    @property
    def exact(self) -> bool:
        """Whether K is there in float64."""
        return self._gram is not None

    @property
    def ready(self) -> bool:
        """Whether there is a K to solve with."""
        return self._near is not None or self.exact

    @property
    def gram(self) -> Tensor:
        """K in float64, made once."""
        if self._gram is None:
            if isinstance(self.root, JacobianRoot):
                self._gram = self.root.gram()
            else:
                rows = self.root.matrix if isinstance(self.root, Dense) else self.root.to_dense()
                self._gram = inner_products(rows, rows)
            self._near = None
        return self._gram

    @property
    def factor(self) -> DualFactor:
        """The factorisation of K in float64, made once."""
        if self._factor is None:
            self._factor = DualFactor(self.root, gram=self.gram, scale=self.scale)
        return self._factor

    def solve(self, rhs: Tensor, damping: float | Sequence[float] | Tensor, *, rtol: float | None = None) -> Solution:
        """(scale R^T R + damping I) x = rhs; arguments and errors as those of `DualFactor.solve`."""
        spent = 0
        near = self._of_seven_digits(float(torch.as_tensor(damping).min()))
        if near is not None:
            found = near.solve(rhs, damping, rtol=rtol)
            if found.ok:
                return found
            spent = found.num_products
        found = self.factor.solve(rhs, damping, rtol=rtol)
        return replace(found, num_products=found.num_products + spent)

    def _of_seven_digits(self, damping: float) -> DualFactor | None:
        """The factorisation of K from products in single precision, where that can do for this damping."""
        if self.exact or not isinstance(self.root, JacobianRoot) or self.root.dtype.itemsize >= 8:
            return None
        if self._near is None:
            few = self.root.gram(single=True)
            self._near = DualFactor(self.root, gram=few, scale=self.scale, dtype=torch.float32)
        enough = damping >= ROUNDING * self.scale * float(self._near.dual.diagonal().sum())
        return self._near if enough else None
