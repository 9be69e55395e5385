"""Largest eigenvalues of a symmetric operator by products: thick-restart block Lanczos."""

import torch
from torch import Tensor

from fipgeo.linalg._stacks import as_generator, gaussian, inner, norms, orthonormal_complement, scaled
from fipgeo.linalg._system import require_spectrum, tolerance
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Spectrum

_PROBE_STEPS = 5
_PATIENCE = 6
_TOGETHER = 10


@torch.no_grad()
def lanczos(
    operator: LinearOperator,
    k: int,
    *,
    rtol: float | None = None,
    max_products: int | None = None,
    basis_size: int | None = None,
    block_size: int | None = None,
    generator: torch.Generator | int | None = None,
) -> Spectrum:
    """The k (algebraically) largest eigenpairs of a symmetric operator, by thick-restart block Lanczos.

    The basis V and its products `A V` are both kept, so every residual that counts is that of true products.
    Each step appends what the last product left outside the basis, orthogonalised twice against the whole of
    it; a full basis is compressed to its leading Ritz vectors. Where the recurrence calls all k pairs accurate,
    their true residuals are formed (without products), and those that are not small are appended instead. Once
    k pairs are accurate, a random block in their complement is iterated until its largest Ritz value settles
    below them: a further copy of a multiple eigenvalue would rise above, and then joins.

    Args:
        operator: A, symmetric, shape `(n, n)`.
        k: pairs, 1 <= k <= n. Eigenvalues beyond the rank come out as zeros to rounding.
        rtol: a pair is accurate when `|A v - lambda v| <= rtol max |lambda|`; None for 1e-6, in float32
            1.2e-5 (100 eps).
        max_products: most products; None for `100 + 20 k`, or `2 n` (at most 1000) where that is more.
        basis_size: vectors in the basis, `2 basis_size n` numbers; None for `2 k + 20`, at most n.
        block_size: vectors a step, multiplied in one stack. Larger blocks need more products, but fewer
            passes. None for the operator's own hint, its attribute `block`, if it has one, else 2.
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

    Examples:
        >>> from fipgeo.linalg import Diagonal
        >>> found = lanczos(Diagonal(torch.arange(100.0, dtype=torch.float64)), k=3)
        >>> found.values.round(decimals=6), found.ok
        (tensor([99., 98., 97.], dtype=torch.float64), True)
    """
    n = operator.shape[0]
    require_spectrum(operator, k)
    block_size = int(getattr(operator, "block", 2)) if block_size is None else block_size
    size = min(n, 2 * k + 20 if basis_size is None else basis_size)
    if block_size < 1 or size < min(n, k + 2 * block_size):
        raise ValueError(
            f"basis_size {basis_size} with block_size {block_size} leaves no room to search; expected "
            f"block_size >= 1 and basis_size >= k + 2 block_size = {k + 2 * block_size} (or n = {n})"
        )
    limit = max(100 + 20 * k, min(2 * n, 1000)) if max_products is None else max_products
    search = Search(operator, k, size, block_size, as_generator(generator))
    return search.spectrum(*search.run(tolerance(rtol, operator.dtype), limit))


