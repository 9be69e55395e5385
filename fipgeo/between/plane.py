"""Planes in weight space: what is measured on them, and curves of weights seen in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fipgeo.between.record import Connection
from fipgeo.geodesics import Geodesic
from fipgeo.grids import Grid
from fipgeo.model import unwrapped
from fipgeo.paths import PathResult
from fipgeo.space import WeightSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = PathResult | Geodesic | Connection | Tensor | Sequence[nn.Module]
"""Weights in an order: a record of the library, networks, or flat weights `[n, D]` of all parameters."""


@dataclass(frozen=True, eq=False)
class Plane:
    """The points origin + s axes[0] + t axes[1] in weight space, with axes of length 1 at a right angle.

    Distances in the coordinates (s, t) are distances of weights.

    Attributes:
        origin: `[D]`.
        axes: `[2, D]`.

    Examples:
        >>> corners = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [1.0, 3.0, 1.0]])
        >>> Plane.through(corners).coordinates(corners).tolist()
        [[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]]
    """

    origin: Tensor = field(repr=False)
    axes: Tensor = field(repr=False)

    @classmethod
    def through(cls, points: Tensor) -> Plane:
        """The plane through three points `[3, D]`: the first at (0, 0), the second on the first axis.

        Raises:
            ValueError: Not three points, or they lie on a line.
        """
        if points.dim() != 2 or len(points) != 3:
            raise ValueError(f"points: got shape {list(points.shape)}, expected three flat points [3, D]")
        one, two = (points[1:] - points[0]).double()
        along = one / one.norm()
        across = two - (two @ along) * along
        if not float(across.norm()) > 1e-9 * float(two.norm()):
            raise ValueError("points: the three lie on one line; a plane needs a third point beside it")
        return cls(points[0], torch.stack([along, across / across.norm()]).to(points))

    @classmethod
    def principal(cls, points: Tensor) -> Plane:
        """The plane nearest to points `[n, D]` in least squares: their mean and two principal directions.

        Each axis points to the side where the last point lies of the first.

        Raises:
            ValueError: Fewer than three points, or they lie on a line.
        """
        if points.dim() != 2 or len(points) < 3:
            raise ValueError(f"points: got shape {list(points.shape)}, expected three or more flat points [n, D]")
        origin = points.double().mean(0)
        away = points.double() - origin
        values, vectors = torch.linalg.eigh(away @ away.T)  # n x n; D is much larger
        if not float(values[-2]) > 1e-14 * float(values[-1]):  # that of rounding is 1e-16 or so
            raise ValueError("points: they lie on one line, which has no second principal direction")
        axes = vectors.T[[-1, -2]] @ away
        axes = axes / axes.norm(dim=1, keepdim=True)
        turn = torch.where(axes @ (away[-1] - away[0]) < 0, -1.0, 1.0)
        return cls(origin.to(points), (turn.to(axes)[:, None] * axes).to(points))

    def coordinates(self, weights: Tensor) -> Tensor:
        """(s, t) of the points of the plane nearest to weights: `[..., D]` to `[..., 2]`."""
        return (weights - self.origin) @ self.axes.T

    def weights(self, coordinates: Tensor) -> Tensor:
        """Flat weights at coordinates: `[..., 2]` to `[..., D]`."""
        return self.origin + coordinates.to(self.axes) @ self.axes

    def scan(
        self,
        model: nn.Module,
        measure: Callable[[nn.Module], Any],
        around: Tensor,
        *,
        num: int = 15,
        margin: float = 0.25,
        name: str = "",
    ) -> Grid:
        """Measure networks on a rectangle of the plane.

        Args:
            model: A network of the shape of the weights, which are all its parameters; copied, in eval mode. Buffers,
                such as the statistics of BatchNorm, are this model's everywhere; `measure` may estimate them anew.
            measure: A network to a number: its loss on some data, or the distance of its outputs from others. Called
                without gradients.
            around: Coordinates `[n, 2]` that the rectangle encloses.
            num: Points along each side.
            margin: Room beyond them, as a share of the longer side.
            name: What is measured, with its unit.

        Returns:
            The numbers, num x num of them.

        Raises:
            ValueError: `around` is not `[n, 2]`, or num < 2.
        """
        if around.dim() != 2 or around.shape[1] != 2 or num < 2:
            raise ValueError(
                f"around, num: got {list(around.shape)} and {num}, expected coordinates [n, 2] and at least 2"
            )
        net = copy.deepcopy(unwrapped(model)).eval()
        space = WeightSpace.of(net, "*")
        low, high = around.double().amin(0), around.double().amax(0)
        room = margin * float((high - low).max())
        x, y = (torch.linspace(float(low[i]) - room, float(high[i]) + room, num) for i in (0, 1))

        def at(s: float, t: float) -> Any:
            space.assign_(net, self.weights(torch.tensor([s, t])))
            return measure(net)

        with torch.no_grad():
            return Grid.of(at, x, y, name)


@dataclass(frozen=True, eq=False)
class Projection:
    """Curves of weights, seen in the plane that is nearest to all of their points.

    Attributes:
        plane: The plane.
        curves: Coordinates of each curve by name, `[n, 2]`, in units of weights.
        explained: Share of the variance of all points along each axis, `[2]`. What is missing to 1 lies outside the
            plane and is not seen.
    """

    plane: Plane = field(repr=False)
    curves: Mapping[str, Tensor]
    explained: Tensor

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw the curves with `fipgeo.plotting.plot_path_projection`."""
        from fipgeo import plotting

        return plotting.plot_path_projection(self, ax=ax, **kwargs)


