"""Correctors: back to where the function is, within what the objective has won.

A corrector lowers |z(theta) - z(theta_0)|^2 on the protected inputs by moving the free weights only. Two kinds share
one interface: `GaussNewton` solves for the move, `FirstOrder` walks to it by Adam on minibatches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fipgeo.outputs import embed
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.kept import Kept, Position

State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Correction:
    """What a corrector hands back."""

    position: Position
    state: State
    cost: float


class Corrector(ABC):
    """Moves a position's free weights so that the protected outputs return to the start's."""

    @abstractmethod
    def correct(
        self,
        kept: Kept,
        position: Position,
        free: Tensor,
        state: State,
        generator: torch.Generator,
        *,
        moves: Compensation | None = None,
        effort: float = 1.0,
    ) -> Correction:
        """One correction.

        Args:
            kept: The protected inputs and their reference.
            position: Where to start.
            free: Boolean `[D]`, the weights that may move; all others come back bit for bit.
            state: What the last correction left (empty at first).
            generator: Source of minibatches.
            moves: The predictor's tangent moves, to be used once more if the corrector can (a chord step).
            effort: Multiple of the usual work.

        Returns:
            The corrected position, the state for the next correction, and the model evaluations spent.
        """


@dataclass(frozen=True)
class GaussNewton(Corrector):
    """Levenberg-Marquardt steps on the protected outputs, on full batches or on a random subset of rows.

    Each step solves min |r + R w|^2 / N + mu |w|^2 over the free weights at the present Jacobian. It is kept only if the
    true residual falls; mu then shrinks, otherwise it grows and the step is tried again.

    Attributes:
        steps: Jacobians made in one correction.
        damping: mu at first, as a multiple of the mean non-zero eigenvalue of the metric.
        max_rows: Embedded outputs in a step; more protected inputs than that are sampled anew for every Jacobian.
        max_iters: Conjugate-gradient iterations where the Gram matrix is too large to factor.
    """

    steps: int = 2
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
        effort: float = 1.0,
    ) -> Correction:
        """Solve, check on all protected inputs, adapt the damping (see `Corrector.correct`)."""
        damping = float(state.get("damping", torch.tensor(self.damping)))
        loss, cost = kept.loss(position), float(kept.num_examples)
        if moves is not None:
            tried = replace(position, theta=position.theta + moves(moves.kept.residual(position)))
            now = kept.loss(tried)
            cost += kept.num_examples + moves.kept.num_examples
            if now < loss:
                position, loss = tried, now
        for _ in range(round(self.steps * effort)):
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


@dataclass(frozen=True)
class FirstOrder(Corrector):
    """Adam on minibatches of the protected inputs (Kingma & Ba, 2015), with a cosine decay to nothing in every correction.

    Where the model has BatchNorm, minibatches are normalised by themselves while weights move, and the running
    statistics are re-estimated at the end.

    Attributes:
        steps: Minibatches in one correction.
        batch_size: Protected inputs in a minibatch.
        lr: Largest learning rate.
    """

    steps: int = 100
    batch_size: int = 128
    lr: float = 1e-3

    def correct(
        self,
        kept: Kept,
        position: Position,
        free: Tensor,
        state: State,
        generator: torch.Generator,
        *,
        moves: Compensation | None = None,
        effort: float = 1.0,
    ) -> Correction:
        """Walk; `moves` is not used (see `Corrector.correct`)."""
        del state, moves
        steps = max(round(self.steps * effort), 1)
        live = bool(kept.function.map.normalisers)
        theta = position.theta.clone()
        optimizer = torch.optim.Adam([theta], lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        cost = 0.0
        for _ in range(steps):
            batch, z0 = kept.draw(self.batch_size, generator)
            theta.grad = self._gradient(kept, replace(position, theta=theta), batch, z0, live) * free
            optimizer.step()
            schedule.step()
            cost += 3 * len(z0)
        position = replace(position, theta=theta)
        return Correction(kept.renormalised(position) if live else position, {}, cost + live * kept.num_examples)

    @staticmethod
    def _gradient(kept: Kept, position: Position, batch: object, z0: Tensor, live: bool) -> Tensor:
        """Gradient `[D]` of the mean over a minibatch of |z - z_0|^2."""
        function = kept.at(position)
        with function.map.frozen(batch_statistics=live), torch.enable_grad():
            theta = position.theta.detach().requires_grad_()
            z = embed(function.geometry, function.map.call(function.map.named(theta), batch))
            loss = (z - z0).square().sum() / len(z0)
            return torch.autograd.grad(loss, theta)[0]
