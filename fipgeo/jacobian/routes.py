"""Which way a damped solve or a spectrum of g = R^T R / N goes, by the estimates of the root."""

from __future__ import annotations

from fipgeo.jacobian.cost import WIDE
from fipgeo.jacobian.root import JacobianRoot
from fipgeo.linalg import LinearOperator

ITERATIONS = 50
"""Iterations of conjugate gradients that an estimate expects."""

SKETCH = 64
"""Rank of a randomised preconditioner."""

SMALL = 4096
"""Without estimates, matrices are factored up to this size (128 MiB in float64)."""


def searched(k: int) -> int:
    """Products that a search for k eigenpairs is expected to take."""
    return 3 * k + 20


def cheapest_solver(root: LinearOperator, count: int, dampings: int) -> str:
    """The cheapest of "dual", "dense", "cg" and "nystrom" for a number of right-hand sides and dampings."""
    rows, dim = root.shape
    if not isinstance(root, JacobianRoot):
        return _by_size(rows, dim, "cg")
    costs, most = root.costs, root.max_bytes
    pairs = count * dampings
    ways = {"cg": costs.least(ITERATIONS * count, most)}  # all dampings share one Krylov space
    if count >= 4:  # one sketch for all; each solve then takes a third of the iterations or less
        ways["nystrom"] = costs.least(SKETCH + ITERATIONS * pairs / 3, most)
    if 16 * rows**2 <= most:
        ways["dual"] = costs.dual(4 * pairs, most) + WIDE * rows**3
    if 16 * dim**2 <= most and dim < rows:
        ways["dense"] = costs.least(dim, most) + WIDE * dim**3
    return min(ways, key=lambda way: ways[way])


def cheapest_spectrum(root: LinearOperator, k: int | None, single: bool = False) -> str:
    """The cheapest of "dual", "dense" and "lanczos" for k eigenpairs, or for all that are not zero.

    Args:
        root: R.
        k: How many; None for all.
        single: Whether K from products in single precision has digits enough.
    """
    rows, dim = root.shape
    if not isinstance(root, JacobianRoot):
        return _by_size(rows, dim, "lanczos")
    costs, most = root.costs, root.max_bytes
    ways = {} if k is None else {"lanczos": costs.least(searched(k), most)}
    if 16 * rows**2 <= most:
        few = k is not None and 20 * k <= rows
        work = WIDE * (2 * searched(k or 0) * rows**2 if few else 9 * rows**3)
        ways["dual"] = costs.dual((k or min(rows, dim)) / 2 + 2, most, single=single) + work
    if 16 * dim**2 <= most and dim < rows:
        ways["dense"] = costs.least(dim, most) + 9 * WIDE * dim**3
    return min(ways, key=lambda way: ways[way], default="lanczos")


def _by_size(rows: int, dim: int, otherwise: str) -> str:
    if min(rows, dim) > SMALL:
        return otherwise
    return "dual" if rows <= dim else "dense"
