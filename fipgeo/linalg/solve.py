"""Iterative solves with many right-hand sides at once: conjugate gradients, and LSMR for least squares."""

from collections.abc import Callable

import torch
from torch import Tensor

from fipgeo.linalg._shifts import multishift
from fipgeo.linalg._stacks import dots, norms, scaled
from fipgeo.linalg._system import Damping, System, as_rows, ratio, require_damping, tolerance
from fipgeo.linalg.nodes import Identity, Stack
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Solution


@torch.no_grad()
def cg(
    operator: LinearOperator,
    rhs: Tensor,
    *,
    damping: Damping = 0.0,
    rtol: float | None = None,
    atol: float = 0.0,
    max_iters: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    x0: Tensor | None = None,
) -> Solution:
    """Conjugate gradients for `(A + damping I) x = b`, A symmetric positive semi-definite.

    Right-hand sides run side by side, each with its own scalars, by one stacked product an iteration; those
    that are done leave the stack. A residual that the recurrence calls small is computed anew with a true
    product; if it is not small, the iteration goes on from the true one.

    Several dampings share one Krylov space: one product an iteration for each right-hand side, whatever the
    number of dampings. One stacked product then measures all true residuals, and the iteration above goes on
    with those that are not small. With a preconditioner or x0 there is no such space, and every pair of damping
    and right-hand side has its own products.

    Args:
        operator: A, shape `(n, n)`.
        rhs: b, `[..., n]`. In float64 for an A in lower precision, products are made in float64 where A has
            them (a matrix, or what is made of matrices); otherwise vectors are rounded at every product, and
            `STAGNATED` is the verdict where that keeps `rtol` from being measured.
        damping: added to the diagonal; a list or tensor `[p]` solves for each, and everything in the record has
            p as its first axis.
        rtol: a right-hand side is done when `|b - (A + damping I) x| <= max(rtol |b|, atol)`; None for 1e-6,
            in float32 1.2e-5 (100 eps).
        atol: see `rtol`.
        max_iters: most iterations; None for 10 n, at most 1000.
        preconditioner: maps stacks `[k, n]` to about `(A + damping I)^{-1}` of them, symmetric positive
            definite.
        x0: start, of the shape of the value; None for zero.

    Returns:
        Solution. `BREAKDOWN`: a direction of negative (or, to rounding, zero) curvature was met; `value` is
        the iterate before it, `curvature` the number. `STAGNATED`: going on from the true residual no longer
        reduces it, or the rounding of x alone is as large. `MAX_ITERATIONS`: the best that the allowed work
        gave, with its true residual.

    Raises:
        ValueError: if A is not square, shapes do not fit, or damping is negative.
        TypeError: if dtypes differ.

    Source: Hestenes & Stiefel, Methods of conjugate gradients for solving linear systems (1952); for several
    dampings Frommer & Maass, Fast CG-based methods for Tikhonov-Phillips regularization (1999).

    Examples:
        >>> from fipgeo.linalg import Dense
        >>> A = Dense(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), psd=True)
        >>> found = cg(A, torch.tensor([[4.0, 3.0], [1.0, 2.0]]))
        >>> found.outcome.name, found.value.round(decimals=4).abs()
        ('CONVERGED', tensor([[1., 1.],
                [0., 1.]]))
    """
    system = System(operator, rhs, damping)
    shape = (*system.batch, operator.shape[0])
    if x0 is not None and x0.shape != shape:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}, expected that of the value, {shape}")
    start = None if x0 is None else as_rows(system.operator, x0, operator.shape[0], "x0")
    rtol = system.tolerance(rtol)
    target = torch.clamp(rtol * system.lengths, min=atol)
    limit = min(10 * operator.shape[0], 1000) if max_iters is None else max_iters
    history: list[Tensor] = []
    if system.path and start is None and preconditioner is None:
        start, sizes = multishift(system, target, limit)
        history = [ratio(size, system.lengths) for size in sizes[:-1]]
    run = _ConjugateGradients(system, target, preconditioner, start)
    history.append(ratio(run.size, system.lengths))
    while len(run.live) and len(history) <= limit:
        run.step()
        history.append(ratio(run.size, system.lengths))
    run.finish()
    return system.solution(
        run.x,
        ratio(run.size, system.lengths),
        system.judged(Outcome.worst(run.outcomes), run.x, rtol, float(run.highest.max()) if len(run.x) else 0.0),
        len(history) - 1,
        history=torch.stack(history),
        curvature=run.curvature,
    )


