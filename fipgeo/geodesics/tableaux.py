"""Runge-Kutta methods as tables of numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method for autonomous equations y' = f(y).

    Attributes:
        order: The error over a fixed length shrinks like the step to this power.
        stages: Coefficients of the earlier slopes, one row for each further slope.
        weights: Of the slopes in the step.
        embedded: Weights of a second method, one order lower, whose difference estimates the error of a step; None
            without one. The last slope is then the first of the next step.

    Source: Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I (1993), tables 1.2 and 5.2.
    """

    order: int
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    embedded: tuple[float, ...] | None = None

    def step(self, slope: Callable[[Tensor], Tensor], y: Tensor, first: Tensor, h: float) -> tuple[Tensor, Tensor]:
        """One step from y, where the slope is `first`: the new y, and the estimated error (zero without a pair)."""
        slopes = [first]
        for row in self.stages:
            slopes.append(slope(y + h * _combined(row, slopes)))
        error = y.new_zeros(y.shape)
        if self.embedded is not None:
            gaps = tuple(b - e for b, e in zip(self.weights, self.embedded, strict=True))
            error = h * _combined(gaps, slopes)
        return y + h * _combined(self.weights, slopes), error


def _combined(row: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = slopes[0] * row[0]
    for weight, found in zip(row[1:], slopes[1:], strict=False):
        if weight:
            total = total + weight * found
    return total


RK4 = Tableau(
    order=4,
    stages=((1 / 2,), (0, 1 / 2), (0, 0, 1)),
    weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)
"""The classical method: four slopes a step."""

_LAST = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)

DOPRI5 = Tableau(
    order=5,
    stages=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _LAST,
    ),
    weights=(*_LAST, 0),
    embedded=(5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
)
"""Dormand and Prince's pair of orders 5 and 4: six slopes a step."""

TABLEAUX = {"rk4": RK4, "dopri5": DOPRI5}
"""The methods by name."""
