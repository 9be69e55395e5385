"""Spectra by factorisation: through the m x m Gram matrix of a short root, or of a dense matrix."""

from dataclasses import replace

import torch
from torch import Tensor

from fipgeo.linalg._stacks import norms, scaled, wide
from fipgeo.linalg._system import require_spectrum
from fipgeo.linalg.factor import DualFactor
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Spectrum


@torch.no_grad()
def dual_eigh(
    root: LinearOperator,
    *,
    scale: float = 1.0,
    k: int | None = None,
    gram: Tensor | None = None,
    vectors: bool = True,
) -> Spectrum:
    """Largest eigenpairs of `scale R^T R` through the float64 Gram matrix `K = R R^T` of a short root.

        K u = s u    gives    v = R^T u / sqrt(s),    lambda = scale s

    Vectors are orthonormalised from the largest on; those of zero eigenvalues are filled up from the
    complement.

    Args:
        root: R, shape `(m, n)`, m up to some thousands.
        scale: factor of `R^T R`, not negative.
        k: pairs, at most `min(m, n)`; None for all `min(m, n)`.
        gram: K, `[m, m]`, if it is known; None computes `root.gram()`.
        vectors: whether to make the vectors `[k, n]`, by k adjoint products, and measure their residuals, by
            k normal ones.

    Returns:
        Spectrum; `complete` if all values left out are below its `tolerance()`.

    Raises:
        ValueError: if k is out of range or `gram` has another shape.

    Example:
        >>> from fipgeo.linalg import Dense
        >>> found = dual_eigh(Dense(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]])), scale=0.5)
        >>> found.values, found.complete
        (tensor([4.5000, 2.0000]), True)
    """
    bound = min(root.shape)
    if k is not None and not 1 <= k <= bound:
        raise ValueError(f"k is {k}, expected 1 to {bound}, the smaller size of a root of shape {root.shape}")
    factor = DualFactor(root, gram, scale)
    k = bound if k is None else k
    if not vectors:
        return _record(factor.operator, factor.eigenvalues, k, None, factor.num_products)
    rows = root.adjoint(factor.vectors[:k].to(root.dtype))
    found = torch.linalg.qr(rows.T).Q.T.contiguous()
    return _record(factor.operator, factor.eigenvalues, k, found, factor.num_products + k)


@torch.no_grad()
def dense_eigh(operator: LinearOperator, k: int | None = None, max_bytes: int = 2**31) -> Spectrum:
    """Largest eigenpairs of a small symmetric operator, by a float64 eigen-decomposition of its matrix.

    Args:
        operator: A, symmetric, shape `(n, n)`.
        k: pairs; None for all n.
        max_bytes: the largest matrix, in the operator's dtype, that may be made.

    Returns:
        Spectrum; `complete` if all values left out are zero to rounding.

    Raises:
        ValueError: if A is not square, not declared symmetric or larger than `max_bytes`, or k is out of
            range.

    Example:
        >>> from fipgeo.linalg import Diagonal
        >>> dense_eigh(Diagonal(torch.tensor([1.0, 3.0, 2.0])), k=2).values
        tensor([3., 2.])
    """
    n = operator.shape[0]
    k = n if k is None else k
    require_spectrum(operator, k)
    matrix = operator.to_dense(max_bytes).to(wide(operator.device))
    values, columns = torch.linalg.eigh((matrix + matrix.T) / 2)
    vectors = columns.flip(1)[:, :k].T.to(operator.dtype).contiguous()
    return _record(operator, values.flip(0), k, vectors, n)


def _record(operator: LinearOperator, values: Tensor, k: int, vectors: Tensor | None, num_products: int) -> Spectrum:
    """The k largest of all values, with residuals by true products if there are vectors."""
    values = values.to(operator.dtype)
    found = Spectrum(
        values[:k],
        vectors,
        None,
        operator.shape[0],
        rank_bound=operator.rank_bound,
        num_products=num_products,
    )
    complete = bool((values[k:].abs() <= found.tolerance()).all())
    if vectors is None:
        return replace(found, complete=complete)
    residuals = norms(operator(vectors) - scaled(values[:k], vectors)).to(operator.dtype)
    outcome = Outcome.CONVERGED if bool(torch.isfinite(residuals).all()) else Outcome.NOT_FINITE
    return replace(
        found,
        complete=complete,
        residuals=residuals,
        outcome=outcome,
        num_products=num_products + len(vectors),
    )
