"""First-order correction: walk back by Adam on minibatches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fipgeo.model import OutputMap
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.correctors.base import Correction, Corrector, State
from fipgeo.paths.kept import Kept, Position


@dataclass(frozen=True)
class FirstOrder(Corrector):
    """Adam on minibatches of the protected inputs (Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015).

    The loss is mean |z - z_0|^2 / mean |z_0|^2 + tap_weight * mean over taps of mean (h - h_0)^2 / var h_0, where the
    taps h are hidden outputs: they give many more constraints an input when inputs are few. Where there is a mask, taps
    that start with its axes are compared at the positions that count. Moments are kept from one correction to the next;
    the learning rate is constant, and decays along a cosine in the last correction. Where the model has BatchNorm,
    minibatches are normalised by themselves while weights move, and the running statistics are re-estimated at the end.

    Attributes:
        steps: Minibatches in one correction.
        final_steps: The same in the last one.
        batch_size: Protected inputs in a minibatch.
        lr: Learning rate.
        taps: Names of modules whose outputs are protected too; "blocks" for the smallest modules that hold at least two
            weight matrices (residual blocks, attention, MLPs), or None.
        tap_weight: Weight of the taps beside the outputs.

    Raises:
        ValueError: When correcting, if a tap names no module of the model.
    """

    steps: int = 30
    final_steps: int = 400
    batch_size: int = 64
    lr: float = 1e-3
    taps: str | tuple[str, ...] | None = "blocks"
    tap_weight: float = 2.0

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
        steps = self.final_steps if final else self.steps
        live = bool(kept.function.map.normalisers)
        taps = kept.function.map.blocks() if self.taps == "blocks" else list(self.taps or ())
        theta = position.theta.clone()
        optimizer = torch.optim.Adam([theta], lr=self.lr)
        if state:
            moments = {"step": state["step"], "exp_avg": state["exp_avg"] * free, "exp_avg_sq": state["exp_avg_sq"]}
            optimizer.state[theta] = {key: value.clone() for key, value in moments.items()}
        cost = 0.0
        for t in range(steps):
            batch, z0, _ = kept.draw(self.batch_size, generator)
            here = replace(position, theta=theta)
            theta.grad = self._gradient(kept, here, batch, z0, taps) * free
            optimizer.param_groups[0]["lr"] = self.lr * (0.5 * (1 + math.cos(math.pi * t / steps)) if final else 1.0)
            optimizer.step()
            cost += (4 if taps else 3) * len(z0)
        position = replace(position, theta=theta)
        if live:
            position = kept.renormalised(position)
            cost += kept.num_examples
        return Correction(position, dict(optimizer.state[theta]), cost)

    def _gradient(self, kept: Kept, position: Position, batch: Any, z0: Tensor, taps: list[str]) -> Tensor:
        """Gradient `[D]` of the loss on a minibatch."""
        function = kept.at(position)
        model, start = function.map, kept.function.map
        hidden0 = self._hidden(start, kept.start, batch, taps) if taps else []
        with model.frozen(batch_statistics=bool(model.normalisers)), torch.enable_grad():
            theta = position.theta.detach().requires_grad_()
            outputs, hidden = model.tapped(model.named(theta), batch, taps)
            loss = (function.embedded(outputs, batch) - z0).square().sum() / len(z0) / kept.scale
            mask = next((m for m in function.masks(outputs, batch) if m is not None), None)
            pairs = [(_counting(h, mask), _counting(h0, mask)) for h, h0 in zip(hidden, hidden0, strict=True)]
            pairs = [(h, h0) for h, h0 in pairs if h0.numel() and float(h0.std(correction=0)) > 0]
            parts = [(h - h0).square().mean() / h0.var(correction=0) for h, h0 in pairs]
            if parts:
                loss = loss + self.tap_weight * sum(parts) / len(parts)
            return torch.autograd.grad(loss, theta)[0]

    @staticmethod
    def _hidden(model: OutputMap, theta: Tensor, batch: Any, taps: list[str]) -> list[Tensor]:
        with model.frozen():
            return model.tapped(model.named(theta), batch, taps)[1]


def _counting(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """A hidden output at the positions that count; all of it where it does not start with the mask's axes."""
    if mask is None or hidden.dim() <= mask.dim() or hidden.shape[: mask.dim()] != mask.shape:
        return hidden
    return hidden[mask]
