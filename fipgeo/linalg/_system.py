"""What every solver shares: a damped square system with counted products, and checks of what came."""

import torch
from torch import Tensor

from fipgeo.linalg._stacks import norms
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Solution


class System:
    """`(A + damping I) x = b` for a stack of right-hand sides, with its products counted.

    Raises:
        ValueError: if A is not square, the right-hand side does not fit, or damping is negative or not
            finite.
        TypeError: if the dtypes differ.
    """

    def __init__(self, operator: LinearOperator, rhs: Tensor, damping: float) -> None:
        if operator.shape[0] != operator.shape[1]:
            raise ValueError(f"operator has shape {operator.shape}, expected a square one; for least squares take lsmr")
        require_damping(damping)
        self.rhs = as_rows(operator, rhs, operator.shape[0])
        self.operator, self.damping, self.num_products = operator, float(damping), 0
        self.lengths = norms(self.rhs)
        self.batch = rhs.shape[:-1]

    def __call__(self, x: Tensor) -> Tensor:
        """`A x + damping x` for a stack `[k, n]`."""
        self.num_products += len(x)
        product = self.operator(x)
        return product + self.damping * x if self.damping else product

    def residual(self, x: Tensor) -> Tensor:
        """`b - A x - damping x`, `[k, n]`, by a true product."""
        return self.rhs - self(x)

    def relative(self, residual: Tensor) -> Tensor:
        """Norms of residuals `[k, n]` relative to the right-hand sides, `[k]`."""
        return ratio(norms(residual), self.lengths)

    def solution(self, x: Tensor, residual: Tensor, outcome: Outcome, num_iters: int, **extra: Tensor) -> Solution:
        """The record for `x` and relative residuals `[k]`, in the batch shape that came."""
        unfolded = {name: entry.reshape((*entry.shape[:-1], *self.batch)) for name, entry in extra.items()}
        value = x.reshape((*self.batch, x.shape[-1]))
        return Solution(value, outcome, residual.reshape(self.batch), num_iters, self.num_products, **unfolded)


def as_rows(operator: LinearOperator, rhs: Tensor, size: int, name: str = "rhs") -> Tensor:
    """The stack `[k, size]` of `rhs` `[..., size]`, after a check of size and dtype."""
    if rhs.ndim == 0 or rhs.shape[-1] != size:
        raise ValueError(
            f"{name} has shape {tuple(rhs.shape)}, expected [..., {size}] for an operator of shape "
            f"{operator.shape}; vectors are rows of a stack"
        )
    if rhs.dtype != operator.dtype:
        raise TypeError(f"{name} is {rhs.dtype}, the operator {operator.dtype}; convert with .to({operator.dtype})")
    return rhs.reshape(-1, size)


def require_damping(damping: float) -> None:
    """Refuse damping that is negative or not finite."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping is {damping}, expected a finite number of at least 0")


def tolerance(rtol: float | None, dtype: torch.dtype) -> float:
    """`rtol` if it was given; otherwise 1e-6, or 100 eps where that is more (1.2e-5 in float32)."""
    return max(1e-6, 100 * torch.finfo(dtype).eps) if rtol is None else rtol


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, 0 where `part` is 0."""
    return torch.where(part == 0, part, part / whole)


def require_spectrum(operator: LinearOperator, k: int) -> None:
    """Refuse operators that are not symmetric and a k out of range."""
    m, n = operator.shape
    if m != n:
        raise ValueError(
            f"operator has shape {operator.shape}, expected a symmetric one; for singular values take Gram"
        )
    if not operator.symmetric:
        raise ValueError("operator is not declared symmetric; build it with symmetric=True or psd=True, or take Gram")
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, expected 1 to {n} for an operator of shape {operator.shape}")
