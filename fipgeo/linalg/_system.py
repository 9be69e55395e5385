"""What every solver shares: a damped square system with counted products, and checks of what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fipgeo.linalg._precision import widened
from fipgeo.linalg._stacks import norms, scaled, wide
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Solution

Damping = float | Sequence[float] | Tensor


class System:
    """`(A + damping I) x = b` for a stack of right-hand sides, with its products counted.

    Several dampings make a row of each pair of damping and right-hand side, `[p k, n]`. A right-hand side in
    float64 makes all products in float64 where A has them, else the products are cast and `exact` is False.

    Raises:
        ValueError: if A is not square, the right-hand side does not fit, or a damping is negative or not
            finite.
        TypeError: if the dtypes differ.
    """

    def __init__(self, operator: LinearOperator, rhs: Tensor, damping: Damping) -> None:
        if operator.shape[0] != operator.shape[1]:
            raise ValueError(f"operator has shape {operator.shape}, expected a square one; for least squares take lsmr")
        self.own_dtype = operator.dtype
        operator, self.exact = widened(operator, rhs.dtype)
        self.base = as_rows(operator, rhs, operator.shape[0])
        self.dampings = as_dampings(damping)
        self.path = isinstance(damping, Sequence) or (isinstance(damping, Tensor) and damping.ndim == 1)
        self.operator, self.num_products = operator, 0
        self.shifts: Tensor | float = self.dampings[0]
        self.rhs, self.batch = self.base, rhs.shape[:-1]
        if self.path:
            count = len(self.dampings)
            self.batch = torch.Size((count, *self.batch))
            self.rhs = self.base.repeat(count, 1)
            shifts = torch.tensor(self.dampings, dtype=wide(rhs.device), device=rhs.device)
            self.shifts = shifts.repeat_interleave(len(self.base))
        self.lengths = norms(self.rhs)

    def __call__(self, x: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """`A x + damping x` for a stack `[k, n]`, which stands at `rows` of the right-hand sides."""
        self.num_products += len(x)
        product = self.operator(x)
        if isinstance(self.shifts, Tensor):
            return product + scaled(self.shifts[rows], x)
        return torch.add(product, x, alpha=self.shifts) if self.shifts else product

    def divided(self, x: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """`x / damping`, row by row."""
        return scaled(1 / self.shifts[rows], x) if isinstance(self.shifts, Tensor) else x / self.shifts

    def residual(self, x: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """`b - A x - damping x`, `[k, n]`, by a true product."""
        return self.rhs[rows] - self(x, rows)

    def relative(self, residual: Tensor) -> Tensor:
        """Norms of residuals `[k, n]` relative to the right-hand sides, `[k]`."""
        return ratio(norms(residual), self.lengths)

    def tolerance(self, rtol: float | None) -> float:
        """`rtol`, or the default for the precision of the products."""
        return tolerance(rtol, self.rhs.dtype if self.exact else self.own_dtype)

    def judged(self, outcome: Outcome, x: Tensor, rtol: float, norm: float) -> Outcome:
        """The verdict, CONVERGED only where the products are precise enough to measure `rtol`.

        Products that are cast err by `eps |A| |x|`, with `norm` a lower bound of `|A|`.
        """
        if self.exact or outcome is not Outcome.CONVERGED:
            return outcome
        error = torch.finfo(self.own_dtype).eps * norm * norms(x)
        return outcome if bool((error <= rtol * self.lengths).all()) else Outcome.STAGNATED

    def solution(self, x: Tensor, residual: Tensor, outcome: Outcome, num_iters: int, **extra: Tensor) -> Solution:
        """The record for `x` and relative residuals `[k]`, in the batch shape that came."""
        unfolded = {name: entry.reshape((*entry.shape[:-1], *self.batch)) for name, entry in extra.items()}
        value = x.reshape((*self.batch, x.shape[-1]))
        return Solution(value, outcome, residual.reshape(self.batch), num_iters, self.num_products, **unfolded)


def as_dampings(damping: Damping) -> list[float]:
    """One or several dampings as numbers, none negative or infinite."""
    if isinstance(damping, Tensor) and damping.ndim > 1:
        raise ValueError(f"damping has shape {tuple(damping.shape)}, expected a number or a list [p]")
    if isinstance(damping, Sequence):
        dampings = [float(number) for number in damping]
    else:
        dampings = [float(n) for n in damping.flatten().tolist()] if isinstance(damping, Tensor) else [float(damping)]
    if not dampings:
        raise ValueError("damping is empty, expected a number or a list of at least one")
    for number in dampings:
        require_damping(number)
    return dampings


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
