"""Correctors: back to where the function is, within what the objective has won.

A corrector lowers |z(theta) - z(theta_0)|^2 on the protected inputs by moving the free weights only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fipgeo.model import NotFiniteError
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
    """Moves a position's free weights so that the protected outputs return to the start's.

    Attributes:
        idle: Whether weights stay where they are, so that nothing needs to be held beside the protected outputs.
    """

    idle: ClassVar[bool] = False

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
        final: bool = False,
    ) -> Correction:
        """One correction.

        Args:
            kept: The protected inputs and their reference.
            position: Where to start.
            free: Boolean `[D]`, the weights that may move; all others come back bit for bit.
            state: What the last correction left (empty at first).
            generator: Source of minibatches.
            moves: The predictor's tangent moves, to be used once more if the corrector can (a chord step).
            final: The step arrives at a landmark of the objective (a waypoint, or the end), worth more work.

        Returns:
            The corrected position, the state for the next correction, and the model evaluations spent.
        """


def settled(kept: Kept, position: Position) -> tuple[Position, float, float]:
    """The position with its own BatchNorm statistics or with re-estimated ones, whichever keeps the outputs better.

    Returns:
        The position, its loss, and the model evaluations spent.
    """
    loss, cost = kept.loss(position), float(kept.num_examples)
    if not kept.function.map.normalisers:
        return position, loss, cost
    try:
        other = kept.renormalised(position)
    except NotFiniteError:
        return position, loss, cost
    now = kept.loss(other)
    return (other, now, 3 * cost) if now < loss else (position, loss, 3 * cost)


@dataclass(frozen=True)
class NoCorrection(Corrector):
    """Nothing is brought back, for objectives that keep the function by themselves.

    Attributes:
        statistics: At the end of a path, re-estimate BatchNorm statistics if that alone brings the outputs nearer.
    """

    statistics: bool = False
    idle: ClassVar[bool] = True

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
        """The position as it came, or with other statistics (see `Corrector.correct`)."""
        del free, generator, moves
        if not (self.statistics and final and kept.function.map.normalisers):
            return Correction(position, state, 0.0)
        better, _, cost = settled(kept, position)
        return Correction(better, state, cost)
