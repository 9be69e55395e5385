r"""Least squares in the tangent space: which move of the free weights best undoes a given change of the outputs.

    w = argmin  |r + R w|^2 / N + mu |w|^2      over w supported on the free weights F
      = -R_F^T (R_F R_F^T + N mu)^{-1} r  =  -(g_FF + mu)^{-1} R_F^T r / N

One object serves two steps of a path. Predictor: with r = R d it turns a wished displacement d into
`d + w = argmin <v, g v> + mu |v - d|^2`, which for F = everything is mu (g + mu)^{-1} d: free directions pass, costly
ones are damped. Corrector: with r = z(theta) - z(theta_0) it is the Gauss-Newton (Levenberg-Marquardt) step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fipgeo.jacobian import JacobianRoot
from fipgeo.linalg import Dense, Diagonal, Gram, LinearOperator, cg, trace
from fipgeo.model import NotFiniteError
from fipgeo.paths.kept import Kept, Position

MAX_ROWS = 2048
"""Up to so many embedded outputs the Gram matrix is factored; beyond, conjugate gradients are used."""


class Compensation:
    """The least-squares moves at one position.

    Args:
        kept: The protected inputs that make the rows of R.
        position: Where R is taken.
        free: Boolean `[D]`, the weights that may move.
        damping: mu as a multiple of the mean non-zero eigenvalue of g_FF.
        max_iters: Conjugate-gradient iterations where the Gram matrix is too large to factor.
        max_bytes: Most memory for rows of R.

    Attributes:
        cost: Model evaluations that making it took.
    """

    def __init__(
        self,
        kept: Kept,
        position: Position,
        free: Tensor,
        *,
        damping: float,
        max_iters: int = 30,
        max_bytes: int = 2**30,
    ) -> None:
        self.root = JacobianRoot(kept.at(position), position.theta, max_bytes=max_bytes, survey=kept.survey)
        self.kept, self.num_examples, self.max_iters = kept, kept.num_examples, max_iters
        self.cost = 2.0 * kept.survey.num_rows
        using = self.root.materialise() or self.root.prepare()
        mask = free.to(position.theta.dtype)
        self.masked: LinearOperator = using @ Diagonal(mask)
        self.gram: Tensor | None = None
        if isinstance(using, Dense):
            self.masked = using if bool(free.all()) else Dense(using.matrix * mask)
            total = float(self.masked.matrix.square().sum(1).double().sum())
            if self.root.shape[0] <= MAX_ROWS:
                self.gram = (self.masked.matrix @ self.masked.matrix.T).double()
        else:
            total = float(trace(Gram(self.masked), num_products=4).value)
        if not math.isfinite(total):
            raise NotFiniteError(
                "model: the derivative of its outputs is NaN or infinite, so there is no metric to step in"
            )
        rows = kept.survey.num_rows - kept.survey.lost
        self.scale = total / self.num_examples / max(min(rows, int(free.sum())), 1)
        self.damped(damping)

    def damped(self, damping: float) -> Compensation:
        """The same moves under another damping; rows and their Gram matrix are shared.

        Raises:
            ValueError: damping is not positive.
        """
        if not damping > 0:
            raise ValueError(f"damping: got {damping}, expected a positive multiple of the metric's mean eigenvalue")
        self.mu = damping * self.scale
        self.factor: Tensor | None = None
        if self.gram is not None and self.mu > 0:
            shift, failed = self.num_examples * self.mu, True
            while failed and math.isfinite(
                shift
            ):  # single-precision rows can leave the Gram matrix a rounding error short of definite
                factor, info = torch.linalg.cholesky_ex(self.gram + shift * torch.eye(len(self.gram)).to(self.gram))
                self.factor, failed, shift = factor, bool(info), 10 * shift
        return self

    def __call__(self, r: Tensor) -> Tensor:
        """The move w `[D]` for a change r of the embedded outputs `[N * M]`."""
        if not self.mu > 0:
            return torch.zeros(self.root.shape[1], dtype=self.root.dtype, device=self.root.device)
        if self.factor is not None:
            u = torch.cholesky_solve(r.double()[:, None], self.factor)[:, 0]
            return -self.masked.adjoint(u.to(self.root.dtype))
        rhs = self.masked.adjoint(r) / self.num_examples
        g = Gram(self.masked, 1 / self.num_examples)
        return -cg(g, rhs, damping=self.mu, rtol=1e-3, max_iters=self.max_iters).value

    def passed(self, d: Tensor) -> Tensor:
        """The predictor step for a wished displacement d `[D]`: `argmin <v, g v> + mu |v - d|^2`, v = d off F."""
        return d + self(self.root(d))
