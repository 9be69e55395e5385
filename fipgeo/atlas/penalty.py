r"""Penalties and bounds of coefficients that are not smooth, and the steps of a quadratic model under them.

minimise over d   g . d + d . B d / 2 + l1 |c + d|_1    with   lower <= c + d <= upper,   |D d| <= radius
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fipgeo.atlas.region import Curvature

ITERATIONS = 1000
"""Proximal steps for one step of the model, at most."""


@dataclass(frozen=True)
class Penalty:
    """l1 |c|_1 for coefficients between two bounds.

    Attributes:
        l1: Weight of the sum of absolute values, at least 0.
        lower: Of every coefficient.
        upper: The same.

    Raises:
        ValueError: The weight is negative, or no number lies between the bounds.

    Examples:
        >>> Penalty(0.5, lower=0.0).near(torch.tensor([-1.0, 0.4, 2.0]), 1.0)
        tensor([0.0000, 0.0000, 1.5000])
    """

    l1: float = 0.0
    lower: float = -math.inf
    upper: float = math.inf

    def __post_init__(self) -> None:
        if not self.l1 >= 0 or not self.lower <= self.upper:
            raise ValueError(
                f"l1, bounds: got {self.l1} and ({self.lower}, {self.upper}), expected at least 0 and a lower bound no"
                " larger than the upper one"
            )

    @property
    def free(self) -> bool:
        """Whether there is nothing to be minded."""
        return self.l1 == 0 and self.lower == -math.inf and self.upper == math.inf

    def __call__(self, c: Tensor) -> float:
        """l1 |c|_1."""
        return self.l1 * float(c.double().abs().sum()) if self.l1 else 0.0

    def near(self, c: Tensor, weight: Tensor | float) -> Tensor:
        """The proximal map: what minimises weight * penalty(x) + |x - c|^2 / 2 between the bounds, entry by entry."""
        return (c.sign() * (c.abs() - weight * self.l1).clamp(min=0)).clamp(self.lower, self.upper)

    def step(self, curvature: Curvature, slope: Tensor, c: Tensor, radius: float) -> Tensor:
        """The step d `[r]` from coefficients between the bounds; one that is too long is cut to the radius.

        By accelerated proximal gradients in the scale of the metric, begun anew where the model would rise.

        Source: Beck & Teboulle, A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems, 2009;
        O'Donoghue & Candes, Adaptive Restart for Accelerated Gradient Schemes, 2015.
        """
        if self.free:
            return curvature.step(slope, radius)
        inverse = curvature.scale.reciprocal()
        bound = float(torch.linalg.matrix_norm(curvature.rows * inverse, 2)) ** 2
        size = inverse.square() / (bound + curvature.ridge * float(inverse.max()) ** 2 + 1e-300)
        d, ahead, momentum = torch.zeros_like(c), torch.zeros_like(c), 1.0
        best = self.change(curvature, slope, c, d)
        for _ in range(ITERATIONS):
            tried = self.near(c + ahead - size * (slope + curvature(ahead)), size) - c
            length = curvature.length(tried)
            tried = tried * min(1.0, radius / length) if length > 0 else tried
            found = self.change(curvature, slope, c, tried)
            if found > best and momentum > 1:
                ahead, momentum = d, 1.0
                continue
            if not found < best - 1e-12 * abs(best):
                break
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = tried + (momentum - 1) / following * (tried - d)
            d, best, momentum = tried, found, following
        return d

    def moved(self, c: Tensor, d: Tensor) -> Tensor:
        """The end c + d without its rounding: between the bounds, and 0 where a step goes to 0."""
        end = (c + d).clamp(self.lower, self.upper)
        return end.where(end.abs() > 1e-12 * c.abs(), 0.0) if self.l1 else end

    def change(self, curvature: Curvature, slope: Tensor, c: Tensor, d: Tensor) -> float:
        """What the model says of a step, the penalty included."""
        return curvature.change(slope, d) + self(c + d) - self(c)
