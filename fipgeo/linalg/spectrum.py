"""Spectra by factorisation: through the m x m Gram matrix of a short root, or of a dense matrix."""

from dataclasses import replace

import torch
from torch import Tensor

from fipgeo.linalg._stacks import as_generator, inner, norms, rademacher, scaled, wide
from fipgeo.linalg._system import require_spectrum, tolerance
from fipgeo.linalg.factor import DualFactor
from fipgeo.linalg.krylov import Search, lanczos
from fipgeo.linalg.nodes import Dense, Gram
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Spectrum

_CLEAR = 1e5  # from singular values above this many eps of the largest, vectors come out orthogonal
_WIDE = 400  # from this many rows on a few eigenvectors of a Gram matrix are found faster by Lanczos
_MODEST = 1500  # up to here, and where its digits will do, a whole decomposition in float32 is faster still
_DENSE_BLOCK = 4
_FEW = 20  # ... if they are less than one in 20


@torch.no_grad()
def root_lanczos(
    root: LinearOperator,
    k: int,
    *,
    scale: float = 1.0,
    rtol: float | None = None,
    max_products: int | None = None,
    block_size: int | None = None,
    generator: torch.Generator | int | None = None,
) -> Spectrum:
    """The k largest eigenpairs of `scale R^T R` by Lanczos on the smaller side of the root R.

    For a short root (m < n) the search runs on `scale R R^T` with vectors of length m, so a large n costs nothing
    but the products. Its eigenvectors are mapped back by one stacked adjoint product, `v = R^T u / |R^T u|`, and
    one stacked normal product measures their residuals; where one misses `rtol`, the search goes on. For a tall
    root this is `lanczos(Gram(root, scale), k)`.

    Args:
        root: R, shape `(m, n)`.
        k: pairs, at most `min(m, n)`.
        scale: factor of `R^T R`, not negative.
        rtol: a pair is accurate when `|A v - lambda v| <= rtol lambda_max`; None for 1e-6, in float32 1.2e-5.
        max_products: most products of the search with `R R^T`; None as in `lanczos`.
        block_size: vectors a step; None for the root's attribute `block`, or 2.
        generator: start vectors; generator or seed, None for the fixed seed 0.

    Returns:
        Spectrum with vectors `[k, n]`. `num_products` counts a product with `R R^T` as one, like a normal product.

    Raises:
        ValueError: if k is out of range or `scale` is negative.

    Examples:
        >>> from fipgeo.linalg import Dense
        >>> found = root_lanczos(Dense(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]])), k=1)
        >>> found.values.round(decimals=3), found.vectors.abs().round(decimals=3)
        (tensor([9.]), tensor([[1., 0., 0.]]))
    """
    m, n = root.shape
    if not 1 <= k <= min(m, n):
        raise ValueError(f"k is {k}, expected 1 to {min(m, n)}, the smaller size of a root of shape {root.shape}")
    block_size = int(getattr(root, "block", 2)) if block_size is None else block_size
    if m >= n:
        whole = Gram(root, scale)
        return lanczos(whole, k, rtol=rtol, max_products=max_products, block_size=block_size, generator=generator)
    rtol = tolerance(rtol, root.dtype)
    limit = max(100 + 20 * k, min(2 * m, 1000)) if max_products is None else max_products
    size = min(m, max(2 * k + 20, k + 2 * block_size))
    search = Search(Gram(root.T, scale), k, size, block_size, as_generator(generator))
    asked, last = rtol, float("inf")
    while True:
        outcome, complete = search.run(asked, limit)
        found = search.spectrum(outcome, complete)
        if found.vectors is None or not len(found.values):
            return replace(found, dim=n, rank_bound=root.rank_bound)
        back = _orthonormal(root.adjoint(found.vectors))
        search.num_products += 2 * len(back)
        residuals = norms(Gram(root, scale)(back) - scaled(found.values, back))
        worst = float(residuals.max() / found.values[0].abs()) if float(found.values[0]) else 0.0
        if worst <= rtol or not outcome.ok or not worst < 0.5 * last:
            break
        asked, last = 0.3 * asked * rtol / worst, worst
    if outcome.ok and not worst <= rtol:
        outcome = Outcome.STAGNATED if worst == worst else Outcome.NOT_FINITE
    elif outcome is Outcome.STAGNATED and worst <= rtol:
        outcome = Outcome.CONVERGED
    return replace(
        found,
        vectors=back,
        residuals=residuals.to(root.dtype),
        dim=n,
        rank_bound=root.rank_bound,
        outcome=outcome,
        num_products=search.num_products,
    )


