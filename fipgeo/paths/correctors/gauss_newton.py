"""Gauss-Newton: solve for the move that brings the outputs back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fipgeo.paths.compensate import Compensation
from fipgeo.paths.correctors.base import Correction, Corrector, State
from fipgeo.paths.kept import Kept, Position


@dataclass(frozen=True)
class GaussNewton(Corrector):
    """Levenberg-Marquardt steps on the protected outputs, on full batches or on a random subset of rows.

    Each step solves min |r + R w|^2 / N + mu |w|^2 over the free weights at the present Jacobian. It is kept only if
    the true residual falls; mu then shrinks, otherwise it grows and the step is tried again. BatchNorm statistics are
    re-estimated first, and kept if that alone lowers the residual.

    Attributes:
        steps: Jacobians made in one correction.
        final_steps: The same in the last one.
        damping: mu at first, as a multiple of the mean non-zero eigenvalue of the metric.
        max_rows: Embedded outputs in a step; more protected inputs than that are sampled anew for every Jacobian.
        max_iters: Conjugate-gradient iterations where the Gram matrix is too large to factor.
    """

    steps: int = 2
    final_steps: int = 6
    damping: float = 1e-2
    max_rows: int = 1024
    max_iters: int = 30

    def correct(
        self,
        kept: Kept,
        position: Position,
        free: Tensor,
        state: State,
        generator: torch.Generator,
        *,
        moves: Compensation | None = None,
        final: bool = False,
    ) -> Correction:
        """Solve, check on all protected inputs, adapt the damping (see `Corrector.correct`)."""
        damping = float(state.get("damping", torch.tensor(self.damping)))
        loss, cost = kept.loss(position), float(kept.num_examples)
        if kept.function.map.normalisers:
            renormalised = kept.renormalised(position)
            now = kept.loss(renormalised)
            cost += 2 * kept.num_examples
            if now < loss:
                position, loss = renormalised, now
        if moves is not None:
            tried = replace(position, theta=position.theta + moves(moves.kept.residual(position)))
            now = kept.loss(tried)
            cost += kept.num_examples + moves.kept.num_examples
            if now < loss:
                position, loss = tried, now
        for _ in range(self.final_steps if final else self.steps):
            part = kept.subset(self.max_rows, generator)
            moves = Compensation(part, position, free, damping=damping, max_iters=self.max_iters)
            residual = part.residual(position)
            cost += moves.cost + part.num_examples
            for _ in range(6):
                tried = replace(position, theta=position.theta + moves.damped(damping)(residual))
                now = kept.loss(tried)
                cost += kept.num_examples
                if now < loss:
                    position, loss, damping = tried, now, max(damping / 3, 1e-6)
                    break
                damping = min(4 * damping, 1e3)
        return Correction(position, {"damping": torch.tensor(damping, dtype=torch.float64)}, cost)