class _ConjugateGradients:
    """All right-hand sides of one solve; `live` are the rows that still run."""

    def __init__(
        self,
        system: System,
        target: Tensor,
        preconditioner: Callable[[Tensor], Tensor] | None,
        x0: Tensor | None,
    ) -> None:
        self.system, self.target = system, target
        self.precondition = preconditioner or (lambda r: r)
        self.x = torch.zeros_like(system.rhs) if x0 is None else x0.clone()
        self.r = system.rhs.clone() if x0 is None else system.residual(x0)
        self.size = norms(self.r)
        self.true_size = self.size.clone()  # the residual when it was last measured
        self.curvature = torch.full_like(target, torch.inf)
        self.highest = torch.zeros_like(target)
        self.outcomes = [Outcome.MAX_ITERATIONS] * len(target)
        self.unmeasured = torch.ones_like(target, dtype=torch.bool)
        self.live = torch.arange(len(target), device=target.device)
        self.stop(self.size <= target, Outcome.CONVERGED, measured=True)
        self.p = torch.zeros_like(self.r)
        self.rz = torch.ones_like(target)
        self.turn(torch.ones_like(self.live, dtype=torch.bool))

    @property
    def rows(self) -> Tensor | slice:
        """Index of the live rows; a slice, which copies nothing, while all are."""
        return slice(None) if len(self.live) == len(self.target) else self.live

    def stop(self, mask: Tensor, outcome: Outcome, measured: bool = False) -> None:
        """Let the live rows under `mask` rest with a verdict."""
        for i in self.live[mask].tolist():
            self.outcomes[i] = outcome
        self.unmeasured[self.live[mask]] = not measured
        self.live = self.live[~mask]

    def step(self) -> None:
        """One product, one move along each direction, and new directions."""
        p = self.p[self.rows]
        ap = self.system(p, self.rows)
        pap = dots(p, ap)
        quotient = pap / dots(p, p)
        self.curvature[self.rows] = torch.minimum(self.curvature[self.rows], quotient)
        self.highest[self.rows] = torch.maximum(self.highest[self.rows], quotient)
        finite = torch.isfinite(pap)
        # a curvature below the rounding of the largest one cannot be told from zero
        curved = finite & (quotient > torch.finfo(p.dtype).eps * self.highest[self.rows])
        if not bool(curved.all()):
            p, ap, pap = p[curved], ap[curved], pap[curved]
            self.stop(~finite, Outcome.NOT_FINITE)
            self.stop(~curved[finite], Outcome.BREAKDOWN)
        alpha = self.rz[self.rows] / pap
        self.add(self.x, alpha, p)
        self.add(self.r, -alpha, ap)
        self.turn(self.measure())

    def add(self, to: Tensor, factors: Tensor, y: Tensor) -> None:
        """`to_i += factors_i y_i` at the live rows, in one pass where these are all."""
        rows, factors = self.rows, factors.to(y.dtype).unsqueeze(-1)
        if isinstance(rows, slice):
            to.addcmul_(factors, y)
        else:
            to[rows] += factors * y

    def measure(self) -> Tensor:
        """Measure residuals that the recurrence calls small; which live rows are to start again."""
        self.size[self.rows] = norms(self.r[self.rows])
        claimed = self.size[self.rows] <= self.target[self.rows]
        if not bool(claimed.any()):
            return claimed
        some = self.live[claimed]
        self.r[some] = self.system.residual(self.x[some], some)
        before, after = self.true_size[some], norms(self.r[some])
        self.size[some] = self.true_size[some] = after
        done, near = after <= self.target[some], after <= 2 * self.target[some]
        # below eps |A| |x| the rounding of x alone moves the residual, and starting again does not help
        floor = torch.finfo(self.x.dtype).eps * self.highest[some] * norms(self.x[some])
        stuck = ~done & torch.where(near, ~(after <= 0.9 * before), ~(after <= 0.5 * before) | (after <= floor))
        is_done, is_stuck = (claimed.index_put((claimed,), mask) for mask in (done, stuck))
        self.stop(is_done, Outcome.CONVERGED, measured=True)
        self.stop(is_stuck[~is_done], Outcome.STAGNATED, measured=True)
        return claimed[~is_done & ~is_stuck]

    def turn(self, fresh: Tensor) -> None:
        """New directions for the live rows, conjugate to the last ones except where `fresh`."""
        if not len(self.live):
            return
        r = self.r[self.rows]
        z = self.precondition(r)
        rz = dots(r, z)
        beta = torch.where(fresh, 0.0, rz / self.rz[self.rows])
        self.p[self.rows] *= beta.to(self.p.dtype).unsqueeze(-1)
        self.p[self.rows] += z
        self.rz[self.rows] = rz
        self.stop(~torch.isfinite(rz), Outcome.NOT_FINITE)
        self.stop(self.rz[self.rows] <= 0, Outcome.BREAKDOWN)

    def finish(self) -> None:
        """True residuals for the rows that have none yet."""
        rows = self.unmeasured.nonzero().squeeze(-1)
        if len(rows):
            self.size[rows] = norms(self.system.residual(self.x[rows], rows))


