"""Which way a damped solve or a spectrum of g = R^T R / N goes, by the estimates of the root."""

from __future__ import annotations

from bisect import bisect_left

from fipgeo.jacobian.cost import WIDE
from fipgeo.jacobian.root import JacobianRoot
from fipgeo.linalg import LinearOperator, Spectrum, dual_eigh

ITERATIONS = 50
"""Iterations of conjugate gradients that an estimate expects."""

LONGEST = 1000
"""Most iterations of conjugate gradients."""

SKETCH = 64
"""Rank of a randomised preconditioner."""

SINGLE = 1e-5
"""From this residual on, relative to the largest eigenvalue, a dual matrix of seven digits will do."""

SMALL = 4096
"""Without estimates, matrices are factored up to this size (128 MiB in float64)."""


def searched(k: int) -> int:
    """Products that a search for k eigenpairs is expected to take."""
    return 3 * k + 20


def cheapest_solver(root: LinearOperator, count: int, dampings: int, iterations: float = ITERATIONS) -> str:
    """The cheapest of "dual", "dense", "cg" and "nystrom" for a number of right-hand sides and dampings.

    Args:
        root: R.
        count: Right-hand sides.
        dampings: Dampings of each.
        iterations: Those of conjugate gradients that are expected for one of them.
    """
    rows, dim = root.shape
    if not isinstance(root, JacobianRoot):
        return _by_size(rows, dim, "cg")
    costs, most = root.costs, root.max_bytes
    pairs = count * dampings
    ways = {"cg": costs.least(iterations * count, most, count)}  # all dampings share one Krylov space
    if count >= 4:  # one sketch for all; each solve then takes a third of the iterations or less
        ways["nystrom"] = costs.least(SKETCH + iterations * pairs / 3, most)
    if 16 * rows**2 <= most:
        ways["dual"] = _by_dual(root, 4 * pairs)
    if 16 * dim**2 <= most and dim < rows:
        ways["dense"] = costs.least(dim, most) + WIDE * dim**3
    return min(ways, key=lambda way: ways[way])


def patience(root: LinearOperator, count: int, dampings: int) -> int | None:
    """Iterations in which conjugate gradients take as long as the dual way; None where that is not open.

    How many they need depends on the spectrum, which no estimate knows. Who turns to the dual way after so many takes
    at most twice what the dual way alone does, or `ITERATIONS` more, as far as the estimates go.
    """
    if not isinstance(root, JacobianRoot) or 16 * root.shape[0] ** 2 > root.max_bytes:
        return None
    costs, most = root.costs, root.max_bytes
    dual = _by_dual(root, 4 * count * dampings)
    return max(ITERATIONS, bisect_left(range(LONGEST), dual, key=lambda n: costs.least(n * count, most, count)))


def cheapest_spectrum(root: LinearOperator, k: int | None, rtol: float | None = None) -> str:
    """The cheapest of "dual", "dense" and "lanczos" for k eigenpairs, or for all that are not zero.

    Args:
        root: R.
        k: How many; None for all.
        rtol: The residual asked for; None for all digits.
    """
    rows, dim = root.shape
    if not isinstance(root, JacobianRoot):
        return _by_size(rows, dim, "lanczos")
    costs, most = root.costs, root.max_bytes
    ways = {} if k is None else {"lanczos": costs.least(searched(k), most)}
    if 16 * rows**2 <= most:
        few = k is not None and 20 * k <= rows
        work = WIDE * (2 * searched(k or 0) * rows**2 if few else 9 * rows**3)
        ways["dual"] = costs.dual((k or min(rows, dim)) / 2 + 2, most, single=_coarse(k, rtol)) + work
    if 16 * dim**2 <= most and dim < rows:
        ways["dense"] = costs.least(dim, most) + 9 * WIDE * dim**3
    return min(ways, key=lambda way: ways[way], default="lanczos")


def few_digits(root: LinearOperator, k: int | None, rtol: float | None, scale: float) -> Spectrum | None:
    """Eigenpairs of scale R^T R through K of seven digits; None where that is not enough, or K takes as long with all.

    Args:
        root: R.
        k: How many; None for all.
        rtol: The residual asked for, relative to the largest eigenvalue; None for all digits.
        scale: 1 / N.
    """
    if not isinstance(root, JacobianRoot) or not _coarse(k, rtol):
        return None
    found = dual_eigh(root, scale=scale, k=k, gram=root.gram(single=True), rtol=rtol)
    assert found.residuals is not None and rtol is not None
    return found if bool((found.residuals <= rtol * found.values[0]).all()) else None


def _by_dual(root: JacobianRoot, products: float) -> float:
    """Operations of solves through K, of seven digits where R has no more, with products to refine them."""
    single = root.dtype.itemsize < 8
    return root.costs.dual(products, root.max_bytes, single=single) + (1 if single else WIDE) * root.shape[0] ** 3


def _coarse(k: int | None, rtol: float | None) -> bool:
    return k is not None and rtol is not None and rtol >= SINGLE


def _by_size(rows: int, dim: int, otherwise: str) -> str:
    if min(rows, dim) > SMALL:
        return otherwise
    return "dual" if rows <= dim else "dense"
