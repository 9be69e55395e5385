"""Direct solves: dense Cholesky, and the dual route through the m x m Gram matrix of a short root."""

from collections.abc import Callable

import torch
from torch import Tensor

from fipgeo.linalg._stacks import norms, wide
from fipgeo.linalg._system import System, as_rows, ratio, tolerance
from fipgeo.linalg.nodes import Gram
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Solution

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

    Example:
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

    def inverse(b: Tensor) -> Tensor:
        return torch.cholesky_solve(b.to(factor.dtype).T, factor).T.to(b.dtype)

    return _refined(system, inverse, rtol, refine=1)


@torch.no_grad()
def woodbury(
    root: LinearOperator,
    rhs: Tensor,
    *,
    damping: float,
    scale: float = 1.0,
    gram: Tensor | None = None,
    refine: int = 1,
    rtol: float | None = None,
) -> Solution:
    """`(scale R^T R + damping I) x = b` through the Gram matrix `K = R R^T` of a short root.

    K is m x m and factored once, by Cholesky in float64:

        x = (b - R^T (K + damping / scale)^{-1} R b) / damping

    The difference cancels like `lambda_max / damping`, so a few digits are lost; a refinement with a true
    product squares that loss away. For several dampings take `DualFactor`, which decomposes K once for all.

    Args:
        root: R, shape `(m, n)`, m up to some thousands.
        rhs: b, `[..., n]`.
        damping: positive.
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

    Example:
        >>> from fipgeo.linalg import Dense
        >>> woodbury(Dense(torch.tensor([[1.0, 0.0, 0.0]])), torch.tensor([2.0, 1.0, 0.0]), damping=1.0).value
        tensor([1., 1., 0.])
    """
    system = System(Gram(root, scale), rhs, damping)
    _require_positive(damping)
    dual = _dual_gram(root, gram)
    system.num_products += min(root.shape) if gram is None else 0
    dual = scale * dual
    dual.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(dual)
    if int(info):
        return _failed(system, Outcome.BREAKDOWN if bool(torch.isfinite(dual).all()) else Outcome.NOT_FINITE)
    return _refined(
        system,
        _dual_inverse(system, root, scale, lambda y: torch.cholesky_solve(y.T, factor).T),
        rtol,
        refine,
    )


class DualFactor:
    """`scale R^T R` through the eigen-decomposition of `K = R R^T`, made once in float64.

    Then a solve with any damping, and the projection on the null space of R, cost a few products each.

    Args:
        root: R, shape `(m, n)`, m up to some thousands.
        gram: K, `[m, m]`, if it is known; None computes `root.gram()`.
        scale: factor of `R^T R`, not negative.

    Attributes:
        eigenvalues: the `min(m, n)` largest of `scale R^T R`, descending, float64, not negative. All others
            are zero.
        vectors: the eigenvectors u of K, `[m, m]`, one a row, in the order of the eigenvalues.
        operator: `scale R^T R`.
        num_products: products spent on K.

    Raises:
        ValueError: if `gram` has another shape, is not finite, or scale is negative.

    Example:
        >>> from fipgeo.linalg import Dense
        >>> factor = DualFactor(Dense(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])))
        >>> factor.eigenvalues.tolist()
        [4.0, 1.0]
        >>> factor.solve(torch.tensor([5.0, 2.0, 1.0]), damping=1.0).value
        tensor([1., 1., 1.])
        >>> factor.null_project(torch.tensor([5.0, 2.0, 1.0]))
        tensor([0., 0., 1.])
    """

    @torch.no_grad()
    def __init__(self, root: LinearOperator, gram: Tensor | None = None, scale: float = 1.0) -> None:
        self.root, self.scale, self.operator = root, float(scale), Gram(root, scale)
        dual = _dual_gram(root, gram)
        if not bool(torch.isfinite(dual).all()):
            raise ValueError("gram (R R^T) has entries that are not finite; check the root's products")
        self.num_products = min(root.shape) if gram is None else 0
        values, vectors = torch.linalg.eigh((dual + dual.T) / 2)
        self._values, self.vectors = values.flip(0).clamp(min=0), vectors.flip(1).T
        self.eigenvalues = scale * self._values[: min(root.shape)]

    @torch.no_grad()
    def solve(self, rhs: Tensor, damping: float, *, rtol: float | None = None, refine: int = 2) -> Solution:
        """`(scale R^T R + damping I) x = b`, refined with true products until `rtol` or `refine` times.

        Args:
            rhs: b, `[..., n]`.
            damping: positive.
            rtol: the relative residual at which refinement stops and the solve counts as converged; None for
                1e-6, in float32 1.2e-5 (100 eps).
            refine: most refinements; they stop where they no longer help.

        Raises:
            ValueError: if damping is not positive or shapes do not fit.
            TypeError: if dtypes differ.
        """
        system = System(self.operator, rhs, damping)
        _require_positive(damping)
        weights = 1 / (self.scale * self._values + damping)

        def inverse(y: Tensor) -> Tensor:
            return (y @ self.vectors.T * weights) @ self.vectors

        return _refined(system, _dual_inverse(system, self.root, self.scale, inverse), rtol, refine)

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
        rows = as_rows(self.root, v, self.root.shape[1], "v")
        if rtol is None:
            own, dual = (torch.finfo(dtype).eps for dtype in (self.root.dtype, self._values.dtype))
            rtol = max(own, 10 * self.root.shape[0] * dual)
        seen = self._values > rtol * self._values[:1]
        vectors, values = self.vectors[seen], self._values[seen]
        for _ in range(2):
            image = self.root(rows).to(values.dtype)
            rows = rows - self.root.adjoint(((image @ vectors.T / values) @ vectors).to(rows.dtype))
        return rows.reshape(v.shape)


