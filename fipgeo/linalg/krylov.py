"""Largest eigenvalues of a symmetric operator by products: thick-restart block Lanczos."""

import torch
from torch import Tensor

from fipgeo.linalg._stacks import as_generator, gaussian, inner, norms, orthonormal_complement, scaled
from fipgeo.linalg._system import require_spectrum, tolerance
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Spectrum

_PROBE_STEPS = 5
_PATIENCE = 6


@torch.no_grad()
def lanczos(
    operator: LinearOperator,
    k: int,
    *,
    rtol: float | None = None,
    max_products: int | None = None,
    basis_size: int | None = None,
    block_size: int = 2,
    generator: torch.Generator | int | None = None,
) -> Spectrum:
    """The k (algebraically) largest eigenpairs of a symmetric operator, by thick-restart block Lanczos.

    The basis V and its products `A V` are both kept, so every residual is that of true products. Each step
    appends the residuals of the leading open Ritz pairs, orthogonalised twice against the whole basis; a full
    basis is compressed to its leading Ritz vectors. Once k pairs are accurate, a random block in their
    complement is iterated until its largest Ritz value settles below them: a further copy of a multiple
    eigenvalue would rise above, and then joins.

    Args:
        operator: A, symmetric, shape `(n, n)`.
        k: pairs, 1 <= k <= n. Eigenvalues beyond the rank come out as zeros to rounding.
        rtol: a pair is accurate when `|A v - lambda v| <= rtol max |lambda|`; None for 1e-6, in float32
            1.2e-5 (100 eps).
        max_products: most products; None for `100 + 20 k`, or `2 n` (at most 1000) where that is more.
        basis_size: vectors in the basis, `2 basis_size n` numbers; None for `2 k + 20`, at most n.
        block_size: vectors a step, multiplied in one stack. Larger blocks need more products, but fewer
            passes.
        generator: start vectors; generator or seed, None for the fixed seed 0.

    Returns:
        Spectrum. `complete`: a random block outside the k vectors was mapped to zero, to rounding.
        `STAGNATED`: rounding or noise in the products kept residuals above `rtol`. `MAX_ITERATIONS`: the
        products were used up; there may be fewer than k values, and copies may be missing.

    Raises:
        ValueError: if A is not square or not declared symmetric, or k, basis_size or block_size are out of
            range.

    Source: Wu & Simon, Thick-restart Lanczos method (2000); the residual expansion is that of Davidson
    (1975), which without a preconditioner spans the same spaces.

    Example:
        >>> from fipgeo.linalg import Diagonal
        >>> found = lanczos(Diagonal(torch.arange(100.0, dtype=torch.float64)), k=3)
        >>> found.values.round(decimals=6), found.ok
        (tensor([99., 98., 97.], dtype=torch.float64), True)
    """
    n = operator.shape[0]
    require_spectrum(operator, k)
    size = min(n, 2 * k + 20 if basis_size is None else basis_size)
    if block_size < 1 or size < min(n, k + 2 * block_size):
        raise ValueError(
            f"basis_size {basis_size} with block_size {block_size} leaves no room to search; expected "
            f"block_size >= 1 and basis_size >= k + 2 block_size = {k + 2 * block_size} (or n = {n})"
        )
    limit = max(100 + 20 * k, min(2 * n, 1000)) if max_products is None else max_products
    search = _Subspace(operator, k, size, tolerance(rtol, operator.dtype))
    source = as_generator(generator)
    draw = torch.empty(0, dtype=operator.dtype, device=operator.device)
    outcome, complete = Outcome.MAX_ITERATIONS, False
    probe = -1  # steps of the block that looks for missed copies; -1 while some of the k pairs are open
    block = gaussian((block_size, n), draw, source)
    while True:
        block = orthonormal_complement(block, search.basis)
        if not len(block):
            block = orthonormal_complement(gaussian((block_size, n), draw, source), search.basis)
        if not len(block):  # the basis is all of R^n
            outcome, complete = Outcome.CONVERGED, True
            break
        if search.num_products + len(block) > limit:
            break
        if not search.append(block):
            outcome = Outcome.NOT_FINITE
            break
        if probe >= 0 and search.moved():
            probe = -1
        if probe < 0:
            block = search.open_residuals(block_size)
            if len(block):
                continue
            missing = k - search.used
            if missing <= 0:
                probe = 0
                search.compress(k)
            block = gaussian((max(block_size, missing), n), draw, source)
            continue
        probe += 1
        complete = probe == 1 and search.annihilates(k)
        if complete or search.settles(probe):
            block = search.open_residuals(block_size)
            if not len(block):
                outcome = Outcome.STAGNATED if search.relaxed else Outcome.CONVERGED
                break
            probe = -1
        else:
            block = search.residuals(k, k + block_size)
    return search.spectrum(outcome, complete)


