"""Objectives: what a path walks towards while it keeps the function.

An objective proposes the next position; the driver corrects it, measures it and accepts or refuses it. Objectives are
immutable; what evolves is an explicit state of tensors, so that a refused step leaves no trace and a path can resume.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fipgeo.model import OutputMap
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.kept import Kept, Position
from fipgeo.space import Where

State = Mapping[str, Tensor]
Predictor = Callable[[Position, Tensor], Compensation | None]
"""(position, free) -> the tangent moves there, or None to step without a metric."""


@dataclass(frozen=True, eq=False)
class Proposal:
    """A step before correction.

    Attributes:
        position: Where the objective wants to be.
        free: Boolean `[D]`, the weights that a corrector may move without undoing what was won.
        state: The objective's state if the step is accepted.
        moves: The tangent moves used, for a corrector to use once more.
        cost: Model evaluations spent.
    """

    position: Position
    free: Tensor
    state: State
    moves: Compensation | None
    cost: float


class Objective(ABC):
    """What a path walks towards.

    Attributes:
        name: What `value` is, with its unit.
        maximise: Whether more of it is better.
    """

    name: str
    maximise: bool

    @abstractmethod
    def begin(self, kept: Kept, position: Position) -> State:
        """The state at the start of a path.

        Raises:
            ValueError: The objective does not fit the model.
        """

    @abstractmethod
    def propose(
        self,
        kept: Kept,
        position: Position,
        state: State,
        size: float,
        predictor: Predictor,
        generator: torch.Generator,
    ) -> Proposal:
        """A step of the given size (what size means is the objective's own)."""

    @abstractmethod
    def value(self, position: Position, state: State) -> float:
        """The objective's measure of a position."""

    @abstractmethod
    def reached(self, state: State) -> bool:
        """Whether the path has arrived."""

    def counted(self, model: OutputMap) -> Tensor:
        """Boolean `[D]`: the coordinates over which the sparsity of a point is counted."""
        return weight_mask(model)


def weight_mask(model: OutputMap, exclude: Where = None) -> Tensor:
    """Boolean `[D]`: what counts as a weight, less the tensors that `exclude` chooses.

    Weights are the tensors with at least two axes that belong to no normalisation layer, `[1, ..., 1, D]` (a token)
    left out; embeddings count. Biases, and scales and shifts of normalisation layers of any shape, do not.
    """
    space, modules = model.space, dict(model.module.named_modules())

    def is_weight(name: str, tensor: Tensor) -> bool:
        owner = type(modules[name.rpartition(".")[0]]).__name__
        token = tensor.dim() > 2 and tensor.numel() == tensor.shape[-1]
        return tensor.dim() > 1 and not token and "Norm" not in owner

    named = {name: torch.empty(shape, device="meta") for name, shape in space.shapes.items()}
    names = {name for name, tensor in named.items() if is_weight(name, tensor)}
    nothing = torch.zeros(space.dim, dtype=torch.bool, device=space.device)
    mask = space.mask(lambda name, _: name in names) if names else nothing
    return mask if exclude is None else mask & ~space.mask(exclude, argument="exclude")


@dataclass(frozen=True)
class Sparsity(Objective):
    """Unstructured sparsity over all chosen weights together.

    Zeros are chosen by `score`: by default the change of the outputs that the metric predicts for setting a weight to
    zero, w_j^2 g_jj, with g_jj re-estimated at every step. Once chosen they are held. A step of size h zeroes the share
    h of the weights that are left; with a predictor, the others make up for it within the tangent space.

    Attributes:
        target: Share of zeros to reach, in [0, 1).
        exclude: Which tensors stay dense (globs or a predicate), besides biases and normalisation scales and shifts.
        score: "metric" for w_j^2 g_jj, "lamp", or "magnitude" (see `scores`).
        samples: Random output directions for each estimate of the diagonal.
        batch_size: Inputs that share a random output direction.

    Raises:
        ValueError: target is not in [0, 1).
    """

    target: float
    exclude: Where = None
    score: str = "metric"
    samples: int = 128
    batch_size: int = 8
    name = "sparsity"
    maximise = True

    def __post_init__(self) -> None:
        """Check the target."""
        if not 0 <= self.target < 1:
            raise ValueError(
                f"sparsity: got {self.target}, expected a share of zeros in [0, 1), such as 0.9 for 90 % zeros"
            )
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
        return {"counted": counted, "held": counted & (position.theta == 0)}

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
        want = min(self._goal(total), have + max(round(size * (total - have)), 1))
        score = torch.where(counted & ~held, self.scores(kept, position, counted & ~held, generator), torch.inf)
        chosen = torch.zeros_like(held)
        chosen[score.argsort(stable=True)[: want - have]] = True
        held = held | chosen
        moves = predictor(position, ~held)
        step = torch.where(chosen, -position.theta, 0)
        cost = 3.0 * self.samples * self.batch_size * (self.score == "metric")
        if moves is not None:
            r = moves.kept.residual(position) + moves.root(step)
            step = step + moves(r)
            cost += moves.cost
        theta = torch.where(held, 0, position.theta + step)
        return Proposal(replace(position, theta=theta), ~held, {"counted": counted, "held": held}, moves, cost)

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
        """Whether as many weights are held at zero as the target asks."""
        return int(state["held"].sum()) >= self._goal(int(state["counted"].sum()))

    def _goal(self, total: int) -> int:
        return round(self.target * total)


def metric_diagonal(
    kept: Kept, position: Position, samples: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """An unbiased estimate of diag g `[D]`: mean of (R_b^T u)^2 / n over minibatches b and random signs u.

    E (R_b^T u)_j^2 = sum over the minibatch's rows of R_rj^2, since the signs are independent (Bekas, Kokiopoulou &
    Saad, An Estimator for the Diagonal of a Matrix, 2007, applied to R^T R).
    """
    function = kept.at(position)
    weights = function.map.named(position.theta)
    total, seen = torch.zeros_like(position.theta), 0
    with function.map.frozen():
        for _ in range(samples):
            batch, z0, live = kept.draw(batch_size, generator)
            z, pull = torch.func.vjp(function.on(batch), weights)[:2]
            count = z.numel() if live is None else int(live.sum())
            signs = torch.randint(2, (count,), generator=generator).to(z) * 2 - 1
            if live is not None:  # none is drawn for masked entries, so that more padding leaves the others as they are
                signs = torch.zeros_like(z).masked_scatter(live.reshape(-1), signs)
            total += function.map.space.ravel(pull(signs)[0]).square()
            seen += len(z0)
    return total / seen
