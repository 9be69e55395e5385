"""What following a geodesic leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fipgeo.geodesics.chart import Chart
from fipgeo.linalg import Outcome
from fipgeo.model import unwrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Geodesic:
    """A geodesic at the points where its integrator stood.

    Attributes:
        chart: Coordinates, with the metric.
        damping: lambda of h = g + lambda I.
        lengths: Arc length in h of every point from the start, `[n + 1]`; the start's is 0.
        points: Coordinates, `[n + 1, r]`.
        velocities: theta', `[n + 1, r]`; of unit length in h at the start.
        speeds: |theta'|_h as measured, `[n + 1]`: 1 throughout, but for the error of the integrator.
        output_speeds: |theta'|_g, how fast the outputs move, `[n + 1]`; not constant.
        carried: Vectors carried along by parallel transport, `[n + 1, k, r]`.
        outcome: CONVERGED where the whole length was followed.
        message: What ended it, with the remedy.
        num_evaluations: Times that the equation was evaluated, a metric and a solve each.
        num_rejected: Steps that were taken back.
    """

    chart: Chart = field(repr=False)
    damping: float
    lengths: Tensor = field(repr=False)
    points: Tensor = field(repr=False)
    velocities: Tensor = field(repr=False)
    speeds: Tensor = field(repr=False)
    output_speeds: Tensor = field(repr=False)
    carried: Tensor = field(repr=False)
    outcome: Outcome
    message: str
    num_evaluations: int
    num_rejected: int

    def __len__(self) -> int:
        """Points, the start among them."""
        return len(self.points)

    @property
    def ok(self) -> bool:
        """Whether the whole length was followed."""
        return self.outcome.ok

    @property
    def end(self) -> Tensor:
        """Coordinates of the last point, `[r]`."""
        return self.points[-1]

    @property
    def arc_length(self) -> float:
        """The integral of |theta'|_h, from the measured speeds."""
        return _integral(self.speeds, self.lengths)

    @property
    def output_length(self) -> float:
        """The integral of |theta'|_g: how long a way the outputs went; by trapezoids between the points."""
        return _integral(self.output_speeds, self.lengths)

    @property
    def energy(self) -> float:
        """Half the integral of |theta'|_h^2, from the measured speeds."""
        return _integral(self.speeds.square(), self.lengths) / 2

    @property
    def speed_error(self) -> float:
        """The largest relative change of |theta'|_h along the way, which exact integration would conserve."""
        return float((self.speeds / self.speeds[0] - 1).abs().max())

    def weights(self, index: int = -1) -> Tensor:
        """The flat weights `[D]` at a point."""
        return self.chart.weights(self.points[index])

    def apply_(self, model: nn.Module, index: int = -1) -> nn.Module:
        """Write the weights at a point into a model of the same shape, in place; returns the model."""
        self.chart.field.space.assign_(unwrapped(model), self.weights(index))
        return model

    def profile(self) -> dict[str, Tensor]:
        """Numbers along the way by name, those of the horizontal axis first."""
        return {"arc length": self.lengths, "speed": self.speeds, "speed of the outputs": self.output_speeds}

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw the speeds along the way; `kwargs` go to `fipgeo.plotting.plot_profile`."""
        from fipgeo import plotting

        return plotting.plot_profile(self, ax=ax, **kwargs)


def _integral(values: Tensor, lengths: Tensor) -> float:
    return float(torch.trapezoid(values, lengths))