@torch.no_grad()
def lsmr(
    operator: LinearOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    rtol: float | None = None,
    max_iters: int | None = None,
) -> Solution:
    """Damped least squares, `min |A x - b|^2 + damping |x|^2`, without forming `A^T A`.

    Solves the same system as `cg(Gram(A), A^T b, damping=...)` with the same number of iterations in exact
    arithmetic. It needs a forward and an adjoint product an iteration, where `cg` needs one fused normal
    product, and pays where damping is so small that `cg` stagnates. Among the minimisers the smallest is
    returned.

    Args:
        operator: A, shape `(m, n)`.
        rhs: b, `[..., m]`.
        damping: weight of `|x|^2` (of the square: lambda, not its root).
        rtol: a right-hand side is done when `|A^T (b - A x) - damping x| <= rtol |A^T b|`; None for 1e-6, in
            float32 1.2e-5 (100 eps).
        max_iters: most iterations; None for `10 min(m, n)`, at most 1000.

    Returns:
        Solution; `residual` is that of the normal equations, as in `rtol`, from true products.

    Raises:
        ValueError: if shapes do not fit or damping is negative.
        TypeError: if dtypes differ.

    Source: Fong & Saunders, LSMR: an iterative algorithm for sparse least-squares problems (2011).

    Examples:
        >>> from fipgeo.linalg import Dense
        >>> A = Dense(torch.tensor([[1.0], [1.0]]))
        >>> lsmr(A, torch.tensor([1.0, 3.0])).value
        tensor([2.])
    """
    require_damping(damping)
    m, n = operator.shape
    b = as_rows(operator, rhs, m)
    if damping:  # damping is a block of rows below A; it costs no product with A
        operator = Stack([operator, damping**0.5 * Identity(n, dtype=operator.dtype, device=operator.device)])
        b = torch.cat([b, b.new_zeros(len(b), n)], dim=-1)
    limit = min(10 * min(m, n), 1000) if max_iters is None else max_iters
    residual, gradient = b, operator.adjoint(b)
    size = norms(gradient)
    target, lengths = tolerance(rtol, operator.dtype) * size, size.clone()
    x = b.new_zeros(len(b), n)
    outcomes = [Outcome.CONVERGED] * len(b)
    history, num_products = [ratio(size, lengths)], len(b)
    live = (size != 0).nonzero().squeeze(-1)
    while len(live) and len(history) <= limit:
        run = _Bidiagonalisation(operator, residual, gradient)
        while bool((run.size > target[live]).any()) and len(history) <= limit:
            run.step()
            history.append(history[-1].index_copy(0, live, run.size / lengths[live]))
        x[live] += run.x
        residual = b[live] - operator(x[live])
        gradient = operator.adjoint(residual)
        num_products += 2 * len(live) * (run.num_iters + 1)
        before, after = size[live], norms(gradient)
        size[live] = after
        open_ = ~(after <= target[live])
        stuck = open_ & ~(after <= 0.5 * before) & (len(history) <= limit)
        for i, row in enumerate(live.tolist()):
            if open_[i]:
                outcomes[row] = Outcome.STAGNATED if stuck[i] else Outcome.MAX_ITERATIONS
                outcomes[row] = outcomes[row] if torch.isfinite(after[i]) else Outcome.NOT_FINITE
            else:
                outcomes[row] = Outcome.CONVERGED
        keep = open_ & ~stuck
        live, residual, gradient = live[keep], residual[keep], gradient[keep]
    batch = rhs.shape[:-1]
    return Solution(
        x.reshape(*batch, n),
        Outcome.worst(outcomes),
        ratio(size, lengths).reshape(batch),
        len(history) - 1,
        num_products,
        torch.stack(history).reshape(len(history), *batch),
    )