@torch.no_grad()
def dual_eigh(
    root: LinearOperator,
    *,
    scale: float = 1.0,
    k: int | None = None,
    gram: Tensor | None = None,
    vectors: bool = True,
    rtol: float | None = None,
) -> Spectrum:
    """Largest eigenpairs of `scale R^T R` through the float64 Gram matrix `K = R R^T` of a short root.

        K u = s u    gives    v = R^T u / sqrt(s),    lambda = scale s

    A few pairs of a large K (k <= m / 20, m >= 400) are found by Lanczos on K, which costs `m^2` operations a
    vector instead of some `9 m^3`. Vectors are orthonormalised from the largest on; those of zero eigenvalues are
    filled up from the complement.

    Args:
        root: R, shape `(m, n)`, m up to some thousands.
        scale: factor of `R^T R`, not negative.
        k: pairs, at most `min(m, n)`; None for all `min(m, n)`.
        gram: K, `[m, m]`, if it is known; None computes `root.gram()`.
        vectors: whether to make the vectors `[k, n]`, by k adjoint products. Their residuals are measured in K, and
            what products round on top by true products with two sums of all vectors with random signs.
        rtol: a residual, relative to the largest eigenvalue, that is good enough for a few pairs; None for all
            digits that there are.

    Returns:
        Spectrum; `complete` if all values left out are below its `tolerance()`.

    Raises:
        ValueError: if k is out of range or `gram` has another shape.

    Examples:
        >>> from fipgeo.linalg import Dense
        >>> found = dual_eigh(Dense(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]])), scale=0.5)
        >>> found.values, found.complete
        (tensor([4.5000, 2.0000]), True)
    """
    bound = min(root.shape)
    if k is not None and not 1 <= k <= bound:
        raise ValueError(f"k is {k}, expected 1 to {bound}, the smaller size of a root of shape {root.shape}")
    if vectors and k is not None and root.shape[0] >= _WIDE and k * _FEW <= bound:
        found = _few(root, scale, k, gram, rtol)
        if found is not None:
            return found
    factor = DualFactor(root, gram, scale)
    k = bound if k is None else k
    if not vectors:
        return _record(factor.operator, factor.eigenvalues, k, None, factor.num_products)
    return _mapped_back(root, scale, factor.eigenvalues, factor.vectors[:k], factor.dual, factor.num_products + k)


def _mapped_back(
    root: LinearOperator, scale: float, values: Tensor, vectors: Tensor, dual: Tensor, num_products: int
) -> Spectrum:
    """The record of eigenvectors u `[k, m]` of K as vectors `v = R^T c`, c being u made orthonormal under K.

    Then `scale R^T R v - lambda v = R^T (scale K c - lambda c)`, whose norm takes K alone. What this leaves out is that
    products round, `R v` not being quite `K c`: two sums of all v with random signs show it by true products, and the
    larger of both counts for every vector. Where eigenvalues are zero to rounding, vectors are filled up from the
    complement and have residuals by true products.
    """
    operator, k = Gram(root, scale), len(vectors)
    floor = max((_CLEAR * torch.finfo(root.dtype).eps) ** 2, _CLEAR * torch.finfo(dual.dtype).eps)
    clear = int((values[:k] > floor * values[0]).sum())
    u = vectors[:clear]
    turn = _orthonormalising(u @ dual @ u.T) if clear else None
    c = None if turn is None else (turn @ u).to(root.dtype)
    filled = None if c is None else root.adjoint(c)
    spent = num_products
    if filled is not None and clear < k:
        filled, spent = _filled_up(filled, root.adjoint(vectors[clear:].to(root.dtype))), spent + k
    if c is None or filled is None:
        back = torch.linalg.qr(root.adjoint(vectors.to(root.dtype)).T).Q.T.contiguous()
        return _record(operator, values, k, back, spent)
    back = filled[:clear]
    misses = scale * (c.to(dual.dtype) @ dual) - scaled(values[:clear], c.to(dual.dtype))
    missed = ((misses @ dual) * misses).sum(-1).clamp(min=0)
    signs = rademacher((min(2, clear), clear), c, as_generator(None))
    gap = root(signs @ back).to(dual.dtype) - (signs @ c).to(dual.dtype) @ dual
    rounding = norms(root.adjoint((scale * gap).to(root.dtype))).max()
    residuals = (missed + rounding.square()).sqrt()
    if clear < k:
        extra = norms(operator(filled[clear:]) - scaled(values[clear:k].to(root.dtype), filled[clear:]))
        residuals = torch.cat([residuals, extra.to(residuals.dtype)])
    spent = num_products + 2 * len(signs) - clear  # a record counts a product for each vector
    return _record(operator, values, k, filled, spent, residuals)