class _Subspace:
    """A growing orthonormal basis V, its products W = A V, and the Ritz pairs in it."""

    def __init__(self, operator: LinearOperator, k: int, size: int, rtol: float) -> None:
        n, dtype, device = operator.shape[0], operator.dtype, operator.device
        self.operator, self.k, self.used, self.num_products = operator, k, 0, 0
        self.eps = torch.finfo(dtype).eps
        self.rtol = rtol
        self.v = torch.empty(size, n, dtype=dtype, device=device)
        self.w = torch.empty(size, n, dtype=dtype, device=device)
        self.t = torch.zeros(size, size, dtype=torch.float64)
        self.theta, self.s = torch.empty(0, dtype=torch.float64), torch.empty(0, 0, dtype=torch.float64)
        self.settled, self.relaxed = 0, False
        self.leading = float("inf")  # the largest residual in the first open block
        self.best = (0, float("inf"), 0)  # settled pairs, leading residual and steps since it last halved
        self.reference = self.theta

    @property
    def basis(self) -> Tensor:
        return self.v[: self.used]

    @property
    def scale(self) -> float:
        return float(self.theta.abs().max()) if len(self.theta) else 0.0

    def append(self, block: Tensor) -> bool:
        """Multiply new basis vectors and solve the projected problem; False if a product is not finite."""
        if self.used + len(block) > len(self.v):
            self.compress(min(self.k + (len(self.v) - self.k) // 2, len(self.v) - len(block)))
        old, new = slice(0, self.used), slice(self.used, self.used + len(block))
        self.v[new], self.w[new] = block, self.operator(block)
        self.num_products += len(block)
        self.used += len(block)
        if not bool(torch.isfinite(norms(self.w[new])).all()):
            self.used = old.stop
            return False
        couplings = inner(self.v[: self.used], self.w[new]).cpu().double()
        self.t[old, new], self.t[new, old] = couplings[old], couplings[old].T
        self.t[new, new] = (couplings[new] + couplings[new].T) / 2
        theta, s = torch.linalg.eigh(self.t[: self.used, : self.used])
        self.theta, self.s = theta.flip(0), s.flip(1)
        return True

    def _relax(self) -> None:
        """Raise the tolerance to where rounding, or noise in the products, stops the first open pair.

        That is a residual of at most 1000 eps that has not halved in as many steps as `_PATIENCE`.
        """
        settled, leading, steps = self.best
        if self.settled != settled or self.leading < 0.5 * leading:
            self.best = (self.settled, self.leading, 0)
        elif self.leading <= 1000 * self.eps * self.scale:
            self.best = (settled, leading, steps + 1)
            if steps + 1 >= _PATIENCE:
                self.rtol, self.relaxed = 2 * self.leading / self.scale, True

    def compress(self, keep: int) -> None:
        """Keep the leading Ritz vectors as the basis."""
        self.v[:keep], self.w[:keep] = self._rotated(self.v, 0, keep), self._rotated(self.w, 0, keep)
        self.theta, self.s, self.used = self.theta[:keep], torch.eye(keep, dtype=torch.float64), keep
        self.t[:keep, :keep] = self.theta.diag()
        self.reference = self.theta[: self.k]

    def _rotated(self, stack: Tensor, start: int, stop: int) -> Tensor:
        return self.s[:, start:stop].T.to(stack.device, stack.dtype) @ stack[: self.used]

    def residuals(self, start: int, stop: int) -> Tensor:
        """`A v - theta v` of Ritz pairs `start` to `stop`, `[stop - start, n]`."""
        stop = min(stop, self.used)
        theta = self.theta[start:stop].to(self.v.device)
        return self._rotated(self.w, start, stop) - scaled(theta, self._rotated(self.v, start, stop))

    def open_residuals(self, count: int) -> Tensor:
        """Residuals of the first pairs, at most `count`, that are not accurate; empty if all k are.

        Pairs once found accurate are skipped until all are, and then looked at again.
        """
        end = min(self.k, self.used)
        while True:
            first = min(self.settled, end)
            for start in range(first, end, count):
                r = self.residuals(start, min(start + count, end))
                lengths = norms(r)
                is_open = lengths > self.rtol * self.scale
                if bool(is_open.any()):
                    self.settled, self.leading = start, float(lengths.max())
                    self._relax()
                    return r[is_open]
            self.settled = 0
            if first == 0:
                return self.v[:0]

    def moved(self) -> bool:
        """Whether the k largest Ritz values differ from those at the last compression."""
        return bool((self.theta[: self.k] - self.reference).abs().max() > self.rtol * self.scale)

    def annihilates(self, start: int) -> bool:
        """Whether A maps the basis vectors from `start` on into the span of those before, to rounding.

        Pairs that are known to `rtol` leave a part of relative size `rtol^2` of themselves in the complement.
        """
        known, w = self.v[:start], self.w[start : self.used]
        outside = norms(w - inner(w, known).to(w.dtype) @ known)
        return bool((outside <= (100 * self.eps + self.rtol**2) * self.scale).all())

    def settles(self, steps: int) -> bool:
        """Whether the next Ritz value will stay below the k largest, as far as its residual tells."""
        gap, error = (
            float(self.theta[self.k - 1] - self.theta[self.k]),
            float(norms(self.residuals(self.k, self.k + 1))),
        )
        return error <= self.rtol * self.scale or (steps >= _PROBE_STEPS and error <= gap)

    def spectrum(self, outcome: Outcome, complete: bool) -> Spectrum:
        """The record of the k leading pairs (all of them if there are fewer)."""
        k, dtype = min(self.k, self.used), self.v.dtype
        return Spectrum(
            values=self.theta[:k].to(self.v.device, dtype),
            vectors=self._rotated(self.v, 0, k),
            residuals=norms(self.residuals(0, k)).to(dtype),
            dim=self.operator.shape[0],
            rank_bound=self.operator.rank_bound,
            complete=complete,
            outcome=outcome,
            num_products=self.num_products,
        )