class _Bidiagonalisation:
    """One undamped LSMR run from zero on `min |A x - r|`; the letters are those of the paper.

    `size` is the recurrence's `|A^T (r - A x)|`, for each row.
    """

    def __init__(self, operator: LinearOperator, r: Tensor, gradient: Tensor) -> None:
        self.operator, self.num_iters = operator, 0
        beta = norms(r)
        self.u = _over(r, beta)
        self.v = _over(gradient, beta)
        self.alpha = norms(self.v)
        self.v = _over(self.v, self.alpha)
        self.alpha_bar, self.zeta_bar = self.alpha.clone(), self.alpha * beta
        self.rho, self.rho_bar, self.c_bar = (torch.ones_like(beta) for _ in range(3))
        self.s_bar = torch.zeros_like(beta)
        self.h, self.h_bar, self.x = self.v.clone(), torch.zeros_like(self.v), torch.zeros_like(self.v)
        self.size = self.zeta_bar.abs()

    def step(self) -> None:
        """One forward and one adjoint product, two plane rotations, and the update of x."""
        self.num_iters += 1
        u = self.operator(self.v) - scaled(self.alpha, self.u)
        beta = norms(u)
        self.u = _over(u, beta)
        v = self.operator.adjoint(self.u) - scaled(beta, self.v)
        self.alpha = norms(v)
        self.v = _over(v, self.alpha)

        # the first rotation turns the lower bidiagonal matrix B into the upper bidiagonal R
        rho_old, self.rho = self.rho, torch.hypot(self.alpha_bar, beta)
        c, s = ratio(self.alpha_bar, self.rho), ratio(beta, self.rho)
        theta, self.alpha_bar = s * self.alpha, c * self.alpha
        # the second turns R^T into the upper bidiagonal of the normal equations
        rho_bar_old, theta_bar, rho_temp = self.rho_bar, self.s_bar * self.rho, self.c_bar * self.rho
        self.rho_bar = torch.hypot(rho_temp, theta)
        self.c_bar, self.s_bar = ratio(rho_temp, self.rho_bar), ratio(theta, self.rho_bar)
        zeta, self.zeta_bar = self.c_bar * self.zeta_bar, -self.s_bar * self.zeta_bar

        self.h_bar = self.h - scaled(ratio(theta_bar * self.rho, rho_old * rho_bar_old), self.h_bar)
        self.x += scaled(ratio(zeta, self.rho * self.rho_bar), self.h_bar)
        self.h = self.v - scaled(ratio(theta, self.rho), self.h)
        self.size = self.zeta_bar.abs()


def _over(x: Tensor, lengths: Tensor) -> Tensor:
    """Rows divided by their lengths; a zero row stays zero."""
    return scaled(ratio(torch.ones_like(lengths), lengths).masked_fill(lengths == 0, 0.0), x)