def _filled_up(rows: Tensor, more: Tensor) -> Tensor | None:
    """Orthonormal rows, and as many as there are in `more` beside them; None where these depend on one another."""
    rows = rows if rows.dtype.itemsize == 8 else _orthonormal(rows)  # rounding left more than the filling may
    noise = torch.randn(more.shape, generator=torch.Generator().manual_seed(0), dtype=more.dtype).to(more.device)
    for _ in range(2):
        lengths = norms(more)
        more = torch.where((lengths > 0)[:, None], scaled(1 / lengths, more), noise)
        more = more - inner(more, rows).to(rows.dtype) @ rows
    turn = _orthonormalising(inner(more, more).cpu().double())
    return None if turn is None else torch.cat([rows, turn.to(rows.device, rows.dtype) @ more])


def _orthonormalising(gram: Tensor) -> Tensor | None:
    """The matrix that makes nearly orthogonal rows with these inner products orthonormal; None where they are not."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    if not bool(torch.isfinite(gram).all()) or not bool((lengths > 0).all()):
        return None
    lower, info = torch.linalg.cholesky_ex(gram / torch.outer(lengths, lengths))
    if int(info) or float(lower.diagonal().min()) < 0.5:
        return None
    return torch.linalg.inv(lower) / lengths


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows of the same nested spans."""
    turn = _orthonormalising(inner(rows, rows).cpu().double())
    if turn is None:
        return torch.linalg.qr(rows.T).Q.T.contiguous()
    return turn.to(rows.device, rows.dtype) @ rows


def _few(root: LinearOperator, scale: float, k: int, gram: Tensor | None, rtol: float | None) -> Spectrum | None:
    """The k largest pairs by Lanczos on K, or to few digits in float32; None where Lanczos does not end in time."""
    m = root.shape[0]
    dual = root.gram() if gram is None else gram.to(wide(root.device))
    if dual.shape != (m, m):
        return None  # the factorisation words the complaint
    spent = k + (min(root.shape) if gram is None else 0)
    if m <= _MODEST and rtol is not None and rtol >= 100 * torch.finfo(torch.float32).eps:
        vectors = torch.linalg.eigh(dual.float()).eigenvectors.flip(1)[:, :k].T.to(dual.dtype)
        values = (((vectors @ dual) * vectors).sum(-1) / vectors.square().sum(-1)).clamp(min=0)
        rest = scale * (dual.trace() - values.sum())
        found = _mapped_back(root, scale, scale * values, vectors, dual, spent)
        return replace(found, complete=bool(abs(rest) <= m * found.tolerance()))
    accuracy = 1e-2 * torch.finfo(root.dtype).eps if root.dtype.itemsize < 8 else 1e-13
    accuracy = accuracy if rtol is None else max(accuracy, 0.1 * rtol)
    operator = Dense(dual.to(root.dtype) if accuracy > 100 * torch.finfo(root.dtype).eps else dual, psd=True)
    search = lanczos(operator, k, rtol=accuracy, block_size=_DENSE_BLOCK, max_products=max(200, m // 2))
    if search.vectors is None or search.outcome not in (Outcome.CONVERGED, Outcome.STAGNATED):
        return None
    rest = scale * (dual.trace() - search.values.sum()) if search.complete else torch.inf
    values = scale * search.values.clamp(min=0)
    found = _mapped_back(root, scale, values, search.vectors.to(dual.dtype), dual, spent)
    return replace(found, complete=bool(abs(rest) <= m * found.tolerance()))


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

    Examples:
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


def _record(
    operator: LinearOperator,
    values: Tensor,
    k: int,
    vectors: Tensor | None,
    num_products: int,
    residuals: Tensor | None = None,
) -> Spectrum:
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
    if residuals is None:
        residuals = norms(operator(vectors) - scaled(values[:k], vectors))
    residuals = residuals.to(operator.dtype)
    outcome = Outcome.CONVERGED if bool(torch.isfinite(residuals).all()) else Outcome.NOT_FINITE
    return replace(
        found,
        complete=complete,
        residuals=residuals,
        outcome=outcome,
        num_products=num_products + len(vectors),
    )
