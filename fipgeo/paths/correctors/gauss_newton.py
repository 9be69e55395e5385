"""Gauss-Newton: solve for the move that brings the outputs back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fipgeo.paths.compensate import MAX_COLUMNS, Compensation
from fipgeo.paths.correctors.base import Correction, Corrector, State, settled
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.precondition import LayerPreconditioner
from fipgeo.paths.taps import Taps

MAX_BYTES = 2**28
"""Most memory for columns of free weights, where these are few."""


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
            Hidden outputs do not count. Once few weights are left, more inputs or all are taken at once.
        max_iters: Conjugate-gradient iterations where the Gram matrix is too large to factor.
        taps: Hidden outputs that are protected too (see `Taps`); the residual that must fall is then theirs as well.
        tap_weight: Weight of the taps beside the outputs.
        tap_width: Most numbers a tap and input (see `TappedOutputs`); None for all of them.
        precondition: Whether conjugate gradients use what the layers see (see `LayerPreconditioner`).
        memory: Share of the last move that is added to the next one, in [0, 1): a step that fits one sample of inputs
            then undoes less of what the samples before it have won.
    """

    steps: int = 2
    final_steps: int = 6
    damping: float = 1e-2
    max_rows: int = 1024
    max_iters: int = 30
    taps: Taps = None
    tap_weight: float = 2.0
    tap_width: int | None = None
    precondition: bool = False
    memory: float = 0.0

    def __post_init__(self) -> None:
        """Check the memory."""
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory: got {self.memory}, expected a share of the last move in [0, 1)")

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
        plain, kept = kept, kept.tapped(self.taps, self.tap_weight, self.tap_width)
        damping = float(state.get("damping", torch.tensor(self.damping)))
        position, loss, cost = settled(kept, position)
        if moves is not None:
            tried = kept.moved(position, position.theta + moves(moves.kept.residual(position)))
            now = kept.loss(tried)
            cost += kept.num_examples + moves.kept.num_examples
            if now < loss:
                position, loss = tried, now
        rows = self.max_rows // max(width for _, width in plain.shapes) * max(width for _, width in kept.shapes)
        if 0 < (few := int(free.sum())) <= MAX_COLUMNS:  # all inputs at once cost no more than some: columns are few
            rows = max(rows, MAX_BYTES // (few * position.theta.itemsize))
        before = state.get("move", torch.zeros_like(position.theta)) * free
        for _ in range(self.final_steps if final else self.steps):
            part = kept.subset(max(rows, 1), generator)
            inverse = LayerPreconditioner(part, position, free, generator) if self.precondition else None
            moves = Compensation(
                part, position, free, damping=damping, max_iters=self.max_iters, preconditioner=inverse
            )
            residual = part.residual(position)
            cost += moves.cost + part.num_examples + (inverse.cost if inverse is not None else 0.0)
            for _ in range(6):
                move = moves.damped(damping)(residual)
                cost += 0.0 if moves.gram is not None else 4.0 * part.num_examples * self.max_iters
                move = (1 - self.memory) * move + self.memory * before
                tried = kept.moved(position, position.theta + move)
                now = kept.loss(tried)
                cost += kept.num_examples
                if now < loss:
                    position, loss, damping, before = tried, now, max(damping / 3, 1e-6), move
                    break
                damping = min(4 * damping, 1e3)
        left = {"damping": torch.tensor(damping, dtype=torch.float64)}
        return Correction(position, left | ({"move": before} if self.memory else {}), cost)
