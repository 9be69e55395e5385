"""The published path: distillation on a replay buffer with a pull towards the sparse plane, as one more objective.

What the public implementation of functionally invariant paths does when it sparsifies; here so that it can be compared
on equal terms, with the same driver, verdict and records as every other path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from fipgeo.model import OutputMap
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.objectives.base import Objective, Predictor, Proposal, State, sparse_mask
from fipgeo.space import Where


@dataclass(frozen=True)
class Replay(Objective):
    r"""The published penalty method towards sparsity (Raghavan et al., Nature Machine Intelligence 2024).

    With P_p(w) the weights w less the share p of smallest magnitude, chosen over all counted weights together and anew
    in every step, and D the mean Bhattacharyya distance of the softmax outputs to those of the frozen start network on
    a minibatch of protected inputs,

        u = grad_w D(w) + weight * (w - P_p(w)),        w <- w - lr u / |u|.

    No weight is zero until the end, where w is replaced by P_p(w). Both networks are in eval mode. No metric is formed:
    walk it with `damping=None` and the corrector `NoCorrection`, and a control that refuses no step. A step of the path
    holds `refresh` minibatches; its size multiplies lr.

    The public code sums D over a minibatch of 200 with weight 0.1, which is a weight of 0.0005 here, and adds a small
    number under the root of the Bhattacharyya coefficient; neither is followed. Nor are scales, shifts and biases
    pruned.

    Attributes:
        target: Share p of zeros, in [0, 1).
        exclude: Which tensors stay dense, besides biases and normalisation scales and shifts.
        steps: Minibatches in all.
        refresh: Minibatches in a step of the path.
        lr: Length of a step.
        weight: Of the pull towards the sparse plane.
        batch_size: Protected inputs in a minibatch.

    Raises:
        ValueError: A number is out of range.
    """

    target: float
    exclude: Where = None
    steps: int = 1000
    refresh: int = 50
    lr: float = 0.01
    weight: float = 0.1
    batch_size: int = 64
    name = "sparsity"
    maximise = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.target < 1:
            raise ValueError(f"target: got {self.target}, expected a share of zeros in [0, 1), such as 0.9")
        for key in ("steps", "refresh", "lr", "weight", "batch_size"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}: got {getattr(self, key)}, expected a positive number")

    def counted(self, model: OutputMap) -> Tensor:
        """The weights that may become zero (see `weight_mask`)."""
        return sparse_mask(model, self.exclude)

    def begin(self, kept: Kept, position: Position) -> State:
        """No minibatch seen."""
        del position
        return {"counted": self.counted(kept.function.map), "seen": torch.tensor(0)}

    def propose(
        self,
        kept: Kept,
        position: Position,
        state: State,
        size: float,
        predictor: Predictor,
        generator: torch.Generator,
    ) -> Proposal:
        """`refresh` minibatch steps; after the last of all, the snap to the sparse plane."""
        del predictor
        counted, seen = state["counted"], int(state["seen"])
        count = min(self.refresh, self.steps - seen)
        theta, cost = position.theta.clone(), 0.0
        for _ in range(count):
            batch, z0, _ = kept.draw(self.batch_size, generator)
            gradient = self.gradient(kept, replace(position, theta=theta), batch)
            step = gradient + self.weight * (theta - self.sparse(theta, counted))
            theta = theta - self.lr * size * step / step.norm().clamp_min(torch.finfo(step.dtype).tiny)
            cost += 4.0 * len(z0)
        new = {"counted": counted, "seen": torch.tensor(seen + count)}
        free = torch.ones_like(counted)
        if self.reached(new):
            theta = self.sparse(theta, counted)
            free = ~counted | (theta != 0)
        return Proposal(replace(position, theta=theta), free, new, None, cost)

    def sparse(self, theta: Tensor, counted: Tensor) -> Tensor:
        """P_p(theta): the smallest counted weights set to zero, exactly as many as the target asks."""
        size = torch.where(counted, theta.abs(), torch.inf)
        gone = size.argsort(stable=True)[: round(self.target * int(counted.sum()))]
        return theta.index_fill(0, gone, 0)

    def gradient(self, kept: Kept, position: Position, batch: Any) -> Tensor:
        """Gradient `[D]` of the mean Bhattacharyya distance to the start's outputs on a minibatch."""
        teacher, function = kept.function, kept.at(position)
        reference = teacher.map(kept.start, batch)
        with function.map.frozen(), torch.enable_grad():
            theta = position.theta.detach().requires_grad_()
            outputs = function.map.call(function.map.named(theta), batch)
            parts = []
            for f, f0, mask in zip(outputs, reference, function.masks(outputs, batch), strict=True):
                distance = bhattacharyya(f, f0)
                parts.append((distance if mask is None else distance[mask]).mean())
            return torch.autograd.grad(torch.stack(parts).sum(), theta)[0]

    def value(self, position: Position, state: State) -> float:
        """Exact zeros among the counted weights, as a share; 0 until the end."""
        return float((position.theta[state["counted"]] == 0).double().mean())

    def reached(self, state: State) -> bool:
        """Whether all minibatches are seen."""
        return int(state["seen"]) >= self.steps


def bhattacharyya(f: Tensor, f0: Tensor) -> Tensor:
    """-log sum_c sqrt(p_c q_c) `[...]` of the softmax of logits `[..., C]`, in log space: never negative, 0 for p = q.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
        >>> bhattacharyya(p.log(), q.log()).isclose(-(p * q).sqrt().sum().log()).item()
        True
    """
    return -torch.logsumexp((log_softmax(f, -1) + log_softmax(f0, -1)) / 2, -1)
