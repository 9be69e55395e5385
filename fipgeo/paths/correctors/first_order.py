"""First-order correction: walk back by Adam or SGD on minibatches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fipgeo.paths.compensate import Compensation
from fipgeo.paths.correctors.base import Correction, Corrector, State
from fipgeo.paths.kept import Kept, Position, Recomputed
from fipgeo.paths.precondition import LayerPreconditioner
from fipgeo.paths.taps import Taps


@dataclass(frozen=True)
class FirstOrder(Corrector):
    """Adam or SGD with momentum on minibatches of the protected inputs.

    The loss is mean |z - z_0|^2 / mean |z_0|^2 + tap_weight * mean over taps of mean |h - h_0|^2 / mean |h_0 - mean|^2,
    where the taps h are hidden outputs: they give many more constraints an input when inputs are few (see `Taps`).
    Moments are kept from one correction to the next; the learning rate is constant, and decays along a cosine in the
    last correction. Where the model has BatchNorm, minibatches are normalised by themselves while weights move, and the
    running statistics are re-estimated at the end.

    Attributes:
        steps: Minibatches in one correction.
        final_steps: The same in the last one.
        batch_size: Protected inputs in a minibatch.
        lr: Learning rate; None for 0.05, and with Adam for 4e-3 where the model has BatchNorm, which makes the size of
            the weights before it immaterial, and 2e-3 elsewhere.
        taps: Hidden outputs that are protected too: names of modules, "blocks", "layers" or None.
        tap_weight: Weight of the taps beside the outputs.
        optimizer: "adam" (Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015), "sgd" (heavy ball, 0.9), or
            "natural": "sgd" on gradients that were multiplied by the inverse of the metric's block diagonal, made anew
            at the start of every correction (see `LayerPreconditioner`).
        batch_statistics: Whether BatchNorm normalises minibatches by themselves; if not, its statistics are those of
            the position, re-estimated where that brings the outputs nearer.

    Raises:
        ValueError: The optimizer is none of these. When correcting: a tap names no module of the model.
    """

    steps: int = 40
    final_steps: int = 250
    batch_size: int = 64
    lr: float | None = None
    taps: Taps = "blocks"
    tap_weight: float = 2.0
    optimizer: str = "adam"
    batch_statistics: bool = True

    def __post_init__(self) -> None:
        """Check the optimizer."""
        if self.optimizer not in RATES:
            raise ValueError(f"optimizer: got {self.optimizer!r}, expected one of {', '.join(map(repr, RATES))}")

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
        """Walk; `moves` is not used (see `Corrector.correct`)."""
        del moves
        target = kept.tapped(self.taps, self.tap_weight)
        live, cost = bool(kept.function.map.normalisers) and self.batch_statistics, 0.0
        if not live:
            position = kept.better_normalised(position)
        steps = self.final_steps if final else self.steps
        rate = self._rate(bool(kept.function.map.normalisers))
        theta = position.theta.clone()
        optimizer = self._optimizer(theta, rate)
        if state:
            optimizer.state[theta] = {k: v.clone() * free if k in MOVING else v.clone() for k, v in state.items()}
        evaluations = 4.0 if isinstance(target.reference, Recomputed) else 3.0
        inverse: LayerPreconditioner | None = None
        if self.optimizer == "natural":
            inverse = LayerPreconditioner(_some(target, LOOKED_AT, generator), position, free, generator)
            cost += inverse.cost
        for t in range(steps):
            part = target.draw(self.batch_size, generator)
            slope = target.gradient(replace(position, theta=theta), part, batch_statistics=live)
            slope = slope * free / target.scale
            noise = 16 * torch.finfo(slope.dtype).eps  # which Adam, that forgets sizes, would walk after
            theta.grad = slope * (slope.abs().max() > noise)
            theta.grad = theta.grad if inverse is None else inverse(theta.grad) / 2
            optimizer.param_groups[0]["lr"] = rate * (0.5 * (1 + math.cos(math.pi * t / steps)) if final else 1.0)
            optimizer.step()
            theta.copy_(kept.constraints.brought_back(theta))
            cost += evaluations * len(part.reference)
        position = replace(position, theta=theta)
        if kept.function.map.normalisers:
            rough = live and not final
            position = kept.renormalised(position, ROUGHLY) if rough else kept.better_normalised(position)
            cost += min(kept.num_examples, ROUGHLY) if rough else 3 * kept.num_examples
        return Correction(position, dict(optimizer.state[theta]), cost)

    def _rate(self, normalised: bool) -> float:
        if self.lr is not None:
            return self.lr
        return NORMALISED if normalised and self.optimizer == "adam" else RATES[self.optimizer]

    def _optimizer(self, theta: Tensor, rate: float) -> torch.optim.Optimizer:
        if self.optimizer != "adam":
            return torch.optim.SGD([theta], lr=rate, momentum=0.9)
        return torch.optim.Adam([theta], lr=rate)


RATES = {"adam": 2e-3, "sgd": 0.05, "natural": 0.05}
"""Optimizers, with their learning rates."""

NORMALISED = 4e-3
"""Adam's learning rate for models with BatchNorm."""

MOVING = ("exp_avg", "momentum_buffer")
"""What of an optimizer's state would move weights that have just been frozen."""


ROUGHLY = 1024
"""Protected inputs by which statistics of BatchNorm are re-estimated between corrections; at the end it is by all."""

LOOKED_AT = 256
"""Protected inputs of which the block diagonal of the metric is made."""


def _some(kept: Kept, count: int, generator: torch.Generator) -> Kept:
    """About so many of the protected inputs at random."""
    return kept.subset(count * max(width for _, width in kept.shapes), generator)
