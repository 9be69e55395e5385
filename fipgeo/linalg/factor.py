"""Direct solves: dense Cholesky, and the dual route through the m x m Gram matrix of a short root."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fipgeo.linalg._dual import dual_solved
from fipgeo.linalg._precision import widened
from fipgeo.linalg._refine import refined
from fipgeo.linalg._stacks import wide
from fipgeo.linalg._system import Damping, System, as_rows
from fipgeo.linalg.nodes import Gram
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Solution

_MANY = 8  # Cholesky factorisations that cost less than one eigen-decomposition
_SHORT = "expected m x m, the inner products R R^T of the root's rows, without scale or damping"


@torch.no_grad()
def cholesky(
    operator: LinearOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    rtol: float | None = None,
    max_bytes: int = 2**31,
) -> Solution:
    """`(A + damping I) x = b` by a float64 Cholesky factorisation of the dense matrix.

    One refinement with true products follows where rounding to the operator's dtype left too much.

    Args:
        operator: A, shape `(n, n)`, symmetric; its symmetric part is used.
        rhs: b, `[..., n]`.
        damping: added to the diagonal.
        rtol: the relative residual that counts as converged; None for 1e-6, in float32 1.2e-5 (100 eps).
        max_bytes: the largest dense matrix, in the operator's dtype, that may be made.

    Returns:
        Solution. `BREAKDOWN`: the matrix is not positive definite (`value` is zero). `STAGNATED`: the true
        residual stays above `rtol`.

    Raises:
        ValueError: if A is not square or larger than `max_bytes`, shapes do not fit, or damping is negative.
        TypeError: if dtypes differ.

    Examples:
        >>> from fipgeo.linalg import Diagonal
        >>> cholesky(Diagonal(torch.tensor([1.0, 3.0])), torch.tensor([4.0, 8.0]), damping=1.0).value
        tensor([2., 2.])
    """
    system = System(operator, rhs, damping)
    matrix = operator.to_dense(max_bytes).to(wide(operator.device))
    system.num_products += operator.shape[0]
    matrix = (matrix + matrix.T) / 2
    matrix.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(torch.isfinite(matrix).all()):
        return _failed(system, Outcome.NOT_FINITE)
    if int(info):
        return _failed(system, Outcome.BREAKDOWN)

    return refined(system, lambda b, rows: _cholesky_solve(b, factor), rtol, refine=1)


@torch.no_grad()
def woodbury(
    root: LinearOperator,
    rhs: Tensor,
    *,
    damping: Damping,
    scale: float = 1.0,
    gram: Tensor | None = None,
    refine: int = 5,
    rtol: float | None = None,
) -> Solution:
    """`(scale R^T R + damping I) x = b` through the Gram matrix `K = R R^T` of a short root.

    K is m x m and factored once, by Cholesky in float64:

        x = (b - R^T (K + damping / scale)^{-1} R b) / damping

    The difference cancels like `lambda_max / damping`, so a few digits are lost; refinements with true products
    square that loss away. For more solves with one root keep a `DualFactor`.

    Args:
        root: R, shape `(m, n)`, m up to some thousands.
        rhs: b, `[..., n]`; see `DualFactor.solve` for float64 with a root in lower precision.
        damping: positive; a list or tensor `[p]` solves for each.
        scale: factor of `R^T R`, not negative.
        gram: K, `[m, m]`, if it is known; None computes `root.gram()`.
        refine: most refinements; each costs a normal, a forward and an adjoint product for a right-hand side.
        rtol: the relative residual at which refinement stops and the solve counts as converged; None for
            1e-6, in float32 1.2e-5 (100 eps).

    Returns:
        Solution. `BREAKDOWN`: `gram` is indefinite beyond the damping. `STAGNATED`: `rtol` was not reached.

    Raises:
        ValueError: if damping is not positive, scale is negative, or shapes do not fit.
        TypeError: if dtypes differ.

    Source: Woodbury, Inverting modified matrices (1950); Golub & Van Loan, Matrix Computations, 2.1.4.

    Examples:
        >>> from fipgeo.linalg import Dense
        >>> woodbury(Dense(torch.tensor([[1.0, 0.0, 0.0]])), torch.tensor([2.0, 1.0, 0.0]), damping=1.0).value
        tensor([1., 1., 0.])
    """
    system = System(Gram(root, scale), rhs, damping)
    _require_positive(system.dampings)
    dual = _dual_gram(root, gram)
    spent = min(root.shape) if gram is None else 0
    factors = [_cholesky(dual, scale, number) for number in system.dampings]
    known = [factor for factor in factors if factor is not None]
    if len(known) < len(factors):
        outcome = Outcome.BREAKDOWN if bool(torch.isfinite(dual).all()) else Outcome.NOT_FINITE
        return replace(_failed(system, outcome), num_products=spent)
    inverses = [lambda y, factor=factor: _cholesky_solve(y, factor) for factor in known]
    found = refined(system, _dual_inverse(system, root, scale, inverses), rtol, refine)
    return replace(found, num_products=found.num_products + spent)


class DualFactor:
    """`scale R^T R` through its Gram matrix `K = R R^T`, factored for any damping.

    The first few dampings get a Cholesky factorisation each, `m^3 / 3` operations. The eigen-decomposition, about
    ten times that, is made once it is asked for (`eigenvalues`, `vectors`, `null_project`) or more than 8 dampings
    have come; from then on a further damping costs nothing.

    Args:
        root: R, shape `(m, n)`, m up to some thousands.
        gram: K, `[m, m]`, symmetric, if it is known; None computes `root.gram()`.
        scale: factor of `R^T R`, not negative.
        dtype: precision of the factorisations; None for float64. float32 takes half the time and memory, and
            refinement makes up for it unless damping is below about `1e-6 m lambda_max`.

    Attributes:
        operator: `scale R^T R`.
        num_products: products spent on K.

    Raises:
        ValueError: if `gram` has another shape, is not finite, or scale is negative.

    Examples:
        >>> from fipgeo.linalg import Dense
        >>> factor = DualFactor(Dense(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])))
        >>> factor.solve(torch.tensor([5.0, 2.0, 1.0]), damping=1.0).value
        tensor([1., 1., 1.])
        >>> factor.eigenvalues.tolist()
        [4.0, 1.0]
        >>> factor.null_project(torch.tensor([5.0, 2.0, 1.0]))
        tensor([0., 0., 1.])
    """

    @torch.no_grad()
    def __init__(
        self,
        root: LinearOperator,
        gram: Tensor | None = None,
        scale: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.root, self.scale, self.operator = root, float(scale), Gram(root, scale)
        dual = _dual_gram(root, gram)
        if not bool(torch.isfinite(dual).all()):
            raise ValueError("gram (R R^T) has entries that are not finite; check the root's products")
        self.num_products = min(root.shape) if gram is None else 0
        self.dual = dual.to(dtype or dual.dtype)
        self._eigen: tuple[Tensor, Tensor] | None = None
        self._last: tuple[float, Tensor] | None = None
        self._num_factored = 0
        self._proved = False  # whether a solve by true products has shown K to be that of the root

    @property
    def vectors(self) -> Tensor:
        """The eigenvectors u of K, `[m, m]`, one a row, in the order of the eigenvalues."""
        return self._decomposed()[1]

    @property
    def eigenvalues(self) -> Tensor:
        """The `min(m, n)` largest of `scale R^T R`, descending, not negative; all others are zero."""
        return self.scale * self._decomposed()[0][: min(self.root.shape)]

    @torch.no_grad()
    def _decomposed(self) -> tuple[Tensor, Tensor]:
        if self._eigen is None:
            values, vectors = torch.linalg.eigh(self.dual)
            self._eigen, self._last = (values.flip(0).clamp(min=0), vectors.flip(1).T), None
        return self._eigen

    def _inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """`y -> (scale K + damping)^{-1} y` on stacks `[k, m]`."""
        if self._eigen is None:
            if self._last is None or self._last[0] != damping:
                factor = _cholesky(self.dual, self.scale, damping)
                self._num_factored += 1
                self._last = None if factor is None else (damping, factor)
            if self._last is not None:
                factor = self._last[1]
                return lambda y: _cholesky_solve(y, factor)
        values, vectors = self._decomposed()  # also where rounding made K indefinite
        weights = 1 / (self.scale * values + damping)
        return lambda y: ((y.to(values.dtype) @ vectors.T * weights) @ vectors).to(y.dtype)

    @torch.no_grad()
    def solve(self, rhs: Tensor, damping: Damping, *, rtol: float | None = None, refine: int = 5) -> Solution:
        """`(scale R^T R + damping I) x = b`, refined with true products until `rtol` or `refine` times.

        All dampings and right-hand sides go through the root together: a stacked forward product with b, one
        stacked adjoint, and one stacked normal product that measures the residuals. Each refinement of those that
        are not small costs the same again.

        Once such a solve has converged, further ones take two thirds of that or less. Their `residual` comes from a
        true forward product with the x that is returned, and K: with `x = (b - scale R^T y) / damping` it is
        `scale R^T (y - R x)`, of length `scale sqrt(q^T K q)`, q = y - R x, plus two units in the last place of
        `scale R^T y`. A refinement costs a forward and an adjoint product. Where that does not converge, the normal
        products above decide.

        Args:
            rhs: b, `[..., n]`. In float64 for a root in lower precision, vectors and products are in float64 where
                the root has them (a matrix, or what is made of matrices), and conjugate gradients with the
                factorisation as preconditioner finish what refinement leaves; otherwise vectors are rounded at
                every product, and `STAGNATED` is the verdict where that keeps `rtol` from being measured.
            damping: positive; a list or tensor `[p]` solves for each, with p as first axis of the record.
            rtol: the relative residual at which refinement stops and the solve counts as converged; None for
                1e-6, in float32 1.2e-5 (100 eps).
            refine: most refinements; they stop where they no longer help.

        Raises:
            ValueError: if a damping is not positive or shapes do not fit.
            TypeError: if dtypes differ.
        """
        system = System(self.operator, rhs, damping)
        _require_positive(system.dampings)
        new = {number for number in system.dampings if self._last is None or number != self._last[0]}
        if self._num_factored + len(new) > _MANY:
            self._decomposed()
        inverses = [self._inverse(number) for number in system.dampings]
        if self._proved and len(system.rhs):
            found = dual_solved(system, self.root, self.scale, self.dual, inverses, rtol, refine)
            if found is not None:
                return found
        found = refined(system, _dual_inverse(system, self.root, self.scale, inverses), rtol, refine)
        self._proved = self._proved or (found.ok and found.num_iters <= 1)
        return found

    @torch.no_grad()
    def null_project(self, v: Tensor, rtol: float | None = None) -> Tensor:
        """The part of v that R does not see, `v - R^T K^+ R v`, `[..., n]`, by two passes.

        Args:
            v: `[..., n]`.
            rtol: eigenvalues up to `rtol` times the largest count as zero; None for the rounding of the root
                or of K, whichever is larger: `max(eps, 10 m eps_64)` with eps of the root's dtype.

        Raises:
            ValueError: if shapes do not fit.
            TypeError: if dtypes differ.
        """
        root, _ = widened(self.root, v.dtype)
        rows = as_rows(root, v, root.shape[1], "v")
        values, vectors = self._decomposed()
        if rtol is None:
            own, dual = (torch.finfo(dtype).eps for dtype in (self.root.dtype, values.dtype))
            rtol = max(own, 10 * root.shape[0] * dual)
        seen = values > rtol * values[:1]
        vectors, values = vectors[seen], values[seen]
        for _ in range(2):
            image = root(rows).to(values.dtype)
            rows = rows - root.adjoint(((image @ vectors.T / values) @ vectors).to(rows.dtype))
        return rows.reshape(v.shape)


def _dual_gram(root: LinearOperator, gram: Tensor | None) -> Tensor:
    m = root.shape[0]
    if gram is None:
        return root.gram()
    if gram.shape != (m, m):
        raise ValueError(f"gram has shape {tuple(gram.shape)} for a root of shape {root.shape}; {_SHORT}")
    return gram.to(wide(root.device))


def _require_positive(dampings: list[float]) -> None:
    if 0 in dampings:
        raise ValueError(
            "damping is 0, but R^T R of a short root is singular; pass damping > 0, or take "
            "DualFactor.null_project for the limit of small damping"
        )


def _cholesky(dual: Tensor, scale: float, damping: float) -> Tensor | None:
    """The lower factor of `scale dual + damping I`, None if that is not positive definite."""
    matrix = scale * dual
    matrix.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(matrix)
    return None if int(info) or not bool(torch.isfinite(factor.diagonal()).all()) else factor


def _cholesky_solve(y: Tensor, factor: Tensor) -> Tensor:
    """`(L L^T)^{-1} y` on stacks; `torch.cholesky_solve` would copy L for every call."""
    half = torch.linalg.solve_triangular(factor, y.to(factor.dtype).T, upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True).T.to(y.dtype)


def _dual_inverse(
    system: System, root: LinearOperator, scale: float, inverses: list[Callable[[Tensor], Tensor]]
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`b -> (b - scale R^T (scale K + damping)^{-1} R b) / damping`, given the m x m inverse for each damping.

    The stack is that of the system's rows given, or, for None, of all right-hand sides, and then R b is made once
    for all dampings.
    """
    root, _ = widened(root, system.rhs.dtype)

    def solve(b: Tensor, rows: Tensor | None) -> Tensor:
        source = system.base if rows is None else b
        image = root(source).to(wide(b.device))
        system.num_products += len(source) + len(b)
        if rows is None:
            inner = torch.cat([inverse(image) for inverse in inverses])
            at: Tensor | slice = slice(None)
        else:
            inner, at, which = torch.empty_like(image), rows, rows // max(1, len(system.base))
            for i in which.unique().tolist():
                inner[which == i] = inverses[i if system.path else 0](image[which == i])
        return system.divided(b - scale * root.adjoint(inner.to(b.dtype)), at)

    return solve


def _failed(system: System, outcome: Outcome) -> Solution:
    """The zero solution with its residual, for a factorisation that does not exist."""
    x = torch.zeros_like(system.rhs)
    return system.solution(x, system.relative(system.rhs), outcome, 0)