def _dual_gram(root: LinearOperator, gram: Tensor | None) -> Tensor:
    m = root.shape[0]
    if gram is None:
        return root.gram()
    if gram.shape != (m, m):
        raise ValueError(f"gram has shape {tuple(gram.shape)} for a root of shape {root.shape}; {_SHORT}")
    return gram.to(wide(root.device))


def _require_positive(damping: float) -> None:
    if damping == 0:
        raise ValueError(
            "damping is 0, but R^T R of a short root is singular; pass damping > 0, or take "
            "DualFactor.null_project for the limit of small damping"
        )


def _dual_inverse(
    system: System, root: LinearOperator, scale: float, inverse: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """`b -> (b - scale R^T (scale K + damping)^{-1} R b) / damping` on stacks, given the m x m inverse."""

    def solve(b: Tensor) -> Tensor:
        system.num_products += 2 * len(b)
        image = root(b).to(wide(b.device))
        return (b - scale * root.adjoint(inverse(image).to(b.dtype))) / system.damping

    return solve


def _refined(system: System, inverse: Callable[[Tensor], Tensor], rtol: float | None, refine: int) -> Solution:
    """Solve, and refine rows whose true residual is too large; a step that does not help is not taken."""
    rtol = tolerance(rtol, system.rhs.dtype)
    x = inverse(system.rhs)
    r = system.residual(x)
    size = system.relative(r)
    steps = 0
    while steps < refine and len(rows := (size > rtol).nonzero().squeeze(-1)):
        steps += 1
        trial = x[rows] + inverse(r[rows])
        left = system.rhs[rows] - system(trial)
        new = ratio(norms(left), system.lengths[rows])
        better = new < size[rows]
        rows = rows[better]
        x[rows], r[rows], size[rows] = trial[better], left[better], new[better]
        if not len(rows):
            break
    finite = bool(torch.isfinite(size).all())
    outcome = Outcome.CONVERGED if bool((size <= rtol).all()) else Outcome.STAGNATED
    return system.solution(x, size, outcome if finite else Outcome.NOT_FINITE, steps)


def _failed(system: System, outcome: Outcome) -> Solution:
    """The zero solution with its residual, for a factorisation that does not exist."""
    x = torch.zeros_like(system.rhs)
    return system.solution(x, system.relative(system.rhs), outcome, 0)