def project(model: nn.Module, curves: Mapping[str, Curve]) -> Projection:
    """Principal components of the weights along curves: paths, geodesics, polygons, lines between networks.

    Args:
        model: A network of their shape. Parameters that a curve does not move are this network's.
        curves: By name: a `PathResult` (its stored points), a `Geodesic`, a `Connection` (its corners), a sequence of
            networks, or flat weights `[n, D]` of all parameters.

    Returns:
        The curves in the plane. All points of all curves count alike.

    Raises:
        TypeError: A curve is something else.
        ValueError: The points are fewer than three or lie on a line.

    Examples:
        >>> a, b, c = (nn.Linear(3, 2) for _ in range(3))
        >>> found = project(a, {"there": [a, b], "back": [b, c, a]})
        >>> {name: list(curve.shape) for name, curve in found.curves.items()}, round(float(found.explained.sum()), 4)
        ({'there': [2, 2], 'back': [3, 2]}, 1.0)
    """
    own = unwrapped(model)
    space = WeightSpace.of(own, "*")
    start = {name: tensor.detach() for name, tensor in own.named_parameters()}
    points = {name: _points(name, curve, space, start) for name, curve in curves.items()}
    if not points:
        raise ValueError("curves: got none, expected one or more by name")
    every = torch.cat(list(points.values()))
    plane = Plane.principal(every)
    away = plane.coordinates(every)
    away = away - away.mean(0)
    total = (every - every.mean(0)).double().square().sum()
    found = {name: plane.coordinates(weights) for name, weights in points.items()}
    return Projection(plane, found, away.double().square().sum(0) / total)


def _points(name: str, curve: Any, space: WeightSpace, start: Mapping[str, Tensor]) -> Tensor:
    """The weights of a curve, `[n, D]`, of all parameters."""
    if isinstance(curve, Tensor):
        return curve.detach().to(space.device, space.dtype)
    if isinstance(curve, PathResult):
        stored = [point.tensors for point in curve if point.tensors is not None]
    elif isinstance(curve, Geodesic):
        of = curve.chart.field.space
        stored = [of.unravel(theta) for theta in curve.chart.weights(curve.points)]
    elif isinstance(curve, Connection):
        return curve.way.corners
    elif isinstance(curve, Sequence) and all(isinstance(net, nn.Module) for net in curve):
        stored = [{n: p.detach() for n, p in unwrapped(net).named_parameters()} for net in curve]
    else:
        raise TypeError(
            f"curves[{name!r}]: got a {type(curve).__name__}, expected a PathResult, Geodesic, Connection, a list of"
            " networks, or flat weights [n, D]"
        )
    return torch.stack([space.ravel(dict(start) | {n: t for n, t in one.items() if n in start}) for one in stored])
