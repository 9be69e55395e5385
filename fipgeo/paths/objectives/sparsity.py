"""Sparsity: weights set to zero, a share at a time, and held there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fipgeo.model import OutputMap
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.objectives.base import Objective, Predictor, Proposal, State, weight_mask
from fipgeo.paths.objectives.scores import metric_diagonal
from fipgeo.space import Where


@dataclass(frozen=True)
class Sparsity(Objective):
    """Unstructured sparsity over all chosen weights together.

    Zeros are chosen by `score`: by default the change of the outputs that the metric predicts for setting a weight to
    zero, w_j^2 g_jj, with g_jj re-estimated at every step. Once chosen they are held. A step of size h zeroes the share
    h of the weights that are left; with a predictor, the others make up for it within the tangent space. No step goes
    over a waypoint: every one is hit exactly and is a landmark, where the corrector does its full work.

    Attributes:
        target: Share of zeros to reach, in [0, 1); or several, increasing, the waypoints of one path.
        exclude: Which tensors stay dense (globs or a predicate), besides biases and normalisation scales and shifts.
        score: "metric" for w_j^2 g_jj, "lamp", or "magnitude" (see `scores`).
        samples: Random output directions for each estimate of the diagonal.
        batch_size: Inputs that share a random output direction.

    Raises:
        ValueError: target is not in [0, 1), or waypoints do not increase.
    """

    target: float | tuple[float, ...]
    exclude: Where = None
    score: str = "metric"
    samples: int = 128
    batch_size: int = 8
    name = "sparsity"
    maximise = True

    def __post_init__(self) -> None:
        """Check the target."""
        single = isinstance(self.target, int | float)
        targets = (self.target,) if isinstance(self.target, int | float) else tuple(self.target)
        if not targets or not all(0 <= t < 1 for t in targets):
            raise ValueError(
                f"sparsity: got {self.target}, expected a share of zeros in [0, 1), such as 0.9 for 90 % zeros, or"
                " several such as (0.7, 0.8, 0.9)"
            )
        if any(b <= a for a, b in zip(targets, targets[1:], strict=False)):
            raise ValueError(f"sparsity: got waypoints {targets}, expected them to increase, such as (0.7, 0.8, 0.9)")
        if not single:
            object.__setattr__(self, "target", targets)  # a list would be neither hashable nor safe from changes
        if self.score not in ("metric", "lamp", "magnitude"):
            raise ValueError(f"score: got {self.score!r}, expected 'metric', 'lamp' or 'magnitude'")

    def counted(self, model: OutputMap) -> Tensor:
        """The weights that may become zero (see `weight_mask`)."""
        mask = weight_mask(model, self.exclude)
        if not mask.any():
            raise ValueError(
                f"exclude: {self.exclude!r} leaves no tensor with two axes or more out of {model.space.names}; nothing"
                " can become sparse"
            )
        return mask

    def begin(self, kept: Kept, position: Position) -> State:
        """Weights that are zero already count and are held."""
        counted = self.counted(kept.function.map)
        held = counted & (position.theta == 0)
        return {"counted": counted, "held": held, "before": held.sum()}

    def propose(
        self,
        kept: Kept,
        position: Position,
        state: State,
        size: float,
        predictor: Predictor,
        generator: torch.Generator,
    ) -> Proposal:
        """Zero the share `size` of the weights that are left, and move the others to make up for it."""
        counted, held = state["counted"], state["held"]
        total, have = int(counted.sum()), int(held.sum())
        goals = [g for g in self._goals(total) if g > have]
        want = min(goals[0] if goals else have, have + max(round(size * (total - have)), 1))
        score = torch.where(counted & ~held, self.scores(kept, position, counted & ~held, generator), torch.inf)
        chosen = torch.zeros_like(held)
        chosen[score.argsort(stable=True)[: want - have]] = True
        held = held | chosen
        moves = predictor(position, ~held)
        step = torch.where(chosen, -position.theta, 0)
        cost, predicted = 3.0 * self.samples * self.batch_size * (self.score == "metric"), None
        if moves is not None:
            before = moves.kept.residual(position)
            r = before + moves.root(step)
            fix = moves(r)
            after = r + moves.root(fix)
            predicted = float(after.double().norm() - before.double().norm()) / moves.num_examples**0.5
            step = step + fix
            cost += moves.cost
        theta = torch.where(held, 0, position.theta + step)
        new = {"counted": counted, "held": held, "before": torch.tensor(have)}
        return Proposal(replace(position, theta=theta), ~held, new, moves, cost, predicted)

    def scores(self, kept: Kept, position: Position, alive: Tensor, generator: torch.Generator) -> Tensor:
        """What each weight is worth, `[D]`; the least are set to zero first.

        "metric": the squared change of the embedded outputs that the metric predicts, w_j^2 g_jj. "magnitude": w_j^2.
        "lamp": w_j^2 over the sum of the squares in its tensor that are at least as large, which shares sparsity out
        between layers (Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021).
        """
        square = position.theta.square()
        if self.score == "magnitude":
            return square
        if self.score == "metric":
            return square * metric_diagonal(kept, position, self.samples, self.batch_size, generator)
        out = torch.zeros_like(square)
        for where in kept.function.map.space.slices().values():
            own = torch.where(alive[where], square[where], 0)
            values, order = own.sort(stable=True)
            out[where] = torch.zeros_like(own).scatter(
                0, order, values / values.flip(0).cumsum(0).flip(0).clamp_min(1e-30)
            )
        return out

    def value(self, position: Position, state: State) -> float:
        """Exact zeros among the counted weights, as a share."""
        return float((position.theta[state["counted"]] == 0).double().mean())

    def reached(self, state: State) -> bool:
        """Whether as many weights are held at zero as the last waypoint asks."""
        return int(state["held"].sum()) >= self._goals(int(state["counted"].sum()))[-1]

    def landmark(self, state: State) -> bool:
        """Whether the step that made this state arrived at a waypoint."""
        before, have = int(state["before"]), int(state["held"].sum())
        return any(before < goal <= have for goal in self._goals(int(state["counted"].sum())))

    def _goals(self, total: int) -> list[int]:
        """Zeros at every waypoint."""
        targets = (self.target,) if isinstance(self.target, int | float) else self.target
        return [round(target * total) for target in targets]
