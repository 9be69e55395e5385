"""Objectives: what a path walks towards while it keeps the function.

An objective proposes the next position; the driver corrects it, measures it and accepts or refuses it. Objectives are
immutable; what evolves is an explicit state of tensors, so that a refused step leaves no trace and a path can resume.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipgeo.constraints import Constraints
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
        predicted: Change of the function that the tangent model expects, sqrt(|r + R w|^2 / N) less what was there
            before, in units of z; None without a predictor.
    """

    position: Position
    free: Tensor
    state: State
    moves: Compensation | None
    cost: float
    predicted: float | None = None


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

    def landmark(self, state: State) -> bool:
        """Whether a position is worth the corrector's full work; by default only where the path arrives."""
        return self.reached(state)

    def beside(self, kept: Kept) -> Sequence[Any]:
        """Batches whose outputs the correction at a landmark leaves as they are, beside the protected; none by default.

        Args:
            kept: The protected function.
        """
        del kept
        return ()

    def counted(self, model: OutputMap) -> Tensor:
        """Boolean `[D]`: the coordinates over which the sparsity of a point is counted."""
        return weight_mask(model)


def sparse_mask(model: OutputMap, exclude: Where = None) -> Tensor:
    """Boolean `[D]`: the weights that may become zero (see `weight_mask`).

    Raises:
        NotImplementedError: One of them is kept on a manifold.
        ValueError: There is none.
    """
    mask = weight_mask(model, exclude)
    if not mask.any():
        raise ValueError(
            f"exclude: {exclude!r} leaves no tensor with two axes or more out of {model.space.names}; nothing can"
            " become sparse"
        )
    cure = "keep them dense with exclude={names}, beside whatever else is excluded"
    Constraints.of(model.module, model.space).refuse("exclude", "would leave their manifolds with zeros", cure, mask)
    return mask


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