class Search:
    """The state of one `lanczos`: an orthonormal basis V, its products W = A V, and the Ritz pairs in it.

    The projected problem lives on the host in float64. A step of the recurrence waits for the device twice: for
    the couplings of the new block, and for what is left of it outside the basis.
    """

    def __init__(
        self, operator: LinearOperator, k: int, size: int, block_size: int, generator: torch.Generator
    ) -> None:
        n, dtype, device = operator.shape[0], operator.dtype, operator.device
        self.operator, self.k, self.used, self.num_products = operator, k, 0, 0
        self.block_size, self.generator = block_size, generator
        self.eps = torch.finfo(dtype).eps
        self.rtol = 0.0
        self.v = torch.empty(size, n, dtype=dtype, device=device)
        self.w = torch.empty(size, n, dtype=dtype, device=device)
        self.t = torch.zeros(size, size, dtype=torch.float64)
        self.theta, self.s = torch.empty(0, dtype=torch.float64), torch.empty(0, 0, dtype=torch.float64)
        self.left = self.v[:0]  # what the last product left outside the basis
        self.estimates = self.theta  # residuals of the Ritz pairs by the recurrence
        self.settled, self.relaxed = 0, False
        self.leading = float("inf")  # the largest residual in the first open block
        self.best = (0, float("inf"), 0)  # settled pairs, leading residual and steps since it last halved
        self.reference = self.theta

    def run(self, rtol: float, limit: int) -> tuple[Outcome, bool]:
        """Search until all pairs are accurate to `rtol` or `limit` products are used; verdict and completeness.

        A search that ended may be run again with a smaller `rtol` or a larger `limit`; it goes on from its basis.
        """
        self.rtol, self.relaxed, self.best = rtol, False, (0, float("inf"), 0)
        recurrence = self.used == 0
        probe = -1  # steps of the block that looks for missed copies; -1 while some of the k pairs are open
        block = self.draw(self.block_size) if recurrence else self.open_residuals()
        while True:
            block = orthonormal_complement(block, self.basis, 1 if recurrence and self.used else 2)
            if not len(block):
                block = orthonormal_complement(self.draw(self.block_size), self.basis)
            if not len(block):  # the basis is all of R^n
                return Outcome.CONVERGED, True
            if self.num_products + len(block) > limit:
                return Outcome.MAX_ITERATIONS, False
            if not self.append(block):
                return Outcome.NOT_FINITE, False
            if recurrence:
                recurrence = self.used < self.k or bool((self.estimates[: self.k] > self.rtol * self.scale).any())
                if recurrence:
                    block = self.left
                    continue
            if probe >= 0 and self.moved():
                probe = -1
            if probe < 0:
                block = self.open_residuals()
                if len(block):
                    continue
                missing = self.k - self.used
                if missing <= 0:
                    probe = 0
                    self.compress(self.k)
                block = self.draw(max(self.block_size, missing))
                continue
            probe += 1
            complete = probe == 1 and self.annihilates(self.k)
            if complete or self.settles(probe):
                block = self.open_residuals()
                if not len(block):
                    return (Outcome.STAGNATED if self.relaxed else Outcome.CONVERGED), complete
                probe = -1
            else:
                block = self.residuals(self.k, self.k + self.block_size)

    @property
    def basis(self) -> Tensor:
        """V, `[used, n]`."""
        return self.v[: self.used]

    @property
    def scale(self) -> float:
        """The largest Ritz value in modulus."""
        return float(self.theta.abs().max()) if len(self.theta) else 0.0

    def draw(self, count: int) -> Tensor:
        """Random rows, `[count, n]`."""
        return gaussian((count, self.v.shape[1]), self.v[:0], self.generator)

    def append(self, block: Tensor) -> bool:
        """Multiply new basis vectors and solve the projected problem; False if a product is not finite."""
        if self.used + len(block) > len(self.v):
            self.compress(min(self.k + (len(self.v) - self.k) // 2, len(self.v) - len(block)))
        old, new = slice(0, self.used), slice(self.used, self.used + len(block))
        self.v[new], self.w[new] = block, self.operator(block)
        self.num_products += len(block)
        basis, products = self.v[: new.stop], self.w[new]
        couplings = inner(basis, products)
        self.left = torch.addmm(products, couplings.T.to(basis.dtype), basis, alpha=-1)
        couplings, outside = torch.cat([couplings, inner(self.left, self.left)]).cpu().double().tensor_split([new.stop])
        if not bool(torch.isfinite(couplings).all()):
            return False
        self.used = new.stop
        self.t[old, new], self.t[new, old] = couplings[old], couplings[old].T
        self.t[new, new] = (couplings[new] + couplings[new].T) / 2
        theta, s = torch.linalg.eigh(self.t[: self.used, : self.used])
        self.theta, self.s = theta.flip(0), s.flip(1)
        alive = outside.diagonal().sqrt() > 100 * self.eps * self.scale  # the rest is rounding of the product
        self.left = self.left if bool(alive.all()) else self.left[alive.to(self.left.device)]
        last = self.s[new]
        self.estimates = ((outside @ last) * last).sum(0).clamp(min=0).sqrt()
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

    def open_residuals(self) -> Tensor:
        """Residuals of the first pairs, at most a block, that are not accurate; empty if all k are.

        Pairs once found accurate are skipped until all are, and then looked at again.
        """
        end, count = min(self.k, self.used), self.block_size
        while True:
            first = min(self.settled, end)
            together = max(count, _TOGETHER)  # every call reads the whole basis
            for start in range(first, end, together):
                r = self.residuals(start, min(start + together, end))
                lengths = norms(r)
                is_open = lengths > self.rtol * self.scale
                if bool(is_open.any()):
                    self.settled, self.leading = start, float(lengths[is_open][:count].max())
                    self._relax()
                    return r[is_open][:count]
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
