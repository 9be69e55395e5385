"""What connecting two networks leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.model import unwrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Way:
    """A polygon in weight space from one network to another, and how to evaluate the networks on it.

    Attributes:
        function: Embedded outputs on the inputs that normalisation statistics are re-estimated on.
        corners: Its corners at even times in [0, 1], `[m, D]`; the first is a, the last b.
        buffers: The floating buffers of a and of b, by name.
    """

    function: EmbeddedOutputs = field(repr=False)
    corners: Tensor = field(repr=False)
    buffers: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = field(repr=False)

    def at(self, t: float | Tensor) -> Tensor:
        """The weights at a time between 0 and 1, `[D]`; differentiable by the corners."""
        place = float(t) * (len(self.corners) - 1)
        left = min(int(place), len(self.corners) - 2)
        return torch.lerp(self.corners[left], self.corners[left + 1], place - left)

    def buffers_at(self, t: float) -> dict[str, Tensor]:
        """Buffers at a time: those of a and b at the ends.

        Between, a straight line between them, with statistics of BatchNorm re-estimated at the weights there.
        """
        first, last = self.buffers
        if t in (0, 1):
            return dict(last if t else first)
        found = {name: torch.lerp(first[name], last[name], float(t)) for name in first}
        model = self.function.map.with_buffers(found)
        return found | (model.statistics(self.at(t), self.function.batches) if model.normalisers else {})


@dataclass(frozen=True, eq=False)
class Connection:
    """A path between two networks, as measured on held-out inputs beside the straight line of the weights.

    The path of least energy moves the outputs evenly along z*(t), the geometry's geodesic between those of the ends.

    Attributes:
        way: The path.
        times: Where it was measured, in [0, 1], `[n]`.
        drift: Root mean square over inputs of |z - z*(t)|, z the embedded outputs there, in units of the spread of a's
            outputs (their root mean square distance from their mean), `[n]`; 0 at the ends.
        straight_drift: The same on the straight line of the weights.
        changed: Share of inputs whose prediction is neither a's nor b's, `[n]`; NaN where outputs predict nothing.
        straight_changed: The same on the straight line.
        energy: Mean over inputs of the sum over steps of d_i^2 / (t_{i+1} - t_i), d_i the distance of the outputs at
            the two ends of a step (see `Geometry.distance`).
        straight_energy: The same on the straight line.
        least_energy: The squared distance of the ends' outputs, a mean over inputs: no path between them has less.
        history: What was minimised, step after step: the energy of z - z* on the minibatch.
        num_held_out: Inputs that were measured on.
    """

    way: Way = field(repr=False)
    times: Tensor = field(repr=False)
    drift: Tensor = field(repr=False)
    straight_drift: Tensor = field(repr=False)
    changed: Tensor = field(repr=False)
    straight_changed: Tensor = field(repr=False)
    energy: float
    straight_energy: float
    least_energy: float
    history: Tensor = field(repr=False)
    num_held_out: int

    @property
    def largest_drift(self) -> float:
        """The largest drift along the path."""
        return float(self.drift.max())

    @property
    def straight_largest_drift(self) -> float:
        """The largest drift along the straight line of the weights."""
        return float(self.straight_drift.max())

    def __str__(self) -> str:
        """The measured statement."""
        return (
            f"largest drift {self.largest_drift:.3g} along the path, {self.straight_largest_drift:.3g} along the"
            f" straight line; energy {self.energy:.3g} and {self.straight_energy:.3g}, at least"
            f" {self.least_energy:.3g}; on {self.num_held_out} held-out inputs at {len(self.times)} points"
        )

    def at(self, t: float) -> Tensor:
        """The flat weights `[D]` at a time between 0 (a) and 1 (b).

        Raises:
            ValueError: The time is not between 0 and 1.
        """
        if not 0 <= t <= 1:
            raise ValueError(f"t: got {t}, expected a time between 0 (the first network) and 1 (the second)")
        return self.way.at(t)

    def apply_(self, model: nn.Module, t: float) -> nn.Module:
        """Write the network at a time into a model of the same shape, its buffers too, in place; returns the model."""
        own = unwrapped(model)
        self.way.function.map.space.assign_(own, self.at(t))
        buffers = dict(own.named_buffers())
        for name, value in self.way.buffers_at(t).items():
            buffers[name].copy_(value)
        return model

    def profile(self) -> dict[str, Tensor]:
        """Numbers along the path by name, those of the horizontal axis first."""
        return {"position": self.times, "drift": self.drift, "drift of the straight line": self.straight_drift}

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw the drift along the path and along the straight line; `kwargs` go to `fipgeo.plotting.plot_profile`."""
        from fipgeo import plotting

        return plotting.plot_profile(self, ax=ax, **kwargs)
