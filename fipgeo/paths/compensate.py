r"""Least squares in the tangent space: which move of the free weights best undoes a given change of the outputs.

    w = argmin  |r + R w|^2 / N + mu |w|^2      over w supported on the free weights F
      = -R_F^T (R_F R_F^T + N mu)^{-1} r  =  -(g_FF + mu)^{-1} R_F^T r / N

One object serves two steps of a path. Predictor: with r = R d it turns a wished displacement d into
`d + w = argmin <v, g v> + mu |v - d|^2`, which for F = everything is mu (g + mu)^{-1} d: free directions pass, costly
ones are damped. Corrector: with r = z(theta) - z(theta_0) it is the Gauss-Newton (Levenberg-Marquardt) step.

The limits of mu are steps of their own:

| damping | w | d + w |
| --- | --- | --- |
| 0 | -R_F^+ r, the shortest that undoes most | d - R^+ R d, the part of d that the outputs do not feel |
| a number | damped | damped |
| `math.inf` or None | 0 | d, the plain step |

and a trust region (`radius=`) finds the mu at which the step has a given length.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fipgeo.basis import inclusion
from fipgeo.jacobian import inner_products
from fipgeo.linalg import Dense, Diagonal, Gram, LinearOperator, cg, lsmr, trace
from fipgeo.model import NotFiniteError
from fipgeo.paths.protected import Position, Protected

MAX_ROWS = 2048
"""Up to so many embedded outputs R_F R_F^T is factored."""

MAX_COLUMNS = 2048
"""With more outputs than that, R_F^T R_F is factored for up to so many free weights; else conjugate gradients."""

TINY = 1e-12
"""The least damping that a search for a radius looks at before it takes the null space, over the mean eigenvalue."""


class Compensation:
    """The least-squares moves at one position.

    Args:
        kept: The protected function whose derivative is R: that of protected inputs (`Kept`), a sketch of a metric,
            or several of them (`Several`).
        position: Where R is taken.
        free: Boolean `[D]`, the weights that may move.
        damping: mu as a multiple of the mean non-zero eigenvalue of g_FF; 0 for the null-space limit, `math.inf` or
            None for no move at all.
        rtol: Where damping is 0, eigenvalues of R_F R_F^T up to `rtol` times the largest count as zero; None for the
            rounding of the rows, 10 sqrt(N M) eps. Without a factored Gram matrix there is no such cut, and
            `max_iters` steps of LSMR regularise instead.
        preconditioner: About (g_FF + mu)^{-1} times a constant, on stacks `[k, D]`, for conjugate gradients; None for
            none.
        max_iters: Iterations where the Gram matrix is too large to factor.
        max_bytes: Most memory for rows of R.

    Attributes:
        cost: Model evaluations that making it took.
        mu: The damping in units of g.

    Raises:
        ValueError: damping is negative.
        NotFiniteError: R is not finite.
    """

    def __init__(
        self,
        kept: Protected,
        position: Position,
        free: Tensor,
        *,
        damping: float | None,
        rtol: float | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
        max_iters: int = 30,
        max_bytes: int = 2**30,
    ) -> None:
        self.tangent = kept.tangent(position, max_bytes)
        self.root = self.tangent.root
        self.kept, self.num_examples, self.max_iters = kept, kept.num_examples, max_iters
        self.rtol = 10 * self.root.shape[0] ** 0.5 * torch.finfo(self.root.dtype).eps if rtol is None else rtol
        self.free, self.preconditioner = free, preconditioner
        self.gram: Tensor | None = None
        self.normal: Tensor | None = None
        self._eigen: tuple[Tensor, Tensor] | None = None
        total = self._held(position, max_bytes)
        if not math.isfinite(total):
            raise NotFiniteError(
                "model: the derivative of its outputs is NaN or infinite, so there is no metric to step in"
            )
        self.scale = total / self.num_examples / max(min(self.tangent.rank_bound, int(free.sum())), 1)
        self.damped(damping)

    def _held(self, position: Position, max_bytes: int) -> float:
        """Set up R_F and what is factored of it; returns its squared Frobenius norm, or an estimate."""
        few = self.root.shape[0] <= MAX_ROWS
        self.solver = self.tangent.solver(self.free)
        if self.solver is not None:
            self.masked: LinearOperator = self.tangent.prepare() @ Diagonal(self.free.to(position.theta.dtype))
            self.cost = self.tangent.cost(columns=False)
            return self.solver.trace
        if few and bool(self.free.all()) and (gram := self.tangent.gram()) is not None:
            self.masked = self.tangent.prepare()
            self.gram, self.cost = gram, self.tangent.cost(columns=True)
            return float(gram.diagonal().sum())
        columns = self._columns(max_bytes)
        self.cost = self.tangent.cost(columns=columns is not None)
        if columns is None:
            self.masked = self.tangent.prepare() @ Diagonal(self.free.to(position.theta.dtype))
            return float(trace(Gram(self.masked), num_products=4).value)
        self.masked = Dense(columns) @ inclusion(self.kept.space, self.free).T
        if few:
            self.gram = inner_products(columns, columns, single=True)
        elif columns.shape[1] <= MAX_COLUMNS:
            self.normal = inner_products(across := columns.T.contiguous(), across, single=True)
        return float(torch.linalg.vector_norm(columns, dim=1).double().square().sum())

    def _columns(self, max_bytes: int) -> Tensor | None:
        """R_F `[N * M, |F|]` where it fits: in a sparse network only the free columns are ever held."""
        few, (num_rows, dim) = int(self.free.sum()), self.root.shape
        width = few if MAX_ROWS < num_rows and few <= MAX_COLUMNS else dim  # many rows are of use to the few only
        fits = num_rows * width * self.root.dtype.itemsize <= max_bytes
        return self.tangent.columns(self.free) if fits else None

    def damped(self, damping: float | None) -> Compensation:
        """The same moves under another damping; rows, their Gram matrix and its eigenvalues are shared.

        Raises:
            ValueError: damping is negative or NaN.
        """
        damping = math.inf if damping is None else damping
        if not damping >= 0:
            raise ValueError(
                f"damping: got {damping}, expected a positive multiple of the metric's mean eigenvalue, 0 for the"
                " null-space limit, or None for no metric"
            )
        self.mu = damping * self.scale if self.scale > 0 else math.inf
        self.factor: Tensor | None = None
        square = self.normal if self.gram is None else self.gram
        if square is not None and self._eigen is None and 0 < self.mu < math.inf:
            shift, failed = self.num_examples * self.mu, True
            # single-precision rows can leave the matrix a rounding error short of definite
            while failed and math.isfinite(shift):
                factor, info = torch.linalg.cholesky_ex(square + shift * torch.eye(len(square)).to(square))
                self.factor, failed, shift = factor, bool(info), 10 * shift
        return self

    def __call__(self, r: Tensor, *, radius: float | None = None) -> Tensor:
        """The move w `[D]` for a change r of the embedded outputs `[N * M]`.

        Args:
            r: What the move is to undo.
            radius: Trust region: |w| is at most so much, by the smallest mu from `self.mu` on that does it. |w| falls
                with mu, so there is one. None for no bound.

        Raises:
            ValueError: radius is not positive.
        """
        w = self._move(r, self.mu)
        if radius is None or float(w.norm()) <= _positive(radius):
            return w
        if self.gram is None:
            return self._searched(lambda mu: self._moves(r, mu), radius)
        values, vectors = self.eigen
        seen = (vectors @ r.double()).square()

        def length(mu: float) -> float:
            return float((self._inverse(values, mu).square() * values * seen).sum()) ** 0.5

        return self._move(r, _bisected(length, radius, max(self.mu, TINY * self.scale), self.scale, rising=False))

    def passed(self, d: Tensor, *, radius: float | None = None) -> Tensor:
        """The predictor step v for a wished displacement d `[D]`: `argmin <v, g v> + mu |v - d|^2`, v = d off F.

        Args:
            d: The wish.
            radius: Trust region: |v| is exactly so much, by the mu that does it (|v| grows with mu, from the part of d
                in the null space up to d). A wish shorter than the radius passes as it is, and where even the null
                space leaves more than the radius, that part is scaled down to it. None to use `self.mu`.

        Raises:
            ValueError: radius is not positive, or comes with a wish that is not zero off F.
        """
        if radius is None:
            return self._answered(d, self.mu)
        radius = _positive(radius)
        if bool(d[~self.free].any()):
            raise ValueError(
                "radius: the wish moves weights that are not free, so its length is not ours to choose; pass"
                " moves(moves.root(d), radius=...) to bound the answer to it"
            )
        size = float(d.norm())
        if size <= radius or self.scale == 0:
            return d * min(1.0, radius / size) if size else d
        least = self._answered(d, 0.0)
        floor = float(least.norm())
        if floor >= radius:
            return least * (radius / floor)
        if self.gram is None:
            return self._searched(lambda mu: [self._answered(d, m) for m in mu], radius)
        values, vectors = self.eigen
        image = (vectors @ self.root(d).double()).square()

        def length(mu: float) -> float:
            inverse = self._inverse(values, mu)
            return max(size**2 - float((image * inverse * (2 - values * inverse)).sum()), 0.0) ** 0.5

        return self._answered(d, _bisected(length, radius, TINY * self.scale, self.scale, rising=True))

    def predicted(self, r: Tensor, w: Tensor) -> float:
        """Root mean square change that the tangent model expects to be left, sqrt(|r + R w|^2 / N), in units of z.

        Args:
            r: Change of the embedded outputs before the move, `[N * M]`.
            w: The move, `[D]`.
        """
        return float((r + self.root(w)).double().square().sum() / self.num_examples) ** 0.5

    @property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[N * M]` of R_F R_F^T and its eigenvectors, one a row, in float64; made once."""
        if self._eigen is None:
            assert self.gram is not None
            values, vectors = torch.linalg.eigh((self.gram + self.gram.T) / 2)
            self._eigen = values.clamp(min=0), vectors.T.contiguous()
        return self._eigen

    def _inverse(self, values: Tensor, mu: float) -> Tensor:
        """1 / (eigenvalue + N mu); for mu = 0 the pseudo-inverse."""
        if mu == 0:
            seen = values > self.rtol * values.max()
            return torch.where(seen, 1 / torch.where(seen, values, 1), 0)
        return 1 / (values + self.num_examples * mu)

    def _answered(self, d: Tensor, mu: float) -> Tensor:
        """D and the move that makes up for it; in the null-space limit by two passes, as projections need."""
        for _ in range(2 if mu == 0 else 1):
            d = d + self._move(self.root(d), mu)
        return d

    def _moves(self, r: Tensor, mu: list[float]) -> list[Tensor]:
        """Moves under several dampings, in closed form or from one Krylov space."""
        if self.solver is not None:
            rhs = self.masked.adjoint(r)
            return [-self.solver.solve(rhs, self.num_examples * m) for m in mu]
        rhs = self.masked.adjoint(r) / self.num_examples
        g = Gram(self.masked, 1 / self.num_examples)
        return list(
            -cg(g, rhs, damping=mu, rtol=1e-3, max_iters=self.max_iters, preconditioner=self.preconditioner).value
        )

    def _move(self, r: Tensor, mu: float) -> Tensor:
        if mu == math.inf:
            return torch.zeros(self.root.shape[1], dtype=self.root.dtype, device=self.root.device)
        if self.gram is None:
            if self.factor is not None and mu == self.mu:
                rhs = self.masked.adjoint(r).double()
                step = torch.cholesky_solve(rhs[self.free][:, None], self.factor)[:, 0]
                return -torch.zeros_like(rhs).masked_scatter(self.free, step).to(self.root.dtype)
            if mu > 0 or self.solver is not None:
                return self._moves(r, [mu])[0]
            return -lsmr(self.masked, r, max_iters=self.max_iters).value
        if self.factor is not None and mu == self.mu:
            u = torch.cholesky_solve(r.double()[:, None], self.factor)[:, 0]
        else:
            values, vectors = self.eigen
            u = (self._inverse(values, mu) * (vectors @ r.double())) @ vectors
        return -self.masked.adjoint(u.to(self.root.dtype))

    def _searched(self, steps: Callable[[list[float]], list[Tensor]], radius: float) -> Tensor:
        """The step of nearly the radius among iterated ones: two sweeps over mu, the second between the nearest two."""
        exponents = torch.linspace(-6, 6, 13, dtype=torch.float64).tolist()
        found: list[Tensor] = []
        for _ in range(2):
            found = steps([self.scale * 10**e for e in exponents])
            gaps = [abs(math.log(max(float(step.norm()), 1e-300) / radius)) for step in found]
            best = gaps.index(min(gaps))
            found, low, high = [found[best]], exponents[max(best - 1, 0)], exponents[min(best + 1, len(exponents) - 1)]
            exponents = torch.linspace(low, high, 11, dtype=torch.float64).tolist()
        return found[0] * (radius / float(found[0].norm()))


def _positive(radius: float) -> float:
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius: got {radius}, expected a positive length of the step, or None for no bound")
    return radius


def _bisected(length: Callable[[float], float], radius: float, low: float, scale: float, *, rising: bool) -> float:
    """The mu from `low` on at which a length that rises or falls with it equals the radius, to rounding."""
    high = max(scale, 2 * low)
    while (length(high) < radius) == rising and high < 1e12 * scale:
        high *= 10
    for _ in range(200):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        low, high = (middle, high) if (length(middle) < radius) == rising else (low, middle)
    return high
